"""Expert policies, without tensors: how many experts each token of a request may use."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal, Self, cast

from engine.errors import InvalidRequest, require

PolicyKind = Literal["dense", "top_k", "mass", "auto", "oracle"]

NO_MASS_LIMIT: Final = 2.0  # predicted shares sum to 1, so a limit of 2 never binds
SHARED_IS_GONE: Final = "the expert policy shared was removed; top_k:N takes its place"


@dataclass(frozen=True)
class ExpertPolicy:
    """How many experts a token of this request may use.

    - `dense`: all of them; the dense FFN.
    - `top_k`: the `value` experts with the highest router score.
    - `mass`: as few as the router predicts to hold the share `value` of the activation mass.
    - `auto`: what the checkpoint recommends; resolved by `resolve` before it runs.
    - `oracle`: the `value` experts with the most *true* activation mass. It computes every neuron
      to choose, so it saves nothing: it is the upper bound of any router, for evaluation.
    """

    kind: PolicyKind
    value: float = 0.0

    @classmethod
    def dense(cls) -> Self:
        return cls("dense")

    @classmethod
    def top_k(cls, k: int) -> Self:
        return cls("top_k", k)

    @classmethod
    def mass(cls, share: float) -> Self:
        return cls("mass", share)

    @classmethod
    def auto(cls) -> Self:
        return cls("auto")

    @classmethod
    def oracle(cls, k: int) -> Self:
        return cls("oracle", k)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read "dense", "auto", "top_k:8", "mass:0.95" or "oracle:8". The inverse of `str`.

        Raises:
            InvalidRequest: if `text` is none of these.
        """
        kind, _, value = text[:40].strip().partition(":")
        if kind in ("dense", "auto") and not value:
            return cls("dense" if kind == "dense" else "auto")
        require(kind != "shared", SHARED_IS_GONE, InvalidRequest)
        try:
            if kind == "mass":
                return cls("mass", float(value))
            if kind in ("top_k", "oracle"):
                return cls(cast(PolicyKind, kind), int(value))
        except ValueError:
            pass
        raise InvalidRequest(
            f"experts must be dense, auto, top_k:N or mass:SHARE; got {text[:40]!r}"
        )

    def __str__(self) -> str:
        if self.kind in ("dense", "auto"):
            return self.kind
        value = self.value if isinstance(self.value, int) else f"{self.value:.12g}"
        return f"{self.kind}:{value}"

    def resolve(self, default: str) -> ExpertPolicy:
        """Replace `auto` by the checkpoint's `default` policy."""
        return ExpertPolicy.parse(default) if self.kind == "auto" else self

    def validate(self, num_experts: int) -> None:
        """Raise InvalidRequest unless the value fits a model of `num_experts` experts."""
        if self.kind in ("top_k", "oracle"):
            require(
                1 <= self.value <= num_experts,
                f"experts.{self.kind} must be between 1 and {num_experts}, got {self.value}",
                InvalidRequest,
            )
        if self.kind == "mass":
            require(
                math.isfinite(self.value) and 0.0 < self.value <= 1.0,
                f"experts.mass must be above 0 and at most 1, got {self.value}",
                InvalidRequest,
            )

    def limits(self, num_experts: int) -> tuple[int, float]:
        """(most experts, predicted mass that suffices): the two numbers that routing needs."""
        if self.kind == "mass":
            return num_experts, self.value
        if self.kind == "dense":
            return num_experts, NO_MASS_LIMIT
        assert self.kind != "auto", "auto is resolved before routing"
        return int(self.value), NO_MASS_LIMIT

    def uses_all(self, num_experts: int) -> bool:
        """Whether every token uses every expert (`dense`, or top_k:E), so that the FFN is dense."""
        return self.kind == "dense" or (self.kind == "top_k" and self.value == num_experts)
