# `make help` lists the targets. Everything lives in .venv; set-up, repeated, needs no network.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
GEN := src/gamenode/wire/gen
IMAGE := build/contract.binpb
RELEASED := proto/released.binpb
UV_COMPILE := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--no-emit-index-url --no-annotate --no-header --extra server --group pyproject.toml:build

.DEFAULT_GOAL := help
.PHONY: help demo test test-deps check bench soak format format-check lint types imports \
	proto proto-check proto-release lock clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "GameNode needs Python 3.11 or newer: set PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.server: requirements/server.txt pyproject.toml $(VENV)/.python
	$(PIP) install --require-hashes -r requirements/server.txt
	$(PIP) install --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/.dev: requirements/dev.txt $(VENV)/.server
	$(PIP) install --require-hashes -r requirements/dev.txt
	@touch $@

demo: $(VENV)/.server ## Start everything and run an example; ONCE=1 stops after it
	@$(BIN)/python tools/demo.py $(if $(ONCE),--once)

test: $(VENV)/.dev ## Run every test that this machine can run
	$(BIN)/python -m pytest -q -m "not bench and not soak" $(ARGS)

test-deps: ## Install what the tests use beside Python, on Debian as root
	apt-get update -qq
	DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
		docker.io docker-registry podman conmon crun runc containernetworking-plugins catatonit \
		iptables iproute2 busybox-static util-linux strace

check: format-check lint types imports proto-check test ## What CI runs

format: $(VENV)/.dev ## Format the code
	$(BIN)/ruff format . && $(BIN)/ruff check --fix --quiet .

format-check: $(VENV)/.dev
	$(BIN)/ruff format --check --quiet .

lint: $(VENV)/.dev
	$(BIN)/ruff check --quiet .

types: $(VENV)/.dev
	$(BIN)/mypy

imports: $(VENV)/.dev
	$(BIN)/lint-imports --no-logo import-contracts.toml

bench: $(VENV)/.dev ## Measure; prints tables
	$(BIN)/python -m pytest -q -m bench -s tests/bench $(ARGS)

soak: $(VENV)/.dev ## Run the long suites
	$(BIN)/python -m pytest -q -m soak $(ARGS)

proto: $(VENV)/.dev ## Generate the wire code from proto/
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tools/generate_proto.py code $(GEN)

$(IMAGE): proto/gamenode/v1/gamenode.proto tools/generate_proto.py $(VENV)/.dev
	@mkdir -p $(@D)
	$(BIN)/python tools/generate_proto.py image $@

proto-check: $(IMAGE) ## Lint the contract, compare it with the released one, and the code with it
	$(BIN)/buf lint $(IMAGE) --config buf.yaml
	$(BIN)/buf breaking $(IMAGE) --against $(RELEASED) --config buf.yaml
	@rm -rf build/gen && mkdir -p build
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tools/generate_proto.py code build/gen
	@diff -r --exclude=__pycache__ build/gen $(GEN) || \
		{ echo "The generated code is not what proto/ says: run make proto."; exit 1; }

proto-release: $(IMAGE) ## Take the contract as the one that later changes must be compatible with
	cp $(IMAGE) $(RELEASED)

lock: $(VENV)/.python ## Resolve the dependencies anew
	$(PIP) install uv
	$(UV_COMPILE) pyproject.toml -o requirements/server.txt
	$(UV_COMPILE) --group pyproject.toml:dev pyproject.toml -o requirements/dev.txt

clean: ## Remove what was built
	rm -rf $(VENV) build dist gamenode-data
