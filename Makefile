# `make race` and `make test` work on a machine with Python 3.11, pip, venv and make, and nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OUT ?= out/demo
export MPLBACKEND := Agg

.PHONY: setup race test lint types clean

setup: $(STAMP)

# torch comes first and pinned: any package that asks for "torch" later then finds it in place.
$(STAMP): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || (echo "Python 3.11 or newer is needed: make PYTHON=python3.11" && false)
	@echo "Installing into $(VENV) (about two minutes) ..."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $(STAMP)

race: setup
	$(BIN)/steepest race --preset demo --out $(OUT)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/basedpyright

test: lint types
	$(BIN)/python -m pytest

clean:
	rm -rf $(VENV)
