"""The parameters cell of a notebook, and the strict conversion of text to its types."""

from __future__ import annotations

import io
import json
import re
from datetime import date
from pathlib import Path
from typing import Literal, get_args

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from rich.console import Console

from ekiben.errors import SettingsError
from ekiben.parameter_help import explain, help_table
from ekiben.parameters import Parameter, convert, parse_parameters, read_cells, read_parameters, schema_of, step_name
from ekiben.settings import load_settings
from ekiben.values import from_text, hide_passwords, is_of_type, shorten, split_list, to_text, type_of

patient = hypothesis_settings(deadline=None)


def write_notebook(path: Path, *sources: str, tag: str = "parameters") -> Path:
    cells = [{"cell_type": "markdown", "metadata": {}, "source": ["# page\n"]}]
    cells += [
        {"cell_type": "code", "metadata": {"tags": [tag]}, "source": s.splitlines(keepends=True)} for s in sources
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"cells": cells, "nbformat": 4, "nbformat_minor": 5}))
    return path


def parameter(annotation: str) -> Parameter:
    return Parameter("x", annotation, None, 1)


@pytest.mark.parametrize(
    ("annotation", "text", "value"),
    [
        ("int", "60", 60),
        ("int", "-3", -3),
        ("int", " 0 ", 0),
        ("float", "60", 60.0),
        ("float", "1e3", 1000.0),
        ("float", "-.5", -0.5),
        ("str", "007", "007"),
        ("str", "a = b # c", "a = b # c"),
        ("str", "", ""),
        ("str", "none", "none"),
        *[("bool", text, True) for text in ("yes", "true", "on", "1", "YES")],
        *[("bool", text, False) for text in ("no", "False", "off", "0")],
        ("date", "2024-02-29", "2024-02-29"),
        ("Path", "data/a b.csv", "data/a b.csv"),
        ("Literal['auto', 'none']", "none", "none"),
        ("Literal[1, 2]", "2", 2),
        ("list[str]", "sex, race", ["sex", "race"]),
        ("list[str]", "\n  sex\n  race,age\n", ["sex", "race", "age"]),
        ("list[str]", '"income, net", age', ["income, net", "age"]),
        ("list[str]", "", []),
        ("list[float]", "0.1\n0.9", [0.1, 0.9]),
        ("list[int]", "1, 2,", [1, 2]),
        ("list[Literal['a', 'b']]", "b, a", ["b", "a"]),
        ("int | None", "", None),
        ("int | None", "none", None),
        ("Optional[float]", "2", 2.0),
        ("str | None", "", None),
        ("str | None", "none", "none"),
        ("float | Literal['auto']", "auto", "auto"),
        ("typing.Literal['auto'] | None", "auto", "auto"),
        ("list[str] | None", "", None),
    ],
)
def test_text_becomes_what_its_annotation_says(annotation: str, text: str, value: object) -> None:
    converted = convert(parameter(annotation), text)
    assert converted == value
    assert type(converted) is type(value)


@pytest.mark.parametrize(
    ("annotation", "text"),
    [
        *[("int", text) for text in ("007", "1_0", "1e3", "1.0", "true", "", "0x10", "\u0661", "1 0", "9" * 5000)],
        *[("float", text) for text in ("nan", "inf", "-Infinity", "1_0", "01.5", "1e999", "", "1,5", "true")],
        *[("bool", text) for text in ("", "y", "2", "truee", "none")],
        *[("date", text) for text in ("2024-02-30", "20240229", "29.02.2024", "2024-W01-1", "")],
        ("Path", ""),
        ("Literal['auto', 'none']", "Auto"),
        ("list[int]", "1, two"),
        ("list[str]", '"sex, race'),
        ("list[Literal['a', 'b']]", "a, c"),
        ("int | None", "null"),
    ],
)
def test_text_that_is_not_quite_the_type_is_refused(annotation: str, text: str) -> None:
    with pytest.raises(SettingsError, match="`x` takes "):
        convert(parameter(annotation), text)


def test_a_refusal_says_what_is_allowed_what_came_and_what_was_meant() -> None:
    with pytest.raises(SettingsError) as refused:
        convert(parameter("Literal['stratified', 'time']"), "stratifed")
    assert str(refused.value) == ("`x` takes one of `stratified`, `time`, got `stratifed`; did you mean `stratified`?")


def test_a_comment_behind_a_value_is_explained() -> None:
    with pytest.raises(SettingsError, match="a comment goes on a line of its own"):
        from_text(int, "60  # seconds")


@pytest.mark.parametrize(
    "annotation",
    ["dict[str, int]", "Any", "list[list[int]]", "list", "Literal[1.5]", "Literal[True]", "f()", "int |", ""],
)
def test_an_annotation_that_is_no_type_of_ours_is_refused(annotation: str) -> None:
    with pytest.raises(SettingsError, match="is no type of a parameter"):
        type_of(annotation)


@pytest.mark.parametrize(
    ("source", "line", "says"),
    [
        ("x = 1", 1, "needs a type"),
        ("a: int = 1\nx: int", 2, "needs a default"),
        ("a: int = 1\n\n\nx: int = a", 4, "must be a literal"),
        ("x: int = 1 + 1", 1, "must be a literal"),
        ("x: int = 1.0", 1, "takes a whole number, but its default is `1.0`"),
        ("x: int = True", 1, "takes a whole number"),
        ("x: bool = 1", 1, "takes yes or no"),
        ("x: float = '1'", 1, "takes a number"),
        ("x: float = True", 1, "takes a number"),
        ("x: float = 1e999", 1, "takes a number"),
        ("x: list[str] = ['a', 1]", 1, "takes a list"),
        ("x: Literal['a'] = 'b'", 1, "takes one of `a`"),
        ("x: date = '2024-13-01'", 1, "takes a date"),
        ("x: int = None", 1, "takes a whole number"),
        ("x: dict = {}", 1, "is no type of a parameter"),
        ("x: int = 1\nx: int = 2", 2, "already there in line 1"),
        ("print('hello')", 1, "only annotated literals"),
        ("import os", 1, "only annotated literals"),
        ("x: int = 1; y = 2", 1, "needs a type"),
        ("%matplotlib inline", 1, "invalid syntax"),
        ("a.b: int = 1", 1, "only annotated literals"),
        ("'words'", 1, "only annotated literals"),
    ],
)
def test_a_line_that_is_no_annotated_literal_names_itself(source: str, line: int, says: str) -> None:
    with pytest.raises(SettingsError) as refused:
        parse_parameters(source, where="02_tune.ipynb cell 2")
    assert str(refused.value).startswith(f"02_tune.ipynb cell 2 line {line}: ")
    assert says in str(refused.value)
    assert refused.value.line == line


def test_a_cell_with_a_null_byte_is_refused() -> None:
    with pytest.raises(SettingsError, match="null bytes"):
        parse_parameters("x: int = 1\0")


def test_a_cell_keeps_order_types_comments_and_lines() -> None:
    source = (
        "from typing import Literal\n"
        'upstream: list[str] = ["prepare"]  # reads its table\n'
        "# a comment alone belongs to nobody\n"
        "budget_s: float = 60  # seconds of search\n"
        "trials: int | None = None\n"
        "learners: list[\n    Literal['a', 'b']\n] = ['b']  # tried in turn\n"
    )
    found = {p.name: p for p in parse_parameters(source)}
    assert list(found) == ["upstream", "budget_s", "trials", "learners"]
    assert (found["budget_s"].default, type(found["budget_s"].default)) == (60.0, float)
    assert (found["budget_s"].line, found["budget_s"].says) == (4, "seconds of search")
    assert found["trials"].says == ""
    assert found["learners"].says == "tried in turn"
    assert found["learners"].type == list[Literal["a", "b"]]


def test_upstream_may_stand_without_an_annotation() -> None:
    assert parse_parameters('upstream = ["prepare"]')[0].default == ["prepare"]
    with pytest.raises(SettingsError, match="takes a list"):
        parse_parameters('upstream = "prepare"')


def test_a_notebook_needs_exactly_one_parameters_cell(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"exactly one cell tagged `parameters`, found 0$"):
        read_parameters(write_notebook(tmp_path / "01_a.ipynb"))
    with pytest.raises(SettingsError, match=r"found 2 \(cells 2, 3\)$"):
        read_parameters(write_notebook(tmp_path / "02_b.ipynb", "x: int = 1", "y: int = 1"))


def test_an_error_in_a_notebook_names_notebook_cell_and_line(tmp_path: Path) -> None:
    path = write_notebook(tmp_path / "02_tune.ipynb", "x: int = 1\ny = 2")
    with pytest.raises(SettingsError) as refused:
        read_parameters(path)
    assert str(refused.value).startswith(f"{path} cell 2 line 2: `y` needs a type")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"cells": 3}', '{"cells": [{}]}', "\ufeff{}"])
def test_a_file_that_is_no_notebook_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "01_a.ipynb"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(SettingsError, match="is not a notebook"):
        read_parameters(path)


def test_a_notebook_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot be read"):
        read_parameters(tmp_path / "01_a.ipynb")


def test_steps_come_in_the_order_of_their_numbers_and_other_notebooks_are_left_alone(tmp_path: Path) -> None:
    for name in ("10_package.ipynb", "2_tune.ipynb", "01_prepare.ipynb", "scratch.ipynb"):
        write_notebook(tmp_path / name, "x: int = 1")
    write_notebook(tmp_path / "00_notes.ipynb", "x = 1", tag="other")
    assert list(read_cells(tmp_path)) == ["prepare", "tune", "package"]
    assert read_cells(tmp_path / "nowhere") == {}


def test_two_notebooks_cannot_be_the_same_step(tmp_path: Path) -> None:
    write_notebook(tmp_path / "01_tune.ipynb", "x: int = 1")
    write_notebook(tmp_path / "02_tune.ipynb", "x: int = 1")
    with pytest.raises(SettingsError, match=r"02_tune.ipynb: step `tune` is also 01_tune.ipynb"):
        read_cells(tmp_path)


def test_what_belongs_to_the_notebook_cannot_be_set(tmp_path: Path) -> None:
    source = 'upstream: list[str] = ["prepare"]\non_run: bool = False\nx: int = 1'
    cell = read_parameters(write_notebook(tmp_path / "06_monitor.ipynb", source))
    assert cell.upstream == ("prepare",)
    assert [p.name for p in cell.parameters] == ["upstream", "on_run", "x"]
    assert cell.defaults == {"x": 1}
    with pytest.raises(SettingsError, match=r"change it in 06_monitor\.ipynb"):
        cell["upstream"]
    assert "upstream" not in schema_of(cell)["properties"]


def test_the_json_schema_says_types_defaults_and_comments(tmp_path: Path) -> None:
    source = (
        "budget_s: float = 60  # seconds\n"
        "learner: Literal['a', 'b'] = 'a'\n"
        "trials: int | None = None\n"
        "since: date = '2024-01-01'\n"
    )
    schema = schema_of(read_parameters(write_notebook(tmp_path / "02_tune.ipynb", source)))
    assert schema["additionalProperties"] is False
    assert schema["properties"]["budget_s"] == {"type": "number", "default": 60.0, "description": "seconds"}
    assert schema["properties"]["learner"]["enum"] == ["a", "b"]
    assert schema["properties"]["since"] == {"type": "string", "format": "date", "default": "2024-01-01"}
    assert {"type": "null"} in schema["properties"]["trials"]["anyOf"]


@pytest.mark.parametrize(
    ("file", "step"), [("02_tune.ipynb", "tune"), ("1-a.ipynb", "a"), ("tune.ipynb", "tune"), ("03_a_1.ipynb", "a_1")]
)
def test_a_step_is_called_like_its_file_without_the_number(file: str, step: str) -> None:
    assert step_name(Path(file)) == step


words = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1)
phrases = st.lists(words, min_size=1).map(" ".join)


@patient
@given(
    st.one_of(
        st.integers(),
        st.booleans(),
        st.floats(allow_nan=False, allow_infinity=False),
        phrases,
        st.dates().map(date.isoformat),
    )
)
def test_a_plain_value_survives_being_written_and_read(value: object) -> None:
    assert from_text(type(value), to_text(value)) == value


@patient
@given(st.lists(phrases))
def test_a_list_of_texts_survives_being_written_and_read(items: list[str]) -> None:
    assert split_list(to_text(items)) == items
    assert from_text(tuple[str, ...], to_text(items)) == tuple(items)


@patient
@given(st.lists(st.integers()), st.one_of(st.none(), st.floats(allow_nan=False, allow_infinity=False)))
def test_lists_of_numbers_and_values_that_may_be_missing_survive_too(items: list[int], maybe: float | None) -> None:
    assert from_text(list[int], to_text(items)) == items
    assert from_text(float | None, to_text(maybe)) == maybe


@patient
@given(
    st.sampled_from(["int", "float", "str", "bool", "date", "Path", "Literal['a', 'b']", "list[int]", "int | None"]),
    st.text(),
)
def test_any_text_is_converted_to_its_type_or_refused_with_a_settings_error(annotation: str, text: str) -> None:
    kind = type_of(annotation)
    try:
        value = from_text(kind, text)
    except SettingsError as exc:
        assert "\n" not in str(exc)
    else:
        assert is_of_type(kind, value)
        assert from_text(kind, to_text(value)) == value


@patient
@given(st.integers(), st.sampled_from(["{}", "{}.0", "{}e0", "0{}", "{}_0", " {}"]))
def test_only_plain_decimal_digits_are_a_whole_number(number: int, shape: str) -> None:
    text = shape.format(number)
    try:
        assert from_text(int, text) == int(text)
        assert text.strip() == str(number)
    except SettingsError:
        assert shape not in ("{}", " {}")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql+psycopg://ada:s3:cr@t/x@db.example/credit", "postgresql+psycopg://ada:***@db.example/credit"),
        ("redis://:s3cr@host", "redis://:***@host"),
        ("mysql://host/db?user=ada&password=s3&charset=utf8", "mysql://host/db?user=ada&password=***&charset=utf8"),
        ("s3://bucket/a.csv?X-Amz-Security-Token=s3#x", "s3://bucket/a.csv?X-Amz-Security-Token=***"),
        ("https://example.org:8080/a", "https://example.org:8080/a"),
    ],
)
def test_passwords_of_urls_never_reach_a_message(url: str, shown: str) -> None:
    assert hide_passwords(url) == shown
    assert shorten(url) == shown
    with pytest.raises(SettingsError, match=re.escape(shown)):
        from_text(int, url)


# One line for each kind of text that is easily taken for something else: what each annotation makes of it, or why not.
REFUSED = object()
TRICKY: dict[str, dict[str, object]] = {
    "007": {"int": REFUSED, "float": REFUSED, "str": "007", "bool": REFUSED, "list[str]": ["007"], "list[int]": REFUSED},
    "-007": {"int": REFUSED, "float": REFUSED, "str": "-007"},
    "0": {"int": 0, "float": 0.0, "str": "0", "bool": False, "int | None": 0, "list[int]": [0]},
    "-0": {"int": 0, "float": -0.0, "str": "-0"},
    "-3": {"int": -3, "float": -3.0, "str": "-3", "bool": REFUSED, "list[int]": [-3], "Literal[-3, 3]": -3},
    "+3": {"int": 3, "float": 3.0, "str": "+3"},
    "1": {"int": 1, "bool": True, "Literal['1']": "1", "Literal[1]": 1, "int | str": 1, "str | int": "1", "bool | int": True},
    "true": {"int": REFUSED, "float": REFUSED, "str": "true", "bool": True, "list[str]": ["true"], "int | None": REFUSED},
    "True": {"bool": True, "str": "True", "int": REFUSED, "Literal['True']": "True", "Literal['true']": REFUSED},
    "1_0": {"int": REFUSED, "float": REFUSED, "str": "1_0", "list[float]": REFUSED, "int | str": "1_0"},
    "1e3": {"int": REFUSED, "float": 1000.0, "str": "1e3", "list[int]": REFUSED, "list[float]": [1000.0]},
    "1.0": {"int": REFUSED, "float": 1.0, "str": "1.0", "Literal[1]": REFUSED},
    ".5": {"float": 0.5, "int": REFUSED},
    "5.": {"float": 5.0, "int": REFUSED},
    "1,5": {"float": REFUSED, "int": REFUSED, "list[int]": [1, 5], "list[str]": ["1", "5"], "str": "1,5"},
    "nan": {"float": REFUSED, "int": REFUSED, "str": "nan", "float | None": REFUSED, "list[float]": REFUSED},
    "inf": {"float": REFUSED, "str": "inf"},
    "-Infinity": {"float": REFUSED, "str": "-Infinity"},
    "1e999": {"float": REFUSED, "str": "1e999"},
    "0x10": {"int": REFUSED, "float": REFUSED, "str": "0x10"},
    "٣": {"int": REFUSED, "float": REFUSED, "str": "٣", "date": REFUSED},
    "１２": {"int": REFUSED, "float": REFUSED},
    "²": {"int": REFUSED, "float": REFUSED},
    "": {"int": REFUSED, "float": REFUSED, "bool": REFUSED, "str": "", "date": REFUSED, "Path": REFUSED, "list[str]": [],
         "int | None": None, "str | None": None, "Optional[float]": None, "list[int] | None": None,
         "Literal['a'] | None": None, "Literal['a']": REFUSED, "Literal['']": "", "Secret": REFUSED, "Secret | None": None},
    "none": {"int | None": None, "str | None": "none", "int": REFUSED, "str": "none", "Literal['none'] | None": None,
             "Path | None": None, "Secret | None": None},
    "null": {"int | None": REFUSED, "str | None": "null"},
    "2024-12-31": {"date": "2024-12-31", "str": "2024-12-31", "int": REFUSED, "date | None": "2024-12-31"},
    "2024-02-30": {"date": REFUSED, "str": "2024-02-30", "list[date]": REFUSED},
    "31.12.2024": {"date": REFUSED},
    "2024-12-31T10:00": {"date": REFUSED},
    "２０２４-12-31": {"date": REFUSED},
    "a, b": {"list[str]": ["a", "b"], "str": "a, b", "list[Literal['a', 'b']]": ["a", "b"], "Path": "a, b", "list[Path]": ["a", "b"]},
    "[1, 2]": {"list[int]": REFUSED, "str": "[1, 2]"},
    "TOKEN": {"Secret": "TOKEN", "Secret | None": "TOKEN", "str": "TOKEN"},
    "_T0KEN_2": {"Secret": "_T0KEN_2"},
    "Token": {"Secret": REFUSED, "Secret | None": REFUSED},
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "annotation", "value"),
    [(text, annotation, value) for text, row in TRICKY.items() for annotation, value in row.items()],
)
@pytest.mark.parametrize("by", ["settings.ini", "environment", "-p"])
def test_settings_environment_and_command_line_convert_alike(
    tmp_path: Path, by: str, text: str, annotation: str, value: object
) -> None:
    default = {"Secret": "'DEFAULT'", "date": "'2000-01-01'", "Path": "'.'", "str": "'x'", "int": "9", "float": "9.5", "bool": "False"}
    kind = type_of(annotation)
    first = annotation.split(" | ")[0]
    written = "None" if is_of_type(kind, None) else "[]" if is_of_type(kind, []) else default.get(first) or repr(get_args(kind)[0])
    write_notebook(tmp_path / "nbs/pipeline/02_tune.ipynb", f"x: {annotation} = {written}")
    (tmp_path / "settings.ini").write_text(f"[columns]\ntarget = y\n\n[tune]\n{f'x = {text}' if by == 'settings.ini' else ''}\n")
    env = {"EKIBEN_TUNE__X": text} if by == "environment" else {}
    overrides = {"tune.x": text} if by == "-p" else {}
    try:
        found = load_settings(tmp_path, env=env, overrides=overrides).steps["tune"]["x"]
    except SettingsError as exc:
        assert value is REFUSED, exc
        assert "`x` takes " in str(exc) and "\n" not in str(exc)
        assert str(exc).startswith(
            {"settings.ini": "settings.ini line 5: [tune] ", "environment": "EKIBEN_TUNE__X", "-p": "the command line's tune.x"}[by]
        )
    else:
        assert found == value
        assert type(found) is type(value)


@pytest.mark.parametrize(
    ("annotation", "text", "why"),
    [
        ("int", "007", "a number has no leading zeros (as text it keeps them: annotate it `str`)"),
        ("float", "01.5", "a number has no leading zeros (as text it keeps them: annotate it `str`)"),
        ("int", "1_0", "write it without `_`: 10"),
        ("float", "-1_000", "write it without `_`: -1000"),
        ("int", "1e3", "write 1000"),
        ("int", "60.0", "write 60"),
        ("int", "1.5", "it is not whole"),
        ("int | None", "2.5", "it is not whole"),
        ("float", "nan", "it must be finite"),
        ("float", "-Infinity", "it must be finite"),
        ("float", "1e999", "it is too large"),
        ("int", "true", "yes or no is of type `bool`"),
        ("float", "1,5", "decimals follow a point"),
        ("int", "٣", "only the digits 0 to 9 count"),
        ("list[int]", "1, 007", "a number has no leading zeros (as text it keeps them: annotate it `str`)"),
    ],
)
def test_a_refused_number_is_told_why(annotation: str, text: str, why: str) -> None:
    with pytest.raises(SettingsError) as refused:
        convert(parameter(annotation), text)
    assert str(refused.value).endswith(f"; {why}")


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("x: tuple[int, int] = (1, 2)", "`tuple[int, int]` is no type of a parameter; use list[…]"),
        ("x: set[str] = {'a'}", "use list[…]"),
        ("x: dict[str, int] = {}", "use one parameter for each key"),
        ("x: datetime = '2024-01-01'", "use date or str"),
        ("x: list[int] = (1, 2)", "but its default is `(1, 2)`; a list is written in [ ]"),
        ("x: list[list[int]] = [[1]]", "is no type of a parameter"),
        ("x: list[int] = [1, [2]]", "but its default is `[1, [2]]`"),
        ("x: list[int] = [1, -2.0]", "takes a list"),
        ("x: int = -(-1)", "must be a literal"),
        ("x: float = float('nan')", "must be a literal"),
        ("x: int = 0x10 * 2", "must be a literal"),
    ],
)
def test_a_default_or_type_that_cannot_be_says_what_to_write_instead(source: str, says: str) -> None:
    with pytest.raises(SettingsError) as refused:
        parse_parameters(source)
    assert says in str(refused.value)


@pytest.mark.parametrize(
    ("source", "default"),
    [
        ("x: int = -3", -3),
        ("x: float = -3", -3.0),
        ("x: int = 1_000", 1000),
        ("x: int = 0x10", 16),
        ("x: list[float] = [-1, 2.5]", [-1.0, 2.5]),
        ("x: list[float] | None = [1]", [1.0]),
        ("x: Literal[-1, 1] = -1", -1),
        ("x: list[Literal['a', 'b']] = ['b']", ["b"]),
        ("x: list[date] = ['2024-12-31']", ["2024-12-31"]),
        ("x: Path | None = None", None),
        ("x: int | str = '007'", "007"),
        ("x: str = ''", ""),
        ("x: str = 'a' 'b'", "ab"),
    ],
)
def test_python_s_own_ways_of_writing_a_literal_are_fine_in_the_notebook(source: str, default: object) -> None:
    (found,) = parse_parameters(source)
    assert found.default == default
    assert type(found.default) is type(default)


def test_an_unknown_parameter_is_told_what_was_meant(tmp_path: Path) -> None:
    write_notebook(tmp_path / "nbs/pipeline/02_tune.ipynb", "budget_s: float = 60\ntrials: int = 0")
    for text, env, overrides, says in (
        ("\n[tune]\nbudgets = 9\n", {}, {}, r"settings.ini line 5: \[tune\] has no key `budgets`; did you mean `budget_s`\?"),
        ("", {"EKIBEN_TUNE__BUDGET": "9"}, {}, r"`EKIBEN_TUNE__BUDGET`, which is no setting; did you mean `EKIBEN_TUNE__BUDGET_S`\?"),
        ("", {}, {"tune.trails": "9"}, r"has no key `trails`; did you mean `trials`\?"),
        ("", {}, {"tun.trials": "9"}, r"no section is called \[tun\]; did you mean `tune`\?"),
    ):
        (tmp_path / "settings.ini").write_text(f"[columns]\ntarget = y\n{text}")
        with pytest.raises(SettingsError, match=says):
            load_settings(tmp_path, env=env, overrides=overrides)


EVERY_TYPE = """from ekiben.redaction import Secret
a: int = -3  # whole
b: float = 1
c: str = "x"
d: bool = False
e: date = "2024-12-31"
f: Path = "data"
g: Literal["a", 1] = "a"
h: Literal["only"] = "only"
i: list[str] = ["sex", "race"]
j: list[float] = []
k: int | None = None
l: list[Literal[1, 2]] | None = [1]
m: Secret = "TOKEN"
n: Secret | None = ""
o: int | str = "007"
"""


def test_the_json_schema_is_valid_and_says_the_same_as_the_conversion(tmp_path: Path) -> None:
    import jsonschema

    cell = read_parameters(write_notebook(tmp_path / "02_tune.ipynb", EVERY_TYPE))
    schema = json.loads(json.dumps(schema_of(cell)))
    checks = jsonschema.Draft202012Validator
    checks.check_schema(schema)
    assert schema["$schema"] == checks.META_SCHEMA["$id"]
    validator = checks(schema, format_checker=checks.FORMAT_CHECKER)
    validator.validate(cell.defaults)
    wrong = {
        "a": 1.5, "b": "1", "c": 1, "d": 1, "e": "2024-02-30", "f": "", "g": "b", "h": "x", "i": "sex", "j": ["x"],
        "k": "none", "l": [3], "m": "tok-3f9a", "n": "tok-3f9a", "o": 1.5, "p": 1,
    }  # fmt: skip
    for name, value in wrong.items():
        assert not validator.is_valid({name: value}), name
    assert schema["properties"]["a"] == {"type": "integer", "default": -3, "description": "whole"}
    assert schema["properties"]["g"]["enum"] == ["a", 1]


def test_the_help_says_what_a_parameter_is_now_and_where_that_was_said(tmp_path: Path) -> None:
    source = 'from ekiben.redaction import Secret\na: int = 1  # first\nb: int = 2\nc: int = 3\nd: int = 4\ntoken: Secret = "TOKEN"'
    write_notebook(tmp_path / "nbs/pipeline/02_tune.ipynb", source)
    (tmp_path / "settings.ini").write_text("[columns]\ntarget = y\n\n[tune]\na = 10\nb = 20\nc = 30\n")
    settings = load_settings(tmp_path, env={"EKIBEN_TUNE__B": "200"}, overrides={"tune.c": "300"})
    cell = read_cells(tmp_path / "nbs/pipeline")["tune"]
    lines = {line.name: line for line in explain(settings, cell, env={"TOKEN": "hunter2"})}
    assert [(line.now, line.origin) for line in lines.values()] == [
        ("10", "settings.ini line 5"),
        ("200", "EKIBEN_TUNE__B"),
        ("300", "-p"),
        ("4", "default"),
        ("TOKEN (set)", "default"),
    ]
    assert (lines["a"].default, lines["a"].type, lines["a"].says) == ("1", "int", "first")
    assert explain(settings, cell, env={})[-1].now == "TOKEN (not set)"
    console = Console(width=120, file=io.StringIO(), record=True)
    console.print(help_table(list(lines.values()), "tune"))
    text = console.export_text()
    assert "settings.ini line 5" in text and "hunter2" not in text
