"""What decides whether answers are right goes from features and flags into the weights, and comes back from there."""

import json

import pytest
import torch
from clips import draw
from safetensors.torch import load_file
from towers import write_narrow_tower
from training_run import CHANNELS, ROWS, flags, write_run

from fastvid import chat as chat_module
from fastvid import export, extract, train, validate
from fastvid.checkpoints import checkpoint
from fastvid.config import ExportConfig, ValidateConfig
from fastvid.features.file import load_features, save_features
from fastvid.flags import parse
from fastvid.inference.chat import Chat
from fastvid.provenance import Provenance, of_weights
from fastvid.video.towers.choice import revisions
from fastvid.weights.projector_file import save_tensors

FRAMES = ROWS - 4  # a 28-pixel tower of 14-pixel patches adds four rows
DIGEST, OTHER = "sha256:aa", "sha256:bb"


def mark(file, tower, frames=FRAMES):
    """Give a feature file the header that extraction with `tower` gives."""
    features, _ = load_features(file)
    save_features(file, features, {"tower": str(tower), "tower_revision": revisions(tower)[0], "num_frames": frames})


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with model/, tower_a, tower_b, features of tower_b, and out/, what a step of adapter training left."""
    folder = write_run(tmp_path_factory.mktemp("made"))
    for seed, name in enumerate(("tower_a", "tower_b")):
        write_narrow_tower(folder / name, seed, CHANNELS)
    config = json.loads((folder / "model" / "config.json").read_text()) | {"mm_vision_tower": str(folder / "tower_a")}
    (folder / "model" / "config.json").write_text(json.dumps(config))
    for file in (folder / "feats").iterdir():
        mark(file, folder / "tower_b")
    draw(folder / "clip.mp4", 6)
    assert train.main(flags(folder, folder / "out", "--max_steps", "1", "--question_order", "video_first")) == 0
    return folder


def ask(made, weights="out/mm_projector.bin", **settings):
    return Chat(
        model_name_or_path=str(made / "model"),
        projector=str(made / weights),
        max_new_tokens=2,
        device="cpu",
        **settings,
    )


@pytest.mark.slow
def test_training_notes_it_in_all_that_it_writes(made):
    expected = Provenance(
        str(made / "tower_b"),
        revisions(made / "tower_b")[0],
        FRAMES,
        ROWS,
        "vicuna_v1_1",
        "video_first",
        True,
        pooling="temporal+spatial",
    )
    for path in ("out/mm_projector.bin", "out/mm_projector.safetensors", "out/checkpoint-1"):
        assert of_weights(made / path) == expected
    tensors = torch.load(made / "out" / "mm_projector.bin", weights_only=True)
    same = load_file(made / "out" / "mm_projector.safetensors")
    assert tensors.keys() == same.keys() and all(torch.equal(tensors[name], same[name]) for name in same)


@pytest.mark.slow
def test_chat_asks_as_the_weights_were_trained(made):
    for weights in ("out", "out/mm_projector.safetensors"):
        chat = ask(made, weights)
        assert (chat.config.conv_mode, chat.config.question_order, chat.config.num_frames) == (
            "vicuna_v1_1",
            "video_first",
            FRAMES,
        )
    assert chat.features(made / "clip.mp4").shape == (ROWS, CHANNELS)
    named = ask(
        made,
        vision_tower=str(made / "tower_b"),
        num_frames=FRAMES,
        conv_mode="vicuna_v1_1",
        question_order="video_first",
        mm_use_vid_start_end=True,
    )
    assert torch.equal(named.features(made / "clip.mp4"), chat.features(made / "clip.mp4"))
    assert named.ask(made / "clip.mp4", "what") == chat.ask(made / "clip.mp4", "what")
    chat.close(), named.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    "flag, value, trained",
    [
        ("num_frames", 100, str(FRAMES)),
        ("conv_mode", "pg-video-llava", "vicuna_v1_1"),
        ("question_order", "reference", "video_first"),
        ("mm_use_vid_start_end", False, "True"),
    ],
)
def test_a_flag_that_contradicts_the_weights_is_refused(made, flag, value, trained):
    with pytest.raises(ValueError, match=rf"--{flag} {value}: .*mm_projector.bin was trained with {trained}"):
        ask(made, **{flag: value})


@pytest.mark.slow
def test_another_tower_is_refused_whatever_its_name(made, tmp_path):
    with pytest.raises(ValueError, match="--vision_tower .*tower_a is another tower"):
        ask(made, vision_tower=str(made / "tower_a"))
    (tmp_path / "another_name").symlink_to(made / "tower_b")
    chat = ask(made, vision_tower=str(tmp_path / "another_name"))
    assert chat.features(made / "clip.mp4").shape == (ROWS, CHANNELS)
    chat.close()


@pytest.mark.parametrize(
    "header, rows, message",
    [
        ({"tower": "x", "tower_revision": OTHER}, ROWS, "made by another tower"),
        ({"num_frames": FRAMES + 1}, ROWS, f"--num_frames {FRAMES + 1}, .* was trained with {FRAMES}"),
        ({}, ROWS + 3, f"{ROWS + 3} rows, .* was trained on features of {ROWS}"),
    ],
)
def test_a_feature_file_that_contradicts_the_weights_is_refused(made, tmp_path, header, rows, message):
    file = tmp_path / "a.safetensors"
    save_features(file, torch.ones(rows, CHANNELS, dtype=torch.float16), header)
    with pytest.raises(ValueError, match=message):
        chat_module.main(
            [
                "--model_name_or_path",
                str(made / "model"),
                "--projector",
                str(made / "out"),
                "--video",
                str(file),
                "--question",
                "what",
            ]
        )
    save_features(file, torch.ones(ROWS, CHANNELS, dtype=torch.float16), {})
    ask(made).ask(file, "what")


def test_weights_that_tell_nothing_are_asked_as_the_reference_asks(made, tmp_path):
    torch.save(torch.load(made / "out" / "mm_projector.bin", weights_only=True), tmp_path / "theirs.bin")
    chat = ask(made, tmp_path / "theirs.bin")
    assert (chat.config.conv_mode, chat.config.question_order, chat.config.num_frames) == (
        "pg-video-llava",
        "reference",
        100,
    )
    assert chat.loaded_encoders()[0].revision == revisions(made / "tower_a")[0]


def test_features_of_another_tower_than_the_given_one_are_refused(made, tmp_path):
    torch.save(torch.load(made / "out" / "mm_projector.bin", weights_only=True), tmp_path / "theirs.bin")
    file = tmp_path / "a.safetensors"
    save_features(file, torch.ones(ROWS, CHANNELS, dtype=torch.float16), {"tower": "x", "tower_revision": OTHER})
    with pytest.raises(ValueError, match="a.safetensors was made by another tower .x. than --vision_tower .*tower_a"):
        ask(made, tmp_path / "theirs.bin", vision_tower=str(made / "tower_a")).features(file)
    assert ask(made, tmp_path / "theirs.bin").features(file).shape == (ROWS, CHANNELS)


def test_an_older_output_dir_tells_the_prompt(made, tmp_path):
    """Its projector file tells nothing, and the checkpoint beside it has only flags."""
    state = checkpoint.read_state(made / "out" / "checkpoint-1")
    del state["provenance"]
    tensors = checkpoint.read_full(made / "out" / "checkpoint-1", "model")
    checkpoint.save(tmp_path, 1, groups={"model": tensors}, state=state)
    torch.save(torch.load(made / "out" / "mm_projector.bin", weights_only=True), tmp_path / "mm_projector.bin")
    chat = ask(made, tmp_path)
    assert chat.weights.endswith("mm_projector.bin") and chat.trained.tower is None
    assert (chat.config.conv_mode, chat.config.question_order, chat.config.num_frames) == (
        "vicuna_v1_1",
        "video_first",
        100,
    )


@pytest.mark.slow
def test_a_frame_count_that_gives_other_rows_is_refused(made, tmp_path):
    """Features without headers tell their rows alone."""
    tensors = torch.load(made / "out" / "mm_projector.bin", weights_only=True)
    save_tensors(tmp_path / "p.bin", tensors, Provenance(rows=ROWS))
    with pytest.raises(ValueError, match=f"--num_frames 100 .* 104 rows, .* of {ROWS}: --num_frames {FRAMES}"):
        ask(made, tmp_path / "p.bin").features(made / "clip.mp4")
    assert ask(made, tmp_path / "p.bin", num_frames=FRAMES).features(made / "clip.mp4").shape == (ROWS, CHANNELS)


def test_an_export_holds_the_tower_of_the_features(made, tmp_path):
    export.export(ExportConfig(str(made / "out"), str(tmp_path / "hf"), "llava"))
    held = load_file(tmp_path / "hf" / "model.safetensors")
    tower = load_file(made / "tower_b" / "model.safetensors")
    name = "embeddings.class_embedding"
    (mine,), (theirs,) = ([t for key, t in tensors.items() if key.endswith(name)] for tensors in (held, tower))
    assert torch.equal(mine, theirs)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["mm_vision_tower"] == str(made / "tower_b")
    assert of_weights(tmp_path / "hf") == of_weights(made / "out" / "checkpoint-1")
    for format in ("llava", "llama"):
        with pytest.raises(ValueError, match="tower_a is another tower"):
            export.export(
                ExportConfig(str(made / "out"), str(tmp_path / "x"), format, vision_tower=str(made / "tower_a"))
            )
    assert not (tmp_path / "x").exists()


def test_a_tower_that_is_gone_is_asked_for(made, tmp_path):
    state = checkpoint.read_state(made / "out" / "checkpoint-1")
    state["provenance"]["tower"] = str(tmp_path / "gone")
    tensors = checkpoint.read_full(made / "out" / "checkpoint-1", "model")
    folder = checkpoint.save(tmp_path / "run", 1, groups={"model": tensors}, state=state)
    with pytest.raises(ValueError, match="gone .* is not to be found: give its folder with --vision_tower"):
        export.export(ExportConfig(str(folder), str(tmp_path / "hf"), "llava"))
    export.export(ExportConfig(str(folder), str(tmp_path / "llama"), "llama"))
    given = {"vision_tower": str(made / "tower_b")}
    export.export(ExportConfig(str(folder), str(tmp_path / "hf"), "llava", **given))
    (tmp_path / "gone").symlink_to(made / "tower_b")  # a name that is there again
    export.export(ExportConfig(str(folder), str(tmp_path / "hf"), "llava"))


def test_an_exported_projector_keeps_it(made, tmp_path):
    export.export(ExportConfig(str(made / "out"), str(tmp_path / "p.bin")))
    assert of_weights(tmp_path / "p.bin") == of_weights(made / "out" / "checkpoint-1") != Provenance()


@pytest.mark.slow
def test_features_of_two_towers_are_told_before_the_first_step(made, tmp_path, caplog):
    feats = tmp_path / "feats"
    feats.mkdir()
    for number, file in enumerate(sorted((made / "feats").iterdir())):
        (feats / file.name).write_bytes(file.read_bytes())
        if number % 3 == 0:
            mark(feats / file.name, made / "tower_a")
    more = ("--max_steps", "1", "--video_folder", str(feats))
    assert train.main(flags(made, tmp_path / "out", *more)) == 0
    (line,) = [record.getMessage() for record in caplog.records if "vision towers" in record.getMessage()]
    assert "features of 2 vision towers" in line and "8 of" in line and "4 of" in line
    found = of_weights(tmp_path / "out" / "mm_projector.bin")
    assert found.tower_revision is None and found.num_frames == FRAMES


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train", "validate"])
def test_training_with_a_tower_that_did_not_make_the_features_is_refused(made, tmp_path, command):
    for name in ("tower_b", "tower_a"):
        argv = flags(made, tmp_path / name, "--max_steps", "1", "--vision_tower", str(made / name))
        if command == "validate":
            report = validate.validate(
                parse(
                    ValidateConfig,
                    [
                        "--data_path",
                        str(made / "train.json"),
                        "--video_folder",
                        str(made / "feats"),
                        "--vision_tower",
                        str(made / name),
                    ],
                )
            )
            assert ("features of another tower than --vision_tower" in report.problems) == (name == "tower_a")
        elif name == "tower_b":
            assert train.main(argv) == 0
        else:
            with pytest.raises(ValueError, match="--vision_tower .*tower_a is another tower .*tower_b"):
                train.main(argv)


@pytest.mark.slow
def test_a_file_of_another_tower_is_told_when_it_is_read(made, tmp_path, caplog, monkeypatch):
    feats = tmp_path / "feats"
    feats.mkdir()
    for file in (made / "feats").iterdir():
        (feats / file.name).write_bytes(file.read_bytes())
    mark(feats / "clip5.safetensors", made / "tower_a")
    monkeypatch.setattr("fastvid.data.dataset.SampleSet.HEADERS", 2)
    assert train.main(flags(made, tmp_path / "out", "--video_folder", str(feats), "--num_train_epochs", "1")) == 0
    assert "features are of the tower" in caplog.text and "vision towers" not in caplog.text


@pytest.mark.slow
def test_text_alone_keeps_what_it_started_from(made, tmp_path):
    records = [
        {"id": str(i), "conversations": [{"from": "human", "value": "what"}, {"from": "gpt", "value": "a cat"}]}
        for i in range(4)
    ]
    (tmp_path / "text.json").write_text(json.dumps(records))
    argv = flags(made, tmp_path / "out", "--max_steps", "1", "--pretrain_mm_mlp_adapter", str(made / "out"))
    argv[argv.index("--data_path") + 1] = str(tmp_path / "text.json")
    assert train.main(argv) == 0
    found, before = of_weights(tmp_path / "out" / "mm_projector.bin"), of_weights(made / "out" / "mm_projector.bin")
    assert (found.tower_revision, found.num_frames) == (before.tower_revision, before.num_frames) != (None, None)
    assert found.question_order == "reference"


PYAV, NVDEC, DALI = (
    {
        "tower": "t",
        "tower_revision": DIGEST,
        "num_frames": 16,
        "conversion": "dali",
        "video": {"decoder": decoder, "conversion": conversion},
    }
    for decoder, conversion in (("pyav 18.1.0", "swscale"), ("nvdec, CUDA 13.0", "swscale"), ("dali 2.4.0", "dali"))
)


@pytest.mark.slow
@pytest.mark.parametrize("other, level", [(NVDEC, "INFO"), (DALI, "WARNING")])
def test_several_decoders_are_told_once_and_kept(made, tmp_path, caplog, other, level):
    feats = tmp_path / "feats"
    feats.mkdir()
    for number, file in enumerate(sorted((made / "feats").iterdir())):
        features, header = load_features(file)
        video = (other if number % 3 == 0 else PYAV)["video"]
        save_features(feats / file.name, features, {**header, "video": video})
    caplog.set_level("INFO", logger="fastvid")
    assert train.main(flags(made, tmp_path / "out", "--max_steps", "1", "--video_folder", str(feats))) == 0
    (told,) = [record for record in caplog.records if "features of 2" in record.getMessage()]
    assert told.levelname == level and "8 of" in told.getMessage() and "4 of" in told.getMessage()
    decoders = "; ".join(sorted(["pyav 18.1.0", other["video"]["decoder"]]))
    export.export(ExportConfig(str(tmp_path / "out"), str(tmp_path / "p.bin")))
    export.export(ExportConfig(str(tmp_path / "out"), str(tmp_path / "hf"), "llama"))
    for path in ("out/mm_projector.bin", "out/mm_projector.safetensors", "out/checkpoint-1", "p.bin", "hf"):
        found = of_weights(tmp_path / path)
        assert (found.decoder, found.conversion) == (decoders, "swscale" if other is NVDEC else "dali; swscale")


@pytest.mark.slow
def test_a_file_of_another_conversion_is_told_when_it_is_read(made, tmp_path, caplog, monkeypatch):
    feats = tmp_path / "feats"
    feats.mkdir()
    for file in (made / "feats").iterdir():
        features, header = load_features(file)
        save_features(
            feats / file.name,
            features,
            header
            | (DALI if file.name == "clip5.safetensors" else PYAV)
            | {"tower_revision": header["tower_revision"]},
        )
    monkeypatch.setattr("fastvid.data.dataset.SampleSet.HEADERS", 2)
    assert train.main(flags(made, tmp_path / "out", "--video_folder", str(feats), "--num_train_epochs", "1")) == 0
    assert "of the colour conversion dali, not swscale" in caplog.text and "colour conversions" not in caplog.text


@pytest.mark.slow
def test_features_of_one_conversion_again(made, tmp_path, caplog):
    """What the warning tells to do ends it."""
    (tmp_path / "videos").mkdir()
    for name in "ab":
        draw(tmp_path / "videos" / f"{name}.mp4", 6)
    extraction = [
        "--video_dir_path",
        str(tmp_path / "videos"),
        "--clip_feat_path",
        str(tmp_path / "feats"),
        "--vision_tower",
        str(made / "tower_b"),
        "--num_frames",
        str(FRAMES),
        "--device",
        "cpu",
    ]
    assert extract.main(extraction) == 0
    file = tmp_path / "feats" / "a.safetensors"
    features, header = load_features(file)
    assert header["video"]["conversion"] == "swscale" and header["video"]["decoder"].startswith("pyav")
    save_features(file, features, {**header, "conversion": "dali", "video": DALI["video"]})
    turns = json.loads((made / "train.json").read_text())[0]["conversations"]
    records = [{"id": name, "video": f"{name}.mp4", "conversations": turns} for name in "ab"]
    (tmp_path / "train.json").write_text(json.dumps(records))
    argv = flags(
        made,
        tmp_path / "out",
        "--max_steps",
        "1",
        "--video_folder",
        str(tmp_path / "feats"),
        "--data_path",
        str(tmp_path / "train.json"),
        "--dry_run",
    )
    del argv[2:4]  # the other --data_path
    assert train.main(argv) == 0
    assert "2 colour conversions: 1 of dali, 1 of swscale" in caplog.text
    assert "--overwrite True` without --decoder dali makes them alike" in caplog.text
    caplog.clear()
    assert extract.main([*extraction, "--overwrite", "True"]) == 0
    assert train.main(argv) == 0 and "conversions" not in caplog.text
