"""Small models that answer questions about videos: a language model, a tokenizer and a tower from seeds."""

import json

import torch

from fastvid.data.tokenizer import load_tokenizer

HIDDEN, CHANNELS = 32, 16


def model_maker(root):
    """What writes a small model's folder below `root`: LLaVA's names, a tokenizer with or without the video tokens, a
    CLIP tower."""
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers
    from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=CHANNELS,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
        )
    ).save_pretrained(root / "tower")
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(content=" ", left=1)])
    bpe.train_from_iterator(
        ["You are a large assistant. USER: what who is? ASSISTANT: plays cards"],
        trainers.BpeTrainer(vocab_size=60, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False),
    )

    def make(name, *, tokens=True, projector=True, channels=CHANNELS, **settings):
        folder = root / name
        folder.mkdir()
        bpe.save(str(folder / "tokenizer.json"))
        if tokens:
            load_tokenizer(folder, True).save(folder)
        rows = load_tokenizer(folder, None).tokens.vocab_size - (not tokens)
        config = LlamaConfig(
            vocab_size=rows,
            hidden_size=HIDDEN,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=800,
            initializer_range=0.3,
            eos_token_id=2,
            bos_token_id=1,
        )
        torch.manual_seed(1)
        state = dict(LlamaForCausalLM(config).state_dict())
        if projector:
            state |= projector_state(channels)
        save_file({key: value.contiguous() for key, value in state.items()}, folder / "model.safetensors")
        values = config.to_dict() | {
            "mm_vision_tower": str(root / "tower"),
            "mm_hidden_size": channels,
            "mm_projector_type": "linear",
            **settings,
        }
        (folder / "config.json").write_text(json.dumps(values))
        return folder

    return make


def projector_state(channels=CHANNELS, scale=1.0):
    generator = torch.Generator().manual_seed(5)
    return {
        "model.mm_projector.weight": scale * torch.randn(HIDDEN, channels, generator=generator),
        "model.mm_projector.bias": scale * torch.randn(HIDDEN, generator=generator),
    }
