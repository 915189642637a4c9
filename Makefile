# SPDX-License-Identifier: Apache-2.0
# One verb each for what one does with a clone; `make` lists them. Needed beforehand: Python 3.10
# or later and a C++17 compiler. Everything else comes into .venv from the package index.

PYTHON ?= python3
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
OLD_TRITON := $(VENV)/triton-3.6
CONSTRAINTS := requirements/tested.txt
SANITIZED := build/sanitized
SANITIZERS := address undefined
# Tests of the compiled module, those that are there.
NATIVE_TESTS := $(wildcard tests/test_sanitizers.py tests/test_native.py \
	tests/test_patch_rows*.py tests/test_place_tokens.py tests/test_patch_embed_native.py)
# What the installed package is made from.
SOURCES := setup.py CMakeLists.txt pyproject.toml README.md \
	$(shell find fastvit kernels csrc -type f -not -name '*.so' -not -path '*/__pycache__/*')
CXX_SOURCES := $(filter-out csrc/dlpack.h,$(foreach kind,h cpp cu cuh, \
	$(wildcard csrc/*.$(kind) tests/emulator/*.$(kind))))

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

.PHONY: help
help:
	@echo "make test      environment, install, lint, tests, and one quick pass over bench/"
	@echo "make bench     environment, install, and the table of times per epoch; for example"
	@echo "               make bench ARGS='--rows ConViT-S --steps 10 --report out'"
	@echo "make gpu       check and measure on this GPU, offline, with PYTHON as it is; STAGE=, OUT=, DRY=1"
	@echo "make docs      the site of docs/, into build/site; needs Python 3.11"
	@echo "make resources compile the Triton kernels, and with an nvcc the CUDA kernels, for every"
	@echo "               architecture, update the tables of it"
	@echo "make install   environment and install only: $(BIN)/fastvit info"
	@echo "make sanitize  the tests of the compiled module with AddressSanitizer and UBSan (Linux, GCC)"
	@echo "make lint      ruff, mypy on the installed package, clang-format"
	@echo "make format    rewrite the sources as lint wants them"
	@echo "make clean     remove what builds and caches left ($(VENV) stays)"
	@echo "PYTHON=python3.12 make ... chooses the Python that $(VENV) is made with."

.PHONY: venv
venv: $(VENV)/.created

$(VENV)/.created:
	@command -v $(PYTHON) >/dev/null || \
		{ echo "fastvit: $(PYTHON) was not found; install Python 3.10 or later or set PYTHON" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "fastvit: Python 3.10 or later is needed, $(PYTHON) is $$($(PYTHON) -V 2>&1);" \
			"set PYTHON, as in make PYTHON=python3.12 test" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV) || \
		{ echo "fastvit: Python's venv module does not work (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@touch $@

# The dependencies, and the package with them: both in one run of pip, which resolves them together.
$(VENV)/.dependencies: $(VENV)/.created pyproject.toml $(CONSTRAINTS)
	$(BIN)/python -m pip install --constraint $(CONSTRAINTS) '.[bench,test]'
	@touch $@ $(VENV)/.installed

# Only sources changed: the package alone.
$(VENV)/.installed: $(VENV)/.dependencies $(SOURCES)
	$(BIN)/python -m pip install --no-deps --force-reinstall .
	@touch $@

.PHONY: install
install: $(VENV)/.installed

.PHONY: lint
lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)
	@# From elsewhere, so that the installed package is checked: types of fastvit.kernels are
	@# found only there.
	cd / && '$(CURDIR)/$(BIN)/mypy' --config-file '$(CURDIR)/pyproject.toml' \
		--cache-dir '$(CURDIR)/.mypy_cache' --package fastvit

.PHONY: test
test: lint $(OLD_TRITON)/.created
	$(BIN)/fastvit info
	$(BIN)/pytest tests $(ARGS)
ifeq ($(shell uname -s),Linux)
	$(MAKE) sanitize ARGS=
endif
	$(OLD_TRITON)/bin/python bench/resources.py --check
	$(BIN)/pytest bench

# The oldest Triton that is supported, alone: the check for the installed one is among the tests.
$(OLD_TRITON)/.created: $(VENV)/.created
	$(PYTHON) -m venv --clear $(OLD_TRITON)
	$(OLD_TRITON)/bin/python -m pip install triton==3.6.0
	@touch $@

# A second package with a module of its own, in a build folder of its own: the installed one and
# its build stay as they are.
$(SANITIZED)/.built: $(VENV)/.dependencies $(SOURCES)
	rm -rf $(SANITIZED)
	mkdir -p $(SANITIZED)
	printf '[build]\nbuild_base = $(SANITIZED)/work\n' > $(SANITIZED)/setup.cfg
	DIST_EXTRA_CONFIG=$(SANITIZED)/setup.cfg FASTVIT_CUDA=0 \
		CMAKE_ARGS="-DCMAKE_BUILD_TYPE=Debug '-DFASTVIT_SANITIZE=$(subst $() $(),;,$(SANITIZERS))'" \
		$(BIN)/python -m pip install --no-deps --target $(SANITIZED)/package .
	@touch $@

# Python itself is not instrumented, so the sanitizers' libraries come before all others, and with
# them libstdc++, whose exceptions they watch. Python frees little at its exit, hence no leak check;
# its objects get memory of their own each, with guards around it.
.PHONY: sanitize
sanitize: $(SANITIZED)/.built
	libraries=$$(ldd $(SANITIZED)/package/fastvit/_C.*.so | awk '/lib(asan|ubsan|stdc\+\+)\./ {print $$3}') && \
	env LD_PRELOAD="$$(echo $$libraries)" \
		PYTHONPATH='$(CURDIR)/$(SANITIZED)/package' PYTHONMALLOC=malloc \
		ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=1 \
		UBSAN_OPTIONS=print_stacktrace=1 \
		FASTVIT_TEST_SANITIZERS='$(SANITIZERS)' \
		$(BIN)/pytest -p no:cacheprovider $(NATIVE_TESTS) $(ARGS)

.PHONY: resources
resources: install $(OLD_TRITON)/.created
	$(BIN)/python bench/resources.py --write
	$(OLD_TRITON)/bin/python bench/resources.py --write
	$(BIN)/python bench/cuda_resources.py --write --optional

# Warnings are errors. The variable silences an advertisement, not a warning of ours.
.PHONY: docs
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

.PHONY: bench
bench: install
	$(BIN)/pytest bench/ --benchmark $(ARGS)

# No environment is made: GPU machines often have no network, and a PyTorch of their own.
.PHONY: gpu
gpu:
	$(PYTHON) bench/gpu $(addprefix --stage ,$(STAGE)) $(if $(OUT),--out '$(OUT)') \
		$(if $(DRY),--dry)

.PHONY: format
format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

.PHONY: clean
clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	rm -f fastvit/_C.*.so
	find . -type d -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
