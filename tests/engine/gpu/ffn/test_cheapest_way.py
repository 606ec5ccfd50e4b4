"""The rule that picks a way: what it is for, and that it never strays far from the dense FFN."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.gpu.ffn.cheapest_way import (
    RATES,
    FFNShape,
    cheapest_way,
    dense_us,
    expected_used,
    one_pass_is_cheaper,
    sparse_us,
)

WIDE = FFNShape(2048, 32, 256, 2)


def test_expected_used() -> None:
    assert expected_used(1, 6, 32) == pytest.approx(6)
    assert expected_used(2, 16, 32) == pytest.approx(24)
    assert expected_used(3, 32, 32) == 32
    assert expected_used(1000, 6, 32) == pytest.approx(32)


def test_one_token_reads_its_experts_and_many_multiply_by_expert() -> None:
    assert cheapest_way(WIDE, 1, 6) == "few_tokens"
    assert cheapest_way(WIDE, 4096, 6) == "many_tokens"


def test_some_tokens_read_used_experts_once() -> None:
    assert cheapest_way(WIDE, 8, 6) == "used_experts"


def test_what_is_known_of_the_used_experts_decides() -> None:
    for tokens in (8, 16, 64):
        assert cheapest_way(WIDE, tokens, 6, quarters=4) == "all_experts"
        assert cheapest_way(WIDE, tokens, 6, quarters=3) == "used_experts"


def test_all_experts_of_many_tokens_are_dense_products() -> None:
    for tokens in (512, 4096):
        assert cheapest_way(WIDE, tokens, 32) == "all_experts"


@settings(deadline=None)
@given(
    st.sampled_from((64, 768, 2048, 4096)),
    st.sampled_from((8, 32, 64, 512)),
    st.integers(1, 512),
    st.integers(1, 8192),
    st.sampled_from((2, 4)),
    st.data(),
)
def test_no_batch_costs_more_than_dense_and_its_routing(
    width: int, experts: int, size: int, tokens: int, itemsize: int, data: st.DataObject
) -> None:
    shape = FFNShape(width, experts, size, itemsize)
    k = data.draw(st.integers(1, experts))
    cost = sparse_us(shape, tokens, k)[cheapest_way(shape, tokens, k)]
    rates = RATES
    routing = rates.select + tokens * rates.beside_token
    assert cost <= dense_us(shape, tokens) + routing


def test_a_few_dense_tokens_among_sparse_ones() -> None:
    assert one_pass_is_cheaper(WIDE, 1, 7, 6)
    assert not one_pass_is_cheaper(WIDE, 1, 4095, 6)
