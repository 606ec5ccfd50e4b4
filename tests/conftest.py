"""What holds for every test: threads, Triton's interpreter, the same examples, and honest skips.

The settings of threads and of Triton are read when torch and the kernels are imported, so they come
before those imports.
"""

from __future__ import annotations

import collections
import os
import re
from typing import Final

import pytest

# Tests run in parallel, a process by core; alone, a process has two threads for its tiny models.
# The processes that tests start inherit this.
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
# Threads that wait for work sleep instead of spinning: beside other processes, spinning makes tests
# of tiny models many times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch  # after the settings above
from hypothesis import settings

# How long an example takes says something about the machine, not about the code. The examples are
# the same in every run, so that a failure says something about the change; AMBIDEX_RANDOM_TESTS=1
# draws new ones.
SAME_EXAMPLES = "AMBIDEX_RANDOM_TESTS" not in os.environ
settings.register_profile("ambidex", deadline=None, derandomize=SAME_EXAMPLES)
settings.load_profile("ambidex")

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Why a test may be skipped on a machine that has all that the tests need, but no GPU and no Ray.
KNOWN_REASONS: Final = re.compile(r"could not import 'ray|make test-ray runs this|CUDA|no TMA")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all-installed",
        action="store_true",
        help="fail if a test was skipped for want of anything but a GPU or Ray",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Compile the CPU kernels before the workers start, which would all compile them at once."""
    if getattr(config.option, "numprocesses", None):
        from engine.cpu import native

        native.available()


def skipped_by_reason(skipped: list[pytest.TestReport]) -> dict[str, int]:
    reasons = collections.Counter[str]()
    for report in skipped:
        # Where it was skipped, the line, and "Skipped: ..."
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reasons[reason.removeprefix("Skipped: ")] += 1
    return dict(reasons.most_common())


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or not session.config.option.all_installed:
        return
    reasons = skipped_by_reason(reporter.stats.get("skipped", []))
    if session.exitstatus == pytest.ExitCode.OK and not all(map(KNOWN_REASONS.search, reasons)):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    for reason, count in skipped_by_reason(terminalreporter.stats.get("skipped", [])).items():
        known = not config.option.all_installed or KNOWN_REASONS.search(reason)
        wrong = "" if known else "; this must not be skipped here"
        terminalreporter.write_line(f"skipped {count}: {reason}{wrong}")
