"""What the check of a data set counts and names, without a data set."""

from types import SimpleNamespace

from fastvid.config.policy import POLICIES
from fastvid.provenance import Provenance
from fastvid.validation.features import _check_makers
from fastvid.validation.report import Report, summary
from fastvid.video.towers import choice


def test_videos_to_be_made_are_counted_once():
    report = Report(to_make={"a", "b"})
    report.videos.update({"a": 1, "b": 1})
    report.layouts = report.videos.__class__()
    report.add("features missing", "in the other folder", video="a")
    assert report.states["to be made"] == 1 and "1 videos have no features yet" in summary(report)


def test_a_second_tower_is_named_by_its_flag(tmp_path, monkeypatch):
    monkeypatch.setattr(choice, "revisions", lambda folder: ("sha256:given",))
    config = SimpleNamespace(
        vision_tower=str(tmp_path), vision_tower_2=str(tmp_path), policy=POLICIES["none"], pooling=None, num_frames=None
    )
    for which in ("", "_2"):
        report = Report()
        _check_makers(report, config, {"a": Provenance(tower="t", tower_revision="sha256:other")}, which)
        assert list(report.problems) == [f"features of another tower than --vision_tower{which}"]
