"""Champion and challenger in one process: swaps that lose nothing, keys that stay, and a way back that needs nobody."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bundles import make_project
from hypothesis import given, settings
from hypothesis import strategies as st

from ekiben.serving.hosting import hosting as hosting_module
from ekiben.serving.hosting import leaving as leaving_module
from ekiben.serving.hosting import logbook as logbook_module
from ekiben.serving.http.app import ServiceApp
from ekiben.serving.bundle import load_bundle, stamp_bundle
from ekiben.serving.hosting.deployment import (
    ACCEPTED,
    BUNDLES,
    DEPLOYMENT,
    Deployment,
    GuardLimits,
    add_bundle,
    append_event,
    deployment_folder,
    now,
    read_events,
    read_status,
    write_deployment,
)
from ekiben.serving.journal.journal import read_journal
from ekiben.serving.options import ServiceOptions
from ekiben.serving.hosting.referee import Moments, judge_errors, judge_latency, judge_loss, judge_shift
from ekiben.serving.hosting.routing import place_of
from ekiben.serving.journal.seal import seal_journal
from ekiben.serving.journal.sealed import open_journal, sealed_files
from ekiben.serving.scoring.compiled import Lane
from ekiben.serving.security.signer import sign_folder, signing_key
from ekiben.serving.hosting.standing import EVENTS, STATUS
from ekiben.serving.http.state import State
from ekiben.serving.signals.traffic import read_traffic
from ekiben.serving.security.trust import trusted_keys

ROW = {"age": 30, "income": 1.0, "job": "clerk", "place": "L", "member": True, "since": "2020-01-01"}
LOOSE = GuardLimits(max_error_rate=1, max_latency_ratio=1e9, max_loss_gap=1e9, max_shift=1e9)


@pytest.fixture(scope="module")
def signer():
    return signing_key(say=lambda line: None)


@pytest.fixture(scope="module")
def signed(tmp_path_factory, signer) -> dict[str, Path]:
    """Return signed bundles: versions 3 and 4 differ in their trees, 5 answers as 4 does, 9 is for another question."""
    top, found = tmp_path_factory.mktemp("signed"), {}
    for version, rounds, task in (("3", 5, "binary"), ("4", 20, "binary"), ("9", 5, "regression")):
        made = make_project(top / f"made{version}", rounds=rounds, rows=300, task=task, policy=None if task == "binary" else _policy())
        stamp_bundle(made.bundle.folder, top / f"v{version}", version=version)
        found[version] = top / f"v{version}"
    stamp_bundle(found["4"], top / "v5", version="5")
    found["5"] = top / "v5"
    for version, folder in found.items():
        sign_folder(folder, signer, kind="bundle", name=f"census:v{version}")
    return found


def _policy() -> Any:
    from ekiben.records import Policy

    return Policy(task="regression")


class Place:
    """A deployment's folder with everything in it, and what an operator does with it."""

    def __init__(self, top: Path, signed: dict[str, Path], signer: Any) -> None:
        self.top, self.signer, self.number = top, signer, 0
        self.folder = deployment_folder(top)
        self.arms = {version: add_bundle(self.folder, folder, bento=f"census:v{version}") for version, folder in signed.items()}
        self.own, self.journal = signed["3"], top / "journal"
        self.states: list[State] = []

    def deploy(self, champion: str = "3", challenger: str = "", mode: str = "", share: float = 0.5, **more: Any) -> Deployment:
        self.number = more.pop("number", self.number + 1)
        parts = {"at": now(), "by": "ada", "why": "a try", "limits": LOOSE, **more}
        if challenger:
            mode = mode or "canary"
            parts |= {"challenger": self.arms[challenger], "mode": mode, "share": share if mode == "canary" else 0.0}
        made = Deployment(environment="production", number=self.number, champion=self.arms[champion], **parts)
        write_deployment(self.folder, made, self.signer)
        return made

    def open(self, *, journal: bool = True, **more: Any) -> State:
        state = State()
        state.trust = trusted_keys()
        kept = self.journal if journal else None
        state.open(self.own, journal=kept, service=ServiceOptions(), deployment=more.pop("deployment", self.folder), **more)
        self.states.append(state)
        return state

    def events(self) -> list[str]:
        return [event.what for event in read_events(self.folder)]


@pytest.fixture
def place(tmp_path, signed, signer, monkeypatch):
    monkeypatch.setattr(hosting_module, "RETRY_S", 0.3)
    monkeypatch.setattr(leaving_module, "GRACE_S", 0.3)
    made = Place(tmp_path, signed, signer)
    yield made
    for state in made.states:
        state.close()


def client(state: State) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=ServiceApp(state=state)), base_url="http://localhost")


def call(state: State, method: str, path: str, **sent: Any) -> httpx.Response:
    async def go() -> httpx.Response:
        async with client(state) as asking:
            return await asking.request(method, path, **sent)

    return asyncio.run(go())


def post(app: ServiceApp, path: str, said: Any, **headers: str) -> Any:
    """Return the coroutine that posts JSON straight to the application, which is ten times as fast as through httpx."""
    raw, sent = json.dumps(said).encode(), []
    named = [(name.replace("_", "-").encode(), value.encode()) for name, value in {"content_type": "application/json", **headers}.items()]

    async def receive() -> Any:
        return {"type": "http.request", "body": raw, "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    async def go() -> tuple[int, Any]:
        scope = {"type": "http", "method": "POST", "path": path, "scheme": "http", "client": ("127.0.0.1", 1), "query_string": b"",
                 "server": ("127.0.0.1", 80), "headers": [*named, (b"content-length", str(len(raw)).encode())]}  # fmt: skip
        await app(scope, receive, send)
        return sent[0]["status"], json.loads(b"".join(m.get("body", b"") for m in sent[1:]))

    return go()


def ask(state: State, keys: Any, **headers: str) -> list[dict[str, Any]]:
    """Predict once for each key; return the answers."""

    async def go() -> list[dict[str, Any]]:
        app, found = ServiceApp(state=state), []
        for key in keys:
            status, said = await post(app, "/predict", {"rows": [{**ROW, "id": key}]}, **headers)
            assert status == 200, said
            found.append(said)
        return found

    return asyncio.run(go())


def tell(state: State, said: dict[str, str]) -> None:
    async def go() -> None:
        app = ServiceApp(state=state)
        for id_, label in said.items():
            assert (await post(app, "/feedback", {"id": id_, "label": label}))[0] == 200

    asyncio.run(go())


def wait(true: Any, timeout_s: float = 10.0) -> float:
    """Wait until something is so; return the seconds that it took."""
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < timeout_s, "it did not come about"
        time.sleep(0.005)
    return time.monotonic() - began


def until(state: State, number: int) -> None:
    """Wait until a deployment serves."""
    own = state.hosting
    wait(lambda: own.number == number and state.arm is own.champion and state.split is own.split and not own.refused)


def readyz(state: State) -> dict[str, Any]:
    return call(state, "GET", "/readyz").json()["deployment"]


def versions(answers: list[dict[str, Any]]) -> list[str]:
    return [answer["model"]["version"] for answer in answers]


# ---- what serves


def test_without_a_deployment_all_is_as_it_was(place):
    state = State()
    state.trust = trusted_keys()
    state.open(place.own, service=ServiceOptions())
    assert state.hosting is None and state.split is None
    assert "deployment" not in call(state, "GET", "/readyz").json() and "deployment" not in call(state, "GET", "/model").json()
    assert ask(state, [1])[0]["model"] == {"name": "census", "version": "3", "bento": ""}
    assert "ekiben_deployment" not in call(state, "GET", "/metrics").text


def test_an_empty_folder_serves_the_bento_s_own_and_waits(place):
    state = place.open()
    assert versions(ask(state, [1])) == ["3"] and readyz(state)["number"] == 0 and place.events() == []
    place.deploy("4")
    wait(lambda: state.model["version"] == "4")
    assert versions(ask(state, [1])) == ["4"] and readyz(state)["number"] == 1
    wait(lambda: read_status(place.folder).number == 1)


def test_what_was_deployed_serves_from_the_start_and_says_so(place):
    place.deploy("4", "3", share=0.25)
    state = place.open()
    said = call(state, "GET", "/model").json()
    assert (said["version"], said["challenger"]["version"], said["bento"]) == ("4", "3", "census:v4")
    assert said["deployment"] == readyz(state)
    assert (readyz(state)["champion"], readyz(state)["challenger"], readyz(state)["share"]) == ("4", "3", 0.25)
    status = read_status(place.folder)
    assert (status.serving, status.mode, status.share, set(status.arms)) == ("4", "canary", 0.25, {"3", "4"})
    assert place.events() == ["loaded"] and (place.folder / ACCEPTED).read_bytes() == (place.folder / DEPLOYMENT).read_bytes()


def test_a_swap_under_load_loses_no_request_and_no_row_of_the_journal(place):
    place.deploy("3")
    state = place.open()
    statuses: list[int] = []
    seen: list[str] = []
    ids: list[str] = []
    over = threading.Event()

    async def load() -> None:
        app = ServiceApp(state=state)
        many = {"rows": [{**ROW, "age": age} for age in range(17, 90)] * 10}  # larger ones are answered in a thread
        while not over.is_set():
            bodies = [{"rows": [{**ROW, "id": random.random()}]} for _ in range(20)] + [many]
            for status, said in await asyncio.gather(*(post(app, "/predict", body) for body in bodies)):
                statuses.append(status)
                seen.append(said["model"]["version"])
                ids.extend(p["id"] for p in said["predictions"])

    worker = threading.Thread(target=lambda: asyncio.run(load()))
    worker.start()
    took = []
    for champion, challenger in (("3", "4"), ("4", ""), ("3", "4"), ("5", "4"), ("3", "")):
        began = time.perf_counter()
        place.deploy(champion, challenger)
        until(state, place.number)
        took.append(time.perf_counter() - began)
        time.sleep(0.2)
    over.set()
    worker.join(20)
    print(f"{len(statuses)} requests during 5 swaps; from signing to serving {min(took):.2f} to {max(took):.2f} s")
    assert set(statuses) == {200} and set(seen) == {"3", "4", "5"} and seen[-1] == "3"
    state.close()
    kept = [event["id"] for event in read_journal(place.journal)]
    assert sorted(kept) == sorted(ids)


def test_the_same_key_goes_to_the_same_arm_whatever_bears_it_and_a_larger_share_keeps_its_keys(place):
    place.deploy("3", "4", share=0.2)
    state = place.open(journal=False)
    first = versions(ask(state, range(300)))
    assert versions(ask(state, range(300))) == first
    assert versions(ask(state, [float(key) for key in range(300)])) == first, "17.0 is 17"
    by_header = [versions(ask(state, ["x"], routing_key=str(key)))[0] for key in range(100)]
    assert by_header == first[:100]
    expected = ["4" if place_of(str(key).encode(), "production") < 0.2 else "3" for key in range(300)]
    assert first == expected
    place.deploy("3", "4", share=0.6)
    until(state, 2)
    later = versions(ask(state, range(300)))
    assert all(after == "4" for before, after in zip(first, later, strict=True) if before == "4")


@settings(max_examples=30, deadline=None)
@given(share=st.floats(0.01, 0.99), environment=st.sampled_from(["production", "staging"]), seed=st.integers(0, 2**32))
def test_the_share_is_what_it_should_be_within_chance(share, environment, seed):
    keys = np.random.default_rng(seed).integers(0, 2**62, 2_000)
    hit = sum(place_of(str(key).encode(), environment) < share for key in keys)
    assert abs(hit - 2_000 * share) < 5.5 * np.sqrt(2_000 * share * (1 - share)) + 1


def test_a_request_without_a_key_goes_where_its_body_says(place):
    place.deploy("3", "4")
    state = place.open(journal=False)
    ages = [{"rows": [{**ROW, "age": 20 + i / 10}]} for i in range(60)]
    first = [call(state, "POST", "/predict", json=body).json()["model"]["version"] for body in ages]
    assert set(first) == {"3", "4"}
    assert first == [call(state, "POST", "/predict", json=body).json()["model"]["version"] for body in ages]


def test_tables_and_explanations_go_where_single_rows_go(place):
    place.deploy("3", "4")
    state = place.open()
    keys = [str(key) for key in range(30)]
    expected = versions(ask(state, keys))
    for key, version in zip(keys, expected, strict=True):
        row = {**ROW, "id": key}
        out = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist([row, row]), out)
        sent = {"content": out.getvalue().to_pybytes(), "headers": {"content-type": "application/vnd.apache.parquet", "accept": "application/json"}}
        assert call(state, "POST", "/predict", **sent).json()["model"]["version"] == version
        assert call(state, "POST", "/predict", json={"rows": [row]}, headers={"accept": "text/csv"}).status_code == 200
        assert call(state, "POST", "/explain", json={"rows": [row]}).json()["model"]["version"] == version
    state.close()
    roles = [event["model"]["role"] for event in read_journal(place.journal)]
    assert roles.count("challenger") == 4 * expected.count("4") and roles.count("champion") == 4 * expected.count("3")


def test_each_answer_is_the_one_that_its_model_gives(place, signed):
    from ekiben.serving.scoring.scorer import Scorer

    place.deploy("3", "4")
    state = place.open()
    scorers = {version: Scorer(load_bundle(signed[version])) for version in ("3", "4")}
    for answer in ask(state, range(40)):
        version = answer["model"]["version"]
        assert answer["predictions"][0]["probability"] == scorers[version].score_row(ROW).probability


# ---- the shadow


def test_a_shadow_is_journalled_under_the_same_id_and_nobody_sees_it(place):
    place.deploy("3", "4", mode="shadow")
    state = place.open()
    answers = ask(state, range(60))
    assert set(versions(answers)) == {"3"}
    assert state.split.shadow.flush()
    state.close()
    events = read_journal(place.journal)
    by_role = {role: {e["id"]: e["output"] for e in events if e["model"]["role"] == role} for role in ("champion", "shadow")}
    assert set(by_role["champion"]) == set(by_role["shadow"]) == {a["predictions"][0]["id"] for a in answers}
    given = {a["predictions"][0]["id"]: a["predictions"][0]["probability"] for a in answers}
    assert all(by_role["champion"][id_]["probability"] == p for id_, p in given.items())
    assert all(by_role["shadow"][id_]["probability"] != p for id_, p in given.items())
    assert {e["model"]["version"] for e in events if e["model"]["role"] == "shadow"} == {"4"}


def test_a_shadow_that_is_behind_drops_and_says_how_many(place, monkeypatch):
    monkeypatch.setattr("ekiben.serving.hosting.split.MOST_WAITING", 5)
    place.deploy("3", "4", mode="shadow")
    state = place.open()
    gate, score = threading.Event(), state.split.challenger.scorer.score_rows
    monkeypatch.setattr(state.split.challenger.scorer, "score_rows", lambda rows: gate.wait(10) and score(rows))
    ask(state, range(50))
    gate.set()
    assert state.split.shadow.flush()
    arm = state.hosting.status().arms["4"]
    assert arm.dropped + arm.requests == 50 and 5 <= arm.requests <= 7 and arm.role == "shadow"
    assert f"ekiben_shadow_dropped_total {arm.dropped}" in call(state, "GET", "/metrics").text.replace(".0", "")


# ---- the guard


def broken_by(state: State, keys: range) -> int:
    """Ask until the challenger is dropped; return how many requests that took."""
    for n, key in enumerate(keys, 1):
        ask(state, [key])
        if state.split is None:
            return n
    raise AssertionError("the challenger is still heard")


def test_a_challenger_that_raises_loses_no_request_and_is_dropped(place, monkeypatch):
    place.deploy("3", "4", limits=GuardLimits())
    state = place.open()

    def fail(rows: Any) -> Any:
        raise RuntimeError("out of order")

    monkeypatch.setattr(state.split.challenger.scorer, "score_rows", fail)
    began = time.perf_counter()
    answers = ask(state, range(300))
    assert set(versions(answers)) == {"3"} and state.split is None
    print(f"every second request failed: dropped within {time.perf_counter() - began:.2f} s and 300 requests")
    assert "requests failed" in readyz(state)["rolled_back"] and readyz(state)["share"] == 0
    wait(lambda: place.events() == ["loaded", "rolled_back"])
    status = read_status(place.folder)
    assert status.arms["4"].errors == 50 and status.rolled_back == readyz(state)["rolled_back"]
    text = call(state, "GET", "/metrics").text
    assert "ekiben_challenger_rolled_back 1.0" in text and 'ekiben_arm_errors_total{role="challenger",version="4"} 50.0' in text
    state.close()
    assert len(read_journal(place.journal)) == 300


def test_an_answer_that_is_no_number_is_an_error(place, monkeypatch):
    place.deploy("3", "4", share=1.0)
    state = place.open(journal=False)
    scorer = state.split.challenger.scorer
    monkeypatch.setattr(scorer, "lane", Lane(lambda row: float("nan"), is_compiled=False))
    monkeypatch.setattr(scorer.engine, "predict", lambda X, threads: np.full(len(X), np.nan))
    assert versions(ask(state, range(3))) == ["3"] * 3 and state.hosting.status().arms["4"].errors == 3


def test_what_the_caller_did_wrong_is_nobody_s_error(place):
    place.deploy("3", "4", limits=GuardLimits())
    state = place.open(journal=False)
    for key in range(150):
        assert call(state, "POST", "/predict", json={"rows": [{**ROW, "age": "old", "id": key}]}).status_code == 422
    arms = state.hosting.status().arms
    assert state.split is not None and arms["3"].errors == arms["4"].errors == 0


def test_a_challenger_that_is_slow_is_dropped(place, monkeypatch):
    place.deploy("3", "4", limits=GuardLimits())
    state = place.open(journal=False)
    score = state.split.challenger.scorer.score_rows
    monkeypatch.setattr(state.split.challenger.scorer, "score_rows", lambda rows: time.sleep(0.004) or score(rows))
    assert 50 < broken_by(state, range(400)) < 200 and "to score" in readyz(state)["rolled_back"]


def test_a_challenger_whose_answers_turn_out_wrong_is_dropped(place):
    place.deploy("3", "4", limits=GuardLimits(max_shift=1))
    state = place.open()
    answers = ask(state, range(400))
    good = {a["predictions"][0]["id"]: a["predictions"][0]["label"] for a in answers if a["model"]["version"] == "3"}
    bad = {a["predictions"][0]["id"]: {"no": "yes", "yes": "no"}[a["predictions"][0]["label"]] for a in answers if a["model"]["version"] == "4"}
    tell(state, good)
    assert state.split is not None
    tell(state, bad)
    assert state.split is None and "mean loss" in readyz(state)["rolled_back"]
    arms = read_status(place.folder).arms
    assert arms["3"].labels == len(good) and arms["4"].labels == 50
    assert arms["4"].loss_mean > arms["3"].loss_mean and 0 <= arms["3"].loss_mean <= 1


def test_a_challenger_that_decides_otherwise_is_dropped(place, monkeypatch):
    place.deploy("3", "4", limits=GuardLimits())
    state = place.open(journal=False)
    champion = state.split.champion.scorer.score_row(ROW).label
    other = {"no": "yes", "yes": "no"}[champion]
    score = state.split.challenger.scorer.score_rows

    def turned(rows: Any) -> Any:
        answers = score(rows)
        answers[0].label = other
        return answers

    monkeypatch.setattr(state.split.challenger.scorer, "score_rows", turned)
    assert broken_by(state, range(400)) < 250 and "it decides `yes`" in readyz(state)["rolled_back"]


def test_a_shadow_is_judged_too(place, monkeypatch):
    place.deploy("3", "4", mode="shadow", limits=GuardLimits())
    state = place.open()
    monkeypatch.setattr(state.split.challenger.scorer, "score_rows", lambda rows: 1 / 0)
    ask(state, range(60))
    wait(lambda: state.split is None)
    assert "requests failed" in readyz(state)["rolled_back"]
    wait(lambda: place.events()[-1] == "rolled_back")


def test_a_sound_challenger_stays(place):
    place.deploy("4", "5", limits=GuardLimits())
    state = place.open()
    answers = ask(state, range(600))
    tell(state, {a["predictions"][0]["id"]: random.choice(["no", "yes"]) for a in answers})
    assert state.split is not None and readyz(state)["rolled_back"] == ""


def test_a_lease_that_nobody_renews_ends(place):
    place.deploy("3", "4", share=1.0, expires=(datetime.now(UTC) + timedelta(seconds=1)).isoformat())
    state = place.open()
    assert versions(ask(state, [1])) == ["4"]
    wait(lambda: state.split is None)
    assert versions(ask(state, [1])) == ["3"]
    wait(lambda: place.events() == ["loaded", "expired"])
    place.deploy("3", "4", share=1.0, expires=(datetime.now(UTC) + timedelta(seconds=60)).isoformat())
    wait(lambda: state.split is not None)
    assert versions(ask(state, [1])) == ["4"]
    state.close()
    assert versions(ask(place.open(), [1])) == ["4"], "a lease that holds is heard after a restart"


def test_a_lease_that_is_renewed_goes_on_and_is_no_event(place):
    for seconds in (30, 60, 90):
        place.deploy("3", "4", expires=(datetime.now(UTC) + timedelta(seconds=seconds)).isoformat())
        if seconds == 30:
            state = place.open()
        until(state, place.number)
        ask(state, range(10))
    assert place.events() == ["loaded"] and sum(arm.requests for arm in state.hosting.status().arms.values()) == 30
    place.deploy("3", "4", share=0.9, expires=(datetime.now(UTC) + timedelta(seconds=60)).isoformat())
    until(state, 4)
    wait(lambda: place.events() == ["loaded", "loaded"])


def test_a_lease_that_ended_while_nothing_ran_is_over(place):
    place.deploy("3", "4", share=1.0, expires=(datetime.now(UTC) - timedelta(seconds=1)).isoformat())
    state = place.open()
    assert versions(ask(state, [1])) == ["3"] and "its time was over" in readyz(state)["rolled_back"]
    assert place.events() == ["loaded", "expired"]


def drop(state: State) -> None:
    state.hosting.fall_back("it was no good")


@pytest.mark.parametrize("lost", [(), (STATUS,), (EVENTS,)])
def test_after_a_rollback_a_restart_does_not_bring_the_challenger_back(place, lost):
    place.deploy("3", "4", share=1.0)
    state = place.open()
    assert versions(ask(state, [1])) == ["4"]
    drop(state)
    assert versions(ask(state, [1])) == ["3"]
    state.close()
    for name in lost:
        (place.folder / name).unlink()
    again = place.open()
    assert versions(ask(again, [1])) == ["3"] and readyz(again)["rolled_back"] == "it was no good"
    place.deploy("3", "4", share=1.0)
    until(again, 2)
    assert versions(ask(again, [1])) == ["4"], "somebody signed it anew, and knows"


def test_a_damaged_status_lets_the_champion_answer_alone(place):
    place.deploy("3", "4", share=1.0)
    place.open().close()
    (place.folder / STATUS).write_bytes(b'{"number": 1, "rolled')
    state = place.open()
    assert versions(ask(state, [1])) == ["3"] and "status.json is damaged" in readyz(state)["rolled_back"]
    assert read_status(place.folder).number == 1


def test_what_was_signed_before_the_rollback_was_known_does_not_go_on(place):
    place.deploy("3", "4", share=0.5)
    state = place.open()
    signed_at = now()
    time.sleep(0.01)
    drop(state)
    place.deploy("3", "4", share=1.0, at=signed_at)
    until(state, 2)
    assert state.split is None and "before this was known" in readyz(state)["rolled_back"]
    state.close()
    again = place.open()
    assert again.split is None and "before this was known" in readyz(again)["rolled_back"]


def test_a_step_of_the_same_two_goes_on_counting_and_another_challenger_begins_anew(place):
    place.deploy("3", "4", share=0.5)
    state = place.open()
    ask(state, range(40))
    before = state.split.tally
    place.deploy("3", "4", share=0.9)
    until(state, 2)
    assert state.split.tally is before and state.split.share == 0.9
    place.deploy("3", "5", share=0.5)
    until(state, 3)
    assert state.hosting.status().arms["5"].requests == 0


def test_a_service_that_nobody_asks_says_that_it_runs(place, monkeypatch):
    monkeypatch.setattr(hosting_module, "ALIVE_S", 0.2)
    place.deploy("3")
    place.open()
    first = read_status(place.folder).at
    wait(lambda: read_status(place.folder).at > first)


# ---- feedback


def test_feedback_is_counted_for_the_arm_that_answered_once(place):
    place.deploy("3", "4")
    state = place.open()
    answers = ask(state, range(60))
    ids = {a["predictions"][0]["id"]: a["model"]["version"] for a in answers}
    tell(state, dict.fromkeys(ids, "yes"))
    tell(state, dict.fromkeys(ids, "no"))
    tell(state, {"00000000-0000-7000-8000-000000000000": "yes"})
    arms = state.hosting.status().arms
    assert {version: arm.labels for version, arm in arms.items()} == {v: list(ids.values()).count(v) for v in ("3", "4")}
    expected = np.mean([(a["predictions"][0]["probability"] - 1) ** 2 for a in answers if a["model"]["version"] == "4"])
    assert arms["4"].loss_mean == pytest.approx(expected)
    state.close()
    assert sum(event["event"] == "feedback" for event in read_journal(place.journal)) == 121


def test_in_the_shadow_one_truth_counts_for_both(place):
    place.deploy("3", "4", mode="shadow")
    state = place.open()
    answers = ask(state, range(20))
    assert state.split.shadow.flush()
    tell(state, {a["predictions"][0]["id"]: "yes" for a in answers})
    assert [arm.labels for arm in state.hosting.status().arms.values()] == [20, 20]


def test_what_is_remembered_for_the_truth_is_bounded(place, monkeypatch):
    monkeypatch.setattr("ekiben.serving.hosting.tally.KEPT", 10)
    place.deploy("3", "4")
    state = place.open(journal=False)
    ask(state, range(200))
    for side in state.split.tally.sides:
        assert len(side.young) + len(side.old) <= 20


# ---- what is never served


def refused(state: State) -> str:
    wait(lambda: readyz(state)["refused"])
    return readyz(state)["refused"]


def test_a_damaged_unsigned_or_replayed_file_changes_nothing(place):
    place.deploy("3")
    older = (place.folder / DEPLOYMENT).read_bytes()
    place.deploy("4", "3", share=1.0)
    state = place.open()
    assert versions(ask(state, [1])) == ["3"]
    good = (place.folder / DEPLOYMENT).read_bytes()
    for raw, why in ((good[:-10], "not a signed"), (good.replace(b'"share": 1.0', b'"share": 0.0'), "not what was signed"), (older, "not newer than 2")):
        (place.folder / DEPLOYMENT).write_bytes(raw)
        wait(lambda why=why: why in readyz(state)["refused"] and why in read_status(place.folder).refused)
        assert versions(ask(state, [1])) == ["3"] and why in readyz(state)["refused"] and why in read_status(place.folder).refused
    (place.folder / DEPLOYMENT).unlink()
    wait(lambda: "holds no deployment.json" in readyz(state)["refused"])
    assert versions(ask(state, [1])) == ["3"]
    (place.folder / DEPLOYMENT).write_bytes(good)
    wait(lambda: not readyz(state)["refused"])
    assert readyz(state)["refused"] == "" and place.events() == ["loaded"] + ["refused"] * 4


@pytest.mark.parametrize("harm", ["flip", "remove", "swap"])
@pytest.mark.parametrize("whose", ["champion", "challenger"])
def test_a_bundle_that_does_not_hold_is_never_served(place, harm, whose):
    place.deploy("3")
    state = place.open()
    folder = place.folder / BUNDLES / place.arms["4"].bundle
    saved = place.top / "saved"
    shutil.copytree(folder, saved)
    if harm == "flip":
        path = next((folder / "model").iterdir())
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 1
        path.write_bytes(raw)
    else:
        shutil.rmtree(folder)
    if harm == "swap":  # a genuine bundle, of another version
        shutil.copytree(place.folder / BUNDLES / place.arms["5"].bundle, folder)
    place.deploy(*(("4", "") if whose == "champion" else ("3", "4")), share=1.0)
    assert refused(state)
    assert versions(ask(state, range(5))) == ["3"] * 5 and state.hosting.number == 1
    shutil.rmtree(folder, ignore_errors=True)
    saved.rename(folder)
    until(state, 2)
    assert versions(ask(state, range(5))) == ["4"] * 5 and readyz(state)["refused"] == ""


def test_at_its_start_it_serves_what_it_last_took_when_the_new_file_does_not_hold(place):
    place.deploy("4")
    place.open().close()
    good = (place.folder / DEPLOYMENT).read_bytes()
    (place.folder / DEPLOYMENT).write_bytes(good[:-5])
    state = place.open()
    assert versions(ask(state, [1])) == ["4"] and "not a signed deployment" in readyz(state)["refused"]


def test_at_its_start_an_older_file_is_not_believed(place):
    place.deploy("4")
    older = (place.folder / DEPLOYMENT).read_bytes()
    place.deploy("3")
    place.open().close()
    (place.folder / DEPLOYMENT).write_bytes(older)
    state = place.open()
    assert versions(ask(state, [1])) == ["3"] and "not newer than 2" in readyz(state)["refused"]


def test_at_its_start_the_bento_s_own_serves_when_nothing_else_holds_until_it_does(place):
    place.deploy("4")
    folder = place.folder / BUNDLES / place.arms["4"].bundle
    folder.rename(place.top / "away")
    state = place.open()
    assert versions(ask(state, [1])) == ["3"] and "is not there" in readyz(state)["refused"]
    (place.top / "away").rename(folder)
    until(state, 1)
    assert versions(ask(state, [1])) == ["4"]


def test_at_its_start_the_champion_serves_alone_while_its_challenger_does_not_hold(place):
    place.deploy("3", "4", share=1.0)
    folder = place.folder / BUNDLES / place.arms["4"].bundle
    folder.rename(place.top / "away")
    state = place.open()
    assert versions(ask(state, [1])) == ["3"] and "is not there" in readyz(state)["refused"] and readyz(state)["number"] == 1
    (place.top / "away").rename(folder)
    wait(lambda: state.split is not None)
    wait(lambda: readyz(state)["refused"] == "")
    assert versions(ask(state, [1])) == ["4"]


def test_models_that_answer_different_questions_do_not_stand_beside_each_other(place):
    place.deploy("3")
    state = place.open()
    place.deploy("3", "9")
    assert "do not answer the same question" in refused(state)
    assert versions(ask(state, [1])) == ["3"]


def test_whom_nobody_trusts_deploys_nothing(place, monkeypatch):
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from ekiben.serving.security.signer import Signer

    place.deploy("3")
    state = place.open()
    place.signer = Signer(Ed25519PrivateKey.generate(), place.top)
    place.deploy("4")
    assert "not trusted here" in refused(state) and versions(ask(state, [1])) == ["3"]


def test_where_nothing_may_be_written_it_serves_on_and_remembers_beside_the_journal(place, monkeypatch):
    place.deploy("3", "4", share=1.0)
    real = logbook_module.write_whole

    def read_only(path: Path, raw: bytes) -> None:
        if place.folder in path.parents:
            raise OSError(30, "Read-only file system")
        real(path, raw)

    def no_events(folder: Path, *said: Any) -> Any:
        if folder == place.folder:
            raise OSError(30, "Read-only file system")
        return append_event(folder, *said)

    monkeypatch.setattr(logbook_module, "write_whole", read_only)
    monkeypatch.setattr(logbook_module, "append_event", no_events)
    state = place.open()
    assert versions(ask(state, [1])) == ["4"]
    drop(state)
    state.close()
    assert sorted(p.name for p in place.folder.iterdir() if p.is_file()) == [".lock", DEPLOYMENT]
    again = place.open()
    assert versions(ask(again, [1])) == ["3"] and readyz(again)["rolled_back"] == "it was no good"
    again.close()
    lonely = place.open(journal=False)
    assert versions(ask(lonely, [1])) == ["4"], "nowhere to remember it"


# ---- the journal


def test_roles_are_sealed_and_old_files_without_them_are_still_read(place):
    place.deploy("3", "4", mode="shadow")
    state = place.open()
    answers = ask(state, [f"c{i}" for i in range(10)])
    assert state.split.shadow.flush()
    tell(state, {a["predictions"][0]["id"]: "yes" for a in answers})
    state.close()
    seal_journal(place.journal)
    old = sealed_files(place.journal, "predictions")[0]
    table = pq.read_table(old).drop_columns(["_role"])
    pq.write_table(table, old.with_name("v2-old.parquet"))
    with open_journal(place.journal) as db:
        counts = dict(db.execute("SELECT _role, count(*) FROM journal GROUP BY _role").fetchall())
        assert counts["champion"] + counts["shadow"] == 30 and counts["shadow"] in (10, 20)
        assert db.execute("SELECT count(*) FROM journal WHERE _truth = 'yes'").fetchone() == (30,)
        answered = "SELECT count(*) FROM journal WHERE coalesce(_role, 'champion') <> 'shadow'"
        assert db.execute(answered).fetchone() == (30 - counts["shadow"],)
    for path in sealed_files(place.journal, "predictions"):
        if path.name != "v2-old.parquet":
            path.unlink()
    with open_journal(place.journal) as db:
        assert db.execute("SELECT DISTINCT _role FROM predictions").fetchall() == [("champion",)]


@pytest.mark.parametrize("is_sealed", [False, True])
def test_whoever_is_forgotten_is_forgotten_in_every_role(place, is_sealed):
    from ekiben.serving.journal.erase import Eraser, Person

    place.deploy("3", "4", mode="shadow")
    state = place.open()
    ask(state, ["ada", "bob", "ada"])
    assert state.split.shadow.flush()
    state.close()
    if is_sealed:
        seal_journal(place.journal)
    assert len(read_journal(place.journal)) == 6
    assert Eraser(place.journal, Person(column="id", value="ada")).erase().predictions == 4
    assert [(e["keys"]["id"], e["model"]["role"]) for e in read_journal(place.journal)] in (
        [("bob", "champion"), ("bob", "shadow")], [("bob", "shadow"), ("bob", "champion")],
    )  # fmt: skip


# ---- traffic


def test_traffic_is_written_down_by_arm(place):
    place.deploy("3", "4", limits=LOOSE)
    state = place.open()
    seen = versions(ask(state, range(50)))
    assert call(state, "POST", "/predict", json={"rows": []}).status_code == 422
    state.close()
    [line] = read_traffic(place.journal)
    assert line["requests"] == {"200": 50, "422": 1} and line["rows"] == 50 and sum(line["latency_ms"]["counts"]) == 51
    assert line["arms"] == {v: {"requests": seen.count(v), "errors": 0} for v in ("3", "4")}
    assert len(line["latency_ms"]["counts"]) == len(line["latency_ms"]["edges"]) + 1


def test_a_swap_ends_the_line_of_the_one_that_answered_before(place):
    place.deploy("3")
    state = place.open()
    ask(state, range(5))
    place.deploy("4")
    wait(lambda: state.model["version"] == "4")
    ask(state, range(7))
    state.close()
    assert [line["arms"] for line in read_traffic(place.journal)] == [{"3": {"requests": 5, "errors": 0}}, {"4": {"requests": 7, "errors": 0}}]


# ---- the referee


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32), rate=st.floats(0, 0.3))
def test_chance_does_not_make_equal_error_rates_look_different(seed, rate):
    rng = np.random.default_rng(seed)
    for n, of in ((50, 950), (200, 800), (1000, 1000)):
        failed, theirs = rng.binomial(n, rate, 200), rng.binomial(of, rate, 200)
        said = [judge_errors(GuardLimits(), (int(f), n), (int(t), of)) for f, t in zip(failed, theirs, strict=True)]
        assert not any(said)


def test_a_thousand_sound_rollouts_are_left_alone():
    """Each of 200 looks at a growing sample of two arms that are the same, in all four figures."""
    rng, limits, fell = np.random.default_rng(7), GuardLimits(), 0
    for _ in range(1000):
        p = rng.beta(2, 5)
        one, other = (rng.binomial(1, p, 50 * 20).reshape(20, 50) for _ in range(2))
        losses = [((x - rng.beta(2, 5, x.shape)) ** 2) for x in (one, other)]
        times = [rng.lognormal(-9, 0.7, x.shape) for x in (one, other)]
        sums = [Moments(), Moments()]
        shares = [Moments(), Moments()]
        for k in range(20):
            for i, x in enumerate((one, other)):
                sums[i] = sums[i] + Moments(50, float(losses[i][k].sum()), float((losses[i][k] ** 2).sum()))
                shares[i] = shares[i] + Moments(50, float(x[k].sum()), float(x[k].sum()))
            fell += bool(
                judge_loss(limits, *sums)
                or judge_shift(limits, shares[:1], shares[1:], ["yes"])
                or judge_latency(limits, times[0][k].tolist(), times[1][k].tolist())
            )
    assert fell == 0


def test_squared_errors_of_a_heavy_tail_do_not_cost_a_sound_challenger_its_place():
    rng, limits, fell = np.random.default_rng(8), GuardLimits(), 0
    for _ in range(2000):
        one, other = (rng.standard_t(5, 200) ** 2 for _ in range(2))
        for n in (50, 100, 200):
            fell += bool(judge_loss(limits, *(Moments(n, float(x[:n].sum()), float((x[:n] ** 2).sum())) for x in (one, other)), is_value=True))
    assert fell <= 2


@pytest.mark.parametrize("n", [50, 200])
def test_what_is_far_beyond_a_limit_is_found_at_the_first_look(n):
    rng, limits = np.random.default_rng(9), GuardLimits()
    found = [0, 0, 0, 0]
    for _ in range(200):
        found[0] += bool(judge_errors(limits, (int(rng.binomial(n, 0.4)), n), (0, 500)))
        found[1] += bool(judge_latency(limits, rng.lognormal(-5, 0.5, n).tolist(), rng.lognormal(-9, 0.5, 500).tolist()))
        bad, good = rng.beta(8, 2, n) ** 2, rng.beta(2, 8, 500) ** 2
        found[2] += bool(judge_loss(limits, *(Moments(len(x), float(x.sum()), float((x**2).sum())) for x in (bad, good))))
        yes, no = rng.binomial(1, 0.95, n), rng.binomial(1, 0.2, 500)
        found[3] += bool(judge_shift(limits, *([Moments(len(x), float(x.sum()), float(x.sum()))] for x in (yes, no)), ["yes"]))
    assert min(found) >= 195


@settings(max_examples=50, deadline=None)
@given(failed=st.integers(0, 60), tried=st.integers(0, 60), theirs=st.integers(0, 60), of=st.integers(0, 60))
def test_more_failures_are_never_judged_more_kindly(failed, tried, theirs, of):
    failed, theirs = min(failed, tried), min(theirs, of)
    said = [bool(judge_errors(GuardLimits(), (n, tried), (theirs, of))) for n in range(failed, tried + 1)]
    assert said == sorted(said)
