# Every target sets up .venv first if need be; nothing needs root.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
PY := .venv/bin/python
# One thread per process: test processes and services share the cores.
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1

# What `make images` builds: the services.
ROLES := $(patsubst services/%/service.py,%,$(wildcard services/*/service.py))
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
DOCKER ?= docker
BASE_IMAGE ?= python:3.11-slim-bookworm
ACCELERATOR ?= cpu
IMAGE_PREFIX ?=
IMAGE_TAG ?= $(VERSION)$(if $(filter cuda,$(ACCELERATOR)),-cuda)
BUILD_OPTIONS ?=

.PHONY: help setup demo test test-slow test-helm test-terraform test-kube lint format proto bench bench-gpu images test-compose chaos loadtest compare docs lock clean

help: ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

setup: ## Make .venv (2 minutes the first time)
	@$(PYTHON) tools/setup_environment.py

demo: setup ## Train the household agent on this machine: all services, live view, report
	@.venv/bin/sdar run examples/household.yaml

test: setup ## Unit, contract, integration and end-to-end tests
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow" --durations=25 --durations-min=5

test-slow: setup ## What takes minutes: the warm start from nothing, the demo to its end
	$(PY) -m pytest -m slow

test-kube: setup ## Put the chart to the test on the cluster of KUBECONFIG (35 minutes); VALUES=FILE, REPORT=PAGE
	$(PY) -m pytest tests/kube -s $(if $(VALUES),--values $(VALUES)) $(if $(REPORT),--report $(REPORT))

test-helm: setup ## The chart: schemas of Kubernetes, policies, messages, dashboards, alerts (seconds)
	@$(PY) tools/get_tools.py
	PATH="$(CURDIR)/.tools:$$PATH" $(PY) -m pytest tests/helm

test-terraform: setup ## infra/terraform: validity, plans and policies under the real AWS provider, without an account (2 minutes)
	$(PY) -m pytest tests/terraform

lint: setup ## Style, types, import rules, protobuf rules
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	.venv/bin/lint-imports
	@command -v npx >/dev/null || { echo "error: buf needs Node.js: install it and run make lint again"; exit 1; }
	npx --yes @bufbuild/buf@1.75.0 lint

format: setup ## Bring the code into style
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

proto: setup ## Generate sdar/v1 from proto/
	$(PY) -m grpc_tools.protoc -Iproto --python_out=. --pyi_out=. --grpc_python_out=. \
	  --plugin=protoc-gen-mypy_grpc=.venv/bin/protoc-gen-mypy_grpc --mypy_grpc_out=quiet:. proto/sdar/v1/*.proto

bench: setup ## Measure, as ratios against named peers; writes docs/benchmarks.md
	$(PY) -m loadtest.bench

bench-gpu: ## Measure the learner's step on a CUDA machine that has torch and transformers
	$(PYTHON) loadtest/bench_gpu.py

chaos: setup ## Kill, pause and cut everything for 10 minutes of a real run, then check that nothing was lost
	$(PY) -m loadtest.chaos --page

images: ## Build the five container images (docs/containers.md has its variables)
	@set -e; for role in $(ROLES); do echo "$(IMAGE_PREFIX)sdar-$$role:$(IMAGE_TAG)"; \
	  $(DOCKER) build --target $$role --tag $(IMAGE_PREFIX)sdar-$$role:$(IMAGE_TAG) --build-arg BASE_IMAGE=$(BASE_IMAGE) \
	    --build-arg ACCELERATOR=$(ACCELERATOR) --build-arg VERSION=$(VERSION) \
	    --build-arg REVISION=$$(git rev-parse --short HEAD 2>/dev/null || echo unknown) $(BUILD_OPTIONS) .; done

test-compose: setup ## docker-compose up, to the end and through kills and restarts (15 minutes; needs docker and make images)
	$(PY) -m pytest -s tests/compose

loadtest: setup ## Drive servers from outside until they are full (4 minutes); GATEWAY=URL, ENVS=HOST:PORT for ones that are there
	$(PY) -m loadtest.outside $(if $(GATEWAY),--gateway $(GATEWAY)) $(if $(ENVS),--envs $(ENVS)) $(LOADTEST_OPTIONS)

compare: setup ## The method comparison of docs/method.md (about 35 minutes on 2 cores)
	.venv/bin/sdar compare examples/household-comparison.yaml

docs: setup ## Write what is made from the code: pages of keys and metrics, dashboards, the chart's schema
	$(PY) -m sdar.cli.configuration_page
	$(PY) -m sdar.cli.metrics_page
	$(PY) -m tools.make_dashboards
	$(PY) -m tools.chart_schema

lock: ## Resolve dependencies anew; rewrite requirements-cpu.lock and the images' lists
	$(PYTHON) tools/setup_environment.py --write-lock
	$(PYTHON) tools/setup_environment.py
	$(PY) tools/image_requirements.py

clean: ## Remove caches; runs and .venv stay
	rm -rf .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis build *.egg-info
