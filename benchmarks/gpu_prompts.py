"""The section `prompts` of benchmarks/gpu.py: what large prompts run on, checked, then compared.

First the checks: products by TMA and attention over the paged cache against float64, and a captured
prompt step against the same step launched. Then rivals, the one in use first, each checked against
its result: the products of `grouped_ffn` and `grouped_tma` in several tiles, the sum over slots,
attention of a chunk, the router's scores. `share of dense product` rows relate the useful
operations to the square product's rate of the same run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from engine.gpu.attention.paged_kv import rotate_and_store
from torch import Tensor

from benchmarks import gpu_tiles
from benchmarks.gpu_kernels import (
    CHOSEN,
    EXPERTS,
    LIMITS,
    Case,
    Ceilings,
    Problem,
    Sizes,
    problem,
    random_routing,
    weight_sets,
)
from benchmarks.gpu_model import (
    BLOCK,
    BenchmarkPrompts,
    Shape,
    launched_call,
    random_model,
    set_experts,
)
from benchmarks.gpu_tiles import brief, compare_calls, params_of
from benchmarks.gpu_timing import DEVICE, Call, check, interleaved_us, relative_error
from benchmarks.records import Record
from engine.gpu.attention import paged_prefill
from engine.gpu.attention.batches import KernelAttend
from engine.gpu.ffn import grouped_ffn, grouped_tma
from engine.gpu.routing import routing
from engine.model.attention import KVCache, SequenceSpan, rotate
from engine.serving.request import ExpertPolicy, Request, SamplingParams
from engine.serving.scheduler import Plan, Scheduled

# (computed before, to compute now) of each sequence
Lengths = Sequence[tuple[int, int]]

# --- correctness ---------------------------------------------------------------------------------


def check_products(width: int, neurons: int, tokens: int, dtype: torch.dtype) -> list[Record]:
    """The products by TMA against the reference in float64, one program a tile and walking."""
    x_TD = torch.randn(tokens, width, device=DEVICE).to(dtype)
    up_FD, down_FD = (
        (torch.randn(neurons, width, device=DEVICE) / width**0.5).to(dtype) for _ in range(2)
    )
    routed = random_routing(tokens, "independent")
    wide = x_TD.double(), up_FD.double(), down_FD.double()
    expected = grouped_ffn.grouped_ffn_reference(*wide, routed, "relu")
    label = f"D={width} F={neurons} T={tokens} {str(dtype).removeprefix('torch.')}"
    found = []
    for per_sm in (0, 1):
        up = {**grouped_tma.up_blocks(tokens, neurons // EXPERTS), "per_sm": per_sm}
        down = {**grouped_tma.down_blocks(neurons // EXPERTS), "per_sm": per_sm}
        h_PS, slot_P = grouped_tma.up_product(x_TD, up_FD, routed, "relu", up)
        slots_TKD = grouped_tma.down_product(h_PS, slot_P, down_FD, routed, down)
        error = relative_error(grouped_ffn.combine(slots_TKD, routed.ids_TK), expected)
        found.append(check(f"grouped_tma per_sm={per_sm} {label}", error, LIMITS[dtype]))
    return found


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
        self.usual = paged_prefill.prefill_blocks(q_heads // kv_heads, width, dtype.itemsize)
        self._launched = KernelAttend.of_spans(self.cache, self.spans, self.turns)

    @property
    def tokens(self) -> int:
        return sum(span.length for span in self.spans)

    def pieces(self, block_q: int) -> Tensor:
        spans = [(s.start, s.length, s.context - s.length) for s in self.spans]
        pieces = paged_prefill.cut(spans, self.tokens, block_q)
        return torch.tensor(pieces, dtype=torch.int32, device=DEVICE)

    def launched(self, _: int = 0) -> Tensor:
        """As without a graph: contexts gathered for PyTorch's kernel, decoding rows apart."""
        return self._launched(0, self.heads_TNd)

    def paged(self, blocks: dict[str, int], pieces_N4: Tensor, _: int = 0) -> Tensor:
        """As in a graph, cache writes included too."""
        keys, values = self.cache.slots[0]
        slots_T = self._launched._slots_T
        q_THd = rotate_and_store(self.heads_TNd, *self.turns, keys, values, slots_T)
        table_BM = self.table_BM
        return paged_prefill.paged_prefill(q_THd, keys, values, table_BM, pieces_N4, BLOCK, blocks)


def check_attention(heads: tuple[int, int, int], dtype: torch.dtype) -> list[Record]:
    """Chunks, contexts and decoding rows in one batch against the reference in float64."""
    case = Chunks(heads, [(0, 5), (40, 1), (100, 170), (0, 1)], dtype)
    pieces_N4 = case.pieces(case.usual["BLOCK_Q"])
    found = case.paged(case.usual, pieces_N4)
    keys, values = case.cache.slots[0].double()  # written by now
    q_THd = rotate(case.heads_TNd[:, : heads[0]], *case.turns).double()
    expected = paged_prefill.paged_prefill_reference(
        q_THd, keys, values, case.table_BM, pieces_N4, BLOCK
    )
    label = f"{heads} {str(dtype).removeprefix('torch.')}"
    return [check(f"paged_prefill {label}", relative_error(found, expected), LIMITS[dtype])]


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

# Pairs, neurons, columns, warps, stages, programs a multiprocessor; see `grouped_tma.tile`.
UP_TMA = (
    (128, 256, 64, 8, 3, 0),
    (128, 256, 64, 8, 4, 0),
    (128, 256, 64, 8, 3, 1),
    (128, 256, 64, 8, 4, 1),
    (64, 256, 64, 8, 4, 0),
    (64, 256, 64, 8, 5, 0),
    (64, 256, 64, 8, 4, 1),
    (64, 256, 64, 4, 4, 0),
    (128, 128, 64, 8, 5, 0),
    (128, 128, 64, 8, 5, 1),
    (128, 128, 128, 8, 3, 0),
    (64, 128, 64, 4, 4, 0),
)
DOWN_TMA = (
    (128, 64, 256, 8, 3, 0),
    (128, 64, 256, 8, 4, 0),
    (128, 64, 256, 8, 3, 1),
    (128, 64, 256, 8, 4, 1),
    (128, 128, 256, 8, 2, 0),
    (64, 64, 256, 8, 4, 0),
    (64, 64, 256, 8, 4, 1),
    (128, 64, 128, 4, 3, 0),
    (128, 64, 128, 4, 3, 2),
    (128, 64, 128, 4, 4, 0),
    (128, 128, 128, 8, 3, 1),
    (64, 64, 128, 4, 4, 0),
)
# The same products without TMA, in tiles that were not compared before.
UP_PLAIN = ((64, 256, 64, 8, 4), (64, 256, 64, 8, 5), (128, 256, 64, 8, 4))
DOWN_PLAIN = ((128, 64, 256, 8, 4), (128, 32, 256, 8, 4), (128, 64, 256, 8, 3))


def _walking(sizes: tuple[int, ...]) -> dict[str, int]:
    return grouped_tma.tile(*sizes[:-1], per_sm=sizes[-1])


def up_case(case: Problem) -> list[Record]:
    """The first product in every way."""
    pairs = -(-case.x_TD.shape[0] * CHOSEN // EXPERTS)
    usual = grouped_ffn.up_blocks(pairs, case.expert_size, 2)

    def plain(blocks: dict[str, int]) -> Call:
        return lambda i: grouped_ffn.up_product(
            case.x_TD, case.weights[i % len(case.weights)][0], case.routing, "relu", blocks=blocks
        )

    def by_tma(blocks: dict[str, int]) -> Call:
        return lambda i: grouped_tma.up_product(
            case.x_TD, case.weights[i % len(case.weights)][0], case.routing, "relu", blocks
        )[0]

    rivals = [(brief(b), plain(b)) for b in (usual, *(grouped_ffn.tile(*s) for s in UP_PLAIN))]
    rivals += [(f"TMA {brief(b)}", by_tma(b)) for b in map(_walking, UP_TMA)]
    expected = plain(usual)(0)
    assert isinstance(expected, Tensor)
    return compare_calls("up", params_of(case), rivals, len(case.weights), expected, 5e-3)


def down_case(case: Problem) -> list[Record]:
    """The second product in every way."""
    pairs = -(-case.x_TD.shape[0] * CHOSEN // EXPERTS)
    usual = grouped_ffn.down_blocks(pairs)
    h_PS, slot_P = grouped_tma.up_product(case.x_TD, case.weights[0][0], case.routing, "relu")

    def plain(blocks: dict[str, int]) -> Call:
        return lambda i: grouped_ffn.down_product(
            h_PS, case.weights[i % len(case.weights)][1], case.routing, blocks
        )

    def by_tma(blocks: dict[str, int]) -> Call:
        return lambda i: grouped_tma.down_product(
            h_PS, slot_P, case.weights[i % len(case.weights)][1], case.routing, blocks
        )

    tiles = [usual, *({**grouped_ffn.tile(*s), "BLOCK_K": 8} for s in DOWN_PLAIN)]
    rivals = [(brief(b), plain(b)) for b in tiles]
    rivals += [(f"TMA {brief(b)}", by_tma(b)) for b in map(_walking, DOWN_TMA)]
    expected = plain(usual)(0)
    assert isinstance(expected, Tensor)
    return compare_calls("down", params_of(case), rivals, len(case.weights), expected, 5e-3)


def combine_case(case: Problem) -> list[Record]:
    """The sum over slots."""
    tokens, width = case.x_TD.shape
    shape = (4, tokens, CHOSEN, width)
    slots = torch.randn(shape, device=DEVICE).bfloat16().unbind(0)

    def run(blocks: dict[str, int]) -> Call:
        return lambda i: grouped_ffn.combine(slots[i % 4], case.routing.ids_TK, None, blocks)

    usual = grouped_ffn.combine_blocks(width)
    sizes = ((128, 1), (256, 2), (512, 2), (512, 4), (1024, 4))
    others = [{"BLOCK_K": 8, "BLOCK_D": d, "num_warps": w} for d, w in sizes if d <= width]
    return gpu_tiles.compare("combine", params_of(case), [usual, *others], run, 4)


def ffn_case(case: Problem, kind: str, ceilings: Ceilings) -> list[Record]:
    """The whole grouped FFN, as in use and by TMA, and its share of the dense product's rate."""

    def by_tma(i: int) -> Tensor:
        up_FD, down_FD = case.weights[i % len(case.weights)]
        h_PS, slot_P = grouped_tma.up_product(case.x_TD, up_FD, case.routing, "relu")
        slots_TKD = grouped_tma.down_product(h_PS, slot_P, down_FD, case.routing)
        return grouped_ffn.combine(slots_TKD, case.routing.ids_TK)

    rivals: list[tuple[str, Call]] = [("in use", case.grouped), ("TMA", by_tma)]
    params = {**params_of(case), "routing": kind}
    found = compare_calls("grouped_ffn", params, rivals, len(case.weights), case.grouped(0), 2e-2)
    useful = 4.0 * case.x_TD.numel() * CHOSEN * case.expert_size
    rate = ceilings.measure()[1]
    return found + [
        Record("share of dense product", record.params, useful / record.value / rate, "ratio")
        for record in found
        if not record.name.endswith("best")
    ]


CHUNK_BLOCKS = ((128, 64, 8, 3), (128, 64, 4, 3), (128, 128, 8, 3), (64, 64, 4, 3), (64, 128, 4, 3))


def attention_case(heads: tuple[int, int, int], lengths: Lengths) -> list[Record]:
    """Chunks over the paged cache: gathered for PyTorch's kernel, or through the table."""
    case = Chunks(heads, lengths, torch.bfloat16)
    rivals: list[tuple[str, Call]] = [("launched", case.launched)]
    for rows, keys, warps, stages in CHUNK_BLOCKS:
        blocks = {**case.usual, "BLOCK_Q": rows // case.usual["BLOCK_H"], "BLOCK_N": keys}
        blocks |= {"num_warps": warps, "num_stages": stages}
        rivals.append((brief(blocks), partial(case.paged, blocks, case.pieces(blocks["BLOCK_Q"]))))
    params: dict[str, Any] = {"heads": heads[0], "kv_heads": heads[1], "d": heads[2]}
    params |= {"sequences": len(lengths), "tokens": case.tokens, "before": lengths[-1][0]}
    return compare_calls("chunk attention", params, rivals, 8, case.launched(), 2e-2)


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
    pieces_TNE = routing.score_pieces(case.x_TD, routers[0])

    def choose(_: int) -> object:
        return routing.choose(pieces_TNE, *case.limits, CHOSEN)

    def sort(_: int) -> object:
        return routing.sort_pairs(routing.Choice(case.routing.chosen_TE, case.routing.ids_TK))

    def scores(blocks: dict[str, int]) -> Call:
        return lambda i: routing.score_pieces(case.x_TD, routers[i % 8], blocks)

    usual = routing.scores_blocks(EXPERTS, 2)
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
            yield f"{label} up", partial(up_case, case)
            yield f"{label} down", partial(down_case, case)
            yield f"{label} combine", partial(combine_case, case)
            yield f"{label} routing", partial(routing_case, case)
        del weights
    for heads in sizes.heads:
        for lengths in sizes.chunks:
            yield f"attention {heads} {lengths}", partial(attention_case, heads, lengths)
