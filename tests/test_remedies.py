"""What messages tell a user to do can be done: what they name is there, and the command succeeds once it was done.

``remedies.json`` says which test carries out which remedy, by a piece of its message ("carried out"). Others want a
network, a GPU or several machines ("not here"), or name a flag and ask nothing of the user ("nothing to do").
"""

import ast
import dataclasses
import json
import re

import pytest
from conftest import ROOT
from training_run import flags, write_run

from fastvid import config, train
from fastvid.cli import COMMANDS

# Of other programs: torchrun, pip, hf, docker, sbatch.
OTHERS = {"array", "config", "help", "local-dir", "nproc_per_node", "repo-type", "shm-size"}
FLAGS = {
    config.flag_of(field)
    for each in vars(config).values()
    if dataclasses.is_dataclass(each) and isinstance(each, type)
    for field in dataclasses.fields(each)
}


def docstrings(tree):
    """The identities of a syntax tree's docstrings."""
    return {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }


def texts():
    """(file, text) of every string of the product that is no docstring."""
    for path in sorted((ROOT / "fastvid").rglob("*.py")):
        tree = ast.parse(path.read_text())
        docs = docstrings(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
                yield path.relative_to(ROOT).as_posix(), node.value


@pytest.mark.slow
@pytest.mark.parametrize(
    "pattern, known",
    [
        (r"(?<![\w-])--([A-Za-z][\w-]*)", FLAGS | OTHERS),
        (r"[`(]fastvid ([a-z]+)", set(COMMANDS)),
        (r"(scripts/[\w/]+\.\w+)", {path.relative_to(ROOT).as_posix() for path in (ROOT / "scripts").rglob("*")}),
    ],
)
def test_what_is_named_is_there(pattern, known):
    named = {(file, word) for file, text in texts() for word in re.findall(pattern, text)}
    assert len(named) > 1
    assert {(file, word) for file, word in named if word not in known} == set()


# What a message that asks something of its reader has in it: a flag, a command, or one of these words.
ASKS = re.compile(
    r"--[\w{]|`(fastvid|hf|pip|git|docker|gunzip)|\b(give|use|leave|choose|remove|replace|add|set|fetch|"
    r"download|unpack|install|restore|end that|try|copy|go on with|start over|move|save the|store|write|"
    r"extract|name it|make|mend|rename|shorten|raise it|put)\b"
)
FOREIGN = "fastvid/flags/foreign.py"  # remedies that test_remedies_runs tries all
HELP = "fastvid/config/"  # where most texts are those of --help, which ask nothing: only what is raised counts


def messages():
    """Every text of the product that is no docstring and may ask something; {} for what is filled in."""
    for path in sorted((ROOT / "fastvid").rglob("*.py")):
        tree, file = ast.parse(path.read_text()), path.relative_to(ROOT).as_posix()
        skipped = docstrings(tree)
        if file == FOREIGN:
            continue
        if file.startswith(HELP):
            raised = [part for node in ast.walk(tree) if isinstance(node, ast.Raise) for part in ast.walk(node)]
            skipped |= {id(part) for part in ast.walk(tree)} - {id(part) for part in raised}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                skipped |= {id(part) for part in ast.walk(node) if part is not node}
                text = "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped:
                text = node.value
            else:
                continue
            if id(node) not in skipped and len(text) >= 20 and ASKS.search(text):
                yield text


@pytest.mark.slow
def test_every_remedy_is_carried_out_by_a_test():
    ledger = json.loads((ROOT / "tests" / "remedies.json").read_text())
    pieces = {piece for some in ledger["carried out"].values() for piece in some} | {*ledger["not here"]}
    asking = list(messages())
    assert len(asking) > 200
    assert [
        text for text in asking if text not in ledger["nothing to do"] and not any(piece in text for piece in pieces)
    ] == [], "a message of this kind wants a test that does what it says"
    gone = [text for _, text in texts()] + asking
    assert [piece for piece in pieces if not any(piece in text for text in gone)] == []
    assert {*ledger["nothing to do"]} <= {*asking}
    for name in ledger["carried out"]:
        file, _, function = name.partition("::")
        assert f"def {function}(" in (ROOT / "tests" / file).read_text(), name


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = write_run(tmp_path_factory.mktemp("run"), hidden_size=32, intermediate_size=48)  # sides for FP8
    records = json.loads((folder / "train.json").read_text())
    (folder / "missing.json").write_text(json.dumps([*records, {**records[0], "video": "nowhere"}]))
    (folder / "image.json").write_text(json.dumps([*records, {**records[0], "image": "a.jpg", "video": None}]))
    return folder


# (flags of a mistake, what is said, the same flags as mended by what it says)
TRAINING = [
    ("--master_dtype bfloat16", "add --bf16 True", "--master_dtype bfloat16 --bf16 True"),
    ("--frozen_dtype fp8", "add --bf16 True", "--frozen_dtype fp8 --bf16 True"),
    ("--frozen_dtype int8 --tune_mm_mlp_adapter False", "leave the flag out", "--tune_mm_mlp_adapter False"),
    (
        "--frozen_dtype int8 --tune_mm_mlp_adapter False",
        "--tune_mm_mlp_adapter True",
        "--frozen_dtype int8 --tune_mm_mlp_adapter True",
    ),
    ("--frozen_dtype int8 --parity reference", "leave one of the two out", "--parity reference"),
    ("--reduce_dtype bfloat16 --parity reference", "leave one of the two out", "--reduce_dtype bfloat16"),
    ("--frozen_dtype int8 --shard full", "use --shard auto or none", "--frozen_dtype int8 --shard none"),
    ("--shard_size 2", "for --shard hybrid; add that, or leave it out", "--shard_size 2 --shard hybrid"),
    ("--eval_strategy steps", "needs --eval_data_path", "--eval_strategy steps --eval_data_path {run}/train.json"),
    ("--eval_strategy epoch --evaluation_strategy no", "leave one out", "--evaluation_strategy no"),
    ("--weight_decay 0.1 --parity reference", "set it to 0", "--weight_decay 0 --parity reference"),
    (
        "--freeze_mm_mlp_adapter True --mm_use_vid_start_end False",
        "without --mm_use_vid_start_end",
        "--freeze_mm_mlp_adapter True --mm_use_vid_start_end True",
    ),
    ("--recompute 99", "the model has 2 layers; give at most as many", "--recompute 2"),
    ("--recompute many", "give auto, none, selective, full", "--recompute selective"),
    ("--memory 80", "such as 24GiB or 80GB", "--memory 80GB"),
    ("--report_to figures", "known are tensorboard", "--report_to tensorboard"),
    ("--tokens_per_batch 30", "give at least as many", "--tokens_per_batch 300"),
    ("--num_video_tokens 9", "let videos differ in rows .neither --num_video_tokens", ""),
    ("--data_weights 1 2", "give one each", "--data_weights 1"),
    ("--data_weights 0", "give a larger one", "--data_weights 1"),
    ("--share_video True --parity reference", "leave it out with --parity reference", "--parity reference"),
    ("--data_path {run}/missing.json", "--on_bad_sample skip", "--data_path {run}/missing.json --on_bad_sample skip"),
    ("--data_path {run}/image.json", "--on_bad_sample skip", "--data_path {run}/image.json --on_bad_sample skip"),
    (
        "--video_folder {run}/model/config.json",
        "give the one that feature extraction wrote to",
        "--video_folder {run}/feats",
    ),
    ("--model_name_or_path {run}", "its model is .*/model: give that", "--model_name_or_path {run}/model"),
    ("--fp16 True", "--bf16", "--bf16 True"),
    ("--deepspeed zero3.json", "--shard", "--shard full"),
    ("--bits 4", "--frozen_dtype nf4", "--frozen_dtype nf4"),
    ("--learning_rate -1", "give 0 or more", "--learning_rate 0"),
]


@pytest.mark.slow
@pytest.mark.parametrize("mistake, said, mended", TRAINING)
def test_training_starts_once_a_mistake_was_mended_as_told(run, tmp_path, mistake, said, mended, capsys):
    def attempt(words):
        return train.main(flags(run, tmp_path / "out", "--dry_run", *words.format(run=run).split()))

    with pytest.raises((ValueError, SystemExit)) as refused:
        attempt(mistake)
    assert re.search(said, f"{refused.value} {capsys.readouterr().err}")
    assert attempt(mended) == 0
