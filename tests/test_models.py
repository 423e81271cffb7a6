"""Models: the same bits for one row and a batch, before and after storing, and in another process."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neighbors import KNeighborsClassifier
from sklearn.svm import LinearSVC
from sklearn.tree import DecisionTreeRegressor

from ekiben.errors import IntegrityError, UsageError
from ekiben.fitting import _design, fit_lightgbm, fit_linear, fit_sklearn, lightgbm_params
from ekiben.models import LinearModel, Model, SklearnModel, load_model, to_probability
from ekiben.trusted import TRUSTED_TYPES

TASKS = {"binary": 2, "multiclass": 3, "regression": 0}


def make_rows(task, n=500, seed=0):
    """Return two numbers and a category of three levels, with gaps, and a target that depends on both."""
    random = np.random.default_rng(seed)
    X = np.column_stack([random.normal(size=n), random.normal(50, 9, n), random.integers(0, 3, n)]).astype(float)
    X[random.random(X.shape) < 0.1] = np.nan
    score = np.nan_to_num(X[:, 0]) + (X[:, 2] == 1) + 0.5 * random.normal(size=n)
    if task == "regression":
        return X, 100 * score
    return X, np.digitize(score, [0.3] if task == "binary" else [-0.2, 0.8]).astype(np.int64)


def make_model(kind, task):
    X, y = make_rows(task)
    given = {"task": task, "n_classes": TASKS[task], "categorical": [2]}
    if kind == "lightgbm":
        return fit_lightgbm(X, y, params={"num_leaves": 7, "feature_fraction": 0.7}, rounds=15, **given)
    return fit_linear(X, y, n_levels=[3], **given)


MODELS = [(kind, task) for kind in ("lightgbm", "linear") for task in TASKS]


@pytest.mark.parametrize(("kind", "task"), MODELS)
def test_a_row_has_the_bits_of_its_batch_of_any_size(kind, task):
    model = make_model(kind, task)
    X = np.vstack([make_rows(task, 300, seed=1)[0], [[np.nan] * 3, [1e300, -1e300, 7.0], [0.0, 0.0, 1.0]]])
    for method in (model.predict, model.margin, model.contributions):
        whole = method(X)
        for size in (1, 2, 7, 64, 65, 200):
            parts = np.concatenate([method(X[i : i + size]) for i in range(0, len(X), size)])
            assert parts.tobytes() == whole.tobytes(), (method, size)
        assert method(np.asfortranarray(X)).tobytes() == whole.tobytes()
        assert method(X[::2]).tobytes() == np.ascontiguousarray(whole[::2]).tobytes()


@pytest.mark.parametrize(("kind", "task"), MODELS)
def test_predictions_have_the_shape_and_range_of_their_task(kind, task):
    model, (X, _) = make_model(kind, task), make_rows(task)
    found = model.predict(X)
    assert isinstance(model, Model) and (model.runtime, model.task, model.classes_n) == (kind, task, TASKS[task])
    assert found.shape == ((len(X), 3) if task == "multiclass" else (len(X),)) and found.dtype == np.float64
    if task != "regression":
        assert (found >= 0).all() and (found <= 1).all()
    if task == "multiclass":
        assert np.allclose(found.sum(axis=1), 1, atol=1e-12)


@pytest.mark.parametrize(("kind", "task"), MODELS)
def test_contributions_add_up_to_the_margin_and_the_margin_gives_the_prediction(kind, task):
    model, (X, _) = make_model(kind, task), make_rows(task)
    parts = model.contributions(X)
    assert parts.shape == ((len(X), 4, 3) if task == "multiclass" else (len(X), 4))
    assert np.allclose(parts.sum(axis=1), model.margin(X), rtol=1e-9, atol=1e-9)
    margin = model.margin(X)
    assert np.allclose(margin if task == "regression" else to_probability(margin), model.predict(X), atol=1e-12)


@pytest.mark.parametrize(("kind", "task"), MODELS)
def test_a_stored_model_is_the_same_model(kind, task):
    model, (X, _) = make_model(kind, task), make_rows(task, 200, seed=2)
    files = model.to_files()
    assert all(isinstance(raw, bytes) for raw in files.values())
    read = load_model(files)
    assert read == model and read.to_files() == files
    assert read.predict(X).tobytes() == model.predict(X).tobytes()


@pytest.mark.parametrize(("kind", "task"), MODELS)
def test_fitting_again_gives_the_same_bytes(kind, task):
    assert make_model(kind, task).to_files() == make_model(kind, task).to_files()


@pytest.mark.parametrize("kind", ["lightgbm", "linear"])
def test_another_process_fits_the_same_bytes(kind):
    code = (
        "import sys, hashlib; sys.path.insert(0, sys.argv[1]); import test_models as t; "
        f"files = t.make_model({kind!r}, 'binary').to_files(); "
        "print(hashlib.sha256(b''.join(files[k] for k in sorted(files))).hexdigest())"
    )
    from pathlib import Path

    run = subprocess.run([sys.executable, "-c", code, str(Path(__file__).parent)], capture_output=True, text=True, check=True)
    files = make_model(kind, "binary").to_files()
    assert run.stdout.strip() == hashlib.sha256(b"".join(files[k] for k in sorted(files))).hexdigest()


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("weighted", [False, True])
def test_the_linear_model_is_scikit_learns_to_the_last_digits(task, weighted):
    X, y = make_rows(task)
    weight = np.random.default_rng(5).random(len(y)) + 0.5 if weighted else None
    model = fit_linear(X, y, task=task, n_classes=TASKS[task], categorical=[2], n_levels=[3], weight=weight, C=0.5)
    design, _ = _design(X, [2], [3])
    if task == "regression":
        reference = Ridge(alpha=2.0, solver="sparse_cg", tol=1e-10).fit(design, y, sample_weight=weight)
        assert np.allclose(model.predict(X), reference.predict(design), rtol=1e-9, atol=1e-9)
        dense = Ridge(alpha=2.0, solver="cholesky").fit(design.toarray(), y, sample_weight=weight)
        assert np.allclose(model.predict(X), dense.predict(design.toarray()), rtol=1e-4, atol=1e-3)
    else:
        reference = LogisticRegression(C=0.5, max_iter=300).fit(design, y, sample_weight=weight)
        expected = reference.predict_proba(design)
        assert np.abs(model.predict(X) - (expected[:, 1] if task == "binary" else expected)).max() < 1e-9


@pytest.mark.parametrize("kind", ["lightgbm", "linear"])
def test_weights_count_as_repeated_rows_and_change_the_model(kind):
    X, y = make_rows("binary")
    weight = np.where(y == 1, 3.0, 1.0)
    given = {"task": "binary", "n_classes": 2, "categorical": [2]}
    extra = {"params": {"num_leaves": 7}, "rounds": 15} if kind == "lightgbm" else {"n_levels": [3]}
    fit = fit_lightgbm if kind == "lightgbm" else fit_linear
    assert fit(X, y, weight=weight, **given, **extra).predict(X).mean() > fit(X, y, **given, **extra).predict(X).mean() + 0.1


def test_a_constant_and_an_empty_column_do_no_harm():
    X, y = make_rows("binary")
    X = np.column_stack([X, np.full(len(X), 3.0), np.full(len(X), np.nan)])
    for model in (
        fit_linear(X, y, task="binary", n_classes=2, categorical=[2], n_levels=[3]),
        fit_lightgbm(X, y, task="binary", n_classes=2, categorical=[2], params={}, rounds=5),
    ):
        assert np.isfinite(model.predict(X)).all() and model.contributions(X).shape == (len(X), 6)


def test_what_makes_training_repeatable_cannot_be_taken_away_by_parameters():
    params = lightgbm_params({"deterministic": False, "seed": 9, "num_leaves": 5, "num_threads": 64}, task="multiclass", n_classes=4, seed=1)
    assert params["deterministic"] is True and params["seed"] == 1 and params["num_threads"] == 2
    assert params["num_leaves"] == 5 and params["num_class"] == 4 and params["objective"] == "multiclass"


@given(st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=20))
def test_a_probability_stays_between_0_and_1_and_grows_with_its_score(scores):
    found = to_probability(np.sort(np.array(scores)))
    assert ((found >= 0) & (found <= 1)).all() and (np.diff(found) >= 0).all()


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1))
def test_a_softmax_sums_to_one_and_keeps_the_order(seed):
    scores = np.random.default_rng(seed).normal(0, 300, (5, 4))
    found = to_probability(scores)
    assert np.allclose(found.sum(axis=1), 1) and (found.argmax(axis=1) == scores.argmax(axis=1)).all()


@pytest.mark.parametrize("task", TASKS)
def test_any_estimator_is_fitted_stored_and_read_back(task):
    X, y = make_rows(task)
    estimator = DecisionTreeRegressor(max_depth=4) if task == "regression" else RandomForestClassifier(n_estimators=5)
    given = {"task": task, "n_classes": TASKS[task], "categorical": [2], "n_levels": [3]}
    model = fit_sklearn(estimator, X, y, np.ones(len(y)), **given)
    read = load_model(model.to_files())
    assert read.runtime == "python" and read.predict(X).tobytes() == model.predict(X).tobytes()
    again = fit_sklearn(estimator, X, y, np.ones(len(y)), **given)
    assert again.predict(X).tobytes() == model.predict(X).tobytes() and not hasattr(estimator, "tree_")
    assert model.margin(X).shape == model.predict(X).shape


def test_an_estimator_that_refuses_missing_values_gets_them_filled():
    X, y = make_rows("binary")
    model = fit_sklearn(KNeighborsClassifier(), X, y, task="binary", n_classes=2)
    assert np.isfinite(model.predict(X)).all()


def test_what_an_estimator_cannot_do_is_said_clearly():
    X, y = make_rows("binary")
    with pytest.raises(UsageError, match="LinearSVC gives no probabilities"):
        SklearnModel(LinearSVC(), "binary", 2)
    with pytest.raises(UsageError, match="KNeighborsClassifier takes no sample weights"):
        fit_sklearn(KNeighborsClassifier(), X, y, np.ones(len(y)), task="binary", n_classes=2)
    forest = fit_sklearn(RandomForestClassifier(n_estimators=2), X, y, task="binary", n_classes=2)
    assert not forest.has_contributions
    with pytest.raises(UsageError, match=r"the python runtime \(RandomForestClassifier\) has no exact contributions"):
        forest.contributions(X)


def test_the_types_that_ekiben_itself_vouches_for_are_of_the_libraries_that_it_knows():
    assert all(name.split(".")[0] in ("collections", "lightgbm", "numpy", "scipy", "sklearn") for name in TRUSTED_TYPES)


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"model.json": b"{}"},
        {"model.json": b"not json"},
        {"model.json": b'{"runtime":"linear","task":"binary","classes_n":2}'},
        {"model.json": b'{"runtime":"linear","task":"binary","classes_n":2}', "linear.json": b"[]"},
        {"model.json": b'{"runtime":"pickle","task":"binary","classes_n":2}'},
    ],
)
def test_files_that_are_no_model_are_refused(files):
    with pytest.raises(IntegrityError):
        load_model(files)


def test_a_linear_model_is_plain_json_and_knows_nothing_of_scikit_learn():
    raw = make_model("linear", "multiclass").to_files()["linear.json"]
    assert LinearModel.from_json(raw).to_json() == raw and b"sklearn" not in raw
