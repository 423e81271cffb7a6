"""Models as ONNX graphs: the same leaves at every split, what cannot be said is refused, and the proof decides who serves."""

from __future__ import annotations

import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import bundles
import msgspec
import numpy as np
import pytest
from bundles import Project, make_columns, make_package, make_project

from ekiben import convert
from ekiben.convert import split_rows, to_onnx
from ekiben.errors import IntegrityError, RowError, ServiceError, SettingsError, UsageError
from ekiben.fitting import fit_lightgbm, fit_linear, fit_sklearn
from ekiben.models import SklearnModel
from ekiben.package import describe_bundle, make_bundle
from ekiben.records import Policy
from ekiben.pyfunc import requirements_of
from ekiben.runtimes import Choice, choose_runtime
from ekiben.serving.bundle import Bundle, Limits, Lineage
from ekiben.serving.scoring.onnx import OnnxEngine
from ekiben.serving.scoring.scorer import FEW, Scorer, self_test
from ekiben.trees import ZERO, read_lightgbm

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

CLASSES = {"binary": 2, "multiclass": 3, "regression": 0}
LEVELS = 70


@pytest.fixture
def written(monkeypatch):
    """Let the project's features be of the kind that is written out for single rows."""
    text = bundles.PREPARE
    for looks, written in (
        ('capital = np.array([place in CAPITALS for place in c["place"]], dtype=bool)', 'capital = np.isin(c["place"], CAPITALS)'),
        ('c["since"].astype("datetime64[Y]").astype(float) + 1970', 'year(c["since"])'),
        ("from ekiben.columns import Columns", "from ekiben.columns import Columns\nfrom ekiben.features import year"),
    ):
        assert looks in text
        text = text.replace(looks, written)
    monkeypatch.setattr(bundles, "PREPARE", text)


def make_matrix(n: int, *, gaps: bool = True, seed: int = 0) -> np.ndarray:
    """Numbers, rounded numbers, tiny numbers and category codes."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, 5))
    X[:, 1] = X[:, 1].round(1)
    X[:, 2] = rng.choice([0.0, ZERO, -ZERO, 1e-36, -1e-36, 2e-35, -2e-35, 1.0], n)
    X[:, 3] = rng.integers(0, LEVELS, n)
    if gaps:
        X[rng.random(X.shape) < 0.1] = np.nan
    return X


def make_answers(X: np.ndarray, task: str, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed + 1).normal(size=len(X))
    whole = np.nan_to_num(X)
    score = whole[:, 0] + whole[:, 1] + (whole[:, 2] > 0) + (whole[:, 3] % 7 == 2) + noise
    return score if task == "regression" else np.digitize(score, [0.5] if task == "binary" else [0.0, 1.0])


def engine_of(model: Any, width: int) -> OnnxEngine:
    return OnnxEngine(to_onnx(model, width).raw, model.task)


# --- LightGBM ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["binary", "multiclass", "regression"])
@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("categorical", [(), (3,)])
def test_lightgbm_takes_the_same_leaves_at_every_split(task, gaps, categorical):
    X = make_matrix(2000, gaps=gaps)
    y = make_answers(X, task)
    model = fit_lightgbm(X, y, task=task, n_classes=CLASSES[task], params={}, rounds=40, categorical=categorical)
    engine, rows = engine_of(model, 5), split_rows(model, X, most=20_000)
    assert len(rows) > 3000, "three rows for every split"
    holes = make_matrix(500, seed=1)
    holes[np.random.default_rng(2).random(holes.shape) < 0.4] = np.nan
    unseen = make_matrix(200, seed=3)
    unseen[:, 3] = np.random.default_rng(4).choice([-1, LEVELS, 95, 96, 1000, 1e9], 200)
    for given in (X, rows, holes, unseen):
        np.testing.assert_allclose(engine.predict(given), model.predict(given), rtol=1e-13, atol=1e-14)
    alone = np.array([engine.single()["finish"](tuple(row)) for row in rows[:300].tolist()])
    np.testing.assert_allclose(alone, model.predict(rows[:300]), rtol=1e-13, atol=1e-14)


def test_numbers_that_count_as_zero_go_where_zero_goes():
    x = np.repeat([-1.0, -2e-35, 0.0, 2e-35, 1.0], 200)[:, np.newaxis]
    y = np.repeat(np.arange(5.0), 200)
    model = fit_lightgbm(x, y, task="regression", n_classes=0, params={"min_child_samples": 5}, rounds=5)
    thresholds = read_lightgbm(model.booster_text).splits
    assert any(abs(t) <= 2 * ZERO for t in thresholds), "a split beside zero is what this is about"
    near = [0.0, ZERO, 5e-324, 1e-36, np.nextafter(ZERO, 1), 1.1e-35, 2e-35]
    given = np.array([*near, *(-v for v in near)])[:, np.newaxis]
    assert engine_of(model, 1).predict(given).tolist() == model.predict(given).tolist()


def test_a_model_of_single_leaves_is_a_constant():
    X = make_matrix(50)
    params = {"min_child_samples": 100}
    model = fit_lightgbm(X, make_answers(X, "regression"), task="regression", n_classes=0, params=params, rounds=3)
    assert np.allclose(engine_of(model, 5).predict(X), model.predict(X), rtol=1e-15)


@pytest.mark.parametrize(
    ("params", "what"),
    [
        ({"objective": "poisson"}, "objective `poisson`"),
        ({"zero_as_missing": True}, "zero_as_missing"),
        ({"linear_tree": True}, "linear trees"),
        ({"reg_sqrt": True}, "sqrt"),
        ({"boosting": "rf", "bagging_freq": 1, "bagging_fraction": 0.5}, "averaged trees"),
    ],
)
def test_what_would_mean_something_else_is_refused(params, what):
    X = make_matrix(300, gaps=False)
    y = np.abs(make_answers(X, "regression"))
    model = fit_lightgbm(X, y, task="regression", n_classes=0, params=params, rounds=5)
    with pytest.raises(UsageError, match=what):
        to_onnx(model, 5)


# --- scikit-learn -----------------------------------------------------------------------------------------------------

BOTH = (
    "RandomForest", "ExtraTrees", "GradientBoosting", "HistGradientBoosting", "AdaBoost", "DecisionTree", "ExtraTree",
    "KNeighbors", "MLP",
)  # fmt: skip


def find_kind(name: str) -> Any:
    import sklearn.ensemble
    import sklearn.linear_model
    import sklearn.neighbors
    import sklearn.neural_network
    import sklearn.tree

    parts = (sklearn.ensemble, sklearn.linear_model, sklearn.neighbors, sklearn.neural_network, sklearn.tree)
    return next(getattr(part, name) for part in parts if hasattr(part, name))


def zoo() -> list[tuple[str, str]]:
    ends = {"binary": "Classifier", "multiclass": "Classifier", "regression": "Regressor"}
    linear = [("LogisticRegression", "binary"), ("LogisticRegression", "multiclass"), ("Ridge", "regression"), ("Lasso", "regression")]
    return [*((f"{name}{end}", task) for name in BOTH for task, end in ends.items()), *linear]


def fit_kind(name: str, task: str, X: np.ndarray, categorical: tuple[int, ...]) -> SklearnModel:
    kind = find_kind(name)
    params = {"n_estimators": 10} if "n_estimators" in kind().get_params() else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fit_sklearn(
            kind(**params), X, make_answers(X, task), task=task, n_classes=CLASSES[task], categorical=categorical,
            n_levels=(LEVELS,) * len(categorical),
        )  # fmt: skip


@pytest.mark.parametrize(("name", "task"), zoo())
@pytest.mark.parametrize("categorical", [(), (3,)], ids=["numbers", "categories"])
def test_an_estimator_with_gaps_and_categories_is_the_same_as_a_graph(name, task, categorical):
    X = make_matrix(300)
    model = fit_kind(name, task, X, categorical)
    engine = engine_of(model, 5)
    rows = np.concatenate([X, split_rows(model, X, most=600)])
    off = 1e-6 if name.startswith("AdaBoost") else 1e-12  # skl2onnx has float32 only for sums of trees
    np.testing.assert_allclose(engine.predict(rows), model.predict(rows), rtol=off, atol=off)


def test_an_endless_conversion_is_not_begun():
    X = make_matrix(300)
    model = fit_kind("BaggingClassifier", "binary", X, ())
    with pytest.raises(UsageError, match="splits on missing values alone"):
        to_onnx(model, 5)


@pytest.mark.parametrize("name", ["HistGradientBoostingRegressor", "GradientBoostingRegressor"])
def test_a_loss_without_a_plain_sum_is_refused(name):
    X = make_matrix(200, gaps=False)
    kind = find_kind(name)
    if name.startswith("Hist"):
        fitted, what = kind(loss="poisson", max_iter=3).fit(X, np.abs(X[:, 0])), "loss `poisson`"
    else:
        fitted, what = kind(init=find_kind("Ridge")(), n_estimators=3).fit(X, X[:, 0]), "another estimator"
    with pytest.raises(UsageError, match=what):
        to_onnx(SklearnModel(fitted, "regression", 0), 5)


# --- in a bundle ------------------------------------------------------------------------------------------------------


def choose(folder: Path, project: Project, asked: str = "auto", **changes: Any) -> tuple[Bundle, Choice]:
    """Choose a runtime as the packaging step does."""
    parts = {"model": project.model, "policy": project.policy, **changes}
    held_out = make_columns(300, seed=3)
    matrix = project.preprocessor.transform(project.features(held_out.pick([f.name for f in project.schema.inputs])))
    prediction = parts["model"].predict(matrix)
    policy = parts["policy"]
    return choose_runtime(
        asked, parts["model"],
        lambda model, said: make_bundle(
            folder / model.runtime, name="census", package="census", package_root=make_package(folder), schema=project.schema,
            preprocessor=project.preprocessor, model=model, policy=policy, sample=held_out, lineage=Lineage(),
            limits=Limits(), runtimes=said,
        ),
        columns=held_out, matrix=matrix, prediction=prediction,
        decision=policy.decide(prediction, held_out[policy.group_by] if policy.group_by else None),
    )  # fmt: skip


@pytest.mark.parametrize("task", ["binary", "multiclass", "regression"])
def test_an_estimator_is_served_through_its_graph(tmp_path, written, task):
    project = make_project(tmp_path, runtime="python", task=task)
    bundle, choice = choose(tmp_path, project)
    assert (choice.runtime, bundle.info.runtime) == ("onnx", "onnx") and "times `python`" in choice.why
    assert choice.taken.proof.is_proved and choice.taken.proof.changed_decisions == 0 and choice.taken.proof.split_rows > 0
    assert {c["runtime"]: c["serves"] for c in bundle.runtimes} == {"python": False, "onnx": True}
    scorer = Scorer(bundle)
    assert scorer.lane.is_compiled and self_test(scorer) == 8
    assert [r.partition("==")[0] for r in requirements_of(bundle)] == ["msgspec", "numpy", "onnxruntime"]
    with pytest.raises(ServiceError, match="no exact contributions"):
        scorer.explain_rows([bundle.examples[0].row], ["a"])


@pytest.mark.parametrize("runtime", ["lightgbm", "linear"])
def test_what_keeps_every_bit_is_preferred_and_the_others_are_shown(tmp_path, runtime):
    project = make_project(tmp_path, runtime=runtime)
    bundle, choice = choose(tmp_path, project)
    assert (bundle.info.runtime, choice.why) == (runtime, "the same bits")
    no_graph = "" if runtime == "lightgbm" else "a model of runtime `linear` has no ONNX form here"
    assert {c.runtime: c.refused for c in choice.candidates} == {runtime: "", "onnx": no_graph, "python": ""}
    assert msgspec.json.decode(choice.to_json(), type=Choice) == choice
    assert f"`{runtime}` serves: the same bits." in choice._repr_markdown_()


@pytest.mark.parametrize("asked", ["onnx", "python"])
def test_a_runtime_can_be_asked_for(tmp_path, asked):
    project = make_project(tmp_path)
    bundle, choice = choose(tmp_path, project, asked)
    assert (bundle.info.runtime, choice.why, len(choice.candidates)) == (asked, "as asked", 1)
    own = Scorer(project.bundle).score_columns(make_columns(50, seed=9))
    other = Scorer(bundle).score_columns(make_columns(50, seed=9))
    np.testing.assert_allclose(other[0], own[0], rtol=1e-13)
    assert other[1].tolist() == own[1].tolist()


def test_a_runtime_that_does_not_fit_the_model_is_named(tmp_path):
    project = make_project(tmp_path, runtime="linear")
    with pytest.raises(SettingsError, match="can be served by linear, onnx, python"):
        choose(tmp_path, project, "lightgbm")
    with pytest.raises(IntegrityError, match=r"`runtime = onnx` cannot serve this model: .* no ONNX form"):
        choose(tmp_path, project, "onnx")


def round_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the conversion round thresholds to float32, as the usual converters do."""
    add = convert.add_trees

    def add_rounded(graph: Any, x: str, trees: Any) -> str:
        trees.splits = np.float32(trees.splits).astype(float).tolist()
        return add(graph, x, trees)

    monkeypatch.setattr(convert, "add_trees", add_rounded)


def test_a_conversion_that_rounds_thresholds_is_refused_with_figures(tmp_path, monkeypatch):
    round_splits(monkeypatch)
    project = make_project(tmp_path, runtime="python")
    bundle, choice = choose(tmp_path, project)
    assert (bundle.info.runtime, choice.why) == ("python", "the only one that was proved")
    onnx = next(c for c in choice.candidates if c.runtime == "onnx")
    assert "answers differ, by at most" in onnx.refused and onnx.proof.largest_difference > 1e-6
    figures = r"`runtime = onnx` cannot serve .* answers differ, by at most 0\.\d+ \(allowed 1e-06\)"
    with pytest.raises(IntegrityError, match=figures):
        choose(tmp_path, project, "onnx")


class Own:
    """An estimator of the user's own."""

    def predict_proba(self, X: np.ndarray) -> np.ndarray:
        return np.full((len(X), 2), 0.5)


def test_an_estimator_that_nothing_takes_says_every_reason(tmp_path):
    project = make_project(tmp_path, runtime="python")
    with pytest.raises(IntegrityError, match=r"no runtime can serve this model: python: .*belongs to no package.*onnx: skl2onnx does not convert Own"):
        choose(tmp_path, project, model=SklearnModel(Own(), "binary", 2))


def test_thresholds_for_groups_are_kept_by_every_runtime(tmp_path):
    policy = Policy(task="binary", threshold=0.5, group_by="sex", thresholds={"F": 0.2, "M": 0.8})
    project = make_project(tmp_path, runtime="python", policy=policy)
    bundle, choice = choose(tmp_path, project)
    assert choice.runtime == "onnx"
    row = {name: None for name in ("age", "income", "job", "place", "member", "since")}
    scorer = Scorer(bundle)
    for _ in range(3):
        labels = [scorer.score_rows([{**row, "sex": sex}])[0].label for sex in ("F", "M")]
        share = scorer.score_row({**row, "sex": "F"}).probability
        assert labels == [("no", "yes")[share >= 0.2], ("no", "yes")[share >= 0.8]]


def test_times_do_not_change_what_a_bundle_is(tmp_path):
    project = make_project(tmp_path)
    first, second = (choose(tmp_path / name, project)[0] for name in "ab")
    assert first.digest == second.digest and describe_bundle(first) == describe_bundle(second)


# --- the engine -------------------------------------------------------------------------------------------------------


def test_the_serving_process_imports_neither_scikit_learn_nor_the_converters(tmp_path):
    project = make_project(tmp_path, runtime="python")
    bundle, _ = choose(tmp_path, project, "onnx")
    code = (
        "import sys; from pathlib import Path\n"
        "from ekiben.serving.bundle import load_bundle; from ekiben.serving.scoring.scorer import Scorer\n"
        f"bundle = load_bundle(Path({str(bundle.folder)!r})); Scorer(bundle).score_rows([bundle.examples[0].row])\n"
        "never = {'sklearn', 'pandas', 'scipy', 'skops', 'onnx', 'skl2onnx', 'mlflow', 'lightgbm', 'optuna'}\n"
        "print(sorted(never & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("raw", [b"", b"not a model", b"\x08\x0a" + b"\xff" * 40])
def test_what_is_no_model_is_refused(raw):
    with pytest.raises(IntegrityError, match="not a model that ONNX Runtime takes"):
        OnnxEngine(raw, "binary")


def test_a_cut_off_model_is_refused():
    X = make_matrix(200)
    raw = to_onnx(fit_lightgbm(X, make_answers(X, "binary"), task="binary", n_classes=2, params={}, rounds=5), 5).raw
    for cut in (len(raw) // 3, len(raw) - 1):
        with pytest.raises(IntegrityError):
            OnnxEngine(raw[:cut], "binary")


def test_threads_share_a_session():
    X = make_matrix(400)
    model = fit_lightgbm(X, make_answers(X, "binary"), task="binary", n_classes=2, params={}, rounds=20)
    engine = engine_of(model, 5)
    finish, rows = engine.single()["finish"], X.tolist()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda row: finish(tuple(row)), rows))
    np.testing.assert_allclose(found, model.predict(X), rtol=1e-13)


# --- few rows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("runtime", ["lightgbm", "linear"])
@pytest.mark.parametrize("task", ["binary", "multiclass", "regression"])
def test_a_request_of_few_rows_has_the_bits_of_the_batch(tmp_path, written, runtime, task):
    scorer = Scorer(make_project(tmp_path, runtime=runtime, task=task).bundle)
    people = make_columns(FEW + 1, seed=5).pick([f.name for f in scorer.request_schema.inputs])
    rows = msgspec.json.decode(msgspec.json.encode(people.to_rows()))
    whole = scorer.score_rows(rows)
    assert scorer.lane.is_compiled
    for n in (2, 7, FEW):
        assert scorer.score_rows(rows[:n]) == whole[:n]


def test_the_error_of_few_rows_names_the_row(tmp_path, written):
    scorer = Scorer(make_project(tmp_path).bundle)
    good = scorer.bundle.examples[0].row
    with pytest.raises(RowError, match="row 2"):
        scorer.score_rows([good, good, {**good, "age": "forty"}])


def test_a_linear_model_says_why_it_has_no_graph():
    X = make_matrix(100, gaps=False)
    with pytest.raises(UsageError, match="`linear` has no ONNX form"):
        to_onnx(fit_linear(X, make_answers(X, "regression"), task="regression", n_classes=0), 5)
