# `make demo` and `make test` need nothing but Python 3.11 or newer: they make .venv and install into it once.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt

.PHONY: demo test lint bench install install-dev clean

demo: install
	$(BIN)/retouch demo $(ARGS)

test: install-dev
	$(BIN)/python -m pytest -q -m "not gpu" $(ARGS)

lint: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: install
	$(BIN)/python bench/edit_latency.py $(ARGS)

install: .venv/.installed
install-dev: .venv/.installed-dev

$(BIN)/python:
	$(PYTHON) -m venv .venv

# Torch goes first and alone, so that a machine with a local wheel of it takes that one.
.venv/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing into .venv (once; a few minutes where the wheels are not at hand)"
	$(PIP) torch
	$(PIP) -e ".[demo]"
	@touch $@

.venv/.installed-dev: .venv/.installed
	$(PIP) -e ".[dev]"
	@touch $@

clean:
	rm -rf .venv out build src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
