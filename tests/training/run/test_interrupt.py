"""Signals become a request to stop; a second Ctrl-C ends at once."""

from __future__ import annotations

import signal
import threading

import pytest

from training.run.interrupt import StopRequest, stop_on_signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_noted_and_the_next_ctrl_c_is_not(number: signal.Signals) -> None:
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with stop_on_signals() as request:
        assert not request
        signal.raise_signal(number)
        assert request
        assert request.signal is number
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert request.signal is signal.SIGTERM
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before


def failing(seen: list[object]) -> None:
    with stop_on_signals():
        seen.append(signal.getsignal(signal.SIGTERM))
        raise ValueError("in between")


def test_handlers_come_back_after_an_error() -> None:
    before, seen = signal.getsignal(signal.SIGTERM), list[object]()
    with pytest.raises(ValueError, match="in between"):
        failing(seen)
    assert seen != [before]
    assert signal.getsignal(signal.SIGTERM) is before


def test_another_thread_changes_nothing() -> None:
    before, found = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        with stop_on_signals() as request:
            found.append((request, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    ((request, handler),) = found
    assert isinstance(request, StopRequest)
    assert not request
    assert handler is before
