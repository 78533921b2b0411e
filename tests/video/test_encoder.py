"""Features against transformers' own forward pass and against the reference's recordings."""

import importlib
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from fastvid_kernels import spatio_temporal_pool
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import interpolate
from towers import write_tower

from fastvid.video import restarts
from fastvid.video.decode import decode
from fastvid.video.encoder import FeatureEncoder, make_current, open_device
from fastvid.video.sampling import frame_indices

CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    return write_tower(tmp_path_factory.mktemp("towers") / "tower")


def _frames(count, height=20, width=30, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


@torch.no_grad()
def _direct(folder, frames, num_temporal, mean=CLIP_MEAN, std=CLIP_STD):
    """hidden_states[-2] of transformers' forward pass on pixels made as the reference makes them."""
    from transformers import CLIPVisionModel

    model = CLIPVisionModel.from_pretrained(folder).eval()
    size = model.config.image_size
    pixels = interpolate(torch.from_numpy(frames).permute(0, 3, 1, 2).float(), size=(size, size))
    mean, std = torch.tensor(mean)[:, None, None], torch.tensor(std)[:, None, None]
    pixels = (((pixels.double() / 255).float() - mean) / std).half().float()
    states = model(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    return spatio_temporal_pool(states.half(), num_temporal=num_temporal)


@pytest.mark.parametrize(
    "shape", [{}, {"image_size": 32, "patch_size": 7}, {"image_size": 48, "patch_size": 16}, {"layers": 1}]
)
def test_equals_transformers(tmp_path, shape):
    folder = write_tower(tmp_path / "tower", **shape)
    encoder = FeatureEncoder(folder, device="cpu", dtype=torch.float32, batch_size=4, num_temporal=12)
    features = encoder.encode(_frames(9))
    grid = shape.get("image_size", 28) // shape.get("patch_size", 14)
    assert encoder.num_patches == grid**2 and encoder.hidden_size == 32
    assert (encoder.image_size, encoder.patch_size) == (shape.get("image_size", 28), shape.get("patch_size", 14))
    assert features.dtype == torch.float16 and features.shape == (12 + grid**2, 32)
    assert (features[9:12] == 0).all()
    expected = _direct(folder, _frames(9), 12)
    assert torch.allclose(features.float(), expected.float(), rtol=2**-10, atol=2**-12)


def test_features_do_not_depend_on_neighbours(tower):
    encoder = FeatureEncoder(tower, device="cpu", dtype=torch.float32, batch_size=8, num_temporal=20)
    long, frames = encoder.encode(_frames(20)), _frames(20)
    for count in (1, 3, 7, 13, 19):
        assert torch.equal(encoder.encode(frames[:count])[:count], long[:count])
    frames[5] = 0
    changed = encoder.encode(frames)
    assert torch.equal(changed[:5], long[:5]) and torch.equal(changed[6:20], long[6:20])
    assert not torch.equal(changed[5], long[5])


@pytest.mark.slow
def test_passes_are_evened_out(tower):
    sizes = {(100, 32): 25, (100, 100): 100, (100, 1): 1, (7, 32): 7, (64, 32): 32, (65, 32): 22}
    for (num_temporal, batch_size), expected in sizes.items():
        encoder = FeatureEncoder(tower, device="cpu", batch_size=batch_size, num_temporal=num_temporal)
        assert encoder.batch_size == expected


def test_arrays_and_tensors(tower):
    encoder = FeatureEncoder(tower, device="cpu", num_temporal=4)
    assert torch.equal(encoder.encode(_frames(3)), encoder.encode(torch.from_numpy(_frames(3))))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_tower_gives_float16_features(tower, dtype):
    features = FeatureEncoder(tower, device="cpu", dtype=dtype, num_temporal=6).encode(_frames(6))
    expected = _direct(tower, _frames(6), 6).float()
    assert features.dtype == torch.float16
    assert torch.nn.functional.cosine_similarity(features.float(), expected).min() > 0.999


def test_pixel_statistics_of_the_tower(tmp_path):
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
    folder = write_tower(tmp_path / "tower", mean=mean, std=std)
    features = FeatureEncoder(folder, device="cpu", dtype=torch.float32, num_temporal=4).encode(_frames(4))
    assert torch.allclose(features.float(), _direct(folder, _frames(4), 4, mean, std).float(), rtol=2**-10, atol=2**-12)


def test_whole_clip_model(tmp_path, capfd):
    from transformers import CLIPConfig, CLIPModel

    parts = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    CLIPModel(
        CLIPConfig(
            text_config={**parts, "vocab_size": 99},
            projection_dim=8,
            vision_config={**parts, "image_size": 28, "patch_size": 14},
        )
    ).save_pretrained(tmp_path)
    capfd.readouterr()
    features = FeatureEncoder(str(tmp_path), device="cpu", dtype=torch.float32, num_temporal=3).encode(_frames(3))
    assert torch.allclose(features.float(), _direct(tmp_path, _frames(3), 3).float(), rtol=2**-10, atol=2**-12)


@pytest.mark.slow
def test_revision_names_the_weights(tmp_path):
    a, b = write_tower(tmp_path / "a"), write_tower(tmp_path / "b")
    other = write_tower(tmp_path / "c", seed=1)
    revisions = [FeatureEncoder(folder, device="cpu").revision for folder in (a, b, other)]
    assert revisions[0] == revisions[1] != revisions[2]
    assert revisions[0].startswith("sha256:")


@pytest.mark.slow
def test_a_tower_of_the_hub(tower, tmp_path):
    """Loaded by its id from the hub's cache, without a network."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "models--some--tower"
    shutil.copytree(tower, cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    code = (
        "from fastvid.video.encoder import FeatureEncoder; encoder = FeatureEncoder('some/tower', device='cpu')\n"
        "print(encoder.revision, encoder.image_size)"
    )
    environment = {
        **os.environ,
        "HF_HUB_CACHE": str(tmp_path),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == [commit, "28"], done.stderr


@pytest.mark.parametrize("frames", [_frames(0), _frames(5)])
def test_number_of_frames(tower, frames):
    with pytest.raises(ValueError, match="1 to 4 frames"):
        FeatureEncoder(tower, device="cpu", num_temporal=4).encode(frames)


@pytest.mark.parametrize("settings", [{"batch_size": 0}, {"num_temporal": 0}])
def test_settings(tower, settings):
    with pytest.raises(ValueError, match="at least 1"):
        FeatureEncoder(tower, device="cpu", **settings)


def test_a_missing_tower_says_how_to_get_it(tmp_path):
    with pytest.raises(ValueError, match="hf download openai/clip-vit-large-patch14-336"):
        FeatureEncoder(str(tmp_path / "nowhere"))


def test_an_address_or_a_file_is_no_tower(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"x")
    for tower, what in ((tmp_path / "model.safetensors", "a file"), ("https://huggingface.co/a/b", "a URL")):
        with pytest.raises(ValueError, match=f"--vision_tower {tower} is {what}; give the tower's folder"):
            FeatureEncoder(str(tower), device="cpu")


def test_the_hub_id_is_in_the_command(monkeypatch):
    from transformers import PretrainedConfig

    def fail(*args, **kwargs):
        raise OSError("We couldn't connect\nmore")

    monkeypatch.setattr(PretrainedConfig, "get_config_dict", fail)
    with pytest.raises(ValueError, match=r"couldn't connect\); .*hf download some/tower "):
        FeatureEncoder("some/tower")


def test_another_model_is_no_tower(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(
        LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9)
    ).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not a CLIP, SigLIP, DINOv2 or DINOv3 vision tower .model_type llama"):
        FeatureEncoder(tmp_path)


def _check(features, expected):
    features, expected = features.double().numpy(), expected.astype(np.float64)
    lengths = np.linalg.norm(features, axis=1), np.linalg.norm(expected, axis=1)
    empty = lengths[1] == 0
    assert (features[empty] == 0).all()
    cosine = (features * expected).sum(1)[~empty] / (lengths[0] * lengths[1])[~empty]
    assert cosine.min() >= 0.999999
    assert np.abs(features - expected).max() <= 0.004


@pytest.mark.slow
@pytest.mark.parametrize("size", ["336", "224"])
def test_recordings(golden, recipe, tiny, size):
    encoder = FeatureEncoder(tiny / f"clip{size}", device="cpu", dtype=torch.float32)
    drawn = np.load(golden / "features.npz")
    real = np.load(golden / "features_real.npz")
    for name in ("noise7", "noise130"):
        frames = recipe.clip_video(name)
        _check(encoder.encode(frames[frame_indices(len(frames))]), drawn[f"{size}/{name}.pkl"])
    names = [name for name in real if name.startswith(size)]
    assert len(names) > 1
    for i, name in enumerate(names):  # resized while decoding, and by the encoder
        path = golden / "videos" / f"{name[4:].removesuffix('.pkl')}.mp4"
        frames, _ = decode(path, size=None if i % 2 else encoder.image_size)
        _check(encoder.encode(frames), real[name])


@pytest.mark.parametrize("name", ["gpu", "cuda:99"])
def test_devices_that_are_not_there_are_named(tower, name):
    with pytest.raises(ValueError, match=f"--device {name} cannot be used"):
        FeatureEncoder(tower, device=name)


def test_opening_a_gpu_leaves_the_current_one_alone(monkeypatch):
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    with FakeTensorMode():
        assert open_device("cuda:1") == torch.device("cuda:1") and current == []
    for name in ("cuda:1", "cpu"):
        make_current(torch.device(name))
    assert current == [torch.device("cuda:1")]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_towers_file_that_is_not_the_file(tmp_path, name):
    write_tower(tmp_path / "tower", layers=1)
    (tmp_path / "tower" / name).write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match=f"{name} is a git-lfs pointer"):
        FeatureEncoder(tmp_path / "tower", device="cpu")


@pytest.mark.parametrize("command", ["chat", "extract"])
def test_a_command_makes_its_gpu_the_current_one(tmp_path, monkeypatch, command):
    """Before the library is called, and from --device."""
    (tmp_path / "a.mp4").write_bytes(b"a video")
    current, module = [], importlib.import_module(f"fastvid.{command}")
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(module, "open_device", torch.device)
    monkeypatch.setattr(restarts, "may_crash", lambda config: False)  # in this very process

    def begins(config, *_):
        current.append(config.device)
        raise ValueError("begins")

    monkeypatch.setattr(module, {"chat": "Chat", "extract": "extract"}[command], begins)
    flags = {
        "chat": ["--model_name_or_path", "m", "--video", str(tmp_path / "a.mp4"), "--question", "why?"],
        "extract": ["--video_dir_path", str(tmp_path), "--clip_feat_path", str(tmp_path)],
    }[command]
    with pytest.raises(ValueError, match="begins"):
        module.main([*flags, "--device", "cuda:1"])
    assert current == [torch.device("cuda:1"), "cuda:1"]
