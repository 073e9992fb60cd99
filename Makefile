# Each target works alone on a fresh machine that has Python >= 3.11, make and a C compiler.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready

.PHONY: help test deep mutation crosscheck lint notebooks clean

help:  ## show the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 14

$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "cpjax needs Python 3.11 or newer")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[torch,notebooks,dev]'
	touch $@

crosscheck: $(READY)  ## attention of the vendor's example configuration, three ways, and the verdict
	$(BIN)/cpjax crosscheck

test: $(READY)  ## all tests
	$(BIN)/python -m pytest -n 2

deep: $(READY)  ## the property tests with many more examples
	HYPOTHESIS_PROFILE=deep $(BIN)/python -m pytest -n 2

mutation: $(READY)  ## a seeded sample of mutants of the algorithm; which survive
	$(BIN)/python tools/mutation.py --sample 150

lint: $(READY)  ## style, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

notebooks: $(READY)  ## execute every notebook
	$(BIN)/jupyter-execute notebooks/*.ipynb

clean:  ## remove the environment and all caches
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis
