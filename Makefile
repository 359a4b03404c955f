# Needs Python 3.11 or newer, make, and a network to the package index. Everything lives in .venv.
PYTHON ?= python3
BIN := .venv/bin
# two processes of one thread each: on two cores, threads of two processes would wait for each other
# bytecode is kept: without it each process compiles the checked modules and the rewritten tests anew
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadgroup
# without the shape-checking hook, under which nothing compiles
UNHOOKED := -o addopts="-q --strict-markers -p no:cacheprovider"

.PHONY: install demo test check types quick test-slow lowest docs bench format

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
	$(MAKE) --jobs 2 --output-sync types quick

# beside one another: the types take one core
types:
	$(BIN)/pyright --pythonpath $(BIN)/python

quick:
	$(PYTEST) -m "quick and not seconds and not slow and not unhooked"

test: install
	$(PYTEST) -m "not slow and not unhooked"
	$(PYTEST) -m "unhooked and not slow" $(UNHOOKED)

test-slow: install
	$(BIN)/pytest -m "slow" $(UNHOOKED) --durations 10

# a quick part of the tests with the oldest torch that serves, and another Python
LOWEST := .venv-lowest
PYTHON312 ?= $(shell for each in python3.12 $$HOME/.pyenv/versions/3.12*/bin/python; do $$each -c '' 2>/dev/null && echo $$each && break; done)
ifeq ($(PYTHON312),)
lowest:
	@echo "no Python 3.12 here: the oldest torch is not tried"
else
lowest: $(LOWEST)/.installed
	OMP_NUM_THREADS=1 $(LOWEST)/bin/pytest -n 2 --dist loadgroup -W "ignore:This DataLoader will create" -m "quick and not slow and not unhooked" tests/test_methods.py tests/test_train.py tests/test_plain.py tests/test_swin.py tests/test_visible.py tests/test_data_loader.py tests/test_draws.py tests/test_computing.py

$(LOWEST)/.installed: install pyproject.toml constraints.txt
	$(BIN)/uv venv --quiet --clear --no-python-downloads --python $(PYTHON312) $(LOWEST)
	grep -vE '^(torch|torchvision|triton|tensorboard|setuptools|nvidia-.*|cuda-.*)==' constraints.txt > $(LOWEST)/constraints.txt
	$(BIN)/uv pip install --quiet --python $(LOWEST)/bin/python --constraint $(LOWEST)/constraints.txt "torch==2.11.*" --editable ".[dev]"
	touch $@
endif

# the documentation's examples, executed
docs: install
	$(BIN)/pytest tests/test_examples.py

bench: install
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --constraint constraints.txt --editable ".[dev,bench]"
	$(BIN)/python benchmarks/step.py --peers

format: install
	$(BIN)/ruff format src tests benchmarks scripts
	$(BIN)/ruff check --fix src tests benchmarks scripts
