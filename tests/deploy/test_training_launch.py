"""The recipes that start training on one machine, on several, and under Slurm.

They run for real, with two processes on this machine's processors. Slurm's own commands are those
of tests/deploy/slurm, which do here what Slurm does on its nodes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.training.parallel.test_distributed import free_port

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "deploy" / "training"
FAKES = ROOT / "tests" / "deploy" / "slurm"
SCRIPTS = sorted([*RECIPES.iterdir(), *FAKES.iterdir()])
SMALL = """
preset = "smoke"
steps = 40
batch_size = 2
sequence_length = 32
valid_share = 0.1
validate_share = 0
evaluate_tokens = 512
"""


def environment(**variables: str) -> dict[str, str]:
    """The commands of this environment and, after them, of the system."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    quiet = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT)}
    return {**os.environ, "PATH": path, **quiet, **variables}


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of `ambidex train`, but for --out."""
    folder = tmp_path_factory.mktemp("launch")
    shutil.copytree(Path(json.__file__).parent, folder / "corpus")
    (folder / "run.toml").write_text(SMALL)
    return ["--config", str(folder / "run.toml"), "--data", str(folder / "corpus")]


def report(run: Path) -> dict[str, object]:
    return json.loads((run / "checkpoint" / "training_report.json").read_text())


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound(script: Path) -> None:
    checks = [["bash", "-n", str(script)], ["shellcheck", "-x", "-P", str(RECIPES), str(script)]]
    for command in checks:
        checked = subprocess.run(command, capture_output=True, text=True, env=environment())
        assert checked.returncode == 0, checked.stdout + checked.stderr
    assert script.name == "environment.sh" or os.access(script, os.X_OK)


def test_one_node(arguments: list[str], tmp_path: Path) -> None:
    """Two processes train, the first one publishes."""
    run, target = tmp_path / "run", tmp_path / "models" / "one"
    command = [
        str(RECIPES / "one-node.sh"),
        *arguments,
        "--out",
        str(run),
        "--publish",
        str(target),
    ]
    done = subprocess.run(
        command, env=environment(PROCESSES="2"), capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert report(run)["processes"] == 2
    assert (target / "manifest.json").is_file()


class Job:
    """A job of Slurm: the batch script runs on the first of two nodes."""

    def __init__(self, folder: Path, arguments: list[str], **variables: str) -> None:
        self.folder = folder
        slurm = {
            "FAKE_SLURM": str(folder),
            "SLURM_JOB_ID": "4242",
            "SLURM_JOB_NODELIST": "node[0-1]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_CPUS_PER_TASK": "3",
            "SLURM_SUBMIT_DIR": str(ROOT),
        }
        given = environment(**slurm, **variables)
        given["PATH"] = f"{FAKES}:{given['PATH']}"
        # Slurm runs a copy of the script, somewhere else.
        script = shutil.copy(RECIPES / "slurm.sbatch", folder / "slurm_script")
        with (folder / "output").open("ab") as output:
            self.process = subprocess.Popen(
                [script, *arguments], cwd=folder, env=given, stdout=output, stderr=output
            )

    @property
    def output(self) -> str:
        return (self.folder / "output").read_text()

    @property
    def requeued(self) -> bool:
        return (self.folder / "requeued").exists()

    def wait_for(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + 240
        while not condition():
            assert self.process.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.02)

    def end(self) -> int:
        try:
            return self.process.wait(240)
        finally:
            self.process.kill()
            for task in (self.folder / "tasks").read_text().split():
                if Path(f"/proc/{task}").exists():
                    os.killpg(int(task), signal.SIGKILL)


# What Python runs first: once the file beside it is there, the disk takes its time.
SLOW_DISK = """
import os, pathlib, time
fsync, slow = os.fsync, pathlib.Path(__file__).with_name("slow")
os.fsync = lambda file: (slow.exists() and time.sleep(0.6), fsync(file))[1]
"""


def test_slurm_saves_when_time_is_out_and_goes_on(arguments: list[str], tmp_path: Path) -> None:
    """Two nodes of one process each meet, save when told to, and end the run the second time.

    The state takes longer to write than the second node, whose end kills the first, has to wait.
    """
    run, disk = tmp_path / "run", tmp_path / "disk"
    disk.mkdir()
    (disk / "sitecustomize.py").write_text(SLOW_DISK)
    command = [*arguments, "--out", str(run)]
    first = Job(tmp_path, command, PROCESSES="1", PORT=free_port(), PYTHONPATH=f"{disk}:{ROOT}")
    first.wait_for(lambda: re.search(r"step \d+/40", first.output))
    (disk / "slow").touch()
    first.process.send_signal(signal.SIGUSR1)
    assert first.end() != 0, first.output
    assert first.requeued
    assert "with its state saved" in first.output
    assert not (run / "checkpoint").exists()
    (tmp_path / "requeued").unlink()
    second = Job(tmp_path, command, PROCESSES="1", PORT=free_port())
    assert second.end() == 0, second.output
    assert not second.requeued
    assert "resuming at step" in second.output
    assert report(run)["processes"] == 2


@pytest.fixture
def step(tmp_path: Path) -> Path:
    """A step that ends with a status, or goes on until SIGTERM and then for a moment."""
    script = tmp_path / "node.sh"
    script.write_text(
        "#!/bin/bash\n"
        '[ "$1" = for-ever ] || exit "$1"\n'
        "trap 'kill $!; sleep 0.3; echo saved; sleep 0.3; exit 1' TERM\n"
        "sleep 60 & echo started $HEAD $NODES $PORT $SLURM_CPUS_PER_TASK; wait\n"
    )
    script.chmod(0o755)
    return tmp_path


@pytest.mark.parametrize("status", [0, 3])
def test_slurm_ends_with_the_runs_status(step: Path, status: int) -> None:
    job = Job(step, [str(status)], AMBIDEX_RECIPES=str(step))
    assert job.end() == status, job.output
    assert not job.requeued


def test_slurm_waits_for_the_state_when_preempted(step: Path) -> None:
    """Slurm tells steps and batch script, and requeues the job by itself."""
    job = Job(step, ["for-ever"], AMBIDEX_RECIPES=str(step))
    job.wait_for(lambda: job.output.count("started 127.0.0.1 2 24242 3") == 2)
    for task in (step / "tasks").read_text().split():
        os.killpg(int(task), signal.SIGTERM)
    job.process.send_signal(signal.SIGTERM)
    assert job.end() == 1, job.output
    assert job.output.count("saved") == 3
    assert not job.requeued
