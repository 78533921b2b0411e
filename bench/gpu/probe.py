"""What the machine is and what its hardware does at best: the roofs that other figures are compared with."""

import ctypes
import glob
import importlib.metadata
import shutil
import subprocess
import time

import torch

from bench.measure import copy_bandwidth, time_calls

QUERY = ("name", "driver_version", "memory.total", "power.limit", "clocks.max.sm", "clocks.max.mem", "temperature.gpu")
DURING = ("clocks.sm", "power.draw", "temperature.gpu", "clocks_event_reasons.active")
CODECS = {"MPEG2": 1, "MPEG4": 2, "H264": 4, "JPEG": 5, "HEVC": 8, "VP8": 9, "VP9": 10, "AV1": 11}
FORMATS = {(1, 0): "4:2:0 8 bit", (1, 2): "4:2:0 10 bit", (2, 0): "4:2:2 8 bit", (3, 0): "4:4:4 8 bit"}
PACKAGES = ("av", "bitsandbytes", "flash_attn", "liger_kernel", "nvidia-dali-cuda130", "quack-kernels", "torchcodec")


def ask_smi(fields):
    """{field: text} of the first GPU, from nvidia-smi; empty where it cannot say."""
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip().splitlines()
    return dict(zip(fields, (word.strip() for word in found[0].split(",")))) if found else {}


def card(small):
    """The card, its driver, and what else is there."""
    row = {
        "row": "card",
        **ask_smi(QUERY),
        "nvcc": bool(shutil.which("nvcc")),
        "gcc": bool(shutil.which("gcc")),
        "packages": {name: _version(name) for name in PACKAGES if _version(name)},
    }
    if torch.cuda.is_available():
        about = torch.cuda.get_device_properties(0)
        row |= {
            "cuda": torch.version.cuda,
            "capability": f"{about.major}.{about.minor}",
            "multiprocessors": about.multi_processor_count,
            "l2_bytes": about.L2_cache_size,
            "memory_bytes": about.total_memory,
            "free_bytes": torch.cuda.mem_get_info()[0],
        }
    yield row


def _version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


class _DecoderCapabilities(ctypes.Structure):
    """CUVIDDECODECAPS of NVIDIA's Video Codec SDK."""

    _fields_ = [
        ("codec", ctypes.c_int),
        ("chroma", ctypes.c_int),
        ("depth_minus_8", ctypes.c_uint),
        ("reserved1", ctypes.c_uint * 3),
        ("supported", ctypes.c_ubyte),
        ("engines", ctypes.c_ubyte),
        ("formats", ctypes.c_ushort),
        ("max_width", ctypes.c_uint),
        ("max_height", ctypes.c_uint),
        ("max_macroblocks", ctypes.c_uint),
        ("min_width", ctypes.c_ushort),
        ("min_height", ctypes.c_ushort),
        ("reserved2", ctypes.c_uint * 16),
    ]


def decoder(small):
    """The hardware decoder's library, its codecs and engines."""
    folders = ("/usr/local/nvidia", "/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/local/cuda")
    files = [path for folder in folders for path in glob.glob(f"{folder}/**/libnvcuvid.so*", recursive=True)]
    library, errors = None, []
    for name in ("libnvcuvid.so.1", "libnvcuvid.so", *files):
        try:
            library = ctypes.CDLL(name)
            break
        except OSError as error:
            errors.append(str(error))
    row = {"row": "decoder", "files": files, "loaded": library is not None}
    if library is None:
        yield row | {"reason": errors[0] if errors else "no libnvcuvid"}
        return
    torch.zeros(1, device="cuda")
    codecs = {}
    for codec, number in CODECS.items():
        for (chroma, depth), text in FORMATS.items():
            asked = _DecoderCapabilities(codec=number, chroma=chroma, depth_minus_8=depth)
            if library.cuvidGetDecoderCaps(ctypes.byref(asked)) == 0 and asked.supported:
                codecs[f"{codec} {text}"] = {"engines": asked.engines, "max": [asked.max_width, asked.max_height]}
    yield row | {"codecs": codecs}


def copies(small):
    """Bandwidth of a copy on the device, and between host and device."""
    if not torch.cuda.is_available():
        yield {"row": "copy", "bytes_per_second": _host_copy(2**20)}
        return
    yield {"row": "copy", "bytes_per_second": copy_bandwidth(small)}
    for pinned in (True, False):
        size = 2**28
        host, device = (
            torch.empty(size, dtype=torch.uint8, pin_memory=pinned),
            torch.empty(size, dtype=torch.uint8, device="cuda"),
        )
        host.fill_(1)
        for name, target, source in (("host to device", device, host), ("device to host", host, device)):
            times = []
            for _ in range(3):
                torch.cuda.synchronize()
                begin = time.perf_counter()
                target.copy_(source)
                torch.cuda.synchronize()
                times.append(time.perf_counter() - begin)
            yield {"row": f"{name}, {'pinned' if pinned else 'pageable'}", "bytes_per_second": size / min(times)}


def _host_copy(size):
    source, target = torch.ones(size, dtype=torch.uint8), torch.empty(size, dtype=torch.uint8)
    begin = time.perf_counter()
    target.copy_(source)
    return 2 * size / (time.perf_counter() - begin)


def products(small, seconds=10.0):
    """Rate of a large bf16 product in a burst and after `seconds`, and of the products of a 7B decoder layer."""
    yield from _large_product(8192 if torch.cuda.is_available() else 64, 0.0 if small else seconds)
    yield from layer_products(small)


def _large_product(n, seconds):
    on_gpu = torch.cuda.is_available()
    a, b = (torch.randn(n, n, device="cuda" if on_gpu else "cpu").to(torch.bfloat16) for _ in range(2))

    def rate():
        return 2 * n**3 / _median(lambda x: lambda: x @ b, [(a,)], on_gpu)

    yield {"row": "product, burst", "flops_per_second": rate()}
    if not on_gpu or not seconds:
        return
    done, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        for _ in range(50):
            a @ b
        torch.cuda.synchronize()
        done += 50
    mean = done * 2 * n**3 / (time.perf_counter() - begin)
    yield {
        "row": "product, sustained",
        "flops_per_second": rate(),
        "after_seconds": seconds,
        "mean_flops_per_second": mean,
        **ask_smi(DURING),
    }


def layer_products(small):
    """Of a LLaMA 7B layer: QKV, output, gate and up, down; forward (x·Wᵀ) and the rows' gradient (g·W)."""
    on_gpu = torch.cuda.is_available()
    device, scale = ("cuda", 1) if on_gpu else ("cpu", 64)
    hidden, wide = 4096 // scale, 11008 // scale
    shapes = {"qkv": (hidden, 3 * hidden), "o": (hidden, hidden), "gate_up": (hidden, 2 * wide), "down": (wide, hidden)}
    for rows in (6400, 6640, 8448, 16896) if on_gpu else (64,):
        total, work, row = 0.0, 0, {"row": f"products of a layer, {rows} rows, bf16"}
        for name, (inputs, outputs) in shapes.items():
            weight = torch.randn(outputs, inputs, device=device).to(torch.bfloat16)
            for way, columns, call in (
                ("forward", inputs, lambda x: lambda: x @ weight.T),
                ("backward", outputs, lambda g: lambda: g @ weight),
            ):
                x = torch.randn(rows, columns, device=device).to(torch.bfloat16)
                seconds, flops = _median(call, [(x,), (x.clone(),)], on_gpu, rounds=10), 2 * rows * inputs * outputs
                row[f"{name} {way} TFLOP/s"] = round(flops / seconds / 1e12, 1)
                total, work = total + seconds, work + flops
        yield row | {"flops_per_second": work / total, "seconds": total}
    if on_gpu and torch.cuda.get_device_capability() >= (8, 9):
        for rows in (6640, 8448, 16896):
            yield from _fp8_products(rows, shapes)


def _fp8_products(rows, shapes):
    total, work, row = 0.0, 0, {"row": f"products of a layer, {rows} rows, fp8"}
    for name, (inputs, outputs) in shapes.items():
        for way, K, M in (("forward", inputs, outputs), ("backward", outputs, inputs)):
            weight = torch.randn(M, K, device="cuda").to(torch.float8_e4m3fn)
            x = torch.randn(rows, K, device="cuda").to(torch.float8_e4m3fn)
            scales = torch.ones(rows, 1, device="cuda"), torch.ones(1, M, device="cuda")
            seconds = _median(
                lambda a: (
                    lambda: torch._scaled_mm(
                        a, weight.T, scale_a=scales[0], scale_b=scales[1], out_dtype=torch.bfloat16, use_fast_accum=True
                    )
                ),
                [(x,), (x.clone(),)],
                True,
                rounds=10,
            )
            row[f"{name} {way} TFLOP/s"] = round(2 * rows * K * M / seconds / 1e12, 1)
            total, work = total + seconds, work + 2 * rows * K * M
    yield row | {"flops_per_second": work / total, "seconds": total}


def _median(prepare, copies, on_gpu, rounds=20):
    times = time_calls(prepare, copies, rounds=rounds, seconds=1.0, on_cuda=on_gpu)
    return torch.tensor(times, dtype=torch.float64).median().item()
