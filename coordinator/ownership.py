"""Whose slot, publications and topics bear our name: a migration of the same name into another target names its own alike.

A publication is ours by its oid, recorded before the transaction that makes it commits. The slot is ours where a publication is, for it is made
after both and dropped before them. Topics are ours by the migration's id in the control topic.
"""

from __future__ import annotations

from dataclasses import dataclass

import asyncpg
from pydantic import ValidationError

from live_migration.common.control import CONFIG, OWNER, Owner, ProducerConfig
from live_migration.common.errors import KafkaError, SlotError, SourceError
from live_migration.common.kafka import admin, read_control, topic_exists
from live_migration.common.postgres import asking, describe
from live_migration.common.settings import Settings
from live_migration.coordinator.control_topic import write_records
from live_migration.producer.slot import read_slot

_KIND = "publication"
_CLAIM = f"""
    select m.id::text as migration_id,
           m.phase <> 'prepare' or exists (select from _live_migration.steps where name = 'prepare') as is_begun,
           m.phase <> 'prepare' or exists (select from _live_migration.steps
                                           where (name = 'prepare' and is_done) or name = 'recopy') as is_prepared,
           coalesce((select array_agg(oid) from _live_migration.source_changes where kind = '{_KIND}'), '{{}}') as publications
    from _live_migration.migration m
"""
_PUBLICATIONS = "select oid, pubname::text as name from pg_publication where pubname = any($1::text[]) order by 2"


@dataclass(frozen=True, slots=True)
class Claim:
    """What the state says that this migration has made.

    `is_begun`: it may have made something. `is_prepared`: slot and publications were whole once. `publications`: their oids, also of those that
    are gone; none in the state of an older version.
    """

    migration_id: str
    is_begun: bool
    is_prepared: bool
    publications: frozenset[int]


async def read_claim(target: asyncpg.Connection) -> Claim:
    """Read what the target's migration has made."""
    with asking("target", "reading what was made"):
        row = await target.fetchrow(_CLAIM)
    return Claim(row["migration_id"], row["is_begun"], row["is_prepared"], frozenset(row["publications"]))


async def record_publication(target: asyncpg.Connection, oid: int, name: str) -> None:
    """Record a publication that is about to be there."""
    await target.execute(
        "insert into _live_migration.source_changes (kind, oid, object, before, after) values ($1, $2, $3, '', '')",
        _KIND,
        oid,
        name,
    )


async def find_on_source(source: asyncpg.Connection, settings: Settings) -> list[str]:
    """Name slot and publications of our name that are on the source, whosever they are."""
    with asking("source", "looking for slot and publications of our name"):
        slot = await read_slot(source, settings.slot)
        publications = await source.fetch(_PUBLICATIONS, [settings.publication, settings.insert_publication])
    found = [f"slot {settings.slot}"] if slot is not None else []
    return found + [f"publication {row['name']}" for row in publications]


async def require_ours_on_source(source: asyncpg.Connection, settings: Settings, claim: Claim) -> None:
    """Refuse slot and publications of our name that this migration has not made.

    Raises:
        SourceError: publications are somebody else's, and so is the slot then.
        SlotError: there is a slot alone, and none of ours can be there.
    """
    with asking("source", "looking whose slot and publications of our name are"):
        slot = await read_slot(source, settings.slot)
        found = await source.fetch(_PUBLICATIONS, [settings.publication, settings.insert_publication])
    # The state of an older version names none.
    is_known = bool(claim.publications) or not claim.is_prepared
    foreign = [row["name"] for row in found if row["oid"] not in claim.publications] if is_known else []
    if foreign:
        used = f" in use by pid {slot.active_pid}" if slot is not None and slot.active_pid is not None else ""
        with_slot = f"; slot {settings.slot}{used} may be theirs, too" if slot is not None else ""
        raise SourceError(
            f"publications {', '.join(foreign)} on the source were not made by this migration{with_slot}: a migration named "
            f"{settings.name} into another target made them, or somebody by hand. Nothing was touched",
            hint="End that migration first (`live-migration clean` with its own TARGET); drop them if nobody needs them. Then run this again.",
        )
    if slot is not None and not found and not claim.is_prepared:
        raise SlotError(
            f"slot {settings.slot} on the source was not made by this migration, which has no publications there yet",
            hint=f"If nobody needs it: `select pg_drop_replication_slot('{settings.slot}')`. Then run this again.",
        )


async def sign_topics(settings: Settings, migration_id: str) -> None:
    """Write into the control topic, which was made just now, whose it is."""
    owner = Owner(migration_id=migration_id, target=describe(settings.target_uri()))
    await write_records(settings, [(OWNER, owner.model_dump_json().encode())])


@dataclass(frozen=True, slots=True)
class Topics:
    """What topics of our name say of whose they are; empty where they do not."""

    owner: str = ""
    target: str = ""
    system_identifier: str = ""

    def __str__(self) -> str:
        whose = f"migration {self.owner}" if self.owner else "somebody who is not known"
        return f"{whose}, into {self.target}" if self.target else whose


async def read_topics(settings: Settings) -> Topics | None:
    """Tell whose the topics of our name are; None where there are none.

    Raises:
        KafkaError: what they say cannot be read.
    """
    async with admin(settings) as client:
        if not await topic_exists(client, settings.control_topic):
            return Topics() if await topic_exists(client, settings.changes_topic) else None
    control = await read_control(settings)
    try:
        config = ProducerConfig.model_validate_json(control[CONFIG]) if control.get(CONFIG) else None
        owner = Owner.model_validate_json(control[OWNER]) if control.get(OWNER) else None
    except ValidationError as error:
        raise KafkaError(
            f"topic {settings.control_topic} holds a record that this program cannot read: whose it is is not known",
            hint="Somebody else writes into the topic, or a newer program did: use that one, or delete the topic if nobody needs it.",
        ) from error
    if owner is None:  # of an older version
        owner = Owner(migration_id=config.migration_id if config is not None else "")
    return Topics(owner.migration_id, owner.target, config.system_identifier if config is not None else "")


async def read_topics_owner(settings: Settings) -> str | None:
    """Give the id of the migration whose topics bear our name; None where there are none, or where that is not known."""
    topics = await read_topics(settings)
    return (topics.owner or None) if topics is not None else None


async def require_our_topics(settings: Settings, claim: Claim) -> None:
    """Raise KafkaError where topics of our name are another migration's."""
    owner = await read_topics_owner(settings)
    if owner is not None and owner != claim.migration_id:
        raise KafkaError(
            f"topics {settings.changes_topic} and {settings.control_topic} belong to another migration named {settings.name} ({owner}). "
            "Nothing was touched",
            hint="End that migration first (`live-migration clean` with its own TARGET), or delete the topics if nobody needs them.",
        )
