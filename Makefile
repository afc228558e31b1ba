# Everything a contributor or a CI machine runs. `make help` prints the list.
PYTHON ?= python3
BIN    := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help install peers demo test test-slow test-browser check format bench clean

help:  ## print this list
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1|/' | awk -F'|' '{printf "  make %-12s %s\n", $$1, $$2}'

install: .venv/installed  ## create .venv and install lorica with its development tools

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,peers]"
	touch $@

peers: .venv-mergekit/installed  ## create .venv-mergekit, where mergekit is compared with: its pins are its own

.venv-mergekit/installed: constraints.txt
	test -x .venv-mergekit/bin/python || $(PYTHON) -m venv .venv-mergekit
	.venv-mergekit/bin/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	.venv-mergekit/bin/python -m pip install --quiet --constraint constraints.txt mergekit==0.1.5
	touch $@

demo: install  ## train, merge and compare on the embedded model and tasks, write a report
	$(BIN)/lorica demo

test: install  ## every test that needs neither a network nor a GPU
	$(BIN)/python -m pytest -n 3 --dist worksteal -m "not slow and not gpu and not shared"

test-slow: install  ## the tests that `make test` leaves out for the time they take; ray's need `pip install ray`
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "slow and not gpu and not shared"

test-browser: install  ## look at a report in Chromium, which is installed where apt and root are at hand
	command -v chromium >/dev/null || { apt-get update && apt-get install -y chromium; }
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[browser]"
	mkdir -p screenshots
	LORICA_SCREENSHOTS=$(CURDIR)/screenshots $(BIN)/python -m pytest -q tests/test_report_browser.py

check: install  ## lint, format and types
	$(BIN)/ruff check src tests benchmarks examples
	$(BIN)/ruff format --check src tests benchmarks examples
	$(BIN)/mypy

format: install  ## rewrite the code in the house's format
	$(BIN)/ruff check --fix src tests benchmarks examples
	$(BIN)/ruff format src tests benchmarks examples

bench: install peers  ## compare with peers side by side; needs LORICA_SHARED=folder with models/ and data/
	$(BIN)/python benchmarks/step_time.py
	$(BIN)/python benchmarks/quality_vs_peft.py
	$(BIN)/python benchmarks/boosting_arms.py
	$(BIN)/python benchmarks/merge_cost.py
	$(BIN)/python benchmarks/merge_recovery.py
	$(BIN)/python benchmarks/coefficients_cost.py
	$(BIN)/python benchmarks/merge_learned.py
	$(BIN)/python benchmarks/sweep_cost.py
	$(BIN)/python benchmarks/zo_step.py
	$(BIN)/python benchmarks/evaluation_speed.py
	$(BIN)/python benchmarks/evaluation_matrix.py
	$(BIN)/python benchmarks/encoder_study.py
	$(BIN)/python benchmarks/write_tables.py

clean:  ## remove what was made here
	rm -rf .venv .venv-mergekit .pytest_cache .mypy_cache .ruff_cache .hypothesis demo_out screenshots
