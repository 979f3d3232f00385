"""What folding must not decide by itself: runs that go to the server in source order, which then says what is wrong."""

from __future__ import annotations

import pytest

from live_migration.consumer.folding import NotFoldable, fold, fold_whole_rows
from live_migration.consumer.row_encoding import UNCHANGED
from tests.support.messages import put_delete, put_insert, put_update

INSERT = put_insert(1, [b"1", b"a"])
UPDATE = put_update(1, [b"1", b"b"])
DELETE = put_delete(1, key=[b"1", None])


@pytest.mark.parametrize(
    "messages",
    [
        [DELETE, DELETE],
        [DELETE, UPDATE],
        [INSERT, INSERT],
        [UPDATE, INSERT],
        [DELETE, put_update(1, [b"2", b"b"], key=[b"1", None])],
        [put_insert(1, [b"2", b"x"]), put_update(1, [b"2", b"b"], key=[b"1", None])],  # onto a key that is there
    ],
    ids=["deleted twice", "updated after it was deleted", "inserted twice", "inserted over an updated row", "moved after it was deleted", "moved onto another"],
)  # fmt: skip
def test_a_run_that_contradicts_itself_is_left_to_the_server(messages: list[bytes]) -> None:
    with pytest.raises(NotFoldable):
        fold(messages, [0])


def test_a_key_that_is_not_in_the_stream_is_not_foldable() -> None:
    with pytest.raises(NotFoldable):
        fold([put_update(1, [UNCHANGED, b"x"])], [0])


def test_a_whole_row_with_a_value_left_out_is_not_foldable() -> None:
    with pytest.raises(NotFoldable):
        fold_whole_rows([put_insert(1, [b"1", UNCHANGED])])


def test_a_row_deleted_and_made_anew_is_replaced_whole() -> None:
    net = fold([DELETE, put_insert(1, [b"1", None])], [0])
    assert net.deletes == [(b"1",)]
    assert net.inserts == [[b"1", None]]
    assert not net.updates
