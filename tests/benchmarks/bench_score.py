"""`ekiben score` on simulated applications: rows a second and peak memory, beside LightGBM's own predict on a ready array.

Run it as ``python tests/benchmarks/bench_score.py [ROWS]``; each side has a process of its own, so that the peaks are
its own. Exits with 1 when the memory or the speed aimed for is not reached.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

TREES, LEAVES = 200, 31
LIMIT_MIB, AIM = 1024, 0.5


def make_bundle(folder: Path) -> None:
    """Train the reference model (200 trees of 31 leaves) on 20,000 simulated applications and write its bundle."""
    import ekiben
    from ekiben.columns import Columns
    from ekiben.data.credit import simulate_credit
    from ekiben.encoding import fit_preprocessor
    from ekiben.fitting import fit_lightgbm
    from ekiben.package import make_bundle
    from ekiben.pipeline.prepare import features
    from ekiben.records import Field, Policy, Schema
    from ekiben.serving.bundle import Limits, Lineage

    table = simulate_credit("simulated:credit?rows=20000&seed=1")
    columns = Columns.from_arrow(table)
    roles = {"default": "target", "application_id": "id", "sex": "sensitive"}
    fields = tuple(
        Field(name=n, kind=k, role=roles.get(n, "feature"), is_input=n not in roles) for n, k in columns.kinds.items()
    )
    schema = Schema(fields=fields, task="binary", target="default", classes=("no", "yes"))
    made = features(columns.pick([f.name for f in schema.inputs]))
    preprocessor = fit_preprocessor(made)
    target = columns["default"]
    y = (target == "yes").astype(np.int64) if target.dtype == object else target.astype(np.int64)
    model = fit_lightgbm(
        preprocessor.transform(made), y, task="binary", n_classes=2, params={"num_leaves": LEAVES}, rounds=TREES,
        categorical=preprocessor.categorical,
    )  # fmt: skip
    make_bundle(
        folder, name="credit", package="ekiben", package_root=Path(ekiben.__file__).parent, schema=schema,
        preprocessor=preprocessor, model=model, policy=Policy(task="binary"), sample=columns.rows(np.arange(100)),
        lineage=Lineage(), limits=Limits(),
    )  # fmt: skip


def time_score(folder: Path, rows: int) -> dict:
    """Score simulated rows to Parquet."""
    from ekiben.scoring import score_file
    from ekiben.serving.bundle import load_bundle

    bundle = load_bundle(folder)
    began = time.perf_counter()
    done = score_file(f"simulated:credit?rows={rows}&seed=2", folder.parent / "scored.parquet", bundle)
    return {"rows": done.rows, "seconds": time.perf_counter() - began, "peak_mib": peak_mib()}


def time_predict(folder: Path, rows: int) -> dict:
    """Predict a ready array with LightGBM's Python package."""
    import lightgbm

    from ekiben.columns import Columns
    from ekiben.data.credit import simulate_credit
    from ekiben.serving.bundle import load_bundle
    from ekiben.serving.scoring.scorer import Scorer

    bundle = load_bundle(folder)
    some = min(rows, 50_000)
    columns = Columns.from_arrow(simulate_credit(f"simulated:credit?rows={some}&seed=2"), bundle.schema)
    X = np.ascontiguousarray(np.resize(Scorer(bundle).to_matrix(columns), (rows, len(bundle.preprocessor.names))))
    booster = lightgbm.Booster(model_str=bundle.part("model")["booster.txt"].decode())
    booster.predict(X[:1000], num_threads=2)
    began = time.perf_counter()
    booster.predict(X, num_threads=2)
    return {"rows": rows, "seconds": time.perf_counter() - began, "peak_mib": peak_mib()}


def peak_mib() -> float:
    """Return this process's peak resident memory in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> int:
    """Run both sides and print them side by side."""
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "bundle"
        make_bundle(folder)
        found = {}
        for side in ("predict", "score"):
            command = [sys.executable, __file__, "--side", side, str(folder), str(rows)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found[side] = json.loads(done.stdout.strip().splitlines()[-1])
    print(f"{'':28}{'rows':>12}{'seconds':>10}{'rows/s':>12}{'peak MiB':>10}")
    for side, name in (("predict", "Booster.predict, ready array"), ("score", "ekiben score, to Parquet")):
        f = found[side]
        print(f"{name:28}{f['rows']:>12,}{f['seconds']:>10.2f}{f['rows'] / f['seconds']:>12,.0f}{f['peak_mib']:>10,.0f}")
    ratio = found["predict"]["seconds"] / found["score"]["seconds"]
    good = ratio >= AIM and found["score"]["peak_mib"] < LIMIT_MIB
    print(f"ratio {ratio:.2f} (aim {AIM}), peak {found['score']['peak_mib']:,.0f} MiB (limit {LIMIT_MIB}): {'ok' if good else 'NOT reached'}")
    return 0 if good else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--side"]:
        side = {"score": time_score, "predict": time_predict}[sys.argv[2]]
        print(json.dumps(side(Path(sys.argv[3]), int(sys.argv[4]))))
    else:
        raise SystemExit(main())
