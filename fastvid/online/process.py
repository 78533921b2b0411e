"""The program that encodes videos while a rank trains: ``python -m fastvid.online.process BOARD SETUP``.

It is a process of its own, so that neither the trainer's interpreter nor its precision settings have a part in it, and
a decoder or a tower that crashes does not take the weights along. BOARD and SETUP are open files: a `Board`, and JSON
of "config" (`ExtractConfig`), "videos" ([path, name, output]) and "order" (numbers of videos). On stdin come numbers of
videos that somebody waits for, some on a line; "end", or the death of all who could write there, ends it.

Files, manifest and leases are those of ``fastvid extract``.
"""

import contextlib
import json
import os
import signal
import sys
import threading
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

from fastvid.files import shown
from fastvid.online.board import FAILED, MADE, Board
from fastvid.online.turns import Turns

_LOOKS_UP = 0.1  # seconds between looks at whether to stop, and at decoders that do not answer
_GRACE = 30.0  # seconds to end in, once nobody wants more


def main(board_file: int, setup_file: int, requests: int) -> int:
    """Encode what is asked for; returns the exit code."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # they reach the whole job: the trainer ends this
        signal.signal(number, signal.SIG_IGN)
    with open(setup_file, "rb") as file:
        setup = json.load(file)
    board = Board(len(setup["videos"]), board_file)
    turns = Turns(setup["order"], board)
    threading.Thread(target=_heed, args=(requests, turns), daemon=True).start()
    try:
        _encode(setup, turns, board)
    except BaseException as error:
        board.tell(error)
        if not isinstance(error, (ValueError, OSError)):
            raise
        return 1
    return 0


def _heed(requests, turns):
    """Do what the trainer and its readers ask for, until they want no more."""
    for line in _lines(requests):
        if line == b"end":
            break
        turns.first([int(number) for number in line.split()])
    turns.stop()
    late = threading.Timer(_GRACE, os._exit, [1])
    late.daemon = True
    late.start()


def _lines(pipe):
    """Lines as they come. A buffered file's lock, held by a thread that waits, would abort the interpreter's end."""
    content = b""
    while more := os.read(pipe, 1 << 16):
        *lines, content = (content + more).split(b"\n")
        yield from lines


def _encode(setup, turns, board):
    from transformers.utils.logging import disable_progress_bar

    from fastvid.config import ExtractConfig
    from fastvid.features.manifest import Manifest
    from fastvid.files import remove_left_over
    from fastvid.video.earlier import EarlierFeatures
    from fastvid.video.encoder import make_current, open_device
    from fastvid.video.features import VideoFeatures, default_device
    from fastvid.video.leases import Leases
    from fastvid.video.listing import Video

    disable_progress_bar()  # of loading the tower: the trainer has one of its own
    config = ExtractConfig(**setup["config"])
    make_current(open_device(config.device or default_device()))
    features = VideoFeatures(config)
    features.open()
    leases, manifest = Leases(config.clip_feat_path), Manifest(config.clip_feat_path)
    earlier = EarlierFeatures(config, features.settings, features.shape, manifest)
    videos = [Video(*each) for each in setup["videos"]]
    with contextlib.ExitStack() as stack:  # each is closed, whatever the closing of another raises
        for opened in (leases, manifest, features):
            stack.callback(opened.close)
        remove_left_over(config.clip_feat_path)
        leases.open()
        manifest.open(leases)
        _Encoding(features, leases, manifest, earlier, videos, turns, board).run()


class _Encoding:
    """Threads that each take a video from its file to its features."""

    def __init__(self, features, leases, manifest, earlier, videos, turns, board):
        self.features, self.pipeline, self.leases = features, features.pipeline, leases
        self.manifest, self.earlier, self.videos, self.turns, self.board = manifest, earlier, videos, turns, board
        self._lock = threading.Lock()  # of leases, manifest and board

    def run(self):
        # While one video is with the tower, its thread uses no decoder.
        count = self.pipeline.at_a_time + self.pipeline.towers
        with ThreadPoolExecutor(count, thread_name_prefix="encode") as threads:
            serving = [threads.submit(self._serve) for _ in range(count)]
            while left := wait(serving, timeout=_LOOKS_UP, return_when=FIRST_EXCEPTION).not_done:
                if any(each.exception() for each in serving if each not in left):
                    self.turns.stop()
                if self.turns.stopped:
                    self.pipeline.kill()
                if late := self.pipeline.overdue():
                    self._end_now(late)
        for each in serving:
            each.result()

    def _serve(self):
        while (number := self.turns.next()) is not None:
            video = self.videos[number]
            lease = video.lease(self.features.config.clip_feat_path)
            with self._lock:
                taken = self.leases.take(lease)
            if not taken:
                self.turns.leave(number, again=True)
                continue
            try:
                state = self._state_of(video)
            finally:
                with self._lock:
                    self.leases.release(lease)
            if state:
                with self._lock:
                    self.board.finish(number, state)
            self.turns.leave(number)

    def _state_of(self, video):
        """What becomes of a leased video, whoever makes its features; None where a stop came before."""
        with self._lock:
            self.manifest.look_again()
            if video.name in self.manifest.failed_elsewhere:
                return FAILED
            _, redo, fault = self.earlier.judge(video, fresh=True)
        if fault is None and redo == "":
            return MADE
        entry = (
            self.features.extract(video)
            if fault is None
            else {"video": video.name, "status": "failed", "reason": fault}
        )
        failed = entry["status"] == "failed"
        if failed and self.turns.stopped:  # its decoder was ended
            return None
        with self._lock:
            self.manifest.append(**entry)
        return FAILED if failed else MADE

    def _end_now(self, late):
        """End the process: a thread that waits for a GPU's decoder cannot be ended alone."""
        self.board.tell(
            OSError(
                f"the GPU's decoder does not answer ({', '.join(map(shown, late))}); extract the features first, with "
                "`fastvid extract --decoder pyav`"
            )
        )
        os._exit(1)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), sys.stdin.fileno()))
