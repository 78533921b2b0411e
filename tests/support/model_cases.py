"""Small models and batches for the tests of fastvid.model."""

from dataclasses import replace

import torch

from fastvid.batch import AttentionLayout, PackedBatch
from fastvid.config.policy import Lora, Trainable
from fastvid.model.config import DecoderConfig, ModelConfig, Precision
from fastvid.model.video_llava import VideoLlava

ADAPTER = Trainable(projector=True, boundary=True)
FULL = Trainable(projector=True, embed=True, head=True, decoder=True)
LORA = Trainable(projector=True, boundary=True, lora=Lora(4, 8.0, 0.1))
PATCH, START, END = 97, 98, 99


def decoder_config(**changes):
    settings = {
        "vocab_size": 100,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 4,
        "head_dim": 8,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
    }
    return DecoderConfig(**{**settings, **changes})


def model_config(projector_type="mlp2x_gelu", mm_hidden_size=12, **changes):
    return ModelConfig(decoder_config(**changes), mm_hidden_size, projector_type, None, 0.02)


# Of LLaVA-1.5-7B, for `model_config`.
SEVEN_BILLION = {
    "mm_hidden_size": 1024,
    "vocab_size": 32003,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_layers": 32,
    "num_heads": 32,
    "num_kv_heads": 32,
    "head_dim": 128,
}
# What `random_model` is given for the models whose layers differ in what they keep and recompute.
KINDS = {
    "mha": {},
    "gqa": {"config": model_config(num_kv_heads=2)},
    "selective": {"recompute": "selective"},
    "full": {"recompute": "full"},
    "head": {"trainable": replace(ADAPTER, head=True)},
    "one layer": {"config": model_config(num_layers=1)},
}


# What each family has besides LLaMA's, with its model_type; small enough for the model of `model_config`.
FAMILIES = {
    "mistral": {"num_kv_heads": 2, "sliding_window": 256},
    "qwen2": {"num_kv_heads": 2, "qkv_bias": True},
    "qwen3": {"num_kv_heads": 2, "qk_norm": True, "head_dim": 16, "tie_word_embeddings": True},
    "smollm3": {"num_kv_heads": 2, "num_layers": 3, "unrotated_layers": (1,), "tie_word_embeddings": True},
}


def family_config(model_type, **changes):
    """ModelConfig of a small model of a family."""
    return replace(model_config(**{**FAMILIES[model_type], **changes}), model_type=model_type)


def fill(module, seed=0):
    """Seeded weights of a size at which every part of the model matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            values = torch.randn(parameter.shape, generator=generator) * (0.1 if "norm" in name else 0.25)
            parameter.copy_(values + 1 if "norm" in name else values)
    return module


def random_model(
    config=None,
    trainable=ADAPTER,
    compute_dtype=torch.float32,
    seed=0,
    trained_dtype=torch.float32,
    frozen_dtype=None,
    fp32_residual=False,
    **options,
):
    precision = Precision(compute_dtype, trained_dtype, frozen_dtype, fp32_residual)
    return fill(VideoLlava(config or model_config(), trainable=trainable, precision=precision, **options), seed)


def random_sample(generator, text=(9, 7), video=6, answer=3):
    """Token ids with one video between start and end tokens (none if `video` is 0), and the supervised rows."""

    def words(n):
        return torch.randint(3, PATCH, (n,), generator=generator).tolist()

    ids = words(text[0]) + ([START] + [PATCH] * video + [END] if video else []) + words(text[1] + answer)
    return ids, range(len(ids) - answer - 1, len(ids) - 1)


def pack(samples, channels=12, generator=None):
    """PackedBatch of [(token ids, supervised rows)] with random features for every placeholder."""
    ids = [token for sample, _ in samples for token in sample]
    token_ids = torch.tensor(ids, dtype=torch.int64)
    lengths = [len(sample) for sample, _ in samples]
    offsets = [sum(lengths[:i]) for i in range(len(samples))]
    positions = [i for length in lengths for i in range(length)]
    rows = torch.tensor(
        [offset + row for offset, (_, supervised) in zip(offsets, samples) for row in supervised], dtype=torch.int64
    )
    video_rows = (token_ids == PATCH).nonzero()[:, 0]
    starts, ends = ((token_ids == token).nonzero()[:, 0] for token in (START, END))
    features = torch.randn(len(video_rows), channels, generator=generator)
    return PackedBatch(
        token_ids=token_ids,
        positions=torch.tensor(positions, dtype=torch.int32),
        layout=AttentionLayout.of_lengths(lengths),
        video_rows=video_rows,
        features=features,
        boundary_rows=torch.stack([starts, ends], 1).flatten(),
        loss_rows=rows,
        targets=token_ids[rows + 1],
        sample_ids=[f"sample{i}" for i in range(len(samples))],
    )


def random_batch(seed=0, shapes=({}, {"text": (4, 12), "answer": 5}, {"text": (3, 2), "answer": 1})):
    generator = torch.Generator().manual_seed(seed)
    return pack([random_sample(generator, **shape) for shape in shapes], generator=generator)


def pack_frozen(samples, prefix, features):
    """PackedBatch of the same, but that the `prefix` first tokens are the model's, and frozen rows lie first."""
    pieces = []  # of the frozen rows, then of the live ones: (tokens, first position, supervised, keys before its own)
    for ids, supervised in samples:
        video = next((i for i, token in enumerate(ids) if token in (START, PATCH)), len(ids))
        pieces.append(
            [
                (ids[a:b], a, [row - a for row in supervised if a <= row < b])
                for a, b in ((prefix, video), (video, len(ids)))
                if a < b
            ]
        )
    frozen = [(i, piece) for i, sample in enumerate(pieces) for piece in sample[:1] if START not in piece[0][:1]]
    live = [(i, sample[-1]) for i, sample in enumerate(pieces) if START in sample[-1][0][:1]]
    keys, ends, kv_rows, k_lengths, rows, positions, token_ids, targets = {}, prefix, [], [], [], [], [], []
    for i, (ids, first, supervised) in frozen + live:
        own = range(ends, ends := ends + len(ids))
        keys[i] = [*keys.get(i, range(prefix)), *own]
        kv_rows += keys[i]
        k_lengths.append(len(keys[i]))
        rows += [own[row] - prefix for row in supervised]
        targets += [samples[i][0][first + row + 1] for row in supervised]
        token_ids += ids
        positions += range(first, first + len(ids))
    queries, of_keys = (
        AttentionLayout.of_lengths(lengths) for lengths in ([len(piece[0]) for _, piece in frozen + live], k_lengths)
    )
    token_ids = torch.tensor(token_ids)
    starts, stops = ((token_ids == token).nonzero()[:, 0] for token in (START, END))
    return PackedBatch(
        token_ids=token_ids,
        positions=torch.tensor(positions, dtype=torch.int32),
        layout=replace(
            queries, cu_seqlens_k=of_keys.cu_seqlens_q, max_seqlen_k=of_keys.max_seqlen_q, kv_rows=torch.tensor(kv_rows)
        ),
        video_rows=(token_ids == PATCH).nonzero()[:, 0],
        features=features,
        boundary_rows=torch.stack([starts, stops], 1).flatten(),
        loss_rows=torch.tensor(rows),
        targets=torch.tensor(targets),
        prefix_rows=prefix,
        frozen_rows=sum(len(piece[0]) for _, piece in frozen),
    )


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def loss_and_gradients(model, *batches):
    """Summed loss and gradients; gradients are cleared first."""
    model.zero_grad()
    losses = [model(batch) for batch in batches]
    torch.stack(losses).sum().backward()
    return sum(loss.item() for loss in losses), gradients(model)


def assert_close(found, expected, tolerance=1e-5):
    """Largest difference at most `tolerance` of the largest expected value."""
    error = (found.double() - expected.double()).abs().max().item() if expected.numel() else 0.0
    assert found.shape == expected.shape
    assert error <= tolerance * max(expected.abs().max().item(), 1e-30), f"{error} of {expected.abs().max()}"


def assert_same_gradients(found, expected, tolerance=1e-5):
    assert found.keys() == expected.keys()
    for name in expected:
        try:
            assert_close(found[name], expected[name], tolerance)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


def llama_of(model):
    """transformers' model of the same family with the same weights, in fp32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    c = model.config.decoder
    own = {"no_rope_layers": [int(i not in c.unrotated_layers) for i in range(c.num_layers)]}
    llama = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            model.config.model_type,
            vocab_size=c.vocab_size,
            hidden_size=c.hidden_size,
            intermediate_size=c.intermediate_size,
            num_hidden_layers=c.num_layers,
            num_attention_heads=c.num_heads,
            num_key_value_heads=c.num_kv_heads,
            head_dim=c.head_dim,
            rms_norm_eps=c.rms_norm_eps,
            max_position_embeddings=c.max_position_embeddings,
            rope_parameters=dict(c.rope_parameters),
            tie_word_embeddings=c.tie_word_embeddings,
            attn_implementation="eager",
            **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
            **(own if c.unrotated_layers else {}),
        )
    )
    llama.load_state_dict(to_llama(model, dict(model.named_parameters())), strict=True)
    return llama


def to_llama(model, tensors):
    """Tensors by our names (weights or gradients) → by transformers' names."""
    c = model.config.decoder
    heads = [c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, c.num_kv_heads * c.head_dim]
    renamed = {
        "model.embed_tokens.weight": tensors["embed.weight"],
        "model.norm.weight": tensors["decoder.norm.weight"],
        "lm_head.weight": tensors["embed.weight" if c.tie_word_embeddings else "head.weight"],
    }
    for i in range(c.num_layers):
        ours, theirs = f"decoder.layers.{i}.", f"model.layers.{i}."
        for name, part in zip("qkv", tensors[ours + "qkv.weight"].split(heads)):
            renamed[f"{theirs}self_attn.{name}_proj.weight"] = part
        if c.qkv_bias:
            for name, part in zip("qkv", tensors[ours + "qkv.bias"].split(heads)):
                renamed[f"{theirs}self_attn.{name}_proj.bias"] = part
        if c.qk_norm:
            for name in ("q_norm", "k_norm"):
                renamed[f"{theirs}self_attn.{name}.weight"] = tensors[f"{ours}{name}.weight"]
        for name, part in zip(("gate", "up"), tensors[ours + "gate_up.weight"].chunk(2)):
            renamed[f"{theirs}mlp.{name}_proj.weight"] = part
        renamed[theirs + "self_attn.o_proj.weight"] = tensors[ours + "o.weight"]
        renamed[theirs + "mlp.down_proj.weight"] = tensors[ours + "down.weight"]
        renamed[theirs + "input_layernorm.weight"] = tensors[ours + "input_norm.weight"]
        renamed[theirs + "post_attention_layernorm.weight"] = tensors[ours + "post_norm.weight"]
    return {name: tensor.detach() for name, tensor in renamed.items()}


PREFIX = [5, 6, 7, 8]  # of all that follow: a run's constant prompt
FEW = {"text": (5, 1), "video": 2}, {"text": (4, 1), "video": 1, "answer": 2}  # an interpreter is slow


def with_prefix(text_only=True, seed=0, shapes=({}, {"text": (4, 12), "answer": 5}, {"text": (9, 2), "answer": 1})):
    """Samples that begin alike: questions before the video, none, and text only; packed plainly and in parts."""
    generator = torch.Generator().manual_seed(seed)
    samples = [random_sample(generator, **shape) for shape in shapes]
    if text_only:
        samples.insert(1, random_sample(generator, text=(6, 5), video=0, answer=4))
    for ids, _ in samples:
        ids[: len(PREFIX)] = PREFIX
    plain = pack(samples, generator=generator)
    return plain, pack_frozen(samples, len(PREFIX), plain.features)


def prepared(model):
    model.keep_prefix(PREFIX)
    return model


def assert_packed_equals_apart(model, change=lambda batch: batch):
    """Three samples in one batch, which `change` may change, have the loss and gradients of the three alone."""
    generator = torch.Generator().manual_seed(1)
    samples = [random_sample(generator, text=(n, n + 1), video=6) for n in (3, 11, 6)]
    together = change(pack(samples, generator=generator))
    apart = [
        replace(pack([sample]), features=features)
        for sample, features in zip(samples, together.features.split(6), strict=True)
    ]
    loss, found = loss_and_gradients(model, together)
    total, expected = loss_and_gradients(model, *apart)
    assert abs(loss - total) <= 1e-6 * abs(total)
    assert_same_gradients(found, expected)
