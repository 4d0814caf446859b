# `make serve` and `make test` each do the set-up they need; `make help` lists the rest.
PYTHON ?= python3
BIN := .venv/bin
MODEL ?= models/chorus-tiny
SERVE_FLAGS ?=
PEERS_BENCH ?= ../shared/bench
LOWEST := build/lowest
CLIENTS := build/clients

.DEFAULT_GOAL := help
.PHONY: help setup serve test lint types unit conformance bench format clean

help:  ## what there is
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: .venv/installed  ## a .venv in this folder with `chorus` in it

.venv/installed: pyproject.toml constraints.txt setup.py $(wildcard server/devices/cpu/native/*.cpp server/devices/cpu/native/*.h)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

serve: setup  ## start the server on the bundled model and adapters
	$(BIN)/chorus serve --model $(MODEL) --adapters adapters $(SERVE_FLAGS)

test: lint types unit  ## all checks

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

# A process for each core, four at most: each takes about 1.5 GiB. A file's tests stay together.
unit: setup
	$(BIN)/pytest --numprocesses logical --maxprocesses 4 --dist loadfile

conformance: $(LOWEST)/installed $(CLIENTS)/lm-eval/installed  ## lowest versions allowed; clients that others wrote; long tests (minutes, once installed)
	$(BIN)/pytest tests/conformance
	$(BIN)/pytest -m long
	PYTHONPATH=$(LOWEST) $(BIN)/pytest -W "ignore:Conversion of an array with ndim:DeprecationWarning" tests/model tests/lora

$(LOWEST)/installed: tests/lowest.txt | setup
	rm -rf $(LOWEST)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(LOWEST) -r $<
	touch $@

# A client with what the project has already, so that torch is not installed twice.
$(CLIENTS)/%/installed: tests/conformance/%.txt | setup
	rm -rf $(@D)
	$(PYTHON) -m venv $(@D)
	$(BIN)/python -c "import site; print(site.getsitepackages()[0])" > $$(echo $(@D)/lib/python3*/site-packages)/chorus.pth
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	touch $@

bench: setup  ## Chorus and its peers on the CPU, three rounds of models S and M (hours), into build/bench
	load_tests/peers.sh $(PEERS_BENCH) build/bench

format: setup  ## format and sort imports
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove what set-up and builds made
	rm -rf .venv build *.egg-info server/devices/cpu/native/*.so
