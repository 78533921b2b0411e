"""Fixtures of servers: a model, clips, and a server that several tests ask."""

import threading

import pytest
from chat_models import model_maker
from clips import draw
from serving_run import served

from fastvid.inference.chat import Chat


@pytest.fixture(scope="session")
def serving_folder(tmp_path_factory):
    """model/, and below videos/ clips of 4, 9 and 30 frames."""
    root = tmp_path_factory.mktemp("serving")
    model_maker(root)("model", question_order="video_first")
    (root / "videos").mkdir()
    for frames in (4, 9, 30):
        draw(root / "videos" / f"{frames}.mp4", frames)
    return root


@pytest.fixture(scope="session")
def serving_chat(serving_folder):
    chat = Chat(
        model_name_or_path=str(serving_folder / "model"),
        max_new_tokens=12,
        device="cpu",
        num_frames=12,
        question_order="video_first",
    )
    yield chat
    chat.close()


@pytest.fixture(scope="module")
def server(serving_chat, serving_folder):
    """A server of usual settings, which allows files."""
    with served(serving_chat, serving_folder / "model", allowed_folder=str(serving_folder / "videos")) as running:
        yield running


class Gate:
    """Holds a server's answers before their next step, until it is opened."""

    def __init__(self, running):
        batcher = running.service._engine._batcher
        self._step, self._opened, batcher.step = batcher.step, threading.Event(), self._held

    def _held(self):
        self._opened.wait(60)
        return self._step()

    def open(self):
        self._opened.set()
