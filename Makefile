# Commands of the project. `make demo` and `make test` are all that a fresh clone needs.
#   PYTHON=python3.11   interpreter the environment is made from; a torch 2.13.0 that it has is used
#   ARGS="..."          further arguments for the command, such as make test ARGS="-k bundle"
#   WORKERS=2           processes that share the tests, file by file; 0 is one after the other in this process
#   BUNDLE=...          bundle that is broken on purpose, such as make broken BUNDLE=fetal-head.bundle
#   NAME=... STATE=...  student that is made and the folder of its stages, such as make student NAME=fetal-head STATE=/tmp/s
#   ROW=... SEED=...    row and seed of the experiment, such as make experiment ROW=hc18-10-ours SEED=0

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
WORKERS ?= 2
ROW ?=
SEED ?= 0
BUNDLE ?= runtime/tinyusfm_runtime/bundles/fetal-head.bundle
NAME ?= fetal-head
STATE ?= runs/students
BIN := $(VENV)/bin
OPENVINO := from importlib.util import find_spec as f; print(f("openvino").submodule_search_locations[0])
INSTALL := $(PYTHON) scripts/environment.py --venv $(VENV) --extras

.DEFAULT_GOAL := help
.PHONY: help demo test lint check tree docs bench experiment student bundle broken signing duplicates soak format clean capi capi-deps capi-test capi-proof capi-stress

help:  ## list the commands
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/make \1 \t\2/p' Makefile

demo:  ## install what the demo needs and run it
	$(INSTALL) demo
	$(BIN)/tinyusfm-edge demo $(ARGS)

test:  ## install what the tests need and run them
	$(INSTALL) test,opencv
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --max-worker-restart 0 $(ARGS)

lint:  ## ruff, mypy and the import contracts
	$(INSTALL) test,opencv,lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint test  ## everything a change must pass

tree:  ## every source file with the first line of its docstring
	@$(PYTHON) scripts/tree.py $(ARGS)

docs:  ## the documentation as a site in build/site
	$(INSTALL) demo,docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

bench:  ## engines against their rivals on this machine, about half an hour
	$(INSTALL) bench
	$(BIN)/python benchmarks/bench_engines.py $(ARGS)

experiment:  ## one row of the experiment on real data (ROW, SEED), resumable; without ROW the table alone
	$(INSTALL) train
	$(BIN)/python benchmarks/experiment.py $(if $(ROW),--row $(ROW) --seed $(SEED)) $(ARGS)

student:  ## make a shipped student from data and a teacher (NAME, STATE), stage by stage, resumable; hours of CPU
	$(INSTALL) train
	$(BIN)/python -m tinyusfm_edge.release.make_student --name $(NAME) --state $(STATE) $(ARGS)

bundle:  ## make the bundle that ships with the runtime, integers alone: make bundle ARGS="--data hc18/"; a minute
	$(INSTALL) demo
	$(BIN)/python scripts/ready_bundle.py $(ARGS)

soak:  ## the live loop under load for an hour: frames, ages, memory, accuracy
	$(INSTALL) demo
	$(BIN)/python benchmarks/soak.py $(ARGS)

duplicates:  ## code that stands twice, by pylint in an environment of its own
	$(PYTHON) scripts/duplicates.py

broken:  ## mutated bundles and files, killed runs, full disks, opening time (BUNDLE, ARGS="--scale 0.01"); hours
	$(INSTALL) demo,signed,train
	$(BIN)/python benchmarks/broken.py $(BUNDLE) $(ARGS)

litert-oracle:  ## LiteRT files against the converter's own on the same frames, in an environment of its own (1.2 GB)
	$(INSTALL) demo,litert
	$(BIN)/python benchmarks/litert_oracle.py $(ARGS)

signing:  ## signatures against the OpenSSF model-signing tool, both directions, in an environment of its own
	$(INSTALL) demo,signed
	$(BIN)/python scripts/signing_conformance.py

format:  ## let ruff rewrite the layout
	$(INSTALL) test,opencv,lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

capi-deps:  ## what the C runtime is built with, from Debian's packages (root)
	bash scripts/capi_deps.sh

capi:  ## the C runtime into build/capi
	cmake -S runtime/capi -B build/capi -DTUSFM_WERROR=ON \
	  -DTUSFM_ORT_INCLUDE=$(CURDIR)/build/capi-deps/include/onnxruntime \
	  -DTUSFM_OPENVINO_INCLUDE="$$($(BIN)/python -c '$(OPENVINO)' 2>/dev/null)/include" $(ARGS)
	cmake --build build/capi --parallel 2

capi-proof:  ## C and Python to the bit on real frames by real engines: BUNDLE=fetal-head.bundle
	TUSFM_PROOF_BUNDLE=$(abspath $(BUNDLE)) $(BIN)/python -m pytest -q -s tests/capi/proof_real_engines.py $(ARGS)

capi-stress:  ## 5,000 predictions and 60 openings of each real engine, without growth
	$(BIN)/python -m pytest -q -s tests/capi/stress_engines.py $(ARGS)

capi-test:  ## the tests that hold the C runtime against the Python runtime
	$(BIN)/python -m pytest -q tests/capi $(ARGS)

.PHONY: arm64 musl windows macos identity fuzz jetson-check litert-oracle
jetson-check:  ## what can be checked of a JetPack board without one: wheels, types, the bundle, TensorRT's calls; minutes
	$(INSTALL) test,lint
	$(BIN)/python scripts/jetson_check.py $(ARGS)

arm64:  ## the runtime on emulated 64-bit Arm, in Python and C, with its real engines; 700 MB, step by step (root)
	bash scripts/ports.sh arm64

musl:  ## tusfm-check as one static program for 64-bit Arm, by zig, run emulated (root)
	bash scripts/ports.sh musl

windows:  ## the C runtime for Windows, run under Wine with ONNX Runtime's Windows library (root)
	bash scripts/ports.sh windows

macos:  ## the kernels cross-compiled for macOS with zig; nothing runs
	bash scripts/ports.sh macos

identity:  ## the integer network on all golden and 100 real frames, in every instruction set of this CPU
	bash scripts/ports.sh identity

fuzz:  ## the readers of manifests, signatures, integer models and rings under libFuzzer, SECONDS each (600)
	bash scripts/fuzz.sh $(or $(SECONDS),600)

clean:  ## remove the environment, caches and build leftovers
	rm -rf .venv build dist demo-out .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
	find . -name '*.egg-info' -type d -not -path './.git/*' -prune -exec rm -rf {} +
