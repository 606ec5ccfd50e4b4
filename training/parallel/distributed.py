"""Several processes that train one model, as torchrun starts them.

Each process takes its part of every batch; gradients and what is logged are means over them. The
first process prepares the tokens and writes everything that a run leaves behind. All processes
look at activations and cluster neurons, since none could go on meanwhile, but what the first one
found is what all of them use, so that rounding on one GPU cannot set two processes apart.

    ddp   every process has all weights; gradients are averaged while they are made
    fsdp  every process has its rows of weights, gradients and moments; layers are gathered in turn

Any function here that says "collective" waits for all processes: each must call it, in turn.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from engine.checkpoint import check_device
from engine.errors import AmbidexError, require
from engine.model.decoder import Decoder
from training.errors import TrainingError
from training.step import Objective, objective

JOIN: Final = timedelta(minutes=5)  # until all processes have started
COLLECTIVE: Final = timedelta(minutes=30)  # a slow disk's state, not a dead process
PREPARE: Final = timedelta(hours=24)  # the first process tokenises a corpus
_FIRST_SPEAKS: Final = 2.0  # seconds: torchrun ends the others as soon as one process has failed
_VARIABLES: Final = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Team:
    """The processes of one run, seen by one of them.

    Attributes:
        device: "cpu" or "cuda", this process's GPU being the current one.
        rank: number of this process, from 0.
        size: how many there are.
        store: what they share before and beside collectives; None for one process.
    """

    device: str = "cpu"
    rank: int = 0
    size: int = 1
    store: Store | None = None

    @classmethod
    def from_environment(
        cls,
        device: str,
        *,
        join: timedelta = JOIN,
        collective: timedelta = COLLECTIVE,
        environment: Mapping[str, str] = os.environ,
    ) -> Team:
        """The team that torchrun's variables describe; one process without them.

        Args:
            device: "cpu" or "cuda".
            join: how long to wait until all processes have started.
            collective: how long a process waits for the others in the middle of the run.
            environment: where RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT are.

        Raises:
            ConfigError: if `device` is unknown or not here.
            TrainingError: if variables are missing or make no sense, this machine has fewer GPUs
                than processes, or the others do not join in time.
        """
        check_device(device)
        if "RANK" not in environment or environment.get("WORLD_SIZE") == "1":
            return cls(device)
        rank, size, local = _numbers(environment)
        if device == "cuda":
            gpus = torch.cuda.device_count()
            require(
                local < gpus,
                f"LOCAL_RANK is {local}, but this machine has {gpus} GPUs: start at most "
                f"--nproc-per-node {gpus}",
                TrainingError,
            )
            # NCCL talks from the current device, so it is chosen before anything is sent.
            torch.cuda.set_device(local)
        address = f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}"
        try:
            # The store is opened by itself, because joining and collectives wait for different
            # times, and because the team talks through it where no collective can be made.
            store, _, _ = next(rendezvous("env://", rank, size, timeout=join))
            dist.init_process_group(
                "nccl" if device == "cuda" else "gloo",
                store=PrefixStore("collectives", store),
                rank=rank,
                world_size=size,
                timeout=collective,
                device_id=torch.device("cuda", local) if device == "cuda" else None,
            )
        except (RuntimeError, ValueError, OSError) as error:
            reason = str(error).partition("\n")[0]
            raise TrainingError(
                f"process {rank} of {size} could not join the others at {address} within "
                f"{join.total_seconds():g} seconds ({reason})"
            ) from error
        return cls(device, rank, size, PrefixStore("team", store))

    @property
    def is_main(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def close(self) -> None:
        """Leave the group; for the end of a run that went well."""
        if self.size > 1:
            dist.destroy_process_group()

    def end_process(self) -> None:
        """End this process with status 0 if it is one of several; for when all its work is done.

        Neither leaving the group nor the interpreter's end waits for all of torch's threads, and
        sometimes one aborts a process that has nothing left to do ("terminate called without an
        active exception"), which torchrun would take for a failed run.
        """
        if self.size > 1:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)

    def __enter__(self) -> Team:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:  # after a failure the others may be stuck, and leaving waits for them
            self.close()

    def refuse(self, error: AmbidexError) -> NoReturn:
        """An error that every process has met alike: the first one raises it, the others end."""
        if self.is_main:
            raise error
        time.sleep(_FIRST_SPEAKS)
        raise SystemExit(1)

    @contextmanager
    def main_first(self, what: str, timeout: timedelta = PREPARE) -> Iterator[None]:
        """The first process runs the block, then the others do; `what` is used once.

        If it fails, the others end. They wait on the store, which needs no collective's timeout.
        """
        if self.store is None:
            yield
        elif self.is_main:
            try:
                yield
            except BaseException:
                self.store.set(what, "failed")
                raise
            self.store.set(what, "done")
        else:
            self.store.wait([what], timeout)
            if self.store.get(what) != b"done":
                time.sleep(_FIRST_SPEAKS)
                raise SystemExit(1)
            yield

    def barrier(self) -> None:
        """Wait for all. Collective."""
        if self.size > 1:
            self.any(False)

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on any process. Collective."""
        if self.size == 1:
            return flag
        found = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return bool(found.item())

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over processes of a plain tensor that is the same shape on each. Collective."""
        if self.size == 1:
            return tensor
        total = tensor.detach().clone()
        dist.all_reduce(total)
        return total / self.size

    def agree(self, tensor: Tensor) -> Tensor:
        """Overwrite a plain tensor with the first process's, and return it. Collective."""
        if self.size > 1:
            dist.broadcast(tensor, 0)
        return tensor

    def agree_number(self, number: float | None) -> float | None:
        """The first process's number or None. Collective."""
        if self.size == 1:
            return number
        value = torch.nan if number is None else number
        found = self.agree(torch.tensor(value, dtype=torch.float64, device=self.device)).item()
        return None if found != found else found


def _numbers(environment: Mapping[str, str]) -> tuple[int, int, int]:
    """(rank, size, local rank), checked."""
    missing = [name for name in _VARIABLES if not environment.get(name)]
    require(
        not missing,
        f"RANK is set but not {', '.join(missing)}: start several processes with torchrun",
        TrainingError,
    )
    values = {name: environment[name] for name in _VARIABLES[:3]}
    require(
        all(value.isdecimal() for value in values.values()),
        f"RANK, WORLD_SIZE and LOCAL_RANK must be whole numbers, got {', '.join(values.values())}",
        TrainingError,
    )
    rank, size, local = (int(value) for value in values.values())
    require(rank < size, f"RANK {rank} must be below WORLD_SIZE {size}", TrainingError)
    return rank, size, local


class _ObjectiveModule(nn.Module):
    """`objective` as a forward pass, the form in which DDP takes it."""

    def __init__(self, model: Decoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, *arguments: Any) -> Objective:
        return objective(self.model, *arguments)


class SharedObjective:
    """`training.step.objective` of a model whose gradients come out as means over the team.

    Making one moves `model` to the team's device and, for fsdp, shards its parameters in place: do
    it before the optimiser is made. Calls are collective.
    """

    def __init__(self, model: Decoder, parallel: str, team: Team) -> None:
        """Prepare `model` for `parallel`: "ddp" or "fsdp"; one process needs neither."""
        self._ddp: DistributedDataParallel | None = None
        self._forward: Callable[..., Objective] = _ObjectiveModule(model)
        if team.size > 1 and parallel == "fsdp":
            _shard(model, team)
        else:
            model.to(team.device)
        if team.size > 1 and parallel == "ddp":
            # Routers, which are buffers, follow from the weights, so they are alike without sending
            # them. Every parameter has a gradient at every step.
            self._ddp = DistributedDataParallel(_ObjectiveModule(model), broadcast_buffers=False)
            self._forward = self._ddp

    def __call__(self, *arguments: Any) -> Objective:
        """Compute `objective`; the arguments are the same, without the model."""
        return self._forward(*arguments)

    def unfinished(self) -> AbstractContextManager[None]:
        """The context of every micro-batch but the last: DDP sends gradients once a step.

        FSDP sends them for each micro-batch: keeping them would need room for all of them whole.
        """
        return self._ddp.no_sync() if self._ddp is not None else nullcontext()


def _shard(model: Decoder, team: Team) -> None:
    """Each layer, and what is left at the root (embedding and last norm), gathered in its turn.

    fully_shard moves one layer at a time to the device, so the whole model is never there.
    """
    mesh = init_device_mesh(team.device, (team.size,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    # The root is resharded too, unlike torch's default; otherwise its parameters would be other
    # objects after an evaluation.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
