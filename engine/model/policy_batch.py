"""The expert policies of a flat batch, as tensors.

Shapes: R requests, T tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from engine.policy import ExpertPolicy


@dataclass(frozen=True)
class PolicyBatch:
    """The limits of each request of a batch; what every token needs is expanded on the device.

    Attributes:
        k_R: most experts of a token, int32.
        mass_R: predicted mass that suffices, float32; NO_MASS_LIMIT where it never binds.
        max_k: the largest k of the requests that are not dense; 0 if all are dense.
        tokens: how many tokens each request has, in batch order; None if each has one.
        dense: which requests are dense, where some are and others are not; else None.
        same_k: the k of all requests that are not dense, if it is one k and mass never binds.
        oracle: experts are chosen by true activation mass instead of the router (evaluation).
        quarters: how many quarters of all experts such batches use together, rounded up; 0 if it is
            unknown. It may decide how the batch is computed, never the result.
    """

    k_R: Tensor
    mass_R: Tensor
    max_k: int
    tokens: tuple[int, ...] | None = None
    dense: tuple[bool, ...] | None = None
    same_k: int | None = None
    oracle: bool = False
    quarters: int = 0

    @classmethod
    def build(
        cls,
        policies: Sequence[tuple[ExpertPolicy, int]],
        num_experts: int,
        device: torch.device | str = "cpu",
    ) -> Self:
        """One entry per request in batch order: (its resolved policy, its number of tokens)."""
        dense = tuple(policy.uses_all(num_experts) for policy, _ in policies)
        limits = [policy.limits(num_experts) for policy, _ in policies]
        oracle = {policy.kind == "oracle" for policy, _ in policies}
        assert len(oracle) <= 1, "oracle does not mix with other policies in one batch"
        sparse = {limit for limit, is_dense in zip(limits, dense, strict=True) if not is_dense}
        max_k = max((k for k, _ in sparse), default=0)
        tokens = tuple(count for _, count in policies)
        return cls(
            k_R=torch.tensor([k for k, _ in limits], dtype=torch.int32, device=device),
            mass_R=torch.tensor([m for _, m in limits], dtype=torch.float32, device=device),
            max_k=max_k,
            tokens=None if all(count == 1 for count in tokens) else tokens,
            dense=dense if any(dense) and sparse else None,
            same_k=max_k if len(sparse) == 1 and next(iter(sparse))[1] > 1 else None,
            oracle=True in oracle,
        )

    @classmethod
    def uniform(
        cls, policy: ExpertPolicy, tokens: int, num_experts: int, device: torch.device | str = "cpu"
    ) -> Self:
        """The same policy for every one of `tokens` tokens."""
        return cls.build([(policy, tokens)], num_experts, device)

    @property
    def all_dense(self) -> bool:
        return self.max_k == 0

    @functools.cached_property
    def k_T(self) -> Tensor:
        """`k_R` of each token's request."""
        return self._by_token(self.k_R)

    @functools.cached_property
    def mass_T(self) -> Tensor:
        """`mass_R` of each token's request."""
        return self._by_token(self.mass_R)

    @functools.cached_property
    def dense_rows(self) -> Tensor:
        """Indices of the tokens of dense requests, int64."""
        return self._rows(wanted=True)

    @functools.cached_property
    def sparse_rows(self) -> Tensor:
        """Indices of the other tokens, int64."""
        return self._rows(wanted=False)

    def count(self, *, dense: bool) -> int:
        """Tokens of the requests that are dense, or of those that are not, in a mixed batch."""
        assert self.dense is not None
        tokens = self.tokens or (1,) * len(self.dense)
        return sum(n for n, found in zip(tokens, self.dense, strict=True) if found == dense)

    @functools.cached_property
    def _request_T(self) -> Tensor:
        """The request of each token. The host knows how many tokens there are, so nothing waits."""
        assert self.tokens is not None
        tokens_R = torch.tensor(self.tokens, device=self.k_R.device)
        return torch.repeat_interleave(tokens_R, output_size=sum(self.tokens))

    def _by_token(self, values_R: Tensor) -> Tensor:
        if self.tokens is None:
            return values_R
        if len(self.tokens) == 1:
            return values_R.expand(self.tokens[0]).contiguous()
        return values_R[self._request_T]

    def _rows(self, *, wanted: bool) -> Tensor:
        """Rows of the batch whose request is dense, or is not."""
        assert self.dense is not None
        rows, start = [], 0
        for count, dense in zip(self.tokens or (1,) * len(self.dense), self.dense, strict=True):
            if dense == wanted:
                rows.append(torch.arange(start, start + count))
            start += count
        return torch.cat(rows).to(self.k_R.device)
