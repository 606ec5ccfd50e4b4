"""The rule that picks a way: what it is for, and that it never strays far from the dense FFN."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.gpu.ffn import gpu_ways
from engine.gpu.ffn.gpu_ways import Layer, dense_us, expected_union, sparse_us, sparse_way

WIDE = Layer(2048, 32, 256, 2)


def test_expected_union() -> None:
    assert expected_union(1, 6, 32) == pytest.approx(6)
    assert expected_union(2, 16, 32) == pytest.approx(24)
    assert expected_union(3, 32, 32) == 32
    assert expected_union(1000, 6, 32) == pytest.approx(32)


def test_one_token_reads_its_experts_and_many_are_grouped() -> None:
    assert sparse_way(WIDE, 1, 6) == "few"
    assert sparse_way(WIDE, 4096, 6) == "grouped"


def test_some_tokens_read_their_union_once() -> None:
    assert sparse_way(WIDE, 8, 6) == "union"


def test_what_is_known_of_the_union_decides() -> None:
    for tokens in (8, 16, 64):
        assert sparse_way(WIDE, tokens, 6, quarters=4) == "masked"
        assert sparse_way(WIDE, tokens, 6, quarters=3) == "union"


def test_all_experts_of_many_tokens_are_the_masked_dense_products() -> None:
    for tokens in (512, 4096):
        assert sparse_way(WIDE, tokens, 32) == "masked"


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
    layer = Layer(width, experts, size, itemsize)
    k = data.draw(st.integers(1, experts))
    cost = sparse_us(layer, tokens, k)[sparse_way(layer, tokens, k)]
    rates = gpu_ways.RATES
    routing = rates.select + tokens * rates.beside_token
    assert cost <= dense_us(layer, tokens) + routing


def test_a_few_dense_tokens_among_sparse_ones() -> None:
    assert gpu_ways.mixed_is_masked(WIDE, 1, 7, 6)
    assert not gpu_ways.mixed_is_masked(WIDE, 1, 4095, 6)
