# make demo: set up and run the example sweep. make test: set up and run the tests. make ui: browse the results.
# make report [STUDY=name]: the report of what was run.
VENV ?= .venv
PYTHON ?= python3
PORT ?= 5000
STORAGE ?= mlruns
BIN = $(VENV)/bin
# The active environment's MLflow, if it has one: to look at results takes no other environment.
MLFLOW = $(wildcard $(addsuffix /bin/mlflow,$(or $(VIRTUAL_ENV),$(CONDA_PREFIX))))

.PHONY: demo test test-slow lint llama ui report clean

demo: $(VENV)/.ready
	$(BIN)/python launch.py -m method=rtn,gptq,awq bits=2,3,4

# Two workers: many tests wait for processes of their own. tests/conftest.py says what comes first.
# test-slow: the rest, which CI runs as well.
test: $(VENV)/.ready
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

test-slow: $(VENV)/.ready
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m slow

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy q3q hydra_plugins/q3q launch.py tests benchmarks

# llama.cpp from its sources, which takes a compiler and at most nine minutes of one core; the slow
# tests of GGUF files then run it. pip keeps the wheel that it builds, for any x86-64 with AVX2.
llama: .venv-llama/.ready

.venv-llama/.ready: constraints.txt
	$(PYTHON) -m venv .venv-llama
	CMAKE_ARGS="-DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF" .venv-llama/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt llama-cpp-python
	touch $@

ui: $(if $(MLFLOW),,$(VENV)/.ready)
	$(or $(MLFLOW),$(BIN)/mlflow) ui --backend-store-uri 'sqlite:///$(STORAGE)/mlflow.db' --host 127.0.0.1 --port $(PORT)

report: $(VENV)/.ready
	$(BIN)/python -m q3q.report --storage $(STORAGE) $(if $(STUDY),--study $(STUDY))

clean:
	rm -rf $(VENV) .venv-llama

# One environment for all of them, made anew when what it is made of changes.
$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "q3q needs Python 3.11 or newer, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@
