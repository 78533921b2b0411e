"""Packing: what a batch says of its samples, and that every row sees what it would see in a batch of its own."""

from collections import Counter

import pytest
import torch
from attention_cases import keys_in_parts, keys_of
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvid.batch import FeaturePair, VideoTokens
from fastvid.data.conversation import EncodedSample
from fastvid.data.packing import pack

TOKENS = VideoTokens(patch=50, start=51, end=52, vocab_size=53)
BARE = VideoTokens(patch=50, start=None, end=None, vocab_size=51)
SYSTEM = (1, 7, 7, 3)
ROWS = 3
ROWS_OF = {"b": 1}  # of the other videos: ROWS


def sample(name, ids, supervised, videos=()):
    return EncodedSample(name, ids, supervised, list(videos))


def features(name):
    """A video's features: its name in every place."""
    return torch.full((ROWS_OF.get(name, ROWS), 2), float(ord(name[0])))


def test_pack_lays_samples_end_to_end():
    video = sample("v", [1, 7, 51, 50, 50, 50, 52, 8, 9, 2], [(8, 10)], ["v"])
    text = sample("t", [1, 5, 6, 2, 4, 2], [(2, 4), (5, 6)])
    rows = torch.arange(12, dtype=torch.float16).view(3, 4)
    batch = pack([(text, []), (video, [rows])], TOKENS, 4)
    assert batch.token_ids.tolist() == text.token_ids + video.token_ids
    assert batch.positions.tolist() == [*range(6), *range(10)] and batch.positions.dtype == torch.int32
    assert batch.layout.cu_seqlens_q.tolist() == [0, 6, 16] and batch.layout.max_seqlen_q == 10
    assert batch.layout.cu_seqlens_k is batch.layout.cu_seqlens_q and batch.layout.kv_rows is None
    assert batch.video_rows.tolist() == [9, 10, 11] and batch.boundary_rows.tolist() == [8, 12]
    assert batch.token_ids[batch.boundary_rows].tolist() == [51, 52]
    assert torch.equal(batch.features, rows)
    assert batch.loss_rows.tolist() == [1, 2, 4, 13, 14]
    assert batch.targets.tolist() == [6, 2, 2, 9, 2] == batch.token_ids[batch.loss_rows + 1].tolist()
    assert batch.sample_ids == ["t", "v"]
    assert (batch.prefix_rows, batch.frozen_rows, batch.sample_rows) == (0, 0, 16)


def test_videos_of_different_rows_lie_end_to_end():
    ids = [1, 51, 50, 52, 51, 50, 50, 50, 50, 52, 4, 51, 50, 50, 52, 2]
    videos = [torch.full((rows, 4), float(rows)) for rows in (1, 4, 2)]
    batch = pack([(sample("three", ids, [(15, 16)], "abc"), videos)], TOKENS, 4)
    assert batch.features.shape == (7, 4) and batch.features[:, 0].tolist() == [1, 4, 4, 4, 4, 2, 2]
    assert batch.video_rows.tolist() == [2, 5, 6, 7, 8, 12, 13] and batch.boundary_rows.tolist() == [1, 3, 4, 9, 11, 14]
    with pytest.raises(AssertionError, match="three: placeholders and features differ"):
        pack([(sample("three", ids, [(15, 16)], "abc"), videos[:2])], TOKENS, 4)


def test_pack_several_videos_and_mixed_precision():
    two = sample("two", [1, 51, 50, 50, 52, 51, 50, 50, 52, 2], [(9, 10)], ["a", "b"])
    batch = pack([(two, [torch.ones(2, 4), torch.zeros(2, 4, dtype=torch.float16)])], TOKENS, 4)
    assert batch.video_rows.tolist() == [2, 3, 6, 7] and batch.boundary_rows.tolist() == [1, 4, 5, 8]
    assert batch.features.dtype == torch.float32 and batch.features[:, 0].tolist() == [1, 1, 0, 0]


def test_rows_of_two_towers_follow_each_other_in_a_video_and_lie_apart_in_the_batch():
    ids = [1, 51, 50, 50, 50, 52, 4, 51, 50, 50, 50, 50, 52, 2]
    videos = [
        FeaturePair(torch.full((first, 4), float(first)), torch.full((second, 2), float(second)))
        for first, second in ((2, 1), (1, 3))
    ]
    batch = pack([(sample("two", ids, [(13, 14)], "ab"), videos)], TOKENS, (4, 2))
    assert batch.features[:, 0].tolist() == [2, 2, 1] and batch.features.shape == (3, 4)
    assert batch.features_2[:, 0].tolist() == [1, 3, 3, 3] and batch.features_2.shape == (4, 2)
    assert batch.video_rows.tolist() == [2, 3, 8, 4, 9, 10, 11] and batch.second_rows == 4
    assert batch.boundary_rows.tolist() == [1, 5, 7, 12]
    empty = pack([], TOKENS, (4, 2))
    assert empty.features.shape == (0, 4) and empty.features_2.shape == (0, 2) and empty.second_rows == 0
    with pytest.raises(AssertionError, match="two: placeholders and features differ"):
        pack([(sample("two", ids, [(13, 14)], "ab"), videos[:1])], TOKENS, (4, 2))


def test_pack_without_start_and_end_tokens():
    batch = pack([(sample("v", [1, 50, 50, 2], [(3, 4)], ["v"]), [torch.ones(2, 4)])], BARE, 4)
    assert batch.boundary_rows.numel() == 0 and batch.video_rows.tolist() == [1, 2]


@pytest.mark.parametrize("frozen", [False, True])
def test_pack_of_nothing_is_one_row_with_a_gradient(frozen):
    batch = pack([], TOKENS, 2, prefix=SYSTEM, frozen=frozen, share=True)
    assert batch.num_rows == 1 and batch.num_supervised == 0 and batch.features.shape == (0, 2)
    assert (batch.prefix_rows, batch.frozen_rows, batch.sample_rows) == (0, 0, 0)


VIDEO = [51, 50, 50, 50, 52]


def test_frozen_rows_come_first_and_the_kept_prefix_is_not_packed():
    first = sample("f", [*SYSTEM, *VIDEO, 8, 9, 2], [(10, 12)], ["f"])
    last = sample("l", [*SYSTEM, 4, 5, *VIDEO, 9, 2], [(12, 13)], ["l"])
    batch = pack([(first, [features("f")]), (last, [features("l")])], TOKENS, 2, prefix=SYSTEM, frozen=True)
    assert batch.token_ids.tolist() == [4, 5, *VIDEO, 8, 9, 2, *VIDEO, 9, 2]
    assert batch.positions.tolist() == [4, 5, *range(4, 12), *range(6, 13)]
    assert (batch.prefix_rows, batch.frozen_rows, batch.sample_rows) == (4, 2, 25)
    assert batch.layout.cu_seqlens_q.tolist() == [0, 2, 10, 17]
    assert batch.layout.cu_seqlens_k.tolist() == [0, 6, 18, 31] and batch.layout.max_seqlen_k == 13
    assert batch.layout.kv_rows.tolist() == [*range(6), *range(4), *range(6, 14), *range(6), *range(14, 21)]
    assert batch.loss_rows.tolist() == [8 - 1 + 0, 8, 15] and batch.targets.tolist() == [9, 2, 2]
    assert batch.video_rows.tolist() == [3, 4, 5, 11, 12, 13] and batch.boundary_rows.tolist() == [2, 6, 10, 14]


def test_a_frozen_batch_without_videos_keeps_one_sample_with_a_gradient():
    texts = [(sample(name, [*SYSTEM, 5, 6, 2], [(6, 7)]), []) for name in "ab"]
    batch = pack(texts, TOKENS, 2, prefix=SYSTEM, frozen=True)
    assert batch.num_rows == 6 and batch.frozen_rows == 3


def test_shared_rows_stand_once():
    group = [sample(name, [*SYSTEM, *VIDEO, 8, 9, end], [(10, 12)], ["v"]) for name, end in zip("abc", (2, 3, 4))]
    other = sample("d", [*SYSTEM, 4, 5, *VIDEO, 9, 2], [(12, 13)], ["v"])
    alone = sample("e", [*SYSTEM, *VIDEO, 9, 2], [(10, 11)], ["w"])
    samples = [(s, [features(s.videos[0])]) for s in (*group, other, alone)]
    batch = pack(samples, TOKENS, 2, prefix=SYSTEM, share=True)
    lengths = batch.layout.cu_seqlens_q.diff().tolist()
    assert lengths == [4, 9, 7, 5, 3, 3, 3]  # system prompt, question first, another video, video, three branches
    assert batch.features[::ROWS, 0].tolist() == [*map(float, map(ord, "vwv"))]
    assert batch.sample_rows == 3 * 12 + 13 + 11
    frozen = pack(samples, TOKENS, 2, prefix=SYSTEM, frozen=True, share=True)
    assert frozen.layout.cu_seqlens_q.diff().tolist() == [2, 7, 7, 5, 3, 3, 3] and frozen.frozen_rows == 2
    pair = pack(samples[:2], TOKENS, 2, prefix=SYSTEM, share=True)
    assert pair.layout.cu_seqlens_q.diff().tolist() == [9, 3, 3], "who shares the video needs no cut before it"


def test_branches_copy_no_key_of_what_they_go_on_from():
    """Rows behind longer ones do; a video behind the system prompt's few rows takes copies of those."""
    group = [sample(name, [*SYSTEM, *VIDEO, 8, end], [(10, 11)], ["v"]) for name, end in zip("abc", (2, 3, 4))]
    group = [(one, [features("v")]) for one in group]
    layout = pack(group, TOKENS, 2, prefix=SYSTEM, share=True).layout
    assert layout.kv_rows.tolist() == [*range(9), *range(11), *range(9), 11, 12, *range(9), 13, 14]
    branches = layout.branches
    assert branches.causal.kv_rows is None and branches.causal.lengths == ([9, 2, 2, 2], [9, 2, 2, 2])
    assert branches.full.lengths == ([6], [9]) and (branches.first_query, branches.first_key) == (9, 0)
    frozen = pack(group, TOKENS, 2, prefix=SYSTEM, frozen=True, share=True)
    branches = frozen.layout.branches
    assert branches.causal.kv_rows.tolist() == list(range(15)) and branches.causal.lengths[1] == [9, 2, 2, 2]
    assert (branches.first_query, branches.first_key) == (5, 0)
    last = frozen.loss_layout.branches
    assert last.causal.lengths == ([1, 1, 1], [1, 1, 1]) and last.full.lengths == ([3], [9])
    assert last.causal.kv_rows.tolist() == [9, 11, 13, *range(9)] and (last.first_query, last.first_key) == (0, 3)
    apart = pack(group, TOKENS, 2, prefix=SYSTEM, frozen=True)
    assert apart.layout.branches is None and apart.loss_layout.branches is None


def test_without_branches_supervised_rows_lie_in_the_order_of_their_samples():
    """Two videos in turn, and an answer that is longer than what it goes on from."""
    samples = []
    for number, (video, answer) in enumerate((("v", 1), ("w", 1), ("v", 20), ("w", 1), ("v", 2))):
        ids = [*SYSTEM, *VIDEO, *[8] * answer, 10 + number]
        samples.append((sample(str(number), ids, [(len(ids) - 1, len(ids))], [video]), [features(video)]))
    in_order = pack(samples, TOKENS, 2, share=True, branches=False)
    assert in_order.targets.tolist() == [10, 11, 12, 13, 14] and in_order.layout.branches is None
    lies = pack(samples, TOKENS, 2, share=True)
    assert sorted(lies.targets.tolist()) == [10, 11, 12, 13, 14] != lies.targets.tolist()


# --- any samples, any mode: what each supervised row sees


@st.composite
def any_samples(draw):
    texts = st.lists(st.integers(2, 6), max_size=3)
    samples = []
    for index in range(draw(st.integers(1, 6))):
        videos = draw(st.sampled_from([[], ["a"], ["a"], ["b"], ["a", "b"]]))
        marks = draw(st.sampled_from([True, True, False]))
        ids = [*(SYSTEM if draw(st.sampled_from([True, True, False])) else (1,)), *draw(texts)]
        for at, name in enumerate(videos):
            patches = [50] * ROWS_OF.get(name, ROWS)
            ids += ([51, *patches, 52] if marks else patches) + (draw(texts) if at + 1 < len(videos) else [])
        ids += [*draw(texts), 2]
        starts = sorted(draw(st.sets(st.integers(1, len(ids) - 1), max_size=3)))
        spans = [(start, draw(st.integers(start + 1, end))) for start, end in zip(starts, [*starts[1:], len(ids)])]
        samples.append((marks, sample(str(index), ids, spans, videos)))
    marks = samples[0][0]
    chosen = [s for with_marks, s in samples if with_marks == marks]
    return TOKENS if marks else BARE, [(s, [features(name) for name in s.videos]) for s in chosen]


def seen(batch, prefix):
    """Each supervised row's (what it attends to, its target): token, position and features of every key."""
    n = batch.prefix_rows
    rows = [(token, at, None) for at, token in enumerate(prefix[:n])]
    values = dict(zip(batch.video_rows.tolist(), batch.features[:, 0].tolist(), strict=True))
    rows += [
        (token, at, values.get(row))
        for row, (token, at) in enumerate(zip(batch.token_ids.tolist(), batch.positions.tolist(), strict=True))
    ]
    layout = batch.layout
    keys = list(range(len(rows))) if layout.kv_rows is None else layout.kv_rows.tolist()
    contexts = []
    for q, q_end, k, k_end in zip(
        *(
            bounds.tolist()[i : len(bounds) - 1 + i]
            for bounds in (layout.cu_seqlens_q, layout.cu_seqlens_k)
            for i in (0, 1)
        )
    ):
        contexts += [tuple(rows[key] for key in keys[k : k_end - (q_end - 1 - row)]) for row in range(q, q_end)]
    for row, context in enumerate(contexts):
        assert [at for _, at, _ in context] == list(range(len(context))), "a row's keys are its sample's rows before it"
        assert context[-1] == rows[row + n], "a row sees itself last"
    assert sorted(set(batch.loss_rows.tolist())) == batch.loss_rows.tolist(), "no row predicts for two samples"
    return contexts, Counter(
        (contexts[row], target) for row, target in zip(batch.loss_rows.tolist(), batch.targets.tolist(), strict=True)
    )


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(any_samples(), st.booleans(), st.booleans(), st.sampled_from([(), SYSTEM]))
def test_every_row_sees_what_it_would_see_alone(given_samples, frozen, share, prefix):
    tokens, samples = given_samples
    batch = pack(samples, tokens, 2, prefix=prefix, frozen=frozen, share=share)
    contexts, supervised = seen(batch, prefix)
    boundaries = list(zip(*[iter(batch.boundary_rows.tolist())] * 2))
    assert batch.token_ids[batch.boundary_rows].tolist() == [tokens.start, tokens.end] * len(boundaries)
    assert (
        tokens.start is None
        or [row for start, end in boundaries for row in range(start + 1, end)] == batch.video_rows.tolist()
    )
    apart = Counter()
    for one in samples:
        apart.update(seen(pack([one], tokens, 2), ())[1])
    assert supervised == apart
    starts = {tokens.patch} if tokens.start is None else {tokens.start}
    live = [any(token in starts for token, _, _ in context) for context in contexts]
    assert not any(live[: batch.frozen_rows]) and batch.frozen_rows < batch.num_rows
    if frozen and any(live):
        assert all(live[batch.frozen_rows :])
    assert batch.frozen_rows == 0 or frozen
    if not share:
        kept = Counter(len(prefix) for one, _ in samples if prefix and _begins_with(one, prefix)) if frozen else {}
        assert batch.num_rows + sum(size * times for size, times in kept.items()) == batch.sample_rows
    assert batch.layout.cu_seqlens_q.diff().min() > 0
    expected = batch.layout.of_rows(batch.loss_rows)
    assert all(
        torch.equal(getattr(batch.loss_layout, name), getattr(expected, name))
        for name in ("cu_seqlens_q", "cu_seqlens_k", "kv_rows")
    )
    for part in batch.parts or [batch]:
        for layout in (part.layout, part.loss_layout):
            assert layout.branches is None or keys_in_parts(layout.branches) == keys_of(layout)


def _begins_with(one, prefix):
    first_supervised = min([len(one.token_ids), *(start for start, _ in one.supervised)])
    return one.token_ids[: len(prefix)] == list(prefix) and first_supervised > len(prefix)
