"""`validate` on real sources and targets with TimescaleDB."""

from __future__ import annotations

import secrets
from dataclasses import replace

import pytest

from live_migration.common.postgres import session
from live_migration.common.settings import load_settings
from live_migration.coordinator.findings import Finding
from live_migration.coordinator.preflight import validate
from live_migration.coordinator.timescale_facts import HypertableFacts, read_source
from tests.fixtures.fix_postgres import Server, execute
from tests.fixtures.fix_timescale import timescale_database
from tests.support.begun import begin_state

SCHEMA = [
    "create table metrics (time timestamptz not null, device int not null, v float8, primary key (device, time))",
    "select create_hypertable('metrics', 'time')",
    "alter table metrics set (timescaledb.compress, timescaledb.compress_segmentby = 'device')",
    "insert into metrics select t, 1, 1 from generate_series('2026-01-01'::timestamptz, '2026-02-01', '1 hour') t",
    "select compress_chunk(c) from show_chunks('metrics', older_than => '2026-01-10'::timestamptz) c",
    """create materialized view hourly with (timescaledb.continuous) as
       select time_bucket('1 hour', time) as hour, sum(v) as v from metrics group by 1 with no data""",
    "select add_retention_policy('metrics', interval '100 years')",
]

ACTION = [
    "create procedure act(job_id int, config jsonb) language sql as 'select 1'",
    "select add_job('act', interval '1 day')",
]

NEEDS_TIMESCALE = [
    "create table gate (id int primary key, at timestamptz)",
    "create view harmless as select * from metrics where v > 1",
    "create view latest as select device, last(v, time) as v from metrics group by 1",
    "create view upon_latest as select * from latest",
    "create materialized view copy as select hour, v as n from hourly",
    "create index copy_n on copy (n)",
    "create index by_bucket on gate (time_bucket('1 hour', at, 'UTC'))",
    "create function bucket_of(t timestamptz) returns timestamptz language sql begin atomic select time_bucket('1 day', t); end",
]


async def found(source: str, target: str, **options: object) -> list[Finding]:
    """Give the findings that speak of TimescaleDB; keys and identities are judged elsewhere."""
    settings = load_settings({"source": source, "target": target, "name": f"lm_{secrets.token_hex(4)}", **options})
    return [each for each in await validate(settings) if "without replica identity" not in each.what]


def about(findings: list[Finding], text: str) -> Finding:
    (finding,) = [each for each in findings if text in each.what]
    return finding


async def test_a_source_as_validate_reads_it(timescale_source_database: str) -> None:
    await execute(timescale_source_database, *SCHEMA)
    async with session(timescale_source_database, "source") as connection:
        facts = await read_source(connection, ["ours"])
        assert facts is not None
        assert facts.version == facts.server.version == facts.server.version_to_be("9.9")
        assert facts.version in facts.server.versions
        assert (facts.server.license, facts.has_markers, facts.has_auto_publication) == ("timescale", True, True)
        assert facts.hypertables == (
            HypertableFacts("public.hourly", "postgres", can_compress=False, tablespaces=()),
            HypertableFacts("public.metrics", "postgres", can_compress=True, tablespaces=(), has_compressed=True),
        )
        assert (facts.aggregates, facts.old_aggregates) == (("public.hourly",), ())
        assert (facts.server.background_workers, facts.server.is_restoring, facts.has_direct_compress) == (
            16,
            False,
            False,
        )
        assert [job.subject for job in facts.jobs] == ["public.metrics"]
        chunks = await connection.fetchval("select count(*) from timescaledb_information.chunks")
        compressed = await connection.fetchval(
            "select count(*) from timescaledb_information.chunks where is_compressed"
        )
        assert facts.relations == chunks + compressed > chunks > 0
        await connection.execute("set timescaledb.enable_direct_compress_insert = on")
        assert (await read_source(connection, ["ours"])) == replace(facts, has_direct_compress=True)
        assert facts.truncates
        await connection.execute("set timescaledb.compress_truncate_behaviour = truncate_or_delete")
        assert not (await read_source(connection, ["ours"])).truncates
        await connection.execute(
            "create publication ours for table public.metrics; create publication theirs for table public.metrics"
        )
        assert (await read_source(connection, ["ours"])).joined_publications == ("theirs",)


async def test_one_version_on_both_sides(timescale_source_database: str, timescale_target_database: str) -> None:
    await execute(timescale_source_database, *SCHEMA)
    refused, cost = await found(timescale_source_database, timescale_target_database)
    assert (refused.level, cost.level) == ("error", "warning")
    assert "Retention Policy" in refused.what
    assert "--pause-source-jobs" in refused.hint
    assert "public.metrics: a DELETE that removes whole compressed batches" in cost.what
    consented = await found(timescale_source_database, timescale_target_database, pause_source_jobs=True)
    assert {each.level for each in consented} == {"warning"}
    assert "Retention Policy" in about(consented, "are paused until `clean`").what
    off = "select alter_job(job_id, scheduled => false) from timescaledb_information.jobs where proc_name = 'policy_retention'"
    await execute(timescale_source_database, off)
    named = about(await found(timescale_source_database, timescale_target_database), "policies of the source are off")
    assert (named.level, "Retention Policy" in named.what) == ("warning", True)


async def test_nothing_is_asked_again_of_a_migration_that_has_begun(
    timescale_source_database: str, timescale_target_database: str
) -> None:
    await execute(timescale_source_database, *SCHEMA)
    settings = load_settings(
        {"source": timescale_source_database, "target": timescale_target_database, "name": "begun"}
    )
    await begin_state(settings)
    await execute(timescale_target_database, "select timescaledb_pre_restore()")
    findings = await found(timescale_source_database, timescale_target_database, name="begun")
    assert [each for each in findings if each.level == "error"] == []


async def test_an_older_source_and_an_older_target(
    timescale_target_database: str, timescale_source: Server, other_timescale: Server
) -> None:
    async with timescale_database(other_timescale) as other:
        await execute(other, *SCHEMA)
        across = await found(other, timescale_target_database)
        assert {each.level for each in across} == {"warning"}
        about(across, "chunks come over as rows")
        assert "room" in about(across, "compressed chunks are decompressed on their way").hint
        about(across, "go on meanwhile")
        assert "2.25 and newer have it" in about(across, "updates and deletes only when it has been found").what
    async with timescale_database(timescale_source) as source, timescale_database(other_timescale) as older:
        refused = about(await found(source, older), "older than the source's")
        assert refused.level == "error"


async def test_a_target_without_timescaledb(timescale_source_database: str, target_database: str) -> None:
    await execute(timescale_source_database, *SCHEMA)
    (refused,) = [e for e in await found(timescale_source_database, target_database) if e.level == "error"]
    assert "the target's server does not offer it" in refused.what
    assert "give --flatten" in refused.hint
    flattened = await found(timescale_source_database, target_database, flatten=True)
    assert {each.level for each in flattened} == {"warning"}
    about(flattened, "hypertables become plain tables")
    about(flattened, "compressed chunks take about")


async def test_what_plain_tables_go_without_is_named_before_the_start(
    timescale_source_database: str, target_database: str
) -> None:
    source = timescale_source_database
    await execute(source, *SCHEMA, *NEEDS_TIMESCALE)
    flattened = await found(source, target_database, flatten=True)
    assert "public.hourly" in about(flattened, "continuous aggregates are left out").what
    left_out = about(flattened, "what needs TimescaleDB or a continuous aggregate is left out").what.partition(": ")[2]
    wanted = (
        "function public.bucket_of(",
        "index public.by_bucket",
        "materialized view public.copy",
        "view public.latest",
    )
    assert all(name in left_out for name in wanted), left_out
    assert not [name for name in ("public.harmless", "chunk", "_timescaledb", "copy_n") if name in left_out], left_out
    assert "stays on the target for good" in about(flattened, "go on meanwhile").what
    assert {each.level for each in flattened} == {"warning"}

    await execute(source, "alter table gate alter at set default time_bucket('1 hour', now())")
    refused = about(await found(source, target_database, flatten=True), "tables of the source need TimescaleDB")
    assert (refused.level, "public.gate" in refused.what) == ("error", True)


async def test_restoring_mode_and_a_publication_of_all_tables(
    timescale_source_database: str, timescale_target_database: str
) -> None:
    await execute(timescale_source_database, "create publication everything for all tables")
    await execute(timescale_target_database, "select timescaledb_pre_restore()")
    findings = await found(timescale_source_database, timescale_target_database)
    assert about(findings, "publication FOR ALL TABLES").level == "warning"
    assert "timescaledb_post_restore" in about(findings, "timescaledb.restoring is on in the target's database").hint


async def test_roles_and_tablespaces_that_the_target_lacks(
    timescale_source_database: str, timescale_target_database: str
) -> None:
    role = f"r_{secrets.token_hex(4)}"
    await execute(timescale_source_database, f"create role {role} login; grant all on schema public to {role}")
    try:
        await execute(
            timescale_source_database.replace("postgres@", f"{role}@"),
            *SCHEMA[:3],
            "select add_retention_policy('metrics', interval '100 years')",
            *ACTION,
        )
        await execute(
            timescale_source_database,
            "insert into _timescaledb_catalog.tablespace (hypertable_id, tablespace_name) select id, 'fast' from _timescaledb_catalog.hypertable",
        )
        findings = await found(timescale_source_database, timescale_target_database, pause_source_jobs=True)
        assert about(findings, "own actions (jobs of users) on the source are missing").what.endswith(role)
        assert about(findings, "own hypertables or jobs on the source are missing").level == "warning"
        assert about(findings, "tablespaces that the target lacks: fast").level == "error"
    finally:
        await execute(
            timescale_source_database,
            "select delete_job(job_id) from timescaledb_information.jobs where proc_name = 'act'",
            f"drop table if exists metrics cascade; drop owned by {role}; drop role {role}",
        )


@pytest.mark.parametrize("privilege", ["", "replication"])
async def test_a_role_that_is_no_superuser(
    privilege: str, timescale_source_database: str, timescale_target_database: str
) -> None:
    role = f"r_{secrets.token_hex(4)}"
    await execute(timescale_source_database, *SCHEMA, f"create role {role} login {privilege}")
    try:
        source = timescale_source_database.replace("postgres@", f"{role}@")
        findings = await found(source, timescale_target_database, pause_source_jobs=True)
        assert about(findings, "lacks the rights of the owners of jobs").level == "error"
        every = about(findings, "every chunk that is made during the migration")
        assert f"role {role} is no superuser" in every.what
        assert f"role {role} may not set timescaledb.enable_chunk_auto_publication" in every.what
    finally:
        await execute(timescale_source_database, f"drop role {role}")


async def test_a_target_role_that_is_no_superuser(
    timescale_source_database: str, timescale_target_database: str
) -> None:
    role = f"r_{secrets.token_hex(4)}"
    await execute(timescale_source_database, *SCHEMA, *ACTION)
    await execute(timescale_target_database, f"create role {role} login")
    try:
        target = timescale_target_database.replace("postgres@", f"{role}@")
        findings = await found(timescale_source_database, target, pause_source_jobs=True)
        assert about(findings, "may not write TimescaleDB's catalog").level == "error"
        assert about(findings, "may not set timescaledb.restoring").level == "error"
        assert about(findings, "lacks the rights of roles that own actions (jobs of users): postgres").level == "error"
        assert about(findings, "may not set session_replication_role").level == "warning"
    finally:
        await execute(timescale_target_database, f"drop role {role}")
