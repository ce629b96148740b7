# Every target works on a fresh clone: the first one that runs makes the virtual environment.
PYTHON ?= python3.11
BIN := .venv/bin
PARALLEL := --numprocesses auto --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-all lint types bench docs

demo: .venv/.installed
	$(BIN)/pifa demo

test: .venv/.installed
	TRITON_INTERPRET=1 $(BIN)/pytest $(PARALLEL)

test-all: .venv/.installed
	TRITON_INTERPRET=1 $(BIN)/pytest $(PARALLEL) -m ""

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy cannot follow the editable install's map of folders, so it checks an installed copy, from outside the root.
types: .venv/.installed
	rm -rf build/lib build/types
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --target build/types .
	cd build/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p pifa_compiler

# The tables in README.md and docs/, from the rows in benchmarks/results and from the command line.
docs: .venv/.installed
	$(BIN)/python benchmarks/tables.py

bench: .venv/.installed
	$(BIN)/python benchmarks/kernel_figures.py

.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -c constraints.txt -e '.[hf,onnx,plot,gpu,dev]'
	touch $@
