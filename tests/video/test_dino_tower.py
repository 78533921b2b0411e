"""DINOv2's and DINOv3's towers against transformers' own."""

import copy
import json

import numpy as np
import pytest
import torch
from clips import draw
from fastvid_kernels import spatio_temporal_pool
from test_siglip_tower import CPU, patches, whole
from torch.nn.functional import cosine_similarity, interpolate
from towers import write_dino

from fastvid import extract
from fastvid.data.video_tokens import tower_geometry
from fastvid.features.file import load_features
from fastvid.video.encoder import FeatureEncoder
from fastvid.video.towers.dino import Dinov2Tower, Dinov3Tower
from fastvid.video.towers.load import open_tower, tower_sizes

KINDS = {
    "dinov2": ("dinov2", {}),
    "dinov2, gated": ("dinov2", {"use_swiglu_ffn": True}),
    "dinov2, registers": ("dinov2_with_registers", {"num_register_tokens": 3}),
    "dinov3": ("dinov3_vit", {"num_register_tokens": 4}),
    "dinov3, gated": ("dinov3_vit", {"use_gated_mlp": True, "hidden_act": "silu", "num_register_tokens": 0}),
    "dinov3, gated by GELU": ("dinov3_vit", {"use_gated_mlp": True, "key_bias": True, "proj_bias": False}),
}
every_kind = pytest.mark.parametrize("kind, settings", KINDS.values(), ids=KINDS)


def pictures(side):
    return torch.randn(4, 3, side, side, generator=torch.Generator().manual_seed(1))


def leading(model):
    return 1 + getattr(model.config, "num_register_tokens", 0)


def error(found, model, side):
    """Norm of the difference from the exact states."""
    exact = whole(copy.deepcopy(model).double(), pictures(side).double())[:, leading(model) :]
    return (found.double() - exact).norm() / exact.norm()


@every_kind
@pytest.mark.parametrize("side", [28, 42])
def test_states_are_those_of_transformers(tmp_path, kind, settings, side):
    """Of pictures of the size in config.json, and of another, to which positions are interpolated."""
    model = write_dino(tmp_path, kind, side=side, **settings)
    tower = open_tower(tmp_path, CPU, torch.float32)
    assert type(tower) is (Dinov3Tower if kind == "dinov3_vit" else Dinov2Tower)
    assert (tower.image_size, tower.patch_size, tower.num_patches) == (side, 14, (side // 14) ** 2)
    found, expected = tower.states(patches(pictures(side))), whole(model, pictures(side))[:, leading(model) :]
    assert found.shape == expected.shape == (4, (side // 14) ** 2, 32)
    assert cosine_similarity(found, expected, dim=-1).min() >= 0.99999
    assert error(found, model, side) <= 1.5 * error(expected, model, side) + 1e-6


@every_kind
def test_in_16_bits_the_error_is_hardly_larger_than_that_of_transformers(tmp_path, kind, settings):
    model = write_dino(tmp_path, kind, **settings)
    for dtype in (torch.bfloat16, torch.float16):
        found = open_tower(tmp_path, CPU, dtype).states(patches(pictures(28)).to(dtype))
        theirs = whole(copy.deepcopy(model).to(dtype), pictures(28).to(dtype))[:, leading(model) :]
        assert found.dtype == dtype and error(found, model, 28) <= 1.4 * error(theirs, model, 28)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dinov2_with_registers", "dinov3_vit"])
def test_by_the_kernels(tmp_path, monkeypatch, kind):
    """On a GPU, or interpreted."""
    model = write_dino(tmp_path, kind, num_register_tokens=2)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = open_tower(tmp_path, device, torch.float16).states(patches(pictures(28)).to(device, torch.float16))
    theirs = whole(copy.deepcopy(model).half(), pictures(28).half())[:, leading(model) :]
    assert error(found.cpu(), model, 28) <= 1.4 * error(theirs, model, 28)


@pytest.mark.parametrize("settings", [{}, {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}])
def test_features_are_those_of_transformers(tmp_path, settings):
    """Without preprocessor settings mean and deviation are ImageNet's."""
    model = write_dino(tmp_path, "dinov3_vit", preprocessor=settings)
    frames = np.random.default_rng(0).integers(0, 256, (5, 20, 24, 3), dtype=np.uint8)
    found = FeatureEncoder(tmp_path, device="cpu", dtype=torch.float32, batch_size=3, num_temporal=6).encode(frames)
    imagenet = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    mean, std = (torch.tensor((imagenet | settings)[name]).view(3, 1, 1) for name in imagenet)
    pixels = interpolate(torch.from_numpy(frames).permute(0, 3, 1, 2).float(), size=(28, 28)) / 255
    states = whole(model, ((pixels - mean) / std).half().float())[:, leading(model) :]
    expected = spatio_temporal_pool(states.half(), num_temporal=6)
    torch.testing.assert_close(found, expected, rtol=2**-8, atol=2**-8)


@pytest.mark.parametrize(
    "preprocessor, side",
    [
        ({"size": {"shortest_edge": 256}, "crop_size": {"height": 42, "width": 42}}, 42),
        ({"size": {"height": 56, "width": 56}, "crop_size": {"height": 42, "width": 42}, "do_center_crop": False}, 56),
        ({"size": {"shortest_edge": 56}}, 56),
        ({"size": 70, "do_center_crop": False}, 70),
        ({}, 28),
    ],
)
def test_pictures_have_the_size_that_preprocessing_makes(tmp_path, preprocessor, side):
    write_dino(tmp_path, "dinov2", preprocessor=preprocessor)
    encoder = FeatureEncoder(tmp_path, device="cpu", dtype=torch.float32)
    assert tower_sizes(tmp_path) == (side, 14, 32) == (encoder.image_size, encoder.patch_size, encoder.hidden_size)
    (tmp_path / "model").mkdir()
    assert tower_geometry(tmp_path / "model", str(tmp_path)) == (side, 14)


@pytest.mark.parametrize(
    "preprocessor, message",
    [
        ({"size": {"height": 28, "width": 42}}, "makes pictures of 28 × 42 pixels"),
        ({"size": {"height": 7, "width": 7}}, "makes pictures of 7 × 7 pixels, and its patches have 14"),
        ({"size": 10**9}, "makes pictures of 1000000000 × 1000000000 pixels"),
        ({"size": -28}, "makes pictures of -28 × -28"),
    ],
)
def test_pictures_of_no_possible_size_are_refused(tmp_path, preprocessor, message):
    write_dino(tmp_path, "dinov2", preprocessor=preprocessor)
    with pytest.raises(ValueError, match=message):
        FeatureEncoder(tmp_path, device="cpu")


def test_sizes_that_are_no_numbers_are_refused(tmp_path):
    write_dino(tmp_path, "dinov3_vit")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"patch_size": "14"}))
    with pytest.raises(ValueError, match="config.json has patch_size '14', which is no size; download it again"):
        tower_sizes(tmp_path)
    write_dino(tmp_path, "dinov3_vit")
    assert tower_sizes(tmp_path) == (28, 14, 32)


def test_names_on_the_hub_tell_how_many_rows_a_video_takes(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for name, sizes in (
        ("dinov2-base", (224, 14)),
        ("dinov2-with-registers-giant", (224, 14)),
        ("dinov3-vits16plus-pretrain-lvd1689m", (224, 16)),
        ("dinov3-vit7b16-pretrain-lvd1689m", (224, 16)),
    ):
        assert tower_geometry(tmp_path, f"facebook/{name}") == sizes


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dinov2", "dinov3_vit"])
def test_extraction(tmp_path, kind):
    write_dino(tmp_path / "tower", kind, preprocessor={"size": {"height": 42, "width": 42}})
    (tmp_path / "videos").mkdir()
    draw(tmp_path / "videos" / "a.mp4", 5)
    folders = ["--video_dir_path", str(tmp_path / "videos"), "--clip_feat_path", str(tmp_path / "features")]
    tower = ["--vision_tower", str(tmp_path / "tower"), "--num_frames", "4", "--device", "cpu", "--decode_workers", "1"]
    assert extract.main([*folders, *tower]) == 0
    features, header = load_features(tmp_path / "features" / "a.safetensors")
    assert features.shape == (4 + 9, 32) and (features.norm(dim=1) > 0).all()
    assert (header["image_size"], header["patch_size"]) == (42, 14)
