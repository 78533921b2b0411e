"""Videos and pictures that a server takes from nowhere: other folders, hosts and links, and what changes meanwhile."""

import dataclasses
import hashlib
import io
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import ThreadingHTTPServer

import local_server
import pytest
from clips import draw
from fake_judge import raw_server
from local_server import serving
from PIL import Image
from serving_run import refused, served, uri
from waiting import LONG, wait_until

from fastvid.serving import media
from fastvid.serving.errors import ApiError
from fastvid.video.sampling import frame_indices

pytestmark = pytest.mark.usefixtures("forked")  # decoders


def test_paths_do_not_lead_out(server, serving_folder, tmp_path):
    """Files elsewhere, whether they exist or not, have one answer."""
    videos = serving_folder / "videos"
    outside = draw(serving_folder / "outside.mp4", 4)
    (videos / "link.mp4").symlink_to(outside)
    (videos / "folder").symlink_to(serving_folder)
    (videos / "within.mp4").symlink_to(videos / "4.mp4")
    os.mkfifo(videos / "pipe.mp4")
    for path in (
        outside,
        f"{videos}/../outside.mp4",
        f"{videos}/%2e%2e/outside.mp4",
        f"{videos}/link.mp4",
        f"{videos}/folder/outside.mp4",
        f"{videos}/pipe.mp4",
        f"{videos}/4.mp4?x",
        f"{videos}/none.mp4",
        f"{videos}/4.mp4%00",
        f"{videos}/{'x' * 300}",
        f"{videos}x/4.mp4",
        videos,
        "/etc/passwd",
        "/proc/self/environ",
        "4.mp4",
        "/tmp/\ud800",
        f"//elsewhere{videos}/4.mp4",
    ):
        refused(server.ask(f"file://{path}"), 400, "is no file below the server's --allowed_folder")
    refused(server.ask(f"file://elsewhere{videos}/4.mp4"), 400, "is no file below")
    for path in (f"{videos}/4.mp4", f"{videos}/within.mp4", f"{videos}/../videos/%34.mp4", f"localhost{videos}/4.mp4"):
        assert server.ask(f"file://{path}")[0] == 200


def test_files_are_not_for_everybody(serving_chat, serving_folder):
    with served(serving_chat, serving_folder / "model") as running:
        refused(running.ask(f"file://{serving_folder}/videos/4.mp4"), 400, "start it with --allowed_folder")


def test_playlists_name_nothing(server, serving_folder):
    """A video is one file, whatever it says."""
    for text in (
        f"ffconcat version 1.0\nfile {serving_folder}/videos/4.mp4\n",
        f"#EXTM3U\n{serving_folder}/videos/4.mp4\n",
    ):
        refused(server.ask(uri(text.encode())), 400, "the file")


@contextmanager
def host(answer):
    """A web server that answers as told: "host:port", and what it was asked."""
    asked = []

    class Handler(local_server.Handler):
        def do_GET(self):
            asked.append(self.path)
            answer(self)

    web = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    with serving(web):
        yield f"127.0.0.1:{web.server_port}", asked


def test_remote_addresses_are_not_asked(server):
    with host(lambda handler: handler.send_error(500)) as (address, asked):
        refused(server.ask(f"http://{address}/clip.mp4"), 400, "the server asks no such host (--allow_host)")
        refused(server.ask([f"http://{address}/1.png"]), 400, "the server asks no such host")
        assert asked == []


@pytest.mark.slow
def test_allowed_hosts_are_asked_with_care(serving_chat, serving_folder):
    content = (serving_folder / "videos" / "4.mp4").read_bytes()
    released = threading.Event()

    def answer(handler):
        if handler.path == "/elsewhere":
            handler.send_response(302)
            handler.send_header("Location", "/clip.mp4")
            handler.end_headers()
            return
        if handler.path == "/missing":
            handler.send_error(404)
            return
        handler.send_response(200)
        handler.end_headers()
        if handler.path == "/late":
            released.wait(60)
        for _ in range(3 << 10 if handler.path == "/endless" else 0):
            handler.wfile.write(bytes(1 << 10))
        handler.wfile.write(content)

    with (
        host(answer) as (address, asked),
        served(
            serving_chat, serving_folder / "model", allow_host=[address], max_video_mib=1, decode_timeout=2.0
        ) as running,
    ):
        for worker in running.service._features._workers:
            worker.timeout = LONG  # the two seconds are those of a host
        assert running.ask(f"http://{address}/clip.mp4")[0] == 200
        assert running.ask(f"http://{address}/clip.mp4?again")[0] == 200
        assert running.metric('fastvid_feature_cache_total{found="yes"}') == 1  # known by its content
        refused(running.ask(f"http://{address}/elsewhere"), 400, "redirects are not followed")
        refused(running.ask(f"http://{address}/missing"), 400, "answers 404")
        refused(running.ask(f"http://{address}/endless"), 413, "more than 1 MiB (--max_video_mib)")
        refused(running.ask(f"http://{address}/late"), 504, "takes longer than 2 s")
        released.set()
        before = len(asked)
        refused(running.ask(f"http://user:word@{address}/clip.mp4"), 400, "holds a user's name")
        refused(running.ask(f"http://{address}@localhost/clip.mp4"), 400, "asks no such host")
        refused(running.ask(f"http://localhost:{address.split(':')[1]}/clip.mp4"), 400, "asks no such host")
        refused(running.ask("http://127.0.0.1/clip.mp4"), 400, "asks no such host")
        refused(running.ask("http://[/clip.mp4"), 400, "is no address")
        assert len(asked) == before
        assert os.listdir(running.service._spool.name) == []


@pytest.mark.slow
def test_silent_hosts_hold_up_nobody(serving_chat, serving_folder):
    """Who asks for what they do not send waits for his own time alone, and nothing of it is left."""
    released = threading.Event()

    def silent(handler):
        released.wait(LONG)
        handler.send_error(404)

    with (
        host(silent) as (address, asked),
        served(
            serving_chat, serving_folder / "model", allow_host=[address], request_timeout=LONG, decode_timeout=LONG
        ) as running,
        ThreadPoolExecutor(12) as pool,
    ):
        try:
            waiting = [pool.submit(running.ask, f"http://{address}/{number}") for number in range(6)]
            wait_until(lambda: len(asked) == 6)
            assert running.ask(uri(serving_folder / "videos" / "4.mp4"))[0] == 200
            running.service.config = dataclasses.replace(running.service.config, request_timeout=1.0)
            for late in [pool.submit(running.ask, f"http://{address}/late/{number}") for number in range(6)]:
                refused(late.result(), 504, "longer than ")  # than the request may, or than the host then has left
            assert not any(each.done() for each in waiting)
            assert not released.is_set()
            began = time.monotonic()
            with pytest.raises(ApiError, match=r"takes longer than 0\.(2|1\d+) s"):
                running.service._addresses.open(f"http://{address}/late", False, began + 0.2)
        finally:
            released.set()
        for each in waiting:
            refused(each.result(), 400, "answers 404")
        wait_until(lambda: os.listdir(running.service._spool.name) == [])


@pytest.mark.slow
def test_what_is_fetched_for_nobody_is_removed(serving_chat, serving_folder):
    released, content = threading.Event(), (serving_folder / "videos" / "4.mp4").read_bytes()

    def late(handler):
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(content[:9])
        released.wait(60)
        handler.wfile.write(content[9:])

    with (
        host(late) as (address, _),
        served(serving_chat, serving_folder / "model", allow_host=[address], request_timeout=0.5) as running,
    ):
        addresses, made = running.service._addresses, []
        open_one = addresses.open
        addresses.open = lambda url, pictures, _: made.append(open_one(url, pictures, time.monotonic() + 60)) or made[0]
        refused(running.ask(f"http://{address}/clip.mp4"), 504, "(--request_timeout)")
        released.set()
        wait_until(lambda: made)
        wait_until(lambda: os.listdir(running.service._spool.name) == [])
        assert addresses._spool._used == 0


def test_only_pictures_that_are_seen_are_opened(serving_chat, serving_folder):
    """The others may be anything; they change neither the answer nor what it is kept by."""
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "png")
    seen = frame_indices(20_000, 12)
    urls = ["http://nowhere.invalid/1.png"] * 20_000
    for number, index in enumerate(seen):
        urls[index] = uri(picture.getvalue() + bytes(number), "image/png")
    with served(serving_chat, serving_folder / "model") as running:
        opened, open_one = [], running.service._addresses.open
        running.service._addresses.open = lambda url, *rest: opened.append(url) or open_one(url, *rest)
        answer = running.ask(urls)
        assert answer[0] == 200, answer
        assert opened == [urls[index] for index in seen]
        urls[0], urls[-1] = "ftp://nowhere.invalid", "ftp://nowhere.invalid"
        assert running.ask(urls)[0] == 200
        assert running.metric('fastvid_feature_cache_total{found="yes"}') == 1
        assert running.ask(urls[: seen[0] + 1])[0] == 400  # fewer than frames: all are seen
        assert os.listdir(running.service._spool.name) == []


@pytest.mark.parametrize("what", ["file", "folder"])
def test_no_link_is_followed_that_comes_late(server, serving_folder, tmp_path, monkeypatch, what):
    """One that is put in when the path was found to be good already."""
    folder, elsewhere = serving_folder / "videos" / f"late-{what}", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    path = shutil.copy(serving_folder / "videos" / "4.mp4", folder / "clip.mp4")
    outside, inside = draw(elsewhere / "clip.mp4", 4), media.inside

    def then_swapped(real, allowed):
        found = inside(real, allowed)
        if not folder.is_symlink() and not path.is_symlink():
            if what == "file":
                path.unlink()
                path.symlink_to(outside)
            else:
                folder.rename(tmp_path / "away")
                folder.symlink_to(elsewhere)
        return found

    monkeypatch.setattr(media, "inside", then_swapped)
    refused(server.ask(f"file://{path}"), 400, "is no file below the server's --allowed_folder")


def test_what_changes_while_it_is_read_is_not_kept(serving_chat, serving_folder, tmp_path):
    """Neither a video under another's digest, nor an answer about what a link leads to."""
    path, other = tmp_path / "clip.mp4", tmp_path / "other.mp4"
    four, nine = ((serving_folder / "videos" / f"{frames}.mp4").read_bytes() for frames in (4, 9))
    with served(serving_chat, serving_folder / "model", allowed_folder=str(tmp_path)) as running:
        store = running.service._features
        decode = store._decode
        for swap in (lambda: other.replace(path), lambda: (path.unlink(), path.symlink_to(other)), path.unlink):
            path.unlink(missing_ok=True)
            path.write_bytes(four)
            other.write_bytes(nine)
            decoded = []

            def swapped(worker, file, swap=swap, decoded=decoded):
                begun = worker.decode

                def late(*arguments, **options):
                    decoded.append(begun(*arguments, **options))
                    swap()
                    return decoded[0]

                worker.decode = late
                try:
                    return decode(worker, file)
                finally:
                    del worker.decode

            store._decode = swapped
            refused(running.ask(f"file://{path}"), 400, "clip.mp4 was changed while it was read; ask again")
            assert decoded
            assert store.bytes == 0
        store._decode = decode
        path.write_bytes(four)
        assert running.ask(f"file://{path}")[0] == 200


def test_a_folder_that_was_tidied_away_is_made_again(tmp_path, monkeypatch):
    """As /tmp's is of a server that nobody asked for days; room is counted as before."""
    folder = tmp_path / "spool"
    folder.mkdir()
    spool = media.Spool(folder, 4)
    lost = spool.keep([b"one"])
    shutil.rmtree(folder)
    lost.remove()
    for _ in range(2):
        kept = spool.keep([b"four"])
        assert kept.path.read_bytes() == b"four" and folder.stat().st_mode & 0o777 == 0o700
        kept.remove()
        kept.remove()
    folder.rmdir()
    with monkeypatch.context() as patch, pytest.raises(FileNotFoundError):
        patch.setattr(os, "geteuid", lambda: -1)  # the folder is somebody else's
        spool.keep([b"four"])
    folder.rmdir()
    folder.symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError):
        spool.keep([b"four"])


@pytest.mark.parametrize("begin", [b"HTTP/1.1 200 OK\r\nA: ", b"HTTP/1.1 200 OK\r\n\r\n"], ids=["head", "body"])
def test_a_host_that_drips_has_its_time(tmp_path, begin):
    """A byte within each of a socket's own time-outs."""
    all_sent = threading.Event()

    def talk(connection, ended):
        connection.sendall(begin)
        for _ in range(100):  # five seconds
            if ended.wait(0.05):
                break
            connection.sendall(b"a")
        else:
            all_sent.set()

    with raw_server(talk) as url:
        address = url.removeprefix("http://").removesuffix("/v1")
        settings = {"allowed_folder": None, "allow_host": [address], "most_bytes": 9999, "timeout": 0.3}
        addresses = media.Addresses(media.Spool(tmp_path, 9999), **settings)
        with pytest.raises(ApiError, match="takes longer than 0.3 s") as refused:
            addresses.open(url, False, time.monotonic() + LONG)
        assert not all_sent.is_set()
    assert refused.value.status == 504 and os.listdir(tmp_path) == []


def test_where_links_lead_is_not_told(server, serving_folder):
    """Of a file that may be read, and holds no features."""
    hidden, link = serving_folder / "videos" / "hidden", serving_folder / "videos" / "link"
    hidden.mkdir()
    (hidden / "bad.safetensors").write_bytes(b"bad" * 9)
    link.symlink_to(hidden)
    status, content = server.ask(f"file://{link}/bad.safetensors")
    assert status == 400 and "extract it again" in content["error"]["message"]
    assert "hidden" not in content["error"]["message"]


def test_a_digest_is_of_what_a_file_holds_now(tmp_path):
    """Whoever sets the time of a file's change back deceives nobody."""
    path, settings = tmp_path / "a.mp4", {"allow_host": [], "most_bytes": 9, "timeout": 1.0}
    addresses = media.Addresses(media.Spool(tmp_path, 9), allowed_folder=str(tmp_path), **settings)
    digests = set()
    for content in (b"one", b"two"):
        path.write_bytes(content)
        os.utime(path, ns=(10**18, 10**18))
        digests |= {addresses.open(f"file://{path}", False, 0.0).digest for _ in range(2)}
    assert digests == {hashlib.sha256(content).hexdigest() for content in (b"one", b"two")}
