"""Fairness intervals for 50,000 rows: counts resampled, against Fairlearn's bootstrap of rows.

Run with ``python tests/benchmarks/bench_fairness.py``. Fairlearn's time is measured on a few replicates and scaled.
"""

import time

import numpy as np

from ekiben.fairness import count_groups, measure_gaps
from ekiben.intervals import resample_counts

ROWS, REPLICATES, FEW = 50_000, 2000, 4


def seconds(call, repeat=5):
    """Return the median time of a call."""
    taken = []
    for _ in range(repeat):
        begun = time.perf_counter()
        call()
        taken.append(time.perf_counter() - begun)
    return float(np.median(taken))


def main():
    """Print the times and their ratio."""
    from fairlearn.metrics import MetricFrame, false_positive_rate, selection_rate, true_positive_rate
    from sklearn.metrics import accuracy_score

    rng = np.random.default_rng(0)
    sex = rng.choice(np.array(["F", "M"], dtype=object), ROWS)
    y = (rng.random(ROWS) < 0.3).astype(int)
    decision = (rng.random(ROWS) < 0.2 + 0.4 * y).astype(int)
    cells = count_groups(y, decision, sex).cells
    drawing = seconds(lambda: resample_counts(cells, REPLICATES))
    whole = seconds(lambda: measure_gaps(y, decision, {"sex": sex}, "binary"))
    metrics = {"sel": selection_rate, "tpr": true_positive_rate, "fpr": false_positive_rate, "acc": accuracy_score}
    theirs = seconds(
        lambda: MetricFrame(
            metrics=metrics, y_true=y, y_pred=decision, sensitive_features=sex,
            n_boot=FEW, ci_quantiles=[0.025, 0.975], random_state=0,
        ),
        repeat=1,
    )  # fmt: skip
    scaled = theirs / (FEW + 1) * REPLICATES
    print(f"{ROWS:,} rows, {REPLICATES:,} replicates")
    print(f"  resampled counts                 {drawing * 1e3:10.1f} ms")
    print(f"  all six gaps with intervals      {whole * 1e3:10.1f} ms, from the rows")
    print(f"  Fairlearn MetricFrame, 4 metrics {scaled:10.1f} s, scaled from {FEW} replicates ({theirs / (FEW + 1):.2f} s each)")
    print(f"  ratio                            {scaled / whole:10,.0f} x")


if __name__ == "__main__":
    main()
