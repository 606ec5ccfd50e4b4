"""The section `tiles` of benchmarks/gpu: other tiles than those the kernels take, timed.

One row a candidate, its peer the tile in use today; the fastest of a group is named in a last row.
A candidate that does not compile or does not fit is reported and left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import Tensor

from benchmarks.gpu.kernels import (
    ARRIVALS,
    Case,
    Problem,
    Sizes,
    problem,
    weight_sets,
)
from benchmarks.gpu.timing import Call, interleaved_us, relative_error
from benchmarks.records import Record
from engine.gpu.ffn import few_tokens, product_blocks, products, used_experts
from engine.gpu.ffn.products import Pairs

Blocks = dict[str, int]


FEW_FIRST = ((4096, 2), (4096, 4), (8192, 4), (8192, 8), (16384, 8))
FEW_SECOND = (
    (32, 64, 64, 1),
    (64, 32, 64, 1),
    (64, 64, 64, 1),
    (64, 64, 64, 2),
    (128, 32, 64, 1),
    (128, 32, 64, 2),
    (128, 64, 64, 2),
    (128, 64, 64, 4),
    (256, 32, 64, 2),
)


def few_first_candidates(width: int) -> list[Blocks]:
    """Tiles of `first_product`: elements of a program, warps."""
    usual = few_tokens.row_blocks(width)
    block_d = usual["BLOCK_D"]
    found = [usual]
    for elements, warps in FEW_FIRST:
        rows = max(1, elements // block_d)
        candidate = {"BLOCK_N": rows, "BLOCK_D": block_d, "num_warps": warps}
        found += [] if candidate in found else [candidate]
    return found


def few_second_candidates(size: int) -> list[Blocks]:
    """Tiles of `second_product`: neurons and columns of a program, pieces added at once, warps."""
    found = [few_tokens.second_blocks(size)]
    for sizes in FEW_SECOND:
        names = ("BLOCK_S", "BLOCK_D", "BLOCK_C", "num_warps")
        candidate = dict(zip(names, sizes, strict=True))
        found += [] if candidate in found or sizes[0] > size else [candidate]
    return found


USED_FIRST = (
    (64, 64, 4, 5),
    (64, 128, 4, 3),
    (64, 128, 4, 5),
    (64, 256, 4, 3),
    (128, 64, 8, 4),
    (128, 128, 8, 3),
    (32, 128, 4, 5),
    (32, 256, 4, 4),
)
USED_SECOND = (
    (64, 128, 4, 6, 0),
    (64, 128, 4, 8, 0),
    (64, 64, 4, 6, 0),
    (64, 64, 4, 8, 0),
    (32, 128, 4, 8, 0),
    (128, 64, 4, 6, 0),
    (128, 128, 8, 4, 0),
    (64, 128, 4, 6, 4),
    (64, 64, 4, 6, 4),
    (64, 256, 8, 6, 0),
)


GATHER_FEW = ((16, 16, 128, 4, 4), (16, 16, 256, 4, 3), (16, 32, 128, 4, 5), (16, 32, 256, 4, 3))
GATHER_MANY = (
    (64, 128, 64, 4, 3),
    (64, 256, 64, 8, 3),
    (128, 128, 64, 4, 4),
    (128, 128, 64, 8, 4),
    (128, 256, 64, 8, 4),
    (128, 256, 32, 8, 4),
)
SPREAD_FEW = ((16, 32, 64, 4, 4), (16, 64, 64, 4, 4), (16, 64, 128, 4, 3), (16, 128, 64, 4, 3))
SPREAD_MANY = (
    (64, 64, 128, 4, 3),
    (64, 64, 256, 8, 3),
    (128, 32, 128, 4, 4),
    (128, 64, 128, 4, 3),
    (128, 64, 128, 8, 4),
    (128, 64, 256, 8, 3),
)


def compare(
    name: str,
    params: dict[str, Any],
    candidates: list[Blocks],
    run: Callable[[Blocks], Call],
    n: int,
) -> list[Record]:
    """A record for each candidate against the first, which is in use, and the fastest."""
    rivals = [(brief(blocks), run(blocks)) for blocks in candidates]
    return compare_calls(f"tile {name}", params, rivals, n)


def compare_calls(
    name: str,
    params: dict[str, Any],
    rivals: list[tuple[str, Call]],
    n: int,
    expected: Tensor | None = None,
    limit: float = 0.0,
) -> list[Record]:
    """A record for each rival against the first, and the fastest; `n` calls make a graph.

    One that fails, or whose first result is further from `expected` than `limit`, is left out.
    """
    working: list[tuple[str, Call]] = []
    for label, call in rivals:
        try:
            found = call(0)
            if expected is not None:
                assert isinstance(found, Tensor)
                error = relative_error(found, expected)
                assert error <= limit, f"relative error {error:.3g}"
            working.append((label, call))
        except Exception as error:  # whatever a compiler may raise; the others still count
            print(f"left out {name} {label}: {type(error).__name__}: {str(error)[:160]}")
    times = interleaved_us([call for _, call in working], calls=n)
    records = [
        Record(name, {**params, "tile": label}, us, "us", times[0], times[0] / us)
        for (label, _), us in zip(working, times, strict=True)
    ]
    best = min(records, key=lambda record: record.value)
    return [*records, Record(f"{name} best", best.params, best.value, "us", times[0], best.ratio)]


def brief(blocks: Blocks) -> str:
    """Like "S8 D2048 w8"."""
    short = {"num_warps": "w", "num_stages": "s"}
    parts = (
        f"{short.get(key, key.removeprefix('BLOCK_'))}{int(value)}" for key, value in blocks.items()
    )
    return " ".join(parts)


def few_case(case: Problem, candidates: list[Blocks], part: str) -> list[Record]:
    """Tiles of `first_product` or `second_product`."""
    ids_TK, size = case.pairs.ids_TK, case.expert_size
    hidden = [
        few_tokens.first_product(case.x_TD, up, ids_TK, size, "relu") for up, _ in case.weights
    ]

    def run(blocks: Blocks) -> Call:
        def call(i: int) -> object:
            i %= len(hidden)
            up_FD, down_FD = case.weights[i]
            if part == "first":
                return few_tokens.first_product(
                    case.x_TD, up_FD, ids_TK, size, "relu", blocks=blocks
                )
            return few_tokens.second_product(hidden[i], down_FD, ids_TK, ARRIVALS, blocks=blocks)

        return call

    return compare(f"few_tokens {part}", params_of(case), candidates, run, len(case.weights))


def used_case(case: Problem, part: str) -> list[Record]:
    """Tiles of the products over used experts; the other product keeps its own."""
    tokens = case.x_TD.shape[0]
    shape = (
        used_experts.first_blocks(tokens) if part == "first" else used_experts.second_blocks(tokens)
    )
    names = (
        "BLOCK_N" if part == "first" else "BLOCK_S",
        "BLOCK_D",
        "num_warps",
        "num_stages",
        "shares",
    )
    tiles: tuple[tuple[int, ...], ...] = USED_FIRST if part == "first" else USED_SECOND
    candidates = [shape, *({**shape, **dict(zip(names, t, strict=False))} for t in tiles)]

    def run(blocks: Blocks) -> Call:
        tile = {key: value for key, value in blocks.items() if key != "shares"}
        options: dict[str, Any] = {part: tile, "shares": blocks.get("shares") or None}

        def call(i: int) -> object:
            up_FD, down_FD = case.weights[i % len(case.weights)]
            chosen_TE = case.pairs.chosen_TE
            return used_experts.ffn(case.x_TD, up_FD, down_FD, chosen_TE, "relu", **options)

        return call

    return compare(f"used_experts {part}", params_of(case), candidates, run, len(case.weights))


def gather_case(case: Problem, tiles: tuple[tuple[int, ...], ...]) -> list[Record]:
    """Tiles of `gather`, in serving."""
    pairs = Pairs.of(case.pairs)
    usual = product_blocks.gather_blocks(pairs.mean_pairs, case.expert_size, 2)

    def run(blocks: Blocks) -> Call:
        return lambda i: products.gather(
            case.x_TD, case.weights[i % len(case.weights)][0], pairs, "relu", blocks=blocks
        )

    candidates = [usual, *(product_blocks.product_blocks(*sizes) for sizes in tiles)]
    return compare("gather", params_of(case), candidates, run, len(case.weights))


def spread_case(case: Problem, tiles: tuple[tuple[int, ...], ...]) -> list[Record]:
    """Tiles of `spread`, in serving."""
    pairs = Pairs.of(case.pairs)
    usual = product_blocks.spread_blocks(pairs.mean_pairs)
    h_PS = products.gather(case.x_TD, case.weights[0][0], pairs, "relu")

    def run(blocks: Blocks) -> Call:
        return lambda i: products.spread_to_slots(
            h_PS, case.weights[i % len(case.weights)][1], pairs, blocks=blocks
        )

    candidates = [usual, *({**product_blocks.product_blocks(*s), "WHOLE": False} for s in tiles)]
    return compare("spread", params_of(case), candidates, run, len(case.weights))


def params_of(case: Problem) -> dict[str, Any]:
    return {"D": case.x_TD.shape[1], "tokens": case.x_TD.shape[0]}


def cases(sizes: Sizes) -> Iterator[Case]:
    """The section `tiles`."""
    for width, neurons in sizes.shapes[-2:]:
        weights = weight_sets(width, neurons)
        for tokens in (t for t in sizes.tokens if t in (1, 4)):
            case = problem(weights, tokens, "independent")
            label = f"tiles D={width} tokens={tokens}"
            yield (
                f"{label} few first",
                partial(few_case, case, few_first_candidates(width), "first"),
            )
            seconds = few_second_candidates(case.expert_size)
            yield f"{label} few second", partial(few_case, case, seconds, "second")
        for tokens in (t for t in sizes.tokens if t in (2, 16, 64)):
            case = problem(weights, tokens, "independent")
            for part in ("first", "second"):
                label = f"tiles D={width} tokens={tokens} used {part}"
                yield label, partial(used_case, case, part)
        for tokens in (t for t in sizes.tokens if t in (2, 8, 64)):
            case = problem(weights, tokens, "independent")
            yield f"tiles D={width} tokens={tokens} gather", partial(gather_case, case, GATHER_FEW)
            yield f"tiles D={width} tokens={tokens} spread", partial(spread_case, case, SPREAD_FEW)
        for tokens in (t for t in sizes.tokens if t >= 512):
            case = problem(weights, tokens, "independent")
            yield f"tiles D={width} tokens={tokens} gather", partial(gather_case, case, GATHER_MANY)
            yield f"tiles D={width} tokens={tokens} spread", partial(spread_case, case, SPREAD_MANY)
