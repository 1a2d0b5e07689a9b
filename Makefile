# Set-up and every routine command. `make demo` and `make test` need Python >= 3.11 and nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LEGACY := .venv-legacy

.PHONY: help demo gpu test test-legacy kernels fuzz docs tables lint format build install clean

help: ## List these commands
	@sed -n 's/^\([a-z-]*\):.* ## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

demo: $(VENV)/demo ## Train a small ESVAE on handwritten digits and draw its pictures
	$(BIN)/sj-taid train

# The extra is that of the CUDA which torch is built for.
gpu: install ## Prove the CUDA kernels on this machine's GPU, and time them; ten minutes
	cuda=$$($(BIN)/python -c "import torch; print((torch.version.cuda or '').split('.')[0])"); \
	  test -z "$$cuda" || $(BIN)/python -m pip install --quiet --editable ".[cuda$$cuda]"
	$(BIN)/python experiments/prove.py

test: install lint ## Lint, type check and test
	$(BIN)/python -m pytest

# The kernels know nothing of SpikingJelly; the fuzz and all else that fires run them on that line too.
test-legacy: $(LEGACY)/installed ## Test the library on SpikingJelly 0.0.0.0.14
	$(LEGACY)/bin/python -m pytest tests sj_taid --ignore-glob=*/experiments --ignore-glob=*/data --ignore-glob=*/training --ignore-glob=*/test_cpu.py --ignore-glob=*/test_cuda.py --ignore-glob=*/test_kernels.py --ignore-glob=*/test_nvrtc.py

kernels: install ## Test every combination of the CUDA kernels' options; minutes
	$(BIN)/python -m pytest -m kernels

fuzz: install ## Test 2,000 random calls of each public function; minutes
	$(BIN)/python -m pytest -m fuzz

docs: $(VENV)/docs ## Make HTML in build/docs
	$(BIN)/sphinx-build -E -W --keep-going docs build/docs

tables: install ## Fill the tables of README, RESULTS and docs from the results
	$(BIN)/python experiments/pages.py

lint: install ## Lint and type check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install ## Format, and mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

build: install ## Make wheel and sdist in dist/, and check them
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

install: $(VENV)/installed ## Make .venv with everything

# Repeated when the dependencies change.
$(VENV)/demo: setup.cfg pyproject.toml
	@echo "Installing what the demo needs in $(VENV); a minute or more."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[cpu,train]"
	touch $@

$(VENV)/installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@ $(VENV)/demo

$(VENV)/docs: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	touch $@

$(LEGACY)/installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(LEGACY)
	$(LEGACY)/bin/python -m pip install --quiet --editable ".[test-legacy]" "spikingjelly==0.0.0.0.14"
	touch $@

clean: ## Remove what these commands made
	rm -rf $(VENV) $(LEGACY) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
