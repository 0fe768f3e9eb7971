# Two commands for users: `make run` and `make test`. The rest is for developers.
# Extra flags: make run ARGS="--server-port 9000", make run PIP_ARGS="--extra-index-url …".
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: run test check format screenshots bench bench-users soak

run: $(VENV)/installed
	$(BIN)/python app.py $(ARGS)

test: $(VENV)/installed-for-tests
	$(BIN)/python -m pytest $(ARGS)

check: $(VENV)/installed-for-tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/installed-for-tests
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Photographs the real page with the real model for the README.
screenshots: $(VENV)/installed-for-tests
	$(BIN)/python -m pytest tests/test_screenshots.py --screenshots assets

# The engine beside llama.cpp and Transformers; exit code 1 where a target is missed. Wants a quiet
# machine and half an hour: make bench ARGS="--rounds 3 --rows decode-64 prefill" is shorter.
bench: $(VENV)/installed-for-tests
	$(BIN)/python -m qwen.evals.bench $(ARGS)

# The web app with many users beside llama.cpp's server; a quarter of an hour on a quiet machine.
# make bench-users ARGS="--rounds 1 --rows total first" is shorter.
bench-users: $(VENV)/installed-for-tests
	$(BIN)/python -m qwen.evals.bench_users $(ARGS)

# 32 users for half an hour: memory flat, nothing left over. ARGS="--minutes 4" is shorter.
soak: $(VENV)/installed-for-tests
	$(BIN)/python -m qwen.evals.soak $(ARGS)

$(VENV)/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or later is needed; say which with: make run PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt $(PIP_ARGS)
	@touch $@

$(VENV)/installed-for-tests: $(VENV)/installed requirements-test.txt requirements-evals.txt
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements-test.txt $(PIP_ARGS)
	./scripts/install_chromium.sh $(BIN)/python
	@touch $@
