"""The training loop, readable from top to bottom.

    prepare corpus, tokenizer, model
    for every step: probe activations when due, switch phase if decided, train one step
    evaluate dense and by share of experts, write the checkpoint

Dense steps run every neuron; sparse steps compute the chosen experts' forward and backward pass
alone, plus the concentration penalty on a sample of the tokens. See docs/ssd.md.

Shapes: B sequences, L length, T tokens, D model, F neurons, E experts, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from engine import checkpoint
from engine.checkpoint import check_device
from engine.experts import Trace, true_mass
from engine.model import Decoder
from engine.request import ExpertPolicy
from engine.tokenizer import Tokenizer
from training import data, run_state
from training.activation import ActivationPattern, observe, similarity
from training.config import SwitchConfig, TrainConfig
from training.conversion import build_experts, calibrate_routers, refresh_router
from training.errors import DataError, NonFiniteLoss
from training.evaluation import Batches, QualityCurve, quality_curve
from training.model_card import model_card
from training.optimizer import build_optimizer, learning_rate
from training.switching import Decision, Phase, SwitchController

_PROBE_TOKENS: Final = 1024
_EVAL_TOKENS: Final = 1 << 17
_LOG_EVERY: Final = 10


class Monitor(Protocol):
    """What the loop tells whoever watches: a progress bar, or nobody."""

    def message(self, text: str) -> None: ...

    def step(self, step: int, loss: float, phase: str, tokens_per_second: float) -> None: ...


class SilentMonitor:
    """Watches nothing."""

    def message(self, text: str) -> None:
        pass

    def step(self, step: int, loss: float, phase: str, tokens_per_second: float) -> None:
        pass


@dataclass
class Prepared:
    """Everything that is fixed before the first step."""

    tokens: data.TokenData
    tokenizer: Tokenizer
    batches: data.TokenBatches
    valid: Batches
    probe_BL: Tensor
    train_tokens: int


def prepare(config: TrainConfig, tokens: data.TokenData, monitor: Monitor, device: str) -> Prepared:
    """Lay the tokens out in batches: to train on, held out, and the probe.

    Raises:
        DataError: if the corpus, or its held-out part, is shorter than one sequence.
    """
    monitor.message(f"tokens: {tokens.train.size:,} to train on, {tokens.valid.size:,} held out")
    length = config.sequence_length
    batches = data.TokenBatches(tokens.train, config.batch_size, length, config.seed)
    max_batches = max(1, _EVAL_TOKENS // config.batch_tokens)
    valid = [
        (inputs.to(device), targets.to(device))
        for inputs, targets in data.consecutive_batches(
            tokens.valid, config.batch_size, length, max_batches
        )
    ]
    if not valid:
        raise DataError(
            f"{tokens.valid.name} has {tokens.valid.size} tokens, fewer than one sequence of "
            f"{length + 1}; give more text, raise valid_share or give --valid"
        )
    # The probe is training text, so the held-out text decides nothing.
    probe_BL, _ = data.TokenBatches(
        tokens.train, max(1, _PROBE_TOKENS // length), length, config.seed + 1
    ).batch(0)
    return Prepared(
        tokens, tokens.tokenizer, batches, valid, probe_BL.to(device), tokens.train.size
    )


def penalty(model: Decoder, trace: Trace, token_share: float) -> Tensor:
    """Share of the true activation mass outside the chosen experts, mean over layers (0-dim).

    Measured on every n-th token so that the first product of unchosen experts is computed for a
    `token_share` of the batch alone. Its gradient concentrates activations in the chosen experts.
    """
    stride = max(1, round(1 / token_share))
    outside = []
    for ffn, x_TD, chosen_TE in zip(model.ffns(), trace.inputs, trace.chosen, strict=True):
        assert chosen_TE is not None
        mass_TE = true_mass(x_TD[::stride], ffn.up, ffn.num_experts, ffn.activation)
        inside = (mass_TE * chosen_TE[::stride]).sum()
        outside.append(1 - inside / mass_TE.sum().clamp_min(1e-9))
    return torch.stack(outside).mean()


def objective(
    model: Decoder, inputs_BL: Tensor, targets_BL: Tensor, top_k: int | None, switch: SwitchConfig
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What a step minimises, its cross-entropy, and the share of mass outside the chosen experts.

    Dense if `top_k` is None, and then without a penalty (the third value is None). Otherwise sparse
    and with it, on routers refreshed from the present weights.
    """
    trace, policy = None, ExpertPolicy.dense()
    if top_k is not None:
        for ffn in model.ffns():
            refresh_router(ffn)
        trace, policy = Trace(keep_inputs=True), ExpertPolicy.top_k(top_k)
    logits_BLV = model.logits(inputs_BL, policy, trace)
    loss = F.cross_entropy(logits_BLV.flatten(0, 1), targets_BL.flatten())
    if trace is None:
        return loss, loss, None
    outside = penalty(model, trace, switch.penalty_tokens)
    return loss + switch.penalty * outside, loss, outside


def gradients(model: Decoder, total: Tensor, clip: float) -> Tensor:
    """Backward pass into fresh gradients, clipped to the norm `clip`; returns the norm before."""
    model.zero_grad(set_to_none=True)
    total.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return torch.nn.utils.clip_grad_norm_(model.parameters(), clip)


class Trainer:
    """One run in one directory; `train` starts or resumes it and returns the checkpoint's path."""

    def __init__(
        self,
        config: TrainConfig,
        run: Path,
        paths: Sequence[Path] = (),
        monitor: Monitor | None = None,
        command: str = "",
        *,
        device: str = "cpu",
        fresh: bool = False,
        valid_paths: Sequence[Path] = (),
    ) -> None:
        self.config = config
        self.run = run
        self.monitor = monitor or SilentMonitor()
        self.command = command
        self.fresh = fresh
        self.device = device
        check_device(device)
        self.progress: run_state.Progress | None = None
        tokens = data.open_tokens(
            paths,
            valid_paths,
            run / "tokens",
            vocab_size=config.model.vocab_size,
            valid_share=config.valid_share,
            seed=config.seed,
            report=self.monitor.message,
            tokenizer_for=self._resumed_tokenizer,
        )
        self.prepared = prepare(config, tokens, self.monitor, device)
        self.model = Decoder(
            config.model.model_config(
                config.sequence_length, self.prepared.tokenizer.eos_id, config.dtype
            )
        )
        self.model.initialize(self._generator(0))
        self.model.to(device)
        self.optimizer = build_optimizer(self.model, config)
        self.controller = SwitchController(config)
        self.patterns: dict[str, ActivationPattern] = {}
        self.switches: list[dict[str, Any]] = []
        self.step = 0
        self.seconds = 0.0

    def _generator(self, stream: int) -> torch.Generator:
        """A generator for one purpose; a function of the seed alone, so resuming repeats it."""
        return torch.Generator().manual_seed(self.config.seed * 1_000_003 + stream)

    def train(self) -> Path:
        """Train to the end, resuming what an earlier process left in the run's directory.

        Raises:
            TrainingError: if another process trains in the run's directory.
            NonFiniteLoss: if the loss or a gradient stops being finite.
        """
        with run_state.exclusive(self.run):
            run_state.sweep(self.run)
            if self.fresh:
                run_state.clear(self.run)
            if self.progress is not None:
                self._resume(self.progress)
            return self._train()

    def _train(self) -> Path:
        log = run_state.RunLog(self.run, self.step if self.progress is not None else None)
        save_every = self.config.steps_of(self.config.checkpoint_share)
        while self.step < self.config.steps:
            began = time.perf_counter()
            self._probe_and_switch(log)
            loss, outside, top_k = self._train_step()
            elapsed = time.perf_counter() - began
            self.seconds += elapsed
            speed = self.config.batch_tokens / elapsed
            self.monitor.step(self.step, loss, self.controller.phase.value, speed)
            if self.step % _LOG_EVERY == 0:
                log.write(
                    self.step, loss=loss, outside=outside, top_k=top_k, tokens_per_second=speed
                )
            self.step += 1
            if self.step % save_every == 0 or self.step == self.config.steps:
                self._save_state()
        return self._finish()

    def _resumed_tokenizer(self, fingerprint: str) -> Tokenizer | None:
        """Find where the run's directory left off; its tokenizer, or None for a new run.

        Raises:
            TrainingError: if it holds a run of another configuration, corpus or machine.
        """
        progress = None if self.fresh else run_state.load_progress(self.run)
        if progress is None:
            return None
        run_state.check_resumable(self.run, progress, self.config.digest, fingerprint, self.device)
        self.progress = progress
        return run_state.saved_tokenizer(self.run)

    def _resume(self, progress: run_state.Progress) -> None:
        self.patterns = run_state.load_state(self.run, self.model, self.optimizer)
        self.controller = SwitchController.from_dict(self.config, progress.controller)
        self.step, self.seconds, self.switches = progress.step, progress.seconds, progress.switches
        self.monitor.message(f"resuming at step {self.step} of {self.config.steps}")

    def _save_state(self) -> None:
        progress = run_state.Progress(
            step=self.step,
            seconds=self.seconds,
            controller=self.controller.to_dict(),
            switches=self.switches,
            config_digest=self.config.digest,
            corpus_fingerprint=self.prepared.tokens.fingerprint,
            device=self.device,
            threads=torch.get_num_threads(),
        )
        run_state.save_state(
            self.run,
            self.model,
            self.optimizer,
            self.prepared.tokenizer,
            self.patterns,
            progress,
        )

    def _probe_and_switch(self, log: run_state.RunLog) -> None:
        """Look at the activations when due, and change the phase if the controller decides so."""
        if self.controller.wants_probe(self.step):
            now = observe(self.model, self.prepared.probe_BL)
            settled = self._similarity("previous", now)
            drift = self._similarity("birth", now)
            self.patterns["previous"] = now
            self.controller.observe(settled, drift)
            log.write(self.step, settled=settled, drift=drift, active=now.active_shares)
        decision = self.controller.decide(self.step)
        if decision is not None:
            self._switch(decision)
            log.write(self.step, switch=decision.to_dict())

    def _similarity(self, name: str, now: ActivationPattern) -> float | None:
        then = self.patterns.get(name)
        return similarity(then, now) if then is not None else None

    def _switch(self, decision: Decision) -> None:
        self.monitor.message(f"step {decision.step}: {decision.phase.value}, {decision.reason}")
        self.switches.append(decision.to_dict())
        clustered_before = any(switch["cluster"] for switch in self.switches[:-1])
        if decision.cluster:
            layouts = build_experts(
                self.model,
                self.optimizer,
                self.prepared.probe_BL,
                self._generator(decision.step + 1),
                warm_start=clustered_before,
            )
            self.patterns = {n: p.permute(layouts) for n, p in self.patterns.items()}
            self.patterns["birth"] = observe(self.model, self.prepared.probe_BL)
        if decision.phase is Phase.DENSE:
            self.patterns.pop("birth", None)

    def _train_step(self) -> tuple[float, float | None, int | None]:
        """One optimiser step; returns (loss, share of mass outside the experts, k), dense: None."""
        inputs_BL, targets_BL = (
            tensor.to(self.device) for tensor in self.prepared.batches.batch(self.step)
        )
        top_k = self.controller.step_top_k(self.step)
        total, loss, outside = objective(
            self.model, inputs_BL, targets_BL, top_k, self.config.switch
        )
        self._update(total, sparse=top_k is not None)
        return loss.item(), None if outside is None else outside.item(), top_k

    def _update(self, total: Tensor, *, sparse: bool) -> None:
        """Gradients and optimiser step; stops before the step on a non-finite value."""
        norm = gradients(self.model, total, self.config.optimizer.grad_clip).item()
        value = total.item()
        if not (math.isfinite(value) and math.isfinite(norm)):
            raise NonFiniteLoss(
                f"step {self.step}: loss {value:g}, gradient norm {norm:g}; stopped "
                f"before the optimiser step, {self.run} keeps the last good state; lower "
                f"optimizer.learning_rate or raise optimizer.warmup_share"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.step)
        if sparse:
            self.optimizer.sparse_step()
        else:
            self.optimizer.step()

    def _finish(self) -> Path:
        """Round to the saved dtype, calibrate, evaluate those weights, write the checkpoint."""
        _round_parameters(self.model, getattr(torch, self.config.dtype))
        for ffn in self.model.ffns():
            refresh_router(ffn)
        calibrate_routers(self.model, self.prepared.probe_BL)
        curve = quality_curve(
            self.model,
            self.prepared.valid,
            lambda policy: self.monitor.message(f"evaluate {policy}"),
        )
        num_experts = self.config.model.num_experts
        experts = dataclasses.replace(
            self.model.config.experts,
            default_policy=curve.recommended(num_experts),
            quality=curve.points(num_experts),
        )
        self.model.config = dataclasses.replace(self.model.config, experts=experts)
        report = self._report(curve)
        path = self.run / "checkpoint"
        card = model_card(self.model.config, report)
        checkpoint.save(path, self.model, self.prepared.tokenizer, report, {"README.md": card})
        return path

    def _report(self, curve: QualityCurve) -> dict[str, Any]:
        """The content of `training_report.json`."""
        prepared = self.prepared
        active = observe(self.model, prepared.probe_BL).active_shares
        return {
            "command": self.command,
            "config": dataclasses.asdict(self.config),
            "corpus": {
                "description": prepared.tokens.description,
                "fingerprint": prepared.tokens.fingerprint,
                "train_tokens": prepared.train_tokens,
                "held_out_tokens": sum(targets.numel() for _, targets in prepared.valid),
            },
            "tokens_seen": self.config.steps * self.config.batch_tokens,
            "seconds": round(self.seconds, 1),
            "switches": self.switches,
            "active_neurons": active,
            "evaluation": curve.to_dict(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "device": torch.cuda.get_device_name() if self.device == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
        }


@torch.no_grad()
def _round_parameters(model: Decoder, dtype: torch.dtype) -> None:
    """Round parameters to values that `dtype` can hold: what is scored is what is saved."""
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype).to(parameter.dtype))
