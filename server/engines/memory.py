"""How much memory the system says is left for another model."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import torch

MEMINFO: Final = Path("/proc/meminfo")
CGROUP: Final = Path("/sys/fs/cgroup")


def available_bytes(device: str) -> int | None:
    """Bytes that can be allocated on `device` ("cpu" or "cuda"); None if that is not known."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    known = [n for n in (_of_machine(MEMINFO), _of_group(CGROUP)) if n is not None]
    return min(known, default=None)


def _of_machine(meminfo: Path) -> int | None:
    """Linux's own estimate (proc(5), MemAvailable)."""
    try:
        lines = meminfo.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    for line in lines:
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) << 10
    return None


def _of_group(group: Path) -> int | None:
    """What the container's limit leaves (cgroup v2); file pages that can go count as free."""
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    if not limit.isdigit():  # "max"
        return None
    return max(0, int(limit) - used + int(stat.get("inactive_file", 0)))
