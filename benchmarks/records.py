"""What every benchmark writes: one record a number, with versions and machine."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton


def _processor() -> str:
    """The CPU's model name, where the platform tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{_processor()}, {os.cpu_count()} CPUs, {capability}"


VERSIONS: dict[str, str] = {
    "python": platform.python_version(),
    "torch": torch.__version__,
    "triton": triton.__version__,
    "cuda": torch.version.cuda or "none",
}
MACHINE: str = _machine()


@dataclass(frozen=True)
class Record:
    """One measured number. `ratio` is peer_value / value for times: above 1, ours is faster."""

    name: str
    params: dict[str, Any]
    value: float
    unit: str
    peer_value: float | None = None
    ratio: float | None = None
    versions: dict[str, str] = field(default_factory=lambda: VERSIONS)
    machine: str = MACHINE


def write_records(path: Path, records: Sequence[Record]) -> None:
    """Write the records as a JSON list."""
    text = json.dumps([asdict(record) for record in records], indent=1)
    path.write_text(text + "\n", encoding="utf-8")
