"""The activation study: what fires on a fixed probe batch, and what the experts make of it.

Per layer: how sparse the activations are, how much of their mass few experts hold, how evenly the
router spreads tokens, and whether the neurons of an expert fire together. Two clusterings of the
same neurons are compared by the adjusted Rand index. All of it is measured on the dense forward
pass, so that a layer's figures do not depend on the choices of the layers below it.

Shapes: B sequences, L length, T tokens, D model, F neurons, E experts, N sampled neurons.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from pathlib import Path
from typing import Any, Final, Self

import torch
from torch import Tensor

from engine.config import check_range, known_fields
from engine.errors import ConfigError, require
from engine.model.decoder import Decoder
from engine.model.ffn import ExpertFFN
from engine.text.tokenizer import Tokenizer
from training.data.batches import TokenBatches
from training.data.corpus import read_paths
from training.data.vocabulary import encode_documents
from training.experts.activation import ffn_inputs, hidden
from training.experts.shares import top_k_of

# The shares of the experts whose oracle mass is recorded, whatever the run's own k.
CONCENTRATION_SHARES: Final = (Fraction(1, 16), Fraction(1, 8), Fraction(1, 4))
_SAMPLED_NEURONS: Final = 256
_PROBE_CHARACTERS: Final = 1 << 19
_DIGITS: Final = 6


@dataclass(frozen=True)
class LayerStudy:
    """One layer on the probe batch. All shares are between 0 and 1.

    Attributes:
        active: share of the neurons that fire, mean over tokens.
        never: share of the neurons that fire on no token of the probe.
        concentration: share of the true activation mass in each token's best 1/16, 1/8 and 1/4 of
            the experts, chosen by that mass (oracle).
        oracle: the same at the study's k.
        coverage: share of the true mass inside the router's k experts; None without a router.
        load: per expert, its tokens under the router over those of a uniform spread; the mean is 1.
            Empty without a router.
        within: probability that a neuron fires on a token on which another neuron of its expert
            does, mean over sampled neurons that fire at all.
        between: the same for neurons of other experts.
    """

    active: float
    never: float
    concentration: tuple[float, ...]
    oracle: float
    coverage: float | None
    load: tuple[float, ...]
    within: float
    between: float

    @property
    def cohesion(self) -> float:
        """`within` over `between`: 1 if an expert's neurons fire together no more than others."""
        return self.within / self.between if self.between else 1.0

    @property
    def load_entropy(self) -> float | None:
        """Entropy of the load over that of the uniform one: 1 is even, 0 is one expert for all."""
        total = sum(self.load)
        if len(self.load) < 2 or not total:
            return None
        shares = [value / total for value in self.load if value > 0]
        return -sum(p * math.log(p) for p in shares) / math.log(len(self.load))

    @property
    def dead_experts(self) -> int:
        """Experts that the router chose for no token of the probe."""
        return sum(value == 0 for value in self.load)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON; `concentration` by share, such as {"1/16": 0.4}."""
        named = {str(s): v for s, v in zip(CONCENTRATION_SHARES, self.concentration, strict=True)}
        return {**dataclasses.asdict(self), "concentration": named, "load": list(self.load)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`; raises ConfigError for missing, unknown or non-numeric keys."""
        fields = known_fields(cls, values, "activation study: layer")
        try:
            named = fields.pop("concentration")
            concentration = tuple(float(named[str(share)]) for share in CONCENTRATION_SHARES)
            load = tuple(float(value) for value in fields.pop("load"))
            coverage = fields.pop("coverage")
            return cls(
                **{name: float(value) for name, value in fields.items()},
                concentration=concentration,
                load=load,
                coverage=None if coverage is None else float(coverage),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"activation study: layer: {error!r}") from error


@dataclass(frozen=True)
class ActivationStudy:
    """What a model's neurons do on a probe batch.

    Attributes:
        tokens: how many the probe has.
        top_k: experts per token in `LayerStudy.oracle`, `coverage` and `load`.
        layers: from the first to the last.
    """

    tokens: int
    top_k: int
    layers: tuple[LayerStudy, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, for the log."""
        layers = [layer.to_dict() for layer in self.layers]
        return {"tokens": self.tokens, "top_k": self.top_k, "layers": layers}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`; raises ConfigError for anything else."""
        fields = known_fields(cls, values, "activation study")
        try:
            layers = tuple(LayerStudy.from_dict(layer) for layer in fields["layers"])
            return cls(int(fields["tokens"]), int(fields["top_k"]), layers)
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"activation study: {error!r}") from error


def text_probe(
    tokenizer: Tokenizer, paths: Sequence[Path], length: int, tokens: int = 4096
) -> Tensor:
    """A probe of about `tokens` token ids, [B, L], from a fixed sample of a text's documents.

    Args:
        tokenizer: the tokenizer of the model to study.
        paths: files and folders of text; none mean Python's standard library.
        length: L, tokens per sequence.
        tokens: the batch has at most this many, but at least one sequence.

    Raises:
        DataError: if a path cannot be read, or the text does not fill one sequence.
    """
    documents = read_paths(paths)
    random.Random(0).shuffle(documents)
    read = accumulate((len(document.text) for document in documents), initial=0)
    enough = sum(characters < _PROBE_CHARACTERS for characters in read)
    ids = encode_documents(tokenizer, documents[:enough])
    available = (ids.size - 1) // length
    batch = max(1, min(tokens // length, available))
    return TokenBatches(ids, batch, length, seed=0).batch(0)[0]


@torch.no_grad()
def study(model: Decoder, probe_BL: Tensor, top_k: int) -> ActivationStudy:
    """Study every layer of `model` on the token ids `probe_BL`, on the model's device.

    The router is taken as it stands; while no experts have been built yet (a router of zeros)
    there is no coverage and no load.

    Raises:
        ConfigError: unless 1 <= top_k <= number of experts.
    """
    check_range("top_k", top_k, 1, model.config.experts.num_experts)
    pairs = zip(model.ffns(), ffn_inputs(model, probe_BL), strict=True)
    layers = tuple(study_layer(ffn, x_TD, top_k) for ffn, x_TD in pairs)
    return ActivationStudy(probe_BL.numel(), top_k, layers)


@torch.no_grad()
def study_layer(ffn: ExpertFFN, x_TD: Tensor, top_k: int) -> LayerStudy:
    """One layer on FFN inputs of its own; see `study`."""
    hidden_TF = hidden(ffn, x_TD).float()
    mass_TE = ffn.mass_of(hidden_TF)
    active_TF = (hidden_TF != 0).float()
    best_TE = mass_TE.sort(dim=1, descending=True).values.sum(0).cumsum(0)
    total = float(best_TE[-1])

    def oracle(k: int) -> float:
        return _ratio(float(best_TE[k - 1]), total)

    ks = [top_k_of(share, ffn.num_experts) for share in CONCENTRATION_SHARES]
    coverage, load = _routing(ffn, x_TD, mass_TE, top_k)
    within, between = cofiring(active_TF, ffn.num_experts)
    return LayerStudy(
        active=round(float(active_TF.mean()), _DIGITS),
        never=round(float((active_TF.sum(0) == 0).float().mean()), _DIGITS),
        concentration=tuple(oracle(k) for k in ks),
        oracle=oracle(top_k),
        coverage=coverage,
        load=load,
        within=round(within, _DIGITS),
        between=round(between, _DIGITS),
    )


def _ratio(part: float, whole: float) -> float:
    """A share of the mass; where no neuron fires at all, nothing is missing."""
    return round(min(part / whole, 1.0), _DIGITS) if whole else 1.0


def _routing(
    ffn: ExpertFFN, x_TD: Tensor, mass_TE: Tensor, top_k: int
) -> tuple[float | None, tuple[float, ...]]:
    """(coverage, load) of the router's `top_k` experts a token."""
    if not ffn.router.any():
        return None, ()
    best_TK = ffn.scores(x_TD).topk(top_k, sorted=False).indices
    inside = float(mass_TE.gather(1, best_TK).sum())
    counts_E = torch.bincount(best_TK.flatten(), minlength=ffn.num_experts)
    uniform = best_TK.numel() / ffn.num_experts
    load = tuple(round(count / uniform, _DIGITS) for count in counts_E.tolist())
    return _ratio(inside, float(mass_TE.sum())), load


def cofiring(active_TF: Tensor, num_experts: int) -> tuple[float, float]:
    """How probably a neuron fires when another one does: (of its own expert, of another one).

    P(j fires | i fires), mean over all j and over up to 256 neurons i that stand evenly spaced, so
    that every expert has its share of them; neurons i that never fire are left out. If neurons
    fired independently both would equal the mean rate of firing. (0, 0) if none fires.

    Args:
        active_TF: 1 where a neuron fires, else 0; float, expert e being columns e*S .. (e+1)*S.
        num_experts: must divide the number of neurons.
    """
    neurons = active_TF.shape[1]
    size = neurons // num_experts
    sampled = min(neurons, _SAMPLED_NEURONS)
    sample_N = torch.arange(sampled, device=active_TF.device) * neurons // sampled
    counts_N = active_TF[:, sample_N].sum(0)
    fires = counts_N > 0
    sample_N, counts_N = sample_N[fires], counts_N[fires]
    if not sample_N.numel():
        return 0.0, 0.0
    given_NF = (active_TF[:, sample_N].T @ active_TF) / counts_N[:, None]
    own_N = given_NF.view(-1, num_experts, size).sum(2).gather(1, (sample_N // size)[:, None])[:, 0]
    others_N = given_NF.sum(1) - own_N
    within_N = (own_N - 1) / (size - 1) if size > 1 else torch.zeros_like(own_N)
    between_N = others_N / (neurons - size) if neurons > size else torch.zeros_like(own_N)
    return float(within_N.mean()), float(between_N.mean())


def adjusted_rand_index(first: Sequence[int] | Tensor, second: Sequence[int] | Tensor) -> float:
    """How far two labelings of the same things agree: 1 the same groups, about 0 by chance.

    The index of Hubert and Arabie, *Comparing partitions* (1985): pairs that both labelings put
    together, less what is expected of random labelings with the same group sizes, over the most
    it could be. Names of labels do not matter. It can be below 0.

    Raises:
        ConfigError: unless both have the same number of labels, at least one.
    """
    a, b = (torch.as_tensor(labels).flatten().cpu().long() for labels in (first, second))
    require(
        a.numel() == b.numel() > 0,
        f"labelings must be of the same things, got {a.numel()} and {b.numel()} labels",
    )
    pairs = torch.stack([a, b], dim=1)
    together = _pairs(pairs)
    in_first, in_second, everything = _pairs(a[:, None]), _pairs(b[:, None]), math.comb(len(a), 2)
    # Integers throughout: (together - expected) / (most - expected), all times 2 * everything.
    numerator = 2 * (together * everything - in_first * in_second)
    denominator = (in_first + in_second) * everything - 2 * in_first * in_second
    return numerator / denominator if denominator else 1.0


def _pairs(rows: Tensor) -> int:
    """Unordered pairs of equal rows."""
    counts = torch.unique(rows, dim=0, return_counts=True)[1].tolist()
    return sum(math.comb(count, 2) for count in counts)
