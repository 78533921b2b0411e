"""Deliberate faults in kernels, at least three for each, and the test that must see each of them.

`MUTATIONS[name]` are faults of ``fastvid_kernels/<name>.py``, seen by tests of ``test_<name>.py``.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    old: str  # occurs once in the file
    new: str
    test: str  # function, or function[parameters]


MUTATIONS = {}
MUTATIONS["linear_cross_entropy"] = [
    Mutation("logits_ptr += row * row_stride", "logits_ptr += row * vocab_size", "test_equals_eager[dtype0-False-10]"),
    Mutation("x = tl.where(tokens < vocab_size, x, float(\"-inf\"))", "x = tl.where(tokens < row_stride, x, 0.0)",
             "test_equals_eager[dtype0-False-10]"),
    Mutation("total = total * tl.exp(top - higher) + tl.sum", "total = total + tl.sum",
             "test_rows_longer_than_a_tile[dtype0]"),
    Mutation("tl.where(tokens == target, p - 1, p)", "tl.where(tokens % BLOCK == target, p - 1, p)",
             "test_rows_longer_than_a_tile[dtype0]"),
]
