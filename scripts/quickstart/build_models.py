"""Build the small models that stand in for CLIP and for an untrained LLaVA, in the formats that the real ones come in.

    python build_models.py OUT

writes

- ``OUT/tower_a``, ``OUT/tower_b``: CLIP vision towers of equal shape and different random weights (``CLIPVisionModel``
  folders). Nothing trains them: random features keep enough of a picture to learn from.
- ``OUT/llava_base``: a random LLaMA with a projector in front, as a LLaVA-1.5 folder: ``config.json``,
  ``model.safetensors`` (``LlamaForCausalLM``'s names, and ``model.mm_projector.*``) and a sentencepiece tokenizer
  trained on ``OUT/videoinstruct.json``.
"""

import argparse
import json
from pathlib import Path

import sentencepiece
import torch
from draw_clips import PATCH, SIZE
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. USER: {q} ASSISTANT: {a}"
)
PIECES = 480  # 3 control pieces, 256 bytes for whatever the others do not cover, the rest learned from the text
HIDDEN = 128
TOWER_HIDDEN = 64


def build_tower(folder, seed):
    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        image_size=SIZE,
        patch_size=PATCH,
        hidden_size=TOWER_HIDDEN,
        intermediate_size=4 * TOWER_HIDDEN,
        num_hidden_layers=4,
        num_attention_heads=4,
    )
    CLIPVisionModel(config).save_pretrained(folder)


def build_tokenizer(folder, texts):
    """A byte-pair tokenizer with the control pieces where LLaMA has them: <unk> 0, <s> 1, </s> 2."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=PIECES,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
        num_threads=1,
    )
    (folder / "tokenizer.vocab").unlink()  # a readable list of the pieces; nothing loads it
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "model_max_length": 2048,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))


def build_llava(folder, tower, seed, *, hidden=HIDDEN, layers=2, heads=4, intermediate=4 * HIDDEN):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=PIECES,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=2048,
        initializer_range=0.02,
        architectures=["LlamaForCausalLM"],
    )
    config.mm_vision_tower, config.mm_hidden_size, config.mm_projector_type = str(tower), TOWER_HIDDEN, "mlp2x_gelu"
    config.save_pretrained(folder)
    state = LlamaForCausalLM(config).state_dict()
    for index, inputs in ((0, TOWER_HIDDEN), (2, hidden)):  # Linear, GELU, Linear
        layer = torch.nn.Linear(inputs, hidden)
        state |= {f"model.mm_projector.{index}.{name}": tensor for name, tensor in layer.state_dict().items()}
    save_file(
        {name: tensor.detach().contiguous() for name, tensor in state.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    logging.disable_progress_bar()
    out = arguments.out.resolve()
    texts = [PROMPT.format(**record) for record in json.loads((out / "videoinstruct.json").read_text())]

    build_tower(out / "tower_a", seed=2 * arguments.seed)
    build_tower(out / "tower_b", seed=2 * arguments.seed + 1)
    (out / "llava_base").mkdir(exist_ok=True)
    build_tokenizer(out / "llava_base", texts)
    build_llava(out / "llava_base", out / "tower_a", arguments.seed)
    print(f"two towers and a language model in {out}")


if __name__ == "__main__":
    main()
