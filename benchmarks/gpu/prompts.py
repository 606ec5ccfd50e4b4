"""The section `prompts` of benchmarks/gpu: what large prompts run on, checked, then compared.

First the checks: products by TMA and attention over the paged cache against float64, and a captured
prompt step against the same step launched. Then rivals, the one in use first, each checked against
its result: the products of `many_tokens` with and without TMA in several tiles, the sum over slots,
attention of a chunk, the router's scores. `share of dense product` rows relate the useful
operations to the square product's rate of the same run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.kernels import (
    CHOSEN,
    EXPERTS,
    LIMITS,
    Case,
    Ceilings,
    Problem,
    Sizes,
    problem,
    random_pairs,
    weight_sets,
)
from benchmarks.gpu.model import (
    BLOCK,
    BenchmarkPrompts,
    Shape,
    launched_call,
    random_model,
    set_experts,
)
from benchmarks.gpu.tiles import Blocks, brief, compare, compare_calls, params_of
from benchmarks.gpu.timing import DEVICE, Call, check, interleaved_us, relative_error
from benchmarks.records import Record
from engine.gpu.attention import attend_chunks
from engine.gpu.attention.rotate_and_store import rotate_and_store
from engine.gpu.ffn import many_tokens, product_blocks, products
from engine.gpu.ffn.products import Pairs
from engine.gpu.routing import choose_many
from engine.gpu.routing.pairs import sort_pairs
from engine.gpu.routing.rule import Choice
from engine.model.attention import KVCache, PagedAttend, SequenceSpan, rotate
from engine.policy import ExpertPolicy
from engine.serving.request import Request, SamplingParams
from engine.serving.scheduler import Plan, Scheduled

# (computed before, to compute now) of each sequence
Lengths = Sequence[tuple[int, int]]

# --- correctness ---------------------------------------------------------------------------------


def check_products(width: int, neurons: int, tokens: int, dtype: torch.dtype) -> list[Record]:
    """The products by TMA against the reference in float64."""
    x_TD = torch.randn(tokens, width, device=DEVICE).to(dtype)
    up_FD, down_FD = (
        (torch.randn(neurons, width, device=DEVICE) / width**0.5).to(dtype) for _ in range(2)
    )
    if not products.supports_tma(x_TD, neurons // EXPERTS):
        return []
    pairs = random_pairs(tokens, "independent")
    wide = x_TD.double(), up_FD.double(), down_FD.double()
    expected = many_tokens.ffn_reference(*wide, pairs, "relu")
    label = f"D={width} F={neurons} T={tokens} {str(dtype).removeprefix('torch.')}"
    y_TD = many_tokens.ffn(x_TD, up_FD, down_FD, pairs, "relu", tma=True)
    return [check(f"many_tokens by TMA {label}", relative_error(y_TD, expected), LIMITS[dtype])]


class Chunks:
    """Random heads of several sequences over a cache whose blocks are scattered."""

    def __init__(self, heads: tuple[int, int, int], lengths: Lengths, dtype: torch.dtype) -> None:
        q_heads, kv_heads, width = heads
        most = max(-(-(before + n) // BLOCK) for before, n in lengths)
        order = torch.randperm(len(lengths) * most).view(len(lengths), most)
        self.table_BM = order.int().to(DEVICE)
        self.cache = KVCache(1, len(lengths) * most, BLOCK, kv_heads, width, dtype, DEVICE)
        self.cache.slots.normal_()
        self.spans: list[SequenceSpan] = []
        for (before, n), blocks in zip(lengths, order.tolist(), strict=True):
            self.spans.append(SequenceSpan(self.tokens, n, before + n, blocks))
        shape = (self.tokens, q_heads + 2 * kv_heads, width)
        self.heads_TNd = torch.randn(shape, device=DEVICE).to(dtype)
        angles_Tc = torch.randn(self.tokens, width // 2, device=DEVICE)
        self.turns = angles_Tc.cos(), angles_Tc.sin()
        self.usual = attend_chunks.chunk_blocks(q_heads // kv_heads, width, dtype.itemsize)
        inside = torch.arange(BLOCK, device=DEVICE)
        slots = (self.table_BM[:, :, None] * BLOCK + inside).flatten(1).long()
        self._slots = [slots[b, : span.context] for b, span in enumerate(self.spans)]
        self._slots_T = torch.cat(
            [s[-span.length :] for s, span in zip(self._slots, self.spans, strict=True)]
        )

    @property
    def tokens(self) -> int:
        return sum(span.length for span in self.spans)

    def pieces(self, block_q: int) -> Tensor:
        spans = [(s.start, s.length, s.context - s.length) for s in self.spans]
        pieces = attend_chunks.cut(spans, self.tokens, block_q)
        return torch.tensor(pieces, dtype=torch.int32, device=DEVICE)

    def gathered(self, _: int = 0) -> Tensor:
        """PyTorch's attention over each sequence's gathered context."""
        keys, values = self.cache.slots[0]
        q_THd = rotate_and_store(self.heads_TNd, *self.turns, keys, values, self._slots_T)
        out_THd = torch.empty_like(q_THd)
        for span, slots in zip(self.spans, self._slots, strict=True):
            rows = slice(span.start, span.start + span.length)
            out_THd[rows] = PagedAttend.chunk(q_THd[rows], keys[slots], values[slots])
        return out_THd

    def paged(self, blocks: dict[str, int], pieces_N4: Tensor, _: int = 0) -> Tensor:
        """The engine's attention, cache writes included too."""
        keys, values = self.cache.slots[0]
        q_THd = rotate_and_store(self.heads_TNd, *self.turns, keys, values, self._slots_T)
        return attend_chunks.attend_chunks(
            q_THd, keys, values, self.table_BM, pieces_N4, BLOCK, blocks
        )


def check_attention(heads: tuple[int, int, int], dtype: torch.dtype) -> list[Record]:
    """Chunks, contexts and decoding rows in one batch against the reference in float64."""
    case = Chunks(heads, [(0, 5), (40, 1), (100, 170), (0, 1)], dtype)
    pieces_N4 = case.pieces(case.usual["BLOCK_Q"])
    found = case.paged(case.usual, pieces_N4)
    keys, values = case.cache.slots[0].double()  # written by now
    q_THd = rotate(case.heads_TNd[:, : heads[0]], *case.turns).double()
    expected = attend_chunks.attend_chunks_reference(
        q_THd, keys, values, case.table_BM, pieces_N4, BLOCK
    )
    label = f"{heads} {str(dtype).removeprefix('torch.')}"
    return [check(f"attend_chunks {label}", relative_error(found, expected), LIMITS[dtype])]


# Small, and in float32: a rounded score may choose another expert, and both steps be right.
CHECKED = Shape("checked", 64, 2, 256, 4, 300, ((8, 2),))


@torch.inference_mode()
def check_step(shape: Shape, steps: Sequence[Lengths]) -> list[Record]:
    """Captured steps of chunks and decoding rows against the same steps launched."""
    model = random_model(shape).float()
    experts, chosen = shape.experts[0]
    set_experts(model, experts)
    caches = [new_cache(shape, 16) for _ in range(2)]
    graphs = BenchmarkPrompts(model, caches[0], 4, 64, 128, experts)
    found = []
    for policy in (ExpertPolicy.dense(), ExpertPolicy.top_k(chosen)):
        for lengths in steps:
            plan = plan_of(policy, lengths)
            key = graphs.key(plan)
            assert key is not None
            replayed, _ = graphs.run(plan, key)
            launched = launched_call(model, caches[1], plan, experts)(0)
            assert isinstance(launched, Tensor)
            label = f"prompt graph {policy} {lengths}"
            found.append(check(label, relative_error(replayed, launched), 1e-4))
            error = relative_error(caches[0].slots, caches[1].slots)
            found.append(check(f"{label} cache", error, 1e-4))
    return found


def new_cache(shape: Shape, blocks: int) -> KVCache:
    """Of a model of this shape; contexts that nobody computed are the same in each."""
    width = shape.width // shape.heads
    cache = KVCache(shape.layers, blocks, BLOCK, shape.heads, width, torch.float32, DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(0)
    cache.slots.normal_(generator=generator)
    return cache


def plan_of(policy: ExpertPolicy, lengths: Lengths) -> Plan:
    """Requests with so many tokens computed, and so many to compute now, on blocks of their own."""
    plan: Plan = []
    used = 0
    for i, (before, count) in enumerate(lengths):
        prompt = [1 + (31 * i + 7 * j) % 290 for j in range(before + count)]
        request = Request(str(i), prompt, SamplingParams(), policy, seed=0)
        request.num_computed = before
        blocks = -(-len(prompt) // BLOCK)
        request.blocks = list(range(used, used + blocks))
        used += blocks
        plan.append(Scheduled(request, count))
    return plan


# --- rivals --------------------------------------------------------------------------------------

# Pairs, neurons, columns, warps, stages of products by TMA.
GATHER_TMA = (
    (128, 256, 64, 8, 3),
    (128, 256, 64, 8, 4),
    (64, 256, 64, 8, 4),
    (64, 256, 64, 8, 5),
    (64, 256, 64, 4, 4),
    (128, 128, 64, 8, 5),
    (128, 128, 128, 8, 3),
    (64, 128, 64, 4, 4),
)
SPREAD_TMA = (
    (128, 64, 256, 8, 3),
    (128, 64, 256, 8, 4),
    (64, 64, 256, 8, 4),
    (128, 64, 128, 4, 3),
    (128, 128, 128, 8, 3),
)
# The same products without.
GATHER_PLAIN = ((64, 256, 64, 8, 4), (64, 256, 64, 8, 5), (128, 256, 64, 8, 4))
SPREAD_PLAIN = ((128, 64, 256, 8, 4), (128, 32, 256, 8, 4), (128, 64, 256, 8, 3))


def compare_products(
    name: str,
    case: Problem,
    run: Callable[[Blocks, bool], Call],
    plain: list[Blocks],
    by_tma: list[Blocks],
) -> list[Record]:
    """One product with and without TMA, the blocks in use without it first."""
    rivals = [(brief(blocks), run(blocks, False)) for blocks in plain]
    if products.supports_tma(case.x_TD, case.expert_size):
        rivals += [(f"TMA {brief(blocks)}", run(blocks, True)) for blocks in by_tma]
    expected = rivals[0][1](0)
    assert isinstance(expected, Tensor)
    return compare_calls(name, params_of(case), rivals, len(case.weights), expected, 5e-3)


def gather_case(case: Problem) -> list[Record]:
    """The first product in every way."""
    pairs = Pairs.of(case.pairs)

    def run(blocks: Blocks, tma: bool) -> Call:
        return lambda i: products.gather(
            case.x_TD,
            case.weights[i % len(case.weights)][0],
            pairs,
            "relu",
            tma=tma,
            blocks=blocks,
        )

    usual = product_blocks.gather_blocks(pairs.mean_pairs, case.expert_size, 2)
    plain = [usual, *(product_blocks.product_blocks(*sizes) for sizes in GATHER_PLAIN)]
    by_tma = [product_blocks.product_blocks(*sizes) for sizes in GATHER_TMA]
    return compare_products("gather", case, run, plain, by_tma)


def spread_case(case: Problem) -> list[Record]:
    """The second product in every way."""
    pairs = Pairs.of(case.pairs)
    h_PS = products.gather(case.x_TD, case.weights[0][0], pairs, "relu")

    def run(blocks: Blocks, tma: bool) -> Call:
        return lambda i: products.spread_to_slots(
            h_PS, case.weights[i % len(case.weights)][1], pairs, tma=tma, blocks=blocks
        )

    def blocks_of(sizes: tuple[int, ...]) -> Blocks:
        return {**product_blocks.product_blocks(*sizes), "WHOLE": False}

    plain = [product_blocks.spread_blocks(pairs.mean_pairs), *map(blocks_of, SPREAD_PLAIN)]
    return compare_products("spread", case, run, plain, [blocks_of(s) for s in SPREAD_TMA])


def combine_case(case: Problem) -> list[Record]:
    """The sum over slots."""
    tokens, width = case.x_TD.shape
    shape = (4, tokens, CHOSEN, width)
    slots = torch.randn(shape, device=DEVICE).bfloat16().unbind(0)

    def run(blocks: dict[str, int]) -> Call:
        return lambda i: products.combine(slots[i % 4], case.pairs.ids_TK, None, blocks)

    usual = product_blocks.combine_blocks(width)
    sizes = ((128, 1), (256, 2), (512, 2), (512, 4), (1024, 4))
    others = [{"BLOCK_K": 8, "BLOCK_D": d, "num_warps": w} for d, w in sizes if d <= width]
    return compare("combine", params_of(case), [usual, *others], run, 4)


def ffn_case(case: Problem, kind: str, ceilings: Ceilings) -> list[Record]:
    """The FFN of many tokens, as in use and without TMA, and its share of the dense rate."""
    plain = partial(case.many_tokens, tma=False)
    rivals: list[tuple[str, Call]] = [("in use", case.many_tokens), ("without TMA", plain)]
    params = {**params_of(case), "routing": kind}
    expected = case.many_tokens(0)
    found = compare_calls("many_tokens", params, rivals, len(case.weights), expected, 2e-2)
    useful = 4.0 * case.x_TD.numel() * CHOSEN * case.expert_size
    rate = ceilings.measure()[1]
    return found + [
        Record("share of dense product", record.params, useful / record.value / rate, "ratio")
        for record in found
        if not record.name.endswith("best")
    ]


CHUNK_BLOCKS = ((128, 64, 8, 3), (128, 64, 4, 3), (128, 128, 8, 3), (64, 64, 4, 3), (64, 128, 4, 3))


def attention_case(heads: tuple[int, int, int], lengths: Lengths) -> list[Record]:
    """Chunks over the paged cache: through the table, or gathered for PyTorch's kernel."""
    case = Chunks(heads, lengths, torch.bfloat16)
    usual = partial(case.paged, case.usual, case.pieces(case.usual["BLOCK_Q"]))
    rivals: list[tuple[str, Call]] = [("in use", usual), ("gathered", case.gathered)]
    for rows, keys, warps, stages in CHUNK_BLOCKS:
        blocks = {**case.usual, "BLOCK_Q": rows // case.usual["BLOCK_H"], "BLOCK_N": keys}
        blocks |= {"num_warps": warps, "num_stages": stages}
        rivals.append((brief(blocks), partial(case.paged, blocks, case.pieces(blocks["BLOCK_Q"]))))
    params: dict[str, Any] = {"heads": heads[0], "kv_heads": heads[1], "d": heads[2]}
    params |= {"sequences": len(lengths), "tokens": case.tokens, "before": lengths[-1][0]}
    return compare_calls("chunk attention", params, rivals, 8, case.gathered(), 2e-2)


# Tokens, columns, warps, stages
SCORE_BLOCKS = (
    (16, 128, 2, 3),
    (32, 64, 4, 3),
    (32, 128, 8, 3),
    (64, 64, 4, 3),
    (128, 64, 8, 3),
    (64, 128, 8, 2),
)


def routing_case(case: Problem) -> list[Record]:
    """The parts of the routing of many tokens, and other tiles for its scores."""
    routers = [torch.randn_like(case.router_ED) for _ in range(8)]
    pieces_TNE = choose_many.score_pieces(case.x_TD, routers[0])

    def choose(_: int) -> object:
        return choose_many.choose_pieces(pieces_TNE, *case.limits, CHOSEN)

    def sort(_: int) -> object:
        return sort_pairs(Choice(case.pairs.chosen_TE, case.pairs.ids_TK))

    def scores(blocks: dict[str, int]) -> Call:
        return lambda i: choose_many.score_pieces(case.x_TD, routers[i % 8], blocks)

    usual = choose_many.scores_blocks(EXPERTS, 2)
    tiles = [usual]
    for rows, columns, warps, stages in SCORE_BLOCKS:
        changed = {"BLOCK_T": rows, "BLOCK_D": columns, "num_warps": warps, "num_stages": stages}
        tiles.append({**usual, **changed})
    rivals = [(brief(blocks), scores(blocks)) for blocks in tiles]
    params = params_of(case)
    found = compare_calls("scores", params, rivals, 8, pieces_TNE, 1e-5)
    same = [
        brief(blocks) for blocks in tiles if torch.equal(_as_tensor(scores(blocks)), pieces_TNE)
    ]
    print(f"scores of the same bits: {', '.join(same)}")
    choose_us, sort_us = interleaved_us([choose, sort], calls=8)
    found.append(Record("routing choose", params, choose_us, "us"))
    return [*found, Record("routing sort", params, sort_us, "us")]


def _as_tensor(call: Call) -> Tensor:
    found = call(0)
    assert isinstance(found, Tensor)
    return found


def check_cases(sizes: Sizes) -> Iterator[Case]:
    """The section `prompt-check`."""
    yield "check step", partial(check_step, CHECKED, sizes.steps)
    for dtype in sizes.types:
        for heads in sizes.checked_heads:
            yield f"check attention {heads} {dtype}", partial(check_attention, heads, dtype)
        for width, neurons, tokens in sizes.checked:
            if dtype != torch.float32 and width % 8 == 0 and neurons // EXPERTS % 16 == 0:
                label = f"check products D={width} T={tokens} {dtype}"
                yield label, partial(check_products, width, neurons, tokens, dtype)


def cases(sizes: Sizes) -> Iterator[Case]:
    """The section `prompts`."""
    ceilings = Ceilings(sizes)
    for width, neurons in reversed(sizes.shapes[-2:]):
        weights = weight_sets(width, neurons)
        for tokens in sorted(t for t in sizes.prompts)[::-1]:
            for kind in ("independent", "shared"):
                case = problem(weights, tokens, kind)
                label = f"prompts D={width} tokens={tokens} {kind}"
                yield f"{label} ffn", partial(ffn_case, case, kind, ceilings)
            case = problem(weights, tokens, "independent")
            yield f"{label} gather", partial(gather_case, case)
            yield f"{label} spread", partial(spread_case, case)
            yield f"{label} combine", partial(combine_case, case)
            yield f"{label} routing", partial(routing_case, case)
        del weights
    for heads in sizes.heads:
        for lengths in sizes.chunks:
            yield f"attention {heads} {lengths}", partial(attention_case, heads, lengths)
