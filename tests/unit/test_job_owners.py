"""Rows of the table of jobs, in COPY's text format, whose policies are given to the role that migrates."""

from __future__ import annotations

from live_migration.coordinator.job_owners import give_policies

COLUMNS = ["id", "proc_schema", "owner", "config"]
POLICY = rb"1000	_timescaledb_functions	app	{"
ACTION = rb"1001	public	app	\N"


def test_policies_are_given_and_nothing_else_is_changed() -> None:
    given = give_policies(POLICY + b"\n" + ACTION + b"\n", COLUMNS, "mover")
    assert given == POLICY.replace(b"app", b"mover") + b"\n" + ACTION + b"\n"


def test_a_name_that_is_quoted_and_escaped() -> None:
    given = give_policies(POLICY + b"\n", COLUMNS, '"A\\b"')
    assert given == POLICY.replace(b"app", b'"A\\\\b"') + b"\n"
