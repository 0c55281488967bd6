# Two commands do all set-up on a fresh machine: `make demo` and `make test`.
# PYTHON chooses the interpreter (3.11 or newer), VENV the environment.

PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check

DATA := data/openmoji
WORKDIR := runs/tiny
# Processes that share the tests; each of them takes up to 4 GB.
WORKERS := 2

.PHONY: help demo test test-all rehearsal test-beam test-xpk locks faults soak fuzz lint format check venv clean

## What there is to make.
help:
	@awk '/^## /{text = text substr($$0, 3); next} \
	    /^[a-z-]+:/ && text {sub(/:.*/, ""); printf "%-10s%s\n", $$0, text} {text = ""}' $(MAKEFILE_LIST)

## Train a small model on real pictures and look at what it draws: ten to fifteen minutes on two cores.
demo: $(VENV)/.demo
	$(RUN) tools/prepare_data.py openmoji --output=$(DATA) --flagfile=configs/tiny_data.flags
	$(RUN) -m lumina_jax.train --config=configs/tiny.py --workdir=$(WORKDIR)
	$(RUN) tools/plot_run.py --workdir=$(WORKDIR)
	$(RUN) -m lumina_jax.evaluate --checkpoint=$(WORKDIR)
	@echo "Look at $(WORKDIR)/evaluation/*.png and $(WORKDIR)/loss_curve.png"

## The tests that a change must pass: ten to twenty minutes on two cores.
test: $(VENV)/.dev
	$(RUN) -m pytest -n $(WORKERS) --dist loadfile -m "not slow" $(PYTEST_ARGS)

## Slow ones too.
test-all: $(VENV)/.dev
	$(RUN) -m pytest -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

## Three stages as two processes: one is killed, one told to end, and what they learn is the same as
## that of a run without stops. About four minutes on two cores.
rehearsal: $(VENV)/.dev
	$(RUN) -m pytest tests/launch/test_rehearsal.py -k rehearsal_learns $(PYTEST_ARGS)

## Kills, full disks, damaged files and the like, in real runs: about forty minutes on two cores.
faults: $(VENV)/.dev
	$(RUN) -m pytest tests/faults tests/test_checkpoint.py tests/test_lease.py tests/test_peers.py \
	    tests/test_watchdog.py tests/test_distributed.py tests/data/test_storage.py $(PYTEST_ARGS)

## Half an hour with a fault every minute or two, against the same run undisturbed.
soak: $(VENV)/.dev
	$(RUN) -m tests.faults.soak $(SOAK_ARGS)

## A hundred thousand inputs for each door: records, weights, flags. See docs/security.md.
fuzz: $(VENV)/.dev
	$(RUN) -m tests.fuzz $(FUZZ_ARGS)

## Data preparation and captions on Apache Beam, in an environment of its own (it asks for an older
## protobuf).
test-beam: $(VENV)-beam/.beam
	$(VENV)-beam/bin/python -m pytest tests/data/test_beam.py tests/unicap/test_caption_beam.py $(PYTEST_ARGS)

## The JobSets of launch/gke beside those that xpk makes, in an environment of its own (it asks for
## exact versions).
test-xpk: $(VENV)/.dev $(VENV)-xpk/.xpk
	$(RUN) -m pytest tests/launch/test_xpk.py $(PYTEST_ARGS)

## Versions and hashes of the packages in launch/Dockerfile's images, from those installed here.
locks: $(VENV)/.dev
	$(RUN) tools/lock.py

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports

format: $(VENV)/.dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

check: lint test

venv: $(VENV)/.dev

$(VENV)/.demo: requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lumina_jax needs Python 3.11 or newer; this is %s. Try make PYTHON=python3.12 ..." % sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[demo]'
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(PIP) -e '.[dev]'
	touch $@

$(VENV)-beam/.beam: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)-beam
	$(VENV)-beam/bin/python -m pip install --quiet --disable-pip-version-check -e '.[beam,demo,servers]' \
	    beartype pytest
	touch $@

$(VENV)-xpk/.xpk:
	$(PYTHON) -m venv $(VENV)-xpk
	$(VENV)-xpk/bin/python -m pip install --quiet --disable-pip-version-check xpk==1.16.0
	touch $@

clean:
	rm -rf $(DATA) $(WORKDIR)
