# `make demo` and `make test` need Python and make alone: both make .venv on the first call.
PYTHON ?= python3
BIN := .venv/bin
CONSTRAINTS ?= -c constraints.txt
PIP := $(BIN)/pip --disable-pip-version-check install -q $(CONSTRAINTS)

.PHONY: demo test lint docs wheel setup

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	@echo "Installing PyTorch and the packages of pyproject.toml into .venv: some minutes."
	$(PIP) torch
	$(PIP) -e '.[dev]'
	touch $@

setup: .venv/.installed

demo: setup
	$(BIN)/python examples/demo.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The tests build the site as well.
test: lint
	$(BIN)/python -m pytest

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "Open site/index.html, or serve it (the search needs that): $(BIN)/python -m http.server --directory site"

# What is published: built, checked, installed without this folder's sources, and tested.
wheel: setup
	rm -rf build dist
	$(BIN)/python -m build
	$(BIN)/python tests/check_wheel.py dist
	$(BIN)/python -m venv build/installed
	build/installed/bin/pip --disable-pip-version-check install -q $(CONSTRAINTS) torch
	build/installed/bin/pip --disable-pip-version-check install -q $(CONSTRAINTS) "$$(ls dist/*.whl)[dev]"
	build/installed/bin/python -m pytest --ignore tests/project/test_docs.py --ignore tests/project/test_surface.py
