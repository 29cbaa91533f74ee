# Every target sets up what it needs: a virtual environment in .venv with the tested versions of constraints.txt.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DOCS_STAMP := $(VENV)/.docs-installed
# The first Python that is new enough for constraints.txt; `make PYTHON=...` overrides it.
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt
PYTEST_OPTIONS := --quiet -n logical --maxprocesses 4 --dist worksteal
PYTEST := $(BIN)/python -m pytest $(PYTEST_OPTIONS)
# What lets torch, and oneDNN in it, see the oldest CPU that they know: sums come out in another order.
OLD_CPU := ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41
NUMERIC := tests/quantization
# Pairs of lightning and torch for `make test-versions`, and the tests that meet Lightning's hooks most.
VERSIONS ?= 2.5.5_2.13.0 newest_2.13.0 newest_newest
VERSION_TESTS := tests/contracts/test_contracts.py tests/contracts/test_yaml.py tests/contracts/test_older_name.py tests/structure tests/test_cli.py

.PHONY: help install demo test test-all test-versions lint types docs bench dist clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F '\t' '{printf "  make %-13s %s\n", $$1, $$2}'

install: $(STAMP) ## create .venv and install the package with all that the demo and the tests need
	@echo "$(VENV) is ready. Next: \`make demo\` or \`make test\`."

$(STAMP): pyproject.toml constraints.txt
	@[ -n "$(PYTHON)" ] || { echo "Python 3.11 or newer is needed. Name one: make PYTHON=/path/to/python3 $(MAKECMDGOALS)"; exit 1; }
	@echo "[1/3] creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@echo "[2/3] installing torch (this takes a few minutes)"
	@$(PIP) torch
	@echo "[3/3] installing lightning_compress, its dependencies and the tools of the tests (this takes a few minutes)"
	@$(PIP) -e '.[test,examples,plots]'
	@touch $(STAMP)

demo: $(STAMP) ## teach a small network to read letters, halve it, bring it to int8 and onnxruntime, then report
	@echo "running examples/letters/demo.py"
	@$(BIN)/python examples/letters/demo.py

test: lint types ## lint, types, doctests and tests; warnings are errors
	@echo "pytest: doctests and tests"
	@$(PYTEST)
	@echo
	@echo "All passed. Next: \`make demo\` shows the package at work; \`make test-all\` adds the slow tests."

test-all: lint types ## the same with the slow tests, and the numeric tests as on an old CPU
	@echo "pytest: doctests and tests, the slow ones too"
	@$(PYTEST) -m "slow or not slow"
	@echo "pytest: $(NUMERIC) as on an old CPU"
	@$(OLD_CPU) $(PYTEST) $(NUMERIC)
	@echo
	@echo "All passed, the slow tests too. Next: \`make bench\` measures."

test-versions: $(VERSIONS:%=.venvs/%/.installed) ## the tests that meet Lightning most, with older and newer versions of it and of torch
	@for pair in $(VERSIONS); do \
		echo "pytest: $$(.venvs/$$pair/bin/python -m pip list --disable-pip-version-check 2>/dev/null | grep -E '^(lightning|torch) ' | xargs)"; \
		.venvs/$$pair/bin/python -m pytest $(PYTEST_OPTIONS) $(VERSION_TESTS); done

PAIR = $(subst _, ,$*)
.venvs/%/.installed: pyproject.toml constraints.txt
	@echo "installing lightning and torch $(PAIR) in .venvs/$* (this takes a few minutes)"
	@$(PYTHON) -m venv .venvs/$*
	@grep -vE '^(lightning|pytorch-lightning|torch)==' constraints.txt > .venvs/$*/constraints.txt
	@.venvs/$*/bin/python -m pip install -qq --disable-pip-version-check -c .venvs/$*/constraints.txt -e '.[test]' \
		$(patsubst %==newest,%,$(patsubst %,%==$(word 1,$(PAIR)),lightning pytorch-lightning) torch==$(word 2,$(PAIR)))
	@touch $@

lint: $(STAMP)
	@echo "ruff: lint and format"
	@$(BIN)/ruff check --quiet
	@$(BIN)/ruff format --check --quiet || { echo "Not formatted. Run: $(BIN)/ruff format"; exit 1; }

types: $(STAMP)
	@echo "mypy: strict, on the package"
	@$(BIN)/mypy

$(DOCS_STAMP): $(STAMP)
	@echo "installing what the site is built with"
	@$(PIP) -e '.[docs]'
	@touch $(DOCS_STAMP)

docs: $(DOCS_STAMP) ## build the site, strictly
	@$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going -c docs . docs/_build/html
	@echo "Next: open docs/_build/html/docs/index.html."

bench: $(STAMP) ## run every benchmark
	@for script in benchmarks/*.py; do echo "running $$script"; $(BIN)/python "$$script"; done

dist: $(STAMP) ## build the wheel and the source distribution
	@$(PIP) -e '.[dist]'
	@rm -rf build dist
	@$(BIN)/python -m build --no-isolation > /dev/null
	@ls dist/*

clean: ## remove .venv and everything that was generated
	rm -rf $(VENV) .venvs build dist docs/_build demo_output *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis lightning_logs checkpoints
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
