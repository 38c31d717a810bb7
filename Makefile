# Two commands matter: `make demo` and `make test`. `make help` lists them all.
SHELL := /bin/bash
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
PYTHON ?= python3.11
VENV := .venv
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export DVC_NO_ANALYTICS := 1
export MLFLOW_DISABLE_TELEMETRY := true

.PHONY: help demo data ui test lint lock pretrain-sample sample bench-copies clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 20

# The demo and the UI are of this folder, whatever server the shell is set up for: phantoms are no production model.
here := env -u MLFLOW_TRACKING_URI -u MLFLOW_REGISTRY_URI -u MLFLOW_RUN_ID

demo: $(VENV)/run data  ## from the sample images to a registered challenger, and a table of what happened
	@$(here) dvc repro; status=$$?; braintumor summary && exit $$status

data: $(VENV)/run  ## fetch the sample images and the backbone, where data/ or weights/ is absent
	@$(call pull,data)
	@$(call pull,weights)

# A pull that is broken off leaves a part of the files, which nobody could tell from a data set: away with it.
pull = test -d $(1) || { trap 'rm -rf $(1)' INT TERM; dvc pull -r sample $(1).dvc || { rm -rf $(1); exit 1; }; }

ui: $(VENV)/run  ## open the registry of this folder at http://127.0.0.1:5000
	$(here) mlflow server --backend-store-uri sqlite:///mlflow.db --artifacts-destination mlartifacts --host 127.0.0.1 --port 5000

test: $(VENV)/dev data lint  ## lint, types, import contracts and all tests
	pytest -n 2 --dist loadfile

lint: $(VENV)/dev  ## formatting, lint, types and import contracts
	ruff format --check .
	ruff check .
	mypy
	lint-imports --no-cache

lock: $(VENV)/dev  ## lock the newest versions that pyproject.toml allows, with hashes
	uv pip compile -q --python-version 3.11 pyproject.toml --extra dev --generate-hashes --no-emit-index-url --no-annotate --no-header -o requirements/dev.txt --upgrade
	uv pip compile -q --python-version 3.11 pyproject.toml --extra build --generate-hashes --no-emit-index-url --no-annotate --no-header -c requirements/dev.txt -o requirements/run.txt

sample: $(VENV)/dev  ## draw the sample images anew, into build/sample
	braintumor data sample build/sample

pretrain-sample: $(VENV)/dev  ## pre-train the sample's backbone anew; more than an hour on two cores
	braintumor model pretrain-sample build/pretrain/densenet201-phantoms.weights.h5

DATASET ?= data
bench-copies: $(VENV)/run data  ## how many copies of DATASET the search finds, the pairs that decide, and its speed
	python bench/copies.py --dataset $(DATASET)
	python bench/borderline.py --dataset $(DATASET)
	python bench/fingerprints.py

clean:  ## remove what a run leaves: outputs and the registry of this folder
	rm -rf build mlflow.db mlruns mlartifacts

$(VENV)/bin/python:
	@command -v $(PYTHON) >/dev/null || { echo "Error: $(PYTHON) is missing; install Python 3.11 (Debian: apt install python3.11-venv) or set PYTHON="; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { echo "Error: $(PYTHON) is not Python 3.11; set PYTHON="; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Nothing is built in isolation: the build backend is locked like all else.
$(VENV)/run: requirements/run.txt pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet --require-hashes -r $<
	$(VENV)/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/dev: requirements/dev.txt $(VENV)/run
	$(VENV)/bin/python -m pip install --quiet --require-hashes -r $<
	@touch $@
