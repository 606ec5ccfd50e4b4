"""Blocks: every one is blank, cached or owned, and found under the key of its content alone."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import ConfigError
from engine.serving.kv_blocks import BlockAllocator, child_key, root_key

ROOT = root_key("dense:0.0")


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


def keys(count: int, start: int = 0) -> list[bytes]:
    """Keys of a sequence of blocks of one token each."""
    made: list[bytes] = []
    for token in range(start, start + count):
        made.append(child_key(made[-1] if made else ROOT, [token]))
    return made


def published(allocator: BlockAllocator, count: int, start: int = 0) -> list[int]:
    """New blocks that hold the sequence of `keys`."""
    blocks = allocator.allocate(count)
    for block, key in zip(blocks, keys(count, start), strict=True):
        allocator.publish(block, key)
    return blocks


def test_keys_name_tokens_parents_and_policy() -> None:
    """Each differs from the others, and the same content has the same key in every process."""
    made = {
        child_key(ROOT, [1, 2]),
        child_key(ROOT, [2, 1]),
        child_key(ROOT, [1]),
        child_key(ROOT, [1, 2, 3]),
        child_key(ROOT, [258]),
        child_key(child_key(ROOT, [1]), [2]),
        child_key(root_key("top_k:2"), [1, 2]),
        child_key(root_key("top_k:21"), [1, 2]),
    }
    assert len(made) == 8
    assert child_key(ROOT, [1, 2]).hex() == "53b9cd69fba5e18730d8b99da72c4811"


def test_free_blocks_are_found_until_they_are_taken() -> None:
    """Blank blocks first, then those given up first; of one owner, children before parents."""
    allocator = BlockAllocator(6, 1)
    first, second = published(allocator, 2), published(allocator, 3, start=10)
    allocator.free(first)
    allocator.free(second)
    assert (allocator.num_free, allocator.num_cached, allocator.num_used) == (6, 5, 0)
    assert [allocator.find(key) for key in keys(2)] == first
    taken = allocator.allocate(3)
    assert taken[1:] == [first[1], first[0]]
    assert [allocator.find(key) for key in keys(2)] == [None, None]
    assert [allocator.find(key) for key in keys(3, 10)] == second
    assert allocator.allocate(1) == [second[2]]


def test_shared_blocks_stay_until_the_last_owner_leaves() -> None:
    allocator = BlockAllocator(3, 1)
    blocks = published(allocator, 2)
    allocator.share(blocks[:1])
    allocator.check_integrity([blocks, blocks[:1]])
    assert allocator.num_free_without([blocks]) == 2
    assert allocator.num_free_without([blocks, blocks[:1]]) == 3
    allocator.free(blocks)
    assert (allocator.num_free, allocator.is_free(blocks[0])) == (2, False)
    allocator.check_integrity([blocks[:1]])
    allocator.free(blocks[:1])
    allocator.check_integrity([])
    assert allocator.num_cached == 2


def test_sharing_a_cached_block_saves_it() -> None:
    allocator = BlockAllocator(2, 1)
    older, newer = published(allocator, 1), published(allocator, 1, start=5)
    allocator.free(older)
    allocator.free(newer)
    allocator.share(older)
    assert allocator.allocate(1) == newer
    allocator.free(older)
    assert allocator.find(keys(1)[0]) == older[0]


def test_of_two_blocks_with_one_content_one_is_found() -> None:
    allocator = BlockAllocator(2, 1)
    blocks, copies = published(allocator, 1), published(allocator, 1)
    assert allocator.find(keys(1)[0]) == blocks[0]
    allocator.free(blocks)
    allocator.free(copies)
    assert allocator.num_cached == 1
    allocator.check_integrity([])


def test_misuse_of_keys_is_caught() -> None:
    allocator = BlockAllocator(2, 1)
    (block,) = allocator.allocate(1)
    with pytest.raises(AssertionError, match="not published"):
        allocator.share([block])
    allocator.publish(block, ROOT)
    with pytest.raises(AssertionError, match="published twice"):
        allocator.publish(block, keys(1)[0])
    allocator.free([block])
    with pytest.raises(AssertionError, match="without an owner"):
        allocator.publish(block, ROOT)


def test_integrity_finds_lost_and_miscounted_blocks() -> None:
    allocator = BlockAllocator(4, 1)
    owned = allocator.allocate(2)
    allocator.check_integrity([owned])
    for wrong in ([owned[:1]], [owned, owned[:1]], [owned, [allocator._blank[0]]], []):
        with pytest.raises(AssertionError, match="miscounted"):
            allocator.check_integrity(wrong)
    allocator._num_owners[owned[0]] = 0
    with pytest.raises(AssertionError, match="3 blocks are accounted for, 4 exist"):
        allocator.check_integrity([owned[1:]])


def owned_cached_blank() -> BlockAllocator:
    """Block 0 is owned, block 1 cached, block 2 blank."""
    allocator = BlockAllocator(3, 1)
    blocks = published(allocator, 2)
    allocator.free(blocks[1:])
    allocator.check_integrity([[0]])
    return allocator


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda a: a._blank.append(2), "blank twice"),
        (lambda a: a._blank.append(0), "an owned block is blank"),
        (lambda a: a._cached.update({0: None}), "an owned block is cached"),
        (lambda a: a._key_of.update({2: ROOT}), "a blank block can be found"),
        (lambda a: a._key_of.pop(1), "a cached block cannot be found"),
        (lambda a: a._block_of.update({keys(2)[1]: 0}), "another block than its own"),
    ],
)
def test_integrity_finds_wrong_states_and_keys(
    damage: Callable[[BlockAllocator], object], sentence: str
) -> None:
    allocator = owned_cached_blank()
    damage(allocator)
    with pytest.raises(AssertionError, match=sentence):
        allocator.check_integrity([[0]])


@given(st.lists(st.tuples(st.integers(-3, 5), st.integers(0, 2)), max_size=60))
def test_blocks_are_conserved(changes: list[tuple[int, int]]) -> None:
    """Positive numbers admit an owner of so many blocks of one of three sequences, who shares what
    is found and publishes the rest; negative ones free the owner of that number. Found blocks have
    the content that was asked for, and those taken for new data were released first."""
    allocator = BlockAllocator(12, 1)
    owners: list[list[int]] = []
    content: dict[int, bytes] = {}
    released: OrderedDict[int, None] = OrderedDict()
    for change, sequence in changes:
        if change < 0 and len(owners) >= -change:
            blocks = owners.pop(-change - 1)
            allocator.free(blocks)
            for block in reversed(blocks):
                if not any(block in other for other in owners):
                    released[block] = None
        elif 0 <= change <= allocator.num_free:
            wanted = keys(change, sequence * 100)
            found = [b for key in wanted if (b := allocator.find(key)) is not None]
            assert [content[block] for block in found] == wanted[: len(found)]
            allocator.share(found)
            for block in found:
                released.pop(block, None)
            blank = allocator.num_free - allocator.num_cached
            new = allocator.allocate(change - len(found))
            oldest = list(released)[: max(0, len(new) - blank)]
            assert [block for block in new if block in released] == oldest
            for block, key in zip(new, wanted[len(found) :], strict=True):
                content[block] = key
                released.pop(block, None)
                allocator.publish(block, key)
            owners.append(found + new)
        allocator.check_integrity(owners)
        assert allocator.num_used == len({block for owner in owners for block in owner})
        assert list(allocator._cached) == list(released)
