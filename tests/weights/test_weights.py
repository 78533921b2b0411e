"""Starting weights: every form of model folder, new rows, sharding, and what is refused."""

import logging

import pytest
import torch
import torch.multiprocessing as mp
from forks import FORKS
from ranks import leave
from safetensors.torch import load_file, save_file
from weight_folders import (
    ADAPTER,
    CONFIG,
    HF_CONFIG,
    LLAMA,
    TOKENS,
    C,
    D,
    V,
    assert_same,
    llava_state,
    load,
    new_hf_names,
    old_hf_names,
    write_folder,
)

from fastvid.batch import VideoTokens
from fastvid.config.policy import Trainable
from fastvid.model.config import Precision
from fastvid.model.video_llava import VideoLlava
from fastvid.weights.loading import load_weights
from fastvid.weights.model_config import read_model_config
from fastvid.weights.starting import StartingWeights

FORMS = {
    "llava-bin": {},
    "llava-bin-sharded": {"files": 3},
    "llava-safetensors": {"ending": "safetensors"},
    "llava-safetensors-sharded": {"ending": "safetensors", "files": 4},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["linear", "mlp2x_gelu"])
def test_llava_folders(tmp_path, form, kind):
    state = llava_state(kind)
    stray = {
        "model.vision_tower.vision_tower.x": torch.ones(2),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3),
    }
    folder = write_folder(
        tmp_path / "m", state | stray, {**CONFIG, "mm_projector_type": kind}, **{"ending": "bin", **FORMS[form]}
    )
    assert_same(load(folder), state)


@pytest.mark.parametrize("rename", [old_hf_names, new_hf_names])
@pytest.mark.parametrize("files", [1, 3])
def test_llava_hf_folders(tmp_path, rename, files):
    state = llava_state()
    assert_same(load(write_folder(tmp_path / "m", rename(state), HF_CONFIG, files=files)), state)


def test_llava_hf_folder_as_transformers_writes_it(tmp_path):
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    tower = CLIPVisionConfig(
        hidden_size=C, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=tower, text_config=LlamaConfig(**LLAMA)))
    model.save_pretrained(tmp_path / "m")
    held = {
        name.replace("model.language_model.", "model."): tensor
        for name, tensor in model.state_dict().items()
        if "vision_tower" not in name
    }
    for i in (1, 2):
        held = {
            name.replace(f"multi_modal_projector.linear_{i}", f"mm_projector.{2 * i - 2}"): tensor
            for name, tensor in held.items()
        }
    assert_same(load(tmp_path / "m"), held)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_are_cast_to_the_parameters(tmp_path, dtype):
    state = llava_state(dtype=torch.float16)
    model = load(write_folder(tmp_path / "m", state), dtype=dtype)
    assert model.decoder.norm.weight.dtype == dtype and model.projector[0].weight.dtype == torch.float32
    assert_same(model, state)


def test_new_rows(tmp_path):
    state = llava_state()
    model = load(write_folder(tmp_path / "m", state), trainable=Trainable(embed=True, head=True))
    for table, name in ((model.embed.weight, "model.embed_tokens.weight"), (model.head.weight, "lm_head.weight")):
        assert table.shape == (V + 3, D)
        assert 0 < table[V].abs().max() < 0.02 * 5 and abs(table[V].mean()) < 0.02
        mean = torch.cat([state[name], table[V : V + 1].detach()]).mean(0)
        assert torch.equal(table[V + 1], mean) and torch.equal(table[V + 2], mean)
    assert not torch.equal(model.embed.weight[V], model.head.weight[V])


def test_new_rows_depend_on_the_seed_alone(tmp_path):
    folder = write_folder(tmp_path / "m", llava_state())
    first, again, other = (load(folder, seed=seed).embed.weight[V] for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_rows_that_the_folder_has_are_kept(tmp_path):
    state = llava_state()
    tokens = VideoTokens(V - 3, V - 2, V - 1, V)
    model = load(write_folder(tmp_path / "m", state), tokens=tokens)
    assert_same(model, state)
    assert torch.equal(model.boundary.weight, state["model.embed_tokens.weight"][-2:])


def test_padded_tables_keep_their_size(tmp_path):
    state = llava_state()
    first = V - 9  # the tokenizer ends here; the rest of the table is padding
    tokens = VideoTokens(first, first + 1, first + 2, first + 3, (first, first + 1, first + 2))
    model = load(write_folder(tmp_path / "m", state), tokens=tokens)
    table = state["model.embed_tokens.weight"]
    assert_same(model, state, rows=first)
    assert model.embed.weight.shape == (V, D) and torch.equal(model.embed.weight[first + 3 :], table[first + 3 :])
    mean = model.embed.weight[: first + 1].mean(0)
    assert torch.equal(model.boundary.weight, mean.expand(2, D)) and torch.equal(model.embed.weight[first + 2], mean)


@pytest.mark.parametrize("variant", ["336", "224"])
def test_rows_of_the_reference(golden, recipe, tiny, variant):
    recorded, V = load_file(golden / "model.safetensors"), recipe.BASE_VOCAB
    rows = recorded[f"{variant}/init/embed_rows_{V}_{V + 2}"]
    tokens = VideoTokens(V, V + 1, V + 2, V + 3)
    model = load(tiny / f"model{variant}", tokens=tokens)
    assert torch.equal(model.boundary.weight, rows[1:])
    for name in (name for name in recorded if name.startswith(f"{variant}/init/model.mm_projector.")):
        ours = "projector." + ("" if variant == "336" else "0.") + name.partition("mm_projector.")[2]
        assert torch.equal(model.get_parameter(ours), recorded[name])
    # The mean rule: the reference's start and end rows from the table and its own patch row.
    for name, kind in (("embed.weight", "embed"), ("head.weight", "lm_head")):
        made = StartingWeights(
            model.config, tiny / f"model{variant}", tokens=VideoTokens(V, V + 1, V + 2, V + 3, (V + 1, V + 2))
        )
        assert torch.equal(torch.cat(made.pieces(name))[V:], recorded[f"{variant}/init/{kind}_rows_{V}_{V + 2}"])


def test_tied_head(tmp_path):
    state = llava_state(tied=True)
    config = {**CONFIG, "tie_word_embeddings": True}
    model = load(write_folder(tmp_path / "m", state, config))
    assert not hasattr(model, "head") and torch.equal(model.embed.weight[:V], state["model.embed_tokens.weight"])
    stored = state | {"lm_head.weight": state["model.embed_tokens.weight"].clone()}
    again = load(write_folder(tmp_path / "stored", stored, config))
    assert torch.equal(again.embed.weight, model.embed.weight)


def test_a_missing_projector_starts_untrained_and_says_so(tmp_path, caplog):
    state = {name: tensor for name, tensor in llava_state().items() if "mm_projector" not in name}
    folder = write_folder(tmp_path / "m", state, {"model_type": "llama", **LLAMA})
    with caplog.at_level(logging.WARNING, "fastvid"):
        model = load(folder, projector_type="mlp2x_gelu", mm_hidden_size=C)
    assert "holds no mlp2x_gelu projector" in caplog.text and str(folder) in caplog.text
    for linear, inputs in ((model.projector[0], C), (model.projector[2], D)):
        for parameter in (linear.weight, linear.bias):
            assert 0.7 * inputs**-0.5 < parameter.abs().max() <= inputs**-0.5
    again = load(folder, projector_type="mlp2x_gelu", mm_hidden_size=C)
    other = load(folder, projector_type="mlp2x_gelu", mm_hidden_size=C, seed=7)
    assert torch.equal(model.projector[0].weight, again.projector[0].weight)
    assert not torch.equal(model.projector[0].weight, other.projector[0].weight)


def test_another_projector_type_than_the_folders(tmp_path, caplog):
    folder = write_folder(tmp_path / "m", llava_state("linear"), {**CONFIG, "mm_projector_type": "linear"})
    model = load(folder, projector_type="mlp2x_gelu")
    assert "holds no mlp2x_gelu projector" in caplog.text and model.projector[2].weight.isfinite().all()


BROKEN = {
    "a tensor is missing": (
        lambda s: s.pop("model.layers.1.mlp.up_proj.weight"),
        r"m does not fit .*model\.layers\.1\.mlp\.up_proj\.weight is missing",
    ),
    "part of the projector is missing": (
        lambda s: s.pop("model.mm_projector.2.weight"),
        r"model\.mm_projector\.2\.weight is missing",
    ),
    "the head is missing": (lambda s: s.pop("lm_head.weight"), "lm_head.weight is missing"),
    "a tensor has another shape": (
        lambda s: s.update({"model.layers.0.self_attn.k_proj.weight": torch.ones(3, D)}),
        r"model.safetensors: model.layers.0.self_attn.k_proj.weight is \[3, 24\], the "
        r"model's is \[12, 24\]",
    ),
    "the projector has another width": (
        lambda s: s.update({"model.mm_projector.0.weight": torch.ones(D, 3)}),
        r"mm_projector.0.weight is \[24, 3\], the model's is \[24, 10\]",
    ),
    "a table is too large": (
        lambda s: s.update({"lm_head.weight": torch.ones(V + 4, D)}),
        r"lm_head.weight is \[44, 24\], the model's is \[43, 24\]",
    ),
    "a table is too narrow": (
        lambda s: s.update({"model.embed_tokens.weight": torch.ones(V, 3)}),
        r"embed_tokens.weight is \[40, 3\]",
    ),
    "a layer too many": (
        lambda s: s.update({"model.layers.2.mlp.up_proj.weight": torch.ones(1)}),
        "model.safetensors: model.layers.2.mlp.up_proj.weight is unexpected",
    ),
    "biases": (
        lambda s: s.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(D)}),
        "q_proj.bias is unexpected",
    ),
    "quantised without a word in config.json": (
        lambda s: s.update({"model.layers.0.self_attn.q_proj.qweight": torch.ones(D, dtype=torch.int32)}),
        "q_proj.qweight is unexpected.*These are quantised weights: take the folder of the model",
    ),
    "quantised": (
        lambda s: s.update({"model.norm.weight": torch.ones(D, dtype=torch.int8)}),
        "model.norm.weight is torch.int8: quantised",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_does_not_fit_is_named(tmp_path, case):
    breaks, message = BROKEN[case]
    state = llava_state()
    breaks(state)
    folder = write_folder(tmp_path / "m", state)
    config = read_model_config(folder, vocab_size=V + 3)
    model = VideoLlava(config, trainable=Trainable(), precision=Precision())
    for parameter in model.parameters():
        parameter.data.fill_(7)
    with pytest.raises(ValueError, match=message):
        load_weights(model, folder, tokens=TOKENS)
    assert all((parameter == 7).all() for parameter in model.parameters()), "nothing is copied unless all fits"


def _load_sharded(rank, folder, config, rendezvous):
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    try:
        mesh = dist.init_device_mesh("cpu", (2,))
        with torch.device("meta"):
            model = VideoLlava(config, trainable=ADAPTER, precision=Precision())
        for layer in model.decoder.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        model.to_empty(device="cpu")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.to_local().fill_(float("nan"))
        load_weights(model, folder, tokens=TOKENS)
        expected, uneven = load_file(f"{folder}/expected"), 0
        for name, parameter in model.named_parameters():
            uneven += parameter.shape[0] % 2
            assert len(parameter.to_local()) < parameter.shape[0], f"{name} is not sharded"
            assert torch.equal(parameter.full_tensor(), expected[name]), name
        assert uneven, "a table with an odd number of rows is cut unevenly"
    finally:
        dist.destroy_process_group()
    leave()


@pytest.mark.slow
def test_sharded_over_two_ranks(tmp_path):
    folder = write_folder(tmp_path / "m", llava_state(), files=2)
    plain = load(folder)
    save_file(plain.state_dict(), folder / "expected")
    mp.start_processes(
        _load_sharded,
        (str(folder), plain.config, str(tmp_path / "rendezvous")),
        nprocs=2,
        start_method=FORKS.get_start_method(),
    )
