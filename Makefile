# Every target runs in .venv, which is made once from setup.cfg and constraints.txt and reused until one of them changes.
PYTHON ?= python3
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
PYTEST := $(BIN)/python -m pytest -n $(WORKERS)

# Nothing below talks to the Hub.
export HF_HUB_OFFLINE := 1
# Where WORKERS processes share the cores, each has one thread.
test check: export OMP_NUM_THREADS ?= 1

# torchao, which transformers imports where it is installed, names every GPU kernel that it cannot load.
demo: export TORCHAO_FORCE_SKIP_LOADING_SO_FILES := 1
demo: export TORCH_LOGS := -torch.utils

.PHONY: demo test check slow venv format

demo: venv
	$(BIN)/python -m hf_perceiver.demo

test: venv
	$(PYTEST) -m "not slow"

check: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTEST) -m "not slow and not medium"

slow: venv
	$(BIN)/python -m pytest -m slow

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

venv: $(STAMP)

# The stamp goes first and comes back last: an interrupted installation is taken up again, never taken for finished.
# torch comes alone and first, from wherever pip is configured to look; the build tools are the pinned ones too.
$(STAMP): setup.cfg constraints.txt
	rm -f $@
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(PIP) "$$(grep '^torch==' constraints.txt)" setuptools
	$(PIP) --no-build-isolation -e '.[test]'
	touch $@
