"""How a call is checked and timed, on a GPU and on a CPU, and the roofs that its speed is compared with."""

import time
from itertools import cycle, islice

import torch

ROUNDS = 50
# A row whose calls take seconds (the reference's chain on the CPU) stops here, with at least SLOW_ROUNDS of them.
ROW_SECONDS, SLOW_ROUNDS = 8.0, 5
# The device waits this many cycles (about a millisecond) while the host queues, or twice as long as that took the last
# time if this is more: no launch gap is timed.
HEAD_START, LONGEST_START, CYCLES_PER_SECOND = 2_000_000, 20_000_000, 2e9
# Largest error of an element, relative to itself and to the root mean square of all: two units in the last place
# (one of e4m3's).
TOLERANCE = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 2e-5, torch.float8_e4m3fn: 2**-3}


def worst_error(found, expected):
    """Largest error of an element among a call's tensors, as `assert_agree` measures it; NaN where one is NaN."""
    found, expected = (x if isinstance(x, tuple) else (x,) for x in (found, expected))
    return max((_errors(a, b).max().item() for a, b in zip(found, expected) if a.numel()), default=0.0)


def _errors(a, b):
    a, b = a.detach().to(b.device, torch.float32), b.detach().float()
    return (a - b).abs() / (b.abs() + b.square().mean().sqrt() + 1e-30)


def assert_agree(found, expected, tolerance=None):
    """Compare a call's tensors with those of the plain reference in fp32 (or wider), element by element."""
    found, expected = (x if isinstance(x, tuple) else (x,) for x in (found, expected))
    assert len(found) == len(expected), f"{len(found)} results instead of {len(expected)}"
    for place, (a, b) in enumerate(zip(found, expected)):
        assert a.shape == b.shape, f"result {place}: {list(a.shape)} instead of {list(b.shape)}"
        limit, error = tolerance or TOLERANCE[a.dtype], _errors(a, b)
        assert bool((error <= limit).all()), (  # NaN is not below any limit
            f"result {place}: error {error.max().item():.3g} in {list(a.shape)}, at most {limit:.3g} is allowed"
        )


def time_calls(prepare, copies, *, rounds=ROUNDS, seconds=ROW_SECONDS, on_cuda):
    """Seconds of each of `rounds` calls, or of fewer where calls are slow.

    Args:
        prepare: inputs → a call without arguments. Preparing (a forward before a timed backward) is not timed.
        copies: sets of inputs taken in turn, together larger than the caches (see `copies_needed`).
        seconds: for all calls; once they are spent, SLOW_ROUNDS are enough.
        on_cuda: time by events on the device, else by the host's clock.
    """
    timed = _OnDevice() if on_cuda else _time_on_host
    timed(prepare, copies)  # compilation, allocation
    times = []
    while len(times) < rounds and not (len(times) >= SLOW_ROUNDS and sum(times) > seconds):
        times += timed(prepare, list(islice(cycle(copies), rounds - len(times)))[: len(copies)])
    return times


class _OnDevice:
    """Times calls by events on the device. It keeps how long a head start the host needs to queue them all."""

    def __init__(self):
        self.head_start = HEAD_START

    def __call__(self, prepare, copies):
        calls = [prepare(*inputs) for inputs in copies]
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in calls]
        torch.cuda.synchronize()
        torch.cuda._sleep(self.head_start)
        started = time.perf_counter()
        for call, (begin, end) in zip(calls, events):
            begin.record()
            call()
            end.record()
        queued = time.perf_counter() - started
        torch.cuda.synchronize()
        self.head_start = min(max(HEAD_START, int(2 * queued * CYCLES_PER_SECOND)), LONGEST_START)
        return [begin.elapsed_time(end) / 1e3 for begin, end in events]


def _time_on_host(prepare, copies):
    times = []
    for inputs in copies:
        call = prepare(*inputs)
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return times


def copies_needed(inputs):
    """Sets of inputs that together exceed three times the device's L2, so that none is found there."""
    held = sum(x.nbytes for x in inputs if isinstance(x, torch.Tensor))
    cache = torch.cuda.get_device_properties().L2_cache_size if torch.cuda.is_available() else 64 * 2**20
    return min(16, max(2, -(-3 * cache // max(held, 1))))


def peak_extra_bytes(call):
    """Device memory that a call takes at its peak beyond what was held before, its result included."""
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - held


def copy_bandwidth(small=False):
    """Bytes read and written per second by a device-to-device copy, the roof of every kernel that moves bytes."""
    count = 2**20 if small else 2**30
    copies = [
        (
            torch.empty(count, dtype=torch.uint8, device="cuda"),
            torch.randint(256, (count,), dtype=torch.uint8, device="cuda"),
        )
        for _ in range(2)
    ]
    return 2 * count / _median(time_calls(lambda out, x: lambda: out.copy_(x), copies, on_cuda=True))


def matmul_rate(small=False):
    """FLOP per second of a large bf16 matrix product on random data, the roof of what multiplies matrices."""
    n = 512 if small else 8192
    copies = [tuple(torch.randn(n, n, dtype=torch.bfloat16, device="cuda") for _ in range(2)) for _ in range(2)]
    return 2 * n**3 / _median(time_calls(lambda a, b: lambda: a @ b, copies, on_cuda=True))


def _median(times):
    return torch.tensor(times, dtype=torch.float64).quantile(0.5).item()


class Replay:
    """A clock that shows times measured before, for `benchmark.pedantic`: pytest-benchmark's own clock is the host's.

    As the ``timer`` of a benchmark it is read twice a round; the second reading is later by the round's time.
    """

    __name__ = "measured"

    def __init__(self):
        self._readings = iter(())

    def load(self, times):
        readings, now = [], 0.0
        for seconds in times:
            readings += [now, now + seconds]
            now += seconds
        self._readings = iter(readings)

    def __call__(self):
        return next(self._readings)
