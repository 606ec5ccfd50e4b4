"""Hidden states of many tokens, carried through a model layer by layer.

A model whose layers come one at a time cannot run a text from end to end. So all tokens of an
import pass layer 0, then all pass layer 1, and what is between is kept. Held-out tokens pass every
layer once for each way to choose experts: their states diverge, and each ends in its own loss.

Shapes: T tokens, D model, E experts, L length, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.config import ModelConfig
from engine.cpu import native
from engine.cpu.pack import pack_layer
from engine.model.attention import causal_attend
from engine.model.decoder import Decoder, Layer
from engine.model.ffn import ExpertFFN
from engine.model.policy_batch import PolicyBatch
from engine.model.trace import Trace
from training.importing.plan import Stream
from training.quality.expert_use import ExpertUse

_BATCH_TOKENS: Final = 2048
_LOGIT_TOKENS: Final = 256
_MASS_EVERY: Final = 8  # coverage is measured on every eighth token

Advance = Callable[[int], None]


class Frame:
    """A decoder in which only the part at work has weights."""

    def __init__(self, config: ModelConfig, rest: Mapping[str, Tensor]) -> None:
        """`rest`: the tensors outside the layers, in the dtype to run in."""
        self._config = config
        with torch.device("meta"):
            model = Decoder(dataclasses.replace(config, num_hidden_layers=1))
        self.model = model.requires_grad_(False).eval()
        self.model.materialize_tables("cpu")
        self._rest = rest

    @contextmanager
    def layer(self, index: int, tensors: Mapping[str, Tensor]) -> Iterator[Layer]:
        """The layer with its weights, while it is needed; its router is empty."""
        with torch.device("meta"):
            layer = Layer(self._config, index)
        router = torch.zeros(layer.ffn.router.shape, dtype=torch.float32)
        layer.load_state_dict({**tensors, "ffn.router": router}, assign=True)
        yield layer.requires_grad_(False).eval()

    @contextmanager
    def ends(self) -> Iterator[Decoder]:
        """The model with the weights before and behind its layers."""
        self.model.load_state_dict(self._rest, strict=False, assign=True)
        yield self.model.requires_grad_(False)
        for name, module in self.model.named_children():
            if name != "layers":
                module.to("meta")


def pack(layer: Layer, config: ModelConfig) -> None:
    """Switch a layer to the CPU's kernels where they support it: several times faster if sparse.

    Its weights are released: take them from it before.
    """
    if native.supports(layer.ffn.up.dtype, config.hidden_size, config.head_dim):
        pack_layer(layer)


@torch.no_grad()
def embed(model: Decoder, ids_BL: Tensor) -> Tensor:
    """The input of the first layer, [T, D], sequence by sequence."""
    sequences, length = ids_BL.shape
    return model.embed(ids_BL.flatten(), torch.arange(length).repeat(sequences))


@torch.no_grad()
def pass_layer(
    model: Decoder,
    layer: Layer,
    x_TD: Tensor,
    length: int,
    stream: Stream,
    generator: torch.Generator,
    advance: Advance = lambda _tokens: None,
    inputs: list[Tensor] | None = None,
) -> ExpertUse:
    """Carry the states of whole sequences through one layer, in place.

    Args:
        model: gives the positions their rotations.
        layer: the layer, with its weights.
        x_TD: the states in front of the layer, which become those behind it.
        length: L, the length of every sequence.
        stream: how experts are chosen.
        generator: draws the experts that are chosen by chance.
        advance: is called after every batch with its number of tokens.
        inputs: gains the FFN's inputs, batch by batch.

    Returns:
        What the choice used, and covered of the true mass of every eighth token.
    """
    use, step = ExpertUse(), max(1, _BATCH_TOKENS // length) * length
    experts = layer.ffn.num_experts
    for rows_TD in torch.split(x_TD, step):
        sequences = rows_TD.shape[0] // length
        positions_T = torch.arange(length).repeat(sequences)
        policies = PolicyBatch.uniform(stream.policy, rows_TD.shape[0], experts)
        trace = Trace(keep_inputs=inputs is not None, mass_every=_MASS_EVERY if stream.k else 0)
        attend = causal_attend(sequences, length, model.config.window)
        with _by_chance(layer.ffn, generator, wanted=stream.kind == "random"):
            rows_TD.copy_(layer(rows_TD, *model.turns(positions_T), attend, policies, trace))
        _count(use, trace, rows_TD.shape[0] * experts)
        if inputs is not None:
            inputs += trace.inputs
        advance(rows_TD.shape[0])
    return use


@contextmanager
def _by_chance(ffn: ExpertFFN, generator: torch.Generator, *, wanted: bool) -> Iterator[None]:
    """While it lasts, every token's experts are drawn with equal chances."""

    def scores(x_TD: Tensor, *, oracle: bool = False) -> Tensor:
        return torch.rand(x_TD.shape[0], ffn.num_experts, generator=generator)

    if not wanted:
        yield
        return
    ffn.scores = scores  # type: ignore[method-assign]  # of this one object
    try:
        yield
    finally:
        del ffn.scores


def _count(use: ExpertUse, trace: Trace, available: int) -> None:
    use.available += available
    chosen_TE = trace.chosen[0]
    if chosen_TE is None:
        use.activated += available
        return
    use.activated += int(chosen_TE.sum())
    mass_nE = trace.masses[0].float()
    use.inside += float((mass_nE * chosen_TE[::_MASS_EVERY]).sum())
    use.total += float(mass_nE.sum())


@torch.no_grad()
def token_losses(model: Decoder, x_TD: Tensor, targets_T: Tensor) -> Tensor:
    """Cross-entropy of every token in nats, float64 [T], from the states behind the last layer."""
    losses = []
    for rows_TD, targets in zip(
        torch.split(x_TD, _LOGIT_TOKENS), torch.split(targets_T, _LOGIT_TOKENS), strict=True
    ):
        logits_TV = model.logits_of(model.last_norm(rows_TD))
        losses.append(F.cross_entropy(logits_TV, targets, reduction="none"))
    return torch.cat(losses).double()
