"""The rule by which a token's experts are chosen from its scores.

One rule serves every policy. Order a token's experts by score, descending, ties to the lower index.
The expert at rank r (from 0) is chosen iff r < k and the predicted shares of activation mass of the
experts before it, softmax(scores), sum to less than `mass`. Rank 0 is always chosen, unless k is 0:
that is for rows which only fill a batch up and choose nothing. So top-k is (k, 2.0), a mass policy
is (E, p) and dense is (E, 2.0). The kernels of the CPU and the GPU follow the same rule, and are
tested against this function.

Shapes: T tokens, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor


def choose_reference(scores_TE: Tensor, k_T: Tensor, mass_T: Tensor) -> Tensor:
    """The rule itself: scores [T, E], k int32 [T], mass float32 [T] -> chosen, bool [T, E]."""
    scores_TE = scores_TE.float()
    scores_TE = scores_TE.masked_fill(scores_TE.isnan(), -torch.inf)
    order_TE = scores_TE.sort(dim=1, descending=True, stable=True).indices
    shares_TE = scores_TE.softmax(dim=1).gather(1, order_TE)
    before_TE = shares_TE.cumsum(dim=1).roll(1, dims=1)
    rank_E = torch.arange(scores_TE.shape[1], device=scores_TE.device)
    in_order_TE = (rank_E < k_T[:, None]) & (before_TE < mass_T[:, None])
    in_order_TE[:, 0] = k_T > 0
    return torch.zeros_like(in_order_TE).scatter(1, order_TE, in_order_TE)
