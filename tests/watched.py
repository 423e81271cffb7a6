"""A project that was served: a bundle, a journal written directly, and the notebook that watches."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from bundles import fit_model

from ekiben.columns import Columns
from ekiben.encoding import fit_preprocessor
from ekiben.metrics import quality
from ekiben.profile import profile_of
from ekiben.records import Field, Policy, Schema
from ekiben.reference import reference_of
from ekiben.serving.journal import journal as journals
from ekiben.serving.bundle import Bundle, Lineage, write_bundle
from ekiben.serving.journal.journal import Journal
from ekiben.serving.journal.segments import origin_of

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = """[pipeline]
name = loans

[data]
task = {task}

[columns]
target = y
id = customer
sensitive = sex
{gates}
[monitor]
parts = 6
{monitor}
"""
CODE = {
    "pipeline/prepare.py": "from ekiben.columns import Columns\n\n\ndef features(c: Columns) -> Columns:\n    return c\n",
    "pipeline/__init__.py": "",
}
JOBS = ("clerk", "nurse", "smith")
CLASSES = {"binary": ("no", "yes"), "multiclass": ("low", "mid", "high"), "regression": ()}
DAY_S = 86_400


def schema_of(task: str) -> Schema:
    """Return the schema of the loans."""
    return Schema(
        fields=(
            Field(name="age", kind="number"),
            Field(name="debt", kind="number"),
            Field(name="job", kind="category", categories=JOBS),
            Field(name="customer", kind="category", role="id", is_input=False),
            Field(name="sex", kind="category", role="sensitive", is_input=False),
            Field(name="y", kind="number" if task == "regression" else "category", role="target", is_input=False),
        ),
        task=task,  # type: ignore[arg-type]
        target="y",
        classes=CLASSES[task],
    )


def people(n: int, seed: int) -> Columns:
    """Return applicants."""
    rng = np.random.default_rng(seed)
    job = rng.choice(JOBS, n, p=[0.5, 0.3, 0.2]).astype(object)
    return Columns({"age": rng.normal(45, 12, n), "debt": rng.lognormal(1, 0.6, n), "job": job}, {"job": "category"})


def truth_of(columns: Columns, task: str, seed: int, *, turned: bool = False) -> np.ndarray:
    """Return what becomes of them; `turned`: debt has come to mean the contrary."""
    rng = np.random.default_rng(seed + 1000)
    slope = 0.9 if turned else -0.9
    age, debt = np.nan_to_num(columns["age"], nan=45), np.nan_to_num(columns["debt"], nan=3)
    score = (age - 45) / 12 + slope * (debt - 3.2) / 2 + 0.6 * np.array([j == "nurse" for j in columns["job"]])
    if task == "regression":
        return score + rng.normal(0, 0.5, len(score))
    if task == "multiclass":
        return np.digitize(score + rng.logistic(0, 0.5, len(score)), [-0.6, 0.6]).astype(np.int64)
    return (rng.random(len(score)) < 1 / (1 + np.exp(-1.5 * score))).astype(np.int64)


@dataclass
class Served:
    """A project that was served, and what its model says."""

    root: Path
    task: str
    bundle: Bundle
    schema: Schema
    model: Any
    preprocessor: Any
    policy: Policy
    ids: list[str] = field(default_factory=list)

    def predict(self, columns: Columns) -> np.ndarray:
        """Predict as the service would."""
        return np.asarray(self.model.predict(self.preprocessor.transform(columns)))

    def serve(
        self, columns: Columns, y: np.ndarray | None = None, *, end: float, seconds: float = DAY_S, labelled: float = 1.0, version: str = "3",
        role: str = "", customers: list[str] | None = None, told_late_s: float = 60.0, folder: Path | None = None,
    ) -> list[str]:  # fmt: skip
        """Answer rows evenly over the `seconds` before `end` [s since 1970], and tell the truth about a share of them."""
        model = {"name": "loans", "version": version, "bento": ""} | ({"role": role} if role else {})
        n, prediction = columns.n, self.predict(columns)
        decision = self.policy.decide(prediction)
        rows = [{name: _plain(columns[name][i]) for name in columns} for i in range(n)]
        for i, row in enumerate(rows):
            row["customer"] = customers[i] if customers else f"c{i}"
        answers = [self._answer(prediction[i], decision[i]) for i in range(n)]
        ids = journals.new_ids(n)
        journal = Journal(folder or self.root / ".ekiben" / "journal", origin_of(self.schema, ["age", "debt", "job"], model))
        clock = journals.time.time_ns
        try:
            for part in np.array_split(np.arange(n), min(n, 48)):
                at = end - seconds + seconds * (part[0] + 0.5) / n
                journals.time.time_ns = lambda at=at: int(at * 1e9)  # type: ignore[method-assign]
                journal.predictions([ids[i] for i in part], [rows[i] for i in part], [answers[i] for i in part])
            journals.time.time_ns = lambda: int((end - 1 + max(0.0, told_late_s - 60)) * 1e9)  # type: ignore[method-assign]
            for i in np.random.default_rng(0).permutation(n)[: int(n * labelled)] if y is not None else []:
                journal.feedback(ids[i], float(y[i]) if self.task == "regression" else self.schema.classes[int(y[i])])
        finally:
            journals.time.time_ns = clock  # type: ignore[method-assign]
            journal.close()
        self.ids += ids
        return ids

    def _answer(self, prediction: Any, decision: Any) -> dict[str, Any]:
        if self.task == "regression":
            return {"value": float(prediction)}
        label = self.schema.classes[int(decision)]
        if self.task == "binary":
            return {"label": label, "probability": float(prediction)}
        return {"label": label, "probabilities": dict(zip(self.schema.classes, map(float, prediction), strict=True))}


def _plain(value: Any) -> Any:
    if isinstance(value, float) and np.isnan(value):
        return None
    return value.item() if isinstance(value, np.generic) else value


def make_served(root: Path, task: str = "binary", *, monitor: str = "", gates: str = "", version: str = "3", rows: int = 4000) -> Served:
    """Make a project with a trained model's bundle among its deployment's, and the notebook that watches."""
    schema = schema_of(task)
    train, held_out = people(rows, 1), people(rows, 2)
    preprocessor = fit_preprocessor(train)
    y, truth = truth_of(train, task, 1), truth_of(held_out, task, 2)
    model = fit_model("linear", task, preprocessor.transform(train), y, preprocessor)
    policy = Policy(task=task, threshold=0.5)  # type: ignore[arg-type]
    prediction = np.asarray(model.predict(preprocessor.transform(held_out)))
    decision = policy.decide(prediction)
    profile = profile_of(train).with_predictions(prediction, schema.classes)
    measures = quality(truth, prediction, decision, schema.task, schema.classes, resamples=200)
    reference = reference_of(schema, profile, held_out, truth, prediction, decision, measures=measures)
    folder = root / ".ekiben" / "deployments" / "production" / "bundles" / "made"
    folder.parent.mkdir(parents=True, exist_ok=True)
    bundle = write_bundle(
        folder, name="loans", schema=schema, preprocessor=preprocessor, model=model, policy=policy, code=CODE, examples=(),
        lineage=Lineage(run_id="20260101-120000-aaaa", version=version), profile=profile.to_json(), reference=reference.to_json(),
    )  # fmt: skip
    (folder.parents[1] / "deployment.json").write_bytes(msgspec.json.encode({"champion": {"version": version}}))
    lines = "[gates]\n" + "\n".join(f"{key} =\n    {text}" for key, text in [tuple(gates.split(":", 1))]) + "\n" if gates else ""
    (root / "settings.ini").write_text(SETTINGS.format(task=task, monitor=monitor, gates=lines), encoding="utf-8")
    (root / "pyproject.toml").write_text(
        '[project]\nname = "loans"\nversion = "0"\n[tool.nbdev]\nlib_path = "src/loans"\nnbs_path = "nbs"\n', encoding="utf-8"
    )
    (root / "nbs" / "pipeline").mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "nbs" / "pipeline" / "06_monitor.ipynb", root / "nbs" / "pipeline" / "06_monitor.ipynb")
    return Served(root, task, bundle, schema, model, preprocessor, policy)
