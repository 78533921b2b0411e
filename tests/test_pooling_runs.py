"""Training on features of several poolings, and answers of the weights that it leaves."""

import json
import re
import shutil
from dataclasses import replace

import pooling_run
import pytest
import torch
from model_cases import assert_same_gradients, loss_and_gradients
from online_run import start_quickly
from pooling_run import FRAMES, GRID, OTHER, ROWS, SIDE, SLOW_FAST, job
from safetensors.torch import save_file
from training_run import CHANNELS, config_of, flags, losses

from fastvid import extract, train, validate
from fastvid.config import ValidateConfig
from fastvid.config.pooling import RECIPE
from fastvid.data.packing import pack
from fastvid.dist import parallel
from fastvid.features.file import load_features, save_features
from fastvid.inference.chat import Chat
from fastvid.provenance import EXPORT_MARK, KEY, Provenance, of_weights
from fastvid.weights.projector_file import save_tensors

made = pooling_run.made

WORLD = parallel.World(0, 1, 0, torch.device("cpu"), False)


# --- training


def write_weights(made, folder, provenance):
    """A model folder whose weights tell `provenance`, as an export's do."""
    shutil.copytree(made / "model", folder)
    config = json.loads((folder / "config.json").read_text())
    config[EXPORT_MARK] = {KEY: provenance.to_json()}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def argv(made, output, *more, records=None):
    words = flags(made, output, "--num_train_epochs", "1", "--dataloader_num_workers", "0", *more)
    words[words.index("--data_path") + 1] = str(records or made / "train.json")
    return words


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["adapter", "full"])
def test_two_poolings_an_image_and_text_packed_give_the_gradients_of_the_samples_apart(made, mode):
    more = [] if mode == "adapter" else ["--tune_mm_mlp_adapter", "False"]
    state = train.build(config_of(made, "unused", "--dataloader_num_workers", "0", *more), WORLD)
    samples = [state.loader.samples.read(index) for index in range(6)]
    tokens, channels = state.tokenizer.tokens, state.loader.samples.channels
    apart, packed = [pack([one], tokens, channels) for one in samples], pack(samples, tokens, channels)
    rows = [ROWS[GRID]] * 2 + [ROWS[RECIPE]] * 2 + [SIDE**2, 0]
    assert [len(batch.video_rows) for batch in apart] == rows and len(packed.features) == sum(rows)
    loss, found = loss_and_gradients(state.model, packed)
    found = {name: gradient.clone() for name, gradient in found.items()}
    expected_loss, expected = loss_and_gradients(state.model, *apart)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert_same_gradients(found, expected, 1e-5)


@pytest.fixture(scope="module")
def trained(made):
    """Folders of runs: "both" on features of two poolings, "grid" on those of one."""
    assert train.main(argv(made, made / "both")) == 0
    only = [
        record
        for record in json.loads((made / "train.json").read_text())
        if record.get("video", "") in ("a.mp4", "b.mp4")
    ]
    (made / "grid.json").write_text(json.dumps(only))
    assert train.main(argv(made, made / "grid", records=made / "grid.json")) == 0
    return made


@pytest.mark.slow
def test_weights_keep_the_poolings_of_their_features(trained):
    for path in ("mm_projector.bin", "mm_projector.safetensors", "checkpoint-3"):
        assert of_weights(trained / "both" / path).pooling == f"{GRID}; {RECIPE}"
    assert (
        of_weights(trained / "both" / "mm_projector.bin").pairs
        == f"{GRID} of {FRAMES} frames; {RECIPE} of {FRAMES} frames"
    )
    assert losses(trained / "both")
    found = of_weights(trained / "grid" / "mm_projector.bin")
    assert (found.pooling, found.rows, found.num_frames, found.pairs) == (GRID, ROWS[GRID], FRAMES, None)


@pytest.mark.slow
def test_the_reference_trains_on_the_recipe_alone(made, tmp_path):
    """What the message of training and that of `validate` tell to do is done."""
    records = [record for record in json.loads((made / "train.json").read_text()) if "video" in record]
    (tmp_path / "videos.json").write_text(json.dumps(records))
    words = argv(made, tmp_path / "out", "--parity", "reference", records=tmp_path / "videos.json")
    with pytest.raises(ValueError, match=r"--pooling grid:3x2x2, and --parity reference takes temporal.spatial alone"):
        train.main(words)
    checked = ValidateConfig(
        data_path=[str(tmp_path / "videos.json")], video_folder=str(made / "feats"), parity="reference"
    )
    report = validate.validate(checked)
    assert report.problems["features of another pooling"] == 2
    (example,) = report.examples["features of another pooling"]
    assert "2 are not of temporal+spatial" in example
    shutil.copytree(made / "feats", tmp_path / "feats")
    assert extract.extract(job(made, made / "grids", tmp_path / "feats", overwrite=True)).extracted == 2
    assert not validate.validate(replace(checked, video_folder=str(tmp_path / "feats"))).problems
    assert train.main([*words, "--video_folder", str(tmp_path / "feats")]) == 0


@pytest.mark.slow
def test_validate_counts_poolings(made, capsys):
    words = ["--data_path", str(made / "train.json"), "--video_folder", str(made / "feats")]
    assert validate.main([*words, "--json", str(made / "report.json"), "--overwrite", "True"]) == 0
    told = capsys.readouterr().out
    assert f"{FRAMES} frames, {GRID}" in told and f"{FRAMES} frames, {RECIPE}" in told and "an image's patches" in told
    found = {(line["pooling"], line["files"]) for line in json.loads((made / "report.json").read_text())["made_by"]}
    assert found == {(GRID, 2), (RECIPE, 2), ("spatial", 1)}


@pytest.mark.slow
def test_validate_tells_images_from_features_that_tell_no_pooling(made, tmp_path, capsys):
    """As another program may have written them."""
    shutil.copytree(made / "feats", tmp_path / "feats")
    for path in tmp_path.glob("feats/*.safetensors"):
        features, header = load_features(path)
        save_features(path, features, {name: header[name] for name in ("tower", "tower_revision")})
    words = ["--data_path", str(made / "train.json"), "--video_folder", str(tmp_path / "feats")]
    assert validate.main(words) == 0
    told = capsys.readouterr().out
    assert "frames not told, pooling not told" in told and "an image's patches" not in told


@pytest.mark.slow
def test_frames_that_features_do_not_have_are_told_and_a_rate_of_zero(trained, tmp_path, caplog, capsys):
    words = argv(trained, tmp_path / "out", "--max_steps", "1", records=trained / "grid.json")
    checked = ["--data_path", str(trained / "grid.json"), "--video_folder", str(trained / "feats")]
    unlike = f"--num_frames 7 is for videos that have no features yet; .* as they are: 2 of {FRAMES} frames$"
    for frames, count in (("7", 1), (str(FRAMES), 0)):
        caplog.clear()
        rate = ["--learning_rate", "0"] * count
        assert train.main([*words, "--dry_run", "--num_frames", frames, *rate]) == 0
        assert len(re.findall(unlike, caplog.text, re.MULTILINE)) == count
        assert caplog.text.count("--learning_rate 0: no step changes a weight") == count
        assert validate.main([*checked, "--num_frames", frames]) == 0
        assert len(re.findall(f"warning +{unlike}", capsys.readouterr().out, re.MULTILINE)) == count


@pytest.mark.slow
def test_a_pooling_that_features_do_not_have_is_told(trained, tmp_path, caplog, capsys):
    """They are used as they are, as are those beside videos that get the pooling."""
    unlike = rf"--pooling {re.escape(RECIPE)} is for videos that have no features yet; .* as they are: 2 of {GRID}$"
    words = argv(trained, tmp_path / "out", "--max_steps", "1", records=trained / "grid.json")
    checked = ["--data_path", str(trained / "grid.json"), "--video_folder", str(trained / "feats")]
    for spec, count in ((RECIPE, 1), (GRID, 0)):
        caplog.clear()
        assert train.main([*words, "--dry_run", "--pooling", spec]) == 0
        assert len(re.findall(unlike, caplog.text, re.MULTILINE)) == count
        report = tmp_path / f"{count}.json"
        assert validate.main([*checked, "--pooling", spec, "--json", str(report)]) == 0
        assert len(re.findall(f"warning +{unlike}", capsys.readouterr().out, re.MULTILINE)) == count
        assert len(json.loads(report.read_text())["remarks"]) == count


# --- answers


def chat_of(made, weights, **options):
    return Chat(
        model_name_or_path=str(made / "model"), projector=str(made / weights), device="cpu", max_new_tokens=2, **options
    )


@pytest.mark.slow
def test_chat_makes_features_as_those_of_the_training_were_made(trained, tmp_path):
    chat = chat_of(trained, "grid")
    found = chat.features(trained / "grids" / "a.mp4")
    torch.testing.assert_close(found, load_features(trained / "feats" / "a.safetensors")[0], rtol=2**-9, atol=2**-9)
    assert chat.ask(trained / "grids" / "a.mp4", "what") == chat.ask(trained / "feats" / "a.safetensors", "what")
    chat.close()
    with pytest.raises(
        ValueError, match=r"--pooling temporal.spatial: .* was trained with grid:3x2x2.*; leave --pooling out"
    ):
        chat_of(trained, "grid", pooling=RECIPE)
    with pytest.raises(
        ValueError, match="c.safetensors was made with --pooling temporal.spatial, .*; extract it with that pooling"
    ):
        chat_of(trained, "grid").features(trained / "feats" / "c.safetensors")
    assert extract.extract(job(trained, trained / "recipe", tmp_path, pooling=GRID)).extracted == 2
    assert chat_of(trained, "grid").features(tmp_path / "c.safetensors").shape == (ROWS[GRID], CHANNELS)


@pytest.mark.slow
def test_of_several_poolings_the_user_names_one(trained):
    chat = chat_of(trained, "both")
    for name in ("a", "c"):
        assert chat.features(trained / "feats" / f"{name}.safetensors").shape[1] == CHANNELS
    with pytest.raises(
        ValueError, match=r"several poolings \(grid:3x2x2; temporal.spatial\); name the one .*--pooling"
    ):
        chat.features(trained / "grids" / "a.mp4")
    for spec in (GRID, RECIPE):
        named = chat_of(trained, "both", pooling=spec)
        assert named.features(trained / "grids" / "a.mp4").shape == (ROWS[spec], CHANNELS)
        assert [len(named.features(trained / "feats" / f"{name}.safetensors")) for name in "ac"] == [
            ROWS[GRID],
            ROWS[RECIPE],
        ]
        named.close()
    chat.close()


@pytest.mark.slow
def test_weights_that_tell_nothing_take_what_the_user_says(trained, tmp_path):
    tensors = torch.load(trained / "grid" / "mm_projector.bin", weights_only=True)
    save_file(tensors, tmp_path / "theirs.safetensors")
    chat = chat_of(
        trained,
        str(tmp_path / "theirs.safetensors"),
        pooling=SLOW_FAST,
        num_frames=FRAMES,
        vision_tower=str(trained / "tower"),
    )
    assert chat.features(trained / "grids" / "b.mp4").shape == (ROWS[SLOW_FAST], CHANNELS)
    chat.close()


@pytest.mark.slow
def test_of_several_frame_counts_the_user_names_one(trained, tmp_path, monkeypatch):
    """Nothing tells which of them goes with which pooling: none is taken for granted."""
    model = write_weights(trained, tmp_path / "model", Provenance(pooling=f"{GRID}; {RECIPE}"))
    tensors = torch.load(trained / "grid" / "mm_projector.bin", weights_only=True)
    save_tensors(tmp_path / "p.safetensors", tensors, Provenance(pooling=f"{GRID}; {RECIPE}"))
    options = {"pooling": GRID, "vision_tower": str(trained / "tower")}
    chat = chat_of(trained, tmp_path / "p.safetensors", **options)
    with pytest.raises(ValueError, match="tells no one number of frames .*; give the one .* with --num_frames"):
        chat.features(trained / "grids" / "a.mp4")
    assert chat.ask(trained / "feats" / "a.safetensors", "what")
    chat.close()
    chat = chat_of(trained, tmp_path / "p.safetensors", **options, num_frames=FRAMES)
    assert chat.features(trained / "grids" / "a.mp4").shape == (ROWS[GRID], CHANNELS)
    chat.close()
    start_quickly(monkeypatch)
    words = online(trained, tmp_path / "out", "--model_name_or_path", str(model), "--max_steps", "1", "--pooling", GRID)
    told = words.index("--num_frames")
    with pytest.raises(ValueError, match="tells no one number of frames .*; give one with --num_frames"):
        train.main(words[:told] + words[told + 2 :])
    assert train.main(words) == 0


@pytest.mark.slow
def test_weights_of_a_pooling_that_is_not_known_answer_about_features(trained, tmp_path, monkeypatch):
    """Those of another program, say. Training takes them, and asks for a pooling where it makes features."""
    (tmp_path / "feats").mkdir()
    for name in "ab":
        features, header = load_features(trained / "feats" / f"{name}.safetensors")
        save_features(tmp_path / "feats" / f"{name}.safetensors", features, header | {"pooling": OTHER})
    words = argv(trained, tmp_path / "out", "--max_steps", "1", records=trained / "grid.json")
    assert train.main([*words, "--video_folder", str(tmp_path / "feats")]) == 0
    chat = chat_of(trained, tmp_path / "out")
    with pytest.raises(
        ValueError, match=f"the pooling '?{OTHER}'?, which is not known .*; give feature files, not videos"
    ):
        chat.features(trained / "grids" / "a.mp4")
    assert chat.ask(tmp_path / "feats" / "a.safetensors", "what")
    chat.close()
    start_quickly(monkeypatch)
    start = ["--pretrain_mm_mlp_adapter", str(tmp_path / "out"), "--max_steps", "1"]
    with pytest.raises(ValueError, match=f"the pooling '?{OTHER}'?, which is not known here; name one with --pooling"):
        train.main(online(trained, tmp_path / "again", *start))
    assert train.main(online(trained, tmp_path / "again", *start, "--pooling", GRID)) == 0


@pytest.mark.slow
def test_features_of_another_pooling_than_the_one_that_is_given_are_refused(trained, tmp_path):
    """By weights that tell nothing, as features are of another tower than --vision_tower."""
    tensors = torch.load(trained / "grid" / "mm_projector.bin", weights_only=True)
    save_file(tensors, tmp_path / "theirs.safetensors")
    chat = chat_of(trained, tmp_path / "theirs.safetensors", pooling=RECIPE)
    with pytest.raises(
        ValueError, match=r"--pooling grid:3x2x2, not with the --pooling temporal.spatial .* leave --pooling out"
    ):
        chat.features(trained / "feats" / "a.safetensors")
    assert chat.ask(trained / "feats" / "c.safetensors", "what")
    assert chat.ask(trained / "feats" / "e.safetensors", "what")  # an image
    chat.close()
    chat = chat_of(trained, tmp_path / "theirs.safetensors")
    assert chat.ask(trained / "feats" / "a.safetensors", "what")
    chat.close()


# --- features that training makes


def online(made, output, *more):
    words = ["--vision_tower", str(made / "tower"), "--num_frames", str(FRAMES), "--video_folder", str(made / "grids")]
    return argv(made, output, *words, *more, records=made / "grid.json")


@pytest.mark.slow
def test_training_on_videos_makes_the_features_that_extract_makes(trained, tmp_path, monkeypatch):
    start_quickly(monkeypatch)
    assert train.main(online(trained, tmp_path, "--pooling", GRID)) == 0
    for name in "ab":
        made = tmp_path / "features" / f"{name}.safetensors"
        assert made.read_bytes() == (trained / "feats" / made.name).read_bytes()
    assert losses(tmp_path) == losses(trained / "grid")
    assert of_weights(tmp_path / "mm_projector.bin").pooling == GRID


@pytest.mark.slow
def test_it_goes_on_with_the_pooling_of_the_weights_it_starts_from(trained, tmp_path, monkeypatch, caplog):
    start_quickly(monkeypatch)
    start = ["--pretrain_mm_mlp_adapter", str(trained / "grid"), "--max_steps", "1"]
    assert train.main(online(trained, tmp_path / "a", *start)) == 0
    assert of_weights(tmp_path / "a" / "mm_projector.bin").pooling == GRID
    assert f"({ROWS[GRID]} × {CHANNELS} each)" in caplog.text
    assert train.main(online(trained, tmp_path / "b", *start, "--pooling", RECIPE)) == 0
    assert of_weights(tmp_path / "b" / "mm_projector.bin").pooling == RECIPE
    start[1] = str(trained / "both")
    with pytest.raises(ValueError, match=r"several poolings \(.*\); name one with --pooling"):
        train.main(online(trained, tmp_path / "c", *start))
    assert train.main(online(trained, tmp_path / "c", *start, "--pooling", GRID)) == 0


@pytest.mark.slow
def test_it_goes_on_with_the_frames_of_the_weights_it_starts_from(trained, tmp_path, monkeypatch):
    start_quickly(monkeypatch)
    words = online(trained, tmp_path / "a", "--pretrain_mm_mlp_adapter", str(trained / "grid"), "--max_steps", "1")
    told = words.index("--num_frames")
    assert train.main(words[:told] + words[told + 2 :]) == 0
    found = of_weights(tmp_path / "a" / "mm_projector.bin")
    assert (found.pooling, found.num_frames) == (GRID, FRAMES)
    config = {"data_path": [str(trained / "grid.json")], "vision_tower": str(trained / "tower")}
    weights = write_weights(trained, tmp_path / "model", Provenance(num_frames=FRAMES, pooling=SLOW_FAST))
    checked = ValidateConfig(**config, video_folder=str(trained / "grids"), model_name_or_path=str(weights))
    assert not validate.validate(checked).problems
    with pytest.raises(ValueError, match=f"--num_frames is 3; give --num_frames {FRAMES}"):
        validate.validate(replace(checked, num_frames=3))


@pytest.mark.slow
def test_a_run_goes_on_where_the_flags_come_to_the_same(trained, tmp_path, monkeypatch, caplog):
    """Of features that lie there they change nothing; of those that are made what comes of them counts."""
    start_quickly(monkeypatch)
    words = argv(trained, tmp_path / "files", "--max_steps", "1", records=trained / "grid.json")
    assert train.main(words) == train.main([*words, "--pooling", GRID, "--num_frames", "100"]) == 0
    assert "resumed from" in caplog.text
    caplog.clear()
    words = online(trained, tmp_path / "a", "--pretrain_mm_mlp_adapter", str(trained / "grid"), "--max_steps", "1")
    told = words.index("--num_frames")
    assert train.main(words[:told] + words[told + 2 :]) == train.main([*words, "--pooling", GRID]) == 0
    assert "resumed from" in caplog.text
    elsewhere = ["--clip_feat_path", str(tmp_path / "features")]
    with pytest.raises(ValueError, match=r"--num_frames was 6, is 5; --pooling was grid:3x2x2, is temporal.spatial"):
        train.main([*words, *elsewhere, "--num_frames", "5", "--pooling", RECIPE])


@pytest.mark.slow
def test_what_training_would_make_is_checked_before(trained):
    config = {
        "data_path": [str(trained / "grid.json")],
        "video_folder": str(trained / "grids"),
        "vision_tower": str(trained / "tower"),
    }
    with pytest.raises(ValueError, match=r"--num_frames is 100; give --num_frames 6"):
        validate.validate(ValidateConfig(**config, pooling=SLOW_FAST))
    assert not validate.validate(ValidateConfig(**config, pooling=SLOW_FAST, num_frames=FRAMES)).problems
