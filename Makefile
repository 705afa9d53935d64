# Everything works from a fresh clone with python3 (3.11 or newer) and a package index.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: venv demo test test-slow test-faults check clean

venv: .venv/ready

.venv/ready: requirements.txt setup.cfg
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "python3 is $$($(PYTHON) -V 2>&1), 3.11 or newer is needed: make PYTHON=python3.12" >&2; exit 2; }
	@echo "setting up .venv (once)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

demo: venv
	@$(BIN)/engram-jax sweep memory_scaling --out runs/demo --seeds 1 --allow-dirty
	@$(BIN)/engram-jax report runs/demo --out runs/demo/report.html

test: venv
	@$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: venv
	@$(BIN)/python -m pytest -m slow

test-faults: venv
	@$(BIN)/python tests/faults/campaign.py

check: venv
	@$(BIN)/ruff check .
	@$(BIN)/mypy

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
