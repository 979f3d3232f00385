"""Shapes of a table on both sides, and the statements that mend the target."""

from __future__ import annotations

from live_migration.common.catalog import ColumnInfo
from live_migration.consumer.table_shape import (
    ColumnDefinition,
    copied_columns,
    find_differences,
    mending_statements,
    travels_binary,
)


def put_column(
    name: str,
    type_name: str = "integer",
    oid: int = 23,
    *,
    generated: str = "",
    identity: str = "",
    not_null: bool = False,
    collation: str = "",
    expression: str = "",
    is_inherited: bool = False,
) -> ColumnDefinition:
    info = ColumnInfo(name, type_name, oid, generated, identity, not_null)
    return ColumnDefinition(info, collation, expression, is_inherited)


def mend(*source: ColumnDefinition, target: tuple[ColumnDefinition, ...]) -> tuple[str, ...]:
    return mending_statements("t", "root", source, target)


def test_the_order_of_columns_does_not_matter() -> None:
    a, b = put_column("a"), put_column("b")
    assert find_differences([a, b], [b, a]) == ()
    assert mend(a, b, target=(b, a)) == ()


def test_a_missing_column_is_added_with_all_that_makes_it() -> None:
    added = put_column("b", "text", 25, not_null=True, collation='"C"', expression="'x'::text")
    differences = find_differences([put_column("a"), added], [put_column("a")])
    assert differences == ("column b (text) is missing on the target",)
    assert mend(put_column("a"), added, target=(put_column("a"),)) == (
        'ALTER TABLE t ADD COLUMN "b" text COLLATE "C" DEFAULT \'x\'::text NOT NULL;',
    )
    identity = put_column("i", "bigint", 20, identity="a", not_null=True)
    assert mend(identity, target=()) == ('ALTER TABLE t ADD COLUMN "i" bigint GENERATED ALWAYS AS IDENTITY NOT NULL;',)


def test_one_column_gone_and_one_come_of_the_same_type_is_a_rename() -> None:
    assert mend(put_column("new"), target=(put_column("old"),)) == ('ALTER TABLE t RENAME COLUMN "old" TO "new";',)
    assert mend(put_column("new", "bigint", 20), target=(put_column("old"),)) == (
        'ALTER TABLE t DROP COLUMN "old";',
        'ALTER TABLE t ADD COLUMN "new" bigint;',
    )


def test_another_type_is_altered_with_its_default() -> None:
    source = put_column("a", "bigint", 20, expression="7")
    assert mend(source, target=(put_column("a", expression="5"),)) == (
        'ALTER TABLE t ALTER COLUMN "a" DROP DEFAULT,'
        + ' ALTER COLUMN "a" TYPE bigint USING "a"::text::bigint, ALTER COLUMN "a" SET DEFAULT 7;',
    )


def test_generated_columns_make_way_for_another_type() -> None:
    generated = put_column("g", generated="s", expression="(a * 2)")
    source = (put_column("a", "bigint", 20), generated)
    assert mend(*source, target=(put_column("a"), generated)) == (
        'ALTER TABLE t DROP COLUMN "g";',
        'ALTER TABLE t ALTER COLUMN "a" TYPE bigint USING "a"::text::bigint;',
        'ALTER TABLE t ADD COLUMN "g" integer GENERATED ALWAYS AS ((a * 2)) STORED;',
    )
    assert [column.name for column in copied_columns(source)] == ["a"]


def test_generated_on_one_side_only_is_a_difference() -> None:
    generated, plain = put_column("g", generated="v", expression="1"), put_column("g")
    assert find_differences([generated], [plain]) == ("column g is generated on the source only",)
    assert find_differences([plain], [generated]) == ("column g is generated on the target only",)
    assert mend(generated, target=(plain,)) == (
        'ALTER TABLE t DROP COLUMN "g";',
        'ALTER TABLE t ADD COLUMN "g" integer GENERATED ALWAYS AS (1) VIRTUAL;',
    )


def test_not_null_matters_only_where_the_target_would_refuse_a_row() -> None:
    strict, loose = put_column("a", not_null=True), put_column("a")
    assert find_differences([strict], [loose]) == ()
    assert find_differences([loose], [strict]) == ("column a may be null on the source, not on the target",)
    assert mend(loose, target=(strict,)) == ('ALTER TABLE t ALTER COLUMN "a" DROP NOT NULL;',)


def test_inherited_columns_are_mended_at_the_root() -> None:
    source = (put_column("a", "bigint", 20, is_inherited=True), put_column("own"))
    assert mend(*source, target=(put_column("a", is_inherited=True),)) == (
        'ALTER TABLE root ALTER COLUMN "a" TYPE bigint USING "a"::text::bigint;',
        'ALTER TABLE t ADD COLUMN "own" integer;',
    )


def test_binary_needs_the_same_built_in_type_on_both_sides() -> None:
    number, mood = put_column("a"), put_column("m", "s.mood", 16500)
    assert travels_binary([number], [number])
    assert not travels_binary([number], [put_column("a", "bigint", 20)])
    assert not travels_binary([number, mood], [number, mood])
    assert travels_binary([number, put_column("g", "s.mood", 16500, generated="s")], [number])
