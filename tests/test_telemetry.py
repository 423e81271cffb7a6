"""What the service tells of itself: metrics that a parser takes and that are true, and drift that is more than chance."""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter

import httpx
import numpy as np
import pytest
from bundles import make_columns, make_project
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_strictly
from prometheus_client.parser import text_string_to_metric_families

from ekiben.columns import Columns
from ekiben.profile import profile_of
from ekiben.records import Field, Schema
from ekiben.rows import RowReader
from ekiben.serving.http.app import ServiceApp
from ekiben.serving.signals.drifting import Window, psi, psi_noise
from ekiben.serving.signals.examiner import LONGEST, SAMPLE, Examiner
from ekiben.serving.security.integrity import seal_folder
from ekiben.serving.options import ServiceOptions
from ekiben.serving.scoring.answers import Answer
from ekiben.serving.scoring.scorer import Scorer
from ekiben.serving.http.state import State
from ekiben.serving.signals.telemetry import FIGURES, MEDIA_TYPE, Telemetry


def make_schema(task: str = "regression", classes: tuple[str, ...] = ()) -> Schema:
    fields = (Field(name="age", kind="number"), Field(name="job", kind="category", categories=("clerk", "smith")))
    return Schema(fields=fields, task=task, target="target", classes=classes)


def make_people(n: int, seed: int = 0) -> Columns:
    rng = np.random.default_rng(seed)
    return Columns({"age": rng.normal(40, 10, n), "job": rng.choice(["clerk", "smith"], n).astype(object)})


def make_examiner(per_s: float = 2_000, n: int = 5_000) -> Examiner:
    profile = profile_of(make_people(n)).with_predictions(np.random.default_rng(1).normal(size=n))
    return Examiner(profile, RowReader(make_schema()), "regression", per_s=per_s)


def read(text: str) -> dict[tuple[str, ...], float]:
    """Return the samples by name and labels, in the labels' order."""
    families = text_string_to_metric_families(text)
    found = [((s.name, *(v for _, v in sorted(s.labels.items()))), s.value) for f in families for s in f.samples]
    assert len(found) == len(dict(found)), "a sample is told twice"
    return dict(found)


@pytest.fixture(scope="module", params=["binary", "multiclass", "regression"])
def answered(request, tmp_path_factory):
    """A scorer of every task, rows with every kind of column, and what was told of them."""
    task = request.param
    project = make_project(tmp_path_factory.mktemp(task), task=task, rows=400, rounds=5)
    scorer = Scorer(project.bundle)
    prediction, _ = scorer.score_columns(project.columns)
    profile = profile_of(project.columns, project.schema.inputs).with_predictions(prediction, project.schema.classes)
    fresh = make_columns(300, seed=9)
    rows = fresh.pick([f.name for f in scorer.request_schema.inputs]).to_rows()
    for i in range(20):
        rows[i] |= {"age": 119.5, "job": "astronaut", "since": "1950-01-01"}
    told = Telemetry("cens\"us\n", "3", examiner=Examiner(profile, scorer.reader, task), classes=scorer.info.classes)
    for row in rows:
        told.rows_answered("/predict", [row], scorer.score_rows([row]))
        told.request("/predict", 200, 0.003)
    told.request("/predict", 422, 20.0)
    return task, scorer, profile, scorer.reader.read(rows), told


def test_prometheus_takes_every_line(answered):
    *_, told = answered
    figures = {key: 1.5 for key, _, _ in FIGURES}
    samples = read(told.to_text(figures))
    assert all(math.isfinite(value) for value in samples.values())
    assert {name for _, name, _ in FIGURES} <= {key[0] for key in samples}
    assert samples["ekiben_model_info", 'cens"us\n', "3"] == 1
    assert samples["process_resident_memory_bytes",] > 1e6 and samples["process_cpu_seconds_total",] > 0
    assert samples["process_start_time_seconds",] > 1.7e9


def test_the_strict_parser_takes_them_too(answered):
    # It refuses families in pieces, buckets that fall, counters below zero and counts that do not add up.
    *_, told = answered
    families = {family.name for family in parse_strictly(openmetrics.generate_latest(told).decode())}
    assert {"ekiben_requests", "ekiben_request_seconds", "ekiben_input_drift_psi", "ekiben_prediction"} <= families


def test_what_is_told_is_what_was_answered(answered):
    task, scorer, profile, columns, told = answered
    samples = read(told.to_text())
    prediction, decision = scorer.score_columns(columns)
    assert samples["ekiben_rows_total", "/predict"] == samples["ekiben_rows_examined_total",] == 300
    assert samples["ekiben_requests_total", "/predict", "200"] == 300
    assert samples["ekiben_errors_total", "/predict", "422"] == 1
    for field in scorer.request_schema.inputs:
        values = columns[field.name]
        gone = np.array([v is None or v != v for v in values.tolist()])
        assert samples["ekiben_input_missing_total", field.name] == gone.sum()
        if field.kind in ("number", "date"):
            own = values[~gone].astype(np.int64) / 1e6 if field.kind == "date" else values[~gone]
            seen = profile[field.name]
            wanted = ((own < seen.minimum) | (own > seen.maximum)).sum()
            assert samples["ekiben_input_out_of_range_total", field.name] == wanted >= (20 if field.name == "since" else 0)
    assert samples["ekiben_input_unseen_total", "job"] == 20
    if task == "regression":
        below = prediction <= profile.predictions[0].cuts[3]
        assert told.examiner.counts[0][:4].sum() == below.sum()
        return
    labels = Counter(scorer.info.classes[i] for i in decision)
    assert {k[1]: v for k, v in samples.items() if k[0] == "ekiben_decisions_total"} == labels
    named = scorer.info.classes if task == "multiclass" else scorer.info.classes[1:]
    for i, label in enumerate(named):
        own = prediction[:, i] if task == "multiclass" else prediction
        assert samples["ekiben_prediction_bucket", label, "0.5"] == (own <= 0.5).sum()
        assert samples["ekiben_prediction_sum", label] == pytest.approx(own.sum())
        assert ("ekiben_prediction_drift_psi", label) in samples


def test_columns_count_as_rows_do(answered):
    task, scorer, profile, columns, told = answered
    prediction, decision = scorer.score_columns(columns)
    bulk = Telemetry(examiner=Examiner(profile, scorer.reader, task, per_s=1e9), classes=scorer.info.classes)
    for start in range(0, 300, 100):
        part = slice(start, start + 100)
        bulk.columns_answered("/predict", columns.rows(part), prediction[part], decision[part])
        bulk.examiner.examine()
    one, other = read(told.to_text()), read(bulk.to_text())
    same = ("ekiben_input", "ekiben_decisions", "ekiben_rows_examined", "ekiben_prediction_bucket")
    assert {k: v for k, v in one.items() if k[0].startswith(same)} == {k: v for k, v in other.items() if k[0].startswith(same)}


def test_a_service_without_profile_or_requests_says_so_little():
    samples = read(Telemetry().to_text())
    assert samples["ekiben_ready",] == 0 and not any("drift" in key[0] for key in samples)
    told = Telemetry(examiner=make_examiner())
    samples = read(told.to_text())
    assert samples["ekiben_drift_window_rows",] == 0 and not any("psi" in key[0] for key in samples)


def test_a_profile_without_predictions_still_serves():
    examiner = Examiner(profile_of(make_people(500)), RowReader(make_schema()), "regression")
    told = Telemetry(examiner=examiner)
    told.rows_answered("/predict", [{"age": 1, "job": "x"}], [Answer(value=2.0)])
    samples = read(told.to_text())
    assert examiner.examined == 1 and ("ekiben_input_drift_psi", "age") in samples


def test_explained_rows_are_counted_but_not_examined():
    told = Telemetry(examiner=make_examiner())
    told.rows_answered("/explain", [{"age": 1, "job": "clerk"}])
    assert told.rows["/explain"] == 1 and told.examiner.offered == 0


@given(name=st.text(st.characters(codec="utf-8"), max_size=20))
@settings(max_examples=50, deadline=None)
def test_any_name_survives_as_a_label(name):
    told = Telemetry(name, classes=("no", name))
    told.decisions[name] += 2
    samples = read(told.to_text())
    assert samples["ekiben_decisions_total", name] == 2 and samples["ekiben_model_info", name, ""] == 1


# The sample


@pytest.mark.parametrize("way", ["one by one", "many", "columns"])
def test_the_sample_is_uniform(way):
    random.seed(4)
    n, examiner = 4_000, make_examiner(per_s=1e-3)
    examiner._due = math.inf
    columns = Columns({"age": np.arange(n, dtype=float), "job": np.full(n, "clerk", dtype=object)})
    rows, answers = columns.to_rows(), [Answer(value=float(i)) for i in range(n)]
    found: Counter[int] = Counter()
    for _ in range(20):
        if way == "columns":
            for start in (0, 1_000):
                part = slice(start, start + 1_000) if start == 0 else slice(1_000, n)
                examiner.take_columns(columns.rows(part), np.arange(n, dtype=float)[part])
        else:
            step = 1 if way == "one by one" else 500
            for start in range(0, n, step):
                examiner.take(rows[start : start + step], answers[start : start + step])
        assert len(examiner._waiting) == SAMPLE and examiner._seen == n
        assert all(row["age"] == value for row, value in examiner._waiting)
        found.update(int(value) // 500 for _, value in examiner._waiting)
        examiner._waiting, examiner._seen = [], 0
    counts = np.array([found[i] for i in range(8)])
    expected = 20 * SAMPLE / 8
    assert ((counts - expected) ** 2 / expected).sum() < 29.9  # chi-squared with 7 degrees of freedom, 1 in 10,000


def test_no_more_than_the_rate_is_examined(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("ekiben.serving.signals.examiner.monotonic", lambda: now[0])
    examiner = make_examiner(per_s=2_000)
    for i in range(20_000):  # 10,000 rows a second for two seconds
        now[0] = 100 + i / 10_000
        examiner.take([{"age": 40.0, "job": "clerk"}], [Answer(value=0.0)])
    assert examiner.offered == 20_000 and 3_500 <= examiner.examined <= 4_300


def test_what_waits_is_bounded_whatever_comes():
    examiner = make_examiner(per_s=1e-3)
    examiner._due = math.inf
    text = "x" * 1_000_000
    examiner.take([{"age": 1.0, "job": text, "ignored": [text]}] * 1_000, [Answer(value=0.0)] * 1_000)
    for _ in range(1_000):
        examiner.take([{"age": 1.0, "job": text}], [Answer(value=0.0)])
    assert len(examiner._waiting) == SAMPLE
    assert all(len(row) == 2 and len(row["job"]) == LONGEST for row, _ in examiner._waiting)


def test_a_row_that_cannot_be_counted_costs_no_answer(caplog):
    examiner = make_examiner()
    for _ in range(2 * SAMPLE):
        examiner.take([{"age": "no number", "job": "clerk"}], [Answer(value=0.0)])
        examiner._due = 0.0
    assert examiner.failed == 2 * SAMPLE and examiner.examined == 0
    assert len(caplog.records) == 1
    told = Telemetry(examiner=examiner)
    assert read(told.to_text())["ekiben_rows_not_examined_total",] == 2 * SAMPLE


# Drift


@pytest.mark.parametrize("rows", [100, 1_000, 10_000])
def test_rows_like_the_reference_stay_within_the_noise(rows):
    rng = np.random.default_rng(rows)
    even, rare = np.full(20, 0.05), 0.7 ** np.arange(40)
    for shares in (even, rare / rare.sum()):
        drawn = [(rng.multinomial(20_000, shares), rng.multinomial(rows, shares)) for _ in range(1_000)]
        beyond = np.mean([psi(reference, counts) > psi_noise(reference, counts) for reference, counts in drawn])
        assert beyond < 0.03  # one in a hundred is meant


def test_rows_unlike_the_reference_do_not():
    reference = np.full(20, 1_000)
    shifted = np.array([20] * 5 + [50] * 10 + [80] * 5)
    assert psi(reference, shifted) > 2 * psi_noise(reference, shifted)
    new = np.array([*np.full(20, 45), 0, 100])  # a tenth of what training never had
    assert psi(np.array([*reference, 0, 0]), new) > 2 * psi_noise(np.array([*reference, 0, 0]), new)


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=30), st.data())
@settings(max_examples=200, deadline=None)
def test_the_index_is_finite_and_nought_for_the_same(counts, data):
    reference = np.array(counts, dtype=float)
    other = np.array(data.draw(st.lists(st.integers(0, 10**6), min_size=len(counts), max_size=len(counts))), dtype=float)
    assert 0 <= psi(reference, other) < 100
    assert psi(1_000 * reference, 1_000 * reference) < 0.01
    assert 0 <= psi_noise(reference, other) < math.inf


def test_the_window_holds_the_last_blocks():
    train = make_people(2_000)
    window = Window(profile_of(train).with_predictions(np.zeros(2_000)), block_rows=100, blocks=4)
    seen = []
    for i in range(13):
        part = make_people(50, seed=i + 1)
        window.add(part, np.zeros(50))
        seen.append(part)
        held = 50 * (i + 1) if i < 10 else (450, 500)[i % 2]  # four full blocks, and the one that is being filled
        last = seen[len(seen) - held // 50 :]
        counts = sum(profile_of(train)["age"].count(p["age"]) for p in last)
        assert window.rows == held
        assert window.drift()["age"][0] == pytest.approx(psi(window.reference["age"], counts))
    assert window.totals["job"].sum() == 13 * 50 and window.seconds >= 0


def test_what_the_profile_left_out_is_not_called_unseen():
    jobs = np.array([f"job {i}" for i in range(150)] * 3, dtype=object)
    train = Columns({"job": jobs})
    window = Window(profile_of(train))  # 100 levels are kept, and no schema says which others there were
    window.add(train, np.zeros(len(jobs)))
    assert window.unseen == {"job": 0}
    known = Window(profile_of(train), [Field(name="job", kind="category", categories=tuple(set(jobs)))])
    known.add(Columns({"job": np.array(["job 149", "astronaut", None], dtype=object)}), np.zeros(3))
    assert known.unseen == {"job": 1} and known.missing() == {"job": 1}


# In the service


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    """The HTTP surface of a bundle with a profile."""
    home = tmp_path_factory.mktemp("service")
    project = make_project(home, rows=400, rounds=5)
    prediction, _ = Scorer(project.bundle).score_columns(project.columns)
    profile = profile_of(project.columns, project.schema.inputs).with_predictions(prediction)
    seal_folder(home / "watched", {**project.bundle.files, "profile.json": profile.to_json()})
    state = State()
    state.open(home / "watched", service=ServiceOptions())
    yield ServiceApp(state=state)
    state.close()


def ask(app: ServiceApp, method: str, path: str, **request) -> httpx.Response:
    async def send() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            return await client.request(method, path, **request)

    return asyncio.run(send())


def test_the_service_tells_what_it_answered(service):
    rows = make_columns(120, seed=3).to_rows()
    for row in rows[:20]:
        assert ask(service, "POST", "/predict", json={"rows": [row]}).status_code == 200
    assert ask(service, "POST", "/predict", json={"rows": rows[20:]}).status_code == 200
    assert ask(service, "POST", "/explain", json={"rows": rows[:3]}).status_code == 200
    came = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00"
    problem = ask(service, "POST", "/predict", json={"rows": [{"age": "x"}]}, headers={"traceparent": came})
    assert problem.json()["trace_id"] == came.split("-")[1] == problem.headers["traceparent"].split("-")[1]
    answer = ask(service, "GET", "/metrics")
    assert answer.headers["content-type"] == MEDIA_TYPE.decode()
    samples = read(answer.text)
    assert samples["ekiben_rows_examined_total",] == samples["ekiben_rows_total", "/predict"] == 120
    assert samples["ekiben_rows_total", "/explain"] == 3
    assert samples["ekiben_errors_total", "/predict", "422"] == 1
    assert samples["ekiben_ready",] == 1 and samples["ekiben_requests_in_flight",] == 0
    assert {key[1] for key in samples if key[0] == "ekiben_input_drift_psi"} == set(service.state.scorer.inputs)
    assert samples["ekiben_prediction_drift_psi", "yes"] < 1 and samples["ekiben_drift_window_rows",] == 120
