"""The search: repeatable bit for bit, resumable after a kill, bounded, and right for every task."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_diabetes, load_wine
from sklearn.model_selection import StratifiedKFold

from ekiben.errors import SettingsError, UsageError
from ekiben.pipeline.tune import search_space
from ekiben.tune.lightgbm_cv import LightGBMTrainer, complete_params
from ekiben.tune.problem import Problem, Stop, choose_score
from ekiben.tune.race import cannot_win, is_behind
from ekiben.tune.search import SearchResult, search_models

TRIALS = 10


def make_problem(n: int = 900, seed: int = 0) -> Problem:
    """A binary table with a number that matters, a category that matters, noise and missing values."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, 5))
    X[:, 4] = rng.integers(0, 6, size=n)
    y = (np.sin(2 * X[:, 0]) + X[:, 1] ** 2 + (X[:, 4] == 2) + rng.normal(size=n) > 1).astype(np.int64)
    X[rng.random(n) < 0.1, 1] = np.nan
    rows = np.arange(n)
    folds = [(np.flatnonzero(rows % 4 != i), np.flatnonzero(rows % 4 == i)) for i in range(4)]
    return Problem(X=X, y=y, task="binary", folds=folds, categorical=(4,), n_levels=(6,))


def run_search(folder: str, slow_s: float = 0.0) -> None:
    """What the process that gets killed runs."""

    def show(done: int, best: float | None, left_s: float) -> None:
        print("trial", done, flush=True)
        time.sleep(slow_s)

    search_models(make_problem(), search_space, trials=TRIALS, folder=Path(folder), progress=show)


def plain(result: SearchResult) -> dict:
    """A result without what the clock and the history of processes say."""
    known = result.to_dict()
    for trial in known["trials"]:
        trial.pop("seconds")
    return {k: v for k, v in known.items() if k not in ("seconds", "resumed")}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("studies")
    return folder, search_models(make_problem(), search_space, trials=TRIALS, folder=folder)


def assert_same(one, other):
    assert plain(one.result) == plain(other.result)
    assert one.model == other.model
    assert one.model.to_files() == other.model.to_files()
    np.testing.assert_array_equal(one.oof, other.oof)
    np.testing.assert_array_equal(one.baseline_oof, other.baseline_oof)


def test_same_seed_and_trials_give_the_same_bits_with_any_number_of_workers(reference):
    assert_same(reference[1], search_models(make_problem(), search_space, trials=TRIALS, workers=1))


def test_another_seed_draws_other_trials(reference):
    other = search_models(make_problem(), search_space, trials=TRIALS, seed=1).result
    assert [t.params for t in other.trials] != [t.params for t in reference[1].result.trials]


@pytest.mark.parametrize("after", [6, pytest.param(1, marks=pytest.mark.slow)])
def test_a_search_killed_half_way_and_resumed_ends_the_same(reference, tmp_path, after):
    code = f"import sys; sys.path[:0] = {[str(Path(__file__).parent)]!r}; import test_tune; test_tune.run_search({str(tmp_path)!r})"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=os.environ)
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == f"trial {after}":
            break
    time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    resumed = search_models(make_problem(), search_space, trials=TRIALS, folder=tmp_path)
    assert after <= resumed.result.resumed < TRIALS
    assert_same(reference[1], resumed)


def test_a_trial_left_running_by_a_killed_process_is_failed_and_drawn_again(reference, tmp_path):
    import optuna

    search_models(make_problem(), search_space, trials=4, folder=tmp_path)
    (file,) = tmp_path.glob("*.db")
    study = optuna.load_study(study_name="lightgbm", storage=f"sqlite:///{file}")
    left = study.ask()
    left.suggest_float("feature_fraction", 0.3, 1.0)
    resumed = search_models(make_problem(), search_space, trials=TRIALS, folder=tmp_path)
    assert resumed.result.resumed == 4
    assert study.trials[left.number].state == optuna.trial.TrialState.FAIL
    assert_same(reference[1], resumed)


def test_a_finished_search_is_replayed_not_extended(reference):
    folder, first = reference
    again = search_models(make_problem(), search_space, trials=TRIALS, folder=folder)
    assert again.result.resumed == TRIALS == len(again.result.trials)
    assert_same(first, again)


def test_fewer_trials_than_the_study_holds_give_what_they_would_have_given_alone(reference, tmp_path):
    folder, _ = reference
    assert_same(
        search_models(make_problem(), search_space, trials=3, folder=folder),
        search_models(make_problem(), search_space, trials=3, folder=tmp_path),
    )


def test_other_data_folds_seed_metric_or_space_start_another_study(reference):
    p = make_problem()
    X = p.X.copy()
    X[5, 0] += 1e-9
    y = p.y.copy()
    y[7] = 1 - y[7]

    def parts(**changes):
        fields = {"X": p.X, "y": p.y, "folds": p.folds, "categorical": (4,), "n_levels": (6,)} | changes
        return Problem(task="binary", **fields).fingerprint

    prints = [parts(), parts(X=X), parts(y=y), parts(folds=p.folds[::-1]), parts(categorical=(), n_levels=())]
    assert prints[0] == p.fingerprint
    assert len(set(prints)) == len(prints)

    def narrow(trial, estimator):
        return {"num_leaves": trial.suggest_int("num_leaves", 4, 8)} if estimator == "lightgbm" else {"C": 1.0}

    keys = [
        search_models(p, space, trials=2, seed=seed, metric=metric).result.key
        for space, seed, metric in (
            (search_space, 0, "auc"), (search_space, 1, "auc"), (search_space, 0, "log_loss"), (narrow, 0, "auc"),
        )
    ]  # fmt: skip
    assert keys[0] == reference[1].result.key
    assert len(set(keys)) == len(keys)


def test_a_budget_of_seconds_is_kept_and_spent_once(tmp_path):
    first = search_models(make_problem(), search_space, budget_s=3.0, folder=tmp_path).result
    assert len(first.trials) > 2
    again = search_models(make_problem(), search_space, budget_s=3.0, folder=tmp_path).result
    assert again.resumed == len(again.trials) == len(first.trials)
    assert plain(again) == plain(first)
    more = search_models(make_problem(), search_space, budget_s=6.0, folder=tmp_path).result
    assert more.resumed == len(first.trials) < len(more.trials)
    by_count = search_models(make_problem(), search_space, trials=len(more.trials)).result
    assert plain(by_count) == plain(more)


def test_a_search_space_that_raises_leaves_no_running_trial(tmp_path):
    import optuna

    def broken(trial, estimator):
        if estimator == "lightgbm":
            trial.suggest_int("num_leaves", 4, 8)
            raise KeyError("gone")
        return {"C": 1.0}

    with pytest.raises(KeyError, match="gone"):
        search_models(make_problem(), broken, trials=4, folder=tmp_path)
    (file,) = tmp_path.glob("*.db")
    study = optuna.load_study(study_name="lightgbm", storage=f"sqlite:///{file}")
    assert [t.state for t in study.trials] == [optuna.trial.TrialState.FAIL]


def test_two_processes_do_not_share_a_search(tmp_path):
    key = search_models(make_problem(), search_space, trials=2, folder=tmp_path).result.key
    import fcntl

    with open(tmp_path / f"{key}.lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match="another process"):
            search_models(make_problem(), search_space, trials=2, folder=tmp_path)


def test_the_baseline_and_the_defaults_go_first(reference):
    first, second, third = reference[1].result.trials[:3]
    assert (first.estimator, first.params) == ("linear", {"C": 1.0})
    defaults = {"num_leaves": 31, "feature_fraction": 1.0, "min_data_in_leaf": 20, "lambda_l2": 0.01}
    assert defaults.items() <= second.params.items()
    assert third.params["feature_fraction"] == 0.5


def test_the_value_is_that_of_the_out_of_fold_predictions(reference):
    result, p = reference[1].result, make_problem()
    score = choose_score("auc", "binary")
    by_fold = [score.measure(p.y[valid], reference[1].oof[valid]) for _, valid in p.folds]
    assert result.value == pytest.approx(np.mean(by_fold), abs=1e-9)
    assert result.folds == pytest.approx(by_fold)
    assert result.value > result.baseline_value + 0.02
    assert not np.isnan(reference[1].oof).any()


def test_pruned_trials_could_not_have_won_any_more(reference):
    result = reference[1].result
    pruned = [t for t in result.trials if t.state == "pruned"]
    assert pruned, "the race never stopped a trial"
    for trial in pruned:
        before = [t for t in result.trials[: trial.number] if t.state == "complete" and t.estimator == trial.estimator]
        best = max(before, key=lambda t: (t.value, -t.number))
        assert 2 <= len(trial.folds) < 4
        assert cannot_win(trial.folds, best.folds, choose_score("auc", "binary"))


@given(st.lists(st.floats(0, 1), min_size=2, max_size=5), st.floats(1e-3, 0.5))
@settings(max_examples=50, deadline=None)
def test_a_race_is_lost_only_on_every_fold(folds, lag):
    score = choose_score("auc", "binary")
    worse = [f - lag for f in folds]
    assert is_behind(worse, folds, score)
    assert not is_behind(folds, worse, score)
    assert not is_behind([*worse[:-1], folds[-1]], folds, score)
    assert not is_behind(worse[:1], folds, score)
    assert is_behind(folds, worse, choose_score("log_loss", "binary"))


@given(st.lists(st.floats(0, 1), min_size=5, max_size=5), st.lists(st.floats(0, 1), min_size=5, max_size=5))
@settings(max_examples=100, deadline=None)
def test_a_trial_that_wins_on_average_is_never_given_up_at_its_end(mine, rival):
    score = choose_score("auc", "binary")
    if sum(mine) >= sum(rival) + 1e-9:
        assert not cannot_win(mine, rival, score)
    if all(m < r for m, r in zip(mine, rival, strict=True)):
        assert cannot_win(mine[:2], rival, score)
    assert not cannot_win(mine[:1], rival, score)


def test_wine_three_classes_and_178_rows():
    X, y = load_wine(return_X_y=True)
    folds = list(StratifiedKFold(5, shuffle=True, random_state=0).split(X, y))
    found = search_models(Problem(X=X, y=y, task="multiclass", folds=folds), search_space, trials=8)
    assert found.result.metric == "log_loss"
    assert found.oof.shape == (178, 3)
    np.testing.assert_allclose(found.oof.sum(axis=1), 1, atol=1e-6)
    assert (found.oof.argmax(axis=1) == y).mean() > 0.95
    assert (found.model.predict(X).argmax(axis=1) == y).mean() > 0.97
    assert found.result.value <= found.result.baseline_value
    assert any(t.estimator == "lightgbm" and t.value < 0.3 for t in found.result.trials)


def test_a_leaf_asks_for_no_more_than_a_twentieth_of_the_rows():
    def leaf(rows):
        return complete_params({"min_data_in_leaf": 60}, task="binary", n_classes=2, rows=rows, seed=0)["min_data_in_leaf"]

    assert [leaf(rows) for rows in (10, 150, 30_000)] == [1, 7, 60]


def test_regression_by_rmse_and_by_mae():
    X, y = load_diabetes(return_X_y=True)
    rows = np.arange(len(y))
    problem = Problem(X=X, y=y, task="regression", folds=[(rows[rows % 3 != i], rows[rows % 3 == i]) for i in range(3)])
    for metric, limit in (("auto", 62), ("mae", 52)):
        found = search_models(problem, search_space, trials=5, metric=metric)
        assert found.result.better == "lower"
        assert found.result.value == min(found.result.value, *(t.value for t in found.result.trials if t.state == "complete"))
        assert found.result.value < limit
        assert found.oof.shape == y.shape


def test_where_a_line_is_the_truth_the_linear_model_wins():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(400, 4))
    y = X @ np.array([3.0, -2.0, 1.0, 0.0]) + 0.1 * rng.normal(size=400)
    rows = np.arange(400)
    problem = Problem(X=X, y=y, task="regression", folds=[(rows[rows % 4 != i], rows[rows % 4 == i]) for i in range(4)])
    found = search_models(problem, search_space, trials=8)
    assert found.result.estimator == "linear"
    assert found.model.runtime == "linear"
    assert found.result.rounds == 0
    assert found.model.to_files() == found.baseline.to_files()
    assert found.result.value < 0.2


def test_time_ordered_folds_leave_the_first_block_without_predictions():
    p = make_problem()
    rows = np.arange(len(p.y))
    block = rows // 225 - 1
    folds = [(rows[block < j], rows[block == j]) for j in range(3)]
    found = search_models(Problem(X=p.X, y=p.y, task="binary", folds=folds, categorical=(4,)), search_space, trials=5)
    np.testing.assert_array_equal(np.isnan(found.oof), block < 0)
    assert found.result.value > 0.6
    trainer = LightGBMTrainer(Problem(X=p.X, y=p.y, task="binary", folds=folds), choose_score("auto", "binary"), seed=0)
    assert trainer.scale_rounds(100) == 141


@pytest.mark.parametrize("name", ["RandomForestClassifier", "HistGradientBoostingClassifier"])
def test_an_estimator_that_the_search_space_names_can_win(name):
    def space(trial, estimator):
        if estimator == "linear":
            return {"C": 1.0}
        assert estimator == name
        depth = trial.suggest_int("max_depth", 3, 12)
        return {"max_depth": depth, **({"n_estimators": 60} if name.startswith("Random") else {"max_iter": 40})}

    found = search_models(make_problem(), space, trials=4, estimators=[name])
    assert found.result.estimator == name
    assert found.model.runtime == "python"
    p = make_problem()
    assert choose_score("auc", "binary").measure(p.y, found.model.predict(p.X)) > found.result.value > 0.7


def test_a_space_with_nothing_to_draw_is_tried_once_or_twice_not_until_the_time_is_over():
    def fixed(trial, estimator):
        return {"C": 1.0} if estimator == "linear" else {"n_estimators": 20}

    found = search_models(make_problem(), fixed, budget_s=30, estimators=["RandomForestClassifier"])
    assert len(found.result.trials) <= 4


def test_bins_may_be_searched_too():
    def space(trial, estimator):
        return {"max_bin": trial.suggest_int("max_bin", 15, 255)} if estimator == "lightgbm" else {"C": 1.0}

    found = search_models(make_problem(), space, trials=6)
    assert len({t.params.get("max_bin") for t in found.result.trials if t.estimator == "lightgbm"}) > 2
    assert found.result.value > 0.7


def test_a_fold_answers_with_the_bits_of_a_fresh_training():
    p = make_problem()
    trainer = LightGBMTrainer(p, choose_score("auto", "binary"), seed=0)
    first = trainer.train_fold({"feature_fraction": 0.5}, 1, Stop())
    trainer.train_fold({"feature_fraction": 0.9}, 1, Stop())
    again = LightGBMTrainer(p, choose_score("auto", "binary"), seed=0, threads=2).train_fold({"feature_fraction": 0.5}, 1, Stop())
    np.testing.assert_array_equal(first.curve, again.curve)
    np.testing.assert_array_equal(first.predict(10), again.predict(10))


def test_a_wrong_estimator_metric_or_budget_says_what_is_allowed():
    with pytest.raises(SettingsError, match="did you mean `RandomForestClassifier`"):
        search_models(make_problem(), search_space, trials=2, estimators=["RandomForrestClassifier"])
    with pytest.raises(SettingsError, match="not defined for a binary target; use `auc`"):
        search_models(make_problem(), search_space, trials=2, metric="rmse")
    with pytest.raises(SettingsError, match="did you mean `auc`"):
        search_models(make_problem(), search_space, trials=2, metric="auk")
    with pytest.raises(SettingsError, match="budget_s"):
        search_models(make_problem(), search_space, budget_s=0)


def test_a_result_reads_itself_back(reference):
    result = reference[1].result
    assert SearchResult.from_json(result.to_json()) == result
