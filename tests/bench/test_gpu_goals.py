"""What a GPU check's report says of goals: reached, fallen short of, or not measured."""

import gpu_rows
import pytest
from gpu_rows import CARD_ROW, begin, end, only, step, write

from bench import report as kernels
from bench.gpu import goals, ladder, merge

card, files = gpu_rows.card, gpu_rows.files


def test_goals_say_what_falls_short_and_what_is_missing(card):
    made, rows = ladder.result(card), kernels.of_checks([card])
    lines = {line.what: line for line in goals.training_lines(card, made)}
    exact = lines["7B adapter, bf16, exact"]
    assert exact.measured == "26,000 tokens/s (`exact_8448`)" and exact.reached and exact.commits == ("bbb",)
    assert lines["7B adapter, FP8"].reached and lines["7B adapter, FP8"].commits == ("bbb", "aaa")  # the product's too
    ratio = lines["exact: × reference recipe / × best transformers row"]
    assert ratio.measured == "not measured (failed: ran past its limit) / 1.25 × (`exact` and `tuned`)"
    assert ratio.reached is None  # of half of the goal nothing is known
    everything = lines["with everything (FP8, shared video): × reference recipe / × best transformers row"]
    assert "6.25 × (`shared_fp8` and `tuned`)" in everything.measured and everything.reached is None
    full = lines["7B full fine-tune"]
    assert full.reached and full.measured.startswith("600 TFLOP/s, 60.6 %")
    memory, *small = goals.memory_lines(card, made)
    assert [line.measured for line in small] == ["not measured"] * 2
    assert (
        memory.reached is False
        and memory.measured == "40.0 GiB, +33.3 % — **falls short**"
        and memory.share == "40 % of the memory"
    )
    assert next(goals.extraction_lines(card)).measured == "not measured (left out: no time)"
    swiglu, *others = [line for line in goals.kernel_lines(card, rows) if "swiglu" in line.what]
    assert others == [] and swiglu.reached and swiglu.share == "100 %" and swiglu.commits == ("bbb",)
    assert swiglu.measured == "100 µs, 4,000 GB/s, 1.25 × Liger"  # the fastest other way
    assert only([vars(line) for line in goals.kernel_lines(card, rows)], what="`rope_qk`")["measured"] == "not measured"


@pytest.mark.parametrize("speed, cosine, reached", [(2100, 0.9951, True), (1200, 0.9951, False), (2100, 0.98, False)])
def test_an_fp8_tower_must_be_faster_and_near(speed, cosine, reached):
    def row(name, speed, **more):
        return {
            "row": f"tower{name}, float16",
            "images_per_second": speed,
            "flops_per_second": 1e12,
            "commit": "aaa",
            **more,
        }

    class Card:
        name = "NVIDIA H200"

        def of(self, stage):
            return [row("", 1300), row(", CUDA graph", 1400), row(", FP8", speed, mean_cosine=cosine, least_cosine=0.9)]

        def roof(self, *of):
            return None, None

    lines = {line.what: line for line in goals.extraction_lines(Card())}
    fp8 = lines["tower, FP8, float16"]
    assert fp8.reached is reached and f"{speed:,} images/s, cosine {cosine:.4f}, 0.9000 at least" in fp8.measured
    assert lines["tower, CUDA graph, float16"].measured == "1,400 images/s"


@pytest.mark.parametrize(
    "peak, built, reached, measured",
    [
        (14.9e9, 0, True, "14.9 GB, -0.7 % (`smallest`)"),
        (14.9e9, 15.5e9, True, "14.9 GB, -0.7 % (`smallest`), 15.5 GB while it was built"),
        (14.9e9, 24.1e9, False, "14.9 GB, -0.7 % (`smallest`), 24.1 GB while it was built — **falls short**"),
        (16e9, 0, False, "16.0 GB, +6.7 % (`smallest`) — **falls short**"),
    ],
)
def test_what_must_fit_a_small_card(tmp_path, peak, built, reached, measured):
    """While the model is built too."""
    row = step("smallest", 2.0, peak_bytes=int(peak), build_peak_bytes=int(built), estimated_bytes=15 * 10**9)
    (card,) = merge.read([write(tmp_path / "s.jsonl", [begin("aaa"), row])])
    _, line, other = goals.memory_lines(card, ladder.result(card))
    assert (line.goal, line.measured, line.reached) == ("< 24 GB, within 6 % of the plan", measured, reached)
    assert other.measured == "not measured" and other.goal.startswith("< 12 GB")


def test_what_speed_costs_in_answers_is_told(tmp_path):
    def way(name, first, left, **more):
        return {
            "stage": "quality",
            "task": "answers",
            "status": "ok",
            "row": name,
            "first right": first,
            "first asked": 96,
            "left right": left,
            "left asked": 96,
        } | more

    curve = {
        "stage": "quality",
        "task": "FP8 curve",
        "status": "failed",
        "row": "FP8 curve",
        "relative error": 0.002,
        "of the last 50": -0.006,
    }
    rows = [
        begin("aaa"),
        curve,
        end("quality", "FP8 curve", "failed", "FP8 curve"),
        way("exact", 96, 93, like=None),
        way("shared", 96, 94, like="exact"),
        way("FP8", 96, 70, like="exact", status="failed", error="left: 70"),
    ]
    (card,) = merge.read([write(tmp_path / "q.jsonl", rows)])
    lines = [(line.what, line.measured, line.reached) for line in goals.quality_lines(card)]
    assert lines == [
        (
            "loss of a 113M model in FP8 against bf16, 200 steps",
            "+0.20 %, of the last 50 steps -0.60 % — **falls short**",
            False,
        ),
        ("right answers, exact", "first: 96 of 96; left: 93 of 96", None),
        ("right answers, shared", "first: 96 of 96; left: 94 of 96", True),
        ("right answers, FP8", "first: 96 of 96; left: 70 of 96 — **falls short**", False),
    ]
    mended = [begin("bbb"), curve | {"status": "ok", "of the last 50": -0.001}]
    (card,) = merge.read([tmp_path / "q.jsonl", write(tmp_path / "r.jsonl", mended)])
    assert next(goals.quality_lines(card)).reached
    later = [begin("ccc"), way("shared", 60, 94, like="exact", status="failed", error="first: 60")]
    (card,) = merge.read([tmp_path / "q.jsonl", write(tmp_path / "s.jsonl", later)])
    assert only([vars(line) for line in goals.quality_lines(card)], what="right answers, shared")["reached"] is False
    few = [begin("ddd"), way("exact", 80, 93, like=None, status="failed", error="first: 80")]
    (card,) = merge.read([tmp_path / "q.jsonl", write(tmp_path / "t.jsonl", few)])
    assert only([vars(line) for line in goals.quality_lines(card)], what="right answers, exact")["reached"] is False
    (none,) = merge.read([write(tmp_path / "n.jsonl", [begin("aaa"), CARD_ROW])])
    assert [line.measured for line in goals.quality_lines(none)] == ["not measured"] * 2


def test_the_ratio_is_of_rows_of_the_same_samples(tmp_path):
    """The fastest of theirs; batches of a budget hold others, and no flag of a user's makes `whole`."""
    rows = [
        begin("aaa"),
        step("exact", 1.0),
        step("whole", 0.9),
        step("exact_8448", 0.2),
        step("tuned", 1.25),
        step("unpadded", 1.22),
        step("reference", 3.0),
    ]
    (card,) = merge.read([write(tmp_path / "o.jsonl", rows)])
    line = only(
        [vars(line) for line in goals.training_lines(card, ladder.result(card))],
        what="exact: × reference recipe / × best transformers row",
    )
    assert line["measured"] == "3.00 × / 1.22 × (`exact` and `unpadded`)" and line["reached"]


def test_speeds_meant_for_another_card_are_no_goals(tmp_path):
    rows = [begin("eee", device="NVIDIA A100"), step("exact", 3.0)]
    (card,) = merge.read([write(tmp_path / "o.jsonl", rows)])
    line = next(goals.training_lines(card, ladder.result(card)))
    assert line.reached is None and "set for an H200" in line.goal and line.measured == "8,000 tokens/s (`exact`)"
