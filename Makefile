# Everything a contributor needs; each target makes its own virtual environment.
#
#   make demo    two workflows, killed and recovered, in under a minute
#   make test    all tests that this machine can run; says what it skipped and why
#   make storm   the tests that take minutes: long backlogs, every pool on every broker
#   make test-oldest  the tests on the oldest supported Celery and libraries
#   make sweep   kill a worker at every point of a run, on every broker; half an hour
#   make check   ruff and mypy
#   make bench   speed, as ratios within one run
#   make dev     only set up .venv for work
#
# Needs Python 3.10 or newer and pip. Another interpreter: make test PYTHON=python3.12
# One test:                                                make test ARGS="-k embedded" TEST_PROCESSES=0

PYTHON ?= python3
ARGS ?=
TEST_PROCESSES ?= 4
VENV := .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help demo test sweep test-oldest storm check bench dev clean

help:
	@sed -n 's/^#  *\(make .*\)/\1/p' Makefile

demo: $(VENV)/.demo
	@$(BIN)/python examples/demo.py $(ARGS)

# Most of a test's time goes into waiting for workers, so several run at once.
test: $(VENV)/.dev
	@$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile $(ARGS)

storm: $(VENV)/.dev
	@$(BIN)/python -m pytest --storm -m storm $(ARGS)

test-oldest: $(OLDEST)/.dev
	@$(OLDEST)/bin/python -m pytest -n $(TEST_PROCESSES) --dist loadfile $(ARGS)

sweep: $(VENV)/.dev
	@$(BIN)/python -m pytest tests/acceptance/test_crash_sweep.py --sweep full \
	    -o faulthandler_timeout=0 -o log_cli=true --log-cli-level=INFO $(ARGS)

check: $(VENV)/.dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: $(VENV)/.dev
	@$(BIN)/python -m benchmarks $(ARGS)

dev: $(VENV)/.dev
	@echo "Ready: . $(BIN)/activate"

clean:
	rm -rf $(VENV) $(OLDEST)

# The demo needs less than a tenth of what the tests need, so it starts sooner.
$(VENV)/.demo: $(VENV)/.python
	@echo "Installing celery-durable into $(VENV) ..."
	@$(PIP) --editable ".[demo]"
	@touch $@

$(VENV)/.dev: $(VENV)/.python
	@echo "Installing celery-durable and its tools into $(VENV) ..."
	@$(PIP) --editable ".[dev]"
	@touch $@ $(VENV)/.demo

$(OLDEST)/.dev: pyproject.toml tests/oldest.txt
	@echo "Installing the oldest supported versions into $(OLDEST) ..."
	@"$(PYTHON)" -m venv $(OLDEST)
	@$(OLDEST)/bin/python -m pip install --quiet --constraint tests/oldest.txt --editable ".[dev]"
	@touch $@

$(VENV)/.python: pyproject.toml
	@command -v "$(PYTHON)" >/dev/null || { \
	    echo "celery-durable needs Python 3.10 or newer, and there is no '$(PYTHON)': set PYTHON=/path/to/python3." >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "celery-durable needs Python 3.10 or newer, and $(PYTHON) is %d.%d: set PYTHON=/path/to/a/newer/python3." % sys.version_info[:2])'
	@"$(PYTHON)" -m venv $(VENV) || { \
	    echo "$(PYTHON) cannot make a virtual environment: on Debian and Ubuntu, apt install python3-venv." >&2; exit 1; }
	@touch $@
