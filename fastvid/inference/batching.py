"""Many answers at once: prompts join a running batch as soon as there is room, and leave it as their answers end.

A prompt passes the decoder packed, as in training, and what several prompts have in common up to the end of their video
passes it once. After that each step takes one token of every answer. Keys and values of all answers lie in one buffer,
a run of rows for each, so that attention reads them where they are.

Dimensions: B answers, N packed rows, P rows that are written, R rows of a video, C channels of the vision tower, D
channels of the decoder, V tokens of the vocabulary.
"""

from collections import deque
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastvid.batch import AttentionLayout, VideoTokens
from fastvid.data.conversation import EncodedSample
from fastvid.data.packing import Chain, pack, ranges
from fastvid.inference.generate import next_token, rows_left
from fastvid.model.cache import LayerCache, RowPool


@dataclass(frozen=True, eq=False)
class Request:
    """A prompt to be continued.

    Attributes:
        key: what its answer is returned with.
        token_ids: of the prompt.
        features_RC: of its video; None of a prompt without one.
        video: name of the features: prompts of the same name have the same.
        max_new_tokens: longest answer.
        temperature: 0 is greedy.
        seed: of the draws, which no other request changes.
    """

    key: Any
    token_ids: list[int]
    features_RC: Tensor | None = None
    video: Hashable = None
    max_new_tokens: int = 1024
    temperature: float = 0.0
    seed: int = 0

    @property
    def videos(self) -> list[Tensor]:
        """The features, as `pack` takes them."""
        return [] if self.features_RC is None else [self.features_RC]


@dataclass(eq=False)
class _Waiting:
    """A request, the rows that it needs, and what it may share: the rows up to `end`, of which `beginning` tells."""

    request: Request
    prompt: int
    new_tokens: int
    end: int
    beginning: tuple

    @property
    def rows(self):
        return self.prompt + self.new_tokens


@dataclass(eq=False)
class _Running:
    """A prompt in the buffer, and its answer so far.

    Attributes:
        first: its first row in the buffer.
        length: rows of it that are there; the last token's is not yet.
    """

    waiting: _Waiting
    first: int
    length: int
    generator: torch.Generator | None
    answer: list[int] = field(default_factory=list)

    @property
    def stop(self):
        return self.first + self.waiting.rows


class Batcher:
    """Answers to many prompts, of a model that is not sharded.

    In fp32 the answers are those of `generate`, prompt by prompt; in bf16 products of one row and of many are rounded
    differently, and a near tie may fall either way.

    Args:
        model: `VideoLlava`.
        tokens: its `VideoTokens`.
        eos: id that ends an answer; it is not part of what is returned.
        at_once: most answers that are continued together.
        cache_bytes: of all keys and values.
        prefill_rows: most rows of prompts that join in one step, unless a single one has more.
    """

    def __init__(
        self, model, tokens: VideoTokens, *, eos: int, at_once: int = 32, cache_bytes: int, prefill_rows: int = 8192
    ):
        sizes = model.config.decoder
        self.row_bytes = 2 * sizes.num_layers * sizes.num_kv_heads * sizes.head_dim * model.compute_dtype.itemsize
        rows = min(cache_bytes // self.row_bytes, at_once * sizes.max_position_embeddings)
        self._model, self._tokens, self._eos = model, tokens, eos
        self._device = model.embed.weight.device
        self._pool = RowPool(sizes.num_layers, rows)
        self._at_once, self._prefill_rows = at_once, prefill_rows
        self._waiting, self._running = deque(), []  # running: in the order of their rows

    def __len__(self) -> int:
        """Requests that are not answered yet."""
        return len(self._waiting) + len(self._running)

    def check(self, request: Request) -> int:
        """Tokens that its answer may have.

        Raises:
            ValueError: a negative temperature, a prompt as long as the model's context, or one whose keys and values do
                not fit the buffer.
        """
        if request.temperature < 0:
            raise ValueError(f"temperature {request.temperature}: 0 is greedy, higher is more random")
        prompt = len(request.token_ids)
        new_tokens = min(request.max_new_tokens, rows_left(self._model, prompt))
        if prompt + new_tokens > self._pool.rows:
            raise ValueError(
                f"a prompt of {prompt} rows and an answer of {new_tokens} need "
                f"{(prompt + new_tokens) * self.row_bytes / 2**30:.2g} GiB for keys and values, there are "
                f"{self._pool.rows * self.row_bytes / 2**30:.2g}: raise --kv_cache_gib, or lower --max_new_tokens"
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
        self._waiting.append(_Waiting(request, prompt, new_tokens, end, chain.beginning(end) if end else ()))

    def run(self, requests: Iterable[Request]) -> Iterator[tuple[Any, list[int]]]:
        """(key, ids of the answer) of every request, as the answers end.

        Requests are taken when they are due, so that few videos' features lie in memory.
        """
        for request in requests:
            self.add(request)
            while len(self._waiting) >= self._at_once:
                yield from self.step()
        while len(self):
            yield from self.step()

    @torch.inference_mode()
    def step(self) -> list[tuple[Any, list[int]]]:
        """Let in whom there is room for, and take one token of every answer; returns (key, ids) of those that ended."""
        joining = self._with_room()
        ended = self._begin(joining) if joining else []
        return ended + (self._continue() if self._running else [])

    def _with_room(self):
        """[(request, first row)] of those that join now, in the order in which they wait."""
        joining, prompt_rows = [], 0
        taken = [(running.first, running.stop) for running in self._running]
        while self._waiting and len(taken) < self._at_once:
            request = self._waiting[0]
            first = _first_gap(taken, request.rows, self._pool.rows)
            prompt_rows += request.prompt
            if first is None or joining and prompt_rows > self._prefill_rows:
                break
            taken = sorted([*taken, (first, first + request.rows)])
            joining.append((self._waiting.popleft(), first))
        return joining

    def _begin(self, joining):
        """Compute prompts into the buffer; returns those whose first token ended them."""
        by_beginning = {running.waiting.beginning: running for running in self._running if running.waiting.end}
        groups = {}  # by whom they follow: None, or one that runs and begins alike
        for request, first in joining:
            known = by_beginning.get(request.beginning) if request.end else None
            groups.setdefault(known, []).append((request, first))
        begun, rows = [], []
        for known, group in groups.items():
            rows.append(self._whole(group) if known is None else self._behind(known, group))
            begun += [_Running(request, first, request.prompt, self._generator(request)) for request, first in group]
        ended = self._take(begun, self._model.logits(torch.cat(rows)))
        self._running.sort(key=lambda running: running.first)
        return ended

    def _whole(self, group):
        """The last rows of whole prompts, [B, D]; what they have in common is computed once."""
        model = self._model
        samples = [
            (
                self._sample(waiting.request),
                [] if waiting.request.features_RC is None else [waiting.request.features_RC],
            )
            for waiting, _ in group
        ]
        batch = pack(samples, self._tokens, model.config.mm_hidden_size, share=True).to(self._device)
        cache = [LayerCache(batch.num_rows) for _ in model.decoder.layers]
        h_BD = model.decoder(
            model.splice(batch),
            batch.positions,
            batch.layout,
            cache,
            supervised=(batch.loss_rows, batch.loss_layout),
        )
        self._write(batch.loss_layout.kv_rows, [(first, waiting.prompt) for waiting, first in group], cache)
        return h_BD

    def _behind(self, known, group):
        """The same, of prompts that begin as one that runs: of its rows they need a copy, and only theirs are
        computed."""
        model, end = self._model, known.waiting.end
        tails = [waiting.request.token_ids[end:] for waiting, _ in group]
        sizes = [len(tail) for tail in tails]
        ends = torch.tensor(sizes).cumsum(0)
        starts = (ends - torch.tensor(sizes)).tolist()
        kv_rows = ranges(
            [row for start in starts for row in (0, end + start)], [n for size in sizes for n in (end, size)]
        )
        layout = AttentionLayout.of_lengths(sizes, [end + size for size in sizes], torch.from_numpy(kv_rows))
        last = (ends - 1).to(self._device)
        x_ND = model.embed.weight[torch.tensor(sum(tails, []), device=self._device)].to(model.residual_dtype)
        positions = torch.from_numpy(ranges([end] * len(group), sizes)).int().to(self._device)
        prefix = self._pool.views(known.first, known.first + end)
        cache = [LayerCache(len(x_ND)) for _ in model.decoder.layers]
        h_ND = model.decoder(x_ND, positions, layout.map(lambda rows: rows.to(self._device)), cache, prefix=prefix)
        for _, first in group:
            self._pool.copy(known.first, first, end)
        own = torch.arange(len(x_ND), device=self._device)
        self._write(own, [(first + end, size) for (_, first), size in zip(group, sizes)], cache)
        return h_ND[last]

    def _write(self, rows_P, runs, cache):
        """Put `rows_P` of a cache of packed rows into runs of the buffer, given as (first row, rows)."""
        places_P = torch.from_numpy(ranges(*zip(*runs))).to(self._device)
        for layer, packed in zip(self._pool.layers, cache, strict=True):
            layer.write(places_P, *(buffer.index_select(0, rows_P) for buffer in packed.buffers))

    def _continue(self):
        """One token more of each answer; returns those that ended."""
        running, device = self._running, self._device
        layout = _layout(running)
        tokens_B, places_B, positions_B = torch.tensor(
            [(each.answer[-1], each.first + each.length, each.length) for each in running]
        ).T.to(device)
        x_BD = self._model.embed.weight[tokens_B].to(self._model.residual_dtype)
        self._pool.aim(places_B, running[-1].first + running[-1].length + 1)
        h_BD = self._model.decoder(
            x_BD, positions_B.int(), layout.map(lambda rows: rows.to(device, non_blocking=True)), self._pool.layers
        )
        for each in running:
            each.length += 1
        self._running = []
        return self._take(running, self._model.logits(h_BD))

    def _take(self, running, logits_BV):
        """Add the next token of each; those that go on run, the others' (key, ids) are returned."""
        greedy_B = logits_BV.argmax(-1).tolist()
        ended = []
        for each, logits_V, token in zip(running, logits_BV, greedy_B):
            waiting = each.waiting
            if each.generator is not None:
                token = next_token(logits_V, waiting.request.temperature, each.generator).item()
            if token != self._eos:
                each.answer.append(token)
            if token == self._eos or len(each.answer) == waiting.new_tokens:
                ended.append((waiting.request.key, each.answer))
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
        if waiting.request.temperature == 0:
            return None
        return torch.Generator(self._device).manual_seed(waiting.request.seed)


def _first_gap(taken, rows, capacity):
    """The first row of the first free run of `rows` rows between the [first, stop) of `taken`; None without any."""
    free = 0
    for first, stop in taken:
        if first - free >= rows:
            return free
        free = stop
    return free if capacity - free >= rows else None


def _layout(running):
    """One query for each, which sees its rows and itself. Rows between those are keys of segments without queries."""
    queries, keys, at = [], [], 0
    for each in running:
        if each.first > at:
            queries.append(0)
            keys.append(each.first - at)
        queries.append(1)
        keys.append(each.length + 1)
        at = each.first + keys[-1]
    return AttentionLayout.of_lengths(queries, keys)
