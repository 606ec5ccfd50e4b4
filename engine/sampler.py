"""Draws the next token of each request from its logits, and reports log-probabilities.

The filters follow the order of Hugging Face's generation: penalties, temperature, top-k, top-p,
min-p, typical-p; each sees the distribution that the one before it left. The draw inverts the
cumulative distribution at one random number that depends on (seed, output index) alone, so neither
the batch's company nor a preemption can change it.

Log-probabilities are those of the model: log-softmax of the raw logits in float32, before
penalties, temperature and filters.

Shapes: B requests, b those of them that sample, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor

from engine.request import Request, SamplingParams

# A colder distribution is greedy in float32 anyway, and dividing by less overflows.
_MIN_TEMPERATURE: Final = 1e-6
# Rows whose log-sum-exp is taken at a time: bounds the memory of a long prompt's log-probabilities.
_ROWS_AT_A_TIME: Final = 64


class Sampled(NamedTuple):
    """One request's next token.

    Attributes:
        token_id: the token.
        logprob: its log-probability.
        top: the `top_n_tokens` likeliest tokens, (id, log-probability), likeliest first.
    """

    token_id: int
    logprob: float
    top: list[tuple[int, float]]


def sample(logits_BV: Tensor, requests: Sequence[Request]) -> list[Sampled]:
    """The next token of each request; row i of `logits_BV` (float32) belongs to `requests[i]`."""
    adjusted_BV = penalize(logits_BV, requests)
    chosen_B = adjusted_BV.argmax(-1)
    rows = [i for i, request in enumerate(requests) if not request.sampling.greedy]
    if rows:
        params = [requests[i].sampling for i in rows]
        numbers = [uniform(requests[i].seed, requests[i].num_output) for i in rows]
        index = torch.tensor(rows, device=logits_BV.device)
        chosen_B[index] = draw(filter_logits(adjusted_BV[index], params), numbers)
    return _report(logits_BV, chosen_B, [request.sampling.top_n_tokens for request in requests])


def uniform(seed: int, index: int) -> float:
    """The random number in [0, 1) of a request's output token `index`; the same on any machine."""
    digest = hashlib.blake2b(struct.pack("<QQ", seed, index), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 12) / float(1 << 52)


def penalize(logits_BV: Tensor, requests: Sequence[Request]) -> Tensor:
    """Logits after the penalties of those requests that have any; the input is left as it is."""
    rows = [i for i, request in enumerate(requests) if _has_penalty(request.sampling)]
    if not rows:
        return logits_BV
    adjusted_BV = logits_BV.clone()
    for i in rows:
        _penalize_row(adjusted_BV[i], requests[i])
    return adjusted_BV


def _has_penalty(params: SamplingParams) -> bool:
    return (
        params.repetition_penalty != 1.0
        or params.frequency_penalty != 0.0
        or params.presence_penalty != 0.0
    )


def _penalize_row(row_V: Tensor, request: Request) -> None:
    """Apply the penalties in place: repetition over all tokens, the others over the output."""
    params = request.sampling
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(request.token_ids, device=row_V.device)
        penalty, values = params.repetition_penalty, row_V[seen]
        row_V[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if params.frequency_penalty or params.presence_penalty:
        output = torch.tensor(request.output_ids, dtype=torch.long, device=row_V.device)
        counts_V = torch.bincount(output, minlength=row_V.numel())
        row_V -= params.frequency_penalty * counts_V + params.presence_penalty * (counts_V > 0)


def filter_logits(logits_bV: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Temperature and filters: logits with maximum 0 where kept, -inf where not.

    A filter is skipped if nobody asks for it, and leaves the rows alone that do not.
    """

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=logits_bV.device)[:, None]

    temperature = column([max(p.temperature, _MIN_TEMPERATURE) for p in params])
    logits_bV = (logits_bV - logits_bV.amax(-1, keepdim=True)) / temperature
    if any(p.top_k for p in params):
        logits_bV = _keep_top_k(logits_bV, [p.top_k for p in params])
    if any(p.top_p < 1 for p in params):
        logits_bV = _keep_top_p(logits_bV, column([p.top_p for p in params]))
    if any(p.min_p > 0 for p in params):
        least = column([math.log(p.min_p) if p.min_p > 0 else -math.inf for p in params])
        logits_bV = logits_bV.masked_fill(logits_bV < least, -math.inf)
    if any(p.typical_p < 1 for p in params):
        logits_bV = _keep_typical(logits_bV, column([p.typical_p for p in params]))
    return logits_bV


def _keep_top_k(logits_bV: Tensor, top_k: list[int]) -> Tensor:
    """Keep each row's k largest logits, and what ties with the least of them; 0 keeps all."""
    vocabulary = logits_bV.shape[-1]
    ranks = [min(k or vocabulary, vocabulary) for k in top_k]
    largest = max((k for k in ranks if k < vocabulary), default=0)
    if not largest:
        return logits_bV
    rank_b1 = torch.tensor(ranks, device=logits_bV.device)[:, None]
    values_bk = logits_bV.topk(largest, dim=-1).values
    least_b1 = values_bk.gather(-1, rank_b1.clamp(max=largest) - 1)
    return logits_bV.masked_fill((logits_bV < least_b1) & (rank_b1 < vocabulary), -math.inf)


def _keep_top_p(logits_bV: Tensor, top_p_b1: Tensor) -> Tensor:
    """Keep the likeliest tokens whose probabilities first reach `top_p` (Holtzman et al., 2020)."""
    sorted_bV = logits_bV.sort(dim=-1, descending=True).values
    probs_bV = sorted_bV.softmax(-1)
    before_bV = probs_bV.cumsum(-1) - probs_bV
    count_b1 = (before_bV < top_p_b1).sum(-1, keepdim=True)
    least_b1 = sorted_bV.gather(-1, count_b1.clamp_min(1) - 1)
    return logits_bV.masked_fill((logits_bV < least_b1) & (top_p_b1 < 1), -math.inf)


def _keep_typical(logits_bV: Tensor, typical_p_b1: Tensor) -> Tensor:
    """Keep the tokens whose surprise is closest to the entropy (Meister et al., 2022)."""
    logprobs_bV = logits_bV.log_softmax(-1)
    probs_bV = logprobs_bV.exp()
    entropy_b1 = -(probs_bV * logprobs_bV).nansum(-1, keepdim=True)  # 0 * -inf is nan, counts as 0
    distance_bV = (logprobs_bV + entropy_b1).abs()
    sorted_bV, order_bV = distance_bV.sort(dim=-1, stable=True)
    held_bV = probs_bV.gather(-1, order_bV)
    before_bV = held_bV.cumsum(-1) - held_bV
    count_b1 = (before_bV < typical_p_b1).sum(-1, keepdim=True)
    farthest_b1 = sorted_bV.gather(-1, count_b1.clamp_min(1) - 1)
    return logits_bV.masked_fill((distance_bV > farthest_b1) & (typical_p_b1 < 1), -math.inf)


def draw(logits_bV: Tensor, numbers: Sequence[float]) -> Tensor:
    """Token ids [b]: the first whose cumulative probability exceeds the row's random number."""
    cumulative_bV = logits_bV.softmax(-1).cumsum(-1, dtype=torch.float64)
    numbers_b1 = torch.tensor(numbers, dtype=torch.float64, device=logits_bV.device)[:, None]
    target_b1 = numbers_b1 * cumulative_bV[:, -1:]
    index_b = torch.searchsorted(cumulative_bV, target_b1, right=True).squeeze(-1)
    return index_b.clamp_max(logits_bV.shape[-1] - 1)


def token_logprobs(logits_NV: Tensor, token_ids: Sequence[int]) -> list[float]:
    """Log-probability of one given token per row, a few rows at a time to bound memory."""
    logprobs: list[float] = []
    for start in range(0, len(token_ids), _ROWS_AT_A_TIME):
        part_nV = logits_NV[start : start + _ROWS_AT_A_TIME]
        ids = torch.tensor(token_ids[start : start + _ROWS_AT_A_TIME], device=logits_NV.device)
        chosen_n = part_nV.gather(-1, ids[:, None]).squeeze(-1)
        logprobs += (chosen_n - part_nV.logsumexp(-1)).tolist()
    return logprobs


def _report(logits_BV: Tensor, chosen_B: Tensor, top_n: list[int]) -> list[Sampled]:
    total_B1 = logits_BV.logsumexp(-1, keepdim=True)
    logprobs = (logits_BV.gather(-1, chosen_B[:, None]) - total_B1).squeeze(-1).tolist()
    tops: list[list[tuple[int, float]]] = [[] for _ in top_n]
    if any(top_n):
        values_Bn, ids_Bn = logits_BV.topk(min(max(top_n), logits_BV.shape[-1]), dim=-1)
        rows = zip(ids_Bn.tolist(), (values_Bn - total_B1).tolist(), strict=True)
        tops = [
            list(zip(ids[:n], values[:n], strict=True))
            for n, (ids, values) in zip(top_n, rows, strict=True)
        ]
    return [Sampled(*row) for row in zip(chosen_B.tolist(), logprobs, tops, strict=True)]
