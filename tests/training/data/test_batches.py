"""Batches: shuffled over everything, a function of the step, and of the step alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import ConfigError
from training.data.batches import TokenBatches
from training.data.shards import TokenArray

SIZES = st.integers(min_value=1, max_value=9)


def cut(tokens: np.ndarray, shard_tokens: int) -> TokenArray:
    return TokenArray(np.split(tokens, range(shard_tokens, tokens.size, shard_tokens)))


@given(SIZES, SIZES, st.integers(1, 60), st.integers(0, 99), st.integers(1, 40))
def test_every_sequence_comes_once_an_epoch(
    batch_size: int, length: int, sequences: int, seed: int, shard_tokens: int
) -> None:
    tokens = np.arange(1 + sequences * length, dtype=np.uint32)
    batches = TokenBatches(cut(tokens, shard_tokens), batch_size, length, seed)
    steps = -(-2 * sequences // batch_size)
    pairs = [batches.batch(step) for step in range(steps)]
    inputs, targets = (torch.cat(rows) for rows in zip(*pairs, strict=True))
    assert torch.equal(inputs + 1, targets)
    starts = inputs[:, 0].tolist()
    everything = list(range(0, sequences * length, length))
    assert sorted(starts[:sequences]) == sorted(starts[sequences : 2 * sequences]) == everything


@given(st.lists(st.integers(0, 60), min_size=1, max_size=8), st.integers(0, 99))
def test_any_step_gives_the_same_batch_whatever_came_before(steps: list[int], seed: int) -> None:
    tokens = np.arange(200, dtype=np.uint16)
    visited = TokenBatches(cut(tokens, 33), 3, 7, seed)
    for step in steps:
        alone = TokenBatches(tokens, 3, 7, seed)
        assert torch.equal(visited.batch(step)[0], alone.batch(step)[0])


@given(SIZES, SIZES, st.integers(0, 50), st.integers(0, 9))
def test_the_rows_of_all_processes_are_the_batch(
    per_process: int, world_size: int, step: int, seed: int
) -> None:
    tokens = np.arange(500, dtype=np.uint16)
    batch_size = per_process * world_size
    whole = TokenBatches(tokens, batch_size, 6, seed).batch(step)
    parts = [
        TokenBatches(tokens, batch_size, 6, seed).batch(step, rank, world_size)
        for rank in range(world_size)
    ]
    for expected, found in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(torch.cat(found), expected)


def test_uneven_shares_are_refused() -> None:
    batches = TokenBatches(np.arange(99, dtype=np.uint16), 6, 4, 0)
    with pytest.raises(ConfigError, match="world_size 4 must divide batch_size 6"):
        batches.batch(0, 0, 4)
    with pytest.raises(ConfigError, match="rank must be from 0 to 1, got 2"):
        batches.batch(0, 2, 2)


@given(st.integers(1, 40), st.integers(0, 100), st.integers(0, 100))
def test_several_arrays_read_as_one(shard_tokens: int, start: int, stop: int) -> None:
    tokens = np.arange(100, dtype=np.uint16)
    array = cut(tokens, shard_tokens)
    assert array.size == 100
    found = array[start:stop]
    assert found.dtype == np.uint16
    np.testing.assert_array_equal(found, tokens[start:stop])
