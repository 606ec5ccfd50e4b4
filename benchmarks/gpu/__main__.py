"""The engine on a GPU: kernels checked and timed, whole models decoded, sparse against dense.

    python -m benchmarks.gpu [--sections check,kernels,...] [--seconds 450] [--json FILE]

Sections, in the order in which they run: `check` (every kernel against its reference) and
`prompt-check` (the rest of them, and captured prompt steps), `decode` and `prefill` (whole models,
benchmarks/gpu/model.py), `kernels` (bandwidth and rate against ceilings measured in the same run,
benchmarks/gpu/kernels.py), `prompts` (rivals for large prompts, benchmarks/gpu/prompts.py), `tiles`
(candidates for the kernels' tiles, benchmarks/gpu/tiles.py), and `training`
(benchmarks/gpu/training.py). `prompts` and `training` run only when asked.

Every time is of work replayed from a CUDA graph, which is how the engine decodes, unless a row says
otherwise. Rivals of one row are replayed in turn, round after round, and the median round counts.

A failing case prints its error and the rest goes on; the exit status is 1 then. Cases that would
start after --seconds are skipped with a line that says so. The JSON file is rewritten after every
case. --tiny runs every section at sizes that Triton's interpreter can bear (TRITON_INTERPRET=1 on a
machine without a GPU), to try the code out; its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from benchmarks.gpu import kernels, model, prompts, tiles, training
from benchmarks.gpu.kernels import Case
from benchmarks.records import MACHINE, VERSIONS, Record, write_records

HEADER = f"{'measurement':<34} {'parameters':<60} {'value':>10} {'unit':<9}{'peer':>10}{'ratio':>8}"
HIDDEN = ("dtype", "F")


def row(record: Record) -> str:
    """One line of the table."""
    params = " ".join(f"{k}={v}" for k, v in record.params.items() if k not in HIDDEN)
    peer = "" if record.peer_value is None else f"{record.peer_value:10.4g}"
    ratio = "" if record.ratio is None else f"{record.ratio:6.2f}x"
    return (
        f"{record.name:<34} {params:<60} {record.value:10.4g} {record.unit:<9}{peer:>10}{ratio:>8}"
    )


def training_cases() -> Iterator[Case]:
    """The section `training`, one case a group of its records."""
    for number, found in enumerate(training.measurements()):
        yield f"training {number}", partial(list, found)


def sections(tiny: bool) -> dict[str, Callable[[], Iterator[Case]]]:
    """The cases of each section, made as they are needed."""
    sizes = kernels.TINY if tiny else kernels.FULL
    shapes = model.TINY if tiny else model.FULL
    return {
        "check": partial(kernels.checks, sizes),
        "prompt-check": partial(prompts.check_cases, sizes),
        "decode": partial(model.decode_cases, shapes),
        "prefill": partial(model.prefill_cases, shapes),
        "kernels": partial(kernels.cases, sizes),
        "prompts": partial(prompts.cases, sizes),
        "tiles": partial(tiles.cases, sizes),
        "training": training_cases,
    }


USUAL = ("check", "prompt-check", "decode", "prefill", "kernels", "tiles")


@dataclass
class Report:
    """Runs cases one after another, prints and keeps what they find.

    Attributes:
        deadline: on `time.monotonic`; no case starts after it.
        path: where the records go after every case, if anywhere.
        records, failures, skipped: what came of the cases so far.
    """

    deadline: float
    path: Path | None = None
    records: list[Record] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def section(self, name: str, cases: Callable[[], Iterator[Case]]) -> None:
        """All cases of a section. An error while a case is prepared ends the section alone."""
        print(f"--- {name}, {self.deadline - time.monotonic():.0f} s left", flush=True)
        remaining = cases()
        while True:
            if time.monotonic() > self.deadline:
                self.skipped.append(name)
                print(f"skipped: the rest of section {name}, no time is left", flush=True)
                return
            try:
                label, case = next(remaining)
            except StopIteration:
                return
            except Exception as error:
                self._failed(f"section {name}", error)
                return
            self._run(label, case)

    def _run(self, label: str, case: Callable[[], list[Record]]) -> None:
        try:
            found = case()
        except (Exception, SystemExit) as error:
            self._failed(label, error)
            return
        self.records += found
        print("\n".join(row(record) for record in found), flush=True)
        if self.path is not None:
            write_records(self.path, self.records)

    def _failed(self, label: str, error: BaseException) -> None:
        self.failures.append(label)
        last = traceback.extract_tb(error.__traceback__)[-1:]
        where = "".join(f" ({frame.filename}:{frame.lineno})" for frame in last)
        text = " ".join(str(error).split())[:400]
        print(f"FAILED {label}: {type(error).__name__}: {text}{where}", flush=True)


def device_is_lost() -> bool:
    """Whether an error has left this process without its device, as an illegal access does."""
    if not torch.cuda.is_available():
        return False
    try:
        torch.cuda.synchronize()
        torch.ones(1, device="cuda").add_(1).tolist()
    except Exception:
        return True
    return False


def go_on_elsewhere(report: Report, rest: list[str], tiny: bool) -> None:
    """Run the remaining sections in a process with a device of its own; takes its records over."""
    print(f"the device is lost to this process; a new one runs {', '.join(rest)}", flush=True)
    command = [sys.executable, "-m", "benchmarks.gpu", "--sections", ",".join(rest)]
    command += ["--seconds", str(max(1, round(report.deadline - time.monotonic())))]
    command += ["--tiny"] if tiny else []
    further = None if report.path is None else report.path.with_suffix(".rest.json")
    command += [] if further is None else ["--json", str(further)]
    if subprocess.run(command, check=False).returncode:
        report.failures.append("a section in the new process")
    if further is not None and report.path is not None and further.exists():
        report.records += [Record(**values) for values in json.loads(further.read_text("utf-8"))]
        further.unlink()
        write_records(report.path, report.records)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Check and time the engine on a GPU.")
    parser.add_argument("--sections", default=",".join(USUAL), help="comma-separated [%(default)s]")
    parser.add_argument("--seconds", type=float, default=450.0, help="start no case after it [450]")
    parser.add_argument("--json", type=Path, help="write the records to this file")
    parser.add_argument(
        "--tiny", action="store_true", help="try the code out; numbers mean nothing"
    )
    found = parser.parse_args(arguments)
    found.sections = found.sections.split(",")
    unknown = sorted(set(found.sections) - set(sections(False)))
    if unknown:
        parser.error(
            f"unknown sections {', '.join(unknown)}; there are {', '.join(sections(False))}"
        )
    return found


def main(arguments: list[str] | None = None) -> None:
    chosen = parse(arguments)
    if not (torch.cuda.is_available() or chosen.tiny):
        raise SystemExit("benchmarks.gpu needs a CUDA device")
    torch.manual_seed(0)
    print(MACHINE, VERSIONS)
    print(HEADER)
    report = Report(time.monotonic() + chosen.seconds, chosen.json)
    available = sections(chosen.tiny)
    names = [name for name in available if name in chosen.sections]
    for number, name in enumerate(names):
        report.section(name, available[name])
        if report.failures and names[number + 1 :] and device_is_lost():
            go_on_elsewhere(report, names[number + 1 :], chosen.tiny)
            break
    print(
        f"{len(report.records)} records, {len(report.failures)} failures, "
        f"sections cut short: {', '.join(report.skipped) or 'none'}"
    )
    if report.failures:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
