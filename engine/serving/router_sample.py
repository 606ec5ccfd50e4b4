"""What the routers of one step missed, measured on a few of its tokens.

The router predicts where the activation mass of a token lies; its *coverage* is the share of the
true mass that the chosen experts hold. Knowing the true mass takes the whole first product of the
FFN, so only a few tokens of a sampled step are measured. Tokens that use every expert cover
everything, and are left out.

Shapes: n sampled tokens, E experts, L layers.
"""

from __future__ import annotations

from typing import Final

import torch

from engine.model.trace import Trace
from engine.serving.stats import RouterSample

SAMPLED_TOKENS: Final = 8  # the most that are measured in one step


def sampling_trace(tokens: int) -> Trace:
    """A trace that keeps the true mass of SAMPLED_TOKENS of `tokens` tokens at most."""
    return Trace(mass_every=-(-tokens // SAMPLED_TOKENS), count_fired=True)


def read_sample(trace: Trace, num_neurons: int) -> RouterSample | None:
    """The sums over the sparse ones of the sampled tokens; None if there are none."""
    chosen = [c[:: trace.mass_every] for c in trace.chosen if c is not None]
    if not chosen:
        return None
    chosen_LnE = torch.stack(chosen)
    sparse_Ln = ~chosen_LnE.all(-1)
    mass_LnE = torch.stack(trace.masses).float() * sparse_Ln[..., None]
    fired_Ln = torch.stack(trace.fired) * sparse_Ln
    load_LE = (chosen_LnE & sparse_Ln[..., None]).sum(1)
    return RouterSample(
        captured=(mass_LnE * chosen_LnE).sum((1, 2)).tolist(),
        mass=mass_LnE.sum((1, 2)).tolist(),
        fired=fired_Ln.sum(1).tolist(),
        neurons=(sparse_Ln.sum(1) * num_neurons).tolist(),
        load=load_LE.tolist(),
    )
