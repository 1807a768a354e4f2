# `make quickstart` and `make test` work from a fresh checkout: they make .venv and install into it what is missing.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: quickstart test meshes torture kernels lint clean

quickstart: $(VENV)/.installed
	JAX_PLATFORMS=$${JAX_PLATFORMS:-cpu} $(BIN)/python scripts/train.py --config=configs/quickstart.py --workdir=runs/quickstart --overwrite

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest

# every router on every mesh axis alone and mixed: about ten minutes
meshes: $(VENV)/.installed-test
	MOE_ZOO_ALL_MESHES=1 $(BIN)/python -m pytest tests/train/test_mesh.py --dist load

# twenty kills at random moments, a thousand mutated configs, a thousand mutated checkpoints; about twenty minutes
torture: $(VENV)/.installed-test
	$(BIN)/python scripts/torture.py --kills=20
	MOE_ZOO_TORTURE=1 $(BIN)/python -m pytest tests/train/test_fuzz.py -n 0 -W ignore

# the TPU kernels for every generation and shape, compiled and simulated without a TPU, against their bars: about an hour
# the first time; an interrupted run goes on where it stopped
kernels: $(VENV)/.installed-test
	JAX_PLATFORMS=cpu $(BIN)/python scripts/bench.py kernels --tpu-static

lint: $(VENV)/.installed-test
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/.installed-test: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	touch $(VENV)/.installed $@

clean:
	rm -rf $(VENV) runs .jax_cache
