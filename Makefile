# make demo      run the embedded default on 4 processes (makes .venv first where needed)
# make test      lint, types and every test that is not marked deep, in two processes
# make test-deep the tests that are marked deep, then test-oldest and docs
# make test-oldest  a part of the tests with the oldest torch and transformers allowed (downloads them to .venv-oldest)
# make bench     time every stage beside its peers, about 12 minutes; the rows go to tools/bench/results/
# make rehearse  count the CUDA path's steps at 8B shapes without a GPU, about 5 minutes; needs g++ and a CPU build of
#                torch; the table goes to docs/results/rehearsal.md
# make lint      ruff and mypy alone;  make format  lets ruff lay out the code
# make chaos     kill a run 100 times at random moments and compare, half an hour; the result goes to docs/results/chaos.md
# make docs      build docs/ as a site into build/site; a broken link is an error
# make audit     known vulnerabilities of the pinned versions; needs the network (ARGS="-s osv" asks another service)
# make clean     remove .venv and .venv-oldest, builds and caches; runs/ stays
#
# Variables: PYTHON (3.11 or 3.12), NPROC, CONFIG, ARGS="key=value ...", PYTEST_ARGS, VENV, and
# TORCH_INDEX=https://download.pytorch.org/whl/cpu for a machine without a GPU (the ordinary index serves the CUDA build),
# .../cu126 for a GPU with a driver older than 580 (docs/gpu.md).

PYTHON ?= python3
VENV ?= .venv
OLDEST ?= .venv-oldest
NPROC ?= 4
CONFIG ?= configs/demo.yaml
ARGS ?=
PYTEST_ARGS ?=
TORCH_INDEX ?=

BIN := $(VENV)/bin
INPUTS := constraints.txt setup.cfg pyproject.toml
export OMP_NUM_THREADS := 1
# Tests of one file stay in one process: they share what its fixtures made.
SHARED_OUT := -n 2 --dist loadfile

.PHONY: help demo test test-deep test-oldest bench rehearse chaos lint format docs audit clean
.DELETE_ON_ERROR:

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

demo: $(VENV)/installed
	$(BIN)/torchrun --nproc_per_node=$(NPROC) launch/run.py $(CONFIG) $(ARGS)

test: lint
	$(BIN)/pytest $(SHARED_OUT) -m "not deep and not gpu" $(PYTEST_ARGS)

test-deep: $(VENV)/installed-test
	$(BIN)/pytest $(SHARED_OUT) -m deep $(PYTEST_ARGS)
	$(MAKE) test-oldest docs

# What depends on torch and transformers: devices, sums, attention, models, training, decoding, and whole small runs.
OLDEST_TESTS := tests/attention tests/generate tests/kernels tests/model tests/parallel tests/train \
  tests/distributed/test_lanes.py tests/distributed/test_exact.py tests/test_architectures.py tests/run/test_round.py

test-oldest: $(OLDEST)/installed-test
	$(OLDEST)/bin/python -m pytest $(SHARED_OUT) -m "not deep and not gpu" $(OLDEST_TESTS) $(PYTEST_ARGS)

bench: $(VENV)/installed-test
	$(BIN)/python tools/bench/run.py $(ARGS)

rehearse: $(VENV)/installed-test
	$(BIN)/python -m tools.rehearsal $(ARGS)

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

chaos: $(VENV)/installed-test
	$(BIN)/python tools/chaos/run.py --kills 100 --publish $(ARGS)

docs: $(VENV)/installed-docs
	$(BIN)/zensical build --clean --strict

audit: $(VENV)/installed-audit
	$(BIN)/python tools/audit.py constraints.txt $(ARGS)

clean:
	rm -rf $(VENV) $(OLDEST) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first and alone, so that TORCH_INDEX or pip's own settings decide which build of the pinned version it is.
$(VENV)/torch: $(INPUTS)
	@$(PYTHON) -c 'import sys; sys.exit("fedsim needs Python 3.11 or newer, %s is %d.%d; set PYTHON=python3.11" % (sys.executable, *sys.version_info[:2]) if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$$(grep '^torch==' constraints.txt)"
	@touch $@

$(VENV)/installed: $(VENV)/torch
	$(BIN)/pip install -c constraints.txt -e .
	@touch $@

$(VENV)/installed-test: $(VENV)/torch
	$(BIN)/pip install -c constraints.txt -e '.[test,dev]'
	@touch $(VENV)/installed $@

# The pins of constraints.txt, but for those that constraints-oldest.txt names. TORCH_INDEX decides torch's build here too.
$(OLDEST)/installed-test: $(INPUTS) constraints-oldest.txt
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	awk -F== 'NR == FNR {print; named[$$1]; next} !($$1 in named)' constraints-oldest.txt constraints.txt > $(OLDEST)/pins.txt
	$(OLDEST)/bin/pip install -c $(OLDEST)/pins.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$$(grep '^torch==' constraints-oldest.txt)"
	$(OLDEST)/bin/pip install -c $(OLDEST)/pins.txt -e '.[test]'
	@touch $@

$(VENV)/installed-docs: $(VENV)/torch
	$(BIN)/pip install -c constraints.txt -e '.[docs]'
	@touch $(VENV)/installed $@

# It needs some of what is pinned, and is none of it.
$(VENV)/installed-audit: $(VENV)/torch
	$(BIN)/pip install -c constraints.txt pip-audit
	@touch $@
