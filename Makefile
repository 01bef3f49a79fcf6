# Every target sets up .venv by itself; doing it again is quick.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := $(BIN)/outrider

.PHONY: quickstart test gpu-check lint setup clean
.DEFAULT_GOAL := help

help:
	@echo "make quickstart   the whole workflow in minutes, on this machine"
	@echo "make test         ruff, pyright, import-linter and the tests"
	@echo "make gpu-check    tests and benchmarks that need an accelerator"

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml tools/install_torch.py
	@echo "setting up $(VENV) (once; a few minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python tools/install_torch.py
	@$(BIN)/python -m pip install -q --disable-pip-version-check -e ".[dev]"
	@touch $@

quickstart: setup
	$(RUN) quickstart

test: lint
	$(BIN)/pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

gpu-check: setup
	$(BIN)/python tools/gpu_check.py

clean:
	rm -rf $(VENV) quickstart
