# Every target does its own set-up. Needs Python >= 3.11, make and pip. Runs with POSIX sh and GNU make 3.81 (macOS).

VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
# No compilation to bytecode: it takes as long as the installation, and most installed modules are never imported.
PIP := $(PY) -m pip install --quiet --disable-pip-version-check --no-compile
# Requirements of the environment; targets with a separate environment override them.
INSTALL ?= --editable '.[dev]' --constraint constraints.txt
# Further requirements, installed without their dependencies.
ALONE ?=
TOOLS := pytest pytest-xdist hypothesis mpmath
# Libraries that read configs; tests/core needs them.
PARSERS := dacite hydra-core omegaconf pydantic
oldest = $(1)==$(shell sed -n 's/.*"$(1)>=\([0-9.]*\).*/\1/p' pyproject.toml | head -n 1).*
PYTEST_ARGS ?= -n auto --maxprocesses 8 --dist loadgroup -m 'not slow'

# Tests start about two hundred processes; without cached bytecode each would compile torch and JAX for some seconds.
unexport PYTHONDONTWRITEBYTECODE
# NumPy multiplies small matrices here, in as many processes as there are cores: a second thread would only wait.
export OPENBLAS_NUM_THREADS := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow setup-integrations test-integrations test-oldest-jax matrix mutants check lint format types public-types docs kernels gpu growth benchmarks check-wheel clean

help: ## show this list
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  PYTHON=/path/to/python chooses the interpreter of $(VENV); PYTEST_ARGS='-k name' replaces '$(PYTEST_ARGS)'."

setup: $(STAMP) ## create .venv and install the library for development

# Installs no development tools unless .venv already has them; a later `make setup` adds them.
demo: ## check the losses on this machine, then train a small model on torch and on jax (writes demo.html)
	@[ -e $(STAMP) ] || $(MAKE) --no-print-directory setup STAMP=$(VENV)/.installed-demo \
	  INSTALL="--editable .[all] --constraint constraints.txt"
	@[ ! -e $(STAMP) ] || $(MAKE) --no-print-directory setup
	$(VENV)/bin/loss-core check
	$(PY) examples/demo.py

test: setup ## run all tests
	$(PY) -m pytest $(PYTEST_ARGS)

test-slow: setup ## run the tests that `make test` skips: torch.compile, the other dtypes, repeated paths; an hour
	$(PY) -m pytest -n auto --maxprocesses 8 --dist loadgroup -m slow

# A separate environment: transformers does not import with peft and the transformer-engine of $(VENV).
# The packages of ALONE require other libraries than these but run with these; see pyproject.toml.
setup-integrations: ## create .venv-integrations, with the libraries that have adapters
	@$(MAKE) --no-print-directory setup VENV=.venv-integrations ALONE="nemo-automodel torchtitan" \
	  INSTALL="--editable .[integrations] --constraint constraints.txt"

test-integrations: setup-integrations ## run the tests of the adapters with their libraries
	.venv-integrations/bin/python -m pytest -n auto --maxprocesses 8 --dist loadgroup \
	  tests/on_torch/integrations tests/on_jax/integrations tests/test_docs.py -k 'integrations or recipes'

test-oldest-jax: ## run the tests of the JAX backend with the oldest JAX that pyproject.toml allows
	@$(MAKE) --no-print-directory setup VENV=.venv-oldest-jax INSTALL="--editable .[jax,cli] $(call oldest,jax) $(TOOLS)"
	.venv-oldest-jax/bin/python -m pytest $(PYTEST_ARGS) tests/on_jax

# Both ends of every range in pyproject.toml. On Linux the oldest and the newest torch are CUDA builds of several GB.
# JAX needs a newer NumPy than the oldest.
matrix: test-oldest-jax ## run the tests with the oldest and the newest supported dependencies; more than an hour
	@$(MAKE) --no-print-directory setup VENV=.venv-oldest-torch \
	  INSTALL="--editable .[torch,jax,cli] $(call oldest,torch) $(TOOLS) $(PARSERS)"
	.venv-oldest-torch/bin/python -m pytest $(PYTEST_ARGS) tests/core tests/losses tests/check tests/on_torch
	@$(MAKE) --no-print-directory setup VENV=.venv-oldest-numpy \
	  INSTALL="--editable .[torch,cli] $(call oldest,numpy) $(TOOLS)"
	.venv-oldest-numpy/bin/python -m pytest $(PYTEST_ARGS) tests/losses
	@$(MAKE) --no-print-directory setup VENV=.venv-newest INSTALL="--upgrade --editable .[dev]"
	.venv-newest/bin/python -m pytest $(PYTEST_ARGS)

mutants: ## mutation tests of the losses: changed operators and numbers; MUTANTS_ARGS='--only rounding --count 40'
	@$(MAKE) --no-print-directory setup VENV=.venv-mutants \
	  INSTALL="--editable .[torch,jax,cli] cosmic-ray $(TOOLS) --constraint constraints.txt"
	.venv-mutants/bin/python tests/mutants.py $(MUTANTS_ARGS)

# Compiled flags in the dtype that tests/helpers/matrix.py leaves to this target; a plain `loss-core check` has all four.
# torch.compile generates the same float32 arithmetic for bfloat16 inputs: one loss covers how they are read and written,
# and `make test-slow` has the others.
ON_TORCH := --backend torch:plain --backend torch:eager

check: setup ## compare every loss with float64: both backends and torch:compile in float32, torch in bfloat16
	$(VENV)/bin/loss-core check $(ON_TORCH) --backend torch:compile --backend jax:xla --dtype float32
	$(VENV)/bin/loss-core check $(ON_TORCH) --dtype bfloat16
	$(VENV)/bin/loss-core check --config MaskedCrossEntropy --backend torch:compile --dtype bfloat16

lint: setup ## ruff and the import rules
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/lint-imports

format: setup ## apply the fixes and the format of ruff
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

types: setup ## mypy, strict
	$(PY) -m mypy

# From the wheel, in a folder outside the checkout, as in a user's editor. Types that are unknown in NumPy and other
# libraries are ignored.
public-types: ## check with pyright --verifytypes that every public name of loss_core has a type; in .venv-public-types
	@$(MAKE) --no-print-directory setup VENV=.venv-public-types INSTALL=".[cli] pyright[nodejs] --constraint constraints.txt"
	.venv-public-types/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --force-reinstall .
	cd "$$(mktemp -d)" && PATH="$(CURDIR)/.venv-public-types/bin:$$PATH" pyright --ignoreexternal --verifytypes loss_core

docs: setup ## build the pages of docs/ into site/; a warning, such as a broken link, is an error
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

kernels: setup ## compile every Triton kernel for real GPUs without one: registers, instructions per logit, predicted time (writes outputs/kernels.json)
	mkdir -p outputs
	$(PY) tests/on_torch/kernels/gpu/kernel_table.py --json outputs/kernels.json

gpu: setup ## on a machine with a GPU: check, compute-sanitizer, benchmark, goals; under 8 minutes (writes outputs/gpu)
	$(PY) examples/gpu_report.py

# Each size over a factor of 16, the others fixed, small enough for two cores. Even the fewest tokens fill torch's block
# of 48 MiB of logits, so that its memory can't grow. The smallest logits exceed the caches, and their gradients the
# memory that malloc keeps.
GROWTH := $(VENV)/bin/loss-core bench --baselines none --rounds 3
BOTH := --backend torch:eager --backend jax:xla
FUSED := --config FusedLinearCrossEntropy
LOGITS := --config MaskedCrossEntropy --config KDLoss
SHARES := $(foreach share,0 0.5 0.75 0.875 0.9375,--ignored $(share))
RESULT := --json examples/benchmarks/cpu-growth

growth: setup ## measure growth with T, V and the share of valid tokens; 8 minutes, idle machine; then: make benchmarks
	$(GROWTH) $(BOTH) $(FUSED) $(foreach t,512 1024 2048 4096 8192,--shape $(t),32000,256) $(RESULT)-fused-tokens.json
	$(GROWTH) $(BOTH) $(FUSED) $(foreach v,2048 4096 8192 16384 32768,--shape 1024,$(v),256) $(RESULT)-fused-vocab.json
	$(GROWTH) $(BOTH) $(FUSED) --shape 4096,8192,256 $(SHARES) $(RESULT)-fused-share.json
	$(GROWTH) --backend jax:xla $(FUSED) --shape 4096,8192,256 $(SHARES) --count-known $(RESULT)-fused-share-known.json
	$(GROWTH) $(BOTH) $(LOGITS) $(foreach t,320 1280 5120,--shape $(t),32000) $(RESULT)-logits-tokens.json
	$(GROWTH) $(BOTH) $(LOGITS) $(foreach v,2500 10000 40000,--shape 4096,$(v)) $(RESULT)-logits-vocab.json
	$(GROWTH) $(BOTH) $(LOGITS) --shape 1024,32000 $(foreach s,0 0.75 0.9375,--ignored $(s)) $(RESULT)-logits-share.json

benchmarks: setup ## write the summary of BENCHMARKS.md and the pages of examples/benchmarks from the results there
	$(PY) examples/benchmark_page.py

check-wheel: setup ## build the wheel and test it without torch and jax, and with either
	$(PY) tests/wheel_check.py

clean: ## remove .venv and everything built
	rm -rf $(VENV) .venv-* build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis outputs site
	rm -f demo.html demo.png report.html
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Runs again only if the requirements change: the checkout itself is installed in place.
# For a Python without ensurepip (as on Debian), its pip installs pip into the environment.
$(STAMP): pyproject.toml constraints.txt
	@if ! $(PY) -c '' 2>/dev/null; then \
	  for python in $(or $(PYTHON),python3 python3.13 python3.12 python3.11 python); do \
	    if "$$python" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$$python; break; fi; \
	  done; \
	  if [ -z "$$found" ]; then \
	    echo "make: $(or $(PYTHON),no python on PATH) is not a Python >= 3.11; name one with PYTHON=/path/to/python" >&2; exit 1; \
	  fi; \
	  echo "Creating $(VENV) with $$("$$found" --version)"; \
	  if "$$found" -c 'import ensurepip' 2>/dev/null; then \
	    "$$found" -m venv --clear $(VENV); \
	  else \
	    "$$found" -m venv --clear --without-pip $(VENV) && \
	    "$$found" -m pip --python $(PY) install --quiet --disable-pip-version-check pip; \
	  fi || exit 1; \
	fi
	@echo "Installing loss-core and its requirements into $(VENV); the first time takes some minutes"
	@$(PIP) $(INSTALL)
	@[ -z "$(ALONE)" ] || $(PIP) --no-deps --constraint constraints.txt $(ALONE)
	@touch $(STAMP)
