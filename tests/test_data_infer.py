"""Guessing what a column holds, and converting it without losing anything."""

from __future__ import annotations

import datetime as dt

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ekiben.data.convert import MISSING, as_texts, convert, to_columns
from ekiben.data.infer import infer_field, infer_fields, looks_personal
from ekiben.records import Field
from ekiben.sections import MISSING as DEFAULT_MISSING


def test_the_markers_are_those_of_the_settings() -> None:
    assert MISSING == DEFAULT_MISSING


@pytest.mark.parametrize("marker", MISSING)
def test_every_marker_is_recognised_among_numbers_and_noted(marker: str) -> None:
    field = infer_field("age", pa.array(["39", marker, "41"]))
    assert (field.kind, field.missing) == ("number", (marker,))
    assert convert(pa.array(["39", marker]), field)[0].to_pylist() == [39.0, None]


@pytest.mark.parametrize(
    ("texts", "kind"),
    [
        (["1", "2.5", "-3e2"], "number"),
        (["007", "123"], "category"),
        (["1234567890123456789", "1"], "category"),
        (["0", "1"], "number"),
        (["0.5", "0"], "number"),
        (["true", "FALSE"], "flag"),
        (["yes", "no"], "category"),
        (["1_000", "2"], "category"),
        (["1,5", "2"], "category"),
        (["inf", "1"], "category"),
        (["2026-02-30", "2026-01-01"], "category"),
        (["?", ""], "category"),
    ],
)
def test_texts_are_taken_for_what_they_are(texts: list[str], kind: str) -> None:
    assert infer_field("x", pa.array(texts)).kind == kind


@pytest.mark.parametrize(
    ("texts", "format"),
    [
        (["2026-01-31", "2026-02-01"], None),
        (["2026-01-31 10:15", "2026-02-01 00:00"], None),
        (["2026-01-31T10:15:30.5Z", "2026-02-01T00:00:00+02:00"], None),
        (["31/01/2026", "01/02/2026"], "%d/%m/%Y"),
        (["01/31/2026", "01/02/2026"], "%m/%d/%Y"),
        (["01/02/2026", "03/04/2026"], "%d/%m/%Y"),
        (["31.01.2026 10:15", "01.02.2026 00:00"], "%d.%m.%Y %H:%M"),
        (["2026/01/31", "2026/02/01"], "%Y/%m/%d"),
        (["31-Jan-2026", "01-Feb-2026"], "%d-%b-%Y"),
    ],
)
def test_dates_are_found_in_the_format_they_are_written_in(texts: list[str], format: str | None) -> None:
    field = infer_field("x", pa.array(texts))
    assert (field.kind, field.format) == ("date", format)
    typed, unreadable = convert(pa.array(texts), field)
    assert typed.null_count == 0 and not any(unreadable.to_pylist())


def test_eight_digits_are_a_date_only_in_a_column_that_says_so() -> None:
    texts = pa.array(["20260131", "20260201"])
    assert infer_field("amount", texts).kind == "number"
    assert infer_field("order_date", texts).format == "%Y%m%d"
    assert infer_field("order_date", pa.array(["20260131", "20269901"])).kind == "number"


def test_zones_are_brought_to_one_clock() -> None:
    typed, _ = convert(pa.array(["2026-01-01T01:00:00+01:00", "2026-01-01"]), Field(name="t", kind="date"))
    assert typed.to_pylist() == [dt.datetime(2026, 1, 1), dt.datetime(2026, 1, 1)]


def test_identifiers_are_told_from_counts() -> None:
    rows = 40
    table = pa.table(
        {
            "instant": [str(i + 1) for i in range(rows)],
            "customerID": [str(7 * i % 41 + 100) for i in range(rows)],
            "token": [f"{i:08x}" for i in range(rows)],
            "visits": [str((i * i) % 13) for i in range(rows)],
            "income": [str(1000.5 + i * i) for i in range(rows)],
            "branch_id": [str(i % 3) for i in range(rows)],
            "zip": [str(10000 + i % 9) for i in range(rows)],
            "name": [f"person {i} of the house" for i in range(rows)],
        }
    )
    found = {f.name: (f.kind, f.role) for f in infer_fields(table)}
    assert found == {
        "instant": ("number", "id"),
        "customerID": ("number", "id"),
        "token": ("category", "id"),
        "visits": ("number", "feature"),
        "income": ("number", "feature"),
        "branch_id": ("category", "feature"),
        "zip": ("category", "feature"),
        "name": ("text", "feature"),
    }


def test_limits_are_guards_and_no_straitjacket() -> None:
    limits = {
        "age": ["17", "90"],
        "temperature": ["-3", "20"],
        "humidity": ["0.25", "1.0"],
        "smoothness": ["0.05", "0.16"],
        "down_pct": ["0.5", "99"],
        "hit_ratio": ["0.1", "0.2"],
    }
    found = {name: infer_field(name, pa.array(texts)) for name, texts in limits.items()}
    assert {name: (f.minimum, f.maximum) for name, f in found.items()} == {
        "age": (0, None),
        "temperature": (None, None),
        "humidity": (0, 1),
        "smoothness": (0, None),
        "down_pct": (0, 100),
        "hit_ratio": (0, 1),
    }


def test_categories_are_listed_only_when_all_have_been_met_more_than_once() -> None:
    assert infer_field("c", pa.array(["a", "b"] * 20)).categories == ("a", "b")
    assert infer_field("c", pa.array(["a", "b"] * 20 + ["c"])).categories == ()
    assert infer_field("c", pa.array([f"v{i}" for i in range(51)] * 2)).categories == ()


def test_typed_tables_keep_their_types() -> None:
    table = pa.table(
        {
            "n": pa.array([1, 2, None], pa.int32()),
            "f": [True, False, None],
            "d": pa.array([dt.date(2026, 1, 1), None, None]),
            "c": pa.array(["a", "b", "a"]).dictionary_encode(),
            "x": pa.array([1.5, float("nan"), 2.0], pa.float32()),
            "m": pa.array([None, None, None]),
        }
    )
    fields = infer_fields(table)
    assert [f.kind for f in fields] == ["number", "flag", "date", "category", "number", "category"]
    columns = to_columns(table, fields)
    assert np.isnan(columns["x"][1]) and np.isnat(columns["d"][1]) and columns["c"].tolist() == ["a", "b", "a"]
    assert columns["f"][:2].tolist() == [1.0, 0.0] and columns["m"].tolist() == [None] * 3


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("email", "", "e-mail address"),
        ("contact", "eva@example.org", "e-mail address"),
        ("client_ip", "", "IP address"),
        ("host", "10.0.0.1", "IP address"),
        ("phoneNumber", "", "telephone number"),
        ("reach", "+49 89 1234567", "telephone number"),
        ("SSN", "", "national identity number"),
        ("reference", "123-45-6789", "national identity number"),
        ("last_name", "", "name"),
        ("name", "Braund, Mr. Owen Harris", "name"),
        ("station_name", "central station", ""),
        ("town", "New York", ""),
        ("date_of_birth", "", "date of birth"),
        ("home address", "", "address"),
        ("payment", "DE89370400440532013000", "account or card number"),
        ("ship", "North", ""),
        ("mailing_type", "", ""),
        ("filename", "a.csv", ""),
        ("amount", "39.5", ""),
        ("day", "2026-01-31", ""),
        ("version", "1.2.3", ""),
    ],
)
def test_personal_data_is_seen_by_name_or_by_pattern(name: str, value: str, what: str) -> None:
    assert looks_personal(name, pa.array([value] * 3)) == what


numbers = st.floats(allow_nan=False, allow_infinity=False, width=64)


@given(st.lists(st.one_of(st.none(), numbers), min_size=1, max_size=20))
def test_numbers_survive_being_written_and_read(values: list[float | None]) -> None:
    texts = pa.array([None if v is None else repr(v) for v in values], pa.string())
    typed, unreadable = convert(texts, Field(name="x", kind="number"))
    assert typed.to_pylist() == values and not any(unreadable.to_pylist())


@given(st.lists(st.integers(-(2**52), 2**52), min_size=1, max_size=20))
def test_whole_numbers_read_as_texts_have_no_point(values: list[int]) -> None:
    assert as_texts(pa.array([float(v) for v in values])).to_pylist() == [str(v) for v in values]


@given(st.lists(st.one_of(st.none(), st.text(max_size=10)), max_size=20), st.sampled_from(["number", "flag", "date", "category", "text"]))
def test_converting_never_fails_and_accounts_for_every_value(values: list[str | None], kind: str) -> None:
    typed, unreadable = convert(pa.array(values, pa.string()), Field(name="x", kind=kind))  # type: ignore[arg-type]
    for value, got, bad in zip(values, typed.to_pylist(), unreadable.to_pylist(), strict=True):
        assert not (bad and got is not None)
        assert got is not None or bad or value is None or not value.strip()
