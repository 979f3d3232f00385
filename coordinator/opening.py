"""Beginning a migration, or finding the one that the target holds."""

from __future__ import annotations

import json
from uuid import uuid4

import asyncpg

from live_migration.common import state
from live_migration.common.errors import SourceError, TargetError, UsageError
from live_migration.common.postgres import asking, describe, session
from live_migration.common.settings import Settings
from live_migration.common.state import Migration, Phase
from live_migration.coordinator import preflight
from live_migration.coordinator.handover import is_finished
from live_migration.coordinator.hypertable_spec import read_specs
from live_migration.coordinator.observer import Reporter
from live_migration.coordinator.run import APPLICATION
from live_migration.producer.slot import identify_system
from live_migration.producer.timeline import SystemIdentity

_SECRETS = frozenset({"source", "target", "kafka_username", "kafka_password"})


async def open_migration(settings: Settings, reporter: Reporter, *, must_exist: bool = False) -> Settings | None:
    """Begin a migration or resume the target's; give the settings that hold for it, None when it is done already.

    `must_exist`: none is begun.

    Raises:
        LiveMigrationError: a check failed before anything was touched; or the target's migration is another one.
    """
    async with session(settings.target_uri(), "target", application=f"{APPLICATION} opening") as target:
        with asking("target", "reading the migration's state"):
            migration = await state.read_migration(target)
        if migration is None and must_exist:
            raise TargetError(
                "the target holds no migration, so nothing can be copied again",
                hint="`live-migration migrate` starts one; check TARGET.",
            )
        if migration is None:
            settings = with_hypertables(settings)
            await _begin(settings, target, reporter)
            return settings
        _require_same_name(settings, migration)
        with asking("target", "reading the migration's state"):
            if migration.phase is Phase.DONE and must_exist:
                raise TargetError(
                    "this migration is done: the target is in charge, and nothing is to be copied again",
                    hint="`live-migration verify` compares both sides.",
                )
            if migration.phase is Phase.DONE and await is_finished(target):
                reporter.phase_changed(Phase.DONE)
                reporter.note(
                    "this migration is done already; nothing was changed. `live-migration clean` removes what it left"
                )
                return None
        if migration.phase is not Phase.DONE:  # what is left then is done on the target, and the source may be gone
            await _require_same_source(settings, migration)
        return _resume(settings, migration, reporter)


def with_hypertables(settings: Settings) -> Settings:
    """Give settings that name every hypertable themselves, for the file may be another one when the migration goes on.

    Raises:
        UsageError: what the user says of hypertables cannot be read.
    """
    specs = read_specs(settings.hypertable, settings.hypertables_file)
    return settings.model_copy(update={"hypertable": tuple(map(str, specs)), "hypertables_file": None})


async def _begin(settings: Settings, target: asyncpg.Connection, reporter: Reporter) -> None:
    findings = await preflight.validate(settings)
    for finding in findings:
        if finding.level == "warning":
            reporter.warning(finding.what)
    preflight.require_clean(findings)
    identity = await identify_system(settings.source_uri())
    async with session(settings.source_uri(), "source", application=f"{APPLICATION} opening") as source:
        with asking("source", "asking for the version"):
            version = await source.fetchval("select current_setting('server_version_num')::int")
    with asking("target", "creating the migration's state"):
        try:
            async with target.transaction():
                await state.create_schema(target)
                await _insert(settings, target, identity, version)
        except asyncpg.DuplicateSchemaError as error:
            raise TargetError(
                "the target holds a schema _live_migration already",
                hint="Another coordinator began just now, or it is left from somewhere else; `live-migration clean` drops it.",
            ) from error
    reporter.note(f"migration of {describe(settings.source_uri())} to {describe(settings.target_uri())} begun")


async def _insert(settings: Settings, target: asyncpg.Connection, identity: SystemIdentity, version: int) -> None:
    await target.execute(
        """insert into _live_migration.migration
           (id, name, phase, settings, kafka, source_address, source_system, source_timeline, source_database,
            source_version, topic_id, lane_count)
           values ($1, $2, 'prepare', $3, $4, $5, $6, $7, $8, $9, $10, $11)""",
        uuid4(),
        settings.name,
        json.dumps(settings.model_dump(mode="json", exclude=set(_SECRETS))),
        settings.kafka_servers(),
        describe(settings.source_uri()),
        identity.system_identifier,
        identity.timeline,
        identity.database,
        version,
        uuid4(),
        settings.lane_map.lane_count,
    )


def _require_same_name(settings: Settings, migration: Migration) -> None:
    if migration.name != settings.name:
        raise TargetError(
            f"the target holds another migration, named {migration.name}",
            hint=f"Give --name {migration.name} to go on with it, or clean it first.",
        )


async def _require_same_source(settings: Settings, migration: Migration) -> None:
    identity = await identify_system(settings.source_uri())
    if (identity.system_identifier, identity.database) != (migration.source_system, migration.source_database):
        raise SourceError(
            f"the migration on the target copies from {migration.source_address}, but SOURCE is another database: "
            f"{describe(settings.source_uri())}, system {identity.system_identifier}",
            hint="Check SOURCE, or `live-migration clean` and start again.",
        )
    async with session(settings.source_uri(), "source", application=f"{APPLICATION} opening") as source:
        with asking("source", "asking whether it is a standby"):
            is_standby = await source.fetchval("select pg_is_in_recovery()")
    if is_standby:
        raise SourceError(
            f"SOURCE is a standby of the migration's source: {describe(settings.source_uri())}. Nothing is lost",
            hint="Give the primary. After a failover, wait until the standby is promoted.",
        )


def _resume(settings: Settings, migration: Migration, reporter: Reporter) -> Settings:
    """Give the settings with what is fixed for a migration's life taken from its state."""
    kafka = settings.kafka or migration.kafka
    lanes = migration.lane_map
    if settings.lanes and settings.lane_map.split != lanes.split:
        begun = " ".join(f"--lanes {name}={count}" for name, count in lanes.split) or "no --lanes"
        raise UsageError(
            f"--lanes cannot be changed any more: the migration has begun with {begun}",
            hint="Leave --lanes out, or `live-migration clean` and start again.",
        )
    if settings.partitions != lanes.shared:
        reporter.note(f"the migration keeps its {lanes.shared} lanes; --partitions cannot change them any more")
    reporter.note(f"going on in phase {migration.phase.value}")
    pause = settings.pause_source_jobs or bool(migration.settings.get("pause_source_jobs"))
    fixed = {"kafka": kafka, "partitions": lanes.shared, "pause_source_jobs": pause, "hypertables_file": None}
    fixed["lanes"] = tuple(migration.settings.get("lanes") or ())
    fixed["hypertable"] = tuple(migration.settings.get("hypertable") or ())
    fixed["skip_hypertable_object"] = tuple(migration.settings.get("skip_hypertable_object") or ())
    fixed["flatten"] = bool(migration.settings.get("flatten"))
    fixed["skip_hypertable_incompatible_objects"] = bool(migration.settings.get("skip_hypertable_incompatible_objects"))
    return settings.model_copy(update=fixed)
