# Two commands do everything on a fresh machine: `make demo` and `make test`.
# A virtual environment in .venv is made when it is missing; nothing outside this folder is touched.
PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= 2.13.0
BIN     = $(VENV)/bin
PIP     = $(BIN)/python -m pip --disable-pip-version-check --quiet

# Without an NVIDIA driver, torch's CPU build: the default one brings 5 GB of CUDA libraries. The local version label
# makes that certain, because only CPU builds carry it. macOS and Arm have no such label; their default build is small.
ifneq ($(shell nvidia-smi -L 2>/dev/null),)
  INSTALL_TORCH = $(PIP) install "torch>=2.11"
else ifeq ($(shell uname -sm),Linux x86_64)
  # Nothing here could run the CUDA kernels: `make test` compiles them, an install need not.
  export FASTLM_CUDA_ARCHS ?= none
  INSTALL_TORCH = $(PIP) install "torch==$(TORCH)+cpu" 2>/dev/null || \
                  $(PIP) install "torch==$(TORCH)+cpu" --index-url https://download.pytorch.org/whl/cpu
else
  INSTALL_TORCH = $(PIP) install "torch>=2.11"
endif

.PHONY: help demo test transformers amd lint bench clean

help:
	@echo "make demo   train a small GPT on real text, about 2 minutes, and show its work"
	@echo "make test   run the whole test suite"
	@echo "make transformers   run tests/hf on every supported version of transformers"
	@echo "make lint   ruff, mypy, clang-format"
	@echo "make amd    compile the Triton kernels for an AMD GPU, minutes"
	@echo "make bench  time every op against its peers"
	@echo "make clean  remove the build; .venv stays"

# Rebuilt when a source of the extension or the packaging changes; Python files are used where they stand.
$(VENV)/.installed: setup.py pyproject.toml Makefile $(shell find csrc -type f)
	@test -x $(BIN)/python || { echo "making $(VENV) ..."; $(PYTHON) -m venv $(VENV); }
	@$(BIN)/python -c "import torch" 2>/dev/null || { echo "installing torch ..."; $(INSTALL_TORCH); }
	@echo "building fastlm ..."
	@$(PIP) install "setuptools>=77" wheel pybind11 ninja
	@$(PIP) install --no-build-isolation -e ".[test]"
	@touch $@

demo: $(VENV)/.installed
	@$(BIN)/fastlm demo $(ARGS)

# The second run has the Triton kernels compute on the CPU, in Triton's interpreter: a switch of the whole process. The
# third has the CUDA kernels run there, compiled with g++ and AddressSanitizer, in three orders of threads.
test: $(VENV)/.installed
	@$(BIN)/python -m pytest -q tests
	@if $(BIN)/python -c "import triton" 2>/dev/null; then TRITON_INTERPRET=1 $(BIN)/python -m pytest -q tests/ops tests/optim; fi
	@$(BIN)/python -m tests.emulation

# The minor versions that pyproject.toml allows, each in a folder of its own before the installed one.
TRANSFORMERS = 5.21 5.22 5.23
transformers: $(VENV)/.installed
	@for version in $(TRANSFORMERS); do \
	  folder=build/transformers-$$version; \
	  test -d $$folder || $(PIP) install --target $$folder --no-deps "transformers==$$version.*" || exit 1; \
	  echo "transformers $$version"; \
	  PYTHONPATH=$$folder $(BIN)/python -m pytest -q tests/hf || exit 1; \
	done

amd: $(VENV)/.installed
	@$(BIN)/python -m bench.ahead_of_time --chip gfx942

lint: $(VENV)/.installed
	@$(PIP) install --no-build-isolation -e ".[lint]"
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy -p fastlm
	$(BIN)/clang-format --dry-run --Werror $$(find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

bench: $(VENV)/.installed
	$(BIN)/python -m bench

clean:
	rm -rf build dist *.egg-info fastlm/_C*.so fastlm/_cuda*.so fastlm/cuda/binaries
