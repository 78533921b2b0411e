"""What the recordings beside this file were made on, drawn from seeds: models, towers, features, records, frames.

python tests/golden/tiny.py FOLDER writes

FOLDER/model336, model224    checkpoints of LLaVA-1.5's and Video-ChatGPT's form, with the three video tokens
FOLDER/data336, data224      train.json, and feats/ as the reference's feature script stores features
FOLDER/clip336, clip224      CLIP vision towers

V tokens of text, D hidden, C features' channels, P patches of a frame.
"""

import hashlib
import json
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
from sentencepiece import SentencePieceProcessor

HERE = Path(__file__).resolve().parent
BASE_VOCAB = SentencePieceProcessor(model_file=str(HERE / "tokenizer.model")).vocab_size()
HIDDEN, INTERMEDIATE, LAYERS, HEADS = 64, 128, 2, 4
MM_HIDDEN = 32
SIZES = {"336": 336, "224": 224}
PROJECTORS = {"336": "mlp2x_gelu", "224": "linear"}
VIDEO_TOKENS = ("<vid_patch>", "<vid_start>", "<vid_end>")
# Large enough that a wrong mask, position or norm shows in the loss, small enough that fp32 stays exact to 1e-6.
SPREADS = {"embed_tokens": 0.05, "lm_head": 0.12, "self_attn": 0.12, "mlp": 0.11, "mm_projector": 0.15}
PATCH = 14
TOWER = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
# Name: frames, height, width. More frames than are taken, and fewer.
FRAMES = {"noise130": (130, 40, 64), "noise7": (7, 90, 160)}

CONVERSATIONS = [
    [("Who is in the kitchen?\n<video>", "A woman in a green coat stands at the stove.")],
    [("<video>\nWhat do the children play?", "They play chess."), ("Who wins?", "The girl does, after a long game.")],
    [
        (
            "Tell me what happens.\n<video>",
            "A boat leaves the harbour at dawn; gulls follow it, and an old man on the pier waves until it is gone.",
        )
    ],
    [("<video>\nDay or night?", "Night.")],
    [("How many dogs are there?\n<video>", "2 dogs: one black, one white.")],
    [("<video>\nIs there snow?", "Yes.")],
    [("List the steps.\n<video>", "1. Wash the rice.\n2. Boil it.\n3. Let it rest!")],
    [("<video>\nWhat music is that?", "A string quartet plays, in a hall with red seats and a high ceiling.")],
    [("Weather?\n<video>", "Sunny ☀ and windy.")],
    [("<video>\nHow does it end?", "She locks the café's door and cycles home through the rain.")],
]


def random(name):
    """A generator of its own for everything that has a name."""
    return np.random.default_rng(list(hashlib.sha256(f"fastvid {name}".encode()).digest()[:16]))


def weight(name, shape):
    """An fp32 weight of the language model or the projector, by the reference's name."""
    values = random(name).standard_normal(shape, dtype=np.float32)
    if "norm" in name:
        return 1 + np.float32(0.1) * values
    return values * np.float32(next(spread for part, spread in SPREADS.items() if part in name))


def llava_state(variant, new_rows=None):
    """{reference's name: fp32 array}; `new_rows` = {"embed": [n, D], "lm_head": [n, D]} follow the V rows of text."""
    shapes = {"model.embed_tokens.weight": (BASE_VOCAB, HIDDEN), "lm_head.weight": (BASE_VOCAB, HIDDEN)}
    for layer in (f"model.layers.{i}." for i in range(LAYERS)):
        shapes |= {f"{layer}self_attn.{x}_proj.weight": (HIDDEN, HIDDEN) for x in "qkvo"}
        shapes |= {f"{layer}mlp.{x}_proj.weight": (INTERMEDIATE, HIDDEN) for x in ("gate", "up")}
        shapes |= {f"{layer}mlp.down_proj.weight": (HIDDEN, INTERMEDIATE)}
        shapes |= {f"{layer}{x}_layernorm.weight": (HIDDEN,) for x in ("input", "post_attention")}
    shapes["model.norm.weight"] = (HIDDEN,)
    linears = {"0.": MM_HIDDEN, "2.": HIDDEN} if PROJECTORS[variant] == "mlp2x_gelu" else {"": MM_HIDDEN}
    for place, width in linears.items():
        shapes |= {
            f"model.mm_projector.{place}weight": (HIDDEN, width),
            f"model.mm_projector.{place}bias": (HIDDEN,),
        }
    state = {name: weight(name, shape) for name, shape in shapes.items()}
    for name, kind in (("model.embed_tokens.weight", "embed"), ("lm_head.weight", "lm_head")):
        if new_rows is not None:
            state[name] = np.concatenate([state[name], new_rows[kind]])
    return state


def records():
    """Ten training records, of one and two rounds."""
    return [
        {
            "id": f"vid{i}",
            "video": f"vid{i}.pkl",
            "conversations": [
                {"from": role, "value": text} for turn in turns for role, text in zip(("human", "gpt"), turn)
            ],
        }
        for i, turns in enumerate(CONVERSATIONS)
    ]


def features(variant, i):
    """[100 + P, C] fp16 features of record `i`. Every third video is short: its last temporal rows are zeros."""
    rows = 100 + (SIZES[variant] // PATCH) ** 2
    values = random(f"features {variant} {i}").standard_normal((rows, MM_HIDDEN), dtype=np.float32)
    values[:, 7] *= 8  # towers have channels that stand out
    if i % 3 == 2:
        values[40 + i : 100] = 0
    return values.astype(np.float16)


def clip_video(name):
    """[T, H, W, 3] uint8 noise: every pixel that is taken from a wrong place shows."""
    return random(f"video {name}").integers(0, 256, (*FRAMES[name], 3), dtype=np.uint8)


def write_tower(folder, size):
    """A CLIP vision tower whose weights do not depend on the version of transformers that writes it."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel

    model = CLIPVisionModel(CLIPVisionConfig(image_size=size, patch_size=PATCH, projection_dim=32, **TOWER))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            short = name.removeprefix("vision_model.")  # transformers 5 has no such prefix
            values = random(f"tower {short}").standard_normal(tuple(parameter.shape), dtype=np.float32)
            if short.endswith("bias"):
                values *= 0.05
            elif "norm" in short:
                values = 1 + 0.1 * values
            else:
                values *= 0.3 if "embedding" in short else parameter.shape[-1] ** -0.5
                values *= 0.15 if "patch" in short else 1
            parameter.copy_(torch.from_numpy(values))
    model.save_pretrained(folder)
    settings = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": size},
        "crop_size": {"height": size, "width": size},
        **{f"do_{step}": True for step in ("resize", "center_crop", "rescale", "normalize", "convert_rgb")},
        "resample": 3,
        "rescale_factor": 1 / 255,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    (Path(folder) / "preprocessor_config.json").write_text(json.dumps(settings))


def write_model(folder, variant, tower, tokenizer, new_rows=None):
    """A checkpoint in the reference's form; without `new_rows` one that has no video tokens yet."""
    import torch

    folder = Path(folder)
    folder.mkdir(parents=True)
    shutil.copy(tokenizer, folder / "tokenizer.model")
    texts = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    # As LLaVA-1.5's files say it: white space around these stays. Around a token that is plain text it would not.
    plain = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "legacy": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
        "padding_side": "right",
        "pad_token": None,
        "sp_model_kwargs": {},
        **{name: {**plain, "content": text, "__type": "AddedToken"} for name, text in texts.items()},
    }
    special = {**{name: {**plain, "content": text} for name, text in texts.items()}, "pad_token": "<unk>"}
    if new_rows is not None:
        special["additional_special_tokens"] = list(VIDEO_TOKENS)
        ids = {token: BASE_VOCAB + i for i, token in enumerate(VIDEO_TOKENS)}
        (folder / "added_tokens.json").write_text(json.dumps(ids))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    state = llava_state(variant, new_rows)
    model = {
        "model_type": "llava",
        "architectures": ["LlavaLlamaForCausalLM"],
        "vocab_size": len(state["lm_head.weight"]),
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "torch_dtype": "float32",
        "use_mm_proj": True,
        "mm_hidden_size": MM_HIDDEN,
        "mm_projector_type": PROJECTORS[variant],
        "mm_vision_select_layer": -2,
        "mm_vision_tower": str(tower),
    }
    (folder / "config.json").write_text(json.dumps(model, indent=1))
    torch.save({name: torch.from_numpy(values) for name, values in state.items()}, folder / "pytorch_model.bin")


def write_data(folder, variant, dtype=np.float16):
    """train.json and the pickled features that it names."""
    (Path(folder) / "feats").mkdir(parents=True)
    (Path(folder) / "train.json").write_text(json.dumps(records()))
    for i, record in enumerate(records()):
        with open(Path(folder) / "feats" / record["video"], "wb") as file:
            pickle.dump(features(variant, i).astype(dtype), file)


def main(folder):
    from safetensors.numpy import load_file

    folder, recorded = Path(folder).absolute(), load_file(HERE / "model.safetensors")
    for variant, size in SIZES.items():
        rows = f"rows_{BASE_VOCAB}_{BASE_VOCAB + 2}"
        new = {kind: recorded[f"{variant}/init/{kind}_{rows}"] for kind in ("embed", "lm_head")}
        write_tower(folder / f"clip{variant}", size)
        write_model(
            folder / f"model{variant}", variant, folder / f"clip{variant}", HERE / "tokenizer.model", new_rows=new
        )
        write_data(folder / f"data{variant}", variant)


if __name__ == "__main__":
    main(sys.argv[1])
