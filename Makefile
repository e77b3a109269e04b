# Two commands for a newcomer: `make demo` and `make test`.  The rest: test-all, gpu, bench, static, lint, format, clean.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PY := $(BIN)/python
# A CUDA toolkit on this machine is used first; without one, nvcc comes from PyPI.
comma := ,
EXTRAS := test$(if $(or $(shell command -v nvcc),$(wildcard /usr/local/cuda/bin/nvcc)),,$(comma)nvcc)

export MAX_JOBS ?= 2
# Set by CI to 1: then a missing extension is an error, not a line of output.
export BIGKERN_EXT ?= auto

.PHONY: demo test test-all gpu bench static lint format clean install build

demo: build
	$(BIN)/bigkern demo

test: build
	$(PY) -m tests.run

test-all: build
	$(PY) -m tests.run --all

# Needs a machine with an NVIDIA GPU and its own PyTorch, and no network: no virtual environment is made.
gpu:
	$(PYTHON) -m benchmarks.gpu

bench: build
	for op in adam attention attention_decode conv layer_norm rnn; do $(PY) -m benchmarks $$op || exit; done

static: build
	$(PY) -m benchmarks.static

lint: install
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	git ls-files '*.cuh' '*.cu' '*.h' '*.cpp' | xargs $(BIN)/clang-format --dry-run --Werror

format: install
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .
	git ls-files '*.cuh' '*.cu' '*.h' '*.cpp' | xargs $(BIN)/clang-format -i

# torch comes first and pinned: left to pip's resolver it may bring a build for CUDA, several GB.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch "setuptools>=77" ninja wheel
	BIGKERN_EXT=0 $(BIN)/pip install -q -c constraints.txt --no-build-isolation -e ".[$(EXTRAS)]"
	touch $@

install: $(VENV)/installed

# In place, so that ninja recompiles only what changed.
build: install
	$(PY) setup.py -q build_ext --inplace

clean:
	rm -rf build dist *.egg-info bigkern/*.so .pytest_cache .ruff_cache .hypothesis
