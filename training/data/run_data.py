"""What is fixed before the first step: batches to train on, held-out batches, and the probe.

Shapes: B sequences, L length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from torch import Tensor

from training.config import TrainConfig
from training.data.batches import Batches, TokenBatches, spread_batches
from training.data.tokens import TokenData
from training.errors import DataError

_PROBE_TOKENS: Final = 1024


@dataclass(frozen=True)
class RunData:
    """A run's tokens, laid out.

    Attributes:
        tokens: the tokens themselves, where they come from, and their tokenizer.
        batches: the batches to train on.
        valid: held-out batches, scored when the run ends.
        glance: some of them, scored while it lasts.
        probe_BL: training text on which activations are watched, because held-out text must decide
            nothing.
    """

    tokens: TokenData
    batches: TokenBatches
    valid: Batches
    glance: Batches
    probe_BL: Tensor


def lay_out(config: TrainConfig, tokens: TokenData, device: str) -> RunData:
    """Lay the tokens out in batches.

    Raises:
        DataError: if the corpus, or its held-out part, is shorter than one sequence.
    """
    length = config.sequence_length
    batches = TokenBatches(tokens.train, config.batch_size, length, config.seed)
    probe = TokenBatches(tokens.train, max(1, _PROBE_TOKENS // length), length, config.seed + 1)
    return RunData(
        tokens,
        batches,
        held_out(config, tokens, config.evaluate_tokens, device),
        held_out(config, tokens, config.validate_tokens, device),
        probe.batch(0)[0].to(device),
    )


def held_out(config: TrainConfig, tokens: TokenData, most: int, device: str) -> Batches:
    """At most `most` held-out tokens, but at least one sequence, spread over the whole part."""
    length = config.sequence_length
    sequences = max(1, most // length)
    found = spread_batches(tokens.valid, config.batch_size, length, sequences)
    batches = [(inputs.to(device), targets.to(device)) for inputs, targets in found]
    if not batches:
        raise DataError(
            f"{tokens.valid.name} has {tokens.valid.size} tokens, fewer than one sequence of "
            f"{length + 1}; give more text, raise valid_share or give --valid"
        )
    return batches
