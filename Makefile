# `make help` lists the targets. Every target but help, image and clean first makes the environment, once.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2
export VENV PYTHON TORCH TORCH_INDEX PAIRS MODEL

.PHONY: help setup demo test faults strategies gpu lint format type audit lock validate image site bench clean

help: ## List the targets
	@echo 'make <target>'
	@sed -n 's/^\([a-z]*\):[^#]*## \(.*\)/  \1@\2/p' $(firstword $(MAKEFILE_LIST)) | awk -F@ '{ printf "%-10s %s\n", $$1, $$2 }'
	@echo 'Options: PYTHON=python3.12 (interpreter), TORCH=cpu|cuda (build), TORCH_INDEX=<address> (extra index for torch),'
	@echo '         WORKERS=2 (test processes), PAIRS=5 and MODEL=<folder> (bench)'

setup: ## Make the virtual environment in .venv (a second run installs nothing)
	@bash scripts/setup.sh

demo: setup ## Train a reward ensemble, align a real model with variance-aware PPO, show the result
	@PATH="$(abspath $(BIN)):$$PATH" bash examples/sentiment/demo.sh

test: setup ## Run all tests, offline, with line coverage (at least 90%)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --cov=lit_vapo

faults: setup ## Kill each kind of run 20 times, resume it, compare; and all other faults (half an hour)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 LIT_VAPO_ALL_FAULTS=1 $(BIN)/python -m pytest -q -n $(WORKERS) -m faults
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults --count 20

strategies: setup ## Run every strategy in several processes, and compare with one (ten minutes)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 LIT_VAPO_ALL_STRATEGIES=1 $(BIN)/python -m pytest -q -n 0 tests/stages/test_stages_sharded.py

gpu: setup ## Check on a GPU what the tests check on a CPU, and write the table of it into the docs
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.gpu

lint: setup ## Check style and layout (ruff), and that imports go down only (import-linter)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo

format: setup ## Repair layout and what ruff can repair by itself
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

type: setup ## Check types (mypy)
	$(BIN)/mypy

audit: setup ## Ask whether an installed package has a known vulnerability (pip-audit)
	$(BIN)/python scripts/audit.py

lock: setup ## Pin the packages of the image anew, after a change of dependencies (uv)
	$(BIN)/python scripts/lock.py

validate: setup ## Check the Dockerfile and deploy/ by the tools that know them (hadolint, shellcheck, schemas, SkyPilot)
	@bash scripts/validate.sh

site: setup ## Build the documentation as a site, and fail on a broken link (zensical)
	@$(BIN)/python scripts/website.py

image: ## Build the image for a CPU and run the tiny pipeline in it (docker, podman, or buildah as root)
	@bash scripts/image.sh

bench: setup ## Time PPO and reward ensembles beside those of peers (hours; PAIRS=1 for a first look)
	@bash scripts/bench.sh

clean: ## Remove the environment and all caches; runs/ stays
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .coverage .coverage.* htmlcov build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
