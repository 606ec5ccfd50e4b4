"""Reads the events of submissions: as they come, merged, or all at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from engine.errors import AmbidexError
from engine.serving.request import TokenEvent, Usage
from server.errors import GenerationFailed, GrammarFailed, IncompleteGeneration
from server.generation.submission import Submission


@dataclass
class Output:
    """The output of a finished request."""

    text: str
    events: list[TokenEvent]
    finish_reason: str
    usage: Usage


def check(event: TokenEvent) -> None:
    """Raise if `event` ends its request in any way but a finished output.

    Raises:
        GenerationFailed: the model failed.
        GrammarFailed: the output could not follow its grammar.
        IncompleteGeneration: the server gave the request up.
    """
    if event.finish_reason == "error":
        if event.own_fault:
            raise GrammarFailed(event.error or "grammar cannot be followed")
        raise GenerationFailed(event.error or "generation failed")
    if event.finish_reason == "abort":
        raise IncompleteGeneration("the server ended the request before it was complete")


async def checked_events(submission: Submission) -> AsyncGenerator[list[TokenEvent], None]:
    """The events of a submission, as many at a time as have come; the terminal one comes last.

    It raises as `check` does, once it has yielded the events before the failure.
    """
    while taken := await submission.events.take():
        try:
            check(taken[-1])
        except AmbidexError:
            if len(taken) > 1:
                yield taken[:-1]
            raise
        yield taken
        if taken[-1].finish_reason is not None:
            return
    raise IncompleteGeneration("the engine ended the request without a last token")


async def collect(submission: Submission) -> Output:
    """The whole output of a submission, once it is finished."""
    events = [event async for taken in checked_events(submission) for event in taken]
    last = events[-1]
    assert last.finish_reason is not None
    assert last.usage is not None
    return Output("".join(e.text for e in events), events, last.finish_reason, last.usage)


async def collect_all(submissions: Sequence[Submission]) -> list[Output]:
    """The output of each submission; raises as soon as one has failed."""
    return list(await asyncio.gather(*map(collect, submissions)))


async def merged_events(
    submissions: Sequence[Submission],
) -> AsyncGenerator[tuple[int, list[TokenEvent]], None]:
    """(which of them, its events) as they come; raises as soon as one has failed."""
    if len(submissions) == 1:  # the usual case needs no tasks
        async with aclosing(checked_events(submissions[0])) as events:
            async for taken in events:
                yield 0, taken
        return
    # The queue is short, so that a slow reader does not make the server keep much.
    queue: asyncio.Queue[tuple[int, list[TokenEvent] | Exception]] = asyncio.Queue(1)

    async def read(which: int) -> None:
        try:
            async for taken in checked_events(submissions[which]):
                await queue.put((which, taken))
        except Exception as error:
            await queue.put((which, error))

    tasks = [asyncio.create_task(read(which)) for which in range(len(submissions))]
    unfinished = len(tasks)
    try:
        while unfinished:
            which, found = await queue.get()
            if isinstance(found, Exception):
                raise found
            unfinished -= found[-1].finish_reason is not None
            yield which, found
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
