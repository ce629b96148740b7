# Every target works on a fresh clone: the first one that runs makes the virtual environment.
PYTHON ?= python3.11
BIN := .venv/bin
PARALLEL := --numprocesses auto --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-all lint types imports installed-copy bench docs

demo: .venv/.installed
	$(BIN)/pifa demo

test: .venv/.installed
	TRITON_INTERPRET=1 $(BIN)/pytest $(PARALLEL)

test-all: .venv/.installed
	TRITON_INTERPRET=1 $(BIN)/pytest $(PARALLEL) -m ""

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: installed-copy
	cd build/installed && ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p pifa_compiler

imports: installed-copy
	cd build/installed && ../../$(BIN)/lint-imports --no-logo --no-cache ../../pyproject.toml

# The package as a wheel has it. mypy and import-linter cannot follow the map of folders of an editable install; they
# check this copy, from inside its folder so that they find it first.
installed-copy: .venv/.installed
	rm -rf build/lib build/installed
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --target build/installed .

# The tables in README.md and docs/, from the rows in benchmarks/results and from the command line.
docs: .venv/.installed
	$(BIN)/python benchmarks/tables.py

bench: .venv/.installed
	$(BIN)/python benchmarks/kernel_figures.py

.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -c constraints.txt -e '.[hf,onnx,plot,gpu,dev]'
	touch $@
