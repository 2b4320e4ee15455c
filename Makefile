# SPDX-License-Identifier: Apache-2.0
# Every target sets up what it needs in .venv and can be run again at little cost: stamp files remember what is done.

PYTHON ?= python3
TORCH ?= torch==2.13.0
PYTEST_ARGS ?=
DEMO_ARGS ?=
BENCH_ARGS ?=
# The GPUs that nvcc, where there is one, compiles for here: that of this machine, else one, to see that it compiles. A wheel and
# `pip install` take them all.
CUDA_ARCHITECTURES ?= $(shell nvidia-smi >/dev/null 2>&1 && echo native || echo 90)

ROOT := $(CURDIR)
VENV := $(ROOT)/.venv
BIN := $(VENV)/bin
PY := $(BIN)/python
STAMP := $(VENV)/stamp
BUILD := $(ROOT)/build
SOURCES := pyproject.toml CMakeLists.txt $(shell find cmake csrc python -type f ! -name '*.pyc')

export PIP_DISABLE_PIP_VERSION_CHECK := 1

# fastloss itself is built without isolation, in a build directory that stays: a second build takes seconds.
PIP := $(PY) -m pip install --quiet
PIP_FASTLOSS := $(PIP) --no-build-isolation --config-settings=build-dir=$(BUILD)/dev \
  --config-settings=cmake.define.FASTLOSS_CUDA_ARCHITECTURES=$(CUDA_ARCHITECTURES)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:  # one .venv, one pip at a time
.PHONY: help demo test bench training lint asan neon emulation registers gpu wheel clean distclean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(STAMP)/demo  ## train a language model with and without fastloss: table and plots
	$(PY) examples/train_lm.py $(DEMO_ARGS)

test: $(STAMP)/test emulation  ## run all tests, and the examples in the docstrings
	$(PY) -m pytest --doctest-modules --doctest-ignore-import-errors tests --pyargs fastloss $(PYTEST_ARGS)

bench: $(STAMP)/bench  ## compare with PyTorch, torch.compile, SciPy, optax: tables, JSON, plots
	$(PY) -m benchmarks $(BENCH_ARGS)

training: $(STAMP)/bench $(STAMP)/demo  ## train with exact, sampled and dropped gradients: table, JSON, plot
	$(PY) -m benchmarks.sampled_training

# ---- set-up ----------------------------------------------------------------------------------------------------------

# Debian and Ubuntu may have venv without ensurepip: then pip comes from the pip outside.
$(STAMP)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "fastloss needs Python 3.10 or newer: make PYTHON=python3.12 ..."; exit 1; }
	rm -rf $(VENV) $(BUILD)/dev $(BUILD)/asan
	$(PYTHON) -m venv $$($(PYTHON) -c 'import ensurepip' 2>/dev/null || echo --without-pip) $(VENV)
	@$(PY) -m pip --version >/dev/null 2>&1 || \
	  $(PYTHON) -m pip install --quiet --target "$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" pip
	$(PIP) --upgrade pip
	mkdir -p $(STAMP) && touch $@

$(STAMP)/tools: $(STAMP)/venv
	$(PIP) 'scikit-build-core>=0.10' 'pybind11>=2.13' 'cmake>=3.18' ninja
	touch $@

$(STAMP)/package: $(STAMP)/tools $(SOURCES)
	$(PIP_FASTLOSS) --force-reinstall --no-deps .
	touch $@

$(STAMP)/torch: $(STAMP)/venv
	$(PY) -m pip install $(TORCH)
	touch $@

# The extras of pyproject.toml. PyTorch comes first, so that no extra brings another one.
$(STAMP)/%: pyproject.toml | $(STAMP)/package $(STAMP)/torch
	$(PIP_FASTLOSS) '.[$(EXTRAS)]'
	touch $@

$(STAMP)/demo: EXTRAS := demo
$(STAMP)/test: EXTRAS := test
$(STAMP)/bench: EXTRAS := bench
$(STAMP)/dev: EXTRAS := dev,test

# ---- checks ----------------------------------------------------------------------------------------------------------

CXX_SOURCES := $(shell find csrc tests -name '*.[ch]pp' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h')
# The ISA files are one algorithm; clang-tidy reads it through the scalar one.
TIDY_SOURCES := $(wildcard csrc/*.cpp) csrc/isa/scalar.cpp

lint: $(STAMP)/dev emulation  ## ruff, mypy --strict, clang-format, clang-tidy, symbols of the ISA objects
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)
	$(PY) tools/check_isa_symbols.py $(BUILD)/dev
	printf '%s\n' $(TIDY_SOURCES) | xargs -P 2 -n 1 $(BIN)/clang-tidy --quiet -p $(BUILD)/dev 2>$(BUILD)/clang-tidy.log || \
	  { cat $(BUILD)/clang-tidy.log; exit 1; }
	$(BIN)/clang-tidy --quiet -p $(BUILD)/emulation csrc/cuda/*.cpp 2>$(BUILD)/clang-tidy.log || \
	  { cat $(BUILD)/clang-tidy.log; exit 1; }

ASAN_CXX ?= g++
asan: $(STAMP)/test  ## run the tests under AddressSanitizer and UndefinedBehaviorSanitizer (g++)
	CXX=$(ASAN_CXX) $(PIP) --no-build-isolation --no-deps --upgrade --target $(BUILD)/asan/site \
	  --config-settings=build-dir=$(BUILD)/asan/objects --config-settings=cmake.define.FASTLOSS_SANITIZE=ON \
	  --config-settings=install.strip=false .
	PYTHONPATH=$(BUILD)/asan/site ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1 \
	  LD_PRELOAD="$$($(ASAN_CXX) -print-file-name=libasan.so) $$($(ASAN_CXX) -print-file-name=libstdc++.so.6)" \
	  $(PY) -m pytest -s tests $(PYTEST_ARGS)

BITS := $(BIN)/cmake -G Ninja -DCMAKE_MAKE_PROGRAM=$(BIN)/ninja -DFASTLOSS_ISA_TEST=ON -S $(ROOT)
neon: $(STAMP)/tools  ## same bits on every ISA: NEON under qemu, then those of this CPU
	@command -v aarch64-linux-gnu-g++ >/dev/null && command -v qemu-aarch64 >/dev/null || \
	  { echo "make neon needs aarch64-linux-gnu-g++ and qemu-aarch64 (Debian: g++-aarch64-linux-gnu, qemu-user)"; exit 1; }
	$(BITS) -B $(BUILD)/bits-aarch64 -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
	  -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DCMAKE_EXE_LINKER_FLAGS=-static
	$(BIN)/cmake --build $(BUILD)/bits-aarch64
	$(PY) tools/check_isa_symbols.py $(BUILD)/bits-aarch64
	qemu-aarch64 $(BUILD)/bits-aarch64/isa_bits
	$(BITS) -B $(BUILD)/bits-native
	$(BIN)/cmake --build $(BUILD)/bits-native
	$(BUILD)/bits-native/isa_bits

emulation: $(STAMP)/tools  ## build the CUDA kernels as C++, as the tests run them where there is no GPU
	@$(BIN)/cmake -G Ninja -DCMAKE_MAKE_PROGRAM=$(BIN)/ninja -DFASTLOSS_CUDA_EMULATION=ON -DPython_EXECUTABLE=$(PY) \
	  -Dpybind11_DIR="$$($(PY) -m pybind11 --cmakedir)" -S $(ROOT) -B $(BUILD)/emulation >/dev/null
	@$(BIN)/cmake --build $(BUILD)/emulation --target _cuda_emulated

registers:  ## compile the CUDA kernels for every architecture: registers of each, and whether one spills
	$(PYTHON) tools/check_cuda_registers.py

gpu:  ## on a machine with a GPU: build, test, measure; needs no network and no .venv
	PYTHON=$(PYTHON) BENCH_ARGS="$(BENCH_ARGS)" tools/gpu.sh

wheel: $(STAMP)/dev  ## build a wheel, check it with auditwheel, try it in a clean environment without a compiler
	rm -rf dist
	$(PY) -m build --outdir dist
	PATH="$(BIN):$$PATH" auditwheel repair --wheel-dir dist/repaired dist/*.whl
	mv dist/repaired/*.whl dist/ && rmdir dist/repaired && rm dist/*-linux_*.whl
	$(BIN)/auditwheel show dist/*.whl
	$(PY) tools/check_wheel.py dist/*.whl $(BUILD)/wheel-venv

clean:  ## remove what was built
	rm -rf $(BUILD) dist .mypy_cache .pytest_cache .ruff_cache .hypothesis $(STAMP)/package

distclean: clean  ## remove .venv too
	rm -rf $(VENV)
