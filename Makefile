# make help lists the targets. PYTHON names the interpreter that .venv is made from (default: Debian's own).
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= /usr/bin/python3
BIN := .venv/bin
ROUNDS ?= 10
COVERED := sgx tee enclave attestation shield
comma := ,
empty :=
space := $(empty) $(empty)

.PHONY: help setup demo test unit lint bench conformance property fuzz mutate lock clean

help: ## this text
	@awk -F':.*## ' '/^[a-z]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## install what is missing (Debian packages as root, Python packages into .venv)
	@PYTHON='$(PYTHON)' scripts/setup

demo: setup ## an image becomes an enclave container, is attested and gets a secret (ARGS=--help)
	@$(BIN)/python demo/run.py $(ARGS)

test: setup ## all tests, with branch coverage of what decides (ARGS=-k name)
	@rm -f .coverage .coverage.*
	@status=0; $(BIN)/coverage run --branch -m pytest --hypothesis-profile=repeatable $(ARGS) || status=$$?; \
	$(BIN)/coverage report --skip-empty --include='$(subst $(space),$(comma),$(foreach p,$(COVERED),*/inclavare/$(p)/*))'; \
	exit $$status

unit: setup ## the unit tests only: no containers, no daemons (ARGS=-k name)
	$(BIN)/python -m pytest tests/unit $(ARGS)

lint: setup ## ruff, mypy --strict, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy src bench
	$(BIN)/mypy tests/conformance/run.py
	$(BIN)/mypy tests/fuzz/run.py
	$(BIN)/mypy tests/mutation/run.py
	$(BIN)/lint-imports

bench: setup ## ratios against runc and crun, side by side (ARGS=--json)
	@$(BIN)/python bench/run.py $(ARGS)

conformance: setup ## suites that others wrote, given by path (ARGS=--help)
	@$(BIN)/python tests/conformance/run.py $(ARGS)

property: setup ## the property tests with new examples, again and again (ROUNDS=10)
	@for round in $$(seq $(ROUNDS)); do echo "round $$round of $(ROUNDS)"; \
	$(BIN)/python -m pytest -q -m hypothesis tests/unit $(ARGS) || exit; done

fuzz: setup ## coverage-guided fuzzing of every parser (ARGS="--seconds 300 --only quote")
	@$(BIN)/python tests/fuzz/run.py $(ARGS)

mutate: setup ## change each rule; which change do the tests miss? (ARGS="--only keys")
	@$(BIN)/python tests/mutation/run.py $(ARGS)

lock: ## make the lock files anew (needs uv)
	scripts/lock

clean: ## remove .venv and everything generated
	rm -rf .venv .fuzz .coverage .coverage.* htmlcov build dist .cache
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
