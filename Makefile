# make quickstart     install into .venv, then train four peers on the digits scans
# make test           what CI runs: the fast tests, and one slow test for each thing that must never break
# make test-all       all tests but the nightly ones
# make test-nightly   all tests: also lost nodes and heads, autoscaling, and outages of a minute
# make lint types     ruff and mypy
# make docs           write docs/config.md, the table of all config keys
# make bench          the benchmarks of benchmarks/README.md
# make lock           resolve requirements.lock and deploy/wml-ray.lock again; UPGRADE=--upgrade for newer versions

PYTHON ?= python3
BIN := .venv/bin
# one test at a time to whichever process is free; groups of xdist 3.8 have no effect under pytest 9.2
PARALLEL := $(BIN)/pytest -n 2 --dist load --maxschedchunk 1
# Slow tests start clusters, servers and workers, each of which uses both cores.
SERIAL := $(BIN)/pytest --durations=20

.PHONY: quickstart install test test-all test-nightly lint types docs bench lock

quickstart: install
	$(BIN)/wml-ray train jobs/quickstart.yaml

install: .venv/installed

# uv takes a fifth of pip's time. It does not read pip's configuration, so pip installs where uv fails. Bytecode is compiled
# (15 s), as pip does: where PYTHONDONTWRITEBYTECODE is set, each process would compile PyTorch again (2 to 4 s).
.venv/installed: export PATH := $(PATH):$(CURDIR)/$(BIN)
.venv/installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; ok = (3, 11) <= sys.version_info < (3, 14); ok or sys.exit("wml_ray needs Python 3.11 to 3.13, this is " + sys.version.split()[0] + ": make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	@echo "installing the locked dependencies into .venv (about 6 GB with PyTorch's CUDA libraries)"
	@sed -n '/^uv==/,/[^\\]$$/p' requirements.lock >.venv/uv.lock
	@command -v uv >/dev/null || $(BIN)/pip install --require-hashes -r .venv/uv.lock || true
	uv pip install --compile-bytecode --python $(BIN)/python --require-hashes -r requirements.lock \
		|| $(BIN)/pip install --require-hashes -r requirements.lock
	$(BIN)/pip install --no-deps --no-build-isolation --editable .
	@touch $@

test: install
	$(PARALLEL) -m "not (core or slow or nightly)"
	$(SERIAL) -m core

test-all: install
	$(PARALLEL) -m "not (core or slow or nightly)"
	$(SERIAL) -m "(core or slow) and not nightly"

test-nightly: install
	$(PARALLEL) -m "not (core or slow or nightly)"
	WML_TEST_OUTAGE_S=60 $(SERIAL) -m "core or slow or nightly"

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

docs: install
	$(BIN)/python -c 'from wml_ray.config.load import describe_keys as table; print("# Config keys\n\n" + table())' >docs/config.md

bench: install
	$(BIN)/python benchmarks/run.py

lock: install
	$(BIN)/uv pip compile --universal --python-version 3.11 --generate-hashes --no-annotate --no-header --extra dev \
		$(UPGRADE) pyproject.toml -o requirements.lock
	$(BIN)/uv pip compile --python-platform linux --python-version 3.11 --generate-hashes --no-annotate --no-header \
		--extra s3 --extra gs --extra postgres --extra onnx --extra serve --extra timm -c requirements.lock $(UPGRADE) pyproject.toml -o deploy/wml-ray.lock
