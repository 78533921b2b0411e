"""Signals that ask a command to stop."""

import os
import signal

import pytest

from fastvid import signals


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_is_noted_and_the_handlers_come_back(number):
    before, noted = [signal.getsignal(each) for each in signals.STOPPING], []
    with signals.noted(noted.append):
        send(number)
        send(number)  # the same once more, as from torchrun and the terminal
    assert noted == [number, number]
    assert [signal.getsignal(each) for each in signals.STOPPING] == before


@pytest.mark.parametrize("later, raises", [(signals.SAME - 1, False), (signals.SAME + 1, True)])
def test_a_later_ctrl_c_interrupts_at_once(monkeypatch, later, raises):
    times, noted = iter([100.0, 100.0 + later]), []
    monkeypatch.setattr(signals.time, "monotonic", lambda: next(times))
    with signals.noted(noted.append):
        send(signal.SIGTERM)
        if raises:
            with pytest.raises(KeyboardInterrupt):
                send(signal.SIGINT)
        else:
            send(signal.SIGINT)
    assert len(noted) == 2 - raises


def test_nohup_stays():
    before, noted = signal.signal(signal.SIGHUP, signal.SIG_IGN), []
    try:
        with signals.noted(noted.append):
            send(signal.SIGHUP)
        assert noted == [] and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
