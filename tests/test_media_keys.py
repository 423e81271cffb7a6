"""Whose rows a table holds: kept and found again as if they had come as JSON, under the limits of every other column."""

from __future__ import annotations

import asyncio
import json
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import bundles
import httpx
import msgspec
import pyarrow as pa
import pytest
from bundles import make_columns, make_project
from test_media import TABLES, refused, to_csv, to_parquet, to_stream, write

from ekiben.records import Field
from ekiben.serving.http import media
from ekiben.serving.http.app import ServiceApp
from ekiben.serving.bundle import Limits
from ekiben.serving.journal.erase import Eraser, Person
from ekiben.serving.journal.journal import read_journal
from ekiben.serving.problem import Problem
from ekiben.serving.scoring.scorer import Scorer
from ekiben.serving.http.state import State

MORE = (
    Field(name="account", kind="number", role="id", is_input=False),
    Field(name="mail", kind="text", role="private", is_input=False, missing=("?",)),
    Field(name="born", kind="date", role="private", is_input=False),
    Field(name="trusted", kind="flag", role="private", is_input=False),
)
NAMES = ("id", *(field.name for field in MORE))
WHO: list[dict[str, Any]] = [
    {"id": "c-17", "account": 9007199254740993, "mail": "ada@example.org", "born": "1815-12-10", "trusted": True},
    {"id": "Zürich, 東京", "account": 170, "mail": None, "born": "1912-06-23T08:30:00", "trusted": False},
    {"id": None, "account": None, "mail": " bob@example.org ", "born": None, "trusted": None},
    {"id": "c-17", "account": -1, "mail": "ada@example.org", "born": "1815-12-10", "trusted": True},
]


@pytest.fixture(scope="module")
def scorer(tmp_path_factory) -> Scorer:
    made = bundles.make_schema
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            bundles, "make_schema", lambda task: msgspec.structs.replace(made(task), fields=(*made(task).fields, *MORE))
        )
        folder = tmp_path_factory.mktemp("census")
        return Scorer(make_project(folder, limits=Limits(max_rows=2000, max_body_mb=0.2)).bundle)


def open_state(scorer: Scorer, journal: Path | None) -> State:
    state = State()
    state.open(scorer.bundle.folder, journal=journal)
    return state


def ask(state: State, kind: str, raw: bytes) -> httpx.Response:
    async def go() -> httpx.Response:
        transport = httpx.ASGITransport(app=ServiceApp(None, state=state))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as asking:
            return await asking.post("/predict", content=raw, headers={"content-type": kind})

    return asyncio.run(go())


def plain_rows() -> list[dict[str, Any]]:
    inputs = [{k: v for k, v in row.items() if k != "sex"} for row in make_columns(len(WHO), seed=5).to_rows()]
    return [{**row, **who} for row, who in zip(inputs, WHO, strict=True)]


def typed(rows: list[dict[str, Any]]) -> pa.Table:
    """The same rows with the types that a client's own table would have."""
    dates = [{k: row[k] and datetime.fromisoformat(row[k]) for k in ("since", "born")} for row in rows]
    return pa.Table.from_pylist([{**row, **said} for row, said in zip(rows, dates, strict=True)])


def body(kind: str, rows: list[dict[str, Any]]) -> bytes:
    if kind == media.JSON:
        return json.dumps({"rows": rows}).encode()
    return to_csv(rows) if kind == media.CSV else write(kind, typed(rows))


# ---- the journal


def test_a_table_is_kept_under_the_keys_that_its_rows_have_and_is_forgotten_with_them(scorer, tmp_path):
    state, kept = open_state(scorer, tmp_path), {}
    for kind in (media.JSON, *TABLES):
        answer = ask(state, kind, body(kind, plain_rows()))
        assert answer.status_code == 200, answer.text
        said = [p["id"] for p in answer.json()["predictions"]]
        state.journal.flush()
        events = {e["id"]: e for e in read_journal(tmp_path)}
        kept[kind] = [(events[id_]["keys"], events[id_]["inputs"]) for id_ in said]
    for kind in TABLES:
        assert [keys for keys, _ in kept[kind]] == [keys for keys, _ in kept[media.JSON]], kind
        assert all(inputs.keys() == kept[media.JSON][0][1].keys() for _, inputs in kept[kind])
    first, second, third, _ = [keys for keys, _ in kept[media.JSON]]
    assert first["id"] == "c-17" and first["account"] == "9007199254740993" and second["account"] == "170"
    assert third["id"] is None and third["trusted"] is None and second["mail"] is None
    assert all(len(first[name]) == 32 for name in ("mail", "born", "trusted"))
    state.journal.close()
    times = 1 + len(TABLES)
    for who, n in (("account=170", 1), ("mail=bob@example.org", 1), ("born=1815-12-10", 2)):
        assert Eraser(tmp_path, Person.parse(who)).erase().predictions == n * times, who
    assert read_journal(tmp_path) == []


def test_by_the_id_every_kind_of_body_is_found(scorer, tmp_path):
    state = open_state(scorer, tmp_path)
    for kind in TABLES:
        assert ask(state, kind, body(kind, plain_rows())).status_code == 200
    state.journal.close()
    assert Eraser(tmp_path, Person.parse("id=c-17")).erase().predictions == 2 * len(TABLES)
    assert Eraser(tmp_path, Person.parse("id=Zürich, 東京")).erase().predictions == len(TABLES)


@pytest.mark.parametrize("kind", TABLES)
def test_a_table_without_keys_is_kept_without(scorer, tmp_path, kind):
    state = open_state(scorer, tmp_path)
    rows = [{k: v for k, v in row.items() if k not in ("id", "born")} for row in plain_rows()]
    table = typed([{**row, "born": None} for row in rows]).drop_columns(["born"])
    assert ask(state, kind, to_csv(rows) if kind == media.CSV else write(kind, table)).status_code == 200
    state.journal.close()
    assert [(e["keys"]["id"], e["keys"]["born"]) for e in read_journal(tmp_path)] == [(None, None)] * len(rows)


def test_without_a_journal_they_are_not_read(scorer):
    state = open_state(scorer, None)
    table = typed(plain_rows()).set_column(6, "id", pa.array([[1]] * len(WHO)))
    assert ask(state, media.ARROW_STREAM, to_stream(table)).status_code == 200


# ---- the values


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (pa.array(["c-17", None]), ["c-17", None]),
        (pa.array(["c-17", None]).dictionary_encode(), ["c-17", None]),
        (pa.array(["c-17", None], pa.string_view()), ["c-17", None]),
        (pa.array([2**64 - 1, None], pa.uint64()), [2**64 - 1, None]),
        (pa.array([-17, None], pa.int8()).dictionary_encode(), [-17, None]),
        (pa.array([17.0, float("nan")]), [17.0, None]),
        (pa.array([0.5, None], pa.float16()), [0.5, None]),
        (pa.array([Decimal("12345678901234567890.00"), Decimal("0.25")]), [12345678901234567890, 0.25]),
        (pa.array([True, None]), [True, None]),
        (pa.array([date(1815, 12, 10), None]), ["1815-12-10", None]),
        (pa.array([date(1815, 12, 10), None], pa.date64()), ["1815-12-10", None]),
        (pa.array([datetime(1815, 12, 10), datetime(1815, 12, 10, 1)], pa.timestamp("s")), ["1815-12-10", "1815-12-10T01:00:00"]),
        (pa.array([0, 1_000], pa.timestamp("ns", tz="Europe/Paris")), ["1970-01-01", "1970-01-01T00:00:00.000001"]),
        (pa.nulls(2), [None, None]),
    ],
    ids=lambda value: str(value.type) if isinstance(value, pa.Array) else "",
)
@pytest.mark.parametrize("kind", TABLES[1:])
def test_a_key_of_any_type_is_what_json_would_say(scorer, kind, array, expected):
    table = typed(plain_rows()[:2]).drop_columns(list(NAMES)).append_column("id", array)
    _, keys = media.read_keyed(kind, write(kind, table), scorer, NAMES)
    assert keys == {"id": expected} and list(map(type, keys["id"])) == list(map(type, expected))


def test_a_key_of_a_csv_is_what_json_would_say(scorer):
    rows = [dict.fromkeys(scorer.reader.kinds, "") for _ in range(6)]
    said = {
        "id": ["007", " x ", "", "1e3", "nan", '"'],
        "account": ["007", " 17 ", "", "1e3", "nan", "9" * 400 + ".5"],
        "mail": ["?", " ?", "", "a,b", "true", "é"],
        "trusted": ["Yes", "0", "", "f", "1.0", "perhaps"],
    }
    _, keys = media.read_keyed(media.CSV, to_csv([{**row, **{n: v[i] for n, v in said.items()}} for i, row in enumerate(rows)]), scorer, NAMES)
    assert keys == {
        "id": ["007", " x ", None, "1e3", "nan", '"'],
        "account": [7, 17, None, 1000.0, "nan", "9" * 400 + ".5"],
        "mail": [None, " ?", None, "a,b", "true", "é"],
        "trusted": [True, 0.0, None, False, 1.0, "perhaps"],
    }
    assert keys["trusted"][0] is True and keys["trusted"][1] is not False


# ---- limits and refusals


@pytest.mark.parametrize(
    ("array", "got"),
    [
        (pa.array([[1]]), "list"),
        (pa.array([{"a": 1}]), "struct"),
        (pa.array([b"c-17"]), "binary"),
        (pa.array([b"c-17"], pa.binary(4)), "fixed_size_binary"),
        (pa.array([float("inf")]), "a value that JSON cannot say"),
        (pa.array([10**12], pa.timestamp("s")), "a value that JSON cannot say"),
    ],
    ids=lambda value: str(value.type) if isinstance(value, pa.Array) else "",
)
@pytest.mark.parametrize("kind", TABLES[1:])
def test_a_key_that_json_could_not_say_is_refused_by_column(scorer, kind, array, got):
    table = typed(plain_rows()[:1]).drop_columns(list(NAMES)).append_column("id", array)
    with pytest.raises(Problem) as caught:
        media.read_keyed(kind, write(kind, table), scorer, NAMES)
    assert caught.value.status == 422 and caught.value.errors[0]["column"] == "id" and got in caught.value.errors[0]["got"]
    media.read_columns(kind, write(kind, table), scorer)


def large(kind: str, table: pa.Table) -> bytes:
    return to_parquet(table, compression="zstd") if kind == media.PARQUET else to_stream(table, compression="zstd")


@pytest.mark.parametrize("kind", [media.ARROW_STREAM, media.PARQUET])
def test_a_key_that_is_small_when_packed_and_large_when_opened_is_refused(scorer, kind):
    texts = [str(i % 10) + "x" * 1000 for i in range(1000)]
    plain = pa.table({**{name: pa.nulls(1000) for name in scorer.reader.kinds}, "id": texts})
    coded = plain.set_column(plain.num_columns - 1, "id", plain["id"].dictionary_encode())
    for table in (plain, coded):
        raw = large(kind, table)
        assert len(raw) < 20_000
        with pytest.raises(Problem) as caught:
            media.read_keyed(kind, raw, scorer, NAMES)
        assert caught.value.status == 413
    if kind == media.PARQUET:
        media.read_columns(kind, large(kind, plain), scorer)


@pytest.mark.parametrize("kind", TABLES)
def test_a_key_that_comes_twice_is_refused(scorer, kind):
    table = typed(plain_rows()).append_column("id", pa.array(["x"] * len(WHO)))
    raw = (",".join([*scorer.reader.kinds, "id", "id"]) + "\n" + "," * 7 + "\n").encode() if kind == media.CSV else write(kind, table)
    assert "more than once" in str(refused(kind, raw, scorer))

