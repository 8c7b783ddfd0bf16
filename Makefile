# make test, make demo, make docs, make bench: each sets up by itself; needs Python 3.11 or newer (PYTHON=...), git and make alone.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
# Set-up compiles no module; the first process that imports one does, and must be allowed to keep it.
unexport PYTHONDONTWRITEBYTECODE
OFFLINE := HF_HUB_OFFLINE=1 WANDB_MODE=offline WANDB_SILENT=true

.PHONY: test test-long types tests demo docs bench clean

# Types are checked beside the tests, which leave a core idle while their last file runs.
test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@$(MAKE) --no-print-directory -j 2 tests types

types: .venv/installed
	$(BIN)/mypy
	$(BIN)/mypy train

# In the order of testpaths, which ends with files of a few docstrings: no process ends alone. Three
# workers on two cores: tests wait for browsers, processes and sinks.
tests: .venv/installed
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder -m "not long"

# What takes half a minute and more, and the rest of sweeps of which make test has a part: the demo,
# the notebook, killed runs, the model zoo, memory of every engine with every mask, compiled kernels.
test-long: .venv/installed
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m long

demo: .venv/installed
	@$(BIN)/python train/demo.py

docs: .venv/installed
	@$(OFFLINE) NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --clean --quiet
	@echo "site/index.html opens without a server"

bench: .venv/installed
	@$(PIP) install -c constraints.txt -e ".[bench]"
	@status=0; for script in $$(grep -l '"__main__"' tests/bench/*.py); do \
		echo "== $$script"; $(OFFLINE) $(BIN)/python $$script || status=1; \
	done; exit $$status

# Once for each state of the two files; a failed set-up leaves no stamp.
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("stabmon needs Python 3.11 or newer: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	@echo "Setting up .venv (once; a few minutes) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(PIP) install --no-compile -c constraints.txt -e ".[dev]"
	@touch $@

clean:
	rm -rf .venv site
