"""Answers to many prompts at once against one prompt after the other, on a model of random weights.

python bench/generation.py [--at_once 32] [--new_tokens 32] [--json bench/results/generation.json]

Both ways must first give the same tokens. The models have the sizes of the quickstart's and of 110M parameters. The
prompts have one video of 32 or 676 rows in common, or one each; the first is what questions about one video are to a
model that was trained with the video first. "step" is the rate at which running answers go on, without the prompts. Of
a CPU the seconds are those that the process computed, whoever else was served.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import torch
from harness import write_results
from train_presets import Shape

from fastvid.batch import VideoTokens
from fastvid.config.policy import Trainable
from fastvid.data.conversation import EncodedSample
from fastvid.data.packing import pack
from fastvid.inference.batching import Batcher
from fastvid.inference.generate import generate
from fastvid.inference.requests import Request
from fastvid.model.attention_check import settle_attention
from fastvid.model.config import DecoderConfig, ModelConfig, Precision
from fastvid.model.video_llava import VideoLlava

MODELS = {
    "quickstart": Shape(128, 2, 4, 512, 483, 32, 64),
    "110m": Shape(768, 12, 12, 2048),
    "tiny": Shape(64, 2, 2, 128, 640, 24, 16),
}
WORDS = 24  # of a question
_TOLD = ("at_once", "alone", "new_tokens", "dtype", "device")  # arguments


def build(shape, dtype, device):
    """The model, with seeded random weights, and the attention that `Chat` would have there."""
    config = DecoderConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_layers=shape.layers,
        num_heads=shape.heads,
        num_kv_heads=shape.heads,
        head_dim=shape.hidden // shape.heads,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )
    heads = config.num_heads, config.num_kv_heads, config.head_dim
    model = VideoLlava(
        ModelConfig(config, shape.channels, "mlp2x_gelu", None, 0.02),
        trainable=Trainable(),
        precision=Precision(dtype),
        attention=settle_attention("auto", torch.device(device), dtype, *heads, gradients=False),
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            scale = 1 if "embed" in name else weight.shape[-1] ** -0.5
            values = torch.randn(weight.shape, generator=generator) * scale
            weight.copy_(torch.ones_like(weight) if "norm" in name else values)
    return model.to(device)


def requests(shape, count, new_tokens, shared):
    """Prompts of one video and `WORDS` words, the video first."""
    generator = torch.Generator().manual_seed(1)
    top = shape.vocabulary - 3
    videos = [torch.randn(shape.video_rows, shape.channels, generator=generator) for _ in range(1 if shared else count)]
    opening = torch.randint(3, top, (40,), generator=generator).tolist()
    placeholder = [top + 1, *[top] * shape.video_rows, top + 2]
    return [
        Request(
            i,
            [*opening, *placeholder, *torch.randint(3, top, (WORDS,), generator=generator).tolist()],
            videos[i % len(videos)],
            i % len(videos),
            new_tokens,
        )
        for i in range(count)
    ]


def one_by_one(model, asked, tokens):
    """The answers, and how many seconds they take."""
    clock, answers = _clock(model), []
    begin = clock()
    for each in asked:
        batch = pack([(EncodedSample("", each.token_ids), each.videos)], tokens, model.config.channels)
        batch = batch.to(model.embed.weight.device)
        answers.append(generate(model, batch, max_new_tokens=each.max_new_tokens, stops=()))
    return answers, clock() - begin


def at_once(model, asked, tokens):
    """The same, all together."""
    clock, batch = _clock(model), Batcher(model, tokens, stops=(), at_once=len(asked), cache_bytes=8 << 30)
    begin = clock()
    answers = dict(batch.run(asked))
    return [answers[each.key] for each in asked], clock() - begin


def _clock(model):
    """Seconds. (Both ways end in a copy to the host, so that a GPU is waited for.)"""
    return time.process_time if model.embed.weight.device.type == "cpu" else time.perf_counter


def row(model, shape, tokens, arguments, shared):
    """One comparison; correctness first."""
    count, new_tokens = arguments.at_once, arguments.new_tokens
    asked = requests(shape, count, new_tokens, shared)
    firsts = [replace(each, max_new_tokens=1) for each in asked]
    few = slice(arguments.alone)
    (expected, alone), (_, alone_prompts) = (one_by_one(model, each[few], tokens) for each in (asked, firsts))
    (answers, together), (_, prompts) = (at_once(model, each, tokens) for each in (asked, firsts))
    same = sum(answer == each for answer, each in zip(answers, expected))
    if arguments.dtype == "fp32":
        assert same == len(expected), f"only {same} of {len(expected)} answers are the same"
    figures = {
        "videos": "one" if shared else "one each",
        "same_answers": f"{same} of {len(expected)}",
        "tokens_per_s_alone": len(expected) * new_tokens / alone,
        "tokens_per_s": count * new_tokens / together,
        "step_tokens_per_s_alone": len(expected) * (new_tokens - 1) / (alone - alone_prompts),
        "step_tokens_per_s": count * (new_tokens - 1) / (together - prompts),
    }
    return figures | {
        "ratio": figures["tokens_per_s"] / figures["tokens_per_s_alone"],
        "step_ratio": figures["step_tokens_per_s"] / figures["step_tokens_per_s_alone"],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", nargs="+", choices=MODELS, default=["quickstart", "110m"])
    parser.add_argument("--at_once", type=int, default=32)
    parser.add_argument("--new_tokens", type=int, default=32)
    parser.add_argument("--alone", type=int, default=4, help="so many of the prompts are asked one by one")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--videos", choices=("one", "each", "both"), default="both")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    dtype, rows = {"fp32": torch.float32, "bf16": torch.bfloat16}[arguments.dtype], []
    for name in arguments.model:
        shape = MODELS[name]
        tokens = VideoTokens(shape.vocabulary - 3, shape.vocabulary - 2, shape.vocabulary - 1, shape.vocabulary)
        model = build(shape, dtype, arguments.device)
        settings = {"model": name, **{key: getattr(arguments, key) for key in _TOLD}}
        for shared in {"one": (True,), "each": (False,), "both": (True, False)}[arguments.videos]:
            found = row(model, shape, tokens, arguments, shared)
            rows.append(settings | found)
            print(
                f"{name:>10}, videos {found['videos']:>8}: {found['tokens_per_s']:7.1f} tokens/s, alone "
                f"{found['tokens_per_s_alone']:6.1f}: {found['ratio']:.1f} times; steps "
                f"{found['step_tokens_per_s']:7.1f} and {found['step_tokens_per_s_alone']:6.1f}: "
                f"{found['step_ratio']:.1f} times"
            )
    if arguments.json:
        write_results(arguments.json, rows)


if __name__ == "__main__":
    main()
