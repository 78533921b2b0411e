"""fastvid doctor: what it finds, and what it says of what it does not find."""

import json
from importlib import metadata
from types import SimpleNamespace

import av
import pytest
import torch

from fastvid import doctor
from fastvid.config import DoctorConfig

GIB = 2**30


def findings(path="."):
    return {finding.name: finding for finding in doctor.examine(DoctorConfig(path=[str(path)]))}


def test_versions_are_those_of_the_environment():
    found = findings()
    assert found["torch"].detail == torch.__version__
    for name in ("triton", "tensorboard", "matplotlib"):
        assert found[name].found and found[name].detail == metadata.version(name)


def test_an_absence_has_its_cost_and_a_presence_has_none(monkeypatch):
    def no_package(name):
        raise metadata.PackageNotFoundError(name)

    found = findings()
    assert all(bool(finding.cost) != finding.found for finding in found.values())
    monkeypatch.setattr(metadata, "version", no_package)
    lost = findings()
    for name in ("triton", "PyAV", "DALI", "bitsandbytes", "liger-kernel", "flash-attn 2", "tensorboard"):
        assert not lost[name].found and lost[name].cost
    assert "FFmpeg" not in lost, "decoders are PyAV's"


def test_decoders(monkeypatch):
    assert findings()["decoders"].found
    monkeypatch.setattr(av, "codecs_available", av.codecs_available - {"hevc"})
    decoders = findings()["decoders"]
    assert not decoders.found and decoders.cost == "videos in HEVC are refused"
    assert "HEVC" not in decoders.detail and "H.264" in decoders.detail


@pytest.mark.parametrize("capability, bf16, fp8", [((7, 5), False, False), ((8, 0), True, False), ((9, 0), True, True)])
def test_gpus(monkeypatch, capability, bf16, fp8):
    device = SimpleNamespace(name="Card", total_memory=80 * GIB, major=capability[0], minor=capability[1])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    found = findings()
    assert found["cuda:1"].detail == f"Card, 80 GiB, compute capability {capability[0]}.{capability[1]}"
    assert (found["bf16"].found, found["fp8"].found) == (bf16, fp8)
    assert "cuda" not in found and found["torch varlen"].found


def test_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "install torch's CUDA build" in findings()["cuda"].cost
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "check the driver" in findings()["cuda"].cost


def test_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=5 * GIB))
    assert findings(tmp_path)["disk"].detail == f"5 GiB free at {tmp_path.resolve()}"
    missing = findings(tmp_path / "none")["disk"]
    assert not missing.found and "does not exist" in missing.detail


def test_table_and_json(capsys):
    assert doctor.main([]) == 0
    table = capsys.readouterr().out
    assert "  + torch" in table and "\nattention\n" in table
    assert doctor.main(["--json"]) == 0
    records = json.loads(capsys.readouterr().out)
    assert [record["name"] for record in records if record["group"] == "video"][:2] == ["PyAV", "FFmpeg"]
    for record in records:
        assert record["name"] in table and record["cost"] in table
