"""Small tokenizers of each family's kind, with its special tokens and its form of prompts; and models beside them."""

import json

import torch
from safetensors.torch import load_file, save_file

CHANNELS = 10
CORPUS = [
    "You are a helpful assistant. What does the cat see near a red house? Why is it running so fast today?",
    "system user assistant\n\nIt plays cards; two people sing – très bien. 123 456\n",
] * 3
_CHATML_TURN = "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
_CHATML_ASKS = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
CHATML = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}{% endif %}"
    "{% for message in messages %}" + _CHATML_TURN + "{% endfor %}" + _CHATML_ASKS
)
# The last answer has an empty block of thoughts before it, as a prompt has that asks for none.
THINKS = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}"
    "{% if loop.last and message.role == 'assistant' %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{{ message.content.lstrip('\\n') + '<|im_end|>\\n' }}{% endfor %}"
    + _CHATML_ASKS.replace(
        "{% endif %}",
        "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
        "{% endif %}",
    )
)
MARKED = (
    "{{ '<|im_start|>system\\nToday is ' + strftime_now('%d %b %Y') + '.<|im_end|>\\n' }}"
    "{% for message in messages %}{% if message.role == 'assistant' %}{{ '<|im_start|>assistant\\n' }}"
    "{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}{% else %}"
    + _CHATML_TURN
    + "{% endif %}{% endfor %}"
    + _CHATML_ASKS
)
HEADERS = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
INST = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}"
    "{{ '[INST] ' + message.content + ' [/INST]' }}{% elif message.role == 'assistant' %}"
    "{{ ' ' + message.content + eos_token }}{% else %}{{ raise_exception('no such role') }}{% endif %}{% endfor %}"
)
_IM = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_LLAMA3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_LLAMA3_SPLIT = r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN_SPLIT = _LLAMA3_SPLIT.replace("{1,3}", "")
_SIZES = {
    "hidden_size": 24,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
}
# model_type, special tokens, (bos, eos), how text is split, the template, and what config.json says besides sizes.
KINDS = {
    "llama3": ("llama", _LLAMA3, (_LLAMA3[0], _LLAMA3[4]), _LLAMA3_SPLIT, HEADERS, {}),
    "mistral": ("mistral", ("<unk>", "<s>", "</s>", "[INST]", "[/INST]"), ("<s>", "</s>"), None, INST, {}),
    "qwen2": ("qwen2", _IM, (None, _IM[2]), _QWEN_SPLIT, CHATML, {}),
    "qwen2 base": ("qwen2", _IM, (None, _IM[0]), _QWEN_SPLIT, CHATML, {}),
    "qwen3": ("qwen3", (*_IM, "<think>", "</think>"), (None, _IM[2]), _QWEN_SPLIT, THINKS, {}),
    "smollm2": ("llama", _IM, (_IM[1], _IM[2]), " ?\\w+|\\s+|[^\\w\\s]+", CHATML, {"tie_word_embeddings": True}),
    "smollm3": ("smollm3", (*_LLAMA3, *_IM), (None, _IM[2]), _LLAMA3_SPLIT, MARKED, {"no_rope_layers": [1, 0]}),
}


def write_tokenizer(folder, kind, *, jinja_file=False):
    """tokenizer.json, tokenizer_config.json and config.json of a kind."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )

    model_type, special, (bos, eos), split, template, more = KINDS[kind]
    folder.mkdir(parents=True, exist_ok=True)
    if split is None:  # sentencepiece's kind, as tokenizer.json
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        first = [*special[:3], *(f"<0x{i:02X}>" for i in range(256))]
        trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=first, show_progress=False)
        tokenizer.train_from_iterator([line.replace(" ", "▁") for line in CORPUS], trainer)
        table = json.loads(tokenizer.to_str())
        table["added_tokens"] = table["added_tokens"][:3]
        tokenizer = Tokenizer.from_str(json.dumps(table))
        tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special[3:]])
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(split), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=340, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        )
        tokenizer.train_from_iterator(CORPUS, trainer)
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=kind != "smollm3")
        tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos}
    config |= {} if jinja_file else {"chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if jinja_file:
        (folder / "chat_template.jinja").write_text(template)
    rows = tokenizer.get_vocab_size() + 8  # of padding, as Qwen's tables have it
    values = {"model_type": model_type, "vocab_size": rows, **_SIZES, **more}
    (folder / "config.json").write_text(json.dumps({"sliding_window": None} | values))
    return folder


def write_model(folder, kind):
    """A whole model folder of a kind: `write_tokenizer`, and random weights with a projector."""
    from transformers import AutoConfig, AutoModelForCausalLM

    write_tokenizer(folder, kind)
    values = json.loads((folder / "config.json").read_text())
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values | dict.fromkeys(names)))
    model.save_pretrained(folder)
    path, hidden = folder / "model.safetensors", values["hidden_size"]
    state = {name: torch.randn(tensor.shape) * 0.2 + ("norm" in name) for name, tensor in load_file(path).items()}
    for name, shape in (
        ("0.weight", (hidden, CHANNELS)),
        ("0.bias", (hidden,)),
        ("2.weight", (hidden, hidden)),
        ("2.bias", (hidden,)),
    ):
        state[f"model.mm_projector.{name}"] = torch.randn(shape)
    save_file(state, path, metadata={"format": "pt"})
    told = {"mm_hidden_size": CHANNELS, "mm_projector_type": "mlp2x_gelu"}
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | told))
    return folder
