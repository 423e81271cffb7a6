"""Reading tables from wherever they are, and saying what is wrong with them."""

from __future__ import annotations

import gzip
import sqlite3
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from ekiben.data.sources import iter_batches, read_table, source_rows
from ekiben.errors import DataError
from ekiben.records import Field


def written(folder: Path, name: str, content: str | bytes) -> str:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def refusal(location: str, **options: object) -> str:
    with pytest.raises(DataError) as caught:
        read_table(location, **options)  # type: ignore[arg-type]
    message = str(caught.value)
    assert caught.value.exit_code == 2 and "\n" not in message
    return message


@pytest.mark.parametrize(
    "content",
    [
        "id,note\n007,a b\n008,\n",
        "\ufeffid,note\r\n007,a b\r\n008,\r\n",
        "id;note\n007;a b\n008;\n",
        "id|note\n007|a b\n008|\n",
        '"id","note"\n"007","a b"\n"008",\n',
        "id,note\n007,a b\n008,",
        "\n\nid,note\n\n007,a b\n\n008,\n\n",
    ],
    ids=["plain", "bom-crlf", "semicolon", "bar", "quoted", "no-last-newline", "blank-lines"],
)
def test_every_dialect_gives_the_same_table(tmp_path: Path, content: str) -> None:
    table = read_table(written(tmp_path, "t.csv", content))
    assert table.to_pydict() == {"id": ["007", "008"], "note": ["a b", None]}


def test_tabs_and_compression_follow_the_name(tmp_path: Path) -> None:
    packed = written(tmp_path, "t.tsv.gz", gzip.compress(b"a\tb\n1\tx,y\n"))
    assert read_table(packed).to_pydict() == {"a": [1.0], "b": ["x,y"]}


def test_a_quoted_field_may_hold_line_breaks_and_delimiters(tmp_path: Path) -> None:
    location = written(tmp_path, "t.csv", 'a,b\n"one\ntwo, three",1\nfour,2\n')
    assert read_table(location)["a"].to_pylist() == ["one\ntwo, three", "four"]


def test_one_column_is_enough(tmp_path: Path) -> None:
    assert read_table(written(tmp_path, "t.csv", "age\n39\n?\n41\n")).to_pydict() == {"age": [39.0, None, 41.0]}


def test_an_encoding_can_be_named(tmp_path: Path) -> None:
    location = written(tmp_path, "t.csv", "name,n\nJosé,1\n".encode("latin-1"))
    table = read_table(location, settings_data=SimpleNamespace(encoding="latin-1", missing=(), query=""))
    assert table["name"].to_pylist() == ["José"]


def test_a_wrong_encoding_far_into_a_file_names_line_and_byte(tmp_path: Path) -> None:
    rows = "".join(f"{i},{'x' * 40}\n" for i in range(5000))
    head = ("n,name\n" + rows).encode()
    message = refusal(written(tmp_path, "t.csv", head + "1,José\n".encode("latin-1")))
    assert f"line 5002: byte {len(head) + 5} is not utf-8; set `encoding = latin-1`" in message


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "the file is empty"),
        ("  \n\n", "the file is empty"),
        ("a,b\n", "line 1 is a header and no rows follow it"),
        ("a,b\n1,2\n3\n", "line 3: 1 fields came, 2 were expected"),
        ('a,b\n"x\ny",2\n3,4,5\n', "line 4: 3 fields came, 2 were expected"),
        ("a,b,a\n1,2,3\n", "line 1: the column name `a` comes twice (columns 1 and 3)"),
        ("a,,c\n1,2,3\n", "line 1: column 2 of 3 has no name"),
        (b"a,b\n\x00\x01,2\n", "this is not a text file"),
        (b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR", "this is not a text file"),
    ],
    ids=["empty", "blank", "header-only", "short-row", "ragged-after-quoted", "duplicate", "nameless", "zero-bytes", "picture"],
)
def test_a_broken_file_is_refused_with_file_and_line(tmp_path: Path, content: str | bytes, says: str) -> None:
    message = refusal(written(tmp_path, "people.csv", content))
    assert message.startswith(str(tmp_path / "people.csv")) and says in message


def test_a_ragged_row_beyond_the_first_block_is_found(tmp_path: Path) -> None:
    rows = "".join(f"{i},{'x' * 100}\n" for i in range(60_000))
    assert "line 60002: 3 fields came" in refusal(written(tmp_path, "t.csv", "a,b\n" + rows + "1,2,3\n"))


def test_a_missing_file_gets_the_nearest_name(tmp_path: Path) -> None:
    written(tmp_path, "train.csv", "a\n1\n")
    assert "did you mean `train.csv`?" in refusal(str(tmp_path / "trian.csv"))
    assert "there is no folder" in refusal(str(tmp_path / "nowhere" / "train.csv"))
    assert "is a folder" in refusal(str(tmp_path))
    assert "known endings" in refusal(written(tmp_path, "t.xlsx", "a"))


def test_a_truncated_gzip_is_refused(tmp_path: Path) -> None:
    whole = gzip.compress(b"a,b\n" + b"1,2\n" * 10_000)
    assert "cannot be read" in refusal(written(tmp_path, "t.csv.gz", whole[: len(whole) // 2]))


def test_a_glob_reads_all_files_in_order_and_names_the_odd_one(tmp_path: Path) -> None:
    written(tmp_path, "b.csv", "y,x\n4,3\n")
    written(tmp_path, "a.csv", "x,y\n1,2\n")
    assert read_table(str(tmp_path / "*.csv")).to_pydict() == {"x": [1.0, 3.0], "y": [2.0, 4.0]}
    written(tmp_path, "c.csv", "x,z\n1,2\n")
    message = refusal(str(tmp_path / "*.csv"))
    assert message.startswith(str(tmp_path / "c.csv")) and "`y`, `z`" in message
    assert "no file matches" in refusal(str(tmp_path / "*.parquet"))


def test_parquet_csv_and_json_lines_give_the_same_table(tmp_path: Path) -> None:
    table = pa.table({"code": ["007", "008"], "age": [39.0, None], "member": [True, False]})
    parquet.write_table(table, tmp_path / "t.parquet")
    csv = written(tmp_path, "t.csv", "code,age,member\n007,39,true\n008,,false\n")
    lines = written(tmp_path, "t.jsonl", '{"code":"007","age":39,"member":true}\n{"code":"008","age":null,"member":false}\n')
    array = written(tmp_path, "t.json", '[{"code":"007","age":39,"member":true},\n {"code":"008","age":null,"member":false}]')
    for location in (str(tmp_path / "t.parquet"), csv, lines, array):
        assert read_table(location).to_pydict() == table.to_pydict(), location


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"a": 1}\n{"a": \n', "line 2: this is not JSON"),
        ('{"a": 1}\n[1]\n', "line 2: an object was expected"),
        ('{"a": 1}\n{"a": [1]}\n', "line 2: `a` holds a list"),
        ("", "the file is empty"),
    ],
)
def test_broken_json_lines_name_the_line(tmp_path: Path, content: str, says: str) -> None:
    assert says in refusal(written(tmp_path, "t.jsonl", content))


def test_broken_parquet_is_refused(tmp_path: Path) -> None:
    assert "not a readable Parquet file" in refusal(written(tmp_path, "t.parquet", b"PAR1 no more"))
    parquet.write_table(pa.table({"a": [[1]]}), tmp_path / "nested.parquet")
    assert "`a` holds lists" in refusal(str(tmp_path / "nested.parquet"))


def test_a_database_answers_a_query_and_hides_its_password(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "loans.db")) as db, db:
        db.execute("CREATE TABLE loan (code TEXT, amount REAL)")
        db.executemany("INSERT INTO loan VALUES (?, ?)", [("007", 1.5), ("008", None), ("009", 3.0)])
    asked = SimpleNamespace(query="SELECT code, amount FROM loan ORDER BY code", encoding="utf-8", missing=())
    table = read_table("sqlite:///loans.db", settings_data=asked, root=tmp_path)
    assert table.to_pydict() == {"code": ["007", "008", "009"], "amount": [1.5, None, 3.0]}
    sizes = [b.num_rows for b in iter_batches("sqlite:///loans.db", settings_data=asked, root=tmp_path, batch_rows=2)]
    assert sizes == [2, 1]
    assert "needs a query" in refusal("sqlite:///loans.db", root=tmp_path)
    assert "no such database file" in refusal("sqlite:///laons.db", settings_data=asked, root=tmp_path)
    message = refusal("postgresql+nodriver://me:secret@localhost/x", settings_data=asked)
    assert "secret" not in message and "***" in message


def test_batches_are_typed_by_the_schema_and_name_the_row_that_does_not_fit(tmp_path: Path) -> None:
    location = written(tmp_path, "t.csv", "age,sex\n" + "39,M\n" * 9 + "forty,F\n")
    fields = (Field(name="age", kind="number"), Field(name="sex", kind="category"))
    with pytest.raises(DataError, match="row 9: column `age` takes a number, got 'forty'"):
        list(iter_batches(location, schema_fields=fields, batch_rows=4))
    whole = read_table(location, schema_fields=fields)
    assert whole.schema.types == [pa.string(), pa.string()]


def test_columns_limit_and_batch_rows_are_kept(tmp_path: Path) -> None:
    location = written(tmp_path, "t.csv", "a,b\n" + "".join(f"{i},{-i}\n" for i in range(10)))
    assert read_table(location, columns=["b"], limit=3).to_pydict() == {"b": [0.0, -1.0, -2.0]}
    assert [b.num_rows for b in iter_batches(location, batch_rows=4)] == [4, 4, 2]
    assert "did you mean `b`" in refusal(location, columns=["bb"])
    assert [b.schema.names for b in iter_batches("simulated:credit?rows=10", columns=["sex", "age"])] == [["sex", "age"]]


def test_rows_are_counted_only_where_it_is_cheap(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"a": range(7)}), tmp_path / "t.parquet")
    assert source_rows(str(tmp_path / "t.parquet")) == 7
    assert source_rows("simulated:credit?rows=123") == 123
    assert source_rows(written(tmp_path, "t.csv", "a\n1\n")) is None


def test_missing_markers_are_remembered_after_they_became_null(shared_data: Path) -> None:
    from ekiben.data.infer import infer_fields

    table = read_table(str(shared_data / "adult" / "train.csv"))
    fields = {f.name: f for f in infer_fields(table)}
    assert table["workclass"].null_count > 0 and fields["workclass"].missing == ("?",)
    again = read_table(str(shared_data / "adult" / "train.csv"), schema_fields=fields.values())
    assert again.equals(table)


cells = st.text(st.characters(codec="utf-8", exclude_characters="\x00\r", exclude_categories=("Cs",)), max_size=12)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(rows=st.lists(st.tuples(cells, cells), min_size=1, max_size=8))
def test_whatever_python_writes_is_read_back_as_texts(tmp_path: Path, rows: list[tuple[str, str]]) -> None:
    import csv

    path = tmp_path / "t.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL)
        writer.writerow(["first", "second"])
        writer.writerows(rows)
    read = [tuple(v or "" for v in row.values()) for b in iter_batches(str(path)) for row in b.to_pylist()]
    assert read == rows
