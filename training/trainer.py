"""The training loop, readable from top to bottom.

    prepare corpus, tokenizer, model
    for every step: probe activations when due, switch phase if decided, train one step
    evaluate dense and by share of experts, write the checkpoint

Dense steps run every neuron; sparse steps compute the chosen experts' forward and backward pass
alone, plus the concentration penalty on a sample of the tokens. See docs/ssd.md.

Shapes: B sequences, L length.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Final, Protocol

import torch

from engine.checkpoint import check_device
from engine.gpu.training import use_kernels
from engine.model.decoder import Decoder
from engine.policy import ExpertPolicy
from engine.text.tokenizer import Tokenizer
from training.config import TrainConfig
from training.data.run_data import lay_out
from training.data.shards import is_token_directory
from training.data.tokens import TokenData, open_tokens
from training.errors import Interrupted, NonFiniteLoss, TrainingError
from training.experts.activation import ActivationPattern, observe, similarity
from training.experts.conversion import build_experts, refresh_routers
from training.experts.flops import FlopCounter
from training.experts.optimizer import build_optimizer, learning_rate
from training.experts.study import study
from training.importing.start import Start
from training.parallel.distributed import SharedObjective, Team
from training.parallel.sharding import plain, whole
from training.quality.evaluation import evaluate
from training.run import run_state
from training.run.finish import write_checkpoint
from training.run.interrupt import StopRequest
from training.step import accumulate
from training.switching import Decision, Phase, SwitchController

# Every n-th step is logged. The number is odd, because the mixed phase alternates dense and sparse
# steps: an even one would log only one of the two kinds.
_LOG_EVERY: Final = 7


class TrainingMonitor(Protocol):
    """What the training loop calls to tell about its progress; a progress bar implements it."""

    def message(self, text: str) -> None: ...

    def step(self, step: int, loss: float, phase: str, tokens_per_second: float) -> None: ...


class SilentTraining:
    """Ignores what it is told."""

    def message(self, text: str) -> None:
        pass

    def step(self, step: int, loss: float, phase: str, tokens_per_second: float) -> None:
        pass


class Log(Protocol):
    """Takes the records of a run: its own log does, and so does TensorBoard's."""

    def write(self, step: int, **values: Any) -> None: ...


class Trainer:
    """One run in one directory; `train` starts or resumes it and returns the checkpoint's path."""

    def __init__(
        self,
        config: TrainConfig,
        run: Path,
        paths: Sequence[Path] = (),
        monitor: TrainingMonitor | None = None,
        command: str = "",
        *,
        device: str = "cpu",
        fresh: bool = False,
        valid_paths: Sequence[Path] = (),
        tensorboard: bool = False,
        team: Team | None = None,
        start: Start | None = None,
    ) -> None:
        self.config = config
        self.start = start
        self.start_record: dict[str, Any] = {}
        self.run = run
        self.team = team or Team(device)
        check_device(device)
        self._check_team()
        self.monitor = monitor if monitor and self.team.is_main else SilentTraining()
        self.command = command
        self.fresh = fresh
        self.device = device
        self.tensorboard = tensorboard
        self.progress: run_state.Progress | None = None
        # The first process makes the tokens while the others wait; then they map them.
        with self.team.main_first(f"tokens of {run}"):
            tokens = self._open_tokens(paths, valid_paths)
            if start is not None:
                start.check_tokenizer(tokens.tokenizer, tokens.description)
        self.monitor.message(
            f"tokens: {tokens.train.size:,} to train on, {tokens.valid.size:,} held out"
        )
        self.data = lay_out(config, tokens, device)
        self.model = self._new_model(tokens.tokenizer)
        use_kernels(self.model)
        shape = self.model.config
        # Sharding replaces the parameters, so the optimiser comes after it.
        self.objective = SharedObjective(self.model, config.parallel, self.team)
        self.optimizer = build_optimizer(self.model, config)
        self.controller = SwitchController(config)
        self.counter = FlopCounter(shape, config.switch, config.sequence_length)
        self.patterns: dict[str, ActivationPattern] = {}
        self.switches: list[dict[str, Any]] = []
        self.logs: list[Log] = []
        self.step = 0
        self.seconds = 0.0
        self.flops = 0.0

    def _new_model(self, tokenizer: Tokenizer) -> Decoder:
        """Make the model to train: a new one, or the one that the run goes on from."""
        config = self.config
        if self.start is not None:
            model = Decoder(self.start.model_config(config))
            self.start.load_into(model)
            self.start_record = self.start.measure(model.to(self.device), self.data.valid)
            self._tell_start()
            return model.to("cpu")
        shape = config.model.model_config(config.sequence_length, tokenizer.eos_id, config.dtype)
        model = Decoder(shape)
        model.initialize(self._generator(0))
        return model

    def _tell_start(self) -> None:
        record = self.start_record
        swapped = record.get("swapped")
        more = f", {swapped:.2f} with ReLU in place of {record['activation']}" if swapped else ""
        self.monitor.message(
            f"going on from {record['source']}: held-out perplexity {record['before']:.2f}{more}"
        )

    def _check_team(self) -> None:
        size, batch = self.team.size, self.config.batch_size
        if batch % size:
            self.team.refuse(
                TrainingError(
                    f"batch_size {batch} must be divisible by the number of processes, {size}"
                )
            )

    def _open_tokens(self, paths: Sequence[Path], valid_paths: Sequence[Path]) -> TokenData:
        """Open the run's tokens; the first process makes them, the others map what it made."""
        made = self.run / "tokens"
        if not self.team.is_main and not any(is_token_directory(path) for path in paths):
            paths, valid_paths = [made], []
        return open_tokens(
            paths,
            valid_paths,
            made,
            vocab_size=self.config.model.vocab_size,
            valid_share=self.config.valid_share,
            seed=self.config.seed,
            report=self.monitor.message,
            tokenizer_for=self._resumed_tokenizer,
            verify=self.team.is_main,
        )

    def _generator(self, stream: int) -> torch.Generator:
        """Make a generator for one purpose; only the seed decides, so a resumed run repeats it."""
        return torch.Generator().manual_seed(self.config.seed * 1_000_003 + stream)

    def train(self, stop: StopRequest | None = None) -> Path:
        """Train to the end, resuming what an earlier process left in the run's directory.

        Args:
            stop: when it becomes true, the running step is finished and its state saved.

        Raises:
            TrainingError: if another process trains in the run's directory.
            NonFiniteLoss: if the loss or a gradient stops being finite.
            Interrupted: if `stop` asked for it.
            StorageError: if a state or the checkpoint cannot be written.
        """
        with run_state.exclusive(self.run) if self.team.is_main else nullcontext():
            if self.team.is_main:
                run_state.sweep(self.run)
                if self.fresh:
                    run_state.clear(self.run)
            self.team.barrier()
            if self.progress is not None:
                self._resume(self.progress)
            self._open_logs()
            self._train(StopRequest() if stop is None else stop)
            return self._finish()

    def _train(self, stop: StopRequest) -> None:
        save_every = self.config.steps_of(self.config.checkpoint_share)
        while self.step < self.config.steps:
            self._validate()
            began = time.perf_counter()
            self._probe_and_switch()
            record = self._train_step()
            elapsed = time.perf_counter() - began
            self.seconds += elapsed
            self._report_step(record, self.config.batch_tokens / elapsed)
            self.step += 1
            stopping = self.team.any(bool(stop))
            if stopping or self.step % save_every == 0 or self.step == self.config.steps:
                self._save_state()
            if stopping:
                # Slurm kills the other processes as soon as one has ended, so nobody leaves before
                # the first process has saved the state.
                self.team.barrier()
            if stopping and self.step < self.config.steps:
                self.team.refuse(
                    Interrupted(
                        f"{stop.signal.name if stop.signal else 'stop'}: stopped before step "
                        f"{self.step} of {self.config.steps} with its state saved; run the same "
                        f"command again to go on"
                    )
                )
        self._validate()

    def _open_logs(self) -> None:
        if not self.team.is_main:
            return
        resumed = self.step if self.progress is not None else None
        self.logs = [run_state.RunLog(self.run, resumed)]
        run_state.write_config(self.run, self.config)
        if self.tensorboard:
            from training.report.tensorboard import TensorBoardLog

            self.logs.append(TensorBoardLog(self.run, self.step))

    def _log(self, **values: Any) -> None:
        for log in self.logs:
            log.write(self.step, **values)

    def _report_step(self, record: dict[str, Any], speed: float) -> None:
        self.monitor.step(self.step, record["loss"], record["phase"], speed)
        if self.step % _LOG_EVERY == 0:
            self._log(
                **record,
                lr=learning_rate(self.config, self.step),
                tokens_per_second=speed,
                flops=self.flops,
                seconds=self.seconds,
            )

    def _resumed_tokenizer(self, fingerprint: str) -> Tokenizer | None:
        """Find where the run left off; returns the tokenizer to use, or None to learn a new one.

        Raises:
            TrainingError: if it holds a run of another configuration, corpus or machine.
        """
        progress = None if self.fresh else run_state.load_progress(self.run)
        own = None if self.start is None else self.start.tokenizer
        if progress is None:
            return own
        self.progress = progress
        if not self.team.is_main:  # the first process, which knows the text, checks for all
            return None
        run_state.check_resumable(
            self.run, progress, self.config.digest, fingerprint, self.device, self.team.size
        )
        if progress.processes != self.team.size:
            self.monitor.message(
                f"saved by {progress.processes} processes, now {self.team.size}: the run goes on "
                f"with the same loss up to rounding"
            )
        return own or run_state.saved_tokenizer(self.run)

    def _resume(self, progress: run_state.Progress) -> None:
        self.patterns = run_state.load_state(self.run, self.model, self.optimizer)
        self.controller = SwitchController.from_dict(self.config, progress.controller)
        self.step, self.switches = progress.step, progress.switches
        self.seconds, self.flops = progress.seconds, progress.flops
        self.monitor.message(f"resuming at step {self.step} of {self.config.steps}")

    def _save_state(self) -> None:
        progress = run_state.Progress(
            step=self.step,
            seconds=self.seconds,
            flops=self.flops,
            controller=self.controller.to_dict(),
            switches=self.switches,
            config_digest=self.config.digest,
            corpus_fingerprint=self.data.tokens.fingerprint,
            device=self.device,
            threads=torch.get_num_threads(),
            processes=self.team.size,
        )
        run_state.save_state(
            self.run,
            self.model,
            self.optimizer,
            self.data.tokens.tokenizer,
            self.patterns,
            progress,
            self.config.keep_states,
            is_main=self.team.is_main,
        )

    def _probe_and_switch(self) -> None:
        """Look at the activations when due, and change the phase if the controller decides so."""
        if self.controller.wants_probe(self.step):
            now = observe(self.model, self.data.probe_BL)
            settled = self._similarity("previous", now)
            drift = self._similarity("birth", now)
            self.patterns["previous"] = now
            self.controller.observe(settled, drift)
            seen = study(self.model, self.data.probe_BL, self.config.switch.top_k[-1])
            self._log(probe=seen.to_dict(), settled=settled, drift=drift)
            # A probe takes two forward passes; each costs a third of what training on a token does.
            self.flops += self.counter.plain_token * 2 / 3 * self.data.probe_BL.numel()
        decision = self.controller.decide(self.step)
        if decision is not None:
            self._switch(decision)
            self._log(switch=decision.to_dict())

    def _similarity(self, name: str, now: ActivationPattern) -> float | None:
        then = self.patterns.get(name)
        return self.team.agree_number(similarity(then, now)) if then is not None else None

    def _switch(self, decision: Decision) -> None:
        self.monitor.message(f"step {decision.step}: {decision.phase.value}, {decision.reason}")
        grouped = self.start is not None and not self.start.smooth
        clustered_before = grouped or any(switch["cluster"] for switch in self.switches)
        self.switches.append(decision.to_dict())
        if decision.cluster:
            self._cluster(warm_start=clustered_before)
            self.patterns["birth"] = observe(self.model, self.data.probe_BL)
        if decision.phase is Phase.DENSE:
            self.patterns.pop("birth", None)

    def _cluster(self, *, warm_start: bool) -> None:
        """Build the experts anew, and move everything along that is indexed by neuron."""
        layouts = build_experts(
            self.model,
            self.optimizer,
            self.data.probe_BL,
            self._generator(self.step + 1),
            warm_start=warm_start,
            agree=self.team.agree,
        )
        self.patterns = {n: p.permute(layouts) for n, p in self.patterns.items()}

    def _train_step(self) -> dict[str, Any]:
        """One optimiser step; returns its record for the log."""
        top_k = self.controller.step_top_k(self.step)
        refresh_routers(self.model)
        self.optimizer.zero_grad(set_to_none=True)
        inputs_BL, targets_BL = self.data.batches.batch(self.step, self.team.rank, self.team.size)
        loss, outside = accumulate(
            lambda inputs, targets: self.objective(inputs, targets, top_k, self.config.switch),
            inputs_BL.to(self.device),
            targets_BL.to(self.device),
            self.config,
            self.objective.unfinished,
        )
        loss = self.team.mean(loss)
        outside = None if outside is None else self.team.mean(outside)
        norm = self._update(loss.item(), sparse=top_k is not None)
        self.flops += self.counter.token(top_k) * self.config.batch_tokens
        return {
            "phase": self.controller.phase.value,
            "loss": loss.item(),
            "outside": None if outside is None else outside.item(),
            "top_k": top_k,
            "grad_norm": norm,
        }

    def _update(self, loss: float, *, sparse: bool) -> float:
        """Clip and take the optimiser's step, unless a value is not finite; returns the norm."""
        clip = self.config.optimizer.grad_clip
        # The norm is taken before clipping; that of a sharded model is a sum over all processes.
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        total = whole(torch.nn.utils.get_total_norm(gradients))
        torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), clip, total)
        norm = total.item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.team.refuse(
                NonFiniteLoss(
                    f"step {self.step}: loss {loss:g}, gradient norm {norm:g}; stopped before the "
                    f"optimiser step, {self.run} keeps the last good state; lower "
                    f"optimizer.learning_rate or raise optimizer.warmup_share"
                )
            )
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.step)
        if sparse:
            self.optimizer.sparse_step()
        else:
            self.optimizer.step()
        return norm

    def _validate(self) -> None:
        """Score some held-out text when due, dense and at the sparsest and the last k.

        This comes after the step's state was saved: the log of a resumed run ends before that
        step, so the resumed run scores the text again.
        """
        share = self.config.validate_share
        if not self.step or not share or self.step % self.config.steps_of(share):
            return
        switch = self.config.switch
        policies = {"dense": ExpertPolicy.dense()}
        if self.controller.phase is not Phase.DENSE:
            for k in sorted({switch.top_k[-1], min(switch.mixed_top_k)}):
                policies[str(k)] = ExpertPolicy.top_k(k)
        scores = {
            name: evaluate(self.model, self.data.glance, policy).perplexity
            for name, policy in policies.items()
        }
        self._log(valid=scores)
        found = ", ".join(f"{name} {score:.2f}" for name, score in scores.items())
        self.monitor.message(f"step {self.step}: held-out perplexity {found}")

    def _finish(self) -> Path:
        """Cluster the neurons if no switch did, score the model, and write the checkpoint."""
        if not any(switch["cluster"] for switch in self.switches):
            self._cluster(warm_start=False)
        refresh_routers(self.model)  # the last optimiser step moved the weights
        path = self.run / "checkpoint"
        model = plain(self.model, keep=self.team.is_main)
        if model is None:
            return path
        tokens = self.config.steps * self.config.batch_tokens
        history = {
            "command": self.command,
            "seconds": round(self.seconds, 1),
            "switches": self.switches,
            "flops": {"training": self.flops, "dense": self.counter.plain_token * tokens},
            "device": torch.cuda.get_device_name() if self.device == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
            "processes": self.team.size,
            **({"start": self.start_record} if self.start_record else {}),
        }
        write_checkpoint(
            path,
            model,
            self.config,
            self.data,
            history,
            self.monitor.message,
            texts={} if self.start is None else self.start.texts,
        )
        return path
