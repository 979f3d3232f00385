"""SQL for what a hypertable refuses to do in place, or cannot do by `ctid`: rows are taken out into a temporary table and put back changed.

A `ctid` names a row within a chunk only, and none in a compressed batch; an UPDATE moves no row to another chunk, and changes no
column of a unique index in a compressed one. Rows are read before they are deleted, never by RETURNING: TimescaleDB 2.24 looks for
compressed batches anew after each row that it returns, and begins its bitmap scan again then: rows are missed. In the statements `t` is the hypertable, `s` the staged row, `b` a row taken out.
"""

from __future__ import annotations

from collections.abc import Sequence

from live_migration.common.relation import quote_identifier
from live_migration.consumer.hypertables import HypertableInfo
from live_migration.consumer.statements import DELETED, INSERTED, WRONG_ROW_COUNT, do, key_matches, own_value, row_image
from live_migration.consumer.target_tables import TargetTable


def moves_rows(table: TargetTable, columns: Sequence[int]) -> bool:
    """Tell whether an UPDATE of these columns has to delete and insert, for some of them are not assigned."""
    return table.hypertable is not None and any(table.columns[i].name in table.hypertable.fixed for i in columns)


def taken_columns(info: HypertableInfo) -> list[tuple[str, str]]:
    """Give the columns b0, b1 … of the table that rows are taken out into, before them `n`: which of several equal rows it is."""
    return [("n", "bigint"), *((f"b{i}", column.type) for i, column in enumerate(info.stored))]


def keep_updated(
    table: TargetTable, info: HypertableInfo, stage: str, taken: str, present: Sequence[int], within: str
) -> str:
    """Keep the rows whose keys are staged, with the `present` columns set as staged."""
    new = {table.columns[i].name: f"s.c{i}" for i in present}
    values = ", ".join(new.get(column.name) or f"t.{quote_identifier(column.name)}" for column in info.stored)
    return f"insert into {taken} select 1, {values} from {table.sql} t, {stage} s where {key_matches(table)}{within}"


def keep_surplus(table: TargetTable, info: HypertableInfo, stage: str, taken: str, within: str) -> str:
    """Keep, of the rows that are the very image of a staged one, those beyond its `n`."""
    names = ", ".join(f"t.{quote_identifier(column.name)} as b{i}" for i, column in enumerate(info.stored))
    return f"""
        insert into {taken} select * from (
            select row_number() over (partition by s.seq) - s.n as n, {names}
            from {table.sql} t, {stage} s where {_image_matches(table, info, "c")}{within}
        ) found where n > 0"""


def delete_equal_rows(table: TargetTable, info: HypertableInfo, stage: str, within: str) -> str:
    """Delete all rows that are the very image of a staged one."""
    return f"delete from {table.sql} t using {stage} s where {_image_matches(table, info, 'c')}{within}"


def put_back(table: TargetTable, info: HypertableInfo, taken: str, condition: str = "") -> str:
    """Insert the rows that were taken out."""
    listed = ", ".join(f"b.b{i}" for i in range(len(info.stored)))
    return f"{_insert(table, info)} select {listed} from {taken} b {condition}"


def apply_in_source_order(table: TargetTable, info: HypertableInfo, stage: str, taken: str) -> str:
    """Apply the staged changes one by one, each to exactly one row."""
    names = ", ".join(quote_identifier(column.name) for column in table.columns)
    values = ", ".join(f"s.c{i}" for i in range(len(table.columns)))
    delete = f"delete from {table.sql} t where {key_matches(table)}; get diagnostics hit = row_count;"
    return do(f"""
        declare s record; hit bigint; mode text := pg_catalog.current_setting('plan_cache_mode');
        begin
            -- a plan for any values would hold all chunks, and decompress them
            perform pg_catalog.set_config('plan_cache_mode', 'force_custom_plan', true);
            for s in select * from {stage} order by seq loop
                if s.op = '{INSERTED}' then
                    insert into {table.name.sql} ({names}) overriding system value values ({values});
                    get diagnostics hit = row_count;
                elsif s.op = '{DELETED}' then
                    {delete if table.key else _take_one(table, info, taken)}
                else
                    {_update_one(table, info, taken)}
                end if;
                if hit <> 1 then
                    raise exception using errcode = '{WRONG_ROW_COUNT}', detail = s.seq,
                        message = format('a change of kind %s hits %s rows instead of one', s.op, hit);
                end if;
            end loop;
            perform pg_catalog.set_config('plan_cache_mode', mode, true);
        end""")


def _insert(table: TargetTable, info: HypertableInfo) -> str:
    names = ", ".join(quote_identifier(column.name) for column in info.stored)
    return f"insert into {table.name.sql} ({names}) overriding system value"


def _image_matches(table: TargetTable, info: HypertableInfo, name: str) -> str:
    """Give the condition that a row is the image of the one staged as `name`0 …; equal times are implied, but an index knows them."""
    target, staged = row_image(table, "t"), row_image(table, "s", name)
    conditions = [
        f"t.{quote_identifier(column.name)} = s.{name}{i}"
        for i, column in enumerate(table.columns)
        if column.name == info.time_column
    ]
    conditions.append(f"hashtextextended({target}::text, 0) = hashtextextended({staged}::text, 0)")
    return " and ".join([*conditions, f"{target} operator(pg_catalog.*=) {staged}"])


def _new_value(table: TargetTable, name: str, old: str) -> str:
    """Give a column's value after a change in source order, `old` where the change leaves it alone."""
    for i, column in enumerate(table.columns):
        if column.name == name:
            return f"case substr(s.present, {i + 1}, 1) when '1' then s.c{i} else {old} end"
    return old


def _take_one(table: TargetTable, info: HypertableInfo, taken: str) -> str:
    """Take the row that a change names out; without a key, all rows that are equal to it, and put the others back."""
    match = key_matches(table) if table.key else _image_matches(table, info, "o")
    names = ", ".join(f"t.{quote_identifier(column.name)}" for column in info.stored)
    take = f"""
                    delete from {taken};
                    insert into {taken} select row_number() over (), {names} from {table.sql} t where {match};
                    delete from {table.sql} t where {match};
                    get diagnostics hit = row_count;"""
    if table.key:
        return take
    return f"""{take}
                    if hit > 1 then
                        {put_back(table, info, taken, "where b.n > 1")};
                        hit := 1;
                    end if;"""


def _update_one(table: TargetTable, info: HypertableInfo, taken: str) -> str:
    values = ", ".join(_new_value(table, column.name, f"b.b{i}") for i, column in enumerate(info.stored))
    move = f"""
                    {_take_one(table, info, taken)}
                    {_insert(table, info)} select {values} from {taken} b where b.n = 1;"""
    if not table.key:
        return move
    return f"""
                    {_update_in_place(table, info)}
                    get diagnostics hit = row_count;
                    if hit = 0 then {move}
                    end if;"""


def _update_in_place(table: TargetTable, info: HypertableInfo) -> str:
    """Assign what an UPDATE may, to a row whose other columns stay as they are to the byte."""
    written = [column.name for column in table.columns]
    names = {name: f"t.{quote_identifier(name)}" for name in written}
    stay = [name for name in written if name in info.fixed]
    plain = {column.name: own_value(column, "t") for column in table.columns}
    old, new = ", ".join(plain[name] for name in stay), ", ".join(_new_value(table, name, plain[name]) for name in stay)
    match = f"{key_matches(table)} and row({old})::record operator(pg_catalog.*=) row({new})::record"
    assignments = ", ".join(
        f"{quote_identifier(name)} = {_new_value(table, name, names[name])}"
        for name in written
        if name not in info.fixed
    )
    if assignments:
        return f"update {table.sql} t set {assignments} where {match};"
    return f"perform from {table.sql} t where {match};"
