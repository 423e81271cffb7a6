"""What a look at the journal finds, says, tells and keeps to itself."""

from __future__ import annotations

import json
import os
import shutil
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from prometheus_client.parser import text_string_to_metric_families
from watched import Served, make_served, people, truth_of

from ekiben import ledger, step
from ekiben.columns import Columns
from ekiben.errors import EkibenError, StepError, UsageError
from ekiben.runner import looks as running
from ekiben.monitor.labelfree import Belief, estimate_quality
from ekiben.monitor.period import period
from ekiben.monitor.records import Alert, MonitorReport, Span, Traffic, Watched
from ekiben.monitor.sinks import Look, Mail, post, send_mail
from ekiben.monitor.standing import Standing, due_for, kept_alerts, read_standing, tell, update
from ekiben.monitor.traffic import measure_traffic, quantile_of, read_telemetry
from ekiben.reference import Calibration
from ekiben.runner.graph import read_steps
from ekiben.runner.plan import Plan, chosen_steps
from ekiben.runner.scheduled import Executed
from ekiben.settings import load_settings
from ekiben.store import Store

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = "06_monitor.ipynb"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Served]:
    """Return a function that makes the project of a task once."""
    known: dict[str, Served] = {}

    def make(task: str) -> Served:
        if task not in known:
            known[task] = make_served(tmp_path_factory.mktemp(task), task)
        return known[task]

    return make


@pytest.fixture
def served(made: Callable[[str], Served], tmp_path: Path) -> Callable[..., Served]:
    """Return a function that gives a fresh project of a task, with further settings."""

    def fresh(task: str = "binary", *, monitor: str = "", gates: str = "") -> Served:
        first = made(task)
        root = tmp_path / "loans"
        shutil.copytree(first.root, root)
        text = (root / "settings.ini").read_text()
        text = text.replace("[monitor]", f"{gates}\n[monitor]") + monitor
        (root / "settings.ini").write_text(text)
        return replace_root(first, root)

    return fresh


def replace_root(first: Served, root: Path) -> Served:
    return Served(root, first.task, first.bundle, first.schema, first.model, first.preprocessor, first.policy)


def run_cells(root: Path, **parameters: Any) -> MonitorReport:
    """Run the notebook's cells here, as a person does by hand, and return what it saved."""
    cells = json.loads((root / "nbs" / "pipeline" / NOTEBOOK).read_text())["cells"]
    before, space = Path.cwd(), {"__name__": "__notebook__"}
    os.chdir(root / "nbs" / "pipeline")
    try:
        for cell in cells:
            if cell["cell_type"] != "code":
                continue
            exec(compile("".join(cell["source"]), f"<{NOTEBOOK}>", "exec"), space)
            if "parameters" in cell["metadata"].get("tags", []):
                space |= {**load_settings(root).steps["monitor"], **parameters}
        session = step._current()
        return Store(session.layout.objects).get(session.result.outputs["report"])
    finally:
        os.chdir(before)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have looks executed in this process, without a kernel."""

    def execute(root: Path, name: str, *, folder: Path, overrides: dict[str, str], links: Any) -> Executed:
        folder.mkdir(parents=True)
        own = load_settings(root, overrides=overrides).steps[name]
        return Executed(folder / NOTEBOOK, None, {"report": run_cells(root, **own)})

    monkeypatch.setattr("ekiben.runner.scheduled.execute_scheduled", execute)


def changed(columns: Columns, **values: Any) -> Columns:
    return Columns({**{name: columns[name] for name in columns}, **values}, {"job": "category"})


NOW = time.time()
LATE = np.arange(3000) >= 1500  # the second half of a window


# ---- what it finds


@pytest.mark.parametrize("task", ["binary", "multiclass", "regression"])
def test_a_window_like_training_is_quiet(served: Callable[..., Served], task: str) -> None:
    project = served(task)
    rows = people(3000, 11)
    project.serve(rows, truth_of(rows, task, 11), end=time.time() - 5)
    report = run_cells(project.root)
    assert report.alerts == [] and report.is_quiet
    assert report.window.rows > 2900 and report.window.labelled == 3000
    named = {m.name for m in report.quality.measures}
    assert {"binary": "auc", "multiclass": "accuracy", "regression": "mae"}[task] in named
    assert len(report.quality.parts) == 6 and len(report.drift) == 3 + max(1, len(project.schema.classes) if task == "multiclass" else 1)
    expected = {m.name: m for m in report.quality.estimated_labelled}
    assert set(expected) == ({"accuracy"} if task == "multiclass" else set() if task == "regression" else set(expected))
    for name, m in expected.items():
        assert m.low is not None and m.high is not None
        assert m.low - 0.01 <= report.quality.realised(name).value <= m.high + 0.01, name


def test_what_moved_is_named_with_its_rows_and_since_when(served: Callable[..., Served]) -> None:
    project = served()
    rows = people(3000, 12)
    project.serve(changed(rows, age=np.where(LATE, rows["age"] + 6, rows["age"])), end=time.time() - 5)
    report = run_cells(project.root)
    alerts = {a.column: a for a in report.alerts}
    assert alerts["age"].kind == "drift" and "age" in alerts["age"].says and alerts["age"].advice
    assert {a.column for a in report.alerts} <= {"age", "prediction"}
    begin = datetime.fromtimestamp(NOW, UTC) - timedelta(hours=24)
    assert timedelta(hours=7) < datetime.fromisoformat(alerts["age"].since) - begin < timedelta(hours=17)
    found = duckdb_rows(project.root, alerts["age"].rows)
    drift = next(d for d in report.drift if d.column == "age")
    cut = float(drift.where.split(">=")[1])
    assert len(found) == 20 and all(row["age"] >= cut > 30 for row in found)


def duckdb_rows(root: Path, query: str) -> list[dict[str, Any]]:
    before = Path.cwd()
    os.chdir(root)
    try:
        return duckdb.sql(query).df().to_dict("records")
    finally:
        os.chdir(before)


@pytest.mark.parametrize(
    ("kind", "column", "values"),
    [
        ("missing", "debt", lambda c: np.where(LATE & (np.arange(3000) % 5 == 0), np.nan, c["debt"])),
        ("unseen", "job", lambda c: np.where(LATE & (np.arange(3000) % 5 == 0), "astronaut", c["job"]).astype(object)),
        ("range", "age", lambda c: np.where(LATE & (np.arange(3000) % 5 == 0), 900.0, c["age"])),
    ],
)
def test_values_that_went_wrong_are_called_what_they_are(
    served: Callable[..., Served], kind: str, column: str, values: Callable[[Columns], np.ndarray]
) -> None:
    project = served()
    rows = people(3000, 13)
    project.serve(changed(rows, **{column: values(rows)}), end=time.time() - 5)
    report = run_cells(project.root)
    alert = next(a for a in report.alerts if a.column == column)
    assert alert.kind == kind and alert.value == pytest.approx(0.1, abs=0.03) and alert.value > alert.limit
    own = next(i for i in report.inputs if i.column == column)
    assert {"missing": own.missing, "unseen": own.unseen, "range": own.out_of_range}[kind] == alert.value
    assert duckdb_rows(project.root, alert.rows)


def test_concept_drift_with_unchanged_inputs_is_seen_by_labels_and_not_by_the_estimate(served: Callable[..., Served]) -> None:
    project = served()
    rows = people(3000, 14)
    y = np.where(LATE, truth_of(rows, "binary", 14, turned=True), truth_of(rows, "binary", 14))
    project.serve(rows, y, end=time.time() - 5)
    report = run_cells(project.root)
    assert {a.kind for a in report.alerts} == {"quality", "concept"}
    assert {a.column for a in report.alerts if a.kind == "concept"} >= {"debt"}
    told, expected = report.quality.realised("auc"), next(m for m in report.quality.estimated if m.name == "auc")
    before = next(m for m in report.quality.reference if m.name == "auc")
    assert told.high < before.low and expected.low < before.value < expected.high, "the estimate is blind to it, and says so"
    assert report.quality.sequential["is_drifting"] or report.quality.shifts[0]["is_drifting"]
    quality = next(a for a in report.alerts if a.kind == "quality")
    found = duckdb_rows(project.root, quality.rows)
    assert len(found) == 20 and all(row["_truth"] in ("no", "yes") for row in found)


def test_harder_cases_are_expected_to_go_wrong_before_any_label_comes(served: Callable[..., Served]) -> None:
    project = served()
    many = people(30_000, 15)
    doubtful = np.abs(project.predict(many) - 0.5) < 0.15
    hard = many.rows(np.flatnonzero(doubtful)[:3000])
    project.serve(hard, end=time.time() - 5)
    report = run_cells(project.root)
    assert report.quality.measures == [] and report.window.labelled == 0
    alert = next(a for a in report.alerts if a.kind == "quality")
    assert alert.figure == "estimated auc" and "before any label" in alert.says
    assert any("no label" in note for note in report.notes)


def test_labels_that_come_days_later_are_seen_by_the_window_they_come_in(served: Callable[..., Served]) -> None:
    project = served()
    rows = people(2000, 16)
    now = time.time()
    project.serve(rows, truth_of(rows, "binary", 16, turned=True), end=now - 3 * 86_400, told_late_s=3 * 86_400 - 3600)
    project.serve(people(1000, 17), end=now - 5)
    report = run_cells(project.root)
    assert report.window.rows == pytest.approx(1000, abs=60) and report.window.labelled == 2000
    assert any(a.kind == "quality" for a in report.alerts)
    assert datetime.fromisoformat(report.quality.parts[0].since) < report.window.begin


def test_versions_are_counted_apart_and_shadow_answers_not_at_all(served: Callable[..., Served]) -> None:
    pytest.importorskip("ekiben.serving.hosting.hosting", reason="this journal knows no roles yet")
    project = served()
    end = time.time() - 5
    project.serve(people(600, 18), end=end, version="3", role="champion")
    project.serve(people(90, 19), end=end, version="4", role="challenger")
    project.serve(people(600, 20), end=end, version="5", role="shadow")
    report = run_cells(project.root)
    assert set(report.window.versions) == {"3", "4"} and report.model.version == "3"
    assert report.window.rows == report.window.versions["3"] and report.traffic.rows == sum(report.window.versions.values())
    with pytest.raises(UsageError, match="no bundle of version `4`"):
        run_cells(project.root, version="4")
    with pytest.raises(UsageError, match="version `9` answered no row"):
        run_cells(project.root, version="9")


def test_the_bundle_is_found_in_its_bento_when_nothing_is_deployed(
    served: Callable[..., Served], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from ekiben.monitor.model import find_bundle
    from ekiben.serving.served import Served as Packaged

    project = served()
    monkeypatch.setenv("BENTOML_HOME", str(tmp_path / "bentoml"))
    older = tmp_path / "bentoml/bentos/loans/old/src/bundle"
    shutil.move(project.root / ".ekiben/deployments/production/bundles/made", older)
    shutil.rmtree(project.root / ".ekiben/deployments")
    Packaged.path(project.root).write_bytes(Packaged(bento="loans:new", name="loans", version="4", digest="").to_json())
    assert find_bundle(project.root, "3").digest == project.bundle.digest, "an older Bento of the same name has it"
    with pytest.raises(UsageError, match="no bundle of version `4`"):
        find_bundle(project.root, "4")


def test_a_declared_limit_that_is_missed_alerts(served: Callable[..., Served]) -> None:
    project = served(gates="[gates]\ngates =\n    auc >= 0.95\n")
    rows = people(1500, 21)
    project.serve(rows, truth_of(rows, "binary", 21), end=time.time() - 5)
    (alert,) = run_cells(project.root).alerts
    assert alert.id == "quality.gate-auc.v3.production" and alert.limit == 0.95 and "auc >= 0.95" in alert.says


def test_few_rows_and_none_are_not_judged_and_said_so(served: Callable[..., Served]) -> None:
    project = served()
    rows = people(40, 22)
    project.serve(changed(rows, age=rows["age"] + 500), end=time.time() - 5)
    few = run_cells(project.root)
    assert few.is_quiet and few.drift == [] and any("fewer than min_rows" in note for note in few.notes)
    none = run_cells(project.root, since="2020-01-01", until="2020-01-02")
    assert none.is_quiet and none.window.rows == 0 and none.model.version == "3", "the champion is looked at"


def test_a_bundle_from_before_there_was_a_reference_is_still_looked_at(served: Callable[..., Served]) -> None:
    from ekiben.serving.security.integrity import seal_folder

    project = served()
    files = {n: raw for n, raw in project.bundle.files.items() if n != "reference.json"}
    seal_folder(project.root / ".ekiben/deployments/production/bundles/made", files)
    rows = people(1000, 23)
    project.serve(rows, truth_of(rows, "binary", 23), end=time.time() - 5)
    report = run_cells(project.root)
    assert report.is_quiet and report.quality.measures and report.quality.estimated == [] == report.quality.reference and report.drift


def test_an_encrypted_journal_is_read_and_its_rows_are_one_line_of_python_away(served: Callable[..., Served], capsys: Any) -> None:
    project = served()
    text = (project.root / "settings.ini").read_text()
    (project.root / "settings.ini").write_text(text.replace("[monitor]", "[serve]\nencryption = yes\n\n[monitor]"))
    rows = people(1500, 28)
    project.serve(changed(rows, age=rows["age"] + 20), end=time.time() - 5)
    alert = next(a for a in run_cells(project.root).alerts if a.column == "age")
    assert list((project.root / ".ekiben/journal/sealed").rglob("*.parquet")) and "open_journal" in alert.rows
    before = Path.cwd()
    os.chdir(project.root)
    try:
        capsys.readouterr()
        exec(alert.rows, {})
    finally:
        os.chdir(before)
    assert "20 rows" in capsys.readouterr().out


def test_a_silent_service_alerts_where_rows_are_expected_and_a_damaged_part_is_said(served: Callable[..., Served]) -> None:
    project = served(monitor="expect_rows = 1000\n")
    project.serve(people(300, 29), end=time.time() - 50_000, seconds=20_000)
    project.serve(people(20, 30), end=time.time() - 5, seconds=10)
    segment = next((project.root / ".ekiben/journal/segments").glob("*.closed"))
    raw = bytearray(segment.read_bytes())
    raw[len(raw) // 2] ^= 0xFF
    segment.write_bytes(bytes(raw))
    report = run_cells(project.root)
    (alert,) = [a for a in report.alerts if a.kind == "traffic"]
    assert alert.limit == 1000 and alert.value == report.traffic.rows < 400
    assert any("is not seen" in note and "damaged" in note for note in report.notes)


# ---- groups of people


def write_people(path: Path, n: int, sex: np.ndarray, *, ids: list[str] | None = None) -> None:
    ids = ids or [f"c{i}" for i in range(n)]
    path.write_text("customer,sex\n" + "".join(f"{i},{s}\n" for i, s in zip(ids, sex, strict=True)), encoding="utf-8")


def test_a_restricted_table_is_joined_and_only_sums_of_large_groups_leave(served: Callable[..., Served]) -> None:
    gates = "[gates]\nwatch =\n    demographic_parity_ratio[sex] >= 0.8\n"
    project = served(gates=gates, monitor="groups = people.csv\n")
    n = 3000
    rows = people(n, 24)
    rng = np.random.default_rng(0)
    chosen = project.predict(rows) >= 0.5
    sex = np.where(LATE & chosen, rng.choice(["F", "M"], n, p=[0.1, 0.9]), rng.choice(["F", "M"], n))
    sex[:12] = "Rare"
    write_people(project.root / "people.csv", n, sex)
    project.serve(rows, truth_of(rows, "binary", 24), end=time.time() - 5)
    report = run_cells(project.root)
    (fair,) = report.fairness
    assert fair.matched == 1.0 and fair.withheld == 12
    assert {m.slice for m in fair.groups} == {"F", "M"} and all(m.rows >= 30 for m in fair.groups)
    assert fair.judgements[0].verdict == "fail"
    (alert,) = [a for a in report.alerts if a.kind == "fairness"]
    assert alert.since and alert.value < 0.8
    written = report.to_json().decode()
    assert "Rare" not in written and "c17" not in written and "customer" not in written


def test_a_gap_too_few_people_tell_of_is_insufficient_and_alerts_nobody(served: Callable[..., Served]) -> None:
    project = served(gates="[gates]\ngates =\n    demographic_parity_ratio[sex] >= 0.8\n", monitor="groups = people.csv\n")
    rows = people(160, 25)
    write_people(project.root / "people.csv", 160, np.where(np.arange(160) % 2, "F", "M"))
    project.serve(rows, end=time.time() - 5)
    report = run_cells(project.root)
    assert report.fairness[0].judgements[0].verdict == "insufficient" and not any(a.kind == "fairness" for a in report.alerts)


def test_groups_are_joined_by_a_private_column_through_its_hash(served: Callable[..., Served]) -> None:
    from ekiben.monitor.groups import join_groups

    project = served()
    rows = people(200, 26)
    schema = project.schema
    fields = tuple(replace(f, role="private") if f.name == "customer" else f for f in schema.fields)
    private = Served(project.root, "binary", project.bundle, replace(schema, fields=fields), project.model, project.preprocessor, project.policy)
    private.serve(rows, end=time.time() - 5)
    write_people(project.root / "people.csv", 200, np.where(np.arange(200) % 2, "F", "M"))
    from ekiben.monitor.answers import open_answered

    journal = project.root / ".ekiben/journal"
    with open_answered(journal) as db:
        kept = db.execute("SELECT customer FROM answered LIMIT 1").fetchone()[0]
        assert kept != "c0" and len(kept) == 32, "the journal has the hash only"
        view = join_groups(db, project.root / "people.csv", "customer", ["sex"], journal=journal, private=["customer"])
        assert db.execute(f"SELECT count(*) FROM {view} WHERE _group_sex IS NOT NULL").fetchone()[0] == 200


@pytest.mark.parametrize(
    ("monitor", "text", "says"),
    [
        ("groups = none.csv\n", "", "no CSV or Parquet file"),
        ("groups = people.csv\n", "customer,gender\nc1,F\n", "no column `sex`"),
        ("groups = people.csv\n", "customer,sex\nc1,F\nc1,M\n", "comes more than once"),
        ("groups = people.csv\ngroup_id = passport\n", "passport,sex\nc1,F\n", "the journal keeps no column `passport`"),
    ],
)
def test_a_restricted_table_that_does_not_fit_is_refused_in_one_line(
    served: Callable[..., Served], monitor: str, text: str, says: str
) -> None:
    project = served(monitor=monitor)
    project.serve(people(150, 27), end=time.time() - 5)
    if text:
        (project.root / "people.csv").write_text(text)
    with pytest.raises(UsageError, match=says) as caught:
        run_cells(project.root)
    assert "\n" not in str(caught.value)


# ---- without labels


def held_out(means: np.ndarray, seen: np.ndarray, rows: int = 500) -> Calibration:
    none = (0.0,) * len(means)
    return Calibration(cuts=(), rows=(rows,) * len(means), said=tuple(means.tolist()), seen=tuple(seen.tolist()), loss=none, right=none)


@settings(max_examples=25, deadline=None)
@given(st.floats(0.4, 4), st.floats(0.4, 4), st.floats(0.2, 0.8), st.integers(0, 2**16))
def test_the_estimate_is_the_truth_in_expectation_when_the_model_is_calibrated(a: float, b: float, threshold: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    p = np.round(rng.beta(a, b, 400), 3)
    decision = (p >= threshold).astype(int)
    means = np.linspace(0.05, 0.95, 10)
    found = {m.name: m.value for m in estimate_quality(p, decision, "binary", held_out(means, means), replicates=20)}
    drawn = rng.random((1500, len(p))) < p
    accuracy = (drawn == decision).mean(axis=1)
    assert found["accuracy"] == pytest.approx(accuracy.mean(), abs=5 * accuracy.std() / 1500**0.5 + 1e-9)
    brier = ((drawn - p) ** 2).mean(axis=1)
    assert found["brier"] == pytest.approx(brier.mean(), abs=5 * brier.std() / 1500**0.5 + 1e-9)
    ranks = np.argsort(np.argsort(p, kind="stable"), kind="stable")
    ties = np.array([np.mean(ranks[p == v]) for v in p]) + 1  # mean ranks, as Mann and Whitney's
    positives = drawn.sum(axis=1)
    told = (positives > 0) & (positives < len(p))
    pairs = positives * (len(p) - positives)
    auc = ((drawn * ties).sum(axis=1) - positives * (positives + 1) / 2)[told] / pairs[told]
    assert found["auc"] == pytest.approx(auc.mean(), abs=5 * auc.std() / len(auc) ** 0.5 + 0.004)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=12), st.integers(0, 2**16))
def test_calibrated_probabilities_are_probabilities_whatever_the_bins_say(bins: list[tuple[float, float]], seed: int) -> None:
    said = np.sort(np.array([b[0] for b in bins]))
    p = np.random.default_rng(seed).random(50)
    found = Belief(held_out(said, np.array([b[1] for b in bins]))).calibrate(p)
    assert ((found >= 0) & (found <= 1)).all()
    for m in estimate_quality(p, (p > 0.5).astype(int), "binary", held_out(said, np.array([b[1] for b in bins])), replicates=20):
        assert m.low is not None and m.high is not None and m.low <= m.high


def test_an_overconfident_model_is_not_believed() -> None:
    rng = np.random.default_rng(0)
    p = rng.choice([0.02, 0.98], 5000)
    sure = np.where(p > 0.5, 0.8, 0.2)
    found = {m.name: m for m in estimate_quality(p, (p > 0.5).astype(int), "binary", held_out(np.array([0.02, 0.98]), np.array([0.2, 0.8])))}
    realised = ((rng.random(5000) < sure) == (p > 0.5)).mean()
    assert found["accuracy"].value == pytest.approx(0.8, abs=1e-9) and found["accuracy"].low <= realised <= found["accuracy"].high


def test_its_interval_holds_what_is_told_later_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for i in range(60):
        truth = rng.beta(2, 2, 4000)
        shown = np.clip(truth**1.3, 0, 1)  # not calibrated
        edges = np.quantile(shown, np.linspace(0, 1, 13)[1:-1])
        bins = np.digitize(shown, edges)
        outcome = rng.random(4000) < truth
        n = np.bincount(bins)
        calibration = Calibration(
            cuts=(), rows=tuple(n.tolist()), said=tuple(np.bincount(bins, shown) / n), seen=tuple(np.bincount(bins, outcome) / n),
            loss=(0.0,) * len(n), right=(0.0,) * len(n),
        )  # fmt: skip
        new = rng.beta(2, 2, 800)
        p = new**1.3
        (m,) = [m for m in estimate_quality(p, (p > 0.5).astype(int), "binary", calibration, seed=i) if m.name == "accuracy"]
        hits += m.low <= ((rng.random(800) < new) == (p > 0.5)).mean() <= m.high
    assert hits >= 52  # 57 expected of 60 at 95 %


def test_a_million_rows_are_estimated_and_values_say_nothing_of_their_errors() -> None:
    p = np.random.default_rng(0).random(1_000_000)
    means = np.linspace(0.05, 0.95, 10)
    found = estimate_quality(p, (p > 0.5).astype(int), "binary", held_out(means, means))
    assert found[0].rows == 1_000_000
    assert estimate_quality(p, p, "regression", held_out(means, means)) == [] == estimate_quality(p, p > 1, "binary", None)


# ---- traffic and time


def test_traffic_comes_from_the_services_log_and_a_torn_line_is_left_out(tmp_path: Path) -> None:
    begin, end = period("2026-11-20T00:00", "2026-11-20T06:00")
    line = {"seconds": 10, "requests": {"200": 95, "500": 5}, "rows": 95, "latency_ms": {"edges": [1, 2, 4], "counts": [50, 40, 9, 1]}, "arms": {}}
    folder = tmp_path / "telemetry"
    folder.mkdir()
    said = [json.dumps({"at": f"2026-11-20T0{h}:30:00Z", **line}) for h in range(6)]
    (folder / "20261120.jsonl").write_text("\n".join([*said, '{"at": "2026-11-20T05:59', ""]))
    lines = read_telemetry(tmp_path, begin, end)
    traffic = measure_traffic(lines, np.full(6, 95), begin, end, parts=6)
    assert len(lines) == 6 and traffic.requests == {"200": 570, "500": 30} and traffic.error_share == 0.05
    assert traffic.p50_ms == 1.0 and traffic.p90_ms == 2 and traffic.p99_ms == 4 and traffic.parts[3].failed == 5
    silent = measure_traffic([], np.full(6, 95), begin, end, parts=6)
    assert silent.rows == 570 and silent.p50_ms is None and silent.requests == {} and "latency is not known" in silent.note


@given(st.lists(st.integers(0, 50), min_size=4, max_size=4).filter(any), st.floats(0, 1))
def test_quantiles_of_a_histogram_rise_and_stay_inside_it(counts: list[int], q: float) -> None:
    low, high = quantile_of([1, 2, 4], counts, q), quantile_of([1, 2, 4], counts, min(1.0, q + 0.1))
    assert low is not None and high is not None and 0 <= low <= high <= 4


@pytest.mark.parametrize("since", ["yesterday", "24", "h", "2026-13-01", ""])
def test_a_time_that_is_none_is_refused_with_what_is_allowed(since: str) -> None:
    with pytest.raises(UsageError, match="24h, 7d or 2026"):
        period(since)


# ---- what stands, and who hears it


def alert(id: str = "drift.age.v3.production", value: float = 0.4, **more: Any) -> Alert:
    given = {"kind": "drift", "column": "age", "figure": "psi", "limit": 0.1, "since": "", "says": "`age` moved.", "rows": "", "advice": "look"}
    return Alert(id=id, value=value, **{**given, **more})


AT = datetime(2026, 11, 20, 12, tzinfo=UTC)
LOOK = Look("loans", "production", "loans", "3", "a", "b", "reports/x.html")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sets(st.sampled_from(["drift.a", "drift.b", "drift.c"])), min_size=1, max_size=8), st.data())
def test_each_place_hears_of_each_alert_once_and_of_its_end_once(looks: list[set[str]], data: st.DataObject) -> None:
    standing: dict[str, Standing] = {}
    heard: dict[str, list[tuple[str, str]]] = {"chat": [], "file": []}
    for i, ids in enumerate([*looks, set()]):
        now = AT + timedelta(minutes=i)
        update(standing, [alert(id) for id in sorted(ids)], environment="production", version="3", now=now, judged={"drift"})
        down = data.draw(st.sampled_from(["", "chat", "file"])) if i < len(looks) else ""

        def send(place: str, down: str = down) -> Callable[[list[Alert]], None]:
            def sender(alerts: list[Alert]) -> None:
                if place == down:
                    raise OSError("down")
                heard[place] += [(a.id, a.state) for a in alerts]

            return sender

        problems = tell(standing, {place: send(place) for place in heard}, now=now)
        assert not problems or problems[0].startswith(down)
    assert standing == {}, "what is over and told is forgotten"
    for told in heard.values():
        for id in ("drift.a", "drift.b", "drift.c"):
            states = [state for known, state in told if known == id]
            assert states == ["new", "resolved"] * (len(states) // 2)


def test_what_is_worse_or_stands_for_long_is_said_again_and_another_version_ends_it() -> None:
    standing: dict[str, Standing] = {}
    own = {"environment": "production", "version": "3", "judged": {"drift"}}
    heard: list[str] = []
    places = {"chat": lambda alerts: heard.extend(a.state for a in alerts)}
    for hours, value in ((0, 0.4), (1, 0.42), (2, 0.9), (3, 0.9), (30, 0.9)):
        update(standing, [alert(value=value)], now=AT + timedelta(hours=hours), **own)
        tell(standing, places, now=AT + timedelta(hours=hours), remind_h=24)
    assert heard == ["new", "worse", "reminder"]
    over = update(standing, [], environment="production", version="4", now=AT + timedelta(hours=31), judged=set())
    assert [a.state for a in over] == ["resolved"] and "version 3 answers no more" in over[0].says
    assert update(standing, [], environment="staging", version="9", now=AT, judged={"drift"}) == []


def test_a_look_that_could_not_judge_a_kind_does_not_call_it_over() -> None:
    standing: dict[str, Standing] = {}
    own = {"environment": "production", "version": "3", "now": AT}
    update(standing, [alert("quality.v3", kind="quality")], judged={"quality"}, **own)
    assert update(standing, [], judged={"drift"}, **own) == [] and not standing["quality.v3"].over
    assert len(update(standing, [], judged={"quality"}, **own)) == 1


def test_what_stands_survives_and_a_spoilt_file_is_said_so(tmp_path: Path) -> None:
    path = tmp_path / "monitor" / "alerts.json"
    with kept_alerts(path) as standing:
        update(standing, [alert()], environment="production", version="3", now=AT, judged={"drift"})
    assert list(read_standing(path)) == [alert().id] and due_for(read_standing(path), "chat", now=AT)
    path.write_text("{")
    with pytest.raises(EkibenError, match="remove it"), kept_alerts(path):
        pass


# ---- where alerts go


@pytest.fixture
def webhook() -> Iterator[tuple[str, list[dict[str, Any]], list[int]]]:
    """Yield the address of a server, what it was sent, and the statuses it is still to answer (default 200)."""
    got: list[dict[str, Any]] = []
    statuses: list[int] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(statuses.pop(0) if statuses else 200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/secret-path", got, statuses
        server.shutdown()
        thread.join()


def test_a_webhook_is_tried_again_when_that_can_help(webhook: Any) -> None:
    url, got, statuses = webhook
    pauses: list[float] = []
    statuses += [503, 429]
    post(url, {"text": "ü"}, sleep=pauses.append)
    assert len(got) == 3 and pauses == [0.5, 1.0] and got[-1] == {"text": "ü"}
    statuses += [404]
    with pytest.raises(EkibenError, match="HTTP 404") as caught:
        post(url, {}, sleep=pauses.append)
    assert len(got) == 4 and "secret-path" not in str(caught.value)
    statuses += [500] * 3
    with pytest.raises(EkibenError, match="HTTP 500"):
        post(url, {}, sleep=pauses.append)
    with pytest.raises(EkibenError) as refused:
        post("http://127.0.0.1:9/secret-path", {}, sleep=pauses.append)
    assert "secret-path" not in str(refused.value)


class MailHandler(socketserver.StreamRequestHandler):
    """A mail server that takes one message, as much of SMTP as smtplib speaks."""

    def handle(self) -> None:
        self.say("220 here")
        body: list[str] | None = None
        while line := self.rfile.readline():
            text = line.decode().rstrip("\r\n")
            if body is not None:
                if text == ".":
                    self.server.got.append("\n".join(body))  # type: ignore[attr-defined]
                    body = None
                    self.say("250 taken")
                else:
                    body.append(text)
                continue
            word = text.split()[0].upper() if text else ""
            if word == "EHLO":
                self.say("250-here\r\n250 AUTH PLAIN")
            elif word == "AUTH":
                self.server.auth.append(text)  # type: ignore[attr-defined]
                self.say("535 no" if self.server.refuse else "235 ok")  # type: ignore[attr-defined]
            elif word == "DATA":
                body = []
                self.say("354 go on")
            elif word == "QUIT":
                self.say("221 bye")
                return
            else:
                self.say("250 ok" if word in ("MAIL", "RCPT", "RSET", "NOOP") else "502 what")

    def say(self, text: str) -> None:
        self.wfile.write(text.encode() + b"\r\n")


@pytest.fixture
def mail_server() -> Iterator[Any]:
    class Server(socketserver.ThreadingTCPServer):
        allow_reuse_address = daemon_threads = True
        got: list[str] = []
        auth: list[str] = []
        refuse = False

    with Server(("127.0.0.1", 0), MailHandler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_an_email_says_what_moved_and_a_refused_login_hides_the_password(mail_server: Any) -> None:
    mail = Mail("127.0.0.1", ("ops@example.org",), "ekiben@example.org", port=mail_server.server_address[1], security="none", user="me", password="hunter22")
    send_mail(mail, [alert(rows="SELECT 1")], LOOK)
    (text,) = mail_server.got
    assert "Subject: [loans] 1 alert (drift): loans version 3 in production" in text.replace("\n ", " ")
    assert "SELECT 1" in text and "To: ops@example.org" in text and mail_server.auth
    assert "hunter22" not in repr(mail)
    mail_server.refuse = True
    with pytest.raises(EkibenError, match="did not take it") as caught:
        send_mail(mail, [alert()], LOOK)
    assert "hunter22" not in str(caught.value)
    mail_server.refuse = False
    with pytest.raises(EkibenError, match="did not take it"):  # it cannot do STARTTLS, so nothing is sent in the clear
        send_mail(replace_security(mail), [alert()], LOOK)
    assert len(mail_server.got) == 1


def replace_security(mail: Mail) -> Mail:
    from dataclasses import replace as with_changes

    return with_changes(mail, security="starttls")


def test_a_place_that_fails_keeps_nobody_else_from_hearing_and_hears_it_next_time(
    served: Callable[..., Served], here: None, webhook: Any, mail_server: Any
) -> None:
    url, got, _ = webhook
    monitor = (
        "webhook = HOOK\nalert_file = out/alerts.jsonl\nprometheus = prom\nemail_to = ops@example.org\nsmtp_host = 127.0.0.1\n"
        f"smtp_security = none\nsmtp_port = {mail_server.server_address[1]}\n"
    )
    project = served(monitor=monitor)
    rows = people(1500, 31)
    project.serve(changed(rows, age=rows["age"] + 20), end=time.time() - 5)
    first = running.look_at(project.root, env={})
    assert first.exit_code == 3 and [p.split(":")[0] for p in first.undelivered] == ["webhook"] and "`HOOK`" in first.undelivered[0]
    lines = [json.loads(line) for line in (project.root / "out/alerts.jsonl").read_text().splitlines()]
    assert {line["state"] for line in lines} == {"new"} and len(mail_server.got) == 1
    second = running.look_at(project.root, env={"HOOK": url})
    assert second.exit_code == 3 and second.undelivered == [] and len(got) == 1, "what it missed, it hears now"
    assert got[0]["text"].startswith("[loans]") and got[0]["alerts"][0]["advice"] and got[0]["report"].endswith(NOTEBOOK)
    assert len((project.root / "out/alerts.jsonl").read_text().splitlines()) == len(lines) and len(mail_server.got) == 1
    assert {a.state for a in second.report.alerts} == {"still"}
    project.serve(people(1500, 32), end=time.time() - 5)
    shutil.rmtree(project.root / ".ekiben/journal")
    project.serve(people(1500, 32), end=time.time() - 5)
    third = running.look_at(project.root, env={"HOOK": url})
    assert third.exit_code == 0 and {a.state for a in third.over} == {"resolved"} and len(got) == 2 and "resolved" in got[1]["text"]
    entries = [e for e in ledger.read(project.root) if e.what == "alert"]
    assert len(entries) == len(lines), "an alert that stands is accounted for once"
    folder = project.root / "reports" / "monitor"
    latest = running.read_latest(project.root)
    assert latest == MonitorReport.from_json((folder / latest.id / "monitor.json").read_bytes()) and latest.id == third.report.id
    families = {f.name: f.samples for f in text_string_to_metric_families((project.root / "prom/ekiben_monitor.prom").read_text())}
    assert families["ekiben_monitor_rows"][0].value == third.report.window.rows
    assert sum(s.value for s in families["ekiben_monitor_alerts"]) == 0
    page = (folder / "index.html").read_text()
    assert page.count("06_monitor.html") == 3 and "drift age" in page


def test_a_failed_notebook_is_a_failure_and_a_wrong_call_is_one(
    served: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    project = served()
    with pytest.raises(UsageError, match=r"no journal in \.ekiben/journal; `ekiben serve`") as caught:
        running.look_at(project.root)
    assert "\n" not in str(caught.value) and not (project.root / "reports").exists()
    (project.root / ".ekiben/journal/segments").mkdir(parents=True)
    with pytest.raises(UsageError, match="24h, 7d"):
        running.look_at(project.root, since="yesterday")
    for code, kind in ((2, UsageError), (1, StepError)):
        error = StepError("the cell raised", code=code)
        monkeypatch.setattr("ekiben.runner.scheduled.execute_scheduled", lambda *_, error=error, **__: Executed(Path("x"), None, {}, error))
        with pytest.raises(kind, match="the cell raised"):
            running.look_at(project.root)
    (project.root / "nbs/pipeline" / NOTEBOOK).unlink()
    (project.root / "settings.ini").write_text("[columns]\ntarget = y\n")
    with pytest.raises(UsageError, match="no notebook for `monitor`"):
        running.look_at(project.root)


# ---- the notebook and the pipeline


def test_no_run_executes_the_notebook_and_its_parameters_are_settings(tmp_path: Path) -> None:
    for name in ("settings.ini", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "nbs" / "pipeline", tmp_path / "nbs" / "pipeline")
    known = load_settings(tmp_path, env={}, overrides={"monitor.since": "7d", "monitor.webhook": "HOOK"})
    steps = read_steps(known)
    assert known.steps["monitor"]["since"] == "7d" and known.secrets == {"monitor.webhook": "HOOK"}
    assert [s.name for s in steps if s.scheduled] == ["monitor"]
    assert "monitor" not in [s.name for s in chosen_steps(steps, Plan(), sample=0)]


def test_the_page_says_nothing_that_is_true_of_one_table_only() -> None:
    cells = json.loads((ROOT / "nbs" / "pipeline" / NOTEBOOK).read_text())["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells)
    assert not any(word in text for word in ("credit", "default\"", "income", "adult"))
    assert all(not cell.get("outputs") for cell in cells)


def test_an_old_report_is_refused_and_a_report_survives_json() -> None:
    report = MonitorReport(made="2026-11-20T12:00:00+00:00", window=Span(since="", until=""), model=Watched(name="m", version="1"), traffic=Traffic(rows=0))
    assert MonitorReport.from_json(report.to_json()) == report
    with pytest.raises(EkibenError):
        MonitorReport.from_json(b'{"format": 1}')


@pytest.mark.slow
def test_a_new_project_is_run_served_and_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import urllib.request

    import pyarrow.csv
    from test_projects import edit_settings, ekiben, predict, run_project, serving

    from ekiben.data.credit import simulate_credit

    monkeypatch.setenv("BENTOML_HOME", str(tmp_path / "bentoml"))
    pyarrow.csv.write_csv(simulate_credit("simulated:credit?rows=4000"), tmp_path / "loans.csv")
    ekiben("new", "loans", "--data", "loans.csv", "--target", "default", cwd=tmp_path)
    root = tmp_path / "loans"
    assert "# since = 24h" in (root / "settings.ini").read_text()
    told = run_project(root, "-p", "tune.budget_s=4", "-p", "evaluate.resamples=200", "-p", "evaluate.stress_rows=300")
    assert [s["name"] for s in told["steps"]] == ["prepare", "tune", "audit", "evaluate", "package"], "no run looks at the journal"
    ekiben("monitor", cwd=root, code=2)
    rows = [
        {k: v.isoformat() if hasattr(v, "isoformat") else v for k, v in row.items()}
        for row in simulate_credit("simulated:credit?rows=1200&seed=9").to_pylist()
    ]
    with serving(root) as url:
        for first in range(0, len(rows), 200):
            part = rows[first : first + 200]
            for answer, row in zip(predict(url, part), part, strict=True):
                body = json.dumps({"id": answer["id"], "label": str(row["default"])}).encode()
                request = urllib.request.Request(f"{url}/feedback", body, {"content-type": "application/json"})
                urllib.request.urlopen(request, timeout=30).close()
        quiet = MonitorReport.from_json(ekiben("monitor", "--json", "--since", "1h", "-p", "false_alarms=0.001", cwd=root).stdout)
        assert quiet.window.rows == quiet.window.labelled == 1200 and quiet.quality.reference and quiet.quality.measures
        assert quiet.model.version == told["model"]["version"] and quiet.quality.estimated_labelled
        number = next(d.column for d in quiet.drift if d.kind == "number" and not d.column.startswith("prediction"))
        for _ in range(6):
            predict(url, [{**row, number: None} for row in rows[:200]])
        loud = MonitorReport.from_json(ekiben("monitor", "--json", "--since", "1h", cwd=root, code=3).stdout)
        wrong = ekiben("monitor", "--version", "77", cwd=root, code=2).stderr
    assert [a.kind for a in loud.alerts if a.column == number] == ["missing"]
    assert "version `77` answered no row" in wrong and wrong.count("\n") == 1
    page = (root / "reports" / "monitor" / loud.id / "06_monitor.html").read_text()
    assert "What alerts" in page and "<img" in page and "Warning" not in page
    assert not list((root / ".ekiben" / "runs").glob("monitor-*")), "what an execution leaves behind goes with it"
    edit_settings(root, ("# since = 24h", "since = 30m"))
    assert load_settings(root, env={}).steps["monitor"]["since"] == "30m"
