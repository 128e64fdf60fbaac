# The two commands of the README are `make run` and `make test`; the others are for those who work on gradwise.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: run test check claims bench stubs clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $(READY)

$(VENV)/.dev: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

$(VENV)/.bench: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	touch $@

run: $(READY)  ## compare six optimizers on real data and write report.html
	$(BIN)/gradwise compare --task digits --methods adamw,adabelief,lion,adamp,sgdp,sgd --seeds 5 --trials 12 --budget steps=300 --out runs/digits --report report.html

test: $(VENV)/.dev  ## the whole test suite
	$(BIN)/python -m pytest -n 2 -q

check: $(VENV)/.dev  ## style, types, architecture, docstrings
	$(BIN)/ruff check src tests benchmarks examples .ci
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python .ci/room_stubs.py --check
	$(BIN)/python .ci/public_names_are_documented.py

claims: $(READY)  ## run every paper's claim, keep the verdicts, rewrite CLAIMS.md
	$(BIN)/gradwise reproduce --all

bench: $(VENV)/.bench  ## speed and memory beside the peers, as ratios from one run
	$(BIN)/python -m benchmarks

stubs: $(READY)  ## write what each room exports into its __init__.pyi, for type checkers
	$(BIN)/python .ci/room_stubs.py

clean:
	rm -rf $(VENV) runs report.html
