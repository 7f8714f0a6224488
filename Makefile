# make repro: the whole workflow. make test: every check. Both need only Python 3.11 or newer, git and make.
SHELL := /bin/bash
PYTHON ?= python3
UV_VERSION := $(shell sed -n "s/^ARG UV_VERSION=//p" Dockerfile)
RUN := source .venv/bin/activate &&
# Where a machine sets it, every process compiles torch, MLflow and timm again (13 s instead of 5 until a stage begins).
unexport PYTHONDONTWRITEBYTECODE

.PHONY: repro test lint image image-test cluster-test compare bench downstream-test serving-test lock clean

repro: .venv/ready
	$(RUN) dvc repro
	$(RUN) dho results

test: .venv/ready lint
	$(RUN) pytest

lint: .venv/ready
	$(RUN) ruff format --check .
	$(RUN) ruff check .
	$(RUN) lint-imports
	$(RUN) mypy
	$(RUN) hadolint Dockerfile tests/cluster/machine/images/*/Dockerfile

# The image, with docker or else buildah; then a training and a prediction in it, locked down as in a cluster.
image:
	tests/cluster/machine/cluster.sh image

image-test: image
	tests/cluster/machine/image/test.sh $$(tests/cluster/machine/cluster.sh tag)

# The tests on real Kubernetes on this machine, as root; with KUBECONFIG and DHO_TEST_CLUSTER=1 on that cluster instead.
# TESTS: files and options for pytest; by default all tests.
cluster-test: .venv/ready
	$(RUN) tests/cluster/machine/cluster.sh test $(TESTS)

compare: .venv/ready
	$(RUN) python benchmarks/compare_methods.py

bench: .venv/ready
	$(RUN) python benchmarks/train_step.py
	$(RUN) python benchmarks/allocator.py
	$(RUN) python benchmarks/teacher_store.py
	$(RUN) python benchmarks/int8.py
	$(RUN) python benchmarks/startup.py

# The environment: uv from PyPI in a folder of its own, then exactly what the lock says, then this package.
.venv/ready: requirements-dev.txt pyproject.toml
	$(PYTHON) -c 'import sys; \
	  sys.exit("dho needs Python 3.11 or newer, this is " + sys.version) if sys.version_info < (3, 11) else 0'
	test -x .uv/bin/uv || \
	  { $(PYTHON) -m venv .uv && .uv/bin/pip install -q --disable-pip-version-check uv==$(UV_VERSION); }
	.uv/bin/uv venv -q --clear --python $(PYTHON) .venv
	.uv/bin/uv pip install -q --python .venv/bin/python --require-hashes -r requirements-dev.txt
	.uv/bin/uv pip install -q --python .venv/bin/python --no-deps --no-build-isolation -e .
	touch $@

# New exact versions from pyproject.toml.
COMPILE := .uv/bin/uv pip compile pyproject.toml -q --universal --python-version 3.11 --generate-hashes \
  --no-emit-index-url --no-header
lock:
	$(COMPILE) --upgrade -o requirements.txt
	$(COMPILE) --extra dev -c requirements.txt -o requirements-dev.txt

clean:
	rm -rf .venv .uv .mypy_cache .ruff_cache .pytest_cache

# A new environment of a downstream team: the champion's accuracy there is that of metrics.json. After `make repro`.
downstream-test: .venv/ready
	tests/downstream/run.sh

# `mlflow models serve` under load and under bad requests. After `make repro`.
serving-test: .venv/ready
	$(RUN) python benchmarks/serving.py
