"""HTTP, one row of Adult a request: ekiben's packaged service beside what people use instead, in one run.

Run it as ``python tests/benchmarks/bench_http.py [--seconds 8] [--rounds 3] [--connections 32] [--data FOLDER] [--only
WORDS]``. FOLDER holds Adult as ``train.csv``. The server has one processor and wrk another. All services are started
first and warmed up; then they take turns, round after round, so that a machine that is slower for a while is so for all;
what is shown are the medians over the rounds, and the ratios are taken within each round. The sides:

- *ekiben, everything on*: the Bento under ``bentoml serve``, every request with a key, validated, counted, journalled
  (`async`).
- *ekiben, fast lane*: the same Bento without journal and keys.
- *mlflow models serve* and *BentoML + MLflow pyfunc*: a scikit-learn Pipeline around the same model.
- *FastAPI no-op*: answers a constant and looks at nothing.
- *raw ASGI + the same scorer*: uvicorn with ekiben's scorer, no checks; about what can be had in Python.

Ends with 1 when an aim is missed: everything on at least 30 times `mlflow models serve`, its p99 below a tenth of its p99,
and the fast lane at least as fast as FastAPI's no-op.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import urllib.request
from pathlib import Path
from statistics import median

from servers import (
    ADULT,
    Load,
    Running,
    Side,
    ekiben_bento,
    ekiben_side,
    fastapi_side,
    mlflow_side,
    pyfunc_side,
    raw_side,
    save_pyfunc,
    wrk,
    wrk_script,
)

ALL_ON, FAST, MLFLOW, FASTAPI = "ekiben, everything on", "ekiben, fast lane", "mlflow models serve", "FastAPI no-op"
TIMES_MLFLOW, P99_SHARE = 30.0, 0.1


def make_sides(data: Path, home: Path) -> list[Side]:
    """Make the models and return what is compared."""
    tag = ekiben_bento(data, home)
    row = save_pyfunc(data, home / "pyfunc")
    fast = ekiben_side(tag, home, name=FAST, is_guarded=False, is_journalled=False)
    return [
        ekiben_side(tag, home, name=ALL_ON, is_guarded=True, is_journalled=True),
        fast,
        mlflow_side(home / "pyfunc", row),
        pyfunc_side(home, home / "pyfunc", row),
        fastapi_side(fast.body),
        raw_side(home / "bundle", fast.body),
    ]


def measure(running: list[Running], options: argparse.Namespace, scratch: Path) -> dict[str, list[Load]]:
    """Return what wrk found for each side in each round."""
    core = 1 if (os.cpu_count() or 1) > 1 else -1
    found: dict[str, list[Load]] = {one.side.name: [] for one in running}
    scripts = {one.side.name: wrk_script(one.side, scratch) for one in running}
    for one in running:
        wrk(one, scripts[one.side.name], min(2.0, options.seconds), options.connections, core)  # warm-up
    for turn in range(options.rounds):
        for one in running if turn % 2 == 0 else reversed(running):
            found[one.side.name].append(wrk(one, scripts[one.side.name], options.seconds, options.connections, core))
            print(f"  round {turn + 1}: {one.side.name:28}{found[one.side.name][-1].per_s:>10,.0f}/s", flush=True)
    return found


def dropped(running: list[Running]) -> int:
    """Return how many records the journal could not take, which would make its figure too good; -1 when nobody says."""
    for one in running:
        if one.side.name == ALL_ON:
            request = urllib.request.Request(f"{one.url}/metrics", headers=one.side.headers)
            with urllib.request.urlopen(request, timeout=20) as answer:
                lines = answer.read().decode().splitlines()
            return next((int(float(x.split()[-1])) for x in lines if x.startswith("ekiben_journal_dropped_total")), -1)
    return 0


def ratio(found: dict[str, list[Load]], a: str, b: str, of: str = "per_s") -> float:
    """Return the median over the rounds of a side's figure by another's."""
    return median(getattr(x, of) / getattr(y, of) for x, y in zip(found[a], found[b], strict=True))


def show(found: dict[str, list[Load]], lost: int) -> bool:
    """Print the medians and the aims; return whether all were met."""
    print(f"\n{'':30}{'requests/s':>12}{'p50 ms':>10}{'p99 ms':>10}{'max ms':>10}{'errors':>8}{'times mlflow':>14}")
    for name, loads in found.items():
        cells = [median(getattr(x, of) for x in loads) for of in ("per_s", "p50_ms", "p99_ms", "max_ms")]
        by_mlflow = f"{ratio(found, name, MLFLOW):>14,.1f}" if MLFLOW in found else ""
        print(f"{name:30}{cells[0]:>12,.0f}{cells[1]:>10.2f}{cells[2]:>10.2f}{cells[3]:>10.1f}{sum(x.errors for x in loads):>8}{by_mlflow}")
    aims = []
    if {ALL_ON, MLFLOW} <= found.keys():
        times, share = ratio(found, ALL_ON, MLFLOW), ratio(found, ALL_ON, MLFLOW, "p99_ms")
        aims.append((f"everything on: {times:.1f} times mlflow models serve (aim {TIMES_MLFLOW:g})", times >= TIMES_MLFLOW))
        aims.append((f"everything on: p99 {share:.3f} of its p99 (aim below {P99_SHARE:g})", share < P99_SHARE))
    if {FAST, FASTAPI} <= found.keys():
        times = ratio(found, FAST, FASTAPI)
        aims.append((f"fast lane: {times:.2f} times FastAPI's no-op (aim 1)", times >= 1))
    ours = [n for n in (ALL_ON, FAST) if n in found]
    aims.append((f"no errors from {' and '.join(ours) or 'ekiben'}", not any(x.errors for n in ours for x in found[n])))
    aims.append((f"{lost} records that the journal could not take (aim 0)", lost == 0))
    print()
    for text, is_met in aims:
        print(f"{'ok         ' if is_met else 'NOT reached'}  {text}")
    return all(is_met for _, is_met in aims)


def main() -> int:
    """Start every side, load them in turn, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=8.0, help="of load for each side in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--data", type=Path, default=ADULT, help="folder with train.csv of Adult")
    parser.add_argument("--only", default="", help="words, by commas: only sides with one of them in their name")
    options = parser.parse_args()
    if not (options.data / "train.csv").is_file():
        print(f"no Adult table in {options.data}; say where with --data")
        return 0
    if missing := [tool for tool in ("wrk", "taskset") if not shutil.which(tool)]:
        print(f"this needs {' and '.join(missing)}, which are not installed")
        return 0
    running: list[Running] = []
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        words = [word.strip() for word in options.only.split(",") if word.strip()]
        sides = [s for s in make_sides(options.data, home) if not words or any(word in s.name for word in words)]
        try:
            for side in sides:
                running.append(Running(side, 0, home / f"{len(running)}.log"))
                print(f"{side.name}: first answer after {running[-1].answer():.1f} s", flush=True)
            found = measure(running, options, home)
            return 0 if show(found, dropped(running)) else 1
        finally:
            for one in running:
                one.stop()


if __name__ == "__main__":
    sys.exit(main())
