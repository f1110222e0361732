# Each target makes what it needs; stamp files under .venv make a second call quick.
# PYTHON is the interpreter that makes the virtual environment (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/stamps
RUNS ?= runs
SOURCES := orchestrator backends policies bench tests docs/examples

.PHONY: demo test base-image appworld lint types layers bench clean

demo: $(STAMPS)/plots $(STAMPS)/bfcl
	@out=$(RUNS)/demo-$$(date +%Y%m%d-%H%M%S) && \
	  $(BIN)/rollout collect --env bfcl --split multi_turn_base --policy replay --skill 0.95 --group-size 8 \
	    --concurrency 512 --out $$out --json >/dev/null && \
	  $(BIN)/rollout status $$out --plot $$out/run.png

test: $(STAMPS)/dev $(STAMPS)/bfcl
	$(BIN)/pytest

base-image: $(STAMPS)/dev
	$(BIN)/rollout image base

appworld: $(STAMPS)/dev
	$(BIN)/rollout env install appworld

lint: $(STAMPS)/dev
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

types: $(STAMPS)/dev
	$(BIN)/mypy

layers: $(STAMPS)/dev
	$(BIN)/lint-imports

bench: $(STAMPS)/plots $(STAMPS)/bfcl
	$(BIN)/rollout bench overhead
	$(BIN)/rollout bench density
	$(BIN)/rollout bench recovery

clean:
	rm -rf $(VENV) dist build .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis

# Some distributions ship Python without ensurepip; then the system's pip fills the new environment.
$(STAMPS)/venv:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) 2>/dev/null || \
	  { $(PYTHON) -m venv --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install -q pip; }
	mkdir -p $(STAMPS)
	touch $@

$(STAMPS)/plots: $(STAMPS)/venv pyproject.toml
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[plots]'
	touch $@

$(STAMPS)/dev: $(STAMPS)/plots
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[plots,dev]'
	touch $@

# Installing an installed environment takes a fraction of a second, and its files may be gone: no stamp.
.PHONY: $(STAMPS)/bfcl
$(STAMPS)/bfcl: | $(STAMPS)/plots
	@$(BIN)/rollout env install bfcl
