"""SQL that applies staged changes. Staging tables are temporary, one a table, kind and column set, emptied at each commit.

Each function is pure: names and types in, a statement out. In them `t` is the target's table, `s` the staged row.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from live_migration.common.catalog import ColumnInfo
from live_migration.common.relation import quote_identifier
from live_migration.consumer.target_tables import TargetTable

INSERTED, UPDATED, DELETED = "I", "U", "D"
"""Values of the staged column `op` in source order."""

WRONG_ROW_COUNT = "LM001"
"""SQLSTATE that the source order loop raises when a change hits no row, or several; its detail is the change's number."""


def planning(table: TargetTable) -> str:
    """Give the settings under which staged rows are joined with the table: by its key's index, where there is one.

    The planner knows nothing of a stage but its size. It has been seen to hash a table of 1.5 million rows for 100,000 staged ones, at four
    times the time, and so for each batch; with the index the time depends on what is staged alone.
    """
    value = "off" if table.is_key_indexed and table.hypertable is None else "default"
    return f"set local enable_hashjoin to {value}; set local enable_mergejoin to {value}"


def create_stage(stage: str, columns: Sequence[tuple[str, str]], indexed: Collection[str] = ()) -> str:
    """Create a staging table of (name, type) columns, with an index over some of them."""
    listed = ", ".join(f"{name} {type_name}" for name, type_name in columns)
    table = f"create temporary table if not exists {stage} ({listed}) on commit delete rows"
    if not indexed:
        return table
    return f"{table}; create index if not exists {stage}_i on pg_temp.{stage} ({', '.join(indexed)})"


def key_stage_columns(table: TargetTable) -> list[tuple[str, str]]:
    """Give the staged columns k0, k1 … of the key."""
    return [(f"k{i}", stage_type(table.columns[column.index])) for i, column in enumerate(table.key)]


def value_stage_columns(table: TargetTable, indexes: Sequence[int], prefix: str = "c") -> list[tuple[str, str]]:
    """Give staged columns for some of the table's; their names carry the column's position."""
    return [(f"{prefix}{i}", stage_type(table.columns[i])) for i in indexes]


def stage_type(column: ColumnInfo) -> str:
    """Give the type that a column's values are staged in: a domain may refuse the NULL of a value that is not there."""
    return column.base_type or column.type


def key_matches(table: TargetTable) -> str:
    """Give the condition that a row bears a staged key."""
    return " and ".join(f"{own_value(table.columns[c.index], 't')} {c.equals} s.k{i}" for i, c in enumerate(table.key))


def own_value(column: ColumnInfo, alias: str) -> str:
    """Give the table's own value of a column, in the type that others of it are staged in: some operators know no domain."""
    value = f"{alias}.{quote_identifier(column.name)}"
    return f"{value}::{column.base_type}" if column.base_type else value


def assigned(table: TargetTable, present: Sequence[int]) -> list[int]:
    """Give those of the `present` columns that an UPDATE may assign."""
    return [i for i in present if table.columns[i].identity != "a"]


def _staged_match(table: TargetTable, present: Sequence[int]) -> str:
    return key_matches(table) + _keeps(table, present)


def _keeps(table: TargetTable, present: Sequence[int]) -> str:
    """Give the condition that identity columns GENERATED ALWAYS, which take no assignment, stay as they are."""
    always = (i for i in present if table.columns[i].identity == "a")
    return "".join(f" and t.{quote_identifier(table.columns[i].name)} = s.c{i}" for i in always)


def delete_staged(table: TargetTable, stage: str, within: str = "") -> str:
    """Delete the rows whose keys are staged. `within`: a further condition, here and below."""
    return f"delete from {table.sql} t using {stage} s where {key_matches(table)}{within}"


def update_staged(table: TargetTable, stage: str, present: Sequence[int], within: str = "") -> str:
    """Set the `present` columns of the rows whose keys are staged, unless an identity column GENERATED ALWAYS changes."""
    assignments = ", ".join(f"{quote_identifier(table.columns[i].name)} = s.c{i}" for i in assigned(table, present))
    return f"update {table.sql} t set {assignments} from {stage} s where {_staged_match(table, present)}{within}"


def beside_key(table: TargetTable) -> list[int]:
    """Give the columns beside the key that an UPDATE may assign."""
    keys = {column.index for column in table.key}
    return assigned(table, [i for i in range(len(table.columns)) if i not in keys])


def assigns_beside_key(table: TargetTable) -> bool:
    """Tell whether an UPDATE of a whole row under its key has a column to assign."""
    return bool(beside_key(table))


def update_whole_rows(table: TargetTable, stage: str, within: str = "") -> str:
    """Set every column beside the key of the rows that are staged whole, under the names c0, c1 … of all columns."""
    assignments = ", ".join(f"{quote_identifier(table.columns[i].name)} = s.c{i}" for i in beside_key(table))
    matches = " and ".join(f"{own_value(table.columns[c.index], 't')} {c.equals} s.c{c.index}" for c in table.key)
    return f"update {table.sql} t set {assignments} from {stage} s where {matches}{within}"


def count_staged(table: TargetTable, stage: str, present: Sequence[int]) -> str:
    """Count the rows that `update_staged` would hit: for updates that assign nothing."""
    return f"select count(*) from {table.sql} t join {stage} s on {_staged_match(table, present)}"


def row_image(table: TargetTable, alias: str, name: str = "") -> str:
    """Give a row of `alias` as a record; its columns are the table's own, or those staged under `name`."""
    columns = ", ".join(
        f"{alias}.{name}{i}" if name else own_value(column, alias) for i, column in enumerate(table.columns)
    )
    return f"row({columns})::record"  # a bare row constructor would be compared column by column


def delete_whole_rows(table: TargetTable, stage: str) -> str:
    """Delete, for each staged row, `n` of the rows that are its very image; `=` would take 1.0 for 1.00, and json has none."""
    target, staged = row_image(table, "t"), row_image(table, "s", "c")
    return f"""
        with hit as (
            select t.ctid as id, s.n, row_number() over (partition by s.seq) as number
            from {table.sql} t join {stage} s
              on hashtextextended({target}::text, 0) = hashtextextended({staged}::text, 0)
             and {target} operator(pg_catalog.*=) {staged}
        )
        delete from {table.sql} t using hit where t.ctid = hit.id and hit.number <= hit.n"""


def source_order_columns(table: TargetTable) -> list[tuple[str, str]]:
    """Give the columns that hold any change: number, kind, which values are present, old key or row, new row."""
    every = range(len(table.columns))
    old = key_stage_columns(table) if table.key else value_stage_columns(table, every, "o")
    return [("seq", "int"), ("op", "text"), ("present", "text"), *old, *value_stage_columns(table, every)]


def apply_in_source_order(table: TargetTable, stage: str) -> str:
    """Apply the staged changes one by one, each to exactly one row."""
    names = [quote_identifier(column.name) for column in table.columns]
    values = ", ".join(f"s.c{i}" for i in range(len(names)))
    # an identity column GENERATED ALWAYS takes no assignment: where it changes, the row is deleted and inserted
    always = [i for i, column in enumerate(table.columns) if column.identity == "a"]

    def value(i: int, row: str) -> str:
        return f"case substr(s.present, {i + 1}, 1) when '1' then s.c{i} else {row}.{names[i]} end"

    assignments = ", ".join(f"{name} = {value(i, 't')}" for i, name in enumerate(names) if i not in always)
    if table.key:
        match = key_matches(table)
    else:
        image = f"{row_image(table, 'x')} operator(pg_catalog.*=) {row_image(table, 's', 'o')}"
        match = f"t.ctid = (select x.ctid from {table.sql} x where {image} limit 1)"
    same = match + _keeps(table, always)
    update = (
        f"update {table.sql} t set {assignments} where {same};"
        if assignments
        else f"perform from {table.sql} t where {same};"
    )
    if always:
        kept = ", ".join(value(i, "gone") for i in range(len(names)))
        update += f"""
                    get diagnostics hit = row_count;
                    if hit = 0 then
                        with gone as (delete from {table.sql} t where {match} returning t.*)
                        insert into {table.name.sql} ({", ".join(names)}) overriding system value select {kept} from gone;
                    end if;"""
    return do(f"""
        declare s record; hit bigint;
        begin
            for s in select * from {stage} order by seq loop
                if s.op = '{INSERTED}' then
                    insert into {table.name.sql} ({", ".join(names)}) overriding system value values ({values});
                elsif s.op = '{DELETED}' then
                    delete from {table.sql} t where {match};
                else
                    {update}
                end if;
                get diagnostics hit = row_count;
                if hit <> 1 then
                    raise exception using errcode = '{WRONG_ROW_COUNT}', detail = s.seq,
                        message = format('a change of kind %s hits %s rows instead of one', s.op, hit);
                end if;
            end loop;
        end""")


def do(body: str) -> str:
    """Give a block as a statement, quoted by what no name in it contains."""
    quote = "$apply$"
    while quote in body:
        quote = f"{quote[:-1]}_$"
    return f"do {quote}{body} {quote}"
