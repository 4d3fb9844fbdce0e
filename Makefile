# Stillhouse: `make help` lists what there is. Everything runs in .venv. `make setup` installs there what
# a job needs; the targets that need more (tests, lint, benches) add it the first time.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# What is installed: a stamp for each level, younger than the files that say what belongs to it.
READY := $(VENV)/.ready
TESTS := $(VENV)/.ready-test
LINT := $(VENV)/.ready-check
BENCHES := $(VENV)/.ready-bench
# Runs what follows -- and keeps how long it took, for `make bench-demo`.
TIMED := $(PYTHON) -m tests.bench.timing
INSTALL := $(BIN)/pip install --quiet --constraint requirements.lock

# Two cores are enough for everything here: one thread per process, so that processes side by side
# do not fight over them. Workers of a job set their own numbers.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help setup install demo bench-demo bench-cache bench-cache-angle bench-train bench-quant bench-sweep bench-plan golden test test-all check format lock clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-17s %s\n", $$1, $$2}'

setup: $(READY) ## Make .venv with what a job needs, in the versions of requirements.lock

# The last lines build DeepSpeed's CPU communication op, the CPU's op for quantized layers and the numba
# kernels, so that no job has to wait for a compiler.
$(READY): pyproject.toml requirements.lock
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found; install Python 3.11 or newer, or say make PYTHON=/path/to/python3.11"; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is $$($(PYTHON) --version 2>&1); Stillhouse needs Python 3.11 or newer: make PYTHON=/path/to/python3.11"; exit 2; }
	@command -v g++ >/dev/null || { echo "error: g++ not found; DeepSpeed compiles an op with it: install it, e.g. apt-get install g++"; exit 2; }
	@$(TIMED) install --begun $(VENV) --size $(VENV) -- $(MAKE) --no-print-directory install
	@touch $@

install:
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch
	$(INSTALL) --editable '.[s3]'
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m trainer.compiled_ops
	$(BIN)/python -m jobs.build_kernels

# pytest, emulated servers, lm-eval.
$(TESTS): $(READY)
	$(INSTALL) --editable '.[test]'
	@touch $@

$(LINT): $(READY)
	$(INSTALL) --editable '.[check]'
	@touch $@

# Peers that are measured beside us. One of them is compiled, which takes minutes.
$(BENCHES): $(READY)
	$(INSTALL) --editable '.[bench]'
	@touch $@

demo: $(READY) ## Train, distil, quantize and report on the prose that ships with Python (minutes, no download)
	@$(TIMED) demo --begun runs/demo-teacher --done runs/demo/report/index.html -- \
		bash -c '$(BIN)/stillhouse run demo-teacher && $(BIN)/stillhouse run demo'

bench-demo: $(READY) ## Check what the demo reached, and keep the figures
	$(BIN)/python -m tests.bench.demo

bench-cache: $(READY) ## Measure the logit cache: bytes, errors, speeds (minutes, after make demo)
	$(BIN)/python -m tests.bench.cache

bench-cache-angle: $(READY) ## Measure whether cached signals are unbiased, and train on each (minutes, after make demo)
	$(BIN)/python -m tests.bench.cache_angle

bench-train: $(BENCHES) ## Measure training: speeds, memory, what students learn (minutes, after make demo)
	$(BIN)/python -m tests.bench.train

bench-quant: $(BENCHES) ## Measure quantized models: size, speed, memory, exports (minutes, after make demo)
	$(BIN)/python -m tests.bench.quant

bench-sweep: $(TESTS) ## Measure the sweep: fan-out, allocation, recovery, tasks (minutes, after make demo)
	$(BIN)/python -m tests.bench.sweep

bench-plan: $(READY) ## Hold forecasts against the demo and DeepSpeed's estimators (after make demo)
	$(BIN)/python -m tests.bench.plan

golden: $(READY) ## Compare all results with those of the last commit on main, or of BASE=COMMIT
	$(BIN)/python -m tests.bench.golden $(if $(BASE),--base $(BASE)) $(if $(CONTINUE),--continue)

# Two files at a time: one has a core while the ranks of the other start, or wait. In this order: the
# whole pipeline, which takes longest, first; the many short files last, so that both processes end
# together. The drills, which kill nodes and watch clocks, have the machine for themselves.
TWO := --numprocesses 2 --dist loadfile --no-loadscope-reorder

test: $(TESTS) ## Unit and system tests
	@$(TIMED) test -- $(BIN)/python -m pytest tests/system/test_pipeline.py tests/system tests/unit $(TWO)

test-all: test ## Everything, with the drills: kills, resumes, clusters that lose nodes
	$(BIN)/python -m pytest tests/drill

check: $(LINT) ## Lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(LINT) ## Put the code into its format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock: $(TESTS) $(LINT) $(BENCHES) ## Write requirements.lock from what is installed
	$(BIN)/pip freeze --exclude-editable | sed -E 's/^(torch==[0-9.]+).*/\1/' > requirements.lock

clean: ## Remove .venv and caches (runs are kept)
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache *.egg-info
