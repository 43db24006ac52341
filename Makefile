# Every target makes its own virtual environment first; PYTHON=... chooses the interpreter (3.11 or newer).
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
JOBS ?= 2

.PHONY: demo test lint format lock clean

demo: $(READY)  ## Train a small LayerSkip Llama on real text and benchmark its decoding.
	$(RUN) launch/demo.py --config=configs/demo.py --workdir=runs/demo

test: $(READY)  ## Everything CI runs but lint.
	$(RUN) -m pytest -n $(JOBS) --dist loadfile

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
	rm -rf $(VENV) runs build *.egg-info

$(READY): requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lsjax needs Python 3.11 or newer, got " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $(READY)
