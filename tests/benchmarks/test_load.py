"""The load is what it says, and the clock reads a server of known speed exactly."""

from __future__ import annotations

import math
import statistics
from itertools import pairwise

import pytest

from benchmarks import load
from benchmarks.load import Arrival, Percentiles, Served


class Clock:
    """Stands in for the module `time`."""

    def __init__(self) -> None:
        self.now = 1000.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Metronome:
    """Takes 100 ms for the first token of each request, one at a time, and 5 ms a step after."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.left: dict[str, int] = {}
        self.begun: set[str] = set()

    def add(self, request_id: str, prompt: list[int], new_tokens: int) -> None:
        self.left[request_id] = new_tokens

    def step(self) -> list[str]:
        fresh = [name for name in self.left if name not in self.begun][:1]
        self.clock.now += 0.1 if fresh else 0.005
        self.begun |= set(fresh)
        served = [name for name in self.left if name in self.begun]
        self.left = {n: left - (n in served) for n, left in self.left.items()}
        self.left = {n: left for n, left in self.left.items() if left}
        self.begun &= set(self.left)
        return served

    @property
    def busy(self) -> bool:
        return bool(self.left)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(load, "time", clock)
    return clock


def test_poisson_arrivals_have_exponential_gaps_of_the_rate() -> None:
    times = load.poisson_arrivals(20_000, rate=4.0, seed=1)
    gaps = [b - a for a, b in pairwise(times)]
    assert times[0] == 0.0
    assert min(gaps) >= 0.0
    assert statistics.mean(gaps) == pytest.approx(0.25, rel=0.03)
    assert statistics.stdev(gaps) == pytest.approx(0.25, rel=0.03)
    assert times == load.poisson_arrivals(20_000, rate=4.0, seed=1)
    assert times != load.poisson_arrivals(20_000, rate=4.0, seed=2)


def test_an_infinite_rate_is_every_request_at_once() -> None:
    assert load.poisson_arrivals(3, math.inf, seed=0) == [0.0, 0.0, 0.0]


def test_prompts_never_share_a_beginning() -> None:
    prompts = [p for seed in range(20) for p in load.random_prompts(16, 64, 50_272, seed)]
    assert {len(prompt) for prompt in prompts} == {64}
    assert len({tuple(prompt[:4]) for prompt in prompts}) == len(prompts)
    assert min(min(prompt) for prompt in prompts) >= load.FIRST_TOKEN_ID
    assert max(max(prompt) for prompt in prompts) < 50_272


def test_a_load_has_prompts_of_all_lengths_asked_for() -> None:
    arrivals = load.random_load(400, 2.0, 512, (3, 9), 7, seed=5)
    assert {len(arrival.prompt) for arrival in arrivals} == set(range(3, 10))
    assert {arrival.new_tokens for arrival in arrivals} == {7}
    assert [a.at for a in arrivals] == load.poisson_arrivals(400, 2.0, seed=6)


@pytest.mark.parametrize(
    ("share", "expected"), [(0.5, 2), (0.51, 3), (0.75, 3), (0.9, 4), (0.0, 1), (1.0, 4)]
)
def test_percentiles_are_of_the_nearest_rank(share: float, expected: float) -> None:
    assert load.percentile([4, 1, 3, 2], share) == expected


def test_decoding_excludes_prompts_and_the_shrinking_end(clock: Clock) -> None:
    prompts = [[5]] * 4
    assert load.decode_ms(Metronome(clock), prompts, 20) == pytest.approx(5.0)


def test_too_few_tokens_to_time_are_refused(clock: Clock) -> None:
    with pytest.raises(RuntimeError, match="4 tokens are too few to time 1 requests"):
        load.decode_ms(Metronome(clock), [[5]], 4)


def test_a_prompt_is_timed_to_its_first_token(clock: Clock) -> None:
    assert load.prefill_ms(Metronome(clock), [5, 6]) == pytest.approx(100.0)


def test_serving_waits_for_arrivals_and_times_each_token(clock: Clock) -> None:
    served = load.serve(Metronome(clock), [Arrival(0.0, [5], 3), Arrival(1.0, [5], 2)])
    assert served.tokens == 5
    assert served.seconds == pytest.approx(1.105)
    assert served.tokens_per_second == pytest.approx(5 / 1.105)
    assert served.first_token.p99 == pytest.approx(0.1)
    assert served.inter_token.p50 == pytest.approx(0.005)
    assert Served.from_dict(served.to_dict()) == served


def test_a_newcomers_prompt_delays_the_others_next_token(clock: Clock) -> None:
    served = load.serve(Metronome(clock), [Arrival(0.0, [5], 30), Arrival(0.11, [5], 2)])
    assert served.inter_token.p99 == pytest.approx(0.1)
    assert served.inter_token.p50 == pytest.approx(0.005)


def test_a_request_that_ends_early_fails_the_measurement(clock: Clock) -> None:
    class Short(Metronome):
        def add(self, request_id: str, prompt: list[int], new_tokens: int) -> None:
            super().add(request_id, prompt, new_tokens - 1)

    with pytest.raises(RuntimeError, match="got 2 tokens, not 3"):
        load.serve(Short(clock), [Arrival(0.0, [5], 3)])


def test_a_server_without_progress_fails_the_measurement(clock: Clock) -> None:
    class Stalled(Metronome):
        def step(self) -> list[str]:
            self.clock.now += 60.0
            return []

    with pytest.raises(RuntimeError, match="no token for 600 seconds"):
        load.serve(Stalled(clock), [Arrival(0.0, [5], 3)])
    with pytest.raises(RuntimeError, match="no token for 600 seconds"):
        load.prefill_ms(Stalled(clock), [5])


def test_commands_do_what_the_functions_do(clock: Clock) -> None:
    server = Metronome(clock)
    decode = {"do": "decode", "prompts": [[5], [6]], "new_tokens": 12}
    assert load.perform(server, decode) == {"ms": pytest.approx(5.0)}
    assert load.perform(server, {"do": "prefill", "prompt": [5]}) == {"ms": pytest.approx(100.0)}
    arrivals = [{"at": 0.0, "prompt": [5], "new_tokens": 3}]
    assert load.perform(server, {"do": "serve", "arrivals": arrivals})["tokens"] == 3
    with pytest.raises(ValueError, match="no such measurement: 'rest'"):
        load.perform(server, {"do": "rest"})


def test_percentiles_of_one_value() -> None:
    assert Percentiles.of([2.0]) == Percentiles(2.0, 2.0, 2.0)
