"""Drift: how often it is seen where there is none, how fast a table is compared, and a journal of ten million rows.

Run with ``python tests/benchmarks/bench_drift.py [windows|table|journal [ROWS]]``; without a word, all three. The journal
lies under the temporary folder and is removed at the end.
"""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import drifting

from ekiben.columns import Columns
from ekiben.monitor.concept import compare_labels, residual_drift
from ekiben.monitor.counting import count_columns
from ekiben.monitor.drift import compare_window
from ekiben.monitor.labels import label_columns
from ekiben.profile import profile_of
from ekiben.reference import Reference, reference_of

WORLDS, EACH, ROWS = 50, 20, 2_000
TABLE, COLUMNS = 100_000, 20
JOURNAL, FILE, DAYS = 10_000_000, 250_000, 10


def windows() -> None:
    """Print how many of 1,000 windows without drift raise a false alarm."""
    data = concept = 0
    named: Counter[str] = Counter()
    for number in range(WORLDS):
        profile, reference = drifting.world(number)
        for window in range(EACH):
            seed = 10_000_000 + 1_000 * number + window
            c = drifting.draw(ROWS, seed)
            said, y = drifting.say(c), drifting.happen(c, seed)
            found = [d.column for d in compare_window(profile, count_columns(profile, c, said)) if d.is_drifting]
            labelled = label_columns(reference, profile, c, y, said)
            about = [d.column for d in residual_drift(reference, labelled, profile) if d.is_drifting]
            about += [d.figure for d in compare_labels(reference, labelled) if d.is_drifting]
            data, concept = data + bool(found), concept + bool(about)
            named.update([*found, *(f"{name} (concept)" for name in about)])
    n = WORLDS * EACH
    print(f"{n:,} windows of {ROWS:,} rows, {len(profile.columns)} features and the prediction, {WORLDS} references, no drift")
    print(f"  windows that name a column        {data:6} = {data / n:.2%}")
    print(f"  windows that name a changed relation {concept:3} = {concept / n:.2%}   {dict(named)}")


def seconds(call, repeat: int = 7) -> tuple[float, float]:
    """Return the median time of a call, and the median of what the processor was busy with it."""
    taken = []
    for _ in range(repeat):
        begun, worked = time.perf_counter(), time.process_time()
        call()
        taken.append((time.perf_counter() - begun, time.process_time() - worked))
    return tuple(np.median(taken, axis=0).tolist())


def table() -> None:
    """Print how long a table in memory takes, and what scipy on the raw rows of both tables takes."""
    rng = np.random.default_rng(0)

    def draw(rows: int) -> Columns:
        numbers = {f"n{i}": rng.normal(size=rows) for i in range(12)}
        levels = np.array([f"level {i}" for i in range(20)], dtype=object)
        texts = {f"c{i}": levels[rng.integers(0, 20, rows)] for i in range(8)}
        return Columns({**numbers, **texts}, dict.fromkeys(texts, "category"))

    before, now = draw(TABLE), draw(TABLE)
    profile = profile_of(before)
    said = rng.random(TABLE)
    profile = profile.with_predictions(said)
    ours, worked = seconds(lambda: compare_window(profile, count_columns(profile, now, said)))
    print(f"{TABLE:,} rows × {COLUMNS} columns (12 numbers, 8 categories of 20 levels) and the prediction")
    print(f"  counted and compared with the profile {ours:8.3f} s ({worked:.3f} s of computing)")
    theirs, busy = seconds(lambda: raw_rows(before, now), repeat=3)
    print(f"  scipy ks_2samp and chi2 on raw rows   {theirs:8.3f} s ({busy:.3f}) = {theirs / ours:.1f} x, and it keeps the training rows")
    probe = "import evidently; from evidently.presets import DataDriftPreset"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=False)
    last = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else ""
    print(f"  Evidently                             {'imports' if not done.returncode else f'does not import here: {last}'}")


def raw_rows(before: Columns, now: Columns) -> None:
    """Test every column as one would without a profile."""
    import pandas as pd
    from scipy import stats

    for name in before:
        if before.kinds[name] == "number":
            stats.ks_2samp(before[name], now[name])
        else:
            counts = [pd.Series(c[name]).value_counts() for c in (before, now)]
            both = pd.concat(counts, axis=1).fillna(0)
            stats.chi2_contingency(both.to_numpy().T)


def journal(rows: int = JOURNAL) -> None:
    """Print rows a second and memory for a journal of ten million rows; the counting is a process of its own."""
    folder = Path(tempfile.mkdtemp(prefix="bench-drift-"))
    try:
        begun = time.perf_counter()
        for name, raw in zip(("profile", "reference"), write_journal(folder / "journal", rows), strict=True):
            (folder / f"{name}.json").write_bytes(raw)
        size = sum(p.stat().st_size for p in (folder / "journal").rglob("*.parquet"))
        print(f"{rows:,} journalled rows × {COLUMNS} columns, {size / 1e6:,.0f} MB (written in {time.perf_counter() - begun:.0f} s)")
        for share in (0.1, 1.0):
            subprocess.run([sys.executable, __file__, "count", str(folder), str(share)], check=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_journal(folder: Path, rows: int) -> tuple[bytes, bytes]:
    """Write sealed files of predictions, a fifth of them labelled, and return profile and reference of such rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from ekiben.records import Field, Schema
    from ekiben.serving.journal.seal import feedback_schema, prediction_schema, sealed_path
    from ekiben.serving.journal.segments import origin_of

    rng = np.random.default_rng(0)
    numbers, texts = [f"n{i}" for i in range(12)], [f"c{i}" for i in range(8)]
    fields = [Field(name=n, kind="number") for n in numbers] + [Field(name=n, kind="category") for n in texts]
    schema = Schema(fields=tuple(fields), task="binary", target="y", classes=("no", "yes"))
    origin = origin_of(schema, [*numbers, *texts], {"name": "bench", "version": "1", "bento": "bench:1"})
    types = prediction_schema(origin)
    levels = pa.array([f"level {i}" for i in range(20)])
    words = np.array(levels.to_pylist(), dtype=object)
    base = {n: rng.normal(size=FILE) for n in numbers} | {n: rng.integers(0, 20, FILE) for n in texts}
    said = rng.random(FILE)
    first = np.datetime64("2026-01-01", "us")
    for number in range(rows // FILE):
        turn = rng.integers(FILE)  # other rows beside each other, without drawing all anew
        at = first + (np.arange(number * FILE, (number + 1) * FILE) * (DAYS * 86_400_000_000 // rows)).astype("timedelta64[us]")
        arrays = {
            "_id": pa.array(np.char.mod("%032d", np.arange(number * FILE, (number + 1) * FILE))),
            "_time": pa.array(at, pa.timestamp("us", tz="UTC")),
            "_label": pa.array(np.where(said >= 0.5, "yes", "no")),
            "_probability": pa.array(np.roll(said, turn)),
        }
        arrays |= {name: pa.repeat(pa.scalar("1"), FILE) for name in ("_model", "_version", "_bento")}
        arrays |= {n: pa.array(np.roll(base[n], turn)) for n in numbers}
        arrays |= {n: levels.take(pa.array(np.roll(base[n], turn))) for n in texts}
        path = sealed_path(folder, "predictions", str(at[0])[:10], f"v1-{number:05d}")
        path.parent.mkdir(parents=True, exist_ok=True)
        cast = [arrays[f.name].cast(f.type) if f.name in arrays else pa.nulls(FILE, f.type) for f in types]
        pq.write_table(pa.table(cast, schema=types), path, compression="zstd", row_group_size=50_000)
        told = np.arange(0, FILE, 5)
        path = sealed_path(folder, "feedback", str(at[0])[:10], f"v1-{number:05d}")
        path.parent.mkdir(parents=True, exist_ok=True)
        truth = np.where(rng.random(len(told)) < np.roll(said, turn)[told], "yes", "no")
        labels = [arrays["_id"].take(pa.array(told)), arrays["_time"].take(pa.array(told)), pa.array(truth)]
        pq.write_table(pa.table(labels, schema=feedback_schema(origin)), path, compression="zstd")
    c = Columns({n: base[n] if n in numbers else words[base[n]] for n in [*numbers, *texts]}, dict.fromkeys(texts, "category"))
    profile = profile_of(c).with_predictions(said)
    y = (rng.random(FILE) < said).astype(np.int64)
    return profile.to_json(), reference_of(schema, profile, c, y, said, said >= 0.5).to_json()


def count(folder: str, share: str) -> None:
    """Count a share of the journal and print rows a second and the peak of memory."""
    from ekiben.monitor.window import read_window
    from ekiben.profile import Profile

    profile = Profile.from_json((Path(folder) / "profile.json").read_bytes())
    reference = Reference.from_json((Path(folder) / "reference.json").read_bytes())
    since = datetime(2026, 1, 1, tzinfo=UTC)
    until = since + timedelta(days=DAYS * float(share))
    for labels in (None, reference):
        begun, worked = time.perf_counter(), time.process_time()
        window = read_window(Path(folder) / "journal", since, until, profile=profile, reference=labels, classes=("no", "yes"))
        found = compare_window(profile, window)
        about = residual_drift(reference, window.labelled, profile) if window.labelled else []
        taken, worked = time.perf_counter() - begun, time.process_time() - worked
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        named = [d.column for d in (*found, *about) if d.is_drifting]
        told = f"and {window.labelled.total:10,} labels" if window.labelled else "                      "
        speed = f"{taken:6.1f} s = {window.rows / taken:9,.0f} rows/s ({worked:5.1f} s of computing)"
        print(f"  {window.rows:12,} rows {told} {speed}, peak {peak:5.0f} MB, named: {named}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["count"]:
        count(*sys.argv[2:4])
    elif sys.argv[1:2] == ["journal"]:
        journal(*map(int, sys.argv[2:3]))
    else:
        for part in sys.argv[1:] or ["windows", "table", "journal"]:
            {"windows": windows, "table": table, "journal": journal}[part]()
