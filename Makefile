# What a developer does with the project; `make help` lists it. Users start with ./my_pipeline.sh.

PYTHON ?=
WORKERS ?= 2
PYTEST_ARGS ?=

# What would change the interpreter or the tests without being asked; tests/conftest.py settles the rest.
unexport CDPATH PYTHONHOME PYTHONPATH PYTHONOPTIMIZE PYTHONWARNINGS PYTHONINSPECT PYTHONDEVMODE PYTHONIOENCODING PYTEST_PLUGINS

BIN := .venv/bin
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

.DEFAULT_GOAL := help
.PHONY: help setup test test-all quality style start grade hint ablate progress

help:  ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile
	@echo "variables: PYTHON=python3.12 (makes .venv), WORKERS=$(WORKERS) (test processes), PYTEST_ARGS='-k engine'"

setup:  ## make .venv and install everything, where pyproject.toml changed since (minutes, some GB the first time)
	@PYTHON="$(PYTHON)" ./my_pipeline.sh --install

test: setup  ## set up, then the quick suite and the examples in docstrings (minutes)
	$(PYTEST)

test-all: setup  ## the same with the long proofs
	$(PYTEST) -m "slow or not slow"

quality: setup  ## check format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python

style: setup  ## format, and fix what lint can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

COURSE = .venv/bin/python -m course
NEEDS_CHALLENGE = @test -n "$(CHALLENGE)" || { echo "error: say which chapter: make $@ CHALLENGE=5" >&2; exit 2; }

start: setup  ## copy a chapter's start.py to my/, never over your file: make start CHALLENGE=5
	$(NEEDS_CHALLENGE)
	@$(COURSE) start $(CHALLENGE)

grade: setup  ## run a chapter's laws on your file: make grade CHALLENGE=5 [MODULE=my/engine.py] [WATCH=--watch]
	$(NEEDS_CHALLENGE)
	@$(COURSE) grade $(CHALLENGE) $(if $(MODULE),--module $(MODULE)) $(WATCH)

hint: setup  ## print a hint: make hint CHALLENGE=5 [HINT=2]
	$(NEEDS_CHALLENGE)
	@$(COURSE) hint $(CHALLENGE) $(HINT)

ablate: setup  ## see what happens without it: make ablate CHALLENGE=5
	$(NEEDS_CHALLENGE)
	@$(COURSE) ablate $(CHALLENGE)

progress: setup  ## ten bars: the share of laws that your files keep
	@$(COURSE) progress
