"""Names in a data set mean files of a feature folder, and no others."""

import hashlib
import json
import os
import pickle

import numpy as np
import pytest
import torch
from test_features import FEATURES, HEADER

from fastvid.features.file import load_features, save_features
from fastvid.features.folder import FeatureFolder, MissingFeatures

# FeatureFolder


@pytest.fixture
def folder(tmp_path):
    """inside/: features, a sub-folder, links of all kinds; outside/: what must not be reached."""
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    for path in ("inside/sub/deep", "outside"):
        (tmp_path / path).mkdir(parents=True)
    for name in (
        "a.pkl",
        "both.pkl",
        "both.safetensors",
        "new.safetensors",
        "cut.pkl",
        "one.2.safetensors",
        "two.1.safetensors",
        "two.2.safetensors",
        "sub/s.pkl",
        "sub/deep/d.safetensors",
        "notes.txt",
        "three.npy",
        "three.pt",
        "four.pt",
        "five.npz",
        "five.mp4",
    ):
        (inside / name).touch()
    (outside / "secret.pkl").touch()
    (inside / "directory.pkl").mkdir()
    (inside / "link_in.pkl").symlink_to("sub/s.pkl")
    (inside / "link_out.pkl").symlink_to(outside / "secret.pkl")
    (inside / "link_up.pkl").symlink_to("../outside/secret.pkl")
    (inside / "link_loop.pkl").symlink_to("link_loop.pkl")
    (inside / "link_broken.pkl").symlink_to("nothing")
    (inside / "folder_in").symlink_to("sub")
    (inside / "folder_out").symlink_to(outside)
    (inside / "sub" / "chain.pkl").symlink_to("../link_out.pkl")
    (tmp_path / "inside_too").mkdir()
    (tmp_path / "inside_too" / "x.pkl").touch()
    (inside / "folder_prefix").symlink_to(tmp_path / "inside_too")
    return inside


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("a.pkl", "a.pkl"),
        ("a", "a.pkl"),
        ("a.safetensors", "a.pkl"),
        ("a.mp4", "a.pkl"),
        ("./a.pkl", "a.pkl"),
        ("both.pkl", "both.pkl"),
        ("both.safetensors", "both.safetensors"),
        ("both", "both.safetensors"),
        ("new.pkl", "new.safetensors"),
        ("new.webm", "new.safetensors"),
        ("one.pkl", "one.2.safetensors"),
        ("one", "one.2.safetensors"),
        ("one.2", "one.2.safetensors"),
        ("two.1.pkl", "two.1.safetensors"),
        ("two.2", "two.2.safetensors"),
        ("cut.3.pkl", "cut.pkl"),
        ("cut.3.mp4", "cut.pkl"),
        ("sub/s.pkl", "sub/s.pkl"),
        ("sub//deep/./d.pkl", "sub/deep/d.safetensors"),
        ("three", "three.npy"),
        ("three.mp4", "three.npy"),
        ("three.pt", "three.pt"),
        ("four.pkl", "four.pt"),
        ("link_in.pkl", "link_in.pkl"),
        ("folder_in/s", "folder_in/s.pkl"),
        ("folder_in/deep/d", "folder_in/deep/d.safetensors"),
    ],
)
def test_names_that_mean_a_file(folder, name, file):
    assert FeatureFolder(folder).resolve(name) == folder / file


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "./.",
        "absent.pkl",
        "A.pkl",
        "absent/a.pkl",
        "a.pkl/a.pkl",
        "notes.txt",
        "notes",
        "sub",
        "sub/",
        "directory.pkl",
        "link_loop.pkl",
        "link_broken.pkl",
        "nul\0.pkl",
        "~/a.pkl",
        "\ud83c.pkl",
        "\ud83c/a.pkl",
        "five",
        "https://x.org/a.pkl",
        "one.3.pkl",
        "a.2/a.pkl",
        "new.3.pkl",
        "sub\\s.pkl",
        "*.pkl",
        "x" * 5000,
    ],
)
def test_names_that_mean_nothing(folder, name):
    with pytest.raises(MissingFeatures, match=r"has no features in .*fastvid extract.*filter_for_missing_videos"):
        FeatureFolder(folder).resolve(name)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        (
            "five.pkl",
            r"five\.npz lies there, but is not in a format that is read \(\.safetensors, \.pkl, \.npy, \.pt\)",
        ),
        ("five", "five.mp4 lies there, but is a video"),
        ("https://x.org/a.pkl", "is a URL"),
        ("link_broken.pkl", "link_broken.pkl lies there, but is a link that leads nowhere"),
        ("packed.mp4", "packed.pkl.gz lies there, but is packed with gzip: unpack it"),
        ("loud", "loud.PKL lies there, but is not read under this ending: name it loud.pkl"),
        ("older", "older.pth lies there, but is not read under this ending: name it older.pt"),
        ("sub\\s.pkl", "written with /"),
        ("absent", "--on_bad_sample skip"),
    ],
)
def test_what_lies_there_instead_is_told(folder, name, hint):
    for other in ("packed.pkl.gz", "loud.PKL", "older.pth"):
        (folder / other).write_bytes(b"x")
    with pytest.raises(MissingFeatures, match=hint):
        FeatureFolder(folder).resolve(name)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("/etc/passwd", "absolute"),
        ("//etc/passwd", "absolute"),
        ("../outside/secret.pkl", r'has "\.\."'),
        ("..", r'has "\.\."'),
        ("sub/../a.pkl", r'has "\.\."'),
        ("sub/../../outside/secret.pkl", r'has "\.\."'),
        ("link_out.pkl", "a link that leads out of"),
        ("link_out", "a link that leads out of"),
        ("link_up", "a link that leads out of"),
        ("folder_out/secret.pkl", "its folder folder_out is a link that leads out of"),
        ("sub/chain.pkl", "a link that leads out of"),
        ("folder_prefix/x.pkl", "its folder folder_prefix is a link that leads out of"),
    ],
)
def test_names_that_leave_the_folder(folder, name, reason):
    features = FeatureFolder(folder)
    for _ in range(2):  # the second time from the cache
        with pytest.raises(ValueError, match=reason) as error:
            features.resolve(name)
        assert repr(name) in str(error.value) and not isinstance(error.value, MissingFeatures)


def test_an_absolute_name_of_a_file_inside_is_refused_too(folder):
    with pytest.raises(ValueError, match="absolute; give it relative to"):
        FeatureFolder(folder).resolve(str(folder / "a.pkl"))


def test_the_folder_itself_may_be_a_link(folder):
    link = folder.parent / "link"
    link.symlink_to(folder)
    features = FeatureFolder(link)
    assert features.resolve("sub/s.pkl") == link / "sub/s.pkl"
    assert features.resolve("link_in.pkl") == link / "link_in.pkl"
    with pytest.raises(ValueError, match="leads out of"):
        features.resolve("folder_out/secret.pkl")


def test_a_cut_name_that_several_files_share(folder):
    with pytest.raises(ValueError, match=r"'two\.pkl' means any of two\.1, two\.2 in .*give the whole name"):
        FeatureFolder(folder).resolve("two.pkl")


@pytest.mark.parametrize("names", [("cut.1.pkl", "cut.2.pkl"), ("cut.1.pkl", "cut.pkl"), ("cut.pkl", "cut.1.pkl")])
def test_two_videos_are_not_read_from_one_cut_name(folder, names):
    features = FeatureFolder(folder)
    for _ in range(2):
        assert features.resolve(names[0]) == folder / "cut.pkl"
    with pytest.raises(ValueError, match=r"would both be read from .*cut\.pkl"):
        features.resolve(names[1])


def test_a_folder_that_is_none(folder):
    for path in (folder / "absent", folder / "a.pkl"):
        with pytest.raises(ValueError, match="is no folder; give the one that feature extraction wrote to"):
            FeatureFolder(path)


def test_each_folder_is_listed_once(folder, monkeypatch):
    listed, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: (listed.append(os.path.basename(path)), scandir(path))[1])
    features, once = FeatureFolder(folder), 0
    for _ in range(3):
        for name in ("a.pkl", "new", "sub/s.pkl", "sub/s"):
            features.resolve(name)
        for name in ("absent", "sub/absent"):
            with pytest.raises(MissingFeatures):
                features.resolve(name)
        once = once or len(listed)
    assert listed[:2] == ["inside", "sub"] and len(listed) == once


def test_load_reads_the_file_that_a_name_means(tmp_path):
    save_features(tmp_path / "v.safetensors", FEATURES, HEADER)
    loaded, header = FeatureFolder(tmp_path).load("v.pkl")
    assert torch.equal(loaded, FEATURES) and header == HEADER


def test_a_pickles_header_is_what_the_manifest_says_of_that_very_file(tmp_path):
    for name in ("a.pkl", "sub/b.pkl", "c.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        save_features(tmp_path / name, torch.ones(2, 3), {"tower": "own"})
    lines = [
        {
            "video": f"{name}.mp4",
            "file": f"{name}.pkl",
            "tower": "t",
            "sha256": hashlib.sha256((tmp_path / f"{name}.pkl").read_bytes()).hexdigest(),
        }
        for name in ("a", "sub/b")
    ]
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    folder = FeatureFolder(tmp_path)
    assert [folder.header(name)["tower"] for name in ("a", "sub/b.mp4", "c")] == ["t", "t", "own"]
    save_features(tmp_path / "a.pkl", torch.zeros(2, 3), {})
    assert folder.header("a") == {}
    assert FeatureFolder(tmp_path / "sub").header("b") == {}


def test_a_file_of_another_ending_is_named_by_its_content(tmp_path, recwarn):
    numbers = FEATURES.numpy()
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(numbers))
    np.save(tmp_path / "a.npy", numbers)
    np.savez(tmp_path / "a.npz", numbers)
    torch.save(FEATURES, tmp_path / "a.pt")
    torch.save(FEATURES, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    save_features(tmp_path / "a.safetensors", FEATURES, HEADER)
    for kept in sorted(tmp_path.iterdir()):
        for ending in {".pkl", ".npy", ".pt", ".safetensors"} - {kept.suffix}:
            path = tmp_path / f"b{ending}"
            path.write_bytes(kept.read_bytes())
            remedy = "store the" if kept.suffix == ".npz" else f"name it b{kept.suffix}"
            with pytest.raises(ValueError, match=rf"b{ending} holds what a {kept.suffix} file does; {remedy}"):
                load_features(path)
    assert not recwarn
