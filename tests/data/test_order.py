"""Sample order: the reference's recordings, and the properties of fastvid's own stream."""

import hashlib
import json
import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvid.config.policy import POLICIES
from fastvid.data.loader import training_order
from fastvid.data.order.stream import EvaluationOrder, StreamOrder
from fastvid.data.order.upstream import UpstreamOrder, reference_indices
from fastvid.data.sharing import Groups


def stream(rank=0, size=1, *, counts=(23,), weights=(), epochs=3.0, max_steps=-1, batch=2, accumulation=2, seed=42):
    return StreamOrder(
        counts=counts,
        weights=weights,
        epochs=epochs,
        max_steps=max_steps,
        batch_size=batch,
        accumulation=accumulation,
        rank=rank,
        size=size,
        seed=seed,
    )


def reference(rank=0, size=1, *, n=10, epochs=3.0, max_steps=-1, batch=2, accumulation=1):
    return UpstreamOrder(
        num_samples=n,
        epochs=epochs,
        max_steps=max_steps,
        batch_size=batch,
        accumulation=accumulation,
        rank=rank,
        size=size,
        seed=42,
    )


def flat(order, steps=None):
    return [
        i
        for step in range(order.total_steps)
        if steps is None or step in steps
        for batch in order.micro_batches(step)
        for i in batch
    ]


def test_reference_order_equals_the_recordings(golden):
    recorded = json.loads((golden / "order.json").read_text())
    assert [flat(reference(), range(5 * e, 5 * e + 5)) for e in range(3)] == recorded["single_n10_epochs3"]
    assert [[reference_indices(10, rank, 2, 42, epoch) for rank in range(2)] for epoch in range(2)] == recorded[
        "dist_n10_w2"
    ]
    assert [reference_indices(10, rank, 4, 42, 0) for rank in range(4)] == recorded["dist_n10_w4_e0"]
    for name, epochs in recorded["big"].items():
        _kind, n, *size = name.split("_")
        n, size = int(n[1:]), int(size[0][1:]) if size else 1
        for epoch, saved in enumerate(epochs):
            indices = reference_indices(n, 0, size, 42, epoch)
            assert indices[:12] == saved.get("head", saved.get("rank0_head"))
            digest = hashlib.sha256(np.asarray(indices, dtype="<i8").tobytes()).hexdigest()
            assert digest == saved.get("sha256_i64le", saved.get("sha256_rank0"))


def test_reference_steps_go_on_from_one_epoch_into_the_next():
    order = reference(n=10, batch=2, accumulation=2, epochs=2)  # 5 micro-batches an epoch
    assert [order.micro_batches(step) for step in range(order.total_steps)] == [
        [[4, 2], [8, 9]],
        [[1, 7], [0, 3]],
        [[5, 6], [6, 2]],
        [[3, 8], [5, 4]],
    ]  # the reference's own, recorded
    assert [order.epoch_after(step) for step in range(5)] == [0, 0.4, 0.8, 1.2, 1.6]


def trainer_steps(n, batch, accumulation, epochs, max_steps):
    """The steps of Hugging Face's Trainer 4.28, as its loop makes them."""
    per_epoch = math.ceil(n / batch)
    steps = max_steps if max_steps > 0 else math.ceil(epochs * max(1, per_epoch // accumulation))
    done, waiting, seen = [], [], 0
    for epoch in range(10**6):
        indices = reference_indices(n, 0, 1, 42, epoch)
        for i in range(per_epoch):
            waiting.append(indices[i * batch : (i + 1) * batch])
            seen += 1
            if seen % accumulation == 0 or (per_epoch <= accumulation and i + 1 == per_epoch):
                done.append(waiting)
                waiting = []
                if len(done) == steps:
                    return done


@pytest.mark.parametrize("epochs, max_steps", [(1, -1), (2.5, -1), (4, -1), (1, 23)])
@pytest.mark.parametrize(
    "n, batch, accumulation",
    [(10, 2, 1), (10, 2, 2), (11, 2, 4), (11, 2, 5), (12, 2, 6), (5, 2, 8), (5, 1, 7), (9, 3, 4), (1, 1, 3)],
)
def test_reference_steps_are_those_of_the_trainer(n, batch, accumulation, epochs, max_steps):
    order = reference(n=n, batch=batch, accumulation=accumulation, epochs=epochs, max_steps=max_steps)
    expected = trainer_steps(n, batch, accumulation, epochs, max_steps)
    assert [order.micro_batches(step) for step in range(order.total_steps)] == expected


def first_version(order, step):
    """The micro-batches of a step as version 1 of the order chose them."""

    def of(epoch):
        indices = reference_indices(order.num_samples, order.rank, order.size, order.seed, epoch)
        return [indices[i : i + order.batch_size] for i in range(0, len(indices), order.batch_size)]

    steps_per_epoch = max(1, order.batches_per_epoch // order.accumulation)
    epoch, at = divmod(step, steps_per_epoch)
    chosen = of(epoch)[at * order.accumulation : (at + 1) * order.accumulation]
    if at == 0 and epoch > 0 and order.batches_per_epoch > order.accumulation:
        chosen = of(epoch - 1)[steps_per_epoch * order.accumulation :] + chosen
    return chosen


@settings(deadline=None)
@given(st.integers(1, 30), st.integers(1, 3), st.integers(1, 8), st.integers(0, 12))
def test_an_older_order_is_gone_on_from_where_it_took_the_same_samples(n, batch, accumulation, step):
    order = reference(n=n, batch=batch, accumulation=accumulation)
    older, ours = (
        [tuple(batch) for i in range(step) for batch in find(i)]
        for find in (lambda i: first_version(order, i), order.micro_batches)
    )
    assert order.goes_on_from(1, step) == (older == ours)
    assert order.goes_on_from(2, step)


def test_stream_covers_each_epoch_once_in_a_fresh_order():
    order = stream(batch=3, accumulation=1)
    samples = flat(order)
    assert len(samples) == 69 and order.total_steps == 23
    epochs = [samples[i : i + 23] for i in (0, 23, 46)]
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert samples == flat(stream(batch=3, accumulation=1)) != flat(stream(batch=3, accumulation=1, seed=43))


@pytest.mark.parametrize("size, batch, accumulation", [(2, 2, 2), (4, 1, 2), (1, 8, 1), (8, 1, 1), (1, 2, 4)])
def test_stream_steps_are_the_same_for_any_ranks(size, batch, accumulation):
    one = stream(batch=4, accumulation=2)
    ranks = [stream(rank, size, batch=batch, accumulation=accumulation) for rank in range(size)]
    assert {order.total_steps for order in ranks} == {one.total_steps}
    for step in range(one.total_steps):
        parts = [order.micro_batches(step) for order in ranks]
        assert len({len(part) for part in parts}) == 1, "ranks differ in micro-batches"
        together = [i for part in parts for micro in part for i in micro]
        assert sorted(together) == sorted(flat(one, [step]))


def test_stream_fractional_epochs_and_max_steps():
    assert len(flat(stream(epochs=0.5, batch=1, accumulation=1))) == math.ceil(23 / 2)
    assert stream(max_steps=100).total_steps == 100
    assert len(flat(stream(max_steps=100))) == 400
    assert stream().epoch_after(stream().total_steps) == 3.0


def test_data_weights_repeat_and_sample_files():
    order = stream(counts=(10, 20), weights=(2.0, 0.5), epochs=1.0, batch=1, accumulation=1)
    seen = Counter(flat(order))
    assert order.samples_per_epoch == 30
    assert all(seen[i] == 2 for i in range(10))
    assert sum(seen[i] for i in range(10, 30)) == 10 and max(seen[i] for i in range(10, 30)) == 1


def test_weights_are_checked():
    config = {
        "num_train_epochs": 1,
        "max_steps": -1,
        "seed": 0,
        "batch_size": 1,
        "gradient_accumulation_steps": 1,
        "tokens_per_batch": None,
        "share_video": False,
        "question_order": "reference",
    }
    for weights, policy, message in [
        ([1.0], "none", "1 numbers for 2"),
        ([1.0, 1.0], "reference", "leave it out"),
        ([0.0, 0.0], "none", "leave no sample"),
        ([-1.0, 2.0], "none", "leave no sample"),
    ]:
        with pytest.raises(ValueError, match=message):
            training_order(SimpleNamespace(data_weights=weights, policy=POLICIES[policy], **config), [3, 4], 0, 1)


@pytest.mark.parametrize(
    "flag, value", [("tokens_per_batch", 4096), ("share_video", True), ("question_order", "video_first")]
)
def test_what_the_reference_lacks_is_refused_with_its_parity(flag, value):
    config = {
        "num_train_epochs": 1,
        "max_steps": -1,
        "seed": 0,
        "batch_size": 1,
        "gradient_accumulation_steps": 1,
        "data_weights": [],
        "tokens_per_batch": None,
        "share_video": False,
        "question_order": "reference",
    }
    config = SimpleNamespace(policy=POLICIES["reference"], **{**config, flag: value})
    with pytest.raises(ValueError, match=f"--{flag}: the reference has none; leave it out with --parity reference"):
        training_order(config, [3, 4], 0, 1)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 8), min_size=1, max_size=60), st.sampled_from([(1, 1, 8), (2, 2, 2), (4, 1, 2), (1, 3, 3)])
)
def test_groups_stay_together_in_every_way_to_make_a_step(of, ways):
    size, accumulation, batch = ways
    groups = Groups(np.array(of))

    def order(rank, size, batch, accumulation):
        return StreamOrder(
            counts=(len(of),),
            weights=(),
            epochs=2.0,
            max_steps=-1,
            batch_size=batch,
            accumulation=accumulation,
            rank=rank,
            size=size,
            seed=1,
            groups=groups,
        )

    plain = StreamOrder(
        counts=(len(of),),
        weights=(),
        epochs=2.0,
        max_steps=-1,
        batch_size=batch,
        accumulation=accumulation,
        rank=0,
        size=size,
        seed=1,
    )
    one = order(0, 1, size * accumulation * batch, 1)
    ranks = [order(rank, size, batch, accumulation) for rank in range(size)]
    assert sorted(flat(one)) == sorted([*range(len(of))] * 2)
    for step in range(one.total_steps):
        samples = one.micro_batches(step)[0]
        parts = [rank.micro_batches(step) for rank in ranks]
        assert sorted(i for part in parts for micro in part for i in micro) == sorted(samples)
        plain_sizes = [len(micro) for micro in plain.micro_batches(step)]
        assert [len(micro) for micro in parts[0]] == plain_sizes, "as many samples as without groups"
        cut = sum(len({of[i] for i in micro}) for part in parts for micro in part) - len({of[i] for i in samples})
        assert cut < sum(len(part) for part in parts) + 1, "a batch cuts one group at most"
    assert {rank.total_steps for rank in ranks} == {one.total_steps}


def test_evaluation_sees_every_sample_once():
    orders = [EvaluationOrder(11, 2, rank, 3) for rank in range(3)]
    assert {order.total_steps for order in orders} == {2}
    assert sorted(i for order in orders for i in flat(order)) == list(range(11))
