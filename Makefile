# Everything a fresh machine needs: `make demo` and `make test` create .venv, install into
# it and run; called again they go straight to work.  `make help` lists the rest.
#
#   PYTHON=python3.12        the interpreter to make .venv with
#   ARGS="-k gradcheck"      handed to what the target runs
#   OUT=FOLDER               where `make gpu` writes
#   TORCH_INDEX_URL=...      another index for torch alone, PIP_ARGS=... for every pip call

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
PIP_ARGS ?=

# Where python may not keep what it has compiled, each start of one compiles torch anew: 2 seconds.
export PYTHONDONTWRITEBYTECODE :=

BIN := $(VENV)/bin
# Of the 18,000 files that are installed most are never imported: compiling them takes a minute.
PIP_INSTALL := $(BIN)/python -m pip install --quiet --no-compile $(PIP_ARGS)
TORCH := torch==2.13.0 $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL))
EXAMPLES := matplotlib tqdm statsmodels optuna
DEPS := numpy ninja setuptools wheel pytest pytest-benchmark pytest-xdist $(EXAMPLES)
ONNX := onnx onnxscript onnxruntime
# Without what they depend on: they name torch, and any torch is a CUDA build.
OPACUS := opacus opt-einsum scipy
LIGHTNING := lightning pytorch-lightning torchmetrics lightning-utilities
TRITON := triton==3.6.0
PEERS := openvino
LINT_TOOLS := ruff==0.17.6 mypy==2.4.1 clang-format==23.1.5

LIBRARY := fastlstm/_C.so
# Folders too: nothing else changes when a source is deleted.
NATIVE := fastlstm/build.py $(shell find csrc -path csrc/cuda -prune -o -print)
CPU_TESTS := $(patsubst %,tests/test_cpu_%.py,kernels processors products refusals tangents)
SOURCES := find csrc benches tests/emulator -name '*.h' -o -name '*.cpp' -o -name '*.cu'

.PHONY: help venv build cuda demo gates forecast tune test lint format sanitize emulate arm bench gpu wheel clean
.DEFAULT_GOAL := help

help: ## this list
	@sed -n 's/^\([a-z]*\):[^#]*## /\1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 12

venv: $(VENV)/.deps ## create .venv with the dependencies

build: $(LIBRARY) ## install the package into .venv, recompiling what changed in csrc

cuda: $(VENV)/.installed ## build the CUDA library into the package, with nvcc
	$(BIN)/python -P fastlstm/build.py --cuda

demo: build ## train a character model with nn.LSTM and with fastlstm.LSTM
	$(BIN)/python examples/char_rnn.py $(ARGS)

gates: build ## measure how far an LSTM remembers, and look at its gates
	$(BIN)/python examples/gates.py $(ARGS)

forecast: build ## forecast sunspots, or a column of a CSV file
	$(BIN)/python examples/time_series.py $(ARGS)

tune: build ## tune both models' hyperparameters, in under 5 minutes
	$(BIN)/python examples/tune.py $(ARGS)

# A process a core; a file's tests stay together, and with them what they compiled.
test: build ## run the tests
	$(BIN)/pytest -n auto --dist loadfile $(ARGS)

lint: $(VENV)/.lint ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(SOURCES) | xargs -r $(BIN)/clang-format --dry-run -Werror
	$(BIN)/mypy

format: $(VENV)/.lint ## rewrite the sources in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(SOURCES) | xargs -r $(BIN)/clang-format -i

# python itself is not instrumented, so the sanitizer's runtime must be in the process
# first, and libstdc++ with it, whose exceptions it intercepts.  Leaks: python's own.
sanitize: build ## run the tests of kernels and plain calls under AddressSanitizer and UBSan
	library=$$($(BIN)/python -P fastlstm/build.py --sanitize) && \
	runtime=$$($(CXX) -print-file-name=libasan.so) && \
	stdcxx=$$($(CXX) -print-file-name=libstdc++.so) && \
	LD_PRELOAD="$$runtime $$stdcxx" ASAN_OPTIONS=detect_leaks=0 \
	UBSAN_OPTIONS=print_stacktrace=1 FASTLSTM_LIBRARY="$$library" \
	$(BIN)/pytest $(CPU_TESTS) tests/test_plain.py $(ARGS)

# The unit's instructions by tests/emulator/amx.h, and AVX-512's by avx512.h where they are missing.
EMULATED = $(if $(shell grep -m 1 -w avx512_bf16 /proc/cpuinfo 2>/dev/null),,avx512) amx
emulate: build ## run the kernel tests with AVX-512 and a matrix unit that are emulated
	library=$$(CXX="$(CXX) $(foreach set,$(EMULATED),-include $(CURDIR)/tests/emulator/$(set).h)" \
	$(BIN)/python -c \
	"import pathlib, fastlstm.build as b; print(b.build(pathlib.Path('build/emulated')))") && \
	export FASTLSTM_LIBRARY="$$library" && $(BIN)/python -c \
	"from fastlstm import native as n; assert not n.missing() and 'amx' in n.instruction_sets()" && \
	$(BIN)/pytest -n auto $(CPU_TESTS) $(ARGS)

arm: $(VENV)/.deps ## run a part of the kernel tests on ARM, emulated (see tests/emulator/arm.sh)
	sh tests/emulator/arm.sh $(BIN)/python $(CPU_TESTS) $(ARGS)

bench: build $(VENV)/.bench ## time against nn.LSTM and others, in under 10 minutes
	$(BIN)/python benches/run.py $(ARGS)

# On a machine with a GPU and a python that has torch and triton; no .venv and no network.
gpu: ## test, stress and time the kernels for GPUs on one, into OUT=FOLDER
	@test -n "$(OUT)" || { echo 'make gpu: expected OUT=FOLDER' >&2; exit 2; }
	PYTHONPATH="benches:$$PYTHONPATH" $(PYTHON) -m gpu.run --out "$(OUT)" $(ARGS)

wheel: build ## build the wheel into dist
	FASTLSTM_BUILD=cpu $(BIN)/python -m pip wheel --quiet $(PIP_ARGS) \
	--no-deps --no-build-isolation --wheel-dir dist .

clean: ## remove what was built; .venv stays
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache fastlstm/*.so

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	"python 3.11 or newer is needed, $(PYTHON) is " + sys.version.split()[0])'
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "$(PYTHON) has no ensurepip, which\
	 making .venv needs: install your system's python3-venv package" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# A CUDA build of torch brings the triton it was made for: leave that one alone.
$(VENV)/.deps: Makefile | $(BIN)/python
	$(PIP_INSTALL) $(TORCH)
	$(BIN)/python -c 'import triton' 2>/dev/null || $(PIP_INSTALL) $(TRITON)
	$(PIP_INSTALL) $(DEPS) $(ONNX) transformers
	$(PIP_INSTALL) --no-deps $(OPACUS) $(LIGHTNING)
	@touch $@

$(VENV)/.bench: $(VENV)/.deps
	$(PIP_INSTALL) $(PEERS)
	@touch $@

$(VENV)/.lint: $(VENV)/.deps
	$(PIP_INSTALL) $(LINT_TOOLS)
	@touch $@

# The library is built below and not by pip, which would wrap every compiler error in its own.
$(VENV)/.installed: $(VENV)/.deps setup.py pyproject.toml
	FASTLSTM_BUILD=none $(PIP_INSTALL) --no-deps --no-build-isolation --editable .
	@touch $@

$(LIBRARY): $(VENV)/.installed $(NATIVE)
	$(BIN)/python -P fastlstm/build.py
