# Everything from a fresh clone: each target sets up .venv by itself, once.
# Needs python3 (3.11 to 3.14) with venv, make, and a package index.

PRESET = quick
DEVICE = auto
ONLY =
SEEDS =
LOCKED =
BENCH =
CHECK_TESTS = tests/core tests/config tests/data tests/house/test_packaging.py tests/house/test_layers.py tests/house/test_front_door.py \
	tests/house/test_surface.py tests/house/test_prose.py tests/house/test_glossary.py tests/house/test_messages.py tests/house/test_notebooks.py
FLOWER_TESTS = tests/machines/test_remote.py tests/machines/test_gate.py tests/commands/test_federate.py tests/machines/test_flower_faults.py
PYTHON = python3

BIN = .venv/bin
READY = .venv/.ready$(if $(strip $(LOCKED)),-locked)
FLOWER = .venv-flower/bin

.DEFAULT_GOAL := help
.PHONY: help figures check test test-flower attack bench lab docs wheel lock clean

help:
	@echo 'make figures   regenerate the figures into figures/gallery'
	@echo '               PRESET=quick (smoke: does it run? | paper: the published settings, for a GPU)'
	@echo '               DEVICE=auto (cpu | cuda | cuda:1 | ...)   ONLY=name (part of a name; several in quotes)   SEEDS="200 201 202"'
	@echo '               LOCKED=1 (the versions of requirements.lock, to the byte, instead of the newest that fit)'
	@echo 'make check     the quick part of the tests: style, layers, types, notebooks clean and in step with the package, units'
	@echo 'make test      all tests: style, layers, types, the notebooks, pytest'
	@echo 'make test-flower   the tests with real clients and a real server, in an environment of their own (.venv-flower)'
	@echo 'make attack    try the attacks that are tests, and count those survived: the table of docs/security.md'
	@echo 'make bench     time every round against bare compute; table and picture into benchmarks/results/'
	@echo '               DEVICE=auto   BENCH="--precision bf16 --threads 2" (benchmarks/bench.py --help lists all)'
	@echo 'make docs      the documentation as a site: _docs/index.html, to open as a file; nothing is fetched'
	@echo 'make wheel     the package as others get it: dist/*.whl and its source distribution'
	@echo 'make lock      look for newer versions and write requirements.lock again'
	@echo 'make lab       JupyterLab, beginning with "Start here" (nbs/index.ipynb)'
	@echo 'make clean     remove the environments, caches and executed notebooks; finished runs (runs/) and the gallery stay'
	@echo 'The first of them sets up .venv, a matter of minutes; later ones use it.'

# As below, but exactly what is in the lock file: each file must have one of its hashes, and nothing is built from elsewhere.
.venv/.ready-locked: requirements.lock settings.ini pyproject.toml setup.py
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip sync --compile-bytecode --python $(BIN)/python --require-hashes requirements.lock
	$(BIN)/uv pip install --python $(BIN)/python --no-deps --no-build-isolation -e .
	@touch .venv/.ready $@

# Compiled once, here: where PYTHONDONTWRITEBYTECODE is set, as in many containers, each process would compile all it imports.
.venv/.ready: settings.ini pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15) and "Python 3.11 to 3.14 is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --compile-bytecode --python $(BIN)/python -e '.[dev]'
	@touch $@

figures: $(READY)
	$(BIN)/fsl-sage-reproduce --preset $(PRESET) --device $(DEVICE) $(if $(strip $(ONLY)),--only $(ONLY)) $(if $(strip $(SEEDS)),--seeds $(SEEDS))

# What can be said without running the package: style, the direction of imports, types.
define STATIC
	$(BIN)/ruff check fsl_sage nbs figures tests benchmarks docs/site setup.py
	$(BIN)/ruff format --check --quiet tests benchmarks docs/site setup.py
	$(BIN)/lint-imports --no-cache --no-logo
	$(BIN)/mypy
endef

# What is quick to say, in 90 seconds on two cores: that, the package in step with clean notebooks, addresses of stored runs, units.
check: $(READY)
	$(STATIC)
	$(BIN)/pytest -m 'not slow' $(CHECK_TESTS)

# One thread a process: there are as many notebooks at work as there are cores. The last line is pytest's.
test: $(READY)
	$(STATIC)
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2
	$(BIN)/pytest

# Flower wants older versions of some packages than JupyterLab and Ray do. One process: the tests start several each.
.venv-flower/.ready: $(READY)
	$(PYTHON) -m venv .venv-flower
	$(BIN)/uv pip install --compile-bytecode --python $(FLOWER)/python -e '.[distributed]' pytest pytest-xdist hypothesis psutil
	@touch $@

test-flower: .venv-flower/.ready
	$(FLOWER)/pytest -n 0 $(FLOWER_TESTS)

# Attacks on processes need Flower's environment, the others what only the first has (a browser). Reports, then their table.
attack: .venv-flower/.ready
	-$(BIN)/pytest -m attack $(FLOWER_TESTS:%=--ignore=%) --junitxml=_proc/attacks.xml
	-$(FLOWER)/pytest -n 0 -m attack $(FLOWER_TESTS) --junitxml=_proc/attacks-flower.xml
	$(BIN)/python -m tests.support.attacks _proc/attacks.xml _proc/attacks-flower.xml

bench: $(READY)
	$(BIN)/python benchmarks/bench.py --device $(DEVICE) $(BENCH)

lab: $(READY)
	$(BIN)/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) --LabApp.default_url=/lab/tree/nbs/index.ipynb

# The theme announces its successor on every build.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

wheel: $(READY)
	$(BIN)/uv build --quiet

# For every platform and Python; without addresses, so that the index is the reader's own. setuptools builds this package.
lock: $(READY)
	echo 'setuptools>=83' | $(BIN)/uv pip compile setup.py - --extra dev --universal --python-version 3.11 --upgrade --quiet \
		--generate-hashes --no-emit-index-url --no-annotate --no-header --output-file requirements.lock

clean:
	rm -rf .venv .venv-flower figures/executed build dist *.egg-info .pytest_cache .ruff_cache .hypothesis _proc _docs
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	find . -name .ipynb_checkpoints -type d -prune -exec rm -rf {} +
