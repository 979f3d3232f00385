"""Foreign keys at the hand-over: as the source has them then, added without a look at the rows, validated while the target is in use."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import asyncpg

from live_migration.common.errors import TargetError
from live_migration.common.postgres import asking, enter_replica_role
from live_migration.common.progress import name_list
from live_migration.common.relation import QualifiedName, quote_identifier
from live_migration.common.timescale import is_hypertable
from live_migration.coordinator.entries import UNFIT
from live_migration.coordinator.run import Run
from live_migration.coordinator.source_changes import find_new_foreign_keys

_NOT_VALID_ON_PARTITIONED = 180_000
_TWIN = "live_migration_valid_"
_DEFINITION = "select pg_get_constraintdef(oid) from pg_constraint where conrelid = to_regclass($1) and conname = $2"
_REFERENCED = """
    select n.nspname::text, c.relname::text
    from pg_constraint k join pg_class c on c.oid = k.confrelid join pg_namespace n on n.oid = c.relnamespace
    where k.conrelid = to_regclass($1) and k.conname = $2 and k.contype = 'f'
"""
_EVENT_TRIGGERS = """
    select evtname::text, case evtenabled when 'A' then 'enable always' else 'enable' end from pg_event_trigger e
    where evtenabled in ('O', 'A') and pg_has_role(evtowner, 'usage') and not exists (
        select from pg_depend d where d.classid = 'pg_event_trigger'::regclass and d.objid = e.oid and d.deptype = 'e')
"""
"""Event triggers that may refuse an ALTER TABLE, and that our role may disable; no extension's."""
_PRESENT = """
    select con.oid, n.nspname as schema_name, c.relname as table_name, con.conname as name, con.convalidated as is_valid,
           c.relkind = 'p' as is_partitioned,
           format('ALTER TABLE %I.%I ADD CONSTRAINT %I ', n.nspname, c.relname, con.conname) || pg_get_constraintdef(con.oid) as statement
    from pg_constraint con join pg_class c on c.oid = con.conrelid join pg_namespace n on n.oid = c.relnamespace
    where con.contype = 'f'
"""
_ADD = """
    insert into _live_migration.foreign_keys (oid, schema_name, table_name, name, is_partitioned, is_valid, statement)
    select $1, $2, $3, $4, $5, $6, $7
    where not exists (select from _live_migration.foreign_keys where oid = $1 or (schema_name, table_name, name) = ($2, $3, $4))
"""
_FOLLOW = """
    update _live_migration.foreign_keys
    set schema_name = $2, table_name = $3, name = $4, is_valid = $5, statement = $6 where oid = $1
"""


async def follow_foreign_keys(run: Run, source: asyncpg.Connection) -> None:
    """Have the plan's foreign keys be as the source has them now: columns, constraints and tables may have got other names.

    Those that the source has no more, as those of and to tables that were dropped there, leave the plan and are named; new ones join it.
    """
    present = await run.patiently("reading foreign keys", lambda: _read_present(source))
    by_oid = {row["oid"]: row for row in present}
    # ALTER TYPE of a column makes its foreign keys anew.
    by_name = {_name_of(row): row for row in present}
    with asking("target", "reading the plan"):
        pending = await run.target.fetch(
            "select oid, schema_name, table_name, name from _live_migration.foreign_keys where state = 'pending' order by oid"
        )
    found = {row["oid"]: by_oid.get(row["oid"]) or by_name.get(_name_of(row)) for row in pending}
    gone = [row for row in pending if found[row["oid"]] is None]
    new = [by_oid[each.oid] for each in await find_new_foreign_keys(run, source) if each.oid in by_oid]
    fields = ("schema_name", "table_name", "name", "is_valid", "statement")
    async with run.target_transaction("following the source's foreign keys") as target:
        await target.execute(
            "delete from _live_migration.foreign_keys where oid = any($1::oid[])", [row["oid"] for row in gone]
        )
        kept = [(oid, *(row[field] for field in fields)) for oid, row in found.items() if row is not None]
        await target.executemany(_FOLLOW, kept)
        all_fields = ("oid", "schema_name", "table_name", "name", "is_partitioned", "is_valid", "statement")
        await target.executemany(_ADD, [tuple(row[field] for field in all_fields) for row in new])
    if gone:
        run.reporter.warning(
            "foreign keys that were dropped on the source since the plan are not made: "
            + name_list(f"{row['name']} of {row['schema_name']}.{row['table_name']}" for row in gone)
        )


async def _read_present(source: asyncpg.Connection) -> list[asyncpg.Record]:
    # Our sessions have an empty search_path, so that each name comes with its schema.
    return [row for row in await source.fetch(_PRESENT) if row["statement"] is not None]


def _name_of(row: asyncpg.Record) -> tuple[str, str, str]:
    return row["schema_name"], row["table_name"], row["name"]


@dataclass(frozen=True, slots=True)
class ForeignKey:
    """A foreign key of the plan; `statement` adds it as the source has it."""

    oid: int
    table: QualifiedName
    name: str
    statement: str
    is_partitioned: bool
    is_valid: bool

    def add_statement(self, target_version: int) -> str:
        """Give the statement that adds it without looking at the rows, where that is allowed."""
        statement = self.statement.rstrip().removesuffix(";")
        is_plain = not self.is_valid or (self.is_partitioned and target_version < _NOT_VALID_ON_PARTITIONED)
        return statement if is_plain else f"{statement} NOT VALID"

    @property
    def validate_statement(self) -> str:
        """Give the statement that looks at the rows."""
        return f"alter table {self.table.sql} validate constraint {quote_identifier(self.name)}"


async def _read_foreign_keys(run: Run, *states: str) -> list[ForeignKey]:
    with asking("target", "reading the plan"):
        rows = await run.target.fetch(
            """select oid, schema_name, table_name, name, statement, is_partitioned, is_valid
               from _live_migration.foreign_keys where state = any($1::text[]) order by oid""",
            list(states),
        )
    return [
        ForeignKey(
            row["oid"],
            QualifiedName(row["schema_name"], row["table_name"]),
            row["name"],
            row["statement"],
            row["is_partitioned"],
            row["is_valid"],
        )
        for row in rows
    ]


async def add_foreign_keys(run: Run) -> None:
    """Add the foreign keys, not valid yet where that is possible; each in a transaction of its own.

    One that can only be added valid, and does not hold, is named and left out; so is one that the target cannot have as it is by now.
    """
    version = await run.target.fetchval("select current_setting('server_version_num')::int")
    for key in await _read_foreign_keys(run, "pending"):
        statement = key.add_statement(version)
        try:
            async with run.target_transaction(f"adding foreign key {key.name} of {key.table}") as target:
                await target.execute(statement)
                await target.execute("update _live_migration.foreign_keys set state = 'added' where oid = $1", key.oid)
        except TargetError as error:
            if not isinstance(error.__cause__, (asyncpg.ForeignKeyViolationError, *UNFIT)):
                raise
            if isinstance(error.__cause__, UNFIT):
                why, mend = "the target cannot have a foreign key as it is", "the target"
            else:
                why, mend = "rows on the target violate a foreign key, as on the source", "the rows"
            run.reporter.warning(f"{why}, and it is left out: {error.message}. Mend {mend}, then add it: {statement}")
            async with run.target_transaction(f"leaving foreign key {key.name} of {key.table} out") as target:
                await target.execute("update _live_migration.foreign_keys set state = 'failed' where oid = $1", key.oid)


async def validate_foreign_keys(run: Run) -> None:
    """Validate the foreign keys that were valid on the source; one that does not hold is named and left not valid."""
    for key in await _read_foreign_keys(run, "added"):
        state = "valid"
        if key.is_valid and await _is_to_hypertable(run.target, key):
            state = await _add_anew(run, key)  # validated, the keys to its chunks would stay as they are
        elif key.is_valid:
            try:
                with asking("target", f"validating foreign key {key.name} of {key.table}"):
                    async with run.target.transaction(), _event_triggers_off(run.target, key):
                        await run.target.execute(key.validate_statement)
            except TargetError as error:
                if isinstance(error.__cause__, asyncpg.FeatureNotSupportedError):
                    state = await _add_anew(run, key)
                elif isinstance(error.__cause__, asyncpg.IntegrityConstraintViolationError):
                    run.reporter.warning(f"rows on the target violate a foreign key, as on the source: {error.message}")
                    state = "failed"
                else:
                    raise
        with asking("target", "recording a foreign key"):
            await run.target.execute(
                "update _live_migration.foreign_keys set state = $2 where oid = $1", key.oid, state
            )


@asynccontextmanager
async def _event_triggers_off(target: asyncpg.Connection, key: ForeignKey) -> AsyncIterator[None]:
    """Silence event triggers in the caller's transaction: the source's are in force by now, and may refuse an ALTER TABLE.

    TimescaleDB's own, by which a key's state is handed to chunks, would be silent in the replica role, too.
    """
    if not await is_hypertable(target, key.table) and not await _is_to_hypertable(target, key):
        await enter_replica_role(target)
        yield
        return
    triggers = [tuple(row) for row in await target.fetch(_EVENT_TRIGGERS)]
    for name, _ in triggers:
        await target.execute(f"alter event trigger {quote_identifier(name)} disable")
    yield
    for name, as_before in triggers:
        await target.execute(f"alter event trigger {quote_identifier(name)} {as_before}")


async def _is_to_hypertable(target: asyncpg.Connection, key: ForeignKey) -> bool:
    with asking("target", f"looking at foreign key {key.name} of {key.table}"):
        row = await target.fetchrow(_REFERENCED, key.table.sql, key.name)
        return row is not None and await is_hypertable(target, QualifiedName(*row))


async def _add_anew(run: Run, key: ForeignKey) -> str:
    """Make a foreign key valid that cannot be validated; give its state then. At no moment is there none that holds for new rows."""
    try:
        if await _is_to_hypertable(run.target, key):
            await _replace_at_once(run, key)
        else:
            await _replace_by_twin(run, key)
    except TargetError as error:
        if not isinstance(error.__cause__, asyncpg.IntegrityConstraintViolationError):
            raise
        run.reporter.warning(f"rows on the target violate a foreign key, as on the source: {error.message}")
        return "failed"
    return "valid"


async def _replace_at_once(run: Run, key: ForeignKey) -> None:
    """Drop a key to a hypertable and make it anew, while readers of both tables wait.

    Of two such keys of one table TimescaleDB gives keys to chunks to the first alone (seen with 2.29): there can be no twin.
    """
    doing = f"validating foreign key {key.name} of {key.table}"
    async with run.target_transaction(doing) as target, _event_triggers_off(target, key):
        await target.execute(f"alter table {key.table.sql} drop constraint {quote_identifier(key.name)}")
        await target.execute(key.statement)


async def _replace_by_twin(run: Run, key: ForeignKey) -> None:
    """Make a valid key beside the other, under which readers go on; then have it take the other's place and name, at once."""
    doing = f"validating foreign key {key.name} of {key.table}"
    alter, twin = f"alter table {key.table.sql}", f"{_TWIN}{key.oid}"
    with asking("target", doing):
        definition = await run.target.fetchval(_DEFINITION, key.table.sql, key.name)
        is_made = await run.target.fetchval(_DEFINITION, key.table.sql, twin) is not None
    if not is_made:  # else a coordinator died here
        async with run.target_transaction(doing) as target, _event_triggers_off(target, key):
            await target.execute(f"{alter} add constraint {twin} {definition.removesuffix(' NOT VALID')}")
    async with run.target_transaction(doing) as target, _event_triggers_off(target, key):
        await target.execute(f"{alter} drop constraint {quote_identifier(key.name)}")
        await target.execute(f"{alter} rename constraint {twin} to {quote_identifier(key.name)}")
        await target.execute("update _live_migration.foreign_keys set state = 'valid' where oid = $1", key.oid)
