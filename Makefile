# Set-up, demo, tests and benchmarks; every target works from a bare checkout.
# Needs: Python >= 3.11, a C++ compiler, make, and a package index that pip reaches.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := runs/demo
NATIVE := setup.py CMakeLists.txt $(wildcard csrc/*.* csrc/*/*.*)

.PHONY: install demo test test-fast bench bench-kernels bench-tracin bench-scale bench-report lint format coverage docs wheel clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt $(NATIVE)
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"Python >= 3.11 needed, {sys.executable} is {v[0]}.{v[1]}; set PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(BIN)/python -m pip install --quiet --editable '.[test,dev,docs]'
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(BIN)/python -m pip install --quiet --no-deps kronfluence
	touch $@

demo: install
	$(BIN)/tracmod run demo --out $(DEMO)

# One process per core, each with one thread; a file's tests stay together and share what they set up.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

test: install
	$(PYTEST)

test-fast: install
	$(PYTEST) -m 'not slow'

# Of the fast tests; lines that only worker processes run do not count.
coverage: install
	$(PYTEST) -m 'not slow' --cov --cov-report=term --cov-report=html

# The site, into site/: no network, warnings are errors.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# dist/*.whl, which installs without a compiler. TRACMOD_CUDA=OFF leaves the CUDA kernels out, ON insists on them.
wheel: install
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(BIN)/python -m pip wheel --no-deps --wheel-dir dist .

bench: install
	$(BIN)/tracmod bench

# Every op at every size, both dtypes; then the pass, the whole job and fidelity. JSON and tables in bench/.
bench-kernels: install
	$(BIN)/tracmod bench --full --json bench/results/kernels-cpu-float32.json
	$(BIN)/tracmod bench --full --dtype bfloat16 --json bench/results/kernels-cpu-bfloat16.json

TRACIN := $(BIN)/python bench/bench_tracin.py

bench-tracin: install
	$(TRACIN) collect
	$(TRACIN) train
	$(TRACIN) fidelity
	$(TRACIN) job
	$(BIN)/python bench/bench_index.py
	$(BIN)/python bench/bench_preconditioner.py

# A million examples on disk (7 GB in runs/scale), the store's costs, and the engines.
bench-scale: install
	$(BIN)/python bench/bench_scale.py search
	$(BIN)/python bench/bench_scale.py store
	$(BIN)/python bench/bench_engine.py

bench-report: install
	$(BIN)/python bench/report.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(wildcard csrc/*.* csrc/*/*.*)
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(wildcard csrc/*.* csrc/*/*.*)

clean:
	rm -rf build dist site htmlcov .coverage *.egg-info tracmod/_C*.so .pytest_cache .mypy_cache .ruff_cache
