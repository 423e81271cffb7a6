"""The page at ``/``: whatever columns and classes are called, it stays one page with one script, and says so."""

from __future__ import annotations

import base64
import hashlib
import json
from html.parser import HTMLParser

import msgspec
import pytest
from bundles import make_project

from ekiben.records import Field
from ekiben.rows import Check
from ekiben.serving.bundle import Limits, load_bundle
from ekiben.serving.http.page import policy_of, write_field, write_page
from ekiben.serving.scoring.scorer import Scorer

HOSTILE = '</script><script>alert(1)</script>"\'><img src=x onerror=alert(1)>&amp;'


class Reader(HTMLParser):
    """Collects elements, and the texts of scripts and styles."""

    def __init__(self, page: bytes) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page.decode())

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.found and self.found[-1][0] in ("script", "style") and data.strip():
            self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


@pytest.fixture(scope="module")
def scorer(tmp_path_factory) -> Scorer:
    return Scorer(make_project(tmp_path_factory.mktemp("census")).bundle)


def test_the_policy_allows_the_script_and_the_style_that_are_there_and_no_other(scorer):
    page = write_page(scorer, {"name": "census", "version": "3"})
    policy = dict(part.strip().split(" ", 1) for part in policy_of(page).split(";"))
    style, facts, script = Reader(page).texts
    for rule, text in (("style-src", style), ("script-src", script)):
        assert policy[rule] == f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert json.loads(facts)["examples"][0] == scorer.bundle.examples[0].row


def test_nothing_is_fetched_from_elsewhere_and_nothing_is_inline_that_the_policy_forbids(scorer):
    reader = Reader(write_page(scorer, {"name": "census"}))
    for tag, attributes in reader.found:
        assert not {"style", "src"} & set(attributes), tag
        assert not any(name.startswith("on") for name in attributes), tag
        assert (attributes.get("href") or "/").startswith(("/", "data:,")), tag


def test_names_cannot_leave_their_place(scorer, monkeypatch):
    info = msgspec.structs.replace(scorer.info, target=HOSTILE, positive=HOSTILE, classes=(HOSTILE, "yes"))
    monkeypatch.setattr(scorer, "info", info)
    monkeypatch.setattr(scorer.reader, "checks", [Check(Field(name=HOSTILE, kind="category", categories=(HOSTILE, "b")), unseen="reject")])
    page = write_page(scorer, {"name": HOSTILE, "version": HOSTILE})
    reader = Reader(page)
    assert len(reader.all("script")) == 2 and not reader.all("img")
    _, facts, _ = reader.texts
    assert json.loads(facts)["fields"][0]["name"] == json.loads(facts)["target"] == HOSTILE
    assert {"value": HOSTILE} in [{k: v for k, v in o.items() if k == "value"} for o in reader.all("option")]
    assert policy_of(page).split("script-src")[1].split(";")[0].count("sha256-") == 1


def test_every_control_has_a_label_a_hint_and_a_place_for_its_error(scorer):
    reader = Reader(write_page(scorer, {}))
    ids = {attributes["id"] for _, attributes in reader.found if "id" in attributes}
    labels = {attributes["for"] for attributes in reader.all("label")}
    controls = [a for a in reader.all("input") + reader.all("select")]
    assert len(controls) == len(scorer.reader.checks) + 1
    for control in controls:
        assert control["id"] in labels and set((control["aria-describedby"] or "").split()) <= ids
    assert len(ids) == sum("id" in attributes for _, attributes in reader.found)


@pytest.mark.parametrize("limits", [Limits(), Limits(missing="reject", unseen="reject")])
@pytest.mark.parametrize("task", ["binary", "multiclass", "regression"])
def test_every_task_has_its_page(tmp_path, task, limits):
    scorer = Scorer(load_bundle(make_project(tmp_path, task=task, limits=limits, runtime="python").bundle.folder))
    facts = json.loads(Reader(write_page(scorer, {"name": "census"})).texts[1])
    assert facts["task"] == task and not facts["explains"] and "gives no exact contributions" in facts["why_not"]
    assert [field["name"] for field in facts["fields"]] == list(scorer.reader.kinds)


@pytest.mark.parametrize(
    ("field", "value", "holds"),
    [
        (Field(name="x", kind="number"), 39.0, 'value="39"'),
        (Field(name="x", kind="number"), 0.1, 'value="0.1"'),
        (Field(name="x", kind="number"), None, 'value=""'),
        (Field(name="x", kind="flag"), False, '<option value="false" selected>'),
        (Field(name="x", kind="flag"), None, '<option value="" selected>missing'),
        (Field(name="x", kind="category", categories=("a&b",)), "a&b", '<option value="a&amp;b">'),
        (Field(name="x", kind="date"), "2024-05-01", "an ISO 8601 date, or empty"),
    ],
)
def test_a_field_shows_its_value(field, value, holds):
    assert holds in write_field(Check(field), 0, value)
