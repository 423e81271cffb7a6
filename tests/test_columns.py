"""The container, the strict reader of requests, and the way through Arrow."""

import json
from datetime import datetime

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ekiben.arrow import from_arrow, to_arrow
from ekiben.columns import Columns, concat
from ekiben.errors import DataError, RowError
from ekiben.records import Field, Schema
from ekiben.rows import RowReader

FIELDS = (
    Field(name="age", kind="number", minimum=-1e12, maximum=1e12),
    Field(name="hired", kind="date"),
    Field(name="remote", kind="flag"),
    Field(name="job", kind="category", categories=("clerk", "nurse"), missing=("?",)),
    Field(name="note", kind="text"),
    Field(name="income", kind="number", role="target", is_input=False),
    Field(name="sex", kind="category", role="sensitive", is_input=False),
)
SCHEMA = Schema(fields=FIELDS, task="regression", target="income")
GOOD = {"age": 39, "hired": "2024-03-01", "remote": True, "job": "clerk", "note": "fine"}

ROWS = st.lists(
    st.fixed_dictionaries({
        "age": st.none() | st.integers(-(10**11), 10**11) | st.floats(-1e11, 1e11),
        "hired": st.none() | st.datetimes(datetime(1900, 1, 1), datetime(2100, 1, 1)).map(datetime.isoformat),
        "remote": st.none() | st.booleans() | st.sampled_from([0, 1]),
        "job": st.none() | st.sampled_from(["clerk", "nurse", "pilot", "?", ""]),
        "note": st.none() | st.text(min_size=1).filter(str.strip),
    }),
    max_size=5,
)  # fmt: skip


@given(ROWS)
def test_rows_that_were_read_can_be_written_and_read_again(rows):
    columns = Columns.from_rows(rows, SCHEMA)
    assert columns.n == len(rows) and list(columns) == ["age", "hired", "remote", "job", "note"]
    assert Columns.from_rows(json.loads(json.dumps(columns.to_rows())), SCHEMA) == columns


@given(ROWS)
def test_the_fast_way_of_reading_gives_what_the_careful_way_gives(rows):
    reader = RowReader(SCHEMA)
    assert reader.read(rows) == reader._read_each(rows)
    assert concat([reader.read([row]) for row in rows] or [reader.read([])]) == reader.read(rows)


@given(ROWS)
def test_a_request_means_what_the_same_table_means(rows):
    table = pa.table({name: pa.array([row[name] for row in rows]) for name in ("age", "hired", "job", "note")}
                     | {"remote": pa.array([None if r["remote"] is None else bool(r["remote"]) for r in rows], pa.bool_())})  # fmt: skip
    assert from_arrow(table, SCHEMA) == Columns.from_rows(rows, SCHEMA)


@given(ROWS)
def test_arrow_and_parquet_keep_kinds_and_values(rows):
    columns = Columns.from_rows(rows, SCHEMA)
    sink = pa.BufferOutputStream()
    pq.write_table(to_arrow(columns), sink)
    assert from_arrow(pq.read_table(pa.BufferReader(sink.getvalue()))) == columns


@pytest.mark.parametrize(
    ("column", "value", "got"),
    [
        ("age", "39", "a text"),
        ("age", True, "a flag"),
        ("age", float("nan"), "NaN or Infinity"),
        ("age", float("inf"), "NaN or Infinity"),
        ("age", 10**400, "NaN or Infinity"),
        ("age", 10**13, "a number outside"),
        ("age", [39], "a list"),
        ("remote", "true", "a text"),
        ("remote", 2, "a number other than 0 and 1"),
        ("job", 3, "a number"),
        ("job", False, "a flag"),
        ("hired", 20240301, "a number"),
        ("hired", "yesterday", "a text that is no such date"),
        ("note", {"text": "fine"}, "an object"),
    ],
)
@pytest.mark.parametrize("rows_before", [0, 3])
def test_a_wrong_value_is_refused_by_row_column_and_type_and_never_shown(column, value, got, rows_before):
    with pytest.raises(RowError) as caught:
        Columns.from_rows([GOOD] * rows_before + [GOOD | {column: value}], SCHEMA)
    error = caught.value
    assert (error.row, error.column, error.got) == (rows_before, column, got)
    assert error.allowed and f"row {rows_before}: column `{column}`" in str(error)
    shown = str(value) if not isinstance(value, dict) else "fine"
    assert shown not in str(error).replace("NaN or Infinity", "").replace("true or false", "") or shown in ("2", "3")


@pytest.mark.parametrize("missing", ["impute", "reject"])
@pytest.mark.parametrize("column", ["age", "hired", "remote", "job", "note"])
def test_null_is_missing_or_refused_as_the_policy_says(missing, column):
    reader = RowReader(SCHEMA, missing=missing)
    if missing == "impute":
        assert reader.read([GOOD | {column: None}]).to_rows()[0][column] is None
    else:
        with pytest.raises(RowError, match="got null"):
            reader.read([GOOD | {column: None}])


def test_a_column_that_is_not_nullable_takes_no_null_under_any_policy():
    schema = Schema(fields=(Field(name="age", kind="number", nullable=False),), task="regression", target="y")
    with pytest.raises(RowError, match="takes a number, got null"):
        Columns.from_rows([{"age": None}], schema)


def test_an_unseen_category_is_kept_or_refused_as_the_policy_says():
    assert Columns.from_rows([GOOD | {"job": "pilot"}], SCHEMA)["job"].tolist() == ["pilot"]
    with pytest.raises(RowError) as caught:
        Columns.from_rows([GOOD | {"job": "pilot"}], SCHEMA, unseen="reject")
    assert caught.value.allowed == "one of clerk, nurse or null" and "pilot" not in str(caught.value)


def test_a_missing_and_an_unknown_column_are_told_with_the_nearest_name():
    row = {key: value for key, value in GOOD.items() if key != "remote"} | {"remot": True}
    with pytest.raises(RowError) as caught:
        Columns.from_rows([row], SCHEMA)
    messages = [error["message"] for error in caught.value.errors]
    assert len(messages) == 2 and "did you mean `remote`" in messages[0] and "column `remote` takes" in messages[1]


def test_columns_of_the_training_table_that_are_no_inputs_are_accepted_and_ignored():
    read = Columns.from_rows([GOOD | {"income": "anything", "sex": 3}], SCHEMA)
    assert read == Columns.from_rows([GOOD], SCHEMA)


def test_at_most_twenty_mistakes_are_listed_and_rows_that_are_no_objects_are_among_them():
    with pytest.raises(RowError) as caught:
        Columns.from_rows([[1, 2]] + [GOOD | {"age": "x", "remote": "x"}] * 30, SCHEMA)
    assert len(caught.value.errors) == 20 and caught.value.errors[0]["got"] == "a list" and "19 more" in str(caught.value)


def test_white_space_around_a_category_and_a_missing_marker_mean_what_they_mean_in_training():
    for rows in ([GOOD | {"job": " clerk "}, GOOD | {"job": " ? "}], [GOOD | {"job": "?"}]):
        reader = RowReader(SCHEMA, unseen="reject")
        assert [row["job"] for row in reader.read(rows).to_rows()] == ["clerk", None][-len(rows) :]
        assert reader.read(rows) == reader.read(rows)


def test_dates_with_a_zone_are_moved_to_utc_and_the_fields_format_is_understood():
    schema = Schema(fields=(Field(name="d", kind="date", format="%d.%m.%Y"),), task="regression", target="y")
    read = Columns.from_rows([{"d": "31.12.2024"}, {"d": "2024-12-31T23:30:00-01:00"}], schema)
    assert read["d"].astype(str).tolist() == ["2024-12-31T00:00:00.000000", "2025-01-01T00:30:00.000000"]


def test_no_method_gives_a_way_to_write_into_columns():
    source = np.array([1.0, 2.0])
    columns = Columns({"a": source, "b": np.array(["x", None], dtype=object)})
    for made in (columns, columns.with_columns(c=columns["a"] * 2), columns.rows([1, 0]), columns.rows(slice(1)),
                 columns.pick(["a"]), concat([columns, columns]), from_arrow(to_arrow(columns)),
                 Columns.from_rows([GOOD], SCHEMA), Columns.from_rows([GOOD] * 3, SCHEMA)):  # fmt: skip
        for name in made:
            with pytest.raises(ValueError, match="read-only"):
                made[name][0] = made[name][0]
    source[0] = 5.0  # the caller's own array stays the caller's


def test_columns_of_different_length_or_unknown_kind_are_refused():
    with pytest.raises(DataError, match="column `b`: a column is one value per row: 2 rows"):
        Columns({"a": [1.0, 2.0], "b": [1.0]})
    with pytest.raises(DataError, match="cannot hold timedelta64"):
        Columns({"a": np.array([1], dtype="timedelta64[D]")})
    with pytest.raises(DataError, match="column `a`: these values are no number column"):
        Columns({"a": np.array(["x"], dtype=object)}, {"a": "number"})


def test_tables_with_different_columns_are_not_put_together():
    with pytest.raises(DataError, match="column `a` is not the same in both"):
        concat([Columns({"a": [1.0]}), Columns({"a": np.array(["x"], dtype=object)})])


def test_a_pandas_frame_of_every_dtype_comes_in():
    frame = pd.DataFrame({
        "i": [1, 2], "f": [0.5, np.nan], "b": [True, False], "nb": pd.array([True, None], dtype="boolean"),
        "s": ["x", None], "c": pd.Categorical(["u", None]), "d": pd.to_datetime(["2024-01-01", None]), "ni": pd.array([1, None], dtype="Int64"),
    }, index=[7, 9])  # fmt: skip
    columns = Columns.from_pandas(frame)
    kinds = ["number", "number", "flag", "flag", "category", "category", "date", "number"]
    assert list(columns.kinds.values()) == kinds and columns.to_pandas()["nb"].dtype == "boolean"
    assert Columns.from_pandas(columns.to_pandas()) == columns


def test_chunks_dictionaries_and_empty_tables_are_read_alike():
    schema = Schema(fields=(Field(name="job", kind="category"),), task="regression", target="y")
    plain = pa.chunked_array([["a", None], ["b", "a"], pa.array([], pa.string())])
    for column in (plain, plain.dictionary_encode(), plain.cast(pa.large_string()), pa.chunked_array([plain.combine_chunks()])):
        assert from_arrow(pa.table({"job": column}), schema)["job"].tolist() == ["a", None, "b", "a"]
    assert from_arrow(pa.table({"job": pa.array([], pa.string())}), schema).n == 0
    assert from_arrow(pa.table({"job": pa.nulls(2)}), schema)["job"].tolist() == [None, None]


def test_numbers_can_be_read_as_categories_and_numeric_texts_as_numbers():
    schema = Schema(
        fields=(Field(name="code", kind="category"), Field(name="age", kind="number", missing=("?",))), task="regression", target="y"
    )
    read = from_arrow(pa.table({"code": [1.0, 2.5, None], "age": ["3", "?", "4.5"]}), schema)
    assert read["code"].tolist() == ["1", "2.5", None] and read["age"].tolist()[::2] == [3.0, 4.5]
    with pytest.raises(DataError, match="column `age` takes a number, row 1 holds something else"):
        from_arrow(pa.table({"code": [1, 2], "age": ["3", "old"]}), schema)


def test_a_column_of_many_different_texts_is_read_like_one_of_few():
    field = Field(name="note", kind="text", missing=("?",))
    schema = Schema(fields=(field,), task="regression", target="y")
    texts = [f"text {i}" for i in range(1500)] + ["?", "", None, "text 3"]
    for column in (pa.chunked_array([texts[:700], texts[700:]]), pa.chunked_array([texts], pa.large_string())):
        read = from_arrow(pa.table({"note": column}), schema)["note"]
        assert read.tolist() == [*texts[:1500], None, None, None, "text 3"] and not read.flags.writeable
