"""Build the small models that stand in for CLIP and for an untrained LLaVA, in the formats that the real ones come in.

    python build_models.py OUT [--family llama|llama3|qwen3]

writes

- ``OUT/tower_a``, ``OUT/tower_b``: CLIP vision towers of equal shape and different random weights (``CLIPVisionModel``
  folders). Nothing trains them: random features keep enough of a picture to learn from.
- ``OUT/llava_base``: a random language model with a projector in front, as a LLaVA-1.5 folder: ``config.json``,
  ``model.safetensors`` (transformers' names, and ``model.mm_projector.*``) and a tokenizer trained on
  ``OUT/videoinstruct.json``: sentencepiece's for LLaMA 2's kind, tokenizer.json with a chat template for the others.
"""

import argparse
import json
from pathlib import Path

import sentencepiece
import torch
from draw_clips import PATCH, SIZE
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, CLIPVisionConfig, CLIPVisionModel
from transformers.utils import logging

PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. USER: {q} ASSISTANT: {a}"
)
PIECES = 480  # 3 control pieces, 256 bytes for whatever the others do not cover, the rest learned from the text
HIDDEN = 128
TOWER_HIDDEN = 64
SPLIT = r" ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+"
LLAMA3_PROMPT = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
QWEN_PROMPT = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Of each family: its special tokens (the one that begins a text or none, the one that ends a turn, others), its form of
# prompts, and what config.json says beside sizes. Both have fewer keys than queries.
FAMILIES = {
    "llama": None,  # LLaMA 2's kind: sentencepiece and LLaVA's prompts
    "llama3": (
        ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
        LLAMA3_PROMPT,
        {
            "model_type": "llama",
            "num_key_value_heads": 2,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 1024,
            },
        },
    ),
    "qwen3": (
        (None, "<|im_end|>", "<|im_start|>", "<|endoftext|>"),
        QWEN_PROMPT,
        {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": True},
    ),
}


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


def build_chat_tokenizer(folder, texts, family):
    """A byte-level tokenizer.json as Llama 3 and Qwen have it, and the family's chat template."""
    (begins, ends, *others), template, _ = FAMILIES[family]
    special = [token for token in (begins, ends, *others) if token is not None]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    size = PIECES - len(special)
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": begins,
        "eos_token": ends,
        "chat_template": template,
        "model_max_length": 2048,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))


def build_llava(folder, tower, seed, *, hidden=HIDDEN, layers=2, heads=4, intermediate=4 * HIDDEN, family="llama"):
    torch.manual_seed(seed)
    values = {
        "model_type": "llama",
        "vocab_size": PIECES,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 2048,
        "initializer_range": 0.02,
    }
    if FAMILIES[family] is not None:  # tokens are known by the tokenizer's files
        values |= FAMILIES[family][2] | dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values))
    config = model.config
    config.architectures = [type(model).__name__]
    config.mm_vision_tower, config.mm_hidden_size, config.mm_projector_type = str(tower), TOWER_HIDDEN, "mlp2x_gelu"
    config.save_pretrained(folder)
    state = model.state_dict()
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
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
    parser.add_argument("--family", choices=FAMILIES, default="llama", help="of the language model")
    arguments = parser.parse_args(argv)
    logging.disable_progress_bar()
    out = arguments.out.resolve()
    texts = [PROMPT.format(**record) for record in json.loads((out / "videoinstruct.json").read_text())]

    build_tower(out / "tower_a", seed=2 * arguments.seed)
    build_tower(out / "tower_b", seed=2 * arguments.seed + 1)
    (out / "llava_base").mkdir(exist_ok=True)
    if FAMILIES[arguments.family] is None:
        build_tokenizer(out / "llava_base", texts)
    else:
        build_chat_tokenizer(out / "llava_base", texts, arguments.family)
    build_llava(out / "llava_base", out / "tower_a", arguments.seed, family=arguments.family)
    print(f"two towers and a language model in {out}")


if __name__ == "__main__":
    main()
