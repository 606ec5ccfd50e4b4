"""How one tensor of ours lies in the tensors of another family, and back.

Shapes: D model, H query heads, G key-value heads, d head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.config import ModelConfig

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Transform:
    """Both directions, and the shapes that the other family's tensors must have.

    Attributes:
        take: theirs to ours.
        give: ours to theirs.
        shapes: the shape of ours to the shapes of theirs.
    """

    take: Callable[[Sequence[Tensor], ModelConfig], Tensor]
    give: Callable[[Tensor, ModelConfig], list[Tensor]]
    shapes: Callable[[Shape, ModelConfig], list[Shape]]


def rotary_order(config: ModelConfig) -> Tensor | None:
    """For each dimension of a head of ours, which of theirs it is, [d]; None if none moved.

    Others rotate the first r dimensions by halves, r/2 apart. Ours rotate whole halves, d/2 apart,
    so each half takes its share of the rotated ones first and of the others after.
    """
    d, r = config.head_dim, config.rotary_dim
    if not config.is_rotary or r == d:
        return None
    rotated, rest = torch.arange(r).chunk(2), torch.arange(r, d).chunk(2)
    return torch.cat([rotated[0], rest[0], rotated[1], rest[1]])


def _reorder(rows: Tensor, order_d: Tensor | None) -> Tensor:
    """`rows` [heads * d, ...], each head's dimensions in another order."""
    if order_d is None:
        return rows
    return rows.view(-1, order_d.numel(), *rows.shape[1:])[:, order_d].reshape(rows.shape)


def _stack_heads(tensors: Sequence[Tensor], config: ModelConfig) -> Tensor:
    q, k, v = tensors
    order_d = rotary_order(config)
    return torch.cat([_reorder(q, order_d), _reorder(k, order_d), v])


def _split_heads(tensor: Tensor, config: ModelConfig) -> list[Tensor]:
    order_d = rotary_order(config)
    back_d = None if order_d is None else torch.argsort(order_d)
    sizes = [shape[0] for shape in _head_shapes(tuple(tensor.shape), config)]
    q, k, v = torch.split(tensor, sizes)
    return [_reorder(q, back_d), _reorder(k, back_d), v]


def _head_shapes(shape: Shape, config: ModelConfig) -> list[Shape]:
    queries, keys = config.num_attention_heads, config.num_key_value_heads
    return [(heads * config.head_dim, *shape[1:]) for heads in (queries, keys, keys)]


SAME = Transform(
    take=lambda tensors, _: tensors[0],
    give=lambda tensor, _: [tensor],
    shapes=lambda shape, _: [shape],
)

TRANSPOSED = Transform(
    take=lambda tensors, _: tensors[0].T.contiguous(),
    give=lambda tensor, _: [tensor.T.contiguous()],
    shapes=lambda shape, _: [shape[::-1]],
)

# Queries, keys and values side by side, where others keep three tensors.
HEADS = Transform(take=_stack_heads, give=_split_heads, shapes=_head_shapes)
