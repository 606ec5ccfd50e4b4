"""The training FFN's operators as torch.compile sees them.

Apart from the numbers' tests because these must not run with poisoned allocations: tracing notes,
for the whole process, which functions allocate.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.gpu.ffn import training
from engine.gpu.ffn.training import choose_top_k, ffn


def leaves(tokens: int, width: int, neurons: int, device: torch.device) -> tuple[Tensor, ...]:
    return tuple(
        torch.randn(rows, width, device=device, requires_grad=True)
        for rows in (tokens, neurons, neurons)
    )


@pytest.mark.parametrize(("dynamic", "autocast"), [(False, False), (True, False), (False, True)])
def test_torch_compile_takes_routing_and_ffn_whole(
    dynamic: bool, autocast: bool, device: torch.device
) -> None:
    inputs = leaves(20, 48, 4 * 16, device)
    router_ED, dy_TD = (torch.randn(rows, 48, device=device) for rows in (4, 20))

    def layer(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        pairs = choose_top_k(x.detach() @ router_ED.T, 2)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            return x + ffn(2.0 * x, up, down, pairs, "relu2")

    whole = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    results = []
    for function in (layer, whole):
        y_TD = function(*inputs)
        results.append((y_TD.detach(), *torch.autograd.grad(y_TD, inputs, dy_TD)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_operators_keep_their_promises_to_torch(device: torch.device) -> None:
    """Schemas, shapes without data, derivatives: all that tracing relies on."""
    inputs = leaves(9, 40, 3 * 16, device)
    scores_TE = torch.randn(9, 3, device=device)
    torch.library.opcheck(training._choose_top_k, (scores_TE, 2))
    found = choose_top_k(scores_TE, 2)
    pairs = (found.ids_TK, found.offsets_E1, found.pair_token_P, found.pair_slot_P)
    torch.library.opcheck(training._forward, (*inputs, *pairs, "relu"))
    detached = tuple(tensor.detach() for tensor in inputs)
    y_TD, h_PS, tiles_N2 = training._forward(*detached, *pairs, "relu")
    backward = (torch.randn_like(y_TD), *detached, h_PS, *pairs, tiles_N2, "relu")
    torch.library.opcheck(training._backward, backward)
