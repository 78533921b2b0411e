"""Refusals tell what helps: here it is done, and the request is answered."""

import logging
import shutil
import sys

import pytest
from serving_run import asking, held_answers, served, uri

from fastvid.config import ServeConfig
from fastvid.serve import main
from fastvid.serving.server import Server, bind


def told(answer, message):
    status, _, content = answer
    assert 400 <= status < 505
    assert message in content["error"]["message"]


def test_what_a_refusal_asks_for_helps(server, serving_folder, serving_chat, tmp_path):
    video = serving_folder / "videos" / "4.mp4"
    good = asking(uri(video))
    elsewhere = shutil.copy(video, tmp_path / "clip.mp4")
    told(server.post(asking("clip.mp4")), "give a data: URI, or a file:// ")
    told(server.post(asking(f"file://{elsewhere}")), "is no file below the server's --allowed_folder")
    assert server.post(asking(f"file://{video}"))[0] == 200
    told(server.post(asking("http://127.0.0.1:9/clip.mp4")), "(--allow_host); send the video as a data: URI")
    told(server.post({**good, "tools": [1]}), "is not served; leave it out")
    system = {"role": "system", "content": "Be short."}
    told(server.post({"messages": [system, *good["messages"]]}), "training; leave this message out")
    told(server.post(asking(uri(video), question="x" * 99_999)), "characters: shorten them")
    assert server.post(good)[0] == 200
    with served(serving_chat, serving_folder / "model") as running:
        told(running.post(asking(f"file://{video}")), "the server allows no files; start it with --allowed_folder")


@pytest.mark.slow
@pytest.mark.parametrize(
    "message, tight, wide",
    [
        ("MiB (--max_body_mib)", {"max_body_mib": 1}, {"max_body_mib": 3}),
        ("MiB (--max_video_mib)", {"max_video_mib": 1}, {"max_video_mib": 3}),
        ("are more than --max_frames 1", {"max_frames": 1}, {"max_frames": 4}),
        ("s (--request_timeout)", {"request_timeout": 1e-3}, {"request_timeout": 60.0}),
    ],
)
def test_a_higher_limit_helps(serving_chat, serving_folder, tmp_path, message, tight, wide):
    long = tmp_path / "long.mp4"
    long.write_bytes((serving_folder / "videos" / "4.mp4").read_bytes() + b"\0\x20\0\0free" + bytes((1 << 21) - 8))
    asked = {
        "max_body_mib": uri(long),
        "max_video_mib": f"file://{long}",
        "max_frames": [uri(b"GIF89a\1\0\1\0\0\0\0,\0\0\0\0\1\0\1\0\0\2\2D\1\0;", "image/gif")] * 2,
        "request_timeout": f"file://{serving_folder / 'videos' / '4.mp4'}",
    }[next(iter(tight))]
    for settings, status in ((tight, None), (wide, 200)):
        folder = long.parent if asked != f"file://{serving_folder / 'videos' / '4.mp4'}" else serving_folder
        with served(serving_chat, serving_folder / "model", allowed_folder=str(folder), **settings) as running:
            answer = running.post(asking(asked))
            if status is None:
                told(answer, message)
            else:
                assert answer[0] == status, answer


@pytest.mark.slow
def test_a_longer_queue_helps(serving_chat, serving_folder):
    url = uri(serving_folder / "videos" / "4.mp4")
    for waiting, refused in ((0, True), (1, False)):
        settings = {"at_once": 1, "max_waiting": waiting, "request_timeout": 1.0}
        with served(serving_chat, serving_folder / "model", **settings) as running, held_answers(running):
            with running.service.admitted():
                answer = running.post(asking(url))
            told(answer, "wait (--max_waiting)" if refused else "(--request_timeout)")


def test_flags_are_mended_as_told(serving_folder, tmp_path, monkeypatch, caplog):
    flags = ["--model_name_or_path", str(serving_folder / "model"), "--port", "0", "--device", "cpu"]
    monkeypatch.setattr(Server, "serve_until_told", lambda server: None)
    missing = tmp_path / "videos"
    with pytest.raises(ValueError, match="is no folder; make it, or name another"):
        main([*flags, "--allowed_folder", str(missing)])
    missing.mkdir()
    with bind(ServeConfig("", port=0)) as taken:
        taken.listen()
        port = str(taken.getsockname()[1])
        with pytest.raises(
            ValueError, match=f"--port {port} cannot be used .*: give another port, or end what listens"
        ):
            main([*flags, "--port", port])
    with pytest.raises(ValueError, match="--host 1.2.3.456 is no address of this machine .*: give 127.0.0.1, or 0.0.0"):
        main([*flags, "--host", "1.2.3.456"])
    caplog.set_level(logging.WARNING, "fastvid")
    assert main([*flags, "--port", port, "--allowed_folder", str(missing), "--host", "0.0.0.0"]) == 0
    assert "everybody who reaches http://0.0.0.0" in caplog.text
    assert "give an --api_key" in caplog.text
    caplog.clear()
    assert main([*flags, "--host", "0.0.0.0", "--api_key", "s3cret"]) == 0
    assert main([*flags, "--host", "127.0.0.1"]) == 0
    assert caplog.text == ""
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "fastvid.serving.server")
    with pytest.raises(ValueError, match=r"fastvid serve needs uvicorn: pip install 'fastvid\[serve\]'"):
        main(flags)
