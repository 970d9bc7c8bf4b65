# Two commands for a stranger: `make demo` and `make test`. Both build .venv and install what they need.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: demo test lint types pytest browser fuzz faults distributed clean
demo: $(VENV)/.train
	$(BIN)/mirrormask train recipes/digits-mlp.yaml --method pilot,mirror --out runs/demo --overwrite true

test: lint types pytest

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test
	$(BIN)/mypy

pytest: $(VENV)/.test browser
	$(BIN)/python -m pytest -n 2 --dist worksteal --durations=15

# The page of `mirrormask report` is tested in a real Chromium; where none can be had those tests say so and are skipped.
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo -n)
browser:
	@command -v chromedriver >/dev/null || ! command -v apt-get >/dev/null || \
	{ $(SUDO) apt-get update -qq; $(SUDO) apt-get install -y -qq chromium chromium-driver; } >/dev/null 2>&1 || \
	echo "chromium could not be installed; the browser tests are skipped"

# The reader of model files against ten minutes of coverage-guided inputs; `make test` has a short run.
fuzz: $(VENV)/.test
	$(BIN)/python tests/fuzz/fuzz_load.py --seconds 600

# 200 kills of runs, damaged checkpoints and limits on the size of files; `make test` has a short run.
faults: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python tests/faults/faults.py --kills 200

# Worlds of processes: two nodes, launchers, hooks, 30 processes killed; `make test` has 90 seconds of it.
distributed: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "distributed or not distributed" --durations=15 tests/distributed

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# The package is built and installed, not linked: what the tests see is what a user's pip would install.
SOURCES := $(shell find src -type f -not -name '*.pyc')
$(VENV)/.%: $(VENV)/bin/python pyproject.toml constraints.txt README.md $(SOURCES)
	$(BIN)/python -m pip install --quiet -c constraints.txt '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) build dist
