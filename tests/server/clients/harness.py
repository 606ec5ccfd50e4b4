"""Run in an environment with `lm_eval`: a small task, scored through the server at URL.

usage: harness.py URL DIRECTORY; DIRECTORY is for the task; writes its results as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TQDM_DISABLE": "1"}

import lm_eval  # after the settings
from lm_eval.tasks import TaskManager

# The byte model prefers nothing sensible: what counts is that all agree on what it prefers.
DOCUMENTS = [
    {"question": "The sky is", "choices": [" blue", " qqqq", "\t\t"], "answer": 0},
    {"question": "Two and two are", "choices": [" four", " a fish"], "answer": 1},
    {"question": "naïve 東京", "choices": [" ist", " war eine Stadt"], "answer": 0},
]
CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
doc_to_choice: choices
target_delimiter: ""
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
PERPLEXITY = """
task: tiny_perplexity
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""
GENERATION = """
task: tiny_generation
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
generation_kwargs: {{until: ["zz"], max_gen_toks: 5, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""


def main(url: str, directory: Path) -> None:
    data = directory / "data.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    tasks = {"choice": CHOICE, "perplexity": PERPLEXITY, "generation": GENERATION}
    for name, text in tasks.items():
        (directory / f"{name}.yaml").write_text(text.format(data=data))
    os.environ["HF_DATASETS_CACHE"] = str(directory / "cache")
    results = lm_eval.simple_evaluate(
        model="local-completions",
        model_args={"model": "tiny", "base_url": f"{url}/v1/completions"},
        tasks=[f"tiny_{name}" for name in tasks],
        task_manager=TaskManager(include_path=str(directory), include_defaults=False),
        batch_size=4,
        log_samples=True,
        bootstrap_iters=0,
    )
    samples = {
        name: [sample["resps"] for sample in results["samples"][f"tiny_{name}"]] for name in tasks
    }
    print(json.dumps({"documents": DOCUMENTS, "samples": samples}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
