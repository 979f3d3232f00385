"""What `validate` judges of TimescaleDB, without a server."""

from __future__ import annotations

from dataclasses import replace

import pytest

from live_migration.common.timescale import parse_version
from live_migration.coordinator.findings import Finding
from live_migration.coordinator.source_jobs import Job
from live_migration.coordinator.timescale_facts import HypertableFacts, ServerFacts, SourceFacts, TargetFacts
from live_migration.coordinator.timescale_findings import assess_jobs, assess_source, assess_target

SERVER = ServerFacts(
    major=18,
    role="mover",
    is_superuser=True,
    version="2.29.2",
    default_version="2.29.2",
    versions=("2.24.0", "2.29.2"),
    license="timescale",
    is_restoring=False,
    background_workers=16,
    worker_processes=40,
    encoding="UTF8",
    locks=10_000,
)
PLAIN = HypertableFacts("public.plain", "alice", can_compress=False, tablespaces=())
COMPRESSED = HypertableFacts("public.metrics", "alice", can_compress=True, tablespaces=(), has_compressed=True)
POLICY = Job(1000, "Retention Policy [1000]", "alice", True, "public.metrics", True, True)
ACTION = Job(1001, "User-Defined Action [1001]", "bob", True, "public.act", False, True)
SOURCE = SourceFacts(
    server=SERVER,
    version="2.29.2",
    has_markers=True,
    has_auto_publication=True,
    owns_database=True,
    all_tables_publications=(),
    joined_publications=(),
    has_direct_compress=False,
    truncates=True,
    hypertables=(PLAIN,),
    aggregates=(),
    old_aggregates=(),
    relations=100,
    jobs=(),
)
TARGET = TargetFacts(
    SERVER,
    frozenset({"alice", "bob"}),
    frozenset({"alice", "bob"}),
    frozenset(),
    can_write_catalog=True,
    can_restore=True,
)

TRIED = "none of those that were tried"
"""Said of any version but those, in a finding that has a test of its own."""
OFF = "policies of the source are off"
"""Likewise."""


def of_source(**changes: object) -> list[Finding]:
    return [each for each in assess_source(replace(SOURCE, **changes)) if TRIED not in each.what]


def of_target(source: SourceFacts = SOURCE, target: TargetFacts = TARGET, **options: bool) -> list[Finding]:
    given = {"flatten": False, "pause_source_jobs": False, "is_begun": False, **options}
    return [each for each in assess_target(source, target, **given) if TRIED not in each.what and OFF not in each.what]


def with_server(**changes: object) -> TargetFacts:
    return replace(TARGET, server=replace(SERVER, **changes))


def only(found: list[Finding], level: str) -> str:
    (finding,) = found
    assert finding.level == level
    return f"{finding.what} | {finding.hint}"


def test_versions_are_compared_by_their_numbers() -> None:
    assert parse_version("2.9.3") < parse_version("2.16.0") < parse_version("2.29.2-dev") < parse_version("2.29.10")


def test_two_plain_sides_of_one_version_are_fine() -> None:
    assert assess_source(SOURCE) == []
    assert of_target() == []


@pytest.mark.parametrize("version", ["2.23.0", "2.29.1", "2.30.0"])
def test_a_version_that_nobody_tried_is_named_on_either_side(version: str) -> None:
    other = replace(SOURCE, version=version)
    options = {"flatten": False, "pause_source_jobs": False, "is_begun": False}
    told = only([each for each in assess_source(other) if TRIED in each.what], "warning")
    assert f"the source's TimescaleDB {version} is none of those that were tried: 2.24.0, 2.29.2" in told
    found = assess_target(SOURCE, with_server(version=version), **options)
    assert f"the target's TimescaleDB {version}" in only([each for each in found if TRIED in each.what], "warning")
    for tried in ("2.24.0", "2.29.2"):
        same = replace(SOURCE, version=tried)
        assert assess_source(same) == assess_target(same, with_server(version=tried), **options) == []


def test_a_target_without_it_is_refused() -> None:
    without = with_server(version=None, default_version=None, versions=(), license=None, background_workers=None)
    assert "or give --flatten" in only(of_target(target=without), "error")
    assert of_target(target=without, flatten=True) == []


def test_plain_tables_are_made_where_no_timescaledb_is() -> None:
    offering = with_server(version=None)
    assert of_target(target=offering, flatten=True) == []
    assert "drop extension timescaledb" in only(of_target(flatten=True), "error")


def test_what_retention_drops_stays_for_good_in_plain_tables() -> None:
    source = replace(SOURCE, jobs=(POLICY,))
    target = with_server(version=None, default_version=None, versions=())
    assert "stays on the target for good" in only(of_target(source, target, flatten=True), "warning")
    assert "are paused until" in only(of_target(source, target, flatten=True, pause_source_jobs=True), "warning")
    assert of_target(source, target, flatten=True, is_begun=True) == []


def test_an_older_target_is_refused() -> None:
    old = with_server(version="2.24.0")
    told = only(of_target(target=old), "error")
    assert "has TimescaleDB 2.24.0, older than the source's 2.29.2" in told
    assert "create extension timescaledb version '2.29.2'" in told
    lacking = with_server(version=None, default_version="2.24.0", versions=("2.24.0",))
    assert "gets TimescaleDB 2.24.0" in only(of_target(target=lacking), "error")


def test_a_newer_target_is_named_with_both_ways_to_one_version() -> None:
    source = replace(SOURCE, version="2.20.0")
    told = only(of_target(source), "warning")
    assert "come over as rows" in told
    assert "Install TimescaleDB 2.20.0" in told
    assert "update to '2.29.2'` on the source" in told


def test_a_server_that_offers_the_sources_version_is_the_same() -> None:
    offering = with_server(version=None, default_version="2.29.2")
    assert of_target(replace(SOURCE, version="2.24.0"), offering) == []


@pytest.mark.parametrize(
    ("source", "needed"),
    [
        (replace(SOURCE, hypertables=(COMPRESSED,)), "compression of public.metrics"),
        (replace(SOURCE, aggregates=("public.hourly",)), "continuous aggregates public.hourly"),
        (replace(SOURCE, jobs=(replace(POLICY, is_scheduled=False),)), "policies Retention Policy [1000]"),
    ],
)
def test_the_apache_licence_lacks_what_the_source_uses(source: SourceFacts, needed: str) -> None:
    apache = with_server(license="apache")
    assert needed in only(of_target(source, apache), "error")
    assert of_target(replace(SOURCE, jobs=(replace(ACTION, is_scheduled=False),)), apache) == []
    assert of_target(source, with_server(license=None)) == [], "not known before the extension is there"


def test_a_source_from_before_the_markers_may_hold_nothing_compressed() -> None:
    assert "compress nothing" in only(of_source(version="2.15.3", has_markers=None), "warning")
    found = of_source(version="2.15.3", has_markers=None, hypertables=(COMPRESSED,))
    assert "public.metrics" in only(found, "error")


def test_a_source_from_before_the_markers_with_compression_on_needs_consent() -> None:
    enabled = replace(COMPRESSED, has_compressed=False)
    source = replace(SOURCE, version="2.15.3", has_markers=None, hypertables=(enabled, PLAIN))
    refused, accepted = (assess_source(source, accept_unseen_changes=accepts)[0] for accepts in (False, True))
    assert (refused.level, accepted.level) == ("error", "warning")
    assert "--accept-unseen-changes" in refused.hint
    for found in (refused, accepted):
        assert "compression is enabled for public.metrics" in found.what
        assert "may be lost or stand twice" in found.what


@pytest.mark.parametrize(
    ("is_superuser", "truncates", "is_refused"), [(True, False, False), (False, True, False), (False, False, True)]
)
def test_a_chunk_that_is_compressed_unseen_must_come_to_lie_in_another_file(
    is_superuser: bool, truncates: bool, is_refused: bool
) -> None:
    server = replace(SERVER, is_superuser=is_superuser)
    errors = [
        each
        for each in of_source(server=server, truncates=truncates, hypertables=(COMPRESSED,))
        if each.level == "error"
    ]
    assert [("compress_truncate_behaviour" in each.what) for each in errors] == [True] * is_refused


@pytest.mark.parametrize(
    ("version", "is_superuser", "is_noticed"),
    [("2.29.2", False, True), ("2.24.0", True, True), ("2.24.0", False, False), ("2.28.9", False, False)],
)
def test_changes_of_compressed_rows_are_noticed_only_where_these_can_be_watched(
    version: str, is_superuser: bool, is_noticed: bool
) -> None:
    server = replace(SERVER, is_superuser=is_superuser)
    found = of_source(version=version, server=server, hypertables=(COMPRESSED,), has_direct_compress=True)
    deletes, direct = found[:2]
    assert deletes.level == ("warning" if is_noticed else "error")
    assert ("is not noticed" in deletes.what, "it is noticed" in deletes.what) == (not is_noticed, is_noticed)
    assert (direct.level == "warning") is is_noticed
    assert ("is copied again" in direct.what) is is_noticed


def test_deletes_that_cannot_be_noticed_are_the_users_to_accept() -> None:
    unwatched = replace(SOURCE, version="2.24.0", server=replace(SERVER, is_superuser=False), hypertables=(COMPRESSED,))
    assert "--accept-unseen-changes" in assess_source(unwatched)[0].hint
    accepted = assess_source(unwatched, accept_unseen_changes=True)[0]
    assert accepted.level == "warning"
    assert "is not noticed" in accepted.what


def test_publications_of_others_that_new_chunks_join_are_named() -> None:
    assert "not ours: theirs" in only(of_source(joined_publications=("theirs",)), "warning")
    kept = of_source(joined_publications=("theirs",), has_auto_publication=False)
    assert not [each for each in kept if "not ours" in each.what], "none joins by itself"


def test_policies_may_not_compress_unmarked() -> None:
    enabled = replace(COMPRESSED, has_compressed=False)
    old = replace(SOURCE, version="2.15.3", has_markers=None, hypertables=(enabled,), jobs=(POLICY,))
    (finding,) = assess_jobs(old, is_same=False, pause=False)
    assert finding.level == "error"
    assert "--pause-source-jobs" in finding.hint
    assert [each.level for each in assess_jobs(old, is_same=False, pause=True)] == ["warning"]


def test_markers_that_are_off_are_an_error() -> None:
    assert "compression is enabled" not in only(of_source(has_markers=False), "error")
    assert of_source(has_markers=False, hypertables=()) == []
    compressing = replace(COMPRESSED, has_compressed=False)
    off, _ = of_source(has_markers=False, hypertables=(compressing,))
    assert off.level == "error"
    assert "pg_reload_conf" in off.hint


def test_compression_costs_copies_of_chunks() -> None:
    assert "copy of each chunk" in only(of_source(hypertables=(COMPRESSED,)), "warning")
    deletes, direct = of_source(hypertables=(COMPRESSED, PLAIN), has_direct_compress=True)
    assert "public.plain" not in deletes.what
    assert "enable_direct_compress" in direct.what


@pytest.mark.parametrize(
    ("major", "is_superuser", "has_auto", "owns", "said"),
    [
        (18, True, True, True, None),
        (18, True, True, False, None),
        (18, True, False, True, "updates and deletes only when it has been found"),
        (14, True, True, True, "PostgreSQL 14 cannot publish whole schemas: new chunks join"),
        (18, False, True, True, "role mover is no superuser, who alone can publish whole schemas: new chunks join"),
        (18, False, True, False, "may not set timescaledb.enable_chunk_auto_publication on the database: every chunk"),
        (
            18,
            False,
            False,
            True,
            "has no timescaledb.enable_chunk_auto_publication (2.25 and newer have it): every chunk",
        ),
    ],
)
def test_how_new_chunks_come_into_the_stream(
    major: int, is_superuser: bool, has_auto: bool, owns: bool, said: str | None
) -> None:
    server = replace(SERVER, major=major, is_superuser=is_superuser)
    found = of_source(server=server, has_auto_publication=has_auto, owns_database=owns)
    if said is None:
        assert found == []
    else:
        assert said in only(found, "warning")
    assert of_source(server=server, has_auto_publication=has_auto, owns_database=owns, hypertables=()) == []


def test_what_somebody_elses_publication_of_all_tables_does() -> None:
    assert "create_hypertable" in only(of_source(all_tables_publications=("debezium",)), "warning")


def test_tiered_chunks_are_refused_by_name() -> None:
    assert "public.plain" in only(of_source(hypertables=(replace(PLAIN, is_tiered=True),)), "error")


def test_restoring_mode_is_refused_on_either_side_but_where_it_is_ours() -> None:
    restoring = replace(SERVER, is_restoring=True)
    assert "the source's database" in only(of_source(server=restoring), "error")
    assert "the target's database" in only(of_target(target=with_server(is_restoring=True)), "error")
    assert of_target(target=with_server(is_restoring=True), is_begun=True) == []


def test_locks_for_all_chunks_at_once() -> None:
    many = replace(SOURCE, relations=600)
    assert "the target's sessions" in only(of_target(many, with_server(locks=1_000)), "warning")


def test_a_target_that_does_not_preload_it() -> None:
    assert "shared_preload_libraries" in only(of_target(target=with_server(background_workers=None)), "error")


def test_workers_for_the_jobs_after_the_cutover() -> None:
    idle = replace(SOURCE, jobs=tuple(replace(POLICY, id=1000 + n, is_scheduled=False) for n in range(5)))
    assert of_target(idle, with_server(background_workers=7)) == []
    assert "max_background_workers is 6" in only(of_target(idle, with_server(background_workers=6)), "warning")
    assert "max_worker_processes" in only(of_target(idle, with_server(worker_processes=8)), "warning")
    assert of_target(target=with_server(background_workers=1)) == [], "no jobs"


def test_aggregates_of_the_old_format() -> None:
    old = replace(SOURCE, version="2.24.0", aggregates=("public.old",), old_aggregates=("public.old",))
    same = with_server(version="2.24.0")
    assert "cagg_migrate" in only(of_target(old, same), "warning")
    _, refused = of_target(old, with_server(version="2.29.2"))
    assert refused.level == "error"
    assert "TimescaleDB 2.29.2 of the target does not know it" in refused.what
    older = replace(old, version="2.20.0")
    assert [finding.level for finding in of_target(older, same)] == ["warning", "error"]


def test_tablespaces_must_be_there_where_chunks_are_made_in_them() -> None:
    source = replace(SOURCE, hypertables=(replace(PLAIN, tablespaces=("fast",)),))
    assert "lacks: fast" in only(of_target(source), "error")
    there = replace(TARGET, tablespaces=frozenset({"fast"}))
    assert "default tablespace" in only(of_target(source, there), "warning")
    across = of_target(replace(source, version="2.20.0"))
    assert [finding.level for finding in across] == ["warning", "warning"]


def test_owners_of_jobs_must_be_roles_of_the_target() -> None:
    off = replace(SOURCE, jobs=(replace(POLICY, is_scheduled=False), replace(ACTION, is_scheduled=False)))
    missing = replace(TARGET, roles=frozenset({"alice"}), our_roles=frozenset({"alice"}))
    assert "missing on the target: bob" in only(of_target(off, missing), "error")
    foreign = replace(TARGET, our_roles=frozenset({"alice"}))
    assert "lacks the rights of roles that own actions (jobs of users): bob" in only(of_target(off, foreign), "error")
    nobody = replace(TARGET, roles=frozenset(), our_roles=frozenset())
    assert "own hypertables" in only(of_target(target=nobody), "warning")


def test_owners_of_policies_need_not_be_roles_of_the_target() -> None:
    policies = replace(SOURCE, hypertables=(), jobs=(replace(POLICY, is_scheduled=False),))
    assert of_target(policies, replace(TARGET, our_roles=frozenset())) == []
    nobody = replace(TARGET, roles=frozenset(), our_roles=frozenset())
    assert "or jobs on the source are missing on the target: alice; what" in only(
        of_target(policies, nobody), "warning"
    )


def test_the_catalog_comes_over_with_the_chunks() -> None:
    foreign = replace(TARGET, can_write_catalog=False)
    assert "role mover on the target may not write TimescaleDB's catalog" in only(of_target(target=foreign), "error")
    assert of_target(target=replace(TARGET, can_write_catalog=None)) == []
    assert "timescaledb.restoring" in only(of_target(target=replace(TARGET, can_restore=False)), "error")
    across = of_target(replace(SOURCE, version="2.20.0"), foreign)
    assert [finding.level for finding in across] == ["warning"]


def test_jobs_need_consent_where_chunks_come_over_as_they_are() -> None:
    source = replace(SOURCE, jobs=(POLICY, ACTION))
    refused, actions = assess_jobs(source, is_same=True, pause=False)
    assert (refused.level, actions.level) == ("error", "warning")
    assert "Retention Policy [1000] of public.metrics" in refused.what
    assert "--pause-source-jobs" in refused.hint
    assert "User-Defined Action [1001] of public.act" in actions.what
    assert [f.level for f in assess_jobs(source, is_same=False, pause=False)] == ["warning", "warning"]
    assert "2 jobs of the source are paused" in only(assess_jobs(source, is_same=True, pause=True), "warning")


def test_jobs_that_our_role_may_not_pause() -> None:
    source = replace(SOURCE, jobs=(replace(POLICY, is_alterable=False), ACTION))
    told = only(assess_jobs(source, is_same=True, pause=True), "error")
    assert "Retention Policy [1000] of public.metrics (alice)" in told
    assert "`grant alice to mover`" in told


def test_jobs_that_are_off_ask_for_nothing_but_are_named() -> None:
    off = replace(SOURCE, jobs=(replace(POLICY, is_scheduled=False, is_alterable=False), ACTION))
    named = f"{OFF}, and will be on the target: Retention Policy [1000] of public.metrics"
    for pause in (False, True):
        first, other = assess_jobs(off, is_same=True, pause=pause)
        assert (first.level, first.what, "[1000]" in other.what) == ("warning", named, False)
    alone = replace(off, jobs=off.jobs[:1])
    assert only(assess_jobs(alone, is_same=True, pause=False), "warning").startswith(named)
    assert "on the target" not in only(assess_jobs(alone, is_same=False, pause=False, is_flat=True), "warning")
    assert assess_jobs(replace(off, jobs=(replace(ACTION, is_scheduled=False),)), is_same=True, pause=True) == []
    assert of_target(replace(SOURCE, jobs=(POLICY,)), is_begun=True) == [], "paused by ours, or taken back by somebody"
