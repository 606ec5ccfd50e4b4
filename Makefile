# Everything runs in .venv; PYTHON names the interpreter that makes it (3.11 or newer).
PYTHON ?= python3
PORT ?= 8000
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help install serve test test-gpu check format bench bench-ssd train-starter clean

help:  ## Show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

install: $(VENV)/.installed  ## Make .venv and install the pinned packages

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

serve: install  ## Serve the packaged starter model on PORT (default 8000)
	$(BIN)/ambidex serve --port $(PORT)

test: install  ## Run the tests
	$(BIN)/python -m pytest

test-gpu: install  ## Run the tests that need a CUDA device, then check and time its kernels
	$(BIN)/python -m pytest -m gpu
	$(BIN)/python -m pytest tests/engine/kernels
	$(BIN)/python benchmarks/gpu.py

check: install  ## Lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install  ## Rewrite the code in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install  ## Time the feed-forward layer and training steps, sparse against dense, on this CPU
	$(BIN)/ambidex bench ffn
	$(BIN)/ambidex bench train

bench-ssd: install  ## Train gpt-5m dense, SSD and static on DATA and compare (an hour on 2 cores)
	$(BIN)/python -m benchmarks.ssd_vs_dense $(addprefix --data ,$(DATA)) $(addprefix --valid ,$(VALID))

train-starter: install  ## Train the packaged model anew (37 minutes on 2 cores) and install it
	$(BIN)/ambidex train --preset starter
	cp -r runs/starter/checkpoint engine/starter.new
	rm -rf engine/starter && mv engine/starter.new engine/starter

clean:  ## Remove the environment and caches
	rm -rf $(VENV) *.egg-info build .pytest_cache .mypy_cache .ruff_cache
