# `make` lists the targets. Needs python3 >= 3.11 with venv; everything else is installed into .venv.

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
DEMO_ARGS ?=

# Data sets of the slow benchmarks; the tests, the demo and the examples need none.
export LOTTALORA_DATA ?= ../shared/data
# Nothing here downloads models or data, and the networks are too small for more threads to pay off.
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false
export OMP_NUM_THREADS ?= 2
export PIP_DISABLE_PIP_VERSION_CHECK = 1

PY = $(VENV)/bin/python
STAMP = $(VENV)/.installed
OLDEST_VENV = .venv-oldest

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help install test test-oldest lint format demo check reproduce clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

install: $(STAMP) ## make .venv with the tested versions; the other targets do it when needed

# Installs again only when a version changed. torch goes first and alone, so that a build of your choice (CPU, CUDA)
# can be put into the environment before the rest; it is then left as it is.
%/.installed: constraints.txt constraints-oldest.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and \
	  "hf-lottalora needs Python 3.11 or newer, but $(PYTHON) is %d.%d. Try: make PYTHON=python3.12" % v[:2])'
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install "$$(grep ^torch== $(CONSTRAINTS))"
	$(@D)/bin/python -m pip install -c $(CONSTRAINTS) -e '.[dev]'
	@touch $@

$(STAMP): CONSTRAINTS = constraints.txt
$(OLDEST_VENV)/.installed: CONSTRAINTS = constraints-oldest.txt

test: $(STAMP) ## run the tests, for example: make test PYTEST_ARGS="-k beta -x"
	$(PY) -m pytest $(PYTEST_ARGS)

test-oldest: $(OLDEST_VENV)/.installed ## run the tests on the oldest supported versions
	$(MAKE) test VENV=$(OLDEST_VENV)

lint: $(STAMP) ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(STAMP) ## let ruff rewrite the code
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

demo: $(STAMP) ## train digits from a seed, save the artifact, rebuild it in a new process
	$(PY) examples/digits_demo.py $(DEMO_ARGS)

check: lint demo test-oldest test ## everything that CI runs

reproduce: $(STAMP) ## figures of the paper, slow; needs the data sets in $LOTTALORA_DATA
	$(PY) benchmarks/mnist.py
	$(PY) benchmarks/sst2.py
	$(PY) -m pytest -m slow

clean: ## remove the environments, caches and outputs
	rm -rf .venv $(OLDEST_VENV) build dist out src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests examples benchmarks -name __pycache__ -prune -exec rm -rf {} +
