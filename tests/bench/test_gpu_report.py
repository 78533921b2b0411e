"""What is made of a GPU check's results: merged rows, the ladder, the profile's groups, the tables."""

import json
import logging

import gpu_rows
import pytest
from conftest import ROOT
from gpu_rows import CARD, FIRST, VERSIONS, begin, end, only, step, timed, write

from bench import report as kernels
from bench.gpu import goals, ladder, merge, profiles, report, train
from bench.ladder_plot import draw, into_readme

card, files = gpu_rows.card, gpu_rows.files


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
