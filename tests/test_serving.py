"""The bundle, the scorer and the HTTP surface, without a server around them."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import httpx
import msgspec
import numpy as np
import pytest
from bundles import LEVELS, PLACES_SEEN, Project, make_columns, make_project
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from ekiben.errors import IntegrityError, RowError
from ekiben.records import Policy
from ekiben.serving.http.app import ServiceApp
from ekiben.serving.http.state import State
from ekiben.serving.bundle import Limits, load_bundle, stamp_bundle
from ekiben.serving.security.integrity import open_folder
from ekiben.serving.journal.journal import new_ids, read_journal
from ekiben.serving.scoring.scorer import Scorer, self_test

TASKS = ("binary", "multiclass", "regression")


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Project:
    return make_project(tmp_path_factory.mktemp("census"))


@pytest.fixture(scope="module")
def scorer(project) -> Scorer:
    return Scorer(load_bundle(project.bundle.folder))


def one_by_one(scorer: Scorer, rows: list[dict]) -> np.ndarray:
    return np.array([scorer.score_columns(scorer.reader.read([row]))[0][0] for row in rows])


# ---- the scorer against the pipeline


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("runtime", ["lightgbm", "linear", "python"])
def test_rows_and_batches_get_the_bits_of_the_pipeline(tmp_path, runtime, task):
    project = make_project(tmp_path, runtime=runtime, task=task)
    scorer = Scorer(load_bundle(project.bundle.folder))
    fresh = make_columns(300, seed=7)
    expected = project.predict(fresh)
    rows = fresh.to_rows()
    batch, decision = scorer.score_columns(scorer.reader.read(rows))
    assert np.array_equal(batch, expected)
    assert np.array_equal(decision, project.policy.decide(expected))
    singles = one_by_one(scorer, rows[:100])
    if runtime == "python":
        np.testing.assert_allclose(singles, expected[:100], rtol=1e-12)
    else:
        assert np.array_equal(singles, expected[:100])


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_do_not_change_a_bit(project, scorer, threads):
    fresh = make_columns(5000, seed=9)
    assert np.array_equal(scorer.score_columns(fresh, threads=threads)[0], project.predict(fresh))


values = st.fixed_dictionaries(
    {
        "age": st.none() | st.floats(0, 120) | st.integers(0, 120),
        "income": st.none() | st.floats(allow_nan=False, allow_infinity=False) | st.just(-0.0),
        "job": st.none() | st.sampled_from(LEVELS) | st.text(min_size=1, max_size=5).filter(lambda t: t.strip() == t),
        "place": st.none() | st.sampled_from(PLACES_SEEN) | st.text(max_size=8),
        "member": st.none() | st.booleans(),
        "since": st.none() | st.datetimes().map(lambda d: d.isoformat()),
    }
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(values, min_size=1, max_size=8))
def test_any_row_alone_equals_itself_in_a_batch_and_in_the_pipeline(project, scorer, rows):
    with np.errstate(over="ignore", invalid="ignore"):
        columns = scorer.reader.read(rows)
        batch = scorer.score_columns(columns)[0]
        assert np.array_equal(batch, project.predict(columns))
        assert np.array_equal(one_by_one(scorer, rows), batch)


def test_the_policy_decides_by_group_when_it_says_so(tmp_path):
    policy = Policy(
        task="binary", threshold=0.5, group_by="sex", thresholds={"F": 0.0, "M": 1.1}, unknown_group="strictest"
    )
    project = make_project(tmp_path, policy=policy)
    scorer = Scorer(project.bundle)
    row = project.columns.rows([0]).to_rows()[0]
    assert [scorer.score_rows([{**row, "sex": s}])[0].label for s in ("F", "M", None, "X")] == ["yes", "no", "no", "no"]
    with pytest.raises(RowError, match="sex"):
        scorer.score_rows([{k: v for k, v in row.items() if k != "sex"}])


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("runtime", ["lightgbm", "linear"])
def test_contributions_and_base_sum_to_the_margin(tmp_path, runtime, task):
    scorer = Scorer(make_project(tmp_path, runtime=runtime, task=task).bundle)
    rows = make_columns(20, seed=3).to_rows()
    for said in scorer.explain_rows(rows, new_ids(20)):
        if task == "multiclass":
            sums = {c: said.base[c] + sum(said.contributions[c].values()) for c in said.base}
            assert all(abs(sums[c] - said.margin[c]) < 1e-9 for c in sums)
            assert "log_income" in said.contributions["low"]
        else:
            assert abs(said.base + sum(said.contributions.values()) - said.margin) < 1e-9
            assert set(said.contributions) == set(scorer.bundle.preprocessor.names)
        if task == "binary":
            assert said.probability == pytest.approx(1 / (1 + np.exp(-said.margin)), abs=1e-12)


# ---- the bundle


def test_every_changed_added_or_missing_file_is_named(project, tmp_path):
    stamp_bundle(project.bundle.folder, tmp_path / "b", version="1")
    names = sorted(open_folder(tmp_path / "b"))
    assert len(names) >= 10
    for name in names:
        path = tmp_path / "b" / name
        raw = path.read_bytes()
        for changed, problem in ((raw[:-1] + bytes([raw[-1] ^ 1]) if raw else b"x", "changed"), (None, "missing")):
            path.write_bytes(changed) if changed is not None else path.unlink()
            with pytest.raises(IntegrityError, match=Path(name).name) as caught:
                load_bundle(tmp_path / "b")
            assert (caught.value.file, caught.value.problem) == (name, problem)
        path.write_bytes(raw)
    for extra in ("code/pipeline/extra.py", "code/pipeline/__pycache__/prepare.cpython-311.pyc", "model/.hidden"):
        path = tmp_path / "b" / extra
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x = 1")
        with pytest.raises(IntegrityError) as caught:
            load_bundle(tmp_path / "b")
        assert (caught.value.file, caught.value.problem) == (extra, "added")
        path.unlink()
    assert load_bundle(tmp_path / "b").info.lineage.version == "1"


def test_a_symbolic_link_is_not_followed(project, tmp_path):
    stamp_bundle(project.bundle.folder, tmp_path / "b", version="1")
    card = tmp_path / "b" / "card.md"
    (tmp_path / "elsewhere").write_bytes(card.read_bytes())
    card.unlink()
    card.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(IntegrityError, match=r"card\.md"):
        load_bundle(tmp_path / "b")


def test_loading_a_bundle_leaves_no_file_in_it(project):
    before = sorted(p.name for p in project.bundle.folder.rglob("*"))
    self_test(Scorer(load_bundle(project.bundle.folder)))
    assert sorted(p.name for p in project.bundle.folder.rglob("*")) == before


def test_no_file_of_a_bundle_is_a_pickle(tmp_path):
    for runtime in ("lightgbm", "linear", "python"):
        for name, raw in open_folder(make_project(tmp_path / runtime, runtime=runtime).bundle.folder).items():
            assert not raw.startswith(b"\x80"), name
            assert name.endswith((".json", ".txt", ".py", ".md", ".skops")), name


def test_two_bundles_with_other_code_live_in_one_process(tmp_path):
    first = make_project(tmp_path / "a")
    second = make_project(tmp_path / "b", seed=5)
    code = (second.bundle.folder / "code" / "places.py").read_text()
    files = open_folder(second.bundle.folder)
    from ekiben.serving.security.integrity import seal_folder

    files["code/places.py"] = code.replace("Paris", "Oslo").encode()
    seal_folder(second.bundle.folder, files)
    one, other = load_bundle(first.bundle.folder), load_bundle(second.bundle.folder)
    inputs = make_columns(50, seed=2).pick([f.name for f in one.schema.inputs])
    assert one.features(inputs)["capital"].sum() > other.features(inputs)["capital"].sum()
    assert one.features.__module__ != other.features.__module__
    assert "census" not in sys.modules


def test_the_digest_speaks_of_answers_and_not_of_origins(project, tmp_path):
    stamped = stamp_bundle(project.bundle.folder, tmp_path / "b", version="12", mlflow_run="abc")
    assert stamped.digest == project.bundle.digest
    assert stamped.info.lineage.run_id == project.bundle.info.lineage.run_id
    assert make_project(tmp_path / "other", rounds=3).bundle.digest != project.bundle.digest


def test_a_wrong_answer_in_the_self_test_stops_the_service(project, tmp_path):
    from ekiben.serving.security.integrity import seal_folder

    files = open_folder(project.bundle.folder)
    examples = json.loads(files["examples.json"])
    examples[1]["prediction"] += 1e-6
    files["examples.json"] = json.dumps(examples).encode()
    seal_folder(tmp_path / "b", files)
    state = State()
    with pytest.raises(IntegrityError, match="self-test: example 1"):
        state.open(tmp_path / "b")
    assert call(state, "GET", "/readyz").status_code == 503
    assert "self-test" in call(state, "GET", "/readyz").json()["detail"]


@pytest.mark.parametrize("runtime", ["lightgbm", "linear"])
def test_the_serving_process_imports_nothing_heavy(tmp_path, runtime):
    project = make_project(tmp_path, runtime=runtime)
    program = f"""
import sys
from pathlib import Path
from ekiben.serving.http.app import ServiceApp
from ekiben.serving.http.state import State
state = State()
state.open(Path({str(project.bundle.folder)!r}))
state.scorer.explain_rows([state.scorer.bundle.examples[0].row], ["x"])
heavy = {{"pandas", "sklearn", "mlflow", "optuna", "lightgbm", "scipy", "pyarrow", "pydantic", "matplotlib", "census"}}
print(sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip() == "[]"


# ---- HTTP


def call(state: State, method: str, path: str, **kwargs) -> httpx.Response:
    async def go() -> httpx.Response:
        transport = httpx.ASGITransport(app=ServiceApp(state=state))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.request(method, path, **kwargs)

    return asyncio.run(go())


@pytest.fixture(scope="module")
def state(project, tmp_path_factory) -> State:
    state = State()
    state.open(project.bundle.folder, journal=tmp_path_factory.mktemp("journal") / "kept", bento="census:v1")
    return state


@pytest.fixture(scope="module")
def rows(project) -> list[dict]:
    return project.columns.rows(np.arange(50)).pick([f.name for f in project.schema.inputs]).to_rows()


def test_predict_answers_every_row_with_an_id_and_the_pipelines_probability(project, state, rows):
    answer = call(state, "POST", "/predict", json={"rows": rows})
    assert answer.status_code == 200
    said = answer.json()
    assert said["model"] == {"name": "census", "version": "", "bento": "census:v1"}
    assert set(said["predictions"][0]) == {"id", "label", "probability"}
    assert len({p["id"] for p in said["predictions"]}) == 50
    expected = project.predict(project.columns.rows(np.arange(50)))
    assert [p["probability"] for p in said["predictions"]] == expected.tolist()
    assert [p["label"] for p in said["predictions"]] == ["yes" if p >= 0.4 else "no" for p in expected]


def test_a_large_request_is_answered_like_small_ones(project, state):
    columns = make_columns(3000, seed=4)
    said = call(state, "POST", "/predict", json={"rows": columns.to_rows()}).json()
    assert [p["probability"] for p in said["predictions"]] == project.predict(columns).tolist()


def test_columns_of_the_training_table_are_accepted_and_ignored(state, rows):
    more = {**rows[0], "target": "yes", "id": "17", "sex": "F"}
    plain, full = (call(state, "POST", "/predict", json={"rows": [r]}).json()["predictions"][0] for r in (rows[0], more))
    assert plain["probability"] == full["probability"]


WRONG = [
    ("age", "39", "a text"),
    ("age", True, "a flag"),
    ("age", [39], "a list"),
    ("age", -3, None),
    ("age", 1e400, "NaN or Infinity"),
    ("income", float("nan"), "NaN or Infinity"),
    ("income", float("inf"), "NaN or Infinity"),
    ("job", 5, "a number"),
    ("member", 2, None),
    ("since", "someday", None),
    ("place", {"deep": 1}, "an object"),
]


@pytest.mark.parametrize(("column", "value", "got"), WRONG)
def test_a_wrong_value_is_named_by_row_and_column_and_never_repeated(state, rows, column, value, got):
    body = json.dumps({"rows": [rows[0], {**rows[1], column: value}]})
    answer = call(state, "POST", "/predict", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 422
    assert answer.headers["content-type"] == "application/problem+json"
    mistake = answer.json()["errors"][0]
    assert (mistake["row"], mistake["column"]) == (1, column)
    if got:
        assert mistake["got"] == got
    assert mistake["allowed"]
    if isinstance(value, str | dict | list):
        assert "someday" not in answer.text and '"39"' not in answer.text and "deep" not in answer.text


def test_missing_and_unknown_columns_are_named(state, rows):
    short = {k: v for k, v in rows[0].items() if k != "job"}
    answer = call(state, "POST", "/predict", json={"rows": [short]})
    assert answer.status_code == 422 and answer.json()["errors"][0]["column"] == "job"
    answer = call(state, "POST", "/predict", json={"rows": [{**rows[0], "agee": 3}]})
    assert answer.status_code == 422 and answer.json()["errors"][0]["column"] == "agee"


def test_missing_and_unseen_values_meet_the_policy(tmp_path, rows):
    strict = State()
    strict.open(make_project(tmp_path, limits=Limits(missing="reject", unseen="reject")).bundle.folder)
    whole = {"age": 30, "income": 1.0, "job": "clerk", "place": "Lyon", "member": True, "since": "2020-01-01"}
    assert call(strict, "POST", "/predict", json={"rows": [whole]}).status_code == 200
    for column, value in (("age", None), ("job", "wizard")):
        answer = call(strict, "POST", "/predict", json={"rows": [{**whole, column: value}]})
        assert answer.status_code == 422 and answer.json()["errors"][0]["column"] == column
        assert "wizard" not in answer.text


def test_unseen_and_missing_are_taken_by_default(state, rows):
    answer = call(state, "POST", "/predict", json={"rows": [{**rows[0], "job": "wizard", "age": None}]})
    assert answer.status_code == 200


@pytest.mark.parametrize(
    ("content", "media", "status"),
    [
        (b'{"rows": [', "application/json", 400),
        (b"\xff\xfe", "application/json", 400),
        (b"", "application/json", 400),
        (b'{"rows": [{"age": ' + b"[" * 100_000, "application/json", 422),
        (b'{"rows": [{"age": ' + b"[" * 100_000 + b"NaN", "application/json", 422),
        (b'{"rows": NaN', "application/json", 400),
        (b"[]", "application/json", 422),
        (b'{"rows": []}', "application/json", 422),
        (b'{"rows": {}}', "application/json", 422),
        (b'{"rows": [3]}', "application/json", 422),
        (b'{"rows": [{}], "more": 1}', "application/json", 422),
        (b'{"rows": []}', "text/plain", 415),
        (b'{"rows": []}', "", 415),
    ],
)
def test_other_bodies_are_refused(state, content, media, status):
    answer = call(state, "POST", "/predict", content=content, headers={"content-type": media} if media else {})
    assert answer.status_code == status
    problem = answer.json()
    assert problem["status"] == status and problem["type"].startswith("urn:ekiben:problem:")


def test_limits_on_rows_and_bytes(tmp_path, rows):
    small = State()
    small.open(make_project(tmp_path, limits=Limits(max_rows=3, max_body_mb=0.001)).bundle.folder)
    row = {"age": 30, "income": 1.0, "job": "clerk", "place": "L", "member": True, "since": "2020-01-01"}
    assert call(small, "POST", "/predict", json={"rows": [row] * 3}).status_code == 200
    assert call(small, "POST", "/predict", json={"rows": [row] * 4}).status_code == 413
    big = json.dumps({"rows": [{**row, "place": "L" * 2000}]}).encode()
    headers = {"content-type": "application/json"}
    assert call(small, "POST", "/predict", content=big, headers=headers).status_code == 413

    async def pieces():
        for start in range(0, len(big), 100):
            yield big[start : start + 100]

    assert call(small, "POST", "/predict", content=pieces(), headers=headers).status_code == 413


def test_methods_and_addresses(state):
    assert call(state, "GET", "/predict").status_code == 405
    assert call(state, "GET", "/predict").headers["allow"] == "POST"
    assert call(state, "DELETE", "/model").headers["allow"] == "GET, HEAD"
    assert call(state, "GET", "/nothing").status_code == 404
    assert call(state, "HEAD", "/model").content == b""


def test_explain_names_features_as_the_model_knows_them(state, rows):
    said = call(state, "POST", "/explain", json={"rows": rows[:2]}).json()["explanations"][0]
    assert {"age", "income", "log_income", "capital", "job"} <= set(said["contributions"])
    assert said["base"] + sum(said["contributions"].values()) == pytest.approx(said["margin"], abs=1e-9)
    predicted = call(state, "POST", "/predict", json={"rows": rows[:1]}).json()["predictions"][0]
    assert (said["label"], said["probability"]) == (predicted["label"], predicted["probability"])


def test_a_runtime_without_exact_contributions_says_so(tmp_path, rows):
    state = State()
    state.open(make_project(tmp_path, runtime="python").bundle.folder)
    answer = call(state, "POST", "/explain", json={"rows": rows[:1]})
    assert answer.status_code == 501 and "python" in answer.json()["detail"]


def test_predictions_and_feedback_meet_in_the_journal(state, rows):
    said = call(state, "POST", "/predict", json={"rows": [{**rows[0], "sex": "F"}]}).json()["predictions"][0]
    assert call(state, "POST", "/feedback", json={"id": said["id"], "label": "no"}).json()["recorded"] is True
    events = [e for e in read_journal(state.journal.folder) if e["id"] == said["id"]]
    assert [e["event"] for e in events] == ["prediction", "feedback"]
    assert events[0]["output"] == {"label": said["label"], "probability": said["probability"]}
    assert events[0]["inputs"] == rows[0], "only inputs are kept, never a sensitive column"


@pytest.mark.parametrize(
    "body", [{"id": "x", "label": "no"}, {"id": new_ids(1)[0], "label": "maybe"}, {"id": new_ids(1)[0], "label": 1}, {}]
)
def test_feedback_that_fits_nothing_is_refused(state, body):
    assert call(state, "POST", "/feedback", json=body).status_code == 422


def test_feedback_without_a_journal_is_refused(project):
    state = State()
    state.open(project.bundle.folder)
    answer = call(state, "POST", "/feedback", json={"id": new_ids(1)[0], "label": "no"})
    assert answer.status_code == 501 and "EKIBEN_JOURNAL" in answer.json()["detail"]


def test_nothing_is_served_before_the_bundle_is_open():
    state = State()
    assert call(state, "GET", "/livez").status_code == 200
    for method, path in (("GET", "/readyz"), ("GET", "/model"), ("GET", "/schema"), ("POST", "/predict")):
        answer = call(state, method, path, **({"json": {"rows": [{}]}} if method == "POST" else {}))
        assert answer.status_code == 503 and answer.headers["retry-after"] == "1"


def test_model_schema_and_readiness_tell_where_it_comes_from(project, state):
    model = call(state, "GET", "/model").json()
    assert model["lineage"]["git"] == "0" * 40 and model["digest"] == project.bundle.digest
    assert model["policy"]["threshold"] == 0.4
    names = [f["name"] for f in call(state, "GET", "/schema").json()["fields"]]
    assert names == ["age", "income", "job", "place", "member", "since"]
    ready = call(state, "GET", "/readyz").json()
    assert ready["status"] == "ready" and ready["self_test"] == 4


def test_metrics_count_what_happened(project, rows):
    state = State()
    state.open(project.bundle.folder)
    call(state, "POST", "/predict", json={"rows": rows[:7]})
    call(state, "POST", "/predict", content=b"{")
    families = {f.name: f for f in text_string_to_metric_families(call(state, "GET", "/metrics").text)}
    requests = {(s.labels["route"], s.labels["status"]): s.value for s in families["ekiben_requests"].samples}
    assert requests == {("/predict", "200"): 1, ("/predict", "415"): 1}
    assert families["ekiben_rows"].samples[0].value == 7
    assert sum(s.value for s in families["ekiben_decisions"].samples) == 7
    assert families["ekiben_errors"].samples[0].value == 1


@pytest.mark.parametrize("task", TASKS)
def test_openapi_examples_are_answered_as_described(tmp_path, task):
    state = State()
    state.open(make_project(tmp_path, task=task).bundle.folder)
    document = call(state, "GET", "/openapi.json").json()
    post = document["paths"]["/predict"]["post"]
    media = post["requestBody"]["content"]["application/json"]
    assert set(document["components"]["schemas"]["Row"]["required"]) == set(media["example"]["rows"][0])
    said = call(state, "POST", "/predict", json=media["example"]).json()
    described = post["responses"]["200"]["content"]["application/json"]["example"]["predictions"]
    assert [{k: v for k, v in p.items() if k != "id"} for p in said["predictions"]] == [
        {k: v for k, v in p.items() if k != "id"} for p in described
    ]


@settings(max_examples=150, deadline=None)
@given(body=st.binary(max_size=60) | st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5) | st.integers(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["rows", "age", "job"]), inner, max_size=3),
    max_leaves=8,
).map(lambda value: json.dumps(value).encode()))
def test_no_body_makes_the_service_fail(state, body):
    for path in ("/predict", "/explain", "/feedback"):
        answer = call(state, "POST", path, content=body, headers={"content-type": "application/json"})
        assert answer.status_code in (400, 422)
        msgspec.json.decode(answer.content)
