# `make race` and `make test` work on a machine with Python 3.11, pip, venv and make, and nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OUT ?= out/demo
TORCH := 2.13.0
OLDEST_TORCH := 2.9.1

.PHONY: setup race test quick oldest lint types docs speed clean

setup: $(STAMP)

# torch comes first and pinned: any package that asks for "torch" later then finds it in place.
$(STAMP): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || (echo "Python 3.11 or newer is needed: make PYTHON=python3.11" && false)
	$(call install,$(VENV),$(TORCH))

define install
	@echo "Installing into $(1) (about two minutes) ..."
	$(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install --quiet --disable-pip-version-check torch==$(2)
	$(1)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(1)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $(1)/.installed
endef

race: setup
	$(BIN)/steepest race --preset demo --out $(OUT)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/basedpyright

test: lint types
	$(BIN)/python -m pytest -n 2

# What to run while working: without the tests that take long, need a browser or need a database server.
QUICK := -q -n 2 -m "not slow and not browser and not postgres"
quick: lint types
	$(BIN)/python -m pytest $(QUICK)

# The quick tests with the oldest torch that is supported; its build for Linux brings CUDA along, seven gigabytes.
oldest: $(VENV)-oldest/.installed
	$(VENV)-oldest/bin/python -m pytest $(QUICK)

$(VENV)-oldest/.installed: requirements.txt pyproject.toml
	$(call install,$(VENV)-oldest,$(OLDEST_TORCH))

# The documentation site; build/docs/index.html is its first page. A warning is an error.
docs: setup
	$(BIN)/python -m sphinx -W -n -q --keep-going -c docs . build/docs

# Every measurement of results/speed. Leave the machine alone meanwhile: about fifteen minutes on two cores.
SPEED ?= results/speed
PEERS ?= steepest,steepest-jordan,steepest-bf16,torch,torch-fp32,pytorch-optimizer,heavyball-eager
STEP := $(BIN)/steepest bench step --threads 2 --peers $(PEERS)
speed: setup
	$(BIN)/steepest bench accuracy --out $(SPEED)/accuracy
	$(BIN)/steepest bench passes --threads 2 --pairs 60 --out $(SPEED)/passes
	$(BIN)/steepest bench scaling --threads 2 --out $(SPEED)/scaling
	$(STEP) --shapes many-small --pairs 20 --out $(SPEED)/many_small
	$(STEP) --shapes conv --pairs 10 --out $(SPEED)/conv
	$(STEP) --shapes gpt2 --width 256 512 768 --layers 4 --pairs 12 --out $(SPEED)/gpt2
	$(STEP) --shapes llama --width 512 --layers 4 --pairs 10 --out $(SPEED)/llama
	$(BIN)/steepest bench step --threads 2 --peers steepest,heavyball --shapes gpt2 --width 256 --pairs 20 \
		--out $(SPEED)/compiled
	$(BIN)/steepest bench ranks --rounds 15 --out $(SPEED)/ranks
	$(BIN)/steepest bench train --threads 2 --out $(SPEED)/train
	$(BIN)/steepest bench train --threads 2 --preset small --steps 8 \
		--methods adamw,muon,torch-muon,newton-muon,muonadam,muonadam-momo --out $(SPEED)/train_small

clean:
	rm -rf $(VENV) $(VENV)-oldest
