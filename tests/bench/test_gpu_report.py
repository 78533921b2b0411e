"""What is made of a GPU check's results: merged rows, the ladder, the profile's groups, the tables of goals."""

import json
import logging

import pytest
from conftest import ROOT

from bench import report as kernels
from bench.gpu import goals, ladder, merge, profiles, report, train
from bench.ladder_plot import draw, into_readme

CARD = "NVIDIA H200"
VERSIONS = {"torch": "2.11.0", "triton": "3.6.0", "transformers": "5.17.0"}


def begin(commit, date="2026-01-01", **more):
    return {
        "stage": "run",
        "task": "run",
        "status": "ok",
        "row": "environment",
        "small": False,
        "device": CARD,
        "python": "3.12.3",
        "commit": commit,
        "date": date,
        "versions": VERSIONS,
    } | more


def end(stage, task, status="ok", error=None):
    return {"stage": stage, "task": task, "status": status, "row": "end", "seconds": 1.0} | (
        {"error": f"{status.replace('_', ' ')}: {error}"} if error else {}
    )


def probed(name, **figures):
    return {"stage": "probe", "task": "any", "status": "ok", "at": 0.1, "row": name, **figures}


CARD_ROW = probed("card", driver_version="580.1", memory_bytes=100 * 2**30)


def timed(kernel, way, median, *, stage="kernels", bytes=4e8, case="forward N=1", **more):
    row = {
        "stage": stage,
        "task": kernel,
        "status": "ok",
        "at": 1.0,
        "row": f"{case} {way}",
        "kernel": kernel,
        "case": case,
        "way": way,
        "median": median,
        "iqr": median / 50,
        "rounds": 50,
        "small": False,
        "device": CARD,
        "copy_bytes_per_second": 4e12,
        "matmul_flops_per_second": 8e14,
        "baseline": "eager",
        "bytes": bytes,
        "flops": 0,
        "peak_extra_mib": 1.0,
        "gb_per_s": round(bytes / median / 1e9, 2),
    }
    return row | {"percent_of_copy": round(100 * bytes / median / 4e12, 1)} | more


def step(name, seconds, *, rows=24_000, loss=11.0, flops=4e14, **more):
    times = [seconds] * 3 if seconds else []
    row = {
        "stage": "train",
        "task": name,
        "status": "ok",
        "at": 9.0,
        "row": name,
        "title": f"title of {name}",
        "dtype": "bf16",
        "loss": loss,
        "norm": 15.0,
        "samples": 30,
        "rows": rows,
        "sample_rows": 24_000,
        "flops": flops,
        "seconds_each": times,
        "start_bytes": 0,
        "peak_bytes": 40 * 2**30,
    }
    return row | ({"seconds": seconds} if seconds else {}) | more


def profiled(name, device_ms, names):
    return {
        "stage": "train",
        "task": f"{name} profile",
        "status": "ok",
        "row": name,
        "device_ms": device_ms,
        "launches": 99,
        "kernels": names,
    }


def best(seconds, block):
    return {
        "stage": "sweep",
        "task": "swiglu",
        "status": "ok",
        "at": 1.0,
        "row": f"best: forward N=1 block {block}",
        "best": True,
        "kernel": "swiglu",
        "case": "forward N=1",
        "candidate": {"block": block},
        "seconds": seconds,
        "percent_of_copy": 125.0,
    }


FIRST = [
    begin("aaa"),
    CARD_ROW,
    probed("product, burst", flops_per_second=8e14),
    probed("product, sustained", flops_per_second=6e14),
    probed("products of a layer, 8448 rows, fp8", flops_per_second=1.5e15),
    timed("swiglu", "ours", 2e-4),
    timed("swiglu", "eager", 4e-4),
    end("kernels", "swiglu"),
    step("exact", 2.0, estimated_bytes=39 * 2**30),
    end("train", "exact"),
    end("train", "reference", "failed", "ran past its limit"),
    end("extract", "tower", "left_out", "no time"),
    best(7e-5, 256),
    {"stage": "correct", "task": "AdamW", "status": "failed", "row": "float32", "at": 1.0},
    end("correct", "AdamW", "failed", "float32"),
]
SECOND = [
    begin("bbb", "2026-01-02"),
    timed("swiglu", "ours", 1e-4),
    timed("swiglu", "Liger", 1.25e-4, stage="libraries"),
    step("exact", 1.0, estimated_bytes=30 * 2**30),
    step("exact_8448", 0.5, rows=13_000, sample_rows=13_500, samples=16),
    step("tuned", 1.25),
    step("strong", 1.5),
    step("strong_video_first", None),
    step("shared", 0.4, rows=6000),
    step("shared_fp8", 0.2, rows=6000),
    step("fp8", 0.7),
    step("full", 1.6, flops=9.6e14),
    profiled(
        "exact", 100.0, [["nvjet_sm90_tst", 50.0, 9], ["void pytorch_flash::flash_fwd_kernel<cutlass::bf16>", 20.0, 3]]
    ),
    end("train", "reference", "left_out", "no time"),
    best(8e-5, 512),
]


def write(path, rows, cut=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + cut)
    return path


@pytest.fixture
def files(tmp_path):
    return [
        write(tmp_path / "a" / "results.jsonl", FIRST),
        write(tmp_path / "b.jsonl", SECOND, '{"stage": "train", "ro'),
    ]


@pytest.fixture
def card(files):
    (card,) = merge.read(files)
    return card


def only(rows, **wanted):
    (row,) = [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]
    return row


def test_the_later_row_counts_and_says_where_it_is_from(card):
    row = only(card.rows, row="forward N=1 ours")
    assert (row["median"], row["commit"], row["driver"], row["date"]) == (1e-4, "bbb", None, "2026-01-02")
    assert only(card.rows, row="forward N=1 eager")["commit"] == "aaa"  # which no later run timed
    assert only(card.rows, row="card") | {"driver": "580.1", "card": CARD, "versions": VERSIONS} == only(
        card.rows, row="card"
    )
    assert not any("at" in row or row["row"] in ("end", "environment") for row in card.rows)
    assert card.slug == "h200"


def test_failures_are_kept_apart_until_they_are_measured(card, files, tmp_path):
    assert [(row["task"], row["row"]) for row in card.failed] == [
        ("reference", "end"),
        ("AdamW", "float32"),
        ("AdamW", "end"),
    ]
    assert [row["task"] for row in card.left_out] == ["tower"]  # the reference failed before it was left out
    assert card.why_missing("train", "reference") == " (failed: ran past its limit)"
    third = [
        begin("ccc"),
        step("reference", 3.0),
        end("train", "reference"),
        {**FIRST[-2], "status": "ok"},
        end("correct", "AdamW"),
    ]
    (mended,) = merge.read([*files, write(tmp_path / "c.jsonl", third)])
    assert mended.failed == [] and only(mended.rows, task="AdamW")["commit"] == "ccc"
    failing = [begin("ddd"), step("exact", 9.0, status="failed"), end("train", "exact", "failed", "killed")]
    (kept,) = merge.read([*files, write(tmp_path / "d.jsonl", failing)])
    assert only(kept.rows, task="exact")["commit"] == "bbb" and only(kept.failed, row="exact")["commit"] == "ddd"


def test_cards_stay_apart_and_tiny_runs_are_passed_over(files, tmp_path):
    other = [begin("eee", device="NVIDIA H100 80GB HBM3"), step("exact", 3.0)]
    tiny = [begin("fff", small=True), step("exact", 0.001)]
    cards = merge.read([*files, write(tmp_path / "o.jsonl", other + tiny)])
    assert [card.slug for card in cards] == ["h200", "h100-80gb-hbm3"]
    assert only(cards[0].rows, task="exact")["commit"] == "bbb" and only(cards[1].rows, task="exact")["commit"] == "eee"
    with pytest.raises(ValueError, match="gpu_check.sh"):
        merge.read([write(tmp_path / "tiny.jsonl", tiny)])
    with pytest.raises(ValueError, match="o.jsonl.*environment"):
        merge.read([write(tmp_path / "o.jsonl", other[1:])])


def test_what_was_merged_can_be_merged_again(files, card, tmp_path):
    stored = write(tmp_path / "gpu-h200.jsonl", merge.lines(card))
    assert merge.read([stored]) == [card]
    assert merge.read([write(tmp_path / "a.jsonl", merge.lines(merge.read(files[:1])[0])), files[1]]) == [card]


def test_roofs_come_from_the_rows_own_run_first(card):
    old, new = only(card.rows, row="card"), only(card.rows, task="exact")
    assert card.roof("burst", old)[0] == card.roof("burst", new)[0] == 8e14
    assert (card.roof("burst", old)[1]["commit"], card.roof("burst", new)[1]["commit"]) == ("aaa", "bbb")
    assert card.roof("sustained", new)[0] == 6e14 and card.roof("fp8", new)[0] == 1.5e15
    assert merge.Card("X", [new]).roof("burst", new) == (None, None)


@pytest.mark.slow
def test_ladder_is_a_file_of_train_step(card, tmp_path):
    made = ladder.result(card)
    names = [row["row"] for row in made["rows"]]
    assert names == [
        "strong",
        "tuned",
        "strong_video_first",
        "exact",
        "exact_8448",
        "shared",
        "fp8",
        "shared_fp8",
        "full",
    ]
    exact = only(made["rows"], row="exact")
    assert (exact["samples_per_second"], exact["seconds"], exact["spread"]) == (30.0, [1.0] * 3, 0.0)
    assert exact["matmul_share"] == pytest.approx(4e14 / 8e14) and exact["sustained_share"] == pytest.approx(4 / 6)
    assert only(made["rows"], row="fp8")["fp8_share"] == pytest.approx(4e14 / 0.7 / 1.5e15) and "fp8_share" not in exact
    assert made["against"] == "tuned" and made["faults"] == [] and made["environment"]["commit"] == "bbb"
    assert made["ratios"]["exact_vs_tuned"] == pytest.approx(1.25)
    assert made["ratios"]["exact_8448_vs_tuned"] == pytest.approx(27_000 / 19_200)  # other samples: rows are compared
    assert "full_vs_tuned" not in made["ratios"]
    draw(json.loads(json.dumps(made))).savefig(tmp_path / "ladder.png")
    row = next(line for line in ladder.table(made).splitlines() if line.startswith("| `exact` "))
    assert [cell.strip() for cell in row.split("|")[3:-1]] == [
        "30.0",
        "0.0 %",
        "24,000",
        "400",
        "50 %",
        "67 %",
        "",
        "40.0 GiB",
        "1.50",
        "1.25",
        "`bbb`",
    ]


def test_a_wrong_loss_is_a_fault(files, tmp_path):
    (card,) = merge.read([*files, write(tmp_path / "c.jsonl", [begin("ccc"), step("tuned", 1.0, loss=11.5)])])
    (fault,) = ladder.result(card)["faults"]
    assert "tuned: loss 11.5" in fault


def test_a_card_without_training_has_no_ladder(files, tmp_path):
    (card,) = merge.read([write(tmp_path / "k.jsonl", [begin("aaa"), timed("swiglu", "ours", 1e-4)])])
    assert ladder.result(card) is None and profiles.draw(card) is None
    lines = {line.what: line for line in goals.training_lines(card, None)}
    assert lines["7B full fine-tune"].measured == "not measured" and len(lines) == 6


@pytest.mark.parametrize(
    "name, group",
    [
        ("nvjet_sm90_qqtst_128x128", "matrix products"),
        ("void cutlass::Kernel2<cutlass_75_tensorop>", "matrix products"),
        ("void pytorch_flash::flash_bwd_kernel<cutlass::half>", "attention"),
        ("void at::native::(anonymous namespace)::CatArrayBatchedCopy<at::native", "gathering keys"),
        ("void at_cuda_detail::cub::detail::radix_sort::DeviceRadixSortOnesweepKernel", "gathering keys"),
        ("void at::native::(anonymous namespace)::sum_and_scatter<float, long>", "gathering keys"),
        ("_place_keys_kernel", "gathering keys"),
        ("_add_rms_norm_bwd_kernel", "norms"),
        ("_swiglu_fwd_kernel", "SwiGLU"),
        ("_rope_qk_kernel", "rotary"),
        ("_quantize_fp8_kernel", "quantise"),
        ("_adamw8bit_step_kernel", "optimizer"),
        ("void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda", "copies"),
        ("Memset (Device)", "copies"),
        ("_softmax_gradient_kernel", "the rest"),
    ],
)
def test_groups_of_kernels(name, group):
    assert profiles.group_of(name) == group


def test_profile_is_drawn_whole(card, tmp_path):
    (row,) = profiles.of(card)
    spent = profiles.grouped(row)
    assert sum(spent.values()) == pytest.approx(100.0)
    assert (spent["matrix products"], spent["attention"], spent["the rest"]) == (50.0, 20.0, pytest.approx(30.0))
    figure = profiles.draw(card)
    assert sum(bar.get_width() for bar in figure.axes[0].patches) == pytest.approx(100.0)
    texts = [text.get_text() for text in figure.texts]
    assert {"50.0 ms  50.0 %", "30.0 ms  30.0 %", "100 ms, 99 launches", "1,000 ms"} <= set(texts)
    figure.savefig(tmp_path / "step.png")
    width, height = figure.get_size_inches() * figure.dpi
    for text in figure.texts:  # none is cut off
        box = text.get_window_extent()
        assert 0 <= box.x0 and box.x1 <= width and 0 <= box.y0 and box.y1 <= height, text.get_text()


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


def test_kernels_table_reads_a_checks_rows(files, tmp_path, card):
    stored = write(tmp_path / "results" / "gpu-h200.jsonl", merge.lines(card))
    rows = kernels.read([stored.parent])
    assert [(row["way"], row["times_as_fast_as_baseline"]) for row in rows] == [
        ("ours", 4.0),
        ("eager", 1.0),
        ("Liger", 3.2),
    ]
    assert "swiglu on a GPU" not in kernels.table(rows) and "driver" not in kernels.table(rows)


def test_sweep_shows_the_best_beside_todays(card):
    heads, line = report.sweep(card, kernels.of_checks([card])).splitlines()
    assert heads.split()[-2:] == ["candidate", "commits"]
    assert line.split() == "swiglu forward N=1 80.0 µs 125 % 100 µs 100 % 1.25 block=512 bbb".split()


@pytest.mark.slow
def test_command_writes_everything_and_the_same_again(files, tmp_path, capsys):
    for folder in (tmp_path, tmp_path / "bench"):
        folder.mkdir(exist_ok=True)
        (folder / "README.md").write_text(f"# A\n{report.BEGIN}\nold\n{report.END}\nrest\n")
    out, plots = tmp_path / "bench" / "results", tmp_path / "bench" / "plots"
    folders = ["--out", str(out), "--plots", str(plots), "--readme", str(tmp_path / "README.md")]
    assert report.main([*map(str, files), *folders]) == 0
    names = {path.name for folder in (out, plots) for path in folder.iterdir()}
    assert names == {
        "gpu-h200.jsonl",
        "train-gpu-7b-h200.json",
        "sweep-h200.txt",
        "train_step-h200.png",
        "kernels-h200.png",
        "step-h200.png",
    }
    texts = [(folder / "README.md").read_text() for folder in (tmp_path, tmp_path / "bench")]
    assert all("old" not in text and text.endswith(f"{report.END}\nrest\n") for text in texts)
    assert "(bench/plots/train_step-h200.png)" in texts[0] and "(plots/step-h200.png)" in texts[1]
    assert sum(line.startswith("| ") for line in texts[0].splitlines()) - 1 <= 10
    assert "failed: train reference: ran past its limit (`aaa`)" in texts[1] and "extract tower" in texts[1]
    assert texts[1].count("failed: correct AdamW") == 1  # the row, not its task's end too
    told = capsys.readouterr().out
    assert report.main([str(out / "gpu-h200.jsonl"), *folders]) == 0  # from what it wrote itself
    assert texts == [(folder / "README.md").read_text() for folder in (tmp_path, tmp_path / "bench")]
    assert capsys.readouterr().out == told
    wrong = write(tmp_path / "w.jsonl", [begin("ccc"), step("tuned", 1.0, loss=12.0)])
    assert report.main([str(out / "gpu-h200.jsonl"), str(wrong), *folders]) == 1
    assert "wrong: bf16 tuned: loss 12" in (tmp_path / "bench" / "README.md").read_text()


@pytest.mark.parametrize("readme, part", [("README.md", report.Report.short), ("bench/README.md", report.Report.long)])
def test_readmes_show_the_committed_results(readme, part):
    text = (ROOT / readme).read_text()
    stored = sorted((ROOT / "bench" / "results").glob("gpu-*.jsonl"))
    if stored:
        reports = [
            report.Report(card, ROOT / "bench" / "results", ROOT / "bench" / "plots") for card in merge.read(stored)
        ]
        shown = "\n\n".join(part(made, ROOT / readme) for made in reports)
    else:
        shown = "Not yet measured."
    assert into_readme(text, shown, report.BEGIN, report.END) == text, f"the comment in {readme} says what renews it"


@pytest.mark.slow
def test_only_the_row_that_built_the_model_says_what_was_planned(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTVID_CHECK_SCRATCH", str(tmp_path))
    monkeypatch.setattr(train, "HELD", {})
    logger = logging.getLogger("fastvid")
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "level", logger.level)
    list(train.data(True, "tiny-gpu"))
    exact, shared = (next(train.row(True, "tiny-gpu", name)) for name in ("exact", "shared"))
    assert exact["estimated_bytes"] > 0 and "estimated_bytes" not in shared
