"""Streams of events, and what an outbox sends at once, together and in which order."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable

import pytest

from engine.policy import ExpertPolicy
from engine.serving.event_stream import EventStream, Outbox
from engine.serving.request import Request, SamplingParams, TokenEvent, TokenLogprob

LONG = 60.0  # seconds that no test waits for


def run(test: Callable[[], Awaitable[None]]) -> None:
    """Run a test's coroutine, at most 20 s."""

    async def bounded() -> None:
        await asyncio.wait_for(test(), 20)

    asyncio.run(bounded())


def event(index: int, *, last: bool = False) -> TokenEvent:
    token = TokenLogprob(5, "a", -1.0)
    return TokenEvent("r", index, token, "a", finish_reason="length" if last else None)


def stream() -> EventStream:
    request = Request("r", [1, 2], SamplingParams(), ExpertPolicy.dense())
    return EventStream(request, lambda _: None)


async def turns(count: int = 3) -> None:
    """Let the loop run what was handed to it."""
    for _ in range(count):
        await asyncio.sleep(0)


def indices(events: list[TokenEvent]) -> list[int]:
    return [event.index for event in events]


def test_take_gives_all_that_has_come() -> None:
    async def test() -> None:
        reader = stream()
        reader.put([event(0), event(1)])
        assert indices(await reader.take()) == [0, 1]
        reader.put([event(2)])
        assert (await anext(reader)).index == 2
        taking = asyncio.create_task(reader.take())
        await turns()
        assert not taking.done()
        reader.put([event(3, last=True)])
        assert indices(await taking) == [3]
        assert await reader.take() == []

    run(test)


def test_the_first_and_the_last_event_never_wait() -> None:
    async def test() -> None:
        outbox, reader, other = Outbox(asyncio.get_running_loop(), LONG), stream(), stream()
        outbox.send([(reader, event(0))])
        assert indices(await reader.take()) == [0]
        await turns()  # by now the outbox has handed over, and holds back what comes
        outbox.send([(reader, event(1)), (other, event(7))])
        outbox.send([(reader, event(2)), (other, event(8))])
        taking = asyncio.create_task(reader.take())
        await asyncio.sleep(0.05)
        assert not taking.done()
        outbox.send([(reader, event(3, last=True))])
        assert indices(await taking) == [1, 2, 3]
        with pytest.raises(TimeoutError):  # the other's are still held back
            await asyncio.wait_for(other.take(), 0.05)

    run(test)


def test_what_is_held_back_comes_after_the_interval_in_order() -> None:
    async def test() -> None:
        outbox, reader = Outbox(asyncio.get_running_loop(), 0.1), stream()
        outbox.send([(reader, event(0))])
        await reader.take()
        await turns()
        started = time.monotonic()
        for index in range(1, 6):
            outbox.send([(reader, event(index))])
        assert indices(await reader.take()) == [1, 2, 3, 4, 5]
        assert 0.05 < time.monotonic() - started < 5

    run(test)


def test_what_comes_after_a_pause_goes_at_once() -> None:
    async def test() -> None:
        outbox, reader = Outbox(asyncio.get_running_loop(), 0.05), stream()
        outbox.send([(reader, event(0))])
        await reader.take()
        await asyncio.sleep(0.1)
        outbox.send([(reader, event(1))])
        await turns()
        taking = asyncio.create_task(reader.take())
        await turns()
        assert taking.done()

    run(test)


def test_without_an_interval_nothing_is_held_back() -> None:
    async def test() -> None:
        outbox, reader = Outbox(asyncio.get_running_loop(), 0.0), stream()
        for index in range(4):
            outbox.send([(reader, event(index))])
            await turns()
            assert indices(await reader.take()) == [index]

    run(test)


def test_another_thread_may_send() -> None:
    async def test() -> None:
        outbox, reader, count = Outbox(asyncio.get_running_loop(), 0.001), stream(), 2000

        def send() -> None:
            for index in range(count):
                outbox.send([(reader, event(index, last=index == count - 1))])

        thread = threading.Thread(target=send)
        thread.start()
        assert [event.index async for event in reader] == list(range(count))
        thread.join()

    run(test)
