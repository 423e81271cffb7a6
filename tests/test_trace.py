"""One prediction, walked back: a whole chain holds, and each link that is taken away or changed is named."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
import time
from pathlib import Path

import pytest
from ekiben.cli import main
from ekiben.errors import UsageError
from ekiben.runs import Layout
from ekiben.serving.journal.keeping import JournalOptions
from ekiben.serving.journal.seal import seal_journal
from ekiben.trace.causes import find_cells
from ekiben.trace.prediction import find_prediction, time_of
from ekiben.trace.reasons import explain_again
from ekiben.trace.screen import show_trace
from ekiben.trace.walk import trace
from traced import RUN, Traced, make_traced


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Traced:
    return make_traced(tmp_path_factory.mktemp("traced") / "census")


@pytest.fixture
def project(original, tmp_path) -> Traced:
    """Give a test a copy that it may spoil."""
    root = tmp_path / "census"
    shutil.copytree(original.root, root, symlinks=True)
    return Traced(root, original.bundle, original.rows)


def states(root: Path, id_: str) -> dict[str, str]:
    return {link.name: link.state for link in trace(root, id_).links if link.state != "holds"}


def printed(capsys, *words: str) -> tuple[int, str]:
    code = main([str(word) for word in words])
    said = capsys.readouterr()
    return code, said.out + said.err


# ------------------------------------------------------------------------------------------------------ a whole chain


def test_a_whole_chain_leads_from_the_answer_to_the_cell_the_commit_and_the_data(project):
    (id_,) = project.answer()
    project.tell(id_, "yes")
    found = trace(project.root, id_)
    assert found.is_complete, [link.why for link in found.links if link.why]
    assert found["bento"].facts["signature"] == "verified" and found["bento"].facts["digest"] == project.bundle.digest
    assert found["version"].facts["aliases"] == ["champion"]
    assert found["run"].title == RUN and found["run"].facts["metrics"] == {"auc": 0.9}
    cell = found["notebook"].facts
    assert (cell["step"], cell["cell"], cell["saved"], cell["line"]) == ("tune", 3, 5, "found = search(trials=50)")
    assert found["code"].facts["in_repository"] and found["data"].facts["fingerprint"] == "f" * 32
    assert found.prediction.truth == "yes" and found.next == f"ekiben reproduce {RUN}"
    assert [move.split()[1] for move in found["ledger"].facts["moves"]] == ["registration", "promotion"]


@pytest.mark.parametrize("encryption", [False, True])
def test_it_says_the_same_before_and_after_sealing(project, encryption):
    ids = project.answer(rows=project.rows)
    project.tell(ids[7], "no")
    before = trace(project.root, ids[7])
    seal_journal(project.journal, JournalOptions(encryption=encryption))
    after = trace(project.root, ids[7])
    assert after.is_complete and before.is_complete
    assert after.reasons == before.reasons and after.prediction.output == before.prediction.output
    assert (after.prediction.truth, after.prediction.keys) == ("no", {"id": "p7"})
    assert after.prediction.place.startswith("sealed/") and before.prediction.place.startswith("segments/")


def test_the_last_truth_counts_wherever_it_stands(project):
    (id_,) = project.answer()
    project.tell(id_, "no")
    seal_journal(project.journal)
    time.sleep(0.002)
    project.tell(id_, "yes")
    assert find_prediction(project.journal, id_).truth == "yes"


def test_every_row_is_computed_again_bit_for_bit_and_explained_to_the_margin(project):
    ids = project.answer(rows=project.rows)
    seal_journal(project.journal)
    for id_ in ids:
        found = explain_again(project.bundle, find_prediction(project.journal, id_))
        assert found.is_same and found.gap < 1e-9
        assert set(found.contributions) == set(project.bundle.preprocessor.names)
        assert list(map(abs, found.contributions.values())) == sorted(map(abs, found.contributions.values()), reverse=True)


@pytest.mark.parametrize(("runtime", "task"), [("linear", "binary"), ("lightgbm", "multiclass"), ("lightgbm", "regression"), ("python", "binary")])
def test_other_runtimes_and_tasks_are_traced_too(tmp_path, runtime, task):
    made = make_traced(tmp_path / "p", runtime=runtime, task=task)
    ids = made.answer(rows=made.rows[:5])
    for seal in (False, True):
        if seal:
            seal_journal(made.journal)
        for id_ in ids:
            found = trace(made.root, id_)
            assert found.is_complete, [link.why for link in found.links if link.why]
            assert found.reasons.is_same
            assert (found.reasons.margin is None) == (runtime == "python")
            assert found.reasons.of == ((found.prediction.output["label"]) if task == "multiclass" else "")
            show_trace(found, made.root)


def test_a_shadow_is_beside_the_answer_and_alone_it_is_said_to_be_unseen(project, capsys):
    scored = project.answer()[0]
    from ekiben.serving.journal.journal import Journal
    from ekiben.serving.scoring.scorer import Scorer
    from ekiben.serving.journal.segments import origin_of

    names = [f.name for f in project.bundle.schema.inputs]
    for id_ in (scored, "0190f0a0-0000-7000-8000-000000000001"):
        journal = Journal(project.journal, origin_of(project.bundle.schema, names, {**project.model, "version": "4", "role": "shadow"}))
        journal.predictions([id_], project.rows[:1], Scorer(project.bundle).score_rows(project.rows[:1]))
        journal.close()
    found = find_prediction(project.journal, scored)
    assert (found.role, found.model["version"]) == ("champion", "3")
    assert [(one.role, one.model["version"]) for one in found.shadows] == [("shadow", "4")]
    code, said = printed(capsys, "trace", "0190f0a0-0000-7000-8000-000000000001", "--project", project.root)
    assert code == 1 and "nobody saw this answer" in said  # version 4 is registered nowhere


# ------------------------------------------------------------------------------------- links that are gone or changed


def spoil_bundle(p: Traced) -> None:
    path = next(p.root.glob(".ekiben/deployments/*/bundles/*/model/*"))
    path.write_bytes(path.read_bytes() + b" ")


def forget_alias_table(p: Traced, statement: str) -> None:
    with contextlib.closing(sqlite3.connect(p.root / "mlflow.db")) as db:
        db.execute(statement)
        db.commit()


GONE = {
    "the bundle": (lambda p: shutil.rmtree(p.root / ".ekiben" / "deployments"), {"bento": "missing", "explanation": "missing"}, "ekiben run"),
    "a byte of the model": (spoil_bundle, {"bento": "broken", "explanation": "missing"}, "not what was signed"),
    "the registry": (lambda p: (p.root / "mlflow.db").unlink(), {"version": "missing"}, "restore mlflow.db"),
    "the version": (lambda p: forget_alias_table(p, "delete from model_versions"), {"version": "missing"}, "restore mlflow.db"),
    "another content": (
        lambda p: forget_alias_table(p, "update model_version_tags set value = 'abcd' where key = 'ekiben.digest'"), {"version": "broken"}, "exchanged",
    ),
    "run.json": (lambda p: (p.layout.report(RUN) / "run.json").unlink(), {"run": "missing"}, "restore the folder"),
    "the notebook": (lambda p: (p.layout.report(RUN) / "02_tune.ipynb").unlink(), {"notebook": "missing"}, f"ekiben reproduce {RUN}"),
    "half a notebook": (lambda p: (p.layout.report(RUN) / "02_tune.ipynb").write_text("{"), {"notebook": "broken"}, "no notebook any more"),
    "what steps said": (lambda p: shutil.rmtree(p.root / ".ekiben" / "runs"), {"notebook": "missing"}, "ekiben reproduce"),
    "a line of the ledger": (
        lambda p: (p.root / ".ekiben" / "ledger.jsonl").write_bytes((p.root / ".ekiben" / "ledger.jsonl").read_bytes().replace(b"first", b"last ")),
        {"ledger": "broken"}, "entry 2",
    ),
    "the ledger's end": (
        lambda p: (p.root / ".ekiben" / "ledger.jsonl").write_bytes((p.root / ".ekiben" / "ledger.jsonl").read_bytes().splitlines(True)[0]),
        {"ledger": "broken"}, "entry 2",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", GONE)
def test_a_link_that_is_gone_or_changed_is_said_in_one_line_with_what_to_do(project, what, capsys):
    (id_,) = project.answer()
    spoil, expected, words = GONE[what]
    spoil(project)
    found = trace(project.root, id_)
    assert {link.name: link.state for link in found.links if link.state != "holds"} == expected
    assert all("\n" not in link.why and link.why for link in found.links if link.state != "holds")
    code, said = printed(capsys, "trace", id_, "--project", project.root)
    assert code == 1 and words in " ".join(said.split())


def test_code_that_neither_git_nor_the_store_holds_is_missing(project):
    (id_,) = project.answer()
    shutil.rmtree(project.root / ".git")
    found = trace(project.root, id_)
    assert found.is_complete and "does not hold the commit" in found["code"].notes[0]  # the copies are kept
    for path in project.layout.objects.rglob("*"):
        if path.is_file():
            path.unlink()
    assert states(project.root, id_) == {"code": "missing"}


def test_an_answer_that_was_changed_in_the_journal_is_found(project):
    def better(answer):
        answer.probability = min(1.0, answer.probability + 1e-12)

    (id_,) = project.answer(change=better)
    found = trace(project.root, id_)
    assert {link.name: link.state for link in found.links if link.state != "holds"} == {"explanation": "broken"}
    assert "journal or bundle was exchanged" in found["explanation"].why


def test_a_row_that_was_changed_in_the_journal_is_found(project):
    row = next(r for r in project.rows if r["age"] is not None)
    (id_,) = project.answer(rows=[row])
    path = next((project.journal / "segments").iterdir())
    from ekiben.serving.journal.segments import PREDICTION, Segment, encode_event

    segment = Segment.read(path)
    _, at, ids, rows, keys, answers = next(segment.events())
    rows[0][0] = (rows[0][0] or 0) + 30
    segment.records[0] = encode_event(PREDICTION, at, ids, rows, keys, answers)
    path.write_bytes(segment.to_bytes())
    assert states(project.root, id_).get("explanation") == "broken"


def test_data_that_changed_since_is_a_note_and_data_of_a_forgotten_person_is_a_missing_link(project):
    from ekiben.files import write_whole
    from ekiben.runs import FileStamp, StepResult
    from msgspec import structs

    (id_,) = project.answer()
    path = project.layout.result(RUN, "prepare")
    source = project.root / "data" / "people.csv"
    stamp = FileStamp(bytes=source.stat().st_size, mtime_ns=source.stat().st_mtime_ns, digest="0" * 64)
    write_whole(path, structs.replace(StepResult.from_json(path.read_bytes()), files={"data/people.csv": stamp}).to_json())
    assert trace(project.root, id_)["data"].notes == []
    source.write_text("age,target\n17,no\n")
    found = trace(project.root, id_)
    assert found.is_complete and "is not what the run read" in found["data"].notes[0]
    digest = StepResult.from_json(path.read_bytes()).outputs["schema"].digest
    said = {"time": "2026-07-02T00:00:00+00:00", "column": "id", "tables": [{"names": ["prepare.train"], "rows": 1, "was": "a" * 64, "now": digest}]}
    (project.root / ".ekiben" / "erasures.jsonl").write_text(json.dumps(said) + "\n")
    assert states(project.root, id_) == {"data": "missing"}


def test_an_erased_prediction_is_unknown_and_no_value_of_the_person_is_told(project, capsys):
    row = project.rows[3] | {"id": "very-private-17"}
    (id_,) = project.answer(rows=[row])
    assert main(["forget", "id=very-private-17", "--project", str(project.root)]) == 0
    capsys.readouterr()
    code, said = printed(capsys, "trace", id_, "--project", project.root)
    assert code == 2 and "erased (1 erasures since)" in said
    raw = (project.root / ".ekiben" / "ledger.jsonl").read_text()
    assert "very-private-17" not in raw and '"what":"erasure"' in raw and '"column":"id"' in raw


# -------------------------------------------------------------------------------------------------------- the command


def test_unknown_ids_and_what_is_no_id_end_with_2(project, capsys):
    project.answer()
    for word in ("0190f0a0-0000-7000-8000-00000000000f", "nonsense", "", "0190f0a0-0000-4000-8000-00000000000f"):
        code, said = printed(capsys, "trace", word, "--project", project.root)
        assert code == 2 and said.startswith("error: ") and said.count("\n") == 1, said


def test_what_is_printed_names_every_link_and_json_holds_them_all(project, capsys):
    (id_,) = project.answer()
    code, said = printed(capsys, "trace", id_.upper(), "--project", project.root)
    assert code == 0
    for word in (id_, "signature verified just now", "census version 3", RUN, "cell 3, saved in cell 5", "bit for bit", "margin", "the chain is complete"):
        assert word in said, word
    assert said.rstrip().endswith(f"ekiben reproduce {RUN}")
    code, said = printed(capsys, "trace", id_, "--project", project.root, "--json")
    found = json.loads(said)
    assert code == 0 and [link["name"] for link in found["links"]] == ["prediction", "bento", "version", "run", "notebook", "code", "data", "explanation", "ledger"]


def test_private_columns_are_not_shown(tmp_path, monkeypatch):
    import bundles
    from ekiben.records import Schema
    from msgspec import structs
    from rich.console import Console

    schema = bundles.make_schema("binary")

    def private(task: str) -> Schema:
        return structs.replace(schema, fields=tuple(structs.replace(f, role="private") if f.name == "id" else f for f in schema.fields))

    monkeypatch.setattr(bundles, "make_schema", private)
    made = make_traced(tmp_path / "p")
    (id_,) = made.answer(rows=[made.rows[0] | {"id": "passport-4711"}])
    console = Console(width=200, record=True, file=open(os.devnull, "w"))
    found = trace(made.root, id_)
    console.print(show_trace(found))
    said = console.export_text()
    assert "id: kept only as a keyed hash" in said and "passport-4711" not in said + found.to_json().decode()
    assert str(found.prediction.keys["id"]) not in said


# -------------------------------------------------------------------------------------------------------------- speed


def test_only_the_files_of_its_day_are_opened(project):
    (id_,) = project.answer()
    seal_journal(project.journal)
    for day in ("2020-01-01", "2099-01-01"):
        other = project.journal / "sealed" / "predictions" / f"_date={day}"
        other.mkdir()
        (other / "v3-broken.parquet").write_bytes(b"PAR1 this is no table")
    assert find_prediction(project.journal, id_) is not None


def test_a_damaged_file_of_its_day_is_said(project, capsys):
    (id_,) = project.answer()
    seal_journal(project.journal)
    path = next((project.journal / "sealed" / "predictions").rglob("*.parquet"))
    path.write_bytes(path.read_bytes()[:-40])
    code, said = printed(capsys, "trace", id_, "--project", project.root)
    assert code == 1 and ("damaged" in said or "could not be searched" in said)


def test_the_time_of_an_id_is_read_from_it():
    assert time_of("01890a5d-ac96-774b-bcce-b302099a8057").isoformat() == "2023-06-30T03:34:18.518000+00:00"
    with pytest.raises(UsageError):
        time_of("01890a5d-ac96-774b-bcce-b302099a8057x")


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        (["step.save('model', fit())"], (1, 1)),
        (["m = fit()\nstep.save('model', m)"], (1, 1)),
        (["m = fit()", "m = tune(m)", "step.save('model', m)", "m = None"], (2, 3)),
        (["a, m = fit()", "%time x = 1\nsave('model', m[0].best)"], (1, 2)),
        (["m: object = fit()", "print('save(model)')", "step.save('model', m)"], (1, 3)),
        (["step.save('policy', 1)", "this is no python", ""], (0, 0)),
        (["step.save(name, m)"], (0, 0)),
    ],
)
def test_the_cell_that_made_the_model_is_found(tmp_path, sources, expected):
    path = tmp_path / "a.ipynb"
    path.write_text(json.dumps({"cells": [{"cell_type": "code", "source": [line]} for line in sources]}))
    found = find_cells(path)
    assert (found.made, found.saved) == expected


def test_layout_is_where_the_tests_put_it(project):
    assert (Layout(project.root).report(RUN) / "run.json").is_file()


# ------------------------------------------------------------------------------------------------ a project, for real


@pytest.mark.slow
def test_a_real_prediction_leads_to_a_run_that_is_made_again_with_the_same_figures(tmp_path, monkeypatch):
    import test_projects as real
    from ekiben.ledger import read, verify

    monkeypatch.setenv("EKIBEN_CONFIG", str(tmp_path / "config"))
    monkeypatch.setenv("BENTOML_HOME", str(tmp_path / "bentoml"))
    root = tmp_path / "credit"
    real.ekiben("new", str(root), "--data", "simulated:credit?rows=2000", "--target", "default", "--private", "postcode", cwd=tmp_path)
    real.edit_settings(root, ("# trials = 0", "trials = 2"))
    run = real.run_project(root)
    assert run["status"] == "done" and run["model"]["alias"] == "champion"
    with real.serving(root) as url:
        rows = real.example_rows(url)
        answer = real.predict(url, rows[:1])[0]
    found = json.loads(real.ekiben("trace", answer["id"], "--json", cwd=root).stdout)
    links = {link["name"]: link for link in found["links"]}
    assert {name for name, link in links.items() if link["state"] != "holds"} == set()
    assert links["run"]["title"] == run["run_id"] and links["notebook"]["facts"]["step"] == "tune" and links["notebook"]["facts"]["line"]
    assert found["reasons"]["is_same"] and found["prediction"]["output"]["probability"] == answer["probability"]
    assert [e.what for e in read(root)] == ["key", "registration", "promotion", "run"] and verify(root).key
    real.ekiben("export", "card", cwd=root)
    again = json.loads(real.ekiben(*found["next"].split()[1:], "--json", cwd=root).stdout)
    figures = [match for match in again["matches"] if match["kind"] == "figure" and match["verdict"] != "varies"]
    assert len(figures) > 20 and all(match["verdict"] == "identical" for match in figures)
    assert verify(root).count == 5 and read(root)[-1].what == "export"
