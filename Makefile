# Needs only Python 3.11 to 3.13 (PYTHON=python3.12 make ... to choose one) and make.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
QUICK := $(VENV)/.quickstart
DOCS := $(VENV)/.docs
SOURCES = sb3_consistency tests examples docs
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --durations=25
INSTALL := -m pip install --progress-bar off -c constraints.txt

.PHONY: quickstart test pytest coverage lint type format check-codestyle commit-checks docs figures notebooks dist version-is floors constraints robotics libraries clean

# what the quickstart needs, and no more: `make test` installs the rest into the same environment
quickstart: $(QUICK)
	$(PY) examples/01_quickstart.py

test: commit-checks pytest

$(VENV)/bin/pip:
	$(PYTHON) -c "import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14) and f'Python 3.11 to 3.13 is needed, {sys.executable} is {sys.version.split()[0]}; set PYTHON=...')"
	$(PYTHON) -m venv $(VENV)

$(QUICK): $(VENV)/bin/pip pyproject.toml constraints.txt
	$(PY) $(INSTALL) --no-compile -e ".[export]" matplotlib
	touch $(QUICK)

$(STAMP): $(VENV)/bin/pip pyproject.toml constraints.txt
	$(PY) $(INSTALL) -e ".[all]"
	touch $(STAMP) $(QUICK)

$(DOCS): $(STAMP)
	$(PY) $(INSTALL) -e ".[docs]"
	touch $(DOCS)

pytest: $(STAMP)
	$(PYTEST)

# the same tests, traced: not in `test`, for it makes them much slower
coverage: $(STAMP)
	$(PYTEST) --cov --cov-report=term:skip-covered

lint: $(STAMP)
	$(PY) -m ruff check $(SOURCES)
	$(VENV)/bin/lint-imports

type: $(STAMP)
	$(PY) -m mypy

format: $(STAMP)
	$(PY) -m ruff check --fix $(SOURCES)
	$(PY) -m ruff format $(SOURCES)

check-codestyle: lint
	$(PY) -m ruff format --check $(SOURCES)

commit-checks: check-codestyle type

# the site, in build/docs/index.html; a warning or a broken internal link is an error
docs: $(DOCS)
	$(PY) -m sphinx -W -n -q docs build/docs

# the pictures of docs/results, from the records in docs/notebook/records
figures: $(STAMP)
	$(PY) docs/figures.py

# the examples, run as notebooks into docs/examples: a quarter of an hour
notebooks: $(DOCS)
	OMP_NUM_THREADS=1 $(PY) docs/notebooks.py

# wheel and sdist: built, checked, and the wheel tried in an empty environment without extras
dist:
	rm -rf dist build/tools-venv build/wheel-venv
	$(PYTHON) -m venv build/tools-venv
	build/tools-venv/bin/python -m pip install --quiet build twine check-wheel-contents
	build/tools-venv/bin/python -m build
	build/tools-venv/bin/python -m twine check --strict dist/*
	build/tools-venv/bin/check-wheel-contents dist/*.whl
	$(PYTHON) -m venv build/wheel-venv
	build/wheel-venv/bin/python $(INSTALL) dist/*.whl
	build/wheel-venv/bin/python -I tests/snippets.py README.md

# make version-is TAG=v0.1.0: the tag of a release is the version of the package
version-is:
	grep -q '^__version__ = "$(TAG:v%=%)"$$' sb3_consistency/__init__.py
	grep -q '^version: $(TAG:v%=%)$$' CITATION.cff

# the oldest versions that pyproject.toml allows
floors:
	$(PYTHON) -m venv build/floors-venv
	build/floors-venv/bin/python -m pip install --quiet uv
	build/floors-venv/bin/uv pip compile --quiet --resolution lowest-direct --extra all pyproject.toml -o build/floors.txt
	build/floors-venv/bin/uv pip install --quiet --python build/floors-venv/bin/python -r build/floors.txt
	build/floors-venv/bin/uv pip install --quiet --python build/floors-venv/bin/python --no-deps -e .
	OMP_NUM_THREADS=1 build/floors-venv/bin/python -m pytest -n 2

# FrankaKitchen and the Fetch tasks need the older MuJoCo
robotics:
	$(PYTHON) -m venv .venv-robotics
	.venv-robotics/bin/python -m pip install --quiet -c constraints-robotics.txt torch
	.venv-robotics/bin/python -m pip install --quiet -c constraints-robotics.txt -e ".[all]"
	OMP_NUM_THREADS=1 .venv-robotics/bin/python -m pytest tests/test_robotics.py

# files of OGBench, robomimic and LeRobot, written and read by the libraries themselves; the latter two in environments of their own
libraries: $(STAMP)
	$(PY) $(INSTALL) --quiet ogbench
	$(PYTHON) -m venv build/robomimic-venv
	build/robomimic-venv/bin/python -m pip install --quiet robomimic six
	python3.12 -m venv build/lerobot-venv
	build/lerobot-venv/bin/python -m pip install --quiet "lerobot[dataset]>=0.6"
	OMP_NUM_THREADS=1 $(PY) -m pytest -m "slow or not slow" tests/test_format_libraries.py

constraints: $(DOCS)
	echo "# The exact versions that CI and the README's commands install. Regenerate: make constraints" > constraints.txt
	$(PY) -m pip freeze --exclude-editable --exclude sb3-consistency | sed 's/+cpu//' >> constraints.txt
	sed 's/^mujoco==.*/mujoco==3.3.7/; /^mujoco-core==/d; /^mujoco-studio==/d' constraints.txt > constraints-robotics.txt

clean:
	rm -rf $(VENV) .venv-robotics build dist
