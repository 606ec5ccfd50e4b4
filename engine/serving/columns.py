"""Numbers of many requests on their way to the device, gathered so that they travel together."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

_N = TypeVar("_N", int, float)


class Columns:
    """Columns of numbers by name: filled on the host, read on the device once they are sent.

    Whatever their number, they travel as one tensor of integers and one of floats, from pinned
    memory and without waiting if the device is a GPU. A column exists only if somebody needs it, so
    `name in columns` decides whether a stage runs at all.

    Attributes:
        widths: sizes of tensors, kept on the host so that reading them does not wait for the
            device.
    """

    def __init__(self) -> None:
        self.widths: dict[str, int] = {}
        self._ints: dict[str, array[int]] = {}
        self._floats: dict[str, array[float]] = {}
        self._sent: dict[str, Tensor] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._ints or name in self._floats

    def __getitem__(self, name: str) -> Tensor:
        """The column on the device: int64 or float64, one-dimensional."""
        return self._sent[name]

    def put_ints(self, name: str, values: Iterable[int]) -> None:
        self._ints[name] = array("q", values)

    def put_floats(self, name: str, values: Iterable[float]) -> None:
        self._floats[name] = array("d", values)

    def put_groups(self, name: str, rows: Sequence[int], groups: Iterable[Iterable[int]]) -> None:
        """Some token ids for each of `rows`, as three columns; `places` reads them."""
        ids, lengths = array("q"), array("q")
        for group in groups:
            start = len(ids)
            ids.extend(group)
            lengths.append(len(ids) - start)
        self._ints |= {f"{name}_rows": array("q", rows), f"{name}_lengths": lengths}
        self._ints[f"{name}_ids"] = ids

    def send(self, device: torch.device) -> None:
        """Move every column to `device`."""
        self._sent = _send(self._ints, array("q"), torch.int64, device)
        self._sent |= _send(self._floats, array("d"), torch.float64, device)

    def places(self, name: str, width: int) -> Tensor:
        """Flat positions, in a matrix of `width` columns, of the groups' (row, token id) pairs."""
        return self.spread(name, self[f"{name}_rows"] * width) + self[f"{name}_ids"]

    def spread(self, name: str, values_G: Tensor) -> Tensor:
        """One number per group, repeated for each of the group's ids."""
        total = self[f"{name}_ids"].numel()
        return values_G.repeat_interleave(self[f"{name}_lengths"], output_size=total)


def _send(
    columns: Mapping[str, array[_N]], packed: array[_N], dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """Pack the columns one after another, transfer them at once, and cut them apart again."""
    for column in columns.values():
        packed.extend(column)
    if not packed:
        return {}
    tensor = torch.frombuffer(packed, dtype=dtype)
    if device.type == "cuda":
        tensor = tensor.pin_memory().to(device, non_blocking=True)
    parts = torch.split(tensor, [len(column) for column in columns.values()])
    return dict(zip(columns, parts, strict=True))
