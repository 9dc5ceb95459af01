# make demo: explain a photograph of a cat, into demo/chelsea.png.   make test: run the tests.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test
.DELETE_ON_ERROR:

demo: .venv/demo.stamp
	$(BIN)/cfcam demo --out demo

test: .venv/test.stamp
	$(BIN)/python -m pytest tests

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "make: Python 3.10 or later is needed; name one with make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -m venv .venv || { rm -rf .venv; \
		echo "make: $(PYTHON) -m venv failed; on Debian and Ubuntu: sudo apt install python3-venv" >&2; exit 1; }

# Editable, so that the checkout itself is what runs; again where the requirements or what is compiled changed.
.venv/%.stamp: setup.py cfcam_gpu/clustering/host.c | $(BIN)/python
	$(BIN)/python -m pip install -e '.[$*]'
	@touch $@
