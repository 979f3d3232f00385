from __future__ import annotations

import random
from collections import Counter
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from live_migration.common.errors import FormatError
from live_migration.consumer.folding import NetEffect, NotFoldable, decode_change, fold, fold_whole_rows
from live_migration.consumer.row_encoding import UNCHANGED, Value
from tests.support.messages import put_delete, put_insert, put_update

Table = dict[bytes, list[Value]]


def _random_run(rng: random.Random, table: Table) -> list[bytes]:
    """Make changes that are possible on `table`, (key, a, b) by key, and apply them to it one by one."""
    messages = []
    for number in range(rng.randrange(1, 25)):
        fresh = b"f%d" % rng.randrange(6)
        choice = rng.random()
        if choice < 0.3 and fresh not in table:
            table[fresh] = [fresh, b"a%d" % number, rng.choice((None, b"b%d" % number))]
            messages.append(put_insert(1, table[fresh]))
        elif table:
            key = rng.choice(sorted(table))
            before = table[key]
            if choice < 0.5:
                del table[key]
                messages.append(put_delete(1, key=[key, None, None]))
            elif choice < 0.8 or fresh in table:
                table[key] = [key, b"u%d" % number, before[2]]
                messages.append(put_update(1, [key, b"u%d" % number, UNCHANGED]))
            else:
                del table[key]
                table[fresh] = [fresh, b"k%d" % number, before[2]]
                unsent = rng.random() < 0.3
                messages.append(
                    put_update(1, [fresh, b"k%d" % number, UNCHANGED if unsent else before[2]], key=[key, None, None])
                )
    return messages


def _apply(net: NetEffect, table: Table) -> Table:
    after = {key: list(row) for key, row in table.items()}
    for (key,) in net.deletes:
        assert key is not None
        del after[key]  # a KeyError: a row would not be hit
    for present, updates in net.updates.items():
        for (key,), values in updates:
            assert key is not None
            for index, value in zip(present, values, strict=True):
                after[key][index] = value
    for row in net.inserts:
        assert row[0] is not None
        assert row[0] not in after
        after[row[0]] = list(row)
    return after


@given(st.integers())
def test_net_effect_equals_one_by_one_application(seed: int) -> None:
    rng = random.Random(seed)
    table: Table = {b"f%d" % i: [b"f%d" % i, b"old", b"toasted%d" % i] for i in range(3)}
    before = {key: list(row) for key, row in table.items()}
    messages = _random_run(rng, table)
    with suppress(NotFoldable):
        assert _apply(fold(messages, [0]), before) == table


def test_a_key_change_with_a_value_that_stayed_behind_is_not_foldable() -> None:
    with pytest.raises(NotFoldable):
        fold([put_update(1, [b"2", UNCHANGED], key=[b"1", None])], [0])


def test_a_key_change_is_whole_when_the_batch_itself_holds_the_rest() -> None:
    messages = [put_insert(1, [b"1", b"big"]), put_update(1, [b"2", UNCHANGED], key=[b"1", None])]
    net = fold(messages, [0])
    assert net.inserts == [[b"2", b"big"]]
    assert not net.deletes
    assert not net.updates


def test_updates_are_grouped_by_the_columns_they_carry() -> None:
    net = fold([put_update(1, [b"1", b"x", UNCHANGED]), put_update(1, [b"2", UNCHANGED, b"y"])], [0])
    assert net.updates == {(1,): [((b"1",), [b"x"])], (2,): [((b"2",), [b"y"])]}


def test_an_unsent_key_value_comes_from_the_old_key() -> None:
    change = decode_change(put_update(1, [UNCHANGED, b"x"], key=[b"long key", None]))
    assert change.new == [b"long key", b"x"]


rows = st.tuples(st.sampled_from([b"1.0", b"1.00"]), st.sampled_from([None, b"x"]))


@given(st.lists(rows, max_size=4), st.integers())
def test_whole_rows_fold_to_the_same_multiset(start: list[tuple[bytes, bytes | None]], seed: int) -> None:
    rng = random.Random(seed)
    table = Counter(start)
    before = table.copy()
    messages = []
    for _ in range(rng.randrange(12)):
        fresh = (rng.choice((b"1.0", b"1.00")), rng.choice((None, b"x")))
        if rng.random() < 0.4 or not table.total():
            table[fresh] += 1
            messages.append(put_insert(1, fresh))
            continue
        old = rng.choice(list(table.elements()))
        table[old] -= 1
        if rng.random() < 0.5:
            messages.append(put_delete(1, old=old))
        else:
            table[fresh] += 1
            messages.append(put_update(1, fresh, old=old))
    deletes, inserts = fold_whole_rows(messages)
    assert not deletes - before, "a delete would not find its rows"
    assert before - deletes + inserts == +table


@pytest.mark.parametrize("message", [put_update(1, [b"1", b"x"], key=[b"2", None]), put_delete(1, old=[b"1", None])])
def test_a_message_cut_short_is_a_format_error(message: bytes) -> None:
    for length in range(5, len(message)):
        with pytest.raises(FormatError):
            decode_change(message[:length])
