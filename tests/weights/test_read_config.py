"""config.json in every form, and what is refused because the model would not compute it."""

import pytest
from weight_folders import (
    CONFIG,
    HF_CONFIG,
    LLAMA,
    C,
    D,
    V,
    llava_state,
    load,
    new_hf_names,
    old_hf_names,
    write_folder,
)

from fastvid.weights.model_config import read_model_config


def read(tmp_path, config, state=None, **options):
    folder = tmp_path / f"m{len(list(tmp_path.iterdir()))}"
    write_folder(folder, llava_state() if state is None else state, config)
    return read_model_config(folder, **options)


def test_original_llava(tmp_path):
    config = read(tmp_path, CONFIG)
    sizes = config.decoder
    assert (config.mm_hidden_size, config.projector_type, config.vision_tower) == (C, "mlp2x_gelu", "some/tower")
    assert config.initializer_range == 0.02 and sizes.rms_norm_eps == 1e-5 and sizes.max_position_embeddings == 128
    assert (sizes.vocab_size, sizes.hidden_size, sizes.intermediate_size, sizes.num_layers) == (V, D, 44, 2)
    assert (sizes.num_heads, sizes.num_kv_heads, sizes.head_dim, sizes.tie_word_embeddings) == (4, 2, 6, False)


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "llava_llama"},
        {"model_type": "VideoChatGPT", "architectures": ["VideoChatGPTLlamaForCausalLM"]},
        {"model_type": "llama"},
        {"use_mm_proj": True},
    ],
)
def test_names_of_the_family(tmp_path, changes):
    assert read(tmp_path, CONFIG | changes) == read(tmp_path, CONFIG)


@pytest.mark.parametrize("kind", ["linear", "mlp2x_gelu"])
def test_projector_that_only_the_weights_show(tmp_path, kind):
    bare = {key: value for key, value in CONFIG.items() if not key.startswith("mm_")}
    config = read(tmp_path, bare, llava_state(kind))
    assert (config.projector_type, config.mm_hidden_size, config.vision_tower) == (kind, C, None)


@pytest.mark.parametrize("rename", [old_hf_names, new_hf_names])
def test_llava_hf(tmp_path, rename):
    config = read(tmp_path, HF_CONFIG, rename(llava_state()))
    assert (config.projector_type, config.mm_hidden_size) == ("mlp2x_gelu", C)
    assert config.decoder == read(tmp_path, CONFIG).decoder


def test_llava_hf_leaves_out_defaults(tmp_path):
    """As llava-hf/llava-1.5-7b-hf does."""
    text = {"model_type": "llama", "rms_norm_eps": 1e-5, "vocab_size": 32064, "max_position_embeddings": 4096}
    config = read(
        tmp_path, {"model_type": "llava", "vision_config": {"model_type": "clip_vision_model"}, "text_config": text}
    )
    sizes = config.decoder
    assert (sizes.hidden_size, sizes.intermediate_size, sizes.num_layers, sizes.head_dim) == (4096, 11008, 32, 128)
    assert sizes.vocab_size == 32064 and config.mm_hidden_size == 1024


def test_plain_llama(tmp_path):
    state = {name: tensor for name, tensor in llava_state().items() if "mm_projector" not in name}
    config = read(tmp_path, {"model_type": "llama", **LLAMA}, state)
    assert (config.projector_type, config.mm_hidden_size) == ("linear", 1024)
    config = read(tmp_path, {"model_type": "llama", **LLAMA}, state, projector_type="mlp2x_gelu", mm_hidden_size=7)
    assert (config.projector_type, config.mm_hidden_size) == ("mlp2x_gelu", 7)


def test_tables_grow_and_never_shrink(tmp_path):
    assert read(tmp_path, CONFIG, vocab_size=V + 3).decoder.vocab_size == V + 3
    assert read(tmp_path, CONFIG, vocab_size=V - 3).decoder.vocab_size == V


@pytest.mark.parametrize(
    "old, new",
    [
        ({}, {"rope_theta": 10000.0, "rope_type": "default"}),
        ({"rope_theta": 5e5}, {"rope_theta": 5e5, "rope_type": "default"}),
        (
            {"rope_scaling": {"type": "linear", "factor": 4.0}},
            {"rope_theta": 10000.0, "rope_type": "linear", "factor": 4.0},
        ),
    ],
)
def test_rope_settings_of_both_generations(tmp_path, old, new):
    for settings in (old, {"rope_parameters": new}):
        found = dict(read(tmp_path, CONFIG | settings).decoder.rope_parameters)
        found.pop("type", None)
        assert found == new


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"model_type": "gemma"},
            r"model_type 'gemma' is not computed; these are: llama \(LLaMA 1 to 3, .*\), mistral",
        ),
        ({"text_config": LLAMA | {"model_type": "phi3"}}, "model_type 'phi3' is not computed"),
        ({"model_type": "qwen3", "attention_bias": True}, "attention_bias = True is not computed"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window = 0 is no size"),
        ({"model_type": "smollm3", "no_rope_layers": [1]}, "a list that says something of each layer is too short"),
        (
            {"model_type": "smollm3", "no_rope_layers": [1], "layer_types": ["full_attention"] * 2},
            "a list that says something of each layer is too short",
        ),
        ({"model_type": "smollm3", "no_rope_layer_interval": 0}, "config.json: integer .*modulo by zero"),
        ({"model_type": "qwen3", "layer_types": ["chunked_attention"] * 2}, "layer_types: 'chunked_attention' is not"),
        ({"partial_rotary_factor": 0.5}, "config.json: partial_rotary_factor = 0.5 is not computed; only 1.0 is"),
        ({"rope_theta": 0}, "config.json: .* give no frequencies: not all frequencies are finite"),
        ({"rope_theta": None}, "config.json: .* give no frequencies .*NoneType"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "config.json: .* give no frequencies .*'str'"),
        ({"max_position_embeddings": -1}, "max_position_embeddings = -1 is no size"),
        ({"num_key_value_heads": 3}, "num_attention_heads = 4 is no multiple of num_key_value_heads = 3"),
        ({"text_config": "llama"}, "config.json: text_config = llama is no JSON object"),
        ({"attention_bias": True}, "attention_bias = True is not computed; only False is"),
        ({"mlp_bias": True}, "mlp_bias = True"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not computed"),
        ({"sliding_window": 4096}, "sliding_window = 4096"),
        ({"num_local_experts": 8}, "num_local_experts = 8"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"mm_projector_type": "mlp3x_gelu"}, "mm_projector_type = 'mlp3x_gelu' is not computed"),
        ({"quantization_config": {"quant_method": "gptq"}}, "give the folder of the model that it was made of"),
        ({"num_attention_heads": 0}, "config.json: num_attention_heads = 0 is no size"),
        ({"num_hidden_layers": -1}, "num_hidden_layers = -1 is no size"),
        ({"head_dim": 0}, "head_dim = 0 is no size"),
        ({"num_hidden_layers": 10**9}, "is no size of a model .1 to 1,000."),
        ({"hidden_size": "wide"}, "config.json: .*hidden_size"),
        ({"mm_video_tower": "LanguageBind/Video_merge"}, "mm_video_tower = 'LanguageBind/Video_merge' is not computed"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "config.json: rope_type 'dynamic'"),
    ],
)
def test_what_is_not_computed_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, CONFIG | changes)


BARE = {key: value for key, value in LLAMA.items() if key != "model_type"}


@pytest.mark.parametrize(
    "model_type, more, expected",
    [
        ("mistral", {}, {"sliding_window": 4096}),  # transformers' default
        ("mistral", {"sliding_window": None, "head_dim": 8}, {"head_dim": 8}),
        ("llava_mistral", {"sliding_window": 100}, {"sliding_window": 100}),
        ("qwen2", {}, {"qkv_bias": True}),
        ("llava_qwen", {"sliding_window": 100, "use_sliding_window": False}, {"qkv_bias": True}),
        (
            "qwen2",
            {"sliding_window": 100, "use_sliding_window": True, "max_window_layers": 1},
            {"qkv_bias": True, "sliding_window": 100},
        ),
        ("qwen2", {"sliding_window": 100, "use_sliding_window": True, "max_window_layers": 2}, {"qkv_bias": True}),
        ("qwen3", {}, {"qk_norm": True, "head_dim": 128}),
        ("qwen3", {"head_dim": 10, "tie_word_embeddings": True}, {"qk_norm": True, "head_dim": 10, "tied": True}),
        ("smollm3", {"no_rope_layer_interval": 2}, {"unrotated_layers": (1,), "tied": True}),
        ("smollm3", {"no_rope_layers": [0, 1]}, {"unrotated_layers": (0,), "tied": True}),
        ("llama", {"head_dim": 8}, {"head_dim": 8}),
    ],
)
def test_families(tmp_path, model_type, more, expected):
    """What each has besides sizes; as a folder of its own, and as the language model of llava-hf's."""
    plain = {
        "qkv_bias": False,
        "qk_norm": False,
        "unrotated_layers": (),
        "sliding_window": None,
        "head_dim": 6,
        "tied": False,
    }
    state = llava_state(tied=True)
    text = BARE | {"model_type": model_type, **more}
    for config in (CONFIG | text, HF_CONFIG | {"text_config": text}):
        found = read(tmp_path, config, state)
        c = found.decoder
        told = {name: c.tie_word_embeddings if name == "tied" else getattr(c, name) for name in plain}
        assert told == plain | expected
        assert found.model_type == {"llava_mistral": "mistral", "llava_qwen": "qwen2"}.get(model_type, model_type)
        assert found.family_settings == {key: more[key] for key in more if "head" not in key and "tie" not in key}
        assert c.context == min(128, expected.get("sliding_window") or 128)


def test_folders_without_a_usable_config(tmp_path):
    with pytest.raises(ValueError, match=r"liuhaotian/llava-v1.5-7b is no folder: download the model \(hf download\)"):
        read_model_config("liuhaotian/llava-v1.5-7b")
    with pytest.raises(ValueError, match="config.json does not exist"):
        read_model_config(tmp_path)
    (tmp_path / "config.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match="config.json is a git-lfs pointer"):
        read_model_config(tmp_path)
    for content in ("{", "[]"):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match="config.json .*download it again"):
            read_model_config(tmp_path)


@pytest.mark.parametrize(
    "config",
    [CONFIG | {"tie_word_embeddings": True}, HF_CONFIG | {"text_config": LLAMA | {"tie_word_embeddings": True}}],
)
def test_tied_tables(tmp_path, config):
    assert read(tmp_path, config, llava_state(tied=True)).decoder.tie_word_embeddings


@pytest.mark.parametrize("changed, tied", [(0.0, True), (1.0, False)])
def test_a_head_beside_tied_tables(tmp_path, caplog, changed, tied):
    """A head that differs is the model's, as transformers 5 has it; one that does not costs no memory."""
    from transformers import LlamaForCausalLM

    state = llava_state()
    state["lm_head.weight"] = state["model.embed_tokens.weight"] + changed
    config = {
        **LLAMA,
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "tie_word_embeddings": True,
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": C,
    }
    assert read(tmp_path, config, state).decoder.tie_word_embeddings is tied
    assert ("hold two that differ" in caplog.text) is not tied
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "m0")
    assert (theirs.lm_head.weight is theirs.model.embed_tokens.weight) is tied
    assert (theirs.lm_head.weight == state["lm_head.weight"]).all()
    ours = load(tmp_path / "m0")
    head = ours.embed.weight if tied else ours.head.weight
    assert (head[:V] == state["lm_head.weight"]).all()


def test_a_byte_order_mark_is_no_fault(tmp_path):
    before = read(tmp_path, CONFIG)
    path = tmp_path / "m0" / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_model_config(tmp_path / "m0") == before


def test_a_projector_of_another_kind_in_the_weights_is_named(tmp_path):
    state = llava_state() | {"model.mm_projector.4.weight": llava_state()["model.mm_projector.2.weight"]}
    config = {"model_type": "llama", **LLAMA}
    with pytest.raises(ValueError, match="mm_projector_type = 'mlp3x_gelu' is not computed"):
        read(tmp_path, config, state)
