# `make` lists the targets that have a comment after ##. All except lock and lock-check make .venv when it is needed.
PYTHON ?= python3
LOCKED := --quiet --universal --python-version 3.11.4 --generate-hashes --no-header --no-annotate
SWEEPS := seeds longer lesson heads rates images blocks
export PATH := $(CURDIR)/.venv/bin:$(PATH)

help:
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "make NAME         run a sweep, write docs/NAME.*: $(SWEEPS)"

.venv/installed: requirements.txt
	$(PYTHON) -m tools.setup

setup: .venv/installed  ## create .venv from requirements.txt, if it is missing or out of date

repro: setup  ## run the stages that are not up to date
	dvc repro

demo: setup  ## transfer learning on small generated images: 2 minutes, no download; figures in demo/
	python -m tools.demo

compare: setup  ## list the last commit and its experiments: accuracies, gain and the settings that differ
	dvc exp show --only-changed --sort-by finetuned.accuracy --sort-order desc \
		--drop '(Created|State|Executor|Rev|weights|params.yaml|.*md5)$$|.*/'

plots: setup  ## draw DVC's plots into dvc_plots/index.html
	dvc plots show

verify: setup  ## run everything from scratch in a clone of the last commit and compare the results
	python -m tools.verify

$(SWEEPS): setup
	python -m tools.sweep $@

bench: setup  ## measure what docs/benchmark.md reports: an hour; needs make repro first
	python -m pip install --quiet --require-hashes --no-deps --requirement benchmarks/requirements.txt
	python -m benchmarks.bench

bench-folder: setup  ## measure folders of photos against ImageFolder; 20 minutes; needs make repro first
	python -m benchmarks.folder

notebooks: setup  ## make docs/exercise.ipynb and docs/ejercicio.ipynb and run them: 4 minutes
	python -m tools.notebook

test: setup  ## run the tests
	python -m pytest

test-faults: setup  ## run the slow tests: kills, a full disk, the same bytes again, a sweep, the demo, the notebooks
	python -m pytest -m faults

lint: setup  ## check style, format, types and the GitHub workflow
	ruff check
	ruff format --check
	mypy stages transfer tools benchmarks
	mypy --platform win32 stages transfer tools benchmarks
	zizmor --offline --quiet .github/workflows

lock:  ## compile both requirements.txt from pyproject.toml (needs uv)
	uv pip compile $(LOCKED) --extra dev --output-file requirements.txt pyproject.toml
	uv pip compile $(LOCKED) --extra peers --constraint requirements.txt \
		--output-file benchmarks/requirements.txt pyproject.toml

# antlr4-python3-runtime is distributed only as source code, in pure Python.
lock-check:  ## check that every locked package has a wheel for each system (needs uv)
	@for platform in x86_64-manylinux_2_28 aarch64-manylinux_2_28 aarch64-apple-darwin \
			x86_64-pc-windows-msvc; do for version in 3.11 3.14; do \
		MACOSX_DEPLOYMENT_TARGET=14.0 uv pip install --quiet --dry-run --no-deps --require-hashes \
			--only-binary :all: --no-binary antlr4-python3-runtime --target .venv/none \
			--python-platform $$platform --python-version $$version -r requirements.txt \
			&& echo "$$platform, Python $$version: yes" || exit 1; \
	done; done

.PHONY: help setup repro demo compare plots verify $(SWEEPS) bench bench-folder notebooks test test-faults lint lock lock-check
