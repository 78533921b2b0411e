"""What weights and feature files tell of their origin, read, compared and summed up, without a model."""

import json
import zipfile
from dataclasses import replace

import pytest
import torch
from test_provenance import DALI, DIGEST, NVDEC, OTHER, PYAV

from fastvid import provenance
from fastvid.checkpoints import checkpoint
from fastvid.config.pooling import RECIPE
from fastvid.provenance import Provenance, agreed, decoders_of, of_features, of_weights, same_tower, what_decoders_mean
from fastvid.weights.projector_file import save_tensors

SOME = Provenance('some/tower é\n\x7f"', DIGEST, 16, 32, "vicuna_v1_1", "video_first", True, pooling="grid:2x4x4")


def test_what_all_headers_agree_about():
    one = {"tower": "t", "tower_revision": DIGEST, "num_frames": 16}
    found, towers = of_features([(32, one), (32, one | {"tower": "spelt/otherwise"}), (32, {})])
    recipe = Provenance(pooling="temporal+spatial")  # of headers that are older than the flag
    assert found == replace(recipe, tower="t", tower_revision=DIGEST, num_frames=16, rows=32)
    assert towers == {("t", DIGEST): 2}
    found, towers = of_features([(32, one), (48, one | {"num_frames": 32}), (32, {"source": "x"})])
    pairs = "temporal+spatial of 16 frames; temporal+spatial of 32 frames"
    assert found == replace(recipe, tower="t", tower_revision=DIGEST, pairs=pairs) and towers == {("t", DIGEST): 2}
    without_frames = {"tower": "t", "tower_revision": DIGEST}
    assert of_features([(32, one), (48, one | {"num_frames": 32}), (32, without_frames)])[0].pairs is None
    found, towers = of_features([(32, one), (32, one | {"tower_revision": OTHER})])
    assert found == replace(recipe, num_frames=16, rows=32) and len(towers) == 2
    found, _ = of_features([(32, one | {"pooling": "grid:2x4x4"}), (16, one | {"pooling": "spatial", "image": {}})])
    assert found.pooling == "grid:2x4x4"  # an image tells nothing of videos
    image = one | {"num_frames": 100, "pooling": "spatial", "image": {}}
    found, towers = of_features([(32, one | {"pooling": "grid:2x4x4"}), (16, image)])
    assert (found.pooling, found.num_frames, found.rows) == ("grid:2x4x4", 16, None) and towers == {("t", DIGEST): 2}
    assert Provenance.of_header(image).num_frames is None
    assert of_features([(16, image)])[0] == Provenance(tower="t", tower_revision=DIGEST, rows=16)
    found, _ = of_features([(32, one | {"pooling": "grid:2x4x4"}), (32, one)])
    assert found.pooling == "grid:2x4x4; temporal+spatial"
    assert of_features([]) == (Provenance(), {})


@pytest.mark.parametrize(
    "recorded, found, same",
    [
        (DIGEST, (DIGEST,), True),
        (DIGEST, (OTHER,), False),
        (DIGEST, (OTHER, "c" * 40), False),
        (None, (DIGEST,), None),
        ("c" * 40, (DIGEST, "c" * 40), True),
        ("c" * 40, (DIGEST,), None),
        (DIGEST, ("c" * 40, OTHER), None),
        (DIGEST, ("c" * 40, DIGEST), True),
        ("d" * 40, ("c" * 40, DIGEST), False),
    ],
)
def test_a_tower_is_known_by_its_content(recorded, found, same):
    assert same_tower(recorded, found) is same


def test_a_flag_and_what_is_known():
    assert agreed("--x", None, None, 3, "w") == 3 and agreed("--x", None, 4, 3, "w") == 4
    assert agreed("--x", 4, 4, 3, "w") == 4 and agreed("--x", 5, None, 3, "w") == 5
    assert agreed("--x", False, None, True, "w") is False
    with pytest.raises(ValueError, match="--x 5: w was trained with 4"):
        agreed("--x", 5, 4, 3, "w")


@pytest.mark.parametrize("ending", ["bin", "safetensors"])
def test_a_projector_file_keeps_it_beside_its_tensors(tmp_path, ending):
    tensors = {"a": torch.randn(300, 40), "b": torch.randn(3)}
    paths = [tmp_path / f"{name}.{ending}" for name in ("with", "again/with", "without")]
    for path, held in zip(paths, (SOME, SOME, None)):
        save_tensors(path, tensors, held)
    assert of_weights(paths[0]) == SOME and of_weights(paths[2]) == Provenance()
    assert paths[0].read_bytes() == paths[1].read_bytes()
    for mapped in (True, False) if ending == "bin" else ():
        loaded = torch.load(paths[0], weights_only=True, mmap=mapped)
        assert loaded.keys() == tensors.keys() and all(torch.equal(loaded[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("content", [b"", b"no zip", b"\x80\x02}q\x00.", b"PK\x05\x06" + bytes(18)])
@pytest.mark.parametrize("name", ["p.bin", "p.safetensors", "p/config.json", "p/state.json"])
def test_what_cannot_be_read_tells_nothing(tmp_path, name, content):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content)
    assert of_weights(file if file.suffix != ".json" else file.parent) == Provenance()
    assert of_weights(tmp_path / "nowhere") == Provenance()


def test_values_of_other_types_are_left_out(tmp_path):
    assert Provenance.of(None) == Provenance.of([1]) == Provenance()
    odd = {"tower": ["x"], "num_frames": True, "rows": "7", "use_start_end": 1, "more": 2}
    assert Provenance.of(odd) == Provenance()
    assert Provenance.of({**SOME.to_json(), "rows": 7.5}).rows is None
    with zipfile.ZipFile(tmp_path / "p.bin", "w") as file:
        file.writestr(f"p/{provenance._MEMBER}", json.dumps({"tower": 3, "num_frames": 16}))
    assert of_weights(tmp_path / "p.bin") == Provenance(num_frames=16, pooling=RECIPE)


def test_weights_that_are_older_than_the_flag_are_of_the_recipe(tmp_path):
    """As features are whose headers are older; what tells no number of frames tells no pooling."""
    older = {"tower": "t", "num_frames": 16}
    (tmp_path / "config.json").write_text(json.dumps({provenance.EXPORT_MARK: {provenance.KEY: older}}))
    assert of_weights(tmp_path).pooling == RECIPE == Provenance.of_header(older).pooling
    folder = checkpoint.save(tmp_path, 1, groups={"model": {"a": torch.ones(1)}}, state={"provenance": older})
    assert of_weights(folder).pooling == RECIPE
    assert Provenance.of({"tower": "t"}).pooling is None
    assert Provenance.of(older | {"pooling": "grid:2x2x2"}).pooling == "grid:2x2x2"


def test_an_older_checkpoint_tells_the_prompt(tmp_path):
    flags = {"version": "v1", "question_order": "video_first", "mm_use_vid_start_end": False}
    folder = checkpoint.save(tmp_path, 1, groups={"model": {"a": torch.ones(1)}}, state={"config": flags})
    assert of_weights(folder) == Provenance(conv_mode="vicuna_v1_1", question_order="video_first", use_start_end=False)


def test_decoders_and_conversions_are_those_of_each_video():
    """A job of DALI leaves to PyAV what DALI does not take, so that the job's conversion is not each video's."""
    assert Provenance.of_header(PYAV).conversion == "swscale" and Provenance.of_header(PYAV).decoder == "pyav 18.1.0"
    assert Provenance.of_header({"video": "a.mp4", "conversion": "swscale"}) == Provenance(conversion="swscale")
    assert Provenance.of_header({"video": {"decoder": 3, "conversion": None}}) == Provenance()
    assert Provenance.of_header([]) == Provenance.of_header(None) == Provenance()
    found, _ = of_features([(32, NVDEC), (32, PYAV), (32, {})])
    assert (found.decoder, found.conversion) == ("nvdec, CUDA 13.0; pyav 18.1.0", "swscale")
    found, _ = of_features([(32, DALI), (32, PYAV)])
    assert (found.decoder, found.conversion) == ("dali 2.4.0; pyav 18.1.0", "dali; swscale")


@pytest.mark.parametrize(
    "headers, remark, warning",
    [
        ([PYAV, PYAV, {}], None, None),
        ([], None, None),
        ([{}], None, None),
        ([PYAV, NVDEC, PYAV], "2 decoders, whose bytes are the same: 2 of pyav 18.1.0, 1 of nvdec, CUDA 13.0", None),
        ([PYAV, DALI, DALI, NVDEC, DALI], None, "2 colour conversions: 3 of dali, 2 of swscale"),
    ],
)
def test_what_several_decoders_mean(headers, remark, warning):
    said = what_decoders_mean(decoders_of(headers))
    assert [bool(line) for line in said] == [bool(remark), bool(warning)]
    assert (remark or "") in (said[0] or "") and (warning or "") in (said[1] or "")
