"""The fused tower against transformers' own layers."""

import copy
import gc
import weakref

import pytest
import torch
from fastvid_kernels.patch_rows import embedding_matrix, row_length
from transformers import CLIPVisionConfig, CLIPVisionModel

from fastvid.video.towers import load
from fastvid.video.towers.load import open_tower

CPU = torch.device("cpu")


def written(folder, activation="quick_gelu", layers=4):
    config = CLIPVisionConfig(
        image_size=42,
        patch_size=14,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=layers,
        num_attention_heads=3,
        layer_norm_eps=1e-3,
        hidden_act=activation,
    )
    torch.manual_seed(0)
    model = CLIPVisionModel(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def theirs(model, patches_BPK):
    """hidden_states[-2] without its first row; patches are embedded by a matrix, whose sums a convolution rounds
    otherwise."""
    parts = model.embeddings
    patches_BPK = patches_BPK.to(parts.class_embedding.dtype)
    matrix_CK = embedding_matrix(parts.patch_embedding.weight)
    class_row, position = parts.class_embedding, parts.position_embedding.weight
    rows = torch.nn.functional.linear(patches_BPK, matrix_CK) + position[1:]
    states = model.pre_layrnorm(torch.cat([(class_row + position[0]).expand(len(rows), 1, -1), rows], 1))
    for layer in model.encoder.layers[:-1]:
        states = layer(states, None)
    return states[:, 1:]


def patches():
    used = torch.randn(5, 9, 3 * 14 * 14, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.pad(used, (0, row_length(14) - used.shape[2]))


def pictures(patches_BPK):
    """[B, 3, 42, 42] that patches are cut from."""
    pixels = patches_BPK[..., : 3 * 14 * 14].reshape(5, 3, 3, 14, 14, 3)
    return pixels.permute(0, 5, 1, 3, 2, 4).reshape(5, 3, 42, 42)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu", "gelu_pytorch_tanh"])
def test_in_fp32_the_bits_are_those_of_transformers(tmp_path, activation):
    model = written(tmp_path, activation)
    assert torch.equal(open_tower(tmp_path, CPU, torch.float32).states(patches()), theirs(model, patches()))


def test_as_a_whole(tmp_path):
    model = written(tmp_path)
    expected = model(pictures(patches()), output_hidden_states=True).hidden_states[-2][:, 1:]
    torch.testing.assert_close(open_tower(tmp_path, CPU, torch.float32).states(patches()), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_16_bits_the_error_is_hardly_larger_than_that_of_transformers(tmp_path, dtype):
    model = written(tmp_path)
    exact = theirs(copy.deepcopy(model).double(), patches())
    found = open_tower(tmp_path, CPU, dtype).states(patches().to(dtype))
    assert found.dtype == dtype
    error, their_error = ((x.double() - exact).norm() for x in (found, theirs(model.to(dtype), patches())))
    assert error <= 1.2 * their_error


def test_the_last_layer_is_left_out(tmp_path):
    """Of one layer, the states are the embedded patches."""
    model = written(tmp_path, layers=1)
    assert torch.equal(open_tower(tmp_path, CPU, torch.float32).states(patches()), theirs(model, patches()))


def test_images_do_not_see_each_other(tmp_path):
    written(tmp_path)
    tower = open_tower(tmp_path, CPU, torch.float32)
    before, other = tower.states(patches()), patches()
    other[3] = 0
    after = tower.states(other)
    assert torch.equal(after[[0, 1, 2, 4]], before[[0, 1, 2, 4]]) and not torch.equal(after[3], before[3])


def test_states_want_no_gradient(tmp_path):
    """Nothing of the tower is kept for a backward pass, even where gradients are on."""
    written(tmp_path)
    with torch.enable_grad():
        states = open_tower(tmp_path, CPU, torch.float32).states(patches().requires_grad_())
    assert not states.requires_grad


@pytest.mark.slow
def test_only_the_tensors_that_it_needs_stay_alive(tmp_path, monkeypatch):
    written(tmp_path)
    loaded, load_tower = [], load.load_tower

    def remembered(*given):
        model = load_tower(*given)
        loaded.extend(map(weakref.ref, (model, *model.parameters())))
        return model

    monkeypatch.setattr(load, "load_tower", remembered)
    tower = open_tower(tmp_path, CPU, torch.float32)
    gc.collect()
    assert len(loaded) > 50 and all(reference() is None for reference in loaded)
    assert not tower.states(patches()).requires_grad


def test_an_activation_with_weights_of_its_own(tmp_path):
    model = written(tmp_path, "prelu")
    assert torch.equal(open_tower(tmp_path, CPU, torch.float32).states(patches()), theirs(model, patches()))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_by_the_kernels(tmp_path, monkeypatch, dtype):
    """On a GPU, or interpreted."""
    model = written(tmp_path)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = open_tower(tmp_path, device, dtype).states(patches().to(device, dtype)).cpu()
    exact = theirs(copy.deepcopy(model).double(), patches())
    error, their_error = ((x.double() - exact).norm() for x in (found, theirs(model.to(dtype), patches())))
    assert error <= 1.2 * their_error
