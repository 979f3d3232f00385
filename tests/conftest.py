"""Lists the fixture modules, `tests/fixtures/fix_*.py`."""

from pathlib import Path

# Its plugin would import it at the run's end, where garbage that is collected meanwhile trips up Python 3.11's parser.
import hypothesis  # noqa: F401
import pytest

# Before the first of them is imported, for they import one another.
pytest.register_assert_rewrite("tests.fixtures")
pytest_plugins = [
    f"tests.fixtures.{path.stem}" for path in sorted(Path(__file__).with_name("fixtures").glob("fix_*.py"))
]
