"""The held-out evaluation: slices that chance cannot fake, stresses, explanations that add up, and its notebook."""

import ast
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ekiben import step
from ekiben.columns import Columns
from ekiben.encoding import fit_preprocessor
from ekiben.errors import UsageError
from ekiben.evaluate import explain, pictures, robustness, tables
from ekiben.evaluate.answers import Answers, answer_with
from ekiben.evaluate.quality import compare, conformal_width, coverage_measure, value_measures
from ekiben.evaluate.slices import cut_column, find_slices, measure_slices
from ekiben.fitting import fit_lightgbm, fit_linear
from ekiben.models import SklearnModel
from ekiben.profile import profile_of
from ekiben.records import Field, Judgement, Policy, Schema


def shop(n=2000, seed=0):
    rng = np.random.default_rng(seed)
    town = rng.choice(["north", "south", "east"], n).astype(object)
    town[rng.random(n) < 0.05] = None
    age = rng.uniform(18, 80, n).round()
    return Columns({"age": age, "town": town, "seen": np.datetime64("2024-01-01", "us") + rng.integers(0, 500, n) * np.timedelta64(1, "D")})


def answers_of(task, n=600, seed=0):
    rng = np.random.default_rng(seed)
    if task == "regression":
        y = rng.gamma(4, 10, n)
        p = y + rng.normal(0, 5, n)
        return Answers(y, p, p, task)
    if task == "binary":
        p = rng.beta(1, 2, n)
        y = (rng.random(n) < p).astype(int)
        return Answers(y, p, (p >= 0.5).astype(int), task, ("no", "yes"))
    p = rng.dirichlet([1, 1, 1], n)
    y = np.array([rng.choice(3, p=row) for row in p])
    return Answers(y, p, p.argmax(axis=1), task, ("a", "b", "c"))


# quality and value


def test_a_conformal_range_covers_what_it_promises_on_rows_like_the_training_rows():
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(200):
        noise = rng.standard_t(3, 400)
        width = conformal_width(noise[:200], np.zeros(200), 0.9)
        covered.append(np.mean(np.abs(noise[200:]) <= width))
    assert np.mean(covered) == pytest.approx(0.9, abs=0.01)


def test_rows_without_an_out_of_fold_prediction_are_left_out_of_the_range():
    y, oof = np.arange(20.0), np.r_[np.full(10, np.nan), np.arange(10.0, 20.0) + 1]
    assert conformal_width(y, oof, 0.5) == 1.0
    with pytest.raises(UsageError, match="more than 10 out-of-fold rows"):
        conformal_width(y, oof, 0.99)


def test_coverage_is_measured_not_assumed():
    answers = Answers(np.array([0.0, 10.0]), np.array([1.0, 1.0]), np.array([1.0, 1.0]), "regression")
    measure = coverage_measure(answers, 2.0)
    assert measure.value == 0.5 and measure.low < 0.1 and measure.high > 0.9


def test_value_is_what_the_counts_say_and_always_no_is_worth_nothing():
    y, decision = np.array([1, 1, 1, 0, 0, 0, 0, 0]), np.array([1, 1, 0, 1, 0, 0, 0, 0])
    others = {"always no": np.zeros(8, int), "always yes": np.ones(8, int)}
    ours, no, yes = value_measures(y, decision, others, lambda tp, fp, fn, tn: 10 * tp - 4 * fp)
    assert ours.value == pytest.approx((20 - 4) / 8)
    assert no.value == pytest.approx(2.0) and yes.value == pytest.approx(2.0 - (30 - 20) / 8)
    assert no.label == "value_gain[always no]"


def test_the_interval_of_a_value_is_that_of_a_mean():
    answers = answers_of("binary", 4000)
    ours = value_measures(answers.y, answers.decision, {}, lambda tp, fp, fn, tn: 3 * tp - fp)[0]
    rows = np.where(answers.decision == 1, np.where(answers.y == 1, 3, -1), 0)
    assert (ours.high - ours.low) / 3.92 == pytest.approx(rows.std() / np.sqrt(4000), rel=0.1)


def test_a_regression_is_compared_by_who_comes_closer():
    y = np.arange(30.0)
    near, far = Answers(y, y + 1, y + 1, "regression"), Answers(y, y + 5, y + 5, "regression")
    found = compare(near, far, resamples=50)
    assert (found.only_ours, found.only_other) == (30, 0) and found.p_value < 1e-6
    assert next(m for m in found.gains if m.name == "mae_gain").value == 4


def test_answers_of_different_lengths_are_refused():
    with pytest.raises(UsageError, match="3 truths, 2 predictions"):
        Answers(np.zeros(3, int), np.zeros(2), np.zeros(2, int), "binary")


def test_verdicts_are_said_in_plain_words():
    line = Judgement(name="auc >= 0.9", metric="auc", slice="", op=">=", limit=0.9, value=0.8, low=0.7, high=0.85, verdict="fail",
                     blocking=True, waived="agreed with Ann")  # fmt: skip
    assert tables.verdict_words(line) == "fails: surely not above 0.9, waived: agreed with Ann"
    gone = Judgement(name="p99_ms <= 5", metric="p99_ms", slice="", op="<=", limit=5, value=None, low=None, high=None,
                     verdict="insufficient", blocking=False)  # fmt: skip
    assert "not measured" in tables.verdict_words(gone)
    assert list(tables.judgement_table([gone, line]).index) == ["auc >= 0.9", "p99_ms <= 5"]


# slices


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.none(), st.floats(-50, 50, width=16)), min_size=1, max_size=60), st.booleans())
def test_a_number_is_cut_into_parts_that_hold_every_row_once(values, whole):
    array = np.array([np.nan if v is None else round(v) if whole else v for v in values])
    codes, labels = cut_column("x", array, "number")
    assert codes.min() >= 0 and codes.max() < len(labels) and len(set(labels)) == len(labels)
    known = ~np.isnan(array)
    order = np.argsort(array[known], kind="stable")
    assert (np.diff(codes[known][order]) >= 0).all()
    assert all(labels[c] == "x is missing" for c in codes[~known])


def test_labels_say_which_rows_they_hold():
    codes, labels = cut_column("age", np.arange(20.0), "number")
    assert labels == ["age up to 4", "age 5 to 9", "age 10 to 14", "age 15 and more"]
    assert [int(np.min(np.arange(20)[codes == k])) for k in range(4)] == [0, 5, 10, 15]
    codes, labels = cut_column("gain", np.r_[np.zeros(90), np.arange(1.0, 11)], "number")
    assert labels[0] == "gain is 0" and (codes == 0).sum() == 90


def test_the_planted_corner_is_found_with_its_rows():
    table, rng = shop(6000), np.random.default_rng(1)
    corner = (table["town"] == "east") & (table["age"] >= 65)
    wrong = (rng.random(6000) < np.where(corner, 0.4, 0.1)).astype(float)
    worst = find_slices(table, wrong).slices[0]
    assert worst.is_worse and "town is east" in worst.name and "age" in worst.name
    assert worst.value == pytest.approx(0.4, abs=0.1) and worst.rest == pytest.approx(0.1, abs=0.03)


@pytest.mark.parametrize("shape", ["share", "number"])
def test_chance_is_called_worse_in_at_most_one_search_of_twenty(shape):
    alarms = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        losses = (rng.random(1500) < 0.15) * 1.0 if shape == "share" else rng.exponential(size=1500)
        alarms += any(s.is_worse for s in find_slices(shop(1500, seed), losses).slices)
    assert alarms <= 6


def test_the_order_of_rows_does_not_change_the_slices():
    table, rng = shop(3000), np.random.default_rng(2)
    losses = (rng.random(3000) < np.where(table["town"] == "north", 0.3, 0.1)) * 1.0
    order = rng.permutation(3000)
    first, second = find_slices(table, losses), find_slices(table.rows(order), losses[order])
    assert [(s.name, s.rows, s.value) for s in first.slices] == [(s.name, s.rows, s.value) for s in second.slices]


def test_too_few_rows_to_cut_give_no_slices_and_no_error():
    found = find_slices(shop(20), np.ones(20))
    assert found.slices == () and found.tested == 0


def test_own_slices_are_measured_as_declared_and_wrong_masks_refused():
    losses = np.r_[np.ones(50), np.zeros(150)]
    found = measure_slices({"first": np.arange(200) < 50, "nobody": np.zeros(200, bool)}, losses)
    assert [(s.name, s.rows, s.value, s.rest) for s in found] == [("first", 50, 1.0, 0.0)] and found[0].is_worse
    with pytest.raises(UsageError, match="slice `odd` must be 200 truth values"):
        measure_slices({"odd": np.arange(200)}, losses)


# robustness


def test_noise_keeps_gaps_whole_numbers_ranges_and_the_usual_value():
    rng = np.random.default_rng(0)
    table = Columns({"age": np.r_[np.nan, rng.integers(18, 80, 999)], "gain": np.r_[np.zeros(900), rng.uniform(1, 9, 100)]})
    noisy = robustness.add_noise(table, ["age", "gain"], 0.2, rng)
    age = noisy["age"]
    assert np.isnan(age[0]) and (age[1:] == age[1:].round()).all() and age[1:].min() >= 18 and age[1:].max() <= 79
    assert (age[1:] != table["age"][1:]).mean() > 0.5
    assert (noisy["gain"][:900] == 0).all() and (noisy["gain"][900:] != table["gain"][900:]).any()


def test_flips_touch_the_share_they_say_and_only_named_columns():
    table = shop(5000)
    flipped = robustness.flip_values(table, ["town"], 0.3, np.random.default_rng(0))
    assert 0.15 < np.mean(flipped["town"] != table["town"]) < 0.25
    assert flipped.drop("town").equals(table.drop("town"))


def test_a_missing_column_is_missing_in_every_row_and_of_its_kind():
    table = shop(10)
    for name in table:
        gone = robustness.drop_values(table, name)
        assert gone.kinds == table.kinds and gone[name].dtype == table[name].dtype
        assert all(v is None or v != v for v in gone[name].tolist())


@pytest.mark.parametrize("task", ["binary", "multiclass", "regression"])
def test_only_the_inputs_that_matter_hurt(task):
    table = shop(1500)
    base = np.nan_to_num(table["age"]) / 40 - 1.2
    truth = {"binary": (base > 0).astype(int), "multiclass": np.digitize(base, [-0.3, 0.3]), "regression": base}[task]

    def answer(columns):
        x = np.where(np.isnan(columns["age"]), 0.0, columns["age"] / 40 - 1.2)
        if task == "regression":
            return x, x
        p = 1 / (1 + np.exp(-4 * x))
        if task == "binary":
            return p, (p >= 0.5).astype(int)
        p = np.column_stack([(1 - p) ** 2, 2 * p * (1 - p), p**2])
        return p, p.argmax(axis=1)

    found = {s.name: s for s in robustness.stress_inputs(answer, table, truth, task)}
    assert found["age missing"].low > 0 and found["age missing"].changed > 0.2
    assert found["town missing"].harm == 0 and found["town missing"].changed == 0
    harms = [found[f"numbers ± {v} of their spread"].harm for v in ("1%", "10%")]
    assert 0 <= harms[0] <= harms[1]


# explanations


def fitted(task):
    rng = np.random.default_rng(0)
    X = np.column_stack([rng.normal(size=800), rng.integers(0, 3, 800), rng.normal(size=800)])
    score = X[:, 0] + (X[:, 1] == 2) + rng.normal(0, 0.3, 800)
    y = {"binary": (score > 0).astype(int), "multiclass": np.digitize(score, [0, 1]), "regression": score}[task]
    return X, y, {"task": task, "n_classes": {"binary": 2, "multiclass": 3, "regression": 0}[task]}


@pytest.mark.parametrize("task", ["binary", "multiclass", "regression"])
@pytest.mark.parametrize("kind", ["lightgbm", "linear"])
def test_contributions_add_up_to_the_score_and_rank_the_inputs(task, kind):
    X, y, about = fitted(task)
    if kind == "lightgbm":
        model = fit_lightgbm(X, y, params={}, rounds=30, categorical=(1,), **about)
    else:
        model = fit_linear(X, y, categorical=(1,), n_levels=(3,), **about)
    found = explain.explain_rows(model, X[:50], ["a", "b", "c"])
    assert np.allclose(found.values.sum(axis=1) + found.base, model.margin(X[:50]))
    ranked = explain.importance(found)
    assert ranked[0].name == "a" and ranked[-1].name == "c" and sum(r.share for r in ranked) == pytest.approx(1)


@pytest.mark.slow
def test_lightgbm_contributions_are_shaps():
    import shap

    X, y, about = fitted("binary")
    model = fit_lightgbm(X, y, params={}, rounds=30, categorical=(1,), **about)
    found = explain.explain_rows(model, X[:100], ["a", "b", "c"])
    assert np.allclose(found.values, shap.TreeExplainer(model.booster).shap_values(X[:100]), atol=1e-6)


@pytest.mark.parametrize("task", ["binary", "multiclass"])
def test_any_estimator_is_explained_approximately_and_says_so(task):
    from sklearn.linear_model import LogisticRegression

    X, y, about = fitted(task)
    model = SklearnModel(LogisticRegression().fit(X, y), task, about["n_classes"])
    found = explain.explain_rows(model, X, ["a", "b", "c"], approximate_rows=20)
    assert not found.is_exact and len(found.X) == 20
    assert np.allclose(found.values.sum(axis=1) + found.base, model.margin(X[:20]), atol=1e-6)
    assert explain.importance(found)[0].name in ("a", "b")


def test_names_must_fit_the_matrix():
    X, y, about = fitted("binary")
    with pytest.raises(UsageError, match="3 inputs but 2 names"):
        explain.explain_rows(fit_linear(X, y, categorical=(1,), n_levels=(3,), **about), X, ["a", "b"])


def test_examples_are_the_surest_hit_the_surest_miss_and_the_closest_call():
    answers = Answers(np.array([1, 0, 1, 0]), np.array([0.9, 0.8, 0.52, 0.3]), np.array([1, 1, 1, 0]), "binary", ("no", "yes"))
    assert explain.pick_examples(answers) == {"right and sure": 0, "wrong and sure": 1, "the closest call": 2}


# pictures, and the page


@pytest.mark.parametrize("task", ["binary", "multiclass", "regression"])
def test_pictures_are_drawn_for_every_task_even_with_odd_names(task):
    answers = answers_of(task)
    X, y, about = fitted(task)
    model = fit_lightgbm(X, y, params={}, rounds=5, categorical=(1,), **about)
    found = explain.explain_rows(model, X[:60], ["cost in $", "50% <b>", "a_b^{c"], categories={"50% <b>": ("$1$", "{", "\\x")})
    truth = Answers(y[:60], model.predict(X[:60]), y[:60], task, answers.classes)
    example = explain.explain_example(found, 0, truth, 0, "why $not$")
    for picture in (pictures.draw_answers(answers), pictures.draw_importance(found), pictures.draw_examples([example])):
        assert picture._repr_png_().startswith(b"\x89PNG")


def cells():
    page = json.loads((Path(__file__).parents[1] / "nbs" / "pipeline" / "04_evaluate.ipynb").read_text())
    return ["".join(cell["source"]) for cell in page["cells"] if cell["cell_type"] == "code"]


def run_page():
    """Run the notebook's cells here, as by hand, and return its names."""
    names = {"__name__": "__main__"}
    for source in cells():
        exec(compile(source, "04_evaluate", "exec"), names)
    return names


def made_project(root, task, sensitive):
    """Write what the earlier steps would have saved."""
    from ekiben.tune.search import SearchResult

    table = shop(900).drop("seen")
    sex = np.random.default_rng(3).choice(["F", "M"], 900).astype(object)
    base = np.nan_to_num(table["age"]) / 40 - 1.2 + 0.5 * (table["town"] == "east") + np.random.default_rng(4).normal(0, 0.4, 900)
    classes = {"binary": ("no", "yes"), "multiclass": ("low", "middle", "high"), "regression": ()}[task]
    target = base if task == "regression" else np.array(classes, dtype=object)[np.digitize(base, [-0.3, 0.3] if len(classes) == 3 else [0])]
    table = table.with_columns(sex=sex, y=target)
    fields = [Field(name="age", kind="number"), Field(name="town", kind="category")]
    fields.append(Field(name="sex", kind="category", role="sensitive" if sensitive else "ignore", is_input=False))
    fields.append(Field(name="y", kind=table.kinds["y"], role="target", is_input=False))
    schema = Schema(fields=tuple(fields), task=task, target="y", classes=classes)
    gate = {"binary": "auc >= 0.6", "multiclass": "auc >= 0.6", "regression": "r2 >= 0.2\n    coverage >= 0.5"}[task]
    watch = "mae_ratio[sex] >= 0.8" if task == "regression" else "demographic_parity_ratio[sex] >= 0.8"
    lines = ["[data]", "source = rows.csv", "[columns]", "target = y", "[gates]", f"gates =\n    {gate}"]
    if sensitive:
        lines[4:4] = ["sensitive = sex"]
        lines.append(f"watch =\n    {watch}")
    (root / "settings.ini").write_text("\n".join(lines) + "\n")
    os.chdir(root)
    train, test = table.rows(slice(0, 600)), table.rows(slice(600, 900))
    pre = fit_preprocessor(train.pick(["age", "town"]))
    X = pre.transform(train.pick(["age", "town"]))
    y = train["y"] if task == "regression" else np.array([classes.index(v) for v in train["y"]])
    about = {"task": task, "n_classes": len(classes), "categorical": pre.categorical}
    model = fit_lightgbm(X, y, params={}, rounds=20, **about)
    step.begin("prepare")
    profile = profile_of(train, schema.inputs)
    for name, thing in {"schema": schema, "preprocessor": pre, "train": train, "test": test, "profile": profile}.items():
        step.save(name, thing)
    step.save("summary", {"rows": {"came": 900}, "split": {"method": "stratified", "note": "300 rows are held out"}, "warnings": []})
    step.record(data={"source": "rows.csv", "fingerprint": "abc", "rows": 900})
    step.begin("tune")
    step.save("oof", fit_lightgbm(X, y, params={}, rounds=5, **about).predict(X))
    step.save("baseline", fit_linear(X, y, n_levels=pre.n_levels, **about))
    step.save("search", SearchResult(estimator="lightgbm", params={}, rounds=20, metric="auc", better="higher", value=0.9, baseline_value=0.8,
                                     folds=(0.9,), baseline_folds=(0.8,), trials=(), seed=0, key="k", seconds=1.0, resumed=0))  # fmt: skip
    step.begin("audit")
    step.save("model", model)
    step.save("policy", Policy(task=task))
    return schema, pre, model, test


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(step, "_session", None)
    return tmp_path


@pytest.mark.parametrize(("task", "sensitive"), [("binary", True), ("multiclass", True), ("regression", False), ("binary", False)])
def test_the_page_runs_for_every_task_with_and_without_sensitive_columns(here, task, sensitive):
    pytest.importorskip("ekiben.pipeline.audit")
    schema, pre, model, test = made_project(here, task, sensitive)
    page = run_page()
    step.begin("package")
    measures, judged = step.load("evaluate", "measures"), step.load("evaluate", "judgements")
    labels = {m.label for m in measures}
    assert {"binary": "auc", "multiclass": "auc", "regression": "coverage"}[task] in labels
    assert ("value" in labels) == (task == "binary")
    assert any("[sex]" in label for label in labels) == sensitive
    assert judged[0].verdict == "pass" and len(judged) == 1 + sensitive + (task == "regression")
    assert step.result_of("evaluate").judgements == judged
    card = step.load("evaluate", "card")
    assert "abc" in card["markdown"] and "300" in card["markdown"]
    reference = step.load("evaluate", "reference")
    assert (reference.rows, reference.of, reference.task) == (300, "300 rows are held out", task)
    assert bool(reference.groups) == sensitive and {s.column for s in reference.residuals} == {"age", "town"}
    answer = answer_with(schema, lambda c: c, pre, model, Policy(task=task))
    assert np.array_equal(page["ours"].prediction, answer(test)[0])


def test_the_page_exports_the_users_own_cell_and_nothing_else():
    exported = [source for source in cells() if source.startswith("#| export")]
    functions = [n.name for source in exported for n in ast.parse(source).body if isinstance(n, ast.FunctionDef)]
    assert functions == ["slices"]


def test_the_own_slices_as_they_stand_mark_rows_with_gaps():
    from ekiben.pipeline.evaluate import slices

    mask = slices(Columns({"a": [1.0, np.nan, 3.0], "b": np.array(["x", "y", None], dtype=object)}))
    assert {k: v.tolist() for k, v in mask.items()} == {"something is missing": [False, True, True]}
