"""Windows of the journal are counted as they are: whose answers, when, with which truth; and what the bundle holds them against."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import bundles
import drifting
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ekiben.columns import Columns
from ekiben.errors import DataError, IntegrityError, UsageError
from ekiben.monitor.counting import count_columns
from ekiben.monitor.drift import compare_window
from ekiben.monitor.labels import label_columns
from ekiben.monitor.sequential import follow, radius, starts_for
from ekiben.monitor.streaming import Chosen, as_time, open_window, rows_showing
from ekiben.monitor.window import read_window
from ekiben.profile import Profile, profile_of
from ekiben.records import Field, Schema
from ekiben.reference import LEAST, Moments, Reference, losses_of, reference_of, residuals_of, said_of
from ekiben.serving.bundle import load_bundle, stamp_bundle, write_bundle
from ekiben.serving.journal.keeping import JournalOptions
from ekiben.serving.journal.seal import feedback_schema, prediction_schema, seal_journal, sealed_path
from ekiben.serving.journal.segments import origin_of

DAY = datetime(2026, 3, 1, tzinfo=UTC)
INPUTS = [
    Field(name="age", kind="number"),
    Field(name="job", kind="category"),
    Field(name="member", kind="flag"),
    Field(name="since", kind="date"),
    Field(name="_odd 'name'", kind="category"),
]
JOBS = ["clerk", "smith", "nurse"]


def schema(task: str = "binary") -> Schema:
    classes = {"binary": ("no", "yes"), "multiclass": ("low", "mid", "it's high"), "regression": ()}[task]
    return Schema(fields=tuple(INPUTS), task=task, target="y", classes=classes)


def draw(rows: int, seed: int = 0) -> Columns:
    rng = np.random.default_rng(seed)
    return Columns(
        {
            "age": np.where(rng.random(rows) < 0.1, np.nan, rng.integers(18, 80, rows).astype(float)),
            "job": np.array([JOBS[i] if i < 3 else None for i in rng.integers(0, 4, rows)], dtype=object),
            "member": (rng.random(rows) < 0.3).astype(float),
            "since": np.datetime64("2020-01-01", "us") + rng.integers(0, 900, rows) * np.timedelta64(86_400_000_000, "us"),
            "_odd 'name'": np.array(["o'ne"] * rows, dtype=object),
        },
        {"job": "category", "member": "flag", "since": "date", "_odd 'name'": "category"},
    )


def answer(task: str, rows: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed + 1)
    return rng.dirichlet([1, 1, 1], rows) if task == "multiclass" else rng.random(rows)


def write_day(
    journal: Path, columns: Columns, prediction: np.ndarray, task: str = "binary", *, day: int = 0, version: str = "1",
    role: str | None = None, truths: dict[int, list[tuple[float, Any]]] | None = None, name: str = "",
) -> list[str]:  # fmt: skip
    """Write a day of sealed answers, evenly over it, and their labels: for a row, hours after midnight and what was told."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    s = schema(task)
    origin = origin_of(s, [f.name for f in s.fields], {"name": "m", "version": version, "bento": ""})
    n, begin = columns.n, DAY + timedelta(days=day)
    ids = [f"{version}-{role}-{day}-{i}" for i in range(n)]
    step = 86_400_000_000 // max(n, 1)
    table: dict[str, Any] = {
        "_id": ids, "_time": [begin + timedelta(microseconds=i * step) for i in range(n)],
        "_model": ["m"] * n, "_version": [version] * n, "_bento": [""] * n,
    }  # fmt: skip
    for f in s.fields:
        own = columns[f.name]
        own = [None if v != v else bool(v) for v in own] if f.kind == "flag" else [None if v != v else v for v in own.tolist()]
        table[f"_{f.name}" if f.name.startswith("_") else f.name] = own
    if task == "regression":
        table["_value"] = prediction.tolist()
    elif task == "binary":
        table |= {"_label": [s.classes[int(p >= 0.5)] for p in prediction], "_probability": prediction.tolist()}
    else:
        table["_label"] = [s.classes[i] for i in prediction.argmax(axis=1)]
        table["_probabilities"] = [list(zip(s.classes, p, strict=True)) for p in prediction.tolist()]
    kinds = prediction_schema(origin)
    fields = [f for f in kinds if f.name != "_role"]
    arrays, names = [pa.array(table[f.name], f.type) for f in fields], [f.name for f in fields]
    if role is not None:
        arrays, names = [*arrays, pa.array([role] * n)], [*names, "_role"]
    path = sealed_path(journal, "predictions", str(begin.date()), f"v{version}-{role}-{name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(arrays, names=names).replace_schema_metadata(kinds.metadata), path)
    for hours in sorted({h for told in (truths or {}).values() for h, _ in told}):
        at = begin + timedelta(hours=hours)
        rows = [(ids[i], at, label) for i, told in (truths or {}).items() for h, label in told if h == hours]
        kinds = feedback_schema(origin)
        path = sealed_path(journal, "feedback", str(at.date()), f"v{version}-{role}-{name}-{hours}")
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table([pa.array(list(v), f.type) for v, f in zip(zip(*rows, strict=True), kinds, strict=True)], schema=kinds), path)
    return ids


def reference(task: str) -> tuple[Profile, Reference]:
    c, p = draw(1_000, 90), answer(task, 1_000, 90)
    s = schema(task)
    y = np.random.default_rng(9).random(1_000) if task == "regression" else np.random.default_rng(9).integers(0, len(s.classes), 1_000)
    profile = profile_of(c).with_predictions(p, s.classes)
    decision = p if task == "regression" else p.argmax(axis=1) if task == "multiclass" else (p >= 0.5).astype(int)
    return profile, reference_of(s, profile, c, y, p, decision)


@pytest.mark.parametrize("task", ["binary", "multiclass", "regression"])
@pytest.mark.parametrize("batch", [7, 100_000])
def test_a_window_counts_every_row_as_the_profile_would_whatever_the_batches(tmp_path: Path, task: str, batch: int) -> None:
    profile, ref = reference(task)
    s, c, p = schema(task), draw(200), answer(task, 200)
    label = (lambda i: float(i)) if task == "regression" else (lambda i: s.classes[i % len(s.classes)])
    write_day(tmp_path, c, p, task, truths={i: [(30, label(i))] for i in range(0, 200, 2)})
    window = read_window(
        tmp_path, DAY, DAY + timedelta(days=1), profile=profile, fields=s.inputs, reference=ref, classes=s.classes, batch=batch
    )
    assert window.rows == 200 and len(window.edges) == 25 and window.counts.rows.tolist()[0] in (8, 9)
    for name in c:
        assert window.counts.of(name).tolist() == profile[name].count(c[name]).tolist(), name
    by_class = p.T if p.ndim == 2 else [p]
    for column, values in zip(profile.predictions, by_class, strict=True):
        assert window.counts.of(column.name).tolist() == column.count(values).tolist()
    if task != "regression":
        assert sum(int(n.sum()) for n in window.decisions.values()) == 200
    told = np.arange(0, 200, 2)
    y = told.astype(float) if task == "regression" else told % len(s.classes)
    expected = label_columns(ref, profile, c.rows(told), y, p[told])
    assert window.labelled is not None and window.labelled.total == 100
    assert window.labelled.loss.sum(axis=0) == pytest.approx(expected.loss.sum(axis=0))
    for name in c:
        assert window.labelled.bins[name] == pytest.approx(expected.bins[name]), name
    assert window.labelled.calibration == pytest.approx(expected.calibration)


def test_shadow_answers_other_versions_and_other_days_are_left_out_and_old_files_have_no_role(tmp_path: Path) -> None:
    profile, _ = reference("binary")
    c, p = draw(50), answer("binary", 50)
    write_day(tmp_path, c, p, name="old")
    day = {"since": DAY, "until": DAY + timedelta(days=1), "profile": profile}
    assert read_window(tmp_path, **day).rows == 50  # before there were roles
    for role in ("champion", "challenger", "shadow"):
        write_day(tmp_path, c, p, version="2" if role == "champion" else "3", role=role)
    write_day(tmp_path, c, p, day=1, role="champion")
    assert read_window(tmp_path, **day).rows == 150
    assert read_window(tmp_path, **day, roles=()).rows == 200
    assert read_window(tmp_path, **day, roles=("shadow",)).rows == 50
    assert read_window(tmp_path, **day, version="3").rows == 50
    assert read_window(tmp_path, **day, version="it's none").rows == 0
    assert read_window(tmp_path, DAY, DAY + timedelta(days=2), profile=profile).rows == 200
    half = read_window(tmp_path, DAY, DAY + timedelta(hours=12), profile=profile, version="2", blocks=1)
    assert half.rows == 25


def test_the_last_truth_counts_late_ones_too_and_unknown_labels_do_not(tmp_path: Path) -> None:
    profile, ref = reference("binary")
    write_day(
        tmp_path, draw(10), np.full(10, 0.75), truths={0: [(1, "no"), (49, "yes")], 1: [(2, "perhaps")], 2: [(700, "yes")], 3: [(3, None)]}
    )
    labelled = read_window(tmp_path, DAY, DAY + timedelta(days=1), profile=profile, reference=ref, classes=("no", "yes")).labelled
    assert labelled is not None and labelled.total == 2
    assert labelled.residual[:, 0].sum() == pytest.approx(0.5) and labelled.loss[:, 0].sum() == pytest.approx(2 * 0.0625)


def test_a_journal_without_feedback_or_without_anything_is_an_empty_window(tmp_path: Path) -> None:
    profile, ref = reference("binary")
    for rows in (0, 5):
        if rows:
            write_day(tmp_path, draw(rows), answer("binary", rows))
        window = read_window(tmp_path, DAY, DAY + timedelta(days=1), profile=profile, reference=ref, classes=("no", "yes"))
        assert window.rows == rows and window.labelled is not None and window.labelled.total == 0
        assert not any(d.is_drifting for d in compare_window(profile, window))


def test_an_encrypted_journal_is_read_and_a_column_it_does_not_have_counts_as_missing(tmp_path: Path) -> None:
    from ekiben.serving.journal.journal import Journal, new_ids

    s = Schema(fields=(INPUTS[0],), task="binary", target="y", classes=("no", "yes"))
    journal = Journal(tmp_path, origin_of(s, ["age"], {"name": "m", "version": "1", "bento": ""}))
    journal.predictions(new_ids(3), [{"age": a} for a in (20, 40, None)], [{"label": "yes", "probability": 0.9}] * 3)
    journal.close()
    seal_journal(tmp_path, JournalOptions(encryption=True))
    profile, _ = reference("binary")
    now = datetime.now(UTC)
    window = read_window(tmp_path, now - timedelta(hours=1), now + timedelta(hours=1), profile=profile)
    assert window.rows == 3 and window.counts.missing("age") == 1 and window.counts.missing("job") == 3


def test_since_when_and_which_rows_is_said(tmp_path: Path) -> None:
    profile, _ = reference("binary")
    c, p = draw(600, 5), answer("binary", 600, 5)
    odd = np.array(["o'ne"] * 300 + ["tw'o"] * 300, dtype=object)
    changed = c.with_columns(job=("category", np.where(np.arange(600) >= 400, "smith", c["job"])), **{"_odd 'name'": ("category", odd)})
    ids = write_day(tmp_path, changed, p)
    window = read_window(tmp_path, DAY, DAY + timedelta(days=1), profile=profile, blocks=24)
    found = {d.column: d for d in compare_window(profile, window)}
    assert found["job"].is_drifting and found["job"].since.startswith("2026-03-01T16:00")
    assert found["_odd 'name'"].is_drifting and found["_odd 'name'"].since.startswith("2026-03-01T12:00")
    connection, chosen = open_window(tmp_path), Chosen(window.since, window.until)
    count, some = rows_showing(connection, found["job"].where, chosen, limit=3)
    assert count > 200 and some == ids[:-4:-1]
    count, some = rows_showing(connection, found["_odd 'name'"].where, chosen)
    assert count == 300 and set(some) <= set(ids[300:])
    for d in found.values():
        rows_showing(connection, d.where, chosen, predictions=["prediction"])  # every condition is SQL that the journal takes


def test_a_join_larger_than_its_memory_goes_to_disk_beside_the_journal_and_leaves_nothing(tmp_path: Path) -> None:
    rows = 30_000
    write_day(tmp_path, draw(rows), answer("binary", rows), truths={i: [(1, "yes")] for i in range(rows)})
    (tmp_path / ".spill-999999999").mkdir()  # of a process that was killed
    connection = open_window(tmp_path, memory="16MB")
    assert not list(tmp_path.glob(".spill-999999999"))
    profile, ref = reference("binary")
    window = read_window(connection, DAY, DAY + timedelta(days=1), profile=profile, reference=ref, classes=("no", "yes"))
    assert window.labelled is not None and window.labelled.total == window.rows == rows
    connection.close()
    assert not [p for p in tmp_path.rglob("*") if "spill" in str(p) and p.is_file()]


@pytest.mark.parametrize("when", ["yesterday", "2026-13-01", ""])
def test_what_is_no_time_is_said_in_one_line(when: str) -> None:
    with pytest.raises(UsageError, match="is no time; write it as 2026-03-01"):
        as_time(when)


def test_a_window_that_ends_before_it_begins_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="before it begins"):
        read_window(tmp_path, "2026-03-02", "2026-03-01", profile=reference("binary")[0])


# ---- the reference


@pytest.mark.parametrize("task", ["binary", "multiclass", "regression"])
def test_a_reference_is_read_back_and_its_sums_are_those_of_its_rows(task: str) -> None:
    _, ref = reference(task)
    assert Reference.from_json(ref.to_json()) == ref
    assert ref.task == task and ref.rows == 1_000
    for sums in ref.residuals:
        assert sum(sums.rows) == 1_000
        assert sum(sums.sums) == pytest.approx(1_000 * ref.residual.mean, abs=1e-3)
    assert sum(ref.calibration.rows) == 1_000
    seen = np.average(ref.calibration.seen, weights=ref.calibration.rows) - np.average(ref.calibration.said, weights=ref.calibration.rows)
    if task != "regression":  # there, residuals far out are cut off
        assert seen == pytest.approx(ref.residual.mean, abs=1e-5)
    assert np.average(ref.calibration.loss, weights=ref.calibration.rows) == pytest.approx(ref.loss.mean, abs=1e-5)


def test_a_column_that_had_moved_when_the_model_was_evaluated_is_named_as_such(tmp_path: Path) -> None:
    profile, ref = reference("binary")
    ref = msgspec.structs.replace(ref, moved=("age",))
    assert "`age` already differ" in ref._repr_markdown_() and Reference.from_json(ref.to_json()) == ref
    c = draw(2_000, 3).with_columns(age=np.full(2_000, 90.0), job=("category", np.full(2_000, "smith", dtype=object)))
    found = {d.column: d for d in compare_window(profile, count_columns(profile, c), reference=ref) if d.is_drifting}
    assert found["age"].says.endswith("it had moved in the held-out rows, too") and "held-out" not in found["job"].says


def test_no_part_of_fewer_rows_than_twenty_is_told() -> None:
    c = drifting.draw(2_000, 1)
    y, said = drifting.happen(c, 1), drifting.say(c)
    groups = {"shop": np.array([str(v) for v in c["shop"]], dtype=object)}
    ref = reference_of(drifting.schema(), profile_of(c), c, y, said, said >= 0.5, groups=groups)
    for sums in ref.residuals:
        kept = [n for i, n in enumerate(sums.rows) if n and i != len(sums.rows) - 2]
        assert min(kept) >= LEAST
    assert ref.groups and min(g.loss.rows for g in ref.groups) >= LEAST
    assert min(ref.calibration.rows) >= LEAST


def test_a_reference_of_a_hundred_wide_columns_stays_below_two_hundred_kilobytes() -> None:
    rng = np.random.default_rng(0)
    n = 20_000
    levels = np.array([f"level {i}" for i in range(100)], dtype=object)
    own = {f"n{i}": rng.normal(size=n) for i in range(50)} | {f"c{i}": levels[rng.integers(0, 100, n)] for i in range(50)}
    c = Columns(own, {name: "category" for name in own if name[0] == "c"})
    said = rng.random(n)
    ref = reference_of(drifting.schema(), profile_of(c), c, (rng.random(n) < said).astype(int), said, said >= 0.5)
    assert len(ref.to_json()) < 200_000


def test_a_reference_needs_one_of_each_for_every_row() -> None:
    c = drifting.draw(50, 1)
    with pytest.raises(DataError, match="50 rows, 49 truths"):
        reference_of(drifting.schema(), profile_of(c), c, np.zeros(49, dtype=int), np.zeros(50), np.zeros(50))
    with pytest.raises(DataError, match="no column `ag` in the reference"):
        reference("binary")[1]["ag"]


def test_losses_are_briers_and_squares() -> None:
    y = np.array([0, 2])
    p = np.array([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]])
    assert losses_of(y, p) == pytest.approx(((p - np.eye(3)[y]) ** 2).sum(axis=1))
    assert residuals_of(y, p).tolist() == pytest.approx([0.5, 0.3]) and said_of(p).tolist() == [0.5, 0.7]
    assert losses_of(np.array([3.0]), np.array([1.0])).tolist() == [4.0]


def test_a_bundle_carries_its_reference_and_answers_alike_with_or_without(tmp_path: Path) -> None:
    project = bundles.make_project(tmp_path, rows=400, rounds=5)
    old = project.bundle
    assert old.reference is None
    c = project.columns
    y, p = bundles.make_target(c, "binary"), project.predict(c)
    ref = reference_of(project.schema, profile_of(c, project.schema.inputs), c, y, p, project.policy.decide(p))
    parts = {
        "name": "census", "schema": project.schema, "preprocessor": project.preprocessor, "model": project.model,
        "policy": project.policy, "code": {n: raw.decode() for n, raw in old.part("code").items()}, "examples": old.examples,
        "lineage": old.info.lineage, "limits": old.info.limits,
    }  # fmt: skip
    new = write_bundle(tmp_path / "new", reference=ref.to_json(), **parts)
    assert new.reference == ref and load_bundle(tmp_path / "new").reference == ref
    assert new.digest == old.digest
    assert stamp_bundle(tmp_path / "new", tmp_path / "stamped", version="7").reference == ref
    bad = write_bundle(tmp_path / "bad", reference=b'{"rows": 1}', **parts)
    with pytest.raises(IntegrityError, match="not a stored Reference"):
        _ = bad.reference


# ---- the sequential test


def stream(rows: int, blocks: int, seed: int, worse_from: int = 10**6) -> tuple[Moments, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)

    def losses(shape: tuple[int, ...], factor: Any = 1.0) -> np.ndarray:
        p = rng.beta(1, 4, shape)
        return (p - (rng.random(shape) < np.clip(factor * p, 0, 1))) ** 2

    known = Moments.of(losses((4_000,)))
    found = losses((blocks, rows), np.where(np.arange(blocks) >= worse_from, 2.0, 1.0)[:, None])
    return known, np.full(blocks, rows), found.sum(axis=1), (found**2).sum(axis=1)


def test_a_year_of_daily_looks_raises_no_false_alarm() -> None:
    alarms = sum(follow(*stream(50, 365, seed), alpha=0.05).has_alarmed for seed in range(40))
    assert alarms <= 2  # 5 % of 40 at most, on average


def test_a_model_that_became_worse_is_noticed_within_days_and_dated() -> None:
    for seed in range(10):
        found = follow(*stream(200, 40, seed, worse_from=20))
        assert found.has_alarmed and 20 <= found.alarmed_at <= 27 and 17 <= found.since <= 22


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 59), st.integers(0, 5))
def test_what_was_said_once_stays_said_when_more_blocks_come(first: int, seed: int) -> None:
    known, rows, sums, squares = stream(60, 60, seed, worse_from=30)
    part, whole = follow(known, rows[:first], sums[:first], squares[:first]), follow(known, rows, sums, squares)
    assert whole.path[:first] == part.path
    if part.has_alarmed:
        assert (whole.alarmed_at, whole.since) == (part.alarmed_at, part.since)


def test_nothing_is_said_of_few_rows_or_of_none() -> None:
    known = Moments(rows=1_000, mean=0.1, std=0.2)
    for rows, blocks in ((1, 99), (0, 5)):
        found = follow(known, np.full(blocks, rows), np.full(blocks, 1.0 * rows), np.full(blocks, 1.0 * rows))
        assert not found.has_alarmed and found.rows == rows * blocks and msgspec.json.encode(found)
    assert not follow(known, np.zeros(0), np.zeros(0), np.zeros(0)).has_alarmed


def test_a_sequence_is_wider_than_one_look_and_narrows_with_rows() -> None:
    rows = np.array([100.0, 1_000, 10_000, 1e6])
    widths = radius(rows, np.ones(4), 0.05)
    assert (widths > 1.96 / rows**0.5).all() and (np.diff(widths) < 0).all()
    assert (starts_for(5_000) < 5_000).all() and starts_for(5_000)[0] == 0 and starts_for(5_000)[-1] == 4_999
