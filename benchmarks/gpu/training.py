"""The section `training` of benchmarks/gpu: one FFN layer's forward and backward pass.

    python -m benchmarks.gpu --sections training [--json FILE]

Every row is y and the gradients of x, up and down in bfloat16, for a choice that is given: each
token has its own random experts, the case with the least reuse. `kernels` is
engine.gpu.ffn.training. Its peers:

- `dense`: relu(x @ up.T) @ down over all neurons, what a dense step computes;
- `masked`: the same with the unchosen neurons' activations set to zero, which gives the sparse
  layer's numbers at more than the dense layer's cost;
- `slices`: engine.experts.sparse_ffn, the plain products expert by expert.

Rows are replayed from a CUDA graph, rivals in turn. `slices` waits for the device and cannot be in
a graph, so it and its rivals are also timed eagerly, as a training loop launches them. `product`
rows are the kernels that `kernels` is made of, and `route` is the choice and the sort of pairs.

Random activations silence half of the neurons; no rival here gains by that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.timing import Call, check, eager_us, interleaved_us, relative_error
from benchmarks.records import Record
from engine.gpu.ffn import products, training
from engine.gpu.ffn.products import Pairs
from engine.gpu.routing.choose_top_k import choose_top_k, choose_top_k_reference
from engine.gpu.routing.pairs import SortedPairs
from engine.model.sliced_ffn import sparse_ffn

SHAPES = ((512, 2048), (768, 3072), (2048, 8192))
TOKENS = (4096, 16384, 65536)
CHOICES = ((64, 8), (32, 6))

LIMITS = {torch.float32: 2e-5, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}

Function = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Layer:
    """Inputs of one layer's step and every way to compute it."""

    x_TD: Tensor
    up_FD: Tensor
    down_FD: Tensor
    dy_TD: Tensor
    pairs: SortedPairs

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.x_TD, self.up_FD, self.down_FD

    def kernels(self, x_TD: Tensor, up_FD: Tensor, down_FD: Tensor) -> Tensor:
        return training.ffn(x_TD, up_FD, down_FD, self.pairs, "relu")

    def slices(self, x_TD: Tensor, up_FD: Tensor, down_FD: Tensor) -> Tensor:
        return sparse_ffn(x_TD, up_FD, down_FD, self.pairs.chosen_TE, "relu")

    def dense(self, x_TD: Tensor, up_FD: Tensor, down_FD: Tensor) -> Tensor:
        return (x_TD @ up_FD.T).relu() @ down_FD

    def masked(self, x_TD: Tensor, up_FD: Tensor, down_FD: Tensor) -> Tensor:
        h_TF = (x_TD @ up_FD.T).relu()
        h_TES = h_TF.view(*self.pairs.chosen_TE.shape, -1) * self.pairs.chosen_TE[:, :, None]
        return h_TES.flatten(1) @ down_FD

    def step(self, function: Function) -> Call:
        """A call of one forward and backward pass."""
        return lambda _: torch.autograd.grad(function(*self.leaves), self.leaves, self.dy_TD)


def random_layer(
    tokens: int,
    shape: tuple[int, int],
    choice: tuple[int, int],
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda",
) -> Layer:
    """Random inputs of (D, F) = `shape` for `choice` = (E, K)."""
    (width, neurons), (experts, chosen) = shape, choice
    scores_TE = torch.randn(tokens, experts, device=device)
    x_TD, dy_TD = (torch.randn(tokens, width, device=device).to(dtype) for _ in range(2))
    up_FD, down_FD = (
        (torch.randn(neurons, width, device=device) / size**0.5).to(dtype).requires_grad_()
        for size in (width, neurons)
    )
    pairs = choose_top_k_reference(scores_TE, chosen)
    return Layer(x_TD.requires_grad_(), up_FD, down_FD, dy_TD, pairs)


# --- correctness ---------------------------------------------------------------------------------


def check_layer(layer: Layer, name: str) -> list[Record]:
    """y and every gradient of `kernels` against the slices in float64."""
    y_TD = layer.kernels(*layer.leaves)
    actual = (y_TD.detach(), *torch.autograd.grad(y_TD, layer.leaves, layer.dy_TD))
    doubles = tuple(leaf.detach().double().requires_grad_() for leaf in layer.leaves)
    expected_TD = layer.slices(*doubles)
    gradients = torch.autograd.grad(expected_TD, doubles, layer.dy_TD.double())
    expected = (expected_TD.detach(), *gradients)
    return [
        check(f"training {tensor} {name}", relative_error(a, e), LIMITS[layer.x_TD.dtype])
        for tensor, a, e in zip(("y", "dx", "dup", "ddown"), actual, expected, strict=True)
    ]


def check_route(tokens: int, experts: int, chosen: int) -> Record:
    """Every field of the sorted pairs of random scores, identical."""
    scores_TE = torch.randn(tokens, experts, device="cuda")
    actual, expected = choose_top_k(scores_TE, chosen), choose_top_k_reference(scores_TE, chosen)
    differing = [
        name
        for name, a, b in zip(actual._fields, actual, expected, strict=True)
        if not torch.equal(a, b)
    ]
    label = f"training route T={tokens} k={chosen}/{experts} differing fields {differing}"
    return check(label, float(len(differing)), 0.0)


def correctness() -> list[Record]:
    """Every shape that is timed, and one of each other dtype and of awkward sizes."""
    cases = [(1024, shape, choice, torch.bfloat16) for shape in SHAPES for choice in CHOICES]
    # Enough pairs that the sums over them are split.
    cases += [(16384, SHAPES[0], choice, torch.bfloat16) for choice in CHOICES]
    cases += [(700, (100, 20 * 12), (20, 3), dtype) for dtype in LIMITS]
    found = [check_route(t, e, k) for t in (1, 100, 65536) for e, k in (*CHOICES, (20, 3))]
    for tokens, shape, choice, dtype in cases:
        layer = random_layer(tokens, shape, choice, dtype)
        sizes = f"T={tokens} D={shape[0]} F={shape[1]} E={choice[0]}"
        found += check_layer(layer, f"{sizes} {str(dtype).removeprefix('torch.')}")
    return found


# --- measurements --------------------------------------------------------------------------------


def product_calls(layer: Layer) -> dict[str, Call]:
    """The kernels that a step of `kernels` launches, each a call of its own."""
    x_TD, up_FD, down_FD = (leaf.detach() for leaf in layer.leaves)
    offsets_E1, capacity = layer.pairs.offsets_E1, layer.pairs.ids_TK.numel()
    tiles_N2 = products.list_tiles(offsets_E1, capacity)
    pairs = Pairs.of(layer.pairs)._replace(tiles_N2=tiles_N2)
    h_PS = products.gather(x_TD, up_FD, pairs, "relu")
    return {
        "tiles": lambda _: products.list_tiles(offsets_E1, capacity),
        "gather": lambda _: products.gather(x_TD, up_FD, pairs, "relu"),
        "gather back": lambda _: products.gather(layer.dy_TD, down_FD, pairs, "relu", h_PS=h_PS),
        "spread": lambda _: products.spread(h_PS, down_FD, pairs),
        "weights": lambda _: products.weights(h_PS, x_TD, pairs),
    }


def route(layer: Layer) -> Call:
    """The choice from scores and the sort of its pairs."""
    scores_TE = torch.randn_like(layer.pairs.chosen_TE, dtype=torch.float32)
    return lambda _: choose_top_k(scores_TE, layer.pairs.ids_TK.shape[1])


def layer_records(layer: Layer, calls: int) -> list[Record]:
    """All measurements of one layer; `calls` of them make a graph."""
    (tokens, width), neurons = layer.x_TD.shape, layer.up_FD.shape[0]
    experts, chosen = layer.pairs.counts_E.numel(), layer.pairs.ids_TK.shape[1]
    params: dict[str, Any] = {"D": width, "F": neurons, "E": experts, "k": chosen}
    params |= {"tokens": tokens, "dtype": "bf16"}
    steps = {name: layer.step(getattr(layer, name)) for name in ("dense", "masked", "kernels")}
    replayed = dict(zip(steps, interleaved_us(list(steps.values()), calls), strict=True))
    parts = {**product_calls(layer), "route": route(layer)}
    parts_us = interleaved_us(list(parts.values()), calls)
    steps["slices"] = layer.step(layer.slices)
    eager = {name: eager_us(steps[name]) for name in ("dense", "slices", "kernels")}

    def against_dense(label: str, times: dict[str, float]) -> list[Record]:
        dense = times["dense"]
        return [
            Record(f"{label} {n} k={chosen}/{experts}", params, us, "us", dense, dense / us)
            for n, us in times.items()
        ]

    return [
        *against_dense("training", replayed),
        *against_dense("training eager", eager),
        *(
            Record(f"product {name} k={chosen}/{experts}", params, us, "us")
            for name, us in zip(parts, parts_us, strict=True)
        ),
    ]


def measurements() -> Iterator[list[Record]]:
    """The section, group by group, correctness first."""
    yield correctness()
    for shape in SHAPES:
        for tokens in TOKENS:
            for choice in CHOICES:
                yield layer_records(random_layer(tokens, shape, choice), calls=65536 // tokens)
                torch.cuda.empty_cache()
