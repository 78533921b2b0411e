"""SigLIP's tower against transformers' SiglipVisionModel, and features of it."""

import copy
import json

import numpy as np
import pytest
import torch
from clips import draw
from fastvid_kernels import spatio_temporal_pool
from fastvid_kernels.patch_rows import embedding_matrix, row_length
from torch.nn.functional import cosine_similarity, interpolate, pad
from towers import write_siglip, write_tower

from fastvid import extract
from fastvid.data.video_tokens import tower_geometry
from fastvid.features.file import load_features
from fastvid.video.encoder import FeatureEncoder
from fastvid.video.towers.clip import ClipTower
from fastvid.video.towers.load import open_tower, tower_sizes
from fastvid.video.towers.siglip import SiglipTower

CPU = torch.device("cpu")


def pictures(count=5, size=30):
    """[T, 3, size, size]; a patch of 14 pixels leaves out the last two of 30, as of 384 the last six."""
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def patches(pixels, patch=14):
    """[T, P, K] patch rows of pictures, as `frame_patchify` cuts them."""
    grid = pixels.shape[-1] // patch
    cut = pixels[..., : grid * patch, : grid * patch].reshape(len(pixels), 3, grid, patch, grid, patch)
    rows = cut.permute(0, 2, 4, 3, 5, 1).reshape(len(pixels), grid * grid, -1)
    return pad(rows, (0, row_length(patch) - rows.shape[2]))


@torch.no_grad()
def whole(model, pixels):
    return model(pixels, output_hidden_states=True).hidden_states[-2]


@torch.no_grad()
def by_layers(model, rows):
    """The same of patch rows, embedded by a matrix, whose sums a convolution rounds otherwise."""
    embedded = model.embeddings.patch_embedding
    states = torch.nn.functional.linear(rows, embedding_matrix(embedded.weight), embedded.bias)
    states = states + model.embeddings.position_embedding.weight
    for layer in model.encoder.layers[:-1]:
        states = layer(states, None)
    return states


def test_as_a_whole(tmp_path):
    model = write_siglip(tmp_path)
    tower = open_tower(tmp_path, CPU, torch.float32)
    assert isinstance(tower, SiglipTower) and (tower.image_size, tower.patch_size, tower.num_patches) == (30, 14, 4)
    found, expected = tower.states(patches(pictures())), whole(model, pictures())
    assert found.shape == expected.shape == (5, 4, 48)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=3e-5)
    assert cosine_similarity(found, expected, dim=-1).min() >= 0.99999


def test_in_fp32_the_bits_are_those_of_transformers(tmp_path):
    model = write_siglip(tmp_path)
    found = open_tower(tmp_path, CPU, torch.float32).states(patches(pictures()))
    assert torch.equal(found, by_layers(model, patches(pictures())))


def test_of_one_layer_the_states_are_the_embedded_patches(tmp_path):
    model = write_siglip(tmp_path, layers=1)
    found = open_tower(tmp_path, CPU, torch.float32).states(patches(pictures()))
    assert torch.equal(found, by_layers(model, patches(pictures())))


@pytest.mark.parametrize("dtype, least", [(torch.bfloat16, 0.9999), (torch.float16, 0.999999)], ids=str)
def test_in_16_bits_the_error_is_hardly_larger_than_that_of_transformers(tmp_path, dtype, least):
    model = write_siglip(tmp_path, std=0.1)
    found = open_tower(tmp_path, CPU, dtype).states(patches(pictures()).to(dtype))
    assert found.dtype == dtype
    assert cosine_similarity(found.float(), whole(model, pictures()), dim=-1).min() >= least
    exact = by_layers(copy.deepcopy(model).double(), patches(pictures()).double())
    error, theirs = (
        (x.double() - exact).norm() for x in (found, by_layers(model.to(dtype), patches(pictures()).to(dtype)))
    )
    assert error <= 1.2 * theirs


@pytest.mark.slow
def test_by_the_kernels(tmp_path, monkeypatch):
    """On a GPU, or interpreted."""
    model = write_siglip(tmp_path)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = open_tower(tmp_path, device, torch.float16).states(patches(pictures()).to(device, torch.float16)).cpu()
    exact = by_layers(copy.deepcopy(model).double(), patches(pictures()).double())
    error, theirs = ((x.double() - exact).norm() for x in (found, by_layers(model.half(), patches(pictures()).half())))
    assert error <= 1.2 * theirs


@pytest.mark.parametrize(
    "settings",
    [None, {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4], "size": {"height": 30, "width": 30}}],
)
def test_features_are_those_of_transformers(tmp_path, settings):
    """Without preprocessor settings mean and deviation are 0.5."""
    model = write_siglip(tmp_path, settings=settings)
    frames = np.random.default_rng(0).integers(0, 256, (5, 20, 24, 3), dtype=np.uint8)
    found = FeatureEncoder(tmp_path, device="cpu", dtype=torch.float32, batch_size=3, num_temporal=6).encode(frames)
    mean, std = (
        torch.tensor((settings or {}).get(name, [0.5] * 3)).view(3, 1, 1) for name in ("image_mean", "image_std")
    )
    pixels = interpolate(torch.from_numpy(frames).permute(0, 3, 1, 2).float(), size=(30, 30)) / 255
    expected = spatio_temporal_pool(whole(model, ((pixels - mean) / std).half().float()).half(), num_temporal=6)
    assert found.shape == (6 + 4, 48) and found.dtype == torch.float16
    torch.testing.assert_close(found, expected, rtol=2**-9, atol=2**-9)
    assert cosine_similarity(found.float(), expected.float(), dim=-1)[[0, 1, 2, 3, 4, 6, 7, 8, 9]].min() >= 0.99999


def test_a_whole_model_of_text_and_vision(tmp_path, capfd):
    from transformers import SiglipConfig, SiglipModel

    parts = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    SiglipModel(
        SiglipConfig(
            text_config={**parts, "vocab_size": 99}, vision_config={**parts, "image_size": 28, "patch_size": 14}
        )
    ).save_pretrained(tmp_path)
    capfd.readouterr()
    tower = open_tower(str(tmp_path), CPU, torch.float32)
    assert isinstance(tower, SiglipTower) and tower.num_patches == 4 and tower.hidden_size == 32
    assert "text_model" not in capfd.readouterr().err  # its weights are not listed one by one


@pytest.mark.slow
def test_extraction_with_pixels_that_fill_no_patch(tmp_path):
    """384 pixels in patches of 14 are 27 × 27, and a file has num_frames + 729 rows."""
    write_siglip(
        tmp_path / "tower",
        image_size=384,
        layers=2,
        hidden_size=16,
        intermediate_size=16,
        heads=2,
        settings={"size": {"height": 384, "width": 384}},
    )
    (tmp_path / "videos").mkdir()
    draw(tmp_path / "videos" / "a.mp4", 5)
    assert (
        extract.main(
            [
                "--video_dir_path",
                str(tmp_path / "videos"),
                "--clip_feat_path",
                str(tmp_path / "features"),
                "--vision_tower",
                str(tmp_path / "tower"),
                "--num_frames",
                "4",
                "--device",
                "cpu",
                "--decode_workers",
                "1",
            ]
        )
        == 0
    )
    features, header = load_features(tmp_path / "features" / "a.safetensors")
    assert features.shape == (4 + 27 * 27, 16) and (features.norm(dim=1) > 0).all()
    assert (header["image_size"], header["patch_size"]) == (384, 14)


@pytest.mark.slow
def test_preprocessing_of_another_tower_is_refused_until_both_are_the_towers(tmp_path):
    write_siglip(tmp_path, settings={"size": {"height": 42, "width": 42}})
    with pytest.raises(ValueError, match="makes pictures of 42 × 42 pixels, its config.json takes 30 × 30; download"):
        FeatureEncoder(tmp_path, device="cpu")
    for side, taken in ((28, 28), (None, 30)):  # 28 pixels are the same four patches
        settings = {"size": {"height": side, "width": side}} if side else {}
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
        assert FeatureEncoder(tmp_path, device="cpu").image_size == taken


def test_the_header_tells_the_size_of_the_pictures(tmp_path):
    write_siglip(tmp_path / "tower", settings={"size": {"height": 28, "width": 28}})  # of 30, of which 28 fill patches
    sizes = tower_sizes(tmp_path / "tower")
    encoder = FeatureEncoder(tmp_path / "tower", device="cpu", dtype=torch.float32)
    assert sizes == (28, 14, 48) == (encoder.image_size, encoder.patch_size, encoder.hidden_size)
    (tmp_path / "tower" / "preprocessor_config.json").write_text('{"size": {"height": 56, "width": 56}}')
    with pytest.raises(ValueError, match="makes pictures of 56 × 56"):
        tower_sizes(tmp_path / "tower")


def test_a_tower_without_a_fixed_resolution_is_refused_and_a_fixed_one_is_taken(tmp_path):
    """SigLIP 2's of a fixed resolution call themselves siglip."""
    from transformers import Siglip2VisionConfig, Siglip2VisionModel

    Siglip2VisionModel(
        Siglip2VisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    ).save_pretrained(tmp_path / "naflex")
    with pytest.raises(ValueError, match="is a NaFlex tower of SigLIP 2.* give one of a fixed resolution"):
        FeatureEncoder(tmp_path / "naflex", device="cpu")
    write_siglip(tmp_path / "fixed")
    assert FeatureEncoder(tmp_path / "fixed", device="cpu").num_patches == 4


def test_the_kind_is_that_of_the_folder(tmp_path):
    write_siglip(tmp_path / "siglip")
    write_tower(tmp_path / "clip")
    assert type(open_tower(tmp_path / "siglip", CPU, torch.float32)) is SiglipTower
    assert type(open_tower(tmp_path / "clip", CPU, torch.float32)) is ClipTower


def test_how_many_rows_a_video_takes(tmp_path):
    """Of a folder that says nothing of its sizes, as google/siglip-base-patch16-224 does, they are SigLIP's own."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    write_siglip(tmp_path / "tower")
    assert tower_geometry(tmp_path / "model", str(tmp_path / "tower")) == (30, 14)
    (tmp_path / "tower" / "config.json").write_text(
        json.dumps({"model_type": "siglip", "vision_config": {"model_type": "siglip_vision_model"}})
    )
    assert tower_geometry(tmp_path / "model", str(tmp_path / "tower")) == (224, 16)
    for name, sizes in (
        ("siglip-so400m-patch14-384", (384, 14)),
        ("siglip2-base-patch16-256", (256, 16)),
        ("siglip-base-patch16-256-multilingual", (256, 16)),
    ):
        assert tower_geometry(tmp_path / "model", f"google/{name}") == sizes
    with pytest.raises(ValueError, match="cannot tell how many tokens"):
        tower_geometry(tmp_path / "model", "google/siglip2-so400m-patch16-naflex")
