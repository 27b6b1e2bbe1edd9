# Everything a person or CI does with this repository. `make help` lists it.
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# A CPU build of torch; pinned first because a range would pull the CUDA build's gigabytes.
TORCH ?= torch==2.13.0

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --editable '.[dev,postgres,s3]'
	touch $@

ns: ## Link the four packages where the type checkers find them
	@mkdir -p build/ns/loractl
	@for p in adapters hub server cli; do ln -sfn ../../../$$p build/ns/loractl/$$p; done

dev: $(STAMP) ns ## Make .venv with everything that development needs

lint: dev ## ruff and the import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: dev ## mypy --strict and pyright on the four packages and the tests
	$(BIN)/mypy
	$(BIN)/pyright --stats | tee build/pyright.txt | tail -n 20
	@test "$$(sed -n 's/^ *Total files checked: *//p' build/pyright.txt | tr -d ,)" -gt 40

check: lint types ## The fast half: lint, types, unit tests
	$(BIN)/pytest -q -n 2 --dist loadfile -m "not slow and not e2e and not real_model and not drill"

test: check ## Everything that CI runs
	$(BIN)/pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m "slow or e2e or real_model or drill"

help-snapshots: dev ## Rewrite tests/cli/help after a command changed
	$(BIN)/python tests/cli/test_help.py

demo: dev ## Train, push, serve and ask, on a real model and real text (KEEP=1 leaves it running)
	PYTHONPATH=tests/support $(BIN)/python tests/demo/run_demo.py $(if $(KEEP),--keep)

charts: dev ## Check the chart, its alerts and dashboards, without a cluster
	$(BIN)/pytest -q tests/charts

charts-checkov: dev ## checkov on the chart but for what users add (extras); a large install, in its own environment
	test -x build/checkov/bin/checkov || ($(PYTHON) -m venv build/checkov && build/checkov/bin/pip install --quiet 'checkov>=3.3,<4')
	mkdir -p build/rendered
	@helm="$$(PYTHONPATH=tests/support $(BIN)/python -c 'from chart_tools import *; print(helm_binary(HELM_4))')"; \
	for values in $$(ls charts/loractl/ci/*-values.yaml | grep -v /extras-); do \
	  "$$helm" template demo charts/loractl --namespace ml --values "$$values" > "build/rendered/$$(basename "$$values")" || exit 1; \
	done
	build/checkov/bin/checkov --skip-download --config-file charts/checkov.yaml --directory build/rendered

drills: dev ## The fault drills at full length, figures printed (500 kills of the hub, 1,000 power cuts; half an hour)
	LORACTL_DRILLS=long $(BIN)/pytest -q -s -m drill

bench-train: dev ## Training against transformers' Trainer, fleets against single runs (20 minutes, a quiet machine)
	PYTHONPATH=tests/support:tests/demo $(BIN)/python tests/bench/bench_train.py

bench-hub: dev ## The hub's speed beside cp and sha256sum, and how lookups grow, as JSON lines (minutes)
	PYTHONPATH=tests/support $(BIN)/python tests/bench/bench_hub.py

bench-http: dev ## The same burst through `loractl serve` and through the engine alone, as JSON lines (minutes, a quiet machine)
	PYTHONPATH=tests/support:tests/demo $(BIN)/python tests/bench/bench_http.py
	PYTHONPATH=tests/support:tests/demo $(BIN)/python tests/bench/bench_http.py --distinct 32

bench-cuda: dev ## On a machine with an NVIDIA card: is it right, how fast; under ten minutes, build/bench-cuda.json
	mkdir -p build
	PYTHONPATH=tests/support $(BIN)/python tests/bench/bench_cuda.py --out build/bench-cuda.json

ops-up: dev ## A real Prometheus on a real hub and server: the alert rules evaluate, then all ends
	PYTHONPATH=tests/support $(BIN)/python tests/support/ops_up.py

clean: ## Remove what was made here (not the caches in ~/.cache/loractl)
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis

conformance: dev ## The Hugging Face protocol, every client on both kinds of hub (ONLY=0.36.2 picks); JUnit in build/conformance
	$(BIN)/python tests/support/run_conformance.py --all $(if $(ONLY),--only $(ONLY))

.PHONY: bench-cuda bench-http bench-hub bench-train conformance help ns dev lint types check test help-snapshots demo charts charts-checkov drills ops-up clean
