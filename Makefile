# Every target makes .venv when there is none and installs into it when what is installed or compiled has changed.
#
#   make demo | demo-text | test | lint | docs | clean
#   make demo PYTHON=python3.12                                     another interpreter
#   make test JOBS=4                                                more tests side by side; 0: none
#   make demo TORCH_INDEX=URL-of-an-index-of-CPU-builds             no GPU here: gigabytes less to download

PYTHON ?= python3
TORCH_INDEX ?=
VENV ?= .venv
JOBS ?= 2

SOURCES = Makefile pyproject.toml constraints.txt setup.py src/trivium/kernels/build.py $(wildcard src/trivium/kernels/native/*.h src/trivium/kernels/native/*.cpp)
PIP_ARGS = -c constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check install --quiet
BIN = $(VENV)/bin

.PHONY: demo demo-text test lint docs clean
.DEFAULT_GOAL := test

demo: $(VENV)/.run
	$(BIN)/trivium demo

demo-text: $(VENV)/.run
	$(BIN)/trivium demo --text

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(JOBS) --dist worksteal

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/.test
	$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

clean:
	rm -rf $(VENV) build docs/_build src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

$(VENV)/bin/python:
	@$(PYTHON) -c "" 2>/dev/null || { \
	  echo "error: there is no '$(PYTHON)'. Install Python 3.10 or newer, for example: apt-get install python3 python3-venv" >&2; \
	  echo "       or name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; exit 3; }
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10))" || { \
	  echo "error: '$(PYTHON)' is `$(PYTHON) --version 2>&1`; Trivium needs Python 3.10 or newer." >&2; \
	  echo "       Name a newer one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 3; }
	@$(PYTHON) -c "import venv, ensurepip" 2>/dev/null || { \
	  echo "error: '$(PYTHON)' has no venv. Install it, for example: apt-get install python3-venv" >&2; exit 3; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: $(SOURCES) | $(VENV)/bin/python
	@echo "Installing into $(VENV) (torch is the large part) ..."
	$(PIP) $(PIP_ARGS) -e '.[serve]'
	@touch $@

$(VENV)/.test: $(SOURCES) | $(VENV)/bin/python
	@echo "Installing into $(VENV), with what the tests and the documentation need ..."
	$(PIP) $(PIP_ARGS) -e '.[test,docs]'
	@touch $@ $(VENV)/.run
