"""Every kernel compiles for A100 and H100 class devices, into the code that was meant.

Triton builds the real machine code without a GPU, so spills, narrow loads, lost tensor cores and
too much shared memory show on any machine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

Report = dict[str, dict[str, int]]

ROOT = Path(__file__).parents[3]
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}


@pytest.fixture(scope="module")
def reports() -> dict[int, Report]:
    """Both architectures, compiled side by side, each in a process without the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    script = str(Path(__file__).with_name("compile_report.py"))
    running = {
        arch: subprocess.Popen(
            [sys.executable, script, str(arch)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for arch in SHARED_LIMIT
    }
    found = {}
    for arch, process in running.items():
        output, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
        found[arch] = json.loads(output)
    return found


@pytest.mark.parametrize("arch", SHARED_LIMIT)
class TestCompiledCode:
    def test_nothing_spills(self, arch: int, reports: dict[int, Report]) -> None:
        """But for two registers or so, which compilers keep on the stack now and then."""
        spilled = {k: r for k, r in reports[arch].items() if r["stack"] > 16 or r["local"]}
        assert not spilled

    def test_shared_memory_fits(self, arch: int, reports: dict[int, Report]) -> None:
        assert max(r["shared"] for r in reports[arch].values()) <= SHARED_LIMIT[arch]

    def test_rows_are_loaded_16_bytes_at_a_time(
        self, arch: int, reports: dict[int, Report]
    ) -> None:
        for name in ("few first", "thin", "used", "sum", "combine", "scores", "up", "down"):
            found = [r for k, r in reports[arch].items() if k.startswith(name)]
            assert found
            # What remains are ids, offsets and limits.
            assert all(2 * r["wide_loads"] >= r["loads"] > 0 for r in found), name

    def test_products_over_pairs_load_only_indices_narrowly(
        self, arch: int, reports: dict[int, Report]
    ) -> None:
        """Tokens of pairs, their slots and offsets: a dozen loads, beside rows of any number."""
        narrow = {
            name: record["loads"] - record["wide_loads"]
            for name, record in reports[arch].items()
            if name.startswith(("gather", "spread", "weights"))
        }
        assert narrow
        assert max(narrow.values()) <= 12, narrow

    def test_training_products_use_tensor_cores_in_any_precision(
        self, arch: int, reports: dict[int, Report]
    ) -> None:
        products = ("gather", "spread", "weights")
        assert all(r["mma"] > 0 for k, r in reports[arch].items() if k.startswith(products))

    def test_half_precision_products_use_tensor_cores(
        self, arch: int, reports: dict[int, Report]
    ) -> None:
        products = {k: r for k, r in reports[arch].items() if k.startswith(("up", "down", "used"))}
        assert products
        assert all((r["mma"] > 0) == k.endswith("bf16") for k, r in products.items())

    def test_attention_of_prompts_uses_tensor_cores(
        self, arch: int, reports: dict[int, Report]
    ) -> None:
        found = {k: r for k, r in reports[arch].items() if k.startswith("chunks")}
        assert found
        assert all((r["mma"] > 0) == k.endswith("bf16") for k, r in found.items())


def test_weights_come_by_tma_into_products_of_whole_warp_groups(
    reports: dict[int, Report],
) -> None:
    found = [r for k, r in reports[90].items() if k.startswith("tma")]
    assert found
    assert all(r["tma"] > 0 and r["wgmma"] > 0 for r in found)
