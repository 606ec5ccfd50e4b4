"""The sections `check` and `kernels` of benchmarks/gpu: single kernels, correct, then timed.

A graph holds one call on each of enough weight sets to exceed the L2 cache three times, so weights
come from memory as they do in a model of many layers; weights are random, never zeros.

The peer is the dense FFN in PyTorch, relu(x @ up.T) @ down, over all neurons. A sparse row uses 6
of 32 experts, either the same 6 for all tokens ("shared") or drawn for each token by itself
("independent"): real routing lies between. Random activations silence half of the neurons, and the
few-token kernel does not read the rows of `down` of silenced neurons. `way` rows are what the
engine runs for that number of tokens, routing included, beside the dense FFN without any.

"share of copy" rows relate the bytes of the experts that were chosen, all of their rows counted, to
the copy bandwidth of the same run; "share of dense product" rows the useful operations to the
square product's rate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.timing import DEVICE, Call, check, interleaved_us, relative_error
from benchmarks.records import Record
from engine.gpu.arrivals import Arrivals
from engine.gpu.attention import attend_step
from engine.gpu.ffn import all_experts, few_tokens, many_tokens, used_experts
from engine.gpu.ffn.cheapest_way import FFNShape, cheapest_way
from engine.gpu.routing.choose_few import MOST_TOKENS, choose_few
from engine.gpu.routing.choose_many import choose_many, choose_many_reference
from engine.gpu.routing.pairs import SortedPairs, sort_pairs, sort_pairs_reference
from engine.gpu.routing.rule import Choice, choose_scores_reference
from engine.model.rotary import rope_table

Case = tuple[str, Callable[[], list[Record]]]

EXPERTS, CHOSEN = 32, 6
L2_BYTES = 60e6
ARRIVALS = Arrivals(torch.device(DEVICE))


@dataclass(frozen=True)
class Sizes:
    """What is measured; `TINY` is for trying the code out."""

    shapes: tuple[tuple[int, int], ...] = ((768, 3072), (2048, 8192), (4096, 16384))
    checked: tuple[tuple[int, int, int], ...] = (
        (100, 32 * 24, 1),
        (100, 32 * 24, 33),
        (768, 3072, 16),
        (2048, 8192, 8),
        (2048, 8192, 700),
    )
    tokens: tuple[int, ...] = (1, 2, 4, 8, 16, 64, 512, 2048)
    prompts: tuple[int, ...] = (512, 2048)
    chunks: tuple[tuple[tuple[int, int], ...], ...] = (
        ((0, 512),),
        ((0, 2048),),
        ((1536, 512),),
        (*tuple((255, 1) for _ in range(64)), (0, 448)),
    )
    steps: tuple[tuple[tuple[int, int], ...], ...] = (((0, 60), (7, 1)), ((30, 21), (0, 43)))
    few: int = 16
    copied: int = 2**28
    product: int = 8192
    attention: tuple[tuple[int, int], ...] = ((1, 256), (16, 256), (64, 256), (16, 4096))
    heads: tuple[tuple[int, int, int], ...] = ((32, 32, 64), (32, 8, 128))
    checked_heads: tuple[tuple[int, int, int], ...] = ((8, 8, 64), (8, 2, 128), (4, 4, 20))
    checked_contexts: tuple[int, ...] = (1, 17, 300)
    types: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)


FULL = Sizes()
TINY = Sizes(
    shapes=((16, 32 * 16),),
    checked=((24, 32 * 16, 2),),
    tokens=(1, 2),
    prompts=(3,),
    chunks=(((0, 3), (4, 1)),),
    steps=(((0, 4), (7, 1)),),
    few=1,
    copied=2**10,
    product=32,
    attention=((2, 9),),
    heads=((4, 2, 8),),
    checked_heads=((4, 2, 8),),
    checked_contexts=(1, 5),
    types=(torch.bfloat16,),
)


@dataclass(frozen=True)
class Problem:
    """Inputs of one shape: enough weight sets to miss the L2 cache, and one choice of experts."""

    weights: list[tuple[Tensor, Tensor]]
    x_TD: Tensor
    router_ED: Tensor
    pairs: SortedPairs
    limits: tuple[Tensor, Tensor]

    @property
    def expert_size(self) -> int:
        return int(self.weights[0][0].shape[0]) // EXPERTS

    def few_tokens(self, i: int) -> Tensor:
        up_FD, down_FD = self.weights[i % len(self.weights)]
        return few_tokens.ffn(
            self.x_TD, up_FD, down_FD, self.pairs.ids_TK, self.expert_size, "relu", ARRIVALS
        )

    def used_experts(self, i: int) -> Tensor:
        up_FD, down_FD = self.weights[i % len(self.weights)]
        return used_experts.ffn(self.x_TD, up_FD, down_FD, self.pairs.chosen_TE, "relu")

    def many_tokens(self, i: int, tma: bool | None = None) -> Tensor:
        up_FD, down_FD = self.weights[i % len(self.weights)]
        return many_tokens.ffn(self.x_TD, up_FD, down_FD, self.pairs, "relu", tma=tma)

    def dense(self, i: int) -> Tensor:
        up_FD, down_FD = self.weights[i % len(self.weights)]
        return (self.x_TD @ up_FD.T).relu_() @ down_FD

    def all_experts(self, i: int) -> Tensor:
        up_FD, down_FD = self.weights[i % len(self.weights)]
        return all_experts.ffn(self.x_TD, up_FD, down_FD, self.pairs.chosen_TE, "relu")

    def routed(self, way: str, i: int) -> object:
        """A way as the engine runs it: scores and choice are computed, though not used here."""
        if self.x_TD.shape[0] <= MOST_TOKENS:
            choose_few(self.x_TD, self.router_ED, *self.limits, CHOSEN, ARRIVALS)
        else:
            choose_many(self.x_TD, self.router_ED, *self.limits, CHOSEN)
        if way == "many_tokens":
            sort_pairs(Choice(self.pairs.chosen_TE, self.pairs.ids_TK))
        return self.ways[way](i)

    @property
    def ways(self) -> dict[str, Call]:
        """By the names of `cheapest_way`."""
        return {
            "few_tokens": self.few_tokens,
            "used_experts": self.used_experts,
            "many_tokens": self.many_tokens,
            "all_experts": self.all_experts,
        }


def weight_sets(width: int, neurons: int) -> list[tuple[Tensor, Tensor]]:
    """Random [F, D] pairs whose chosen rows alone exceed the L2 cache three times."""
    used = 4 * width * neurons * CHOSEN / EXPERTS
    count = min(64, max(2, round(3 * L2_BYTES / used))) if DEVICE == "cuda" else 1
    return [
        (
            torch.randn(neurons, width, device=DEVICE).bfloat16() / width**0.5,
            torch.randn(neurons, width, device=DEVICE).bfloat16() / neurons**0.5,
        )
        for _ in range(count)
    ]


def random_pairs(tokens: int, kind: str) -> SortedPairs:
    """6 of 32 experts a token: drawn for each, or the same for all."""
    scores_TE = torch.randn(1 if kind == "shared" else tokens, EXPERTS, device=DEVICE)
    scores_TE = scores_TE.expand(tokens, EXPERTS).contiguous()
    return sort_pairs_reference(choose_scores_reference(scores_TE, *limits(tokens), CHOSEN))


def limits(tokens: int) -> tuple[Tensor, Tensor]:
    k_T = torch.full((tokens,), CHOSEN, dtype=torch.int32, device=DEVICE)
    return k_T, torch.full((tokens,), 2.0, device=DEVICE)


def problem(weights: list[tuple[Tensor, Tensor]], tokens: int, kind: str) -> Problem:
    x_TD = torch.randn(tokens, weights[0][0].shape[1], device=DEVICE).bfloat16()
    router_ED = torch.randn(EXPERTS, x_TD.shape[1], device=DEVICE)
    return Problem(weights, x_TD, router_ED, random_pairs(tokens, kind), limits(tokens))


# --- correctness ---------------------------------------------------------------------------------


LIMITS = {torch.float32: 5e-6, torch.bfloat16: 1.2e-2, torch.float16: 2e-3}


def check_ffn(width: int, neurons: int, tokens: int, dtype: torch.dtype) -> list[Record]:
    """Every way, plain and with gates and biases, against the reference in float64."""
    x_TD = torch.randn(tokens, width, device=DEVICE).to(dtype)
    up_FD, down_FD, gate_FD = (
        (torch.randn(neurons, width, device=DEVICE) / width**0.5).to(dtype) for _ in range(3)
    )
    biases = [torch.randn(n, device=DEVICE).to(dtype) for n in (neurons, width)]
    pairs = random_pairs(tokens, "independent")
    label = f"D={width} F={neurons} T={tokens} {str(dtype).removeprefix('torch.')}"
    found = []
    for name, extra in (
        ("", {}),
        (" full", {"gate_FD": gate_FD, "up_bias_F": biases[0], "down_bias_D": biases[1]}),
    ):
        expected = many_tokens.ffn_reference(
            x_TD.double(),
            up_FD.double(),
            down_FD.double(),
            pairs,
            "relu",
            **{key: tensor.double() for key, tensor in extra.items()},
        )
        results = {"many_tokens": many_tokens.ffn(x_TD, up_FD, down_FD, pairs, "relu", **extra)}
        if tokens <= 64:
            size = neurons // EXPERTS
            results["few_tokens"] = few_tokens.ffn(
                x_TD, up_FD, down_FD, pairs.ids_TK, size, "relu", ARRIVALS, **extra
            )
        if tokens <= used_experts.MOST_TOKENS and not extra:
            results["used_experts"] = used_experts.ffn(
                x_TD, up_FD, down_FD, pairs.chosen_TE, "relu"
            )
        if not extra:
            results["all_experts"] = all_experts.ffn(x_TD, up_FD, down_FD, pairs.chosen_TE, "relu")
        found += [
            check(f"{way}{name} {label}", relative_error(y_TD, expected), LIMITS[dtype])
            for way, y_TD in results.items()
        ]
    return found


def check_attention(
    heads: tuple[int, int, int], contexts: Sequence[int], dtype: torch.dtype
) -> Record:
    """Decoding over scattered blocks against the reference in float64."""
    case = PagedCase(heads, contexts, dtype)
    keys, values = case.layers[0].double()
    expected = attend_step.attend_step_reference(
        case.heads_BNd.double(),
        *case.tables,
        keys,
        values,
        case.slots_B,
        case.table_BM,
        case.contexts_B,
        case.SIZE,
    )
    label = f"attend_step {heads} {list(contexts)} {str(dtype).removeprefix('torch.')}"
    return check(label, relative_error(case.step(0), expected), LIMITS[dtype])


def check_routing(tokens: int, width: int, experts: int) -> Record:
    """Integer inputs make scores exact, so that the choice must be identical."""
    x_TD = torch.randint(-2, 3, (tokens, width), device=DEVICE).bfloat16()
    router_ED = torch.randint(-2, 3, (experts, width), device=DEVICE) / 16
    k_T = torch.randint(1, CHOSEN + 1, (tokens,), dtype=torch.int32, device=DEVICE)
    mass_T = torch.rand(tokens, device=DEVICE) * 1.5
    actual, again = (
        sort_pairs(choose_many(x_TD, router_ED, k_T, mass_T, CHOSEN)) for _ in range(2)
    )
    expected = sort_pairs_reference(choose_many_reference(x_TD, router_ED, k_T, mass_T, CHOSEN))
    differing = [
        name
        for name, a, b, c in zip(actual._fields, actual, expected, again, strict=True)
        if not (torch.equal(a, b) and torch.equal(a, c))
    ]
    label = f"routing E={experts} D={width} T={tokens} differing fields {differing}"
    return check(label, float(len(differing)), 0.0)


def checks(sizes: Sizes) -> Iterator[Case]:
    """Every kernel against its reference."""
    widths = [(width, 32) for width, _, _ in sizes.checked]
    for tokens in sorted({tokens for _, _, tokens in sizes.checked}):
        for width, experts in {*widths, (100, 12)}:
            yield f"routing {tokens}", lambda t=tokens, w=width, e=experts: [check_routing(t, w, e)]  # type: ignore[misc]
    for dtype in sizes.types:
        for case in sizes.checked:
            yield f"ffn {case} {dtype}", partial(check_ffn, *case, dtype)
        for heads in sizes.checked_heads:
            yield (
                f"attention {heads} {dtype}",
                lambda h=heads, d=dtype: [check_attention(h, sizes.checked_contexts, d)],  # type: ignore[misc]
            )


# --- measurements --------------------------------------------------------------------------------


class Ceilings:
    """What this device copies and multiplies at most, as PyTorch reaches it; measured once.

    The copy is an elementwise kernel: replayed from a graph, `copy_` is slower than that.
    """

    def __init__(self, sizes: Sizes) -> None:
        self._sizes = sizes
        self._found: tuple[float, float] | None = None

    def measure(self) -> tuple[float, float]:
        """Bytes and operations per microsecond."""
        if self._found is None:
            n = self._sizes.product
            source = torch.randn(self._sizes.copied, device=DEVICE).bfloat16()
            target = torch.empty_like(source)
            a, b = (torch.randn(n, n, device=DEVICE).bfloat16() for _ in range(2))
            copy_us, product_us = interleaved_us(
                [lambda _: torch.neg(source, out=target), lambda _: torch.mm(a, b)], calls=4
            )
            self._found = 2 * source.numel() * 2 / copy_us, 2 * n**3 / product_us
        return self._found

    def records(self) -> list[Record]:
        bandwidth, rate = self.measure()
        return [
            Record(
                "ceiling copy bandwidth", {"bytes": 2 * self._sizes.copied}, bandwidth / 1e6, "TB/s"
            ),
            Record("ceiling dense product", {"n": self._sizes.product}, rate / 1e6, "TFLOP/s"),
        ]


def ffn_records(case: Problem, kind: str, few: bool, ceilings: Ceilings) -> list[Record]:
    """Every way against the dense FFN for one number of tokens."""
    width, neurons = case.x_TD.shape[1], case.weights[0][0].shape[0]
    tokens, size = case.x_TD.shape[0], case.expert_size
    rivals: dict[str, Call] = {
        "dense": case.dense,
        "many_tokens": case.many_tokens,
        "all_experts": case.all_experts,
    }
    if few:
        rivals["few_tokens"] = case.few_tokens
    if tokens <= used_experts.MOST_TOKENS:
        rivals["used_experts"] = case.used_experts
    shape = FFNShape(width, EXPERTS, size, 2)
    way = cheapest_way(shape, tokens, CHOSEN)
    rivals["way " + way] = partial(case.routed, way)
    of = dict(zip(rivals, interleaved_us(list(rivals.values()), len(case.weights)), strict=True))
    params: dict[str, Any] = {"D": width, "F": neurons, "E": EXPERTS, "k": CHOSEN}
    params |= {"tokens": tokens, "routing": kind, "dtype": "bf16"}
    found = [
        Record(name, params, us, "us", of["dense"], of["dense"] / us)
        for name, us in of.items()
        if name != "dense"
    ]
    bandwidth, rate = ceilings.measure()
    used = float(case.pairs.chosen_TE.any(0).sum()) * shape.expert_bytes
    useful = tokens * CHOSEN * shape.pair_flops
    for name in ("few_tokens", "used_experts", "many_tokens"):
        if name in of and tokens <= 16:
            share = used / of[name] / bandwidth
            found.append(Record(f"{name} share of copy", params, share, "ratio"))
        if name in of and tokens >= 512:
            share = useful / of[name] / rate
            found.append(Record(f"{name} share of dense product", params, share, "ratio"))
    return found


def routing_records(width: int, sizes: Sizes) -> list[Record]:
    """The whole routing, and the part that few tokens need; the peer is scores and top-k alone."""
    routers = [torch.randn(EXPERTS, width, device=DEVICE) / width**0.5 for _ in range(8)]
    found = []
    for tokens in sizes.tokens[::2]:
        x_TD = torch.randn(tokens, width, device=DEVICE).bfloat16()
        k_T, mass_T = limits(tokens)

        def select(i: int, x_TD: Tensor = x_TD, k_T: Tensor = k_T, m: Tensor = mass_T) -> object:
            return choose_many(x_TD, routers[i % 8], k_T, m, CHOSEN)

        def route(i: int, x_TD: Tensor = x_TD, k_T: Tensor = k_T, m: Tensor = mass_T) -> object:
            return sort_pairs(choose_many(x_TD, routers[i % 8], k_T, m, CHOSEN))

        def step(i: int, x_TD: Tensor = x_TD, k_T: Tensor = k_T, m: Tensor = mass_T) -> object:
            return choose_few(x_TD, routers[i % 8], k_T, m, CHOSEN, ARRIVALS)

        def top_k(i: int, x_TD: Tensor = x_TD) -> object:
            return torch.topk(x_TD.float() @ routers[i % 8].T, CHOSEN)

        rivals = {"select": select, "route": route}
        if tokens <= MOST_TOKENS:
            rivals["step"] = step
        *ours, peer_us = interleaved_us([*rivals.values(), top_k], calls=16)
        params: dict[str, Any] = {
            "D": width,
            "E": EXPERTS,
            "k": CHOSEN,
            "tokens": tokens,
            "router": "fp32",
        }
        found += [
            Record(f"routing {name}", params, us, "us", peer_us, peer_us / us)
            for name, us in zip(rivals, ours, strict=True)
        ]
    return found


class PagedCase:
    """Random heads over a cache whose blocks are scattered, in as many layers as miss the L2."""

    SIZE = 16

    def __init__(
        self, heads: tuple[int, int, int], contexts: Sequence[int], dtype: torch.dtype
    ) -> None:
        q_heads, kv_heads, width = heads
        self.heads, self.batch, self.longest = heads, len(contexts), max(contexts)
        most = -(-self.longest // self.SIZE)
        slots = most * self.batch * self.SIZE
        used = 4 * slots * kv_heads * width
        count = min(32, max(1, round(3 * L2_BYTES / used))) if DEVICE == "cuda" else 1
        shape = (count, 2, slots, kv_heads, width)
        self.layers = torch.randn(shape, device=DEVICE).to(dtype)
        order = torch.randperm(most * self.batch, device=DEVICE)
        self.table_BM = order.view(self.batch, most).int()
        self.contexts_B = torch.tensor(contexts, dtype=torch.int32, device=DEVICE)
        num_heads = q_heads + 2 * kv_heads
        self.heads_BNd = torch.randn(self.batch, num_heads, width, device=DEVICE).to(dtype)
        cos, sin = rope_table(self.longest, width, 1e4)
        self.tables = cos.to(DEVICE), sin.to(DEVICE)
        last_B = self.contexts_B.long() - 1
        blocks_B = self.table_BM.gather(1, last_B[:, None] // self.SIZE)[:, 0]
        self.slots_B = (blocks_B * self.SIZE + last_B % self.SIZE).int()

    def step(self, i: int) -> Tensor:
        keys, values = self.layers[i % len(self.layers)]
        return attend_step.attend_step(
            self.heads_BNd,
            *self.tables,
            keys,
            values,
            self.slots_B,
            self.table_BM,
            self.contexts_B,
            self.SIZE,
            self.longest,
            ARRIVALS,
        )

    def plain(self, i: int) -> Tensor:
        """PyTorch's attention, as if each context lay in one piece: no table, no masks."""
        k, v = (
            t.view(self.batch, -1, *t.shape[1:]).transpose(1, 2)
            for t in self.layers[i % len(self.layers)]
        )
        gqa = self.heads[0] != self.heads[1]
        q_BHnd = self.heads_BNd[:, : self.heads[0], None]
        return F.scaled_dot_product_attention(q_BHnd, k, v, enable_gqa=gqa)


def attention_records(
    heads: tuple[int, int, int], batch: int, context: int, ceilings: Ceilings
) -> list[Record]:
    """Rotation, writes and paged attention in one launch against PyTorch's attention alone."""
    case = PagedCase(heads, [context] * batch, torch.bfloat16)
    ours, peer = interleaved_us([case.step, case.plain], calls=len(case.layers))
    params = {"heads": heads[0], "kv_heads": heads[1], "d": heads[2], "batch": batch}
    params["context"] = context
    share = 4 * batch * context * heads[1] * heads[2] / ours / ceilings.measure()[0]
    return [
        Record("attend_step", params, ours, "us", peer, peer / ours),
        Record("attend_step share of copy", params, share, "ratio"),
    ]


def cases(sizes: Sizes) -> Iterator[Case]:
    """The section `kernels`."""
    ceilings = Ceilings(sizes)
    yield "ceilings", ceilings.records
    for width, neurons in sizes.shapes:
        weights = weight_sets(width, neurons)
        for kind in ("shared", "independent"):
            for tokens in sizes.tokens:

                def ffn(
                    weights: list[tuple[Tensor, Tensor]] = weights,
                    tokens: int = tokens,
                    kind: str = kind,
                ) -> list[Record]:
                    few = tokens <= sizes.few
                    return ffn_records(problem(weights, tokens, kind), kind, few, ceilings)

                yield f"ffn D={width} {kind} tokens={tokens}", ffn
        del weights
    for width, _ in sizes.shapes:
        yield f"routing D={width}", partial(routing_records, width, sizes)
    for batch, context in sizes.attention:
        for heads in sizes.heads:
            yield (
                f"attention batch={batch} context={context}",
                partial(attention_records, heads, batch, context, ceilings),
            )
