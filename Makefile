# Set-up, demo, tests and benchmarks. Every target works from a bare checkout.
# Requirements: Python >= 3.11, a C++ compiler, make, and a package index that pip can reach.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := runs/demo
NATIVE := setup.py CMakeLists.txt $(wildcard csrc/*.* csrc/*/*.*)

.PHONY: install demo test test-fast bench bench-kernels bench-tracin bench-scale bench-peers bench-report lint format stubs coverage docs wheel clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt $(NATIVE)
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"expected Python >= 3.11, got {v[0]}.{v[1]} ({sys.executable}); set PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(BIN)/python -m pip install --quiet --editable '.[test,dev,docs]'
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(BIN)/python -m pip install --quiet --no-deps kronfluence
	touch $@

demo: install
	$(BIN)/tracmod run demo --out $(DEMO)

# One process per core, each with one thread. The tests of a file run in one process and share its fixtures.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

test: install
	$(PYTEST)

test-fast: install
	$(PYTEST) -m 'not slow'

# Coverage of the fast tests. Lines that only run in worker processes are not counted.
coverage: install
	$(PYTEST) -m 'not slow' --cov --cov-report=term --cov-report=html

# Build the documentation in site/, without a network. Warnings are errors.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Build dist/*.whl, which installs without a compiler. TRACMOD_CUDA=OFF leaves the CUDA kernels out, and
# TRACMOD_CUDA=ON fails without a CUDA compiler.
wheel: install
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(BIN)/python -m pip wheel --no-deps --wheel-dir dist .

bench: install
	$(BIN)/tracmod bench

# Benchmark every op at every size in both dtypes. `make bench-report` makes the tables of bench/RESULTS.md.
bench-kernels: install
	$(BIN)/tracmod bench --full --json bench/results/kernels-cpu-float32.json
	$(BIN)/tracmod bench --full --dtype bfloat16 --json bench/results/kernels-cpu-bfloat16.json

TRACIN := $(BIN)/python bench/bench_tracin.py

# Benchmark gradient collection, fidelity, the whole job, indexes, and preconditioners.
bench-tracin: install
	$(TRACIN) collect
	$(TRACIN) train
	$(TRACIN) fidelity
	$(TRACIN) job
	$(BIN)/python bench/bench_index.py
	$(BIN)/python bench/bench_preconditioner.py

# Benchmark a search over a million examples on disk (7 GB in runs/scale), the feature store, and the engines.
bench-scale: install
	$(BIN)/python bench/bench_scale.py search
	$(BIN)/python bench/bench_scale.py store
	$(BIN)/python bench/bench_engine.py
	$(BIN)/python bench/bench_waiting.py

# Compare tracmod with other libraries, which are installed into environments in the user's cache folder.
bench-peers: install
	$(BIN)/python bench/bench_peers.py environments
	$(BIN)/python bench/bench_peers.py features
	$(BIN)/python bench/bench_peers.py job

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

# Generate the types of the native module from the built module.
stubs: install
	$(BIN)/stubgen -q -m tracmod._C -o .
	$(BIN)/ruff check -q --fix tracmod/_C.pyi
	$(BIN)/ruff format -q tracmod/_C.pyi

clean:
	rm -rf build dist site htmlcov .coverage *.egg-info tracmod/_C*.so .pytest_cache .mypy_cache .ruff_cache
