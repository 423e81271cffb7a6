"""Tables as bodies: the bits of the rows, the words of the rows, and nothing unpacked that is too large."""

from __future__ import annotations

import csv
import io
import subprocess
import sys
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.ipc as ipc
import pyarrow.parquet as pq
import pytest
from bundles import LEVELS, PLACES_SEEN, make_columns, make_project
from hypothesis import given, settings
from hypothesis import strategies as st

from ekiben.errors import RowError
from ekiben.serving.http import media
from ekiben.serving.bundle import Limits
from ekiben.serving.http.arrays import read_table
from ekiben.serving.http.cells import read_texts, to_json_value
from ekiben.serving.journal.journal import new_ids
from ekiben.serving.problem import Problem
from ekiben.serving.scoring.scorer import Scorer

TASKS = ("binary", "multiclass", "regression")
TABLES = (media.CSV, media.ARROW_STREAM, media.ARROW_FILE, media.PARQUET)


@pytest.fixture(scope="module")
def scorer(tmp_path_factory) -> Scorer:
    return Scorer(make_project(tmp_path_factory.mktemp("census"), limits=Limits(max_rows=2000, max_body_mb=1)).bundle)


@pytest.fixture(scope="module")
def strict(tmp_path_factory) -> Scorer:
    limits = Limits(missing="reject", unseen="reject", max_rows=2000, max_body_mb=1)
    return Scorer(make_project(tmp_path_factory.mktemp("strict"), limits=limits).bundle)


def to_csv(rows: list[dict[str, Any]]) -> bytes:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def to_stream(table: pa.Table, *, chunk: int | None = None, make: Any = ipc.new_stream, **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    with make(sink, table.schema, options=ipc.IpcWriteOptions(**options)) as stream:
        stream.write_table(table, max_chunksize=chunk)
    return sink.getvalue().to_pybytes()


def to_parquet(table: pa.Table, **options: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, **options)
    return sink.getvalue()


def write(kind: str, table: pa.Table) -> bytes:
    if kind == media.CSV:
        return to_csv([{k: v.isoformat() if isinstance(v, datetime) else v for k, v in row.items()} for row in table.to_pylist()])
    if kind == media.PARQUET:
        return to_parquet(table)
    return to_stream(table, make=ipc.new_stream if kind == media.ARROW_STREAM else ipc.new_file)


def people(n: int, seed: int = 5) -> pa.Table:
    """People as a client would send them, nulls for what is missing."""
    return pa.Table.from_pylist(
        [{**row, "since": row["since"] and datetime.fromisoformat(row["since"])} for row in make_columns(n, seed).to_rows()]
    )


def refused(kind: str, raw: bytes, scorer: Scorer) -> Problem:
    with pytest.raises(Problem) as caught:
        media.read_columns(kind, raw, scorer)
    return caught.value


# ---- the bits of the rows


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("kind", TABLES)
def test_a_table_gets_the_bits_that_its_rows_get(tmp_path, kind, task):
    scorer = Scorer(make_project(tmp_path, task=task).bundle)
    rows = make_columns(300, seed=5).to_rows()
    columns = media.read_columns(kind, write(kind, people(300)), scorer)
    prediction, decision = scorer.score_columns(columns)
    answers = [scorer.score_row(row) for row in rows]
    assert scorer.to_answers(prediction, decision) == answers
    ids = new_ids(300)
    for accept in media.ANSWERS:
        raw, said = media.write_predictions(accept, ids, prediction, decision, scorer, {"name": "census", "version": "7"})
        assert said.startswith(accept)
        assert read_back(accept, raw, scorer) == [
            msgspec.structs.replace(answer, id=id_) for answer, id_ in zip(answers, ids, strict=True)
        ]


def read_back(kind: str, raw: bytes, scorer: Scorer) -> list[Any]:
    """Return answers from the bytes that a client gets, as the scorer's own."""
    from ekiben.serving.scoring.answers import Answer

    if kind == media.JSON:
        said = msgspec.json.decode(raw)
        assert said["model"] == {"name": "census", "version": "7"}
        return msgspec.convert(said["predictions"], list[Answer])
    if kind == media.CSV:
        rows: list[dict[str, Any]] = list(csv.DictReader(io.StringIO(raw.decode(), newline="")))
    else:
        table = pq.read_table(io.BytesIO(raw)) if kind == media.PARQUET else ipc.open_stream(raw).read_all()
        assert table.schema.metadata[b"ekiben.version"] == b"7"
        rows = table.to_pylist()
    return [
        Answer(
            id=row["id"],
            label=row.get("label"),
            value=float(row["value"]) if "value" in row else None,
            probability=float(row["probability"]) if "probability" in row else None,
            probabilities={c: float(row[f"probability_{c}"]) for c in scorer.info.classes}
            if scorer.info.task == "multiclass"
            else None,
        )
        for row in rows
    ]


values = {
    "age": st.none() | st.floats(0, 120) | st.integers(0, 120),
    "income": st.none() | st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**63), 2**63),
    "job": st.none() | st.sampled_from(LEVELS) | st.text(st.characters(codec="utf-8"), max_size=5),
    "place": st.none() | st.sampled_from(PLACES_SEEN) | st.text(st.characters(codec="utf-8"), max_size=8),
    "member": st.none() | st.booleans() | st.sampled_from([0, 1, 0.0, 1.0]),
    "since": st.none() | st.datetimes().map(lambda d: d.isoformat()),
}
lists_of_rows = st.lists(st.fixed_dictionaries(values), min_size=1, max_size=8)


@settings(max_examples=100, deadline=None)
@given(rows=lists_of_rows)
def test_any_rows_are_read_from_csv_as_from_json(scorer, rows):
    expected = scorer.reader.read(rows)
    assert media.read_columns("text/csv", to_csv(rows), scorer).equals(expected)


@settings(max_examples=100, deadline=None)
@given(rows=lists_of_rows, coded=st.booleans(), kind=st.sampled_from(TABLES[1:]), data=st.data())
def test_any_rows_are_read_from_arrow_as_from_json(scorer, rows, coded, kind, data):
    expected = scorer.reader.read(rows)
    text = data.draw(st.sampled_from([pa.string(), pa.large_string(), pa.string_view()]))
    wanted = {"age": (pa.float64(), float), "income": (pa.float64(), float), "job": (text, str), "place": (text, str),
              "member": (pa.float32(), float), "since": (pa.timestamp("us"), datetime.fromisoformat)}  # fmt: skip
    table = pa.table(
        {
            name: pa.array([None if row[name] is None else make(row[name]) for row in rows], type_)
            for name, (type_, make) in wanted.items()
        }
    )
    if coded and text != pa.string_view():
        table = table.set_column(2, "job", table["job"].dictionary_encode())
    assert media.read_columns(kind, write(kind, table), scorer).equals(expected)


cells = st.sampled_from(["", "39", "-1", "121", "nan", "inf", "1e999", "1_0", "yes", "No", "1.0", "2", "?", " ", "2024-02-30"]) | st.text(
    st.characters(codec="utf-8"), max_size=6
)


@settings(max_examples=200, deadline=None)
@given(rows=st.lists(st.lists(cells, min_size=6, max_size=6), min_size=1, max_size=6), is_strict=st.booleans())
def test_any_cells_are_taken_or_refused_in_the_words_of_json(scorer, strict, rows, is_strict):
    reader = (strict if is_strict else scorer).reader
    fields = [check.field for check in reader.checks]
    plain = [{f.name: to_json_value(cell, f) for f, cell in zip(fields, row, strict=True)} for row in rows]
    results = []
    for read in (
        lambda: read_texts([f.name for f in fields], list(zip(*rows, strict=True)), reader),
        lambda: reader.read(plain),
    ):
        try:
            results.append(read())
        except RowError as error:
            results.append((str(error), error.fields))
    assert results[0] == results[1]


def test_what_a_csv_says_is_what_a_person_means(scorer):
    raw = '\ufeffage,income,job,place,member,since,sex\r\n 39 ,1e3," clerk","a ""b"", c",Yes,2024-05-01,\r\n\r\n,,,,,,M\r\n'.encode()
    expected = scorer.reader.read(
        [
            {"age": 39, "income": 1000, "job": "clerk", "place": 'a "b", c', "member": True, "since": "2024-05-01"},
            dict.fromkeys(scorer.reader.kinds),
        ]
    )
    assert media.read_columns('text/csv; charset="UTF-8"', raw, scorer).equals(expected)


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("age", pa.array([39], pa.uint8())),
        ("age", pa.array([39], pa.float16())),
        ("age", pa.array([Decimal("39.0")])),
        ("age", pa.array([39], pa.int64()).dictionary_encode()),
        ("age", pa.nulls(1)),
        ("age", pa.array([float("nan")])),
        ("member", pa.array([True])),
        ("member", pa.array([1], pa.int8())),
        ("since", pa.array([date(2024, 5, 1)])),
        ("since", pa.array([datetime(2024, 5, 1, 2, tzinfo=UTC)], pa.timestamp("ns", tz="Europe/Paris"))),
        ("since", pa.array(["2024-05-01T10:00+02:00"])),
        ("job", pa.nulls(1)),
        ("job", pa.DictionaryArray.from_arrays([0], pa.array([None, "clerk"]))),
    ],
)
@pytest.mark.parametrize("kind", TABLES[1:])
def test_types_of_arrow_that_stand_for_a_value_of_json(scorer, kind, name, array):
    if kind == media.PARQUET and pa.types.is_dictionary(array.type) and array.dictionary.null_count:
        pytest.skip("a Parquet file has no null in a dictionary")
    plain = array.to_pylist()[0]
    if isinstance(plain, float) and plain != plain:
        plain = None
    if hasattr(plain, "isoformat"):
        plain = plain.isoformat()
    row = {**dict.fromkeys(scorer.reader.kinds), name: float(plain) if isinstance(plain, Decimal) else plain}
    table = pa.table({**{other: pa.nulls(1) for other in row}, name: array})
    assert media.read_columns(kind, write(kind, table), scorer).equals(scorer.reader.read([row]))


# ---- the words of the rows


@pytest.mark.parametrize("kind", TABLES)
def test_a_wrong_row_is_named_as_in_json_and_its_value_is_not(scorer, kind):
    rows = people(5).to_pylist()
    rows[3]["age"] = 987654
    problem = refused(kind, write(kind, pa.Table.from_pylist(rows)), scorer)
    assert problem.status == 422
    assert problem.errors[0]["row"] == 3 and problem.errors[0]["column"] == "age"
    assert problem.errors[0]["allowed"] == "a number in [0, 120] or null"
    assert b"987654" not in problem.to_json()


@pytest.mark.parametrize("kind", TABLES)
def test_wrong_columns_are_said_once(scorer, kind):
    table = people(5).rename_columns(["agee", *people(1).column_names[1:]])
    problem = refused(kind, write(kind, table), scorer)
    assert problem.status == 422 and [e["column"] for e in problem.errors] == ["age", "agee"]
    assert "did you mean `age`?" in problem.errors[1]["message"]
    twice = people(5).append_column("age", people(5)["age"])
    if kind != media.CSV:
        assert "more than once" in str(refused(kind, write(kind, twice), scorer))
    assert "more than once" in str(refused(media.CSV, b"age,age\n1,1\n", scorer)) or "no such column" in str(
        refused(media.CSV, b"age,age\n1,1\n", scorer)
    )


@pytest.mark.parametrize(
    ("name", "array", "got"),
    [
        ("job", pa.array([3]), "int64"),
        ("age", pa.array([True]), "bool"),
        ("age", pa.array(["39"]), "string"),
        ("age", pa.array([[39]]), "list"),
        ("job", pa.array([b"clerk"]), "binary"),
        ("since", pa.array([1]), "int64"),
        ("age", pa.array([datetime(2024, 1, 1)]), "timestamp"),
        ("place", pa.array([{"city": "Paris"}]), "struct"),
    ],
)
@pytest.mark.parametrize("kind", TABLES[1:])
def test_types_that_json_would_not_have_are_refused_by_column(scorer, kind, name, array, got):
    problem = refused(kind, write(kind, pa.table({**{n: pa.nulls(1) for n in scorer.reader.kinds}, name: array})), scorer)
    assert problem.status == 422 and problem.errors[0]["column"] == name and got in problem.errors[0]["got"]


@pytest.mark.parametrize("kind", TABLES[1:])
@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("age", pa.array([float("inf")])),
        ("member", pa.array([2])),
        ("since", pa.array([10**12], pa.timestamp("s"))),
        ("since", pa.array([-(10**12)], pa.timestamp("s"))),
        ("since", pa.array([-(2**63)], pa.timestamp("us"))),
    ],
)
def test_values_that_json_could_not_say_are_refused(scorer, kind, name, array):
    problem = refused(kind, write_as(kind, pa.table({**{n: pa.nulls(1) for n in scorer.reader.kinds}, name: array})), scorer)
    assert problem.status == 422 and problem.errors[0]["column"] == name and problem.errors[0]["row"] == 0


def write_as(kind: str, table: pa.Table) -> bytes:
    return to_parquet(table, coerce_timestamps=None) if kind == media.PARQUET else write(kind, table)


@pytest.mark.parametrize(
    ("raw", "status", "words"),
    [
        (b"", 422, "no header"),
        (b"\n\n", 422, "no header"),
        (b"age,income,job,place,member,since\n", 422, "no rows"),
        (b"age,income,job,place,member,since\n1,2\n", 422, "row 0 has 2 fields, the header has 6"),
        (b"age;income;job\n1;2;3\n", 422, "no such column"),
        (b"age,income\xff\n", 400, "not UTF-8"),
        (b'age\n"39\n', 400, "line"),
        (b'age\n"39"x\n', 400, "line"),
        (b"age\n" + b"9" * 200_000, 400, "line"),
    ],
)
def test_a_csv_that_is_none(scorer, raw, status, words):
    problem = refused("text/csv", raw, scorer)
    assert problem.status == status and words in str(problem)


@pytest.mark.parametrize("said", ["text/plain", "application/json", "", "text/csv; charset=latin-1", "application/vnd.apache.arrow"])
def test_other_types_are_refused_with_the_list(scorer, said):
    problem = refused(said, b"", scorer)
    assert problem.status == 415 and b"text/csv" in dict(problem.headers)[b"accept"]


# ---- the answer's type


@pytest.mark.parametrize(
    ("accept", "chosen"),
    [
        ("", media.JSON),
        ("*/*", media.JSON),
        ("text/html, */*;q=0.1", media.JSON),
        ("text/csv", media.CSV),
        ("TEXT/CSV ; q=0.9, application/json;q=0.8", media.CSV),
        ("text/csv;q=0.2, application/json", media.JSON),
        ("text/csv;q=0", media.JSON),
        ("text/csv;q=x", media.JSON),
        ("application/vnd.apache.parquet, application/vnd.apache.arrow.stream", media.PARQUET),
        ("application/*;q=0.3, application/vnd.apache.arrow.stream;q=0.4", media.ARROW_STREAM),
    ],
)
def test_the_answer_is_of_the_type_that_is_preferred(accept, chosen):
    assert media.answer_type(accept) == chosen


def test_tables_need_nothing_heavy(tmp_path, scorer):
    paths = {}
    for i, kind in enumerate(TABLES):
        paths[kind] = str(tmp_path / str(i))
        Path(paths[kind]).write_bytes(write(kind, people(20)))
    program = f"""
import sys
from pathlib import Path
from ekiben.serving.http import media
from ekiben.serving.bundle import load_bundle
from ekiben.serving.scoring.scorer import Scorer
assert "pyarrow" not in sys.modules
scorer = Scorer(load_bundle(Path({str(scorer.bundle.folder)!r})))
for kind, path in {paths!r}.items():
    columns = media.read_columns(kind, Path(path).read_bytes(), scorer)
    for accept in media.ANSWERS:
        media.write_predictions(accept, ["x"] * columns.n, *scorer.score_columns(columns), scorer, {{}})
print(sorted({{"pandas", "sklearn", "mlflow", "optuna", "lightgbm", "scipy", "matplotlib"}} & set(sys.modules)))
"""
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert out.stdout.strip() == "[]", out.stdout + out.stderr


def test_a_row_of_a_table_in_memory_is_read_too(scorer):
    assert read_table(people(3), scorer.reader).equals(scorer.reader.read(make_columns(3, seed=5).to_rows()))
