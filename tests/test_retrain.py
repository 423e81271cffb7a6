"""`ekiben retrain`: which rows, when, by what candidate, and what is decided; the champion stays until somebody is shown to be better."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from msgspec.structs import replace
from tiny import make_project

from ekiben.cli import main
from ekiben.data.credit import simulate_credit
from ekiben.erasure import forget
from ekiben.errors import DataError, UsageError
from ekiben.files import write_whole
from ekiben.prepare.clean import RawRows, clean_rows
from ekiben.records import Field, Judgement, Schema
from ekiben.retrain import apply as applying
from ekiben.retrain.candidates import ALL, CONTINUED, RECENT, plan_candidates, try_candidates
from ekiben.retrain.champion import BEFORE_ALL, Champion, write_starts
from ekiben.retrain.decide import decide, find_broken
from ekiben.retrain.due import began, is_due, latest_look, moment
from ekiben.retrain.records import PARTS, Candidate, Retrained, Table, read_decisions, retrain_folder
from ekiben.retrain.page import write_report
from ekiben.retrain.report import to_markdown
from ekiben.retrain.rows import Stage, count_told, page_fields
from ekiben.retrain.table import make_table
from ekiben.retrain.unfinished import carry_on, hold, keep_tables
from ekiben.runner.jobs import Runner
from ekiben.runner.plan import Plan
from ekiben.runner.screen import Screen
from ekiben.runs import Layout, Run, StepResult
from ekiben.sections import ColumnsSection, DataSection, RetrainSection
from ekiben.serving.journal.journal import Journal, new_ids
from ekiben.serving.journal.segments import origin_of
from ekiben.store import Store

EKIBEN = [sys.executable, "-c", "import sys; from ekiben.cli import main; sys.exit(main())"]

FIELDS = (
    Field(name="id", kind="category", unique=True),
    Field(name="on", kind="date"),
    Field(name="age", kind="number"),
    Field(name="member", kind="flag"),
    Field(name="job", kind="category"),
    Field(name="mail", kind="text", nullable=False),
    Field(name="sex", kind="category"),
    Field(name="paid", kind="category"),
)
COLUMNS: dict[str, Any] = {"target": "paid", "time": "on", "id": ("id",), "sensitive": ("sex",), "private": ("mail",)}
INPUTS = ("age", "member", "job")


def project(root: Path, **columns: Any) -> Any:
    """Write a source of 120 rows, and return settings that name it."""
    (root / "old.csv").write_text(
        "id,on,age,member,job,mail,sex,paid\n"
        + "".join(f"o{i},2026-01-{1 + i % 28:02d},{20 + i % 50},{'yes' if i % 2 else 'no'},smith,o{i}@x.org,F,{'yes' if i % 3 else 'no'}\n" for i in range(120))
    )
    return SimpleNamespace(
        root=root, data=DataSection(source="old.csv"), retrain=RetrainSection(), columns=ColumnsSection(**{**COLUMNS, **columns}), steps={}
    )


def journal(root: Path, names: list[str], *, told: Callable[[int], str | None] = lambda i: "yes" if i % 3 else "no", **model: str) -> list[str]:
    """Journal one prediction for each name, with its truth where `told` gives one; return the predictions' ids."""
    fields = tuple(f for f in FIELDS if f.name in INPUTS)
    keys = (Field(name="id", kind="category", role="id", is_input=False), Field(name="mail", kind="text", role="private", is_input=False))
    schema = Schema(fields=fields + keys, task="binary", target="paid", classes=("no", "yes"))
    kept = Journal(root / ".ekiben/journal", origin_of(schema, INPUTS, {"name": "loans", "version": "1", "bento": "", **model}))
    ids = new_ids(len(names))
    rows = [{"age": 30 + i % 9, "member": i % 2 == 0, "job": "clerk", "id": name, "mail": f"{name}@x.org"} for i, name in enumerate(names)]
    kept.predictions(ids, rows, [{"label": "yes", "probability": 0.9}] * len(names))
    for i, id_ in enumerate(ids):
        if (truth := told(i)) is not None:
            kept.feedback(id_, truth)
    kept.close()
    return ids


def table_of(root: Path, settings: Any, id: str = "r1", **options: Any) -> Table:
    return make_table(root, settings, FIELDS, id=id, journal=root / ".ekiben/journal", **options)


def rows_of(root: Path, id: str = "r1") -> list[dict[str, Any]]:
    return [row for part in sorted((retrain_folder(root, id) / "rows").glob("*.parquet")) for row in pq.read_table(part).to_pylist()]


# Which rows


def test_journalled_rows_have_the_types_of_the_schema_page_and_the_time_of_their_prediction(tmp_path: Path) -> None:
    settings = project(tmp_path)
    journal(tmp_path, [f"j{i}" for i in range(150)])
    table_of(tmp_path, settings)
    row = next(r for r in rows_of(tmp_path) if r["id"] == "j3")
    assert (row["age"], row["member"], row["job"], row["paid"], row["_from"]) == (33.0, False, "clerk", "no", "journal")
    assert abs(row["on"].replace(tzinfo=UTC) - datetime.now(UTC)) < timedelta(minutes=5) and row["on"].tzinfo is None


def test_a_hash_of_a_private_value_never_reaches_a_table(tmp_path: Path) -> None:
    settings = project(tmp_path)
    ids = journal(tmp_path, [f"j{i}" for i in range(150)])
    table_of(tmp_path, settings)
    mine = {r["id"]: r["mail"] for r in rows_of(tmp_path) if r["_from"] == "journal"}
    assert set(mine.values()) == set(ids), "the page insists on a value, and the prediction's own id says nothing of anybody"


def test_shadow_answers_and_rows_without_a_truth_teach_nothing(tmp_path: Path) -> None:
    settings = project(tmp_path)
    journal(tmp_path, [f"j{i}" for i in range(150)], told=lambda i: "yes" if i < 140 else None)
    journal(tmp_path, [f"s{i}" for i in range(30)], role="shadow")
    told = {r["id"] for r in rows_of(tmp_path, table_of(tmp_path, settings).id) if r["_from"] == "journal"}
    if "_role" in _columns(tmp_path):
        assert told == {f"j{i}" for i in range(140)}
    else:
        assert {f"j{i}" for i in range(140)} <= told
    assert count_told(tmp_path / ".ekiben/journal") == len(told)


def _columns(root: Path) -> set[str]:
    from ekiben.serving.journal.sealed import open_journal

    with open_journal(root / ".ekiben/journal") as db:
        return {row[0] for row in db.execute("DESCRIBE journal").fetchall()}


def test_an_erased_row_is_not_in_the_next_table(tmp_path: Path) -> None:
    settings = project(tmp_path)
    journal(tmp_path, [f"j{i}" for i in range(150)])
    forget(tmp_path, "id=j7")
    table_of(tmp_path, settings)
    assert "j7" not in {r["id"] for r in rows_of(tmp_path)}


def test_the_same_row_from_two_places_is_taken_once_and_said(tmp_path: Path) -> None:
    settings = project(tmp_path)
    journal(tmp_path, ["o5", *(f"j{i}" for i in range(150)), "j3"])
    line = (tmp_path / "old.csv").read_text().splitlines()
    (tmp_path / "new.csv").write_text("\n".join([line[0], "o9,2026-02-01,99,no,clerk,a@x.org,M,yes", "j4,2026-02-01,98,no,clerk,b@x.org,M,yes"]) + "\n")
    table = table_of(tmp_path, settings, data=["new.csv"])
    found = {r["id"]: r for r in rows_of(tmp_path)}
    assert len(found) == sum(table.rows.values()) == 120 + 150
    assert found["o9"]["age"] == 99.0 and found["j4"]["age"] == 98.0, "a new file is believed first"
    assert found["o5"]["_from"] == "source", "the source before the journal"
    assert any(note.startswith("4 rows came twice") for note in table.notes), table.notes


def test_identifiers_of_persons_rather_than_of_rows_do_not_make_copies(tmp_path: Path) -> None:
    settings = project(tmp_path)
    fields = tuple(replace(f, unique=False) for f in FIELDS)
    journal(tmp_path, [f"c{i % 10}" for i in range(150)])
    table = make_table(tmp_path, settings, fields, id="r1", journal=tmp_path / ".ekiben/journal")
    assert table.origins == {"source": 120, "journal": 150}, "ten customers, many rows"


def test_the_restricted_table_gives_the_sensitive_columns_and_without_it_one_line_says_so(tmp_path: Path) -> None:
    settings = project(tmp_path)
    journal(tmp_path, [f"j{i}" for i in range(150)])
    bare = table_of(tmp_path, settings)
    said = [note for note in bare.notes if "[monitor] groups = FILE" in note]
    assert len(said) == 1 and "`sex` (45 of 45)" in said[0]
    (tmp_path / "people.csv").write_text("id,sex\n" + "".join(f"j{i},M\n" for i in range(150)))
    table = table_of(tmp_path, settings, "r2", groups=tmp_path / "people.csv", who="id")
    assert {r["sex"] for r in rows_of(tmp_path, "r2") if r["_from"] == "journal"} == {"M"}
    assert not any("[monitor]" in note for note in table.notes)


def test_a_private_identifier_is_joined_by_its_hash(tmp_path: Path) -> None:
    settings = project(tmp_path)
    journal(tmp_path, [f"j{i}" for i in range(150)])
    (tmp_path / "people.csv").write_text("mail,sex\n" + "".join(f"j{i}@x.org,{'M' if i % 2 else 'F'}\n" for i in range(150)))
    table_of(tmp_path, settings, groups=tmp_path / "people.csv", who="mail")
    sex = {r["id"]: r["sex"] for r in rows_of(tmp_path) if r["_from"] == "journal"}
    assert sex["j3"] == "M" and sex["j4"] == "F"


def test_a_time_column_of_numbers_is_numbered_on_for_rows_that_the_journal_keeps_no_time_of(tmp_path: Path) -> None:
    settings = project(tmp_path)
    fields = tuple(replace(f, kind="number") if f.name == "on" else f for f in FIELDS)
    text = (tmp_path / "old.csv").read_text().splitlines()
    (tmp_path / "old.csv").write_text("\n".join([text[0], *(line.replace(line.split(",")[1], str(n / 1000)) for n, line in enumerate(text[1:]))]) + "\n")
    journal(tmp_path, [f"j{i}" for i in range(150)])
    make_table(tmp_path, settings, fields, id="r1", journal=tmp_path / ".ekiben/journal")
    held = pq.read_table(retrain_folder(tmp_path, "r1") / "rows/5-held.parquet").to_pylist()
    assert all(r["_from"] == "journal" for r in held) and min(r["on"] for r in held) > 0.119
    assert len({r["on"] for r in held}) == len(held)


def test_unreadable_cells_of_a_new_file_are_left_out_and_counted(tmp_path: Path) -> None:
    settings = project(tmp_path)
    lines = (tmp_path / "old.csv").read_text().splitlines()
    new = [f"n{i},2026-03-0{1 + i % 9},{'forty' if i < 5 else 40},no,clerk,n{i}@x.org,M,{'yes' if i % 2 else 'no'}" for i in range(150)]
    (tmp_path / "new.csv").write_text("\n".join([lines[0], *new]) + "\n")
    table = make_table(tmp_path, settings, FIELDS, id="r1", data=["new.csv"])
    assert table.origins == {"source": 120, "data": 145}
    assert any("5 of 150 rows of the data hold what a column cannot take (`age` 5)" in note for note in table.notes), table.notes


def test_a_new_file_without_a_column_of_the_page_is_an_error_in_one_line(tmp_path: Path) -> None:
    settings = project(tmp_path)
    (tmp_path / "new.csv").write_text("id,on,paid\nn1,2026-03-01,yes\n")
    with pytest.raises(DataError, match="there is no column `age`"):
        make_table(tmp_path, settings, FIELDS, id="r1", data=["new.csv"])
    assert not (retrain_folder(tmp_path, "r1") / "table.json").exists()


def test_what_the_champion_has_learnt_from_is_never_held_out(tmp_path: Path) -> None:
    settings = project(tmp_path)
    journal(tmp_path, [f"a{i}" for i in range(150)])
    between = datetime.now(UTC).isoformat()
    time.sleep(0.01)
    journal(tmp_path, [f"b{i}" for i in range(150)])
    table = table_of(tmp_path, settings, told_after=between, since="2026-01-20")
    parts = {p: {r["id"][0] for r in pq.read_table(retrain_folder(tmp_path, "r1") / "rows" / f"{p}.parquet").to_pylist()} for p in table.rows}
    assert parts["5-held"] == parts["4-validation"] == parts["3-fresh"] == {"b"}
    assert parts["2-recent"] == {"a", "o"} and parts["0-old"] == {"o"}
    with pytest.raises(DataError, match="0 labelled rows are new"):
        table_of(tmp_path, settings, "r2", told_after=datetime.now(UTC).isoformat())


@given(n=st.integers(70, 400), share=st.floats(0.1, 0.6), old=st.integers(1, 200))
@examples(max_examples=15, deadline=None)
def test_parts_are_disjoint_and_whole_and_the_held_out_rows_are_the_latest(n: int, share: float, old: int) -> None:
    import tempfile

    from ekiben.retrain.parts import arrange, gather, workshop
    from ekiben.retrain.rows import OWN

    with tempfile.TemporaryDirectory() as place:
        fields = (Field(name="id", kind="category", unique=True), Field(name="paid", kind="category"))
        random = np.random.default_rng(n)
        at = random.permutation(n + old).astype(float)
        origin = ["source" if a < old else "journal" for a in at]
        rows: dict[str, Any] = {"id": [f"r{a:.0f}" for a in at], "paid": ["yes"] * len(at), "_id": [f"{a:.0f}" for a in at], "_from": origin}
        rows |= {"_at": at.tolist(), "_time": at.astype(int).tolist(), "_told": [1] * len(at), "_who": [None] * len(at)}
        types = {"id": pa.string(), "paid": pa.string(), **OWN}
        path = Path(place) / "rows.parquet"
        pq.write_table(pa.table({name: pa.array(rows[name], type) for name, type in types.items()}), path)
        with workshop(Path(place) / "work") as db:
            gather(db, [path], fields, ColumnsSection(target="paid", id=("id",)), None)
            try:
                counts = arrange(db, since_us=None, told_after_us=0, seen_until=None, held_out=share, time_is_number=False)
            except DataError:
                assert min(round(n * share), round((n - round(n * share)) * share)) < 20 or n * (1 - share) ** 2 < 21
                return
            found = db.execute("SELECT _part, min(_at), max(_at), count(*) FROM parted WHERE _from = 'journal' GROUP BY 1 ORDER BY 1").fetchall()
        assert sum(counts.values()) == n + old and set(counts) <= set(PARTS)
        assert all(before[2] < after[1] for before, after in pairwise(found)), "every part is later than the one before"


def test_a_table_is_made_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = project(tmp_path)
    journal(tmp_path, [f"j{i}" for i in range(150)])

    def die(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ekiben.retrain.table.write_parts", die)
    with pytest.raises(OSError, match="No space left"):
        table_of(tmp_path, settings)
    assert not (retrain_folder(tmp_path, "r1") / "table.json").exists() and not (retrain_folder(tmp_path, "r1") / ".building").exists()
    assert carry_on(tmp_path, {}, "1") is None and not retrain_folder(tmp_path, "r1").exists()


# Erasure


def test_forget_reaches_the_tables_of_retrainings_and_what_was_prepared_of_them(tmp_path: Path) -> None:
    import pandera.pandas as pandera

    settings = project(tmp_path)
    ids = journal(tmp_path, [f"j{i}" for i in range(150)])
    table_of(tmp_path, settings)
    rows = pa.concat_tables(pq.read_table(p) for p in sorted((retrain_folder(tmp_path, "r1") / "rows").glob("*.parquet")))
    dtypes = {"number": float, "flag": "boolean", "date": "datetime64[us]"}
    page = pandera.DataFrameSchema({
        f.name: pandera.Column(dtypes.get(f.kind, str), nullable=True, unique=f.unique, metadata={"kind": f.kind}) for f in FIELDS
    })  # fmt: skip
    clean = clean_rows(RawRows(rows, None, "", (), True, ""), page, settings, key=b"k")
    assert "_id" not in {n for w in clean.warnings for n in w.columns}, "its own columns are not news"
    layout = Layout(tmp_path)
    result = StepResult(step="prepare", run_id="r", started="2026-11-20", status="done", outputs={"train": Store(layout.objects).put(clean.columns)})
    write_whole(layout.result("r", "prepare"), result.to_json())

    erased = forget(tmp_path, "mail=j9@x.org")
    assert erased.predictions == 1
    first, second = (name for table in erased.tables for name in table.names)
    assert first == "prepare.train" and second.startswith("retrain.r1."), "which part a row is in goes by its id, which is random"
    assert "j9" not in {r["id"] for r in rows_of(tmp_path)} and len(rows_of(tmp_path)) == 120 + 149
    left = Store(layout.objects).get(StepResult.from_json(layout.result("r", "prepare").read_bytes()).outputs["train"])
    assert ids[9] not in set(left["_id"]) and left.n == 120 + 149


def test_rows_that_were_erased_meanwhile_start_a_retraining_anew(tmp_path: Path) -> None:
    settings = project(tmp_path)
    journal(tmp_path, [f"j{i}" for i in range(150)])
    made = table_of(tmp_path, settings, champion="1", request={"mode": "auto"})
    assert carry_on(tmp_path, {"mode": "auto"}, "1") == made
    forget(tmp_path, "id=j9")
    assert carry_on(tmp_path, {"mode": "auto"}, "1") is None


def test_forget_waits_for_no_retraining_but_says_that_one_is_at_work(tmp_path: Path) -> None:
    journal(tmp_path, ["j1"])
    (retrain_folder(tmp_path, "r9") / ".building").mkdir(parents=True)
    with hold(tmp_path), pytest.raises(UsageError, match="is at work and reads rows just now"):
        forget(tmp_path, "id=j1")
    assert forget(tmp_path, "id=j1").predictions == 1
    assert not (retrain_folder(tmp_path, "r9") / ".building").exists(), "what a killed one had gathered may hold anybody's rows"


# When


@given(
    days=st.floats(0, 100), rows=st.integers(0, 20_000), kinds=st.lists(st.sampled_from(["drift", "concept", "quality", "traffic"]), max_size=3),
    when=st.lists(st.sampled_from(["schedule", "drift", "quality", "rows"]), unique=True), looked=st.booleans(),
)  # fmt: skip
def test_it_is_due_exactly_when_a_policy_wants_it_and_there_are_rows(days: float, rows: int, kinds: list[str], when: list[str], looked: bool) -> None:
    section = RetrainSection(when=tuple(when), every_days=30, every_rows=5000, min_rows=200)
    now = datetime(2026, 11, 27, tzinfo=UTC)
    last = now - timedelta(days=days)
    look = {"made": (last + timedelta(seconds=1)).isoformat(), "alerts": [{"kind": k, "since": now.isoformat()} for k in kinds]} if looked else {}
    wants = {
        "schedule": days >= 30,
        "rows": rows >= 5000,
        "drift": looked and bool({"drift", "concept"} & {*kinds}),
        "quality": looked and bool({"quality", "concept"} & {*kinds}),
    }
    found = is_due(section, now=now, last=last, look=look, new_rows=rows)
    assert found.is_due == (rows >= 200 and any(wants[policy] for policy in when))
    assert len(found.says) >= len(when)


def test_a_look_that_cannot_be_read_is_no_look(tmp_path: Path) -> None:
    for raw in (b"", b"[]", b'{"made": 3}', b'{"made": "yesterday"}', b"\xff"):
        write_whole(tmp_path / "reports/monitor/latest.json", raw)
        assert latest_look(tmp_path) == {}
    assert began({"made": "2026-11-27", "alerts": [{"kind": "drift", "since": "?"}, {"kind": "concept", "since": None}]}) == ""


def test_recent_begins_with_the_earliest_alert_that_still_holds(tmp_path: Path) -> None:
    alerts = [
        {"kind": "drift", "since": "2026-11-20T00:00:00+00:00", "state": "resolved"},
        {"kind": "traffic", "since": "2026-11-01T00:00:00+00:00"},
        {"kind": "drift", "since": "2026-11-24T00:00:00+00:00"},
        {"kind": "concept", "since": "2026-11-23T12:00:00"},
    ]
    assert began({"made": "2026-11-27", "alerts": alerts}) == "2026-11-23T12:00:00"
    assert began({"made": "2026-11-27", "alerts": alerts}, after=moment("2026-11-28")) == ""


# Candidates


def facts(**rows: int) -> Table:
    return Table(id="r1", made="", rows={name.replace("_", "-"): n for name, n in rows.items()})


PLENTY = {"0-old": 900, "3-fresh": 400, "4-validation": 150, "5-held": 200}
NOTEBOOKS = {"prepare": {"like": ""}, "tune": {"continue_from": "", "starts_from": "", "trials": 0, "budget_s": 60.0}}


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({"mode": "auto", "rows": "auto"}, [ALL.name, RECENT.name, CONTINUED.name]),
        ({"mode": "full", "rows": "all"}, [ALL.name]),
        ({"mode": "full", "rows": "recent"}, [RECENT.name]),
        ({"mode": "incremental", "rows": "auto"}, [CONTINUED.name]),
        ({"mode": "auto", "rows": "auto", "has_trees": False}, [ALL.name, RECENT.name]),
        ({"mode": "auto", "rows": "auto", "notebooks": {"tune": {}}}, [ALL.name, RECENT.name]),
        ({"mode": "auto", "rows": "auto", "table": Table(id="r", made="", rows={"3-fresh": 400})}, [ALL.name, CONTINUED.name]),
        ({"mode": "auto", "rows": "auto", "table": Table(id="r", made="", rows={"0-old": 400, "3-fresh": 40})}, [ALL.name]),
    ],
)
def test_a_candidate_that_cannot_be_trained_is_left_out_with_a_reason(options: dict[str, Any], left: list[str]) -> None:
    given_ = {"table": Table(id="r", made="", rows=PLENTY), "has_trees": True, "notebooks": NOTEBOOKS, **options}
    planned = plan_candidates(given_.pop("table"), **given_)
    assert [c.name for c in planned if not c.why_not] == left


def test_a_candidate_whose_run_fails_is_out_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = SimpleNamespace(
        root=tmp_path, steps={"tune": {"trials": 0, "estimators": ["lightgbm"]}}, retrain=RetrainSection(), pipeline=SimpleNamespace(package="p", seed=0)
    )
    planned = plan_candidates(Table(id="r1", made="", rows=PLENTY), mode="auto", rows="auto", has_trees=True, notebooks=NOTEBOOKS)
    y = np.arange(300) % 2
    guess = {"all rows": np.linspace(0, 1, 300), "the champion continued": y + 0.0}

    def run(candidate: Candidate, overrides: dict[str, str]) -> Run:
        assert overrides["data.test"].endswith("4-validation.parquet"), "the held-out rows are nobody's business before the verdict"
        failed = candidate.name == "recent rows"
        return Run(run_id=candidate.name, status="failed" if failed else "done", started="", error="too few moments" if failed else "")

    monkeypatch.setattr("ekiben.retrain.candidates.predict_validation", lambda layout, run, package: ("binary", y, guess[run.run_id]))
    found = try_candidates(tmp_path, settings, Table(id="r1", made="", rows=PLENTY), planned, run, starts=False)
    assert {c.name: (c.chosen, c.why_not) for c in found} == {
        "all rows": (False, ""), "recent rows": (False, "too few moments"), "the champion continued": (True, "")
    }  # fmt: skip

    with pytest.raises(DataError, match="no candidate could be trained: recent rows: too few moments"):
        try_candidates(tmp_path, settings, Table(id="r1", made="", rows=PLENTY), [planned[1], replace(planned[1], name="recent rows")], run, starts=False)


def test_a_search_starts_from_the_champions_own_or_from_the_last_one_that_a_person_ran(tmp_path: Path) -> None:
    layout, store = Layout(tmp_path), Store(Layout(tmp_path).objects)
    trial = {"number": 0, "estimator": "lightgbm", "value": 0.7, "state": "complete", "seconds": 1.0}
    for run_id, params in (("continued", {"way": "leaves refitted"}), ("searched", {"num_leaves": 9})):
        result = StepResult(step="tune", run_id=run_id, started="", status="done", trials=store.put([{**trial, "params": params}]))
        write_whole(layout.result(run_id, "tune"), result.to_json())
        write_whole(layout.report(run_id) / "run.json", Run(run_id=run_id, status="done", started="").to_json())
    champion = Champion("2", "", "continued", BEFORE_ALL)
    assert not write_starts(layout, champion, tmp_path / "starts.json"), "a continued model had no search"
    write_whole(layout.last("tune"), layout.result("searched", "tune").read_bytes())
    assert write_starts(layout, champion, tmp_path / "starts.json")
    assert json.loads((tmp_path / "starts.json").read_text())["params"] == {"lightgbm": [{"num_leaves": 9}]}


# The runs stand apart


def execute(root: Path, **plan: Any) -> Run:
    return Runner(root, Plan(**plan), Screen(quiet=True)).execute()


@pytest.mark.slow
def test_a_run_apart_leaves_a_persons_results_alone_and_they_stand_however_many_came_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_project(tmp_path / "tiny")
    mine = execute(root)
    last = {path.name: path.read_bytes() for path in (root / ".ekiben/last").iterdir()}
    monkeypatch.setattr("ekiben.cache.lookup.results_of.__defaults__", (1,))
    apart = execute(root, overrides={"tune.factor": "7"}, until="tune", apart=True)
    assert apart.status == "done" and [s.name for s in apart.steps] == ["prepare", "tune"], "nothing after the step that was named"
    assert {path.name: path.read_bytes() for path in (root / ".ekiben/last").iterdir()} == last
    assert all(s.status == "cached" and s.made_in == mine.run_id for s in execute(root).steps)
    with pytest.raises(UsageError, match="no step `tun`"):
        execute(root, until="tun")


# The decision


BETTER = {"metric": "auc", "champion": 0.7, "newcomer": 0.75, "gain": 0.05, "rows": 500}


@given(low=st.floats(-1, 1), width=st.floats(0, 1))
def test_nobody_is_promoted_without_proof_nor_rejected_without_it(low: float, width: float) -> None:
    decision, reasons = decide({**BETTER, "low": low, "high": low + width}, "4", "3")
    assert decision == ("promoted" if low > 0 else "rejected" if low + width < 0 else "shadow")
    assert len(reasons) == 1 and "500 latest rows" in reasons[0]


def test_a_feed_is_broken_beyond_the_declared_share_only() -> None:
    assert not find_broken(20, 100, 0.2) and not find_broken(0, 0, 0.0)
    assert "21 of 100 new rows (21%" in find_broken(21, 100, 0.2)


def test_a_decision_that_was_not_carried_out_is_completed_by_the_next_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "settings.ini").write_text("[columns]\ntarget = paid\n")
    done = Retrained(decision="rejected", id="r1", version="4", champion="3", reasons=["shown to be worse"], table=Table(id="r1", made="", challenger_before="2"))
    write_whole(retrain_folder(tmp_path, "r1") / "decision.json", done.to_json())
    alias = {"champion": "3", "challenger": "4"}

    class Registry:
        experiment = "loans"

        def versions(self, name: str) -> list[Any]:
            return [SimpleNamespace(version=v, name=name, tags={}, aliases=tuple(a for a, who in alias.items() if who == v)) for v in "234"]

        def set_alias(self, version: Any, name: str) -> None:
            alias[name] = version.version

        def drop_alias(self, model: str, name: str) -> None:
            del alias[name]

        def tag(self, *_: Any) -> None:
            pass

    monkeypatch.setattr(applying, "_account", lambda root, done: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        applying.finish_applying(tmp_path, Registry())
    assert not read_decisions(tmp_path)[0].applied, "what is not in the ledger is not done"
    monkeypatch.undo()
    assert [d.applied for d in applying.finish_applying(tmp_path, Registry())] == [True]
    assert alias == {"champion": "3", "challenger": "2"}, "the challenger of before is challenger again"
    assert applying.finish_applying(tmp_path, Registry()) == []
    assert "shown to be worse" in (tmp_path / "reports/retrain/r1/index.html").read_text()


def test_the_report_says_every_reason_and_escapes_what_came_from_outside(tmp_path: Path) -> None:
    gate = Judgement(name="auc >= 0.9", metric="auc", slice="", op=">=", limit=0.9, value=0.8, low=0.79, high=0.81, verdict="fail", blocking=True)
    done = Retrained(decision="rejected", id="r1", champion="3", reasons=["gate `auc >= 0.9`: fail <script>alert(1)</script>"], gates=[gate])
    page = write_report(tmp_path, done).read_text()
    assert "<script>" not in page and "0.8000" in page and "| `auc >= 0.9` | 0.8000 | 0.7900 … 0.8100 | fail | gate |" in to_markdown(done)


def test_rows_are_kept_for_the_latest_and_for_the_champion(tmp_path: Path) -> None:
    for n in range(5):
        write_whole(retrain_folder(tmp_path, f"d{n}") / "decision.json", Retrained(decision="shadow", id=f"d{n}", version=str(n)).to_json())
        write_whole(retrain_folder(tmp_path, f"d{n}") / "rows/3-fresh.parquet", b"")
    assert keep_tables(tmp_path, 2, "1") == 2 and len(read_decisions(tmp_path)) == 5
    assert sorted(p.parent.name for p in retrain_folder(tmp_path).glob("*/rows")) == ["d1", "d3", "d4"]


# One at a time


def test_a_second_one_is_refused_in_one_line_and_a_killed_ones_lock_is_gone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "settings.ini").write_text("[columns]\ntarget = paid\n")
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom ekiben.retrain.unfinished import hold\n"
        f"with hold(Path({str(tmp_path)!r})):\n    print('held', flush=True)\n    time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        assert main(["retrain", "--if-due", "--project", str(tmp_path)]) == 2
        said = capsys.readouterr().err.splitlines()
        assert said == [f"error: another `ekiben retrain` is at work here (process {other.pid}); this one does nothing"]
    finally:
        other.kill()
        other.wait()
    with hold(tmp_path):
        pass


def test_the_call_says_what_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["retrain", "--mode", "half"]) == 2
    assert "--mode takes auto, full, incremental, got `half`" in capsys.readouterr().err


def test_the_schema_page_of_a_project_is_read_without_its_package(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no schema page"):
        page_fields(tmp_path, "shop")
    path = tmp_path / "src/shop/pipeline/schema.py"
    path.parent.mkdir(parents=True)
    path.write_text('import pandera.pandas as pa\n\ntable = pa.DataFrameSchema({"age": pa.Column(float, pa.Check.ge(0), nullable=True)})\n')
    before = list(sys.path)
    assert [(f.name, f.kind, f.minimum) for f in page_fields(tmp_path, "shop")] == [("age", "number", 0.0)]
    assert sys.path == before


def test_stage_counts_what_it_leaves_out() -> None:
    stage = Stage(FIELDS, ColumnsSection(**COLUMNS))
    batch = pa.RecordBatch.from_pydict({"age": ["1", "x", "3"], "paid": ["yes", "no", None], "_id": ["a", "b", "c"]})
    assert stage.make_alike(batch, "journal").num_rows == 1
    assert stage.counts == {"journal came": 3, "journal unreadable": 1, "journal untold": 1}


# A whole project, whose world changes


def ekiben(root: Path, *words: str, code: int = 0) -> str:
    """Call the command line and check its exit code; return what it printed."""
    done = subprocess.run([*EKIBEN, *words], cwd=root, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == code, f"{words} left {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def bundle_of(root: Path, version: str, place: Path) -> Any:
    from ekiben.registry import Registry

    registry = Registry(root, "sqlite:///mlflow.db", "credit")
    found = next(v for v in registry.versions("credit") if v.version == version)
    return registry.fetch(found, place / f"bundle-{version}")


def aliases(root: Path) -> dict[str, str]:
    from ekiben.registry import Registry

    return {alias: v.version for v in Registry(root, "sqlite:///mlflow.db", "credit").versions("credit") for alias in v.aliases}


def journal_truths(root: Path, rows: list[dict[str, Any]], place: Path) -> None:
    """Journal rows as the champion's service does, each with its truth."""
    from ekiben.serving.scoring.scorer import Scorer

    bundle = bundle_of(root, aliases(root)["champion"], place)
    names = [f.name for f in Scorer(bundle).request_schema.inputs]
    kept = Journal(root / ".ekiben/journal", origin_of(bundle.schema, names, {"name": "credit", "version": bundle.info.lineage.version, "bento": ""}))
    for at in range(0, len(rows), 25):
        part = rows[at : at + 25]
        ids = new_ids(len(part))
        sent = [{k: v.isoformat() if isinstance(v, datetime) else v for k, v in r.items() if k not in ("default", "sex")} for r in part]
        kept.predictions(ids, sent, [{"label": "no", "probability": 0.1}] * len(part))
        for id_, row in zip(ids, part, strict=True):
            kept.feedback(id_, row["default"])
    kept.close()


@pytest.fixture(scope="module")
def credit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a project whose champion knows the old world only; the world has changed since."""
    place = tmp_path_factory.mktemp("credit")
    table = simulate_credit("simulated:credit?rows=4000&days=300&drift=concept&from_day=150&seed=3")
    pq.write_table(table.slice(0, 2000), place / "old.parquet")
    pq.write_table(table.slice(2000), place / "new.parquet")
    words = "--data old.parquet --target default --positive yes --sensitive sex --time applied_on --id application_id"
    ekiben(place, "new", "credit", *words.split())
    root = place / "credit"
    text = (root / "settings.ini").read_text()
    (root / "settings.ini").write_text(text.replace("\n[tune]\n", "\n[tune]\ntrials = 6\nestimators = lightgbm\n").replace("\n[monitor]\n", "\n[monitor]\ngroups = ../people.parquet\n"))
    people = table.select(["application_id", "sex"])
    pq.write_table(people, place / "people.parquet")
    ekiben(root, "run", "--quiet")
    assert aliases(root) == {"champion": "1"}
    yield root


@pytest.mark.slow
def test_a_broken_feed_is_rejected_and_nothing_of_it_is_registered(credit: Path) -> None:
    broken = pq.read_table(credit.parent / "new.parquet").slice(0, 600)
    income = pa.array([-v if v is not None and i % 2 else v for i, v in enumerate(broken["income"].to_pylist())], broken["income"].type)
    pq.write_table(broken.set_column(broken.column_names.index("income"), "income", income), credit.parent / "bad.parquet")
    said = ekiben(credit, "retrain", "--data", "../bad.parquet", "--mode", "full", "--rows", "all", code=3)
    assert "rejected: nothing registered" in said and "the feed is broken" in said and "column `income` must be at least 0" in said
    assert aliases(credit) == {"champion": "1"} and read_decisions(credit)[0].decision == "rejected"
    assert ekiben(credit, "retrain", "--if-due").startswith("not due:")


@pytest.mark.slow
def test_after_a_change_of_the_world_a_killed_retraining_is_carried_on_and_its_challenger_is_better(credit: Path, tmp_path: Path) -> None:
    from sklearn.metrics import roc_auc_score

    from ekiben.retrain.candidates import predict_validation
    from ekiben.serving.scoring.scorer import Scorer

    rows = pq.read_table(credit.parent / "new.parquet").to_pylist()
    journal_truths(credit, rows, tmp_path)
    told = count_told(credit / ".ekiben/journal")
    look = {"made": datetime.now(UTC).isoformat(), "alerts": [{"kind": "concept", "since": "2026-01-01T00:00:00+00:00", "says": "the loss rose"}]}
    write_whole(credit / "reports/monitor/latest.json", json.dumps(look).encode())
    before = {path.name: path.read_bytes() for path in (credit / ".ekiben/last").iterdir()}

    known = {d.id for d in read_decisions(credit)}
    first = subprocess.Popen([*EKIBEN, "retrain", "--if-due", "--quiet"], cwd=credit, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    runs = set((credit / "reports/runs").iterdir())
    until = time.monotonic() + 120
    while len({*(credit / "reports/runs").iterdir()} - runs) < 2 and time.monotonic() < until:
        time.sleep(0.2)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    [unfinished] = [p.name for p in retrain_folder(credit).glob("*/") if p.name not in known]
    assert aliases(credit) == {"champion": "1"} and count_told(credit / ".ekiben/journal") == told == len(rows)

    done = Retrained.from_json(ekiben(credit, "retrain", "--if-due", "--json", "--quiet"))
    assert done.id == unfinished and done.due == ["drift: the loss rose", "quality: the loss rose"]
    assert done.decision == "promoted" and done.alias == "champion" and aliases(credit) == {"champion": done.version}
    assert done.comparison["low"] > 0 and done.comparison["rows"] == done.table.rows["5-held"]
    assert {c.name for c in done.candidates if c.value is not None} == {ALL.name, RECENT.name, CONTINUED.name}
    assert any(j.metric == "demographic_parity_ratio" and j.value is not None for j in done.gates), "sex came from the restricted table"
    assert {path.name: path.read_bytes() for path in (credit / ".ekiben/last").iterdir()} == before
    assert not [p for p in retrain_folder(credit).rglob(".*") if p.name != ".ekiben"]
    assert not ekiben(credit, "ledger", "verify").count("broken")

    bundle, fresh = bundle_of(credit, done.version, tmp_path), tmp_path / "fresh.parquet"
    pq.write_table(simulate_credit("simulated:credit?rows=8000&days=300&drift=concept&from_day=0&seed=11"), fresh)
    overrides = {
        "data.source": f".ekiben/retrain/{done.id}/rows/[34]*.parquet", "data.test": str(fresh), "data.split": "file", "data.on_invalid": "quarantine"
    }  # fmt: skip
    alone = Runner(credit, Plan(overrides=overrides, until="tune", apart=True), Screen(quiet=True)).execute()
    assert alone.status == "done", alone.error
    _, y, guess = predict_validation(Layout(credit), alone, "credit")
    made = StepResult.from_json(Layout(credit).result(alone.run_id, "prepare").read_bytes())
    test = Store(Layout(credit).objects).get(made.outputs["test"])
    ours, theirs = roc_auc_score(y, Scorer(bundle).score_columns(test)[0]), roc_auc_score(y, guess)
    assert ours > theirs - 0.01, f"{ours:.4f} against {theirs:.4f} of a model that only knows the new world"
