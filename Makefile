# `make demo` and `make test` need nothing but Python >= 3.11; everything is installed into .venv.
PYTHON ?= python3
BIN := .venv/bin
PIP_FLAGS := --quiet --disable-pip-version-check
# PyTorch is needed by the tests alone. The plain build of the index brings gigabytes of CUDA; this version's is small
# where a CPU build of it is configured.
TORCH := torch==2.13.0

.PHONY: demo test lint bench clean

demo: .venv/core
	$(BIN)/python examples/demo.py

test: .venv/test
	$(BIN)/python -m pytest

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: .venv/bench
	$(BIN)/python -m benchmarks.fit
	$(BIN)/python -m benchmarks.memory
	$(BIN)/python -m benchmarks.quality

clean:
	rm -rf .venv build *.egg-info

.venv/core: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install $(PIP_FLAGS) --constraint constraints.txt --editable .
	touch $@

.venv/test: .venv/core
	$(BIN)/pip install $(PIP_FLAGS) --constraint constraints.txt $(TORCH)
	$(BIN)/pip install $(PIP_FLAGS) --constraint constraints.txt --editable .[test]
	touch $@

.venv/bench: .venv/core
	$(BIN)/pip install $(PIP_FLAGS) --constraint constraints.txt --editable .[bench]
	touch $@
