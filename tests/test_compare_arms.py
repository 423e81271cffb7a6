"""The comparison of two arms keeps what its intervals promise, and its power calculation finds what it says it finds."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import make_schema
from hypothesis import given, settings
from hypothesis import strategies as st

from ekiben.monitor.answers import Answers
from ekiben.rollout.compare import compare_answers, compare_arms, losses_of
from ekiben.rollout.difference import (
    auc_difference,
    difference_of_aucs,
    difference_of_means,
    difference_of_rates,
    mean_difference,
    rows_needed,
)
from ekiben.rollout.holding import judge_arms, loss_difference
from ekiben.serving.hosting.deployment import ArmStatus, GuardLimits
from ekiben.serving.journal.journal import Journal, new_ids
from ekiben.serving.journal.keeping import JournalOptions
from ekiben.serving.journal.segments import origin_of

numbers = st.floats(-10, 10, allow_nan=False)
samples = st.lists(numbers, min_size=2, max_size=40).map(np.array)


@settings(deadline=None)
@given(samples, samples)
def test_a_difference_of_means_lies_in_its_interval_and_turns_with_the_arms(a: np.ndarray, b: np.ndarray) -> None:
    one, other = difference_of_means(a, b), difference_of_means(b, a)
    assert one.low <= one.value <= one.high
    assert np.allclose([one.value, one.low, one.high], [-other.value, -other.high, -other.low])


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.data())
def test_a_difference_of_rates_lies_in_its_interval_inside_one_and_turns_with_the_arms(n: int, m: int, data: Any) -> None:
    k, j = data.draw(st.integers(0, n)), data.draw(st.integers(0, m))
    one, other = difference_of_rates(k, n, j, m), difference_of_rates(j, m, k, n)
    assert -1 <= one.low <= one.value <= one.high <= 1
    assert np.allclose(one, [-other.value, -other.high, -other.low])


def test_newcombe_s_own_example() -> None:
    found = difference_of_rates(56, 70, 48, 80)  # Statistics in Medicine 17 (1998), table II, case (a), method 10
    assert np.allclose(found, [0.2, 0.0524, 0.3339], atol=5e-5)


def test_intervals_of_different_rows_hold_what_they_promise() -> None:
    rng, held = np.random.default_rng(0), np.zeros(3)
    rounds = 400
    for _ in range(rounds):
        a, b = rng.gamma(1.0, 0.2, 60), rng.gamma(1.0, 0.15, 400)  # losses lean to one side
        means = difference_of_means(a, b)
        rates = difference_of_rates(int((rng.random(40) < 0.9).sum()), 40, int((rng.random(300) < 0.8).sum()), 300)
        y, other = rng.integers(0, 2, 80), rng.integers(0, 2, 400)
        areas = difference_of_aucs(y, y + rng.normal(0, 1, 80), other, other + rng.normal(0, 1, 400))
        assert areas is not None
        held += [means.low <= 0.05 <= means.high, rates.low <= 0.1 <= rates.high, areas.low <= 0 <= areas.high]
    assert np.all(held / rounds > 0.92), held / rounds
    assert np.all(held / rounds < 0.99), held / rounds  # and are not so wide that they promise nothing


def test_intervals_of_the_same_rows_hold_and_are_narrower() -> None:
    rng, held, rounds = np.random.default_rng(1), np.zeros(2), 400
    for _ in range(rounds):
        base = rng.gamma(1.0, 0.2, 100)
        ours = base + rng.normal(0.02, 0.05, 100)
        paired = mean_difference(ours, base)
        y, shared = rng.integers(0, 2, 200), rng.normal(0, 1, 200)
        areas = auc_difference(y, y + shared + rng.normal(0, 0.3, 200), y + shared + rng.normal(0, 0.3, 200))
        assert areas is not None
        held += [paired.low <= 0.02 <= paired.high, areas.low <= 0 <= areas.high]
        apart = difference_of_means(ours, base)
        assert paired.high - paired.low < apart.high - apart.low
    assert np.all(held / rounds > 0.92), held / rounds


def test_an_auc_needs_both_classes() -> None:
    y = np.ones(10, dtype=int)
    assert auc_difference(y, np.arange(10.0), np.arange(10.0)) is None
    assert difference_of_aucs(y, np.arange(10.0), np.array([0, 1]), np.array([0.1, 0.2])) is None


def test_a_perfect_arm_has_an_interval_with_a_width() -> None:
    y = np.array([0, 1] * 20)
    found = difference_of_aucs(y, y.astype(float), y, y + np.random.default_rng(0).normal(0, 1, 40))
    assert found is not None
    assert found.low < found.value <= found.high


@settings(deadline=None)
@given(st.floats(1e-3, 1), st.floats(0.01, 2), st.floats(0.01, 2), st.floats(0.01, 0.99))
def test_fewer_rows_decide_a_larger_difference_and_more_power_takes_more(size: float, ours: float, theirs: float, share: float) -> None:
    n = rows_needed(size, ours, theirs, share=share)
    assert n >= 2
    assert rows_needed(size * 2, ours, theirs, share=share) <= n
    assert rows_needed(size, ours, theirs, share=share, power=0.95) >= n
    assert rows_needed(size, ours, theirs, share=share, confidence=0.99) >= n
    assert rows_needed(size, ours, theirs, share=share) == rows_needed(size, theirs, ours, share=1 - share) or abs(
        rows_needed(size, ours, theirs, share=share) - rows_needed(size, theirs, ours, share=1 - share)
    ) <= 1  # fmt: skip


def test_the_rows_that_are_said_to_be_needed_find_the_difference_four_times_in_five() -> None:
    rng, size, share = np.random.default_rng(2), 0.05, 0.25
    n = rows_needed(size, 0.3, 0.2, share=share)
    ours, rounds = round(n * share), 600
    found = 0
    for _ in range(rounds):
        gap = difference_of_means(rng.normal(size, 0.3, ours), rng.normal(0, 0.2, n - ours))
        found += gap.low > 0
    assert 0.75 < found / rounds < 0.85
    paired = rows_needed(0.05, 0.2)
    hits = sum(mean_difference(rng.normal(0.05, 0.2, paired), np.zeros(paired)).low > 0 for _ in range(rounds))
    assert 0.75 < hits / rounds < 0.85


def answers_of(task: str, n: int, noise: float, seed: int = 0, *, labelled: float = 1.0) -> Answers:
    rng = np.random.default_rng(seed)
    if task == "regression":
        truth = rng.normal(0, 1, n)
        said = truth + rng.normal(0, noise, n)
        decision: np.ndarray = said
    elif task == "binary":
        chance = rng.random(n)
        truth = (rng.random(n) < chance).astype(float)
        said = np.clip(chance + rng.normal(0, noise, n), 0, 1)
        decision = (said >= 0.5).astype(np.int64)
    else:
        truth = rng.integers(0, 3, n).astype(float)
        raw = np.eye(3)[truth.astype(int)] + np.abs(rng.normal(0, noise + 0.3, (n, 3)))
        said = raw / raw.sum(axis=1, keepdims=True)
        decision = said.argmax(axis=1)
    truth = np.where(rng.random(n) < labelled, truth, np.nan)
    return Answers(task, np.arange(n), said, decision, truth, np.ones(n, bool), {})  # type: ignore[arg-type]


@pytest.mark.parametrize("task", ["binary", "multiclass", "regression"])
def test_a_better_challenger_is_called_better_in_every_metric(task: str) -> None:
    found = compare_answers(answers_of(task, 4000, 0.02), answers_of(task, 9000, 0.6, 1), paired=False, versions=("2", "1"))
    assert {d.metric for d in found.differences} == {"binary": {"loss", "accuracy", "auc"}, "multiclass": {"loss", "accuracy"}, "regression": {"loss"}}[task]
    assert [d.better for d in found.differences] == ["challenger"] * len(found.differences)
    turned = compare_answers(answers_of(task, 9000, 0.6, 1), answers_of(task, 4000, 0.02), paired=False, versions=("1", "2"))
    assert {d.better for d in turned.differences} == {"champion"}


def test_the_loss_of_two_classes_is_the_same_said_in_either_way() -> None:
    binary = answers_of("binary", 50, 0.1)
    both = Answers("multiclass", binary.time, np.column_stack([1 - binary.prediction, binary.prediction]), binary.decision, binary.y, binary.inside, {})  # type: ignore[arg-type]
    assert np.allclose(losses_of(binary), losses_of(both))


def test_only_labelled_rows_count_and_none_at_all_is_no_error() -> None:
    some = compare_answers(answers_of("binary", 1000, 0.1, labelled=0.3), answers_of("binary", 1000, 0.1, 1), paired=False, versions=("2", "1"))
    assert some.rows == (1000, 1000)
    assert 250 < some.labelled[0] < 350
    none = compare_answers(answers_of("binary", 10, 0.1, labelled=0), answers_of("binary", 10, 0.1), paired=False, versions=("2", "1"))
    assert none.differences == ()
    assert none.needed == none.missing == 0


def test_what_holds_is_judged_by_the_limits_and_only_on_enough_requests() -> None:
    limits = GuardLimits(min_requests=50, max_latency_ratio=2.0, max_shift=0.1)
    champion = ArmStatus(version="1", role="champion", requests=5000, seconds_median=1e-4, positive_share=0.2, labels=900, loss_mean=0.1, loss_sd=0.1)

    def broken(**figures: Any) -> int:
        own = {"requests": 400, "seconds_median": 1e-4, "positive_share": 0.2, "labels": 300, "loss_mean": 0.1, "loss_sd": 0.1}
        return len(judge_arms(champion, ArmStatus(version="2", role="challenger", **{**own, **figures}), limits).broken)

    assert broken() == 0
    assert broken(errors=20) == 1
    assert broken(seconds_median=2.5e-3) == 1
    assert broken(seconds_median=2.5e-4) == 0  # more than twice as long, but nobody notices a fraction of a millisecond
    assert broken(positive_share=0.35) == 1
    assert broken(loss_mean=0.2) == 1
    assert broken(loss_mean=0.155, loss_sd=0.2) == 0  # not surely
    assert broken(errors=20, seconds_median=1.0, positive_share=0.9, loss_mean=0.9) == 4
    assert broken(requests=20, errors=5, seconds_median=1.0, positive_share=0.9, labels=20, loss_mean=0.9) == 0


@settings(deadline=None)
@given(st.integers(2, 1000), st.integers(2, 1000), st.floats(0, 1), st.floats(0, 1), st.floats(0, 0.5), st.floats(0, 0.5))
def test_the_difference_of_losses_turns_with_the_arms(n: int, m: int, a: float, b: float, s: float, t: float) -> None:
    one = ArmStatus(version="1", role="champion", labels=n, loss_mean=a, loss_sd=s)
    two = ArmStatus(version="2", role="challenger", labels=m, loss_mean=b, loss_sd=t)
    there, back = loss_difference(two, one), loss_difference(one, two)
    assert there is not None
    assert back is not None
    assert np.allclose(there, [-back[0], -back[2], -back[1]])
    assert there[1] <= there[0] <= there[2]


# ------------------------------------------------------------------------------------------------ from a journal


def write_arm(folder: Path, version: str, role: str, ids: list[str], truth: list[int], noise: float, *, told: bool) -> None:
    schema = make_schema("binary")
    origin = origin_of(schema, ["age"], {"name": "census", "version": version, "bento": "", "role": role})
    journal = Journal(folder, origin, JournalOptions())
    rng = np.random.default_rng(int(version))
    for id_, y in zip(ids, truth, strict=True):
        p = float(np.clip(0.3 + 0.4 * y + rng.normal(0, noise), 0, 1))
        journal.predictions([id_], [{"age": 40.0}], [{"id": id_, "label": "yes" if p >= 0.5 else "no", "probability": p}])
    journal.flush()
    if told:
        for id_, y in zip(ids, truth, strict=True):
            journal.feedback(id_, "yes" if y else "no")
    journal.close()


def test_a_canary_s_arms_are_read_from_the_journal(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    before = new_ids(50)
    write_arm(tmp_path, "1", "champion", before, [1] * 50, 3.0, told=False)  # before the challenger came: not counted
    time.sleep(0.01)
    for version, role, n, noise in (("2", "challenger", 100, 0.02), ("1", "champion", 300, 0.4)):
        write_arm(tmp_path, version, role, new_ids(n), rng.integers(0, 2, n).tolist(), noise, told=True)
    write_arm(tmp_path, "2", "challenger", new_ids(20), [1] * 20, 0.02, told=False)  # the champion's rows lie in its time
    found = compare_arms(tmp_path, make_schema("binary"), "2", "1")
    assert not found.is_paired
    assert found.rows == (120, 300)
    assert found.labelled == (100, 300)
    assert {d.metric: d.better for d in found.differences}["loss"] == "challenger"


def test_a_shadow_s_rows_are_paired_with_what_was_answered(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ids = new_ids(200)
    truth = rng.integers(0, 2, 200).tolist()
    write_arm(tmp_path, "1", "champion", ids, truth, 0.3, told=True)
    write_arm(tmp_path, "2", "shadow", ids[50:], truth[50:], 0.05, told=False)  # 50 were dropped
    found = compare_arms(tmp_path, make_schema("binary"), "2", "1", shadow=True)
    assert found.is_paired
    assert compare_arms(tmp_path, make_schema("binary"), "2", "1").rows == (0, 0)  # nobody was answered by it
    assert found.labelled == (150, 150)
    assert {d.metric: d.better for d in found.differences}["loss"] == "challenger"


def test_no_journal_and_no_rows_are_nothing_to_compare(tmp_path: Path) -> None:
    assert compare_arms(tmp_path, make_schema("binary"), "2", "1").rows == (0, 0)
    write_arm(tmp_path, "1", "champion", new_ids(5), [1] * 5, 0.1, told=True)
    assert compare_arms(tmp_path, make_schema("binary"), "2", "1").rows == (0, 0)
