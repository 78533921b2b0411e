"""Rows of attention agree with fp32 for every way, and so does the GPU check's, in parts too."""

import pytest
import torch
from attention_parts import CPU, PLAIN

from bench import attention_rows, kernel_rows
from bench.gpu import correct, kernels


@pytest.mark.slow
def test_every_library_is_a_row_and_agrees(monkeypatch):
    """Libraries of a pretended GPU; of shared videos with keys copied for each branch as well."""
    monkeypatch.setattr(attention_rows, "gpu_libraries", lambda device: [CPU, PLAIN])
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        apart, shared = attention_rows.cases(small=True)
    assert list(apart.ways) == ["ours", "eager", str(CPU), str(PLAIN)]
    copies = [f"{library}, a copy for each" for library in (CPU, PLAIN)]
    assert list(shared.ways) == ["ours", "eager", str(CPU), copies[0], str(PLAIN), copies[1]]
    for case in (apart, shared):
        for way in case.ways:
            kernel_rows.agree(case, way, torch.Generator().manual_seed(0))
    asked = []
    q, k, v, grad, layout = shared.make(torch.Generator().manual_seed(0), "cpu")
    with monkeypatch.context() as patch:
        patch.setattr(attention_rows, "_both_ways", lambda attend, q, k, v, grad: asked.append(len(k)))
        for way in (str(CPU), copies[0]):
            shared.ways[way](q, k, v, grad, layout)
    assert asked == [len(layout.branches.causal.kv_rows), len(layout.kv_rows)] and 3 * asked[0] < asked[1]


@pytest.mark.slow
def test_rows_are_timed():
    rows = list(kernels.attention(small=True))
    assert len(rows) == 4 and all(row["median"] > 0 and row["kernel"] == "attention" for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("grouped", [False, True])
def test_the_check_of_a_gpu_sees_branches(monkeypatch, grouped):
    called = []
    monkeypatch.setattr(correct, "choose_attention", lambda *_: CPU)
    attend = CPU.placed
    monkeypatch.setattr(
        type(CPU), "placed", lambda self, layout, **options: called.append(layout.branches) or attend(layout, **options)
    )
    rows = list(correct.attention(True, "flash", grouped))
    assert [row["status"] for row in rows] == ["ok"] * 4
    assert [branches is not None for branches in called] == [False, False, False, True]
