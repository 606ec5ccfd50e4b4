"""The engine's vocabulary: sampling parameters, requests, token events.

Who sets which field of a `Request`: the caller at construction (id, prompt, sampling, policy), the
scheduler (status, place in line, blocks, what is computed and what came from the prefix cache), the
sampler (counts), the engine (everything about output and time).
"""

from __future__ import annotations

import enum
import math
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from engine.errors import InvalidRequest, require
from engine.policy import ExpertPolicy
from engine.text.grammar import Grammar, Matcher

FinishReason = Literal["length", "eos_token", "stop_sequence", "abort", "error"]

MAX_STOPS: Final = 16
MAX_STOP_LENGTH: Final = 256
MAX_BIASES: Final = 300
MAX_BIAS: Final = 100.0
MAX_TOP_N: Final = 20
MAX_COMPLETIONS: Final = 128
MAX_SEED: Final = (1 << 63) - 1


def _check(condition: bool, message: str) -> None:
    require(condition, message, InvalidRequest)


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is drawn, and when to stop.

    Attributes:
        max_new_tokens: tokens to generate at most.
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the likeliest tokens that hold this probability mass (nucleus sampling).
        min_p: drop tokens less likely than this share of the likeliest.
        typical_p: locally typical sampling (Meister et al., 2022); 1 keeps all.
        repetition_penalty: divides positive and multiplies negative logits of seen tokens (CTRL).
        frequency_penalty: subtracted once per earlier occurrence in the output.
        presence_penalty: subtracted once if the token occurs in the output.
        seed: makes sampling reproducible, whatever else runs; None draws one.
        logit_bias: (token id, what is added to its logit), each token at most once.
        stop: strings that end the text (they are kept in it, as in TGI).
        stop_token_ids: tokens that end the output; they leave no text.
        min_tokens: tokens before which nothing ends the output: until then, tokens that would end
            it are not drawn, and stop strings are not looked for.
        ignore_eos: generate past the end-of-text token.
        top_n_tokens: alternatives to report with each token.
        prompt_logprobs: report the log-probability of each prompt token.
        prompt_top_n: alternatives to report with each prompt token; needs `prompt_logprobs`.
        grammar: the form that the output must have. Only tokens that it allows are drawn; once
            nothing can follow, the output ends. It goes before `ignore_eos` and `min_tokens`, which
            hold as far as it allows.
        token_experts: report which experts computed each token.
    """

    max_new_tokens: int = 100
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    ignore_eos: bool = False
    top_n_tokens: int = 0
    prompt_logprobs: bool = False
    prompt_top_n: int = 0
    grammar: Grammar | None = None
    token_experts: bool = False

    def __post_init__(self) -> None:
        self._range("max_new_tokens", 1, 1 << 20)
        self._range("temperature", 0.0, 100.0)
        self._range("top_k", 0, 1 << 20)
        self._range("top_p", 0.0, 1.0, open_low=True)
        self._range("min_p", 0.0, 1.0)
        self._range("typical_p", 0.0, 1.0, open_low=True)
        self._range("repetition_penalty", 0.0, 100.0, open_low=True)
        self._range("frequency_penalty", -2.0, 2.0)
        self._range("presence_penalty", -2.0, 2.0)
        self._range("top_n_tokens", 0, MAX_TOP_N)
        self._range("prompt_top_n", 0, MAX_TOP_N)
        _check(self.prompt_logprobs or not self.prompt_top_n, "prompt_top_n needs prompt_logprobs")
        if self.seed is not None:
            self._range("seed", 0, MAX_SEED)
        self._check_bias()
        self._check_stops()

    def _check_bias(self) -> None:
        _check(len(self.logit_bias) <= MAX_BIASES, f"logit_bias takes at most {MAX_BIASES} tokens")
        for _, bias in self.logit_bias:
            _check(
                -MAX_BIAS <= bias <= MAX_BIAS,  # nan is not
                f"logit_bias values must be from {-MAX_BIAS:g} to {MAX_BIAS:g}, got {bias}",
            )
        once = len({token_id for token_id, _ in self.logit_bias}) == len(self.logit_bias)
        _check(once, "logit_bias must name each token once")

    def _check_stops(self) -> None:
        _check(
            0 <= self.min_tokens <= self.max_new_tokens,
            f"min_tokens must be from 0 to max_new_tokens, which is {self.max_new_tokens}; got "
            f"{self.min_tokens}",
        )
        stop_ids = len(self.stop_token_ids)
        _check(stop_ids <= MAX_STOPS, f"stop_token_ids takes at most {MAX_STOPS} tokens")
        _check(len(self.stop) <= MAX_STOPS, f"stop takes at most {MAX_STOPS} strings")
        for text in self.stop:
            _check(
                1 <= len(text) <= MAX_STOP_LENGTH,
                f"stop strings must have 1 to {MAX_STOP_LENGTH} characters",
            )

    def _range(self, name: str, low: float, high: float, *, open_low: bool = False) -> None:
        value = getattr(self, name)
        above = value > low if open_low else value >= low
        first, last = (n if isinstance(n, int) else f"{n:g}" for n in (low, high))
        bounds = f"above {first} and at most {last}" if open_low else f"from {first} to {last}"
        _check(
            math.isfinite(value) and above and value <= high,
            f"{name} must be {bounds}, got {value}",
        )

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def penalizes(self) -> bool:
        """Whether logits depend on the tokens so far."""
        penalties = (self.repetition_penalty, self.frequency_penalty, self.presence_penalty)
        return penalties != (1.0, 0.0, 0.0)


class TokenCounts:
    """The distinct tokens of a request; it grows with the request, a token at a time.

    Attributes:
        token_ids: each token of prompt and output once.
        in_output: how often each of these occurs in the output.
    """

    def __init__(self) -> None:
        self.token_ids: array[int] = array("q")
        self.in_output: array[int] = array("q")
        self._places: dict[int, int] = {}
        self._counted = 0

    def update(self, token_ids: Sequence[int], prompt_len: int) -> None:
        """Count the tokens that are new since the last call."""
        for position in range(self._counted, len(token_ids)):
            token_id = token_ids[position]
            place = self._places.setdefault(token_id, len(self.token_ids))
            if place == len(self.token_ids):
                self.token_ids.append(token_id)
                self.in_output.append(0)
            self.in_output[place] += position >= prompt_len
        self._counted = len(token_ids)


class Status(enum.Enum):
    """Where a request is in its life; only the scheduler moves it."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False)
class Request:
    """One generation, from admission to its terminal event.

    `token_ids` is the prompt followed by the output; `num_computed` of them have keys and values in
    the cache. A preempted request loses its blocks, and `num_computed` falls to 0 until it is
    admitted again.
    """

    request_id: str
    prompt_ids: list[int]
    sampling: SamplingParams
    policy: ExpertPolicy  # resolved: never `auto`
    seed: int = 0

    # the scheduler's
    status: Status = Status.WAITING
    rank: int = 0  # its place in line; a lower number comes first
    blocks: list[int] = field(default_factory=list)
    # keys of its full blocks, computed as far as they were needed
    block_keys: list[bytes] = field(default_factory=list)
    num_computed: int = 0
    # how many of its prompt's tokens the cache had when it was first admitted
    cached_prompt_tokens: int = 0
    preemptions: int = 0

    # the sampler's
    counts: TokenCounts = field(default_factory=TokenCounts)

    # the engine's
    matcher: Matcher | None = None  # follows its grammar
    token_ids: list[int] = field(init=False)
    finish_reason: FinishReason | None = None
    experts_activated: int = 0
    experts_available: int = 0
    arrived: float = field(default_factory=time.monotonic)
    admitted: float | None = None
    first_token: float | None = None
    last_token: float | None = None

    def __post_init__(self) -> None:
        self.token_ids = list(self.prompt_ids)

    @property
    def prompt_len(self) -> int:
        return len(self.prompt_ids)

    @property
    def output_ids(self) -> list[int]:
        return self.token_ids[self.prompt_len :]

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - self.prompt_len

    @property
    def may_end(self) -> bool:
        """Whether the newest token may end the output."""
        return self.num_output > self.sampling.min_tokens

    @property
    def num_uncomputed(self) -> int:
        return len(self.token_ids) - self.num_computed

    @property
    def max_len(self) -> int:
        """Tokens that the request has at its end, at most."""
        return self.prompt_len + self.sampling.max_new_tokens

    @property
    def activated_ratio(self) -> float:
        """Share of the experts that this request's tokens used, over all layers so far."""
        return self.experts_activated / self.experts_available if self.experts_available else 0.0


@dataclass(frozen=True)
class TokenLogprob:
    """A token, its text, and its log-probability (None for a prompt's first token).

    `raw` is its part of the text's UTF-8, where `text` has U+FFFD for parts of characters.
    """

    token_id: int
    text: str
    logprob: float | None
    special: bool = False
    raw: bytes = b""


@dataclass(frozen=True)
class Usage:
    """What a finished request took: counts, times in seconds, activated experts.

    `cached_prompt_tokens` of its prompt came from the prefix cache. Their experts are not counted:
    nothing was computed for them.
    """

    prompt_tokens: int
    cached_prompt_tokens: int
    generated_tokens: int
    seed: int | None
    queue_seconds: float
    inference_seconds: float
    experts_activated: int
    experts_available: int

    @property
    def activated_ratio(self) -> float:
        return self.experts_activated / self.experts_available if self.experts_available else 0.0


@dataclass(frozen=True)
class TokenEvent:
    """One step of one request as its reader sees it.

    Every accepted request ends with exactly one event whose `finish_reason` is set; `usage` comes
    with it. `token` is None in a terminal event without a token of its own (abort, error).

    Attributes:
        request_id: whose event this is.
        index: position in the output, from 0.
        token: the generated token.
        text: the text that became final with this token; may be empty inside a character.
        top_tokens: the likeliest alternatives, when asked for.
        activated_ratio: share of the experts, over all layers, used to compute this token.
        finish_reason: set in the terminal event alone.
        error: a sentence, when finish_reason is "error".
        own_fault: whether that error lies with the request, whose grammar cannot be followed any
            further, and not with the engine.
        prompt: log-probabilities of the prompt, in the first event, when asked for.
        prompt_top: the likeliest tokens at each position of the prompt but the first, likewise.
        usage: set in the terminal event.
        experts: which experts computed this token, as in `engine.serving.token_experts`, when
            asked for.
    """

    request_id: str
    index: int
    token: TokenLogprob | None
    text: str = ""
    top_tokens: tuple[TokenLogprob, ...] = ()
    activated_ratio: float = 0.0
    finish_reason: FinishReason | None = None
    error: str | None = None
    own_fault: bool = False
    prompt: tuple[TokenLogprob, ...] = ()
    prompt_top: tuple[tuple[TokenLogprob, ...], ...] = ()
    usage: Usage | None = None
    experts: bytes = b""
