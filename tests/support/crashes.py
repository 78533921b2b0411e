"""Extractions that crash: decoders that stand for a GPU's and do to their process what a plan says."""

import hashlib
import json
import os
import signal
import threading
import time
from pathlib import Path

# Frames of the videos, by which decoders know them. They come in the order of their bytes: f first.
NUMBERS = {name: 5 + i for i, name in enumerate("abcdef")}
ILLEGAL = "CUDA error: an illegal memory access was encountered"


def broken_context():
    from fastvid.video.decode.nvcuvid import check

    check(700, "mapping a picture")


def lines(log):
    """What came to what: [video, where, process, how many others were with decoders]."""
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


class Plan:
    """What goes wrong: ``{(video, where): [what, the first time and the next ones]}``.

    Where: a "decoder" of the process, "PyAV" or the "tower". What: a signal, an exception or a function that raises
    one, "wait" for the end, "crash at the end" or "hang". A crash comes once all videos of
    `together` have come to anything, and never between a video's file and its process's word of it: such a video counts
    as having been there.
    """

    def __init__(self, plan, together, log):
        self.plan, self.together, self.log = plan, together, log
        self.at_hand, self.lock, self.writing = 0, threading.Lock(), threading.Lock()

    def meet(self, video, where, cancelled=lambda: False):
        video = next((name for name, frames in NUMBERS.items() if frames == video), video)
        with self.lock:
            times = sum(line[:2] == [video, where] for line in lines(self.log))
            with open(self.log, "a") as file:
                file.write(json.dumps([video, where, os.getpid(), self.at_hand - 1]) + "\n")
        what = dict(enumerate(self.plan.get((video, where), []))).get(times)
        end = time.monotonic() + 30
        if isinstance(what, str):
            while not (what != "hang" and cancelled()) and time.monotonic() < end:
                time.sleep(0.01)
            if what == "crash at the end":
                signal.raise_signal(signal.SIGSEGV)
        elif what is not None:
            while not set(self.together) <= {name for name, *_ in lines(self.log)} and time.monotonic() < end:
                time.sleep(0.01)
            self.writing.acquire()  # the process ends with it
            if isinstance(what, Exception):
                raise what
            what() if callable(what) else signal.raise_signal(what)  # in this thread, before it goes on

    def decoder(self):
        """As a GPU's, with colours of its own: it gets all videos.

        What it survives is PyAV's, whose bytes are the same.
        """
        from fastvid.video.decode.bitstream import Unsuited

        def patch_rows(stream, encoder):
            self.meet(stream.info.frames, "decoder", lambda: made.cancelled)
            raise Unsuited("it is only a stand-in")

        made = type("StandIn", (), {"name": "stand-in", "conversion": "its own", "cancelled": False})()
        made.patch_rows, made.close = patch_rows, lambda: None
        return made, None

    def worker(self):
        """PyAV within the process, which takes less time to start."""
        from fastvid.video.decode import pyav
        from fastvid.video.decode.bitstream import read_bitstream

        def decode_and_hash(path, digest=True, **options):
            frames, info = pyav.decode(path, **options)
            self.meet(info.frames, "PyAV")
            return frames, info, sha256(path)

        def sha256(path):
            return hashlib.sha256(Path(path).read_bytes()).hexdigest()

        made = type("Here", (), {"kill": lambda self: None, "close": lambda self: None})()
        made.decode_and_hash = decode_and_hash
        made.read_bitstream = lambda path, **options: (read_bitstream(path, **options), sha256(path))
        return made

    def install(self):
        from fastvid import extract
        from fastvid.video import extraction, pipeline, restarts

        prepare, add, opened = pipeline.Pipeline.prepare, pipeline.Pipeline.add, extract.open_device

        def counted(own, path, **options):
            with self.lock:
                self.at_hand += 1
            try:
                return prepare(own, path, **options)
            finally:
                with self.lock:
                    self.at_hand -= 1

        def added(own, key, prepared):
            with self.lock:
                self.at_hand += 1
            self.meet(prepared.info.frames, "tower")
            with self.lock:
                self.at_hand -= 1
            return add(own, key, prepared)

        def set_up(device):
            self.meet("set-up", "set-up")
            return opened(device)

        def written(own, *args):
            with self.writing:
                return write(own, *args)

        pipeline.Pipeline.prepare, pipeline.Pipeline.add, extract.open_device = counted, added, set_up
        write, extraction.Extraction._write = extraction.Extraction._write, written
        pipeline.DecodeWorker = lambda timeout: self.worker()
        pipeline._hardware_decoders = lambda *_: [self.decoder() for _ in range(2)]
        restarts.may_crash = lambda config: True


def extraction(argv, plan, together, log, said, rank):
    """The command, in a process of its own; `said`: files of what it prints. `rank`: of two; None: there is but one."""
    if rank is not None:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    for number, path in enumerate(said, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    from fastvid import cli, extract
    from fastvid.video import restarts

    own = Plan(plan, together, log)
    own.install()
    if most := [int(flag.removeprefix("most=")) for flag in argv if flag.startswith("most=")]:
        restarts._MOST_IN_A_ROW, argv = most[0], argv[:-1]
    main = extract.main

    def ended(argv):
        code = main(argv)
        if os.getpid() != parent:
            own.meet("end", "end")
        return code

    parent, extract.main = os.getpid(), ended
    cli.run("extract", argv)
