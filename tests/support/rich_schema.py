"""A schema with something of everything, for tests of dump and restore."""

from __future__ import annotations

from pathlib import Path

RICH_SCHEMA = Path(__file__).with_name("rich.sql").read_text()
