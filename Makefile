# make demo: explain a photograph of a cat, into demo/chelsea.png.   make test: check the style and the types, run the tests.
# make lint: the style and the types alone.   make docs: the documentation, into site/.   make test-ray: the tests of Ray.
# make test-compiled: the tests that compile networks and files.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo lint test test-ray test-compiled docs
.DELETE_ON_ERROR:

define LINT
$(BIN)/ruff check .
$(BIN)/ruff format --check .
$(BIN)/mypy
endef

demo: .venv/demo.stamp
	$(BIN)/cfcam demo --out demo

lint: .venv/lint.stamp
	$(LINT)

test: .venv/test.stamp
	$(LINT)
	$(BIN)/python -m pytest tests -n auto -m "not ray and not inductor"

# Not part of make test, because Ray and its workers take longer to begin than most tests to run: two minutes on two cores.
test-ray: .venv/test.stamp .venv/ray.stamp
	$(BIN)/python -m pytest tests/test_ray.py

# Not part of make test, because Inductor compiles C++: minutes.
test-compiled: .venv/test.stamp
	$(BIN)/python -m pytest tests -m inductor

docs: .venv/docs.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "make: Python 3.10 or later is needed; name one with make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -m venv .venv || { rm -rf .venv; \
		echo "make: $(PYTHON) -m venv failed; on Debian and Ubuntu: sudo apt install python3-venv" >&2; exit 1; }

# Editable, so that the checkout itself is what runs; again where the requirements or what is compiled changed.
.venv/%.stamp: setup.py cfcam_gpu/clustering/host.c | $(BIN)/python
	$(BIN)/python -m pip install -e '.[$*]'
	@touch $@
