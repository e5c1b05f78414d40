# make demo   set up and watch the main job; make test   set up and run the tests.
# Needs python3 (3.11 or newer), git and make. Everything else is installed into .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SGLANG := .venv-sglang

.PHONY: help setup demo test test-slow test-openai2 test-litellm test-recipes test-recipes-openai3 \
  test-recipes-openai2 test-sglang test-hardware check lint types contracts bench clean

help:
	@sed -n '1,2s/^# //p' Makefile
	@echo "also: make check (lint, types, import contracts, tests), make bench, make test-slow,"
	@echo "      make test-sglang (real SGLang on the CPU), make clean"

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "ConServe needs Python 3.11 or newer; found $$($(PYTHON) --version 2>&1). Set PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || \
	  { echo "$(PYTHON) cannot make virtual environments: install your system's python3-venv package"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (a minute or two the first time) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

setup: $(READY)

demo: setup
	@$(BIN)/conserve demo

test: setup
	@$(BIN)/python -m pytest -q -m "not slow and not sglang"

test-slow: setup
	@$(BIN)/python -m pytest -q -m slow

# The client layer again, with the other major version of the OpenAI SDK.
test-openai2: setup
	@test -x $(VENV)-openai2/bin/python || $(PYTHON) -m venv $(VENV)-openai2
	@$(VENV)-openai2/bin/python -m pip install --quiet --disable-pip-version-check \
	  -c constraints-openai2.txt -e . 'openai>=2.45,<3' hypothesis pytest pytest-asyncio
	@$(VENV)-openai2/bin/python -m pytest -q tests/client

# Real SGLang on the CPU, in an environment of its own; tests/sglang/README.md says what it is.
# torch first and with what it needs (on some machines that is CUDA libraries); then the complete
# list, as it is. The page hashes are compiled here, where no engine waits for them.
$(SGLANG)/.ready: constraints-sglang.txt pyproject.toml
	@test -x $(SGLANG)/bin/python || $(PYTHON) -m venv $(SGLANG)
	@echo "installing SGLang into $(SGLANG) (some minutes the first time) ..."
	@$(SGLANG)/bin/python -m pip install --quiet --disable-pip-version-check \
	  $$(grep '^torch==' constraints-sglang.txt)
	@$(SGLANG)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
	  -r constraints-sglang.txt -e .
	@TORCH_EXTENSIONS_DIR=$(CURDIR)/$(SGLANG)/extensions $(SGLANG)/bin/python -c 'from sglang.srt.mem_cache.cpp_utils \
	  import native_hash; native_hash.get_native_hash([1], None)' 2>$(SGLANG)/extensions.log \
	  || echo "no C++ compiler: page hashes in Python instead ($(SGLANG)/extensions.log)"
	@touch $@

test-sglang: setup $(SGLANG)/.ready
	@$(BIN)/python -m pytest -q -m sglang

# The GPU measuring script at small size on the CPU, with the torch that SGLang brings.
test-hardware: $(SGLANG)/.ready
	@$(SGLANG)/bin/python -m pytest -q tests/hardware

# The LiteLLM provider, with LiteLLM and its proxy, which do not fit into the development environment.
$(VENV)-litellm/.ready: pyproject.toml constraints-litellm.txt
	@test -x $(VENV)-litellm/bin/python || $(PYTHON) -m venv $(VENV)-litellm
	@echo "installing LiteLLM into $(VENV)-litellm (a minute or two, 750 MB) ..."
	@$(VENV)-litellm/bin/python -m pip install --quiet --disable-pip-version-check \
	  -c constraints-litellm.txt -e '.[litellm,serving]' 'litellm[proxy]' pytest pytest-asyncio
	@touch $@

test-litellm: setup $(VENV)-litellm/.ready
	@$(VENV)-litellm/bin/python -m pytest -q --disable-warnings tests/integrations/litellm

# Agent frameworks on our OpenAI clients, through the real gateway. Two environments: most need
# openai 3, CrewAI needs openai 2, where the matrix of our own clients runs again as well.
RECIPES_openai3 := openai-agents 'pydantic-ai-slim[openai]' 'smolagents[openai]' \
  autogen-agentchat 'autogen-ext[openai]'
RECIPES_openai2 := crewai
RECIPE_TESTS_openai2 := tests/integrations/test_openai_*.py tests/integrations/test_session_*.py

$(VENV)-recipes-%/.ready: pyproject.toml constraints-recipes-%.txt
	@test -x $(VENV)-recipes-$*/bin/python || $(PYTHON) -m venv $(VENV)-recipes-$*
	@echo "installing into $(VENV)-recipes-$* (a minute, 260 MB for openai 3, 1.1 GB for openai 2) ..."
	@$(VENV)-recipes-$*/bin/python -m pip install --quiet --disable-pip-version-check \
	  -c constraints-recipes-$*.txt -e '.[openai,serving]' $(RECIPES_$*) \
	  hypothesis pytest pytest-asyncio
	@touch $@

test-recipes: test-recipes-openai3 test-recipes-openai2

test-recipes-openai3 test-recipes-openai2: test-recipes-%: setup $(VENV)-recipes-%/.ready
	@$(VENV)-recipes-$*/bin/python -m pytest -q --disable-warnings \
	  tests/integrations/test_recipes_*.py $(RECIPE_TESTS_$*)

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: setup
	@$(BIN)/mypy

contracts: setup
	@$(BIN)/lint-imports --no-cache

check: lint types contracts test

bench: setup
	@$(BIN)/python benchmarks/scheduler_core/run.py
	@$(BIN)/python benchmarks/gateway_overhead/run.py
	@$(BIN)/python benchmarks/identity/run.py

clean:
	rm -rf $(VENV) $(VENV)-openai2 $(VENV)-litellm $(VENV)-recipes-openai2 $(VENV)-recipes-openai3
	rm -rf $(SGLANG) build .mypy_cache .ruff_cache .pytest_cache .hypothesis out
