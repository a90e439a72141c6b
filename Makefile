# make quickstart   install into .venv, then train four peers on the digits scans
# make test         the whole test suite
# make lint types   ruff and mypy
# make bench        the benchmarks of benchmarks/README.md
# make lock         resolve requirements.lock anew (needs uv)

PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart install test lint types bench lock

quickstart: install
	$(BIN)/wml-ray train jobs/quickstart.yaml

install: .venv/installed

.venv/installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; ok = (3, 11) <= sys.version_info < (3, 14); ok or sys.exit("wml_ray needs Python 3.11 to 3.13, this is " + sys.version.split()[0] + ": make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	@echo "installing the locked dependencies into .venv (about 6 GB with PyTorch's CUDA libraries; a few minutes)"
	$(BIN)/pip install --quiet --require-hashes -r requirements.lock
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

test: install
	$(BIN)/pytest -n 2 -m "not slow"
	$(BIN)/pytest -m slow

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

bench: install
	$(BIN)/python benchmarks/run.py

lock:
	uv pip compile --universal --python-version 3.11 --generate-hashes --no-annotate --no-header --extra dev \
		pyproject.toml -o requirements.lock
