"""Clustering and routing on a checkpoint: what each way to group and to choose keeps, and its time.

    python -m benchmarks.training.clustering [--model DIR] [--data PATH ...] [--json FILE]

The first table times balanced k-means on random rows, and on rows with planted clusters, at widths
of real models. The second compares groupings of the checkpoint's neurons (by weights, as they are,
at random) and routers (stored, calibrated centroids, fitted to the true
mass on other tokens, and the oracle) by the share of true activation mass inside the chosen experts
and by held-out perplexity. Without --data, the text is Python's standard library, split as in the
checkpoint's own training.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from benchmarks.records import MACHINE, VERSIONS, Record, write_records
from engine import checkpoint
from engine.checkpoint import STARTER, Checkpoint
from engine.policy import ExpertPolicy
from training.data.batches import Batches, TokenBatches
from training.data.corpus import Document, load_corpus
from training.data.vocabulary import encode_documents
from training.experts.clustering import balanced_kmeans
from training.quality.coverage import Choice, compare
from training.quality.evaluation import evaluate

SHAPES: Final = ((1024, 256, 64), (8192, 2048, 64), (8192, 2048, 128), (8192, 2048, 256))
KS: Final = (4, 8, 16)
LENGTH: Final = 512
BATCH: Final = 4
ROUNDS: Final = 3


def random_rows(rows: int, width: int, clusters: int, *, planted: bool) -> Tensor:
    """Gaussian rows [F, D]; planted: as much again of one of `clusters` directions in each."""
    generator = torch.Generator().manual_seed(0)
    rows_FD = torch.randn(rows, width, generator=generator)
    if planted:
        centres_ED = torch.randn(clusters, width, generator=generator)
        rows_FD += centres_ED[torch.randperm(rows, generator=generator) % clusters]
    return rows_FD


def time_clustering(
    shapes: Sequence[tuple[int, int, int]], device: str, rounds: int = ROUNDS
) -> Iterator[Record]:
    """Median seconds of balanced k-means, a record for each shape and kind of rows."""
    for rows, width, clusters in shapes:
        for kind in ("gaussian", "planted"):
            rows_FD = random_rows(rows, width, clusters, planted=kind == "planted").to(device)
            seconds = []
            for seed in range(rounds):
                generator = torch.Generator().manual_seed(seed)
                began = time.perf_counter()
                found = balanced_kmeans(rows_FD, clusters, generator)  # ends with numbers on host
                seconds.append(time.perf_counter() - began)
            params = {
                "F": rows,
                "D": width,
                "E": clusters,
                "rows": kind,
                "inertia": found.inertia,
                "device": device,
                "threads": torch.get_num_threads(),
            }
            yield Record("clustering", params, statistics.median(seconds), "s")


def _tokens(loaded: Checkpoint, documents: list[Document], count: int, device: str) -> Batches:
    """Batches of at least `count` tokens, if there are as many, of documents in random order."""
    documents = list(documents)
    random.Random(0).shuffle(documents)
    chosen: list[Document] = []
    while documents and sum(len(d.text) for d in chosen) < 8 * count:
        chosen.append(documents.pop())
    tokens = encode_documents(loaded.tokenizer, chosen)
    length = min(LENGTH, loaded.config.max_position_embeddings)
    most = -(-count // (BATCH * length))
    source = TokenBatches(tokens, BATCH, length, seed=0)
    most = max(1, min(most, source.num_sequences // BATCH))
    pairs = (source.batch(step) for step in range(most))
    return [(inputs_BL.to(device), targets_BL.to(device)) for inputs_BL, targets_BL in pairs]


def batches_of(
    loaded: Checkpoint, paths: Sequence[Path], fit: int, test: int, device: str
) -> tuple[Batches, Batches]:
    """Batches to fit on and to test on: `fit` and `test` tokens, from different documents.

    Raises:
        DataError: if a path cannot be read or the text is too short.
    """
    trained = loaded.report.get("config", {})
    share, seed = float(trained.get("valid_share", 0.03)), int(trained.get("seed", 1))
    corpus = load_corpus(paths, share, seed)
    return (
        _tokens(loaded, corpus.train, fit, device),
        _tokens(loaded, corpus.valid, test, device),
    )


def choice_records(choices: Sequence[Choice], params: dict[str, object]) -> list[Record]:
    """Coverage and perplexity of each choice; the peer is the oracle of the same grouping."""
    oracle = {(c.grouping, c.k): c for c in choices if c.router == "oracle"}
    records = []
    for choice in choices:
        best = oracle[choice.grouping, choice.k]
        which = {"grouping": choice.grouping, "router": choice.router, "k": choice.k, **params}
        ratio = choice.coverage / best.coverage
        records += [
            Record("coverage", which, choice.coverage, "share", best.coverage, ratio),
            Record("perplexity", which, choice.perplexity, "perplexity", best.perplexity),
        ]
    return records


def _print_choices(
    choices: Sequence[Choice], ks: Sequence[int], experts: int, dense: float
) -> None:
    """One line for each grouping and router: coverage at every k, then perplexity at every k."""
    print(f"experts per token, of {experts}; by chance k experts cover k/{experts}")
    print(f"{'':28}" + "coverage".center(9 * len(ks)) + "   " + "perplexity".center(9 * len(ks)))
    heads = "".join(f"{k:>9}" for k in ks)
    print(f"{'neurons grouped by':20}{'router':8}{heads}   {heads}")
    for start in range(0, len(choices), len(ks)):
        line = choices[start : start + len(ks)]
        coverages = "".join(f"{c.coverage:>9.1%}" for c in line)
        perplexities = "".join(f"{c.perplexity:>9.2f}" for c in line)
        print(f"{line[0].grouping:20}{line[0].router:8}{coverages}   {perplexities}")
    print(f"{'(dense)':28}{'100.0%':>9}{'':{9 * len(ks) - 9}}   {dense:>9.2f}")


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, default=STARTER, help="checkpoint directory")
    parser.add_argument("--data", type=Path, nargs="*", default=[], help="text files or folders")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--fit-tokens", type=int, default=16384)
    parser.add_argument("--test-tokens", type=int, default=8192)
    parser.add_argument("--seed", type=int, default=0, help="of the clusterings")
    parser.add_argument("--k", type=int, nargs="+", default=KS, help="experts per token")
    parser.add_argument("--no-timing", action="store_true", help="skip the first table")
    parser.add_argument("--json", type=Path, help="write the records to this file")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables; with --json, keep the records."""
    options = _arguments(arguments)
    print(f"{MACHINE}, {torch.get_num_threads()} threads, torch {VERSIONS['torch']}")
    records: list[Record] = []
    if not options.no_timing:
        print(f"{'rows':>6}{'width':>7}{'experts':>9}{'':>10}{'inertia':>10}{'seconds':>10}")
        for record in time_clustering(SHAPES, options.device):
            p = record.params
            records.append(record)
            print(
                f"{p['F']:>6}{p['D']:>7}{p['E']:>9}{p['rows']:>10}{p['inertia']:>10.4f}"
                f"{record.value:>10.2f}",
                flush=True,
            )
    loaded = checkpoint.load(options.model, options.device, "float32")
    fit, test = batches_of(
        loaded, options.data, options.fit_tokens, options.test_tokens, options.device
    )
    fit_BL = [inputs_BL for inputs_BL, _ in fit]
    choices = compare(loaded.model, fit_BL, test, options.k, options.seed)
    dense = evaluate(loaded.model, test, ExpertPolicy.dense()).perplexity
    params: dict[str, object] = {
        "model": loaded.fingerprint[:12],
        "fit_tokens": sum(ids.numel() for ids in fit_BL),
        "test_tokens": sum(ids.numel() for ids, _ in test),
        "seed": options.seed,
        "dense_perplexity": dense,
    }
    print(f"\n{options.model.name}: {params['fit_tokens']:,} tokens to fit, ", end="")
    print(f"{params['test_tokens']:,} others to test")
    _print_choices(choices, options.k, loaded.config.experts.num_experts, dense)
    if options.json is not None:
        write_records(options.json, records + choice_records(choices, params))


if __name__ == "__main__":
    main()
