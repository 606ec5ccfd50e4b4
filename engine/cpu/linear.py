"""Linear layers whose weights are packed in the order in which the product reads them.

Shapes: T tokens, N outputs, K inputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.cpu.native import INT, LONG, call, lanes, pointer, weight_memory


def panel_width(outputs: int) -> int:
    """Columns of a panel, as 4, 2 or 1 vectors: wide ones fill registers, narrow ones pad less."""
    one = lanes()
    if outputs % (4 * one) == 0:
        return 4 * one
    return 2 * one if outputs % (2 * one) == 0 or outputs > 4 * one else one


def pack(weight_NK: Tensor, width: int) -> Tensor:
    """`in_panels` in memory of its own."""
    panels = in_panels(weight_NK, width)
    return weight_memory(tuple(panels.shape), weight_NK.dtype).copy_(panels)


def in_panels(weight_NK: Tensor, width: int) -> Tensor:
    """[N, K] as panels of `width` outputs, input by input; in bfloat16, pairs of inputs. A view.

    Returns [panels, K, width] in float32, [panels, K / 2, width, 2] in bfloat16; the last panel is
    padded with zeros.
    """
    N, K = weight_NK.shape
    panels = -(-N // width)
    padded = F.pad(weight_NK, (0, 0, 0, panels * width - N)) if N % width else weight_NK
    if weight_NK.dtype == torch.bfloat16:
        return padded.view(panels, width, K // 2, 2).permute(0, 2, 1, 3)
    return padded.view(panels, width, K).transpose(1, 2)


def unpack(packed: Tensor, outputs: int) -> Tensor:
    """The inverse of `pack`: [N, K]."""
    if packed.dtype == torch.bfloat16:
        rows = packed.permute(0, 2, 1, 3).reshape(packed.shape[0] * packed.shape[2], -1)
    else:
        rows = packed.transpose(1, 2).reshape(packed.shape[0] * packed.shape[2], -1)
    return rows[:outputs]


def padded_bias(bias_N: Tensor, width: int) -> Tensor:
    """float32, with zeros up to whole panels."""
    bias = bias_N.detach().float()
    return F.pad(bias, (0, -bias.shape[-1] % width)).contiguous()


class PackedLinear:
    """``y = x @ weight.T + bias`` from one packed copy of the weight; the caller may free its own.

    Args:
        weight_NK: [N, K], float32 or bfloat16, K even.
        bias_N: [N], or None.
    """

    def __init__(self, weight_NK: Tensor, bias_N: Tensor | None = None) -> None:
        self.outputs, self.inputs = weight_NK.shape
        self.dtype = weight_NK.dtype
        self.width = panel_width(self.outputs)
        self.packed = pack(weight_NK.detach(), self.width)
        self.bias = None if bias_N is None else padded_bias(bias_N, self.width)

    def __call__(self, x_TK: Tensor) -> Tensor:
        """[T, K] -> [T, N], both in the weight's type."""
        assert x_TK.dtype == self.dtype
        x_TK = x_TK.contiguous()
        T = x_TK.shape[0]
        y_TN = torch.empty(T, self.outputs, dtype=self.dtype)
        call(
            "linear", self.dtype, pointer(x_TK), pointer(self.packed), pointer(self.bias),
            pointer(y_TN), LONG(T), LONG(self.outputs), LONG(self.inputs),
            INT(self._vectors()),
        )  # fmt: skip
        return y_TN

    def _vectors(self) -> int:
        return self.width // lanes()

    def rows(self, ids_T: Tensor) -> Tensor:
        """Rows of the weight, [T, K]: an embedding and an output layer can share one copy."""
        panel_T, column_T = ids_T // self.width, ids_T % self.width
        if self.dtype == torch.bfloat16:
            return self.packed[panel_T, :, column_T].flatten(1)
        return self.packed[panel_T, :, column_T]
