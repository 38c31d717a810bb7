# Two commands matter: `make demo` and `make test`. `make help` lists them all.
SHELL := /bin/bash
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
PYTHON ?= python3.11
VENV := .venv
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export DVC_NO_ANALYTICS := 1
export MLFLOW_DISABLE_TELEMETRY := true

.PHONY: help demo data ui test soak lint security image image-server image-check lock pretrain-sample sample bench \
        bench-pipeline bench-profile bench-copies bench-ablation bench-ood bench-explanations bench-evaluation \
        bench-materialise clean

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

test: $(VENV)/dev $(VENV)/security/installed data lint  ## lint, types, import contracts and all tests
	pytest -n 2 --dist loadfile --no-loadscope-reorder  # long files first, as they are named

soak: $(VENV)/dev data  ## kill the training 20 times, and train with two and four workers, in full; an hour on two cores
	BRAINTUMOR_SOAK=1 pytest -p no:xdist tests/integration/test_resume.py tests/integration/test_workers.py

lint: $(VENV)/dev  ## formatting, lint, types and import contracts
	ruff format --check .
	ruff check .
	mypy
	lint-imports --no-cache

security: $(VENV)/dev $(VENV)/security/installed  ## lint of the image's file and of the Kubernetes objects
	pytest tests/contract/test_image.py tests/contract/test_manifests.py

TARGET ?= cpu
TAG ?= $(shell git describe --always --dirty --abbrev=12 --exclude='*')
BUILD ?= $(shell docker info >/dev/null 2>&1 && echo docker || echo buildah)
image:  ## build the image braintumor:TAG by docker, or else buildah; TARGET=gpu: with CUDA
	@$(can_build)
	$(build) --target $(TARGET) --tag braintumor:$(TAG) $(BUILD_OPTIONS) .

image-server:  ## build the image braintumor-mlflow:TAG of the registry's server, in the same way
	@$(can_build)
	$(build) --file mlflow/Dockerfile --tag braintumor-mlflow:$(TAG) $(BUILD_OPTIONS) .

can_build = command -v $(BUILD) >/dev/null || { echo "Error: neither docker nor buildah can build here; install one of them"; exit 1; }
build = $(BUILD) build --build-arg GIT_COMMIT="$$(git describe --always --dirty --abbrev=40 --exclude='*')"

image-check: data  ## build the image of TARGET on a base that debootstrap makes, and run steps in it; as root, minutes
	nice tests/image/check $(TARGET)

lock: $(VENV)/dev  ## lock the newest versions that pyproject.toml allows, with hashes
	uv pip compile -q --python-version 3.11 pyproject.toml --extra dev --generate-hashes --no-emit-index-url --no-annotate --no-header -o requirements/dev.txt --upgrade
	uv pip compile -q --python-version 3.11 pyproject.toml --extra build --generate-hashes --no-emit-index-url --no-annotate --no-header -c requirements/dev.txt -o requirements/run.txt
	uv pip compile -q --python-version 3.11 pyproject.toml --extra gpu --generate-hashes --no-emit-index-url --no-annotate --no-header -c requirements/dev.txt -o requirements/gpu.txt --upgrade
	uv pip compile -q --python-version 3.11 --group server --generate-hashes --no-emit-index-url --no-annotate --no-header -c requirements/dev.txt -o requirements/server.txt --upgrade
	uv pip compile -q --python-version 3.11 --group security --generate-hashes --no-emit-index-url --no-annotate --no-header -o requirements/security.txt --upgrade

sample: $(VENV)/dev  ## draw the sample images anew, into build/sample
	braintumor data sample build/sample --with-masks

pretrain-sample: $(VENV)/dev  ## pre-train the sample's backbone anew; more than an hour on two cores
	braintumor model pretrain-sample build/pretrain/densenet201-phantoms.weights.h5

# Ours beside plain Keras, and PyTorch where BENCH names a Python that has it: make bench BENCH='--torch-python FILE'
bench: $(VENV)/run data  ## ours beside plain Keras: ratios with spread, table and plots in build/bench; an hour on two cores
	python bench/run.py $(BENCH)

bench-pipeline: $(VENV)/run data  ## the pipeline without its training, by the model in build/: seconds and memory a step
	python bench/pipeline.py --dataset $(DATASET)

bench-profile: $(VENV)/run data  ## where the time of a training step goes, operation by operation; after make bench
	python bench/profile_step.py

DATASET ?= data
bench-copies: $(VENV)/run data  ## how many copies of DATASET the search finds, the pairs that decide, and its speed
	python bench/copies.py --dataset $(DATASET)
	python bench/borderline.py --dataset $(DATASET)
	python bench/fingerprints.py

bench-ablation: $(VENV)/run data  ## train recipes that differ in one thing on the split in build/, and compare them; hours on two cores
	python bench/ablation.py --dataset $(DATASET)

bench-ood: $(VENV)/run data  ## how well scores tell images unlike the training's, by the model and split in build/
	python bench/ood.py --dataset $(DATASET)

bench-explanations: $(VENV)/run data  ## which heat maps of the model in build/ point at known lesions
	python bench/explanations.py --dataset $(DATASET)

bench-evaluation: $(VENV)/run data  ## what an evaluation of the model in build/ costs beside its forward passes
	python bench/evaluation.py --dataset $(DATASET)

bench-materialise: $(VENV)/dev  ## how fast a data version is fetched from S3, beside dvc pull
	python bench/materialise.py

clean:  ## remove what a run leaves: outputs and the registry of this folder
	rm -rf build mlflow.db mlflow.db-* mlruns mlartifacts

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

$(VENV)/security/installed: requirements/security.txt | $(VENV)/bin/python
	$(PYTHON) -m venv $(VENV)/security
	$(VENV)/security/bin/python -m pip install --quiet --require-hashes -r $<
	@touch $@
