"""Batches by a budget of rows: nothing lost, nothing over, the same plan everywhere, ranks even."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvid.data.order.tokens import SampleRows, TokenOrder
from fastvid.data.sharing import Groups


def sample_rows(own, shared=None, of=None, base=0):
    shared = np.zeros(len(own), dtype=np.int64) if shared is None else np.asarray(shared)
    groups = None if of is None else Groups(np.asarray(of)).without(shared == 0)
    return SampleRows(np.asarray(own), shared, groups, base)


def order(rows, budget, rank=0, size=1, *, accumulation=1, epochs=1.0, max_steps=-1, seed=3, counts=None, weights=()):
    return TokenOrder(
        counts=counts or (len(rows.own),),
        weights=weights,
        epochs=epochs,
        max_steps=max_steps,
        rows=rows,
        budget=budget,
        accumulation=accumulation,
        rank=rank,
        size=size,
        seed=seed,
    )


def cost(rows, batch):
    """Rows of a batch: its samples' own, and once what each group shares."""
    once = {rows.groups.of[i]: rows.shared[i] for i in batch} if rows.groups else {}
    return int(sum(rows.own[i] for i in batch) + sum(once.values())) + rows.base * bool(batch)


def steps(orders):
    """For each step the ranks' micro-batches."""
    assert len({each.total_steps for each in orders}) == 1
    return [[each.micro_batches(step) for each in orders] for step in range(orders[0].total_steps)]


@st.composite
def any_rows(draw):
    n = draw(st.integers(1, 80))
    own = draw(st.lists(st.integers(0, 30), min_size=n, max_size=n))
    if draw(st.booleans()):
        return sample_rows(own), draw(st.integers(30, 90))
    of = np.array(draw(st.lists(st.integers(0, 9), min_size=n, max_size=n)))
    shared = np.array(draw(st.lists(st.integers(0, 20), min_size=10, max_size=10)))[of]
    base = draw(st.integers(0, 5))
    return sample_rows(own, shared, of, base), draw(st.integers(55, 120))


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(any_rows(), st.integers(1, 4), st.integers(1, 3), st.sampled_from([0.4, 1.0, 2.5]))
def test_every_sample_once_an_epoch_and_no_batch_over_the_budget(given_rows, size, accumulation, epochs):
    rows, budget = given_rows
    n = len(rows.own)
    ranks = [order(rows, budget, rank, size, accumulation=accumulation, epochs=epochs) for rank in range(size)]
    seen, epoch_ends = Counter(), []
    for step, parts in enumerate(steps(ranks)):
        assert {len(part) for part in parts} <= set(range(1, accumulation + 1)) and len({len(p) for p in parts}) == 1
        for part in parts:
            for batch in part:
                seen.update(batch)
                assert cost(rows, batch) <= budget
        done = sum(seen.values())
        assert {each.epoch_after(step + 1) for each in ranks} == {done / n}
        epoch_ends += [done] if done % n == 0 else []
    total = math.ceil(epochs * n)
    assert sum(seen.values()) == total and epoch_ends == list(range(n, total + 1, n))
    assert max(seen.values()) - min(seen[i] for i in range(n)) <= (total % n > 0)
    assert ranks[0].epoch_after(0) == 0


def test_the_plan_depends_on_the_ranks_product_with_the_accumulation_alone():
    rows = sample_rows(np.random.default_rng(0).integers(5, 40, 500))
    ways = [
        [order(rows, 200, rank, size, accumulation=8 // size, epochs=2.0) for rank in range(size)] for size in (1, 2, 8)
    ]
    samples = [[sorted(i for part in parts for batch in part for i in batch) for parts in steps(way)] for way in ways]
    assert samples[0] == samples[1] == samples[2]
    assert len({way[0].samples_per_step for way in ways}) == 1


def test_epochs_and_seeds_differ_and_any_step_can_be_asked_first():
    rows = sample_rows(np.random.default_rng(0).integers(5, 40, 300))
    straight = order(rows, 200, epochs=3.0)
    batches = [straight.micro_batches(step) for step in range(straight.total_steps)]
    assert order(rows, 200, epochs=3.0).micro_batches(20) == batches[20]
    assert order(rows, 200, max_steps=len(batches)).micro_batches(len(batches) - 1) == batches[-1]
    assert order(rows, 200, max_steps=7).total_steps == 7
    assert order(rows, 200, epochs=3.0, seed=4).micro_batches(0) != batches[0]
    per_epoch = len(batches) // 3
    assert batches[0] not in batches[per_epoch:]


def test_groups_stay_together_unless_they_are_over_the_budget():
    of = np.repeat(np.arange(40), 5)
    rows = sample_rows(np.full(200, 3), np.full(200, 20), of)
    for parts in steps([order(rows, 80)]):
        for batch in parts[0]:
            assert all(batch.count(i) == 1 and sum(of[j] == of[i] for j in batch) == 5 for i in batch)
    cut = Counter(
        of[i] for parts in steps([order(rows, 30)]) for batch in parts[0] for i in {of[j]: j for j in batch}.values()
    )
    assert set(cut.values()) == {2}, "20 + 3 · 3 rows and the rest"


@pytest.mark.slow
def test_ranks_are_even_and_batches_full():
    rng = np.random.default_rng(0)
    text = rng.gamma(2.2, 45, 12_000).clip(10, 900).astype(np.int64)
    groups = np.arange(len(text)) // 8
    for rows in (sample_rows(text + 690), sample_rows(text, np.full(len(text), 678), groups, base=38)):
        orders = [order(rows, 16384, rank, 8) for rank in range(8)]
        loads = np.array([[sum(cost(rows, batch) for batch in part) for part in parts] for parts in steps(orders)])
        assert sum(len(batch) for parts in steps(orders) for part in parts for batch in part) == len(text)
        assert loads.max(1).sum() / loads.mean(1).sum() < 1.02
        assert (loads[loads.min(1) > 0].max(1) / loads[loads.min(1) > 0].mean(1) < 1.02).mean() > 0.85
        assert np.median(loads) > 0.96 * 16384


def test_data_weights_repeat_samples():
    rows = sample_rows(np.full(30, 10))
    batches = [batch for parts in steps([order(rows, 40, counts=(10, 20), weights=(2.0, 0.5))]) for batch in parts[0]]
    seen = Counter(i for batch in batches for i in batch)
    assert all(seen[i] == 2 for i in range(10)) and sum(seen[i] for i in range(10, 30)) == 10


def test_a_sample_over_the_budget_is_named():
    with pytest.raises(
        ValueError, match=r"--tokens_per_batch 70: the longest sample, number 2 from 0, takes 75 tokens"
    ):
        order(sample_rows([10, 20, 60, 5], [0, 0, 10, 10], [0, 1, 2, 2], base=5), 70)


def test_other_rows_are_another_run():
    one, other = (order(sample_rows(own), 70).samples_per_step for own in ([10, 20], [10, 21]))
    assert one != other and one.startswith("1 × 70 tokens")
