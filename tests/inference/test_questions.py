"""Which file a question is about."""

import json

import pytest

from fastvid.inference.questions import list_media, read_questions

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
        "a.mp4": folder / "a.mp4",
        "a.safetensors": folder / "a.safetensors",
        "sub/b.1.MP4": folder / "sub" / "b.1.MP4",
    }
    assert list_media(folder / "notes.txt", SUFFIXES) == {"notes.txt": folder / "notes.txt"}
    with pytest.raises(ValueError, match="no file in it ends in"):
        list_media(folder, (".avi",))


@pytest.mark.parametrize(
    ("video", "found"),
    [
        ("a.mp4", "a.mp4"),
        ("a", "a.safetensors"),
        ("a.pkl", "a.safetensors"),
        ("sub/b.1", "sub/b.1.MP4"),
        ("sub/b.1.pkl", "sub/b.1.MP4"),
        ("sub/b", None),
        ("b.1", None),
        ("../videos/a.mp4", None),
        (7, None),
        (None, None),
        ("notes.txt", None),
    ],
)
def test_a_name_means_a_listed_file_or_none(folder, tmp_path, video, found):
    path = ask(tmp_path, {"video": video, "question": "?"})
    (question,) = read_questions(path, list_media(folder, SUFFIXES), SUFFIXES)
    assert question.path == (folder / found if found else None)
    assert (question.fault is None) == (found is not None)


def test_absolute_names_are_not_opened(folder, tmp_path):
    path = ask(tmp_path, {"video": str(folder / "a.mp4"), "question": "?"})
    assert read_questions(path, list_media(folder / "sub", SUFFIXES), SUFFIXES)[0].path is None


def test_links_out_of_the_folder_are_not_followed(folder, tmp_path):
    (tmp_path / "secret.pkl").touch()
    (folder / "out.pkl").symlink_to(tmp_path / "secret.pkl")
    (folder / "in.pkl").symlink_to(folder / "a.safetensors")
    path = ask(tmp_path, {"video": "out.pkl", "question": "?"}, {"video": "in.pkl", "question": "?"})
    refused, question = read_questions(path, list_media(folder, SUFFIXES), SUFFIXES, folder)
    assert question.path.name == "in.pkl"
    assert refused.path is None and "'out.pkl', a link that leads out" in refused.fault


def test_order_is_kept_and_bad_records_are_named(folder, tmp_path):
    path = ask(
        tmp_path,
        {"video": "a", "question": "1"},
        {"video": "a"},
        "text",
        {"video": "sub/b.1", "question": "2"},
        {"video": "a", "question": "3"},
    )
    questions = read_questions(path, list_media(folder, SUFFIXES), SUFFIXES)
    assert [(question.video, question.texts) for question in questions] == [
        ("a", ("1",)),
        ("a", ()),
        ("", ()),
        ("sub/b.1", ("2",)),
        ("a", ("3",)),
    ]
    assert [question.fault and question.fault.split(": ")[1].split(" (")[0] for question in questions] == [
        None,
        "record 1",
        "record 2",
        None,
        None,
    ]


def test_the_video_may_be_missing_where_there_is_one(folder, tmp_path):
    path = ask(tmp_path, {"question": "1"})
    (question,) = read_questions(path, list_media(folder / "a.mp4", SUFFIXES), SUFFIXES)
    assert (question.video, question.path) == ("a.mp4", folder / "a.mp4")
    (question,) = read_questions(path, list_media(folder, SUFFIXES), SUFFIXES)
    assert 'names no video ("video" or "video_name")' in question.fault


@pytest.mark.parametrize(
    "record, video, texts, line",
    [
        (
            {"video": "a", "question": "?", "id": 7, "answer": "red"},
            "a",
            ("?",),
            {"video": "a", "question": "?", "id": 7, "reference_answer": "red", "answer": "1"},
        ),
        (
            {"video_name": "a", "question": "?", "question_id": "a_1"},
            "a",
            ("?",),
            {"video": "a", "question": "?", "video_name": "a", "question_id": "a_1", "answer": "1"},
        ),
        (
            {"video_name": "a", "Q": "?", "A": "red"},
            "a",
            ("?",),
            {"video": "a", "question": "?", "video_name": "a", "Q": "?", "A": "red", "answer": "1", "pred": "1"},
        ),
        (
            {"video_name": "a", "Q1": "?", "Q2": "!", "A": "red"},
            "a",
            ("?", "!"),
            {
                "video": "a",
                "question": ["?", "!"],
                "video_name": "a",
                "Q1": "?",
                "Q2": "!",
                "A": "red",
                "answer": ["1", "2"],
                "pred1": "1",
                "pred2": "2",
            },
        ),
        (
            {"video_id": "a", "q": "?", "a": "red"},
            "a",
            ("?",),
            {"video": "a", "question": "?", "video_id": "a", "q": "?", "a": "red", "answer": "1"},
        ),
        (
            {"video_name": 12, "question": "?"},
            "12",
            ("?",),
            {"video": "12", "question": "?", "video_name": 12, "answer": "1"},
        ),
    ],
)
@pytest.mark.parametrize("array", [False, True])
def test_the_benchmarks_records(folder, tmp_path, record, video, texts, line, array):
    (folder / "12.mp4").touch()
    path = ask(tmp_path, record)
    if array:
        path.write_text(json.dumps([record]))
    (question,) = read_questions(path, list_media(folder, SUFFIXES), SUFFIXES)
    assert (question.video, question.texts, question.fault) == (video, texts, None)
    assert question.line(["1", "2"][: len(texts)]) == line
    failed = question.line([], "no luck")
    assert failed["error"] == "no luck" and not {"answer", "pred", "pred1"} & failed.keys()
    assert failed.items() <= (line | {"error": "no luck"}).items()


def test_activitynets_names_lack_their_prefix(folder, tmp_path):
    for name in ("v_x1.mp4", "sub/v_x2.mp4", "x3.mp4", "v_x3.mp4"):
        (folder / name).touch()
    path = ask(tmp_path, *({"video_name": name, "question": "?"} for name in ("x1", "sub/x2", "x3")))
    found = [question.path for question in read_questions(path, list_media(folder, SUFFIXES), SUFFIXES)]
    assert found == [folder / "v_x1.mp4", folder / "sub" / "v_x2.mp4", folder / "x3.mp4"]


def test_an_address_is_told(folder, tmp_path):
    path = ask(tmp_path, {"video": "https://x.org/a.mp4", "question": "?"})
    (question,) = read_questions(path, list_media(folder, SUFFIXES), SUFFIXES)
    assert "https://x.org/a.mp4, a URL; download" in question.fault


@pytest.mark.parametrize("content", ["", "[]", "\n\n"])
def test_an_empty_file_is_said_to_be_empty(folder, tmp_path, content):
    path = tmp_path / "questions.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match="questions.jsonl is empty"):
        read_questions(path, list_media(folder, SUFFIXES), SUFFIXES)
