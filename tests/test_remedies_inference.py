"""Chat, export, extraction and inspection succeed once a mistake was mended exactly as its message tells."""

import importlib
import json
import re
import shlex
import shutil
from contextlib import closing

import pytest
import torch
from checkpoint_cases import flip_a_bit
from clips import draw
from model_cases import pack, random_model
from remedied_answers import ASK, FRAMES, HERE, MISTAKES, OF_OUT, ONE, OUT, PROJECTOR, UNTOLD, URL
from safetensors.torch import load_file, save_file
from towers import write_narrow_tower
from training_run import CHANNELS, ROWS, flags, write_run
from weight_folders import RunsCode, write_folder

from fastvid import doctor, inspection
from fastvid.checkpoints import checkpoint
from fastvid.config import DoctorConfig
from fastvid.features.file import load_features, save_features
from fastvid.inference.chat import Chat
from fastvid.inference.generate import generate
from fastvid.provenance import Provenance
from fastvid.video.encoder import FeatureEncoder
from fastvid.video.towers.choice import revisions
from fastvid.weights.export_files import write_tokenizer_table
from fastvid.weights.model_config import read_model_config
from fastvid.weights.projector_file import save_tensors

CODE = object()  # a pickle that would run code


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run's inputs; out/, full/ and untold/, what training left; and what users hold by mistake in a model's place.

    The features are of tower_b; model/ names tower_a. untold/ was trained from llama/, which holds no projector and
    names no tower, on features without headers.
    """
    made = write_run(tmp_path_factory.mktemp("made"))
    for seed, (name, width) in enumerate({"tower_a": CHANNELS, "tower_b": CHANNELS, "wide": 16}.items()):
        write_narrow_tower(made / name, seed, width)
    write_narrow_tower(made / "fine", 3, CHANNELS, patch_size=7)
    (made / "clips").mkdir()
    draw(made / "clips" / "clip.mp4", 6)
    shutil.copytree(made / "feats", made / "untold_feats")
    for file in (made / "feats").iterdir():
        save_features(
            file,
            load_features(file)[0],
            {"tower": str(made / "tower_b"), "tower_revision": revisions(made / "tower_b")[0], "num_frames": FRAMES},
        )
    (made / "questions.json").write_text(json.dumps([{"video": "clip1", "question": "what"}]))
    tensors, path = load_file(made / "model" / "model.safetensors"), made / "model" / "config.json"
    config = json.loads(path.read_text()) | {"mm_vision_tower": str(made / "tower_a")}
    path.write_text(json.dumps(config))

    def model(name, state=tensors, *, without=(), tokenizer=True, files=1, ending="safetensors", **changes):
        values = {key: value for key, value in (config | changes).items() if key not in without}
        write_folder(made / name, state, values, files=files, ending=ending)
        if tokenizer:
            shutil.copy(made / "model" / "tokenizer.model", made / name)
        return made / name

    model("llama", {name: t for name, t in tensors.items() if "mm_projector" not in name}, without=["mm_vision_tower"])
    model("sharded", files=2)
    model("bin", ending="bin")
    model("bins", ending="bin", files=2)
    model("bare", tokenizer=False)
    model("gptq", quantization_config={"quant_method": "gptq"})
    model("int8", tensors | {"model.norm.weight": torch.ones_like(tensors["model.norm.weight"], dtype=torch.int8)})
    model("shallow", {name: t for name, t in tensors.items() if "layers.1." not in name}, num_hidden_layers=1)
    tables = ("model.embed_tokens.weight", "lm_head.weight")
    other = model(
        "other",
        tensors | {name: torch.cat([tensors[name], tensors[name][:1]]) for name in tables},
        vocab_size=config["vocab_size"] + 1,
    )
    (other / "added_tokens.json").write_text(json.dumps({"<more>": config["vocab_size"]}))
    write_tokenizer_table(model("table"))
    (made / "table" / "tokenizer.model").unlink()
    family = model("family", tokenizer=False)
    text = (made / "table" / "tokenizer.json").read_text()
    (family / "tokenizer.json").write_text(text.replace("</s>", "<|end|>"))
    for name, file in (("llama.cpp", "m.gguf"), ("meta", "consolidated.00.pth")):
        (model(name) / "model.safetensors").unlink()
        (made / name / file).write_bytes(b"x")
    (made / "none").mkdir()
    for name in ("a", "b"):
        shutil.copytree(made / "model", made / "models--a--b" / "snapshots" / name)

    start = importlib.import_module("fastvid.train").main
    assert start(flags(made, made / "out", "--max_steps", "1", "--question_order", "video_first")) == 0
    assert start(flags(made, made / "full", "--max_steps", "1", "--tune_mm_mlp_adapter", "False")) == 0
    assert (
        start(
            flags(
                made,
                made / "untold",
                "--max_steps",
                "1",
                "--model_name_or_path",
                str(made / "llama"),
                "--video_folder",
                str(made / "untold_feats"),
            )
        )
        == 0
    )
    trained = torch.load(made / "out" / "mm_projector.bin", weights_only=True)
    save_tensors(made / "theirs.bin", trained)
    save_tensors(made / "rows.bin", trained, Provenance(num_frames=FRAMES, rows=ROWS))
    (made / "cut.bin").write_bytes((made / "theirs.bin").read_bytes()[:-1000])
    save_tensors(made / "nan.bin", {name: torch.full_like(t, torch.nan) for name, t in trained.items()})
    save_tensors(
        made / "narrow.bin",
        {name: t[..., :4].contiguous() if name.endswith("2.weight") else t for name, t in trained.items()},
    )
    save_features(made / "wide.safetensors", torch.ones(ROWS, 16, dtype=torch.float16), {})
    return made


ALWAYS = {
    "chat": "--model_name_or_path {made}/model --max_new_tokens 2 --device cpu",
    "extract": f"--video_dir_path {{made}}/clips --clip_feat_path {{tmp}}/feats --num_frames {FRAMES} --device cpu",
    "export": "",
    "train": "",
    "inspect": "",
}


@pytest.fixture
def attempt(made, tmp_path):
    """attempt(command, words): run it; words of the constants above."""

    def attempt(command, words):
        argv = shlex.split(f"{ALWAYS[command]} {words}".format(made=made, tmp=tmp_path, long="what " * 600))
        if command in ("train", "inspect"):
            argv = flags(made, tmp_path / "trained", *argv)
        module = "inspection" if command == "inspect" else command
        return importlib.import_module(f"fastvid.{module}").main(argv)

    return attempt


@pytest.mark.slow
@pytest.mark.parametrize("command, mistake, said, mended", [(*row[:3], row[3:]) for row in MISTAKES])
def test_a_command_succeeds_once_a_mistake_was_mended_as_told(made, tmp_path, attempt, command, mistake, said, mended):
    with pytest.raises(ValueError, match=said):
        attempt(command, mistake)
    for words in mended:
        assert attempt(command, words) == 0
        for left in tmp_path.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()


def outside(text):
    return text.replace("model-00001", "../sharded/model-00001")


def told(**values):
    return lambda text: json.dumps(json.loads(text) | values)


# (model folder, file, what becomes of it, what is said): bytes; None, it is gone; a path, it is a link to that; a
# function of the text.
DAMAGED = [
    ("model", "config.json", b"{", "config.json is no JSON object .*; copy the model's folder again"),
    ("model", "config.json", b"[]", "config.json holds no JSON object; download it again"),
    (
        "model",
        "config.json",
        lambda text: text.replace('"num_hidden_layers": 2', '"num_hidden_layers": 0'),
        "is no size of a model .*; download the file again",
    ),
    (
        "model",
        "config.json",
        told(text_config=["llama"]),
        "text_config = .* is no JSON object; download the file again",
    ),
    ("model", "config.json", told(num_key_value_heads=3), "is no multiple of .*; download the file again"),
    ("model", "config.json", told(rope_theta="1e6"), "give no frequencies .*; download the file again"),
    ("model", "tokenizer.model", b"none", "no sentencepiece model .*; copy the model's folder again"),
    ("table", "tokenizer.json", b"{", "no tokenizer file .*; copy the model's folder again"),
    ("model", "model.safetensors", b"cut short", "cannot be read .*; download or write it again"),
    ("model", "model.safetensors", None, "holds no weights: .*; download the model again .`hf download`."),
    ("model", "model.safetensors", "nowhere", "is a link that leads nowhere: download the model again"),
    ("model", "model.safetensors", {"model.norm.weight": None}, "model.norm.weight is missing. Complete the download"),
    ("model", "model.safetensors", {"model.norm.weight": torch.nan}, "are not finite .*; download it again"),
    ("sharded", "model.safetensors.index.json", None, "model.safetensors.index.json lists them: download that too"),
    ("bins", "pytorch_model.bin.index.json", None, "pytorch_model.bin.index.json lists them: download that too"),
    ("sharded", "model.safetensors.index.json", b"[]", "is not an index of weights .*; download it again"),
    ("sharded", "model.safetensors.index.json", outside, "outside its folder; only plain file names are read"),
    ("sharded", "model-00002-of-00002.safetensors", None, "does not exist: the folder's download is incomplete"),
    (
        "sharded",
        "model-00002-of-00002.safetensors",
        {"model.layers.0.self_attn.q_proj.weight": None},
        "which the folder's index says it holds; download it again",
    ),
    ("bin", "pytorch_model.bin", CODE, "Download it again from a source you trust, best as .safetensors"),
]


@pytest.mark.slow
@pytest.mark.parametrize("kind, name, damage, said", DAMAGED)
def test_chat_answers_once_a_file_was_copied_again(made, tmp_path, attempt, kind, name, damage, said):
    file = shutil.copytree(made / kind, tmp_path / kind) / name
    if isinstance(damage, bytes):
        file.write_bytes(damage)
    elif isinstance(damage, dict):
        tensors = load_file(made / kind / name)
        changed = {key: torch.full_like(tensors[key], value) for key, value in damage.items() if value is not None}
        save_file({key: t for key, t in tensors.items() if key not in damage} | changed, file)
    elif damage is CODE:
        torch.save({"model.norm.weight": RunsCode(tmp_path / "executed")}, file)
    elif callable(damage):
        file.write_text(damage(file.read_text()))
    else:
        file.unlink()
        if damage is not None:
            file.symlink_to(tmp_path / damage)
    words = "--model_name_or_path {tmp}/" + f"{kind} {ONE}"
    with pytest.raises(ValueError, match=said):
        attempt("chat", words)
    file.unlink(missing_ok=True)
    shutil.copy(made / kind / name, file)
    assert attempt("chat", words) == 0 and not (tmp_path / "executed").exists()


@pytest.mark.slow
def test_a_model_is_exported_once_its_configuration_was_downloaded_again(made, tmp_path, attempt):
    words = OF_OUT + PROJECTOR + "--model_name_or_path {tmp}/model"
    (shutil.copytree(made / "model", tmp_path / "model") / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is no JSON object .*; copy the model's folder again"):
        attempt("export", words)
    with pytest.raises(ValueError, match="config.json is not JSON .*; download it again"):
        read_model_config(tmp_path / "model")
    shutil.copy(made / "model" / "config.json", tmp_path / "model")
    assert attempt("export", words) == 0


@pytest.mark.slow
def test_a_model_that_was_downloaded_to_the_folder_given_is_read(made, tmp_path):
    with pytest.raises(ValueError, match="is no folder: download the model .hf download. and give its folder"):
        read_model_config(tmp_path / "m")
    shutil.copytree(made / "model", tmp_path / "m")
    assert read_model_config(tmp_path / "m").vision_tower == str(made / "tower_a")


def test_generation_with_a_temperature_that_is_allowed():
    model, prompt = random_model(), pack([([5, 6], range(0))])
    with pytest.raises(ValueError, match="temperature -1: 0 is greedy, higher is more random; it cannot be negative"):
        generate(model, prompt, max_new_tokens=2, stops=(), temperature=-1)
    for temperature in (0, 1):
        assert len(generate(model, prompt, max_new_tokens=2, stops=(), temperature=temperature)) == 2


def test_a_bin_that_asks_for_more_than_tensors_may_be_downloaded_as_safetensors(made, tmp_path, attempt):
    file = shutil.copytree(made / "bin", tmp_path / "bin") / "pytorch_model.bin"
    torch.save({"model.norm.weight": RunsCode(tmp_path / "executed")}, file)
    with pytest.raises(ValueError, match="best as .safetensors"):
        attempt("chat", "--model_name_or_path {tmp}/bin " + ONE)
    shutil.copy(made / "model" / "model.safetensors", tmp_path / "bin")
    assert attempt("chat", "--model_name_or_path {tmp}/bin " + ONE) == 0


@pytest.mark.parametrize("name", ["model.safetensors.incomplete", "nothing"])
def test_a_download_that_did_not_end_is_made_again(made, tmp_path, attempt, name):
    """hf download writes beside what is there; a folder of the hub's cache may be left empty."""
    if name == "nothing":
        folder, said = tmp_path / "models--c--d", "is empty: download the model again"
        (folder / "snapshots").mkdir(parents=True)
        again = folder / "snapshots" / "a"
    else:
        folder = again = shutil.copytree(made / "model", tmp_path / "m")
        (folder / "model.safetensors").rename(folder / name)
        said = "its download has not ended: download it again"
    words = f"--model_name_or_path {folder} {ONE}"
    with pytest.raises(ValueError, match=said):
        attempt("chat", words)
    shutil.copytree(made / "model", again, dirs_exist_ok=True)
    assert attempt("chat", words) == 0


@pytest.mark.slow
def test_a_checkpoint_of_more_than_a_projector_is_exported_by_the_command_told(made, tmp_path, attempt):
    for path in ("full/checkpoint-1", "full"):
        with pytest.raises(ValueError, match="and start from that folder") as refused:
            attempt("chat", f"--projector {{made}}/{path} {ONE}")
        (words,) = re.findall(r"\(fastvid export (.*)\)", str(refused.value))
        assert attempt("export", words.replace("FOLDER", str(tmp_path / "exported"))) == 0
        assert attempt("chat", "--model_name_or_path {tmp}/exported " + ONE) == 0
    assert attempt("train", "--max_steps 1 --model_name_or_path {tmp}/exported") == 0


# (tower and frames of an extraction, flags of chat, what is said, those flags as mended where extraction is not)
EXTRACTED = [
    (
        "--vision_tower {made}/tower_a",
        OUT,
        "by another tower .*tower_a.* than the features .*tower_b.*; extract it with that one",
        None,
    ),
    (
        f"--vision_tower {{made}}/tower_b --num_frames {FRAMES + 1}",
        OUT,
        f"was trained with {FRAMES}; extract it with that",
        None,
    ),
    (
        "--vision_tower {made}/tower_a",
        "--projector {made}/theirs.bin --vision_tower {made}/tower_b ",
        "than --vision_tower .*; extract it with that one, or leave --vision_tower out",
        "--projector {made}/theirs.bin ",
    ),
    (
        f"--vision_tower {{made}}/tower_b --num_frames {FRAMES + 1}",
        UNTOLD,
        f"on features of {ROWS}: extract it with the tower, the frames and the pooling of training",
        None,
    ),
    ("--vision_tower {made}/wide", "", "made with another vision tower", None),
]


@pytest.mark.slow
@pytest.mark.parametrize("made_with, asked_with, said, mended", EXTRACTED)
def test_features_extracted_as_told_are_answered_about(attempt, made_with, asked_with, said, mended):
    about = "--video {tmp}/feats/clip.safetensors " + ASK
    assert attempt("extract", made_with) == 0
    with pytest.raises(ValueError, match=said):
        attempt("chat", asked_with + about)
    if mended is not None:
        assert attempt("chat", mended + about) == 0
    assert attempt("extract", "--vision_tower {made}/tower_b --overwrite") == 0
    assert attempt("chat", asked_with + about) == 0


# (record, what is said, the record as mended)
QUESTIONS = [
    ({"video": "clip1"}, 'has no text as "question" .or "Q", or', {"video": "clip1", "question": "?"}),
    ({"video": "clip1"}, 'has no text as "question" .or "Q", or', {"video": "clip1", "Q": "what"}),
    ({"video": "clip1"}, 'or "Q1" and "Q2".', {"video": "clip1", "Q1": "what", "Q2": "why"}),
    ({"question": "?"}, r'names no video \("video" or "video_name"\)', {"video": "clip1", "question": "?"}),
    ({"question": "?"}, r'names no video \("video" or "video_name"\)', {"video_name": "clip1", "question": "?"}),
    (
        {"video": f"{URL}.mp4", "question": "?"},
        "a URL; download the videos into the folder of --video, and give their names there",
        {"video": "a.mp4", "question": "?"},
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize("record, said, mended", QUESTIONS)
def test_questions_are_answered_once_mended_as_told(made, tmp_path, attempt, capsys, record, said, mended):
    shutil.copytree(made / "feats", tmp_path / "videos")
    words = "--video {tmp}/videos --questions_file {tmp}/questions.json --num_frames 4"
    (tmp_path / "questions.json").write_text(json.dumps([record]))
    with pytest.raises(ValueError, match=said):
        attempt("chat", words)
    shutil.copy(made / "clips" / "clip.mp4", tmp_path / "videos" / "a.mp4")
    (tmp_path / "questions.json").write_text(json.dumps([mended]))
    assert attempt("chat", words) == 0
    assert "answer" in json.loads(capsys.readouterr().out)


def test_an_export_goes_where_what_was_in_its_way_is_not(tmp_path, attempt):
    assert attempt("export", OF_OUT + HERE) == 0
    (tmp_path / "x" / "notes.txt").touch()
    with pytest.raises(ValueError, match="also holds notes.txt, .*; move it away, or choose another folder"):
        attempt("export", OF_OUT + HERE)
    assert attempt("export", OF_OUT + "--format llama --output {tmp}/y") == 0
    (tmp_path / "x" / "notes.txt").rename(tmp_path / "notes.txt")
    assert attempt("export", OF_OUT + HERE) == 0


@pytest.mark.slow
def test_a_projector_file_goes_where_the_message_says(attempt):
    with pytest.raises(ValueError, match="a projector file is chat's --projector or train's --pretrain_mm_mlp_adapter"):
        attempt("export", "--checkpoint {made}/out/mm_projector.bin " + PROJECTOR)
    assert attempt("chat", "--projector {made}/out/mm_projector.bin " + ONE) == 0
    assert attempt("train", "--max_steps 1 --pretrain_mm_mlp_adapter {made}/out/mm_projector.bin") == 0


def test_a_damaged_checkpoint_is_restored_or_another_one_named(made, tmp_path, attempt):
    run, name = tmp_path / "run", "model-00000-of-00001.safetensors"
    tensors = checkpoint.read_full(made / "out" / "checkpoint-1", "model")
    state = checkpoint.read_state(made / "out" / "checkpoint-1")
    for step in (1, 2):
        checkpoint.save(run, step, groups={"model": tensors}, state=state | {"step": step})
    shutil.copytree(run, tmp_path / "copy")
    flip_a_bit(run / "checkpoint-2" / name)
    with pytest.raises(ValueError, match="restore this checkpoint from a copy, or name another one"):
        attempt("export", "--checkpoint {tmp}/run/checkpoint-2 " + PROJECTOR)
    assert attempt("export", "--checkpoint {tmp}/run/checkpoint-1 " + PROJECTOR) == 0
    flip_a_bit(run / "checkpoint-1" / name)
    with pytest.raises(ValueError, match="No other checkpoint in .* is valid: restore one of them"):
        attempt("export", "--checkpoint {tmp}/run " + PROJECTOR)
    shutil.copytree(tmp_path / "copy" / "checkpoint-2", run / "checkpoint-2", dirs_exist_ok=True)
    assert attempt("export", "--checkpoint {tmp}/run " + PROJECTOR) == 0
    assert attempt("export", "--checkpoint {tmp}/run/checkpoint-2 " + PROJECTOR) == 0


@pytest.mark.slow
def test_an_address_is_downloaded_before_the_library_reads_it(made):
    settings = {"projector": str(made / "out"), "max_new_tokens": 2, "device": "cpu"}
    with closing(Chat(model_name_or_path=str(made / "model"), **settings)) as chat:
        with pytest.raises(ValueError, match="is a URL: download the video and give its path"):
            chat.ask(f"{URL}.mp4", "what")
        chat.ask(made / "clips" / "clip.mp4", "what")


def test_the_encoders_settings_are_mended_as_told(made):
    with pytest.raises(ValueError, match="batch size .0. and frames per video .0. must be at least 1"):
        FeatureEncoder(made / "tower_b", device="cpu", batch_size=0, num_temporal=0)
    encoder = FeatureEncoder(made / "tower_b", device="cpu", batch_size=1, num_temporal=1)
    with pytest.raises(ValueError, match="must have 1 to 1 frames, found 2"):
        encoder.encode(torch.zeros(2, 8, 8, 3, dtype=torch.uint8))
    assert encoder.encode(torch.zeros(1, 8, 8, 3, dtype=torch.uint8)).shape == (5, CHANNELS)


def test_rows_are_no_guess_with_the_flag_told(made, tmp_path, caplog, capsys):
    argv = flags(made, tmp_path, "--vision_tower", str(made / "tower_b"))
    at = argv.index("--video_folder")
    assert inspection.main(argv[:at] + argv[at + 2 :]) == 0
    assert "--video_folder tells each one's own" in caplog.text
    caplog.clear()
    assert inspection.main(argv) == 0
    assert f"<vid_patch>×{ROWS}" in capsys.readouterr().out and not caplog.text


def test_doctor_looks_at_a_folder_that_is_there(tmp_path):
    def disk(path):
        return next(f for f in doctor.examine(DoctorConfig(path=[str(path)])) if f.name == "disk")

    assert disk(tmp_path / "none").cost == "name a folder that does: --path"
    assert disk(tmp_path).found
