# All targets use .venv in this checkout and make it when it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DONE := $(VENV)/.installed
# What MONAI's bundle runner needs, apart: MONAI loads ignite in every process that finds it.
RUNNER := $(VENV)/bundle-runner
export FLWR_TELEMETRY_ENABLED := 0
export PIP_DISABLE_PIP_VERSION_CHECK := 1
SHELL := /bin/bash

# Flower's newest release within the pin, apart from what constraints.txt holds; and the tests of all
# that touches Flower's interface, documented or not.
NEXT := .venv-flower-next
FLOWER_TESTS := tests/deployment/test_flower_link.py tests/deployment/test_links.py \
	tests/deployment/test_aggregator.py tests/server/flower tests/server/test_participants.py \
	tests/server/test_reply_validation.py tests/server/test_round_loop.py tests/server/test_peak.py \
	tests/client/connector tests/client/test_app.py tests/fedward/test_framing.py \
	tests/fedward/test_tensors.py tests/strategies tests/simulation/test_engines.py \
	tests/attacks/test_stranger_on_the_port.py

.PHONY: help install demo demo-clinic test journeys faults check bench docs flower-next clean

help:
	@echo "make demo   four synthetic hospitals, two studies, one report (a minute, and the first time the install)"
	@echo "make demo-clinic  from PACS to PACS with no patient: Orthanc, fetch, study, predict, SEG and SR (two minutes)"
	@echo "make test   all checks and tests"
	@echo "make journeys  the pages for newcomers, followed step by step with whole studies (minutes)"
	@echo "make faults five hospitals in networks of their own, killed and cut off in each phase (a quarter of an hour)"
	@echo "make flower-next  the tests of the links to Flower, with its newest release that the pin allows"
	@echo "make bench  the benchmarks behind the README's numbers (takes long)"
	@echo "make docs   write the generated reference pages anew"

install: $(DONE)

# torch first and with pip: a constraint on a local or CPU build then holds for all that follows.
# The rest with uv, in a quarter of the time; pip where uv finds no registry (it reads no pip.conf).
$(DONE): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt torch uv
	VIRTUAL_ENV=$(CURDIR)/$(VENV) $(BIN)/uv pip install --quiet --compile-bytecode \
		--constraint constraints.txt --editable ".[dev,transfer]" || \
		$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev,transfer]"
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps --upgrade --target $(RUNNER) \
		pytorch-ignite fire termcolor
	touch $@

demo: $(DONE)
	$(BIN)/fedward-simulate demo --out demo

# Installs Orthanc on Debian where root runs it, as the tests do; says so and ends where it cannot.
demo-clinic: $(DONE)
	PYTHONPATH=tests/fixtures $(BIN)/python tests/journeys/demo_clinic.py --out demo-clinic

check: $(DONE)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: check
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

journeys: $(DONE)
	FEDWARD_JOURNEYS=1 $(BIN)/python -m pytest tests/journeys

faults: $(DONE)
	FEDWARD_FAULTS=1 $(BIN)/python -m pytest tests/deployment/federation

# Flower's own dependencies may have to be newer than constraints.txt has them.
flower-next:
	test -x $(NEXT)/bin/python || $(PYTHON) -m venv $(NEXT)
	$(NEXT)/bin/pip install --quiet --no-compile --constraint constraints.txt torch
	$(NEXT)/bin/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	$(NEXT)/bin/pip install --quiet --upgrade --editable ".[simulation]" flwr
	@echo "Flower $$($(NEXT)/bin/python -c 'from importlib.metadata import version; print(version("flwr"))')"
	$(NEXT)/bin/python -m pytest $(FLOWER_TESTS)

bench: $(DONE)
	$(BIN)/python benchmarks/simulation.py
	$(BIN)/python benchmarks/dp.py
	$(BIN)/python benchmarks/dicom.py
	$(BIN)/python benchmarks/accuracy.py
	$(BIN)/python benchmarks/transfer.py
	$(BIN)/python benchmarks/privacy.py
	$(BIN)/python benchmarks/deployment.py

docs: $(DONE)
	$(BIN)/python -m tools.docs.plan > docs/plan.md
	$(BIN)/python -m tools.docs.strategies > docs/strategies.md
	$(BIN)/python -m tools.docs.metrics > docs/metrics.md
	$(BIN)/python -m tools.docs.site > docs/site.md
	$(BIN)/python -m tools.docs.dicom > docs/dicom.md
	$(BIN)/python -m tools.docs.server > docs/server.md
	$(BIN)/python -m tools.docs.api > docs/api.md

clean:
	rm -rf $(VENV) $(NEXT) demo demo-clinic runs
