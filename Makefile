# Every target makes its own virtual environment first; PYTHON=... chooses the interpreter (3.11 or newer).
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
JOBS ?= 2

PARITY := $(VENV)/.parity
AHEAD_VENV ?= .venv-ahead
AHEAD := $(AHEAD_VENV)/.ready

.PHONY: demo demo-pretrained test test-parity test-ahead ahead lint format lock clean

demo: $(READY)  ## Train a small LayerSkip Llama on real text and benchmark its decoding.
	$(RUN) launch/demo.py --config=configs/demo.py --workdir=runs/demo

demo-pretrained: $(READY)  ## Continue a real Llama, SmolLM2-135M, with LayerSkip; every exit before and after.
	$(RUN) launch/demo_pretrained.py --config=configs/continual_smollm2_135m.py --workdir=runs/smollm2

test: $(READY)  ## The tests.
	$(RUN) -m pytest -n $(JOBS) --dist loadfile --ignore=tests/parity --ignore=tests/ahead

test-parity: $(PARITY)  ## Against PyTorch transformers on the same weights (torch is large).
	$(RUN) -m pytest tests/parity

ahead: $(AHEAD)  ## The compilers for TPU and GPU, in an environment of their own: launch/compile_ahead.py.

test-ahead: $(AHEAD)  ## Programs compiled for TPUs and GPUs that are not there.
	$(AHEAD_VENV)/bin/python -m pytest -n $(JOBS) tests/ahead

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

format: $(READY)
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

lock: $(READY)  ## Resolve pyproject.toml anew into requirements.lock.
	$(RUN) -m pip install --quiet uv
	$(RUN) -m uv pip compile --quiet --universal --python-version 3.11 --extra test --no-header \
		--output-file requirements.lock pyproject.toml

clean:
	rm -rf $(VENV) $(AHEAD_VENV) runs build *.egg-info

$(READY): requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lsjax needs Python 3.11 or newer, got " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $(READY)

# torch by its exact version: a range would take a build with several GB of CUDA packages where a CPU build is at hand.
$(PARITY): $(READY)
	$(RUN) -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint requirements.lock accelerate "transformers>=5.23" "sentencepiece>=0.2.2"
	touch $(PARITY)

# Of its own: where these are installed, JAX looks for a TPU and for CUDA each time it starts.
$(AHEAD): requirements.lock pyproject.toml
	$(PYTHON) -m venv $(AHEAD_VENV)
	$(AHEAD_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(AHEAD_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock \
		"jax[cuda13-local,tpu]" libtpu==0.0.42.1
	$(AHEAD_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $(AHEAD)
