"""Which experts computed each token, against the plain model's own routing."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from engine.config import ExpertConfig
from engine.errors import InvalidRequest
from engine.model.decoder import Decoder
from engine.model.trace import Trace
from engine.policy import ExpertPolicy
from engine.serving.engine import Engine
from engine.serving.request import SamplingParams, TokenEvent
from engine.serving.token_experts import MAX_BYTES, check_size, pack
from tests.engine.conftest import tiny_config

MakeEngine = Callable[..., Engine]
POLICIES = ["dense", "top_k:1", "top_k:3", "top_k:8", "mass:0.5", "shared:2"]
ASKS = SamplingParams(max_new_tokens=9, ignore_eos=True, token_experts=True)
LAYERS, EXPERTS = 2, 8


def unpack(experts: bytes) -> list[list[int]]:
    """Expert ids, layer by layer."""
    bits = np.unpackbits(np.frombuffer(experts, np.uint8), bitorder="little")
    return [np.flatnonzero(row).tolist() for row in bits.reshape(LAYERS, EXPERTS)]


@torch.inference_mode()
def routed(reference: Decoder, ids: list[int], policy: ExpertPolicy) -> list[list[int]]:
    """The experts of the last of `ids`, by the model that computes the whole sequence."""
    trace = Trace()
    policy = ExpertPolicy.top_k(int(policy.value)) if policy.kind == "shared" else policy
    reference.logits(torch.tensor([ids]), policy, trace)
    return [
        list(range(EXPERTS)) if chosen is None else chosen[-1].nonzero().flatten().tolist()
        for chosen in trace.chosen
    ]


def events_by_request(engine: Engine, policies: list[str]) -> dict[str, list[TokenEvent]]:
    requests = [
        engine.make_request(list(range(7 + i, 18)), ASKS, ExpertPolicy.parse(p), request_id=p)
        for i, p in enumerate(policies)
    ]
    found: dict[str, list[TokenEvent]] = {p: [] for p in policies}
    for event in engine.run(requests):
        found[event.request_id].append(event)
    return found


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("sample_every", [0, 2])
def test_exactly_the_experts_that_the_router_chose(
    make_engine: MakeEngine, reference: Decoder, together: bool, sample_every: int
) -> None:
    """Alone and in one batch, in steps that are sampled or run whole, in chunks of prompts."""
    policies = [p for p in POLICIES if not together or not p.startswith("shared")]
    engine = make_engine(sample_every=sample_every, max_num_batched_tokens=16, max_num_seqs=8)
    for company in [policies] if together else [[p] for p in policies]:
        for name, events in events_by_request(engine, company).items():
            ids = list(range(7 + company.index(name), 18))
            for event in events:
                assert event.token is not None
                chosen = unpack(event.experts)
                assert chosen == routed(reference, ids, ExpertPolicy.parse(name)), name
                pairs = sum(map(len, chosen))
                assert event.activated_ratio == pairs / (LAYERS * EXPERTS)
                ids.append(event.token.token_id)
            assert len(events) == 9


@pytest.mark.parametrize("policy", POLICIES)
def test_tokens_add_up_to_what_the_request_used(make_engine: MakeEngine, policy: str) -> None:
    """Of a prompt of one token every computed token has an event."""
    engine = make_engine()
    events = list(engine.run([engine.make_request([5], ASKS, ExpertPolicy.parse(policy))]))
    usage = events[-1].usage
    assert usage is not None
    used = [sum(map(len, unpack(event.experts))) for event in events]
    assert sum(used) == usage.experts_activated
    assert sum(e.activated_ratio for e in events) / 9 == pytest.approx(usage.activated_ratio)


def test_it_is_off_unless_asked_for_and_changes_no_output(make_engine: MakeEngine) -> None:
    engine = make_engine()
    quiet = SamplingParams(max_new_tokens=9, ignore_eos=True)
    policy = ExpertPolicy.top_k(3)
    requests = [engine.make_request([5, 6], params, policy) for params in (quiet, ASKS)]
    tokens: dict[str, list[int]] = {r.request_id: [] for r in requests}
    for event in engine.run(requests):
        assert event.token is not None
        tokens[event.request_id].append(event.token.token_id)
        assert bool(event.experts) == (event.request_id == requests[1].request_id)
    assert tokens[requests[0].request_id] == tokens[requests[1].request_id]


def test_layers_begin_on_bytes() -> None:
    chosen_LnE = torch.zeros(2, 1, 11, dtype=torch.bool)
    chosen_LnE[0, 0, [0, 9]] = True
    chosen_LnE[1, 0, 3] = True
    assert pack(chosen_LnE) == [bytes([0b1, 0b10, 0b1000, 0])]


def test_what_is_reported_is_bounded() -> None:
    large = tiny_config(
        num_hidden_layers=64,
        intermediate_size=4096,
        experts=ExpertConfig(num_experts=512, expert_size=8),
    )
    most = MAX_BYTES // (64 * 64)
    check_size(SamplingParams(max_new_tokens=most, token_experts=True), large)
    check_size(SamplingParams(max_new_tokens=most + 1), large)
    with pytest.raises(InvalidRequest, match=f"max_new_tokens must be at most {most} where"):
        check_size(SamplingParams(max_new_tokens=most + 1, token_experts=True), large)
