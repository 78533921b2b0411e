"""The demo page in a real browser, as wide as a desktop's window and as a phone."""

import os
import shutil

import pytest
from clips import draw
from serving_run import served

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    if BROWSER is None:
        pytest.skip("there is no Chromium: apt-get install chromium")
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"] * (os.getuid() == 0))
        yield found
        found.close()


@pytest.fixture(scope="module")
def demo(serving_chat, serving_folder):
    with served(serving_chat, serving_folder / "model", demo=True, api_key="s3cret") as running:
        yield running


def opened(browser, demo, width):
    """A page that was let in, and what goes wrong in it."""
    page, wrong = browser.new_page(viewport={"width": width, "height": 900}), []
    page.set_default_timeout(30_000)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda line: wrong.append(line.text) if "Content Security Policy" in line.text else None)
    page.on("request", lambda request: wrong.append(request.url) if demo.url not in request.url[:40] else None)
    page.on("dialog", lambda dialog: dialog.accept("s3cret"))
    page.goto(demo.url)
    page.locator("#model", has_text="model").wait_for()
    return page, wrong


@pytest.mark.slow
@pytest.mark.parametrize("width", [1200, 360])
def test_a_clip_is_shown_and_asked_about(browser, demo, serving_chat, serving_folder, width):
    clip = serving_folder / "videos" / "30.mp4"
    page, wrong = opened(browser, demo, width)
    page.set_input_files("#file", clip)
    page.wait_for_selector("#seen")
    captions = page.locator("#frames figcaption").all_inner_texts()
    assert len(captions) == 12
    assert captions[0] == "0.04 s, frame 1"
    assert page.locator("#strip rect").count() == 12
    sizes = page.evaluate("[...document.images].filter(i => i.src).map(i => i.complete ? i.naturalWidth : -1)")
    assert len(sizes) == 15
    assert min(sizes) > 0
    widths = page.evaluate("[...document.querySelectorAll('.norm i')].map(bar => bar.style.width)")
    assert len(set(widths)) > 3
    assert "64 × 48, 1.2 s, 12 of 30 frames, 16 tokens" in page.inner_text("#told")

    answer = serving_chat.ask(clip, "what plays?")
    page.fill("#question", "what plays?")
    page.press("#question", "Enter")
    page.wait_for_selector("#send:enabled")
    assert page.inner_text(".turn .asked") == "what plays?"
    assert page.text_content(".turn .answer") == answer
    page.fill("#question", "who is?")
    page.click("#send")
    page.wait_for_selector("#send:enabled")
    again = serving_chat.ask(clip, "who is?", [("what plays?", answer)])
    assert page.locator(".turn .answer").nth(1).text_content() == again
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.is_hidden("#error")
    assert wrong == []
    if folder := os.environ.get("FASTVID_SCREENSHOTS"):
        page.screenshot(path=f"{folder}/demo-{width}.png", full_page=True)
    page.close()


@pytest.mark.slow
def test_a_bad_file_is_told(browser, demo, serving_folder, tmp_path):
    bad = tmp_path / "<b>bad.mp4"
    bad.write_bytes(b"no video")
    page, wrong = opened(browser, demo, 700)
    page.set_input_files("#file", bad)
    page.wait_for_selector("#error:visible")
    assert page.inner_text("#error").startswith("<b>bad.mp4: the file cannot be opened")
    assert "up to 128 MiB" in page.inner_text("#drop")
    assert page.is_hidden("#seen")
    assert page.is_hidden("#talk")
    page.set_input_files("#file", serving_folder / "videos" / "4.mp4")  # and another one will do
    page.wait_for_selector("#seen")
    assert page.is_hidden("#error")
    page.fill("#question", "what is <vid_patch>")
    page.click("#send")
    page.wait_for_selector("#error:visible")
    assert "<vid_patch>" in page.inner_text("#error")
    page.set_input_files("#file", bad)  # the clip and what was said about it stay
    page.locator("#error", has_text="bad.mp4").wait_for()
    assert page.is_visible("#seen")
    assert page.is_visible("#talk")
    assert page.locator(".turn").count() == 1
    assert page.inner_text("#told").startswith("4.mp4: ")
    page.evaluate("document.getElementById('drop').dataset.most = '0'")
    page.set_input_files("#file", bad)  # is not sent
    page.locator("#error", has_text="it has more than 0 MiB").wait_for()
    assert wrong == []
    page.close()


@pytest.mark.slow
def test_a_forgotten_clip_is_sent_again(browser, demo, serving_chat, serving_folder, tmp_path):
    page, wrong = opened(browser, demo, 700)
    clip = draw(tmp_path / "clip.mp4", 7)
    page.set_input_files("#file", clip)
    page.wait_for_selector("#seen")
    demo.service._features._kept.clear()
    demo.service._features.bytes = 0
    page.fill("#question", "what plays?")
    page.click("#send")
    page.wait_for_selector("#send:enabled")
    assert page.text_content(".turn .answer") == serving_chat.ask(clip, "what plays?")
    assert wrong == []
    page.close()
