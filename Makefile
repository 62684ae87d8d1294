# Needs only Python >= 3.11 (PYTHON=python3.12 make ... to choose one) and make.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
SOURCES = sb3_consistency tests examples

.PHONY: quickstart test pytest lint type format check-codestyle commit-checks constraints robotics clean

quickstart: $(STAMP)
	$(PY) examples/01_quickstart.py

test: commit-checks pytest

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and f'Python 3.11 or newer is needed, {sys.executable} is older; set PYTHON=...')"
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet -c constraints.txt torch
	$(PY) -m pip install --quiet -c constraints.txt -e ".[all]"
	touch $(STAMP)

pytest: $(STAMP)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --durations=25 --cov --cov-report=term:skip-covered

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

# FrankaKitchen and the Fetch tasks need the older MuJoCo
robotics:
	$(PYTHON) -m venv .venv-robotics
	.venv-robotics/bin/python -m pip install --quiet -c constraints-robotics.txt torch
	.venv-robotics/bin/python -m pip install --quiet -c constraints-robotics.txt -e ".[all]"
	OMP_NUM_THREADS=1 .venv-robotics/bin/python -m pytest tests/test_robotics.py

constraints: $(STAMP)
	$(PY) -m pip freeze --exclude-editable --exclude sb3-consistency | sed 's/+cpu//' > constraints.txt
	sed 's/^mujoco==.*/mujoco==3.3.7/; /^mujoco-core==/d; /^mujoco-studio==/d' constraints.txt > constraints-robotics.txt

clean:
	rm -rf $(VENV) .venv-robotics build dist
