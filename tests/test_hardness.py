"""What a client may do to the application without getting more than a plain refusal, and what a refusal costs."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from bundles import Project, make_columns, make_project
from fuzz import Bodies, Body, fault_of, open_state, send, send_all

from ekiben.errors import RowError
from ekiben.serving.http import body
from ekiben.serving.http.app import ServiceApp
from ekiben.serving.http.body import Patience
from ekiben.serving.bundle import Limits
from ekiben.serving.http.lifecycle import Idlers
from ekiben.serving.problem import Problem
from ekiben.serving.http.state import State

JSON = b"application/json"
ROW = make_columns(1, 5).to_rows()[0]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return make_project(tmp_path_factory.mktemp("census"), limits=Limits(max_body_mb=0.5))


@pytest.fixture(scope="module")
def opened(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Any:
    state, word = open_state(project.bundle.folder, tmp_path_factory.mktemp("opened"))
    yield state, word
    state.close()


def answer(opened: tuple[State, bytes], raw: bytes, path: str = "/predict", **headers: bytes) -> tuple[int, bytes]:
    """Return status and body of an answer that has no fault."""
    fields = {b"content-type": JSON} | {name.replace("_", "-").encode(): value for name, value in headers.items()}
    sent = Body(path, tuple(fields.items()), (raw,))
    status, said, body = asyncio.run(send(ServiceApp(state=opened[0]), opened[1], sent))
    assert fault_of(status, said, body) == ""
    for name, value in said.items():
        assert not {*b"\r\n\0"} & {*name, *value}, "a header that ends early"
    return status, body


# ---- bodies


def test_malformed_bodies_get_nothing_but_refusals(opened) -> None:
    found = asyncio.run(send_all(*opened, Bodies(7), 3_000))
    assert found.failed == [] and sum(found.statuses.values()) == 3_000
    assert {200, 400, 413, 415, 422} >= set(found.statuses) and found.statuses[422] > 100 < found.statuses[200]


def test_the_same_body_comes_of_the_same_seed() -> None:
    assert [Bodies(3).make(i) for i in range(50)] == [Bodies(3).make(i) for i in range(50)]
    assert [Bodies(3).make(i) for i in range(50)] != [Bodies(4).make(i) for i in range(50)]


@pytest.mark.parametrize("half", ["\\ud800", "\\udfff", "a\\ud83d"])
@pytest.mark.parametrize("form", ['{"rows":[{"HALF":1}]}', '{"rows":[{"age":NaN,"HALF":1}]}', '{"rows":[{"age":NaN,"place":"HALF"}]}',
                                  '{"HALF":NaN}', '{"rows":[{"age":"Infinity","place":"HALF"}]}'])  # fmt: skip
def test_half_a_character_is_no_text(opened, form, half) -> None:
    for path in ("/predict", "/explain", "/feedback"):
        assert answer(opened, form.replace("HALF", half).encode(), path)[0] in ((400,) if path != "/feedback" else (400, 422))


def test_what_is_no_number_is_still_told_by_row_and_column(opened) -> None:
    status, said = answer(opened, json.dumps({"rows": [{**ROW, "age": float("nan")}]}).encode())
    assert status == 422 and json.loads(said)["errors"][0]["column"] == "age"
    assert answer(opened, '{"rows":[{"age":NaN}]}'.encode("utf-16"))[0] == 400, "JSON is UTF-8"


@pytest.mark.parametrize("path", ["/predict", "/explain", "/feedback"])
def test_names_that_a_client_made_up_come_back_short(opened, path) -> None:
    long = "a name that is long " * 20_000
    for said in ({"rows": [{long: 1}]}, {long: 1}, {"rows": [{long: 1}] * 3}, {"rows": [], long: 1}):
        status, back = answer(opened, json.dumps(said).encode()[:500_000], path)
        assert status in (400, 413, 422) and len(back) < 8_192
    assert answer(opened, long.encode()[:400_000] + b"\n1\n", content_type=b"text/csv")[0] == 400


def test_a_name_is_looked_up_only_for_mistakes_that_are_told(opened, monkeypatch) -> None:
    from ekiben import errors, rows
    from ekiben.serving.http import cells

    looked = []

    def watch(name: str, known: Any) -> str:
        looked.append(len(name))
        return errors.did_you_mean(name, known)

    monkeypatch.setattr(rows, "did_you_mean", watch)
    monkeypatch.setattr(cells, "did_you_mean", watch)
    many = [f"column {i}" for i in range(20_000)]
    assert answer(opened, json.dumps({"rows": [dict.fromkeys(many, 1)]}).encode())[0] == 422
    assert answer(opened, ",".join(many).encode() + b"\n", content_type=b"text/csv")[0] == 422
    assert 2 <= len(looked) <= 40 and max(looked) <= 60


def test_the_mistakes_of_a_row_are_still_all_told(project) -> None:
    from ekiben.rows import RowReader

    with pytest.raises(RowError) as caught:
        RowReader(project.schema).read([{**ROW, "agee": 1, "jobb": 2, "income": "x"}])
    assert [e["column"] for e in caught.value.fields["errors"]] == ["agee", "jobb", "income"]


# ---- heads


@pytest.mark.parametrize("length", [b"9" * 19, b"9" * 4_300, b"9" * 100_000, b"0" * 50 + b"1" * 20])
def test_a_length_of_any_number_of_digits_is_too_large(opened, length) -> None:
    assert answer(opened, b"{}", content_length=length)[0] == 413


@pytest.mark.parametrize("state", [b"a=1\r\nx-evil: 1", b"a=1\nx: y", b"a=\0", b"a=\xff", b"a" * 513])
def test_a_trace_cannot_end_the_header_it_comes_back_in(opened, state) -> None:
    parent = b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    for raw in (json.dumps({"rows": [ROW]}).encode(), b"{"):
        answer(opened, raw, traceparent=parent, tracestate=state)  # it checks every header
        answer(opened, raw, traceparent=parent + b"\r\nx-evil: 1", tracestate=b"a=1")


@pytest.mark.parametrize("name", [b"accept", b"accept-encoding", b"content-encoding", b"content-type", b"idempotency-key", b"host"])
@pytest.mark.parametrize("value", [b"", b"\xff\xfe\x80", b";", b",", b";q=", b"a;q=nan, */*;q=inf", b"," * 60_000, b"x" * 60_000, b"text/csv;charset=\xff"])
def test_absurd_headers_are_refused_or_overlooked(opened, name, value) -> None:
    for raw in (json.dumps({"rows": [ROW]}).encode(), b"age\n1\n"):
        answer(opened, raw, **{name.decode(): value})


# ---- slow clients


def test_a_slow_body_makes_room_for_a_request_that_is_there(project, tmp_path) -> None:
    state, word = open_state(project.bundle.folder, tmp_path)
    state.options = state.options.__class__(max_concurrency=3, keys=state.options.keys)
    state.patience = Patience(yield_s=0.0)
    whole = Body("/predict", ((b"content-type", JSON),), (json.dumps({"rows": [ROW]}).encode(),))
    app, statuses = ServiceApp(state=state), []
    head = {"type": "http", "method": "POST", "path": "/predict", "scheme": "http", "client": ("127.0.0.1", 1),
            "headers": [(b"content-type", JSON), (b"x-api-key", word)]}  # fmt: skip

    async def slow() -> None:
        parts = iter([{"type": "http.request", "body": b"{", "more_body": True}])

        async def receive() -> dict[str, Any]:
            return next(parts, None) or await asyncio.Event().wait()  # type: ignore[return-value]

        async def take(message: Any) -> None:
            if message["type"] == "http.response.start":
                statuses.append((message["status"], (b"connection", b"close") in message["headers"]))

        await app(dict(head), receive, take)

    async def go() -> list[int]:
        held = [asyncio.create_task(slow()) for _ in range(3)]
        while state.in_flight < 3:
            await asyncio.sleep(0)
        told = []
        for _ in range(5):
            told.append((await send(app, word, whole))[0])
            while not statuses:
                await asyncio.sleep(0)
        state.patience.yield_s = 3_600.0
        assert statuses == [(408, True)] and state.in_flight == 2, "one place is enough for those who come one after the other"
        held.append(asyncio.create_task(slow()))
        while state.in_flight < 3:
            await asyncio.sleep(0)
        told.append((await send(app, word, whole))[0])
        for task in held:
            task.cancel()
        await asyncio.gather(*held, return_exceptions=True)
        return told

    assert asyncio.run(asyncio.wait_for(go(), 60)) == [200] * 5 + [503]
    assert state.in_flight == 0 and statuses == [(408, True)]
    state.close()


def test_nobody_makes_room_where_nobody_waits() -> None:
    assert not Patience(yield_s=0.0).make_room()


class Connection:
    """A connection as the server keeps it."""

    def __init__(self, left: int = 0, *, complete: bool | None = None) -> None:
        self.left, self.is_open, self.transport = left, True, self
        self.cycle = None if complete is None else type("Cycle", (), {"response_complete": complete})()

    def get_write_buffer_size(self) -> int:
        return self.left

    def abort(self) -> None:
        self.is_open = False


def test_who_takes_nothing_of_an_answer_is_left() -> None:
    deaf, deaf_too, slow, busy = Connection(9, complete=False), Connection(9, complete=True), Connection(99), Connection(complete=False)
    idlers = Idlers(patience_s=10)
    for now in range(0, 40, 5):
        slow.left -= 1
        idlers.look([c for c in (deaf, deaf_too, slow, busy) if c.is_open], float(now))
    assert [c.is_open for c in (deaf, deaf_too, slow, busy)] == [False, False, True, True] and idlers.closed == 2


# ---- what a refusal costs


def test_a_refusal_by_the_head_reads_nothing_and_scores_nothing(opened, monkeypatch) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("worked for a request that is refused")

    monkeypatch.setattr(body, "gunzip", fail)
    monkeypatch.setattr(opened[0].scorer, "score_rows", fail)
    app = ServiceApp(state=opened[0])
    for word, headers, status in (
        (b"wrong", {b"content-type": JSON}, 401),
        (opened[1], {b"content-type": b"text/html"}, 415),
        (opened[1], {b"content-type": JSON, b"content-length": b"1000000"}, 413),
    ):
        told: list[int] = []

        async def take(message: Any, told: list[int] = told) -> None:
            told.append(message.get("status", 0))

        scope = {"type": "http", "method": "POST", "path": "/predict", "scheme": "http", "client": ("127.0.0.1", 1),
                 "headers": [*headers.items(), (b"x-api-key", word)]}  # fmt: skip
        asyncio.run(app(scope, fail, take))  # type: ignore[arg-type]
        assert told[0] == status


def test_a_bad_gzip_is_told_before_it_is_unpacked_further_than_allowed() -> None:
    import zlib

    packer = zlib.compressobj(wbits=31)
    packed = packer.compress(bytes(50_000_000)) + packer.flush()
    with pytest.raises(Problem) as caught:
        body.gunzip(packed, 1_000)
    assert caught.value.status == 413


def test_to_look_at_the_sockets_opens_nothing(tmp_path) -> None:
    import os

    from ekiben.serving.http.guards import listens_on_loopback

    with (tmp_path / "a file").open("wb"):
        before = len(os.listdir("/dev/fd"))
        for _ in range(5):
            listens_on_loopback()
        assert len(os.listdir("/dev/fd")) == before
