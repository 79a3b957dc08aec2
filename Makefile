# Needs a Python, 3.11 to 3.14, and nothing else. Another than the first found: make setup PYTHON=/path/to/python3
# pip's own settings apply: point it at torch's CPU wheels first to spare a GPU-less Linux gigabytes of CUDA.

PYTHON ?= python3 python3.13 python3.12 python3.11 python
USABLE := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))
PIP := .venv/bin/python -m pip --disable-pip-version-check
# An environment holds absolute paths: in a moved folder it is made anew.
ifneq ($(shell cat .venv/made 2>/dev/null),$(shell pwd -P))
MOVED := moved
endif

.PHONY: help setup demo test lint clean dev moved

help:
	@echo 'make setup   install kobza into .venv (once; .venv/bin/kobza is then there)'
	@echo 'make demo    train a small model on Shakespeare and let it write'
	@echo 'make test    check style, imports and all tests'
	@echo 'make lint    check style and imports only'
	@echo 'make clean   remove .venv and what tools left; runs/ stays'

setup: .venv/installed
	@echo 'kobza is installed: .venv/bin/kobza --help'

demo: .venv/installed
	.venv/bin/kobza demo

test: lint
	.venv/bin/python -m pytest -n auto --maxprocesses 4 --dist worksteal

lint: dev
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .
	.venv/bin/lint-imports

dev: .venv/installed-dev

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find kobza tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps: each is written last, so that what broke off is done again.
.venv/made: $(MOVED)
	@for python in $(PYTHON); do \
	  if $$python -c '$(USABLE)' 2>/dev/null; then \
	    echo "making .venv with $$($$python --version)"; \
	    $$python -m venv --clear .venv && pwd -P > .venv/made; exit; \
	  fi; \
	done; echo 'kobza needs Python 3.11 to 3.14 and found none: install one, or name it: make setup PYTHON=/path/to/python3' >&2; exit 1

.venv/installed: .venv/made pyproject.toml
	$(PIP) install --editable .
	@touch $@

.venv/installed-dev: .venv/installed
	$(PIP) install --quiet --editable '.[dev]'
	@touch $@
