"""Processes that stand for ranks."""

import os
import sys


def leave():
    """End a rank whose work is done, past the interpreter's shutdown.

    Once something was sharded, gloo's threads outlive the process group, and one that drops its last tensor while the
    interpreter shuts down aborts the process. Commands leave the same way (`fastvid.cli.run`).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
