"""One training step: what it minimises, and its gradients.

Shapes: B sequences, L length, T tokens, n sampled tokens, E experts, K chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.model.decoder import Decoder
from engine.model.trace import Trace
from engine.policy import ExpertPolicy
from training.config import SwitchConfig, TrainConfig


@dataclass(frozen=True)
class Objective:
    """The results of one forward pass, each a 0-dim tensor.

    Attributes:
        total: what training minimises: `loss` plus `outside` times its weight.
        loss: cross-entropy in nats per token.
        outside: share of the true activation mass outside the chosen experts, mean over layers;
            None where no penalty is measured.
    """

    total: Tensor
    loss: Tensor
    outside: Tensor | None


def objective(
    model: Decoder,
    inputs_BL: Tensor,
    targets_BL: Tensor,
    top_k: int | None,
    switch: SwitchConfig,
) -> Objective:
    """Run a dense (`top_k` None) or sparse forward pass and measure its penalty.

    Dense passes know every expert's mass already; sparse ones compute it on a sample of the tokens.
    """
    weight = switch.dense_weight if top_k is None else switch.penalty
    policy = ExpertPolicy.dense() if top_k is None else ExpertPolicy.top_k(top_k)
    trace = Trace(keep_inputs=True, mass_every=switch.penalty_every) if weight > 0 else None
    logits_BLV = model.logits(inputs_BL, policy, trace)
    loss = F.cross_entropy(logits_BLV.flatten(0, 1), targets_BL.flatten())
    if trace is None:
        return Objective(loss, loss, None)
    outside = outside_share(model, trace, top_k or switch.top_k[-1])
    return Objective(loss + weight * outside, loss, outside)


def outside_share(model: Decoder, trace: Trace, top_k: int) -> Tensor:
    """Share of the true activation mass outside the chosen experts, mean over layers (0-dim).

    Where every expert ran, the chosen ones are those that the router would choose at `top_k`. Its
    gradient draws activations into the chosen experts.
    """
    every = trace.mass_every
    shares = []
    for ffn, x_TD, chosen_TE, mass_nE in zip(
        model.ffns(), trace.inputs, trace.chosen, trace.masses, strict=True
    ):
        mass_nE = mass_nE.float()
        if chosen_TE is None:
            best_nK = ffn.scores(x_TD[::every]).topk(top_k, sorted=False).indices
            inside = mass_nE.gather(1, best_nK).sum()
        else:
            inside = (mass_nE * chosen_TE[::every]).sum()
        shares.append(1 - inside / mass_nE.sum().clamp_min(1e-9))
    return torch.stack(shares).mean()


def accumulate(
    forward: Callable[[Tensor, Tensor], Objective],
    inputs_BL: Tensor,
    targets_BL: Tensor,
    config: TrainConfig,
    unfinished: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> tuple[Tensor, Tensor | None]:
    """Add up the gradients of a batch, one micro-batch at a time.

    Returns the batch's mean loss and mean outside share.

    Args:
        forward: computes the objective from the inputs and targets of a micro-batch.
        inputs_BL, targets_BL: this process's part of the batch.
        config: for `micro_batch_size` and `precision`.
        unfinished: entered around every micro-batch but the last (`SharedObjective.unfinished`).
    """
    losses, outsides = [], []
    sequences = inputs_BL.shape[0]
    for rows in _micro_batches(sequences, config.micro_batch_size):
        device, mixed = inputs_BL.device.type, config.precision == "bfloat16"
        share = (rows.stop - rows.start) / sequences
        with nullcontext() if rows.stop == sequences else unfinished():
            with torch.autocast(device, dtype=torch.bfloat16, enabled=mixed):
                result = forward(inputs_BL[rows], targets_BL[rows])
            (result.total * share).backward()
        losses.append(result.loss.detach() * share)
        if result.outside is not None:
            outsides.append(result.outside.detach() * share)
    return torch.stack(losses).sum(), torch.stack(outsides).sum() if outsides else None


def _micro_batches(sequences: int, size: int) -> Iterator[slice]:
    for start in range(0, sequences, size or sequences):
        yield slice(start, min(start + (size or sequences), sequences))
