"""A training run small enough for a test: model, tokenizer, records and features made from seeds."""

import json
import os
import subprocess
import sys
from unittest import mock

import forks
import numpy as np
import sentencepiece
import torch
from conftest import ROOT
from safetensors import safe_open
from weight_folders import CONFIG, write_folder

from fastvid.config import TrainConfig
from fastvid.features.file import save_features
from fastvid.flags import parse
from fastvid.training.metrics import read_metrics

PIECES, ROWS, CHANNELS, SAMPLES = 300, 8, CONFIG["mm_hidden_size"], 12
WORDS = "what does the cat see near a red house and why is it running so fast today".split()

# A program that holds an output folder, which it is given, until it is killed.
HOLD = """
import sys, time, torch
from fastvid.dist import parallel
from fastvid.training import run_lock
with run_lock.held(sys.argv[1], parallel.World(0, 1, 0, torch.device("cpu"), False)):
    print("held", flush=True)
    time.sleep(100)
"""


def write_run(folder, **sizes):
    """Write model/, feats/ and train.json into `folder`; `sizes` of the model differ from `weight_folders.CONFIG`."""
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, size)) for size in rng.integers(3, 25, 4 * SAMPLES)]
    config = {**CONFIG, "vocab_size": PIECES, "max_position_embeddings": 512, **sizes}
    write_folder(folder / "model", random_state(config), config)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(folder / "model" / "tokenizer"),
        vocab_size=PIECES,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
        num_threads=1,
        hard_vocab_limit=False,
    )
    (folder / "feats").mkdir()
    records = []
    for i in range(SAMPLES):
        question, answer = texts[2 * i], texts[2 * i + 1]
        ask = f"{question}?\n<video>" if i % 2 else f"<video>\n{question}?"
        records.append(
            {
                "id": f"clip{i}",
                "video": f"clip{i}.safetensors",
                "conversations": [{"from": "human", "value": ask}, {"from": "gpt", "value": answer}],
            }
        )
        features = torch.from_numpy(rng.standard_normal((ROWS, CHANNELS)).astype(np.float16))
        save_features(folder / "feats" / f"clip{i}.safetensors", features, {})
    (folder / "train.json").write_text(json.dumps(records))
    return folder


def three_a_video(folder, ending):
    """The records of a folder of `write_run` as three questions for each of four videos, whose names end so; each
    second of the three stands before its video's rows."""
    records = []
    for i, record in enumerate(json.loads((folder / "train.json").read_text())):
        question = record["conversations"][0]["value"].replace("<video>", "").strip()
        asked = f"{question}\n<video>" if i % 3 == 1 else f"<video>\n{question}"
        turns = [{"from": "human", "value": asked}, record["conversations"][1]]
        records.append({**record, "video": f"clip{i // 3}.{ending}", "conversations": turns})
    return records


SECOND_CHANNELS = 6


def write_second(folder):
    """Write feats_2/ into a folder of `write_run`: a second vision tower's features of the same videos; returns it."""
    rng, second = np.random.default_rng(1), folder / "feats_2"
    second.mkdir()
    for i in range(SAMPLES):
        features = torch.from_numpy(rng.standard_normal((3 + i % 2, SECOND_CHANNELS)).astype(np.float16))
        save_features(second / f"clip{i}.safetensors", features, {})
    return second


def random_state(config):
    """{LLaVA's name: fp32 tensor} of the sizes in `config`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    generator = torch.Generator().manual_seed(0)
    sizes = {key: value for key, value in config.items() if key not in ("model_type", "architectures")}
    shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(LlamaConfig(**sizes)).state_dict().items()}
    hidden = config["hidden_size"]
    shapes |= {
        "model.mm_projector.0.weight": (hidden, CHANNELS),
        "model.mm_projector.0.bias": (hidden,),
        "model.mm_projector.2.weight": (hidden, hidden),
        "model.mm_projector.2.bias": (hidden,),
    }
    return {name: torch.randn(shape, generator=generator) * 0.2 + ("norm" in name) for name, shape in shapes.items()}


def overflowing(run):
    """[CHANNELS] features that are finite, while the projector's products of them are not, whatever order they are
    added in: those of one row have the same sign."""
    with safe_open(run / "model" / "model.safetensors", "pt") as file:
        weights_HC = file.get_tensor("model.mm_projector.0.weight")
    sums_H = weights_HC.abs().sum(1)
    assert sums_H.max() > 1.5  # times 3e38: more than fp32 holds
    return 3e38 * weights_HC[sums_H.argmax()].sign()


def flags(run, output, *more):
    """The command line of an adapter run: 3 epochs of 12 samples, 2 a step."""
    return [
        "--model_name_or_path",
        str(run / "model"),
        "--data_path",
        str(run / "train.json"),
        "--video_folder",
        str(run / "feats"),
        "--output_dir",
        str(output),
        "--tune_mm_mlp_adapter",
        "True",
        "--mm_use_vid_start_end",
        "--num_train_epochs",
        "3",
        "--per_device_train_batch_size",
        "2",
        "--learning_rate",
        "1e-2",
        "--warmup_ratio",
        "0.1",
        "--logging_steps",
        "1",
        "--save_steps",
        "4",
        "--model_max_length",
        "512",
        "--report_to",
        "none",
        "--disable_tqdm",
        *more,
    ]


def config_of(run, output, *more):
    return parse(TrainConfig, flags(run, output, *more))


def start(program, arguments, *, ranks=1):
    """Run a Python program (source text or a list such as ["-m", "fastvid.train"]); returns the finished process."""
    command = ["-c", program] if isinstance(program, str) else program
    if ranks > 1:
        assert not isinstance(program, str), "torchrun starts files and modules"
        command = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *command]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    with mock.patch("subprocess.Popen", forks.Popen):
        return subprocess.run(
            [sys.executable, *command, *arguments], capture_output=True, text=True, timeout=240, env=environment
        )


def losses(output):
    """{step: loss} of a run's metrics.jsonl."""
    return {line["step"]: line["loss"] for line in read_metrics(output / "metrics.jsonl") if "loss" in line}
