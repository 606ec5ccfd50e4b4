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
from engine.gpu.attention import attend_step, paged_kv, paged_prefill
from engine.gpu.ffn import (
    expert_ffn,
    grouped_ffn,
    grouped_pairs,
    grouped_tma,
    masked_ffn,
    union_ffn,
)
from engine.gpu.routing import route_step, routing, sharing, top_k

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
    **dict.fromkeys(("chosen_ptr", "read_ptr", "taken_ptr", "used_ptr"), "i1"),
    **dict.fromkeys(("pieces_ptr", "scores_ptr", "mass_ptr", "partial_ptr"), "fp32"),
    **dict.fromkeys(("k_ptr", "ids_ptr", "counts_ptr", "chunk_counts_ptr"), "i32"),
    **dict.fromkeys(("offsets_ptr", "pair_token_ptr", "tiles_ptr"), "i32"),
    **dict.fromkeys(("table_ptr", "contexts_ptr", "slot_ptr", "spans_ptr"), "i32"),
    **dict.fromkeys(("cos_ptr", "sin_ptr", "stats_ptr"), "fp32"),
    **dict.fromkeys(("arrived_ptr", "list_ptr"), "i32"),
}
FLOATS = ("scale", "epsilon", "threshold")
# What a descriptor fetches at once.
DESCRIPTORS = {
    "up_desc": ("BLOCK_S", "BLOCK_D"),
    "h_desc": ("BLOCK_P", "BLOCK_S"),
    "down_desc": ("BLOCK_S", "BLOCK_D"),
}
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
    sort = routing.sort_blocks(T)
    found: list[tuple[str, Any, dict[str, Any], str]] = [
        ("count", routing._count_kernel, sort, "i32"),
        ("fill", routing._fill_kernel, {**sort, "BLOCK_E": E}, "i32"),
        ("choose", routing._choose_kernel, routing.choose_blocks(E, N, K), "fp32"),
        ("choose 512", routing._choose_kernel, routing.choose_blocks(512, N, 16), "fp32"),
        ("take", sharing._take_kernel, sharing.take_blocks(E), "fp32"),
        ("use", sharing._use_kernel, sharing.use_blocks(E, K), "fp32"),
        ("take 512", sharing._take_kernel, sharing.take_blocks(512), "fp32"),
        ("use 512", sharing._use_kernel, sharing.use_blocks(512, 16), "fp32"),
        ("tiles", grouped_pairs._tiles_kernel, grouped_pairs.tiles_blocks(E), "i32"),
    ]
    for experts in (E, 64, 512):
        blocks = top_k.top_k_blocks(experts)
        found += [
            (f"pick {experts}", top_k._pick_kernel, blocks, "fp32"),
            (f"place {experts}", top_k._place_kernel, blocks, "i32"),
        ]
    for dtype, itemsize in (("bf16", 2), ("fp32", 4)):
        found += [
            ("scores", routing._scores_kernel, routing.scores_blocks(E, itemsize), dtype),
            ("combine", grouped_ffn._combine_kernel, grouped_ffn.combine_blocks(D), dtype),
        ]
        for pairs in (12, 96, 384) if dtype == "bf16" else (384,):
            up = grouped_ffn.up_blocks(pairs, S, itemsize)
            down = grouped_ffn.down_blocks(pairs)
            found += [
                (f"up {pairs}", grouped_ffn._up_kernel, {**up, "BLOCK_E": E}, dtype),
                (f"down {pairs}", grouped_ffn._down_kernel, {**down, "BLOCK_E": E}, dtype),
            ]
        full = {"GATED": True, "BIASED": True}
        many = {**grouped_ffn.up_blocks(384, S, itemsize, gated=True), **full, "BLOCK_E": E}
        found += [
            ("up full", grouped_ffn._up_kernel, many, dtype),
            ("add norm", add_norm._add_norm_kernel, add_norm.add_norm_blocks(D), dtype),
            ("add norm 5120", add_norm._add_norm_kernel, add_norm.add_norm_blocks(5120), dtype),
            ("activate", masked_ffn._activate_kernel, masked_ffn.activate_blocks(), dtype),
        ]
        found += [(name, *rest, dtype) for name, *rest in attention_cases(itemsize)]
        found += [(name, *rest, dtype) for name, *rest in step_cases(itemsize)]
        for size in TRAINED_SIZES:
            found += [(f"{n} {size}", *rest, dtype) for n, *rest in training_cases(size, itemsize)]
    return found


def attention_cases(itemsize: int) -> list[tuple[str, Any, dict[str, Any]]]:
    """The paged cache's kernels, as (name, kernel, constants)."""
    split = {"SPLIT": paged_kv.SPLIT}
    found = [
        ("rotate", paged_kv._rotate_store_kernel, paged_kv.rotate_blocks(48, 64)),
        ("merge", paged_kv._merge_kernel, {**split, **paged_kv.merge_blocks(64)}),
    ]
    for group in (1, 4):
        for width in (64, 128, 256):
            blocks = {
                **split,
                "ONLY": width == 64,
                **paged_kv.decode_blocks(group, width, itemsize),
            }
            found.append((f"decode {group}x{width}", paged_kv._decode_kernel, blocks))
            blocks = {"PAGE": 16, **paged_prefill.prefill_blocks(group, width, itemsize)}
            found.append((f"prefill {group}x{width}", paged_prefill._prefill_kernel, blocks))
            for batch in (1, 16):
                step = attend_step.attend_blocks(batch, group, width, itemsize)
                name = f"attend {batch} {group}x{width}"
                found.append((name, attend_step._attend_kernel, {**step, "CHAINED": CHAINED}))
    return found


def tma_cases() -> list[tuple[str, Any, dict[str, Any], str]]:
    """The grouped products that need TMA, in the tiles in use, as `cases`."""
    found: list[tuple[str, Any, dict[str, Any], str]] = []
    for pairs in (48, 384):
        for product, kernel, blocks in (
            ("up", grouped_tma._up_kernel, grouped_tma.up_blocks(pairs, S)),
            ("down", grouped_tma._down_kernel, grouped_tma.down_blocks(S)),
        ):
            switches = {"FLATTEN": blocks.pop("per_sm") > 0, "BLOCK_E": E, "BLOCK_K": 8}
            found.append((f"tma {product} {pairs}", kernel, {**blocks, **switches}, "bf16"))
    return found


def step_cases(itemsize: int) -> list[tuple[str, Any, dict[str, Any]]]:
    """The kernels of a decoding step, as (name, kernel, constants)."""
    chained = {"CHAINED": CHAINED}
    rows, normed = {**expert_ffn.up_blocks(D), **chained}, {"NORMED": True}
    down = {**expert_ffn.down_blocks(S), **chained}
    full = {"GATED": True, "BIASED": True}
    found = [
        ("thin", thin_linear._thin_linear_kernel, {**rows, **normed}),
        ("expert_up", expert_ffn._expert_up_kernel, {**rows, **normed}),
        ("expert_up full", expert_ffn._expert_up_kernel, {**rows, **full}),
        ("expert_down", expert_ffn._expert_down_kernel, down),
        ("expert_down full", expert_ffn._expert_down_kernel, {**down, "ADDED": True, **full}),
        ("sum", union_ffn._sum_shares_kernel, {**union_ffn.sum_blocks(16), **chained}),
    ]
    for experts in (E, 64, 512):
        blocks = route_step.route_blocks(experts, D, K)
        found.append(
            (f"route {experts}", route_step._route_kernel, {**blocks, **normed, **chained})
        )
    for tokens in (8, 16, union_ffn.MOST_TOKENS) if itemsize == 2 else ():  # what gpu_ways takes
        lists = {"BLOCK_L": 8, "BLOCK_E": 512}
        tiles = {**union_ffn.up_blocks(tokens), **lists, **chained}
        found.append((f"union_up {tokens}", union_ffn._union_up_kernel, tiles))
        tiles = {**union_ffn.down_blocks(tokens), **chained}
        found.append((f"union_down {tokens}", union_ffn._union_down_kernel, tiles))
    return found


def training_cases(size: int, itemsize: int) -> list[tuple[str, Any, dict[str, Any]]]:
    """The products of training for experts of this size, as (name, kernel, constants)."""
    precision = {"PRECISION": "ieee" if itemsize == 2 else "tf32x3"}
    forward, backward = (
        {**grouped_pairs.gather_blocks(size, itemsize, backward=b), **precision, "BACKWARD": b}
        for b in (False, True)
    )
    spread = {**grouped_pairs.spread_blocks(size, itemsize), **precision}
    weights = {**grouped_pairs.weights_blocks(size, itemsize), **precision}
    return [
        ("gather", grouped_pairs._gather_kernel, forward),
        ("gather back", grouped_pairs._gather_kernel, {**backward, "SQUARE": True}),
        ("spread", grouped_pairs._spread_kernel, spread),
        ("weights", grouped_pairs._weights_kernel, weights),
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
        "ROUTED",
        "CHAINED",
    )
    constexprs = {**dict.fromkeys((*switches, "CHAINED"), False), **constants}
    constexprs = {k: v for k, v in constexprs.items() if k in kernel.arg_names}
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constexprs:
            signature[name] = "constexpr"
        elif name in DESCRIPTORS:
            shape = ", ".join(str(constexprs[size]) for size in DESCRIPTORS[name])
            signature[name] = f"tensordesc<{dtype}[{shape}]>"
        elif name in INTS:
            signature[name] = "i32"
        elif name in FLOATS:
            signature[name] = "fp32"
        else:
            signature[name] = "*" + POINTERS.get(name, dtype)
        plain = name not in constexprs and name not in FLOATS and name not in DESCRIPTORS
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
