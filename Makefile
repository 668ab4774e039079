# dsv3_mtp. Needs make, Python >= 3.11 and a C compiler; everything else is installed into $(VENV).

PYTHON ?= python3
VENV ?= .venv
CONFIG ?= configs/v3_tiny.yaml
CORPUS ?= data/pystdlib-2048
# Extra options for pip (an index with CPU builds of torch, a proxy) and for pytest: two processes, a file stays in one of
# them, because fixtures of some files train several ranks.
PIP_FLAGS ?=
PYTEST_FLAGS ?= -n 2 --dist loadfile --no-loadscope-reorder
# Optional dependencies to install: dev, hf (parity with transformers), eval (lm-evaluation-harness), wandb, triton.
EXTRAS ?= dev

GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
# Without a GPU every package is pinned to the version that was tested, torch to one with a CPU build; and DeepSpeed is
# told that there is no GPU, because its own detection warns.
ifeq ($(GPU),)
CONSTRAINT := -c constraints-cpu.txt
export DS_ACCELERATOR ?= cpu
endif

# The stamp's name holds what was installed, and it has no prerequisites: only changed content installs again, not the
# newer dates of a fresh clone.
KEY := $(shell { cat pyproject.toml constraints-cpu.txt; echo $(EXTRAS); } | cksum | cut -d' ' -f1)
STAMP := $(VENV)/.installed-$(KEY)
# The deepspeed launcher starts plain `python`, which has to be the one in $(VENV). This checkout comes first on the
# module path, so that an environment shared by several clones runs the code of the one it was started in.
BIN := $(abspath $(VENV))/bin
IN_VENV := PATH="$(BIN):$$PATH" PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}"
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help install corpus train test test-slow test-serve lint format check clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP)  ## create the virtual environment $(VENV) and install the project into it

$(STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "dsv3_mtp needs Python >= 3.11; $(PYTHON) is older or missing. Try: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; \
	  exit 1; }
	@echo "Installing into $(VENV) (a few minutes the first time)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) $(CONSTRAINT) $(PIP_FLAGS) -e '.[$(EXTRAS)]'
	@rm -f $(VENV)/.installed-* && touch $@

corpus: $(CORPUS)/index.json  ## prepare the embedded training corpus (Python's standard library)

$(CORPUS)/index.json: | $(STAMP)
	@$(IN_VENV) python tools/prepare_data.py --corpus pystdlib --vocab-size 2048 --out $(CORPUS)

train: $(STAMP) $(CORPUS)/index.json  ## train $(CONFIG) with DeepSpeed; resumes, or says that the run is finished
	@$(IN_VENV) deepspeed -q tools/train.py --config $(CONFIG)

test: $(STAMP)  ## run the test suite, but for what takes long
	@$(IN_VENV) python -m pytest $(PYTEST_FLAGS) -m "not slow"

test-slow: $(STAMP)  ## run what takes long: the wheel, launchers, Triton for other GPUs, measured memory
	@$(IN_VENV) python -m pytest $(PYTEST_FLAGS) -m slow

test-serve: $(STAMP)  ## run an export in the engines that VLLM_PYTHON and SGLANG_PYTHON name
	@$(IN_VENV) python -m pytest -s -m serve tests/hf/test_vllm.py tests/hf/test_sglang.py

lint: $(STAMP)  ## check format, lint and types
	@$(IN_VENV) ruff format --check .
	@$(IN_VENV) ruff check .
	@$(IN_VENV) mypy

format: $(STAMP)  ## rewrite the sources in the project's format
	@$(IN_VENV) ruff format .
	@$(IN_VENV) ruff check --fix .

check: lint test  ## everything that CI runs

clean:  ## remove caches and the virtual environment; runs/ and data/ stay
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
