# Set-up and every routine command. `make demo` and `make test` need Python >= 3.11 and nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# SpikingJelly's former version alone; all else is that of .venv.
LEGACY := build/legacy
# Of the many of dev the newest pip installs in half the time.
INSTALL := $(BIN)/python -m pip install --quiet --upgrade pip && $(BIN)/python -m pip install --quiet
# Each file of tests in one process, as many at a time as there are cores, each in one thread.
PYTEST := -m pytest --numprocesses=auto --maxprocesses=8 --dist=loadfile --no-loadscope-reorder

.PHONY: help demo gpu test slow test-all test-legacy kernels fuzz docs tables lint format build install clean

help: ## List these commands
	@sed -n 's/^\([a-z-]*\):.* ## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

demo: $(VENV)/demo ## Train a small ESVAE on handwritten digits and draw its pictures
	$(BIN)/sj-taid train
	@echo "For sj-taid in this shell: source $(BIN)/activate"

# The extra is that of the CUDA which torch is built for.
gpu: install ## Prove the CUDA kernels on this machine's GPU, and time them; twenty minutes
	cuda=$$($(BIN)/python -c "import torch; print((torch.version.cuda or '').split('.')[0])"); \
	  test -z "$$cuda" || $(BIN)/python -m pip install --quiet --editable ".[cuda$$cuda]"
	$(BIN)/python experiments/prove.py

test slow test-all test-legacy docs: export OMP_NUM_THREADS := 1

test: install lint ## Lint, type check and test
	$(BIN)/python $(PYTEST)

slow: install ## Test runs, faults, sweeps, pages and all else that takes long
	$(BIN)/python $(PYTEST) -m slow

test-all: install ## Test what test and slow do, in one go
	$(BIN)/python $(PYTEST) -m "not kernels and not fuzz and not ray"

# The unit tests, without training and what asks little of SpikingJelly: metrics, pages, kernels and
# their texts, operations on tensors and norms, what a graph is compiled to.
NOT_LEGACY := experiments data metric training test_docs.py test_packaging.py test_extras.py
NOT_LEGACY += test_cpu.py test_cuda.py test_cuda_text.py test_fused.py test_kernels.py test_neurons.py
NOT_LEGACY += test_norm.py test_nvrtc.py test_rows.py test_text.py test_fuzz.py
NOT_LEGACY += test_norm_output.py test_own_norm.py test_readers.py test_flow.py test_writes.py
test-legacy: install $(LEGACY) ## Test the library on SpikingJelly 0.0.0.0.14
	PYTHONPATH=$(CURDIR)/$(LEGACY) $(BIN)/python $(PYTEST) \
	  tests sj_taid $(NOT_LEGACY:%=--ignore-glob=*/%) -k "not inductor"

kernels: install ## Test every combination of the CUDA kernels' options; minutes
	$(BIN)/python -m pytest -m kernels

fuzz: install ## Test 2,000 random calls of the neuron, 2,000 random nets and 1,000 random steps; minutes
	$(BIN)/python -m pytest -m fuzz

docs: install ## Make HTML in build/docs
	$(BIN)/sphinx-build -E -W --keep-going docs build/docs

tables: install ## Fill the tables of README, RESULTS and docs from the results, and draw energy.png
	$(BIN)/python experiments/pages.py

lint: install ## Lint and type check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install ## Format, and fix what ruff can fix
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
	$(INSTALL) --editable ".[dev]"
	touch $@ $(VENV)/demo

$(LEGACY): | $(VENV)/installed
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $@.part "spikingjelly==0.0.0.0.14"
	mv $@.part $@

clean: ## Remove what these commands made
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
