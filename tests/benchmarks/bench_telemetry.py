"""What observing costs the event loop, in microseconds a row or a request.

Run with ``python tests/benchmarks/bench_telemetry.py [ROWS]`` (default 100,000). Rows have 14 columns, six of them numbers, like
those of a census; each request holds one row, as fast as one process can hand them over, and then at a given rate.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import numpy as np

from ekiben.columns import Columns
from ekiben.profile import profile_of
from ekiben.records import Field, Schema
from ekiben.rows import RowReader
from ekiben.serving.signals import examiner as examining
from ekiben.serving.signals.examiner import SAMPLE, Examiner
from ekiben.serving.scoring.answers import Answer
from ekiben.serving.signals.telemetry import Telemetry
from ekiben.serving.signals.traces import Trace

NUMBERS, CATEGORIES = 6, 8
PARENT = [(b"host", b"x")] * 6 + [(b"traceparent", b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01")]


def make_people(rows: int) -> Columns:
    """Return rows like a census's: skewed numbers, categories of 2 to 42 levels."""
    rng = np.random.default_rng(0)
    values = {f"number{i}": np.round(rng.lognormal(3, 1, rows)) * (rng.random(rows) < (0.1 if i > 3 else 1)) for i in range(NUMBERS)}
    for i, levels in enumerate(np.linspace(2, 42, CATEGORIES).astype(int)):
        names = np.array([f"level {j}" for j in range(levels)], dtype=object)
        values[f"category{i}"] = names[np.minimum(rng.geometric(0.3, rows) - 1, levels - 1)]
    return Columns(values)


def cost(work: Callable[[], object], rows: int) -> float:
    """Return the microseconds of processor time a row that `work` takes; the least of seven, as the machine may be busy."""
    taken = []
    for _ in range(7):
        began = time.process_time()
        work()
        taken.append((time.process_time() - began) / rows * 1e6)
    return min(taken)


def main(rows: int) -> None:
    """Measure and print."""
    columns = make_people(rows)
    fields = tuple(
        Field(name=n, kind=k, categories=tuple(sorted(set(columns[n].tolist()))) if k == "category" else ())
        for n, k in columns.kinds.items()
    )
    schema = Schema(fields=fields, task="binary", target="target", classes=("no", "yes"))
    prediction = np.random.default_rng(1).random(rows)
    decision = (prediction > 0.5).astype(np.int64)
    profile = profile_of(columns).with_predictions(prediction)
    given = [[row] for row in columns.to_rows()]
    answers = [[Answer(label=schema.classes[d], probability=p)] for p, d in zip(prediction.tolist(), decision.tolist(), strict=True)]

    def telemetry(per_s: float = examining.PER_S) -> Telemetry:
        return Telemetry("census", "1", examiner=Examiner(profile, RowReader(schema), "binary", per_s=per_s), classes=schema.classes)

    def serve(told: Telemetry) -> None:
        for row, answer in zip(given, answers, strict=True):
            told.rows_answered("/predict", row, answer)

    def trace() -> None:
        for _ in range(rows):
            Trace.of(PARENT).to_headers()

    told = telemetry()
    full = cost(lambda: serve(told), rows)
    share = told.examiner.examined / told.examiner.offered  # type: ignore[union-attr]
    print(f"rows_answered, {1e6 / full:,.0f} rows/s, {share:.1%} examined   {full:6.2f} µs a row")
    print(f"rows_answered, every row examined            {cost(lambda: serve(telemetry(1e9)), rows):6.2f} µs a row")
    one = telemetry(1e9).examiner
    assert one is not None

    def examine() -> None:
        one.take([row for row, in given[: SAMPLE - 1]], [a for a, in answers[: SAMPLE - 1]])
        one.examine()

    print(f"one examination of {SAMPLE} rows                {cost(examine, 1) / 1e3:6.2f} ms")
    bulk = columns.rows(slice(0, 10_000))
    told = telemetry()
    print(f"columns_answered, 10,000 rows                {cost(lambda: told.columns_answered('/', bulk, prediction[:10_000], decision[:10_000]), 1) / 1e3:6.2f} ms")
    print(f"request                                      {cost(lambda: [told.request('/predict', 200, 0.001) for _ in range(rows)], rows):6.2f} µs")
    print(f"trace, with a parent                         {cost(trace, rows):6.2f} µs")
    text = told.to_text()
    print(f"a scrape of {len(text.splitlines())} lines                       {cost(lambda: told.to_text(), 1) / 1e3:6.2f} ms")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100_000)
