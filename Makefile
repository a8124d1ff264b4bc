# `make demo` and `make test` need nothing but Python 3.11 or newer: they make .venv and install into it once.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt

.PHONY: demo test lint bench bench-peers install install-dev clean

demo: install
	$(BIN)/retouch demo $(ARGS)

test: install-dev
	$(BIN)/python -m pytest -q -m "not gpu" -n auto --maxprocesses 4 --dist loadfile $(ARGS)

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

# One environment a peer of the comparison: bench/peers/environments/NAME.txt into bench/peers/.venvs/NAME.
PEERS := $(patsubst bench/peers/environments/%.constraints.txt,bench/peers/.venvs/%/.installed,$(wildcard bench/peers/environments/*.constraints.txt))

bench-peers: $(PEERS)

bench/peers/.venvs/%/.installed: bench/peers/environments/%.txt bench/peers/environments/%.constraints.txt
	@echo "Installing the peer environment $* (once; a minute or two, 1.3 GB)"
	$(PYTHON) -m venv bench/peers/.venvs/$*
	bench/peers/.venvs/$*/bin/python -m pip --disable-pip-version-check install --quiet -c $(word 2,$^) torch
	bench/peers/.venvs/$*/bin/python -m pip --disable-pip-version-check install --quiet -c $(word 2,$^) -r $<
	@touch $@

clean:
	rm -rf .venv bench/peers/.venvs out build src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
