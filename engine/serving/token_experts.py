"""Which experts computed a token, for requests that ask (`SamplingParams.token_experts`).

A token's choice is a bitset: layer by layer, each from a byte of its own, expert e is bit e % 8 of
byte e // 8.

Shapes: L layers, T tokens, E experts, n tokens that are asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from torch import Tensor

from engine.config import ModelConfig
from engine.errors import InvalidRequest, require
from engine.serving.request import Request, SamplingParams

MAX_BYTES: Final = 16 << 20  # the most that all bitsets of one request may take


def bitset_bytes(model: ModelConfig) -> int:
    """Length of a token's bitset."""
    return model.num_hidden_layers * -(-model.experts.num_experts // 8)


def check_size(sampling: SamplingParams, model: ModelConfig) -> None:
    """Raise InvalidRequest if a request's bitsets could take more than MAX_BYTES together."""
    most = MAX_BYTES // bitset_bytes(model)
    require(
        not sampling.token_experts or sampling.max_new_tokens <= most,
        f"max_new_tokens must be at most {most} where the experts of each token are reported, got "
        f"{sampling.max_new_tokens}",
        InvalidRequest,
    )


def pack(chosen_LnE: Tensor) -> list[bytes]:
    """The bitset of each of n tokens. Waits for the device."""
    bits_LnB = np.packbits(chosen_LnE.cpu().numpy(), axis=-1, bitorder="little")
    return [bits_LB.tobytes() for bits_LB in bits_LnB.swapaxes(0, 1)]


def read(
    requests: Sequence[Request], rows: Sequence[int], chosen_LTE: Tensor | None, model: ModelConfig
) -> list[bytes]:
    """The bitset of each request's newest token; empty for those that did not ask.

    Args:
        requests, rows: requests, and the row of the batch in which each one's token lies.
        chosen_LTE: what the batch's tokens chose; None if every token used every expert.
        model: gives the number of layers and experts.
    """
    wanted = [row for request, row in zip(requests, rows, strict=True) if asks(request)]
    if not wanted:
        return [b""] * len(requests)
    if chosen_LTE is None:
        layers, experts = model.num_hidden_layers, model.experts.num_experts
        everything = np.packbits(np.ones((layers, experts), bool), axis=-1, bitorder="little")
        packed = [everything.tobytes()] * len(wanted)
    else:
        packed = pack(chosen_LTE[:, wanted])
    found = iter(packed)
    return [next(found) if asks(request) else b"" for request in requests]


def asks(request: Request) -> bool:
    """Whether the request wants to know the experts of each token."""
    return request.sampling.token_experts
