# `make` lists the targets. Everything runs in this folder's own virtual environment; nothing outside it is changed.
#
# Variables:
#   PYTHON=python3.12     the interpreter that the virtual environment is made with (3.10 to 3.13)
#   TORCH_INDEX_URL=URL   a further package index for torch; on Linux without a GPU
#                         https://download.pytorch.org/whl/cpu saves a download of several GB
#   PIP_ARGS="..."        anything else for pip
#   JOBS=8                processes that the tests run in; each takes up to 2 GB
#   EXTRA=gpu             faiss-gpu, deepspeed and vllm instead of faiss-cpu

SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV ?= .venv
EXTRA ?= cpu
TORCH_INDEX_URL ?=
PIP_ARGS ?=
JOBS ?= 2
ARGS ?=
RECIPE ?=
SEEDS ?= 1 2 3

PY := $(VENV)/bin/python
LAUNCH := $(VENV)/bin/accelerate launch --config_file accelerate_configs/cpu.yaml
INSTALL := $(PY) -m pip install --quiet --disable-pip-version-check \
	$(if $(TORCH_INDEX_URL),--extra-index-url $(TORCH_INDEX_URL)) $(PIP_ARGS)
# Written when an installation is complete; pyproject.toml is newer after a change of the dependencies.
RUN_STAMP := $(VENV)/.installed-to-run
DEV_STAMP := $(VENV)/.installed-to-develop

.PHONY: help setup demo tour test slow smoke check fmt tiny-models learn new-recipe release-check clean

help:  ## list the targets
	@grep -hE '^[a-z][a-z-]*:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | \
		while IFS=$$'\t' read -r target text; do printf '  %-14s %s\n' "$$target" "$$text"; done

setup: $(DEV_STAMP)  ## make .venv and install everything for development; does nothing when done

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || { \
		echo "$(PYTHON) is $$($(PYTHON) --version 2>&1); rag-rl needs Python 3.10 to 3.13: make PYTHON=python3.12 ..." >&2; \
		exit 1; }
	@$(PYTHON) -m venv $(VENV) || { \
		echo "no virtual environment: on Debian and Ubuntu 'apt install python3-venv' brings the module" >&2; \
		rm -rf $(VENV); exit 1; }

$(RUN_STAMP): pyproject.toml | $(PY)
	@echo "Installing rag-rl[$(EXTRA)] into $(VENV): about 110 packages, one to five minutes."
	@$(INSTALL) -e '.[$(EXTRA)]'
	@touch $@

$(DEV_STAMP): pyproject.toml | $(PY)
	@echo "Installing rag-rl[$(EXTRA),dev] into $(VENV): about 150 packages, two to six minutes."
	@$(INSTALL) -e '.[$(EXTRA),dev]'
	@touch $@ $(RUN_STAMP)

demo: $(RUN_STAMP)  ## install, train the tiny generator (minutes, no GPU), show what it learned
	@$(LAUNCH) recipes/grpo_generator.py --output_dir runs/demo
	@echo "The curve:  runs/demo/curves.png"
	@echo "The report: runs/demo/report.html (opens in any browser)"

tour: $(RUN_STAMP)  ## train every part on the tiny world and compare the assemblies (eight minutes on 2 cores, no GPU)
	@$(PY) tools/tour.py $(ARGS)

test: $(DEV_STAMP)  ## every test that needs no GPU, no network and no patience
	@$(PY) -m pytest -m "not slow and not gpu and not network" --numprocesses $(JOBS) --dist loadfile $(ARGS)

slow: $(DEV_STAMP)  ## the slow tests: every recipe for a few steps, kill and resume, two processes
	@$(PY) -m pytest -m "slow and not gpu and not network" --numprocesses $(JOBS) --dist loadfile $(ARGS)

smoke: $(DEV_STAMP)  ## each recipe for seconds through its real command line; RECIPE=name for one
	@$(PY) -m pytest -m smoke tests/recipes $(if $(RECIPE),-k "$(RECIPE)") $(ARGS)

check: $(DEV_STAMP)  ## lint, format and types
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/pydoclint --quiet rag_rl
	@$(VENV)/bin/mypy

fmt: $(DEV_STAMP)  ## format, and fix what can be fixed
	@$(VENV)/bin/ruff check --fix --quiet . || true
	@$(VENV)/bin/ruff format .

tiny-models: $(DEV_STAMP)  ## make the packaged tiny models again from nothing (up to 4 hours on 2 cores)
	@$(PY) -m rag_rl.tiny.make_data
	@$(PY) -m rag_rl.tiny.make

learn: $(RUN_STAMP)  ## the learning tables of recipes/README.md: tiny runs of seeds 1, 2 and 3, and their controls
	@set -e; for recipe in grpo_generator grpo_retriever sft_reasoner ppo_reasoner grpo_reasoner train_reranker \
		grpo_reranker dpo_augmenter distill_retriever self_boost; do \
		echo "$$recipe"; $(PY) tools/learning_table.py $$recipe --seeds $(SEEDS); done

new-recipe: $(DEV_STAMP)  ## NAME=grpo_cite [LIKE=grpo_generator]: a skeleton that passes the checks
	@$(PY) tools/new_recipe.py "$(NAME)" $(if $(LIKE),--like "$(LIKE)")

release-check: $(DEV_STAMP)  ## version, changelog and citation agree; the wheel holds what it must
	@$(PY) tools/release_check.py

clean:  ## remove caches and builds, but no runs and no virtual environment
	@rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
