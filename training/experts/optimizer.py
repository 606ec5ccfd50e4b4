"""AdamW that can leave experts without a gradient alone, and its schedule.

The learning rate is a pure function of the step.

Shapes: F neurons, D model, E experts.
"""

from __future__ import annotations

import math
from typing import Any, Final

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from engine.model.decoder import Decoder
from training.config import TrainConfig
from training.parallel.sharding import any_of_sharers, is_sharded, local_rows

_SAMPLED_ROWS: Final = 8  # every n-th row of an expert is looked at first


def learning_rate(config: TrainConfig, step: int) -> float:
    """The learning rate of a step: linear warm-up, then the schedule down to its floor.

    `cosine` takes half a cosine from warm-up to the last step. `wsd` (warm-up, stable, decay; Hu et
    al. 2024) stays at the peak and falls linearly over the last `decay_share` of the run.
    """
    optimizer = config.optimizer
    warmup = max(1, round(optimizer.warmup_share * config.steps))
    if step < warmup:
        return optimizer.learning_rate * (step + 1) / warmup
    last, floor = config.steps - 1, optimizer.min_lr_share
    if optimizer.schedule == "cosine":
        progress = min((step - warmup) / max(1, last - warmup), 1.0)
        above = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        decay = max(1, min(round(optimizer.decay_share * config.steps), last - warmup))
        above = min(1.0, max(0.0, (last - step) / decay))
    return optimizer.learning_rate * (floor + (1 - floor) * above)


class ExpertAdamW(torch.optim.AdamW):
    """torch's fused AdamW, with a second kind of step for sparse training.

    `step` is torch's own, bit for bit: every row decays and moves. `sparse_step` leaves an expert's
    rows of a parameter alone where their gradient is exactly zero: weights, both moments and weight
    decay stay as they were, as if the step had not happened to them. The other experts' rows, and
    every parameter that has no experts, are updated as `step` would. `up` and `down` are looked at
    each for itself: the concentration penalty reaches rows of `up` that no token chose.

    The step count that corrects the moments' bias stays one number a parameter, and a sparse step
    raises it for all rows (as torch.optim.SparseAdam does). A count per expert could not follow
    neurons that a later clustering moves to another expert, and the error of the shared one fades:
    what matters are the steps a row took part in before it was first left alone. After 60 dense
    steps, fewer than any run's first phase should have, both corrections are 1 within 5% whichever
    count is used (beta2 0.95). A row whose very first step came late would move by
    (1 - beta1) / sqrt(1 - beta2) of the usual, 0.45 with the default betas.

    Under FSDP a process steps the rows that it holds. An expert's rows may lie on two processes: it
    has a gradient if it has one on any of them.

    Experts are declared by a parameter group's `num_experts`: expert e owns rows e*S .. (e+1)*S of
    each of the group's parameters [F, D].
    """

    @torch.no_grad()
    def sparse_step(self) -> None:
        """One step that touches only experts with a gradient.

        When all of them have one, this is `step` itself: the same single fused call. When few have,
        only their rows are read and written.
        """
        partial = self._partly_touched()
        gradients = [parameter.grad for parameter, _, _ in partial]
        for parameter, _, _ in partial:
            parameter.grad = None  # hidden from the step of whole parameters
        self.step()
        for (parameter, group, touched), gradient in zip(partial, gradients, strict=True):
            assert gradient is not None
            parameter.grad = gradient
            self._step_rows(parameter, gradient, group, _row_ranges(touched, parameter.shape[0]))

    def _partly_touched(self) -> list[tuple[Tensor, dict[str, Any], list[bool]]]:
        """(parameter, its group, whether each expert has a gradient), where some have none."""
        found = [
            (parameter, group)
            for group in self.param_groups
            if "num_experts" in group
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        if found and is_sharded(found[0][0]):
            touched = _touched_shards([(p.grad, group["num_experts"]) for p, group in found])
        else:
            touched = _touched([_by_expert(p.grad, group["num_experts"]) for p, group in found])
        return [
            (parameter, group, experts)
            for (parameter, group), experts in zip(found, touched, strict=True)
            if not all(experts)
        ]

    def _step_rows(
        self, parameter: Tensor, gradient: Tensor, group: dict[str, Any], ranges: list[slice]
    ) -> None:
        """AdamW on some rows of one parameter; its step count rises even if there are none."""
        state = self.state[parameter]
        if not state:  # the first step, as AdamW itself begins
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        parts = [
            local_rows(t) for t in (parameter, gradient, state["exp_avg"], state["exp_avg_sq"])
        ]
        ranges = _held(ranges, parts[0][1], parts[0][0].shape[0])
        params, grads, averages, squares = ([t[rows] for rows in ranges] for t, _ in parts)
        beta1, beta2 = group["betas"]
        adamw(
            params,
            grads,
            averages,
            squares,
            [],
            [state["step"].clone() for _ in ranges],  # each is counted up by the call
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        state["step"] += 1


def _by_expert(rows_FD: Tensor, num_experts: int) -> Tensor:
    """[F, D] as [E, S, D]."""
    return rows_FD.view(num_experts, -1, rows_FD.shape[1])


def _touched(grads_ESD: list[Tensor]) -> list[list[bool]]:
    """For each gradient, whether each expert's part has anything but zeros.

    A few rows of each expert mostly tell, in a fraction of the time that reading all would take;
    only gradients in which some expert stays in doubt are read whole.
    """
    touched = _nonzero([grad_ESD[:, ::_SAMPLED_ROWS] for grad_ESD in grads_ESD])
    doubtful = [i for i, experts in enumerate(touched) if not all(experts)]
    for i, experts in zip(doubtful, _nonzero([grads_ESD[i] for i in doubtful]), strict=True):
        touched[i] = experts
    return touched


def _nonzero(grads_ESD: list[Tensor]) -> list[list[bool]]:
    """Whether each expert's part has anything but zeros; NaN is not zero.

    Two extremes are exact, unlike a sum of squares, and much faster than `any`. One answer for all
    gradients waits for the device once.
    """
    found = [grad.amax((1, 2)).ne(0) | grad.amin((1, 2)).ne(0) for grad in grads_ESD]
    flags: list[list[bool]] = torch.stack(found).tolist() if found else []
    return flags


def _touched_shards(grads: list[tuple[Tensor, int]]) -> list[list[bool]]:
    """Compute `_touched` for gradients [F, D] that are divided among processes."""
    flags = torch.stack([_shard_flags(*local_rows(g), g.shape[0], n) for g, n in grads])
    found: list[list[bool]] = any_of_sharers(flags, grads[0][0]).bool().tolist()
    return found


def _shard_flags(rows_nD: Tensor, first: int, neurons: int, num_experts: int) -> Tensor:
    """int32 [E]: 1 where these rows, of which the first is neuron `first`, are not all zeros."""
    moved_n = (rows_nD.amax(1).ne(0) | rows_nD.amin(1).ne(0)).int()
    neuron_n = torch.arange(first, first + rows_nD.shape[0], device=rows_nD.device)
    flags_E = torch.zeros(num_experts, dtype=torch.int32, device=rows_nD.device)
    return flags_E.scatter_reduce_(0, neuron_n // (neurons // num_experts), moved_n, "amax")


def _held(ranges: list[slice], first: int, count: int) -> list[slice]:
    """The parts of row ranges that lie in rows first .. first + count, counted from there."""
    cut = [slice(max(r.start - first, 0), min(r.stop - first, count)) for r in ranges]
    return [rows for rows in cut if rows.start < rows.stop]


def _row_ranges(touched: list[bool], rows: int) -> list[slice]:
    """The rows of touched experts, neighbours joined."""
    size = rows // len(touched)
    ranges: list[slice] = []
    for expert, is_touched in enumerate(touched):
        start, end = expert * size, (expert + 1) * size
        if is_touched and ranges and ranges[-1].stop == start:
            ranges[-1] = slice(ranges[-1].start, end)
        elif is_touched:
            ranges.append(slice(start, end))
    return ranges


def build_optimizer(model: Decoder, config: TrainConfig) -> ExpertAdamW:
    """AdamW that decays matrices and leaves norms alone, and knows which rows are experts'."""
    settings = config.optimizer
    decay = {"weight_decay": settings.weight_decay}
    experts = [weight for ffn in model.ffns() for weight in ffn.per_neuron()]
    of_experts = set(experts)
    others = [p for p in model.parameters() if p not in of_experts]
    count = {"num_experts": config.model.num_experts}
    biases = [p for p in experts if p.dim() < 2]
    return ExpertAdamW(
        [
            {"params": [p for p in experts if p.dim() >= 2], **count, **decay},
            *([{"params": biases, **count, "weight_decay": 0.0}] if biases else []),
            {"params": [p for p in others if p.dim() >= 2], **decay},
            {"params": [p for p in others if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        fused=True,
    )
