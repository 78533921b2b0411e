"""What messages about videos, features and data files tell a user to do can be done, and the command then succeeds."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from clips import draw
from conftest import ROOT
from towers import write_tower
from training_run import CHANNELS, write_run

from fastvid import convert, extract, inspection, train, validate
from fastvid.config import TrainConfig
from fastvid.data import prefetch as workers
from fastvid.data.conversation import inference_prompt
from fastvid.data.dataset import SampleSet, SampleSkipped
from fastvid.data.loader import Loader
from fastvid.data.prefetch import Ahead
from fastvid.data.tokenizer import load_tokenizer
from fastvid.features.file import load_features, save_features
from fastvid.features.folder import FeatureFolder

VIDEOS = ("a.mp4", "b.mp4", "sub/c.mp4")
TURNS = [{"from": "human", "value": "what does the cat see\n<video>"}, {"from": "gpt", "value": "a red house"}]
GOOD = {"id": "a", "video": "a.mp4", "conversations": TURNS}
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


# (how the mistake comes about, the command, what is said with " … " for what is left out here, what is then done, and
# the command that then succeeds)
EXTRACTING = [
    (
        "ln -s $PWD/videos/b.mp4 videos/l.mp4",
        "extract",
        "1 links were left out; --follow_links True follows them",
        "",
        "extract --follow_links True",
    ),
    (
        "mkdir links && ln -s $PWD/videos/a.mp4 links",
        "extract --video_dir_path links",
        "1 links are not followed without --follow_links True",
        "",
        "extract --video_dir_path links --follow_links True",
    ),
    (
        "",
        "extract --num_frames 3",
        "3 feature files of other settings … choose another --clip_feat_path",
        "",
        "extract --num_frames 3 --clip_feat_path more",
    ),
    (
        "",
        "extract --num_frames 3",
        "or replace them with --overwrite True",
        "",
        "extract --num_frames 3 --overwrite True",
    ),
    (
        "",
        "extract --num_frames 3 --format pkl",
        "3 feature files of another format … choose another --clip_feat_path",
        "",
        "extract --num_frames 3 --format pkl --clip_feat_path more",
    ),
    (
        "",
        "extract --num_frames 3 --format pkl",
        "choose another --clip_feat_path, or remove them",
        "rm feats/*.safetensors feats/sub/*.safetensors",
        "extract --num_frames 3 --format pkl",
    ),
    (
        "cp -a $S/pickles . && cp $S/stray.pkl pickles/a.pkl",
        "extract --format pkl --clip_feat_path pickles",
        "is not the file that its manifest entry describes; remove it",
        "rm pickles/a.pkl",
        "extract --format pkl --clip_feat_path pickles",
    ),
    (
        "cp -a $S/pickles . && cp $S/stray.pkl pickles/a.pkl",
        "extract --format pkl --clip_feat_path pickles",
        "or replace such files with --overwrite True",
        "",
        "extract --format pkl --clip_feat_path pickles --overwrite",
    ),
    (
        "",
        "extract --vision_tower $S/overflows --clip_feat_path more --dtype float16",
        "its features are not finite in float16; try --dtype float32",
        "",
        "extract --vision_tower $S/overflows --clip_feat_path more --dtype float32",
    ),
    (
        "",
        "extract --vision_tower $S/huge --clip_feat_path more --dtype float32",
        "its features are not finite in float32; give another --vision_tower",
        "",
        "extract --vision_tower $S/tower --clip_feat_path more",
    ),
    ("", "extract --llava 1.1", "--llava 1.1 has no effect beside --vision_tower", "", "extract"),
    (
        "",
        "extract --video_dir_path videos/a.mp4",
        "is a file; give the folder that it lies in, videos",
        "",
        "extract --video_dir_path videos",
    ),
    (
        "",
        "extract --video_dir_path https://a.b/c",
        "is a URL: download the videos and give their folder",
        "",
        "extract --video_dir_path videos",
    ),
    ("", "extract --video_dir_path nowhere", "does not exist; give the folder of the videos", "", "extract"),
    (
        "mkdir odd && cp -p videos/a.mp4 odd/a.dat",
        "extract --video_dir_path odd",
        "no file in it ends as a video does (.mp4",
        "mv odd/a.dat odd/a.mp4",
        "extract --video_dir_path odd",
    ),
    (
        "cp videos/a.mp4 videos/a.mkv",
        "extract",
        "a.mkv would be written to a.safetensors as well; rename one of them",
        "mv videos/a.mkv videos/d.mkv",
        "extract",
    ),
    (
        "gzip videos/a.mp4 && mv videos/a.mp4.gz videos/a.mp4",
        "extract",
        "is packed with gzip; name it a.mp4.gz and unpack it with `gunzip`",
        "mv videos/a.mp4 videos/a.mp4.gz && gunzip videos/a.mp4.gz",
        "extract",
    ),
    # What is fetched or downloaded again is a good file in its place.
    (
        "echo version https://git-lfs.github.com/spec/v1 > videos/a.mp4",
        "extract",
        "fetch it with `git lfs pull` in its folder, or download it again",
        "cp $S/videos/a.mp4 videos",
        "extract",
    ),
    (
        "echo '<html>' > videos/a.mp4",
        "extract",
        "is a web page (HTML), not the file itself; download it again",
        "cp $S/videos/a.mp4 videos",
        "extract",
    ),
    (": > videos/a.mp4", "extract", "is empty; download or write it again", "cp $S/videos/a.mp4 videos", "extract"),
]
FLAGS = [
    ("", "validate --video_foldr feats", "did you mean --video_folder?", "", "validate --video_folder feats"),
    ("", "validate --fastest", "unknown flag --fastest, see --help", "fastvid validate --help", "validate --quick"),
    (
        "echo fast > c.yaml",
        "validate --config c.yaml",
        "expected `flag: value` lines",
        "echo quick: true > c.yaml",
        "validate --config c.yaml",
    ),
    (
        "",
        "validate --video_folder feats -quick",
        "unexpected argument -quick; a flag begins with two hyphens (--)",
        "",
        "validate --video_folder feats --quick",
    ),
    ("", "validate --video_folder", "--video_folder: give a value", "", "validate --video_folder feats"),
    ("", "validate --data_path", "--data_path: give one value or more", "", "validate --data_path train.json"),
    ("", "validate -data_path", "error: give --data_path", "", "validate --data_path train.json"),
    (
        "",
        "convert --output_json_file https://a.b/c.json",
        "is a URL; name a place on this machine",
        "",
        "convert --output_json_file c.json",
    ),
    (
        "",
        "convert --output_json_file feats",
        "is a folder; name a file in it",
        "",
        "convert --output_json_file feats/out.json",
    ),
    (
        "",
        "convert --output_json_file in.json/out.json",
        "in.json is a file, not a folder; name another",
        "",
        "convert --output_json_file out.json",
    ),
    (
        "",
        "convert --output_json_file new/out.json",
        "does not exist; create it first",
        "mkdir new",
        "convert --output_json_file new/out.json",
    ),
    (
        "",
        "validate --video_folder=",
        "is empty, as of a variable that is not set; give a path",
        "",
        "validate --video_folder feats",
    ),
    ("", "validate --video_folder=", "give a path, or leave the flag out", "", "validate -video_folder"),
]
CONVERTING = [
    (
        "",
        "convert --input_json_file train.json",
        "need no conversion; with --clip_feature_path those are kept",
        "",
        "convert --input_json_file train.json --clip_feature_path feats",
    ),
    (
        "",
        "convert --clip_feature_path videos",
        "it holds a.mp4; extract the features of the videos first (fastvid",
        "fastvid extract --clip_feat_path videos",
        "convert --clip_feature_path videos",
    ),
    (
        "mkdir others && touch others/w.pkl",
        "convert --clip_feature_path others",
        "give the folder that holds these records' features",
        "",
        "convert --clip_feature_path feats",
    ),
    (
        "",
        "convert --clip_feature_path nowhere",
        "is no folder; give the one that feature extraction wrote to",
        "",
        "convert --clip_feature_path feats",
    ),
    (
        'sed -i \'s/"a": "/"b": "/\' in.json',
        "convert",
        "mend it, or leave malformed",
        'sed -i \'s/"b": "/"a": "/\' in.json',
        "convert",
    ),
    (
        'sed -i \'0,/"a": "/ s//"b": "/\' in.json',
        "convert",
        "or leave malformed records out with --on_bad drop",
        "",
        "convert --on_bad drop",
    ),
    (
        "sed -i 's/a.mp4/..\\/a.mp4/' train.json",
        "convert --input_json_file train.json --clip_feature_path feats",
        "records out with --on_bad drop",
        "",
        "convert --input_json_file train.json --clip_feature_path feats --on_bad drop",
    ),
    (
        "sed -i '0,/a house/ s///' in.json",
        "convert",
        "have an empty answer; training leaves them out with --on_bad_sa",
        "",
        "train --data_path out.json --on_bad_sample skip",
    ),
    (
        "",
        "validate --data_path in.json",
        "is a record of VideoInstruct, of which fastvid convert makes a training",
        "fastvid convert",
        "validate --data_path out.json",
    ),
]
VALIDATING = [
    (
        "cp $S/wide.safetensors feats/b.safetensors",
        "validate",
        "extract all with one tower",
        "fastvid extract --overwrite True",
        "validate",
    ),
    ("", "validate --num_video_tokens 7", "or leave --num_video_tokens 7 out", "", "validate"),
    ("", "validate --vision_tower $S/other", "leave --vision_tower … other out", "", "validate"),
    ("", "validate --vision_tower $S/other", "other out, or give that one", "", "validate --vision_tower $S/tower"),
    (
        "cp $S/others/b.safetensors feats",
        "validate",
        "extract all with one tower (fastvid extract --overwrite True)",
        "fastvid extract --overwrite True",
        "validate",
    ),
    (
        "cp $S/others/b.safetensors feats",
        "train",
        "features of 2 vision towers … `fastvid extract --overwrite True` makes them anew",
        "fastvid extract --overwrite True",
        "train",
    ),
    (
        "sed -i 's/red house/red<\\/s>house/g' train.json",
        "validate",
        "(--parity reference leaves the sample out)",
        "",
        "validate --parity reference",
    ),
]
DATA_FILES = [
    (
        "printf PAR1.... > p.json",
        "validate --data_path p.json",
        "is no whole Parquet file",
        "cp train.jsonl p.jsonl",
        "validate --data_path p.jsonl",
    ),
    (
        f"{sys.executable} -m zipfile -c t.zip train.json",
        "validate --data_path t.zip",
        "is a zip archive; unpack it",
        f"{sys.executable} -m zipfile -e t.zip unpacked",
        "validate --data_path unpacked/train.json",
    ),
    (
        "gzip train.json",
        "validate --data_path train.json.gz",
        "is packed with gzip; unpack it with `gunzip`",
        "gunzip train.json.gz",
        "validate --data_path train.json",
    ),
    (
        "gzip train.json && mv train.json.gz train.json",
        "validate",
        "name it train.json.gz and unpack it with `gunzip`",
        "mv train.json train.json.gz && gunzip train.json.gz",
        "validate",
    ),
    (
        "bzip2 train.json && mv train.json.bz2 train.json",
        "validate",
        "is packed with bzip2; name it train.json.bz2 and unpack it with `bunzip2`",
        "mv train.json train.json.bz2 && bunzip2 -q train.json.bz2",
        "validate",
    ),
    (
        "xz train.json && mv train.json.xz train.json",
        "validate",
        "is packed with xz; name it train.json.xz and unpack it with `unxz`",
        "mv train.json train.json.xz && unxz -q train.json.xz",
        "validate",
    ),
    (
        "sed 's/red/caf\\xe9/' train.json > l.json",
        "validate --data_path l.json",
        "is not UTF-8 … save the file as UTF",
        "iconv -f latin1 -t utf8 l.json > u.json",
        "validate --data_path u.json",
    ),
    (
        "mkdir sets && mv train.json sets",
        "validate --data_path sets",
        "give the data files in it: train.json",
        "",
        "validate --data_path sets/train.json",
    ),
    (
        "",
        "validate --data_path train.json,train.jsonl",
        "give several files with spaces between them: train.json train.jsonl",
        "",
        "validate --data_path train.json train.jsonl",
    ),
    (
        "",
        "validate --data_path tra*.json",
        "write a pattern without quotation marks, so that the shell puts",
        "",
        "validate --data_path tra*.json",
    ),
    (
        "",
        "validate --data_path some/set",
        "(hf download some/set --repo-type dataset), and give its JSON file",
        "mkdir hub && cp train.json hub",
        "validate --data_path hub/train.json",
    ),
    ("", "validate --data_path nowhere.json", "give the path of a JSON, JSONL or Parquet file", "", "validate"),
    (
        'sed -i \'s/, "conversations"/,\\n"conversations"/\' train.jsonl',
        "validate --data_path train.jsonl",
        "expected a JSON array or one JSON object per line",
        "sed -i 'N;s/\\n//' train.jsonl",
        "validate --data_path train.jsonl",
    ),
    (
        "echo > e.json",
        "validate --data_path e.json",
        "is empty: expected a JSON array or one JSON object per line",
        "cat train.json > e.json",
        "validate --data_path e.json",
    ),
    (
        "printf 'sets:\\n- train.json\\n' > m.yaml",
        "validate --data_path m.yaml",
        "YAML is no data file: give the JSON files that it lists",
        "",
        "validate --data_path train.json",
    ),
    (
        "(printf '{\"x\": '; cat train.json; printf ', \"y\": '; cat train.json; printf '}') > both.json",
        "validate --data_path both.json",
        "lists of records (x, y); write the one to use to a file of its own",
        "cp train.json x.json",
        "validate --data_path x.json",
    ),
]
AGAIN = "rm feats/a.* && fastvid extract"
FEATURES = [
    (
        "truncate -s -10 feats/a.safetensors",
        "validate",
        "remove it and extract it again (fastvid extract)",
        AGAIN,
        "validate",
    ),
    (
        "cp $S/nan.safetensors feats/a.safetensors",
        "validate",
        "holds NaN or infinity … remove it and extract it again",
        AGAIN,
        "validate",
    ),
    (
        "sed -i 's/a.mp4/a.pkl/' train.json && echo torn > feats/a.pkl",
        "validate",
        "a.pkl: the pickle is damaged … remove it and extract it again",
        AGAIN,
        "validate",
    ),
    (
        "rm feats/a.* && cp $S/whole.npy feats/a.npy",
        "validate",
        "dtype is int32 … numpy.save writes .npy",
        "cp $S/good.npy feats/a.npy",
        "validate",
    ),
    (
        "rm feats/a.* && cp $S/whole.npy feats/a.npy",
        "validate",
        ".pt), or remove it and extract it again",
        AGAIN,
        "validate",
    ),
    (
        "rm feats/a.* && cp $S/dict.pt feats/a.pt",
        "validate",
        "holds a dict … torch.save of the tensor .pt",
        "cp $S/good.pt feats/a.pt",
        "validate",
    ),
    (
        "rm feats/a.* && cp $S/good.npz feats/a.pkl",
        "validate",
        "store the [rows, channels] array itself (numpy.save",
        "rm feats/a.pkl && cp $S/good.npy feats/a.npy",
        "validate",
    ),
    (
        "rm feats/a.* && cp $S/good.npy feats/a.pkl",
        "validate",
        "holds what a .npy file does; name it a.npy",
        "mv feats/a.pkl feats/a.npy",
        "validate",
    ),
    ("rm feats/a.*", "validate", "extract them (fastvid extract)", "fastvid extract", "validate"),
    (
        "rm feats/a.*",
        "train",
        "leave its records out (train with --on_bad_sample skip",
        "",
        "train --on_bad_sample skip",
    ),
    (
        "rm feats/a.*",
        "validate",
        "or use scripts/filter_for_missing_videos.py",
        f"{sys.executable} {ROOT}/scripts/filter_for_missing_videos.py --input_json_file train.json --output_json_file "
        "kept.json --clip_feature_path feats 2> told",
        "validate --data_path kept.json",
    ),
    (
        "gzip feats/a.safetensors",
        "validate",
        "lies there, but is packed with gzip: unpack it with `gunzip`",
        "gunzip feats/a.safetensors.gz",
        "validate",
    ),
    (
        "mv feats/a.safetensors feats/a.SAFETENSORS",
        "validate",
        "not read under this ending: name it a.safetensors",
        "mv feats/a.SAFETENSORS feats/a.safetensors",
        "validate",
    ),
    (
        "rm feats/a.* && cp $S/good.pt feats/a.pth",
        "validate",
        "not read under this ending: name it a.pt",
        "mv feats/a.pth feats/a.pt",
        "validate",
    ),
    (
        "rm feats/a.* && ln -s $PWD/videos/a.mp4 feats",
        "validate",
        "a.mp4 lies there, but is a video; extract them",
        "fastvid extract",
        "validate",
    ),
    (
        "rm feats/a.* && ln -s $PWD/videos/a.mp4 feats",
        "validate",
        "Links in that folder were not followed",
        "fastvid extract --video_dir_path feats --follow_links True",
        "validate",
    ),
    (
        "cp feats/a.safetensors feats/two.1.safetensors && cp feats/a.safetensors feats/two.2.safetensors && "
        "sed -i 's/a.mp4/two.pkl/' train.json",
        "validate",
        "means any of two.1, two.2 in feats; give the whole name",
        "sed -i 's/two.pkl/two.1.pkl/' train.json",
        "validate",
    ),
    (
        "cp $S/pickles/a.pkl feats/cut.pkl && sed -i 's/a.mp4/cut.1.mp4/; s/b.mp4/cut.2.mp4/' train.json && "
        "mv videos/a.mp4 videos/cut.1.mp4 && mv videos/b.mp4 videos/cut.2.mp4",
        "validate",
        "whose name is cut at the first dot; extract them again (fastvid extract)",
        "fastvid extract",
        "validate",
    ),
    (
        "",
        "validate --video_folder nowhere",
        "is no folder; give the one that feature extraction wrote to",
        "",
        "validate --video_folder feats",
    ),
]
TRAINING = [
    (
        "",
        "train -video_folder",
        "names a video (a.mp4); give its folder with --video_folder",
        "",
        "train --video_folder feats",
    ),
    (
        "cp -r $S/model m && truncate -s 20 m/config.json",
        "inspect --model_name_or_path m",
        "is no JSON object … copy the model's folder again",
        "rm -r m && cp -r $S/model m",
        "inspect --model_name_or_path m",
    ),
    (
        "for f in a b sub/c; do cp $S/wide.safetensors feats/$f.safetensors; done",
        "train",
        "extract them with this run's vision tower",
        "fastvid extract --overwrite True",
        "train",
    ),
    ("", "train --num_video_tokens 9", "or let videos differ in rows (neither --num_video_tokens nor", "", "train"),
    ("", "train --version v9", "--version v9 is no template; known: auto, v1", "", "train --version v1"),
    (
        "",
        "inspect -video_folder",
        "cannot tell how many tokens a video takes from … give --num_video_tokens",
        "",
        "inspect -video_folder --num_video_tokens 6",
    ),
    ("", "inspect -video_folder", "--video_folder with the features", "", "inspect --video_folder feats"),
    (
        "",
        "inspect -video_folder",
        "or --vision_tower with the tower's folder",
        "",
        "inspect -video_folder --vision_tower $S/tower",
    ),
]


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


def asked(question, answer="a house", **more):
    return {**GOOD, "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}], **more}


def without(record, *names):
    return {name: value for name, value in record.items() if name not in names}


LEFT_OUT = None
# (record, what is said, the record as mended)
RECORDS = [
    (
        asked("<video> what <vid_patch>"),
        "which is the model's own placeholder; take it out of the text",
        asked("<video> what"),
    ),
    (
        without({**asked("what"), "video_path": "a.mp4"}, "video"),
        "a record names its video in 'video'",
        asked("<video> what"),
    ),
    (
        without({**asked("<video> what"), "clip": "a.mp4"}, "video"),
        "field 'clip' is not read; a record names its video",
        asked("<video> what"),
    ),
    (
        without({**asked("what"), "image": "picture.jpg"}, "video"),
        "0 <image> in the text for 1 image; put <image> into the question",
        without({**asked("<image> what"), "image": "picture.jpg"}, "video"),
    ),
    (
        without({**asked("<image> what"), "img": "picture.jpg"}, "video"),
        "field 'img' is not read; a record names its image in 'image'",
        without({**asked("<image> what"), "image": "picture.jpg"}, "video"),
    ),
    (
        without(asked("<image> what"), "video"),
        "the text holds <image>, but the record names no file; name its image in 'image'",
        without({**asked("<image> what"), "image": "picture.jpg"}, "video"),
    ),
    (
        without({**asked("<image> what"), "image": "data:image/png;base64,iVBO"}, "video"),
        "field 'image' holds the file itself; write it to a file, and name that",
        without({**asked("<image> what"), "image": "picture.jpg"}, "video"),
    ),
    (
        without({**asked("<depth> what"), "depth": "a.png"}, "video"),
        "field 'depth': only videos … leave the record out",
        LEFT_OUT,
    ),
    (
        without(asked("<audio> what"), "video"),
        "names no file: only videos, images and text are trained on; leave the record",
        LEFT_OUT,
    ),
    (
        asked("<video> or <video>"),
        'a record of several videos lists them as "videos", one for each placeholder',
        without(asked("<video> or <video>", videos=["a.mp4", "b.mp4"]), "video"),
    ),
    (
        {**GOOD, "conversations": [TURNS[1] | {"value": "<video>"}, *asked("what")["conversations"]]},
        "the first turn is from gpt and left out; put <video> into the question",
        {**GOOD, "conversations": [TURNS[1] | {"value": "hello"}, *asked("<video> what")["conversations"]]},
    ),
    (asked("what"), "put <video> into the question", asked("<video> what")),
    (
        {**GOOD, "conversations": [{**TURNS[0], "value": "what"}, {**TURNS[1], "value": "<image> a house"}]},
        "in an answer, which shows nothing; put it into the question",
        asked("<video> what"),
    ),
    (
        {"messages": [{"role": "system", "content": [{"video": "a.mp4"}]}, {"role": "user", "content": "what"}]},
        "turn 0, from system, holds a file; put it into a question",
        GOOD,
    ),
    (
        without(asked("what", videos=["a.mp4", "b.mp4"]), "video"),
        "into the question, once for each video",
        without(asked("<video> what <video>", videos=["a.mp4", "b.mp4"]), "video"),
    ),
    (
        {"Q": "what", "A": "a house", "video": "a.mp4"},
        'write "conversations": [{"from": "human", "value": question}',
        asked("<video> what"),
    ),
    ({**GOOD, "conversations": [*TURNS, {"from": "narrator", "value": "x"}]}, "and leave other turns out", GOOD),
    (
        {**GOOD, "conversations": [{**TURNS[0], "from": "visitor"}, TURNS[1]]},
        'is from "visitor"; write "human" for who asks and "gpt" for who answers',
        GOOD,
    ),
    (
        {**GOOD, "conversations": [{"value": TURNS[0]["value"]}, TURNS[1]]},
        'turn 0 does not say that it is "from": "human" or "gpt"',
        GOOD,
    ),
    (
        {**GOOD, "conversations": [{"from": "human", "text": TURNS[0]["value"]}, TURNS[1]]},
        'turn 0 has no text as "value" (it has from, text)',
        GOOD,
    ),
    ({**GOOD, "conversations": [TURNS[0], TURNS[0], TURNS[1]]}, "human and gpt must take turns", GOOD),
    (
        {**GOOD, "conversations": [{"from": "human", "value": [{"type": "audio"}, {"text": "what"}]}, TURNS[1]]},
        "part 0 is of the type audio; only text, images and videos are read",
        {**GOOD, "conversations": [{"from": "human", "value": [{"type": "video"}, {"text": "what"}]}, TURNS[1]]},
    ),
    ({**GOOD, "video": "https://a.b/a.mp4"}, "it is a URL, and must be downloaded first", GOOD),
    ({**GOOD, "video": "sub\\c.mp4"}, "sub-folders are written with /", {**GOOD, "video": "sub/c.mp4"}),
    ({**GOOD, "video": "/data/a.mp4"}, "it is absolute; give it relative to feats", GOOD),
    ({**GOOD, "video": "../feats/a.mp4"}, 'it has ".."; give it relative to feats', GOOD),
]


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


# Processes that read ahead. Their number is the caller's: --dataloader_num_workers.


def test_no_processes_need_no_shared_memory(monkeypatch):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(workers._Fork, "Queue", full)
    with pytest.raises(ChildProcessError, match="can be started .*--dataloader_num_workers 0 needs none"):
        list(Ahead(str, 1).map(range(2)))
    assert list(Ahead(str, 0).map(range(2))) == ["0", "1"]


def test_no_processes_need_no_memory_to_send_with(monkeypatch):
    def full():
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(workers, "_memory", full)
    with pytest.raises(ChildProcessError, match="fewer --dataloader_num_workers need less memory, 0 needs none"):
        list(Ahead(str, 1).map(range(2)))
    assert list(Ahead(str, 0).map(range(2))) == ["0", "1"]


@pytest.mark.slow
@pytest.mark.parametrize("processes, limit", [(1, 4096), (0, None)])
def test_a_limit_on_open_files(processes, limit):
    def opens_many(number):
        held = []
        try:
            while len(held) < 100:
                held.append(os.dup(0))
        except OSError:
            pass
        if parent == os.getpid():
            while held:
                os.close(held.pop())
        return number, held

    limits, parent = resource.getrlimit(resource.RLIMIT_NOFILE), os.getpid()
    few = len(os.listdir("/proc/self/fd")) + 60
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (few, limits[1]))
        with pytest.raises(ChildProcessError, match="raise the limit on open files .`ulimit -n`., or give --data"):
            list(Ahead(opens_many, 1).map(range(2)))
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit or few, limits[1]))
        assert [number for number, _ in Ahead(opens_many, processes).map(range(2))] == [0, 1]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_no_processes_need_no_second_memory():
    def needs_much(number):
        if os.getpid() != parent:
            raise MemoryError
        return number

    parent = os.getpid()
    with pytest.raises(ChildProcessError, match="has no memory left: fewer --dataloader_num_workers need less, 0 "):
        list(Ahead(needs_much, 1).map(range(2)))
    assert list(Ahead(needs_much, 0).map(range(2))) == [0, 1]


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
