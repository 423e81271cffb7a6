"""A small project with every kind of column, and bundles made from it, for the tests of the service."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ekiben.columns import Columns
from ekiben.encoding import fit_preprocessor
from ekiben.records import Field, Policy, Schema
from ekiben.serving.bundle import Bundle, Lineage, Limits, write_bundle
from ekiben.portable import collect_code, load_code
from ekiben.serving.scoring.scorer import Scorer, make_examples

PREPARE = '''"""How the people of the census are described."""
import numpy as np

from census.places import CAPITALS
from ekiben.columns import Columns


def features(c: Columns) -> Columns:
    """Return the features of these rows."""
    capital = np.array([place in CAPITALS for place in c["place"]], dtype=bool)
    return c.with_columns(
        log_income=np.log1p(np.maximum(c["income"], 0)),
        ratio=c["income"] / np.where(c["age"] == 0, np.nan, c["age"]),
        capital=capital,
        year=c["since"].astype("datetime64[Y]").astype(float) + 1970,
    )
'''
PLACES = 'CAPITALS = ("Paris", "Tokyo", "Zürich")\n'
LEVELS = ("clerk", "smith", "Zürich", "nurse")
PLACES_SEEN = ("Paris", "Tokyo", "Lyon", "Zürich", "naïve – 東京")


@dataclass
class Project:
    """The pipeline's side of a bundle: what the service must agree with, bit for bit."""

    bundle: Bundle
    features: Any
    preprocessor: Any
    model: Any
    policy: Policy
    columns: Columns
    schema: Schema

    def predict(self, columns: Columns) -> np.ndarray:
        """Predict as the pipeline does."""
        inputs = [f.name for f in self.schema.inputs]
        return self.model.predict(self.preprocessor.transform(self.features(columns.pick(inputs))))


def make_schema(task: str) -> Schema:
    """Return the schema of the census."""
    classes = {"binary": ("no", "yes"), "multiclass": ("low", "mid", "high"), "regression": ()}[task]
    return Schema(
        fields=(
            Field(name="age", kind="number", minimum=0, maximum=120),
            Field(name="income", kind="number"),
            Field(name="job", kind="category", categories=LEVELS),
            Field(name="place", kind="text"),
            Field(name="member", kind="flag"),
            Field(name="since", kind="date"),
            Field(name="sex", kind="category", role="sensitive", is_input=False, categories=("F", "M")),
            Field(name="id", kind="category", role="id", is_input=False),
            Field(name="target", kind="number" if task == "regression" else "category", role="target", is_input=False),
        ),
        task=task,
        target="target",
        classes=classes,
    )


def make_columns(n: int, seed: int = 0) -> Columns:
    """Return people, a tenth of every column missing."""
    rng = np.random.default_rng(seed)

    def pick(levels: tuple[str, ...]) -> np.ndarray:
        found = np.array([levels[i] for i in rng.integers(0, len(levels), n)], dtype=object)
        found[rng.random(n) < 0.1] = None
        return found

    def number(values: np.ndarray) -> np.ndarray:
        return np.where(rng.random(n) < 0.1, np.nan, values)

    since = np.datetime64("2001-01-01", "us") + rng.integers(0, 8000, n).astype("timedelta64[D]")
    since[rng.random(n) < 0.1] = np.datetime64("NaT")
    return Columns(
        {
            "age": number(rng.integers(17, 90, n).astype(float)),
            "income": number(rng.lognormal(10, 1, n)),
            "job": pick(LEVELS),
            "place": pick(PLACES_SEEN),
            "member": number((rng.random(n) < 0.5).astype(float)),
            "since": since,
            "sex": pick(("F", "M")),
        },
        {"job": "category", "place": "text", "member": "flag", "since": "date", "sex": "category"},
    )


def make_target(columns: Columns, task: str, seed: int = 0) -> np.ndarray:
    """Return what is to be predicted."""
    rng = np.random.default_rng(seed + 1)
    score = (
        np.nan_to_num(columns["age"], nan=40) / 20
        + np.nan_to_num(columns["member"])
        + np.array([j == "nurse" for j in columns["job"]])
        + rng.normal(size=columns.n)
    )
    if task == "regression":
        return score
    return np.digitize(score, np.quantile(score, [0.6] if task == "binary" else [0.33, 0.66])).astype(np.int64)


def make_package(folder: Path) -> Path:
    """Write the project's package and return its folder."""
    package = folder / "src" / "census"
    (package / "pipeline").mkdir(parents=True, exist_ok=True)
    (package / "pipeline" / "prepare.py").write_text(PREPARE, encoding="utf-8")
    (package / "places.py").write_text(PLACES, encoding="utf-8")
    return package


def fit_model(runtime: str, task: str, X: np.ndarray, y: np.ndarray, preprocessor: Any, rounds: int = 30) -> Any:
    """Train a model of a runtime."""
    from ekiben.fitting import fit_lightgbm, fit_linear

    n_classes = 0 if task == "regression" else len(np.unique(y))
    if runtime == "lightgbm":
        return fit_lightgbm(
            X, y, task=task, n_classes=n_classes, params={}, rounds=rounds, categorical=preprocessor.categorical
        )
    if runtime == "linear":
        return fit_linear(
            X,
            y,
            task=task,
            n_classes=n_classes,
            categorical=preprocessor.categorical,
            n_levels=preprocessor.n_levels,
        )
    from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor

    from ekiben.models import SklearnModel

    kind = HistGradientBoostingRegressor if task == "regression" else HistGradientBoostingClassifier
    return SklearnModel(kind(max_iter=20).fit(X, y), task, n_classes)


def make_project(
    folder: Path,
    *,
    runtime: str = "lightgbm",
    task: str = "binary",
    limits: Limits | None = None,
    policy: Policy | None = None,
    rows: int = 600,
    rounds: int = 30,
    seed: int = 0,
    lineage: Lineage | None = None,
) -> Project:
    """Train a model on the census and write its bundle to ``folder / "bundle"``."""
    code = collect_code("census", make_package(folder))
    features = load_code(code).features
    schema, columns = make_schema(task), make_columns(rows, seed)
    made = features(columns.pick([f.name for f in schema.inputs]))
    preprocessor = fit_preprocessor(made)
    y = make_target(columns, task, seed)
    model = fit_model(runtime, task, preprocessor.transform(made), y, preprocessor, rounds)
    policy = policy or Policy(task=task, threshold=0.4)
    parts = {
        "name": "census",
        "schema": schema,
        "preprocessor": preprocessor,
        "model": model,
        "policy": policy,
        "code": code,
        "limits": limits,
        "lineage": lineage or Lineage(run_id="20260101-120000-aaaa", git="0" * 40, fingerprint="f" * 16),
        "card": "# census\n",
    }
    first = write_bundle(folder / "bundle", examples=(), **parts)
    examples = make_examples(Scorer(first), columns.rows(np.arange(4)))
    bundle = write_bundle(folder / "bundle", examples=examples, **parts)
    return Project(bundle, features, preprocessor, model, policy, columns, schema)
