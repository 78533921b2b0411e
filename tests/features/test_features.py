"""Feature files: what is written, read and refused, of ours and of other programs."""

import json
import os
import pickle
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvid.features import file as features
from fastvid.features.file import load_features, probe_features, save_features
from fastvid.features.folder import FeatureFolder

FEATURES = torch.arange(15.0).reshape(5, 3) / 7
HEADER = {"tower": "clip é 🍳", "frames": [0, 3, 3], "nested": {"size": 336, "name\ud83c": None}}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_safetensors_round_trip(tmp_path, dtype):
    path = tmp_path / "v.safetensors"
    save_features(path, FEATURES.to(dtype), HEADER)
    loaded, header = load_features(str(path))
    assert loaded.dtype == dtype and torch.equal(loaded, FEATURES.to(dtype))
    assert header == HEADER
    assert probe_features(path) == (5, 3, dtype)
    assert os.listdir(tmp_path) == ["v.safetensors"]


def test_the_safetensors_library_reads_what_is_written_and_the_reverse(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    save_features(tmp_path / "a.safetensors", FEATURES, HEADER)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.keys() == ["features"] and torch.equal(file.get_tensor("features"), FEATURES)
        assert json.loads(file.metadata()["header"]) == HEADER
    save_file({"features": FEATURES.half()}, tmp_path / "b.safetensors")
    loaded, header = load_features(tmp_path / "b.safetensors")
    assert torch.equal(loaded, FEATURES.half()) and header == {}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_pickles_are_float16_arrays_as_the_reference_writes_them(tmp_path, dtype):
    save_features(tmp_path / "v.pkl", FEATURES.to(dtype), HEADER)
    with open(tmp_path / "v.pkl", "rb") as file:
        array = pickle.load(file)
    assert type(array) is np.ndarray and array.dtype == np.float16
    assert torch.equal(torch.from_numpy(array), FEATURES.to(dtype).half())
    loaded, header = load_features(tmp_path / "v.pkl")
    assert loaded.dtype == torch.float16 and torch.equal(loaded, FEATURES.to(dtype).half())
    assert header == {}
    assert probe_features(tmp_path / "v.pkl") == (5, 3, torch.float16)


def test_the_references_files(tiny):
    for variant, rows in (("336", 676), ("224", 356)):
        folder = FeatureFolder(tiny / f"data{variant}" / "feats")
        for i in range(10):
            loaded, _ = folder.load(f"vid{i}.pkl")
            with open(folder.folder / f"vid{i}.pkl", "rb") as file:
                assert torch.equal(loaded, torch.from_numpy(pickle.load(file)))
            assert loaded.shape == (rows, 32)


def test_strided_features_and_those_with_a_gradient(tmp_path):
    for name in ("a.safetensors", "a.pkl"):
        wide = torch.arange(12.0, dtype=torch.float16).reshape(3, 4).requires_grad_()
        save_features(tmp_path / name, wide.T[::2], {})
        assert torch.equal(load_features(tmp_path / name)[0], wide.detach().T[::2])


def test_loaded_features_are_not_tied_to_the_file(tmp_path):
    path = tmp_path / "v.safetensors"
    save_features(path, FEATURES, {})
    loaded, _ = load_features(path)
    path.write_bytes(b"")  # of a mapped file, reading the values would now kill the process
    assert torch.equal(loaded, FEATURES)


@pytest.mark.parametrize("name", ["v.safetensors", "v.pkl"])
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, name):
    save_features(tmp_path / name, FEATURES.half(), {})
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_features(tmp_path / name, 2 * FEATURES.half(), {})
    assert torch.equal(load_features(tmp_path / name)[0], FEATURES.half())
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("name", ["v.npz", "v", "v.safetensors.tmp"])
def test_other_endings_are_refused(tmp_path, name):
    (tmp_path / name).touch()
    for action in (load_features, probe_features):
        with pytest.raises(ValueError, match=r"a feature file ends in \.safetensors, \.pkl, \.npy or \.pt"):
            action(tmp_path / name)
    for path in (tmp_path / name, tmp_path / "v.npy"):
        with pytest.raises(ValueError, match=r"a feature file ends in \.safetensors or \.pkl"):
            save_features(path, FEATURES, {})


@pytest.mark.parametrize("tensor", [FEATURES[0], FEATURES[None], FEATURES[:0], FEATURES.double(), FEATURES.int()])
def test_what_are_no_features_is_not_written(tmp_path, tensor):
    with pytest.raises(ValueError, match=r"v\.pkl: features must be \[R, C\] in float16"):
        save_features(tmp_path / "v.pkl", tensor, {})
    assert os.listdir(tmp_path) == []


def _safetensors(header, values=b""):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + values


def _entry(shape, dtype="F16", size=12):
    return {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x10\0\0", "cut short"),
        (struct.pack("<Q", 2**62) + b"{}", "cut short"),
        (_safetensors(b"{" + b" " * 40), "header is damaged"),
        (_safetensors(b"[" * 100_000), "header is damaged"),
        (_safetensors([1]), "header is damaged"),
        (_safetensors({"other": _entry([2, 3])}, bytes(12)), 'has no "features"'),
        (_safetensors({"features": 3}), "header is damaged"),
        (_safetensors({"features": _entry([2, 3]), "__metadata__": {"header": "{"}}, bytes(12)), "header is damaged"),
        (_safetensors({"features": _entry([2, 3])}, bytes(11)), "holds 11 bytes of values instead of 12"),
        (_safetensors({"features": _entry([2, 3])}, bytes(13)), "holds 13 bytes of values instead of 12"),
        (_safetensors({"features": _entry([2, 3]), "more": _entry([2, 3])}, bytes(12)), "holds 12 bytes"),
        (_safetensors({"features": _entry([2**40, 2**40])}, bytes(12)), "holds 12 bytes"),
        (_safetensors({"features": _entry([-2, -3])}, bytes(12)), r"must be \[R, C\]"),
        (_safetensors({"features": _entry([0, 3])}), r"must be \[R, C\]"),
        (_safetensors({"features": _entry([6])}, bytes(12)), r"must be \[R, C\]"),
        (_safetensors({"features": _entry(["2", 3])}, bytes(12)), r"must be \[R, C\]"),
        (_safetensors({"features": _entry([2, 3], "I16")}, bytes(12)), r"must be \[R, C\] .* not \[2, 3\] in I16"),
        (_safetensors({"features": _entry([2, 3], ["F16"])}, bytes(12)), r"must be \[R, C\]"),
    ],
)
def test_damaged_safetensors_are_named_with_the_remedy(tmp_path, content, message):
    path = tmp_path / "v.safetensors"
    path.write_bytes(content)
    for read in (load_features, probe_features):
        with pytest.raises(ValueError, match=rf"v\.safetensors.*{message}.*fastvid extract"):
            read(path)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damaged_safetensors_give_features_or_a_value_error(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "v.safetensors"
    damaged = bytearray(_safetensors({"features": _entry([2, 3]), "__metadata__": {"header": "{}"}}, bytes(12)))
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged[: data.draw(st.integers(0, 2 * len(damaged)))])
    try:
        loaded, _ = load_features(path)
    except ValueError as error:
        assert "v.safetensors" in str(error)
    else:
        assert loaded.dim() == 2 and loaded.is_floating_point()


def test_a_damaged_file_is_told_as_what_it_is_whatever_its_headers_length(tmp_path):
    """Lengths that begin with 0x80, as pickles do, among them."""
    path, told = tmp_path / "v.safetensors", set()
    for more in range(0, 600, 8):
        save_features(path, FEATURES, {"note": "x" * (1000 + more)})
        content = path.read_bytes()
        told.add(content[:1])
        path.write_bytes(content[:-4])
        with pytest.raises(ValueError, match=r"v.safetensors: .* remove it and extract it again"):
            probe_features(path)
    assert b"\x80" in told


def test_malicious_pickles_are_named_and_not_executed(tmp_path):
    canary = tmp_path / "canary"
    (tmp_path / "v.pkl").write_bytes(f"cos\nsystem\n(S'touch {canary}'\ntR.".encode())
    for read in (load_features, probe_features, lambda path: FeatureFolder(path.parent).load(path.name)):
        with pytest.raises(ValueError, match=r"v\.pkl: the pickle names os\.system.*refused; .*fastvid extract"):
            read(tmp_path / "v.pkl")
    assert not canary.exists()


def test_a_file_that_shrinks_while_it_is_read(tmp_path, monkeypatch):
    path = tmp_path / "v.safetensors"
    save_features(path, FEATURES, {})
    read_header = features._read_header

    def read_and_cut(file):
        result = read_header(file)
        os.truncate(path, path.stat().st_size - 4)
        return result

    monkeypatch.setattr(features, "_read_header", read_and_cut)
    with pytest.raises(ValueError, match="cut short while it was read"):
        load_features(path)


# What other programs write, and what is no feature file


def _write(path, values):
    if path.suffix == ".npy":
        np.save(path, values.numpy())
    elif path.suffix == ".pt":
        torch.save(values, path)
    elif path.suffix == ".pkl":
        path.write_bytes(pickle.dumps(values.numpy()))
    else:
        from safetensors.torch import save_file

        save_file({"features": values}, path)
    return path


@pytest.mark.parametrize("suffix", [".npy", ".pt", ".pkl", ".safetensors"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_arrays_of_other_programs_are_read_and_float64_is_rounded(tmp_path, suffix, dtype):
    path = _write(tmp_path / f"v{suffix}", FEATURES.to(dtype))
    loaded, header = load_features(path)
    assert loaded.dtype == (torch.float32 if dtype == torch.float64 else dtype) and header == {}
    assert torch.equal(loaded, FEATURES.to(dtype).to(loaded.dtype)) and loaded.is_contiguous()
    assert probe_features(path) == (5, 3, dtype)
    assert FeatureFolder(tmp_path).dtype("v") == dtype and FeatureFolder(tmp_path).shape("v") == (5, 3)


def test_other_layouts_of_npy_and_pt(tmp_path):
    np.save(tmp_path / "v.npy", np.asfortranarray(FEATURES.numpy().astype(">f4")))
    assert torch.equal(load_features(tmp_path / "v.npy")[0], FEATURES)
    with open(tmp_path / "w.npy", "wb") as file:
        np.lib.format.write_array(file, FEATURES.numpy(), version=(2, 0))
    assert torch.equal(load_features(tmp_path / "w.npy")[0], FEATURES)
    torch.save(torch.nn.Parameter(FEATURES.bfloat16().T), tmp_path / "v.pt")
    loaded, _ = load_features(tmp_path / "v.pt")
    assert torch.equal(loaded, FEATURES.bfloat16().T) and type(loaded) is torch.Tensor and not loaded.requires_grad
    torch.save(FEATURES, tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(load_features(tmp_path / "w.pt")[0], FEATURES)
    assert probe_features(tmp_path / "w.pt") == (5, 3, torch.float32)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"features": FEATURES}, "holds a dict, not a plain tensor"),
        ([FEATURES], "holds a list"),
        (FEATURES[None], r"holds \[1, 5, 3\] in float32"),
        (FEATURES.int(), "in int32"),
        (FEATURES.to_sparse(), "not a plain tensor"),
        (FEATURES[:1, :1].expand(4000, 4000), "fewer values than its shape"),
        (os.system, "asks for more than a tensor; refused"),
    ],
)
def test_other_contents_of_pt_are_refused_with_what_to_store(tmp_path, value, message):
    torch.save(value, tmp_path / "v.pt")
    for read in (load_features, probe_features):
        with pytest.raises(ValueError, match=rf"v\.pt: .*{message}.*fastvid extract"):
            read(tmp_path / "v.pt")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.ones((2, 3), np.int8), "dtype is int8"),
        (np.ones(3, np.float16), r"shape is \[3\]"),
        (np.ones((0, 3), np.float16), r"shape is \[0, 3\]"),
        (np.array([["a"]], object), "dtype is object"),
    ],
)
def test_other_contents_of_npy_are_refused(tmp_path, array, message):
    np.save(tmp_path / "v.npy", array, allow_pickle=True)
    for read in (load_features, probe_features):
        with pytest.raises(ValueError, match=rf"v\.npy: .*{message}.*store the .rows, channels. array itself"):
            read(tmp_path / "v.npy")


@pytest.mark.parametrize("name", ["v.npy", "v.pt"])
def test_damaged_npy_and_pt_are_named(tmp_path, name):
    whole = _write(tmp_path / name, FEATURES).read_bytes()
    for size in (3, 60, len(whole) - 1):
        (tmp_path / name).write_bytes(whole[:size])
        for read in (load_features, probe_features):
            with pytest.raises(ValueError, match=rf"{name}: .*fastvid extract"):
                read(tmp_path / name)


@pytest.mark.parametrize("suffix", features.SUFFIXES)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "is a git-lfs pointer"),
        (b"\x1f\x8b\x08\0more", "is packed with gzip"),
        (b"<html></html>", "is a web page"),
    ],
)
def test_what_is_no_feature_file_is_called_by_name(tmp_path, suffix, content, message):
    (tmp_path / f"v{suffix}").write_bytes(content)
    for read in (load_features, probe_features):
        with pytest.raises(ValueError, match=rf"v{suffix} {message}"):
            read(tmp_path / f"v{suffix}")


def test_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "v.pkl")
    with pytest.raises(ValueError, match=r"v\.pkl is no regular file"):
        load_features(tmp_path / "v.pkl")


@pytest.mark.parametrize("suffix", features.SUFFIXES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_named_with_file_row_and_remedy(tmp_path, suffix, value):
    bad = FEATURES.half()
    bad[3, 1] = value
    path = _write(tmp_path / f"v{suffix}", bad)
    assert probe_features(path) == (5, 3, torch.float16)
    with pytest.raises(ValueError, match=rf"v{suffix} holds NaN or infinity, first in row 3 .*fastvid extract"):
        load_features(path)
