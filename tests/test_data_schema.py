"""The schema page, roles and classes, and the check of every row."""

from __future__ import annotations

import datetime as dt
import shutil
import subprocess
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandera.pandas as pandera
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ekiben.data.credit import simulate_credit
from ekiben.data.infer import infer_fields
from ekiben.data.schema import build_schema, fields_from_pandera, pandera_source, validate
from ekiben.data.sources import read_table
from ekiben.data.table import DataWarning, check_target, drop_missing_target, label_texts, target_of
from ekiben.errors import DataError
from ekiben.records import Field, Schema
from ekiben.sections import ColumnsSection, DataSection


def settings_for(target: str, task: str = "auto", **columns: Any) -> SimpleNamespace:
    return SimpleNamespace(data=DataSection(task=task), columns=ColumnsSection(target=target, **columns))  # type: ignore[arg-type]


def page_of(fields: tuple[Field, ...]) -> pandera.DataFrameSchema:
    found: dict[str, Any] = {}
    exec("import pandera.pandas as pa\n" + pandera_source(fields), found)
    return found["table"]


names = st.text(min_size=1, max_size=30)
fields_drawn = st.lists(
    st.one_of(
        st.builds(
            Field,
            name=names,
            kind=st.just("number"),
            minimum=st.one_of(st.none(), st.integers(-5, 0).map(float)),
            maximum=st.one_of(st.none(), st.integers(1, 500).map(float)),
            nullable=st.booleans(),
            missing=st.lists(names, max_size=2).map(tuple),
            unique=st.booleans(),
        ),
        st.builds(
            Field,
            name=names,
            kind=st.just("category"),
            categories=st.lists(st.text(max_size=30), max_size=8, unique=True).map(tuple),
        ),
        st.builds(Field, name=names, kind=st.just("date"), format=st.sampled_from([None, "%d/%m/%Y"])),
        st.builds(Field, name=names, kind=st.sampled_from(["flag", "text"])),
    ),
    max_size=5,
    unique_by=lambda f: f.name,
).map(tuple)


@given(fields_drawn)
def test_what_is_written_on_the_page_is_read_back_from_it(fields: tuple[Field, ...]) -> None:
    assert fields_from_pandera(page_of(fields)) == fields


@pytest.mark.skipif(shutil.which("ruff") is None, reason="ruff is not installed")
def test_the_page_is_laid_out_as_a_formatter_would() -> None:
    fields = (
        *infer_fields(simulate_credit("simulated:credit?rows=3000")),
        Field(name='a "quoted" name', kind="number", minimum=0, maximum=1, missing=("?", "-1")),
        Field(name="x" * 60, kind="category", categories=tuple(f"level number {i}" for i in range(12)), missing=("?",) * 3),
        Field(name="y" * 70, kind="date", format="%d/%m/%Y %H:%M", nullable=False, unique=True),
    )
    text = pandera_source(fields) + "\n"
    command = ["ruff", "format", "--line-length", "120", "--isolated", "-"]
    formatted = subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout
    assert formatted == text


def test_a_page_written_by_hand_is_understood() -> None:
    page = pandera.DataFrameSchema(
        {
            "age": pandera.Column(int, pandera.Check.in_range(0, 120)),
            "sex": pandera.Column(str, pandera.Check.isin(["f", "m"]), nullable=True),
            "since": pandera.Column("datetime64[ns]"),
            "member": pandera.Column(bool),
            "story": pandera.Column(str, metadata={"kind": "text"}),
        }
    )
    assert fields_from_pandera(page) == (
        Field(name="age", kind="number", minimum=0, maximum=120, nullable=False),
        Field(name="sex", kind="category", categories=("f", "m")),
        Field(name="since", kind="date", nullable=False),
        Field(name="member", kind="flag", nullable=False),
        Field(name="story", kind="text", nullable=False),
    )
    page = pandera.DataFrameSchema({"age": pandera.Column(metadata={"kind": "numbr"})})
    with pytest.raises(DataError, match="did you mean `number`"):
        fields_from_pandera(page)


def test_roles_decide_what_the_model_sees() -> None:
    fields = (*(Field(name=n, kind="number") for n in "ytgspix"), Field(name="k", kind="number", unique=True))
    asked = settings_for("y", task="regression", time="t", group="g", sensitive=("s",), private=("p",), ignore=("i",))
    notes: list[DataWarning] = []
    schema = build_schema(fields, asked, np.arange(9.0), notes=notes)
    assert [f.name for f in schema.inputs] == ["t", "x"]
    assert schema["k"].role == "id" and [n.columns for n in notes] == [("k",)]
    asked = settings_for("y", task="regression", sensitive=("s",), sensitive_as_input=True)
    assert "s" in [f.name for f in build_schema(fields, asked, np.arange(9.0)).inputs]


def test_a_column_that_settings_name_must_be_there() -> None:
    fields = (Field(name="income", kind="category"), Field(name="sex", kind="category"))
    with pytest.raises(DataError, match=r"\[columns\] sensitive in settings.ini names `sxe`.*did you mean `sex`"):
        build_schema(fields, settings_for("income", sensitive=("sxe",)), ["a", "b"])
    with pytest.raises(DataError, match=r"target in settings.ini names `incme`.*did you mean `income`"):
        build_schema(fields, settings_for("incme"), ["a", "b"])


@pytest.mark.parametrize(
    ("kind", "values", "task", "classes"),
    [
        ("category", ["no", "yes", "no"], "binary", ("no", "yes")),
        ("category", [">50K", "<=50K", ">50K", ">50K"], "binary", ("<=50K", ">50K")),
        ("category", ["a", "b", "b"], "binary", ("b", "a")),
        ("number", [0, 1, 1], "binary", ("0", "1")),
        ("number", [2, 1, 1], "binary", ("2", "1")),
        ("flag", [True, False], "binary", ("false", "true")),
        ("category", ["b", "c", "a"], "multiclass", ("a", "b", "c")),
        ("number", [10, 9, 2], "multiclass", ("2", "9", "10")),
        ("number", [0.5, 1.5, 2], "regression", ()),
        ("number", list(range(21)), "regression", ()),
        ("category", ["1", "2", None, "2"], "binary", ("2", "1")),
    ],
)
def test_the_task_follows_from_the_target(kind: str, values: list, task: str, classes: tuple[str, ...]) -> None:
    schema = build_schema((Field(name="y", kind=kind),), settings_for("y"), pa.array(values))  # type: ignore[arg-type]
    assert (schema.task, schema.classes) == (task, classes)


def test_settings_overrule_task_and_positive_class() -> None:
    fields = (Field(name="y", kind="number"),)
    assert build_schema(fields, settings_for("y", task="regression"), [0, 1, 2]).task == "regression"
    assert build_schema(fields, settings_for("y", positive="0"), [0, 1, 1]).classes == ("1", "0")
    with pytest.raises(DataError, match="has no such class"):
        build_schema(fields, settings_for("y", positive="2"), [0, 1, 1])
    with pytest.raises(DataError, match="for two classes"):
        build_schema(fields, settings_for("y", positive="2"), [0, 1, 2])
    with pytest.raises(DataError, match="has 3 classes"):
        build_schema(fields, settings_for("y", task="binary"), [0, 1, 2])


@pytest.mark.parametrize(
    ("kind", "values", "says"),
    [
        ("category", ["a", "a"], "`a` in every row"),
        ("category", [None, None], "missing in every row"),
        ("date", [dt.datetime(2026, 1, 1)] * 2, "a date"),
        ("category", [f"t{i}" for i in range(30)], "holds texts"),
    ],
)
def test_a_target_that_cannot_be_predicted_is_refused(kind: str, values: list, says: str) -> None:
    with pytest.raises(DataError, match=says):
        build_schema((Field(name="y", kind=kind),), settings_for("y"), pa.array(values))  # type: ignore[arg-type]


def test_the_target_becomes_indices_and_missing_ones_are_dropped_and_counted() -> None:
    from ekiben.columns import Columns

    schema = Schema(
        fields=(Field(name="y", kind="number", role="target", is_input=False),), task="binary", target="y", classes=("0", "1")
    )
    columns = Columns({"y": np.array([1.0, np.nan, 0.0])})
    with pytest.raises(DataError, match="missing in row 1"):
        target_of(columns, schema)
    known, dropped = drop_missing_target(columns, schema)
    assert dropped == 1 and target_of(known, schema).tolist() == [1, 0]
    with pytest.raises(DataError, match="class `2` in row 0 that the schema does not know"):
        target_of(Columns({"y": np.array([2.0])}), schema)
    with pytest.raises(DataError, match="no target column `y`"):
        target_of(Columns({"x": np.array([2.0])}), schema)


def test_too_few_rows_or_classes_are_refused() -> None:
    schema = Schema(fields=(Field(name="y", kind="category"),), task="multiclass", target="y", classes=("a", "b", "c"))
    check_target(np.array([0, 1, 2] * 5), schema)
    with pytest.raises(DataError, match=r"class `c` \(4 rows\)"):
        check_target(np.array([0, 1, 2] * 4 + [0, 1]), schema)
    with pytest.raises(DataError, match="`b` in every row"):
        check_target(np.ones(20, dtype=np.int64), schema)
    with pytest.raises(DataError, match="known in 9 rows"):
        check_target(np.array([0, 1, 2] * 3), schema)
    regression = Schema(fields=(Field(name="y", kind="number"),), task="regression", target="y")
    with pytest.raises(DataError, match="is 3 in every row"):
        check_target(np.full(20, 3.0), regression)


def test_labels_are_texts_whatever_the_kind() -> None:
    assert label_texts(np.array([1.0, 0.5, np.nan]), "number").tolist() == ["1", "0.5", None]
    assert label_texts(np.array([1.0, 0.0, np.nan]), "flag").tolist() == ["true", "false", None]


page = pandera.DataFrameSchema(
    {
        "age": pandera.Column(float, pandera.Check.in_range(0, 120), nullable=True, metadata={"missing": ["?"]}),
        "sex": pandera.Column(str, pandera.Check.isin(["Female", "Male"]), nullable=False, metadata={"missing": ["?"]}),
        "since": pandera.Column("datetime64[us]", nullable=True, metadata={"kind": "date", "format": "%d/%m/%Y"}),
        "key": pandera.Column(str, unique=True, nullable=False),
        "count": pandera.Column(int, pandera.Check(lambda s: s % 2 == 0, name="even", element_wise=False)),
    }
)
people = pa.table(
    {
        "age": ["39", "121", "x", None, "5", "6", "?"],
        "sex": ["Male", "Female", "Male", "?", "Mal", "Male", "Female"],
        "since": ["31/12/2011", "", "2011-12-31", None, "01/01/2012", "02/01/2012", ""],
        "key": ["a", "b", "c", "d", "e", "a", "f"],
        "count": ["2", "4", "3", "2", "2", "2", "8"],
        "shoe": ["1"] * 7,
    }
)


def test_bad_rows_are_set_aside_as_they_came_with_every_reason() -> None:
    found = validate(people, page, fields_from_pandera(page), "quarantine")
    aside = found.quarantined.to_pydict()
    assert aside["_row"] == [0, 1, 2, 3, 4, 5]
    assert aside["_reason"] == [
        "column `key` may hold no value twice, got 'a' again",
        "column `age` must be between 0 and 120, got 121",
        "column `age` takes a number, got 'x'; column `since` takes a date (%d/%m/%Y), got '2011-12-31'; "
        "column `count` breaks the check `even`, got 3",
        "column `sex` may not be missing",
        "column `sex` has no category 'Mal'; did you mean `Male`?",
        "column `key` may hold no value twice, got 'a' again",
    ]
    assert aside["age"][2] == "x" and found.notes[0].columns == ("shoe",)


def test_the_good_rows_stay_in_order_with_their_types() -> None:
    found = validate(people.slice(1), page, fields_from_pandera(page), "quarantine")
    assert found.good["key"].tolist() == ["a", "f"] and found.good["count"].tolist() == [2.0, 8.0]
    assert found.good["age"][0] == 6.0 and np.isnan(found.good["age"][1])
    assert found.good.kinds == {"age": "number", "sex": "category", "since": "date", "key": "category", "count": "number"}


def test_the_first_bad_row_is_named_and_the_others_counted() -> None:
    with pytest.raises(DataError) as caught:
        validate(people.slice(1), page, fields_from_pandera(page))
    assert str(caught.value).startswith("row 0: column `age` must be between 0 and 120, got 121 (and 3 more rows")
    assert (caught.value.row, caught.value.column) == (0, "age")


def test_nothing_left_is_an_error() -> None:
    with pytest.raises(DataError, match="every row breaks the schema"):
        validate(people.slice(1, 2), page, fields_from_pandera(page), "quarantine")


def test_a_whole_number_column_refuses_fractions() -> None:
    page = pandera.DataFrameSchema({"n": pandera.Column(int)})
    with pytest.raises(DataError, match=r"takes a whole number, got '2\.5'"):
        validate(pa.table({"n": ["1", "2.5"]}), page, fields_from_pandera(page))


def test_a_declared_column_must_come_unless_it_is_optional() -> None:
    with pytest.raises(DataError, match=r"no column `age`; did you mean `agee`"):
        validate(people.rename_columns(["agee", *people.column_names[1:]]), page, fields_from_pandera(page))
    page_ = pandera.DataFrameSchema({"n": pandera.Column(float), "m": pandera.Column(float, required=False)})
    assert validate(pa.table({"n": [1.0]}), page_, fields_from_pandera(page_)).good.n == 1


def test_a_check_of_the_whole_table_is_kept() -> None:
    page = pandera.DataFrameSchema(
        {"a": pandera.Column(float), "b": pandera.Column(float)}, checks=pandera.Check(lambda df: df["a"] <= df["b"], name="ordered")
    )
    found = validate(pa.table({"a": [1.0, 3.0], "b": [2.0, 2.0]}), page, fields_from_pandera(page), "quarantine")
    assert found.quarantined["_row"].to_pylist() == [1]


def test_real_tables_pass_the_page_inferred_from_them(shared_data: Any) -> None:
    for name in ("adult/train.csv", "bike_sharing/hour.csv", "electricity/elec.csv"):
        table = read_table(str(shared_data / name))
        fields = infer_fields(table)
        page = page_of(fields)
        found = validate(read_table(str(shared_data / name), schema_fields=fields), page, fields_from_pandera(page))
        assert found.good.n == table.num_rows and found.quarantined.num_rows == 0


def test_adults_test_file_passes_the_page_of_its_training_file(shared_data: Any) -> None:
    page = page_of(infer_fields(read_table(str(shared_data / "adult/train.csv"))))
    fields = fields_from_pandera(page)
    test = read_table(str(shared_data / "adult/test.csv"), schema_fields=fields)
    assert validate(test, page, fields).good.n == 16281


def test_this_projects_own_page_is_what_is_inferred_from_the_simulation() -> None:
    from ekiben.pipeline.schema import table

    assert fields_from_pandera(table) == fields_from_pandera(page_of(infer_fields(simulate_credit())))
