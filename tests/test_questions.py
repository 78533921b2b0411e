"""Which file a question is about."""

import json

import pytest

from fastvid.data.questions import list_media, read_questions

SUFFIXES = (".safetensors", ".pkl", ".mp4")


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "videos"
    for name in ("a.mp4", "a.safetensors", "sub/b.1.MP4", "notes.txt", ".hidden.mp4"):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def ask(tmp_path, *records):
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_listing_has_the_media_below_a_folder(folder):
    assert list_media(folder, SUFFIXES) == {
        "a.mp4": folder / "a.mp4", "a.safetensors": folder / "a.safetensors",
        "sub/b.1.MP4": folder / "sub" / "b.1.MP4"}
    assert list_media(folder / "notes.txt", SUFFIXES) == {"notes.txt": folder / "notes.txt"}
    with pytest.raises(ValueError, match="no file in it ends in"):
        list_media(folder, (".avi",))


@pytest.mark.parametrize(("video", "found"), [
    ("a.mp4", "a.mp4"), ("a", "a.safetensors"), ("a.pkl", "a.safetensors"), ("sub/b.1", "sub/b.1.MP4"),
    ("sub/b.1.pkl", "sub/b.1.MP4"), ("sub/b", None), ("b.1", None), ("../videos/a.mp4", None), (7, None), (None, None),
    ("notes.txt", None),
])
def test_a_name_means_a_listed_file_or_none(folder, tmp_path, video, found):
    path = ask(tmp_path, {"video": video, "question": "?"})
    questions, faults = read_questions(path, list_media(folder, SUFFIXES), SUFFIXES)
    assert [question.path for question in questions] == ([folder / found] if found else [])
    assert len(faults) == (found is None)


def test_absolute_names_are_not_opened(folder, tmp_path):
    path = ask(tmp_path, {"video": str(folder / "a.mp4"), "question": "?"})
    assert read_questions(path, list_media(folder / "sub", SUFFIXES), SUFFIXES)[0] == []


def test_links_out_of_the_folder_are_not_followed(folder, tmp_path):
    (tmp_path / "secret.pkl").touch()
    (folder / "out.pkl").symlink_to(tmp_path / "secret.pkl")
    (folder / "in.pkl").symlink_to(folder / "a.safetensors")
    path = ask(tmp_path, {"video": "out.pkl", "question": "?"}, {"video": "in.pkl", "question": "?"})
    questions, faults = read_questions(path, list_media(folder, SUFFIXES), SUFFIXES, folder)
    assert [question.path.name for question in questions] == ["in.pkl"]
    assert len(faults) == 1 and "'out.pkl', a link that leads out" in faults[0]


def test_order_is_kept_and_bad_records_are_named(folder, tmp_path):
    path = ask(tmp_path, {"video": "a", "question": "1"}, {"video": "a"}, "text", {"video": "sub/b.1", "question": "2"},
               {"video": "a", "question": "3"})
    questions, faults = read_questions(path, list_media(folder, SUFFIXES), SUFFIXES)
    assert [(question.video, question.text) for question in questions] == [("a", "1"), ("sub/b.1", "2"), ("a", "3")]
    assert ["record 1" in faults[0], "record 2" in faults[1]] == [True, True] and len(faults) == 2


def test_the_video_may_be_missing_where_there_is_one(folder, tmp_path):
    path = ask(tmp_path, {"question": "1"})
    questions, _ = read_questions(path, list_media(folder / "a.mp4", SUFFIXES), SUFFIXES)
    assert [(question.video, question.path) for question in questions] == [("a.mp4", folder / "a.mp4")]
    assert read_questions(path, list_media(folder, SUFFIXES), SUFFIXES)[0] == []
