"""A tower whose matrices are multiplied in FP8: how near its features are, and what says that they are others."""

import json
import shutil

import pytest
import torch
from clips import draw
from fastvid_kernels.quantize_fp8 import FP8_CAPABILITY, scaled_product
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import cosine_similarity, linear
from towers import write_siglip, write_tower

from fastvid import extract, validate
from fastvid.config import ExtractConfig
from fastvid.features.file import load_features, save_features
from fastvid.provenance import in_fp8, of_features, what_fp8_means
from fastvid.video.encoder import FeatureEncoder
from fastvid.video.towers import fidelity
from fastvid.video.towers.load import open_tower
from fastvid.video.towers.products import Fp8Product, check_fp8

CPU = torch.device("cpu")


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two towers and two clips."""
    folder = tmp_path_factory.mktemp("made")
    write_siglip(folder / "siglip", std=0.1)
    write_tower(folder / "clip")
    (folder / "videos").mkdir()
    for name, frames in (("a", 7), ("b", 3)):
        draw(folder / "videos" / f"{name}.mp4", frames)
    return folder


@pytest.fixture
def job(made, tmp_path):
    def make(**given):
        return ExtractConfig(
            str(made / "videos"),
            **{
                "clip_feat_path": str(tmp_path / "features"),
                "vision_tower": str(made / "siglip"),
                "num_frames": 5,
                "device": "cpu",
                "decode_workers": 1,
                **given,
            },
        )

    return make


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_product_is_near(dtype):
    x, weight, bias = random(50, 64).to(dtype), random(48, 64, seed=1).to(dtype), 8 * random(48, seed=2).to(dtype)
    weight[5] *= 1000  # each output channel has a scale of its own, and each row
    x[3] *= 1e-3
    found, exact = Fp8Product(weight, bias)(x), linear(x.double(), weight.double(), bias.double())
    assert found.dtype == dtype and found.shape == (50, 48)
    error = (found.double() - exact).norm(dim=0) / exact.norm(dim=0)
    assert 0.001 < error.max() < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("kind, shape", [("clip", (3, 4, 32)), ("siglip", (3, 4, 48))])
def test_states_are_near_and_others(made, kind, shape):
    rows = random(3, 4, 592)
    found, exact = (open_tower(made / kind, CPU, torch.float32, fp8=fp8).states(rows) for fp8 in (True, False))
    assert found.shape == exact.shape == shape and found.dtype == torch.float32
    assert 0.99 < cosine_similarity(found.flatten(1), exact.flatten(1)).min() < 0.999999


def test_images_do_not_see_each_other(made):
    tower, rows = open_tower(made / "siglip", CPU, torch.float32, fp8=True), random(3, 4, 592)
    before = tower.states(rows)
    rows[1] *= 100
    after = tower.states(rows)
    assert torch.equal(after[[0, 2]], before[[0, 2]]) and not torch.equal(after[1], before[1])


def test_on_a_gpu_torch_takes_the_bias_as_it_is():
    with FakeTensorMode():
        bits = [torch.empty(n, 64, dtype=torch.float8_e4m3fn, device="cuda") for n in (50, 48)]
        scales = [torch.empty(n, device="cuda") for n in (50, 48)]
        found = scaled_product(
            bits[0],
            scales[0],
            bits[1],
            scales[1],
            torch.float16,
            bias_M=torch.empty(48, dtype=torch.bfloat16, device="cuda"),
        )
    assert found.shape == (50, 48) and found.dtype == torch.float16


@pytest.mark.slow
def test_sizes_that_fp8_units_cannot_multiply_are_refused_until_the_flag_is_left_out(job, tmp_path):
    write_siglip(tmp_path / "odd", hidden_size=24, layers=2)
    with pytest.raises(ValueError, match="a matrix of the tower is 72 × 24, .* steps of 16; leave the flag out"):
        extract.extract(job(vision_tower=str(tmp_path / "odd"), tower_dtype="fp8"))
    assert extract.extract(job(vision_tower=str(tmp_path / "odd"))).extracted == 2


def test_a_gpu_without_fp8_units_is_refused(monkeypatch):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ValueError, match=r"--tower_dtype fp8: A100 \(compute capability 8.0\).*leave the flag out"):
        check_fp8(gpu)
    check_fp8(CPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: FP8_CAPABILITY)
    check_fp8(gpu)


@pytest.mark.slow
def test_the_header_and_the_summary_tell(job, made, tmp_path):
    summary = extract.extract(job(tower_dtype="fp8"))
    features, header = load_features(tmp_path / "features" / "a.safetensors")
    assert summary.extracted == 2 and header["tower_dtype"] == "fp8" and header["dtype"] != "fp8"
    (line,) = [note for note in summary.notes if "cosine" in note]
    assert extract.extract(job(tower_dtype="fp8", clip_feat_path=str(tmp_path / "again"))).notes == [line]
    assert extract.extract(job(clip_feat_path=str(tmp_path / "exact"))).notes == []
    name = line.split("features of ")[1].split(" ")[0]
    features, exact = (
        load_features(tmp_path / folder / name.replace("mp4", "safetensors"))[0].float()
        for folder in ("features", "exact")
    )
    filled = exact.norm(dim=1) > 0
    cosine = cosine_similarity(features[filled], exact[filled], dim=1)
    assert f"a cosine of {cosine.mean():.5f} " in line and f"{cosine.min():.5f} at least" in line
    assert 0.99 < cosine.min() < 0.999999 and line in str(summary)
    assert load_features(tmp_path / "exact" / "a.safetensors")[1]["tower_dtype"] == "auto"


@pytest.mark.slow
def test_a_gpu_without_memory_for_the_comparison_costs_no_video(job, monkeypatch):
    def full(self, *given, fp8=False, **options):
        if not fp8:
            raise torch.OutOfMemoryError("no room")
        made(self, *given, fp8=fp8, **options)

    made = FeatureEncoder.__init__
    monkeypatch.setattr(fidelity.torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(FeatureEncoder, "__init__", full)
    summary = extract.extract(job(tower_dtype="fp8"))
    assert summary.extracted == 2 and ["no memory to compare" in note for note in summary.notes] == [True]


@pytest.mark.slow
def test_features_of_both_are_not_mixed_in_a_folder(job, tmp_path):
    extract.extract(job())
    before = (tmp_path / "features" / "a.safetensors").read_bytes()
    with pytest.raises(ValueError, match="other settings .*tower_dtype auto, not fp8"):
        extract.extract(job(tower_dtype="fp8"))
    assert (tmp_path / "features" / "a.safetensors").read_bytes() == before
    assert extract.extract(job(tower_dtype="fp8", overwrite=True)).extracted == 2
    with pytest.raises(ValueError, match="other settings .*tower_dtype fp8, not auto"):
        extract.extract(job())


@pytest.mark.slow
def test_features_of_before_there_was_fp8_are_of_none(job, tmp_path):
    extract.extract(job())
    for file in (tmp_path / "features").glob("*.safetensors"):
        features, header = load_features(file)
        del header["tower_dtype"]
        save_features(file, features, header)
    (tmp_path / "features" / "manifest.jsonl").unlink()
    assert extract.extract(job()).skipped == 2
    with pytest.raises(ValueError, match="tower_dtype auto, not fp8"):
        extract.extract(job(tower_dtype="fp8"))


@pytest.mark.slow
def test_the_reference_knows_no_fp8(job):
    with pytest.raises(ValueError, match="--tower_dtype fp8 rounds more than the reference.*leave one of the two out"):
        extract.extract(job(tower_dtype="fp8", parity="reference"))
    assert extract.extract(job(parity="reference")).extracted == 2
    assert extract.extract(job(tower_dtype="fp8", overwrite=True)).extracted == 2


@pytest.mark.slow
def test_a_training_set_of_both_is_told_and_made_alike(job, tmp_path, capsys):
    """What the warning tells to do ends it."""
    extract.extract(job())
    extract.extract(job(tower_dtype="fp8", clip_feat_path=str(tmp_path / "fp8")))
    shutil.copy(tmp_path / "fp8" / "b.safetensors", tmp_path / "features")
    turns = [{"from": "human", "value": "<video>\nwhy?"}, {"from": "gpt", "value": "so"}]
    records = [{"id": name, "video": f"{name}.pkl", "conversations": turns} for name in "ab"]
    (tmp_path / "train.json").write_text(json.dumps(records))

    def told():
        code = validate.main(
            ["--data_path", str(tmp_path / "train.json"), "--video_folder", str(tmp_path / "features")]
        )
        headers = [load_features(tmp_path / "features" / f"{name}.safetensors")[1] for name in "ab"]
        return code, capsys.readouterr().out, headers

    code, out, headers = told()
    assert code == 0 and "1 features are of a tower in FP8, 1 are not" in out
    assert what_fp8_means(in_fp8(headers)) in out
    assert of_features([(9, header) for header in headers])[0].tower_dtype == "auto; fp8"
    assert extract.extract(job(overwrite=True)).extracted == 1
    code, out, headers = told()
    assert code == 0 and "FP8" not in out and what_fp8_means(in_fp8(headers)) is None
    assert of_features([(9, header) for header in headers])[0].tower_dtype is None
