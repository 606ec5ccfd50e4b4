"""The comparison with vLLM, its process replaced by a few lines that speak the same protocol."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from benchmarks.models import SHAPES
from benchmarks.peers import vllm_worker, vs_vllm
from benchmarks.peers.peer import Peer, PeerFailed
from benchmarks.peers.vs_vllm import Case, Side
from engine.errors import ConfigError

ABOUT = {"vllm": "0.0-test", "torch": "none", "weight_std": 1.0}
# Answers the settings with ABOUT, times with 5 ms, and loads with 1000 tokens in 2 seconds.
FAKE = """
import json, sys
sys.stdin.readline()
print(json.dumps({about}), flush=True)
times = dict(p50=0.1, p90=0.1, p99=0.1)
served = dict(seconds=2.0, tokens=1000, first_token=times, inter_token=times)
for line in sys.stdin:
    command = json.loads(line)
    print(json.dumps(served if command["do"] == "serve" else dict(ms=5.0)), flush=True)
"""

MakePeer = Callable[..., Peer]


def fake_peer(script: str = FAKE, **about: Any) -> Peer:
    command = [sys.executable, "-c", script.replace("{about}", repr(ABOUT | about))]
    return Peer(command, {"model": "none"}, {}, load_seconds=60.0)


def test_each_side_is_compared_with_the_peer_in_each_case(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vs_vllm, "start_vllm", lambda *_: fake_peer())
    monkeypatch.setattr(vs_vllm, "SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(vs_vllm, "REQUESTS", 3)
    monkeypatch.setattr(vs_vllm, "NEW_TOKENS", 6)
    path = tmp_path / "r.json"
    vs_vllm.main(
        [
            *("--vllm-python", "none", "--shape", "tiny", "--rounds", "2", "--json", str(path)),
            *("--cases", "decode:2,same:2,prefill:16,serve", "--threads", "1"),
        ]
    )
    printed = capsys.readouterr().out
    records = json.loads(path.read_text(encoding="utf-8"))
    cases = [(r["params"]["case"], r["params"]["side"]) for r in records]
    assert cases == [
        (case, side)
        for case in ("decode:2", "same:2", "prefill:16", "serve")
        for side in ("6/32", "8/64", "dense")
    ]
    for record in records:
        assert record["params"]["rounds"] == 2
        assert record["versions"]["vllm"] == "0.0-test"
        assert f"{record['ratio']:.2f}x" in printed
    times, served = records[:-3], records[-3:]
    for record in times:
        ours = record["params"]["values"]
        assert record["peer_value"] == 5.0
        assert record["ratio"] == pytest.approx((5 / ours[0] + 5 / ours[1]) / 2)
    for record in served:
        assert record["peer_value"] == 500.0
        runs = record["params"]["runs"]
        rates = [run["tokens"] / run["seconds"] for run in runs]
        assert record["ratio"] == pytest.approx(sum(rates) / 2 / 500)
        assert {run["tokens"] for run in runs} == {18}


def test_rounds_get_different_prompts_and_sides_the_same() -> None:
    case = Case.parse("decode:4")
    first, second = (case.command(512, 1.0, round_)["prompts"] for round_ in (0, 1))
    assert first == case.command(512, 1.0, 0)["prompts"]
    assert not {tuple(p) for p in first} & {tuple(p) for p in second}
    assert len({tuple(p) for p in first}) == 4
    other = Case.parse("decode:5").command(512, 1.0, 0)["prompts"]
    assert not {tuple(p) for p in first} & {tuple(p) for p in other}
    same = Case.parse("same:4").command(512, 1.0, 0)["prompts"]
    assert len(same) == 4
    assert len({tuple(p) for p in same}) == 1


@pytest.mark.parametrize(
    "text", ["decode", "decode:0", "decode:65", "prefill:-1", "serve:3", "x:1"]
)
def test_a_case_that_does_not_exist_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"decode:N|from 1 to"):
        Case.parse(text)


@pytest.mark.parametrize("text", ["6", "6/33", "0/32", "33/32", "a/b", "sparse"])
def test_a_side_that_does_not_exist_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="sides must be dense or K/E with E one of 32, 64"):
        Side.parse(text)


def test_cases_and_sides_print_as_they_are_written() -> None:
    for text in vs_vllm.CASES.split(","):
        assert str(Case.parse(text)) == text
    for text in vs_vllm.SIDES.split(","):
        assert str(Side.parse(text)) == text
    assert str(Side.parse("dense").policy) == "dense"
    assert str(Side.parse("8/64").policy) == "top_k:8"


def test_a_peer_that_ends_is_quoted() -> None:
    with pytest.raises(PeerFailed, match="ended; it printed last:\nno module named vllm"):
        fake_peer("import sys; sys.stdin.readline(); sys.exit('no module named vllm')")


def test_a_peer_that_is_silent_is_given_up() -> None:
    with (
        fake_peer(
            "import sys\nsys.stdin.readline()\nprint('{}', flush=True)\nsys.stdin.read()"
        ) as peer,
        pytest.raises(PeerFailed, match="gave no answer in 0 seconds"),
    ):
        peer.ask({"do": "prefill"}, seconds=0.05)


def test_a_peer_that_answers_nonsense_is_refused() -> None:
    with pytest.raises(PeerFailed, match="answered no JSON object"):
        fake_peer("import sys; sys.stdin.readline(); print(3)")


def test_constant_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vs_vllm, "Peer", lambda *_: fake_peer(weight_std=0.0))
    with pytest.raises(PeerFailed, match="weights are all equal"):
        vs_vllm.start_vllm("none", SHAPES["tiny"], tmp_path, 1, 1)


def test_the_configuration_is_that_of_opt() -> None:
    config = vs_vllm.opt_config(SHAPES["opt-1.3b"])
    assert (config["hidden_size"], config["ffn_dim"], config["vocab_size"]) == (2048, 8192, 50272)
    assert config["num_hidden_layers"] == 24


class FakeEngine:
    """What the worker uses of vLLM's engine: every step gives each request `per_step` tokens."""

    def __init__(self, per_step: int) -> None:
        self.per_step = per_step
        self.requests: dict[str, list[int]] = {}

    def add_request(self, request_id: str, prompt: dict[str, Any], params: Any) -> None:
        assert params.ignore_eos
        assert params.temperature == 0.0
        assert prompt["prompt_token_ids"]
        self.requests[request_id] = [0, params.max_tokens]

    def step(self) -> list[SimpleNamespace]:
        outputs = []
        for name, (done, total) in list(self.requests.items()):
            done = min(total, done + self.per_step)
            self.requests[name][0] = done
            output = SimpleNamespace(token_ids=[1] * done)
            outputs.append(
                SimpleNamespace(request_id=name, outputs=[output], finished=done == total)
            )
            if done == total:
                del self.requests[name]
        return outputs

    def has_unfinished_requests(self) -> bool:
        return bool(self.requests)


@pytest.mark.parametrize("per_step", [1, 3])
def test_the_worker_counts_tokens_and_answers_commands(
    per_step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module: Any = ModuleType("vllm")
    module.LLM = lambda **settings: SimpleNamespace(llm_engine=FakeEngine(settings["per_step"]))
    module.SamplingParams = lambda **values: SimpleNamespace(**values)
    monkeypatch.setitem(sys.modules, "vllm", module)
    server = vllm_worker.VllmServer({"per_step": per_step})
    server.add("a", [5], 4)
    assert server.step() == ["a"] * per_step
    while server.busy:
        server.step()
    answers: list[str] = []
    arrivals = [{"at": 0.0, "prompt": [5, 6], "new_tokens": 10}] * 2
    commands = [{"do": "serve", "arrivals": arrivals}, {"do": "prefill", "prompt": [7]}]
    vllm_worker.answer_all(server, map(json.dumps, commands), answers.append)
    served, prefill = map(json.loads, answers)
    assert served["tokens"] == 20
    assert prefill["ms"] > 0
