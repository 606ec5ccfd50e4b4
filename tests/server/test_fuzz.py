"""Every route with valid and invalid data, made from the OpenAPI document.

`AMBIDEX_FUZZ_EXAMPLES` (`make fuzz` sets it) says how many of each kind an operation gets.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

if TYPE_CHECKING:
    from tests.server.conftest import Live, Serve

EXAMPLES = int(os.environ.get("AMBIDEX_FUZZ_EXAMPLES", "9"))
ADMIN = "admin-0123456789abcdef"
MAX_ERROR_BYTES = 64 << 10


@pytest.fixture(scope="module")
def fuzzed(serve: Serve) -> Iterator[Live]:
    with serve(max_total_tokens=48, admin_key=ADMIN) as live:
        yield live


def check(case: Any, response: Any) -> None:
    """What holds for every answer."""
    assert response.status_code < 500 or response.status_code in (503, 504), response.text
    if response.status_code >= 400:
        assert len(response.content) <= MAX_ERROR_BYTES
        error = response.json()["error"]
        assert error["message"] if case.path.startswith("/v1/") else error
    checks = [not_a_server_error, status_code_conformance, content_type_conformance]
    if response.headers["content-type"] == "application/json":
        checks.append(response_schema_conformance)
    case.validate_response(response, checks=checks)


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_every_route_answers_whatever_it_is_asked(fuzzed: Live, mode: GenerationMode) -> None:
    session = requests.Session()
    session.trust_env = False
    session.headers["Authorization"] = f"Bearer {ADMIN}"
    schema = schemathesis.openapi.from_url(f"{fuzzed.url}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) > 15
    statuses: Counter[int] = Counter()
    for operation in operations:
        if mode is GenerationMode.NEGATIVE and not operation.body:
            continue  # there is nothing that could be wrong

        @hypothesis.settings(
            max_examples=EXAMPLES,
            deadline=None,
            database=None,
            derandomize="AMBIDEX_FUZZ_EXAMPLES" not in os.environ,
            suppress_health_check=list(HealthCheck),
        )
        @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
        def ask(case: Any) -> None:
            response = case.call(session=session)
            statuses[response.status_code] += 1
            check(case, response)

        ask()
    # Enough of it arrives where it is meant to: at the routes, or at the checks before them.
    expected = (200,) if mode is GenerationMode.POSITIVE else (400, 422)
    assert sum(statuses[status] for status in expected) > statuses.total() / 3, statuses
    fuzzed.wait_until_idle()
    assert fuzzed.frontend.active == 0
    assert fuzzed.generate(max_new_tokens=3, details=True)["details"]["generated_tokens"] == 3
