"""What a step is counted to move, launch and compute, and the time that is predicted from it."""

import json
from collections import Counter

import pytest
from conftest import ROOT

from bench import counted as counting
from bench import model
from bench.counted import GATHERED, Counted, CountedStep
from bench.gpu import merge, profiles
from bench.traffic import ATTENTION, ATTENTION_BACKWARD, FP8_PRODUCT, MOVED, PRODUCT, Call

# Bytes of a token and layer beside products and attention, kernels of a layer and micro-batch. The goals for exact are
# 402,000 and 26, and 26 for each but full and LoRA: bench/NOTES.md.
LIMITS = {
    "exact": (401_300, 21),
    "whole": (389_200, 20),
    "fp8": (369_000, 22),
    "shared": (432_400, 25),
    "shared_fp8": (399_400, 26),
    "full": (691_600, 32.5),
    "lora": (408_200, 61),
}
MEASURED = {row["row"]: row for row in json.loads((ROOT / "bench/results/train-gpu-7b-h200.json").read_text())["rows"]}

# Launches for frozen rows alone: a kernel, its launches by a layer, and by the last one.
APART = (
    ("_add_rms_norm_fwd_kernel", 2, 1),
    ("_swiglu_fwd_kernel", 1, 0),
    ("_swiglu_fp8_fwd_kernel", 1, 0),
    ("_rope_qk_kernel", 1, 1),
    ("_quantize_fp8_kernel", 1, 0),
)
H200 = ROOT / "bench/results/gpu-h200.jsonl"


def profile_of(name):
    return next(row for row in profiles.of(merge.read([H200])[0]) if row["row"] == name)


@pytest.fixture(scope="module")
def seven_billion(tmp_path_factory):
    """Function that counts a row of the preset gpu-7b, once."""
    made, steps = Counted("gpu-7b", tmp_path_factory.mktemp("counted") / "folder"), {}

    def step(name):
        if name not in steps:
            steps[name] = made.step(name.removesuffix(GATHERED), gathered=name.endswith(GATHERED))
        return steps[name]

    return step


@pytest.mark.slow
@pytest.mark.parametrize("name", LIMITS)
def test_a_layer_moves_and_launches_no_more(name, seven_billion):
    step, (most_bytes, most_launches) = seven_billion(name), LIMITS[name]
    assert 0.98 * most_bytes < step.bytes_per_row <= most_bytes, step.table()  # nothing was left uncounted
    assert step.launches_per_layer <= most_launches, step.table()


@pytest.mark.slow
def test_only_gathered_rows_are_placed_twice(seven_billion):
    """Where most rows are keys once, what forward placed waits for backward."""
    once, twice = ["exact", "fp8", "shared", "shared_fp8"], ["shared" + GATHERED, "shared_fp8" + GATHERED]
    for name, times in {"whole": 0, **dict.fromkeys(once, 1), **dict.fromkeys(twice, 2)}.items():
        step = seven_billion(name)
        placed = sum(count for call, count in step.layer.items() if call.name == "_place_keys_kernel")
        assert placed == times * step.micro_batches, name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shared", "shared_fp8"])
def test_a_shared_video_has_no_copies_of_its_keys(name, seven_billion):
    """Attention in two parts makes no tensor of as many rows as all segments have keys; gathered keys are one."""
    step, gathered = seven_billion(name), seven_billion(name + GATHERED)
    assert step.key_rows == gathered.key_rows and min(step.key_rows) > 2 * step.rows / step.micro_batches
    assert not step.key_rows & step.leading and gathered.key_rows <= gathered.leading


@pytest.mark.slow
@pytest.mark.parametrize("name", model.rows_of("gpu-7b"))
def test_the_gpu_executed_what_is_counted(name, seven_billion):
    step, measured = seven_billion(name), MEASURED[name.removesuffix(GATHERED)]
    assert (step.rows, step.samples) == (measured["rows"], measured["samples"])
    assert sum(call.flops * times for call, times in step.calls().items()) == measured["flops"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["exact", "fp8", "shared_fp8" + GATHERED, "full"])
def test_the_gpu_launched_what_is_counted(name, seven_billion):
    """Kernels of ours, as often as the committed profile names them.

    Then keys were placed twice, shared or not, and by a kernel that rotated no queries. One of its own quantised the
    gradients of `o` and `down`. Frozen rows were computed apart, by all layers but the last, which made their keys.
    """
    calls, step = Counter(), seven_billion(name)
    for call, times in step.calls().items():
        calls[call.name] += times
    ours = {
        kernel: times
        for kernel, _, times in profile_of(name.removesuffix(GATHERED))["kernels"]
        if kernel.startswith("_")
    }
    if any(call.name == "_place_keys_kernel" for call in step.layer):
        calls["_rope_qk_kernel"] += step.micro_batches * (step.layers - 1)
    if not name.endswith(GATHERED):
        calls["_place_keys_kernel"] *= 2
    if name in ("exact", "fp8"):
        for kernel, of_a_layer, of_the_last in APART:
            calls[kernel] += step.micro_batches * (of_a_layer * (step.layers - 1) + of_the_last)
    if "fp8" in name:
        calls["_quantize_fp8_kernel"] += 2 * step.layers * step.micro_batches
    assert len(ours) > 8 and ours == {kernel: calls[kernel] for kernel in ours}


@pytest.mark.slow
def test_every_layer_but_the_last_takes_the_same(seven_billion, tmp_path, monkeypatch):
    monkeypatch.setattr(counting, "FEW", 4)
    other = Counted("gpu-7b", tmp_path / "folder").step("exact")
    assert other == seven_billion("exact")


ROOFS = model.Roofs(
    "a card", {MOVED: 1e9, PRODUCT: 1e12, FP8_PRODUCT: None, ATTENTION: 5e11, ATTENTION_BACKWARD: 1e12}, ()
)


def step_of(*calls, others=()):
    return CountedStep(3, 100, 10, 1, Counter(calls), Counter(others))


def test_each_kind_of_call_has_its_roof():
    found = model.predict(
        "exact",
        step_of(
            Call(MOVED, "norm", 10**9),
            Call(PRODUCT, "mm", 10**6, 10**12),
            Call(ATTENTION, "flash", 0, 10**12),
            others=[Call(PRODUCT, "few rows", 3 * 10**9, 10**6), Call(ATTENTION_BACKWARD, "flash", 0, 10**12, 3)],
        ),
        ROOFS,
    )
    seconds = {"products": 2.0 + 3.0, "attention": 2 * 2.0 + 1.0, "moved": 2.0, "gaps": 10 * model.GAP_SECONDS}
    assert found.groups == pytest.approx(seconds) and found.seconds == pytest.approx(sum(seconds.values()))


def test_a_host_that_launches_too_slowly_is_waited_for():
    found = model.predict("exact", step_of(*[Call(MOVED, "norm", 1)] * 1000), ROOFS)
    assert found.seconds == found.host == pytest.approx(2000 * model.HOST_SECONDS)


def test_a_card_without_fp8_units_has_no_such_row():
    assert model.predict("fp8", step_of(Call(FP8_PRODUCT, "mm", 1, 1)), ROOFS) is None


def test_other_data_than_those_measured_are_refused():
    [found] = [model.predict("exact", step_of(Call(MOVED, "norm", 10**9)), ROOFS)]
    measured = {"rows": 100, "samples": 10, "seconds": 4.0, "commit": "abc"}
    [row] = model.compared([found], {"exact": measured})
    assert row["difference"] == pytest.approx(4.0 / found.seconds - 1)
    with pytest.raises(ValueError, match="row exact: a step of 10 samples and 101 tokens was measured, of 10 and 100"):
        model.compared([found], {"exact": measured | {"rows": 101}})


@pytest.mark.slow
def test_the_command_prints_predicted_beside_measured(tmp_path, capsys):
    file = tmp_path / "model.json"
    assert model.main(["--card", "h200", "--json", str(file)]) == 0
    said = capsys.readouterr().out
    line = next(line for line in said.splitlines() if line.split()[:1] == ["exact"])
    for key, digits in (("tokens_per_second", ",.0f"), ("samples_per_second", ".1f")):
        assert format(MEASURED["exact"][key], digits) in line.split()
    made = json.loads(file.read_text())
    assert made["counts"]["exact"]["launches_per_layer"] == 21 and "assumed: 1 µs" in said
    beside = [line.split(GATHERED)[1].split()[0] for line in said.splitlines() if f"shared_fp8{GATHERED}" in line]
    assert {"products", "attention", "moved", "_place_keys_kernel"} <= set(beside)
    committed = json.loads((ROOT / "bench/results/model-h200.json").read_text())  # else write it again, and the docs
    assert [row["row"] for row in committed["rows"]] == [row["row"] for row in made["rows"]]
    for row, other in zip(committed["rows"], made["rows"]):
        assert row["predicted"]["seconds"] == pytest.approx(other["predicted"]["seconds"], rel=1e-4), row["row"]
    told = (ROOT / "docs/performance.md").read_text().partition("predicted tokens/s")[2].partition("\n\n")[0]
    figures = [f"| {row['predicted']['tokens_per_second']:,.0f} |" for row in committed["rows"]]
    assert told.count("\n| `") == sum(figure in told for figure in figures) == 9
    rows = {row["row"]: row for row in made["rows"]}
    assert rows.keys() == set(model.rows_of("gpu-7b"))
    assert {name for name, row in rows.items() if "measured" not in row} == {"shared", "shared_fp8"}


@pytest.mark.slow
def test_a_card_that_was_not_measured_has_its_data_sheet(capsys):
    assert model.main(["--card", "a100"]) == 0
    said = capsys.readouterr().out
    assert "NVIDIA A100-SXM4-80GB" in said and "nominal: the data sheet's" in said and "not measured" in said
    assert not [line for line in said.splitlines() if line.split()[:1] == ["fp8"]]


def test_a_report_says_why_it_predicts_nothing():
    card = merge.Card("a card", [row for row in merge.read([H200])[0].rows if not row["task"].endswith("profile")])
    assert model.beside(card, "gpu-7b").startswith(
        "no step is predicted: no profile of exact on a card: run the check's"
    )


def test_an_unknown_card_is_told_what_there_is(capsys):
    with pytest.raises(SystemExit):
        model.main(["--card", "gtx"])
    assert "gpu-gtx.jsonl does not exist" in capsys.readouterr().err
