"""The evaluate command: both stages, what exit codes tell, and runs that are killed at any moment."""

import json
import os
import signal
from collections import Counter

import pytest
from evaluation_run import flags, settings, write_evaluation
from fake_judge import GOOD, fake_judge
from forks import FORKS
from waiting import wait_until

from fastvid.evaluate import main
from fastvid.evaluation import scores


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = write_evaluation(tmp_path_factory.mktemp("evaluation"))
    records = json.loads((run / "vcg" / "generic_qa.json").read_text())
    (run / "vcg" / "generic_qa.json").write_text(json.dumps([r for r in records if r["video_name"] != "clip99"]))
    return run


@pytest.fixture(scope="module")
def predicted(run, tmp_path_factory):
    """An --output with all predictions of vcg: 4 generic samples and 2 of consistency, 14 judgements."""
    output = tmp_path_factory.mktemp("predicted")
    assert main(flags(settings(run, output))) == 0
    return output


def copy(predicted, tmp_path):
    for name in ("predictions.jsonl", "settings.json"):
        (tmp_path / name).write_bytes((predicted / name).read_bytes())
    return tmp_path


def judging(output, url, *more):
    return ["--output", str(output), "--judge", url, "--judge_model", "m", "--judge_retries", "0", *more]


def score_of(number, body):
    """A reply that hangs on what is graded alone."""
    return json.dumps({"score": len(body["messages"][1]["content"]) % 6})


def test_both_stages(predicted, tmp_path, capsys):
    with fake_judge(score_of) as judge:
        assert main(judging(copy(predicted, tmp_path), judge.url, "--parity", "reference")) == 0
        assert len(judge.bodies) == 4 * 3 + 2
    told = json.loads((tmp_path / "scores.json").read_text())
    assert told["judge"] == "m" and told["answered"] == told["samples"] == 6 and told["missing"] == 0
    assert {name: each["n"] for name, each in told["scores"].items()} == {
        "correctness": 4,
        "detail": 4,
        "context": 4,
        "consistency": 2,
    }
    of = Counter()
    for line in (tmp_path / "judgements.jsonl").read_text().splitlines():
        of[json.loads(line)["aspect"]] += json.loads(line)["score"]
    for name, count in (("correctness", 4), ("consistency", 2)):
        assert told["scores"][name]["mean"] == of[name] / count == told["upstream"][name]["average_score"]
    assert "consistency" in capsys.readouterr().out
    assert json.loads((tmp_path / "upstream" / "detail_judged.json").read_text()).keys() == {
        "clip0_0",
        "clip0_1",
        "clip1_0",
        "clip2_0",
    }


def test_cut_replies_are_asked_for_again_with_more_tokens(predicted, tmp_path, capsys):
    def reply(_, body):
        whole = '{"score": 4}'
        if body["max_tokens"] > 20:
            choice = {"message": {"content": whole}, "finish_reason": "stop"}
        else:
            choice = {"message": {"content": whole[:-1]}, "finish_reason": "length"}
        return 200, json.dumps({"choices": [choice]})

    with fake_judge(reply) as judge:
        words = judging(copy(predicted, tmp_path), judge.url)
        assert main([*words, "--judge_max_tokens", "20"]) == 1
        assert "14 of these replies were cut off: raise --judge_max_tokens 20" in capsys.readouterr().out
        assert main([*words, "--judge_max_tokens", "21"]) == 0
    assert json.loads((tmp_path / "scores.json").read_text())["cut_off"] == 0


def test_predictions_alone(run, predicted, tmp_path, capsys):
    assert main(["--output", str(copy(predicted, tmp_path))]) == 0
    assert "6 predictions are in" in capsys.readouterr().out
    assert not (tmp_path / "scores.json").exists()
    with fake_judge(score_of) as judge:
        assert main(judging(tmp_path, judge.url)) == 0  # as it says
    assert (tmp_path / "scores.json").exists()


def test_multiple_choice_needs_no_judge(run, tmp_path, capsys):
    assert main(flags(settings(run, tmp_path, "mc"))) == 1  # a name that two videos have
    out = capsys.readouterr().out
    assert "1 of 6 samples have no prediction" in out
    told = json.loads((tmp_path / "scores.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "likelihoods" in line]
    right = [max(range(3), key=lambda i: line["likelihoods"][i][0]) == line["right"] for line in lines]
    assert told["scores"]["likelihood"]["mean"] == sum(right) / 5 and told["scores"]["letter"]["n"] == 5


def test_no_rank_ends_the_others(run, tmp_path, monkeypatch, capsys):
    """torchrun ends all ranks once one of them exits with another code than 0."""
    arguments = flags(settings(run, tmp_path, "mc"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, missing in ((0, "4 of 6"), (1, None)):  # the second has the video that cannot be found
        monkeypatch.setenv("RANK", str(rank))
        assert main(arguments) == 0
        out = capsys.readouterr().out
        assert (f"{missing} samples have no prediction yet; once all ranks have ended" in out) == (rank == 0)
        assert not (tmp_path / "scores.json").exists()
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.delenv("RANK")
    assert main(["--output", str(tmp_path)]) == 1  # as it says
    assert "1 of 6 samples have no prediction" in capsys.readouterr().out and (tmp_path / "scores.json").exists()


def test_unreadable_replies_are_told(predicted, tmp_path, capsys):
    with fake_judge(lambda n, body: "well" if n == 3 else score_of(n, body)) as judge:
        assert main(judging(copy(predicted, tmp_path), judge.url)) == 1
    out = capsys.readouterr().out
    assert "1 of 14 replies cannot be read and count in no score: too many" in out
    assert f"one of them: it holds no JSON object: 'well'; all are in {tmp_path}/judgements.jsonl\n" in out
    told = json.loads((tmp_path / "scores.json").read_text())
    assert sum(told["unreadable"].values()) == 1 and sum(each["n"] for each in told["scores"].values()) == 13


@pytest.mark.slow
def test_a_silent_judge_leaves_the_rest_to_the_next_run(predicted, tmp_path, capsys):
    with fake_judge(lambda n, body: (500, "") if n % 2 else score_of(n, body)) as judge:
        assert main(judging(copy(predicted, tmp_path), judge.url)) == 1
    assert "7 of 14 are not judged; the next run asks again" in capsys.readouterr().out
    with fake_judge(score_of) as judge:
        assert main(judging(tmp_path, judge.url)) == 0
        assert len(judge.bodies) == 7


@pytest.mark.slow
def test_comparison(predicted, tmp_path, capsys):
    here, there, fresh = (tmp_path / name for name in ("here", "there", "fresh"))
    fresh.mkdir()
    for folder, score in ((there, 2), (here, 3)):
        folder.mkdir()
        with fake_judge(lambda *_: f'{{"score": {score}}}') as judge:
            more = ["--compare", str(there)] if folder == here else []
            assert main(judging(copy(predicted, folder), judge.url, *more)) == 0
    assert "+1.0000   [+1.0000, +1.0000]   4" in capsys.readouterr().out
    with fake_judge(score_of) as judge:  # what cannot be compared is refused before anything is asked
        with pytest.raises(ValueError, match="judge: other and m.; judge both folders' predictions by one judge"):
            main([*judging(copy(predicted, fresh), judge.url), "--judge_model", "other", "--compare", str(here)])
        assert judge.bodies == []
    assert main(["--output", str(there), "--compare", str(here)]) == 0  # both are judged
    assert "-1.0000   [-1.0000, -1.0000]   4" in capsys.readouterr().out
    with pytest.raises(ValueError, match="holds no scores"):
        main(["--output", str(fresh), "--compare", str(here)])


def test_other_questions_are_refused_before_a_model_is_loaded(run, predicted, tmp_path, monkeypatch):
    monkeypatch.setattr("fastvid.evaluate.Chat", None)
    scores.write_scores(copy(predicted, tmp_path), {"task": "vcg", "annotations": "x", "samples": 6}, {}, {})
    with pytest.raises(ValueError, match="task: mc and vcg.*; give --compare a folder with predictions for the same"):
        main(flags({**settings(run, tmp_path / "new", "mc"), "compare": tmp_path}))


@pytest.mark.slow
def test_a_folder_that_is_judged_shows_its_scores(predicted, tmp_path, capsys):
    """Of the judge whose they are; another one's take their place, and the first one's come back without a request."""
    output = str(copy(predicted, tmp_path))
    with fake_judge(score_of) as judge, fake_judge(score_of) as other:
        assert main(judging(output, judge.url)) == 0
        shown = capsys.readouterr().out
        assert f"scores by the judge m at {judge.url}\n" in shown and "take the place" not in shown
        assert main(["--output", output]) == 0
        assert capsys.readouterr().out == shown
        assert main([*judging(output, other.url), "--judge_model", "n"]) == 0
        shown = capsys.readouterr().out
        assert "take the place of those by the judge m, whose replies stay" in shown
        assert f"scores by the judge n at {other.url}\n" in shown
        asked = len(other.bodies)
        assert main(judging(output, other.url)) == 0  # all replies are there, and are of the first address
        assert f"scores by the judge m at {judge.url}\n" in capsys.readouterr().out and len(other.bodies) == asked
        path = tmp_path / "judgements.jsonl"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
        assert main(judging(output, other.url)) == 0
        assert f"WARNING: the replies of m come from {' and '.join(sorted([judge.url, other.url]))}" in (
            capsys.readouterr().out
        )
    assert len(json.loads((tmp_path / "scores.json").read_text())["judge_url"]) == 2


def test_samples_of_no_group_are_counted(tmp_path, capsys):
    line = {"video": "v", "kind": "generic", "question": "q", "answer": "a", "prediction": "p"}
    groups = {"1": "spatial", "2": "", "3": ""}
    lines = [json.dumps({**line, "id": name, "group": group}) for name, group in groups.items()]
    (tmp_path / "predictions.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "settings.json").write_text(json.dumps({"task": "vcg_diverse", "samples": 3}))
    assert main(["--output", str(tmp_path)]) == 0
    told = "2 samples count in no group: their type is none of summary, spatial, reasoning, temporal\n"
    assert told in capsys.readouterr().out


@pytest.mark.parametrize("task, longest", [("vcg", 1024), ("mc", 128), ("match", 128)])
def test_a_command_that_cannot_begin_leaves_no_folder(run, tmp_path, monkeypatch, task, longest):
    def chat(config):
        assert config.max_new_tokens == longest
        raise ValueError("no model")

    monkeypatch.setattr("fastvid.evaluate.Chat", chat)
    asked = {name: value for name, value in settings(run, tmp_path / "new", task).items() if name != "max_new_tokens"}
    with pytest.raises(ValueError, match="--video .*nowhere does not exist; give the folder"):
        main(flags({**asked, "video": tmp_path / "nowhere"}))
    with pytest.raises(ValueError, match="no model"):
        main(flags(asked))
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_flags_mended_as_told(run, predicted, tmp_path, monkeypatch):
    """Each mistake's message says what the next line gives."""

    def refused(arguments, message):
        with pytest.raises(ValueError, match=message):
            main(arguments)

    output, whole = str(tmp_path), flags(settings(run, tmp_path, "vcg"))
    refused(["--output", output], "holds no predictions: give --model_name_or_path, --annotations and --video first")
    refused(["--output", output, "--model_name_or_path", "x"], "give --annotations and --video and --task")
    assert main(whole) == 0
    refused(["--output", output, "--task", "mc"], "holds predictions of vcg, not of --task mc")
    assert main(["--output", output, "--task", "vcg"]) == 0
    refused(["--output", output, "--judge", "http://x"], "give --judge and --judge_model together")
    refused(judging(output, "localhost"), "localhost is no URL; give one such as http://")
    for wrong in ("http://", "http://h:99999/v1", "http://[::1/v1", "file:///etc"):
        refused(judging(output, wrong), "is no URL; give one such as http://")
    for secret in ("http://me:sk-secret@h/v1", "http://h/v1?key=sk-secret", "http://h/v1#sk-secret"):
        with pytest.raises(ValueError, match="--judge holds more than an address.*--judge_key_variable") as told:
            main(judging(output, secret))
        assert "secret" not in str(told.value)
    with fake_judge(score_of) as judge:
        monkeypatch.setenv("WORLD_SIZE", "2")
        refused(judging(output, judge.url), "--judge needs one process")
        monkeypatch.delenv("WORLD_SIZE")
        refused(judging(output, judge.url, "--compare", str(predicted)), "holds no scores: score its predictions first")
        assert main(judging(predicted, judge.url)) == 0
        assert main(judging(output, judge.url, "--compare", str(predicted))) == 0


def in_child(arguments):
    """A process that runs the command."""
    child = FORKS.Process(target=_run, args=(arguments,))
    child.start()
    return child


def _run(arguments):
    os._exit(main(arguments))


def kill(child):
    os.kill(child.pid, signal.SIGKILL)
    child.join()


@pytest.mark.slow
def test_a_judging_run_is_killed_again_and_again(predicted, tmp_path):
    """A judge is asked twice only for what it was asked in the moment of a kill; no line is there twice."""
    stop_at, at_once, killed = iter([1, 4, 5, 9, 10]), 2, 0
    with fake_judge(lambda n, body: None if n == limit else score_of(n, body)) as judge:
        for more in (*stop_at, None):
            limit = None if more is None else len(judge.bodies) + more - 1
            child = in_child(judging(copy(predicted, tmp_path), judge.url, "--judge_at_once", str(at_once)))
            if limit is None:
                child.join()
                assert child.exitcode == 0
                break
            wait_until(lambda: len(judge.bodies) > limit or not child.is_alive())
            if not child.is_alive():
                break
            kill(child)
            killed += 1
            if more == 4:
                with open(tmp_path / "judgements.jsonl", "a") as file:
                    file.write('{"key": "a line that a crash has tor')
        asked = judge.asked
    assert killed >= 2
    lines = [json.loads(line) for line in (tmp_path / "judgements.jsonl").read_text().splitlines()]
    assert len({line["key"] for line in lines}) == len(lines) == 14
    assert sum(asked.values()) <= 14 + at_once * killed and len(asked) == 14
    told = json.loads((tmp_path / "scores.json").read_text())
    whole = tmp_path / "whole"
    whole.mkdir()
    with fake_judge(score_of) as judge:
        main(judging(copy(predicted, whole), judge.url))
    assert told["scores"] == json.loads((whole / "scores.json").read_text())["scores"]


@pytest.mark.slow
@pytest.mark.parametrize("kept", [0, 1, 4])
def test_a_predicting_run_is_killed(run, predicted, tmp_path, kept):
    """It is killed once so many predictions are there, and goes on."""
    arguments = flags({**settings(run, tmp_path), "at_once": 1})
    child = in_child(arguments)
    path = tmp_path / "predictions.jsonl"
    wait_until(lambda: (path.exists() and path.read_bytes().count(b"\n") >= kept) or not child.is_alive())
    kill(child) if child.is_alive() else child.join()
    before = path.read_bytes()
    child = in_child(arguments)
    child.join()
    assert child.exitcode == 0
    assert path.read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    found, expected = (
        sorted((json.loads(line) for line in file.read_text().splitlines()), key=lambda line: line["id"])
        for file in (path, predicted / "predictions.jsonl")
    )
    assert found == expected


def test_the_key_is_in_no_file(predicted, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-secret")
    with fake_judge(lambda *_: GOOD) as judge:
        main(judging(copy(predicted, tmp_path), judge.url, "--judge_key_variable", "MY_KEY"))
        assert judge.headers[0]["Authorization"] == "Bearer sk-secret"
    assert not any("sk-secret" in path.read_text() for path in tmp_path.rglob("*") if path.is_file())
