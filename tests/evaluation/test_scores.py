"""Scores, computed by hand: intervals, multiple choices, short answers, and upstream's arithmetic on its own files."""

import itertools
import json
import tracemalloc
from collections import Counter

import numpy as np
import pytest

from fastvid.evaluation import scores
from fastvid.evaluation.grading import asks


def test_the_interval_draws_whole_videos():
    """Two videos: each resample has both, or one of them twice. All weights are counted out."""
    values, videos = [1, 1, 1, 0], ["a", "a", "a", "b"]
    mean, low, high = scores.interval(values, videos)
    assert (mean, low, high) == (0.75, 0, 1)  # both, a quarter of the time only b, a quarter only a
    alone = scores.interval([1.0, 3.0], ["a", "a"])
    assert alone == (2, None, None)  # one video says nothing of how videos differ


@pytest.mark.slow
def test_intervals_of_many_videos_need_little_memory(monkeypatch):
    rng = np.random.default_rng(2)
    values, videos = rng.random(10_000), range(10_000)
    tracemalloc.start()
    try:
        found = scores.interval(values, videos)
        assert tracemalloc.get_traced_memory()[1] < 100 << 20  # all resamples together have 153 MiB
    finally:
        tracemalloc.stop()
    some = scores.interval(values[:30], range(30))
    monkeypatch.setattr(scores, "_MOST_DRAWN", 70)
    assert scores.interval(values[:30], range(30)) == pytest.approx(some)
    assert found[0] == pytest.approx(values.mean()) and found[1] < found[0] < found[2]


def test_the_interval_is_wider_when_a_video_decides():
    rng = np.random.default_rng(1)
    of_video = rng.integers(0, 2, 60)
    values = [float(each) for each in of_video for _ in range(5)]
    apart = scores.interval(values, range(300))
    together = scores.interval(values, [i // 5 for i in range(300)])
    assert apart[0] == together[0]
    ratio = (together[2] - together[1]) / (apart[2] - apart[1])
    assert 1.8 < ratio < 2.7  # sqrt(5) = 2.24
    expected = 1.96 * (np.var(of_video) / 60) ** 0.5
    assert (together[2] - together[1]) / 2 == pytest.approx(expected, rel=0.15)
    assert together == scores.interval(values, [i // 5 for i in range(300)])


@pytest.mark.parametrize(
    "text, option",
    [
        ("(B)", 1),
        ("B", 1),
        ("B.", 1),
        ("B. the dog", 1),
        ("Best option: (C) a cat", 2),
        ("The answer is A.", 0),
        ("Answer: C", 2),
        ("A man walks", None),
        ("Answer: A cat", None),
        ("The answer is A small dog.", None),
        ("The answer is A because he walks", 0),
        ("The answer is B because he walks", 1),
        ("I think so", None),
        ("(A) or (B)", None),
        ("(Z)", None),
        ("The Dog!", 1),
        ("", None),
    ],
)
def test_letters(text, option):
    assert scores.read_letter(text, ["a man", "the dog", "a cat"]) == option


def test_choices():
    def line(name, logs, right, text, group=""):
        return {
            "id": name,
            "video": "v",
            "group": group,
            "likelihoods": logs,
            "options": ["a", "b c d"],
            "right": right,
            "prediction": text,
        }

    figures = scores.choice_values(
        [line("1", [[-2.0, 1], [-3.0, 3]], 0, "(A)"), line("2", [[-4.0, 1], [-3.0, 3]], 0, "nothing", "g")]
    )
    assert figures == {
        "likelihood": {"1": (1, "v"), "2": (0, "v")},
        "likelihood_per_token": {"1": (0, "v"), "2": (0, "v")},
        "letter": {"1": (1, "v"), "2": (0, "v")},
        "likelihood/g": {"2": (0, "v")},
        "likelihood_per_token/g": {"2": (0, "v")},
        "letter/g": {"2": (0, "v")},
    }


def test_nothing_tells_equal_options_apart():
    line = {"id": "1", "video": "v", "group": "", "options": ["b", "c", "b "], "right": 2}
    for logs, text, right in (([-1, -2, -1], "(A)", 1), ([-3, -2, -3], "(B)", 0), ([-1, -2, -1], "B.", 0)):
        line |= {"likelihoods": [[log, 1] for log in logs], "prediction": text}
        figures = scores.choice_values([line])
        assert figures["likelihood"] == {"1": (float(logs[0] > -2), "v")} and figures["letter"] == {"1": (right, "v")}
    assert scores.read_letter("b", line["options"]) == 0


@pytest.mark.parametrize(
    "found, right, exact, f1",
    [
        ("The red car.", "red car", 1, 1),
        ("a red car", "blue car", 0, 0.5),
        ("red red car", "red", 0, 0.5),  # 1 common word: 2 · 1 / (3 + 1)
        ("", "red", 0, 0),
        ("the", "A", 0, 0),  # nothing is left of either: they stay as they are
        ("", "A", 0, 0),
        ("A.", "a", 1, 1),
        ("-5", "5", 0, 0),
        ("3.5", "35", 0, 0),
        ("$1,000.", "1000", 1, 1),
        ("STRASSE", "straße", 1, 1),
        ("cafe\u0301", "caf\u00e9", 1, 1),
        ("it\u2019s", "it's", 1, 1),
    ],
)
def test_short_answers(found, right, exact, f1):
    line = {"id": "1", "video": "v", "group": "", "prediction": found, "answer": right}
    assert scores.match_values([line]) == {"exact": {"1": (exact, "v")}, "f1": {"1": (f1, "v")}}


def upstream_loop(combined):
    """The lines of upstream's scripts, as they stand there."""
    score_sum, count, yes_count, no_count = 0, 0, 0, 0
    for result in combined.values():
        count += 1
        try:
            score = int(result[0]["score"])
            score_sum += score
        except Exception:
            continue
        pred = result[0].get("pred", "")
        if "yes" in pred.lower():
            yes_count += 1
        elif "no" in pred.lower():
            no_count += 1
    return score_sum / count, yes_count, no_count


def test_upstreams_arithmetic_on_its_own_files():
    """4.8 counts as 4, "3" as 3; a reply without a score counts as 0 in the mean, and in no accuracy."""
    replies = [
        {"pred": "yes", "score": 4.8},
        {"pred": "No", "score": "3"},
        {"pred": "yes"},
        {"pred": "yes", "score": 5},
    ]
    combined = {f"v_{i}": [reply, {"q": "q", "a": "a", "pred": "p"}] for i, reply in enumerate(replies)}
    figures = scores.upstream_figures(json.loads(json.dumps(combined)))
    assert figures == {"average_score": 12 / 4, "accuracy": 2 / 3}
    mean, yes, no = upstream_loop(combined)
    assert figures == {"average_score": mean, "accuracy": yes / (yes + no)}
    assert scores.upstream_figures({"v_0": [{"score": 2}, {}]}) == {"average_score": 2}
    assert scores.upstream_figures({}) == {}


def line(name, kind="generic", video="v", group="", paired=False):
    texts = ["q", "r"] if paired else "q"
    return {
        "id": name,
        "kind": kind,
        "video": video,
        "group": group,
        "question": texts,
        "answer": "a",
        "prediction": ["p1", "p2"] if paired else f"p{name}",
    }


def judged(ask, **values):
    return {"key": ask.key, "id": ask.id, "aspect": ask.aspect, "reply": json.dumps(values), **values}


def test_judged_values():
    lines = [line("1", group="spatial"), line("2", group="spatial", video="w"), line("3", "qa")]
    wanted = asks(lines, "m")
    by = {(ask.id, ask.aspect): ask for ask in wanted}
    found = [
        judged(by["1", "correctness"], score=4),
        judged(by["1", "detail"], score=1),
        judged(by["1", "context"], fault="no"),
        judged(by["2", "correctness"], score=2),
        judged(by["3", "qa"], score=3, pred="yes"),
        judged(by["3", "qa"], score=0, pred="no"),  # a second reply to the same counts for nothing
    ]
    figures, unreadable, unanswered = scores.judged_values(lines, wanted, found)
    assert figures == {
        "correctness": {"1": (4, "v"), "2": (2, "w")},
        "detail": {"1": (1, "v")},
        "score": {"3": (3, "v")},
        "accuracy": {"3": (1, "v")},
        "correctness and detail/spatial": {"1": (2.5, "v")},
    }
    assert unreadable == Counter(context=1)
    assert unanswered == Counter(detail=1, context=1)


def test_upstreams_combined_files():
    lines = [line("1"), line("2"), line("3", "consistency", paired=True)]
    wanted = asks(lines, "m")
    replies = itertools.cycle(["{'score': 4.8}", "five"])
    found = [{"key": ask.key, "reply": next(replies)} for ask in wanted]
    cut = [line | {"cut": 9} for line in found]
    assert not any(scores.upstream_entries(lines, wanted, cut).values())
    combined = scores.upstream_entries(lines, wanted, found)
    pair = {"q": "q", "a": "a", "pred": "p1"}
    assert combined["correctness"] == {"v_0": [{"score": 4.8}, pair]}  # the second sample's reply was "five"
    assert combined["context"] == {"v_0": [{"score": 4.8}, pair]}
    assert combined["detail"] == {"v_1": [{"score": 4.8}, {**pair, "pred": "p2"}]}
    assert combined["consistency"] == {
        "v_0": [{"score": 4.8}, {"q1": "q", "q2": "r", "a": "a", "pred1": "p1", "pred2": "p2"}]
    }


def test_upstreams_keys_count_in_the_benchmarks_order():
    """Answers are written as they end."""
    lines = [line("generic/10"), line("generic/2"), line("generic/1", video="w")]
    wanted = asks(lines, "m")
    found = [{"key": ask.key, "reply": "{'score': 1}"} for ask in wanted]
    combined = scores.upstream_entries(lines, wanted, found)
    assert {key: pair["pred"] for key, (_, pair) in combined["detail"].items()} == {
        "v_0": "pgeneric/2",
        "v_1": "pgeneric/10",
        "w_0": "pgeneric/1",
    }


@pytest.mark.parametrize(
    "reply",
    [
        "{[]: 1}",
        "b'x'",
        "{'score': {1}}",
        "{'score': 3, (1, 2): 3}",
        "{'score': 3, 'x': 1j}",
        "[1]",
        "\x00",
        "-" * 1_000_000,
    ],
)
def test_replies_that_upstream_cannot_read_are_left_out(reply):
    lines = [line("1"), line("2", video="w")]
    wanted = [ask for ask in asks(lines, "m") if ask.aspect == "detail"]
    found = [{"key": ask.key, "reply": said} for ask, said in zip(wanted, (reply, "{'score': 4.8}"))]
    combined = scores.upstream_entries(lines, wanted, found)
    assert list(combined["detail"]) == ["w_0"]
    json.dumps(combined)


def test_an_endless_score_counts_as_none():
    found = (float("inf"), "9" * 400, "9" * 6000, 2)
    combined = {f"v_{i}": [{"score": score}, {}] for i, score in enumerate(found)}
    assert scores.upstream_figures(combined) == {"average_score": 0.5}


def test_comparison_is_paired_and_refuses_another_judge(tmp_path):
    about = {"task": "vcg", "annotations": "x", "samples": 2, "judge": "m", "prompts": "y"}
    folders = [tmp_path / name for name in ("one", "two", "other")]
    for folder, values, more in zip(folders, ([4, 2, 5], [3, 1], [3, 1]), ({}, {}, {"judge": "n"})):
        folder.mkdir()
        figures = {"detail": {str(i): (float(value), f"v{i}") for i, value in enumerate(values)}}
        scores.write_scores(folder, about, figures, more)
    told = scores.compare(*folders[:2]).splitlines()[1].split()
    assert told == ["detail", "3.0000", "2.0000", "+1.0000", "[+1.0000,", "+1.0000]", "2"]
    with pytest.raises(ValueError, match="cannot be compared .judge: m and n.; judge both"):
        scores.compare(folders[0], folders[2])
    with pytest.raises(ValueError, match="holds no scores: score its predictions first"):
        scores.compare(folders[0], tmp_path)
    alone = {"detail": {"0": (4.0, "v")}}
    assert "one video: none" in scores.table(scores.write_scores(folders[0], about, alone, {}))
    assert "one video: none" in scores.compare(*folders[:2])


def test_other_questions_want_another_folder(tmp_path):
    for name, digest in (("one", "x"), ("two", "z"), ("three", "x")):
        about = {"task": "mc", "annotations": digest, "samples": 2}
        (tmp_path / name).mkdir()
        scores.write_scores(tmp_path / name, about, {"letter": {"0": (1.0, "v")}}, {})
    with pytest.raises(
        ValueError, match="annotations: x and z.; give --compare a folder with predictions for the same"
    ):
        scores.compare(tmp_path / "one", tmp_path / "two")
    scores.compare(tmp_path / "one", tmp_path / "three")


@pytest.mark.parametrize(
    "here, there, told",
    [
        ({"tower": ["sha256:a"]}, {"line": "sha256:a"}, None),
        ({"tower": ["sha256:a", "sha256:b"]}, {"line": "sha256:a"}, None),
        ({"tower": ["sha256:a"]}, {"line": "sha256:b"}, "by other vision towers"),
        ({"tower": ["sha256:a"]}, {"tower": ["sha256:a", "sha256:b"]}, "by other vision towers"),
        ({"tower": ["sha256:a"]}, {"tower": ["0123abc"]}, None),  # a hub's commit: nothing tells
        ({"tower": ["sha256:a", "sha256:a"]}, {"tower": [None, "sha256:a"]}, None),
        ({"tower": ["sha256:a"]}, {}, "known of one side alone: ['sha256:a']"),
        ({}, {}, None),
    ],
)
def test_vision_towers_are_told_where_they_differ(tmp_path, here, there, told):
    """Training's folders have them in the predictions' lines alone."""
    for name, has in (("here", here), ("there", there)):
        folder = tmp_path / name
        folder.mkdir()
        line = {"id": "0", "tower": has["line"]} if "line" in has else {"id": "0"}
        (folder / "predictions.jsonl").write_text(json.dumps(line) + "\n")
        about = {"task": "match"} | {key: value for key, value in has.items() if key == "tower"}
        scores.write_scores(folder, about, {"exact": {"0": (1.0, "v")}}, {})
    rows = scores.compare(tmp_path / "here", tmp_path / "there").splitlines()[2:]
    assert rows == [] if told is None else (len(rows) == 1 and told in rows[0])


@pytest.mark.parametrize(
    "here, there, warned",
    [
        ("http://a/v1", "http://a/v1", False),
        ("http://a/v1", "http://b/v1", True),
        (["http://a/v1", "http://b/v1"], "http://b/v1", True),
        ("http://a/v1", None, False),
    ],
)
def test_one_name_at_two_addresses_is_told(tmp_path, here, there, warned):
    for name, url in (("here", here), ("there", there)):
        (tmp_path / name).mkdir()
        about = {"task": "vcg", "judge": "m", "prompts": "y"} | ({} if url is None else {"judge_url": url})
        scores.write_scores(tmp_path / name, about, {"detail": {"0": (1.0, "v")}}, {})
    told = scores.compare(tmp_path / "here", tmp_path / "there")
    assert ("WARNING: m was asked at http://a/v1" in told and "http://b/v1 there" in told) == warned


def test_values_of_one_judge_never_lie_beside_the_name_of_another(tmp_path, monkeypatch):
    """Whenever a run is killed."""
    about = {"task": "vcg", "annotations": "x", "samples": 1, "prompts": "y"}
    scores.write_scores(tmp_path, about, {"detail": {"0": (4.0, "v")}}, {"judge": "m"})
    atomic_file = scores.atomic_file

    def dying(path):
        if path.name == scores.SCORES:
            raise KeyboardInterrupt
        return atomic_file(path)

    monkeypatch.setattr(scores, "atomic_file", dying)
    with pytest.raises(KeyboardInterrupt):
        scores.write_scores(tmp_path, about, {"detail": {"0": (1.0, "v")}}, {"judge": "n"})
    with pytest.raises(ValueError, match="holds no scores"):
        scores.compare(tmp_path, tmp_path)
