# Everything is set up in .venv by the target that needs it. Python 3.11 or newer and make are all that must be there;
# `make test-system` also runs Debian's Prometheus and docker-compose.
#
#   make demo                         PYTHON=python3.12 make demo
#   make serve ARGS='--port 9000'     make test ARGS='tests/contract -x'

PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
# Stamps lie in .venv, so that they go with it. Each stands on the one before: pip never runs twice at once.
VENV_MADE := $(VENV)/.made-venv
CAN_RUN := $(VENV)/.can-run
CAN_TEST := $(VENV)/.can-test
CAN_TEST_SYSTEM := $(VENV)/.can-test-system
CAN_LINT := $(VENV)/.can-lint
HAS_PERF_ANALYZER := $(VENV)/.has-perf-analyzer
PIP_INSTALL := $(BIN)/python -m pip --disable-pip-version-check install --constraint constraints.txt
SYSTEM_TOOLS := prometheus promtool docker-compose curl chromium

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo serve test test-system test-slow lint format dashboards clean
.PHONY: bench bench-budgets bench-stages bench-full-depth bench-request-path bench-memory bench-goodput bench-soak

help: ## show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: $(CAN_RUN) ## train, export, serve and measure real handwritten digits; ends by itself
	@$(BIN)/offramp demo $(ARGS)

serve: $(CAN_RUN) ## serve the demo's bundle until Ctrl-C
	@$(BIN)/offramp demo --bundle-only
	@$(BIN)/offramp serve .demo/digits $(ARGS)

test: $(CAN_TEST) ## run the test suite
	@$(BIN)/pytest $(ARGS)

test-system: $(CAN_TEST_SYSTEM) $(HAS_PERF_ANALYZER) ## run the tests that need Debian's packages
	@for tool in $(SYSTEM_TOOLS); do command -v $$tool > /dev/null || { \
	    echo "make test-system needs $$tool; on Debian: apt-get install prometheus docker-compose curl chromium" >&2; exit 1; }; done
	@/sbin/ldconfig -p | grep libb64.so.0d > /dev/null || { \
	    echo "make test-system needs libb64; on Debian: apt-get install libb64-0d" >&2; exit 1; }
	@$(BIN)/pytest -m system $(ARGS)

test-slow: $(CAN_TEST) ## run the tests that take minutes
	@$(BIN)/pytest -m slow $(ARGS)

lint: $(CAN_LINT) ## check style, types and who imports whom
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/mypy dashboards/build.py
	@$(BIN)/lint-imports

format: $(CAN_LINT) ## format the code and fix what can be fixed
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

# BUNDLE is a calibrated bundle, DATA its test data, as for `offramp evaluate`, and DATA_DIR where named data sets lie.
BUNDLE ?=
DATA ?=
DATA_DIR ?=
ON_DATA = $(BUNDLE) --data $(DATA) $(if $(DATA_DIR),--data-dir $(DATA_DIR)) $(ARGS)
HAS_DATA = @test -n '$(BUNDLE)' -a -n '$(DATA)' || { \
    echo "name a calibrated bundle and its test data: make $@ BUNDLE=bundles/msdnet-cifar100 DATA=cifar100" >&2; exit 1; }

bench: bench-budgets bench-stages bench-full-depth bench-request-path bench-memory bench-goodput bench-soak ## measure all of the below; BUNDLE=… DATA=… (DATA_DIR=…)

bench-budgets: $(CAN_RUN) ## measure how well latency budgets are kept on an idle server, 3 minutes
	@$(BIN)/python loadtest/benchmarks/latency_budget.py

bench-stages: $(CAN_RUN) ## measure stages against one graph, and the engine's time for a dispatch, 2 minutes
	@$(BIN)/python server/benchmarks/stages_and_graph.py

bench-memory: $(CAN_RUN) ## measure the memory of 10,000 rows in flight, and that it is freed, 2 minutes
	@$(BIN)/python server/benchmarks/inflight_memory.py

bench-full-depth: $(CAN_RUN) ## measure full depth over HTTP against a bare loop, 4 minutes
	@$(BIN)/python loadtest/benchmarks/full_depth.py

bench-request-path: $(CAN_RUN) ## measure where the time of one request goes, 2 minutes
	@$(BIN)/python server/benchmarks/request_path.py

bench-goodput: $(CAN_RUN) ## measure correct goodput against load, 15 minutes; BUNDLE=… DATA=…
	$(HAS_DATA)
	@$(BIN)/python loadtest/benchmarks/goodput.py $(ON_DATA) --out docs/benchmarks/goodput
	@$(BIN)/python loadtest/benchmarks/goodput_report.py docs/benchmarks/goodput/*.json --out docs/benchmarks/goodput.md

bench-soak: $(CAN_RUN) ## load a server for half an hour and judge it; BUNDLE=… DATA=…
	$(HAS_DATA)
	@$(BIN)/python loadtest/benchmarks/soak.py $(BUNDLE) --data $(DATA) $(if $(DATA_DIR),--data-dir $(DATA_DIR))

dashboards: $(CAN_TEST_SYSTEM) ## write dashboards/offramp.json anew
	@$(BIN)/python dashboards/build.py

clean: ## remove everything that make and the tools made
	@rm -rf $(VENV) .demo .stamps .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis build dist
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV_MADE):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "Offramp needs Python 3.11 or newer; name one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(CAN_RUN): pyproject.toml constraints.txt $(VENV_MADE)
	$(PIP_INSTALL) --editable '.[cpu,export,calibrate,loadtest]'
	@touch $@

$(CAN_TEST): $(CAN_RUN)
	$(PIP_INSTALL) --editable '.[cpu,export,calibrate,loadtest,test]'
	@touch $@

$(CAN_TEST_SYSTEM): $(CAN_TEST)
	$(PIP_INSTALL) --editable '.[cpu,export,calibrate,loadtest,test,dashboards]'
	@touch $@

# An older wheel of the client that carries perf_analyzer, beside the newest, which tests use; and the CUDA library
# that perf_analyzer is linked against.
$(HAS_PERF_ANALYZER): $(CAN_TEST_SYSTEM)
	$(PIP_INSTALL) --upgrade --no-deps --target $(VENV)/perf-analyzer tritonclient==2.44.0 nvidia-cuda-runtime-cu12
	@touch $@

$(CAN_LINT): $(CAN_TEST_SYSTEM)
	$(PIP_INSTALL) --editable '.[cpu,export,calibrate,loadtest,test,dashboards,lint]'
	@touch $@
