# This file needs Python 3.11 or later (PYTHON=/path/to/python selects one), make and git.
# On Linux, torch from PyPI includes CUDA. For the smaller build without CUDA:
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-all docs lint clean

demo: .venv/.installed
	$(BIN)/learned-opt train --config configs/train/demo.yaml --output runs/demo
	$(BIN)/learned-opt benchmark --config configs/benchmark/demo.yaml --output runs/demo

test: .venv/.installed-test
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not slow"

test-all: test
	$(BIN)/python -m pytest -n auto --dist worksteal -m slow

docs: .venv/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

lint: .venv/.installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv build dist *.egg-info

# Each environment has a stamp file, so nothing is reinstalled until a requirement changes. The
# constraints pin torch for the whole resolution, so no dependency can install another version first.
.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit( \
	    "constraints.txt needs Python 3.11 or later, but this is " + sys.version.split()[0] + \
	    "; run make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv .venv
	$(INSTALL) -e .
	@touch $@

.venv/.installed-test: .venv/.installed
	$(INSTALL) -e ".[test]"
	@touch $@

.venv/.installed-docs: .venv/.installed
	$(INSTALL) -e ".[docs]"
	@touch $@

.venv/.installed-lint: .venv/.installed
	$(INSTALL) ruff mypy
	@touch $@
