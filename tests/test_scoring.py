"""Scoring a table: the same numbers as the pipeline, whole files or none, bad rows named or set aside."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from bundles import make_columns, make_project
from tiny import hear_ctrl_c

from ekiben.errors import DataError, UsageError
from ekiben.records import Policy
from ekiben.scoring import Ahead, score_file
from ekiben.serving.bundle import Limits


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return make_project(tmp_path_factory.mktemp("census"))


def write_source(path, columns, ids=True, **changes):
    table = columns.to_arrow()
    if ids:
        table = table.append_column("id", pa.array([f"p{i}" for i in range(columns.n)]))
    for name, values in changes.items():
        table = table.set_column(table.column_names.index(name), name, pa.array(values))
    if path.suffix == ".csv":
        pa.csv.write_csv(pa.table({name: as_text(table[name]) for name in table.column_names}), path)
    else:
        pq.write_table(table, path)
    return str(path)


def as_text(column):
    """Return a column as a CSV file holds it: plain, with nothing where it is missing."""
    if pa.types.is_dictionary(column.type):
        return column.cast(pa.string())
    if pa.types.is_floating(column.type):
        return pc.if_else(pc.is_nan(column), None, column)
    return column


@pytest.mark.parametrize("ending", ["csv", "parquet"])
@pytest.mark.parametrize("out_ending", ["csv", "parquet"])
@pytest.mark.parametrize("batch_rows", [64, 100_000])
def test_scores_are_the_pipelines_to_the_last_bit(project, tmp_path, ending, out_ending, batch_rows):
    fresh = make_columns(1000, seed=5)
    source = write_source(tmp_path / f"new.{ending}", fresh)
    done = score_file(source, tmp_path / f"out.{out_ending}", project.bundle, batch_rows=batch_rows)
    assert (done.rows, done.quarantined) == (1000, 0)
    if out_ending == "csv":
        with open(done.out, newline="") as file:
            rows = list(csv.DictReader(file))
        table = {name: [row[name] for row in rows] for name in rows[0]}
        table["probability"] = [float(p) for p in table["probability"]]
    else:
        table = pq.read_table(done.out).to_pydict()
    assert list(table) == ["id", "label", "probability"]
    expected = project.predict(fresh)
    assert table["id"] == [f"p{i}" for i in range(1000)]
    assert np.array_equal(table["probability"], expected)
    assert table["label"] == ["yes" if p >= 0.4 else "no" for p in expected]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([f"new.{ending}", f"out.{out_ending}"])


@pytest.mark.parametrize(
    ("task", "names"),
    [("multiclass", ["id", "label", "probability_low", "probability_mid", "probability_high"]), ("regression", ["id", "value"])],
)
def test_other_tasks_have_their_own_columns(tmp_path, task, names):
    project, fresh = make_project(tmp_path, task=task), make_columns(50, seed=5)
    score_file(write_source(tmp_path / "new.parquet", fresh), tmp_path / "out.parquet", project.bundle)
    table = pq.read_table(tmp_path / "out.parquet")
    assert table.column_names == names
    expected = project.predict(fresh)
    got = np.column_stack([table[n] for n in names if n.startswith(("prob", "value"))])
    assert np.array_equal(got, expected.reshape(50, -1))


def test_the_policy_by_group_reads_the_group(tmp_path):
    policy = Policy(task="binary", threshold=0.5, group_by="sex", thresholds={"F": 0.0, "M": 1.1})
    project, fresh = make_project(tmp_path, policy=policy), make_columns(200, seed=5)
    score_file(write_source(tmp_path / "new.parquet", fresh), tmp_path / "out.parquet", project.bundle)
    said = pq.read_table(tmp_path / "out.parquet")["label"].to_pylist()
    expected = policy.decide(project.predict(fresh), fresh["sex"])
    assert said == [("no", "yes")[i] for i in expected]
    assert {s for s, g in zip(said, fresh["sex"], strict=True) if g == "F"} == {"yes"}


def test_a_wrong_row_stops_it_and_leaves_no_file(project, tmp_path):
    fresh = make_columns(300, seed=5)
    ages = ["30"] * 300
    ages[257] = "old"
    source = write_source(tmp_path / "new.csv", fresh, age=ages)
    with pytest.raises(DataError, match=r"row 257: column `age`") as caught:
        score_file(source, tmp_path / "out.csv", project.bundle, batch_rows=100)
    assert "old" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["new.csv"]


def test_wrong_rows_are_set_aside_with_the_reason(project, tmp_path):
    fresh = make_columns(300, seed=5)
    ages = ["30"] * 300
    ages[57], ages[257] = "-3", "old"
    source = write_source(tmp_path / "new.csv", fresh, ids=False, age=ages)
    done = score_file(source, tmp_path / "out.csv", project.bundle, batch_rows=100, on_invalid="quarantine")
    assert (done.rows, done.quarantined) == (298, 2)
    aside = pa.csv.read_csv(done.quarantine).to_pydict()
    assert aside["_row"] == [57, 257] and aside["age"] == ["-3", "old"]
    assert ["at least 0" in aside["_reason"][0], "takes a number" in aside["_reason"][1]] == [True, True]
    kept = pa.csv.read_csv(tmp_path / "out.csv").to_pydict()
    assert kept["_row"] == [i for i in range(300) if i not in (57, 257)]


def test_limits_of_the_service_hold_here_too(tmp_path):
    project = make_project(tmp_path, limits=Limits(missing="reject", unseen="reject"))
    fresh = make_columns(200, seed=5)
    source = write_source(tmp_path / "new.parquet", fresh, job=["wizard"] * 100 + ["clerk"] * 100)
    done = score_file(source, tmp_path / "out.csv", project.bundle, on_invalid="quarantine")
    aside = pa.csv.read_csv(done.quarantine)
    assert done.quarantined == aside.num_rows > 100
    reasons = aside["_reason"].to_pylist()
    assert sum("never seen" in r for r in reasons) == 100 and any("is missing" in r for r in reasons)


def test_missing_columns_and_odd_endings_are_named(project, tmp_path):
    fresh = make_columns(5, seed=5)
    source = write_source(tmp_path / "new.parquet", fresh.drop(["job"]))
    with pytest.raises(DataError, match="no column `job`"):
        score_file(source, tmp_path / "out.csv", project.bundle)
    for out in (tmp_path / "out.xlsx", tmp_path / "nowhere" / "out.csv"):
        with pytest.raises(UsageError):
            score_file(source, out, project.bundle)
    assert [p.name for p in tmp_path.iterdir()] == ["new.parquet"]


def test_an_old_result_stays_when_the_new_one_fails(project, tmp_path):
    (tmp_path / "out.csv").write_text("precious")
    source = write_source(tmp_path / "new.csv", make_columns(50, seed=5), age=["x"] * 50)
    with pytest.raises(DataError):
        score_file(source, tmp_path / "out.csv", project.bundle)
    assert (tmp_path / "out.csv").read_text() == "precious"


def test_ctrl_c_leaves_nothing_half_written(project, tmp_path):
    source = write_source(tmp_path / "new.parquet", make_columns(20_000, seed=5))
    program = f"""
import sys, time
from pathlib import Path
from ekiben.scoring import score_file
from ekiben.serving.bundle import load_bundle
def slowly(rows):
    print(rows, flush=True)
    time.sleep(0.2)
try:
    score_file({source!r}, Path({str(tmp_path / "out.csv")!r}), load_bundle(Path({str(project.bundle.folder)!r})),
               batch_rows=500, progress=slowly)
except KeyboardInterrupt:
    sys.exit(130)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, preexec_fn=hear_ctrl_c)
    process.stdout.readline()
    time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(20) == 130
    process.stdout.close()
    assert [p.name for p in tmp_path.iterdir()] == ["new.parquet"]


def test_reading_ahead_passes_errors_on_and_stops():
    def broken():
        yield 1
        raise DataError("row 2 is bad")

    with pytest.raises(DataError, match="row 2"):
        list(Ahead(broken()))
    taken = []

    def endless():
        for i in range(10**9):
            taken.append(i)
            yield i

    ahead = Ahead(endless())
    assert next(iter(ahead)) == 0
    ahead.close()
    count = len(taken)
    time.sleep(0.3)
    assert len(taken) == count <= 5
