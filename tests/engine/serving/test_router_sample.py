"""Router coverage on sampled steps against the plain model; off it costs nothing and is nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from engine.config import EngineConfig
from engine.histogram import Histogram
from engine.model.decoder import Decoder
from engine.model.trace import Trace
from engine.policy import ExpertPolicy
from engine.serving.engine import Engine
from engine.serving.request import SamplingParams
from engine.serving.router_sample import SAMPLED_TOKENS, sampling_trace
from engine.serving.stats import Numbers, Stats

MakeEngine = Callable[..., Engine]
ONE = SamplingParams(max_new_tokens=1, ignore_eos=True)


@torch.inference_mode()
def expected(reference: Decoder, ids: list[int], policy: ExpertPolicy) -> dict[str, list[float]]:
    """Per layer, over all tokens of one sequence, by the model that computes everything."""
    trace = Trace(keep_inputs=True)
    reference.logits(torch.tensor([ids]), policy, trace)
    sums: dict[str, list[float]] = {"captured": [], "mass": [], "fired": []}
    for ffn, x_TD, chosen_TE in zip(reference.ffns(), trace.inputs, trace.chosen, strict=True):
        assert chosen_TE is not None
        hidden_TF = torch.relu(x_TD @ ffn.up.T)
        mass_TE = hidden_TF.view(len(ids), ffn.num_experts, -1).sum(-1)
        sums["captured"].append(float(mass_TE[chosen_TE].sum()))
        sums["mass"].append(float(mass_TE.sum()))
        sums["fired"].append(int((hidden_TF > 0).sum()))
    return sums


@pytest.mark.parametrize("policy", ["top_k:1", "top_k:3", "mass:0.5"])
def test_sampled_steps_measure_what_the_router_missed(
    make_engine: MakeEngine, reference: Decoder, policy: str
) -> None:
    engine = make_engine(sample_every=1)
    prompt = list(range(5, 5 + SAMPLED_TOKENS))
    parsed = ExpertPolicy.parse(policy)
    engine.generate([prompt], ONE, parsed)
    numbers, sums = engine.stats.snapshot(), expected(reference, prompt, parsed)
    assert numbers.sampled_steps == 1
    assert numbers.mass_captured == pytest.approx(sums["captured"], rel=1e-4)
    assert numbers.mass_total == pytest.approx(sums["mass"], rel=1e-4)
    assert numbers.neurons_fired == sums["fired"]
    assert numbers.neurons_sampled == [SAMPLED_TOKENS * 64] * 2
    assert [sum(load) for load in numbers.expert_load] == numbers.experts_activated


def test_dense_tokens_are_left_out(make_engine: MakeEngine) -> None:
    engine = make_engine(sample_every=1)
    engine.generate([[7, 8, 9]], ONE, ExpertPolicy.dense())
    assert engine.stats.snapshot().sampled_steps == 0
    requests = [
        engine.make_request([7, 8, 9], ONE, policy)
        for policy in (ExpertPolicy.dense(), ExpertPolicy.top_k(2))
    ]
    list(engine.run(requests))  # one batch of both
    numbers = engine.stats.snapshot()
    assert numbers.sampled_steps == 1
    assert numbers.neurons_sampled == [3 * 64] * 2
    assert [sum(load) for load in numbers.expert_load] == [6, 6]


def test_sampling_changes_no_output_and_is_off_by_default(make_engine: MakeEngine) -> None:
    sampling = SamplingParams(max_new_tokens=20, ignore_eos=True)
    policy = ExpertPolicy.top_k(3)
    plain, sampled = make_engine(), make_engine(sample_every=3)
    texts = [e.generate(["the cat", "a dog"], sampling, policy) for e in (plain, sampled)]
    assert texts[0][0].token_ids == texts[1][0].token_ids
    assert texts[0][1].text == texts[1][1].text
    assert sampled.stats.snapshot().sampled_steps == 20 // 3
    assert plain.stats.snapshot().sampled_steps == 0
    assert EngineConfig().sample_every == 0


def test_a_long_step_is_sampled_in_a_few_tokens() -> None:
    for tokens in (1, 7, 8, 9, 100, 512):
        every = sampling_trace(tokens).mass_every
        assert 1 <= len(range(0, tokens, every)) <= SAMPLED_TOKENS


def test_numbers_of_engines_of_different_shapes_add_up(make_engine: MakeEngine) -> None:
    engine, own = make_engine(sample_every=1), Stats(0, 0, 0)
    engine.generate([[5, 6, 7], [8, 9]], ONE, ExpertPolicy.top_k(2))
    numbers = engine.stats.snapshot()
    own.reject("invalid")
    own.absorb(numbers)
    own.absorb(numbers)
    total = own.snapshot()
    assert total.experts_activated == [2 * n for n in numbers.experts_activated]
    assert total.expert_load == [[2 * n for n in load] for load in numbers.expert_load]
    assert total.finished["length"] == 4
    assert total.rejected == {"invalid": 1}
    assert total.request_seconds.count == 4
    assert total.kv_blocks_total == total.running == 0  # state is not summed up
    both = total + Stats(3, 4, 9).snapshot()
    assert both.experts_activated == [*total.experts_activated, 0]
    assert [len(load) for load in both.expert_load] == [8, 8, 4]
    assert isinstance(both, Numbers)
    assert both.kv_blocks_total == 9
    one, two = Histogram([1, 2]), Histogram([1, 2])
    one.observe(1)
    two.observe(5)
    assert ((one + two).counts, (one + two).sum) == ([1, 0, 1], 6)
