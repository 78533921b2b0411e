"""What messages about videos, features and data files tell a user to do can be done, and the command then succeeds."""

import json
import os
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from clips import draw
from remedied_features import DATA_FILES, FEATURES, TRAINING
from remedied_records import GOOD, LEFT_OUT, RECORDS, VIDEOS, asked
from remedied_videos import CONVERTING, EXTRACTING, FLAGS, VALIDATING
from towers import write_tower
from training_run import CHANNELS, write_run

from fastvid import convert, extract, inspection, train, validate
from fastvid.config import TrainConfig
from fastvid.data.conversation import inference_prompt
from fastvid.data.dataset import SampleSet, SampleSkipped
from fastvid.data.loader import Loader
from fastvid.data.tokenizer import load_tokenizer
from fastvid.features.file import load_features, save_features
from fastvid.features.folder import FeatureFolder

pytestmark = pytest.mark.usefixtures("forked")  # decoders too
ROWS = 2 + 4  # frames per video, patches of the tower
COMMANDS = {"extract": extract, "convert": convert, "validate": validate, "inspect": inspection, "train": train}
# Flags of each command, as far as none of them is given; a word such as -video_folder leaves one out. $S: `store`.
USUAL = {
    "extract": [
        "--video_dir_path videos",
        "--clip_feat_path feats",
        "--vision_tower $S/tower",
        "--num_frames 2",
        "--device cpu",
        "--decode_workers 1",
    ],
    "convert": ["--input_json_file in.json", "--output_json_file out.json"],
    "validate": ["--data_path train.json", "--video_folder feats", "--mm_use_vid_start_end"],
    "inspect": [
        "--model_name_or_path $S/model",
        "--data_path train.json",
        "--video_folder feats",
        "--mm_use_vid_start_end",
    ],
    "train": [
        "--model_name_or_path $S/model",
        "--data_path train.json",
        "--video_folder feats",
        "--output_dir out",
        "--tune_mm_mlp_adapter True",
        "--mm_use_vid_start_end",
        "--report_to none",
        "--disable_tqdm",
        "--dry_run",
    ],
}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """What a user has: videos and their features, records, a model, vision towers; and files to make mistakes with."""
    folder = write_run(tmp_path_factory.mktemp("store"))
    shutil.rmtree(folder / "feats")
    for name in VIDEOS:
        (folder / "videos" / name).parent.mkdir(exist_ok=True, parents=True)
        draw(folder / "videos" / name, 4)
    records = [{**GOOD, "id": str(i), "video": name} for i, name in enumerate(VIDEOS)]
    (folder / "train.json").write_text(json.dumps(records))
    (folder / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "in.json").write_text(json.dumps([{"q": "what?", "a": "a house", "video_id": name} for name in "ab"]))
    for name, seed in (("tower", 0), ("other", 1)):
        write_tower(folder / name, hidden_size=CHANNELS, heads=2, seed=seed)
    for name, scales in (("overflows", {"fc1": 1e6, "fc2": 1e-7}), ("huge", {"fc2": 1e7})):
        from transformers import CLIPVisionModel

        tower = CLIPVisionModel.from_pretrained(folder / "tower")
        for key, tensor in tower.state_dict().items():
            tensor *= next((scale for part, scale in scales.items() if f"layers.0.mlp.{part}." in key), 1)
        tower.save_pretrained(folder / name)
    for feats, more in (("feats", []), ("pickles", ["--format", "pkl"]), ("others", ["--vision_tower", "$S/other"])):
        assert call(folder, f"extract --clip_feat_path $S/{feats} --video_dir_path $S/videos {' '.join(more)}") == 0
    values, header = load_features(folder / "feats" / "a.safetensors")
    save_features(folder / "stray.pkl", values + 1, {})
    save_features(folder / "wide.safetensors", torch.ones(ROWS, CHANNELS + 1), {})
    save_features(folder / "nan.safetensors", torch.where(values == values.max(), torch.nan, values), header)
    np.save(folder / "good.npy", values.numpy()), np.save(folder / "whole.npy", np.ones((ROWS, CHANNELS), np.int32))
    np.savez(folder / "good.npz", values.numpy())
    torch.save(values, folder / "good.pt"), torch.save({"features": values}, folder / "dict.pt")
    return folder


def call(store, command):
    """The code with which a command ends, run in this process."""
    name, *words = command.replace("$S", str(store)).split()
    for flag in USUAL[name]:
        flag, *value = flag.replace("$S", str(store)).split()
        if f"-{flag.removeprefix('--')}" in words:
            words.remove(f"-{flag.removeprefix('--')}")
        elif not any(word.partition("=")[0] == flag for word in words):
            words += [flag, *value]
    return COMMANDS[name].main(words)


@pytest.fixture
def user(store, tmp_path, monkeypatch, capsys, caplog):
    """Who works in a folder with copies of the videos, features and records.

    `user(command)` is (code, all that was said); `user.do(steps)` does what a message says: commands of a shell and of
    fastvid with && between them.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("S", str(store))

    def shell(line):
        done = subprocess.run(line, shell=True, check=True, capture_output=True, text=True)
        assert not done.stderr, done.stderr
        return done.stdout

    def ask(command):
        capsys.readouterr(), caplog.clear()
        try:
            code, error = call(store, command), ""
        except (ValueError, SystemExit) as raised:
            code, error = getattr(raised, "code", 2), raised
        return code, "\n".join([str(error), *capsys.readouterr(), caplog.text])

    def do(steps):
        for step in filter(None, steps.split(" && ")):
            if step.startswith("fastvid "):
                assert ask(step.removeprefix("fastvid "))[0] == 0
            else:
                shell(step)

    shell("cp -a $S/videos $S/feats $S/train.json $S/train.jsonl $S/in.json .")
    ask.do, ask.expanded = do, lambda command: " ".join(shell(f"echo {command}").split())
    return ask


@pytest.mark.slow
@pytest.mark.parametrize(
    "setup, mistake, said, steps, mended",
    [*EXTRACTING, *FLAGS, *CONVERTING, *VALIDATING, *DATA_FILES, *FEATURES, *TRAINING],
)
def test_a_command_succeeds_once_a_mistake_was_mended_as_told(user, setup, mistake, said, steps, mended):
    user.do(setup)
    code, text = user(mistake)
    assert all(part in text for part in said.split(" … ")), text
    user.do(steps)
    again, after = user(user.expanded(mended))
    assert again == 0, after
    assert code != 0 or said.split(" … ")[0] not in after  # a warning is gone


@pytest.mark.parametrize("record, said, mended", RECORDS)
def test_records(user, tmp_path, record, said, mended):
    path = tmp_path / "train.json"
    save_features(tmp_path / "feats" / "picture.safetensors", torch.ones(4, CHANNELS), {})
    path.write_text(json.dumps([record, asked("<video> why")]))
    code, text = user("validate")
    assert code == 1 and all(part in text for part in said.split(" … ")), text
    path.write_text(json.dumps([*([] if mended is LEFT_OUT else [mended]), asked("<video> why")]))
    code, text = user("validate")
    assert code == 0 and "nothing wrong" in text, text


def test_a_sample_that_the_reference_leaves_out(user):
    user.do("sed -i 's/red house/red<\\/s>house/g' train.json")
    assert ", 0 supervised" not in user("inspect")[1]
    assert user("inspect --parity reference")[1].count(", 0 supervised") == len(VIDEOS)


@pytest.mark.parametrize("mend", ["raise it", "shorten the text before the video"])
def test_a_video_that_is_cut(user, tmp_path, mend):
    text = "what does the cat see near a red house"
    (tmp_path / "train.json").write_text(json.dumps([asked(f"{text}\n<video>")]))
    fits = int(re.search(r"(\d+) tokens", user("inspect")[1])[1])
    (tmp_path / "train.json").write_text(json.dumps([asked(f"{text * 3}\n<video>")]))
    code, said = user(f"validate --model_name_or_path $S/model --model_max_length {fits}")
    assert code == 1 and "a video is cut: " in said and mend in said
    if mend != "raise it":
        (tmp_path / "train.json").write_text(json.dumps([asked(f"{text}\n<video>")]))
    else:
        fits = int(re.search(r"the sample has (\d+) tokens", said)[1])
    assert user(f"validate --model_name_or_path $S/model --model_max_length {fits}")[0] == 0


def test_an_answer_beyond_the_longest_sample(user):
    start, fits = re.search(r"supervised \[(\d+),(\d+)\)", user("inspect")[1]).groups()
    limit = "validate --model_name_or_path $S/model --model_max_length"
    code, said = user(f"{limit} {start}")
    assert code == 1 and "no answer within the first " in said and "(--model_max_length)" in said
    assert user(f"{limit} {fits}")[0] == 0


def test_validation_counts_by_kind_what_ends_a_run(user):
    user.do("rm feats/a.* feats/sub/c.* && sed -i 's/b.mp4/..\\/b.mp4/' train.json")
    code, said = user("train")
    assert code == 2 and "none of 3 records can be used (fastvid validate counts them by kind)" in said
    code, said = user("validate")
    assert "features missing: 2\n" in said and "features refused: 1\n" in said


def test_a_name_that_no_feature_file_has(store, tmp_path):
    shutil.copy(store / "feats" / "a.safetensors", tmp_path / "a.bin")
    with pytest.raises(ValueError, match="a feature file ends in .safetensors, .pkl, .npy or .pt"):
        load_features(tmp_path / "a.bin")
    (tmp_path / "a.bin").rename(tmp_path / "a.safetensors")
    load_features(tmp_path / "a.safetensors")


def test_features_that_change_in_a_run(store, user, tmp_path):
    config = TrainConfig(
        str(store / "model"), ["train.json"], output_dir="out", video_folder="feats", mm_use_vid_start_end=True
    )

    def start():
        samples = SampleSet(
            config.data_path,
            load_tokenizer(config.model_name_or_path, True),
            FeatureFolder(config.video_folder),
            config,
        )
        samples.fit(CHANNELS)
        return samples

    samples = start()
    samples.read(0)
    save_features(tmp_path / "feats" / "a.safetensors", torch.ones(ROWS + 1, CHANNELS), {})
    with pytest.raises(SampleSkipped, match=rf"is \[{ROWS + 1}, {CHANNELS}\] now; start the run again"):
        samples.read(0)
    assert len(start().read(0)[1][0]) == ROWS + 1


@pytest.mark.slow
@pytest.mark.parametrize("processes, mended", [(1, True), (0, False)])
def test_a_run_whose_reader_died_goes_on(user, monkeypatch, processes, mended):
    """Started again; and with no processes to read, if they would die again."""
    read, main = Loader.read, os.getpid()

    def dies(loader, step, **options):
        if step == 4 and os.getpid() != main:
            os.kill(os.getpid(), 9)
        return read(loader, step, **options)

    command = (
        "train --dry_run False --num_train_epochs 4 --per_device_train_batch_size 2 --save_steps 2 "
        "--dataloader_num_workers"
    )
    with monkeypatch.context() as patch:
        patch.setattr(Loader, "read", dies)
        with pytest.raises(ChildProcessError, match=r"has died \(.*0 needs none. Start the same command again to go"):
            user(f"{command} 1")
        if mended:
            patch.undo()
        code, said = user(f"{command} {processes}")
    assert code == 0 and "resumed from out/checkpoint-" in said, said


def test_known_templates(store):
    tokenizer = load_tokenizer(store / "model", True)

    def prompt(template):
        return inference_prompt("what", tokenizer, video_tokens=ROWS, use_start_end=True, conv_mode=template)

    with pytest.raises(ValueError, match="--conv_mode v9 is no template; known: ") as told:
        prompt("v9")
    known = str(told.value).partition("known: ")[2].split(", ")
    assert len(known) == 3 and all(map(prompt, known))
