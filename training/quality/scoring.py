"""Log-likelihood of continuations given their contexts, in padded batches.

The boundary between context and continuation is drawn as in EleutherAI's lm-evaluation-harness:
white space that ends the context moves to the continuation (byte-level tokenizers put a word's
space in front of it), then context + continuation is tokenised as one text, so that the model sees
the tokens it was trained on, and cut where the context's own tokens end. Where a token spans the
boundary, the harness drops it from the score; here it belongs to the continuation.

Shapes: B sequences, L length of the longest, T = B * L tokens, N scored tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from engine.errors import require
from engine.model.attention import causal_attend
from engine.model.decoder import Decoder
from engine.model.policy_batch import PolicyBatch
from engine.model.trace import Trace
from engine.policy import ExpertPolicy
from engine.text.tokenizer import Tokenizer
from training.errors import TrainingError
from training.quality.expert_use import ExpertUse

# This batch was the fastest one measured on a CPU; a larger one falls out of its caches.
_BATCH_TOKENS: Final = 512


@dataclass(frozen=True)
class Continuation:
    """Token ids of a context and what follows it.

    Attributes:
        ids: the context's tokens (at least one), then the continuation's.
        targets: how many of them are the continuation's; 0 if it adds no token.
    """

    ids: tuple[int, ...]
    targets: int

    def fitted(self, max_inputs: int) -> Continuation:
        """Without the oldest tokens of the context that a model of `max_inputs` cannot take.

        The last token is only predicted, so `max_inputs` + 1 tokens fit.
        """
        return Continuation(self.ids[-(max_inputs + 1) :], self.targets)


@dataclass(frozen=True)
class Score:
    """What the model thinks of one continuation.

    Attributes:
        loglikelihood: natural logarithm of its probability given the context.
        greedy: whether each of its tokens is the likeliest one.
    """

    loglikelihood: float
    greedy: bool


def encode_pairs(tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]]) -> list[Continuation]:
    """Tokenise (context, continuation) texts; an empty context is the end-of-text token.

    That token is what stood before every document in training. Where the tokenizer itself puts
    something in front of a text, that stands there instead, and in front of every other context.
    """
    moved = [_move_space(context, continuation) for context, continuation in pairs]
    contexts = tokenizer.encode_batch([context for context, _ in moved])
    wholes = tokenizer.encode_batch([context + rest for context, rest in moved])
    return [
        _split(context, whole, tokenizer) for context, whole in zip(contexts, wholes, strict=True)
    ]


def _move_space(context: str, continuation: str) -> tuple[str, str]:
    """Move the white space that ends the context to the start of the continuation."""
    kept = context.rstrip()
    return kept, context[len(kept) :] + continuation


def _split(context_ids: list[int], whole_ids: list[int], tokenizer: Tokenizer) -> Continuation:
    """Cut the whole where it stops being the context's tokens."""
    common = 0
    for context_id, whole_id in zip(context_ids, whole_ids, strict=False):
        if context_id != whole_id:
            break
        common += 1
    targets = len(whole_ids) - common
    # Something must stand before the first target, for the model to predict it from.
    ids = whole_ids if common else [tokenizer.eos_id, *whole_ids]
    if tokenizer.start_ids:
        ids = tokenizer.started(whole_ids)
    return Continuation(tuple(ids), targets)


def padded_tokens(continuations: Sequence[Continuation]) -> int:
    """Tokens that `score` runs for these, padding included: its amount of work."""
    return sum(
        len(indices) * (len(continuations[indices[0]].ids) - 1)
        for indices in _by_length(continuations)
    )


@torch.no_grad()
def score(
    model: Decoder,
    continuations: Sequence[Continuation],
    policy: ExpertPolicy,
    use: ExpertUse,
    advance: Callable[[int], None] = lambda _tokens: None,
) -> list[Score]:
    """Score each continuation under `policy`, in the order given.

    Args:
        model: evaluated as it stands; on any device.
        continuations: each fits the model (`Continuation.fitted`) and has a target.
        policy: resolved, valid for the model.
        use: gains the experts used by every token that was run, padding aside.
        advance: hears after each batch how many tokens, padding included, were run.

    Raises:
        TrainingError: if a log-likelihood is not finite: the weights are broken.
    """
    scores: dict[int, Score] = {}
    for indices in _by_length(continuations):
        batch = [continuations[i] for i in indices]
        scores.update(zip(indices, _score_batch(model, batch, policy, use), strict=True))
        advance(len(batch) * (len(batch[0].ids) - 1))
    require(
        all(math.isfinite(s.loglikelihood) for s in scores.values()),
        f"the model's logits under {policy} are not finite",
        TrainingError,
    )
    return [scores[i] for i in range(len(continuations))]


def _by_length(continuations: Sequence[Continuation]) -> Iterator[list[int]]:
    """Indices in batches of like length, the longest first: little padding, bounded memory."""
    order = sorted(range(len(continuations)), key=lambda i: -len(continuations[i].ids))
    first = 0
    while first < len(order):
        size = max(1, _BATCH_TOKENS // (len(continuations[order[first]].ids) - 1))
        yield order[first : first + size]
        first += size


def _score_batch(
    model: Decoder, batch: Sequence[Continuation], policy: ExpertPolicy, use: ExpertUse
) -> list[Score]:
    """Run one padded batch and score its continuations.

    Padding on the right is harmless: attention is causal, so no real token sees what comes after
    it, and everything else in the model, the choice of experts included, is a token's own.
    """
    device = model.embedding.weight.device
    length = max(len(c.ids) for c in batch) - 1
    inputs_BL = torch.zeros((len(batch), length), dtype=torch.long)
    for row, c in enumerate(batch):
        inputs_BL[row, : len(c.ids) - 1] = torch.tensor(c.ids[:-1])
    real = [(row * length, row * length + len(c.ids) - 1) for row, c in enumerate(batch)]
    real_T = torch.cat([torch.arange(*span) for span in real]).to(device)
    scored = [(end - c.targets, end) for (_, end), c in zip(real, batch, strict=True)]
    rows_N = torch.cat([torch.arange(*span) for span in scored]).to(device)
    targets_N = torch.tensor([i for c in batch for i in c.ids[-c.targets :]], device=device)

    trace = Trace(keep_inputs=policy.kind != "dense")
    logits_NV = _logits(model, inputs_BL.to(device), policy, trace, rows_N)
    use.add(model, trace, real_T)
    logprobs_N = logits_NV.log_softmax(-1).gather(1, targets_N[:, None])[:, 0].double()
    greedy_N = logits_NV.argmax(-1) == targets_N
    counts = [c.targets for c in batch]
    pairs = zip(torch.split(logprobs_N, counts), torch.split(greedy_N, counts), strict=True)
    return [Score(float(logprobs.sum()), bool(greedy.all())) for logprobs, greedy in pairs]


def _logits(
    model: Decoder, inputs_BL: Tensor, policy: ExpertPolicy, trace: Trace, rows_N: Tensor
) -> Tensor:
    """`Decoder.logits` of the given rows of the flat batch alone, [N, V]: contexts need none."""
    batch, length = inputs_BL.shape
    positions_T = torch.arange(length, device=inputs_BL.device).repeat(batch)
    policies = PolicyBatch.uniform(
        policy, inputs_BL.numel(), model.config.experts.num_experts, inputs_BL.device
    )
    attend = causal_attend(batch, length, model.config.window)
    logits_NV: Tensor = model(inputs_BL.flatten(), positions_T, attend, policies, trace, rows_N)
    return logits_NV
