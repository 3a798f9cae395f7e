# `make serve` on a fresh checkout is all there is to know; `make help` lists the rest.

VENV   ?= .venv
PYTHON ?= python3
ARGS   ?=

PY       := $(VENV)/bin/python
PACKAGES := kernels workers router cluster bench
STAMP    := $(VENV)/.headrace
DEVSTAMP := $(VENV)/.headrace-dev

.DEFAULT_GOAL := help
.PHONY: help install install-dev compile serve test test-slow check format example bench proto clean distclean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

serve: $(STAMP) compile  ## Install what is missing and serve; ARGS="--prefill 2 --port 8080" passes options on
	@$(VENV)/bin/headrace serve $(ARGS)

install: $(STAMP)  ## Install into $(VENV) when pyproject.toml has changed

install-dev: $(DEVSTAMP)  ## The same with the tools for tests and checks

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Headrace needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) -V 2>&1); set PYTHON=..." >&2; exit 1; }
	@echo "Creating $(VENV) ..."
	@$(PYTHON) -m venv $(VENV) || { \
	  echo "Creating the environment failed; on Debian: apt-get install python3-venv" >&2; exit 1; }

$(STAMP): pyproject.toml | $(PY)
	@echo "Installing Headrace into $(VENV): a few minutes the first time (torch, ray, transformers) ..."
	@$(PY) -m pip install --disable-pip-version-check -e .
	@$(call compile_libraries)
	@$(call build_kernels)
	@touch $@

$(DEVSTAMP): pyproject.toml | $(PY)
	@echo "Installing Headrace and the tools for tests and checks into $(VENV) ..."
	@$(PY) -m pip install --disable-pip-version-check -e '.[dev]'
	@$(call compile_libraries)
	@$(call build_kernels)
	@touch $(STAMP) $@

# Every process of a cluster imports these; without bytecode each start costs 10 to 20 s more.
define compile_libraries
	echo "Compiling bytecode where it is missing ..."; \
	$(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' | { \
	  read -r site; $(PY) -m compileall -q -j 0 "$$site/ray" "$$site/torch" "$$site/transformers" >/dev/null 2>&1 || true; }
endef

# Without a compiler torch takes the place of the native kernels; the engine says so when it starts.
define build_kernels
	echo "Compiling the CPU kernels ..."; $(PY) -m kernels.cpu.build || true
endef

compile: | $(PY)
	@$(PY) -m compileall -q $(PACKAGES)

test: $(DEVSTAMP) compile  ## Tests that take minutes in all; ARGS="tests/cluster -k config" chooses
	@$(PY) -m compileall -q tests
	@$(PY) -m pytest -m "not slow" $(ARGS)

test-slow: $(DEVSTAMP) compile  ## The tests marked slow
	@$(PY) -m pytest -m slow $(ARGS)

check: $(DEVSTAMP)  ## Lint, format, types, and the rules that tests hold
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy
	@$(PY) -m pytest tests/test_import_rule.py tests/test_rules.py

format: $(DEVSTAMP)  ## Format the code and mend what the linter can
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

example: $(STAMP)  ## Write deploy/config.example.yaml anew from the settings
	@$(VENV)/bin/headrace config --example > deploy/config.example.yaml

bench: $(STAMP) compile  ## Measure; ARGS="main", "engine" or "compare", each with --help
	@$(VENV)/bin/headrace bench $(or $(ARGS),main)

proto: $(DEVSTAMP)  ## Generate the gRPC code from its .proto
	@$(PY) -m grpc_tools.protoc -I. --python_out=. --grpc_python_out=. router/grpc/headrace.proto

clean:  ## Remove what was built, but not $(VENV)
	@rm -rf build dist *.egg-info .mypy_cache .ruff_cache .hypothesis .pytest_cache
	@find $(PACKAGES) tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean  ## Remove $(VENV) too
	@rm -rf $(VENV)
