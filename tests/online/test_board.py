"""The memory that an encoder and its readers share."""

import pytest

from fastvid.online.board import Board


@pytest.mark.parametrize(
    "error, told",
    [
        (FileNotFoundError(2, "there is none"), ("OSError", "[Errno 2] there is none")),
        (ValueError("no such\ntower"), ("ValueError", "no such tower")),
        (RuntimeError("CUDA error"), ("Exception", "CUDA error")),
        (SystemExit("as a library may do"), ("Exception", "as a library may do")),
        (KeyboardInterrupt(), ("Exception", "")),
    ],
)
def test_readers_learn_what_ended_the_encoder(error, told):
    board = Board(3)
    assert board.told is None
    board.tell(error)
    assert board.told == told
    board.close()
