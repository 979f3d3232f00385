"""Queries that asyncpg must not be asked.

asyncpg 0.32 writes eight bytes behind a Record without columns when it is freed (`record_dealloc`). Python's own allocator rounds such a
block up, so that nothing is there; with PYTHONMALLOC=malloc consumers ended by "corrupted size vs. prev_size".
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from live_migration.common import state

_PROGRAM = Path(state.__file__).parent.parent
_WITHOUT_COLUMNS = re.compile(r"(?:^|[;)])\s*select\s+from\b")


def _strings(source: Path) -> Iterator[str]:
    nodes = list(ast.walk(ast.parse(source.read_text())))
    parts = {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)


@pytest.mark.parametrize("folder", ["common", "consumer", "coordinator", "producer"])
def test_no_query_gives_rows_without_columns(folder: str) -> None:
    sources = sorted((_PROGRAM / folder).glob("*.py"))
    assert len(sources) > 3
    found = [
        f"{source.name}: {text.strip()[:60]}"
        for source in sources
        for text in _strings(source)
        if _WITHOUT_COLUMNS.search(text) and "insert into" not in text
    ]
    assert not found
