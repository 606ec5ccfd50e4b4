"""vLLM as a subprocess that measures itself on command; runs inside vLLM's own environment.

`benchmarks.peers.vs_vllm` starts it. The first line on standard input is a JSON object of settings;
every further line is a command of `benchmarks.load.perform`, answered by one line of JSON on
standard output. Between commands the process waits for input and uses no processor.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

from benchmarks.load import Server, perform


class VllmServer:
    """vLLM's engine in this process, as a `benchmarks.load.Server`."""

    def __init__(self, settings: dict[str, Any]) -> None:
        """Load the model: `settings` are arguments of `vllm.LLM`."""
        from vllm import LLM

        self._model = LLM(**settings)
        self._engine = self._model.llm_engine
        self._counts: dict[str, int] = {}

    def about(self) -> dict[str, Any]:
        """Versions, and what the weights are like that packing left readable."""
        import torch
        import vllm

        (deviations,) = self._model.collective_rpc(_standard_deviations)
        return {
            "vllm": vllm.__version__,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "weight_std": max(deviations),
        }

    def add(self, request_id: str, prompt: list[int], new_tokens: int) -> None:
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False
        )
        self._counts[request_id] = 0
        self._engine.add_request(request_id, {"prompt_token_ids": prompt}, params)

    def step(self) -> list[str]:
        tokens: list[str] = []
        for output in self._engine.step():
            total = len(output.outputs[0].token_ids)
            tokens += [output.request_id] * (total - self._counts[output.request_id])
            self._counts[output.request_id] = total
            if output.finished:
                del self._counts[output.request_id]
        return tokens

    @property
    def busy(self) -> bool:
        return bool(self._engine.has_unfinished_requests())


def _standard_deviations(worker: Any) -> list[float]:
    """Of every weight matrix of the model; packed ones leave nothing behind."""
    matrices = (p.detach() for p in worker.model_runner.model.parameters() if p.dim() == 2)
    return [float(matrix.float().std()) for matrix in matrices if matrix.numel()]


def answer_all(server: Server, lines: Iterable[str], answer: Callable[[str], None]) -> None:
    """Perform the command of each line."""
    for line in lines:
        answer(json.dumps(perform(server, json.loads(line))))


def main() -> None:
    # Libraries print to standard output: it becomes standard error, and answers keep the pipe.
    pipe = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(line: str) -> None:
        print(line, file=pipe, flush=True)

    server = VllmServer(json.loads(sys.stdin.readline()))
    answer(json.dumps(server.about()))
    answer_all(server, sys.stdin, answer)


if __name__ == "__main__":
    main()
