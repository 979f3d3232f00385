"""What TimescaleDB says of itself on either side, read for `timescale_findings` to judge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import asyncpg

from live_migration.common.postgres import may_run
from live_migration.common.timescale import Layout, read_layout
from live_migration.coordinator.hash_dimensions import HashDimension, read_hash_dimensions
from live_migration.coordinator.source_jobs import Job, read_jobs

LOCKS = """
    current_setting('max_locks_per_transaction')::bigint
        * (current_setting('max_connections')::int + current_setting('max_prepared_transactions')::int
           + current_setting('autovacuum_max_workers')::int + current_setting('max_worker_processes')::int
           + current_setting('max_wal_senders')::int)
"""
"""How many locks all sessions of a server can hold together, as SQL."""

_SERVER = (
    """
    select current_setting('server_version_num')::int / 10000 as major, current_user::text as role,
           (select rolsuper from pg_roles where rolname = current_user) as is_superuser,
           (select extversion::text from pg_extension where extname = 'timescaledb') as version,
           (select default_version::text from pg_available_extensions where name = 'timescaledb') as default_version,
           coalesce((select array_agg(version::text) from pg_available_extension_versions where name = 'timescaledb'),
                    '{}') as versions,
           current_setting('timescaledb.license', true) as license,
           coalesce(current_setting('timescaledb.restoring', true), 'off') = 'on' as is_restoring,
           current_setting('timescaledb.max_background_workers', true)::int as background_workers,
           current_setting('max_worker_processes')::int as worker_processes, getdatabaseencoding()::text as encoding,
    """
    + f"{LOCKS} as locks"
)

_SOURCE = """
    select current_setting('timescaledb.enable_compression_wal_markers', true) = 'on' as has_markers,
           exists (select from pg_settings where name = 'timescaledb.enable_chunk_auto_publication') as has_auto_publication,
           (select pg_has_role(datdba, 'usage') from pg_database where datname = current_database()) as owns_database,
           coalesce((select array_agg(pubname::text order by pubname) from pg_publication where puballtables), '{}')
               as all_tables_publications,
           coalesce((select array_agg(distinct p.pubname::text)
                     from pg_publication_rel r join pg_publication p on p.oid = r.prpubid
                     join pg_class c on c.oid = r.prrelid join pg_namespace n on n.oid = c.relnamespace
                     join _timescaledb_catalog.hypertable h on (h.schema_name, h.table_name) = (n.nspname, c.relname)
                     where p.pubname <> all($1::text[])
                       and coalesce(current_setting('timescaledb.enable_chunk_auto_publication', true), '') <> 'on'), '{}')
               as joined_publications,
           (select coalesce(bool_or(setting = 'on'), false) from pg_settings
            where name in ('timescaledb.enable_direct_compress_copy', 'timescaledb.enable_direct_compress_insert'))
           or exists (select from pg_db_role_setting s, unnest(s.setconfig) c
                      where s.setdatabase in (0, (select oid from pg_database where datname = current_database()))
                        and c ~ '^timescaledb\\.enable_direct_compress_(copy|insert)=(on|true|yes|1)$') as has_direct_compress,
           coalesce(current_setting('timescaledb.compress_truncate_behaviour', true), 'truncate_only') = 'truncate_only'
           and not exists (select from pg_db_role_setting s, unnest(s.setconfig) c
                           where s.setdatabase in (0, (select oid from pg_database where datname = current_database()))
                             and c ~ '^timescaledb\\.compress_truncate_behaviour=' and c !~ '=truncate_only$') as truncates
"""

_HYPERTABLES = """
    select format('%s.%s', hypertable_schema, hypertable_name) as name, owner::text as owner,
           compression_enabled as can_compress, coalesce(tablespaces::text[], '{}') as tablespaces
    from timescaledb_information.hypertables
    union all
    select format('%s.%s', view_schema, view_name), view_owner::text, compression_enabled, '{}'
    from timescaledb_information.continuous_aggregates
    order by 1
"""

_AGGREGATES = """
    select format('%s.%s', user_view_schema, user_view_name) as name,
           coalesce((to_jsonb(a) ->> 'finalized')::bool, true) as is_finalized
    from _timescaledb_catalog.continuous_agg a order by 1
"""

_ROLES = (
    "select rolname::text as name, pg_has_role(oid, 'usage') as is_ours from pg_roles where rolname = any($1::text[])"
)
_CATALOG = """
    select bool_and(has_table_privilege(t, 'insert') and has_table_privilege(t, 'update') and has_table_privilege(t, 'delete'))
    from pg_extension e, unnest(e.extconfig) t where e.extname = 'timescaledb' and (select relkind from pg_class where oid = t) = 'r'
"""
_TABLESPACES = "select spcname::text from pg_tablespace where spcname = any($1::text[])"


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """What either server has and allows.

    `version`: installed in the database; `versions`: that the server offers, empty where it has no TimescaleDB.
    `license` is None, too, where the extension is not in the database. `background_workers` is None where the library is not preloaded.
    `locks`: how many objects all sessions together may lock, about.
    """

    major: int
    role: str
    is_superuser: bool
    version: str | None
    default_version: str | None
    versions: tuple[str, ...]
    license: str | None
    is_restoring: bool
    background_workers: int | None
    worker_processes: int
    encoding: str
    locks: int

    def version_to_be(self, wanted: str) -> str | None:
        """Give the version that the database has or would get, as `read_version_to_be` does."""
        return self.version or (wanted if wanted in self.versions else self.default_version)


@dataclass(frozen=True, slots=True)
class HypertableFacts:
    """A hypertable or continuous aggregate; `can_compress`: compression is enabled, whether or not a chunk is compressed."""

    name: str
    owner: str
    can_compress: bool
    tablespaces: tuple[str, ...]
    has_compressed: bool = False
    is_tiered: bool = False


@dataclass(frozen=True, slots=True)
class SourceFacts:
    """A source with TimescaleDB. `relations`: chunks and tables of compressed rows."""

    server: ServerFacts
    version: str
    has_markers: bool | None
    """None: the version has no such setting."""
    has_auto_publication: bool
    owns_database: bool
    all_tables_publications: tuple[str, ...]
    joined_publications: tuple[str, ...]
    """Other people's, that hypertables are in: new chunks will join them, too."""
    has_direct_compress: bool
    truncates: bool
    """Whether a chunk that is compressed is truncated, and never has its rows deleted."""
    hypertables: tuple[HypertableFacts, ...]
    aggregates: tuple[str, ...]
    old_aggregates: tuple[str, ...]
    relations: int
    jobs: tuple[Job, ...]
    dimensions: tuple[HashDimension, ...] = ()
    """Of hypertables that are cut by a hash."""


@dataclass(frozen=True, slots=True)
class TargetFacts:
    """The target of a source with TimescaleDB; of roles and tablespaces, those of the source's that it has.

    `our_roles`: those whose rights our role has. `can_write_catalog`: whether it may restore TimescaleDB's catalog; None
    where the extension is not in the database yet. `can_restore`: whether it may enter restoring mode.
    """

    server: ServerFacts
    roles: frozenset[str]
    our_roles: frozenset[str]
    tablespaces: frozenset[str]
    can_write_catalog: bool | None
    can_restore: bool


async def read_source(source: asyncpg.Connection, ours: Sequence[str]) -> SourceFacts | None:
    """Give what is to be judged of a source; None where it has no TimescaleDB. Several queries, some of which may wait for locks.

    `ours`: the publications of this migration.
    """
    layout = await read_layout(source)
    if layout is None:
        return None
    row = dict(await source.fetchrow(_SOURCE, ours))
    for name in ("all_tables_publications", "joined_publications"):
        row[name] = tuple(row[name])
    aggregates = await source.fetch(_AGGREGATES)
    return SourceFacts(
        server=await _read_server(source),
        version=layout.version,
        hypertables=await _read_hypertables(source, layout),
        aggregates=tuple(each["name"] for each in aggregates),
        old_aggregates=tuple(each["name"] for each in aggregates if not each["is_finalized"]),
        relations=len(layout.chunks) + len(layout.compressed),
        jobs=tuple(await read_jobs(source)),
        dimensions=tuple(await read_hash_dimensions(source)),
        **row,
    )


async def read_target(target: asyncpg.Connection, source: SourceFacts) -> TargetFacts:
    """Give what is to be judged of the target of such a source."""
    roles = await target.fetch(_ROLES, [job.owner for job in source.jobs] + [h.owner for h in source.hypertables])
    tablespaces = await target.fetch(_TABLESPACES, [name for h in source.hypertables for name in h.tablespaces])
    server = await _read_server(target)
    is_loaded = server.background_workers is not None  # else anybody may set whatever bears such a name
    return TargetFacts(
        server,
        frozenset(row["name"] for row in roles),
        frozenset(row["name"] for row in roles if row["is_ours"]),
        frozenset(row[0] for row in tablespaces),
        await target.fetchval(_CATALOG),
        not is_loaded or await may_run(target, "set local timescaledb.restoring = on"),
    )


async def _read_server(connection: asyncpg.Connection) -> ServerFacts:
    row = dict(await connection.fetchrow(_SERVER))
    row["versions"] = tuple(row["versions"])
    return ServerFacts(**row)


async def _read_hypertables(source: asyncpg.Connection, layout: Layout) -> tuple[HypertableFacts, ...]:
    compressed = {_plain_name(layout, c.hypertable) for c in layout.chunks.values() if c.compressed is not None}
    tiered = {_plain_name(layout, c.hypertable) for c in layout.chunks.values() if c.is_foreign}
    return tuple(
        HypertableFacts(
            row["name"],
            row["owner"],
            row["can_compress"],
            tuple(row["tablespaces"]),
            row["name"] in compressed,
            row["name"] in tiered,
        )
        for row in await source.fetch(_HYPERTABLES)
    )


def _plain_name(layout: Layout, oid: int) -> str:
    hypertable = layout.hypertables[oid]
    return str(hypertable.view or hypertable.name)
