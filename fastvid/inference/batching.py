"""Many answers at once: prompts join a running batch as soon as there is room, and leave it as their answers end.

A prompt passes the decoder packed, as in training, and what several prompts have in common up to the end of their video
passes it once. After that each step takes one token of every answer. Keys and values of all answers lie in one buffer,
a run of rows for each, so that attention reads them where they are. Those of a beginning that prompts have in common
lie there once, in the run of the first of them, which stays until the last has ended.

Dimensions: B answers, N packed rows, P rows that are written, D channels of the decoder, V tokens of the vocabulary.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import chain
from typing import Any

import torch

from fastvid.batch import AttentionLayout, VideoTokens
from fastvid.data.conversation import EncodedSample
from fastvid.data.packing import Chain, pack, ranges
from fastvid.inference.generate import is_greedy, next_token, rows_left
from fastvid.inference.requests import Request, Running, Waiting, free_run
from fastvid.model.cache import LayerCache, RowPool
from fastvid.model.decoding import DecodingLayout
from fastvid.model.video_llava import VideoLlava


class Batcher:
    """Answers to many prompts, of a model that is not sharded.

    In fp32 the answers are those of `generate`, prompt by prompt; in bf16 products of one row and of many are rounded
    differently, and a near tie may fall either way.

    Args:
        model: `VideoLlava`.
        tokens: its `VideoTokens`.
        stops: ids that end an answer; they are not part of what is returned.
        at_once: most answers that are continued together.
        cache_bytes: of all keys and values.
        prefill_rows: most rows of prompts that join in one step, unless a single one has more.
        keep_beginnings: keep the beginning of prompts, up to the end of their video, for later ones, until its room
            is needed. What was not used for longest goes first.
        flag_prefix: of the names of flags in messages.

    Attributes:
        row_bytes: of one row of keys and values, of all layers.
        found: how many prompts had a beginning that was there already.
        failed: {key: why} of the requests that the last `step` ended without an answer.
    """

    def __init__(
        self,
        model: VideoLlava,
        tokens: VideoTokens,
        *,
        stops: Collection[int],
        at_once: int = 32,
        cache_bytes: int,
        prefill_rows: int = 8192,
        keep_beginnings: bool = False,
        flag_prefix: str = "",
    ):
        sizes = model.config.decoder
        self.row_bytes = 2 * sizes.num_layers * sizes.num_kv_heads * sizes.head_dim * model.precision.compute.itemsize
        self._rows = min(cache_bytes // self.row_bytes, at_once * sizes.context)
        self._model, self._tokens, self._stops = model, tokens, stops
        self._device = model.embed.weight.device
        self._at_once, self._prefill_rows, self._keep = at_once, prefill_rows, keep_beginnings
        self._flag_prefix = flag_prefix
        self.found, self.failed = 0, {}
        self.reset()

    def reset(self) -> None:
        """Forget all requests and beginnings, and free the buffer."""
        self._pool = RowPool(self._model.config.decoder.num_layers, self._rows)
        self._waiting, self._running = deque(), []
        self._runs = []  # in the order of their rows
        self._bases = {}  # {beginning: the run that holds it}; what was used last is the last

    def __len__(self) -> int:
        """Requests that are not answered yet."""
        return len(self._waiting) + len(self._running)

    @property
    def kept_bytes(self) -> int:
        """Of the beginnings that are kept for later prompts alone."""
        return self.row_bytes * sum(run.stop - run.first for run in self._runs if not run.users)

    def running(self) -> Iterator[tuple[Any, list[int]]]:
        """(key, ids so far) of the answers that are being continued; the lists grow with each `step`."""
        return ((each.waiting.request.key, each.answer) for each in self._running)

    def cancel(self, key: Any) -> None:
        """Give up the request of a key, between steps. One that has ended, or never was, is none."""
        self._waiting = deque(each for each in self._waiting if each.request.key != key)
        for each in [each for each in self._running if each.waiting.request.key == key]:
            self._running.remove(each)
            self._leave(each)

    def check(self, request: Request) -> int:
        """Tokens that its answer may have.

        Raises:
            ValueError: a negative temperature, a prompt as long as the model's context, or one whose keys and values do
                not fit the buffer.
        """
        if request.temperature < 0:
            raise ValueError(f"temperature {request.temperature}: 0 is greedy, higher is more random")
        prompt = len(request.token_ids)
        new_tokens = min(request.max_new_tokens, rows_left(self._model.config.decoder.context, prompt))
        if prompt + new_tokens > self._rows:
            raise ValueError(
                f"a prompt of {prompt} tokens and an answer of {new_tokens} need "
                f"{(prompt + new_tokens) * self.row_bytes / 2**30:.2g} GiB for keys and values, there are "
                f"{self._rows * self.row_bytes / 2**30:.2g}: raise --{self._flag_prefix}kv_cache_gib, or lower "
                f"--{self._flag_prefix}max_new_tokens"
            )
        return new_tokens

    def add(self, request: Request) -> None:
        """Let a request wait for its turn.

        Raises:
            ValueError: as `check`.
        """
        new_tokens, prompt = self.check(request), len(request.token_ids)
        chain = Chain(self._sample(request), self._tokens, share=True)
        end = max(chain.shareable, default=0)
        self._waiting.append(Waiting(request, prompt, new_tokens, end, chain.beginning(end) if end else ()))

    def run(
        self, requests: Iterable[Request], lost: Callable[[Any, Exception], object] | None = None
    ) -> Iterator[tuple[Any, list[int]]]:
        """(key, ids of the answer) of every request, as the answers end.

        Requests are taken when they are due, so that few videos' features lie in memory.

        Args:
            lost: told (key, why) of a request that ends without an answer; None: that is raised.

        Raises:
            ArithmeticError: there is no token for one of them, as `step` has it.
        """
        for request in requests:
            self.add(request)
            while len(self._waiting) >= self._at_once:
                yield from self._step_of_all(lost)
        while len(self):
            yield from self._step_of_all(lost)

    def _step_of_all(self, lost):
        yield from self.step()
        for key, why in self.failed.items():
            if lost is None:
                raise why
            lost(key, why)

    @torch.inference_mode()
    def step(self) -> list[tuple[Any, list[int]]]:
        """Let in whom there is room for, and take one token of every answer; returns (key, ids) of those that ended.

        A request whose next token is not told (logits that are not finite) is ended as well, and is `failed`.
        """
        self.failed = {}
        joining = self._with_room()
        ended = self._begin(joining) if joining else []
        return ended + (self._continue() if self._running else [])

    def _with_room(self):
        """Those that join now, in the order in which they wait."""
        joining, prompt_rows = [], 0
        while self._waiting and len(self._running) + len(joining) < self._at_once:
            waiting = self._waiting[0]
            room = self._room_for(waiting)
            if room is None:
                break
            own, base = room
            prompt_rows += waiting.prompt - (0 if base is None else waiting.end)
            if joining and prompt_rows > self._prefill_rows:
                break
            self._waiting.popleft()
            self._runs = sorted([*self._runs, own], key=lambda run: run.first)
            self.found += base is not None
            if waiting.end:
                self._bases.pop(waiting.beginning, None)
                base = self._bases[waiting.beginning] = base or own
            for run in {own, base} - {None}:
                run.users += 1
            joining.append(Running(waiting, own, base, waiting.prompt, self._generator(waiting)))
        return joining

    def _room_for(self, waiting):
        """(a run for what it alone needs, the run of its beginning or None), for which beginnings that nobody uses are
        given up; None without room."""
        there = self._bases.get(waiting.beginning) if waiting.end else None
        choices = [] if there is None else [(waiting.rows - waiting.end, there)]
        if there is None or not there.users:  # its beginning may be what is in the way
            choices.append((waiting.rows, None))
        for rows, base in choices:
            if free_run([run for run in self._runs if run.users or run is base], rows, self._rows) is None:
                continue
            while (own := free_run(self._runs, rows, self._rows)) is None:
                idle = next(key for key, run in self._bases.items() if not run.users and run is not base)
                self._runs.remove(self._bases.pop(idle))
            return own, base
        return None

    def _leave(self, running):
        """Free the runs that nobody needs any more."""
        for run in {running.own, running.base} - {None}:
            run.users -= 1
        base, waiting = running.base, running.waiting
        if base is not None and not base.users:
            if self._keep:
                base.stop = base.first + waiting.end
            else:
                del self._bases[waiting.beginning]
        kept = self._bases.values() if self._keep else ()
        self._runs = [run for run in self._runs if run.users or run in kept]

    def _begin(self, joining):
        """Compute prompts into the buffer; returns those whose first token ended them."""
        new = {each.own for each in joining}
        groups = {}  # by the run of a beginning that is there already; None: with all that they begin with
        for each in joining:
            groups.setdefault(each.base if each.base not in new else None, []).append(each)
        rows = [self._whole(group) if base is None else self._behind(base, group) for base, group in groups.items()]
        return self._take([each for group in groups.values() for each in group], self._model.logits(torch.cat(rows)))

    def _whole(self, group):
        """The last rows of whole prompts, [B, D]; what they have in common is computed once."""
        model = self._model
        samples = [(self._sample(each.waiting.request), each.waiting.request.videos) for each in group]
        batch = pack(samples, self._tokens, model.config.channels, share=True, branches=False).to(self._device)
        cache = [LayerCache(batch.num_rows) for _ in model.decoder.layers]
        h_BD = model.decoder(
            model.splice(batch),
            batch.positions,
            batch.layout,
            cache,
            supervised=(batch.loss_rows, batch.loss_layout),
        )
        prompts = [each.waiting.prompt for each in group]
        skipped = [each.waiting.end if each.behind else 0 for each in group]
        starts = [sum(prompts[:i]) + skip for i, skip in enumerate(skipped)]
        sizes = [prompt - skip for prompt, skip in zip(prompts, skipped)]
        wanted = torch.from_numpy(ranges(starts, sizes)).to(self._device)
        assert batch.loss_layout is not None and batch.loss_layout.kv_rows is not None, "a batch that `pack` made"
        self._write(batch.loss_layout.kv_rows[wanted], [each.own.first for each in group], sizes, cache)
        return h_BD

    def _behind(self, base, group):
        """The same, of prompts whose beginning is there: only what is behind it is computed."""
        model, end = self._model, group[0].waiting.end
        tails = [each.waiting.request.token_ids[end:] for each in group]
        sizes = [len(tail) for tail in tails]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        kv_rows = ranges(
            [row for start in starts for row in (0, end + start)], [n for size in sizes for n in (end, size)]
        )
        layout = AttentionLayout.of_lengths(sizes, [end + size for size in sizes], torch.from_numpy(kv_rows))
        token_ids = torch.tensor(list(chain.from_iterable(tails)), device=self._device)
        x_ND = model.embed.weight[token_ids].to(model.precision.residual)
        positions = torch.from_numpy(ranges([end] * len(group), sizes)).int().to(self._device)
        cache = [LayerCache(len(x_ND)) for _ in model.decoder.layers]
        h_ND = model.decoder(
            x_ND,
            positions,
            layout.map(lambda rows: rows.to(self._device)),
            cache,
            prefix=self._pool.views(base.first, base.first + end),
        )
        self._write(torch.arange(len(x_ND), device=self._device), [each.own.first for each in group], sizes, cache)
        return h_ND[torch.tensor(sizes, device=self._device).cumsum(0) - 1]

    def _write(self, rows_P, starts, sizes, cache):
        """Put `rows_P` of a cache of packed rows into runs of the buffer."""
        places_P = torch.from_numpy(ranges(starts, sizes)).to(self._device)
        for layer, packed in zip(self._pool.layers, cache, strict=True):
            layer.write(places_P, *(buffer.index_select(0, rows_P) for buffer in packed.buffers))

    def _continue(self):
        """One token more of each answer; returns those that ended."""
        running, layout = self._in_order()
        tokens_B, places_B, positions_B = torch.tensor(
            [(each.answer[-1], each.next_row, each.length) for each in running]
        ).T.to(self._device)
        x_BD = self._model.embed.weight[tokens_B].to(self._model.precision.residual)
        self._pool.aim(places_B, max(run.stop for run in self._runs))
        h_BD = self._model.decoder(
            x_BD,
            positions_B.int(),
            layout.map(lambda rows: rows.to(self._device, non_blocking=True)),
            self._pool.layers,
        )
        for each in running:
            each.length += 1
        self._running = []
        return self._take(running, self._model.logits(h_BD))

    def _in_order(self):
        """(who runs, those ahead whose rows are one run and nobody else's; the layout of their next rows)."""
        by_base = {}
        for each in self._running:
            by_base.setdefault(each.base or each.own, []).append(each)
        groups = [group for group in by_base.values() if len(group) > 1 or group[0].behind]
        grouped = {each for group in groups for each in group}
        alone = sorted((each for each in self._running if each not in grouped), key=lambda each: each.own.first)
        ordered = alone + [each for group in groups for each in group]
        return ordered, DecodingLayout.of(
            [(each.own.first, each.length + 1) for each in alone],
            [
                (
                    (group[0].base.first, end := group[0].waiting.end),
                    [(each.next_row - each.length + end, each.length - end + 1) for each in group],
                )
                for group in groups
            ],
        )

    def _take(self, running, logits_BV):
        """Add the next token of each; those that go on run, the others' (key, ids) are returned."""
        # The likeliest of what is no number would be some token; a draw would end every computation on a GPU.
        usable_B, greedy_B = torch.stack([logits_BV.amax(-1).isfinite().long(), logits_BV.argmax(-1)]).tolist()
        ended = []
        for each, logits_V, token, usable in zip(running, logits_BV, greedy_B, usable_B):
            waiting = each.waiting
            request = waiting.request
            if not usable:
                self.failed[request.key] = ArithmeticError("there is no next token: the logits are not finite")
                self._leave(each)
                continue
            if each.generator is not None:
                token = next_token(logits_V, request.temperature, each.generator, request.top_p).item()
            if token not in self._stops:
                each.answer.append(token)
            if token in self._stops or len(each.answer) == waiting.new_tokens:
                ended.append((waiting.request.key, each.answer))
                self._leave(each)
            else:
                self._running.append(each)
        return ended

    def _sample(self, request):
        """The prompt as a sample of which the last row is supervised: what it must predict is no part of the prompt,
        and any token may stand for it."""
        ids = request.token_ids
        return EncodedSample(
            str(request.key), [*ids, 0], [(len(ids), len(ids) + 1)], [request.video] * len(request.videos)
        )

    def _generator(self, waiting):
        if is_greedy(waiting.request.temperature):
            return None
        return torch.Generator(self._device).manual_seed(waiting.request.seed)
