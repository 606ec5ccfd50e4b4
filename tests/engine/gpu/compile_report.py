"""Compile every kernel for sm_80 or sm_90 without a GPU and print what the compiler made of it.

Usage: python compile_report.py ARCH, with the repository root on PYTHONPATH and TRITON_INTERPRET
unset: under the interpreter the kernels are no compilable functions, hence a process of its own.

Prints one JSON object: for each "kernel dtype" a record of registers, stack and local memory in
bytes (both zero unless registers spill), shared memory in bytes, and counts of the instructions
that matter. Arguments carry the alignment that a launch with these sizes would find.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from engine.gpu import add_norm, thin_linear
from engine.gpu._triton import next_power_of_2
from engine.gpu.attention import attend_chunks, attend_step, rotate_and_store
from engine.gpu.ffn import all_experts, few_tokens, product_blocks, products, used_experts
from engine.gpu.routing import choose_few, choose_many, choose_top_k, pairs, rule

D, S, E, K, T = 2048, 256, 32, 6, 2048
N = 8
# One for each choice of block that the width of an expert makes.
TRAINED_SIZES = (32, 128, 256, 512)
INTS = {
    "num_tokens": T,
    "num_experts": E,
    "d_model": D,
    "expert_size": S,
    "max_k": K,
    "pieces": N,
    "capacity": T * K,
    "blocks_per_pair": 32,
    "num_tiles": 128,
    "num_chunks": 8,
    "columns": D,
    "splits": 2,
    "most_blocks": 128,
    "most_splits": 8,
    "block_size": 16,
    "group": 4,
    "head_dim": 64,
    "q_heads": 32,
    "kv_heads": 8,
    "half": 32,
    "neurons": E * S,
    "outputs": D,
    "elements": T * D,
    "shares": 16,
    "pieces_per_slot": 4,
}
POINTERS = {
    "chosen_ptr": "i1",
    **dict.fromkeys(("pieces_ptr", "scores_ptr", "mass_ptr", "partial_ptr"), "fp32"),
    **dict.fromkeys(("k_ptr", "ids_ptr", "counts_ptr", "chunk_counts_ptr"), "i32"),
    **dict.fromkeys(("offsets_ptr", "pair_token_ptr", "pair_slot_ptr", "tiles_ptr"), "i32"),
    **dict.fromkeys(("table_ptr", "contexts_ptr", "slot_ptr", "spans_ptr"), "i32"),
    **dict.fromkeys(("cos_ptr", "sin_ptr", "stats_ptr"), "fp32"),
    **dict.fromkeys(("arrived_ptr", "list_ptr"), "i32"),
}
FLOATS = ("scale", "epsilon", "threshold")
# What a descriptor fetches at once, where a case passes it instead of a pointer.
DESCRIPTORS = {"h": ("BLOCK_P", "BLOCK_S"), "w": ("BLOCK_S", "BLOCK_D")}
# Chained launches are for Hopper and newer; ARCH is the first argument.
CHAINED = sys.argv[1:] == ["90"]
PATTERNS = {
    "wide_loads": r"ld\.global\.(?:\w+\.)*v4\.b32|cp\.async\.c[ag]\.shared\.global .*0x10",
    "loads": r"ld\.global|cp\.async\.c[ag]",
    "mma": r"mma\.sync|wgmma\.mma_async",
    "wgmma": r"wgmma\.mma_async",
    "tma": r"cp\.async\.bulk\.tensor",
}


def cases() -> list[tuple[str, Any, dict[str, Any], str]]:
    """(name, kernel, constants, dtype of the untyped pointers) at the sizes above."""
    found: list[tuple[str, Any, dict[str, Any], str]] = [
        ("choose", choose_many._choose_kernel, rule.choose_token_blocks(E, N, K), "fp32"),
        ("choose 512", choose_many._choose_kernel, rule.choose_token_blocks(512, N, 16), "fp32"),
        ("list tiles", products._list_tiles_kernel, product_blocks.list_tiles_blocks(E), "i32"),
    ]
    for experts in (E, 64, 512):
        blocks, sort = pairs.chunk_blocks(experts), pairs.sort_blocks(2048)
        fill = {**sort, "BLOCK_E": next_power_of_2(experts), "BLOCK_K": 8}
        found += [
            (f"pick {experts}", choose_top_k._pick_kernel, blocks, "fp32"),
            (f"place {experts}", pairs._place_kernel, blocks, "i32"),
            (f"count {experts}", pairs._count_kernel, sort, "i32"),
            (
                f"fill {experts}",
                pairs._fill_kernel,
                fill,
                "i32",
            ),
        ]
    for dtype, itemsize in (("bf16", 2), ("fp32", 4)):
        found += [
            ("scores", choose_many._scores_kernel, choose_many.scores_blocks(E, itemsize), dtype),
            ("combine", products._combine_kernel, product_blocks.combine_blocks(D), dtype),
            ("add norm", add_norm._add_norm_kernel, add_norm.add_norm_blocks(D), dtype),
            ("add norm 5120", add_norm._add_norm_kernel, add_norm.add_norm_blocks(5120), dtype),
            ("activate", all_experts._activate_kernel, all_experts.activate_blocks(), dtype),
        ]
        found += [(name, *rest, dtype) for name, *rest in attention_cases(itemsize)]
        found += [(name, *rest, dtype) for name, *rest in step_cases(itemsize)]
        found += [(name, *rest, dtype) for name, *rest in serving_cases(itemsize)]
        for size in TRAINED_SIZES:
            found += [(f"{n} {size}", *rest, dtype) for n, *rest in training_cases(size, itemsize)]
    return found


def attention_cases(itemsize: int) -> list[tuple[str, Any, dict[str, Any]]]:
    """The paged cache's kernels, as (name, kernel, constants)."""
    found = [
        ("rotate", rotate_and_store._rotate_store_kernel, rotate_and_store.rotate_blocks(48, 64)),
    ]
    for group in (1, 4):
        for width in (64, 128, 256):
            blocks = {"PAGE": 16, **attend_chunks.chunk_blocks(group, width, itemsize)}
            kernel = attend_chunks._attend_chunks_kernel
            found.append((f"chunks {group}x{width}", kernel, blocks))
            for batch in (1, 16):
                step = attend_step.step_blocks(batch, group, width, itemsize)
                name = f"attend {batch} {group}x{width}"
                found.append((name, attend_step._attend_step_kernel, {**step, "CHAINED": CHAINED}))
    return found


SERVING = {"LISTED": False, "PRECISION": "ieee", "BLOCK_E": E}


def serving_cases(itemsize: int) -> list[tuple[str, Any, dict[str, Any]]]:
    """The products over pairs that a prompt takes, as (name, kernel, constants)."""
    found = []
    for mean in (12, 96, 384) if itemsize == 2 else (384,):
        up = {**product_blocks.gather_blocks(mean, S, itemsize), **SERVING}
        down = {**product_blocks.spread_blocks(mean), **SERVING}
        found += [
            (f"up {mean}", products._gather_kernel, up),
            (f"down {mean}", products._spread_kernel, down),
        ]
    many = product_blocks.gather_blocks(384, S, itemsize, gated=True)
    full = {**many, **SERVING, "GATED": True, "BIASED": True}
    return [*found, ("up full", products._gather_kernel, full)]


def tma_cases() -> list[tuple[str, Any, dict[str, Any], str]]:
    """The same products where weights come by TMA, as `cases`."""
    found: list[tuple[str, Any, dict[str, Any], str]] = []
    for mean in (96, 384):
        up = {**product_blocks.tma_gather_blocks(mean, S), **SERVING, "TMA": True}
        found.append((f"tma up {mean}", products._gather_kernel, up, "bf16"))
    down = {**product_blocks.tma_spread_blocks(S), **SERVING, "WALKS": True}
    return [*found, ("tma down", products._spread_kernel, down, "bf16")]


def step_cases(itemsize: int) -> list[tuple[str, Any, dict[str, Any]]]:
    """The kernels of a decoding step, as (name, kernel, constants)."""
    chained = {"CHAINED": CHAINED}
    rows, normed = {**few_tokens.row_blocks(D), **chained}, {"NORMED": True}
    down = {**few_tokens.second_blocks(S), **chained}
    full = {"GATED": True, "BIASED": True}
    found = [
        ("thin", thin_linear._thin_linear_kernel, {**rows, **normed}),
        ("few first", few_tokens._first_kernel, {**rows, **normed}),
        ("few first full", few_tokens._first_kernel, {**rows, **full}),
        ("few second", few_tokens._second_kernel, down),
        ("few second full", few_tokens._second_kernel, {**down, "ADDED": True, **full}),
        ("sum", used_experts._sum_shares_kernel, {**used_experts.sum_blocks(16), **chained}),
    ]
    for experts in (E, 64, 512):
        blocks = choose_few.choose_few_blocks(experts, D, K)
        blocks = {**blocks, **normed, **chained}
        found.append((f"choose few {experts}", choose_few._choose_few_kernel, blocks))
    for tokens in (8, 16, used_experts.MOST_TOKENS) if itemsize == 2 else ():  # as `cheapest_way`
        lists = {"BLOCK_L": 8, "BLOCK_E": 512}
        tiles = {**used_experts.first_blocks(tokens), **lists, **chained}
        found.append((f"used first {tokens}", used_experts._first_kernel, tiles))
        tiles = {**used_experts.second_blocks(tokens), **chained}
        found.append((f"used second {tokens}", used_experts._second_kernel, tiles))
    return found


def training_cases(size: int, itemsize: int) -> list[tuple[str, Any, dict[str, Any]]]:
    """The products of training for experts of this size, as (name, kernel, constants)."""
    order = {
        "LISTED": True,
        "BLOCK_E": E,
        "PRECISION": "ieee" if itemsize == 2 else "tf32x3",
    }
    forward, backward = (
        {
            **product_blocks.listed_gather_blocks(size, itemsize, backward=b),
            **order,
            "BACKWARD": b,
        }
        for b in (False, True)
    )
    spread = {**product_blocks.listed_spread_blocks(size, itemsize), **order}
    weights = {**product_blocks.weights_blocks(size, itemsize), **order}
    return [
        ("gather", products._gather_kernel, forward),
        ("gather back", products._gather_kernel, {**backward, "SQUARE": True}),
        ("spread", products._spread_kernel, spread),
        ("weights", products._weights_kernel, weights),
    ]


def source(kernel: Any, constants: dict[str, Any], dtype: str) -> tuple[ASTSource, dict[str, int]]:
    """The kernel with a launch's signature and alignments, and its compile options."""
    options = {k: v for k, v in constants.items() if k in ("num_warps", "num_stages")}
    switches = (
        "SQUARE",
        "FAT",
        "BOTH",
        "WIDEN",
        "GATED",
        "BIASED",
        "ADDED",
        "RECTIFIED",
        "NORMED",
        "CHAINED",
        "BACKWARD",
        "TMA",
        "WALKS",
    )
    constexprs = {**dict.fromkeys((*switches, "CHAINED"), False), **constants}
    constexprs = {k: v for k, v in constexprs.items() if k in kernel.arg_names}
    by_tma = constexprs.get("TMA") or constexprs.get("WALKS")
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constexprs:
            signature[name] = "constexpr"
        elif name in DESCRIPTORS and by_tma:
            shape = ", ".join(str(constexprs[size]) for size in DESCRIPTORS[name])
            signature[name] = f"tensordesc<{dtype}[{shape}]>"
        elif name in INTS:
            signature[name] = "i32"
        elif name in FLOATS:
            signature[name] = "fp32"
        else:
            signature[name] = "*" + POINTERS.get(name, dtype)
        plain = name not in FLOATS and not signature[name].startswith(("constexpr", "tensordesc"))
        if plain and INTS.get(name, 16) % 16 == 0:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constexprs, attributes), options


def resources(cubin: bytes) -> dict[str, int]:
    """Registers, stack, shared and local memory of a cubin's kernel, as cuobjdump reports them."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run(
            [tool, "-res-usage", path], check=True, capture_output=True, text=True
        ).stdout
    found = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text))
    return {name.lower(): int(value) for name, value in found.items()}


def report(arch: int) -> dict[str, dict[str, int]]:
    """Compile every case for one architecture."""
    records = {}
    for name, kernel, constants, dtype in cases() + (tma_cases() if arch >= 90 else []):
        ast, options = source(kernel, constants, dtype)
        compiled = triton.compile(ast, target=GPUTarget("cuda", arch, 32), options=options)
        counts = {key: len(re.findall(p, compiled.asm["ptx"])) for key, p in PATTERNS.items()}
        records[f"{name} {dtype}"] = {
            **resources(compiled.asm["cubin"]),
            **counts,
            "shared": compiled.metadata.shared,
        }
    return records


if __name__ == "__main__":
    print(json.dumps(report(int(sys.argv[1])), indent=1))
