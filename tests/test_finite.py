"""What a model cannot answer with a finite number is refused by row, whichever way it was asked, and the rest is answered."""

from __future__ import annotations

import asyncio
import csv
import io
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from bundles import make_project
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ekiben.errors import RowError
from ekiben.models import SklearnModel
from ekiben.serving.bundle import write_bundle
from ekiben.serving.http.app import ServiceApp
from ekiben.serving.http.state import State
from ekiben.serving.scoring.answers import require_finite
from ekiben.serving.scoring.scorer import Scorer

GOOD = {"age": 30, "income": 1000.0, "job": "clerk", "place": "Lyon", "member": True, "since": "2020-01-01"}
HUGE = {**GOOD, "income": 1e150}  # no float32
INFINITE = {**GOOD, "income": 1.7e308, "age": 1e-300}  # and its ratio of income to age is infinite
EXTREMES = (None, 1e-300, 1.0, 1e150, 1.7e308, -1.7e308)


def call(state: State, path: str, **kwargs: Any) -> httpx.Response:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app=ServiceApp(state=state))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.post(path, **kwargs)

    return asyncio.run(ask())


def opened(folder: Path) -> State:
    state = State()
    state.open(folder, journal=folder.parent / "journal")
    return state


def picky(folder: Path) -> Path:
    """Return a bundle whose estimator refuses what is infinite, as most of scikit-learn's do."""
    from sklearn.ensemble import RandomForestClassifier

    made = make_project(folder / "made")
    X = np.random.default_rng(0).normal(size=(60, len(made.preprocessor.names)))
    model = SklearnModel(RandomForestClassifier(3, random_state=0).fit(X, X[:, 0] > 0), "binary", 2)
    parts = {"schema": made.schema, "preprocessor": made.preprocessor, "policy": made.policy, "code": made.bundle.part("code")}
    code = {name: raw.decode() for name, raw in parts.pop("code").items()}
    return write_bundle(folder / "bundle", name="picky", model=model, code=code, examples=(), **parts).folder


@pytest.fixture(scope="module", params=["binary", "multiclass", "regression"])
def linear(request, tmp_path_factory) -> Path:
    return make_project(tmp_path_factory.mktemp(request.param), runtime="linear", task=request.param).bundle.folder


def refusal(answer: httpx.Response) -> dict[str, Any]:
    assert answer.status_code == 422, answer.text
    (mistake,) = answer.json()["errors"]
    assert "no finite answer" in answer.json()["detail"] and "1.7e" not in answer.text and "1e+150" not in answer.text
    return mistake


@pytest.mark.parametrize("before", [0, 2, 40])
def test_an_infinite_explanation_is_refused_by_row(linear, before):
    mistake = refusal(call(opened(linear), "/explain", json={"rows": [GOOD] * before + [INFINITE]}))
    assert mistake["row"] == before and "`ratio`" in mistake["message"]


@pytest.mark.parametrize("before", [0, 2, 40])
def test_an_infinite_value_is_refused_by_row_and_the_others_are_answered(tmp_path, before):
    state = opened(make_project(tmp_path, runtime="linear", task="regression").bundle.folder)
    rows = [GOOD] * before + [INFINITE]
    assert refusal(call(state, "/predict", json={"rows": rows}))["row"] == before
    out = io.StringIO()
    writer = csv.DictWriter(out, list(GOOD))
    writer.writeheader()
    writer.writerows(rows)
    told = refusal(call(state, "/predict", content=out.getvalue(), headers={"content-type": "text/csv"}))
    assert told["row"] == before and told["column"] == ""
    assert call(state, "/predict", json={"rows": [GOOD, GOOD]}).status_code == 200
    state.close()


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.fixed_dictionaries({"age": st.sampled_from((None, 0, 5e-324, 1e-300, 60)), "income": st.sampled_from(EXTREMES)}), min_size=1, max_size=20))
def test_an_answer_is_finite_or_its_row_is_named(linear, rows):
    rows = [{**GOOD, **row} for row in rows]
    scorer = Scorer(opened(linear).arm.scorer.bundle)
    with np.errstate(all="ignore"):
        X = scorer.to_matrix(scorer.reader.read(rows))
        plain = scorer.engine.predict(X).reshape(len(rows), -1)
        wrong = np.flatnonzero(~np.isfinite(plain).all(axis=1)).tolist()
        if wrong:
            with pytest.raises(RowError) as caught:
                scorer.score_rows(rows)
            assert [e["row"] for e in caught.value.errors] == wrong[:20]
        else:
            assert len(scorer.score_rows(rows)) == len(rows)


def test_an_estimator_that_refuses_infinity_is_no_failure_of_the_service(tmp_path):
    state = opened(picky(tmp_path))
    for rows in ([INFINITE], [GOOD, INFINITE], [HUGE], [GOOD, HUGE]):
        mistake = refusal(call(state, "/predict", json={"rows": rows}))
        assert mistake["row"] == len(rows) - 1 and "`income`, `ratio`" in mistake["message"]
    state.close()


def test_an_estimator_that_fails_on_finite_numbers_is_one(tmp_path, monkeypatch):
    scorer = Scorer(opened(picky(tmp_path)).arm.scorer.bundle)

    def fail(X: Any, threads: int = 1) -> Any:
        raise ZeroDivisionError("its own mistake")

    monkeypatch.setattr(scorer.engine, "predict", fail)
    for rows in ([GOOD], [GOOD] * 3):
        with pytest.raises(ZeroDivisionError, match="its own"):
            scorer.score_rows(rows)


def test_at_most_twenty_rows_are_named():
    with pytest.raises(RowError, match="and 29 more") as caught:
        require_finite(np.full((30, 3), np.nan), np.zeros((30, 2)), ["a", "b"])
    assert len(caught.value.errors) == 20
