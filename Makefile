# Two commands for a stranger: `make demo` and `make test`. Both build .venv and install what they need.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: demo test test-all lint types pytest docs browser fuzz faults distributed test-oldest test-newest dist audit clean
demo: $(VENV)/.train
	$(BIN)/mirrormask demo

test: lint types docs pytest

# Every case of every law, and what takes long: before a release, and after a change that reaches far.
test-all: lint types docs browser
	$(BIN)/python -m pytest -n 2 --dist worksteal --durations=15

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test
	$(BIN)/mypy

# The site, into build/site. Strict: a broken link or a name that is not there fails.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

pytest: $(VENV)/.test browser
	$(BIN)/python -m pytest -n 2 --dist worksteal --durations=15 --sample

# The page of `mirrormask report` is tested in a real Chromium; where none can be had those tests say so and are skipped.
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo -n)
browser:
	@command -v chromedriver >/dev/null || ! command -v apt-get >/dev/null || \
	{ $(SUDO) apt-get update -qq; $(SUDO) apt-get install -y -qq chromium chromium-driver; } >/dev/null 2>&1 || \
	echo "chromium could not be installed; the browser tests are skipped"

# Readers against coverage-guided inputs, ten minutes for model files and two for each other kind of file, and at least
# 100,000 inputs each; `make test` has a short run.
READERS := recipe checkpoint log result distributions predictions bench structure
fuzz: $(VENV)/.test
	$(BIN)/python tests/fuzz/fuzz_load.py --seconds 600
	for reader in $(READERS); do $(BIN)/python tests/fuzz/fuzz_readers.py $$reader -runs=100000 || exit 1; done

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

# The lower bounds of pyproject.toml on the oldest Python, and the newest of everything on the newest one, each with a
# small part of the tests: steps, masks, files, recipes, a run. Both fetch gigabytes the first time.
SMOKE := tests/optimizer/test_protocol.py tests/masks/test_mask_selection.py tests/storage/test_roundtrip.py \
	tests/train/test_recipe.py tests/train/test_schedule.py
OLDEST ?= python3.10
NEWEST ?= python3.13
test-oldest:
	$(OLDEST) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet uv
	.venv-oldest/bin/uv pip install --quiet --python .venv-oldest --resolution lowest-direct '.[train]' \
		'pytest>=8.2' 'hypothesis>=6.100' 'expecttest>=0.2'
	.venv-oldest/bin/python -m pytest -p no:cacheprovider $(SMOKE)

test-newest:
	$(NEWEST) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --upgrade '.[train]' pytest hypothesis expecttest
	.venv-newest/bin/python -m pytest -p no:cacheprovider $(SMOKE)

# The wheel and the sdist, built from a clean tree and checked; `make pytest` tests what such a wheel installs.
dist: $(VENV)/bin/python
	rm -rf dist
	$(BIN)/python -m pip install --quiet build twine
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python -m twine check --strict dist/*

# Known weaknesses of what is installed; SECURITY.md says what each finding that is left means here.
audit: $(VENV)/.train
	$(BIN)/python -m pip install --quiet pip-audit
	$(BIN)/python -m pip_audit --skip-editable --progress-spinner off

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest build dist
