"""The demo command: the page of a server that only this machine reaches."""

import threading
import webbrowser

import pytest
import urllib3
from waiting import wait_until

from fastvid.demo import main
from fastvid.serving.server import Server


@pytest.mark.parametrize("desktop", [True, False])
def test_the_page_is_served_and_opened(serving_folder, monkeypatch, capfd, desktop):
    """Its address is told once it answers, and opened where there is a desktop."""
    servers, opened, codes = [], [], []
    until_told = Server.serve_until_told
    monkeypatch.setattr(Server, "serve_until_told", lambda self: (servers.append(self), until_told(self)))
    monkeypatch.setattr(webbrowser, "open", lambda url: opened.append((url, get(url).status)))
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.setenv("DISPLAY", ":0" if desktop else "")
    flags = ["--model_name_or_path", serving_folder / "model", "--device", "cpu", "--num_frames", "12", "--port", "0"]
    thread = threading.Thread(target=lambda: codes.append(main([*map(str, flags)])))
    thread.start()
    said = ""

    def told():
        nonlocal said
        said += capfd.readouterr().out
        return "\n" in said.partition("the page is at ")[2]

    try:
        wait_until(told)
        url = said.partition("the page is at ")[2].split()[0]
        assert url.startswith("http://127.0.0.1:")
        page = get(url)
        assert page.status == 200 and b"Drop a clip here" in page.data
        wait_until(lambda: len(opened) == desktop)
        assert opened == ([(url, 200)] if desktop else [])
    finally:
        servers[0].end()
        thread.join(60)
    assert codes == [0]


def get(url):
    return urllib3.request("GET", url, retries=False, timeout=60)
