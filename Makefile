# Commands of the project. `make demo` and `make test` are all that a fresh clone needs.
#   PYTHON=python3.11   interpreter the environment is made from; a torch 2.13.0 that it has is used
#   ARGS="..."          further arguments for the command, such as make test ARGS="-k bundle"

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
BIN := $(VENV)/bin
INSTALL := $(PYTHON) scripts/environment.py --venv $(VENV) --extras

.DEFAULT_GOAL := help
.PHONY: help demo test lint check bench soak format clean

help:  ## list the commands
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1 \t\2/p' Makefile

demo:  ## install what the demo needs and run it
	$(INSTALL) demo
	$(BIN)/tinyusfm-edge demo $(ARGS)

test:  ## install what the tests need and run them
	$(INSTALL) test,opencv
	$(BIN)/python -m pytest $(ARGS)

lint:  ## ruff, mypy and the import contracts
	$(INSTALL) test,opencv,lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint test  ## everything a change must pass

bench:  ## engines against their rivals on this machine, about half an hour
	$(INSTALL) bench
	$(BIN)/python benchmarks/bench_engines.py $(ARGS)

soak:  ## the live loop under load for an hour: frames, ages, memory, accuracy
	$(INSTALL) demo
	$(BIN)/python benchmarks/soak.py $(ARGS)

format:  ## let ruff rewrite the layout
	$(INSTALL) test,opencv,lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the environment, caches and build leftovers
	rm -rf .venv build dist demo-out .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
	find . -name '*.egg-info' -type d -not -path './.git/*' -prune -exec rm -rf {} +
