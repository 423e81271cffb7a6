"""Explanations of one row: the library's contributions in a fraction of its time, beside the very bits of a prediction."""

from __future__ import annotations

import threading
from typing import Any

import bundles
import lightgbm
import numpy as np
import pytest
from bundles import make_columns, make_project
from hypothesis import given, settings
from hypothesis import strategies as st

from ekiben.errors import RowError
from ekiben.serving.scoring.compiled import Lane
from ekiben.serving.scoring.lightgbm import CONTRIBUTIONS, RAW, NativeBooster, SingleRow
from ekiben.serving.scoring.scorer import Scorer
from ekiben.serving.scoring.treeshap import Leaf, Passage, TreeShap, Unsuited, read_leaves

TASKS = ("binary", "multiclass", "regression")


def listed(said: Any) -> list[float]:
    """Return contributions, the base last, of every class in turn."""
    if isinstance(said.base, dict):
        return [value for c in said.base for value in (*said.contributions[c].values(), said.base[c])]
    return [*said.contributions.values(), said.base]


# ---- one row, as it is answered


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("runtime", ["lightgbm", "linear"])
def test_one_row_is_explained_beside_the_bits_of_its_prediction(tmp_path, runtime, task):
    scorer = Scorer(make_project(tmp_path, runtime=runtime, task=task).bundle)
    rows = make_columns(60, seed=9).to_rows()
    together = scorer.explain_rows(rows, [str(i) for i in range(60)])
    for row, other in zip(rows, together, strict=True):
        said, answer = scorer.explain_rows([row], ["x"])[0], scorer.score_row(row)
        assert said.id == "x"
        for name in ("label", "probability", "probabilities", "value"):
            assert getattr(said, name) == getattr(answer, name) == getattr(other, name)
        assert said.margin == other.margin
        assert np.abs(np.subtract(listed(said), listed(other))).max() < 1e-12
        margins = said.margin.values() if isinstance(said.margin, dict) else [said.margin]
        for total, margin in zip(np.reshape(listed(said), (len(margins), -1)).sum(axis=1), margins, strict=True):
            assert abs(total - margin) < 1e-9


PLAIN = """from ekiben.features import log1p

def features(c):
    return c.with_columns(log_income=log1p(c["income"]))
"""


@pytest.mark.parametrize("runtime", ["lightgbm", "linear"])
def test_with_and_without_written_code_the_same_is_said(tmp_path, monkeypatch, runtime):
    monkeypatch.setattr(bundles, "PREPARE", PLAIN)
    scorer = Scorer(make_project(tmp_path, runtime=runtime).bundle)
    rows = make_columns(10, seed=9).to_rows()
    assert scorer.lane.is_compiled, scorer.lane.why
    fast = [scorer.explain_rows([row], ["x"]) for row in rows]
    scorer.__dict__["lane"] = Lane(scorer._predict_generally, is_compiled=False)
    assert [scorer.explain_rows([row], ["x"]) for row in rows] == fast


def test_values_that_only_the_general_way_knows_are_explained_too(tmp_path):
    scorer = Scorer(make_project(tmp_path).bundle)
    row = make_columns(1, seed=2).to_rows()[0]

    class Row(dict):
        pass

    assert scorer.explain_rows([Row(row)], ["x"]) == scorer.explain_rows([row], ["x"])
    with pytest.raises(RowError, match="row 0: column `age`"):
        scorer.explain_rows([{**row, "age": "old"}], ["x"])


def test_threads_that_ask_at_once_get_their_own_row(tmp_path):
    scorer = Scorer(make_project(tmp_path).bundle)
    rows = make_columns(40, seed=4).to_rows()
    expected = [Scorer(scorer.bundle).explain_rows([row], ["x"])[0] for row in rows]
    wrong: list[int] = []
    ready = threading.Barrier(4)

    def ask(start: int) -> None:
        ready.wait(60)
        for i in [*range(start, 40), *range(start)] * 3:
            if scorer.explain_rows([rows[i]], ["x"])[0] != expected[i]:
                wrong.append(i)

    threads = [threading.Thread(target=ask, args=(10 * k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong and not any(thread.is_alive() for thread in threads)


# ---- the prepared calls of the library


@pytest.mark.parametrize("classes", [1, 3])
def test_a_prepared_call_has_the_bits_of_the_matrix_call(classes):
    text, X = train({"num_class": classes, "objective": "multiclass"} if classes > 1 else {"objective": "binary"})
    booster = NativeBooster(text)
    for kind in (RAW, CONTRIBUTIONS):
        single, whole = SingleRow(booster, kind), booster.predict(X, kind=kind)
        for row, expected in zip(X[:50], whole[:50], strict=True):
            found = single.ask(row)
            wanted = expected.T.ravel() if kind == CONTRIBUTIONS and classes > 1 else expected
            assert np.array_equal(found, np.ravel(wanted))


# ---- contributions beside the library's


def make_table(n: int = 500, seed: int = 0) -> np.ndarray:
    """Return four numbers, some of them missing or whole, and two categories."""
    rng = np.random.default_rng(seed)
    X = np.column_stack([rng.normal(size=(n, 3)), rng.integers(-3, 4, n), rng.integers(0, 6, n), rng.integers(0, 70, n)]).astype(float)
    X[rng.random(X.shape) < 0.1] = np.nan
    return X


def train(params: dict[str, Any], *, rounds: int = 15, seed: int = 0, fill: bool = False) -> tuple[str, np.ndarray]:
    X = make_table(seed=seed)
    if fill:
        X = np.nan_to_num(X)
    known = np.nan_to_num(X)
    score = known[:, 0] * known[:, 1] + (known[:, 4] == 2) + known[:, 5] % 3 + known[:, 3] / 3
    y = np.digitize(score, np.quantile(score, [0.4, 0.7])) if params.get("num_class", 1) > 1 else (score > 0.8).astype(int)
    if params.get("objective") == "regression":
        y = score
    data = lightgbm.Dataset(X, y, categorical_feature=[4, 5], free_raw_data=False)
    options = {"verbose": -1, "num_threads": 1, "min_data_in_leaf": 5, "min_data_per_group": 5, "cat_smooth": 1, **params}
    return lightgbm.train(options, data, rounds).model_to_string(), X


SHAPES: dict[str, dict[str, Any]] = {
    "binary": {"objective": "binary"},
    "classes": {"objective": "multiclass", "num_class": 3},
    "regression": {"objective": "regression"},
    "deep": {"objective": "regression", "num_leaves": 200, "min_data_in_leaf": 1},
    "stumps": {"objective": "binary", "num_leaves": 2},
    "one against all": {"objective": "multiclassova", "num_class": 3},
    "one category": {"objective": "binary", "max_cat_to_onehot": 100},
    "weighted": {"objective": "binary", "bagging_fraction": 0.5, "bagging_freq": 1},
    "dropped": {"objective": "binary", "boosting": "dart"},
}


@pytest.mark.parametrize("fill", [False, True], ids=["missing", "whole"])
@pytest.mark.parametrize("shape", list(SHAPES))
def test_contributions_are_the_librarys(shape, fill):
    text, X = train(SHAPES[shape], fill=fill)
    booster = NativeBooster(text)
    shap = TreeShap(text, booster)
    odd = np.array([[np.nan] * 6, [np.inf, -np.inf, 0.0, -0.0, 77.0, -1.0], [1e300, 5e-324, -1e-300, 0.5, -3.0, 69.0]])
    X = np.vstack([X[:150], make_table(50, seed=1), odd])
    for row, expected, margin in zip(X, booster.predict(X, kind=CONTRIBUTIONS), booster.predict(X, kind=RAW), strict=True):
        found = shap.contributions(row)
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() < 1e-11
        assert np.abs(found.sum(axis=0) - margin).max() < 1e-9


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_values_are_explained_as_the_library_explains_them(data):
    _, booster, shap = small()
    edges = [-1.0, 0.0, 1.0, np.nan, np.inf, -np.inf, *(value for _, states in shap._states for value in states.edges())]
    number = st.floats(width=64) | st.sampled_from(edges)
    level = st.integers(-2, 200).map(float) | st.just(np.nan)
    row = np.array([data.draw(number) for _ in range(4)] + [data.draw(level) for _ in range(2)])
    expected = booster.predict(row[np.newaxis], kind=CONTRIBUTIONS)[0]
    assert np.abs(shap.contributions(row) - expected).max() < 1e-11


_SMALL: list[Any] = []


def small() -> Any:
    if not _SMALL:
        text, _ = train(SHAPES["binary"])
        booster = NativeBooster(text)
        _SMALL.extend([text, booster, TreeShap(text, booster)])
    return _SMALL


def test_trees_that_never_split_are_their_base():
    X = np.zeros((50, 2))
    text = lightgbm.train({"verbose": -1, "objective": "regression"}, lightgbm.Dataset(X, np.arange(50.0)), 3).model_to_string()
    booster = NativeBooster(text)
    expected = booster.predict(X[:1], kind=CONTRIBUTIONS)[0]
    assert np.allclose(TreeShap(text, booster).contributions(X[0]), expected, atol=1e-12)


# ---- what is left to the library


@pytest.mark.parametrize(
    ("params", "why"),
    [
        ({"objective": "regression", "boosting": "rf", "bagging_fraction": 0.5, "bagging_freq": 1}, "averaged"),
        ({"objective": "binary", "zero_as_missing": True}, "zero"),
    ],
)
def test_other_forms_of_trees_are_left_to_the_library(params, why):
    text, _ = train(params)
    with pytest.raises(Unsuited, match=why):
        TreeShap(text, NativeBooster(text))


def test_linear_leaves_are_left_to_the_library():
    text, _ = train({"objective": "regression"})
    with pytest.raises(Unsuited, match="linear"):
        read_leaves(text.replace("is_linear=0", "is_linear=1"))


def test_what_comes_out_otherwise_is_never_used(monkeypatch):
    text, booster, _ = small()
    other, _ = train(SHAPES["binary"], seed=3)
    with pytest.raises(Unsuited, match="proof failed"):
        TreeShap(other, booster)
    real = read_leaves(text)
    empty = Leaf(0, 1.0, {0: Passage(share=0.0)})
    monkeypatch.setattr("ekiben.serving.scoring.treeshap.read_leaves", lambda text: ([*real[0], empty], *real[1:]))
    with pytest.raises(Unsuited, match="no training row"):
        TreeShap(text, booster)


@pytest.mark.parametrize("task", TASKS)
def test_where_it_is_not_used_the_library_explains(tmp_path, monkeypatch, task):
    monkeypatch.setattr(TreeShap, "MOST_TERMS", 10)
    scorer = Scorer(make_project(tmp_path, task=task).bundle)
    rows = make_columns(5, seed=9).to_rows()
    alone = [scorer.explain_rows([row], ["x"])[0] for row in rows]
    assert scorer.engine.explainer is None
    assert alone == scorer.explain_rows(rows, ["x"] * 5)


@pytest.mark.parametrize("task", TASKS)
def test_terms_that_miss_the_margin_are_left_to_the_library(tmp_path, monkeypatch, task):
    scorer = Scorer(make_project(tmp_path, task=task).bundle)
    rows = make_columns(5, seed=9).to_rows()
    real = TreeShap.contributions
    assert scorer.engine.explainer is not None
    monkeypatch.setattr(TreeShap, "contributions", lambda self, row: real(self, row) + 1e-9)
    assert [scorer.explain_rows([row], ["x"])[0] for row in rows] == scorer.explain_rows(rows, ["x"] * 5)
