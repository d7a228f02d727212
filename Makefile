# `make demo` and `make test` set up what they need on a fresh machine with Python >= 3.11 and pip.
PYTHON ?= python3
BIN := .venv/bin
# What is imported is compiled then: all of it takes a minute.
INSTALL := $(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt
ARGS ?=
MINUTES ?= 15

.PHONY: demo test lint clean help

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: .venv/installed  ## train the models of V1's table 1 for MINUTES (15) and write a report
	$(BIN)/python -m experiments.table1 --scale=demo --minutes=$(MINUTES) $(ARGS)

test: .venv/installed-test  ## run the tests, and the notebooks
	$(BIN)/python -m pytest $(ARGS)

lint: .venv/installed-test  ## ruff, pyright and the layers of the package
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports --no-cache

.venv/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is older than Python 3.11; say which one to use: make PYTHON=python3.11"; exit 2; }
	$(PYTHON) -m venv .venv
	@touch $@

# Stamps: a second call does nothing unless the requirements changed.
.venv/installed: .venv/python pyproject.toml constraints.txt
	$(INSTALL) --editable .
	@touch $@

.venv/installed-test: .venv/installed
	$(INSTALL) --editable '.[test]'
	# Beside the packages, for one test: among them, JAX would look for TPUs in every process.
	$(INSTALL) --no-deps --upgrade --target .venv/libtpu libtpu
	@touch $@

clean:  ## remove the virtual environment and caches (results in runs/ stay)
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis build *.egg-info
