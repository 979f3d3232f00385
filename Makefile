export PYTHONSAFEPATH = 1

.PHONY: venv check test demo chaos bench

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

chaos: venv  # see docs/reliability.md; PYTHONSAFEPATH keeps tests/ from being found
	PYTHONSAFEPATH= .venv/bin/python -u -m tests.chaos $(if $(ROUNDS),--rounds $(ROUNDS)) $(if $(SEED),--seed $(SEED)) $(if $(MINUTES),--minutes $(MINUTES)) $(CHAOS)

bench: venv  # see docs/performance.md
	PYTHONSAFEPATH= .venv/bin/python -u -m benchmarks $(CASES) $(if $(ROUNDS),--rounds $(ROUNDS)) $(if $(SCALE),--scale $(SCALE))
