# Two commands: `make app` opens the dashboard, `make test` runs the tests. Each sets up all it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PORT ?= 8501

.PHONY: app test test-all check bench bench-quality bench-gpu clean chromium

app: $(VENV)/.app
	$(BIN)/bitpress app --port $(PORT)

test: $(VENV)/.dev chromium
	$(BIN)/pytest -m "not slow and not network and not gpu and not bench"

test-all: $(VENV)/.dev chromium
	$(BIN)/pytest -m "not bench"

check: $(VENV)/.dev
	$(BIN)/ruff check .
	@mkdir -p .mypy_cache/root && ln -sfn ../.. .mypy_cache/root/bitpress
	MYPYPATH=.mypy_cache/root $(BIN)/mypy -p bitpress.engine -p bitpress.kernels

bench: $(VENV)/.dev chromium
	$(BIN)/python -m bitpress.engine.bench

# RIVALS: a folder with one virtual environment for each library to compare with; those that are absent are skipped and named. It takes hours and
# says how many first; ONLY names the benches to run, such as ONLY="depth-speed dual-encoder".
bench-quality: $(VENV)/.dev
	$(BIN)/python tests/bench/every.py $(if $(RIVALS),--rivals $(RIVALS)) $(if $(ONLY),--only $(ONLY))

# Needs an NVIDIA GPU, and says so where there is none.
bench-gpu: $(VENV)/.dev
	$(BIN)/python -m bitpress.kernels.bench_gpu && $(BIN)/python -m bitpress.engine.decode_shape --shape 7b

# One resolve with every version pinned: torch alone can pull gigabytes when left to choose.
$(VENV)/.app: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	@touch $@ $(VENV)/.app

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Bitpress needs Python 3.11 or newer; set PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); $(APT) python3-venv && $(PYTHON) -m venv $(VENV); }

# The browser tests drive Debian's Chromium. Where it cannot be installed they skip and say so.
chromium:
	@command -v chromium >/dev/null || $(APT) chromium || echo "Chromium could not be installed: the browser tests will be skipped."

APT = sh -c 'S=; [ "$$(id -u)" = 0 ] || S="sudo -n"; $$S apt-get update -qq && $$S env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$$0" >/dev/null'

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
