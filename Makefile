# Set-up and every routine command. `make demo` and `make test` need Python >= 3.11 and nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LEGACY := .venv-legacy

.PHONY: demo test test-legacy kernels docs lint format install build clean

demo: install ## Train a small FSVAE on handwritten digits and draw its pictures
	$(BIN)/python experiments/train.py

test: install lint ## Lint, type check and test
	$(BIN)/python -m pytest

test-legacy: $(LEGACY)/installed ## Test the library on SpikingJelly 0.0.0.0.14
	$(LEGACY)/bin/python -m pytest tests sj_taid --ignore-glob=*/experiments/* --ignore-glob=*/data/* --ignore-glob=*/training/*

kernels: install ## Test every combination of the CUDA kernels' options; minutes
	$(BIN)/python -m pytest -m kernels

docs: install ## HTML in build/docs
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	$(BIN)/sphinx-build -W --keep-going docs build/docs

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

build: install ## Wheel and sdist in dist/
	$(BIN)/python -m build

install: $(VENV)/installed

# Made anew when the dependencies change.
$(VENV)/installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

$(LEGACY)/installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(LEGACY)
	$(LEGACY)/bin/python -m pip install --quiet --editable ".[test-legacy]" "spikingjelly==0.0.0.0.14"
	touch $@

clean:
	rm -rf $(VENV) $(LEGACY) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
