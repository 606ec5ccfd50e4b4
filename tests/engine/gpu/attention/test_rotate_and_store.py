"""Rotation and writes to the paged cache against their reference, at sizes that fit no block."""

from __future__ import annotations

import pytest
import torch

from engine.gpu.attention.rotate_and_store import rotate_and_store, rotate_and_store_reference
from engine.model.attention import rotate
from engine.model.rotary import rope_table

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("q_heads", "kv_heads", "width"), [(3, 3, 20), (6, 2, 64), (9, 1, 2)])
def test_rotate_and_store_equals_the_reference(
    q_heads: int, kv_heads: int, width: int, dtype: torch.dtype, device: torch.device
) -> None:
    tokens = 5
    heads_TNd = torch.randn(tokens, q_heads + 2 * kv_heads, width).to(device, dtype)
    cos, sin = (t.to(device) for t in rope_table(50, width, 10_000.0))
    positions = torch.tensor([3, 0, 49, 7, 8], device=device)
    slots_T = torch.tensor([4, -1, 0, 11, 7], dtype=torch.int32, device=device)
    results = []
    for function in (rotate_and_store, rotate_and_store_reference):
        keys, values = torch.zeros(2, 12, kv_heads, width).to(device, dtype).unbind(0)
        q = function(heads_TNd, cos[positions], sin[positions], keys, values, slots_T)
        results.append((q, keys, values))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)
    q, keys, values = results[0]
    rotated = rotate(heads_TNd, cos[positions], sin[positions])
    torch.testing.assert_close(q, rotated[:, :q_heads])
    torch.testing.assert_close(keys[11], rotated[3, q_heads : q_heads + kv_heads])
    assert torch.equal(values[7], heads_TNd[4, q_heads + kv_heads :])
    unwritten = [s for s in range(12) if s not in slots_T.tolist()]
    assert bool((keys[unwritten] == 0).all())
