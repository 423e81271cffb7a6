"""The HTTP surface: the order of what is asked, the limits, compression, replays, remembered answers, and the stop."""

from __future__ import annotations

import asyncio
import gzip
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from bundles import Project, make_project

from ekiben.serving.http.app import ServiceApp
from ekiben.serving.http.body import Patience
from ekiben.serving.bundle import Limits
from ekiben.serving.journal.journal import read_journal
from ekiben.serving.security.issuing import add_key
from ekiben.serving.options import ServiceOptions
from ekiben.serving.http.routes import ROUTES
from ekiben.serving.http.state import State

ROW = {"age": 30, "income": 1.0, "job": "clerk", "place": "L", "member": True, "since": "2020-01-01"}
BODY = json.dumps({"rows": [ROW]}).encode()
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Project:
    return make_project(tmp_path_factory.mktemp("census"), limits=Limits(max_body_mb=0.5))


def open_state(project: Project, *, journal: Path | None = None, **options: Any) -> State:
    state = State()
    state.open(project.bundle.folder, journal=journal, service=ServiceOptions(**options))
    return state


@pytest.fixture(scope="module")
def state(project) -> State:
    return open_state(project)


def client(state: State, inner: Any = None, scheme: str = "http") -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app=ServiceApp(inner, state=state))
    return httpx.AsyncClient(transport=transport, base_url=f"{scheme}://localhost")


def call(state: State, method: str, path: str, *, inner: Any = None, scheme: str = "http", **sent: Any) -> httpx.Response:
    async def go() -> httpx.Response:
        async with client(state, inner, scheme) as asking:
            return await asking.request(method, path, **sent)

    return asyncio.run(go())


def predict(state: State, body: bytes = BODY, **headers: str) -> httpx.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return call(state, "POST", "/predict", content=body, headers={**JSON, **named})


def raw_call(state: State, messages: list[Any], **scope: Any) -> tuple[list[dict], int]:
    """Call the application itself; return what it sent, and how many messages it took. A number is a pause, in seconds."""
    sent: list[dict] = []
    left = list(messages)

    async def receive() -> dict:
        while left and isinstance(left[0], float):
            await asyncio.sleep(left.pop(0))
        return left.pop(0) if left else await asyncio.Event().wait()  # type: ignore[return-value]

    async def send(message: Any) -> None:
        sent.append(message)

    asked = {
        "type": "http", "method": "POST", "path": "/predict", "scheme": "http", "client": ("127.0.0.1", 1), "query_string": b"",
        "server": ("127.0.0.1", 80), "headers": [(b"content-type", b"application/json")], **scope,
    }  # fmt: skip

    async def go() -> None:
        await asyncio.wait_for(ServiceApp(state=state)(asked, receive, send), 60)

    asyncio.run(go())
    return sent, len(messages) - len(left)


# ---- headers


@pytest.mark.parametrize("path", [*ROUTES, "/nothing"])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_every_answer_is_protected_and_says_its_trace(state, method, path):
    answer = call(state, method, path)
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["x-frame-options"] == "DENY"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["cache-control"] == "no-store"
    assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
    assert "unsafe" not in answer.headers["content-security-policy"]
    assert "strict-transport-security" not in answer.headers
    trace_id = answer.headers["traceparent"].split("-")[1]
    if answer.status_code >= 400:
        assert answer.json()["trace_id"] == trace_id


def test_over_tls_the_browser_is_told_to_stay_there(state):
    assert "max-age" in call(state, "GET", "/livez", scheme="https").headers["strict-transport-security"]


def test_a_trace_that_came_is_continued(state):
    came = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    said = predict(state, traceparent=came).headers["traceparent"]
    assert said.split("-")[1] == came.split("-")[1] and said != came


def test_a_failure_within_says_nothing_of_itself(state, monkeypatch, caplog):
    def fail(rows):
        raise RuntimeError("the secret of the house")

    monkeypatch.setattr(state.scorer, "score_rows", fail)
    answer = predict(state)
    assert answer.status_code == 500 and "secret" not in answer.text
    assert answer.json()["type"] == "urn:ekiben:problem:internal-error"
    assert any(record.exc_info for record in caplog.records)


# ---- the order of what is asked


def test_nobody_without_a_key_has_a_body_read_or_learns_what_there_is(project, tmp_path):
    key = add_key(tmp_path / "keys.json", "ana", ["predict"])[1]
    state = open_state(project, keys=str(tmp_path / "keys.json"))
    for path in ("/predict", "/feedback", "/metrics", "/", "/nothing"):
        sent, taken = raw_call(state, [{"type": "http.request", "body": b"x" * 10**6}], path=path, method="DELETE")
        assert (sent[0]["status"], taken) == (401, 0), path
    assert call(state, "GET", "/livez").status_code == call(state, "GET", "/readyz").status_code == 200
    assert predict(state, authorization=f"Bearer {key}").status_code == 200
    assert call(state, "GET", "/nothing", headers={"x-api-key": key}).status_code == 403


@pytest.mark.parametrize(
    ("method", "headers", "status"),
    [
        ("GET", [], 405),
        ("POST", [], 415),
        ("POST", [(b"content-type", b"text/html")], 415),
        ("POST", [(b"content-type", b"application/json"), (b"content-encoding", b"br")], 415),
        ("POST", [(b"content-type", b"application/json"), (b"content-length", b"524289")], 413),
        ("POST", [(b"content-type", b"application/json"), (b"content-length", b"9" * 4000)], 413),
    ],
)
def test_what_the_head_refuses_costs_no_reading(state, method, headers, status):
    sent, taken = raw_call(state, [{"type": "http.request", "body": BODY}], method=method, headers=headers)
    assert (sent[0]["status"], taken) == (status, 0)


def test_more_requests_than_there_is_room_for_are_told_to_come_back(project):
    state = open_state(project, max_concurrency=3)

    async def go() -> tuple[list[int], int, int]:
        hold = asyncio.Event()

        async def slow() -> Any:
            yield BODY[:10]
            await hold.wait()
            yield BODY[10:]

        async with client(state) as asking:
            held = [asyncio.create_task(asking.post("/predict", content=slow(), headers=JSON)) for _ in range(3)]
            while state.in_flight < 3:
                await asyncio.sleep(0.01)
            refused = await asking.post("/predict", content=BODY, headers=JSON)
            alive = await asking.get("/readyz")
            assert refused.headers["retry-after"] == "1"
            hold.set()
            answers = [(await task).status_code for task in held]
        return answers, refused.status_code, alive.status_code

    assert asyncio.run(go()) == ([200, 200, 200], 503, 200)
    assert state.in_flight == 0 and predict(state).status_code == 200


# ---- bodies


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{"type": "http.request", "body": BODY[:20], "more_body": True}],
        [m for byte in BODY[:200] for m in ({"type": "http.request", "body": bytes([byte]), "more_body": True}, 0.02)],
    ],
    ids=["nothing", "a beginning", "a byte now and then"],
)
def test_a_body_that_does_not_come_is_given_up(project, messages):
    state = open_state(project)
    state.patience = Patience(idle_s=0.3, whole_s=0.6, every_s=0.05)
    sent, _ = raw_call(state, messages)
    assert sent[0]["status"] == 408 and (b"connection", b"close") in sent[0]["headers"]
    assert state.in_flight == 0 and predict(state).status_code == 200


def test_a_client_that_leaves_gets_nothing_and_holds_nothing(state):
    sent, _ = raw_call(state, [{"type": "http.request", "body": BODY[:20], "more_body": True}, {"type": "http.disconnect"}])
    assert sent == [] and state.in_flight == 0


@pytest.mark.parametrize("depth", [2, 50, 500, 990, 1000, 2000, 40_000])
@pytest.mark.parametrize("make", [
    lambda n: b'{"rows": [{"age": ' + b"[" * n + b"]" * n + b"}]}",
    lambda n: b'{"rows": ' + b"[" * n + b"]" * n + b"}",
    lambda n: b'{"rows": [{"age": ' + b'{"a":' * n + b"1" + b"}" * n + b"}]}",
    lambda n: b"[" * n,
    lambda n: b'{"rows": [{"age": NaN, "job": ' + b"[" * n + b"]" * n + b"}]}",
])
def test_nesting_is_refused_at_once(state, make, depth):
    assert predict(state, make(depth)).status_code in ((422,) if depth == 40_000 else (400, 422))


def test_compressed_bodies_are_read_and_bombs_are_not(state):
    packed = gzip.compress(BODY)
    plain = predict(state).json()["predictions"][0]["probability"]
    for body in (packed, gzip.compress(BODY[:30]) + gzip.compress(BODY[30:])):
        assert predict(state, body, content_encoding="gzip").json()["predictions"][0]["probability"] == plain
    for body, status in (
        (gzip.compress(bytes(50_000_000)), 413),
        (gzip.compress(gzip.compress(bytes(50_000_000))), 400),
        (gzip.compress(b"") * 20_000, 413),
        (packed[:-9], 400),
        (packed[:5], 400),
        (packed + b"rubbish", 400),
        (BODY, 400),
        (b"", 400),
    ):
        assert predict(state, body, content_encoding="gzip").status_code == status
    assert predict(state, packed, content_encoding="deflate").status_code == 415


def test_large_answers_are_compressed_for_who_takes_it(state):
    many = json.dumps({"rows": [ROW] * 100}).encode()
    packed, plain = predict(state, many, accept_encoding="gzip"), predict(state, many, accept_encoding="identity")
    assert packed.headers["content-encoding"] == "gzip" and "content-encoding" not in plain.headers
    assert int(packed.headers["content-length"]) < int(plain.headers["content-length"])
    assert packed.headers["vary"] == plain.headers["vary"] == "accept-encoding"
    assert [p["probability"] for p in packed.json()["predictions"]] == [p["probability"] for p in plain.json()["predictions"]]
    assert "content-encoding" not in predict(state, accept_encoding="gzip").headers, "a small one is not worth it"


# ---- replays


def test_a_request_that_is_sent_again_is_answered_again_and_kept_once(project, tmp_path):
    state = open_state(project, journal=tmp_path / "journal")
    first, again = predict(state, idempotency_key="a"), predict(state, idempotency_key="a")
    assert first.json() == again.json()
    assert "idempotency-replayed" not in first.headers and again.headers["idempotency-replayed"] == "true"
    other = predict(state, idempotency_key="b")
    assert other.json()["predictions"][0]["id"] != first.json()["predictions"][0]["id"]
    said = {"id": first.json()["predictions"][0]["id"], "label": "yes"}
    for _ in range(2):
        told = call(state, "POST", "/feedback", json=said, headers={"idempotency-key": "a"})
        assert told.status_code == 200, "a key belongs to one address"
    wrong = predict(state, json.dumps({"rows": [ROW, ROW]}).encode(), idempotency_key="a")
    assert wrong.status_code == 422 and "another body" in wrong.json()["detail"]
    assert predict(state, idempotency_key="k" * 256).status_code == predict(state, idempotency_key="").status_code == 400
    state.close()
    assert [e["event"] for e in read_journal(tmp_path / "journal")] == ["prediction", "prediction", "feedback"]


def test_a_key_belongs_to_the_caller_who_chose_it(project, tmp_path):
    keys = [add_key(tmp_path / "keys.json", name, ["predict"])[1] for name in ("ana", "bo")]
    state = open_state(project, keys=str(tmp_path / "keys.json"))
    ids = {predict(state, idempotency_key="1", x_api_key=k).json()["predictions"][0]["id"] for k in keys}
    assert len(ids) == 2


def test_what_was_refused_may_be_tried_again_with_the_same_key(state, monkeypatch):
    wrong = json.dumps({"rows": [{**ROW, "age": "x"}]}).encode()
    assert [predict(state, wrong, idempotency_key="c").status_code for _ in range(2)] == [422, 422]
    assert predict(state, idempotency_key="c").status_code == 200, "a mistake was not remembered"


def test_two_at_once_are_one(project, tmp_path):
    state = open_state(project, journal=tmp_path / "journal")
    many = json.dumps({"rows": [ROW] * 400}).encode()  # large enough for a thread

    async def go() -> list[httpx.Response]:
        async with client(state) as asking:
            headers = {**JSON, "idempotency-key": "d"}
            return await asyncio.gather(*(asking.post("/predict", content=many, headers=headers) for _ in range(5)))

    answers = asyncio.run(go())
    assert {answer.status_code for answer in answers} == {200} and len({answer.text for answer in answers}) == 1
    state.close()
    assert len(read_journal(tmp_path / "journal")) == 400


# ---- remembered answers


def test_a_remembered_answer_is_an_answer_of_its_own(project, tmp_path, monkeypatch):
    state = open_state(project, journal=tmp_path / "journal", cache_entries=2)
    first = predict(state).json()["predictions"][0]
    monkeypatch.setattr(state.scorer, "score_rows", lambda rows: pytest.fail("scored again"))
    again = predict(state).json()["predictions"][0]
    assert again["id"] != first["id"] and again["probability"] == first["probability"]
    monkeypatch.undo()
    for age in (31, 32, 33):
        predict(state, json.dumps({"rows": [{**ROW, "age": age}]}).encode())
    assert len(state.cache) == 2 and state.cache.hits == 1
    state.close()
    kept = {event["id"]: event for event in read_journal(tmp_path / "journal")}
    assert len(kept) == 5 and kept[again["id"]]["inputs"] == kept[first["id"]]["inputs"]


def test_nothing_is_remembered_unless_it_is_asked_for(state):
    predict(state)
    assert len(state.cache) == 0


# ---- inside another application


class Application:
    """What BentoML makes: a stack of middleware around routes, which says who it is in the scope."""

    def __init__(self, state: State) -> None:
        self.seen: list[str] = []
        service = ServiceApp(self.routes, state=state)

        async def slow_middleware(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] == "http":
                self.seen.append(scope["path"])
            await service(scope, receive, send)

        self.middleware_stack = slow_middleware

    async def routes(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            for word in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{word}.complete"})
            return
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x-frame-options", b"SAMEORIGIN")]})
        await send({"type": "http.response.body", "body": b"theirs"})

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        scope["app"] = self
        await self.middleware_stack(scope, receive, send)


def test_requests_never_meet_the_middleware_around_and_the_guard_stands_before_all(project, tmp_path):
    key = add_key(tmp_path / "keys.json", "ana", ["predict"])[1]
    admin = add_key(tmp_path / "keys.json", "root", ["admin"])[1]
    state = open_state(project, keys=str(tmp_path / "keys.json"))
    application = Application(state)

    async def go() -> list[httpx.Response]:
        told = iter(["lifespan.startup", "lifespan.shutdown"])
        started = asyncio.Event()

        async def receive() -> dict:
            return {"type": next(told)}

        async def send(message: dict) -> None:
            started.set()

        await application({"type": "lifespan"}, receive, send)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=application), base_url="http://localhost") as asking:
            return [
                await asking.post("/predict", content=BODY, headers={**JSON, "x-api-key": key}),
                await asking.get("/docs.json"),
                await asking.get("/docs.json", headers={"x-api-key": key}),
                await asking.get("/docs.json", headers={"x-api-key": admin}),
            ]

    answers = asyncio.run(go())
    assert [answer.status_code for answer in answers] == [200, 401, 403, 200]
    assert application.seen == ["/docs.json"], "only what they answer came to them"
    assert answers[3].text == "theirs" and answers[3].headers["x-content-type-options"] == "nosniff"
    assert answers[3].headers["x-frame-options"] == "SAMEORIGIN", "what they say themselves stays"


def test_a_websocket_is_closed(state):
    sent, _ = raw_call(state, [], type="websocket")
    assert sent == [{"type": "websocket.close", "code": 1008}]
