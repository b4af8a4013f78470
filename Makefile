# Two commands are all a newcomer needs: `make demo` and `make test`. Both create .venv on first use.
PYTHON ?= $(shell command -v python3.12 || command -v python3)
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest -m "not gpu and not slow"

.PHONY: demo test first-half second-half functional unit lint docs clean

# The environment is rebuilt when pyproject.toml changes. uv does in seconds what pip does in minutes.
.venv/.ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12))' || { echo "Python 3.12 or newer is needed: make PYTHON=/path/to/python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python "torch==2.13.0" -e ".[dev]"
	@touch $@

demo: .venv/.ready
	$(BIN)/python examples/demo.py

lint: .venv/.ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Two halves at a time, as ranks wait for each other: on two cores neither alone keeps both busy. What the second says
# comes when it is through.
LATER := tests/functional/test_[m-z]*.py

test: lint
	@$(MAKE) --no-print-directory --keep-going --jobs=2 first-half second-half

first-half: .venv/.ready
	$(PYTEST) tests/functional --ignore-glob='$(LATER)'

second-half: .venv/.ready
	@said=$$(mktemp); $(PYTEST) -p no:cacheprovider tests/unit >"$$said" 2>&1; status=$$?; \
	$(PYTEST) -p no:cacheprovider $(LATER) >>"$$said" 2>&1 || status=1; cat "$$said"; rm "$$said"; exit $$status

functional: .venv/.ready
	$(PYTEST) tests/functional

unit: .venv/.ready
	$(PYTEST) tests/unit

docs: .venv/.ready
	$(BIN)/python -m bridge.mapping.docs > docs/mapping.md
	$(BIN)/python -m recipes.slurm.published

clean:
	rm -rf .venv .demo build dist *.egg-info
