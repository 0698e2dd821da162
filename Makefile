# One word for each habit. `make demo` and `make test` work on a fresh clone with nothing installed.
PY := .venv/bin/python
PIP_FLAGS := --quiet --disable-pip-version-check -c constraints.txt
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
K ?=
SLOW ?=

.PHONY: setup lint test demo bench study docs capabilities lines
setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	test -x $(PY) || python3 -m venv .venv
	$(PY) -m pip install $(PIP_FLAGS) torch
	$(PY) -m pip install $(PIP_FLAGS) -e '.[dev]'
	touch .venv/ready

lint: setup
	.venv/bin/ruff format --check src tests
	.venv/bin/ruff check src tests
	.venv/bin/mypy
	.venv/bin/lint-imports

test: setup
	$(PY) -m pytest $(if $(SLOW),,-m "not slow") $(if $(K),-k "$(K)",-n 2)

demo: setup
	$(PY) -m veneer.cli.demo

bench: setup
	$(PY) -m veneer bench

# The full protocol; nights. It stops and goes on at any moment.
study: setup
	for s in text images proteins; do $(PY) -m veneer compare studies/study-$$s.toml --yes || exit 1; done
	$(PY) -m veneer compare --across runs/study-text --across runs/study-images --across runs/study-proteins --output runs/study

docs: setup
	$(PY) -m veneer.cli.docs docs

capabilities: setup
	$(PY) tests/capabilities.py

lines:
	@for d in src/veneer/*/; do printf '%6d %s\n' $$(cat $$d*.py | wc -l) $$d; done
