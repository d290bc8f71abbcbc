# `make demo` and `make test` need Python 3.11 or newer and nothing else.
PYTHON ?= python3
VENV ?= .venv
PROCESSES ?= 3
BIN := $(VENV)/bin
PROMPT ?= a red circle moving left on a black background
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: install demo test check bench soak docs lock clean

install: $(VENV)/.dev

demo: $(VENV)/.runtime
	$(BIN)/python run_wan.py "$(PROMPT)" --model miniature
	$(BIN)/python run_wan.py "$(PROMPT)" --model miniature-fast
	$(BIN)/python run_wan.py "a red ring moving left on a black background" --model miniature --lora miniature-ring

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(PROCESSES) --no-loadscope-reorder $(PYTEST_FLAGS)

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --num-workers 2 || { [ $$? -eq 2 ] && $(BIN)/mypy; }  # on a busy machine its workers may not start in time
	$(BIN)/lint-imports

# On a machine with a GPU: the true shapes. Elsewhere: the same code in small, to see that it works.
bench: $(VENV)/.dev
	cd benchmarks && for file in [a-z]*.py; do ../$(BIN)/python $$file || exit 1; done

soak: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow --timeout 3600

docs: $(VENV)/.dev
	$(BIN)/python docs/make.py

# The hashes of what a server needs, for every system; needs `uv`.
lock:
	{ sed -n '/^#/p; /^[^#]/q' requirements-hashed.txt; grep -h '==' requirements.txt requirements-server.txt | \
	  uv pip compile - --generate-hashes --universal --python-version 3.11 --no-header --no-annotate -q; } > requirements-hashed.tmp
	mv requirements-hashed.tmp requirements-hashed.txt

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# `--no-compile`: a module is compiled when it is first imported, most never are.
$(VENV)/.runtime: requirements.txt pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install -q --no-compile -r requirements.txt -e .
	touch $@

# pip uses one core, so that two install half of what is pinned each; the last line adds what those need beside it.
$(VENV)/.dev: requirements-dev.txt requirements-server.txt requirements.txt pyproject.toml | $(VENV)/bin/python
	grep -h '==' requirements.txt requirements-server.txt requirements-dev.txt > $(VENV)/pinned.txt
	awk 'NR % 2' $(VENV)/pinned.txt > $(VENV)/odd.txt
	awk 'NR % 2 == 0' $(VENV)/pinned.txt > $(VENV)/even.txt
	$(BIN)/python -m pip install -q --no-compile --no-deps -r $(VENV)/odd.txt & odd=$$!; \
	$(BIN)/python -m pip install -q --no-compile --no-deps -r $(VENV)/even.txt -e . && wait $$odd
	$(BIN)/python -m pip install -q --no-compile -r requirements-dev.txt
	touch $@ $(VENV)/.runtime
