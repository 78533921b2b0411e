"""What is told of a judge that does not answer, and of one that is not asked."""

import json

import pytest
from fake_judge import GOOD, fake_judge, raw_server

from fastvid.evaluation import judge as module
from fastvid.evaluation.grading import asks
from fastvid.evaluation.judge import Judge, NoAnswer, judge_all, read_judgements


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(module, "BACKOFF", 0.01)


def wanted(count):
    line = {"kind": "qa", "question": "what?", "answer": "a cat"}
    return asks([{**line, "id": f"s{i}", "prediction": f"a dog {i}"} for i in range(count)], "m")


def hang(connection, ended):
    ended.wait(30)


def drip(connection, ended):
    while not ended.wait(0.02):
        connection.sendall(b"H")


@pytest.mark.slow
@pytest.mark.parametrize("talk", [hang, drip])
def test_a_judge_that_hangs_is_told_as_such(talk, caplog):
    """And not as one that leaves. The first of each wave of retries has its line."""
    with raw_server(talk) as url:
        asked = Judge(url, "m", retries=2, timeout=0.2)
        for _ in range(2):
            with pytest.raises(NoAnswer, match=r"^no reply within 0.2 s \(--judge_timeout\)$"):
                asked.reply(wanted(1)[0].messages)
    assert [record.getMessage() for record in caplog.records] == [
        f"the judge at {url}: no reply within 0.2 s (--judge_timeout); retry {n} of 2" for n in (1, 2)
    ]


def test_a_closed_port_is_told_with_its_address(tmp_path):
    with fake_judge(lambda *_: GOOD) as server:
        url = server.url
    with pytest.raises(
        OSError,
        match=f"the judge at {url} did not answer 16 times in a row; the last time: no connection: Conn[a-z ]+\\.",
    ):
        judge_all(Judge(url, "m", retries=0, timeout=1.0), wanted(20), tmp_path, at_once=2)


def test_where_nothing_is_asked_no_bar_is_shown(tmp_path, capsys):
    with fake_judge(lambda *_: GOOD) as server:
        for bar in (True, False):
            assert judge_all(Judge(server.url + "/", "m"), wanted(2), tmp_path, at_once=2) == {}
            assert ("judge" in capsys.readouterr().err) == bar
        assert {line["url"] for line in read_judgements(tmp_path)} == {server.url}
    path = tmp_path / "judgements.jsonl"
    path.write_text(json.dumps({**json.loads(path.read_text().splitlines()[0]), "url": 3}) + "\n")
    with pytest.raises(ValueError, match='line 1 is damaged .its "url" is no text'):
        read_judgements(tmp_path)
