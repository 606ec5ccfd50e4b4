"""Clients that need packages of their own versions: `make test-clients` makes them `.venv-clients`.

What they read is compared with what the server says on its other routes.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.server.conftest import Live

HERE = Path(__file__).parent
PYTHON = HERE.parents[2] / ".venv-clients" / "bin" / "python"

pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason="make test-clients makes .venv-clients")


def run(script: str, *arguments: str) -> dict[str, Any]:
    """What a script of `clients/` prints at its end, read as JSON."""
    command = [PYTHON, HERE / script, *arguments]
    environment = {**os.environ, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_client_of_text_generation_inference(live: Live) -> None:
    found = run("tgi.py", live.url)
    text = live.generate(max_new_tokens=8)["generated_text"]
    assert found["text"] == found["streamed"] == found["last"] == found["asynchronous"] == text
    assert (found["tokens"], found["prefill"]) == (8, 5)
    assert (
        found["chat"] == live.generate("User: hi\nAssistant:", max_new_tokens=8)["generated_text"]
    )
    assert "max_new_tokens" in found["errors"][0]
    assert "top_k" in found["errors"][1]
    assert "Not Found" in found["errors"][2]


def test_lm_evaluation_harness(live: Live, tmp_path: Path) -> None:
    """Log-likelihoods of continuations, of whole texts, and greedy texts."""

    def likelihood(context: str, continuation: str) -> float:
        details = live.generate(
            context + continuation, max_new_tokens=1, decoder_input_details=True
        )["details"]
        start = len(context.encode())
        return sum(token["logprob"] for token in details["prefill"][start:])

    found = run("harness.py", live.url, str(tmp_path))
    documents, samples = found["documents"], found["samples"]
    assert len(documents) == 3
    for document, responses in zip(documents, samples["choice"], strict=True):
        scores = [likelihood(document["question"], choice) for choice in document["choices"]]
        assert [float(response[0][0]) for response in responses] == pytest.approx(scores, rel=1e-4)
    for document, responses in zip(documents, samples["perplexity"], strict=True):
        ids = [0, *live.engine.tokenizer.encode(document["question"])]
        body = {"prompt": ids, "logprobs": 0, "echo": True, "max_tokens": 0}
        choice = live.http.post("/v1/completions", json=body).json()["choices"][0]
        total = sum(choice["logprobs"]["token_logprobs"][1:])
        assert float(responses[0][0]) == pytest.approx(total, rel=1e-4)
    for document, responses in zip(documents, samples["generation"], strict=True):
        text = live.generate(document["question"], max_new_tokens=5)["generated_text"]
        assert responses[0][0] == text
