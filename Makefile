# `make` lists the targets. Needs python3 >= 3.11 with venv; everything else is installed into .venv.

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
DEMO_ARGS ?=

# Data sets that the benchmarks and the tests of examples/train_glue.py read.
export LOTTALORA_DATA ?= $(abspath $(wildcard ../shared/data))

PY = $(VENV)/bin/python
STAMP = $(VENV)/.installed
OLDEST_VENV = .venv-oldest
MARKED = not slow and not smoke
PYTEST = -m pytest -n 2 --dist worksteal -m "$(MARKED)" $(PYTEST_ARGS)

# Small networks: more threads do not pay off, and waiting threads should sleep when the machine is busy.
demo test test-oldest smoke: export OMP_NUM_THREADS ?= 2
demo test test-oldest smoke: export OMP_WAIT_POLICY ?= passive
demo test test-oldest smoke sweep versions fuzz kills: export TOKENIZERS_PARALLELISM = false
demo test test-oldest smoke sweep versions fuzz kills: export HF_HUB_OFFLINE = 1

.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help install test test-oldest lint format demo figure docs smoke sweep versions fuzz kills check reproduce clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

install: $(STAMP) ## make .venv with the tested versions; the other targets do it when needed

# Installs again only when a version changed. A build of this torch version that is in the environment already, for
# example one for CPUs, is left as it is.
%/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and \
	  "hf-lottalora needs Python 3.11 or newer, but $(PYTHON) is %d.%d. Try: make PYTHON=python3.12" % v[:2])'
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install "$$(grep ^torch== $(CONSTRAINTS))"
	$(@D)/bin/python -m pip install -c $(CONSTRAINTS) -e '.[$(EXTRAS)]'
	@touch $@

$(STAMP): constraints.txt
$(STAMP): CONSTRAINTS = constraints.txt
$(STAMP): EXTRAS = dev,docs,trl,deepspeed
$(OLDEST_VENV)/.installed: constraints-oldest.txt
$(OLDEST_VENV)/.installed: CONSTRAINTS = constraints-oldest.txt
$(OLDEST_VENV)/.installed: EXTRAS = dev

test: $(STAMP) ## run the tests, for example: make test PYTEST_ARGS="-k beta -x"
	$(PY) $(PYTEST)

# Warnings are no errors here: libraries of different years warn about each other. TRL needs newer ones, and benchmarks
# are run with the tested versions alone.
test-oldest: MARKED = not slow
test-oldest: $(OLDEST_VENV)/.installed ## run the tests on the oldest supported versions
	$(OLDEST_VENV)/bin/python $(PYTEST) -W default --ignore tests/tuner/test_trl.py --ignore tests/test_benchmarks.py

lint: $(STAMP) ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(STAMP) ## let ruff rewrite the code
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

demo: $(STAMP) ## train digits from a seed, save the artifact, rebuild it in a new process
	$(PY) examples/digits_demo.py $(DEMO_ARGS)

figure: demo ## the demo's figure and numbers, as README and docs/ show them
	cp out/digits_demo/digits_demo.png docs/assets/
	cp out/digits_demo/summary.json docs/assets/digits_demo.json
	$(PY) benchmarks/tables.py

docs: $(STAMP) ## the documentation as a site, in out/site; no network needed
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet
	@echo "Open out/site/index.html"

smoke: MARKED = smoke
smoke: $(STAMP) ## tests that take long: every benchmark for a few steps, killed savers, ...: 10 minutes
	$(PY) $(PYTEST)

sweep: $(STAMP) ## every architecture of transformers, small, against the recorded results: 15 minutes
	$(PY) benchmarks/architectures.py --workers 2 --output out/architectures.json --check

kills: $(STAMP) ## kill 210 savers at random moments and 50 at chosen ones, print what is left: minutes
	$(PY) tests/artifact/kills.py --points --random 70 --together 5

versions: $(STAMP) $(OLDEST_VENV)/.installed ## artifacts of the oldest versions with the newest, and back: 3 minutes
	rm -rf out/versions
	$(OLDEST_VENV)/bin/python tests/artifact/versions.py write out/versions/oldest
	$(PY) tests/artifact/versions.py read out/versions/oldest
	$(PY) tests/artifact/versions.py write out/versions/newest
	$(OLDEST_VENV)/bin/python tests/artifact/versions.py read out/versions/newest

fuzz: $(STAMP) ## spoil and load ten thousand artifacts: 15 minutes
	$(PY) tests/artifact/fuzz.py --cases 10000 --workers 2 --json out/fuzz.json

check: lint docs demo test-oldest versions test smoke sweep ## everything that CI runs

reproduce: $(STAMP) ## figures of the paper: hours; data sets from $LOTTALORA_DATA
	$(PY) benchmarks/paper/mnist.py
	$(PY) benchmarks/paper/mnist.py --preset tiny small medium --r 1 2 4 8 --alpha r
	$(PY) benchmarks/paper/mnist.py --methods lottalora --alpha r --r 16 32
	$(PY) benchmarks/paper/mnist.py --methods lottalora --alpha r --preset tiny --r 1 2 4 8 --seeds 10
	$(PY) benchmarks/paper/mnist_ablations.py
	$(PY) benchmarks/paper/mnist_seed_gating.py
	$(PY) benchmarks/paper/mnist_rank_search.py
	$(PY) benchmarks/paper/physionet.py
	$(PY) benchmarks/paper/cifar10.py
	$(PY) benchmarks/paper/cifar10.py --epochs 10 --ways "r=1" "r=1 DoRA by input" --output benchmarks/results/cifar10_10_epochs.json
	$(PY) benchmarks/paper/cifar10.py --ways "r=16 residual" "r=16 DoRA by input, residual"
	$(PY) benchmarks/paper/prelora.py --seeds 1
	$(PY) benchmarks/paper/sst2.py
	$(PY) benchmarks/paper/siblings.py
	$(PY) benchmarks/paper/siblings.py --tasks mnist --families
	$(PY) benchmarks/paper/siblings.py --tasks mnist --ways "LoRA r = 8" "RandLoRA r = 16" "RandLoRA r = 64" --epochs 20 --output benchmarks/results/siblings_20_epochs.json
	$(PY) benchmarks/paper/sizes.py
	$(PY) benchmarks/paper/saved_dtypes.py
	$(PY) benchmarks/perf/backward_bytes.py
	$(PY) benchmarks/perf/draw.py
	$(PY) benchmarks/perf/draw.py --scale 900M
	$(PY) benchmarks/perf/ready.py
	$(PY) benchmarks/perf/step.py
	$(PY) benchmarks/perf/step.py --tokens 512
	$(PY) benchmarks/perf/training.py
	$(PY) benchmarks/perf/conv.py
	$(PY) benchmarks/perf/decode.py
	$(PY) benchmarks/perf/decode.py --scale 300M
	$(PY) benchmarks/perf/large.py
	$(PY) benchmarks/perf/export.py
	$(PY) benchmarks/perf/many.py
	$(PY) benchmarks/perf/prelora_steps.py
	$(PY) benchmarks/perf/scales.py
	$(PY) benchmarks/perf/sharing.py
	$(PY) benchmarks/perf/sources.py
	$(PY) benchmarks/scale/clm_900m.py
	$(PY) benchmarks/scale/engines.py
	$(PY) benchmarks/scale/engines.py --scale 900M --parts engines --engines FSDP2 --repeats 0 --methods "PEFT LoRA, efficient loading" dense "packed, 1 bit, trained embeddings"
	$(PY) benchmarks/scale/engines.py --scale 3M --parts losses
	$(PY) benchmarks/scale/engines.py --parts engines --processes 4 --engines FSDP2 --repeats 0 --methods "PEFT LoRA, efficient loading" dense "packed, 1 bit"
	$(PY) benchmarks/scale/model.py
	$(PY) benchmarks/architectures.py --workers 2
	$(PY) benchmarks/tables.py

clean: ## remove the environments, caches and outputs
	rm -rf .venv $(OLDEST_VENV) build dist out src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests examples benchmarks -name __pycache__ -prune -exec rm -rf {} +
