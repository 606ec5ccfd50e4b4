"""The quality curve of an import, from the states behind its last layer.

Shapes: T held-out tokens, B sequences of equal length.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from engine.errors import require
from training.errors import TrainingError
from training.importing.calibration import CalibrationText
from training.importing.layer import LayerResult
from training.importing.plan import Plan, Stream
from training.importing.streams import Frame, token_losses
from training.quality.evaluation import Evaluation, QualityCurve
from training.quality.expert_use import ExpertUse

# A loss that is larger or not a number counts as this many nats. No model is as bad, and the
# perplexity, e to that power, can still be drawn and written.
_MOST_LOSS: Final = 100.0


@dataclass(frozen=True)
class Quality:
    """How much quality the imported model keeps with fewer experts.

    Attributes:
        curve: dense, routed, oracle and random.
        errors: of each stream but the dense one, the standard error of its mean loss over the dense
            one's, in nats: how far chance in the choice of text may have moved the point. From the
            sequences' means, as neighbouring tokens' losses are not independent. None where it is
            not a number: a loss that is not finite, or a single sequence.
        recommended: the sparsest measured policy within the loss budget, or dense.
    """

    curve: QualityCurve
    errors: dict[str, float | None]
    recommended: str


def measure_quality(
    frame: Frame,
    states: Mapping[str, Tensor],
    results: Sequence[LayerResult],
    text: CalibrationText,
    plan: Plan,
) -> Quality:
    """Score the held-out tokens of every stream.

    Raises:
        TrainingError: if the dense model's loss is not finite: its weights are broken.
    """
    targets_T = text.held_BL[:, 1:].flatten()
    with frame.ends() as model:
        losses = {s.name: token_losses(model, states[s.name], targets_T) for s in plan.streams}
    dense_T = losses["dense"]
    require(
        bool(dense_T.isfinite().all()),
        "the model's dense loss on the held-out text is not finite: its weights are broken, or too "
        "large for --dtype",
        TrainingError,
    )
    found: dict[str, dict[int, Evaluation]] = {"routed": {}, "oracle": {}, "random": {}}
    errors, sequences = {}, text.held_BL.shape[0]
    for stream in plan.streams[1:]:
        loss_T = losses[stream.name]
        found[stream.kind][stream.k] = _evaluation(stream, loss_T, _use(stream, results))
        errors[stream.name] = _standard_error((loss_T - dense_T).view(sequences, -1).mean(1))
    dense = Stream("dense")
    curve = QualityCurve(_evaluation(dense, dense_T, _use(dense, results)), **found)
    experts = plan.config.experts.num_experts
    return Quality(curve, errors, curve.recommended(experts, plan.options.max_loss))


def _standard_error(sample_B: Tensor) -> float | None:
    """The standard error of the sample's mean; None if that is not a number."""
    if len(sample_B) < 2 or not sample_B.isfinite().all():
        return None
    return float(sample_B.std() / math.sqrt(len(sample_B)))


def _use(stream: Stream, results: Sequence[LayerResult]) -> ExpertUse:
    """Over all layers."""
    uses = [result.uses[stream.name] for result in results]
    return ExpertUse(
        sum(use.activated for use in uses),
        sum(use.available for use in uses),
        sum(use.inside for use in uses),
        sum(use.total for use in uses),
    )


def _evaluation(stream: Stream, loss_T: Tensor, use: ExpertUse) -> Evaluation:
    mean = min(float(torch.nan_to_num(loss_T, nan=_MOST_LOSS).mean()), _MOST_LOSS)
    return Evaluation(stream.name, math.exp(mean), use.activated_ratio, use.coverage)
