# make run    the whole pipeline with the default configuration; ARGS="--set dpo.beta=0.05" changes it
# make test   linters and tests, as the continuous integration runs them
# make setup  the virtual environment in .venv with what both need
# make clean  caches and build products; the environment, the store and the reports stay

SHELL := /bin/sh
PIP := .venv/bin/python -m pip --disable-pip-version-check --quiet
CHECKED := flows steps hybrid kernels_ext corpora evals stage_store reports tests

.PHONY: setup run test lint clean
.DELETE_ON_ERROR:

setup: .venv/.installed-test

run: .venv/.installed
	.venv/bin/python flows/distill_flow.py run $(ARGS)

test: lint
	.venv/bin/python -m pytest $(ARGS)

lint: .venv/.installed-test
	.venv/bin/ruff check $(CHECKED)
	.venv/bin/ruff format --check $(CHECKED)
	.venv/bin/mypy
	.venv/bin/lint-imports

clean:
	rm -rf build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

# A name on the PATH may be a shim for an interpreter that is not installed, so each candidate has to run.
.venv/bin/python:
	@for candidate in $(PYTHON) python3.11 python3.12 python3; do \
	    if "$$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; \
	    then exec "$$candidate" -m venv .venv; fi; \
	done; \
	echo "make: no Python 3.11 or 3.12 with venv found; install one (Debian: apt install python3 python3-venv) or name it: make PYTHON=/path/to/python" >&2; \
	exit 1

# torch first and by itself: the constraints name the version that the tests ran with.
.venv/.installed: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) install -c constraints.txt torch==2.13.0
	$(PIP) install -c constraints.txt -e .
	@touch $@

.venv/.installed-test: .venv/.installed
	$(PIP) install -c constraints.txt -e ".[test]"
	@touch $@
