# `make train` and `make test` make their own environment; nothing else is needed than Python >= 3.11.
PYTHON ?= python3
PIP_FLAGS ?=
VENV := .venv
BIN := $(VENV)/bin
KILLS ?= 10000
CORRUPTIONS ?= 100000
EXTRAS := data
SOURCES := src tests examples benchmarks docs
export PYTHONHASHSEED := 0

.PHONY: train test test-extras lint format docs bench torture mutants clean

train: $(VENV)/train.stamp
	@$(BIN)/truestep train configs/quickstart.toml

test: $(VENV)/test.stamp
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/pytest -n 2 --dist loadgroup

test-extras: $(VENV)/extras.stamp
	$(BIN)/pytest tests/test_extras_*.py

format: $(VENV)/test.stamp
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 14) else "truestep needs Python 3.11 to 3.13, but $(PYTHON) is %d.%d; use: make PYTHON=/path/to/python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)

$(VENV)/train.stamp: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing truestep into $(VENV) (about a minute, the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt $(PIP_FLAGS) --editable .
	@touch $@

$(VENV)/test.stamp: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing truestep and its development tools into $(VENV) (about a minute, the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt $(PIP_FLAGS) --editable '.[dev]'
	@touch $@ $(VENV)/train.stamp

$(VENV)/extras.stamp: $(VENV)/test.stamp
	@echo "Installing the extras $(EXTRAS) into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt $(PIP_FLAGS) --editable '.[dev,$(EXTRAS)]'
	@touch $@

docs: $(VENV)/train.stamp
	$(BIN)/python docs/make_reference.py
	$(BIN)/python docs/make_reliability.py
	$(BIN)/python docs/make_performance.py
	$(BIN)/python docs/make_recipes.py
	$(BIN)/python docs/make_scaling.py
	$(BIN)/python docs/draw_performance.py

bench: $(VENV)/train.stamp
	$(BIN)/python benchmarks/throughput.py --workloads W1 W2 W3

torture: $(VENV)/test.stamp
	@$(BIN)/python -B tests/torture.py --kills $(KILLS) --corruptions $(CORRUPTIONS) --output docs/torture.json

mutants: $(VENV)/test.stamp
	@$(BIN)/python -B tests/mutants.py --output docs/mutants.json

clean:
	rm -rf $(VENV) build dist *.egg-info src/*.egg-info
