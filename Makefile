# make book    the rendered book, at _build/html/index.html
# make test    style, types, tests, pages in a browser; and the book, where something has changed since
# make lab     JupyterLab on the chapters
# make help    the other targets
#
# Everything runs from this folder. Needed beforehand: make and Python 3.11, 3.12 or 3.13 with its venv module.
# Another Python than `python3`: make book PYTHON=python3.12

PYTHON ?= python3
SHELL := /bin/sh
BIN := .venv/bin
# Touched when the environment is complete, so that a broken installation is taken up again.
ENV := .venv/complete
# mamba-ssm, for the tests of its kernels alone: the book and the module run without it. Built without CUDA and
# installed without what it depends on: its Mamba-2 kernels need Triton, which comes with torch, and einops.
KERNELS := .venv/kernels
MAMBA_SSM := mamba-ssm==2.3.2.post1

MODULE := $(shell find bsmamba2 -name "*.py" -o -path "*/cpp/*" -type f)
CHAPTERS := $(sort $(wildcard book/*.ipynb))
LABS := $(sort $(wildcard book/labs/*.ipynb))
PARAMS := notebooks/params/train_small.yaml
RESULT := book/results/first_run.ipynb

# The GNU C library gives large buffers back to the kernel after each use and asks for them anew. Training on a CPU
# does so hundreds of times a step, which took 40 % of its time on the virtual machine where this was measured.
export MALLOC_MMAP_THRESHOLD_ := 8000000000
export MALLOC_TRIM_THRESHOLD_ := 8000000000

# One target after the other, and each takes all cores. With --jobs there are several at a time: then training takes one
# core, and so does what runs beside it, and all cores what comes after: `make --jobs=2 book test`.
ONE = $(filter -j%,$(MAKEFLAGS))
THREAD = $(if $(ONE),OMP_NUM_THREADS=1)
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest
PARALLEL := $(PYTEST) -n logical
BESIDE = $(PYTEST) -n $(if $(ONE),0,logical)
NBVAL := --dist loadfile --nbval-lax --nbval-cell-timeout=300
CACHE := JUPYTERCACHE="$(CURDIR)/_build/.jupyter_cache"

# Chapters and labs run as soon as what they read is there: most of them at once, those that read what the training run
# has left after it. These are touched when all of them have been run with this code, and gave what they should.
AFTER := $(shell grep -l results/first_run/ $(CHAPTERS) $(LABS))
BEFORE := $(filter-out $(AFTER),$(CHAPTERS) $(LABS))
RUN_BEFORE := _build/run-before-training
RUN_AFTER := _build/run-after-training
# The last first: the longest chapters are not among the first, and two processes then end at about the same time.
reverse = $(if $1,$(call reverse,$(wordlist 2,$(words $1),$1)) $(firstword $1))
# Of the notebooks $1, those that have changed; all, where something else has.
stale = $(call reverse,$(if $(filter-out $1,$?),$1,$(filter $1,$?)))

BOOK := _build/html/index.html
# What the pages are made of, besides chapters.
PAGES := $(wildcard _config.yml _toc.yml CONTRIBUTING.md book/*.md book/*.bib book/_ext/*.py book/_static/* book/data/* book/data/*/*)

.DEFAULT_GOAL := help
.PHONY: help env book test lab train bench gpu lint unit kernels gpu-kernels attack chapters browser pages labs format clean
.DELETE_ON_ERROR:

help:
	@echo 'make book      build the book: _build/html/index.html'
	@echo 'make test      lint, kernels, unit, attack, chapters and browser, and the book for them'
	@echo 'make --jobs=2 book test    both on two cores, side by side: what CI runs'
	@echo 'make lab       open the chapters in JupyterLab'
	@echo 'make train     the training run that the book shows, if it is absent or older than the code'
	@echo 'make bench     time the model part by part on this machine: book/results/benchmark'
	@echo 'make lint      style, types and workflows'
	@echo 'make unit      the tests in tests/'
	@echo 'make kernels   the tests of the fused GPU kernels, run on the CPU by an interpreter (Linux)'
	@echo 'make gpu-kernels  compile the fused kernels for six GPUs and track the memory of training, without one: hours;'
	@echo '                  continues where it stopped (Linux)'
	@echo 'make gpu       check and time everything on an NVIDIA GPU, in at most eight minutes: gpu_check/'
	@echo 'make attack    run the commands on hostile and damaged input (Linux)'
	@echo 'make chapters  run the chapters and labs that have changed, and compare their tagged outputs'
	@echo 'make browser   look at the built book and the labs in Chromium, as a reader would'
	@echo 'make format    put code and chapters into the committed style'
	@echo 'make env       only the environment, in .venv'
	@echo 'make clean     remove what was made, but for .venv'

# --- environment ------------------------------------------------------------------------------------------

env: $(ENV)

# pip check would miss what mamba-ssm is installed without, so it goes first, and `make kernels` puts it back.
$(ENV): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' || { \
	  echo "This book needs Python 3.11, 3.12 or 3.13, and '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." >&2; \
	  echo "Name another one: make $(or $(MAKECMDGOALS),env) PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "'$(PYTHON)' has no working venv module. On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip uninstall -qq --yes mamba-ssm
	$(BIN)/python -m pip install --disable-pip-version-check --editable '.[book,test]'
	$(BIN)/python -m pip check
	@touch $@

# --- training run -----------------------------------------------------------------------------------------

train: $(RESULT)

# A run that was stopped goes on where it was; one that has finished leaves no state to go on from, so that newer code
# trains anew. Papermill leaves a notebook behind even when a cell failed: it becomes the result only after success. A
# progress bar is one line for each of its steps in a stored notebook; coalescing leaves the last.
$(RESULT): notebooks/train.ipynb $(PARAMS) $(MODULE) | $(ENV)
	@mkdir -p _build $(@D)
	$(THREAD) $(BIN)/papermill notebooks/train.ipynb _build/first_run.ipynb -f $(PARAMS) || { \
	  echo 'The training notebook failed; what it did until then is in _build/first_run.ipynb' >&2; exit 1; }
	$(BIN)/jupyter nbconvert --log-level WARN --to notebook --inplace --coalesce-streams _build/first_run.ipynb
	rm -f $(@D)/first_run/state-*.pt
	mv _build/first_run.ipynb $@

# --- benchmark --------------------------------------------------------------------------------------------

# No part of the book or the tests: its numbers are those of the machine, and of the minute.
bench: $(ENV)
	@mkdir -p _build
	$(BIN)/papermill notebooks/benchmark.ipynb _build/benchmark.ipynb -f notebooks/params/benchmark.yaml
	@echo 'Tables and pictures are in _build/benchmark.ipynb, the numbers in book/results/benchmark/benchmark.json'

# --- book -------------------------------------------------------------------------------------------------

book: $(BOOK)

$(BOOK): $(RUN_BEFORE) $(RUN_AFTER) $(RESULT) $(PAGES)
	$(BIN)/jupyter-book build . --all -n -W --keep-going
	@echo 'The book is at $(BOOK)'

# Each chapter is run once, by nbval, and what it gave is kept in the cache that Jupyter Book reads (book/conftest.py).
# The cache is keyed on the cells alone: when the module, the training run or the environment is newer, what is there
# belongs to other code, and all are run; else those that have changed.
RUNS_WITH := $(MODULE) $(ENV) $(wildcard book/*.py book/data/*.json)

$(RUN_BEFORE): $(BEFORE) $(RUNS_WITH)
	@mkdir -p $(@D)
	$(CACHE) $(BESIDE) $(NBVAL) $(call stale,$(BEFORE))
	@touch $@

$(RUN_AFTER): $(AFTER) $(RUNS_WITH) $(RESULT)
	@mkdir -p $(@D)
	$(CACHE) $(PARALLEL) $(NBVAL) $(call stale,$(AFTER))
	@touch $@

lab: $(ENV) $(RESULT)
	$(BIN)/jupyter lab book

# --- checks -----------------------------------------------------------------------------------------------

test: lint kernels unit attack chapters browser

lint: $(ENV)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python tests/book/prose.py
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff
	$(BIN)/zizmor --offline --no-progress --config .github/zizmor.yml .github/workflows

unit: $(ENV)
	$(BESIDE) --dist worksteal tests

# In processes of their own: the interpreter's switches, and the stand-in for a CUDA driver, hold for all of one. Triton is there on Linux only.
ifeq ($(shell uname -s),Linux)
# Installed by the recipe: while a target of its own would be made, make starts the long tests in the place of these.
define INSTALL_KERNELS
@test $(KERNELS) -nt $(ENV) || { MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE \
  $(BIN)/python -m pip install --disable-pip-version-check --no-build-isolation --no-deps '$(MAMBA_SSM)' && \
  touch $(KERNELS); }
endef

kernels: $(ENV)
	$(INSTALL_KERNELS)
	$(THREAD) $(BIN)/pytest tests/interpreter
	$(THREAD) $(BIN)/pytest tests/gpu

gpu-kernels: $(ENV)
	$(INSTALL_KERNELS)
	$(BIN)/python tests/gpu/tracked_cost.py --write book/data/cost.json
	$(BIN)/python tests/gpu/triton_launches.py --write book/data/gpu_kernels.json
else
kernels gpu-kernels:
	@echo 'Not run: the tests of the fused kernels need Triton, which comes with torch on Linux.'
endif

# Not part of the tests, because it needs a GPU; tests/experiments/test_gpu_check.py runs all of it on a CPU at toy size.
gpu: $(ENV)
	$(BIN)/python -m bsmamba2.experiments.gpu_check

# On Linux, whose limits for processes it uses. The table in the book: tests/attack/attack.py --write.
ifeq ($(shell uname -s),Linux)
attack: $(ENV)
	OMP_NUM_THREADS=1 $(BIN)/python tests/attack/attack.py
else
attack:
	@echo 'Not run: the attacks need the limits for processes that Linux has.'
endif

chapters: $(RUN_BEFORE) $(RUN_AFTER)

# In Chromium, and told to be skipped without: every page of the built book, and the labs in a JupyterLab of their own.
browser: pages labs

pages: $(BOOK)
	$(PARALLEL) --dist worksteal tests/browser --ignore=tests/browser/test_lab.py

# After the book, which the pages wait for.
labs: $(RESULT) | $(BOOK)
	$(BESIDE) --dist worksteal tests/browser/test_lab.py

format: $(ENV)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/nbstripout --keep-id --keep-count $(CHAPTERS) $(LABS) notebooks/*.ipynb

clean:
	rm -rf _build book/results .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find bsmamba2 tests -name __pycache__ -type d -prune -exec rm -rf {} +
