# azu: `make demo` answers a question through a swarm on this machine; `make test` checks everything.
# Both make the virtual environment first (once). Only Python 3.11 or newer, a C compiler and pip's registry are needed.

VENV ?= $(CURDIR)/.venv
BIN := $(VENV)/bin
ARGS ?=
SOURCES := azu node coordinator bootstrap benchmarks tests .ci
TYPED := azu node coordinator bootstrap benchmarks .ci
RUFF_CHECK := $(BIN)/ruff check $(SOURCES)
RUFF_FORMAT := $(BIN)/ruff format $(SOURCES)
MYPY := $(BIN)/mypy $(TYPED)
PYTEST := $(BIN)/python -m pytest
export VENV

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup demo test lint types format clean

help: ## show this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 16
	@echo '  make demo ARGS="--prompt \"Why is the sky blue?\" --keep"   (azu-demo --help lists them all)'

# The first interpreter of a version that azu supports; PYTHON=/path/to/python comes first where it is given.
setup: ## make .venv with everything in it, unless it is there already
	@for python in "$(PYTHON)" python3.11 python3.12 python3.13 python3; do \
		"$$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null || continue; \
		exec "$$python" .ci/setup_venv.py; \
	done; \
	echo 'setup: error: no Python of 3.11 to 3.13 found' >&2; \
	echo '  remedy: install one (Debian: apt-get install python3 python3-venv python3-dev), or name it: make PYTHON=/path/to/python3.11 ...' >&2; \
	exit 1

demo: setup ## run a bootstrap node, a coordinator and three workers here, and ask them a question
	@exec $(BIN)/azu-demo $(ARGS)

# A process more than cores, as tests wait a third of their time; four at most, as one that starts a swarm takes some
# GiB. A module's tests stay together, in the order of tests/conftest.py.
PROCESSES ?= $(shell cores=$$(getconf _NPROCESSORS_ONLN); echo $$((cores < 4 ? cores + 1 : 4)))
PARALLEL ?= --numprocesses $(PROCESSES) --dist loadfile --no-loadscope-reorder

# Every step runs even after an earlier one failed, so that one run shows all there is to mend; pytest closes.
test: setup ## lint, types and the whole test suite
	@failed=''; \
	$(RUFF_CHECK) || failed="$$failed lint"; \
	$(RUFF_FORMAT) --check || failed="$$failed format"; \
	$(MYPY) || failed="$$failed types"; \
	[ -z "$$failed" ] || echo "make test: failed so far:$$failed (see above); the tests run all the same" >&2; \
	$(PYTEST) $(PARALLEL) $(ARGS) || { \
		echo 'make test: what failed among others is run again by itself, and has to pass there' >&2; \
		$(PYTEST) --last-failed --last-failed-no-failures none $(ARGS); \
	} || failed="$$failed tests"; \
	[ -z "$$failed" ] || { echo "make test: failed:$$failed" >&2; exit 1; }

lint: setup ## ruff's rules and formatting
	@$(RUFF_CHECK) && $(RUFF_FORMAT) --check

types: setup ## mypy, strict
	@$(MYPY)

format: setup ## let ruff mend what it can, and format
	@$(RUFF_CHECK) --fix-only && $(RUFF_FORMAT)

clean: ## remove the virtual environment and every cache of this checkout
	rm -rf "$(VENV)" .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist *.egg-info
	find $(SOURCES) -type d -name __pycache__ -prune -exec rm -rf {} +
