"""The experts that a batch reads together, on held-out text, and choices that may reduce them.

    python -m benchmarks.engine.expert_union [--model DIR] [--data PATH ...] [--json FILE]

A step that decodes B requests reads the union of the experts that their tokens choose. Sequences
are cut from the whole text at even distances and read side by side, each from its own offset (and
around its end), so that one column of tokens is what B unrelated requests decode at once. Columns
are computed by teacher forcing: all at a time, layer by layer, which changes no result because no
choice looks at another column.

The first table counts the union of each column, beside what independent choices would give if all
experts were chosen equally often, or as often as they are. The second tries choices that look at
the whole column: perplexity against union, and the union with which each token's own top-k, at the
k that fits, is as good.

Experts are given in 64ths of what the checkpoint has; without --data, the text is what the
checkpoint's training held out.

Shapes: N sequences, L length, T = N * L tokens, C columns, B tokens of a column, E experts.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.records import MACHINE, VERSIONS, Record, write_records
from engine import checkpoint
from engine.checkpoint import STARTER, Checkpoint
from engine.gpu.ffn.cheapest_way import expected_used
from engine.model.decoder import Decoder, Layer
from engine.model.ffn import ExpertFFN
from engine.model.policy_batch import PolicyBatch
from engine.model.sliced_ffn import sparse_ffn_reference
from engine.model.trace import Trace
from engine.policy import ExpertPolicy
from training.errors import DataError
from training.quality.evaluation import read_text

ENOUGH: Final = 1 << 30  # more tokens than any text here has
OWN_KS: Final = (2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 64)
TABLE_KS: Final = (8, 16)
BONUSES: Final = (0.5, 1.0, 2.0)
POOLS: Final = (12, 16, 24, 32, 40, 48, 56)
# Own choice may be this much worse and still count as equally good: savings are not overstated.
TOLERANCE: Final = 0.001

Params = dict[str, Any]
Choose = Callable[[Tensor], Tensor]  # scores [C, B, E] -> chosen, bool [C, B, E]


def scaled(part: int, experts: int) -> int:
    """`part` 64ths of the experts, at least one."""
    return max(1, round(part * experts / 64))


def own_top_k(scores_CBE: Tensor, k: int) -> Tensor:
    """Each token's own k best experts: what the engine does."""
    best_CBK = scores_CBE.topk(k, dim=2).indices
    return torch.zeros_like(scores_CBE, dtype=torch.bool).scatter_(2, best_CBK, True)


def free_riders(scores_CBE: Tensor, own_k: int, k: int) -> Tensor:
    """`own_k` of its own, then up to `k` in all from those that any token of the column chose."""
    union_C1E = own_top_k(scores_CBE, own_k).any(1, keepdim=True)
    return own_top_k(scores_CBE.masked_fill(~union_C1E, -math.inf), k) & union_C1E


def whole_union(scores_CBE: Tensor, own_k: int) -> Tensor:
    """Every token uses all that any token of the column chose."""
    return own_top_k(scores_CBE, own_k).any(1, keepdim=True).expand_as(scores_CBE)


def popular(scores_CBE: Tensor, k: int, bonus: float) -> Tensor:
    """Top k of score + bonus * popularity.

    Popularity is the share of the column's tokens with the expert among their own k; the bonus is
    in standard deviations of the token's scores.
    """
    wanted_C1E = own_top_k(scores_CBE, k).float().mean(1, keepdim=True)
    return own_top_k(scores_CBE + bonus * scores_CBE.std(2, keepdim=True) * wanted_C1E, k)


def pooled(scores_CBE: Tensor, size: int) -> Tensor:
    """The `size` experts with most predicted mass over the column, used by every token."""
    mass_C1E = scores_CBE.softmax(2).sum(1, keepdim=True)
    return own_top_k(mass_C1E, size).expand_as(scores_CBE)


def union_sizes(chosen_CBE: Tensor) -> Tensor:
    """Distinct experts of each column: [C]."""
    return chosen_CBE.any(1).sum(1)


def marginal_union(chosen_TE: Tensor, batch: int) -> float:
    """Distinct experts of `batch` tokens that choose independently, each as often as measured."""
    share_E = chosen_TE.double().mean(0)
    return float((1 - (1 - share_E) ** batch).sum())


def equal_union(curve: Sequence[tuple[float, float]], perplexity: float) -> float | None:
    """The union at which a curve reaches `perplexity`; None outside of the curve.

    `curve` holds (union, perplexity) by rising union; between points, the logarithm of perplexity
    is taken to be linear in the union.
    """
    for (union, worse), (next_union, better) in pairwise(curve):
        if better <= perplexity < worse:
            part = math.log(worse / perplexity) / math.log(worse / better)
            return union + part * (next_union - union)
    return None


class ColumnFFN(nn.Module):
    """An expert FFN whose experts are chosen column by column; the policy plays no part."""

    def __init__(self, ffn: ExpertFFN, choose: Choose, rows_CB: Tensor) -> None:
        super().__init__()
        self._ffn, self._choose, self._rows_CB = ffn, choose, rows_CB

    def forward(self, x_TD: Tensor, _policy: PolicyBatch, trace: Trace | None) -> Tensor:
        ffn, rows_CB = self._ffn, self._rows_CB
        chosen_TE = x_TD.new_empty((x_TD.shape[0], ffn.num_experts), dtype=torch.bool)
        chosen_TE[rows_CB] = self._choose(ffn.scores(x_TD)[rows_CB])
        if trace is not None:
            trace.add(x_TD, chosen_TE, ffn.num_experts)
        return sparse_ffn_reference(x_TD, ffn.up, ffn.down, chosen_TE, ffn.activation)


@contextmanager
def choosing(model: Decoder, choose: Choose, rows_CB: Tensor) -> Iterator[None]:
    """Within the block, every FFN of `model` chooses by `choose` for columns of these rows."""
    layers = [layer for layer in model.layers if isinstance(layer, Layer)]
    ffns = [layer.ffn for layer in layers]
    try:
        for layer in layers:
            setattr(layer, "ffn", ColumnFFN(layer.ffn, choose, rows_CB))  # noqa: B010  other type
        yield
    finally:
        for layer, ffn in zip(layers, ffns, strict=True):
            layer.ffn = ffn


def columns(sequences: int, length: int, batch: int, seed: int) -> Tensor:
    """Rows of a flat batch [N, L] that are read at once, [C, B]; each sequence from an offset.

    Which sequences share a column, and their offsets, are drawn from `seed`.
    """
    generator = torch.Generator().manual_seed(seed)
    order_N = torch.randperm(sequences, generator=generator)
    offset_N = torch.randint(length, (sequences,), generator=generator)
    positions_LN = (torch.arange(length)[:, None] + offset_N) % length
    return (order_N * length + positions_LN).view(-1, batch)


@dataclass(frozen=True)
class Text:
    """Inputs and targets, each [N, L]."""

    inputs_NL: Tensor
    targets_NL: Tensor


@dataclass(frozen=True)
class Outcome:
    """One choice on one text: its perplexity, and what every layer chose, bool [T, E]."""

    perplexity: float
    chosen: list[Tensor]

    def unions(self, rows_CB: Tensor) -> list[float]:
        """Mean distinct experts of a column, by layer."""
        return [float(union_sizes(c[rows_CB]).float().mean()) for c in self.chosen]

    @property
    def per_token(self) -> float:
        return sum(float(c.sum(1).float().mean()) for c in self.chosen) / len(self.chosen)


@torch.inference_mode()
def measure(model: Decoder, text: Text, choose: Choose, rows_CB: Tensor) -> Outcome:
    """Run the text with this choice in every layer."""
    trace = Trace()
    with choosing(model, choose, rows_CB):
        logits_NLV = model.logits(text.inputs_NL, ExpertPolicy.dense(), trace)
    loss = F.cross_entropy(logits_NLV.flatten(0, 1), text.targets_NL.flatten())
    return Outcome(math.exp(float(loss)), [c for c in trace.chosen if c is not None])


def candidates(experts: int) -> Iterator[tuple[str, Choose]]:
    """What the second table tries beside own top-k."""
    for few, most in ((2, 8), (4, 8), (6, 8), (4, 16), (8, 16), (12, 16)):
        own_k, k = scaled(few, experts), scaled(most, experts)
        yield f"free riders {own_k} to {k}", partial(free_riders, own_k=own_k, k=k)
    for few in (1, 2, 3, 4, 6, 8):
        own_k = scaled(few, experts)
        yield f"whole union of {own_k}", partial(whole_union, own_k=own_k)
    for k in (scaled(part, experts) for part in TABLE_KS):
        for bonus in BONUSES:
            yield f"popular {k}, bonus {bonus:g}", partial(popular, k=k, bonus=bonus)
    for size in (scaled(part, experts) for part in POOLS):
        yield f"pooled {size}", partial(pooled, size=size)


def read(loaded: Checkpoint, paths: Sequence[Path], sequences: int, length: int) -> Text:
    """`sequences` pieces of the text, evenly spread over all of it.

    Raises:
        DataError: if the text cannot be read or has fewer sequences.
    """
    whole = read_text(loaded, paths, ENOUGH)
    if whole.sequences < sequences:
        raise DataError(f"the text has {whole.sequences} sequences, fewer than {sequences}")
    inputs_NL, targets_NL = (
        torch.cat(side)[:, :length] for side in zip(*whole.batches, strict=True)
    )
    kept = torch.arange(sequences) * whole.sequences // sequences
    return Text(inputs_NL[kept], targets_NL[kept])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def own_records(
    owns: dict[int, Outcome], batches: Sequence[int], rows: dict[int, Tensor], params: Params
) -> Iterator[Record]:
    """Unions of own top-k; the peer is independent choice at the measured load of each expert."""
    for k, own in owns.items():
        for batch in batches:
            layers = own.unions(rows[batch])
            loaded = [marginal_union(chosen_TE, batch) for chosen_TE in own.chosen]
            which = {"choice": f"own {k}", "k": k, "batch": batch, "layers": layers}
            which |= {"perplexity": own.perplexity, "experts_per_token": float(k)}
            which["by_load_layers"] = loaded
            which["uniform"] = expected_used(batch, k, own.chosen[0].shape[1])
            peer = _mean(loaded)
            yield Record(
                "own_union", which | params, _mean(layers), "experts", peer, peer / _mean(layers)
            )


def candidate_record(
    name: str, found: Outcome, rows_CB: Tensor, curve: Sequence[tuple[float, float]], params: Params
) -> Record:
    """A candidate's union; the peer is own top-k's that is as good, within TOLERANCE."""
    layers = found.unions(rows_CB)
    which = {"choice": name, "batch": rows_CB.shape[1], "layers": layers}
    which |= {"perplexity": found.perplexity, "experts_per_token": found.per_token}
    peer = equal_union(curve, found.perplexity * (1 + TOLERANCE))
    ratio = None if peer is None else peer / _mean(layers)
    return Record("candidate_union", which | params, _mean(layers), "experts", peer, ratio)


def _print_own(record: Record) -> None:
    p = record.params
    layers = " ".join(f"{union:5.1f}" for union in p["layers"])
    print(
        f"{p['k']:>4}{p['batch']:>6}{record.value:>9.2f}{record.peer_value:>10.2f}"
        f"{p['uniform']:>9.2f}   {layers}"
    )


def _print_choice(record: Record) -> None:
    p, equal, saved = record.params, "", ""
    if record.name == "candidate_union":
        equal = "-" if record.peer_value is None else f"{record.peer_value:.2f}"
        saved = "-" if record.ratio is None else f"{1 - 1 / record.ratio:.1%}"
    print(
        f"{p['batch']:>5}  {p['choice']:24}{p['perplexity']:>10.3f}{p['experts_per_token']:>8.2f}"
        f"{record.value:>9.2f}{equal:>9}{saved:>8}",
        flush=True,
    )


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, default=STARTER, help="checkpoint directory")
    parser.add_argument("--data", type=Path, nargs="*", default=[], help="text files or folders")
    parser.add_argument("--sequences", type=int, default=32, help="a multiple of every batch")
    parser.add_argument("--length", type=int, default=512, help="at most, of the model's context")
    parser.add_argument("--batch", type=int, nargs="+", default=(2, 4, 8, 16, 32))
    parser.add_argument("--try-batch", type=int, nargs="*", default=(8, 32), help="of candidates")
    parser.add_argument("--seed", type=int, default=0, help="of the columns")
    parser.add_argument("--json", type=Path, help="write the records to this file")
    options = parser.parse_args(arguments)
    sizes = {*options.batch, *options.try_batch}
    if min(options.sequences, options.length, *sizes) < 1:
        parser.error("--sequences, --length and every batch must be at least 1")
    if any(options.sequences % batch for batch in sizes):
        parser.error(f"--sequences {options.sequences} must be a multiple of every batch")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables; with --json, keep the records."""
    options = _arguments(arguments)
    loaded = checkpoint.load(options.model, "cpu", "float32")
    experts = loaded.config.experts.num_experts
    text = read(loaded, options.data, options.sequences, options.length)
    sizes = sorted({*options.batch, *options.try_batch})
    rows = {b: columns(options.sequences, text.inputs_NL.shape[1], b, options.seed) for b in sizes}
    params: Params = {
        "model": loaded.fingerprint[:12],
        "experts": experts,
        "text": [path.name for path in options.data] or "held out in training",
        "tokens": text.inputs_NL.numel(),
        "seed": options.seed,
    }
    print(f"{MACHINE}, torch {VERSIONS['torch']}; {params['tokens']:,} tokens: {params['text']}")

    def run(choose: Choose, batch: int) -> Outcome:
        return measure(loaded.model, text, choose, rows[batch])

    print(f"{'k':>4}{'batch':>6}{'union':>9}{'by load':>10}{'uniform':>9}   by layer")
    ks = sorted({scaled(part, experts) for part in OWN_KS})
    owns = {k: run(partial(own_top_k, k=k), sizes[0]) for k in ks}
    owned = list(own_records(owns, sizes, rows, params))
    for record in owned:
        shown = record.params["k"] in {scaled(part, experts) for part in TABLE_KS}
        if shown and record.params["batch"] in options.batch:
            _print_own(record)
    heads = f"{'each':>8}{'union':>9}{'own':>9}{'saved':>8}"
    print(f"\nbatch  {'choice':24}{'perplexity':>10}{heads}")
    records = list(owned)
    for batch in options.try_batch:
        own = [record for record in owned if record.params["batch"] == batch]
        curve = [(r.value, float(r.params["perplexity"])) for r in own]
        for record in own:
            _print_choice(record)
        for name, choose in candidates(experts):
            found = run(choose, batch)
            records.append(candidate_record(name, found, rows[batch], curve, params))
            _print_choice(records[-1])
    if options.json is not None:
        write_records(options.json, records)


if __name__ == "__main__":
    main()
