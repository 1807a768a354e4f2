# `make quickstart` and `make test` work from a fresh checkout: they make .venv and install into it what is missing.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

# the CUDA compilers of jax need Python 3.12: PYTHON_GPU=... where it goes by another name
PYTHON_GPU ?= python3.12
VENV_GPU   ?= .venv-gpu

.PHONY: quickstart test meshes torture kernels kernels-gpu lint clean

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

# the GPU kernels for an H100 at every shape, compiled without a GPU, against their bars: a quarter of an hour
kernels-gpu: $(VENV_GPU)/.installed
	JAX_PLATFORMS=cpu $(VENV_GPU)/bin/python scripts/bench.py kernels --gpu-static

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

# only the compilers: none of the libraries that a program at work needs
$(VENV_GPU)/.installed: pyproject.toml
	$(PYTHON_GPU) -m venv $(VENV_GPU)
	$(VENV_GPU)/bin/python -m pip install --quiet --disable-pip-version-check -e . nvidia-cuda-nvcc
	version=$$($(VENV_GPU)/bin/python -c 'import jax; print(jax.__version__)'); $(VENV_GPU)/bin/python -m pip install \
		--quiet --disable-pip-version-check jax-cuda13-plugin==$$version jax-cuda13-pjrt==$$version
	touch $@

clean:
	rm -rf $(VENV) $(VENV_GPU) runs .jax_cache
