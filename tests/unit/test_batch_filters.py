"""Which bloom filters of compressed batches are copied."""

from __future__ import annotations

from live_migration.consumer.batch_filters import filters_that_hold

_STATUS, _DEVICE = "_ts_meta_v2_bloomh_status", "_ts_meta_v2_bloomh_device"
_BOTH = "_ts_meta_v2_bloomh_1c2d_device_status"
_CUT = "_ts_meta_v2_bloomh_9a0b_" + "a" * 39


def test_all_filters_hold_where_every_column_is_hashed_by_value() -> None:
    assert filters_that_hold([_STATUS, _DEVICE, _BOTH, _CUT], []) == {_STATUS, _DEVICE, _BOTH, _CUT}


def test_a_filter_over_another_column_is_left_out_alone_and_within_one_of_several_columns() -> None:
    assert filters_that_hold([_STATUS, _DEVICE, _BOTH], ["status"]) == {_DEVICE}


def test_a_filter_whose_name_is_cut_may_be_over_any_column() -> None:
    assert filters_that_hold([_CUT, _DEVICE], ["status"]) == {_DEVICE}


def test_filters_of_older_versions_are_known_by_their_names() -> None:
    names = ["_ts_meta_v2_bloom1_status", "_ts_meta_v2_bloomg_status", "_ts_meta_v2_bloom1_kind"]
    assert filters_that_hold(names, ["status"]) == {"_ts_meta_v2_bloom1_kind"}


def test_a_name_of_another_form_is_left_out() -> None:
    assert filters_that_hold(["_ts_meta_v3_bloom"], ["status"]) == frozenset()
