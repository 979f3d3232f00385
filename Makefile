export PYTHONSAFEPATH = 1

.PHONY: venv check test demo chaos

venv: .venv/stamp

.venv/stamp: pyproject.toml
	test -x .venv/bin/python || python3 -m venv .venv
	.venv/bin/pip install --quiet --editable '.[test]'
	touch $@

check: venv
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/lint-imports

test: venv
	.venv/bin/pytest -n 2 --dist loadfile

demo: venv
	.venv/bin/live-migration demo

ROUNDS ?= 5
SEED ?= 1
chaos: venv  # see docs/reliability.md; PYTHONSAFEPATH keeps tests/ from being found
	PYTHONSAFEPATH= .venv/bin/python -u -m tests.chaos --rounds $(ROUNDS) --seed $(SEED) $(if $(MINUTES),--minutes $(MINUTES)) $(CHAOS)
