"""Videos of different numbers of rows in one run: what is packed, learned, left out, and refused."""

import json

import pytest
import torch
from model_cases import assert_same_gradients, loss_and_gradients
from training_run import CHANNELS, SAMPLES, config_of, flags, losses, three_a_video, write_run

from fastvid import train, validate
from fastvid.config import InspectConfig, ValidateConfig
from fastvid.data.conversation import system_prefix
from fastvid.data.dataset import SampleSet
from fastvid.data.packing import pack
from fastvid.data.tokenizer import load_tokenizer
from fastvid.dist import parallel
from fastvid.features import folder as feature_folder
from fastvid.features.file import save_features
from fastvid.flags import parse
from fastvid.inspection import inspect_records
from fastvid.training.metrics import read_metrics

WORLD = parallel.World(0, 1, 0, torch.device("cpu"), False)
ROWS = (676, 356, 20, 7)
LONG = ["--model_max_length", "1024"]


def write_features(folder, video, rows, channels=CHANNELS):
    """One of the four: .safetensors in the three precisions, and .pkl."""
    features = torch.randn(rows, channels, generator=torch.Generator().manual_seed(rows))
    dtype = {356: torch.bfloat16, 20: torch.float32}.get(rows, torch.float16)
    save_features(folder / (f"clip{video}.pkl" if rows == 676 else f"clip{video}.safetensors"), features.to(dtype), {})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Three questions about each of four videos, and one about two of them; each third before its video's rows."""
    folder = write_run(tmp_path_factory.mktemp("run"), max_position_embeddings=2048)
    for path in (folder / "feats").iterdir():
        path.unlink()
    for video, rows in enumerate(ROWS):
        write_features(folder / "feats", video, rows)
    records = three_a_video(folder, "pkl")
    two = {
        "id": "two",
        "videos": ["clip2.pkl", "clip1.pkl"],
        "conversations": [
            {"from": "human", "value": "<video>\nthe cat\n<video>"},
            {"from": "gpt", "value": "the red house"},
        ],
    }
    (folder / "train.json").write_text(json.dumps([*records, two]))
    return folder


def build(run, *more):
    return train.build(config_of(run, "unused", "--dataloader_num_workers", "0", *LONG, *more), WORLD)


# --- values and gradients


def samples_apart_and_packed(state, frozen, share):
    samples = [state.loader.samples.read(index) for index in range(SAMPLES + 1)]
    tokens, channels = state.tokenizer.tokens, state.loader.samples.channels
    prefix = system_prefix(state.tokenizer) if frozen or share else ()
    packed = pack(samples, tokens, channels, prefix=prefix, frozen=frozen, share=share)
    return [pack([one], tokens, channels) for one in samples], packed


def clone(gradients):
    return {name: gradient.clone() for name, gradient in gradients.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    "mode, frozen, share",
    [
        ("adapter", False, False),
        ("adapter", False, True),
        ("adapter", True, False),
        ("adapter", True, True),
        ("full", False, False),
        ("full", False, True),
    ],
)
def test_packed_together_they_give_the_loss_and_gradients_of_the_samples_apart(run, mode, frozen, share):
    state = build(run, *([] if mode == "adapter" else ["--tune_mm_mlp_adapter", "False"]))
    apart, packed = samples_apart_and_packed(state, frozen, share)
    assert [len(batch.video_rows) for batch in apart] == [rows for rows in ROWS for _ in range(3)] + [20 + 356]
    copies = [2, 2, 2, 2] if share else [3, 3, 3, 3]  # of three questions one stands before its video
    assert len(packed.features) == sum(n * rows for n, rows in zip(copies, ROWS)) + 20 + 356
    assert packed.features.dtype == torch.float32 and packed.sample_rows == sum(batch.num_rows for batch in apart)
    loss, found = loss_and_gradients(state.model, packed)
    found = clone(found)
    expected_loss, expected = loss_and_gradients(state.model, *apart)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert_same_gradients(found, expected, 1e-5)
    assert all(gradient.any() for gradient in expected.values())


@pytest.mark.slow
@pytest.mark.parametrize("frozen, share", [(False, False), (True, True)])
def test_in_bf16_they_are_as_near_to_fp32_as_the_samples_apart(run, frozen, share):
    exact = build(run)
    true_loss, true = loss_and_gradients(exact.model, *samples_apart_and_packed(exact, frozen, share)[0])
    state = build(run, "--bf16", "True")
    apart, packed = samples_apart_and_packed(state, frozen, share)
    apart_loss, eager = loss_and_gradients(state.model, *apart)
    eager = clone(eager)
    loss, found = loss_and_gradients(state.model, packed)
    assert loss == pytest.approx(true_loss, rel=max(2 * abs(apart_loss / true_loss - 1), 1e-3))
    for name, gradient in true.items():
        error, allowed = (x[name].double().sub(gradient).abs().max() for x in (found, eager))
        assert error <= 2 * allowed + 2**-8 * gradient.abs().max(), name


# --- whole runs


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--tokens_per_batch", "1200", "--share_video"]], ids=["samples", "rows, shared"])
def test_a_folder_of_both_formats_and_several_row_counts_trains(run, tmp_path, more):
    assert train.main(flags(run, tmp_path, *LONG, "--num_train_epochs", "1", *more)) == 0
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert len(losses(tmp_path)) > 1 and all(line.get("skipped_samples", 0) == 0 for line in lines)


def test_planned_rows_are_those_of_each_video(run):
    state = build(run, "--tokens_per_batch", "1200")
    rows, samples = state.order.rows, state.loader.samples
    for index in range(SAMPLES + 1):
        one = pack([samples.read(index)], state.tokenizer.tokens, CHANNELS, **state.loader.packing)
        assert rows.own[index] + rows.shared[index] == one.num_rows
    assert rows.own[:3].min() > 676 and rows.own[9:12].max() < 150


@pytest.mark.slow
def test_a_video_longer_than_the_sample_is_left_out_and_reported(run, tmp_path, caplog):
    short = ["--model_max_length", "700"]
    assert train.main(flags(run, tmp_path / "out", *short, "--num_train_epochs", "1")) == 0
    said = sorted(line.partition("skipped sample ")[2] for line in caplog.text.splitlines() if "skipped sample" in line)
    assert [line.partition(" (")[0] for line in said] == ["clip0", "clip1", "clip2"]
    assert all("(from 0)): a video is cut:" in line for line in said)
    assert read_metrics(tmp_path / "out" / "metrics.jsonl")[-1]["skipped_samples"] == 3
    state = build(run, *short, "--tokens_per_batch", "1200")
    assert not state.order.rows.own[:3].any() and state.order.rows.own[3:].all()


# --- other shapes


@pytest.fixture
def bad(run, tmp_path):
    """The run's features, of which clip2's have a channel too many."""
    for video, rows in enumerate(ROWS):
        write_features(tmp_path, video, rows, CHANNELS + (rows == 20))
    return tmp_path


def refused(state):
    found = [state.loader.samples.encode(index).refused for index in range(SAMPLES + 1)]
    return {index: reason for index, reason in enumerate(found) if reason}


def test_features_of_other_channels_cost_their_samples_with_file_and_shapes(run, bad):
    found = refused(build(run, "--video_folder", str(bad)))
    assert sorted(found) == [6, 7, 8, 12]
    assert all(
        f"{bad}/clip2.safetensors: features are [20, {CHANNELS + 1}], expected [any number, {CHANNELS}]" in reason
        for reason in found.values()
    )


@pytest.mark.parametrize("more", [["--num_video_tokens", "676"], ["--parity", "reference"]], ids=["flag", "parity"])
def test_one_number_of_rows_is_required_where_it_is_asked_for(run, more):
    found = refused(build(run, *more))
    assert sorted(found) == list(range(3, SAMPLES + 1))
    assert f"clip1.safetensors: features are [356, {CHANNELS}], expected [676, {CHANNELS}]" in found[3]


def test_a_validation_set_may_have_other_rows_but_under_parity(run, tmp_path):
    records = json.loads((run / "train.json").read_text())
    data = tmp_path / "eval.json"
    data.write_text(json.dumps(records[6:9]))
    more = ["--eval_data_path", str(data), "--eval_strategy", "epoch"]
    batches, odd = build(run, *more).evaluation.read(0)
    assert not odd and len(batches[0].features) in (20, 40, 60)
    with pytest.raises(ValueError, match=rf"clip2\.safetensors: features are \[20, {CHANNELS}\], expected \[676, "):
        build(run, *more, "--parity", "reference")


def test_a_file_that_changes_while_the_run_reads_costs_its_samples(run, tmp_path):
    for video, rows in enumerate(ROWS):
        write_features(tmp_path, video, rows)
    samples = build(run, "--video_folder", str(tmp_path)).loader.samples
    samples.read(6)
    write_features(tmp_path, 2, 20)
    samples.read(6)
    save_features(tmp_path / "clip2.safetensors", torch.ones(21, CHANNELS), {})
    with pytest.raises(ValueError, match=rf"clip2\.safetensors was \[20, {CHANNELS}\] .* is \[21, {CHANNELS}\] now"):
        samples.read(6)


def test_headers_are_read_once_and_no_values_are_read_for_them(run, monkeypatch):
    probe, probed = feature_folder.describe_features, []
    monkeypatch.setattr(feature_folder, "describe_features", lambda path: probed.append(path.name) or probe(path))
    monkeypatch.setattr(feature_folder, "load_features", lambda path: pytest.fail("values were read"))
    config = config_of(run, "unused", *LONG)
    samples = SampleSet(
        config.data_path,
        load_tokenizer(config.model_name_or_path, True),
        feature_folder.FeatureFolder(config.video_folder),
        config,
    )
    for _ in range(2):
        assert not any(samples.encode(index).refused for index in range(len(samples)))
    assert sorted(probed) == ["clip0.pkl", "clip1.safetensors", "clip2.safetensors", "clip3.safetensors"]


# --- the other commands


@pytest.mark.parametrize(
    "more", [[], ["--num_video_tokens", "676"], ["--parity", "reference"]], ids=["any", "flag", "parity"]
)
def test_inspect_shows_what_train_does(run, more):
    samples = build(run, *more).loader.samples
    lines = list(inspect_records(parse(InspectConfig, flags(run, "unused", *LONG, *more))))
    assert len(lines) == len(samples)
    for index, line in enumerate(lines):
        sample = samples.encode(index)
        assert (line["warning"] is None) == (sample.refused is None)
        if sample.refused:
            assert sample.refused in line["warning"]
        else:
            assert (line["input_ids"], line["supervised"]) == (sample.token_ids, sample.supervised)
    assert any(line["warning"] for line in lines) == bool(more)
    assert list(inspect_records(parse(InspectConfig, flags(run, "unused", *LONG, *more, "--index", "4")))) == lines[4:5]


@pytest.mark.parametrize(
    "more, bad",
    [([], 0), (["--num_video_tokens", "356"], 3), (["--parity", "reference"], 3)],
    ids=["any", "flag", "parity"],
)
def test_validate_says_so_beforehand(run, more, bad):
    report = validate.validate(
        parse(ValidateConfig, ["--data_path", str(run / "train.json"), "--video_folder", str(run / "feats"), *more])
    )
    assert report.problems.total() == bad and {R for R, _, _ in report.layouts} == set(ROWS)
