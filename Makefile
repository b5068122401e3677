# Targets of daily work; `make` alone lists them. Everything installed lands in .venv and .models.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
PYTEST_ARGS ?=

BIN := .venv/bin
# Engines, groups, preemption, prefixes, pressure, swap, drafts, a server, and what needs no engine.
NEXT_TESTS := $(addprefix tests/, fit scheduling worker test_abort.py test_draft_models.py test_equality.py \
	test_families.py test_fp8.py test_groups.py test_never_due.py test_off_is_off.py test_preemption.py \
	test_prefix_caching.py test_pressure.py test_prompts.py test_protect.py test_request_options.py \
	test_served.py test_speculation.py test_swap.py test_windows.py)
# Of `make demo`; scripts/fetch_model.py --help lists the names.
MODEL := SmolLM2-135M-Instruct
# Progress must show live, also through a pipe.
export PYTHONUNBUFFERED := 1

.DEFAULT_GOAL := help
.PHONY: help venv gpu-lab model model-1.5b demo test test-all next test-next lint bench clean

help:  ## list the targets
	@grep -hE '^[a-z0-9.-]+:.*  ## ' $(MAKEFILE_LIST) | sed -E 's/:.*  ## /\t/' | expand -t 12

venv:  ## build .venv: vLLM for CPUs and this project, editable
	@$(PYTHON) scripts/install.py

gpu-lab: venv  ## install the pretended H100 of tests/gpu_lab into .gpu-lab: 9 GB, for nightly tests
	@$(BIN)/python scripts/install_gpu_lab.py

model: venv  ## unpack and convert SmolLM2-135M-Instruct, or MODEL=Gemma3-270M, into .models
	@$(BIN)/python scripts/fetch_model.py $(notdir $(MODEL))

model-1.5b: venv  ## the same with Qwen2.5-Coder-1.5B-Instruct: 1.1 GB to download, 3.5 GB on disk
	@$(BIN)/python scripts/fetch_model.py Qwen2.5-Coder-1.5B-Instruct

demo: model  ## serve SmolLM2, or MODEL=..., with compression, chat with it, show the books
	@$(BIN)/python examples/demo.py --model .models/$(notdir $(MODEL))

# Engines of the tests run on one thread each, so two files at a time fill a small machine.
test: model  ## run the tests; PYTEST_ARGS="-n 0 -k name -x" narrows them down
	@$(BIN)/python -m pytest -v -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

test-all: model  ## run the tests and those that a daily run has no time for
	@$(BIN)/python -m pytest -v -n 2 --dist loadfile --no-loadscope-reorder -m "nightly or not nightly" $(PYTEST_ARGS)

next: venv  ## put vLLM 0.33.0 over the compiled libraries of 0.32.0 into .next: 100 MB
	@$(BIN)/python scripts/install_next.py

test-next: model next  ## run a choice of the tests on .next, for the night; docs/versions.md says why
	@.next/venv/bin/python -m pytest -v -n 2 --dist loadfile --no-loadscope-reorder $(NEXT_TESTS) $(PYTEST_ARGS)

lint: venv  ## check format and style
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/clang-format --dry-run --Werror csrc/cpu/*.cpp csrc/cpu/*.h tests/gpu_lab/*.cpp tests/gpu_lab/*.h

bench: model  ## kernels against two baselines, then stock vLLM against compression
	@$(BIN)/python benchmarks/bench_kernels.py
	@$(BIN)/python benchmarks/bench_scheduler.py
	@$(BIN)/rkv-vllm bench .models/$(notdir $(MODEL)) --scenario ample
	@$(BIN)/rkv-vllm bench .models/$(notdir $(MODEL)) --scenario starved

clean:  ## remove build leftovers and caches; .venv and .models stay
	@rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	@rm -rf packaging/vllm-cpu-dist/build packaging/vllm-cpu-dist/*.egg-info
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
