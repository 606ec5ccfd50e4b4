"""All layers of a packed decoder in one call.

The same kernels run in the same order as when Python calls them layer by layer, so the results have
the same bits. A layer has a dozen steps, and in a small model calling each of them from Python
takes as long as reading the weights.

Shapes: T tokens, B sequences, D model, H query heads, G key-value heads, d head dimension,
E experts, S neurons per expert, L layers, M blocks per sequence at most.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor, nn

from engine.cpu import native, pack
from engine.cpu.cache import PagedCache
from engine.cpu.experts import every_pair
from engine.cpu.linear import PackedLinear
from engine.cpu.pack import PackedFFN
from engine.model.decoder import Decoder, Layer


class CachedSequences(NamedTuple):
    """The sequences of a flat batch, and where their keys and values are.

    Attributes:
        cache: keys and values of all layers.
        slot_T: int64, where each token's keys and values go.
        table_BM, first_B, rows_B, context_B: as for `PagedCache.attend`.
    """

    cache: PagedCache
    slot_T: Tensor
    table_BM: Tensor
    first_B: Tensor
    rows_B: Tensor
    context_B: Tensor


class Limits(NamedTuple):
    """How many experts the tokens may use; arguments as for `engine.cpu.experts.choose`.

    Attributes:
        most: the most experts of any one token.
    """

    k_T: Tensor
    mass_T: Tensor
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
    *("k", "mass", "expert", "offsets", "token", "chosen"),
    *("x", "normed", "heads", "attended", "delta", "h", "y"),
)


class _BatchMemory(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("T", "B", "table_stride", "cache_bytes")),
        *((name, ctypes.c_void_p) for name in _POINTERS),
    ]


class PackedLayers:
    """The layers of a decoder that `engine.cpu.pack` has packed."""

    def __init__(self, model: Decoder) -> None:
        config = model.config
        self._layers = [layer for layer in model.layers if isinstance(layer, Layer)]
        self._ffns = [_packed(layer) for layer in self._layers]
        self._weights = (_LayerWeights * len(self._layers))()
        for weights, layer in zip(self._weights, self._layers, strict=True):
            for name, tensor in _weights_of(layer).items():
                setattr(weights, name, None if tensor is None else tensor.data_ptr())
        attention, ffn, lanes = self._layers[0].attention, self._ffns[0].packed, native.lanes()
        qkv, out = _linear(attention.qkv), _linear(attention.out)
        self.dtype, self.num_experts = qkv.dtype, ffn.num_experts
        self._width, self._size = ffn.model, ffn.expert_size
        self._heads, self._kv_heads = attention.heads, attention.kv_heads
        self._head_dim = attention.head_dim
        self._shape = _ModelShape(
            layers=len(self._layers),
            D=self._width,
            H=self._heads,
            G=self._kv_heads,
            d=self._head_dim,
            E=self.num_experts,
            S=self._size,
            qkv_vectors=qkv.width // lanes,
            out_vectors=out.width // lanes,
            up_vectors=ffn.width // lanes,
            down_vectors=ffn.down_width // lanes,
            activation=ffn.code,
            window=config.window,
            norm_first=config.do_layer_norm_before,
            epsilon=config.rms_norm_eps,
            multiplier=config.residual_multiplier,
            threshold=ffn.threshold,
        )

    def __call__(
        self,
        x_TD: Tensor,
        turns: tuple[Tensor, Tensor] | None,
        sequences: CachedSequences,
        limits: Limits | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Run all layers.

        x is replaced by the sum before the last FFN or, where norms come after, by the last norm.

        Args:
            x_TD: contiguous, the embedded tokens; overwritten.
            turns: cosines and sines of each token's position, float32 [T, d / 2]; None: none.
            sequences: which tokens belong together.
            limits: None: all tokens use all experts.

        Returns:
            What the last FFN adds to x, [T, D], overwritten by the next call; and the choices, bool
            [L, T, E], or None if all tokens use all experts.
        """
        T = x_TD.shape[0]
        assert x_TD.dtype == self.dtype
        assert x_TD.is_contiguous()
        # A router is a buffer that may be assigned anew, so each call reads its address.
        for weights, ffn in zip(self._weights, self._ffns, strict=True):
            weights.router = ffn.router.data_ptr()
        # C gets bare addresses: `held` keeps every tensor alive until the call has returned.
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
        """Memory for the choices and pairs (or the pairs of all experts) and the activations."""
        E, row = self.num_experts, self._size + self._size % 2
        if limits is None:
            pairs = every_pair(T, E)
            held = {"expert": pairs.expert_U, "offsets": pairs.offsets, "token": pairs.token_P}
            return held | {"h": native.scratch("h", T * E * row, self.dtype)}, None
        chosen_LTE = torch.empty(len(self._layers), T, E, dtype=torch.bool)
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
        return held, chosen_LTE

    def _between(self, T: int) -> dict[str, Tensor]:
        """Working memory in which one step of a layer leaves its results to the next."""
        heads = (self._heads + 2 * self._kv_heads) * self._head_dim
        sizes = {
            "normed": self._width,
            "heads": heads,
            "attended": self._heads * self._head_dim,
            "delta": self._width,
        }
        found = {name: native.scratch(name, T * n, self.dtype) for name, n in sizes.items()}
        return found | {"y": native.scratch("y", T * self._width, torch.float32)}


def _linear(layer: nn.Module) -> PackedLinear:
    """The weights of a packed linear layer."""
    assert isinstance(layer, pack.PackedLinear)
    return layer.packed


def _packed(layer: Layer) -> PackedFFN:
    """The packed FFN of a layer."""
    ffn = layer.get_submodule("ffn")
    assert isinstance(ffn, PackedFFN)
    return ffn


def _weights_of(layer: Layer) -> dict[str, Tensor | None]:
    """The tensor that each field of `_LayerWeights` points to; the router is set at each call."""
    qkv, out = _linear(layer.attention.qkv), _linear(layer.attention.out)
    ffn = _packed(layer).packed
    return {
        "attention_norm": layer.attention_norm.weight,
        "attention_norm_bias": layer.attention_norm.bias,
        "qkv": qkv.packed,
        "qkv_bias": qkv.bias,
        "out": out.packed,
        "out_bias": out.bias,
        "ffn_norm": layer.ffn_norm.weight,
        "ffn_norm_bias": layer.ffn_norm.bias,
        "up": ffn.up,
        "up_bias": ffn.up_bias,
        "gate": ffn.gate,
        "down": ffn.down,
        "down_bias": ffn.down_bias,
    }
