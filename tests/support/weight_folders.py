"""Tiny model folders in every form that users hold, made of the same tensors."""

import json
import os

import torch
from safetensors.torch import save_file

from fastvid.batch import VideoTokens
from fastvid.config.policy import Trainable
from fastvid.model.config import Precision
from fastvid.model.video_llava import VideoLlava
from fastvid.weights.loading import load_weights
from fastvid.weights.model_config import read_model_config

V, D, C = 40, 24, 10  # vocabulary rows, hidden size, channels of the features
ADAPTER = Trainable(projector=True, boundary=True)
TOKENS = VideoTokens(patch=V, start=V + 1, end=V + 2, vocab_size=V + 3, added=(V, V + 1, V + 2))
LLAMA = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
}
CONFIG = {
    "model_type": "llava",
    "architectures": ["LlavaLlamaForCausalLM"],
    "hidden_act": "silu",
    **LLAMA,
    "mm_hidden_size": C,
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_tower": "some/tower",
}


def llava_state(kind="mlp2x_gelu", dtype=torch.float32, tied=False):
    """{LLaVA's name: tensor} with distinct random values."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=tied))
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if kind == "linear":
        shapes |= {"model.mm_projector.weight": (D, C), "model.mm_projector.bias": (D,)}
    if kind == "mlp2x_gelu":
        shapes |= {
            "model.mm_projector.0.weight": (D, C),
            "model.mm_projector.0.bias": (D,),
            "model.mm_projector.2.weight": (D, D),
            "model.mm_projector.2.bias": (D,),
        }
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items() if not (tied and "lm_head" in name)}


def our_state(state):
    """{our name: tensor} of the same model, before rows are added; written out by hand."""
    ours = {
        "embed.weight": state["model.embed_tokens.weight"],
        "decoder.norm.weight": state["model.norm.weight"],
        "head.weight": state["lm_head.weight"],
    }
    for name, tensor in state.items():
        if "mm_projector" in name:
            tail = name.removeprefix("model.mm_projector.")
            ours[f"projector.{tail if tail[0].isdigit() else '0.' + tail}"] = tensor
    for i in range(LLAMA["num_hidden_layers"]):
        their, our = f"model.layers.{i}.", f"decoder.layers.{i}."
        ours[our + "input_norm.weight"] = state[their + "input_layernorm.weight"]
        ours[our + "post_norm.weight"] = state[their + "post_attention_layernorm.weight"]
        ours[our + "qkv.weight"] = torch.cat([state[f"{their}self_attn.{n}_proj.weight"] for n in "qkv"])
        ours[our + "o.weight"] = state[their + "self_attn.o_proj.weight"]
        ours[our + "gate_up.weight"] = torch.cat([state[f"{their}mlp.{n}_proj.weight"] for n in ("gate", "up")])
        ours[our + "down.weight"] = state[their + "mlp.down_proj.weight"]
    return ours


def write_folder(folder, state, config=CONFIG, ending="safetensors", files=1):
    """A model folder; `files` > 1 shards it. The keys of fused tensors end up in different files."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    stem = "model" if ending == "safetensors" else "pytorch_model"
    places = {}
    for i in range(files):
        name = f"{stem}.{ending}" if files == 1 else f"{stem}-{i + 1:05d}-of-{files:05d}.{ending}"
        part = {key: state[key].contiguous() for key in list(state)[i::files]}
        save_file(part, folder / name) if ending == "safetensors" else torch.save(part, folder / name)
        places |= dict.fromkeys(part, name)
    if files > 1:
        (folder / f"{stem}.{ending}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def old_hf_names(state):
    """llava-hf's keys as transformers 4 wrote them, with a tower's beside them."""
    renamed = {}
    for name, tensor in state.items():
        if "mm_projector" in name:
            name = name.replace("model.mm_projector.0", "multi_modal_projector.linear_1")
            renamed[name.replace("model.mm_projector.2", "multi_modal_projector.linear_2")] = tensor
        else:
            renamed["language_model." + name] = tensor
    return {**renamed, "vision_tower.vision_model.post_layernorm.weight": torch.ones(3)}


def new_hf_names(state):
    """llava-hf's keys as transformers 5 holds them in memory."""
    renamed = {}
    for name, tensor in state.items():
        if "mm_projector" in name:
            name = name.replace("mm_projector.0", "multi_modal_projector.linear_1")
            renamed[name.replace("mm_projector.2", "multi_modal_projector.linear_2")] = tensor
        else:
            renamed[name.replace("model.", "model.language_model.") if name.startswith("model.") else name] = tensor
    return {**renamed, "model.vision_tower.post_layernorm.weight": torch.ones(3)}


HF_CONFIG = {
    "model_type": "llava",
    "architectures": ["LlavaForConditionalGeneration"],
    "text_config": LLAMA,
    "vision_config": {"hidden_size": C, "model_type": "clip_vision_model"},
}


class RunsCode:
    """Pickles to a call that leaves a trace."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def load(folder, *, tokens=TOKENS, trainable=ADAPTER, dtype=torch.float32, projector=None, seed=42, **options):
    """The model that `folder` gives, made without memory first, poisoned, then filled."""
    config = read_model_config(folder, vocab_size=tokens.vocab_size, projector=projector, **options)
    with torch.device("meta"):
        model = VideoLlava(config, trainable=trainable, precision=Precision(dtype))
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    load_weights(model, folder, tokens=tokens, projector=projector, seed=seed)
    return model


def assert_same(model, state, rows=V):
    """Every parameter is what `state` (LLaVA's names) says; of tables the first `rows` rows."""
    expected = our_state(state)
    assert set(expected) | {"boundary.weight"} == set(dict(model.named_parameters())) | {"boundary.weight"}
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
        kept = rows if name in ("embed.weight", "head.weight") else None
        if name != "boundary.weight":
            assert torch.equal(parameter[:kept], expected[name][:kept].to(parameter.dtype)), name
