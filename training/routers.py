"""The routers of a model in training: following the experts' centroids, or learning from the mass.

Shapes: n sampled tokens, D model, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Self

import torch
from torch import Tensor

from engine.model.decoder import Decoder
from engine.model.trace import Trace
from training.conversion import refresh_router
from training.router import OnlineRouter


class Routers:
    """Keeps every layer's router up to date, step by step.

    A `centroid` router is recomputed from the experts' weights before every step. A `learned` one
    does so until the first clustering, begins there, and then takes one step of Adam for each
    forward pass, on the tokens whose true mass that pass knows.

    Of several processes all take the same step: `average` gives the mean over them of a tensor.
    """

    def __init__(
        self,
        model: Decoder,
        kind: str,
        average: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ) -> None:
        self._model = model
        self._kind = kind
        self._average = average
        self._online: list[OnlineRouter] = []

    @property
    def learning(self) -> bool:
        """Whether forward passes are to be heard."""
        return bool(self._online)

    def before_step(self) -> None:
        """Follow the weights, unless the routers learn."""
        if not self._online:
            for ffn in self._model.ffns():
                refresh_router(ffn)

    def clustered(self) -> None:
        """The routers were calibrated for new experts: what was learned of the old ones goes."""
        if self._kind == "learned":
            self._online = [OnlineRouter.begin(ffn.router) for ffn in self._model.ffns()]

    @torch.no_grad()
    def hear(self, trace: Trace) -> None:
        """Learn from one forward pass, in float32 even where that pass is autocast."""
        ffns = self._model.ffns()
        layers = zip(ffns, self._online, trace.inputs, trace.masses, strict=True)
        with torch.autocast(trace.inputs[0].device.type, enabled=False):
            gradients = [
                online.gradient(x_TD[:: trace.mass_every], mass_nE, ffn.router)
                for ffn, online, x_TD, mass_nE in layers
            ]
        averaged = self._average(torch.stack(gradients)).unbind()
        for ffn, online, gradient_ED in zip(ffns, self._online, averaged, strict=True):
            online.apply(ffn.router, gradient_ED)

    def tensors(self) -> dict[str, Tensor]:
        """The state by name, for a safetensors file."""
        return {
            f"{layer}.{name}": tensor
            for layer, online in enumerate(self._online)
            for name, tensor in online.tensors().items()
        }

    @classmethod
    def restored(
        cls,
        model: Decoder,
        kind: str,
        tensors: Mapping[str, Tensor],
        average: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ) -> Self:
        """With the state that `tensors` gave; its layers are counted from 0."""
        routers = cls(model, kind, average)
        layers: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            layer, _, name = key.partition(".")
            layers.setdefault(int(layer), {})[name] = tensor
        routers._online = [OnlineRouter.from_tensors(layers[i]) for i in sorted(layers)]
        return routers
