"""A secret is found in every spelling that programs give it, and nothing else is touched."""

from __future__ import annotations

import base64
import json
from collections import defaultdict
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple
from urllib.parse import quote

import msgspec
import nbformat
import pytest
from hypothesis import assume, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from spelled import ENCODINGS

from ekiben.errors import UsageError
from ekiben.redaction import (
    Hidden,
    Redactor,
    check_secrets,
    missing_secrets,
    passwords_of,
    redactor_of,
)

patient = hypothesis_settings(deadline=None, max_examples=100)

characters = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
nasty = st.sampled_from(list("\\\"'/&<>+%=?# \t\néß€漢😀$`{}[]|~"))
secrets = st.text(st.one_of(nasty, characters, st.sampled_from("abcXYZ019-_.")), min_size=6, max_size=40).filter(
    lambda s: len(s.strip()) >= 6
)
around = st.text(st.sampled_from("abc XYZ09{}[]().,:;\n"), max_size=30)


@pytest.mark.parametrize("encoding", ENCODINGS)
@hypothesis_settings(deadline=None, max_examples=25)
@given(secret=secrets, before=around, after=around)
@example(secret='a"b\\c\'d', before="", after="")
@example(secret="\\\\\\\\\\\\", before="", after="")
@example(secret="C:\\new\\table", before="\\", after="\\")
@example(secret="p@ss w/ö+rd&%25", before="x", after="y")
def test_no_encoding_of_a_secret_survives(encoding: str, secret: str, before: str, after: str) -> None:
    secret = secret.strip()
    written = ENCODINGS[encoding](secret)
    redacted = Redactor([secret]).text(f"{before}{written}{after}")
    assert "***" in redacted
    assert written not in redacted


@patient
@given(secret=secrets, before=st.binary(max_size=80), after=st.binary(max_size=80), width=st.sampled_from([0, 64, 76]))
def test_base64_of_a_longer_text_does_not_hold_it_wherever_it_stands(
    secret: str, before: bytes, after: bytes, width: int
) -> None:
    secret = secret.strip()
    digits = base64.b64encode(before + secret.encode() + after).decode()
    text = "\n".join(digits[i : i + width] for i in range(0, len(digits), width)) if width else digits
    redacted = Redactor([secret]).text(text)
    assert "***" in redacted
    for urlsafe in (text.replace("+", "-").replace("/", "_"), json.dumps(text)):
        assert "***" in Redactor([secret]).text(urlsafe)


@pytest.mark.parametrize("offset", range(3))
@pytest.mark.parametrize("length", [4, 5, 6, 7, 32, 200])
def test_what_is_left_of_base64_tells_nothing_of_the_secret(offset: int, length: int) -> None:
    secret = "Zq7!x9Lm"[:length] if length <= 8 else "".join(chr(33 + i * 7 % 90) for i in range(length))
    before, after = b"abcdef"[:offset] or b"", b"xyz123"
    digits = base64.b64encode(before + secret.encode() + after).decode()
    left, stars, right = Redactor([secret]).text(digits).partition("***")
    assert stars
    shared = base64.b64encode(before).decode().rstrip("=")[: len(before) * 8 // 6]
    assert left == shared
    assert digits.endswith(right)
    kept_bits = 6 * len(right.rstrip("=")) - 2 * right.count("=")
    assert kept_bits <= 8 * len(after)


@patient
@given(secret=secrets, text=st.text(characters, max_size=200))
def test_a_text_without_the_secret_is_unchanged(secret: str, text: str) -> None:
    redactor = Redactor([secret])
    assume(not redactor.holds(text))
    assert redactor.text(text) == text
    assert redactor.value({"a": [text, (text,)], "b": text.encode()}) == {"a": [text, (text,)], "b": text.encode()}


@pytest.mark.parametrize(
    "text",
    [
        "hunter", "hunter3", "HUNTER2", "hunter 2", "h-u-n-t-e-r-2", "aHVudGV", "68756e746572", "***", "", "\\", "%", "&amp;",
    ],
)  # fmt: skip
def test_what_is_nearly_the_secret_is_left_alone(text: str) -> None:
    assert Redactor(["hunter2"]).text(text) == text


@patient
@given(secret=secrets, cut=st.integers(0, 40), pieces=st.integers(1, 5))
def test_a_secret_that_goes_on_in_the_next_text_is_found(secret: str, cut: int, pieces: int) -> None:
    secret = secret.strip()
    whole = f"<{secret}>"
    size = max(1, len(whole) // pieces)
    texts = [whole[i : i + size] for i in range(0, len(whole), size)]
    redacted = Redactor([secret]).lines(texts)
    assert len(redacted) == len(texts)
    assert "".join(redacted) == "<***>"


def test_two_secrets_of_which_one_holds_the_other_both_go() -> None:
    redactor = Redactor(["correct", "correct-horse"])
    assert redactor.text("correct-horse and correct") == "*** and ***"


def test_white_space_around_a_value_does_not_count() -> None:
    assert Redactor(["  hunter2\n"]).text("it is hunter2!") == "it is ***!"


def test_a_private_key_is_found_as_a_whole_and_line_by_line() -> None:
    lines = [base64.b64encode(bytes(range(i, i + 48))).decode() for i in range(0, 200, 40)]
    key = "\n".join(["-----BEGIN PRIVATE KEY-----", *lines, "-----END PRIVATE KEY-----"])
    redactor = Redactor([key])
    assert redactor.text(f"<{key}>") == "<***>"
    for text in (json.dumps(key), repr(key), key.encode().hex(), base64.b64encode(b"x" + key.encode()).decode(), quote(key)):
        assert "***" in redactor.text(text)
        assert not any(line in redactor.text(text) for line in lines)
    indented = "".join(f"    | {line}\n" for line in lines)
    assert not any(line in redactor.text(indented) for line in lines)
    assert redactor.text("-----BEGIN PRIVATE KEY-----") == "-----BEGIN PRIVATE KEY-----"


def test_a_key_whose_variable_says_backslash_n_is_found_with_real_ends_of_lines_too() -> None:
    redactor = Redactor(["-----BEGIN KEY-----\\nMIIEvQIBADANBgkq\\nhkiG9w0BAQEFAASC\\n-----END KEY-----\\n"])
    assert redactor.text("<-----BEGIN KEY-----\nMIIEvQIBADANBgkq\nhkiG9w0BAQEFAASC\n-----END KEY-----\n>") == "<***\n>"
    assert redactor.text("  MIIEvQIBADANBgkq\n") == "  ***\n"


def test_the_password_inside_a_url_is_a_secret_of_its_own() -> None:
    url = "postgresql+psycopg://ada:p%40ss%2Fword@db.example:5432/credit"
    assert passwords_of(url) == ["p%40ss%2Fword", "p@ss/word"]
    redactor = Redactor([url])
    assert redactor.text('FATAL: password "p@ss/word" for ada refused') == 'FATAL: password "***" for ada refused'
    assert redactor.text(f"connecting to {url}") == "connecting to ***"
    assert passwords_of("mysql://h/db?user=ada&password=s3cret7#x") == ["s3cret7"]
    assert passwords_of("s3://bucket/a?x=1") == passwords_of("sqlite:///mlflow.db") == []


@pytest.mark.parametrize("value", ["abc", " ab ", "a"])
def test_a_secret_that_every_text_is_full_of_is_refused_without_being_shown(value: str) -> None:
    with pytest.raises(UsageError, match="fewer than 4 characters") as refused:
        Redactor(["long enough", value])
    assert "\n" not in str(refused.value)
    assert f"`{value.strip()}`" not in str(refused.value)


def test_without_secrets_it_is_false_and_hands_back_what_came() -> None:
    redactor = Redactor(["", "  "])
    value = {"a": ["x"]}
    assert not redactor
    assert redactor.value(value) is value
    assert redactor.text("x") == "x"
    assert Redactor(["hunter2"])
    assert "hunter2" not in repr(Redactor(["hunter2"]))


def test_colours_of_a_terminal_inside_a_secret_do_not_hide_it() -> None:
    text = "\x1b[31mValueError\x1b[0m: hun\x1b[1mter\x1b[0m2 refused"
    assert Redactor(["hunter2"]).text(text) == "\x1b[31mValueError\x1b[0m: ***\x1b[1m\x1b[0m refused"


class Pair(NamedTuple):
    left: str
    right: str


class Note(msgspec.Struct, frozen=True):
    text: str
    status: Literal["done", "failed"] = "done"
    more: dict[str, Any] = {}


def test_values_keep_their_types() -> None:
    redactor = Redactor(["hunter2"])
    value = {
        "hunter2": 1,
        "list": ["x hunter2", 3, None],
        "tuple": ("hunter2", 1.5),
        "set": {"hunter2"},
        "pair": Pair("hunter2", "b"),
        "note": Note("hunter2", more={"k": "hunter2"}),
        "bytes": b"\xff hunter2 \xfe",
    }
    assert redactor.value(value) == {
        "***": 1,
        "list": ["x ***", 3, None],
        "tuple": ("***", 1.5),
        "set": {"***"},
        "pair": Pair("***", "b"),
        "note": Note("***", more={"k": "***"}),
        "bytes": b"\xff *** \xfe",
    }
    assert value["tuple"] == ("hunter2", 1.5)
    counted = redactor.value(defaultdict(list, {"a": ["hunter2"]}))
    assert (counted, counted["b"]) == ({"a": ["***"], "b": []}, [])
    assert redactor.holds(value) and not redactor.holds(redactor.value(value))


def test_a_secret_that_is_a_status_or_a_number_does_not_break_a_record() -> None:
    note = Redactor(["done", "2024"]).value(Note("done in 2024", more={"seconds": 2024}))
    assert note == Note("*** in ***", status="done", more={"seconds": 2024})


def notebook_with(*outputs: Any) -> nbformat.NotebookNode:
    cell = nbformat.v4.new_code_cell("print(token)", outputs=list(outputs))
    return nbformat.v4.new_notebook(cells=[cell])


def test_a_notebook_stays_one_and_holds_no_secret_even_in_two_halves() -> None:
    new = nbformat.v4.new_output
    notebook = notebook_with(
        new("stream", name="stdout", text="hun"),
        new("stream", name="stderr", text="hunter2\n"),
        new("stream", name="stdout", text="ter2\n"),
        new("display_data", data={"text/html": "<b>hunter2</b>", "application/json": {"hunter2": ["hunter2"]}}),
        new("execute_result", data={"text/plain": "'hunter2'"}, execution_count=1),
        new("error", ename="ValueError", evalue="hunter2", traceback=["\x1b[31mhunter2\x1b[0m", "hun", "ter2"]),
    )
    redacted = Redactor(["hunter2"]).value(notebook)
    nbformat.validate(redacted)
    assert isinstance(redacted.cells[0].outputs[0], nbformat.NotebookNode)
    assert "hunter2" not in nbformat.writes(redacted)
    assert [o.text for o in redacted.cells[0].outputs[:3]] == ["***", "***\n", "\n"]
    assert redacted.cells[0].outputs[5].traceback == ["\x1b[31m***\x1b[0m", "***", ""]


@pytest.mark.parametrize("secret", ["stream", "text", "stdout", "text/plain", "output_type", "outputs", "code", "cells"])
def test_a_secret_that_is_a_word_of_the_notebook_format_does_not_break_the_file(secret: str) -> None:
    new = nbformat.v4.new_output
    stream, shown = new("stream", name="stdout", text=f"<{secret}>"), new("display_data", data={"text/plain": secret})
    redacted = Redactor([secret]).value(notebook_with(stream, shown))
    nbformat.validate(redacted)
    outputs = redacted.cells[0].outputs
    assert (outputs[0].text, outputs[1].data["text/plain"]) == ("<***>", "***")


def test_a_hidden_text_is_a_text_that_does_not_show_itself() -> None:
    token = Hidden("hunter2")
    assert repr(token) == repr([token])[1:-1] == "'***'"
    assert token == "hunter2" and f"Bearer {token}" == "Bearer hunter2" and json.dumps(token) == '"hunter2"'


def project(secrets: dict[str, str] | None = None, **data: str) -> Any:
    dump = {"data": {"source": "simulated:credit", **data}, "pipeline": {"tracking_uri": "sqlite:///mlflow.db"}}
    return SimpleNamespace(secrets=secrets or {}, steps={"tune": {"url": "redis://:s3cr3t@h", "n": 3}}, model_dump=lambda **_: dump)


def test_a_project_hides_its_variables_and_the_passwords_of_its_urls() -> None:
    settings = project({"tune.token": "TOKEN", "tune.other": "NOT_SET"}, source="postgresql://ada:pa55word@db/credit")
    redactor = redactor_of(settings, {"TOKEN": "hunter2", "OTHER": "visible"})
    assert redactor.text("hunter2 pa55word s3cr3t visible") == "*** *** *** visible"


def test_a_variable_whose_value_is_too_short_is_named() -> None:
    with pytest.raises(UsageError, match=r"the secret in `TOKEN` has fewer than 4 characters"):
        redactor_of(project({"tune.token": "TOKEN"}), {"TOKEN": "abc"})


def test_missing_variables_are_named_with_step_and_parameter_before_anything_starts() -> None:
    settings = project({"prepare.token": "A_TOKEN", "tune.key": "B_KEY", "audit.key": "C_KEY"})
    env = {"B_KEY": " ", "C_KEY": "there"}
    assert missing_secrets(settings, ["audit"], env) == []
    assert len(missing_secrets(settings, ["prepare", "tune", "audit"], env)) == 2
    with pytest.raises(UsageError) as refused:
        check_secrets(settings, ["prepare", "audit"], env)
    assert str(refused.value) == (
        "step `prepare` needs the environment variable `A_TOKEN` (parameter `token`), which is not set; export it first"
    )
    check_secrets(settings, ["audit"], env)
