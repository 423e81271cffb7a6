"""The card with its evidence: what was recorded is shown with where, what was not is a question, and nothing is claimed."""

from __future__ import annotations

import io
import json
import re
import shutil
import zipfile
from html.parser import HTMLParser
from pathlib import Path

import pytest
from ekiben.cli import main
from ekiben.compliance.checklist import checklist
from ekiben.compliance.evidence import gather
from ekiben.compliance.export import export_card
from ekiben.compliance.html import interval
from ekiben.compliance.page import compliance_page
from ekiben.errors import UsageError
from ekiben.files import write_whole
from ekiben.ledger import append, read, verify
from ekiben.records import Judgement, Measure
from ekiben.runs import Run, StepResult, write_run
from ekiben.store import Store
from msgspec import structs
from traced import RUN, Traced, make_traced

CARD = {
    "title": "Model card: census",
    "sections": [
        {"title": "What it is", "facts": {"predicts": "`target` (binary)", "model": "lightgbm"}, "tables": [], "notes": []},
        {"title": "Data", "facts": {"held-out rows": "120"}, "tables": [], "notes": ["Warning from the data: <b>odd</b>"]},
        {
            "title": "Where it is worst", "facts": {}, "notes": ["12 parts were looked at"],
            "tables": [{"header": ["part", "rows", "loss"], "rows": [["job is clerk", "40", "0.31"]]}],
        },
        {"title": "Limits", "facts": {}, "tables": [], "notes": ["Surely worse where job is clerk."]},
    ],
    "markdown": "# Model card: census\n",
}  # fmt: skip


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Traced:
    made = make_traced(tmp_path_factory.mktemp("compliance") / "census")
    keep(made, card=CARD)
    return made


@pytest.fixture
def project(original, tmp_path) -> Traced:
    root = tmp_path / "census"
    shutil.copytree(original.root, root, symlinks=True)
    return Traced(root, original.bundle, original.rows)


def keep(p: Traced, **outputs) -> None:
    """Store results of `evaluate`."""
    store = Store(p.layout.objects)
    result = StepResult(step="evaluate", run_id=RUN, started="2026-07-01T10:16:00+00:00", status="done", outputs={k: store.put(v) for k, v in outputs.items()})
    write_whole(p.layout.result(RUN, "evaluate"), result.to_json())
    change(p, steps=lambda steps: [*steps, structs.replace(steps[0], name="evaluate", notebook="")])


def change(p: Traced, **changes) -> None:
    path = p.layout.report(RUN) / "run.json"
    run = Run.from_json(path.read_bytes())
    write_run(p.layout, structs.replace(run, **{k: v(getattr(run, k)) if callable(v) else v for k, v in changes.items()}))


def point(p: Traced, title: str, law: str = "GDPR"):
    return next(point for point in checklist(gather(p.root, RUN)) if point.title.startswith(title) and point.law == law)


class Text(HTMLParser):
    """Collects tags and addresses, and refuses tags that do not close."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.links += [value for name, value in attrs if name in ("href", "src") and value]
        if tag not in ("meta", "br", "line", "circle", "img", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, (tag, self.open[-3:])


def read_page(page: str) -> Text:
    parser = Text()
    parser.feed(page)
    assert not parser.open
    return parser


# ------------------------------------------------------------------------------------------------------- what is said


def test_the_evidence_is_what_was_recorded(project):
    e = gather(project.root, RUN, by="ana")
    assert (e.model["version"], e.model["aliases"], e.model["digest"]) == ("3", ["champion"], project.bundle.digest)
    assert e.signature["state"] == "verified" and e.ledger["state"] == "verified"
    assert [x["what"] for x in e.ledger["entries"]] == ["registration", "promotion"]
    assert e.data["source"] == "data/people.csv" and {c["name"] for c in e.data["columns"] if c["role"] == "sensitive"} == {"sex"}
    assert e.declared["lawful_basis"] == "contract" and e.declared["intended_use"] == "to advise" and e.declared["consent_basis"] == ""
    assert e.retention["retention_days"] == 90 and e.lineage["reproduce"] == f"ekiben reproduce {RUN}"
    assert {n["step"] for n in e.lineage["notebooks"]} == {"prepare", "tune", "audit"}


def test_what_a_person_declared_is_their_word_and_never_makes_a_point_shown(project):
    said = point(project, "Lawful basis")
    assert (said.state, said.declared) == ("attest", "contract") and said.question
    assert point(project, "Consent").declared == ""


def test_a_point_is_shown_only_with_evidence_and_asked_only_with_a_question(project):
    points = checklist(gather(project.root, RUN))
    assert {p.law for p in points} == {"GDPR", "CCPA"} and len({(p.law, p.title) for p in points}) == len(points)
    for p in points:
        assert (p.state == "shown") == (bool(p.evidence) and not p.question), p
        assert (p.state == "attest") == bool(p.question), p


def test_nothing_is_ever_called_compliant(project):
    made = export_card(project.root, RUN)
    for path in Path(made.folder).iterdir():
        assert not re.search(r"(?i)\b(is|are|fully|gdpr|ccpa)[- ]compliant\b|\bcompliant with\b", path.read_text()), path.name


def test_facts_that_change_turn_a_point_into_a_question(project):
    assert point(project, "Storage limitation: the journal").state == "shown"
    assert point(project, "Accountability").state == "shown"
    assert point(project, "Accuracy").state == "shown"
    assert point(project, "Security: what is in place").state == "shown"
    settings = project.root / "settings.ini"
    settings.write_text(settings.read_text().replace("retention_days = 90", "retention_days = 0"))
    change(project, measures=[])
    shutil.rmtree(project.root / ".ekiben" / "deployments")
    ledger = project.root / ".ekiben" / "ledger.jsonl"
    ledger.write_bytes(ledger.read_bytes().replace(b"first", b"fifth"))
    asked = point(project, "Storage limitation: the journal")
    assert asked.state == "attest" and "for ever" in asked.question
    broken = point(project, "Accountability")
    assert broken.state == "attest" and "does not verify: entry 2" in broken.question
    assert point(project, "Accuracy").state == "attest"
    assert point(project, "Security: what is in place").state == "attest"
    assert "signature" in " ".join(point(project, "Security: is it enough").evidence)


def test_fairness_that_was_not_measured_is_asked_for_and_measured_gaps_are_still_a_persons_to_judge(project):
    assert point(project, "Fairness between groups was measured").state == "attest"
    gap = Measure(name="demographic_parity_ratio", value=0.74, low=0.64, high=0.86, slice="sex", rows=120)
    change(project, measures=lambda known: [*known, gap])
    assert point(project, "Fairness between groups was measured").evidence == ["demographic_parity_ratio[sex] 0.740 (0.640 … 0.860)"]
    assert point(project, "Fairness between groups is acceptable").state == "attest"


def test_erasures_approvals_waivers_and_the_monitor_are_told(project):
    (project.root / ".ekiben" / "erasures.jsonl").write_text('{"time":"2026-07-02T00:00:00+00:00","column":"id","predictions":3}\n')
    append(project.root, "approval", who="ben", why="seen with the board", name="census", version="3", environment="production")
    waived = Judgement(name="f1 >= 0.9", metric="f1", slice="", op=">=", limit=0.9, value=0.8, low=0.7, high=0.85, verdict="fail", blocking=True, waived="one month only")
    change(project, gates=lambda gates: [*gates, waived])
    write_whole(project.root / "reports" / "monitor" / "latest.json", json.dumps({
        "made": "2026-07-03T00:00:00Z", "window": {"since": "a", "until": "b", "rows": 2000, "labelled": 100}, "model": {"name": "census", "version": "3"},
        "alerts": [{"kind": "drift", "column": "income", "says": "income rose by 12 %", "since": "2026-07-02T10:00:00Z", "advice": "retrain"}],
    }).encode())  # fmt: skip
    e = gather(project.root, RUN)
    page = compliance_page(e, checklist(e))
    for words in ("seen with the board", "one month only", "income rose by 12 %", "waived", "<td>ben</td>"):
        assert words in page, words
    assert "Nobody's approval is recorded" not in page and "3 rows" in page
    assert "Nobody&#x27;s approval" not in page


def test_a_rollback_to_and_from_a_version_is_in_its_account(project):
    append(project.root, "rollback", name="census", version="4", back_to="3", environment="production")
    append(project.root, "rollback", name="census", version="3", back_to="2", environment="production")
    append(project.root, "promotion", name="census", version="5", environment="production")
    assert [x["what"] for x in gather(project.root, RUN).ledger["entries"]] == ["registration", "promotion", "rollback", "rollback"]


# ------------------------------------------------------------------------------------------------------- what is made


def test_the_folder_and_the_archive_hold_the_same_and_the_ledger_says_who_made_them(project):
    made = export_card(project.root, RUN, by="ana")
    folder = Path(made.folder)
    assert folder == project.root / "reports" / "cards" / RUN
    assert {p.name for p in folder.iterdir()} == {"card.md", "card.html", "compliance.html", "compliance.json"}
    archive = zipfile.ZipFile(io.BytesIO(Path(made.archive).read_bytes()))
    assert {name: archive.read(name) for name in archive.namelist()} == {f"{RUN}/{p.name}": p.read_bytes() for p in folder.iterdir()}
    said = json.loads((folder / "compliance.json").read_text())
    assert len(said["checklist"]) == made.shown + made.attest and said["evidence"]["by"] == "ana"
    entry = read(project.root)[-1]
    assert (entry.what, entry.who, entry.facts["version"]) == ("export", "ana", "3") and verify(project.root).count == 3
    again = export_card(project.root, RUN)
    assert again.folder == made.folder


def test_pages_stand_alone_and_close_every_tag(project):
    made = export_card(project.root, RUN)
    for name in ("card.html", "compliance.html"):
        page = (Path(made.folder) / name).read_text()
        found = read_page(page)
        assert not found.tags & {"script", "link", "iframe", "img"} and "url(" not in page and "@import" not in page
        assert all(link.startswith("#") or link == "card.html" for link in found.links), found.links
        assert "http" not in page and "@media print" in page
        assert {link for link in found.links if link.startswith("#")} <= {f"#{where}" for where in re.findall(r' id="(\w+)"', page)}


def test_what_stands_in_the_data_cannot_become_markup(project):
    evil = '<img src=x onerror=alert(1)>`"'
    settings = project.root / "settings.ini"
    settings.write_text(settings.read_text().replace("lawful_basis = contract", f"lawful_basis = {evil}"))
    change(project, data=lambda data: data | {"source": evil}, measures=[Measure(name=evil, value=0.5, low=0.4, high=0.6, note=evil)])
    append(project.root, "approval", who=evil, why=evil, name="census", version="3")
    made = export_card(project.root, RUN)
    for name in ("card.html", "compliance.html"):
        found = read_page((Path(made.folder) / name).read_text())
        assert "img" not in found.tags
    assert "<b>odd" not in (Path(made.folder) / "card.html").read_text()


def test_a_folder_that_holds_something_else_is_left_alone(project, tmp_path):
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter.txt").write_text("years of work")
    with pytest.raises(UsageError, match="something else"):
        export_card(project.root, RUN, out=other)
    assert (other / "chapter.txt").read_text() == "years of work"
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="something else"):
        export_card(project.root, RUN, out=tmp_path / "file")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert Path(export_card(project.root, RUN, out=empty).folder) == empty.resolve()


def test_a_card_that_was_evicted_is_taken_from_the_bundle_and_without_either_it_is_said(project):
    shutil.rmtree(project.root / ".ekiben" / "runs")
    e = gather(project.root, RUN)
    assert e.markdown == "# census\n" and e.sections == []
    export_card(project.root, RUN)
    shutil.rmtree(project.root / ".ekiben" / "deployments")
    with pytest.raises(UsageError, match="no model card any more"):
        gather(project.root, RUN)


def test_a_run_that_packaged_nothing_can_be_answered_for_too(project):
    change(project, model={}, bento={}, gates=[])
    e = gather(project.root, RUN)
    assert e.model["version"] == "" and e.signature["state"] == "none"
    read_page(compliance_page(e, checklist(e)))


def test_a_damaged_monitor_report_or_ledger_stops_nothing(project):
    for raw in (b"{", b"[]", b'{"model": 1}', b"null"):
        write_whole(project.root / "reports" / "monitor" / "latest.json", raw)
        assert "report" not in gather(project.root, RUN).monitoring
    (project.root / ".ekiben" / "ledger.jsonl").write_bytes(b"no ledger\n")
    e = gather(project.root, RUN)
    assert e.ledger["state"] == "broken" and "does not verify" in compliance_page(e, checklist(e))


@pytest.mark.parametrize("values", [(0.5, 0.4, 0.6), (0.5, None, None), (-3.0, -4.0, 1e9), (0.0, 0.0, 0.0), (float("nan"), 0.1, 0.2), (None, None, None)])
@pytest.mark.parametrize("limit", [None, 0.3])
def test_intervals_are_drawn_inside_their_picture(values, limit):
    drawn = interval(*values, limit=limit)
    places = [float(x) for x in re.findall(r'(?:x1|x2|cx)="([^"]+)"', drawn)]
    assert all(0 <= x <= 180 for x in places) and (bool(drawn) == (values[0] is not None and values[0] == values[0]))


def test_the_command_writes_it_and_says_what_is_left_to_a_person(project, capsys):
    assert main(["export", "card", RUN, "--project", str(project.root), "--out", str(project.root / "out")]) == 0
    said = capsys.readouterr().out
    assert "for a person to attest" in said and (project.root / "out.zip").is_file()
    assert main(["export", "card", RUN, "--project", str(project.root), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["run_id"] == RUN
    assert main(["export", "card", "nothing", "--project", str(project.root)]) == 2
    assert main(["export", "cake", "--project", str(project.root)]) == 2
    assert main(["export", "card", "champion", "--project", str(project.root)]) == 2
