"""The application on a cluster of this machine: `make test-ray`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.server.conftest import checkpoint_dir  # noqa: F401  # a fixture

if TYPE_CHECKING:
    from tests.deploy.ray.cluster import Start


@pytest.fixture(scope="session")
def start(checkpoint_dir: Path) -> Iterator[Start]:  # noqa: F811
    """Start the application: `with start(replicas=2, step_seconds=0.01) as served`."""
    if not os.environ.get("AMBIDEX_TEST_RAY"):
        pytest.skip("make test-ray runs this")
    from tests.deploy.ray.cluster import running

    with running(checkpoint_dir) as found:
        yield found
