# Everything runs in a virtual environment of its own; `make demo` or `make test` sets it up.
PYTHON ?= python3
VENV ?= .venv
# The CPU build on the project's machines. Where $(PYTHON) has torch already, that one is used.
TORCH ?= torch==2.13.0
# Its interpreter runs the Triton kernels without a card.
TRITON ?= triton==3.6.0

BIN := $(VENV)/bin
RUN := . $(BIN)/activate &&
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu')
CXX_FILES := $(SOURCES) $(wildcard tests/tiles/*) $(wildcard tests/cuda_emulation/*) $(wildcard tests/toy_family/csrc/*/*.cpp tests/toy_family/csrc/*/*/*.c*)

.PHONY: demo test test-rest test-triton test-cuda test-ranks test-long sanitize mutations lists lint format bench gpu cuda-torch papers parity docs clean setup

setup: $(VENV)/.built

# Where $(PYTHON) stands in a virtual environment itself, --system-site-packages means those of its
# base: what the environment has is added by a path.
OUTER := import sys, sysconfig; \
  sys.prefix != sys.base_prefix and print(*{sysconfig.get_path(p) for p in ("purelib", "platlib")}, sep="\n")
$(VENV)/.python:
	@if $(PYTHON) -c 'import torch' 2>/dev/null; then \
	  $(PYTHON) -m venv --system-site-packages $(VENV) && \
	  $(PYTHON) -c '$(OUTER)' > $$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/outer.pth; \
	else \
	  $(PYTHON) -m venv $(VENV) && $(BIN)/pip install --quiet $(TORCH); \
	fi
	touch $@

$(VENV)/.environment: $(VENV)/.python pyproject.toml
	$(BIN)/pip install --quiet ninja pybind11 "setuptools>=77" wheel
	touch $@

$(VENV)/.built: $(VENV)/.environment setup.py $(SOURCES)
	$(RUN) pip install --quiet --no-build-isolation --editable '.[cli,examples,test,lint]'
	touch $@

# For its interpreter. A CUDA build of torch brings its own.
$(VENV)/.triton: $(VENV)/.built
	$(RUN) python -c 'import triton' 2>/dev/null || pip install --quiet $(TRITON)
	touch $@

demo: $(VENV)/.built
	$(RUN) spectral-kernels demo

# Four runs, two at a time; each prints when it has ended.
RANKS := tests/test_distributed.py tests/test_distributed_forms.py
test: $(VENV)/.triton
	$(MAKE) --jobs=2 --output-sync=target test-rest test-cuda test-triton test-ranks

test-rest: $(VENV)/.built
	$(RUN) pytest -m 'not long and not emulated' $(RANKS:%=--ignore=%)

# The CUDA C++ kernels in their emulation on the CPU.
test-cuda: $(VENV)/.built
	$(RUN) pytest -m 'emulated and not long'

# Optimizers over ranks, which are processes of their own.
test-ranks: $(VENV)/.built
	$(RUN) pytest -m 'not long' $(RANKS)

# The Triton kernels in its interpreter.
test-triton: $(VENV)/.triton
	$(RUN) TRITON_INTERPRET=1 pytest -m 'triton and not long'

# Without an -m the long tests are left out.
test-long: $(VENV)/.triton
	$(RUN) pytest -m 'long or not long'
	$(RUN) TRITON_INTERPRET=1 pytest -m triton

# Memory, arithmetic and threads of all C++, checked by the compiler's sanitizers; a part of
# test-long.
sanitize: $(VENV)/.built
	$(RUN) pytest -m long tests/test_sanitizers.py

# Seeded bugs, and which tests notice. MUTATIONS='--only SOAP' tries some, see tests/mutations.
mutations: $(VENV)/.built
	$(RUN) python tests/mutations/run.py $(MUTATIONS)

# What is made of the table of operators: public names, and README's table of what runs where.
lists: $(VENV)/.built
	$(RUN) python tools/public_names.py && python tools/readme_tables.py README.md

lint: $(VENV)/.built
	$(RUN) ruff check . && ruff format --check . && mypy
	$(RUN) clang-format --dry-run --Werror $(CXX_FILES)

format: $(VENV)/.built
	$(RUN) ruff check --fix . && ruff format .
	$(RUN) clang-format -i $(CXX_FILES)

bench: $(VENV)/.built
	$(RUN) spectral-kernels bench

# Half an hour. PAPERS= (nothing) goes through all problems, PAPERS='--scale 0.1 --trials 3' is a look.
# PEERS as for parity: DeVA's public code is timed too.
PAPERS ?= --tasks digits-mlp,char-gpt
papers: $(VENV)/.built
	$(RUN) SPECTRAL_KERNELS_PEERS=$(abspath $(PEERS)) python examples/papers.py $(PAPERS)

# PEERS: a folder with clones of the public optimizers, see tests/golden/parity.py.
parity: $(VENV)/.built
	$(RUN) SPECTRAL_KERNELS_PEERS=$(abspath $(PEERS)) pytest tests/test_parity.py \
	  tests/test_swap_parity.py tests/test_swap_orthogonalizers.py

docs: $(VENV)/.built
	$(RUN) pip install --quiet mkdocs-material && mkdocs build --strict

# Needs a card and no network; installs nothing. PYTHON is one that has torch and Triton.
gpu:
	PYTHON=$(PYTHON) .ci/gpu

# Builds for the CUDA torch of PYTHON and tries it, without a card. Needs nvcc; installs nothing.
cuda-torch:
	PYTHON=$(PYTHON) .ci/cuda-torch

clean:
	rm -rf build dist results site python/*.egg-info python/spectral_kernels/_C*.so
