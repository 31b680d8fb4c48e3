# Set-up needs Python 3.11 or newer, make, and a C++ compiler (torch.compile calls it). Everything else goes into .venv.
#
#   make demo       run the main job on the bundled model; pictures and report.html land in demo/
#   make test       the whole gate
#   make test-slow  the tests that take minutes
#   make results the published studies and the README's figures and pictures, into docs/; hours, resumable (RESULTS=folder)
#   make peers   the table against whatever other tools .venv can import (extra peers), into docs/; resumable
#   make docs       the site, into site/ (its tools go into .venv)
#   make gpu        on a machine with an NVIDIA GPU: kernels against the reference, then latency into docs/results-cuda.md
#   make format     rewrite the sources as the gate wants them
#   make clean      remove everything that make and the tools wrote, .venv included
#
# WORKERS=n sets how many processes share the tests, one thread each (one a core); 0 runs them in one process.
# PYTHON=... picks the interpreter that makes .venv. Where pip would fetch a CUDA build of torch, PIP_EXTRA_INDEX_URL
# set to PyTorch's index of CPU wheels makes it take the CPU build of the same version.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
WORKERS ?= auto
RESULTS ?= runs/results
ONE_CORE := "method/full precision/*" "method/linear*" "growth/*" "calibration/*" "guidance/*"
OTHER_CORE := "method/ours W*A8/*" "method/[!fl]*"
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo results peers test test-slow docs gpu lint format clean install
.DELETE_ON_ERROR:

demo: $(INSTALLED)
	$(BIN)/qdiff-fx demo --out demo

# One core each: the cells of two commands never meet, and the first makes the calibration set that all share.
results: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/quality.py --work $(RESULTS)/quality --cells "*/RTN MSE" "*/split"
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/results.py --work $(RESULTS)/studies --cells activations shortcuts
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/results.py --work $(RESULTS)/studies --cells $(ONE_CORE) & other=$$!; \
	  trap "kill $$other 2>/dev/null" EXIT INT TERM; \
	  OMP_NUM_THREADS=1 $(BIN)/python benchmarks/results.py --work $(RESULTS)/studies --cells $(OTHER_CORE) && \
	  wait $$other && $(BIN)/python benchmarks/results.py --work $(RESULTS)/studies
	$(BIN)/qdiff-fx demo --out $(RESULTS)/demo
	$(BIN)/python benchmarks/results_table.py $(RESULTS)/demo

peers: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/peers_table.py --work $(RESULTS)/peers --frechet 250

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --numprocesses $(WORKERS) --maxprocesses 8 --dist loadfile

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -q -m slow

# Its theme announces its successor at every build; the build itself is to be without a word.
docs: .venv/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "open site/index.html"

gpu: $(INSTALLED)
	TRITON_INTERPRET=0 $(BIN)/python -m pytest -q -m "slow or not slow" -k cuda tests/kernels/test_backends_contract.py \
	  tests/kernels/test_codes_contract.py tests/kernels/test_attention_contract.py tests/kernels/test_cuda_device.py
	$(BIN)/python benchmarks/latency.py --device cuda sd15 sdxl --out docs/results-cuda.json

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

install: $(INSTALLED)

# torch goes first, alone: it brings setuptools, so that the editable build needs no environment of its own
# and every version in use, the build's included, is one that constraints.txt pins. Only triton is the one that a CUDA
# build of torch asks for, where it brings one.
$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "no python3 on PATH: install Python 3.11 or newer, or set PYTHON=" >&2; exit 2; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is older than Python 3.11: set PYTHON= to a newer one" >&2; exit 2; }
	"$(PYTHON)" -m venv .venv
	sed '/^triton==/d' constraints.txt > .venv/constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c .venv/constraints.txt torch setuptools
	@$(BIN)/python -c 'import triton' 2>/dev/null || cp constraints.txt .venv/constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c .venv/constraints.txt --no-build-isolation -e '.[report,eval,dev]'
	touch $@

.venv/.docs: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c .venv/constraints.txt --no-build-isolation -e '.[docs]'
	touch $@

clean:
	rm -rf .venv build dist demo site *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
