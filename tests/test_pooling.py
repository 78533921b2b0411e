"""What --pooling says, from the spec to the rows of features, to training on them and to answers."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from clips import draw
from model_cases import assert_same_gradients, loss_and_gradients
from online_run import start_quickly
from PIL import Image
from safetensors.torch import save_file
from torch.nn.functional import adaptive_avg_pool3d
from towers import write_tower
from training_run import CHANNELS, config_of, flags, losses, write_run

from fastvid import extract, train, validate
from fastvid.config import ChatConfig, ExtractConfig, ValidateConfig
from fastvid.data.packing import pack
from fastvid.dist import parallel
from fastvid.features.file import load_features, save_features
from fastvid.features.manifest import read_manifest
from fastvid.inference.chat import Chat
from fastvid.pooling import RECIPE, Pooling
from fastvid.provenance import EXPORT_MARK, KEY, Provenance, agreed_frames, agreed_pooling, of_weights
from fastvid.video.decode import decode
from fastvid.video.encoder import FeatureEncoder
from fastvid.weights.projector_file import save_tensors

WORLD = parallel.World(0, 1, 0, torch.device("cpu"), False)
FRAMES, SIDE = 6, 4  # frames per video, patches of the tower
GRID, SLOW_FAST = "grid:3x2x2", f"slow-fast:2x3x3+{FRAMES}x1x1"
OTHER = "pllava-attn"  # of another program
ROWS = {RECIPE: FRAMES + SIDE**2, GRID: 12, SLOW_FAST: 18 + FRAMES}


# --- the spec


@pytest.mark.parametrize(
    "spec, frames, patches, rows",
    [
        (RECIPE, 100, 576, 676),
        ("grid:16x12x12", 16, 576, 2304),
        ("grid:16x12x12", 100, 576, 2304),
        ("grid:32x14x14", 32, 729, 6272),
        ("slow-fast:10x24x12+50x4x4", 50, 576, 2880 + 800),
        ("slow-fast:8x12x12+32x4x4", 32, 576, 1152 + 512),
    ],
)
def test_rows_follow_from_the_spec(spec, frames, patches, rows):
    pooling = Pooling.parse(spec)
    assert str(pooling) == spec and pooling.rows(frames, patches) == rows


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "grid",
        "grid:2x2",
        "grid:0x2x2",
        "grid:2x2x2+1x1x1",
        "slow-fast:2x2x2",
        "spatial",
        "grid:2×2×2",
        "grid:2x2x2 ",
        "grid:1\u0664x2x2",  # digits, but not ours
        "grid:1\uff12x2x2",
    ],
)
def test_what_is_no_spec_is_refused_with_the_specs_that_are(spec):
    with pytest.raises(ValueError, match=r"--pooling .* is no pooling; give temporal\+spatial, grid:TxHxW") as told:
        Pooling.parse(spec)
    for example in ("grid:16x12x12", "slow-fast:10x24x12+50x4x4"):
        assert example in str(told.value)
        Pooling.parse(example)


@pytest.mark.parametrize(
    "config", [lambda spec: ExtractConfig("a", "b", pooling=spec), lambda spec: ChatConfig("a", pooling=spec)]
)
def test_every_configuration_refuses_it_when_it_is_made(config):
    config(GRID)
    with pytest.raises(ValueError, match="--pooling 'grid' is no pooling"):
        config("grid")


def test_groups_in_the_wrong_order_are_refused():
    with pytest.raises(ValueError, match="give slow-fast:2x4x4.6x1x1$") as told:
        Pooling.parse("slow-fast:6x1x1+2x4x4")
    Pooling.parse(str(told.value).rpartition("give ")[2])


@pytest.mark.parametrize(
    "spec, frames, remedy",
    [
        ("grid:16x2x2", 8, "give --num_frames 16 or more"),
        (SLOW_FAST, 100, f"give --num_frames {FRAMES}"),
        (SLOW_FAST, 3, f"give --num_frames {FRAMES}"),
    ],
)
def test_frames_that_do_not_go_with_it_are_refused(spec, frames, remedy):
    pooling = Pooling.parse(spec)
    with pytest.raises(ValueError, match=f"--num_frames is {frames}; {remedy}$"):
        pooling.rows(frames, SIDE**2)
    assert pooling.rows(int(remedy.split()[2]), SIDE**2) > 0


def test_a_grid_finer_than_the_patches_is_refused():
    with pytest.raises(ValueError, match="finer than the vision tower's 4 × 4 patches; give at most 4x4"):
        Pooling.parse("grid:2x5x4").rows(6, 16)
    assert Pooling.parse("grid:2x4x4").rows(6, 16) == 32


def test_which_pooling_new_features_get():
    assert agreed_pooling(None, None, "w") == RECIPE and agreed_pooling(GRID, None, "w") == GRID
    assert agreed_pooling(None, GRID, "w") == agreed_pooling(GRID, GRID, "w") == GRID
    both = f"{GRID}; {RECIPE}"
    assert agreed_pooling(None, both, "w") is None and agreed_pooling(GRID, both, "w") == GRID
    with pytest.raises(ValueError, match=r"--pooling slow-fast.*: w was trained with .*; leave --pooling out$"):
        agreed_pooling(SLOW_FAST, GRID, "w")
    with pytest.raises(
        ValueError, match=r": w was trained with grid:3x2x2 and temporal.spatial, .*; give .* or .*$"
    ) as told:
        agreed_pooling(SLOW_FAST, both, "w")
    for remedy in str(told.value).rpartition("give ")[2].split(" or "):
        assert agreed_pooling(remedy, both, "w") == remedy


def test_a_pooling_that_is_not_known_is_none_to_make():
    """Another program's, or a later version's. It is no flag that somebody gave."""
    assert agreed_pooling(None, OTHER, "w") is None
    with pytest.raises(ValueError, match=f"w was trained with {OTHER}, and would answer wrongly; leave --pooling out$"):
        agreed_pooling(GRID, OTHER, "w")
    with pytest.raises(ValueError, match=f"; give {GRID}$"):
        agreed_pooling(RECIPE, f"{GRID}; {OTHER}", "w")
    with pytest.raises(ValueError, match="; leave --pooling out$"):
        agreed_pooling(RECIPE, f"{OTHER}; {OTHER}-2", "w")


def test_which_frames_new_features_get():
    assert agreed_frames(None, Provenance(), "w") == 100 and agreed_frames(8, Provenance(), "w") == 8
    assert agreed_frames(None, Provenance(num_frames=8, pooling=GRID), "w") == 8
    several = Provenance(pooling=f"{GRID}; {RECIPE}")
    assert agreed_frames(None, several, "w") is None and agreed_frames(8, several, "w") == 8
    with pytest.raises(ValueError, match="leave --num_frames out"):
        agreed_frames(9, Provenance(num_frames=8), "w")


def test_frames_follow_from_the_pooling_that_they_came_with():
    pairs = f"{GRID} of 6 frames; {RECIPE} of 100 frames; {RECIPE} of 50 frames"
    several = Provenance(pooling=f"{GRID}; {RECIPE}", pairs=pairs)
    assert several.made_with == {(GRID, 6), (RECIPE, 100), (RECIPE, 50)}
    assert agreed_frames(None, several, "w", GRID) == agreed_frames(6, several, "w", GRID) == 6
    assert agreed_frames(None, several, "w", RECIPE) is None and agreed_frames(50, several, "w", RECIPE) == 50
    assert agreed_frames(None, several, "w") is None
    for given, pooling in ((100, GRID), (6, RECIPE), (7, None)):
        with pytest.raises(
            ValueError, match=f"--num_frames {given}: w was trained with .* of 6 frames;.*; give"
        ) as told:
            agreed_frames(given, several, "w", pooling)
        for remedy in str(told.value).rpartition("give ")[2].split(" or "):
            assert agreed_frames(int(remedy), several, "w", pooling) == int(remedy)
    assert Provenance(pairs="what is this").made_with == set()


# --- extraction


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run whose four videos have features of two poolings, beside an image and text alone."""
    folder = write_run(tmp_path_factory.mktemp("pooling"), max_position_embeddings=2048)
    shutil.rmtree(folder / "feats")
    write_tower(folder / "tower", image_size=14 * SIDE, hidden_size=CHANNELS, heads=2)
    for name, frames in (("a", 11), ("b", 4), ("c", 9), ("d", 6)):
        group = folder / ("grids" if name in "ab" else "recipe")
        group.mkdir(exist_ok=True)
        draw(group / f"{name}.mp4", frames)
    (folder / "images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "images" / "e.png")
    for group, options in (("grids", {"pooling": GRID}), ("recipe", {}), ("images", {"pooling": GRID, "images": True})):
        assert extract.extract(job(folder, folder / group, folder / "feats", **options)).exit_code == 0
    records = json.loads((folder / "train.json").read_text())[:6]
    for record, media in zip(records, ("a.mp4", "b.mp4", "c.mp4", "d.mp4", "e.png", None)):
        del record["video"]
        turn = record["conversations"][0]
        if media is None:
            turn["value"] = turn["value"].replace("<video>", "").strip()
        elif media.endswith("png"):
            turn["value"], record["image"] = turn["value"].replace("<video>", "<image>"), media
        else:
            record["video"] = media
    (folder / "train.json").write_text(json.dumps(records))
    return folder


def job(made, videos, output, **options):
    settings = {"vision_tower": str(made / "tower"), "num_frames": FRAMES, "device": "cpu", "decode_workers": 1}
    return ExtractConfig(str(videos), str(output), **settings | options)


@pytest.mark.slow
@pytest.mark.parametrize("spec", [GRID, SLOW_FAST])
def test_features_are_means_of_the_towers_states(made, tmp_path, spec):
    """Of a video of more frames than are taken, and of one of fewer: both have the same rows."""
    assert extract.main([*_words(made, tmp_path), "--pooling", spec]) == 0
    whole = FeatureEncoder(made / "tower", device="cpu", num_temporal=FRAMES, pooling=f"grid:{FRAMES}x{SIDE}x{SIDE}")
    for name in "ab":
        found, header = load_features(tmp_path / f"{name}.safetensors")
        frames, _ = decode(made / "grids" / f"{name}.mp4", num_frames=FRAMES, size=whole.image_size)
        states_TPC = torch.stack([whole.encode(frame[None])[: SIDE**2] for frame in frames]).double()
        states_CTHW = states_TPC.unflatten(1, (SIDE, SIDE)).movedim(-1, 0)[None]
        if spec == GRID:
            expected = adaptive_avg_pool3d(states_CTHW, (3, 2, 2))[0].flatten(1).T
        else:
            T = len(frames)
            slow, fast = ([states_CTHW[:, :, i * T // n] for i in range(n)] for n in (2, FRAMES))
            expected = torch.cat(
                [
                    adaptive_avg_pool3d(torch.stack(group, 2), (len(group), side, side))[0].flatten(1).T
                    for group, side in ((slow, 3), (fast, 1))
                ]
            )
        assert found.shape == (ROWS[spec], CHANNELS) and found.dtype == torch.float16
        torch.testing.assert_close(found.double(), expected, rtol=2**-10, atol=2**-14)
        assert header["pooling"] == spec and header["num_frames"] == FRAMES
    assert read_manifest(tmp_path)["a.mp4"]["pooling"] == spec


def _words(made, output, group="grids"):
    return (
        f"--video_dir_path {made / group} --clip_feat_path {output} --vision_tower {made / 'tower'} "
        f"--num_frames {FRAMES} --device cpu --decode_workers 1"
    ).split()


@pytest.mark.slow
def test_a_job_refuses_features_of_its_videos_of_another_pooling(made, tmp_path):
    assert extract.extract(job(made, made / "grids", tmp_path)).extracted == 2
    with pytest.raises(ValueError, match=r"pooling temporal.spatial, not grid:3x2x2.*--overwrite True"):
        extract.extract(job(made, made / "grids", tmp_path, pooling=GRID))
    assert extract.extract(job(made, made / "grids", tmp_path, pooling=GRID, overwrite=True)).extracted == 2
    assert extract.extract(job(made, made / "grids", tmp_path, pooling=GRID)).skipped == 2
    assert load_features(tmp_path / "a.safetensors")[0].shape == (ROWS[GRID], CHANNELS)


@pytest.mark.slow
def test_files_that_name_no_pooling_are_of_the_recipe(made, tmp_path):
    """As earlier versions wrote them: they are taken for what they are, and not made again."""
    assert extract.extract(job(made, made / "grids", tmp_path)).extracted == 2
    for path in tmp_path.glob("*.safetensors"):
        features, header = load_features(path)
        del header["pooling"]
        save_features(path, features, header)
    (tmp_path / "manifest.jsonl").unlink()
    assert extract.extract(job(made, made / "grids", tmp_path)).skipped == 2
    with pytest.raises(ValueError, match=r"pooling temporal.spatial, not grid:3x2x2"):
        extract.extract(job(made, made / "grids", tmp_path, pooling=GRID))


@pytest.mark.slow
def test_images_keep_the_rows_of_their_patches(made, tmp_path):
    jobs = [job(made, made / "images", tmp_path, images=True, pooling=spec) for spec in (GRID, RECIPE, SLOW_FAST)]
    assert [extract.extract(each).skipped for each in jobs] == [0, 1, 1]
    features, header = load_features(tmp_path / "e.safetensors")
    assert features.shape == (SIDE**2, CHANNELS) and header["pooling"] == "spatial"
    recipe = FeatureEncoder(made / "tower", device="cpu", num_temporal=FRAMES)
    (tmp_path / "v").mkdir()
    assert extract.extract(job(made, made / "images", tmp_path / "v", images=True)).extracted == 1
    assert torch.equal(features, load_features(tmp_path / "v" / "e.safetensors")[0])
    assert recipe.rows == ROWS[RECIPE]


@pytest.mark.slow
def test_a_short_video_is_padded_by_the_recipe_alone(made, tmp_path):
    assert extract.extract(job(made, made / "grids", tmp_path / "a")).padded == 1
    assert extract.extract(job(made, made / "grids", tmp_path / "b", pooling=GRID)).padded == 0


def test_the_reference_knows_the_recipe_alone(made, tmp_path, capsys):
    words = [*_words(made, tmp_path), "--parity", "reference"]
    with pytest.raises(ValueError, match=r"--pooling grid:3x2x2 .* --parity reference takes; give temporal.spatial"):
        extract.main([*words, "--pooling", GRID])
    assert extract.main([*words, "--pooling", RECIPE]) == 0
    shutil.rmtree(tmp_path)
    assert extract.main([*words[:-2], "--pooling", GRID]) == 0


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
