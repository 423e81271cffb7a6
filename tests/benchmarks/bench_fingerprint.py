"""The fingerprint of a table of a million rows, beside pandas' hash of the same rows: `python tests/benchmarks/bench_fingerprint.py`."""

from __future__ import annotations

import statistics
import time

import numpy as np
import pandas as pd
import pyarrow as pa

from ekiben.data.table import fingerprint

ROWS, ROUNDS = 1_000_000, 5


def make_table() -> pa.Table:
    """Return twelve columns of numbers and eight of texts."""
    random = np.random.default_rng(0)
    texts = pa.array([f"value {i}" for i in range(50)])
    numbers = {f"n{i}": random.normal(size=ROWS) for i in range(12)}
    return pa.table(numbers | {f"t{i}": texts.take(pa.array(random.integers(0, 50, ROWS))) for i in range(8)})


def timed(action) -> float:
    """Return the seconds that an action takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def main() -> None:
    """Measure both in turn and print the medians and their ratio."""
    table = make_table()
    frame = table.to_pandas()
    ours, theirs = [], []
    for _ in range(ROUNDS + 1):
        ours.append(timed(lambda: fingerprint(table)))
        theirs.append(timed(lambda: pd.util.hash_pandas_object(frame, index=False)))
    mine, pandas = statistics.median(ours[1:]), statistics.median(theirs[1:])
    print(f"{ROWS:,} rows x {table.num_columns} columns: ekiben {mine:.2f} s, pandas {pandas:.2f} s, ratio {pandas / mine:.1f}")


if __name__ == "__main__":
    main()
