# Works with Python 3.11 to 3.13, pip and make. `make help` lists the targets.
# It uses the virtual environment that is active, else its own in .venv.

PYTHON ?= python3
WORKERS ?= 2
ARGS ?=
# In one line: a second one would be a command of its own.
override ARGS := $(strip $(ARGS))
VENV = $(or $(VIRTUAL_ENV),.venv)
BIN = $(VENV)/bin
TEST = $(VENV)/.gpt3jax-test
DEV = $(VENV)/.gpt3jax-dev
PLAN = $(VENV)/.gpt3jax-plan
DOCS = $(VENV)/.gpt3jax-docs
FIGURES = $(VENV)/.gpt3jax-figures

.DEFAULT_GOAL = help
.DELETE_ON_ERROR:
.PHONY: quickstart test test-slow test-all test-gpu test-versions gpu-compiler figures lint docs help clean

quickstart: $(TEST)  ## train a small GPT on the CPU, in minutes (ARGS="--train.n-steps=50")
	$(BIN)/python -m gpt3jax.main --config=configs/quickstart.py $(ARGS)
ifeq ($(findstring .dir,$(ARGS)),)  # else the run is not in this folder, or in none
	$(BIN)/python -m gpt3jax.summary runs/quickstart
endif

test: $(TEST)  ## tests that take seconds (WORKERS=2, ARGS="-k name")
	$(BIN)/python -m pytest -m "not slow and not slower and not gpu" -n $(WORKERS) $(ARGS)

test-slow: $(TEST)  ## more of them: meshes, processes, failures
	$(BIN)/python -m pytest -m "slow and not slower and not gpu" -n $(WORKERS) $(ARGS)

test-all: $(PLAN)  ## all tests that need no GPU
	$(BIN)/python -m pytest -m "not gpu" -n $(WORKERS) $(ARGS)

test-gpu: $(TEST)  ## tests that need a GPU, here (in a virtual environment that has gpt3jax[cuda13,triton])
	$(BIN)/python -m pytest -m gpu $(ARGS)

test-versions:  ## the quick tests on every Python that is here and supported, in .venvs
	@set -e; for version in 3.11 3.12 3.13; do \
	  python$$version -c '' 2> /dev/null || { echo "no python$$version here"; continue; }; \
	  $(MAKE) test VENV=.venvs/$$version PYTHON=python$$version; \
	  .venvs/$$version/bin/python -m pip list | grep -E '^(jax|flax|orbax-checkpoint|grain|numpy) '; \
	done

gpu-compiler: $(PLAN)  ## install what gpt3jax.plan and its tests compile with, 1.6 GiB

figures: $(FIGURES)  ## measure and draw the pictures of docs/figures, an hour (ARGS=--draw: draw only)
	@set -e; for figure in one_loss megatron_curve plan_175b ramp killed float8; do \
	  $(BIN)/python docs/figures/$$figure.py $(ARGS); \
	done

lint: $(DEV)  ## style, format, types, spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

docs: $(DOCS)  ## the documentation, a site in site/: its reference from the code, every link checked
	$(BIN)/python docs/reference/generate.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' Makefile

clean:  ## remove caches and build output; runs/, .venv and .venvs stay
	rm -rf .cache .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist site gpt3jax.egg-info
	find . -path './.venv*' -prune -o -name __pycache__ -prune -exec rm -rf {} +

# Installed once, and again when pyproject.toml changes.
$(TEST): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -e '.[test]'
	touch $@

$(PLAN): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -e '.[test,plan,triton]'
	touch $@ $(TEST)

$(FIGURES): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -e '.[test,plan,triton,figures]'
	touch $@ $(TEST) $(PLAN)

$(DEV): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -e '.[dev]'
	touch $@ $(TEST) $(DOCS)

$(DOCS): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -e '.[docs]'
	touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || { \
	  echo 'gpt3jax needs Python 3.11, 3.12 or 3.13: make PYTHON=/path/to/python3.13 ...' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
