# `make help` lists the targets. Each sets up what it needs by itself.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEV_INSTALLED := $(VENV)/.dev-installed
LOADERS := $(CURDIR)/.loaders
SCHEDULERS := $(CURDIR)/.schedulers
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help setup demo test browser-test loaders soak slurm-test submit-test planted settings audit lint format gpu-test gpu-e2e real bench

help:  ## list the targets
	@awk -F':.*## ' '/^[a-z0-9-]+:.*## / {printf "  %-28s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(INSTALLED)  ## make .venv, install requirements.txt and the command .venv/bin/fitune

$(INSTALLED): requirements.txt requirements-gpu.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fitune needs Python 3.11 or newer; try: make $(MAKECMDGOALS) PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements.txt $(if $(shell command -v nvidia-smi),-r requirements-gpu.txt)
	$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

$(DEV_INSTALLED): $(INSTALLED) requirements-dev.txt
	$(PIP) -r requirements-dev.txt
	@touch $@

demo: setup  ## prepare, train, eval, merge and generate a tiny model on the CPU
	rm -rf runs/demo
	$(BIN)/python -m fitune.demo --output runs/demo

test: $(DEV_INSTALLED)  ## run the test suite
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

CHROMIUM ?= $(firstword $(shell command -v chromium chromium-browser google-chrome))

browser-test: $(DEV_INSTALLED)  ## look at a run's page in headless Chromium, wide and narrow, light and dark
	$(PIP) playwright==1.65.2
	test -n "$(CHROMIUM)" || $(BIN)/python -m playwright install chromium
	mkdir -p runs/screenshots
	CHROMIUM=$(CHROMIUM) SCREENSHOTS=runs/screenshots $(BIN)/python -m pytest -q tests/report/in_chromium.py

soak: $(DEV_INSTALLED)  ## kill a run at 50 random moments, change it each time: it must end as a calm one (about 40 min)
	$(BIN)/python tests/faults/soak.py

planted: $(DEV_INSTALLED)  ## plant each fault of tests/planted/ in a copy: its tests must notice it: make planted [JOBS=16]
	$(BIN)/python tests/planted/plant.py $(if $(JOBS),--jobs $(JOBS)) --json runs/planted.json

slurm-test: $(DEV_INSTALLED)  ## jobs on a real Slurm of two nodes: interrupted, requeued, resumed (root; apt install slurm-wlm)
	$(BIN)/python tests/slurm/run.py $(if $(OUTPUT),--output $(OUTPUT))

submit-test: $(DEV_INSTALLED) $(SCHEDULERS)/.installed  ## job files of submit, read by SkyPilot's parser and JobSet's published models
	$(BIN)/python tests/submit/run.py $(SCHEDULERS)/bin/python

$(SCHEDULERS)/.installed: tests/submit/requirements.txt
	test -x $(SCHEDULERS)/bin/python || $(PYTHON) -m venv $(SCHEDULERS)
	$(SCHEDULERS)/bin/python -m pip install --quiet --disable-pip-version-check -r tests/submit/requirements.txt
	@touch $@

settings: $(DEV_INSTALLED)  ## try every field of SFTConfig and every optimizer, write docs/settings.md (about 15 min)
	$(BIN)/python tests/settings/try_settings.py

loaders: $(LOADERS)/.installed models/smollm2-135m/config.json models/llama3-tokenizer/tokenizer.json  ## what merge and export write, read by other loaders
	FITUNE_LOADERS=$(LOADERS) FITUNE_REAL_MODEL=$(CURDIR)/models/smollm2-135m \
		FITUNE_LLAMA3_TOKENIZER=$(CURDIR)/models/llama3-tokenizer PYTHONPATH=$(LOADERS)/gguf \
		$(BIN)/python -m pytest -q tests/loaders

$(LOADERS)/.installed: $(DEV_INSTALLED) tests/loaders/requirements.txt tests/loaders/requirements-lm-eval.txt requirements-gguf.txt
	test -x $(LOADERS)/bin/python || $(PYTHON) -m venv $(LOADERS)
	$(LOADERS)/bin/python -m pip install --quiet --disable-pip-version-check -r tests/loaders/requirements.txt
	$(PIP) --no-deps --upgrade --target $(LOADERS)/gguf -r requirements-gguf.txt sentencepiece==0.2.3 xllamacpp==2026.10.11549
	test -x $(LOADERS)/lm-eval/bin/python || $(BIN)/python -m venv $(LOADERS)/lm-eval
	$(BIN)/python tests/loaders/beside.py $(LOADERS)/lm-eval
	$(LOADERS)/lm-eval/bin/python -m pip install --quiet --disable-pip-version-check -r tests/loaders/requirements-lm-eval.txt
	@touch $@

models/smollm2-135m/config.json: | $(DEV_INSTALLED)
	$(BIN)/python tests/e2e/real_model.py models/smollm2-135m

models/llama3-tokenizer/tokenizer.json: | $(DEV_INSTALLED)
	$(BIN)/python tests/loaders/llama3_tokenizer.py models/llama3-tokenizer

lint: $(DEV_INSTALLED)  ## check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(DEV_INSTALLED)  ## apply style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

audit: setup  ## check the packages' files against requirements.lock, and them for known vulnerabilities
	$(PIP) --dry-run --ignore-installed --no-deps --require-hashes -r requirements.lock
	$(PIP) pip-audit==2.10.1
	$(BIN)/pip-audit --disable-pip --require-hashes -r requirements.lock

gpu-test: $(DEV_INSTALLED)  ## run the tests that need a GPU
	$(BIN)/python -m pytest -m gpu -s tests/gpu

gpu-e2e: $(DEV_INSTALLED)  ## every command on a real model: make gpu-e2e MODEL=FOLDER [OUTPUT=benchmarks/results]
	@test -n "$(MODEL)" || { echo "give a Llama's folder: make gpu-e2e MODEL=FOLDER (make real makes one)"; exit 2; }
	$(BIN)/python tests/e2e/run.py $(MODEL) $(if $(OUTPUT),--output $(OUTPUT))

real: models/smollm2-135m/config.json  ## make a real small model and run every command on it on the CPU
	CUDA_VISIBLE_DEVICES= $(BIN)/python tests/e2e/run.py models/smollm2-135m $(if $(OUTPUT),--output $(OUTPUT))

bench: setup  ## regenerate the tables and README's picture from benchmarks/results
	$(BIN)/python benchmarks/tables.py
	$(BIN)/python benchmarks/picture.py
	$(BIN)/python benchmarks/machines.py
	$(BIN)/python benchmarks/accuracy.py

train-8b-qlora-1x24gb: setup  ## Llama 3 8B, QLoRA, one 24 GB GPU
	$(BIN)/python cli.py train llama3_8b_qlora --profile single_gpu

train-8b-qlora-1x8gb: setup  ## Llama 3 8B, QLoRA, one 8 GB GPU
	$(BIN)/python cli.py train llama3_8b_qlora --profile single_gpu_8gb

train-8b-full-2x80gb: setup  ## Llama 3 8B, every weight, two 80 GB GPUs
	$(BIN)/python cli.py train llama3_8b_full --profile fsdp_2x80gb

train-70b-qlora-1x12gb: setup  ## Llama 3 70B, QLoRA, one 12 GB GPU and 64 GB of RAM
	$(BIN)/python cli.py train llama3_70b_qlora --profile fsdp_offload_1x12gb

train-70b-qlora-1x24gb: setup  ## Llama 3 70B, QLoRA, one 24 GB GPU and 64 GB of RAM
	$(BIN)/python cli.py train llama3_70b_qlora --profile fsdp_offload_1x24gb

train-70b-qlora-2x24gb: setup  ## Llama 3 70B, QLoRA, two 24 GB GPUs and 64 GB of RAM
	$(BIN)/python cli.py train llama3_70b_qlora --profile fsdp_offload_2x24gb

train-70b-qlora-1x48gb: setup  ## Llama 3 70B, QLoRA, one 48 GB GPU
	$(BIN)/python cli.py train llama3_70b_qlora --profile fsdp_1x48gb

train-70b-qlora-2x40gb: setup  ## Llama 3 70B, QLoRA, two 40 GB GPUs
	$(BIN)/python cli.py train llama3_70b_qlora --profile fsdp_2x40gb

train-70b-qlora-4x24gb: setup  ## Llama 3 70B, QLoRA, four 24 GB GPUs
	$(BIN)/python cli.py train llama3_70b_qlora --profile fsdp_4x24gb

train-70b-qlora-4x24gb-offload: setup  ## Llama 3 70B, QLoRA, four 24 GB GPUs, weights in host RAM (the 2024 tier)
	$(BIN)/python cli.py train llama3_70b_qlora --profile fsdp_offload_4gpu

train-70b-lora-8x80gb: setup  ## Llama 3 70B, LoRA, eight 80 GB GPUs
	$(BIN)/python cli.py train llama3_70b_lora --profile fsdp_lora_8x80gb

train-70b-full-16x80gb: setup  ## Llama 3 70B, every weight, sixteen 80 GB GPUs of two machines
	$(BIN)/python cli.py train llama3_70b_full --profile fsdp_full_16x80gb
