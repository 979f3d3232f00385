"""What `validate` judges of TimescaleDB: facts about both sides in, findings out. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from live_migration.common.progress import format_number_of, name_list
from live_migration.common.timescale import FIRST_WATCHED_BY_OWNERS, parse_version
from live_migration.coordinator.findings import Finding, error, warning
from live_migration.coordinator.hash_dimensions import assess_hash_dimensions
from live_migration.coordinator.source_findings import assess_locks
from live_migration.coordinator.source_jobs import Job, rights_hint
from live_migration.coordinator.timescale_facts import HypertableFacts, ServerFacts, SourceFacts, TargetFacts

_FIRST_WITH_MARKERS = (2, 16)
_FIRST_WITHOUT_OLD_AGGREGATES = (2, 25)
_FIRST_WITH_SCHEMA_PUBLICATIONS = 15
_TRIED_VERSIONS = ("2.24.0", "2.29.2")
"""What the tests ran on; see docs/timescaledb.md."""
_APACHE = "apache"


def is_same_version(source: SourceFacts, target: TargetFacts) -> bool:
    """Tell whether the target has, or would get, the source's version: then chunks come over as they are."""
    return target.server.version_to_be(source.version) == source.version


def can_publish_schema(source: SourceFacts) -> bool:
    """Tell whether whole schemas can be published, so that every new chunk's rows are in the stream."""
    return source.server.major >= _FIRST_WITH_SCHEMA_PUBLICATIONS and source.server.is_superuser


def can_publish_new_chunks(source: SourceFacts) -> bool:
    """Tell whether a new chunk can join its hypertable's publications by itself."""
    return source.has_auto_publication and (source.owns_database or source.server.is_superuser)


def can_watch_compressed(source: SourceFacts) -> bool:
    """Tell whether what changes compressed rows alone can be noticed; `timescale_source` asks the server the same."""
    return source.server.is_superuser or parse_version(source.version) >= FIRST_WATCHED_BY_OWNERS


def assess_source(source: SourceFacts, *, accept_unseen_changes: bool = False) -> list[Finding]:
    """Judge what holds for every target: whether all changes of the hypertables can be followed, or the user does without."""
    return [
        *_assess_markers(source, accept_unseen_changes),
        *_assess_compressed(source, accept_unseen_changes),
        *_assess_publication(source),
        *_assess_all_tables(source),
        *_assess_joined(source),
        *_assess_tiered(source.hypertables),
        *_assess_restoring("source", source.server),
        *_assess_tried("source", source.version),
    ]


def assess_target(
    source: SourceFacts, target: TargetFacts, *, flatten: bool, pause_source_jobs: bool, is_begun: bool
) -> list[Finding]:
    """Judge the target of such a source. `is_begun`: it holds this migration's state, so what we did there is no finding."""
    if flatten:
        jobs = [] if is_begun else assess_jobs(source, is_same=False, is_flat=True, pause=pause_source_jobs)
        return [*_assess_plain(target), *jobs]
    if target.server.version_to_be(source.version) is None:
        return [
            error(
                f"the source has TimescaleDB {source.version}, the target's server does not offer it",
                "Install TimescaleDB on the target's server, or give --flatten: hypertables become plain tables there.",
            )
        ]
    found = [
        *_assess_versions(source, target),
        *_assess_license(source, target.server),
        *_assess_preloading(target.server),
        *_assess_workers(source, target.server),
        *assess_locks("target", source.relations, target.server.locks),
        *_assess_old_aggregates(source, target),
        *_assess_tablespaces(source, target),
        *_assess_catalog(source, target),
        *_assess_owners(source, target),
        *assess_hash_dimensions(source.dimensions, source.server.encoding, target.server.encoding),
        *_assess_tried("target", target.server.version_to_be(source.version)),
    ]
    if not is_begun:
        found += _assess_restoring("target", target.server)
        found += assess_jobs(source, is_same=is_same_version(source, target), pause=pause_source_jobs)
    return found


def _assess_plain(target: TargetFacts) -> list[Finding]:
    if target.server.version is None:
        return []
    return [
        error(
            f"--flatten makes plain tables, and the target's database has TimescaleDB {target.server.version}",
            "Leave --flatten out, and hypertables stay hypertables; or `drop extension timescaledb` on the target.",
        )
    ]


def _assess_tried(side: str, version: str | None) -> list[Finding]:
    if version is None or version in _TRIED_VERSIONS:
        return []
    return [
        warning(
            f"the {side}'s TimescaleDB {version} is none of those that were tried: {name_list(_TRIED_VERSIONS)}",
            "Try the migration on a copy of the source first, and `verify` it.",
        )
    ]


def _assess_versions(source: SourceFacts, target: TargetFacts) -> list[Finding]:
    to_be = target.server.version_to_be(source.version)
    if to_be is None or to_be == source.version:
        return []
    if parse_version(to_be) < parse_version(source.version):
        return [
            error(
                f"the target {_has_or_gets(target)} TimescaleDB {to_be}, older than the source's {source.version}",
                _same_version_hint(source, target),
            )
        ]
    return [
        warning(
            f"the source has TimescaleDB {source.version}, the target {_has_or_gets(target)} {to_be}: hypertables are made anew there, "
            "and chunks come over as rows, not as they are",
            f"For chunks, compressed ones too, to come over as they are: {_same_version_hint(source, target)}",
        )
    ]


def _has_or_gets(target: TargetFacts) -> str:
    return "has" if target.server.version else "gets"


def _same_version_hint(source: SourceFacts, target: TargetFacts) -> str:
    if source.version in target.server.versions:
        return f"`drop extension timescaledb; create extension timescaledb version '{source.version}'` in the empty target."
    to_be = target.server.version_to_be(source.version)
    return f"Install TimescaleDB {source.version} on the target's server" + (
        f", or `alter extension timescaledb update to '{to_be}'` on the source, which runs under PostgreSQL {source.server.major}."
        if to_be and parse_version(to_be) > parse_version(source.version)
        else "."
    )


def _assess_license(source: SourceFacts, target: ServerFacts) -> list[Finding]:
    if target.license != _APACHE or source.server.license == _APACHE:
        return []
    needed = [
        *([f"compression of {name_list(names)}"] if (names := _compressing(source)) else []),
        *([f"continuous aggregates {name_list(source.aggregates)}"] if source.aggregates else []),
        *([f"policies {name_list(names)}"] if (names := [job.name for job in source.jobs if job.is_policy]) else []),
    ]
    if not needed:
        return []
    return [
        error(
            f"the target runs TimescaleDB under the licence apache, which lacks what the source uses: {'; '.join(needed)}",
            "Use a build with the community licence: `timescaledb.license = 'timescale'` in the target's postgresql.conf.",
        )
    ]


def _compressing(source: SourceFacts) -> list[str]:
    return [each.name for each in source.hypertables if each.can_compress or each.has_compressed]


def _assess_markers(source: SourceFacts, is_accepted: bool) -> list[Finding]:
    if parse_version(source.version) < _FIRST_WITH_MARKERS:
        compressed = [each.name for each in source.hypertables if each.has_compressed]
        what = f"the source has TimescaleDB {source.version}, which does not mark in its WAL what compression moves"
        hint = "`alter extension timescaledb update` on the source, to 2.16 or newer."
        if compressed:
            return [error(f"{what}; compressed chunks are in {name_list(compressed)}", hint)]
        enabled = _compressing(source)
        where = f", though compression is enabled for {name_list(enabled)}" if enabled else ""
        judge = error if enabled and not is_accepted else warning
        consent = " Then give --accept-unseen-changes." if judge is error else ""
        return [
            judge(
                f"{what}: compress nothing during the migration{where}. Rows of a chunk that is compressed meanwhile may be lost or stand twice, "
                "and only `verify` finds it",
                f"{hint} Or see that nobody compresses: pause the policies (--pause-source-jobs).{consent}",
            )
        ]
    compressing = _compressing(source)
    if source.has_markers or not source.hypertables:
        return []
    where = f", and compression is enabled for {name_list(compressing)}" if compressing else ""
    return [
        error(
            f"timescaledb.enable_compression_wal_markers is off on the source{where}: what compression moves could not be told from changes",
            "`alter system set timescaledb.enable_compression_wal_markers = on; select pg_reload_conf()` on the source.",
        )
    ]


def _assess_compressed(source: SourceFacts, accept_unseen_changes: bool) -> list[Finding]:
    names = _compressing(source)
    if not names or parse_version(source.version) < _FIRST_WITH_MARKERS:
        return []
    if not can_watch_compressed(source):
        return _assess_unwatched(source, names, accept_unseen_changes)
    found = [
        warning(
            f"compression is enabled for {name_list(names)}: a DELETE that removes whole compressed batches (by a segmentby column) "
            "has no rows in the stream; it is noticed, and costs a copy of each chunk that it touched",
            "Leave such DELETEs, in bulk, for after the cutover.",
        )
    ]
    if not (source.truncates or can_publish_schema(source)):
        found.append(
            error(
                "timescaledb.compress_truncate_behaviour of the source is not truncate_only: where whole schemas are not published, a chunk that is "
                "compressed and decompressed between two looks is known by its file, which stays the same then; what was deleted meanwhile would "
                "stay on the target",
                "Set it back on the source for the time of the migration: `alter system reset timescaledb.compress_truncate_behaviour; "
                "select pg_reload_conf()`, or on the database or role that sets it.",
            )
        )
    if source.has_direct_compress:
        found.append(
            warning(
                "timescaledb.enable_direct_compress_copy or _insert is on at the source: rows that are written compressed are not in the "
                "stream; each chunk that they go to is copied again, as often as that happens",
                "Turn it off on the source for the time of the migration.",
            )
        )
    return found


def _assess_unwatched(source: SourceFacts, names: list[str], is_accepted: bool) -> list[Finding]:
    """Judge a source whose tables of compressed rows our role cannot watch: what changes these alone is neither in the stream nor noticed."""
    why = f"role {source.server.role} is no superuser, who alone can watch compressed rows before TimescaleDB 2.29 (the source has {source.version})"
    mend = "Use a superuser, or `alter extension timescaledb update` on the source, to 2.29 or newer."
    judge = warning if is_accepted else error
    consent = "" if is_accepted else " Or give --accept-unseen-changes, where nobody deletes so."
    found = [
        judge(
            f"compression is enabled for {name_list(names)}, and {why}: a DELETE that removes whole compressed batches (by a segmentby column) has no "
            "rows in the stream and is not noticed; what it deletes stays on the target, and only `verify` finds it",
            f"Leave such DELETEs for after the cutover. {mend}{consent}",
        )
    ]
    if source.has_direct_compress:
        found.append(
            error(
                f"timescaledb.enable_direct_compress_copy or _insert is on at the source, and {why}: rows that are written compressed are not in "
                "the stream, and would be lacking on the target unnoticed",
                f"Turn it off on the source for the time of the migration. {mend}",
            )
        )
    return found


def _assess_publication(source: SourceFacts) -> list[Finding]:
    """Say how new chunks get into the stream, where they do not do so by themselves."""
    if not source.hypertables:
        return []
    role, major = source.server.role, source.server.major
    if not source.has_auto_publication:
        how = f"TimescaleDB {source.version} has no timescaledb.enable_chunk_auto_publication (2.25 and newer have it)"
        mend = "Update TimescaleDB on the source, or expect these copies."
    else:
        how = f"role {role} may not set timescaledb.enable_chunk_auto_publication on the database"
        mend = f"Connect as the database's owner, or have it set: `alter database … set timescaledb.enable_chunk_auto_publication = on`, {role} made a member of the owner."
    if can_publish_schema(source):
        if can_publish_new_chunks(source):
            return []
        return [
            warning(
                f"{how}: a chunk that is made during the migration has its inserts in the stream at once, its updates and deletes only "
                "when it has been found; it is copied again then",
                mend,
            )
        ]
    lacks = (
        f"PostgreSQL {major} cannot publish whole schemas"
        if major < _FIRST_WITH_SCHEMA_PUBLICATIONS
        else f"role {role} is no superuser, who alone can publish whole schemas"
    )
    if can_publish_new_chunks(source):
        return [
            warning(
                f"on the source {lacks}: new chunks join the publication by timescaledb.enable_chunk_auto_publication, in sessions that begin "
                "after it is set; a chunk of an older session, and a new table of compressed rows, only when it has been found, and "
                "the chunk is copied again then",
                "Let the application connect anew once the migration has begun, or use a superuser.",
            )
        ]
    return [
        warning(
            f"on the source {lacks}, and {how}: every chunk that is made during the migration is in the stream only when it has been "
            "found, and is copied again then",
            f"Use a superuser and PostgreSQL 15 or newer. {mend}",
        )
    ]


def _assess_all_tables(source: SourceFacts) -> list[Finding]:
    if not source.all_tables_publications:
        return []
    return [
        warning(
            f"the source has a publication FOR ALL TABLES, which is not ours: {name_list(source.all_tables_publications)}. While it is there, "
            "create_hypertable and the creation of a continuous aggregate fail on the source, and so may a refresh",
            "Drop it if nobody needs it; a migration makes none.",
        )
    ]


def _assess_joined(source: SourceFacts) -> list[Finding]:
    """Judge other people's publications, which new chunks join by the setting that has them join ours."""
    if not source.joined_publications or not can_publish_new_chunks(source):
        return []
    return [
        warning(
            f"hypertables are in publications that are not ours: {name_list(source.joined_publications)}. During the migration their new chunks "
            "join these, too (timescaledb.enable_chunk_auto_publication): whoever subscribes gets rows of tables that he may lack, and a chunk "
            "without replica identity takes no UPDATE or DELETE there",
            "Take the hypertables out of them, or drop what nobody needs.",
        )
    ]


def _assess_tiered(hypertables: Iterable[HypertableFacts]) -> list[Finding]:
    tiered = [each.name for each in hypertables if each.is_tiered]
    if not tiered:
        return []
    return [
        error(
            f"chunks of the source lie in tiered storage, which cannot be copied: {name_list(tiered)}",
            "Bring them back (`call untier_chunk(…)`) or drop them, and remove the tiering policies.",
        )
    ]


def _assess_restoring(side: str, server: ServerFacts) -> list[Finding]:
    if not server.is_restoring:
        return []
    return [
        error(
            f"timescaledb.restoring is on in the {side}'s database: rows into hypertables are not routed to chunks, and no job runs",
            f"Wait for whoever restores there, or end it: `select timescaledb_post_restore()` on the {side}.",
        )
    ]


def _assess_preloading(target: ServerFacts) -> list[Finding]:
    if target.background_workers is not None:
        return []
    return [
        error(
            "TimescaleDB is installed on the target's server but not preloaded",
            "Add timescaledb to shared_preload_libraries on the target and restart it.",
        )
    ]


def _assess_workers(source: SourceFacts, target: ServerFacts) -> list[Finding]:
    """Judge what runs jobs after the cutover: a launcher, a scheduler for each database, and one worker for each job that runs."""
    ours = target.background_workers
    if ours is None:
        return []
    theirs, jobs = source.server.background_workers or 0, len(source.jobs)
    found = []
    if jobs and ours < min(theirs, jobs + 2):
        found.append(
            warning(
                f"timescaledb.max_background_workers is {ours} on the target and {theirs} on the source, which has "
                f"{format_number_of(jobs, 'job')}: jobs would wait for one another after the cutover",
                "Raise it on the target, and max_worker_processes with it, and restart it.",
            )
        )
    if jobs and target.worker_processes < ours:
        found.append(
            warning(
                f"max_worker_processes on the target is {target.worker_processes}, less than timescaledb.max_background_workers ({ours}): "
                "jobs may not start after the cutover",
                "Raise max_worker_processes on the target and restart it.",
            )
        )
    return found


def _assess_old_aggregates(source: SourceFacts, target: TargetFacts) -> list[Finding]:
    if not source.old_aggregates:
        return []
    what = f"continuous aggregates of the source have the format from before 2.7: {name_list(source.old_aggregates)}"
    hint = "`call cagg_migrate('…')` on the source, for each."
    to_be = target.server.version_to_be(source.version)
    if to_be and parse_version(to_be) >= _FIRST_WITHOUT_OLD_AGGREGATES:
        return [error(f"{what}; TimescaleDB {to_be} of the target does not know it", hint)]
    if to_be != source.version:
        return [error(f"{what}, and cannot be made anew so", hint)]
    return [warning(f"{what}; they come over as they are, and the target cannot be updated to 2.25 with them", hint)]


def _assess_tablespaces(source: SourceFacts, target: TargetFacts) -> list[Finding]:
    used = sorted({name for each in source.hypertables for name in each.tablespaces})
    missing = [name for name in used if name not in target.tablespaces]
    if missing and is_same_version(source, target):
        return [
            error(
                f"hypertables of the source spread their chunks over tablespaces that the target lacks: {name_list(missing)}; "
                "no chunk could be made there",
                "Create tablespaces of these names on the target, or `detach_tablespace` on the source.",
            )
        ]
    if used:
        return [
            warning(
                f"hypertables of the source use tablespaces: {name_list(used)}; what is copied goes to the target's default tablespace"
            )
        ]
    return []


def _assess_catalog(source: SourceFacts, target: TargetFacts) -> list[Finding]:
    if not is_same_version(source, target):
        return []
    lacks = []
    if target.can_write_catalog is False:
        lacks.append("write TimescaleDB's catalog, which comes over with the chunks")
    if not target.can_restore:
        lacks.append("set timescaledb.restoring, without which the catalog cannot be written")
    return [
        error(
            f"role {target.server.role} on the target may not {lack}",
            "Use a superuser, or the service's administrator (tsdbadmin on Timescale Cloud).",
        )
        for lack in lacks
    ]


def _assess_owners(source: SourceFacts, target: TargetFacts) -> list[Finding]:
    """Judge the roles: a user's action keeps its owner where chunks come over as they are; all else belongs to the role that migrates."""
    found = []
    keeping = [job for job in source.jobs if not job.is_policy] if is_same_version(source, target) else []
    if keeping:
        missing = sorted({job.owner for job in keeping} - target.roles)
        foreign = [job for job in keeping if job.owner in target.roles - target.our_roles]
        if missing:
            found.append(
                error(
                    f"roles that own actions (jobs of users) on the source are missing on the target: {name_list(missing)}",
                    f"`create role {missing[0]}` on the target, and make {target.server.role} a member.",
                )
            )
        if foreign:
            found.append(
                error(
                    f"role {target.server.role} on the target lacks the rights of roles that own actions (jobs of users): "
                    f"{name_list(sorted({job.owner for job in foreign}))}; it could not hold the jobs until the cutover",
                    f"`grant {', '.join(sorted({job.owner for job in foreign}))} to {target.server.role}` on the target.",
                )
            )
    left = [job.owner for job in source.jobs if job not in keeping]
    others = sorted({*(each.owner for each in source.hypertables), *left} - target.roles)
    if others:
        found.append(
            warning(
                f"roles that own hypertables or jobs on the source are missing on the target: {name_list(others)}; what is migrated belongs to "
                f"{target.server.role}"
            )
        )
    return found


def assess_jobs(source: SourceFacts, *, is_same: bool, pause: bool, is_flat: bool = False) -> list[Finding]:
    """Judge the jobs that are scheduled. `is_same`: both sides have one version; `pause`: the user consents to pausing them; `is_flat`: the
    target gets plain tables and no jobs.
    """
    scheduled = [job for job in source.jobs if job.is_scheduled]
    off = _assess_off(source, is_flat=is_flat)
    if not scheduled:
        return off
    if pause:
        return off + _assess_pausing(source, scheduled)
    policies = [job for job in scheduled if job.is_policy]
    actions = [job for job in scheduled if not job.is_policy]
    found = off
    if policies and is_same:
        found.append(
            error(
                f"{format_number_of(len(policies), 'job')} of the source move data, under which chunks cannot come over as they are: "
                f"{name_list(policies)}",
                "Give --pause-source-jobs: they are paused until `clean`, which gives each back as it was.",
            )
        )
    elif policies and parse_version(source.version) < _FIRST_WITH_MARKERS and _compressing(source):
        found.append(
            error(
                f"{format_number_of(len(policies), 'job')} of the source may compress chunks during the migration, which TimescaleDB "
                f"{source.version} does not mark in its WAL: rows would be lost or stand twice: {name_list(policies)}",
                "Give --pause-source-jobs: they are paused until `clean`, which gives each back as it was.",
            )
        )
    elif policies:
        until = "for good" if is_flat else "until its own policy runs"
        found.append(
            warning(
                f"{format_number_of(len(policies), 'job')} of the source move data and go on meanwhile: {name_list(policies)}. What retention drops "
                f"on the source stays on the target {until}",
                "--pause-source-jobs pauses them until `clean`.",
            )
        )
    if actions:
        found.append(
            warning(
                f"{format_number_of(len(actions), 'action')} of users' own may move data on the source: {name_list(actions)}",
                "If they compress, decompress, reorder or drop chunks, give --pause-source-jobs.",
            )
        )
    return found


def _assess_off(source: SourceFacts, *, is_flat: bool) -> list[Finding]:
    """Name policies that are off before anything has begun: nobody may mean them to be, as after a migration whose state was lost."""
    off = [job for job in source.jobs if not job.is_scheduled and job.is_policy]
    if not off:
        return []
    return [
        warning(
            f"policies of the source are off{'' if is_flat else ', and will be on the target'}: {name_list(off)}",
            f"If they are not meant to be: `select alter_job({off[0].id}, scheduled => true)`.",
        )
    ]


def _assess_pausing(source: SourceFacts, scheduled: list[Job]) -> list[Finding]:
    foreign = [job for job in scheduled if not job.is_alterable]
    if foreign:
        return [
            error(
                f"role {source.server.role} on the source lacks the rights of the owners of jobs that are to be paused: "
                f"{name_list(f'{job} ({job.owner})' for job in foreign)}",
                rights_hint(source.server.role, foreign),
            )
        ]
    return [
        warning(
            f"{format_number_of(len(scheduled), 'job')} of the source are paused until `clean`: {name_list(scheduled)}"
        )
    ]
