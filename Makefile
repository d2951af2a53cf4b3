# Every target does its own set-up: all it needs is Python 3.11 or later, with its venv module, and make.

# The first that runs, is recent enough and can make environments: a name on the path may be a shim for nothing.
SUITABLE := import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for name in python3.13 python3.12 python3.11 python3; do \
	$$name -c '$(SUITABLE)' 2>/dev/null && echo $$name && break; done)
VENV := .venv
BIN := $(VENV)/bin
RUN ?= runs/quickstart

.PHONY: help setup quickstart check test test-all bench
help:
	@echo "make quickstart   a small model through every stage on this machine's CPU, in 20 to 30 minutes, and how to talk to it"
	@echo "make setup        a virtual environment in $(VENV) with all that the tests need"
	@echo "make check        lint, format, types and import order"
	@echo "make test         the fast tests; make test-all runs every test"
	@echo "make bench        speed of training, prefill and decode here, beside transformers"

$(BIN)/python:
	@"$(PYTHON)" -c '$(SUITABLE)' 2>/dev/null || { \
		echo "error: Python 3.11 or later with its venv module is needed; name it with make PYTHON=/path/to/python"; \
		exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.quickstart: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[quickstart]'
	@touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@ $(VENV)/.quickstart

setup: $(VENV)/.dev

quickstart: $(VENV)/.quickstart
	$(BIN)/benthic run quickstart --out $(RUN)
	@echo
	@echo "Your model is in $(RUN). Talk to it:   $(BIN)/benthic chat $(RUN)"
	@echo "Let it write:                  $(BIN)/benthic generate $(RUN) --prompt 'I really like'"
	@echo "What came of each stage:       $(RUN)/report.html"

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# A process for each core, of one thread: threads of several processes would wait for each other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n auto

test: setup
	$(PYTEST) -m "not slow"

test-all: setup
	$(PYTEST)

bench: setup
	$(BIN)/benthic bench train
	$(BIN)/benthic bench prefill
	$(BIN)/benthic bench decode
	for script in benchmarks/*_vs_transformers.py; do $(BIN)/python $$script || exit 1; done
