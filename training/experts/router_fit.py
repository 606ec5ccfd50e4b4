"""A router that is fitted to the true activation mass, beginning at the experts' centroids.

The scores stay linear, router row . FFN input, so the engine runs a fitted router as it runs
centroids. The fit makes softmax(scores) predict the shares of the true activation mass, by
cross-entropy.

Shapes: T tokens, D model, E experts.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from engine.errors import require

# How much the centroids weigh, in tokens for each of the router's numbers. On the packaged model, a
# smaller weight made a fit on a few thousand tokens worse on other tokens than the centroids are.
_PRIOR_TOKENS: Final = 0.1
_HISTORY: Final = 20


def true_shares(mass_TE: Tensor) -> Tensor:
    """Each expert's share of a token's activation mass, [T, E] float32; zeros where none fired."""
    mass_TE = mass_TE.float()
    return mass_TE / mass_TE.sum(1, keepdim=True).clamp_min(1e-20)


def share_loss(scores_TE: Tensor, share_TE: Tensor) -> Tensor:
    """Cross-entropy of softmax(scores) to the true shares in nats, mean over tokens (0-dim)."""
    return -(share_TE * scores_TE.log_softmax(1)).sum(1).mean()


def fit_router(x_TD: Tensor, mass_TE: Tensor, router_ED: Tensor, *, iterations: int = 60) -> Tensor:
    """The router [E, D], float32, that best predicts the shares of mass on these tokens.

    Full-batch L-BFGS on the cross-entropy plus a pull towards `router_ED`, which weighs as much as
    0.1 D E tokens. The problem is convex and nothing is drawn at random.

    Args:
        x_TD: FFN inputs; a thousand help after a clustering, tens of thousands help more.
        mass_TE: their true mass per expert.
        router_ED: where to begin, at a calibrated norm; not zero.
        iterations: how many iterations L-BFGS takes at most.

    Raises:
        ConfigError: if the shapes do not fit together or the router is zero.
    """
    _check(x_TD, mass_TE, router_ED)
    start_ED = router_ED.detach().float()
    size = float(start_ED.norm())
    require(size > 0, "router_ED must not be zero: begin from calibrated centroids")
    x_TD, share_TE = x_TD.detach().float(), true_shares(mass_TE.detach())
    pull = _PRIOR_TOKENS * start_ED.numel() / x_TD.shape[0]
    change_ED = torch.zeros_like(start_ED, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [change_ED], max_iter=iterations, history_size=_HISTORY, line_search_fn="strong_wolfe"
    )

    def objective() -> float:
        optimizer.zero_grad()
        loss = share_loss(x_TD @ (start_ED + change_ED * size).T, share_TE)
        loss = loss + pull * change_ED.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return float(loss.detach())

    with torch.enable_grad():
        optimizer.step(objective)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return (start_ED + change_ED * size).detach()


def _check(x_TD: Tensor, mass_TE: Tensor, router_ED: Tensor) -> None:
    """Raise ConfigError unless tokens, experts and width agree."""
    expected = (x_TD.shape[0], router_ED.shape[0])
    require(
        tuple(mass_TE.shape) == expected and x_TD.shape[1] == router_ED.shape[1],
        f"inputs {tuple(x_TD.shape)}, mass {tuple(mass_TE.shape)} and router "
        f"{tuple(router_ED.shape)} do not fit together: want [T, D], [T, E], [E, D]",
    )
