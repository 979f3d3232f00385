"""How Debezium is set: flat JSON without schemas in the topics, arrays (UNNEST) of 10,000 rows to the target."""

from __future__ import annotations

import json

import asyncpg

from benchmarks.servers import DATABASE, Servers

NAME = "bench"
_BATCH = "10000"
_LONGEST_MS = str(30 * 60 * 1000)  # the most a broker allows; a member that stands still must stay in its group
_MIB = 1024 * 1024

_SOURCE = {
    "connector.class": "io.debezium.connector.postgresql.PostgresConnector",
    "tasks.max": "1",
    "plugin.name": "pgoutput",
    "slot.name": NAME,
    "publication.name": NAME,
    "publication.autocreate.mode": "filtered",
    "topic.prefix": NAME,
    "snapshot.mode": "no_data",
    "max.batch.size": "20000",
    "max.queue.size": "80000",
    "poll.interval.ms": "10",
    "transforms": "unwrap",
    "transforms.unwrap.type": "io.debezium.transforms.ExtractNewRecordState",
    "transforms.unwrap.delete.tombstone.handling.mode": "tombstone",
    "key.converter.schemas.enable": "false",
    "value.converter.schemas.enable": "false",
    "producer.override.batch.size": str(_MIB // 2),
    "producer.override.linger.ms": "10",
    "producer.override.buffer.memory": str(128 * _MIB),
    "producer.override.compression.type": "lz4",
}
_SINK = {
    "connector.class": "io.debezium.connector.jdbc.JdbcSinkConnector",
    "tasks.max": "1",
    "connection.username": "postgres",
    "connection.password": "postgres",
    "connection.pool.min_size": "1",
    "connection.pool.max_size": "2",
    "schema.evolution": "none",
    "primary.key.mode": "record_key",
    "dialect.postgres.unnest.insert.enabled": "true",
    "batch.size": _BATCH,
    "key.converter.schemas.enable": "true",
    "value.converter.schemas.enable": "true",
    "consumer.override.max.poll.records": _BATCH,
    "consumer.override.max.partition.fetch.bytes": str(16 * _MIB),
    "consumer.override.fetch.min.bytes": str(_MIB // 2),
    "consumer.override.fetch.max.wait.ms": "100",
    "consumer.override.session.timeout.ms": _LONGEST_MS,
    "consumer.override.max.poll.interval.ms": _LONGEST_MS,
    "consumer.override.request.timeout.ms": str(10 * 60 * 1000),
}
_URL_OPTIONS = "reWriteBatchedInserts=true&options=-c%20synchronous_commit=off"  # the latter as the others have it
_MODES = {
    # What a migration needs: rows are written again after a restart, updated, deleted. UNNEST takes a key once a statement.
    "upsert": {"insert.mode": "upsert", "use.reduction.buffer": "true", "delete.enabled": "true"},
    # The fastest: keys are not even parsed.
    "insert": {
        "insert.mode": "insert",
        "primary.key.mode": "none",
        "key.converter": "org.apache.kafka.connect.converters.ByteArrayConverter",
    },
}
# How Debezium writes a column's values, as a schema of Connect.
_TYPES: dict[str, dict[str, object]] = {
    "bigint": {"type": "int64"},
    "integer": {"type": "int32"},
    "double precision": {"type": "double"},
    "timestamp with time zone": {"type": "string", "name": "io.debezium.time.ZonedTimestamp", "version": 1},
}
_COLUMNS = """
    select attname, format_type(atttypid, atttypmod), attnotnull,
        exists (select from pg_index where indrelid = attrelid and indisprimary and attnum = any (indkey))
    from pg_attribute where attrelid = $1::regclass and attnum > 0 and not attisdropped order by attnum"""


def topic_of(table: str) -> str:
    return f"{NAME}.{table}"


def sink_of(table: str) -> str:
    return f"sink-{table}"


def source_config(servers: Servers, tables: tuple[str, ...]) -> dict[str, str]:
    """Give the source connector's settings."""
    return _SOURCE | {
        "database.hostname": "127.0.0.1",
        "database.port": str(servers.source.port),
        "database.user": "postgres",
        "database.password": "postgres",
        "database.dbname": DATABASE,
        "table.include.list": ",".join(tables),
    }


async def sink_config(servers: Servers, table: str, insert_mode: str) -> dict[str, str]:
    """Give the settings of a table's sink connector: the schema of what its topic holds is set, not sent."""
    key, row = await _schemas(servers.target_uri, table)
    return (
        _SINK
        | _MODES[insert_mode]
        | {
            "topics": topic_of(table),
            "collection.name.format": table,
            "connection.url": f"jdbc:postgresql://127.0.0.1:{servers.target.port}/{DATABASE}?{_URL_OPTIONS}",
            "key.converter.schema.content": key,
            "value.converter.schema.content": row,
        }
    )


async def _schemas(uri: str, table: str) -> tuple[str, str]:
    """Give the schemas of key and row, as JSON."""
    connection = await asyncpg.connect(uri)
    try:
        columns = await connection.fetch(_COLUMNS, table)
    finally:
        await connection.close()
    fields = [
        (is_key, {**_TYPES[kind], "field": name, "optional": not is_set}) for name, kind, is_set, is_key in columns
    ]
    return (
        _struct(f"{topic_of(table)}.Key", [field for is_key, field in fields if is_key]),
        _struct(f"{topic_of(table)}.Value", [field for _, field in fields]),
    )


def _struct(name: str, fields: list[dict[str, object]]) -> str:
    return json.dumps({"type": "struct", "name": name, "optional": False, "fields": fields})
