"""A rank that dies is named, and the others end within two minutes, wherever they wait for it.

torchrun ends the ranks of the node on which one died, with a signal that a rank cannot heed while it waits for a GPU;
of other nodes nobody ends them before the process group's own timeout. So each rank says every second that it lives,
through the store by which the ranks met; rank 0 listens to all, the others listen to rank 0. No collective is used: it
works while the main thread hangs in one. A rank that lives but hangs is left to the process group's timeout, and shows
where it stands when the job ends.
"""

import faulthandler
import os
import signal
import socket
import sys
import threading
import time
from datetime import timedelta
from typing import TextIO

from torch.distributed import Store

STORE = "rank 0 or its launcher"  # where the store lies: who is gone when it does not answer
LOST = "heartbeat/lost"  # key under which rank 0 tells the others who has died
# Seconds; a rank that says nothing for so long is dead. Longer than C code may hold the interpreter's lock, in which no
# thread of a living rank can speak: json holds it for half a minute over 1.5 GB of records.
EVERY, SILENCE = 1.0, 60.0


def show_stacks() -> None:
    """Have this process write where its threads stand: at SIGUSR1, and when it aborts, as a timeout of NCCL makes
    it."""
    faulthandler.register(signal.SIGUSR1, file=_stderr())
    if not faulthandler.is_enabled():
        faulthandler.enable(_stderr())


class Heartbeat:
    """This rank's signs of life, from its own thread until `stop`.

    Args:
        store: torch.distributed store of all ranks and of no earlier ones; its clone is used.
        rank, size: as torchrun numbers them.
        every: seconds between signs of life.
        silence: seconds without one after which a rank is taken for dead, and this process ends with exit code 1.
    """

    def __init__(self, store: Store, rank: int, size: int, *, every: float = EVERY, silence: float = SILENCE):
        # A store serves one caller at a time, and the main thread may wait in its own.
        self.store: Store = store.clone()  # pyright: ignore[reportAttributeAccessIssue]  # torch's stub lacks it
        self.store.set_timeout(timedelta(seconds=silence))
        self.rank, self.size, self.every, self.silence = rank, size, every, silence
        self.beats = 0
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._beat()

    def start(self) -> None:
        """Begin to listen. Every rank has been constructed by then."""
        self.thread.start()

    def stop(self) -> None:
        """No more signs of life, and none expected."""
        self.stopped.set()
        self.thread.join()

    def silent_ranks(self) -> list[str]:
        """What is known of ranks that give no sign of life while this waits for a few."""
        others = [rank for rank in range(self.size) if rank != self.rank]
        try:
            before = self._heard(others)
            time.sleep(4 * self.every)
            return [_describe(rank, value) for rank, value in self._heard(others).items() if value == before[rank]]
        except RuntimeError:
            return [STORE]

    def _beat(self):
        self.beats += 1
        self.store.set(f"heartbeat/{self.rank}", f"{self.beats} pid {os.getpid()} on {socket.gethostname()}")

    def _heard(self, ranks):
        values = self.store.multi_get([f"heartbeat/{rank}" for rank in ranks])
        return {rank: value.decode() for rank, value in zip(ranks, values)}

    def _run(self):
        listened_to = [rank for rank in range(self.size) if rank != self.rank] if self.rank == 0 else [0]
        # Silence is counted in beats of our own: a machine that stood still has missed nobody's.
        heard, since = {}, {}
        while not self.stopped.wait(self.every):
            try:
                self._beat()
                if self.store.check([LOST]):
                    self._end(self.store.get(LOST).decode())
                for rank, value in self._heard(listened_to).items():
                    if heard.get(rank) != value:
                        heard[rank], since[rank] = value, self.beats
                    elif (self.beats - since[rank]) * self.every > self.silence:
                        lost = f"{_describe(rank, value)} has given no sign of life for {self.silence:g} s"
                        self.store.set(LOST, lost)
                        self._end(lost)
            except RuntimeError as error:
                self._end(f"{STORE} is gone: {str(error).splitlines()[0]}")

    def _end(self, reason):
        if self.stopped.is_set():
            return
        faulthandler.dump_traceback(_stderr())  # a peer may have died because this one hangs
        # In one piece: print would let another rank's line in before its own end.
        sys.stderr.write(f"fastvid: error: {reason}; rank {self.rank} ends. {what_follows()}\n")
        sys.stderr.flush()
        os._exit(1)


def what_follows() -> str:
    """What becomes of a job that has lost a rank: torchrun may start it again by itself."""
    count, most = (int(os.environ.get(f"TORCHELASTIC_{name}", 0)) for name in ("RESTART_COUNT", "MAX_RESTARTS"))
    if count < most:
        return (
            f"torchrun, if it lives, starts the job again (restart {count + 1} of {most}), which goes on from the "
            "last checkpoint"
        )
    return "Start the same command again to go on from the last checkpoint"


def _stderr() -> TextIO:
    """The process's own, whatever stands for it."""
    return sys.__stderr__ or sys.stderr


def _describe(rank, value):
    return f"rank {rank} ({value.partition(' ')[2]})"
