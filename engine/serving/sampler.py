"""Draws the next token of each request from its logits, and reports log-probabilities.

The stages follow the order of Hugging Face's generation: bias, penalties, tokens that may not come
yet or that a grammar forbids; then temperature, top-k, top-p, min-p, typical-p, each of which sees
the distribution that the one before it left. The draw inverts the cumulative distribution at one
random number that depends on (seed, output index) alone, so neither the batch's company nor a
preemption can change it.

Every stage treats all the rows that ask for it at once, and does not run if none does: on a GPU, a
step costs the same few operations for any number of requests, one transfer to the device per kind
of number (`Columns`) and one back. Operations work row by row, so a row's result is the same in any
company, bit for bit on a CPU; that is why sums over the vocabulary are softmax or running sums:
`sum` and `logsumexp` split a long single row between threads.

Log-probabilities are those of the model: log-softmax of the raw logits in float32, before all
stages.

Shapes: B requests, b those of them that sample, p those of them that ask for a stage, g those that
have a grammar, V vocabulary, w columns of a sorted prefix or bytes of a mask, n reported rows, k
reported alternatives.
"""

from __future__ import annotations

import hashlib
import math
import struct
from array import array
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final, NamedTuple

import torch
from torch import Tensor

from engine.serving.columns import Columns
from engine.serving.request import MAX_SEED, MAX_TOP_N, Request, SamplingParams

# A colder distribution is greedy in float32 anyway, and dividing by less overflows.
_MIN_TEMPERATURE: Final = 1e-6
# Rows reported at a time: bounds the memory of a long prompt's log-probabilities.
_ROWS_AT_A_TIME: Final = 64
# On a CPU, the intermediate results of few rows stay in its caches.
_CPU_ROWS_AT_A_TIME: Final = 16
# Nucleus sampling sorts so many of the largest logits first; they nearly always suffice.
_TOP_P_PREFIX: Final = 1024


class Sampled(NamedTuple):
    """A drawn or given token.

    Attributes:
        token_id: the token.
        logprob: its log-probability.
        top: the likeliest tokens, if asked for: (id, log-probability), likeliest first.
    """

    token_id: int
    logprob: float
    top: list[tuple[int, float]]


@torch.inference_mode()
def sample(logits_BV: Tensor, requests: Sequence[Request], eos_token_id: int) -> list[Sampled]:
    """The next token of each request; row i of `logits_BV` (float32) belongs to `requests[i]`."""
    step = _CPU_ROWS_AT_A_TIME if logits_BV.device.type == "cpu" else max(len(requests), 1)
    drawn: list[Sampled] = []
    for start in range(0, len(requests), step):
        part = requests[start : start + step]
        drawn += _sample(logits_BV[start : start + step], part, eos_token_id)
    return drawn


def _sample(logits_BV: Tensor, requests: Sequence[Request], eos_token_id: int) -> list[Sampled]:
    columns = Columns()
    pack_edits(columns, requests, eos_token_id)
    _pack_draws(columns, requests)
    pack_filters(columns, _sampling(requests), logits_BV)
    top_n = [request.sampling.top_n_tokens for request in requests]
    _pack_report(columns, top_n)
    columns.send(logits_BV.device)
    chosen_B = _choose(edit_logits(logits_BV, columns), columns)
    return _report(logits_BV, chosen_B, columns, top_n)


def _sampling(requests: Sequence[Request]) -> list[SamplingParams]:
    return [request.sampling for request in requests if not request.sampling.greedy]


def uniform(seed: int, index: int) -> float:
    """The random number in [0, 1) of a request's output token `index`; the same on any machine."""
    digest = hashlib.blake2b(struct.pack("<QQ", seed, index), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 12) / float(1 << 52)


def completion_seed(seed: int, index: int) -> int:
    """The seed of a prompt's completion `index`; the first keeps `seed`, as if it were alone."""
    if index == 0:
        return seed
    packed = struct.pack("<QQ", seed, index)
    digest = hashlib.blake2b(packed, digest_size=8, person=b"completion").digest()
    return int.from_bytes(digest, "little") & MAX_SEED


# --- edits: bias, penalties, tokens that may not come yet -----------------------------------------


def pack_edits(columns: Columns, requests: Sequence[Request], eos_token_id: int) -> None:
    """Write the columns that `edit_logits` reads."""
    numbered = list(enumerate(requests))
    if biased := [(row, r.sampling.logit_bias) for row, r in numbered if r.sampling.logit_bias]:
        ids_and_values = [tuple(zip(*bias, strict=True)) for _, bias in biased]
        columns.put_groups("bias", [row for row, _ in biased], (ids for ids, _ in ids_and_values))
        columns.put_floats("bias", (value for _, values in ids_and_values for value in values))
    if penalized := [(row, r) for row, r in numbered if r.sampling.penalizes]:
        _pack_penalties(columns, *zip(*penalized, strict=True))
    if bound := [(row, r) for row, r in numbered if r.matcher is not None]:
        _pack_allowed(columns, bound, eos_token_id)
    if early := [(row, r) for row, r in numbered if _is_early(r) and r.matcher is None]:
        groups = [_ends(request.sampling, eos_token_id) for _, request in early]
        columns.put_groups("early", [row for row, _ in early], groups)


def _is_early(request: Request) -> bool:
    return request.num_output < request.sampling.min_tokens


def _pack_allowed(
    columns: Columns, bound: Sequence[tuple[int, Request]], eos_token_id: int
) -> None:
    """Write which tokens the grammars allow: a bit each, the same number of words for every row."""
    allowed = array("q")
    for _, request in bound:
        assert request.matcher is not None
        unwanted = _ends(request.sampling, eos_token_id) if _is_early(request) else ()
        if request.sampling.ignore_eos:
            unwanted = (*unwanted, eos_token_id)
        allowed.frombytes(request.matcher.allowed(unwanted))
    columns.put_ints("bound_rows", [row for row, _ in bound])
    columns.put_ints("allowed", allowed)


def _ends(params: SamplingParams, eos_token_id: int) -> tuple[int, ...]:
    """The ids of the tokens that end the request's output."""
    return params.stop_token_ids if params.ignore_eos else (*params.stop_token_ids, eos_token_id)


def _pack_penalties(columns: Columns, rows: Sequence[int], requests: Sequence[Request]) -> None:
    in_output = array("q")
    for request in requests:
        request.counts.update(request.token_ids, request.prompt_len)
        in_output += request.counts.in_output
    columns.put_groups("seen", rows, (request.counts.token_ids for request in requests))
    columns.put_ints("in_output", in_output)
    for name in ("repetition_penalty", "frequency_penalty", "presence_penalty"):
        columns.put_floats(name, (getattr(request.sampling, name) for request in requests))


def edit_logits(logits_BV: Tensor, columns: Columns) -> Tensor:
    """Logits after bias, penalties and bans; the input is left as it is."""
    names = ("bias_ids", "seen_ids", "early_ids", "allowed")
    if not any(name in columns for name in names):
        return logits_BV
    edited_BV = logits_BV.clone(memory_format=torch.contiguous_format)
    flat, width = edited_BV.view(-1), edited_BV.shape[-1]
    if "bias_ids" in columns:
        flat[columns.places("bias", width)] += columns["bias"].float()
    if "seen_ids" in columns:
        _penalize(flat, columns.places("seen", width), columns)
    if "early_ids" in columns:
        flat.index_fill_(0, columns.places("early", width), -math.inf)
    if "allowed" in columns:
        _constrain(edited_BV, columns)
    return edited_BV


def _constrain(logits_BV: Tensor, columns: Columns) -> None:
    """Forbid, in place, what the rows' grammars do not allow."""
    rows_g, vocabulary = columns["bound_rows"], logits_BV.shape[-1]
    bytes_gw1 = columns["allowed"].view(torch.uint8).view(len(rows_g), -1, 1)
    bits_8 = 1 << torch.arange(8, dtype=torch.uint8, device=logits_BV.device)
    forbidden_gV = ((bytes_gw1 & bits_8) == 0).flatten(1)[:, :vocabulary]
    logits_BV[rows_g] = logits_BV[rows_g].masked_fill_(forbidden_gV, -math.inf)


def _penalize(flat: Tensor, places: Tensor, columns: Columns) -> None:
    """Apply the penalties in place: repetition over all tokens, the others over the output."""
    repetition, frequency, presence = (
        columns.spread("seen", columns[f"{name}_penalty"].float())
        for name in ("repetition", "frequency", "presence")
    )
    values, counts = flat[places], columns["in_output"]
    values = torch.where(values > 0, values / repetition, values * repetition)
    flat[places] = values - (frequency * counts + presence * (counts > 0))


# --- filters --------------------------------------------------------------------------------------


def pack_filters(columns: Columns, params: Sequence[SamplingParams], like_BV: Tensor) -> None:
    """Write the columns that `filter_logits` reads; `like_BV` tells vocabulary and device."""
    vocabulary = like_BV.shape[-1]
    if not params:
        return
    columns.put_floats("temperature", (max(p.temperature, _MIN_TEMPERATURE) for p in params))
    top_k = [p.top_k if p.top_k < vocabulary else 0 for p in params]
    _pack_filter(columns, "top_k", top_k, 0)
    _pack_filter(columns, "top_p", [p.top_p for p in params], 1.0)
    _pack_filter(columns, "min_p", [p.min_p for p in params], 0.0)
    _pack_filter(columns, "typical_p", [p.typical_p for p in params], 1.0)
    # Where top-k leaves few tokens, top-p sorts just these. Otherwise it sorts a prefix first,
    # except on a GPU: asking whether the prefix sufficed would wait for it, so it sorts all.
    unknown = _TOP_P_PREFIX if like_BV.device.type == "cpu" else vocabulary
    widths = [k or unknown for k, p in zip(top_k, params, strict=True) if p.top_p < 1.0]
    columns.widths |= {"top_k": max(top_k), "top_p": min(max(widths, default=0), vocabulary)}


def _pack_filter(columns: Columns, name: str, values: Sequence[float], off: float) -> None:
    """Write one filter's values for the rows that ask for it; no column if none does."""
    if rows := [row for row, value in enumerate(values) if value != off]:
        columns.put_ints(f"{name}_rows", rows)
        columns.put_floats(name, (values[row] for row in rows))


def filter_logits(logits_bV: Tensor, columns: Columns) -> Tensor:
    """Temperature and filters: new logits with maximum 0 where kept, -inf where not."""
    temperature_b1 = columns["temperature"].float()[:, None]
    logits_bV = (logits_bV - logits_bV.amax(-1, keepdim=True)).div_(temperature_b1)
    logits_bV = _on_rows(logits_bV, columns, "top_k", partial(_top_k, columns.widths["top_k"]))
    logits_bV = _on_rows(logits_bV, columns, "top_p", partial(_top_p, columns.widths["top_p"]))
    logits_bV = _on_rows(logits_bV, columns, "min_p", _min_p)
    return _on_rows(logits_bV, columns, "typical_p", _typical_p)


def _on_rows(
    logits_bV: Tensor, columns: Columns, name: str, keep: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Replace the rows that ask for a filter by what it keeps of them, in place."""
    if name not in columns:
        return logits_bV
    rows_p, values_p1 = columns[f"{name}_rows"], columns[name][:, None]
    if len(rows_p) == len(logits_bV):
        return keep(logits_bV, values_p1)
    return logits_bV.index_copy_(0, rows_p, keep(logits_bV[rows_p], values_p1))


def _from(least_p1: Tensor, logits_pV: Tensor) -> Tensor:
    """Keep, in place, the logits that are not below the row's `least_p1`."""
    return logits_pV.masked_fill_(logits_pV < least_p1, -math.inf)


def _top_k(largest: int, logits_pV: Tensor, top_k_p1: Tensor) -> Tensor:
    """Keep each row's k largest logits, and what ties with the least of them."""
    sorted_pw = logits_pV.topk(largest, dim=-1).values
    return _from(sorted_pw.gather(-1, top_k_p1.long() - 1), logits_pV)


def _top_p(width: int, logits_pV: Tensor, top_p_p1: Tensor) -> Tensor:
    """Keep the likeliest tokens whose probabilities first reach `top_p` (Holtzman et al., 2020)."""
    # The largest logit is 0, so the largest probability is 1 / the sum of all exponentials.
    total_p1 = logits_pV.softmax(-1).amax(-1, keepdim=True).double().reciprocal()
    return _from(_least_of_mass(width, logits_pV, top_p_p1 * total_p1), logits_pV)


def _least_of_mass(width: int, logits_pV: Tensor, mass_p1: Tensor) -> Tensor:
    """The logit at which the sum of the exponentials, from the largest down, reaches `mass_p1`.

    Only the `width` largest are sorted. On the CPU, all are sorted if these do not suffice;
    elsewhere the caller has made sure that they do, up to ties with the last, which do not change
    the result.
    """
    whole = width == logits_pV.shape[-1]
    sorted_pw = (
        logits_pV.topk(width).values if not whole else logits_pV.sort(descending=True).values
    )
    reached_p1 = _first_to_reach(mass_p1, sorted_pw.exp())
    least_p1 = sorted_pw.gather(-1, reached_p1.clamp_max(width - 1))
    if not whole and logits_pV.device.type == "cpu":
        short_p = (reached_p1 == width).squeeze(-1)
        if short_p.any():
            rest = _least_of_mass(logits_pV.shape[-1], logits_pV[short_p], mass_p1[short_p])
            least_p1[short_p] = rest
    return least_p1


def _first_to_reach(mass_p1: Tensor, parts_pw: Tensor) -> Tensor:
    """Index of the first part at which their running sum is at least the mass; w if none is."""
    return (parts_pw.cumsum(-1, dtype=torch.float64) < mass_p1).sum(-1, keepdim=True)


def _min_p(logits_pV: Tensor, min_p_p1: Tensor) -> Tensor:
    """Keep the tokens that are at least `min_p` times as likely as the likeliest."""
    return _from(min_p_p1.log().float(), logits_pV)


def _typical_p(logits_pV: Tensor, typical_p_p1: Tensor) -> Tensor:
    """Keep the tokens whose surprise is closest to the entropy (Meister et al., 2022)."""
    logprobs_pV = logits_pV.log_softmax(-1)
    probs_pV = logprobs_pV.exp()
    surprise_pV = (probs_pV * logprobs_pV).masked_fill_(probs_pV == 0, 0.0)  # 0 * -inf is nan
    entropy_p1 = -surprise_pV.cumsum(-1, dtype=torch.float64)[:, -1:].float()
    distance_pV = (logprobs_pV + entropy_p1).abs()
    sorted_pV, order_pV = distance_pV.sort(dim=-1, stable=True)
    reached_p1 = _first_to_reach(typical_p_p1, probs_pV.gather(-1, order_pV))
    farthest_p1 = sorted_pV.gather(-1, reached_p1.clamp_max(sorted_pV.shape[-1] - 1))
    return logits_pV.masked_fill_(distance_pV > farthest_p1, -math.inf)


# --- draws ----------------------------------------------------------------------------------------


def _pack_draws(columns: Columns, requests: Sequence[Request]) -> None:
    """Write which rows are drawn at random, and the random number of each."""
    if rows := [row for row, request in enumerate(requests) if not request.sampling.greedy]:
        columns.put_ints("draw_rows", rows)
        numbers = (uniform(requests[row].seed, requests[row].num_output) for row in rows)
        columns.put_floats("numbers", numbers)


def _choose(logits_BV: Tensor, columns: Columns) -> Tensor:
    """Token ids [B]: drawn at random, or the likeliest where a row is greedy."""
    if "draw_rows" not in columns:
        return logits_BV.argmax(-1)
    rows_b = columns["draw_rows"]
    if len(rows_b) == len(logits_BV):
        return draw(filter_logits(logits_BV, columns), columns["numbers"])
    drawn_b = draw(filter_logits(logits_BV[rows_b], columns), columns["numbers"])
    return logits_BV.argmax(-1).index_copy_(0, rows_b, drawn_b)


def draw(logits_bV: Tensor, numbers_b: Tensor) -> Tensor:
    """Token ids [b]: the first whose cumulative probability exceeds the row's random number.

    Args:
        logits_bV: what the filters left, -inf for tokens that are out.
        numbers_b: float64, in [0, 1).
    """
    cumulative_bV = logits_bV.softmax(-1).cumsum(-1, dtype=torch.float64)
    target_b1 = numbers_b[:, None] * cumulative_bV[:, -1:]
    index_b = torch.searchsorted(cumulative_bV, target_b1, right=True).squeeze(-1)
    return index_b.clamp_max(logits_bV.shape[-1] - 1)


# --- reports --------------------------------------------------------------------------------------


def token_logprobs(logits_NV: Tensor, token_ids: Sequence[int], top_n: int = 0) -> list[Sampled]:
    """Log-probability of one given token per row, and of the row's `top_n` likeliest.

    A few rows at a time, to bound memory.
    """
    report: list[Sampled] = []
    for start in range(0, len(token_ids), _ROWS_AT_A_TIME):
        ids = token_ids[start : start + _ROWS_AT_A_TIME]
        columns, each = Columns(), [top_n] * len(ids)
        columns.put_ints("ids", ids)
        _pack_report(columns, each)
        columns.send(logits_NV.device)
        part_nV = logits_NV[start : start + len(ids)]
        report += _report(part_nV, columns["ids"], columns, each)
    return report


def _pack_report(columns: Columns, top_n: Sequence[int]) -> None:
    """Write which rows report alternatives."""
    if rows := [row for row, n in enumerate(top_n) if n]:
        columns.put_ints("top_rows", rows)


def _report(
    logits_nV: Tensor, ids_n: Tensor, columns: Columns, top_n: Sequence[int]
) -> list[Sampled]:
    """Tokens with log-probabilities and alternatives, brought to the host in one transfer."""
    logprobs_nV = logits_nV.log_softmax(-1)
    numbers = [ids_n, logprobs_nV.gather(-1, ids_n[:, None])]
    # the same k for all rows: with a smaller one, ties could be cut differently
    k = min(MAX_TOP_N, logits_nV.shape[-1])
    if "top_rows" in columns:
        rows_p = columns["top_rows"]
        asked_pV = logprobs_nV if len(rows_p) == len(logprobs_nV) else logprobs_nV[rows_p]
        values_pk, ids_pk = asked_pV.topk(k, dim=-1)
        numbers += [ids_pk, values_pk]
    return _unpack(torch.cat([part.double().flatten() for part in numbers]).tolist(), k, top_n)


def _unpack(numbers: Sequence[float], k: int, top_n: Sequence[int]) -> list[Sampled]:
    """Split ids, log-probabilities, and the k alternatives of the rows that asked for any."""
    n = len(top_n)
    tops, half = 2 * n, k * sum(asked > 0 for asked in top_n)
    report: list[Sampled] = []
    for row, asked in enumerate(top_n):
        ids = map(int, numbers[tops : tops + min(asked, k)])
        top = list(zip(ids, numbers[tops + half : tops + half + min(asked, k)], strict=True))
        report.append(Sampled(int(numbers[row]), numbers[n + row], top))
        tops += k if asked else 0
    return report
