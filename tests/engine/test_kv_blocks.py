"""Blocks: every one is free or owned, and by one owner."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import ConfigError
from engine.kv_blocks import BlockAllocator


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_blocks_for_rounds_up(tokens: int, blocks: int) -> None:
    assert BlockAllocator(3, 4).blocks_for(tokens) == blocks


def test_allocate_and_free_keep_count() -> None:
    allocator = BlockAllocator(3, 4)
    blocks = allocator.allocate(2)
    assert (allocator.num_free, allocator.num_used) == (1, 2)
    allocator.free(blocks)
    assert (allocator.num_free, allocator.num_used) == (3, 0)


def test_sizes_must_be_positive() -> None:
    with pytest.raises(ConfigError, match="num_blocks"):
        BlockAllocator(0, 4)
    with pytest.raises(ConfigError, match="block_size"):
        BlockAllocator(4, 0)


def test_misuse_is_caught() -> None:
    allocator = BlockAllocator(3, 4)
    blocks = allocator.allocate(2)
    with pytest.raises(AssertionError, match="2 blocks asked, 1 free"):
        allocator.allocate(2)
    allocator.free(blocks[:1])
    with pytest.raises(AssertionError, match="freed twice"):
        allocator.free(blocks[:1])


def test_integrity_finds_lost_shared_and_freed_blocks() -> None:
    allocator = BlockAllocator(4, 1)
    owned = allocator.allocate(2)
    allocator.check_integrity([owned])
    with pytest.raises(AssertionError, match="accounted for"):
        allocator.check_integrity([owned[:1]])
    with pytest.raises(AssertionError, match="two owners"):
        allocator.check_integrity([[owned[0]], [owned[0]]])
    allocator.free(owned[:1])
    with pytest.raises(AssertionError, match="an owned block is free"):
        allocator.check_integrity([owned])


@given(st.lists(st.integers(-3, 5), max_size=40))
def test_blocks_are_conserved(changes: list[int]) -> None:
    """Positive numbers allocate so many blocks, negative ones free the owner of that number."""
    allocator = BlockAllocator(12, 4)
    owners: list[list[int]] = []
    for change in changes:
        if change < 0 and len(owners) >= -change:
            allocator.free(owners.pop(-change - 1))
        elif 0 <= change <= allocator.num_free:
            owners.append(allocator.allocate(change))
        allocator.check_integrity(owners)
        assert allocator.num_used == sum(map(len, owners))
