# Every target works from a fresh clone: the virtual environment is made on first use, and made
# again when requirements.lock or pyproject.toml change. `make help` lists the targets.

# Interpreters to try, in order; the first that is new enough makes the environment.
PYTHON ?= python3 python3.13 python3.12 python3.11
# Passed on to what a target runs, as in `make test ARGS="-k momentum"`.
ARGS ?=
# Test processes: one a core, or a number; 0 runs the tests in one process, as a debugger needs.
WORKERS ?= logical
VENV := .venv
INSTALLED := $(VENV)/installed
WITH_EXAMPLES := $(VENV)/with-examples
WITH_DOCS := $(VENV)/with-docs
# What packs a release is in no extra: it is fetched when a target needs it.
UV_VERSION := 0.13.9
BUILD_VERSION := 1.6.1
MYPY_VERSION := 2.4.1
# An environment with the wheel and what it asks for: what a user has.
BARE := dist/installed
# `make installed PROGRAM=in_torch` tries the other package, with the extra that it needs.
PROGRAM ?= in_jax

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1
export PIP_RETRIES ?= 10
export PIP_DEFAULT_TIMEOUT ?= 60

.PHONY: help venv test test-ordinary parity demo phases ruff lint docs dist installed lock clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1	/p' Makefile | expand -t 15

venv: $(INSTALLED)  ## install the locked packages and the project into .venv

# One worker a core. So each worker's torch and BLAS keep to one thread, and no worker's JAX takes
# most of a GPU's memory for itself. XLA's own flags are the tests' conftest.py's.
test: export OMP_NUM_THREADS ?= 1
test: export OPENBLAS_NUM_THREADS ?= 1
test: export XLA_PYTHON_CLIENT_PREALLOCATE ?= false
test: $(INSTALLED)  ## run tests/ and parity_tests/
	$(VENV)/bin/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist worksteal $(ARGS)

# What most users' programs come by, compiled as theirs are: the other tests spare XLA its optimizations.
ORDINARY := tests/in_jax/test_flax.py tests/in_jax/test_remainder.py tests/in_jax/test_polar_factor.py parity_tests/test_golden.py

test-ordinary: export ORDINARY_XLA := 1
test-ordinary: override ARGS := $(ORDINARY) $(ARGS)
test-ordinary: test  ## run a few of the tests with XLA's ordinary flags

parity: $(INSTALLED)  ## print the largest differences between JAX and PyTorch, stage by stage
	$(VENV)/bin/python -m parity_tests $(ARGS)

demo: $(WITH_EXAMPLES)  ## compare AdamW, Muon and NorMuon on a small GPT
	$(VENV)/bin/python -m examples compare $(ARGS)

phases: $(WITH_EXAMPLES)  ## pretrain, fine-tune and preference-tune a small GPT that answers
	$(VENV)/bin/python -m examples.phases $(ARGS)

ruff: $(INSTALLED)  ## check style
	$(VENV)/bin/ruff check

lint: ruff  ## check style, formatting and types
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/pyright

# Pages are read and nothing is imported, so neither JAX nor PyTorch is needed.
docs: export NO_MKDOCS_2_WARNING := 1
docs: $(WITH_DOCS)  ## build the documentation site into build/site; a broken link is an error
	$(VENV)/bin/python -m mkdocs build --strict $(ARGS)

dist: $(VENV)/bin/python  ## build the wheel and the sdist into dist/
	$(VENV)/bin/python -m pip install --quiet build==$(BUILD_VERSION)
	rm -rf dist
	$(VENV)/bin/python -m build --outdir dist

# The program is copied, so that nothing is imported from this folder in place of the wheel.
installed: dist $(INSTALLED)  ## install the wheel alone, run a user's program with it and check its types
	$(VENV)/bin/python -m pip install --quiet mypy==$(MYPY_VERSION)
	$(VENV)/bin/python -m venv $(BARE)
	$(BARE)/bin/python -m pip install --quiet "$$(echo dist/*.whl)$(if $(filter in_torch,$(PROGRAM)),[torch])"
	cp tests/installed/$(PROGRAM).py $(BARE)
	cd $(BARE) && bin/python $(PROGRAM).py
	cd $(BARE) && ../../$(VENV)/bin/pyright --pythonpath bin/python $(PROGRAM).py
	cd $(BARE) && ../../$(VENV)/bin/mypy --strict --disable-error-code import-untyped --python-executable bin/python $(PROGRAM).py

# Pins that still hold are kept; `make lock ARGS=--upgrade` moves them all.
lock: $(VENV)/bin/python  ## rewrite requirements.lock from pyproject.toml
	$(VENV)/bin/python -m pip install --quiet uv==$(UV_VERSION)
	cp requirements.lock $(VENV)/requirements.lock
	$(VENV)/bin/uv pip compile --quiet --universal --python-version 3.11 --extra dev \
	  --no-header --no-emit-index-url --no-emit-find-links --annotation-style line \
	  --output-file $(VENV)/requirements.lock $(ARGS) pyproject.toml
	{ echo "# What \`make test\`, \`make demo\` and \`make lint\` install, for Python 3.11 and later."; \
	  echo "# Written by \`make lock\` from pyproject.toml with its extra \`dev\`: edit that, not this."; \
	  echo "# The GPU packages of torch's Linux build are left out: torch pins them itself."; \
	  grep -Ev '^(#|nvidia-|cuda-)' $(VENV)/requirements.lock; } > requirements.lock.new
	mv requirements.lock.new requirements.lock

clean:  ## remove what the other targets made, the environment included
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .hypothesis .ruff_cache examples/out benchmarks/out
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python:
	@for python in $(PYTHON); do \
	  if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo "making $(VENV) with $$("$$python" -c 'import sys; print(sys.executable, sys.version.split()[0])')"; \
	    "$$python" -m venv $(VENV) && exit 0; \
	    rm -rf $(VENV); exit 1; \
	  fi; \
	done; \
	echo "error: Python 3.11 or newer is needed; tried: $(PYTHON)." >&2; \
	echo "Name one that is new enough: make PYTHON=/path/to/python3.12" >&2; \
	exit 1

$(WITH_DOCS): pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")' \
	  | $(VENV)/bin/python -m pip install --requirement /dev/stdin
	@touch $@

# The lock's versions of what the examples need: neither PyTorch nor the tests' packages.
$(WITH_EXAMPLES): requirements.lock pyproject.toml | $(VENV)/bin/python
	test $(INSTALLED) -nt requirements.lock || { \
	  $(VENV)/bin/python -m pip install --constraint requirements.lock setuptools && \
	  $(VENV)/bin/python -m pip install --constraint requirements.lock --no-build-isolation \
	    --editable '.[examples]'; }
	@touch $@

$(INSTALLED): requirements.lock pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --requirement requirements.lock
	$(VENV)/bin/python -m pip install --no-deps --no-build-isolation --editable .
	@touch $@
