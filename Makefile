# Works with Python 3.11 or newer, pip and make. `make help` lists the targets.
# It uses the virtual environment that is active, else its own in .venv.

PYTHON ?= python3
WORKERS ?= 2
ARGS ?=
VENV = $(or $(VIRTUAL_ENV),.venv)
BIN = $(VENV)/bin
TEST = $(VENV)/.gpt3jax-test
DEV = $(VENV)/.gpt3jax-dev
PLAN = $(VENV)/.gpt3jax-plan

.DEFAULT_GOAL = help
.DELETE_ON_ERROR:
.PHONY: quickstart test test-all gpu-compiler lint help clean

quickstart: $(TEST)  ## train a small GPT on the CPU, in minutes (ARGS="--train.n-steps=50")
	$(BIN)/python -m gpt3jax.main --config=configs/quickstart.py $(ARGS)

test: $(TEST)  ## tests that take seconds (WORKERS=2, ARGS="-k name")
	$(BIN)/python -m pytest -m "not slow and not gpu" -n $(WORKERS) $(ARGS)

test-all: $(PLAN)  ## all tests that need no GPU
	$(BIN)/python -m pytest -m "not gpu" -n $(WORKERS) $(ARGS)

gpu-compiler: $(PLAN)  ## install what gpt3jax.plan and its tests compile with, 0.7 GiB

lint: $(DEV)  ## style, format, types, spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

clean:  ## remove caches and build output; runs/ and .venv stay
	rm -rf .cache .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist gpt3jax.egg-info
	find . -path ./.venv -prune -o -name __pycache__ -prune -exec rm -rf {} +

# Installed once, and again when pyproject.toml changes.
$(TEST): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -e '.[test]'
	touch $@

$(PLAN): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -e '.[test,plan]'
	touch $@ $(TEST)

$(DEV): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -e '.[dev]'
	touch $@ $(TEST)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo 'gpt3jax needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 ...' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
