# Two commands on a fresh machine: `make demo` and `make test`. Each sets up .venv first, once.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: help setup demo demo-segmentation demo-contrastive demo-generation studies estimates browser test test-slow test-cluster check format clean

help:
	@echo "make demo       set up, then compare every method on the embedded digits and write runs/demo/report.html"
	@echo "make demo-segmentation, demo-contrastive, demo-generation   the same for the other tasks: some minutes each"
	@echo "make test       set up, then run the tests (make test-slow: the long ones)"
	@echo "make test-cluster  the launchers on a SLURM cluster of two nodes, made on this machine (installs SLURM; root)"
	@echo "make check      formatting, lint, types, layers, tests"
	@echo "make estimates  peak memory of the published models and of some with billions of parameters, by the estimator"
	@echo "make studies    the kernel, sparsity, initialisation, scale and memory studies, with their pictures"
	@echo "make format     rewrite the sources as 'make check' wants them"

setup: $(READY)

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.12 …")'
	@echo "Setting up .venv, once: a download of about a gigabyte (more with CUDA), some minutes."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --no-input -q --use-pep517 -r requirements.lock
	$(BIN)/python -m pip install --disable-pip-version-check --no-input -q --no-deps --no-build-isolation -e .
	@touch $(READY)

demo: $(READY)
	@PATH="$(CURDIR)/$(BIN):$$PATH" launch/demo.sh

demo-segmentation demo-contrastive demo-generation: demo-%: $(READY)
	@PATH="$(CURDIR)/$(BIN):$$PATH" launch/demo_$*.sh

studies: $(READY)
	@PATH="$(CURDIR)/$(BIN):$$PATH" launch/studies.sh

# What would fit where, by the estimator: nothing is run; half an hour, most of it for 1,024 ranks.
estimates: $(READY)
	@PATH="$(CURDIR)/$(BIN):$$PATH" launch/estimates.sh

FIND_BROWSER := for program in chromium chromium-browser google-chrome google-chrome-stable; do \
    command -v $$program >/dev/null && exit 0; done; exit 1

# A module stays on one worker: many share one start of several processes.
test: $(READY)
	@marks="not slow and not cluster"; \
	if ! ( $(FIND_BROWSER) ); then \
	    marks="$$marks and not browser"; \
	    echo "No Chromium here: the report is not tested in a browser. 'make browser' installs it on Debian (root)."; \
	fi; \
	$(BIN)/python -m pytest -n auto --dist loadfile -m "$$marks"

# Chromium for the tests of the report; fails where it cannot be had.
browser:
	@( $(FIND_BROWSER) ) && exit; \
	echo "Installing Chromium"; \
	apt-get update -q || echo "apt-get update failed: trying with the lists that are here" >&2; \
	DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends chromium

# A real SLURM cluster of two nodes, torchrun's and DeepSpeed's launchers, Kubeflow's schema: some minutes, as root.
test-cluster: $(READY) build/kubeflow
	@[ "$$(id -u)" = 0 ] || { echo "make test-cluster starts a SLURM cluster of its own: run it as root" >&2; exit 1; }
	@missing=; for program in munged slurmctld slurmd sbatch srun scontrol; do \
	    PATH="$$PATH:/usr/sbin:/sbin" command -v $$program >/dev/null || missing="$$missing $$program"; \
	done; \
	[ -z "$$missing" ] && exit; \
	if ! command -v apt-get >/dev/null; then \
	    echo "missing:$$missing. This installs them on Debian and Ubuntu: apt-get install slurm-wlm munge" >&2; exit 1; \
	fi; \
	echo "missing:$$missing. Installing slurm-wlm and munge"; \
	apt-get update -q || echo "apt-get update failed: trying with the lists that are here" >&2; \
	DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends slurm-wlm munge
	$(BIN)/python -m pytest -m cluster tests/cluster

# The clients' models that the Kubernetes manifest is checked against; later ones of `kubernetes` are made otherwise.
build/kubeflow: | $(READY)
	rm -rf $@.partial
	$(BIN)/python -m pip install --disable-pip-version-check --no-input -q --target $@.partial \
	    kubeflow-training==1.9.3 kubernetes==32.0.1
	mv $@.partial $@

test-slow: $(READY)
	$(BIN)/python -m pytest -m "slow and not cluster"

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(MAKE) test

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv runs build *.egg-info
