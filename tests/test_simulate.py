"""A simulation: its clock, its callers, its story, and one short month against a real service."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from fake_service import Fake, http_answer
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from ekiben.data.credit import CreditOptions, simulate_credit, truth
from ekiben.errors import DataError, ServiceError, UsageError
from ekiben.monitor.records import Alert
from ekiben.records import Measure
from ekiben.simulate.client import Callers, Orders
from ekiben.simulate.played import Played
from ekiben.simulate.clock import Clock, iso
from ekiben.simulate.declared import expect
from ekiben.simulate.labels import LabelQueue
from ekiben.simulate.page import summarize, write_page
from ekiben.simulate.picture import draw_story, version_colors
from ekiben.simulate.plan import SCENARIOS, Plan, make_plan
from ekiben.simulate.run import Director
from ekiben.simulate.stage import exchange_labels, world_table
from ekiben.simulate.story import DayStory, Happening, Served, Story, measure_quality, tell_days, tell_served, touched_by
from ekiben.simulate.traffic import Asked, CreditTraffic, TableTraffic, cut_table

PREDICTED = http_answer(200, {"predictions": [{"id": "p", "label": "yes", "probability": 0.75}], "model": {"version": "7"}})


# --- the clock


@given(st.lists(st.floats(0.1, 100), min_size=1, max_size=12), st.floats(0, 1))
def test_a_moment_lies_in_its_own_day_however_long_that_day_was(lengths: list[float], part: float) -> None:
    now = [1000.0]
    clock = Clock(10, now=lambda: now[0])
    for length in lengths:
        clock.begin()
        now[0] += length
    clock.end()
    moments = []
    for day in clock.days:
        at = day.since + part * (day.until - day.since) * 0.999
        assert day.day <= clock.moment(at) <= day.day + 1
        moments.append(clock.moment(at))
    assert moments == sorted(moments)
    assert clock.moment(now[0] + 99) == len(lengths)
    assert clock.span(0, len(lengths) - 1) == (iso(1000.0), iso(clock.days[-1].until))


def test_days_leave_no_gap_in_real_time() -> None:
    clock = Clock(0.01)
    for _ in range(5):
        clock.begin()
        time.sleep(0.002)
    clock.end()
    for before, after in zip(clock.days, clock.days[1:], strict=False):
        assert 0 <= after.since - before.until < 0.001
    clock.end()
    assert clock.left_s >= 0 and len(clock.days) == 5


# --- the plan


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"days": 1}, "--days takes at least 2"),
        ({"rate": 0}, "--rate takes from 1"),
        ({"days": 5, "label_delay": 5}, "--label-delay takes from 0 to 4"),
        ({"share": 1.0}, "--share takes between 0 and 1"),
        ({"bad_day": 30}, "--bad-day takes a day from 0 to 29"),
        ({"drift": "revrsal"}, "did you mean"),
        ({"feed": "gone"}, "--feed takes missing, unit"),
    ],
)
def test_a_plan_that_cannot_be_played_is_refused_in_a_line(given: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        make_plan("full", given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("days", [4, 8, 30])
def test_a_scenario_has_its_events_on_days_that_are_played(scenario: str, days: int) -> None:
    plan = make_plan(scenario, {"days": days})
    for name in ("feed", "drift", "bad"):
        day = getattr(plan, f"{name}_day")
        assert (0 <= day < days) == (name in SCENARIOS[scenario]) and day < days


def test_nothing_is_made_to_drift_in_a_table_of_ones_own() -> None:
    assert make_plan("full", {}, has_own_data=True).drift_day == -1
    with pytest.raises(UsageError, match="the drift that is in it"):
        make_plan("full", {"drift_day": 3}, has_own_data=True)


# --- the world


def test_a_reversal_leaves_the_applicants_as_they_were_and_changes_what_becomes_of_them() -> None:
    old, new = (simulate_credit(CreditOptions(rows=4000, days=1, drift=d, from_day=0)) for d in ("none", "reversal"))
    assert old.drop_columns(["default"]).equals(new.drop_columns(["default"]))
    assert not old["default"].equals(new["default"])
    before = truth(CreditOptions(rows=4000, days=1))
    after = truth(CreditOptions(rows=4000, days=1, drift="reversal", from_day=0))
    assert np.corrcoef(before.probability, after.probability)[0, 1] < 0.8


# --- the traffic


def test_a_request_says_nothing_of_the_label_and_nothing_of_the_sensitive_column() -> None:
    for body in CreditTraffic(Plan(), 60).batch(0, 0).bodies:
        (row,) = json.loads(body)["rows"]
        assert "default" not in row and "sex" not in row and row["applied_on"].startswith("2024-03-01")


def test_rows_of_a_day_are_never_the_same_and_always_made_again() -> None:
    traffic = CreditTraffic(Plan(), 60)
    seen = [b for number in range(3) for day in (0, 1) for b in traffic.batch(day, number).bodies]
    assert len(set(seen)) == len(seen)
    assert traffic.batch(1, 2).bodies == CreditTraffic(Plan(), 60).batch(1, 2).bodies


@pytest.mark.parametrize(("feed", "spoilt"), [("missing", {None}), ("unit", None)])
def test_a_broken_feed_spoils_its_column_on_its_day_alone(feed: Any, spoilt: set[None] | None) -> None:
    traffic = CreditTraffic(Plan(feed_day=3, feed=feed, feed_column="amount"), 60)
    sound, broken = ([json.loads(b)["rows"][0] for b in traffic.batch(day, 0).bodies] for day in (2, 3))
    values = {row["amount"] for row in broken}
    assert values == spoilt if spoilt else np.median(list(values)) < 0.05 * np.median([row["amount"] for row in sound])
    assert all(set(a) == set(b) for a, b in zip(sound, broken, strict=True))


def test_labels_that_nobody_will_know_are_none() -> None:
    labels = CreditTraffic(Plan(labelled=0.3), 60).batch(0, 0).labels
    assert 0.2 < np.mean([label is not None for label in labels]) < 0.4 and set(labels) == {None, "yes", "no"}


def test_a_table_is_cut_in_time_and_no_row_is_lost_or_asked_twice_a_day(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    from ekiben.simulate.traffic import Roles

    rng = np.random.default_rng(0)
    table = pa.table({"t": rng.permutation(5000), "x": rng.normal(size=5000), "y": rng.choice(["a", "b"], 5000)})
    past, later = cut_table(table, "t", 4)
    assert max(past["t"].to_pylist()) < min(later["t"].to_pylist()) and past.num_rows + later.num_rows == 5000
    pq.write_table(later, tmp_path / "later.parquet")
    traffic = TableTraffic(Plan(days=4, drift_day=-1), tmp_path / "later.parquet", Roles("y"))
    asked = [json.loads(b)["rows"][0]["t"] for day in range(4) for number in range(traffic.rows(day) // 1000 + 1) for b in traffic.batch(day, number).bodies]
    assert sorted(asked[: traffic.rows(0)]) == sorted(later.filter(pa.compute.equal(later["_day"], 0))["t"].to_pylist())
    again = traffic.batch(0, 5)
    assert len(again) and set(again.labels) == {None}


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"t": [1, 2]}, "there is no column `when`"),
        ({"when": [1, None, 3]}, "1 missing values"),
        ({"when": [0, 1, 2, 1000]}, "has no rows; play fewer --days"),
    ],
)
def test_a_table_that_cannot_be_cut_into_days_is_refused(table: dict[str, list[Any]], says: str) -> None:
    with pytest.raises(DataError, match=says):
        cut_table(pa.table(table), "when", 5, history=0.25)


def test_mirrored_numbers_stay_within_their_range() -> None:
    assert exchange_labels(pa.table({"y": [0, 1, 1, 10]}), "y", ())["y"].to_pylist() == [10, 9, 9, 0]


@given(st.lists(st.sampled_from(["a", "b", "c", None])))
def test_exchanging_labels_as_often_as_there_are_classes_changes_nothing(labels: list[str | None]) -> None:
    table = pa.table({"y": pa.array(labels, pa.string())})
    again = table
    for _ in range(3):
        again = exchange_labels(again, "y", ("a", "b", "c"))
    assert again["y"].to_pylist() == labels


def test_the_world_that_nobody_is_asked_about_shares_no_row_with_the_traffic() -> None:
    traffic = CreditTraffic(Plan(), 60)
    asked = set(pa.concat_tables([traffic.table(3, n) for n in range(3)])["amount"].to_pylist())
    held = world_table(traffic, 3, 1500)
    assert held.num_rows == 1500 and not held["application_id"].to_pylist()[0].startswith("P0003000")
    assert len(asked) > 10


# --- late labels


@given(st.lists(st.tuples(st.floats(0, 30), st.sampled_from(["yes", None])), max_size=60), st.floats(0, 5), st.integers(1, 7))
def test_every_label_comes_once_and_none_before_its_time(made: list[tuple[float, str | None]], delay: float, most: int) -> None:
    queue = LabelQueue(delay)
    for row, (at, label) in enumerate(sorted(made, key=lambda m: m[0])):
        queue.add(at, str(row), label, row)
    got = []
    for now in np.linspace(0, 40, 161):
        while taken := queue.take(now, most):
            assert len(taken) <= most and all(due.at <= now for due in taken)
            got += [due.row for due in taken]
    assert got == [row for row, (_, label) in enumerate(sorted(made, key=lambda m: m[0])) if label]


# --- the callers


class Rows:
    """A traffic of rows that are all the same."""

    def batch(self, day: int, number: int) -> Asked:
        return Asked([b'{"rows":[{"x":1}]}'] * 40, ["yes", None] * 20, {"sex": ["F", "M"] * 20})


def play(url: str, *, rates: tuple[float, ...] = (200.0, 200.0), day_s: float = 0.6, timeout_s: float = 1.0, key: str = "") -> Played:
    callers = Callers(Orders(url, Rows(), rates, day_s, 1.0, ("no", "yes"), key=key, timeout_s=timeout_s, connections=16))
    try:
        for day, rate in enumerate(rates):
            before, end = callers.count()["sent"], time.monotonic() + 30
            callers.day(day)
            time.sleep(day_s)
            while callers.count()["sent"] - before < 0.8 * rate * day_s and time.monotonic() < end:
                time.sleep(0.05)  # a busy machine gives the callers their time later
        return callers.stop()
    finally:
        callers.close()


def test_callers_keep_their_rate_and_hand_in_each_label_a_day_later() -> None:
    with Fake(lambda n: PREDICTED) as fake:
        played = play(fake.url)
    assert not played.failed and not played.labels_failed
    assert 190 <= played.requests and played.versions == ["7"] and set(played.day) == {0, 1}
    assert 20 <= len(played.late) and played.known.sum() == len(played.late)
    assert not played.known[played.day == 1].any()
    assert abs(len(played.late) + played.waiting - played.requests / 2) <= 1
    assert set(played.groups["sex"]) == {0, 1} and played.names == {"sex": ["F", "M"]}


def test_every_request_that_is_not_answered_well_is_counted_with_its_reason() -> None:
    def behave(n: int) -> Any:
        return {0: 503, 1: None, 2: http_answer(200, {"odd": 1})}.get(n % 20, PREDICTED)

    with Fake(behave) as fake:
        played = play(fake.url, rates=(200.0,))
    whys = {why for _, why in played.failed}
    assert whys == {"503", "connection", "no prediction"}
    assert 0.1 < len(played.failed) / played.requests < 0.2
    assert len(played.at) + len(played.failed) == played.requests >= 90


def test_a_service_that_hangs_makes_slow_requests_of_all_that_were_due() -> None:
    held = threading.Event()

    def behave(n: int) -> bytes:
        if n == 30 and not held.is_set():
            held.set()
            time.sleep(0.8)  # the whole service stands still
        return PREDICTED

    with Fake(behave) as fake:
        played = play(fake.url, rates=(100.0,), day_s=1.0)
    assert not played.failed and (played.took > 0.1).sum() >= 15  # one that waited for answers would be slow once


def test_a_service_that_is_not_there_fails_every_request_and_stops_nothing() -> None:
    with Fake() as fake:
        gone = fake.url
    played = play(gone, rates=(100.0,), day_s=0.5)
    assert len(played.failed) == played.requests >= 30 and {why for _, why in played.failed} == {"connection"}


def test_callers_that_were_killed_are_told_apart_from_a_service() -> None:
    with Fake(lambda n: PREDICTED) as fake:
        callers = Callers(Orders(fake.url, Rows(), (50.0,), 1.0, 1.0))
        callers._process.kill()
        callers._process.join()
        with pytest.raises(ServiceError, match="client process of the simulation"):
            callers.count()
        callers.close()


def test_a_key_is_sent_and_not_shown() -> None:
    with Fake(lambda n: PREDICTED, key="ekb_secret") as fake:
        played = play(fake.url, rates=(100.0,), day_s=0.3, key="ekb_secret")
    assert not played.failed and played.requests
    assert "ekb_secret" not in repr(Orders("http://x", Rows(), (1.0,), 1, 1, key="ekb_secret"))


# --- the story


def made_played(n: int = 4000, days: int = 4, seed: int = 0) -> tuple[Played, Clock]:
    rng = np.random.default_rng(seed)
    now = [0.0]
    clock = Clock(10, now=lambda: now[0])
    for _ in range(days):
        clock.begin()
        now[0] += 10
    clock.end()
    at = np.sort(rng.uniform(0, 10 * days - 0.01, n))
    label = (rng.random(n) < 0.3).astype(np.int32)
    score = np.clip(0.3 * label + 0.7 * rng.random(n), 0, 1)
    played = Played(
        at=at, day=(at // 10).astype(np.int32), took=rng.gamma(2, 0.001, n), version=((at > 30) & (at < 32) & (rng.random(n) < 0.1)).astype(np.int32),
        score=score, decision=(score > 0.5).astype(np.int32), label=label, truth=label * 2.0, known=at < 10 * (days - 1),
        groups={"sex": rng.integers(0, 2, n).astype(np.int32)}, versions=["1", "2"], names={"sex": ["F", "M"]},
    )  # fmt: skip
    return played, clock


def test_each_answer_is_told_once_and_only_known_truth_counts() -> None:
    played, clock = made_played()
    days = tell_days(played, clock, "binary", "sex")
    assert sum(d.requests for d in days) == played.requests == sum(sum(s.versions.values()) for s in tell_served(played, clock))
    assert days[-1].quality is None and days[0].quality is not None and days[0].fairness is not None
    touched = touched_by(played, "2", clock)
    assert touched["touched"] == (played.version == 1).sum() and 0.05 < touched["touched_share"] < 0.2  # type: ignore[operator]
    assert touched_by(played, "9", clock)["touched"] == 0


def test_realised_quality_is_scikit_learns() -> None:
    from sklearn.metrics import r2_score, roc_auc_score

    played, _ = made_played()
    rows, known = np.ones(len(played.at), dtype=bool), played.known
    auc, accuracy, r2 = (measure_quality(played, rows, task) for task in ("binary", "multiclass", "regression"))  # type: ignore[arg-type]
    assert auc is not None and accuracy is not None and r2 is not None
    assert auc.value == pytest.approx(roc_auc_score(played.label[known], played.score[known]))
    assert accuracy.value == pytest.approx((played.label == played.decision)[known].mean())
    assert r2.value == pytest.approx(r2_score(played.truth[known], played.score[known]))
    assert all(m.low <= m.value <= m.high for m in (auc, accuracy, r2))  # type: ignore[operator]
    assert all(type(value) is float for m in (auc, accuracy, r2) for value in (m.value, m.low, m.high))  # it is written as JSON
    assert measure_quality(played, np.zeros(len(played.at), dtype=bool), "binary") is None


HAPPENED = [
    Happening(at=1.2, when="2026-01-01T00:00:00Z", kind="retrained", says="2"),
    Happening(at=1.4, when="2026-01-01T00:00:00Z", kind="canary", says="5 %"),
    Happening(at=1.9, when="2026-01-01T00:00:00Z", kind="promoted", says="2"),
    Happening(at=3.1, when="2026-01-01T00:00:00Z", kind="rolled_back", says="<b>share</b>"),
]
PLAN = Plan(days=4, drift_day=1, bad_day=3, label_delay=1)
FIGURES: dict[str, float | None] = {
    "requests": 4000, "failed": 0, "labels": 3000, "labels_failed": 0, "labels_kept": 3000, "rate_per_s": 100.0, "rate_asked": 100.0,
    "noticed_days": 0.2, "quality_after": 0.80, "quality_best": 0.805, "touched": 20, "touched_of": 400, "touched_share_of_day": 0.02,
    "rolled_back_s": 2.0, "ledger": 1, "traced": 1, "reproduced": 1, "looks_before": 1, "false_alarms": 0,
}  # fmt: skip


def made_story(**change: Any) -> Story:
    played, clock = made_played()
    return Story(
        id="s", made="20260101-000000", project="p", model="credit", task="binary", plan=PLAN, days=tell_days(played, clock, "binary", "sex"),
        happened=HAPPENED, served=tell_served(played, clock), figures=FIGURES, roles={"1": "first", "2": "bad"}, commands=["ekiben run"],
        expected=expect(PLAN, FIGURES, HAPPENED, checks=("ledger", "traced", "reproduced")), **change,
    )  # fmt: skip


def test_a_story_that_went_as_declared_says_so_and_reads_itself_back() -> None:
    story = made_story()
    assert story.is_as_declared, [e for e in story.expected if not e.is_met]
    assert Story.from_json(story.to_json()) == story


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"failed": 1}, ["no request failed"]),
        ({"labels_failed": 3}, ["no label was refused"]),
        ({"labels_kept": 2999}, ["nothing labelled is lost"]),
        ({"rate_per_s": 90.0}, ["the rate was kept"]),
        ({"false_alarms": 1}, ["no false alarm"]),
        ({"quality_after": 0.79}, ["quality afterwards is within 0.01 of a model trained on the new world"]),
        ({"quality_after": None}, ["quality afterwards is within 0.01 of a model trained on the new world"]),
        ({"noticed_days": None}, ["the drift is noticed"]),
        ({"touched": 60}, ["it touched at most its share of the requests"]),
        ({"touched": None}, ["it touched at most its share of the requests"]),
        ({"touched_share_of_day": 0.06}, ["it touched at most its share of the requests"]),
        ({"ledger": 0}, ["the ledger verifies"]),
        ({"traced": None}, ["a prediction of the month is traced to its end"]),
    ],
)
def test_each_figure_that_is_not_as_declared_is_named(change: dict[str, float | None], names: list[str]) -> None:
    found = expect(PLAN, FIGURES | change, HAPPENED, checks=("ledger", "traced", "reproduced"))
    assert [e.name for e in found if not e.is_met] == names


@pytest.mark.parametrize("missing", range(4))
def test_each_event_that_never_came_is_named(missing: int) -> None:
    happened = [h for i, h in enumerate(HAPPENED) if i != missing]
    assert len([e for e in expect(PLAN, FIGURES, happened) if not e.is_met]) == 1


def test_nothing_is_declared_of_what_is_not_played() -> None:
    names = [e.name for e in expect(Plan(drift_day=-1), {"requests": 5, "failed": 0, "labels_failed": 0, "rate_per_s": 5, "rate_asked": 5}, [])]
    assert names == ["no request failed", "no label was refused", "the rate was kept"]


def test_the_page_holds_its_picture_and_escapes_what_it_is_told(tmp_path: Path) -> None:
    page = write_page(tmp_path, made_story())
    text = page.read_text()
    assert "data:image/png;base64," in text and "<b>share</b>" not in text and "&lt;b&gt;share" in text
    assert (tmp_path / "story.png").read_bytes()[:4] == b"\x89PNG" and summarize(made_story())


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 45), st.booleans(), st.lists(st.floats(0, 45), max_size=20))
def test_any_story_can_be_drawn(days: int, measured: bool, at: list[float]) -> None:
    measure = Measure(name="auc", value=0.8, low=0.78, high=0.82, rows=10) if measured else None
    told = [DayStory(day=d, since="", until="", requests=1, quality=measure, fairness=measure, drift={"x": 0.5} if measured else {}) for d in range(days)]
    story = structs.replace(
        made_story(), days=told, served=[Served(since=d, until=d + 1, versions={"1": 1} if measured else {}) for d in range(days)],
        happened=[Happening(at=min(a, days), when="", kind="alert", says="word " * 30) for a in sorted(at)], figures={},
    )  # fmt: skip
    figure = draw_story(story)
    figure.draw_without_rendering()
    assert len(figure.axes) == 6
    assert min(text.get_window_extent().y0 for text in figure.axes[-1].texts) > -0.02 * figure.bbox.height, "every word has room"


def test_each_version_has_a_colour_of_its_own() -> None:
    served = [Served(since=0, until=1, versions={str(v): 1 for v in range(1, 7)})]
    colors = version_colors(structs.replace(made_story(), served=served, roles={"1": "first", "2": "retrained", "3": "retrained", "4": "bad"}))
    assert len(set(colors.values())) >= 5 and len(colors) == 6


@pytest.mark.parametrize(("if_due", "goes_on"), [(True, False), (False, True)])
def test_a_training_that_nothing_asked_for_and_that_was_in_vain_is_the_last(monkeypatch, if_due: bool, goes_on: bool) -> None:
    told: list[str] = []
    director = SimpleNamespace(operator=None, has_learnt=False, note=lambda kind, says: told.append(says))
    kept = SimpleNamespace(decision="rejected", reasons=["shown to be worse: " + "much " * 50])
    monkeypatch.setattr("ekiben.simulate.run.retrain", lambda operator, if_due: kept)
    Director._mend(director, if_due=if_due)  # type: ignore[arg-type]
    assert director.has_learnt is not goes_on and told[0].endswith("much …")


def test_an_alert_that_stands_for_every_version_is_told_once(monkeypatch) -> None:
    told: list[str] = []
    alerts = [Alert(id=f"fairness-{v}", kind="fairness", column="sex", figure="demographic_parity_ratio", value=0.7, limit=0.8, since="", says=f"version {v}", rows="", advice="") for v in (1, 2)]
    reports = iter(SimpleNamespace(alerts=[alert]) for alert in alerts)
    monkeypatch.setattr("ekiben.simulate.run.look", lambda *span: next(reports))
    director = SimpleNamespace(
        operator=None, clock=SimpleNamespace(span=lambda a, b: ("", "")), reports={}, fed_badly_until=-1, plan=PLAN, moved_before=False,
        told=set(), note=lambda kind, says: told.append(says), has_learnt=True, roles={},
    )  # fmt: skip
    for day in (1, 2):
        Director._look(director, day)  # type: ignore[arg-type]
    assert told == ["version 1"]


# --- the whole


@pytest.mark.slow
def test_a_short_month_goes_as_declared(tmp_path: Path) -> None:
    """Eight days at a low rate: drift, retraining, canary, promotion, a bad version, rollback, all accounted for."""
    env = {**os.environ, "EKIBEN_PIPELINE__KERNEL_IDLE_S": "60"}
    command = [
        sys.executable, "-c", "import sys; from ekiben.cli import main; sys.exit(main())", "simulate", "--days", "8", "--day-s", "4",
        "--rate", "200", "--label-delay", "1", "--hold-s", "2", "--scenario", "drift", "--drift-day", "2", "--bad-day", "6", "--within", "0.1",
        "--folder", str(tmp_path / "made"), "--reports", str(tmp_path / "reports"),
    ]  # fmt: skip
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    (path,) = (tmp_path / "reports").glob("*/simulation.json")
    story = Story.from_json(path.read_bytes())
    assert story.is_as_declared and story.figures["failed"] == 0 and len(story.days) == 8
    assert {"first", "retrained", "bad"} <= set(story.roles.values())
    assert (path.parent / "story.html").is_file() and (path.parent / "story.png").is_file()


@pytest.mark.slow
def test_a_simulation_that_is_told_to_end_leaves_no_process(tmp_path: Path) -> None:
    command = [
        sys.executable, "-c", "import sys; from ekiben.cli import main; sys.exit(main())", "simulate", "--days", "3", "--day-s", "20",
        "--rate", "50", "--folder", str(tmp_path / "made"), "--reports", str(tmp_path / "reports"),
    ]  # fmt: skip
    with open(tmp_path / "said.txt", "wb") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, cwd=tmp_path)
        while "day 0" not in (tmp_path / "said.txt").read_text():
            assert process.poll() is None, (tmp_path / "said.txt").read_text()
            time.sleep(0.2)
        assert processes_about(tmp_path)
        process.terminate()
        assert process.wait(60) == 130
    end = time.monotonic() + 30
    while left := processes_about(tmp_path):
        assert time.monotonic() < end, left
        time.sleep(0.2)


def processes_about(folder: Path) -> list[str]:
    """Return the command lines of other processes that name a folder."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            line = (place / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
        except OSError:
            continue
        if str(folder) in line and place.name != str(os.getpid()):
            found.append(line)
    return found


def test_the_alert_that_names_the_broken_feed_is_shown_and_no_other() -> None:
    def told(says: str, column: str = "") -> Happening:
        return Happening(at=7.0, when="", kind="alert", says=says, column=column)

    plan = Plan(feed_day=6)
    (found,) = [e for e in expect(plan, {"feed_named": 1.0}, [told("fairness"), told("income is missing", "income")]) if "feed" in e.name]
    assert found.is_met and found.says == "income is missing"
    (missed,) = [e for e in expect(plan, {}, [told("fairness")]) if "feed" in e.name]
    assert not missed.is_met
