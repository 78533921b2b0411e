"""Which vision tower is taken, and by what it is known."""

import shutil

import pytest
from towers import write_tower

from fastvid.provenance import Provenance
from fastvid.video.towers.choice import check_tower, choose_tower, is_path, revisions

COMMIT = "0123456789" * 4


@pytest.fixture
def tower(tmp_path):
    return write_tower(tmp_path / "old" / "tower", layers=1)


@pytest.fixture
def trained(tower):
    return Provenance(str(tower), revisions(tower)[0])


def test_content_counts_and_not_the_name(tower, tmp_path):
    copy = shutil.copytree(tower, tmp_path / "copy")
    assert revisions(copy) == revisions(tower) and revisions(tower)[0].startswith("sha256:")
    (copy / "notes.txt").write_text("of no account")
    assert revisions(copy) == revisions(tower)
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    assert revisions(copy) != revisions(tower)


def test_a_download_is_known_by_its_commit_as_well(tower, tmp_path):
    snapshot = shutil.copytree(tower, tmp_path / "snapshots" / COMMIT)
    assert revisions(snapshot) == (*revisions(tower), COMMIT)
    note = tower / ".cache" / "huggingface" / "download" / "config.json.metadata"
    note.parent.mkdir(parents=True)
    note.write_text(f"{COMMIT}\nan etag\n1.5\n")
    assert revisions(tower)[1] == COMMIT
    check_tower(tower, Provenance("openai/clip", COMMIT), "weights")


def test_towers_that_cannot_be_compared_are_told(tower, caplog):
    check_tower(tower, Provenance("openai/clip", COMMIT), "weights")
    assert "cannot be compared" in caplog.text and "openai/clip" in caplog.text


def test_the_given_one_is_checked(tower, trained, tmp_path):
    assert choose_tower(str(tower), trained, "weights") == str(tower)
    other = write_tower(tmp_path / "other", layers=1, seed=1)
    with pytest.raises(ValueError, match="other is another tower than .* weights was trained on, .*old/tower"):
        choose_tower(str(other), trained, "weights")
    assert choose_tower(str(other), Provenance(), "weights") == str(other)


def test_the_trained_one_goes_before_the_models(tower, trained, tmp_path):
    assert choose_tower(None, trained, "weights", "some/other") == str(tower)
    assert choose_tower(None, Provenance("hub/id", COMMIT), "weights", "some/other") == "hub/id"
    assert choose_tower(None, Provenance(), "weights", "some/other") == "some/other"
    assert choose_tower(None, Provenance("named"), "weights", "some/other") == "named"
    assert choose_tower(None, Provenance(), "weights") is None


def test_a_tower_that_has_moved_with_the_weights_is_found(tower, trained, tmp_path):
    (tmp_path / "old").rename(tmp_path / "new")
    weights = tmp_path / "new" / "stage2" / "checkpoint-3"
    assert choose_tower(None, trained, weights) == str(tmp_path / "new" / "tower")
    write_tower(tmp_path / "new" / "tower", layers=1, seed=1)  # another one of that name
    with pytest.raises(ValueError, match="old/tower .* is not to be found: .*--vision_tower"):
        choose_tower(None, trained, weights)


@pytest.mark.parametrize("name, path", [("openai/clip", False), ("./clip", True), ("/a/b", True), ("a/b/c", True)])
def test_hub_ids_and_paths(name, path):
    assert is_path(name) is path
