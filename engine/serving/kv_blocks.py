"""Which block of the KV cache belongs to whom, and what it holds. Bookkeeping alone: no tensors.

The cache is cut into `num_blocks` blocks of `block_size` tokens. A request owns whole blocks, so
memory is wasted only in its last one, and a request of any length fits wherever blocks are free.

A full block whose keys and values were computed can be *published* under a key that names its
whole content: its tokens, all tokens before them, and the expert policy (`root_key`, `child_key`).
Whoever has the same prefix then *shares* it instead of computing it. A published block stays
findable after its last owner has left, until it is taken for new data. So a block is in one of
three states:

- owned, by as many requests as share it;
- cached: without an owner, but findable; once no blank block is left, the block that was given up
  first is taken for new data;
- blank: without an owner, and nobody can find it.

Cached and blank blocks are both free. A request gives its blocks up last block first, so children
go before their parents: a block without its parents could never be found.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from itertools import chain
from typing import Final

from engine.config import check_range

# cryptographic: nobody can find two contents with the same key, even on purpose
_KEY_BYTES: Final = 16


def root_key(policy: str) -> bytes:
    """The key that the first block of a sequence continues.

    Args:
        policy: the expert policy that computed the sequence. The keys and values of a sparse token
            differ from those of a dense one from the second layer on.
    """
    return blake2b(policy.encode(), digest_size=_KEY_BYTES).digest()


def child_key(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """The key of a full block of `token_ids` that follows the block (or root) `parent`."""
    return blake2b(parent + array("q", token_ids).tobytes(), digest_size=_KEY_BYTES).digest()


class BlockAllocator:
    """Hands out block numbers 0 .. num_blocks-1, and finds the blocks of known prefixes."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        check_range("num_blocks", num_blocks, 1, 1 << 31)
        check_range("block_size", block_size, 1, 1 << 20)
        self.num_blocks = num_blocks
        self.block_size = block_size
        # Last in, first out: the block freed last is the one most likely still in a CPU cache.
        self._blank = list(range(num_blocks - 1, -1, -1))
        # ordered by when they were given up, the earliest first
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._num_owners = [0] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        return len(self._blank) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Free blocks that can still be found."""
        return len(self._cached)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold `tokens` tokens."""
        return -(-tokens // self.block_size)

    def is_free(self, block: int) -> bool:
        return not self._num_owners[block]

    def allocate(self, count: int) -> list[int]:
        """Take `count` free blocks; the caller has made sure that there are so many."""
        assert 0 <= count <= self.num_free, f"{count} blocks asked, {self.num_free} free"
        blocks = [self._blank.pop() if self._blank else self._forget() for _ in range(count)]
        for block in blocks:
            self._num_owners[block] = 1
        return blocks

    def _forget(self) -> int:
        """The cached block that was given up first; from now on nobody finds it."""
        block, _ = self._cached.popitem(last=False)
        del self._block_of[self._key_of.pop(block)]
        return block

    def free(self, blocks: Sequence[int]) -> None:
        """Give an owner's blocks up, in the order of its sequence."""
        for block in reversed(blocks):
            assert self._num_owners[block], f"block {block} is freed twice"
            self._num_owners[block] -= 1
            if self._num_owners[block]:
                continue
            if block in self._key_of:
                self._cached[block] = None
            else:
                self._blank.append(block)

    def publish(self, block: int, key: bytes) -> None:
        """Make an owned block findable: it is full and computed, and `key` names its content.

        A block of the same content that is findable already stays the one that is found.
        """
        assert self._num_owners[block], f"block {block} is published without an owner"
        assert block not in self._key_of, f"block {block} is published twice"
        if key not in self._block_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def find(self, key: bytes) -> int | None:
        """The block of this content, if it is still there."""
        return self._block_of.get(key)

    def share(self, blocks: Iterable[int]) -> None:
        """Become an owner, perhaps one of several, of blocks that were found."""
        for block in blocks:
            assert block in self._key_of, f"block {block} is shared but was not published"
            self._num_owners[block] += 1
            self._cached.pop(block, None)

    def check_integrity(self, owned: Iterable[Sequence[int]]) -> None:
        """Assert that every block is blank, cached or owned, and that the keys lead where they say.

        Args:
            owned: the blocks of each owner.
        """
        owners = Counter(chain.from_iterable(owned))
        assert self._num_owners.count(0) == self.num_blocks - len(owners), "owners were miscounted"
        assert all(self._num_owners[b] == n for b, n in owners.items()), "owners were miscounted"
        blank = set(self._blank)
        assert len(blank) == len(self._blank), "a block is blank twice"
        assert owners.keys().isdisjoint(self._cached), "an owned block is cached"
        assert blank.isdisjoint(owners), "an owned block is blank"
        assert blank.isdisjoint(self._key_of), "a blank block can be found"
        assert self._cached.keys() <= self._key_of.keys(), "a cached block cannot be found"
        accounted = len(blank) + len(self._cached) + len(owners)
        assert accounted == self.num_blocks, (
            f"{accounted} blocks are accounted for, {self.num_blocks} exist"
        )
        found = dict(zip(self._block_of.values(), self._block_of.keys(), strict=True))
        assert found == self._key_of, "a key leads to another block than its own"
