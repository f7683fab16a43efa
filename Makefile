# Each target does all of its own set-up: `make demo` and `make test` work on a machine that has only Python.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Workers of the test run; each compiles on its own.
JOBS ?= 2

.PHONY: demo test test-all lint parity clean

demo: $(VENV)/.installed
	rm -rf runs/quickstart
	$(BIN)/python launch/quickstart.py --workdir=runs/quickstart

test: $(VENV)/.installed-test lint
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not slow and not real and not parity and not tpu_aot and not multiprocess"

# Everything but the comparison with torch.
test-all: $(VENV)/.installed-test lint
	$(BIN)/pip install -q -e ".[aot]"
	$(BIN)/python -m pytest -n $(JOBS) -m "not parity"

# Needs torch, a CPU build by preference: `$(BIN)/pip install torch --index-url https://download.pytorch.org/whl/cpu` first.
parity: $(VENV)/.installed-test
	$(BIN)/pip install -q -e ".[parity]"
	$(BIN)/python -m pytest -n $(JOBS) -m parity

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/mypy

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip
	$(BIN)/pip install -q -e .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/pip install -q -e ".[test]"
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis
