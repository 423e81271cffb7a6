"""Joins: right to the moment, no row lost, no future seen."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ekiben.data.join import JoinSource, join_sources, join_table, parse_sources
from ekiben.errors import DataError, SettingsError

START = dt.datetime(2026, 1, 1)


def day(n: int | None) -> dt.datetime | None:
    return None if n is None else START + dt.timedelta(days=n)


keys = st.one_of(st.none(), st.sampled_from(["a", "b", "c"]))
moments = st.one_of(st.none(), st.integers(0, 9))


@settings(deadline=None, max_examples=40)
@given(
    main=st.lists(st.tuples(keys, moments), min_size=1, max_size=15),
    other=st.lists(st.tuples(keys, moments, st.integers(0, 99)), max_size=15, unique_by=lambda r: r[:2]),
)
def test_an_asof_join_equals_a_naive_loop(
    main: list[tuple[str | None, int | None]], other: list[tuple[str | None, int | None, int]]
) -> None:
    expected = []
    for key, moment in main:
        candidates = [
            (t, value) for k, t, value in other if None not in (key, moment, k, t) and k == key and t <= moment  # type: ignore[operator]
        ]
        expected.append(max(candidates)[1] if candidates else None)
    left = pa.table({"k": pa.array([k for k, _ in main], pa.string()), "t": pa.array([day(t) for _, t in main], pa.timestamp("us"))})
    right = pa.table(
        {
            "k": pa.array([k for k, _, _ in other], pa.string()),
            "since": pa.array([day(t) for _, t, _ in other], pa.timestamp("us")),
            "value": pa.array([v for _, _, v in other], pa.int64()),
        }
    )
    joined, _ = join_table(left, right, JoinSource(name="r", location="", on=("k",), asof="since"), time="t")
    assert joined.column_names == ["k", "t", "r_since", "r_value"]
    assert joined.select(["k", "t"]).equals(left)
    assert joined["r_value"].to_pylist() == expected


@settings(deadline=None, max_examples=25)
@given(
    main=st.lists(st.tuples(keys, st.integers(0, 2)), min_size=1, max_size=15),
    other=st.dictionaries(st.tuples(st.sampled_from(["a", "b", "c"]), st.integers(0, 2)), st.integers(0, 99)),
)
def test_a_join_on_two_keys_equals_a_dictionary(main: list, other: dict) -> None:
    left = pa.table({"k": pa.array([k for k, _ in main], pa.string()), "n": pa.array([n for _, n in main])})
    right = pa.table(
        {"n": pa.array([n for _, n in other], pa.int64()), "k": pa.array([k for k, _ in other], pa.string()),
         "value": pa.array(list(other.values()), pa.int64())}
    )  # fmt: skip
    joined, _ = join_table(left, right, JoinSource(name="r", location="", on=("k", "n")))
    assert joined["r_value"].to_pylist() == [other.get(row) for row in main]


def test_keys_of_different_types_are_compared_as_texts() -> None:
    joined, warning = join_table(
        pa.table({"id": ["7", "8", "9"]}), pa.table({"id": [7.0, 8.0], "x": [1, 2]}), JoinSource(name="r", location="", on=("id",))
    )
    assert joined["r_x"].to_pylist() == [1, 2, None] and warning is None


def test_a_key_that_comes_twice_is_named_with_its_value() -> None:
    main, other = pa.table({"id": [1, 2]}), pa.table({"id": [1, 2, 2, None, None], "x": [1, 2, 3, 4, 5]})
    with pytest.raises(DataError, match="`r` has more than one row with id = 2; keep one row for each, or join `asof`"):
        join_table(main, other, JoinSource(name="r", location="", on=("id",)))


def test_what_is_not_there_is_named() -> None:
    main, other = pa.table({"id": [1], "t": [START]}), pa.table({"id": [1], "since": [START], "word": ["x"]})
    for source, time, says in (
        (JoinSource(name="r", location="", on=("idd",)), "", "the main table has no key column `idd`; did you mean `id`"),
        (JoinSource(name="r", location="", on=("t",)), "", "`r` has no key column `t`"),
        (JoinSource(name="r", location="", on=("id",), asof="since"), "", r"set `time = COLUMN` under \[columns\]"),
        (JoinSource(name="r", location="", on=("id",), asof="sinse"), "t", "no time column `sinse`; did you mean `since`"),
        (JoinSource(name="r", location="", on=("id",), asof="word"), "t", "not both dates or both numbers"),
    ):
        with pytest.raises(DataError, match=says):
            join_table(main, other, source, time=time)
    with pytest.raises(DataError, match="`r_x`, which is there already"):
        join_table(pa.table({"id": [1], "r_x": [1]}), pa.table({"id": [1], "x": [1]}), JoinSource(name="r", location="", on=("id",)))


def test_a_join_that_finds_little_is_warned_of() -> None:
    _, warning = join_table(
        pa.table({"id": ["007", "008", "009"]}), pa.table({"id": ["7", "8", "009"], "x": [1, 2, 3]}),
        JoinSource(name="r", location="", on=("id",)),
    )  # fmt: skip
    assert warning is not None and "2 of 3 rows found nothing in `r`" in warning.message


@pytest.mark.parametrize("line", ["rates", "rates = a.csv", "rates = a.csv on", "= a.csv on id", "r = a.csv on ,"])
def test_a_line_of_another_form_is_refused(line: str) -> None:
    with pytest.raises(SettingsError, match="is not of the form"):
        parse_sources(line)


def test_several_lines_are_read_and_names_come_once() -> None:
    text = "\n  a = x on y/a.csv on id\n\n  b = b.csv on id, day asof t\n"
    assert parse_sources(text) == (
        JoinSource(name="a", location="x on y/a.csv", on=("id",)),
        JoinSource(name="b", location="b.csv", on=("id", "day"), asof="t"),
    )
    with pytest.raises(SettingsError, match="comes twice"):
        parse_sources("a = x.csv on id\na = y.csv on id")


def test_sources_are_read_from_files_and_joined_in_their_order(tmp_path: Path) -> None:
    (tmp_path / "people.csv").write_text("id,town\n1,Ulm\n2,Bonn\n")
    (tmp_path / "towns.csv").write_text("people_town,size\nUlm,126\nBonn,330\n")
    told = SimpleNamespace(
        data=SimpleNamespace(sources="people = people.csv on id\ntowns = towns.csv on people_town", encoding="utf-8", missing=(), query=""),
        columns=SimpleNamespace(time=""),
    )
    joined, warnings = join_sources(pa.table({"id": [2.0, 1.0]}), told, root=tmp_path)
    assert joined.to_pydict() == {"id": [2.0, 1.0], "people_town": ["Bonn", "Ulm"], "towns_size": [330.0, 126.0]}
    assert warnings == []
