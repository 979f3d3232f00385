export PYTHONSAFEPATH = 1

.PHONY: venv check test demo bench

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

CASES =
ROUNDS = 3
SCALE = 1.0
bench: venv
	PYTHONSAFEPATH= .venv/bin/python -u -m benchmarks $(CASES) --rounds $(ROUNDS) --scale $(SCALE)
