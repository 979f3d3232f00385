"""A migration in replay, made by hand: state on the target, topics, tables, and a Kafka producer for its lanes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from uuid import uuid4

import asyncpg
from aiokafka import AIOKafkaProducer

from live_migration.common import state
from live_migration.common.kafka import create_topics, delete_topics
from live_migration.common.settings import Settings
from live_migration.consumer.apply_phase import run_apply_phase
from live_migration.producer.slot import identify_system
from tests.support.segments import INT4, TEXT, LaneWriter, insert, oid_of, relation, send, update

COLUMNS = json.dumps(
    [{"name": name, "type": kind, "generated": ""} for name, kind in (("id", "integer"), ("v", "text"))]
)


@dataclass
class Replay:
    """Lane n holds the table `t<n>` (id integer primary key, v text)."""

    settings: Settings
    target: asyncpg.Connection
    producer: AIOKafkaProducer
    lanes: list[LaneWriter]
    migration_id: str

    async def send(self) -> None:
        """Send what the lanes have built, a Kafka transaction in all."""
        await send(self.producer, self.settings.changes_topic, [r for lane in self.lanes for r in lane.take()])

    async def rows(self, lane: int) -> dict[int, str]:
        return {r["id"]: r["v"] for r in await self.target.fetch(f"select id, v from public.t{lane}")}

    async def checkpoint(self, lane: int) -> asyncpg.Record:
        return await self.target.fetchrow("select * from _live_migration.checkpoints where lane = $1", lane)

    async def until(self, condition: Callable[[], Awaitable[bool]], seconds: float = 40) -> None:
        async with asyncio.timeout(seconds):
            while not await condition():
                await asyncio.sleep(0.02)

    async def until_applied(self, seconds: float = 25) -> None:
        """Wait until each lane's checkpoint is where its writer is."""

        async def is_applied() -> bool:
            reached = await self.target.fetch(
                "select commit_lsn - '0/0'::pg_lsn as lsn, ordinal from _live_migration.checkpoints order by lane"
            )
            return [(int(r["lsn"]), r["ordinal"]) for r in reached] == [tuple(w.position) for w in self.lanes]

        await self.until(is_applied, seconds)

    @asynccontextmanager
    async def consumer(self, worker: str = "worker-1") -> AsyncIterator[asyncio.Event]:
        """Run the apply phase beside the test; leave it in order."""
        stop = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            group.create_task(run_apply_phase(self.settings, worker, stop))
            try:
                yield stop
            finally:
                stop.set()


@asynccontextmanager
async def replay(
    target_uri: str, kafka: str, name: str, *, lane_count: int, **options: object
) -> AsyncIterator[Replay]:
    settings = Settings.model_validate(
        {"target": target_uri, "source": target_uri, "kafka": kafka, "name": name, "partitions": lane_count, **options}
    )
    topic_id, migration_id = uuid4(), uuid4()
    identity = await identify_system(settings.source_uri())
    await create_topics(settings)
    target = await asyncpg.connect(target_uri)
    producer = AIOKafkaProducer(bootstrap_servers=kafka, transactional_id=name, max_request_size=2 * 1024 * 1024)
    await producer.start()
    try:
        async with target.transaction():
            await state.create_schema(target)
            await target.execute(
                """insert into _live_migration.migration (id, name, phase, settings, kafka, source_address, source_system,
                       source_timeline, source_database, source_version, topic_id, lane_count)
                   values ($1, $2, 'replay', '{}', $3, 'here', $6, 1, $7, 160000, $4, $5)""",
                migration_id, name, kafka, topic_id, lane_count, identity.system_identifier, identity.database,
            )  # fmt: skip
            for lane in range(lane_count):
                await make_table(target, lane, f"t{lane}")
                await target.execute("insert into _live_migration.checkpoints (lane) values ($1)", lane)
        lanes = [LaneWriter(lane, topic_id.bytes) for lane in range(lane_count)]
        for lane in lanes:
            describe(lane, f"t{lane.lane}")
        yield Replay(settings, target, producer, lanes, str(migration_id))
    finally:
        await producer.stop()
        await target.close()
        with suppress(Exception):
            await delete_topics(settings, with_letters=True)


async def make_table(target: asyncpg.Connection, lane: int, table: str) -> None:
    await target.execute(f"create table public.{table} (id integer primary key, v text)")
    await target.execute(
        """insert into _live_migration.tables (oid, schema_name, table_name, lane, publication, columns, binary_copy, state)
           values ($1, 'public', $2, $3, 'all', $4, true, 'ready')""",
        oid_of(table), table, lane, COLUMNS,
    )  # fmt: skip


def describe(lane: LaneWriter, table: str) -> None:
    lane.describe(table, relation(table, [("id", INT4, True), ("v", TEXT, False)]))


def grow(lane: LaneWriter, expected: dict[int, str], numbers: Sequence[int], *, cut_after: int = 0) -> None:
    """Add a transaction that inserts these rows and updates each once: applied twice, or half, it shows."""
    table = f"t{lane.lane}"
    changes = [insert(table, str(n), "new") for n in numbers] + [update(table, str(n), f"v{n}") for n in numbers]
    lane.transaction(changes, cut_after=cut_after)
    lane.cut()
    expected.update({n: f"v{n}" for n in numbers})
