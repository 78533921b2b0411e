"""Tasks of a GPU check that go wrong, for its tests."""

import os
import signal
import time


def fine(**arguments):
    yield {"row": "fine", "value": 1.0}


def raises(**arguments):
    yield {"row": "before", "value": 1.0}
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def hangs(**arguments):
    yield {"row": "before", "value": 1.0}
    time.sleep(600)


def is_killed(**arguments):
    yield {"row": "before", "value": 1.0}
    os.kill(os.getpid(), signal.SIGKILL)


def is_absent(**arguments):
    yield {"row": "library", "absent": "no such library"}


def is_wrong(**arguments):
    yield {"row": "wrong", "status": "failed", "error": "error 3 in [4], at most 1 is allowed"}


def meets(name, others, folder, **arguments):
    """Says that it runs, and waits until all `others` have said so."""
    for each in (name, *others):
        path = f"{folder}/{each}"
        if each == name:
            open(path, "w").close()
        for _ in range(600):
            if os.path.exists(path):
                break
            time.sleep(0.02)
        else:
            raise RuntimeError(f"{each} does not run beside {name}")
    yield {"row": "met", "value": 1.0}


def finds(names, folder, **arguments):
    """Which of some have run."""
    yield {"row": "found", "there": [name for name in names if os.path.exists(f"{folder}/{name}")]}
