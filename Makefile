# Everything a newcomer needs: `make demo`, `make test`. The environment is .venv; nothing else is touched.
PYTHON ?= python3
BIN := .venv/bin
CORE := moe_dist/models/router.py,moe_dist/models/routing.py,moe_dist/models/experts.py,moe_dist/models/swiglu.py,moe_dist/parallel/dispatch*.py
INSTALL := $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check -c constraints.txt

# COVERAGE=1: which lines are reached, in every process that the tests start; takes a third longer.
TESTS := $(if $(COVERAGE),$(BIN)/coverage run -m pytest,$(BIN)/python -m pytest)
# Files of tests run side by side, one to a core; a worker that starts ranks has up to four more processes.
JOBS ?= auto
BESIDE := -n $(JOBS) --maxprocesses 8 --dist loadfile

.PHONY: demo test test-fast test-slow proof coverage coverage-report lint format compat bench clean help

help:  ## what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

demo: .venv/run  ## train a mixture-of-experts model on this machine, about two minutes
	@$(BIN)/moe-dist train configs/demo.yaml $(ARGS)

test: .venv/dev  ## every test but the slow ones
	$(TESTS) $(BESIDE) -m "not slow and not proof" $(ARGS)

test-fast: .venv/dev  ## tests in one process only
	$(BIN)/python -m pytest $(BESIDE) -m "not slow and not dist and not proof" $(ARGS)

test-slow: .venv/dev  ## the slow tests
	$(BIN)/python -m pytest -m slow $(ARGS)

proof: .venv/dev  ## every case of the proof, and every known bug planted: an hour on two cores
	$(BIN)/python -m pytest -m proof $(ARGS)

coverage: .venv/dev  ## make test with COVERAGE=1, and the report
	$(BIN)/coverage erase
	$(MAKE) test COVERAGE=1
	$(MAKE) coverage-report

coverage-report: .venv/dev
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --skip-covered
	$(BIN)/coverage report --fail-under=95 --include='$(CORE)'

lint: .venv/dev  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/dev  ## put the code into shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

compat:  ## the proof and the single-process tests on every promised PyTorch; gigabytes to install, about an hour
	$(PYTHON) tools/compat.py $(ARGS)

bench: .venv/dev  ## one mixture-of-experts layer beside its peers
	$(BIN)/python tools/bench/moe_layer.py --quick

clean:  ## remove the environment and caches; runs under outputs/ stay
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info

.venv/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; say which: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	@touch $@

.venv/run: .venv/python pyproject.toml constraints.txt
	$(INSTALL) -e .
	@touch $@

.venv/dev: .venv/python pyproject.toml constraints.txt
	$(INSTALL) -e '.[dev]'
	@touch $@ .venv/run
