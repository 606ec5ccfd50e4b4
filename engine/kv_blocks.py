"""Which block of the KV cache belongs to whom. Bookkeeping alone: no tensors.

The cache is cut into `num_blocks` blocks of `block_size` tokens. A request owns whole blocks, so
memory is wasted only in its last one, and a request of any length fits wherever blocks are free.
"""

from __future__ import annotations

from collections.abc import Iterable

from engine.config import check_range


class BlockAllocator:
    """Hands out block numbers 0 .. num_blocks-1, each to one owner at a time."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        check_range("num_blocks", num_blocks, 1, 1 << 31)
        check_range("block_size", block_size, 1, 1 << 20)
        self.num_blocks = num_blocks
        self.block_size = block_size
        # Last in, first out: the block freed last is the one most likely still in a CPU cache.
        self._free = list(range(num_blocks - 1, -1, -1))
        self._is_free = bytearray(b"\x01" * num_blocks)

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold `tokens` tokens."""
        return -(-tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """Take `count` free blocks; the caller has made sure that there are so many."""
        assert 0 <= count <= len(self._free), f"{count} blocks asked, {len(self._free)} free"
        blocks = [self._free.pop() for _ in range(count)]
        for block in blocks:
            self._is_free[block] = 0
        return blocks

    def free(self, blocks: Iterable[int]) -> None:
        """Give blocks back; each must be in use."""
        for block in blocks:
            assert not self._is_free[block], f"block {block} is freed twice"
            self._is_free[block] = 1
            self._free.append(block)

    def check_integrity(self, owned: Iterable[list[int]]) -> None:
        """Assert that every block is free or owned, and exactly once.

        Args:
            owned: the blocks of each owner.
        """
        blocks = list(self._free)
        for owner in owned:
            assert not any(self._is_free[block] for block in owner), "an owned block is free"
            blocks += owner
        assert len(blocks) == self.num_blocks, (
            f"{len(blocks)} blocks are accounted for, {self.num_blocks} exist"
        )
        assert len(set(blocks)) == self.num_blocks, "a block has two owners"
