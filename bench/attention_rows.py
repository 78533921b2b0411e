"""Rows of attention: every library that is installed and fits the card, and shared videos with and without copies of
keys.

Keys lie where the rotation's kernel puts them (`rope_keys`, which has rows of its own): placing them is not timed.

Dimensions: N query rows, M key rows, H query heads, K key/value heads, d channels per head.
"""

from dataclasses import replace

import torch

from bench.cases import Case, in_fp32, normal
from fastvid.batch import VideoTokens
from fastvid.data.conversation import EncodedSample
from fastvid.data.packing import pack
from fastvid.model.attention import SDPA, gpu_libraries
from fastvid.model.attention_check import settle_attention

PATCH = 3
FORWARD, BACKWARD = 2, 5  # matrix products
# Backward subtracts the rounded output's product with its gradient: an element of the queries' gradient may lie 4 % off
# in bf16. A wrong mask or head shifts it by tens of percent.
TOLERANCE = 2**-4


def cases(small):
    """Forward and backward of eight samples, and of four videos with 30 questions; of 32 heads, then fewer of keys."""
    for kv_heads in (2,) if small else (32, 8):
        for shared in (False, True):
            yield _case(4 if small else 32, kv_heads, 16 if small else 128, shared, small)


def _batch(shared, small):
    """Behind a kept prompt of 34 rows: videos of 676 rows, questions and answers of 120. Small: a tenth."""
    prompt, video, text = (3, 67, 12) if small else (34, 676, 120)
    questions = (8, 7, 8, 7) if shared else [1] * 8
    samples = []
    for name, count in enumerate(questions):
        ids = [*range(4, 4 + prompt), 1, *[PATCH] * video, 2, *range(4, 4 + text)]
        features_RC = torch.zeros(video, 1)
        one = EncodedSample(str(name), ids, [(len(ids) - text // 2, len(ids))], [str(name)])
        samples += [(one, [features_RC])] * count
    tokens = VideoTokens(patch=PATCH, start=1, end=2, vocab_size=4 + max(prompt, text))
    return pack(samples, tokens, 1, prefix=range(4, 4 + prompt), frozen=True, share=shared)


def _case(H, K, d, shared, small):
    batch = _batch(shared, small)
    layout, N = batch.layout, batch.num_rows
    queries, keys = (torch.tensor(lengths) for lengths in layout.lengths)
    pairs = int((queries * keys - queries * (queries - 1) // 2).sum())

    def inputs(generator, device):
        C = batch.prefix_rows
        rows = ((N, H), (C + N, K), (C + N, K), (N, H))
        return *(normal(generator, device, *shape, d) for shape in rows), layout.map(lambda x: x.to(device))

    def way(attention_of):
        def prepare(q, k, v, grad, layout):
            attention = attention_of(q)
            placed, attend = attention.placed(layout)
            if attention.takes_rows:  # it copies nothing
                C = len(k) - len(q)
                return _both_ways(
                    lambda q, k, v: attention(q, k[C:], v[C:], layout, constant=(k[:C], v[:C])), q, k, v, grad
                )
            rows_M = placed.kv_rows
            return _both_ways(attend, q, k[rows_M], v[rows_M], grad)

        return prepare

    functions = {
        "ours": way(lambda q: settle_attention("auto", q.device, q.dtype, H, K, d)),
        "eager": way(lambda q: SDPA),
    }
    if torch.cuda.is_available():
        for library in gpu_libraries(torch.device("cuda")):
            in_parts = shared and library.parts is not None
            functions[str(library)] = way(lambda q, library=library: library)
            if in_parts:
                functions[f"{library}, a copy for each"] = way(lambda q, library=library: replace(library, parts=None))
    return Case(
        "attention",
        f"both ways, {'30 questions share 4 videos' if shared else '8 samples'}",
        {"N": N, "M": len(layout.kv_rows), "H": H, "K": K, "d": d, "dtype": "bfloat16"},
        inputs,
        functions,
        in_fp32(way(lambda q: SDPA)),
        flops=2 * (FORWARD + BACKWARD) * pairs * H * d,
        tolerance=TOLERANCE,
    )


def _both_ways(attend, q, k, v, grad):
    """All gradients are computed. Compared are those that all ways have: keys lie in other places."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]

    def call():
        out = attend(*leaves)
        return out, torch.autograd.grad(out, leaves, grad)[0]

    return call
