"""A project whose one model can be walked back from its answers: made in a second, every file where the real ones lie."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from bundles import make_project, make_schema
from ekiben.accounted import account_release
from ekiben.files import write_whole
from ekiben.records import Judgement, Measure
from ekiben.runs import Layout, Run, StepResult, StepRun, write_run
from ekiben.serving.bundle import Bundle, Lineage, load_bundle, stamp_bundle
from ekiben.serving.journal.journal import Journal, new_ids
from ekiben.serving.scoring.scorer import Scorer
from ekiben.serving.journal.segments import origin_of
from ekiben.serving.security.signer import sign_folder, signing_key
from ekiben.store import Store

RUN = "20260701-101500-ab12cd"
SETTINGS = """[pipeline]
name = census
[data]
source = data/people.csv
[columns]
target = target
sensitive = sex
id = id
[gates]
gates =
    auc >= 0.8
[card]
lawful_basis = contract
[serve]
retention_days = 90
"""
TABLES = """
create table registered_models (name text);
create table model_versions (name text, version integer, run_id text);
create table model_version_tags (key text, value text, name text, version integer);
create table registered_model_aliases (alias text, version integer, name text);
"""
CELLS = {
    "01_prepare": ["from ekiben import step", 'step.save("schema", schema)'],
    "02_tune": ["from ekiben import step", "# the search\nfound = search(trials=50)", "draw(found)", 'step.save("model", found.model)'],
    "03_audit": ["from ekiben import step", 'model = step.load("tune", "model")', 'step.save("model", model)'],
}


@dataclass
class Traced:
    """The project, and where its parts lie."""

    root: Path
    bundle: Bundle
    rows: list[dict]

    @property
    def journal(self) -> Path:
        return self.root / ".ekiben" / "journal"

    @property
    def layout(self) -> Layout:
        return Layout(self.root)

    @property
    def model(self) -> dict[str, str]:
        return {"name": "census", "version": "3", "bento": ""}

    def answer(self, *, rows: list[dict] | None = None, change=None, **model: str) -> list[str]:
        """Answer rows, journal them as the service does, and return the ids."""
        scorer, rows = Scorer(self.bundle), rows or self.rows[:1]
        answers = scorer.score_rows(rows)
        for answer in answers:
            if change is not None:
                change(answer)
        inputs = [f.name for f in scorer.request_schema.inputs]
        journal = Journal(self.journal, origin_of(self.bundle.schema, inputs, {**self.model, **model}))
        ids = new_ids(len(rows))
        journal.predictions(ids, rows, answers)
        journal.close()
        return ids

    def tell(self, id_: str, label: str | float) -> None:
        """Journal what turned out to be true."""
        names = [f.name for f in self.bundle.schema.inputs]
        journal = Journal(self.journal, origin_of(self.bundle.schema, names, self.model))
        journal.feedback(id_, label)
        journal.close()


def make_traced(root: Path, *, runtime: str = "lightgbm", task: str = "binary") -> Traced:
    """Make the project."""
    root = root.resolve()
    (root / "data").mkdir(parents=True)
    (root / "data" / "people.csv").write_text("age,target\n41,yes\n")
    (root / "settings.ini").write_text(SETTINGS)
    commit = _commit(root)
    layout, store = Layout(root), Store(root / ".ekiben" / "objects")
    made = make_project(root / "build", runtime=runtime, task=task, rounds=20, lineage=Lineage(run_id=RUN, git=commit, fingerprint="f" * 32))
    place = root / ".ekiben" / "deployments" / "production" / "bundles" / made.bundle.digest[:16]
    place.parent.mkdir(parents=True)
    bundle = stamp_bundle(made.bundle.folder, place, version="3")
    sign_folder(place, signing_key(make=True, say=lambda _: None), kind="bundle", name="census 3")
    _register(root, bundle)
    _run(layout, store, commit, task)
    account_release(
        root, name="census", version="3", digest=bundle.digest, alias="champion", replaces="", why="the first that passed", is_new=True, run=RUN
    )
    rows = made.columns.pick([f.name for f in bundle.schema.inputs]).rows(np.arange(40)).to_rows()
    plain = [{k: v.isoformat() if hasattr(v, "isoformat") else v for k, v in row.items()} | {"id": f"p{i}"} for i, row in enumerate(rows)]
    return Traced(root, load_bundle(place), plain)


def _commit(root: Path) -> str:
    git = ["git", "-C", str(root), "-c", "user.name=t", "-c", "user.email=t@example.org"]
    for words in (["init", "-q"], ["add", "settings.ini"], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *words], check=True, capture_output=True)
    return subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()


def _register(root: Path, bundle: Bundle) -> None:
    with contextlib.closing(sqlite3.connect(root / "mlflow.db")) as db:
        db.executescript(TABLES)
        db.execute("insert into registered_models values ('census')")
        db.execute("insert into model_versions values ('census', 3, 'mlflow-run')")
        db.execute("insert into registered_model_aliases values ('champion', 3, 'census')")
        for key, value in {"ekiben.digest": bundle.digest, "ekiben.run": RUN}.items():
            db.execute("insert into model_version_tags values (?, ?, 'census', 3)", (key, value))
        db.commit()


def _run(layout: Layout, store: Store, commit: str, task: str) -> None:
    folder = layout.report(RUN)
    for name, sources in CELLS.items():
        cells = [{"cell_type": "markdown", "metadata": {}, "source": f"# {name}"}]
        cells += [{"cell_type": "code", "metadata": {}, "source": source, "outputs": []} for source in sources]
        write_whole(folder / f"{name}.ipynb", json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}).encode())
    model, schema = store.put({"trees": 20}), store.put(make_schema(task))
    outputs = {"prepare": {"schema": schema}, "tune": {"model": model}, "audit": {"model": model}}
    steps = []
    for name, kept in outputs.items():
        result = StepResult(step=name, run_id=RUN, started="2026-07-01T10:15:00+00:00", status="done", outputs=kept)
        write_whole(layout.result(RUN, name), result.to_json())
        steps.append(StepRun(name=name, status="ran", made_in=RUN, notebook=f"reports/runs/{RUN}/{next(c for c in CELLS if c.endswith(name))}.ipynb"))
    code = store.put({"code": 1}).digest
    gate = Judgement(
        name="auc >= 0.8", metric="auc", slice="", op=">=", limit=0.8, value=0.9, low=0.88, high=0.92, verdict="pass", blocking=True
    )
    write_run(
        layout,
        Run(
            run_id=RUN, status="done", started="2026-07-01T10:15:00+00:00", seconds=12.5, git={"commit": commit, "dirty": False},
            data={"fingerprint": "f" * 32, "rows": 600, "source": "data/people.csv"}, steps=steps, metrics={"auc": 0.9},
            measures=[Measure(name="auc", value=0.9, low=0.88, high=0.92, rows=120)], gates=[gate],
            model={"name": "census", "version": "3", "alias": "champion", "runtime": "lightgbm"}, code={"src/census/a.py": code},
            settings={"evaluate": {"intended_use": "to advise", "contact": "team@example.org"}},
        ),
    )
