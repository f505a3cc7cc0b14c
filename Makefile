# Two commands for a fresh clone with Python 3.11+ and make:
#   make serve   an environment, the package, the digits example on port 8080
#   make test    an environment with all that the tests need; lint, types, all tests
# PORT=9000 or HOST=0.0.0.0 change where `make serve` listens.

PYTHON ?= python3
HOST ?= 127.0.0.1
PORT ?= 8080
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: serve test lint types tests bench clean

serve: $(VENV)/installed
	$(BIN)/python examples/digits/app.py --host $(HOST) --http_port $(PORT)

test: lint types tests

lint: $(VENV)/test-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/test-installed
	$(BIN)/mypy

# Two at a time, file by file: most tests wait for something. `pytest -m "not ray"`
# leaves out those that start Ray, which take some four minutes.
tests: $(VENV)/test-installed
	$(BIN)/pytest -n 2 --dist loadfile

bench: $(VENV)/installed
	$(BIN)/python bench/compare.py

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "kserve-lite needs Python 3.11 or later: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml | $(BIN)/python
	$(BIN)/pip install --quiet --editable .
	touch $@

# torch and torchvision in one go, the index's own build: a CPU-only torch cannot be
# imported by the index's torchvision.
$(VENV)/test-installed: pyproject.toml | $(BIN)/python
	$(BIN)/pip install --quiet --editable '.[torch,test]'
	touch $@ $(VENV)/installed

clean:
	rm -rf $(VENV)
