"""Cutting pg_restore's script into entries."""

from __future__ import annotations

import pytest

from live_migration.common.errors import FormatError
from live_migration.coordinator.dump_script import Entry, parse_script
from live_migration.coordinator.post_data import sort_post_data

HEAD = """--
-- PostgreSQL database dump
--

\\restrict abcDEF

-- Dumped from database version 18.6

SET statement_timeout = 0;
SET transaction_timeout = 0;
SELECT pg_catalog.set_config('search_path', '', false);
"""
TAIL = """
-- Completed on 2026-11-23 22:53:37 UTC

--
-- PostgreSQL database dump complete
--

\\unrestrict abcDEF

"""


def put_entry(
    statements: str, *, name: str = "t", kind: str = "TABLE", catalog: int = 1259, oid: int = 1, schema: str = "app"
) -> str:
    return (
        f"\n--\n-- TOC entry 12 (class {catalog} OID {oid})\n-- Dependencies: 3 4\n"
        f"-- Name: {name}; Type: {kind}; Schema: {schema}; Owner: -\n-- Data Pos: 0\n--\n\n{statements}\n\n"
    )


def parse(*entries: str) -> list[Entry]:
    return parse_script(HEAD + "".join(entries) + TAIL)


def test_entries_carry_their_catalog_row_and_only_their_statements() -> None:
    (entry,) = parse(put_entry("CREATE TABLE app.t ();", oid=77))
    assert entry == Entry(1259, 77, "t", "TABLE", "app", "CREATE TABLE app.t ();", number=12, needs=(3, 4))
    assert entry.label == "table app.t"


FORGED = "--\n-- TOC entry 9 (class 0 OID 0)\n-- Name: x; Type: TABLE; Schema: a; Owner: -\n--\n"


@pytest.mark.parametrize(
    "statements",
    [
        f"CREATE FUNCTION f() AS $$\n{FORGED}$$;",
        f"CREATE FUNCTION f() AS $_$ $$\n{FORGED}$_$;",
        f"COMMENT ON TABLE t IS 'it''s\n{FORGED}';",
        f"COMMENT ON TABLE t IS E'\\'\n{FORGED}';",
        f'COMMENT ON TABLE "o""\n{FORGED}" IS NULL;',
        f"/* a /* b */\n{FORGED}*/ SELECT 1;",
        "SELECT a$b$c, 1; -- it's",
        "CREATE FUNCTION f() AS $$\nSET default_tablespace = x;\n$$;",
    ],
)
def test_what_stands_in_quotes_or_comments_is_no_entry(statements: str) -> None:
    first, second = parse(put_entry(statements), put_entry("SELECT 2;", oid=2))
    assert first.statements == statements
    assert second.statements == "SELECT 2;"


def test_defaults_set_between_entries_hold_for_those_that_follow() -> None:
    first, second, third = parse(
        put_entry("SELECT 1;\n\n\nSET default_tablespace = '';\n\nSET default_table_access_method = heap;"),
        put_entry("SELECT 2;\n\nSET default_table_access_method = columnar;"),
        put_entry("SELECT 3;"),
    )
    assert first.statements == "SELECT 1;"
    assert first.defaults == ()
    assert second.defaults == (("default_tablespace", "''"), ("default_table_access_method", "heap"))
    assert third.defaults == (("default_tablespace", "''"), ("default_table_access_method", "columnar"))


def test_a_name_may_look_like_the_rest_of_the_header() -> None:
    (entry,) = parse(put_entry("SELECT 1;", name="a; Type: VIEW; b"))
    assert (entry.name, entry.type) == ("a; Type: VIEW; b", "TABLE")


def test_an_empty_archive_has_no_entries() -> None:
    assert parse() == []


def test_an_unknown_head_is_an_error() -> None:
    with pytest.raises(FormatError, match="cannot be read"):
        parse_script("--\n-- TOC entry 1; something new\n--\n")


def make(kind: str, *, catalog: int = 0, oid: int = 0, name: str = "n") -> Entry:
    return Entry(catalog, oid, name, kind, "app", "SELECT 1;")


def test_post_data_is_sorted_by_when_it_is_run() -> None:
    built, root = make("INDEX", catalog=1259, oid=1), make("CONSTRAINT", catalog=2606, oid=2)
    attach, view_index = make("INDEX ATTACH"), make("INDEX", catalog=1259, oid=3)
    key, trigger = make("FK CONSTRAINT", catalog=2606, oid=4), make("TRIGGER", catalog=2620, oid=5)
    event, comment = make("EVENT TRIGGER", catalog=3466, oid=6), make("COMMENT", name="CONSTRAINT k ON t")
    ours, theirs = make("PUBLICATION", catalog=6104, oid=7), make("PUBLICATION", catalog=6104, oid=8)
    event_comment = make("COMMENT", name="EVENT TRIGGER e")
    entries = [built, root, attach, view_index, event, event_comment, trigger, ours, theirs, comment, key]
    found = sort_post_data(entries, built={(1259, 1)}, roots={(2606, 2)}, ours={(6104, 7)})
    assert found.partitioned == (root, attach)
    assert found.main == (view_index, trigger, theirs)
    assert found.last == (comment, event, event_comment)
