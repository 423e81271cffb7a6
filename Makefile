# Every developer action by name. `make run` and `make test` do all their own set-up.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export PATH := $(CURDIR)/$(BIN):$(PATH)
export MLFLOW_DISABLE_TELEMETRY := true
export BENTOML_DO_NOT_TRACK := True
# OpenMP's threads sleep while they wait: spinning, they take the core that other processes of a test need.
export OMP_WAIT_POLICY := passive
# Two at a time. What failed beside others is run again alone: a machine that is busy decides nothing.
pytest = python -m pytest -q -n 2 --dist loadfile -m "$(1)" || \
	{ [ $$? = 1 ] && python -m pytest -q --last-failed --last-failed-no-failures none -m "$(1)"; }

.DEFAULT_GOAL := help
.PHONY: help install run test slow fuzz faults image check sync lab bench clean

help:  ## list the actions
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 10

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ekiben needs Python 3.11 or newer; set PYTHON=python3.x")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@$(BIN)/python -m compileall -q src  # the first start is then as quick as the second
	@touch $@

install: $(STAMP)  ## make the virtual environment with the pinned versions

run: $(STAMP)  ## run this repository's own pipeline on the embedded data
	ekiben run

test: $(STAMP)  ## run the library notebooks' own cells, then pytest
	nbdev-test nbs/library --n-workers 2 || nbdev-test nbs/library --n-workers 1
	$(call pytest,not slow and not faults and not image)

slow: $(STAMP)  ## run the slow tests: whole projects on real tables
	$(call pytest,slow)

fuzz: $(STAMP)  ## try the properties on examples that are drawn anew, other ones each time
	python -m pytest -q -n 2 --hypothesis-profile other -m "not faults and not image" $$(grep -l "from hypothesis" tests/test_*.py)

faults: $(STAMP)  ## run the fault suite: kernels, runners and disks that fail, half an hour and more
	python -m pytest -q -m faults

image: $(STAMP)  ## build and run container images: needs root, buildah and debootstrap
	python -m pytest -q -m image

check: $(STAMP)  ## fail when notebooks and src differ, then lint, types, layers
	python tests/check_sync.py
	ruff check src tests bentos
	mypy src/ekiben
	lint-imports --no-cache

sync: $(STAMP)  ## export the notebooks to src and clean them
	nbdev-export
	nbdev-clean

lab: $(STAMP)  ## open the notebooks in JupyterLab
	ekiben lab

bench: $(STAMP)  ## measure ekiben beside the alternatives
	$(BIN)/python -m pip install --quiet --constraint constraints.txt '.[bench]'
	for script in tests/benchmarks/bench_*.py; do echo "== $$script"; python $$script || exit 1; done

clean:  ## remove what the tools made, but no results
	rm -rf .mypy_cache .ruff_cache .pytest_cache build dist
