"""Token arrays to batches by step number.

A batch is a pure function of (seed, step), so a resumed run sees the data that an uninterrupted one
would, and so does each of many processes its share of it.

Shapes: B sequences, L length, R sequences of one process.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.errors import require
from training.data.shards import TokenArray
from training.errors import DataError

Tokens = NDArray[np.uint32] | TokenArray
# Inputs and targets, each int64 [B, L], of the batches that a model is scored on.
Batches = list[tuple[Tensor, Tensor]]


class TokenBatches:
    """Sequences of one token array, shuffled anew each epoch; a batch depends on its step alone.

    The order of an epoch takes 8 bytes a sequence. Of n tokens, (n - 1) // L sequences are made;
    the tokens that do not fill another one are not used.

    Raises:
        DataError: if the tokens do not fill one sequence.
    """

    def __init__(self, tokens: Tokens, batch_size: int, length: int, seed: int) -> None:
        self._tokens = TokenArray.of(tokens)
        if self._tokens.size < length + 1:
            raise DataError(
                f"{self._tokens.name} has {self._tokens.size} tokens, fewer than one sequence of "
                f"{length + 1}"
            )
        self._batch_size = batch_size
        self._length = length
        self._seed = seed
        self.num_sequences = (self._tokens.size - 1) // length
        self._epoch = -1
        self._order: NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def _sequence(self, number: int) -> NDArray[np.int64]:
        epoch, position = divmod(number, self.num_sequences)
        if epoch != self._epoch:
            random_state = np.random.default_rng((self._seed, epoch))
            self._order, self._epoch = random_state.permutation(self.num_sequences), epoch
        start = int(self._order[position]) * self._length
        return self._tokens[start : start + self._length + 1].astype(np.int64)

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> tuple[Tensor, Tensor]:
        """Inputs and targets of `step`, each int64 [R, L]; targets are the next tokens.

        Process `rank` of `world_size` gets rows rank * R .. (rank + 1) * R of the step's B rows,
        R = B / world_size; micro-batches are slices of them.

        Raises:
            ConfigError: if `world_size` does not divide B, or `rank` is not one of its processes.
        """
        require(
            world_size >= 1 and self._batch_size % world_size == 0,
            f"world_size {world_size} must divide batch_size {self._batch_size}",
        )
        require(0 <= rank < world_size, f"rank must be from 0 to {world_size - 1}, got {rank}")
        count = self._batch_size // world_size
        first = step * self._batch_size + rank * count
        rows = np.stack([self._sequence(first + i) for i in range(count)])
        return torch.from_numpy(rows[:, :-1]), torch.from_numpy(rows[:, 1:])


def consecutive_batches(
    tokens: Tokens, batch_size: int, length: int, max_batches: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets over `tokens` in order, for evaluation; the last batch may be smaller."""
    count = (tokens.size - 1) // length
    yield from _batches(tokens, range(min(count, batch_size * max_batches)), batch_size, length)


def spread_batches(
    tokens: Tokens, batch_size: int, length: int, sequences: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of at most `sequences` sequences that are evenly spread over `tokens`."""
    count = (tokens.size - 1) // length
    kept = min(count, sequences)
    yield from _batches(tokens, [i * count // kept for i in range(kept)], batch_size, length)


def _batches(
    tokens: Tokens, numbers: Sequence[int], batch_size: int, length: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The sequences of these numbers, batch by batch."""
    for first in range(0, len(numbers), batch_size):
        starts = [n * length for n in numbers[first : first + batch_size]]
        rows = np.stack([tokens[start : start + length + 1] for start in starts])
        batch_BL = torch.from_numpy(rows.astype(np.int64))
        yield batch_BL[:, :-1], batch_BL[:, 1:]
