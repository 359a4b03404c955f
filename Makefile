# Needs Python 3.11 or newer, make, and a network to the package index. Everything lives in .venv.
PYTHON ?= python3
BIN := .venv/bin
# two processes of one thread each: on two cores, threads of two processes would wait for each other
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadgroup
# without the shape-checking hook, under which nothing compiles
UNHOOKED := -o addopts="-q --strict-markers -p no:cacheprovider"

.PHONY: install demo test check test-slow docs bench format

install: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: install
	$(BIN)/underpaint demo --out runs/demo

check: install
	$(BIN)/ruff format --check src tests benchmarks scripts
	$(BIN)/ruff check src tests benchmarks scripts
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(PYTEST) -m "quick and not slow and not unhooked"

test: install
	$(PYTEST) -m "not slow and not unhooked"
	$(PYTEST) -m "unhooked and not slow" $(UNHOOKED)

test-slow: install
	$(BIN)/pytest -m "slow" $(UNHOOKED) --durations 10

# the documentation's examples, executed
docs: install
	$(BIN)/pytest tests/test_examples.py

bench: install
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --constraint constraints.txt --editable ".[dev,bench]"
	$(BIN)/python benchmarks/step.py --peers

format: install
	$(BIN)/ruff format src tests benchmarks scripts
	$(BIN)/ruff check --fix src tests benchmarks scripts
