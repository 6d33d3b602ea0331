# Two commands do everything, set-up included: `make check` judges the bundled kernels, `make test` tests the harness;
# `make exam` asks how good a judge it is. `make test-all` adds the harness's slow tests, which the nightly runs.

VENV := .venv
BIN := $(VENV)/bin
PROCESSES ?= 2
# More for pytest, such as OPTIONS="--conformance-profile nightly --conformance-kernels mine.py".
OPTIONS ?=
# pypto has wheels for Python 3.10 to 3.12 only.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.10 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' >/dev/null 2>&1 && echo $$p && break; done)

.PHONY: setup check test test-all hostile exam mutation lint clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.10, 3.11 or 3.12 is needed: none found; set PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/conformance doctor
	@touch $@

# One thread each: PROCESSES of them share the cores, and small operators only lose time in a thread pool.
export OMP_NUM_THREADS ?= 1

# The main job: every bundled kernel compiled, interpreted and judged; records and reports stay in runs/.
check: setup
	$(BIN)/python -m pytest conformance/suites -m "compile_only or interpret" -n $(PROCESSES) --dist worksteal -q $(OPTIONS)

test: setup
	$(BIN)/python -m pytest conformance/tests -m "not slow" -n $(PROCESSES) --dist worksteal -q

# Kernels that do what no kernel should: none may pass, hurt the next one or leave a process behind.
hostile: setup
	$(BIN)/python -m pytest conformance/tests -m hostile -q

test-all: setup
	$(BIN)/python -m pytest conformance/tests -n $(PROCESSES) --dist worksteal -q

# What guards the rule: known faults and legal variants, as torch kernels; `conformance exam` has some PyPTO kernels as well.
exam: setup
	$(BIN)/conformance exam --lane eager --processes $(PROCESSES)

# Which changes of the judge its own tests notice: benchmarks/mutation.md. Goes on where it was ended; works in build/mutation.
mutation: setup
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,mutation]'
	$(BIN)/python -m benchmarks.mutation $(OPTIONS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) runs
