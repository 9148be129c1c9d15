# Every target builds what it needs from nothing in .venv; a second run reuses it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INPUTS := pyproject.toml constraints.txt autotunenet_jax/_version.py
# Number of test processes. Compiling is most of the work, so more than the cores does not help.
WORKERS ?= 2

export JAX_PLATFORMS ?= cpu
export PIP_NO_INPUT := 1
# Matrices are small here: the threads of BLAS would mostly wait for each other.
export OPENBLAS_NUM_THREADS ?= 1

.PHONY: demo test soak lint format docs benchmark clean

demo: $(VENV)/.examples.stamp  ## Install, then watch one run tune itself.
	$(BIN)/python examples/quickstart.py

test: $(VENV)/.test.stamp  ## Install, then run every test.
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

soak: $(VENV)/.soak.stamp  ## Install, then run the long forms of tests: more faults, more kills, the long pages.
	JAX_DISABLE_MOST_OPTIMIZATIONS=0 $(BIN)/python -m pytest -n $(WORKERS) -m soak --timeout 1200 tests $(PYTEST_ARGS)

lint: $(VENV)/.dev.stamp  ## Install, then check style, types and the direction of imports.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: $(VENV)/.dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.dev.stamp  ## Install, then build the documentation; a warning is an error.
	$(BIN)/sphinx-build -W --keep-going -b html docs docs/_build/html

clean:
	rm -rf $(VENV) .jax_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache docs/_build dist build

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.examples.stamp: $(INPUTS) | $(VENV)/bin/python
	$(PIP) install -q -e ".[examples]" -c constraints.txt
	touch $@

$(VENV)/.test.stamp: $(INPUTS) | $(VENV)/bin/python
	$(PIP) install -q -e ".[test,lightning,transformers]" -c constraints.txt
	touch $@

$(VENV)/.soak.stamp: $(INPUTS) $(VENV)/.test.stamp | $(VENV)/bin/python
	$(PIP) install -q -e ".[test,ray]" -c constraints.txt
	touch $@

$(VENV)/.dev.stamp: $(INPUTS) $(VENV)/.test.stamp | $(VENV)/bin/python
	$(PIP) install -q -e ".[dev,lightning,transformers]" -c constraints.txt
	touch $@
