"""What generations say: their events as they come, merged, or all at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from engine.errors import AmbidexError
from engine.serving.request import TokenEvent, Usage
from server.errors import GenerationFailed, GrammarFailed, IncompleteGeneration
from server.generation import Generation


@dataclass
class Output:
    """What a finished generation said."""

    text: str
    events: list[TokenEvent]
    finish_reason: str
    usage: Usage


def check(event: TokenEvent) -> None:
    """Raise if `event` ends its request in any way but a finished generation.

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


async def checked_events(generation: Generation) -> AsyncGenerator[list[TokenEvent], None]:
    """The events of a generation, as many at a time as have come, the terminal one last.

    Raises as `check` does, after the events before the one that it raises for.
    """
    while taken := await generation.events.take():
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


async def collect(generation: Generation) -> Output:
    """Everything that a generation says, once it is finished."""
    events = [event async for taken in checked_events(generation) for event in taken]
    last = events[-1]
    assert last.finish_reason is not None
    assert last.usage is not None
    return Output("".join(e.text for e in events), events, last.finish_reason, last.usage)


async def collect_all(generations: Sequence[Generation]) -> list[Output]:
    """What each of them says; raises as soon as one has failed."""
    return list(await asyncio.gather(*map(collect, generations)))


async def merged_events(
    generations: Sequence[Generation],
) -> AsyncGenerator[tuple[int, list[TokenEvent]], None]:
    """(which generation, its events) as they come; raises as soon as one has failed."""
    if len(generations) == 1:  # the usual case needs no tasks
        async with aclosing(checked_events(generations[0])) as events:
            async for taken in events:
                yield 0, taken
        return
    # A short queue: who reads slowly must not make the server keep what was not read.
    queue: asyncio.Queue[tuple[int, list[TokenEvent] | Exception]] = asyncio.Queue(1)

    async def read(which: int) -> None:
        try:
            async for taken in checked_events(generations[which]):
                await queue.put((which, taken))
        except Exception as error:
            await queue.put((which, error))

    tasks = [asyncio.create_task(read(which)) for which in range(len(generations))]
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
