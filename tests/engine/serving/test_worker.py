"""The worker: one terminal event per accepted request on every path, health, a bounded queue."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import pytest

from engine.errors import ConfigError, EngineStopped, InvalidRequest, Overloaded
from engine.policy import ExpertPolicy
from engine.serving.engine import Engine
from engine.serving.event_stream import EventStream
from engine.serving.request import Request, SamplingParams, TokenEvent
from engine.serving.worker import MAX_FAILED_STEPS, STEP_TIMEOUT, Worker

MakeEngine = Callable[..., Engine]
DENSE = ExpertPolicy.dense()


class Gate:
    """Holds the engine's steps back while it is closed."""

    def __init__(self, engine: Engine) -> None:
        self.open = threading.Event()
        self.entered = threading.Event()
        self._step = engine.step
        engine.step = self.step  # type: ignore[method-assign]  # the point of this class

    def step(self) -> list[TokenEvent]:
        self.entered.set()
        assert self.open.wait(20)
        return self._step()


@pytest.fixture(params=[0.0, 10.0], ids=["at once", "together"], autouse=True)
def stream_interval(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every promise holds however long events may be held back."""
    monkeypatch.setattr(Worker.__init__, "__defaults__", (STEP_TIMEOUT, request.param))


@contextmanager
def serving(engine: Engine, step_timeout: float = 120.0) -> Iterator[Worker]:
    worker = Worker(engine, step_timeout)
    worker.start()
    try:
        yield worker
    finally:
        worker.stop()
        assert not worker.alive


def run(test: Callable[[], Awaitable[None]]) -> None:
    """Run a test's coroutine, at most 20 s."""

    async def bounded() -> None:
        await asyncio.wait_for(test(), 20)

    asyncio.run(bounded())


async def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        await asyncio.sleep(0.002)


async def read(stream: EventStream) -> list[TokenEvent]:
    """All events; checks that exactly the last is terminal."""
    events = [event async for event in stream]
    assert [event.finish_reason is None for event in events] == [True] * (len(events) - 1) + [False]
    assert events[-1].usage is not None
    return events


def make(engine: Engine, new: int = 5, request_id: str | None = None) -> Request:
    sampling = SamplingParams(max_new_tokens=new, ignore_eos=True)
    return engine.make_request("the cat", sampling, DENSE, request_id=request_id)


def test_requests_are_served_together(make_engine: MakeEngine) -> None:
    engine, expected = (
        make_engine(),
        make_engine().generate(
            ["the cat"], SamplingParams(max_new_tokens=5, ignore_eos=True), DENSE
        )[0],
    )

    async def test() -> None:
        with serving(engine) as worker:
            assert worker.alive
            assert worker.ready
            streams = [await worker.submit(make(engine)) for _ in range(20)]
            for events in await asyncio.gather(*map(read, streams)):
                assert "".join(event.text for event in events) == expected.text
                assert [event.index for event in events] == list(range(5))
            assert worker.num_unfinished == 0

    run(test)
    assert dict(engine.stats.snapshot().finished) == {"length": 20}


def test_a_finished_stream_ends_and_closes_quietly(make_engine: MakeEngine) -> None:
    engine = make_engine()

    async def test() -> None:
        with serving(engine) as worker:
            async with await worker.submit(make(engine)) as stream:
                await read(stream)
                with pytest.raises(StopAsyncIteration):
                    await anext(stream)

    run(test)
    assert engine.stats.snapshot().aborts == 0


@pytest.mark.parametrize("started", [False, True], ids=["before the first event", "later"])
def test_closing_a_stream_aborts(make_engine: MakeEngine, started: bool) -> None:
    engine = make_engine()

    async def test() -> None:
        with serving(engine) as worker:
            stream = await worker.submit(make(engine, 120))
            if started:
                await anext(stream)
            await stream.aclose()
            await stream.aclose()
            with pytest.raises(StopAsyncIteration):
                await anext(stream)
            await until(lambda: not worker.num_unfinished)
            await until(lambda: not engine.stats.snapshot().kv_blocks_used)

    run(test)
    assert dict(engine.stats.snapshot().finished) == {"abort": 1}


def test_cancelling_a_reader_aborts(make_engine: MakeEngine) -> None:
    engine = make_engine()
    gate = Gate(engine)

    async def test() -> None:
        with serving(engine) as worker:
            stream = await worker.submit(make(engine, 120))
            reader = asyncio.create_task(read(stream))
            await until(gate.entered.is_set)
            reader.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reader
            gate.open.set()
            await until(lambda: not worker.num_unfinished)

    run(test)
    assert dict(engine.stats.snapshot().finished) == {"abort": 1}


def test_abort_by_id(make_engine: MakeEngine) -> None:
    engine = make_engine()
    gate = Gate(engine)

    async def test() -> None:
        with serving(engine) as worker:
            running = await worker.submit(make(engine, 120, "running"))
            await until(gate.entered.is_set)
            queued = await worker.submit(make(engine, 120, "queued"))
            worker.abort("running")
            worker.abort("queued")
            worker.abort("nobody")
            gate.open.set()
            assert (await read(running))[-1].finish_reason == "abort"
            assert [event.finish_reason for event in await read(queued)] == ["abort"]

    run(test)


def boom(*_: object) -> None:
    raise RuntimeError("out of luck")


@pytest.mark.parametrize(
    "where", ["engine.serving.engine.sample", "engine.serving.runner.Runner.run"]
)
def test_a_failing_step_ends_its_requests_and_the_engine_goes_on(
    make_engine: MakeEngine,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    where: str,
) -> None:
    """Two run and end with an error; three wait and are served as if nothing had been."""
    engine = make_engine(max_num_seqs=2)
    sampling = SamplingParams(max_new_tokens=5, ignore_eos=True)
    expected = make_engine().generate(["the cat"], sampling, DENSE)[0].text
    gate = Gate(engine)
    original = engine.step

    def fail_once() -> list[TokenEvent]:
        monkeypatch.setattr(engine, "step", original)
        with monkeypatch.context() as patch:
            patch.setattr(where, boom)
            return original()

    async def test() -> None:
        with serving(engine) as worker:
            streams = [await worker.submit(make(engine)) for _ in range(5)]
            await until(gate.entered.is_set)
            monkeypatch.setattr(engine, "step", fail_once)
            gate.open.set()
            ends = [await read(stream) for stream in streams]
            assert [events[-1].finish_reason for events in ends] == ["error"] * 2 + ["length"] * 3
            for events in ends[:2]:
                assert events[-1].error == "a step of the engine failed: RuntimeError: out of luck"
            for events in ends[2:]:
                assert "".join(event.text for event in events) == expected
            assert worker.ready
            assert worker.failed_steps == 1
            assert (await read(await worker.submit(make(engine))))[-1].finish_reason == "length"

    run(test)
    assert dict(engine.stats.snapshot().finished) == {"error": 2, "length": 4}
    assert engine.allocator.num_used == 0
    assert "a step of the engine failed" in caplog.text


def test_too_many_failing_steps_in_a_row_are_for_good(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(max_num_seqs=1)
    gate = Gate(engine)
    failed = threading.Event()

    async def test() -> None:
        with serving(engine) as worker:
            worker.on_failure = failed.set
            streams = [await worker.submit(make(engine)) for _ in range(MAX_FAILED_STEPS + 3)]
            await until(gate.entered.is_set)
            monkeypatch.setattr(engine.runner, "run", boom)
            gate.open.set()
            errors = [(await read(stream))[-1].error for stream in streams]
            assert (
                errors[:MAX_FAILED_STEPS]
                == ["a step of the engine failed: RuntimeError: out of luck"] * MAX_FAILED_STEPS
            )
            assert set(errors[MAX_FAILED_STEPS:]) == {
                "the engine has failed: RuntimeError: out of luck"
            }
            await until(failed.is_set)
            assert not worker.alive
            assert not worker.ready
            with pytest.raises(EngineStopped, match="the engine has failed: RuntimeError"):
                await worker.submit(make(engine))

    run(test)
    assert engine.stats.snapshot().rejected["stopped"] == 1
    assert dict(engine.stats.snapshot().finished) == {"error": MAX_FAILED_STEPS + 3}


def test_an_engine_that_does_not_prove_clean_is_not_used_again(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(max_num_seqs=1)
    gate = Gate(engine)

    def leak(*_: object) -> None:
        engine.allocator.allocate(1)
        boom()

    async def test() -> None:
        with serving(engine) as worker:
            streams = [await worker.submit(make(engine)) for _ in range(2)]
            await until(gate.entered.is_set)
            monkeypatch.setattr(engine.runner, "run", leak)
            gate.open.set()
            assert [(await read(s))[-1].finish_reason for s in streams] == ["error"] * 2
            await until(lambda: worker.failure is not None)
            assert "AssertionError" in str(worker.failure)

    run(test)


def test_an_engine_too_broken_to_end_its_requests(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()

    async def test() -> None:
        with serving(engine) as worker:
            monkeypatch.setattr(engine, "step", boom)
            monkeypatch.setattr(engine, "end_all", boom)
            events = await read(await worker.submit(make(engine)))
            assert [event.finish_reason for event in events] == ["error"]

    run(test)


def test_overload_is_raised_at_submit(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_seqs=1, max_waiting=3)
    gate = Gate(engine)

    async def test() -> None:
        with serving(engine) as worker:
            streams = [await worker.submit(make(engine))]
            await until(gate.entered.is_set)
            streams += [await worker.submit(make(engine)) for _ in range(2)]
            with pytest.raises(Overloaded, match="at most 3 may"):
                await worker.submit(make(engine))
            gate.open.set()
            for stream in streams:
                assert (await read(stream))[-1].finish_reason == "length"
            await read(await worker.submit(make(engine)))

    run(test)
    assert engine.stats.snapshot().rejected["overloaded"] == 1


def test_overload_by_prompt_tokens(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_seqs=1, max_waiting_tokens=9)
    gate = Gate(engine)

    def long() -> Request:
        return engine.make_request([1] * 5, SamplingParams(max_new_tokens=1), DENSE)

    async def test() -> None:
        with serving(engine) as worker:
            first = await worker.submit(long())
            with pytest.raises(Overloaded, match="5 more would exceed the limit of 9"):
                await worker.submit(long())
            gate.open.set()
            await read(first)

    run(test)


def test_what_was_accepted_is_never_refused_later(make_engine: MakeEngine) -> None:
    """Submitting as fast as the queue allows, from the moment it has room."""
    engine = make_engine(12, max_num_seqs=3, max_waiting=2)

    async def client(worker: Worker) -> str | None:
        request = make(engine, 20)
        while True:
            try:
                stream = await worker.submit(request)
            except Overloaded:
                await asyncio.sleep(0.001)
            else:
                return (await read(stream))[-1].finish_reason

    async def test() -> None:
        with serving(engine) as worker:
            reasons = await asyncio.gather(*[client(worker) for _ in range(15)])
            assert set(reasons) == {"length"}

    run(test)
    numbers = engine.stats.snapshot()
    assert numbers.rejected["overloaded"]
    assert numbers.preemptions


def test_impossible_requests_and_ids_in_use_are_refused(make_engine: MakeEngine) -> None:
    engine = make_engine()
    small = make_engine(4)
    gate = Gate(engine)

    async def test() -> None:
        with serving(engine) as worker:
            first = await worker.submit(make(engine, request_id="same"))
            with pytest.raises(InvalidRequest, match="'same' is already in use"):
                await worker.submit(make(engine, request_id="same"))
            gate.open.set()
            await read(first)
            await read(await worker.submit(make(engine, request_id="same")))
        with serving(small) as worker:
            with pytest.raises(InvalidRequest, match="at most 16"):
                await worker.submit(make(engine, 100))
            assert not worker.num_unfinished

    run(test)


def test_drain_finishes_what_is_in_flight(make_engine: MakeEngine) -> None:
    engine = make_engine()
    gate = Gate(engine)

    async def test() -> None:
        with serving(engine) as worker:
            streams = [await worker.submit(make(engine)) for _ in range(3)]
            draining = asyncio.create_task(worker.drain(10))
            await asyncio.sleep(0)
            assert worker.alive
            assert not worker.ready
            with pytest.raises(EngineStopped, match="draining"):
                await worker.submit(make(engine))
            gate.open.set()
            await draining
            for stream in streams:
                assert (await read(stream))[-1].finish_reason == "length"

    run(test)


def test_drain_aborts_at_its_timeout(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    step = engine.step

    def slow() -> list[TokenEvent]:
        time.sleep(0.02)
        return step()

    monkeypatch.setattr(engine, "step", slow)

    async def test() -> None:
        with serving(engine) as worker:
            stream = await worker.submit(make(engine, 120))
            await worker.drain(0.1)
            events = await asyncio.wait_for(read(stream), 1)
            assert events[-1].finish_reason == "abort"
            assert len(events) > 1

    run(test)
    assert engine.stats.snapshot().aborts == 1


def test_a_hung_step(make_engine: MakeEngine) -> None:
    """Not ready, not alive, refuses; its requests end at once and its late events are dropped."""
    engine = make_engine()
    gate = Gate(engine)

    async def test() -> None:
        with serving(engine, step_timeout=0.5) as worker:
            stream = await worker.submit(make(engine, 1))
            await until(gate.entered.is_set)
            assert worker.ready
            events = await read(stream)
            assert [event.finish_reason for event in events] == ["error"]
            assert events[0].error == "the engine has failed: a step took longer than 0.5 s"
            assert (worker.ready, worker.alive) == (False, False)
            with pytest.raises(EngineStopped, match=r"a step took longer than 0\.5 s"):
                await worker.submit(make(engine))
            gate.open.set()
            await until(lambda: not worker.running)
            assert worker.num_unfinished == 0

    run(test)


def test_an_idle_worker_is_not_hung(make_engine: MakeEngine) -> None:
    engine = make_engine()

    async def test() -> None:
        with serving(engine, step_timeout=0.01) as worker:
            await asyncio.sleep(0.05)
            assert worker.ready

    run(test)


def test_stop_aborts_what_is_in_flight(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_seqs=1)

    async def test() -> None:
        with serving(engine) as worker:
            streams = [await worker.submit(make(engine, 120)) for _ in range(3)]
            await anext(streams[0])
            await asyncio.to_thread(worker.stop)
            for stream in streams:
                assert (await read(stream))[-1].finish_reason == "abort"
            with pytest.raises(EngineStopped, match="stopped"):
                await worker.submit(make(engine))

    run(test)
    engine.check_integrity()
    assert engine.allocator.num_used == 0


def test_stop_does_not_wait_for_a_hung_step(make_engine: MakeEngine) -> None:
    engine = make_engine()
    gate = Gate(engine)

    async def test() -> None:
        worker = Worker(engine)
        worker.start()
        stream = await worker.submit(make(engine))
        await until(gate.entered.is_set)
        worker.stop(timeout=0.05)
        assert [event.finish_reason for event in await read(stream)] == ["abort"]
        gate.open.set()
        await until(lambda: not worker.alive)

    run(test)


def test_a_worker_that_never_started(make_engine: MakeEngine) -> None:
    engine = make_engine()
    worker = Worker(engine)

    async def test() -> None:
        assert not worker.alive
        with pytest.raises(EngineStopped, match="not running"):
            await worker.submit(make(engine))
        await worker.drain(1)

    run(test)
    worker.stop()
    with pytest.raises(ConfigError, match="step_timeout must be above 0"):
        Worker(engine, 0)


def test_a_closed_event_loop_harms_nobody(make_engine: MakeEngine) -> None:
    engine = make_engine()
    gate = Gate(engine)

    async def leave(worker: Worker) -> None:
        await worker.submit(make(engine))

    async def stay(worker: Worker) -> None:
        await read(await worker.submit(make(engine)))

    with serving(engine) as worker:
        asyncio.run(leave(worker))
        gate.open.set()
        asyncio.run(stay(worker))
        assert worker.alive
