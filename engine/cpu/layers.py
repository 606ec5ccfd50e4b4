"""All layers of a packed decoder in one call.

The same functions in the same order as layer by layer, hence the same bits. Between them Python
would cost a small model as much time as its weights: a layer has a dozen steps.

Shapes: T tokens, B sequences, D model, H query heads, G key-value heads, d head dimension,
E experts, S neurons per expert, L layers, M blocks per sequence at most.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from engine.cpu import native

NormWeights = tuple[Tensor, Tensor | None]  # weight and, of a LayerNorm, bias, [D] each


class LayerParts(NamedTuple):
    """One layer's weights."""

    attention_norm: NormWeights
    qkv: native.PackedLinear
    out: native.PackedLinear
    ffn_norm: NormWeights
    ffn: native.PackedExpertFFN


class LayerShape(NamedTuple):
    """What the weights do not say.

    Attributes:
        heads, kv_heads, head_dim: of attention.
        epsilon: of the norms.
        multiplier: of what attention and FFN add to x.
        window: last tokens that a token sees, itself included; 0: all.
        norm_first: norms come before attention and FFN; else after each sum.
    """

    heads: int
    kv_heads: int
    head_dim: int
    epsilon: float
    multiplier: float = 1.0
    window: int = 0
    norm_first: bool = True


class CachedSequences(NamedTuple):
    """The sequences of a flat batch, and where their keys and values are.

    Attributes:
        cache: of all layers.
        slot_T: int64, where each token's keys and values go.
        table_BM, first_B, rows_B, context_B: as for `native.PagedCache.attend`.
    """

    cache: native.PagedCache
    slot_T: Tensor
    table_BM: Tensor
    first_B: Tensor
    rows_B: Tensor
    context_B: Tensor


class Limits(NamedTuple):
    """How many experts the tokens may use; arguments as for `native.choose`.

    Attributes:
        most: of one token.
    """

    k_T: Tensor
    mass_T: Tensor
    shared_T: Tensor | None
    most: int


class _LayerWeights(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_void_p)
        for name in (
            *("attention_norm", "qkv", "out", "ffn_norm", "up", "down", "router"),
            *("attention_norm_bias", "qkv_bias", "out_bias", "ffn_norm_bias"),
            *("gate", "up_bias", "down_bias"),
        )
    ]


_SIZES = ("layers", "D", "H", "G", "d", "E", "S")
_VECTORS = ("qkv_vectors", "out_vectors", "up_vectors", "down_vectors", "activation")
_FLAGS = ("window", "norm_first")


class _ModelShape(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in (*_SIZES, *_VECTORS, *_FLAGS)),
        *((name, ctypes.c_double) for name in ("epsilon", "multiplier", "threshold")),
    ]


_POINTERS = (
    *("cos", "sin", "slot", "table", "first", "rows", "context", "keys", "values"),
    *("k", "shared", "mass", "expert", "offsets", "token", "chosen"),
    *("x", "normed", "heads", "attended", "delta", "h", "scores", "y"),
)


class _BatchMemory(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("T", "B", "table_stride", "cache_bytes")),
        *((name, ctypes.c_void_p) for name in _POINTERS),
    ]


class PackedLayers:
    """The layers of a decoder whose every part is packed.

    Args:
        layers: in order.
        shape: of all of them.
    """

    def __init__(self, layers: Sequence[LayerParts], shape: LayerShape) -> None:
        self._parts = list(layers)  # keeps the weights that the pointers point to
        first, lanes = layers[0], native.lanes()
        self.dtype, self.num_experts = first.qkv.dtype, first.ffn.num_experts
        self._width, self._size = first.ffn.model, first.ffn.expert_size
        self._heads, self._kv_heads, self._head_dim = shape.heads, shape.kv_heads, shape.head_dim
        self._shape = _ModelShape(
            len(layers),
            self._width,
            shape.heads,
            shape.kv_heads,
            shape.head_dim,
            self.num_experts,
            self._size,
            first.qkv.width // lanes,
            first.out.width // lanes,
            first.ffn.width // lanes,
            first.ffn.down_width // lanes,
            first.ffn.code,
            shape.window,
            shape.norm_first,
            shape.epsilon,
            shape.multiplier,
            first.ffn.threshold,
        )
        self._weights = (_LayerWeights * len(layers))()
        for weights, parts in zip(self._weights, layers, strict=True):
            ffn = parts.ffn
            found = {
                "attention_norm": parts.attention_norm[0],
                "attention_norm_bias": parts.attention_norm[1],
                "qkv": parts.qkv.packed,
                "qkv_bias": parts.qkv.bias,
                "out": parts.out.packed,
                "out_bias": parts.out.bias,
                "ffn_norm": parts.ffn_norm[0],
                "ffn_norm_bias": parts.ffn_norm[1],
                "up": ffn.up,
                "up_bias": ffn.up_bias,
                "gate": ffn.gate,
                "down": ffn.down,
                "down_bias": ffn.down_bias,
            }
            for name, tensor in found.items():
                setattr(weights, name, None if tensor is None else tensor.data_ptr())

    def __call__(
        self,
        x_TD: Tensor,
        turns: tuple[Tensor, Tensor] | None,
        sequences: CachedSequences,
        routers: Sequence[Tensor],
        limits: Limits | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Run all layers.

        x is replaced by the sum before the last FFN or, where norms come after, by the last norm.

        Args:
            x_TD: contiguous, the embedded tokens; overwritten.
            turns: cosines and sines of each token's position, float32 [T, d / 2]; None: none.
            sequences: which tokens belong together.
            routers: float32 [E, D], one a layer.
            limits: None: all tokens use all experts.

        Returns:
            What the last FFN adds to x, [T, D], overwritten by the next call; and the choices, bool
            [L, T, E], or None if all tokens use all experts.
        """
        T = x_TD.shape[0]
        assert x_TD.dtype == self.dtype
        assert x_TD.is_contiguous()
        for weights, router_ED in zip(self._weights, routers, strict=True):
            weights.router = router_ED.data_ptr()
        held, chosen_LTE = self._experts(T, limits)
        cache = sequences.cache
        if turns is not None:
            held |= {"cos": turns[0], "sin": turns[1]}
        held |= {
            "slot": sequences.slot_T,
            "table": sequences.table_BM,
            "first": sequences.first_B,
            "rows": sequences.rows_B,
            "context": sequences.context_B,
            "keys": cache.keys,
            "values": cache.values,
            "x": x_TD,
            **self._between(T),
        }
        batch = _BatchMemory(
            T, sequences.table_BM.shape[0], sequences.table_BM.shape[1], cache.keys[0].nbytes
        )
        for name, tensor in held.items():
            setattr(batch, name, tensor.data_ptr())
        native.call(
            "layers",
            self.dtype,
            ctypes.byref(self._weights),
            ctypes.byref(self._shape),
            ctypes.byref(batch),
            ctypes.c_float(self._head_dim**-0.5),
        )
        return held["delta"][: x_TD.numel()].view(x_TD.shape), chosen_LTE

    def _experts(self, T: int, limits: Limits | None) -> tuple[dict[str, Tensor], Tensor | None]:
        """Memory for choices and pairs, or all pairs; and for the activations of the pairs."""
        E, row = self.num_experts, self._size + self._size % 2
        if limits is None:
            pairs = native.every_pair(T, E)
            held = {"expert": pairs.expert_U, "offsets": pairs.offsets, "token": pairs.token_P}
            return held | {"h": native.scratch("h", T * E * row, self.dtype)}, None
        chosen_LTE = torch.empty(len(self._parts), T, E, dtype=torch.bool)
        numbers = native.scratch("pairs", 2 * E + 1 + T * E, torch.int32)
        held = {
            "k": limits.k_T,
            "mass": limits.mass_T,
            "chosen": chosen_LTE,
            "expert": numbers,
            "offsets": numbers[E:],
            "token": numbers[2 * E + 1 :],
            "h": native.scratch("h", T * limits.most * row, self.dtype),
        }
        if limits.shared_T is not None:
            held["shared"] = limits.shared_T
            held["scores"] = native.scratch("scores", T * E, torch.float32)
        return held, chosen_LTE

    def _between(self, T: int) -> dict[str, Tensor]:
        """What one step leaves to the next."""
        heads = (self._heads + 2 * self._kv_heads) * self._head_dim
        sizes = {
            "normed": self._width,
            "heads": heads,
            "attended": self._heads * self._head_dim,
            "delta": self._width,
        }
        found = {name: native.scratch(name, T * n, self.dtype) for name, n in sizes.items()}
        return found | {"y": native.scratch("y", T * self._width, torch.float32)}
