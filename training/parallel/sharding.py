"""Whole tensors and their parts: what lets code outside the forward pass read and move weights.

Under FSDP a parameter is a DTensor: each process holds some of its rows. Forward passes gather
them by themselves; whatever else looks at weights goes through `whole`, and changes them through
`write_whole`. On plain tensors both cost nothing, so that code runs alike on one process.

`whole` of a sharded tensor is collective: every process must call it, in the same order.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from engine.model.decoder import Decoder


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds only some of the tensor's rows."""
    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """All rows, on every process; a plain tensor is returned as it is. Collective, no gradient."""
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor


def sharded_like(value: Tensor, tensor: Tensor) -> Tensor:
    """`value`, the same on every process, divided as `tensor` is; nothing is sent."""
    if not isinstance(tensor, DTensor):
        return value
    value = value.to(tensor.device)
    return distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)


@torch.no_grad()
def write_whole(tensor: Tensor, value: Tensor) -> None:
    """Set `tensor` to `value`, which every process has whole; each keeps its own rows of it."""
    tensor.copy_(sharded_like(value, tensor))


def local_rows(tensor: Tensor) -> tuple[Tensor, int]:
    """The rows that this process holds, and the number of the first; changes are seen in `tensor`.

    Rows are divided as torch.chunk divides them, so the last processes may hold none.
    """
    if not isinstance(tensor, DTensor):
        return tensor, 0
    mesh, rows = tensor.device_mesh, tensor.shape[0]
    first = -(-rows // mesh.size()) * mesh.get_local_rank()
    with torch.no_grad():
        return tensor.to_local(), min(first, rows)


def any_of_sharers(flags: Tensor, tensor: Tensor) -> Tensor:
    """Flags [...], int32 zeros and ones, joined by "or" over the processes that share `tensor`."""
    if isinstance(tensor, DTensor):
        dist.all_reduce(flags, dist.ReduceOp.MAX, tensor.device_mesh.get_group())
    return flags


def gathered(tensors: Iterable[tuple[str, Tensor]], *, keep: bool) -> dict[str, Tensor]:
    """Named tensors, whole, on the processes that `keep` them; the others hold one at a time.

    Collective. Plain tensors stay where they are; those that were sharded come to the CPU, so that
    no device has to hold all of them.
    """
    found = {}
    for name, tensor in tensors:
        value = whole(tensor).cpu() if is_sharded(tensor) else tensor
        if keep:
            found[name] = value
    return found


def plain(model: Decoder, *, keep: bool) -> Decoder | None:
    """`model` itself, or a copy with whole weights if they are sharded; None unless `keep`.

    Collective. The copy is on the model's device.
    """
    if not any(is_sharded(parameter) for parameter in model.parameters()):
        return model if keep else None
    weights = gathered(model.state_dict().items(), keep=keep)
    if not keep:
        return None
    with torch.device("meta"):
        copy = Decoder(model.config)
    weights = {name: tensor.to(model.cos.device) for name, tensor in weights.items()}
    copy.load_state_dict(weights, assign=True)
    copy.materialize_tables(model.cos.device)
    return copy
