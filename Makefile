# `make` lists what there is to make.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
VENV_PYTHON := .venv/bin/python

# One iteration with the tutorial's values; each can be given: make iteration MODEL=... RUN=mine GPUS=4
VARIABLES := MODEL REWARD_MODEL PROMPTS RUN REPO GPUS ITERATION OUTPUT_DIR BACKEND VLLM_PYTHON TRAIN_PYTHON FLAGS
MODEL ?= meta-llama/Meta-Llama-3-8B-Instruct
REWARD_MODEL ?= RLHFlow/ArmoRM-Llama3-8B-v0.1
PROMPTS ?= allenai/ultrafeedback_binarized_cleaned_train
REPO ?=
RUN ?= $(or $(notdir $(REPO)),llama3_armo)
GPUS ?= 8
ITERATION ?= 1
OUTPUT_DIR ?= $(FOLDER)/policy
BACKEND ?= $(shell scripts/backend.sh $(VLLM_PYTHON))
VLLM_PYTHON ?= $(or $(wildcard $(VENV_PYTHON)),python)
TRAIN_PYTHON ?= $(or $(wildcard $(VENV_PYTHON)),python)
FLAGS ?=

# Data go to the run folder, or with REPO=OWNER/NAME to the Hub; a later iteration starts from the one before.
FOLDER = runs/$(RUN)/iteration_$(ITERATION)
DATA = $(if $(REPO),$(REPO)-iter$(ITERATION)-,$(FOLDER)/)
PREVIOUS = $(shell expr $(ITERATION) - 1)
POLICY = $(if $(filter 1,$(ITERATION)),$(MODEL),runs/$(RUN)/iteration_$(PREVIOUS)/policy)

.PHONY: help
help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@printf '\nVariables of generate, rank, filter, train and iteration, with their values now:\n\n'
	@printf '  %-14s %s\n' $(foreach name,$(VARIABLES),'$(name)' '$($(name))')

.PHONY: install install-gpu environment lock doctor
install: ## .venv for CPUs: Python 3.11, vLLM, DeepSpeed and the tools of development
	@scripts/install.sh cpu
install-gpu: ## .venv for CUDA GPUs: the same, flash-attn where it can be built
	@scripts/install.sh gpu
environment:
	@scripts/install.sh
lock: ## write envs/cpu-lock.txt anew from envs/cpu.txt
	@scripts/install.sh lock
doctor: environment ## what this machine has: GPUs, versions, disk, Hub token
	@$(VENV_PYTHON) scripts/doctor.py

.PHONY: lint types test test-slow demo clean
lint: environment ## style and the usual mistakes (ruff)
	$(VENV_PYTHON) -m ruff check .
	$(VENV_PYTHON) -m ruff format --check .
types: environment ## types (mypy)
	$(VENV_PYTHON) -m mypy
test: environment lint types ## lint, types and every test that is neither slow nor in need of a GPU
	$(VENV_PYTHON) -m pytest -m 'not slow and not gpu'
test-slow: environment ## the slow tests: kills, restarts, many launches
	$(VENV_PYTHON) -m pytest -m 'slow and not gpu'
demo: environment ## a language model gets better by RLHF on this machine, in minutes
	@PYTHON=$(VENV_PYTHON) RUN=runs/tiny scripts/tiny.sh
clean: ## remove caches; .venv and runs/ stay
	rm -rf .mypy_cache .pytest_cache .ruff_cache dist
	find src tests scripts benchmarks -name __pycache__ -prune -exec rm -rf {} +

.PHONY: generate rank filter train iteration
generate: ## stage 1: PROMPTS -> responses
	$(VLLM_PYTHON) -m rlhf_pipeline.generate --backend $(BACKEND) --model $(POLICY) \
	    --prompts $(PROMPTS) --tensor_parallel_size $(GPUS) --output_repo $(DATA)responses $(FLAGS)
rank: ## stage 2: responses -> rewards
	$(TRAIN_PYTHON) -m rlhf_pipeline.rank --reward_model $(REWARD_MODEL) \
	    --input_repo $(DATA)responses --output_repo $(DATA)rewards $(FLAGS)
filter: ## stage 3: rewards -> tokenized pairs
	$(TRAIN_PYTHON) -m rlhf_pipeline.filter --model $(POLICY) \
	    --input_repo $(DATA)rewards --output_repo $(DATA)pairs $(FLAGS)
train: ## stage 4: pairs -> the next policy, by REBEL
	$(TRAIN_PYTHON) -m accelerate.commands.launch --config_file accelerate_cfgs/deepspeed_config_stage_3.yaml \
	    --main_process_port 29080 --num_processes $(GPUS) -m rlhf_pipeline.train --base_model $(POLICY) \
	    --input_repo $(DATA)pairs --output_dir $(OUTPUT_DIR) $(FLAGS)
iteration: generate rank filter train ## the four stages in order; ITERATION=2 starts from iteration 1's policy
.NOTPARALLEL:
