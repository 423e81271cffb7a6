"""A world of twenty columns for the tests and benchmarks of drift: every kind, ties, skew, gaps, fifty levels."""

from __future__ import annotations

import numpy as np

from ekiben.columns import Columns
from ekiben.profile import Profile, profile_of
from ekiben.records import Field, Schema
from ekiben.reference import Reference, reference_of

ZIPF = 1 / np.arange(1, 51)
LEVELS = {
    "sex": (2, None),
    "status": (3, [0.7, 0.2, 0.1]),
    "job": (6, [0.5, 0.2, 0.15, 0.08, 0.05, 0.02]),
    "region": (16, None),
    "shop": (50, None),
    "brand": (50, ZIPF / ZIPF.sum()),
}
INPUTS = (
    *("age", "income", "balance", "visits", "spent", "ratio", "tail", "score", "hour"),
    *("member", "abroad", *LEVELS, "since", "note", "distance"),
)


def draw(rows: int, seed: int, *, shift: float = 0.0, doubled: bool = False, gone: bool = False) -> Columns:
    """Return rows of the world.

    Parameters
    ----------
    rows, seed : int
    shift : float
        By how many standard deviations `balance` moves.
    doubled : bool
        Whether the share of the fourth `job` doubles, from 8 % to 16 %.
    gone : bool
        Whether nine of ten values of `income` are missing.
    """
    rng = np.random.default_rng(seed)
    age = np.clip(rng.normal(45, 15, rows), 18, 95).round()
    income = rng.lognormal(10, 0.8, rows) * (1 + (age > 40))
    values: dict[str, np.ndarray] = {
        "age": age,
        "income": np.where(rng.random(rows) < (0.9 if gone else 0.08), np.nan, income),
        "balance": rng.normal(100 + 30 * shift, 30, rows),
        "visits": rng.poisson(1.2, rows).astype(float),
        "spent": np.where(rng.random(rows) < 0.7, 0.0, rng.gamma(2, 50, rows)),
        "ratio": rng.beta(0.5, 0.5, rows),
        "tail": rng.standard_t(2, rows),
        "score": np.where(rng.random(rows) < 0.4, np.nan, age / 10 + rng.normal(size=rows)),
        "hour": rng.integers(0, 24, rows).astype(float),
        "member": (rng.random(rows) < 0.03).astype(float),
        "abroad": np.where(rng.random(rows) < 0.05, np.nan, (rng.random(rows) < 0.5).astype(float)),
    }
    kinds = {"member": "flag", "abroad": "flag", "since": "date", "note": "text"}
    for name, (levels, shares) in LEVELS.items():
        p = np.full(levels, 1 / levels) if shares is None else np.array(shares)
        if name == "job" and doubled:
            p[3], p[0] = 2 * p[3], p[0] - p[3]
        names = np.array([f"{name} {i}" for i in range(levels)], dtype=object)
        found = names[np.searchsorted(p.cumsum()[:-1], rng.random(rows), side="right")]
        if name == "shop":
            found[rng.random(rows) < 0.01] = None
        values[name], kinds[name] = found, "category"
    values["since"] = np.datetime64("2010-01-01", "us") + rng.integers(0, 4000, rows) * np.timedelta64(86_400_000_000, "us")
    values["note"] = np.where(rng.random(rows) < 0.5, None, "some text").astype(object)
    values["distance"] = rng.exponential(10, rows).round(1)
    return Columns({name: values[name] for name in INPUTS}, kinds)


def say(columns: Columns) -> np.ndarray:
    """Return what the model says: it knows the world's law."""
    known = np.nan_to_num(columns["score"], nan=4.5)
    law = 0.04 * (columns["age"] - 45) + 0.02 * (columns["balance"] - 100) + 0.3 * (known - 4.5) - 1
    return 1 / (1 + np.exp(-law))


def happen(columns: Columns, seed: int, *, turned: bool = False) -> np.ndarray:
    """Return what happens; `turned`: `balance` has come to mean the contrary."""
    said = say(columns)
    if turned:
        law = np.log(said / (1 - said)) - 2 * 0.02 * (columns["balance"] - 100)
        said = 1 / (1 + np.exp(-law))
    return (np.random.default_rng([seed, 1]).random(columns.n) < said).astype(np.int64)


def schema() -> Schema:
    """Return the world's schema."""
    columns = draw(2, 0)
    fields = tuple(Field(name=name, kind=columns.kinds[name]) for name in columns)
    return Schema(fields=fields, task="binary", target="y", classes=("no", "yes"))


def world(seed: int, *, rows: int = 10_000, held: int = 5_000) -> tuple[Profile, Reference]:
    """Return the profile of training rows, and the reference of held-out ones."""
    profile, test = profile_of(draw(rows, 2 * seed + 1_000_000)), draw(held, 2 * seed + 1_000_001)
    y, said = happen(test, seed), say(test)
    profile = profile.with_predictions(said)
    return profile, reference_of(schema(), profile, test, y, said, said >= 0.5)
