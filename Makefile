# Every target does its own set-up: one stamp stands for a complete environment, and nothing is installed twice.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
TESTED := $(VENV)/.tested
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
# The checkout's folder must not shadow installed packages (kernels/ is the name of another one).
export PYTHONSAFEPATH := 1
# DeepSpeed's setup.py imports a module beside it, which that variable would hide.
PIP := env -u PYTHONSAFEPATH python -m pip install -q --disable-pip-version-check -c constraints.txt

.PHONY: help install demo test test-faults lint bench clean

help:
	@echo "make install      only what vadit needs, into $(VENV)"
	@echo "make demo         train, sample and evaluate the whole system on digits, in minutes (runs/demo)"
	@echo "make test         lint and tests"
	@echo "make test-faults  runs that are killed, starved and corrupted, for some minutes"
	@echo "make lint         ruff, mypy and the layers of the package"
	@echo "make bench        the benchmarks of this machine"
	@echo "make clean        remove the environment and everything built (runs/ stays)"

install: $(STAMP)

demo: $(STAMP)
	vadit demo $(ARGS)

test: lint $(TESTED)
	OMP_NUM_THREADS=1 python -m pytest -n 2 $(ARGS)

test-faults: $(STAMP) $(TESTED)
	OMP_NUM_THREADS=1 python -m pytest -n 2 --dist loadfile -m faults $(ARGS)

lint: $(STAMP)
	ruff check .
	mypy
	lint-imports

bench: $(STAMP) $(TESTED)
	for script in benchmarks/bench_*.py; do echo "== $$script"; env -u PYTHONSAFEPATH python "$$script" $(ARGS); done

clean:
	rm -rf $(VENV) build dist *.egg-info vadit/_C*.so .pytest_cache .ruff_cache .mypy_cache .import_linter_cache

# Debian's python3 comes without the parts that make virtual environments and compile extensions.
$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "vadit needs Python 3.11 or newer, found $$($(PYTHON) --version); set PYTHON=..." >&2; exit 1; }
	@wanted=(); \
	$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || wanted+=(python3-venv); \
	$(PYTHON) -c 'import os, sysconfig, sys; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' \
		|| wanted+=(python3-dev); \
	command -v g++ >/dev/null || wanted+=(g++); \
	if (( $${#wanted[@]} )); then \
		if [[ $$(id -u) != 0 ]]; then echo "please run: sudo apt-get install -y $${wanted[*]}" >&2; exit 1; fi; \
		echo "installing $${wanted[*]} with apt-get"; \
		apt-get update -qq; \
		DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$${wanted[@]}"; \
	fi
	$(PYTHON) -m venv $(VENV)

$(STAMP): constraints.txt pyproject.toml setup.py $(shell find csrc -type f) | $(VENV)/bin/python
	@echo "installing vadit and what it needs into $(VENV): about 6 GB, some minutes"
	@$(PIP) setuptools wheel torch
	@$(PIP) --no-build-isolation -e '.[dev]'
	@touch $@

# What tests and benchmarks run where it is there: DALI, FFCV, a linter of shell scripts, network namespaces.
$(TESTED): constraints.txt .ci/install_ffcv | $(STAMP)
	@echo "installing DALI and FFCV into $(VENV)"
	@if [[ $$(id -u) == 0 ]] && command -v apt-get >/dev/null && ! { command -v shellcheck && command -v ip; } >/dev/null; then \
		apt-get update -qq; \
		DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends shellcheck iproute2 >/dev/null; \
	fi
	@$(PIP) nvidia-dali-cuda130
	@env -u PYTHONSAFEPATH bash .ci/install_ffcv -c constraints.txt
	@touch $@
