"""A router learned from the true activation mass, beginning at the experts' centroids.

The scores stay linear, router row . FFN input, so the engine runs a learned router as it runs
centroids. What is learned: softmax(scores) is to be the shares of the true activation mass, by
cross-entropy. A dense step knows those shares, since it computes every neuron anyhow.

Shapes: T tokens, D model, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final, Self

import torch
from torch import Tensor

from engine.errors import CheckpointError, require

# Weight of the centroids, in tokens for each of the router's numbers. Measured on the packaged
# model: with less, a fit on a few thousand tokens is worse on others than the centroids are.
_PRIOR_TOKENS: Final = 0.1
_BETA1: Final = 0.9
_BETA2: Final = 0.99
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
        iterations: of L-BFGS at most.

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


@dataclass
class OnlineRouter:
    """Adam on one layer's router while the model trains: one product of [E, T] x [T, D] a step.

    Its steps are measured in the router's own size, so that one `learning_rate` fits every layer.
    Make a new one when neurons move; save `tensors()` with the optimiser's state.

    Attributes:
        first_ED: running mean of the gradient.
        second_ED: running mean of its square.
        count: updates made, int64, 0-dim.
    """

    first_ED: Tensor
    second_ED: Tensor
    count: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64))

    @classmethod
    def begin(cls, router_ED: Tensor) -> Self:
        """A state without history, on the router's device."""
        return cls(torch.zeros_like(router_ED), torch.zeros_like(router_ED))

    def gradient(self, x_TD: Tensor, mass_TE: Tensor, router_ED: Tensor) -> Tensor:
        """Of the cross-entropy by the router, [E, D]; mean over workers is the caller's."""
        _check(x_TD, mass_TE, router_ED)
        x_TD, share_TE = x_TD.detach().float(), true_shares(mass_TE.detach())
        predicted_TE = (x_TD @ router_ED.T).softmax(1) * share_TE.sum(1, keepdim=True)
        return (predicted_TE - share_TE).T @ x_TD / x_TD.shape[0]

    @torch.no_grad()
    def update(
        self, router_ED: Tensor, x_TD: Tensor, mass_TE: Tensor, learning_rate: float = 0.01
    ) -> None:
        """Move `router_ED`, in place, by one step on a sample of tokens.

        Args:
            router_ED: float32, not zero.
            x_TD: FFN inputs of the sample.
            mass_TE: their true mass per expert.
            learning_rate: the step of each number, as a share of the router's root mean square.

        Raises:
            ConfigError: if the shapes do not fit together.
        """
        self.apply(router_ED, self.gradient(x_TD, mass_TE, router_ED), learning_rate)

    @torch.no_grad()
    def apply(self, router_ED: Tensor, gradient_ED: Tensor, learning_rate: float = 0.01) -> None:
        """Adam's step for a gradient that may have been averaged over workers."""
        self.count += 1
        self.first_ED.lerp_(gradient_ED, 1 - _BETA1)
        self.second_ED.lerp_(gradient_ED.square(), 1 - _BETA2)
        first_ED = self.first_ED / (1 - _BETA1 ** int(self.count))
        second_ED = self.second_ED / (1 - _BETA2 ** int(self.count))
        scale = router_ED.square().mean().sqrt()
        router_ED -= learning_rate * scale * first_ED / (second_ED.sqrt() + 1e-12)

    def tensors(self) -> dict[str, Tensor]:
        """The state by name, for a safetensors file."""
        return {"first": self.first_ED, "second": self.second_ED, "count": self.count}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Self:
        """The state that `tensors` gave.

        Raises:
            CheckpointError: if a tensor is missing or of another shape than its companion.
        """
        missing = {"first", "second", "count"} - tensors.keys()
        require(not missing, f"router state lacks {', '.join(sorted(missing))}", CheckpointError)
        shapes: Any = tensors["first"].shape, tensors["second"].shape
        require(shapes[0] == shapes[1], f"router state has shapes {shapes}", CheckpointError)
        return cls(tensors["first"], tensors["second"], tensors["count"].cpu())


def _check(x_TD: Tensor, mass_TE: Tensor, router_ED: Tensor) -> None:
    """Raise ConfigError unless tokens, experts and width agree."""
    expected = (x_TD.shape[0], router_ED.shape[0])
    require(
        tuple(mass_TE.shape) == expected and x_TD.shape[1] == router_ED.shape[1],
        f"inputs {tuple(x_TD.shape)}, mass {tuple(mass_TE.shape)} and router "
        f"{tuple(router_ED.shape)} do not fit together: want [T, D], [T, E], [E, D]",
    )
