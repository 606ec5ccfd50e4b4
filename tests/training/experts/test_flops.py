"""The formula against the products that PyTorch actually does, forward and backward."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from engine.model.decoder import Decoder
from training.config import SwitchConfig, TrainConfig
from training.experts.conversion import refresh_routers
from training.experts.flops import FlopCounter
from training.step import objective

SEQUENCES, LENGTH = 2, 16
TOKENS = SEQUENCES * LENGTH


def decoder(config: TrainConfig) -> Decoder:
    model = Decoder(config.model.model_config(LENGTH, 0, "float32"))
    model.initialize(torch.Generator().manual_seed(0))
    refresh_routers(model)
    return model


def products_of(model: Decoder, top_k: int | None, switch: SwitchConfig) -> int:
    """FLOPs of the products of one step, attention over the whole square of positions."""
    ids = torch.randint(0, 300, (SEQUENCES, LENGTH + 1))
    # Its fused kernel for the CPU is not known to the counter.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        found = objective(model, ids[:, :-1], ids[:, 1:], top_k, switch)
        found.total.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return int(counter.get_total_flops())


def other_half_of_attention(config: TrainConfig) -> int:
    """What masked positions cost, which is left out by convention: scores and values, thrice."""
    shape = config.model
    half = 2 * 2 * LENGTH * shape.hidden_size // 2
    return 3 * shape.num_hidden_layers * half * TOKENS


def counter_of(config: TrainConfig) -> FlopCounter:
    shape = config.model.model_config(LENGTH, 0, "float32")
    return FlopCounter(shape, config.switch, LENGTH)


@pytest.mark.parametrize(("penalty", "dense_penalty"), [(0.1, 0.03), (0.0, 0.0), (0.1, 0.0)])
@pytest.mark.parametrize("penalty_tokens", [1.0, 0.25, 0.125])
@pytest.mark.parametrize("top_k", [None, 1, 3, 7])
def test_a_step_costs_the_products_that_it_does(
    micro: TrainConfig,
    top_k: int | None,
    penalty_tokens: float,
    penalty: float,
    dense_penalty: float,
) -> None:
    """Exactly, but for the half of the attention that the mask throws away."""
    changes = {"penalty": penalty, "dense_penalty": dense_penalty, "penalty_tokens": penalty_tokens}
    switch = dataclasses.replace(micro.switch, **changes)
    config = dataclasses.replace(micro, switch=switch)
    done = products_of(decoder(config), top_k, switch)
    counted = counter_of(config).token(top_k) * TOKENS
    assert counted == done - other_half_of_attention(config)


def test_dense_training_without_experts_is_the_plain_token(micro: TrainConfig) -> None:
    switch = dataclasses.replace(micro.switch, dense_penalty=0.0)
    done = products_of(decoder(micro), None, switch)
    assert counter_of(micro).plain_token * TOKENS == done - other_half_of_attention(micro)


def test_other_shapes_too(micro: TrainConfig) -> None:
    """Layers, heads, width, vocabulary and neurons all enter."""
    shape = dataclasses.replace(
        micro.model,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=3,
        num_key_value_heads=3,
        num_experts=5,
        vocab_size=320,
    )
    switch = dataclasses.replace(micro.switch, top_k=(2,), mixed_top_k=(2,))
    config = dataclasses.replace(micro, model=shape, switch=switch)
    for top_k in (None, 2):
        done = products_of(decoder(config), top_k, switch)
        assert counter_of(config).token(top_k) * TOKENS == done - other_half_of_attention(config)


def test_fewer_experts_cost_less_and_the_penalty_costs_more(micro: TrainConfig) -> None:
    free = dataclasses.replace(micro, switch=dataclasses.replace(micro.switch, penalty=0.0))
    costs = [counter_of(free).token(k) for k in (1, 2, 4)]
    assert costs == sorted(costs)
    assert costs[-1] < counter_of(free).plain_token
    assert costs[0] < counter_of(micro).token(1)
