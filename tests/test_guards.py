"""Who is let in: every route with every role, callers without keys, and how often they may come."""

from __future__ import annotations

import base64
import logging
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ekiben.serving.http.guards import FAILURES_PER_S, Bucket, Caller, Guard, is_loopback, word_of
from ekiben.serving.security.issuing import add_key, revoke_key, rotate_key
from ekiben.serving.security.keys import ROLES, KeyFile
from ekiben.serving.problem import Problem
from ekiben.serving.http.routes import ADMIN, ELSEWHERE, OBSERVERS, PREDICTORS, ROUTES

HERE = ("127.0.0.1", 50000)
HOST = (b"host", b"127.0.0.1:3000")


class Clock:
    """A clock that a test turns."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


@pytest.fixture
def clock() -> Clock:
    return Clock()


def scope_of(*headers: tuple[bytes, bytes], client: tuple[str, int] | None = HERE) -> dict[str, Any]:
    return {"headers": [HOST, *headers], "client": client}


def with_key(word: str, scheme: bytes = b"Bearer") -> dict[str, Any]:
    return scope_of((b"authorization", scheme + b" " + word.encode()))


def refused(guard: Guard, scope: dict[str, Any], roles: frozenset[str] = PREDICTORS) -> Problem | None:
    try:
        guard.admit(scope, roles)
    except Problem as problem:
        return problem
    return None


def status(guard: Guard, scope: dict[str, Any], roles: frozenset[str] = PREDICTORS) -> int:
    problem = refused(guard, scope, roles)
    return problem.status if problem else 200


# Keys and roles


def test_every_set_of_roles_opens_its_routes_and_no_other(path: Path) -> None:
    sets = [roles for n in range(1, 5) for roles in combinations(ROLES, n)]
    words = {roles: add_key(path, "-".join(roles), roles)[1] for roles in sets}
    guard = Guard(KeyFile(path), 0, True)
    opens = {
        "predict": {"/predict", "/explain", "/model", "/schema", "/openapi.json", "/"},
        "feedback": {"/feedback"},
        "observe": {"/metrics", "/model", "/schema", "/openapi.json"},
    }
    guarded = [route for route in (*ROUTES.values(), ELSEWHERE) if route.roles]
    assert {route.path for route in ROUTES.values()} - {route.path for route in guarded} == {"/livez", "/readyz"}
    for roles, word in words.items():
        for route in guarded:
            may = "admin" in roles or any(route.path in opens[role] for role in roles)
            problem = refused(guard, with_key(word), route.roles)
            assert (problem.status if problem else 200) == (200 if may else 403), (roles, route.path)
            if problem:
                assert all(f"`{role}`" in str(problem) for role in route.roles)
            assert status(guard, scope_of(), route.roles) == 401


def test_a_key_is_taken_in_each_of_its_forms(path: Path) -> None:
    key, word = add_key(path, "shop", ["predict"])
    raw, guard = word.encode(), Guard(KeyFile(path), 0, False)
    password = b"Basic " + base64.b64encode(b"anyone:" + raw)
    taken = [b"Bearer " + raw, b"bearer  " + raw, b"BEARER " + raw, password, password.replace(b"Basic", b"basic"), raw]
    for value in taken:
        assert guard.admit(scope_of((b"authorization", value)), PREDICTORS).id == key.id
    assert guard.admit(scope_of((b"x-api-key", raw)), PREDICTORS).name == "shop"
    both = scope_of((b"authorization", b"Basic " + base64.b64encode(b"proxy:its own")), (b"x-api-key", raw))
    assert guard.admit(both, PREDICTORS).id == key.id
    upper = b"Basic " + base64.b64encode(raw + b":")
    for value in [b"", b"Bearer", b"Bearer ", b"Digest " + raw, upper, b"Basic ???", b"Bearer " + raw[:-1], b"Bearer " + raw + b"x"]:
        assert status(guard, scope_of((b"authorization", value))) == 401, value


def test_401_says_how_to_send_a_key_and_shows_none(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, word = add_key(path, "shop", ["predict"])
    problem = refused(Guard(KeyFile(path), 0, True), with_key(word[:-4] + "oops"))
    assert problem and problem.status == 401
    schemes = [value.split()[0] for name, value in problem.headers if name == b"www-authenticate"]
    assert schemes == [b"Bearer", b"Basic"]
    assert "oops" not in problem.to_json().decode() + caplog.text and "127.0.0.1" in caplog.text


@given(
    st.lists(
        st.tuples(st.sampled_from([b"authorization", b"x-api-key", b"host", b"cookie"]), st.binary(max_size=60)), max_size=5
    ),
    st.sampled_from([None, HERE, ("::1", 1), ("10.0.0.1", 1), ("testclient", 1), ("", 0)]),
    st.booleans(),
)
def test_no_headers_get_in_without_a_key(headers: list[tuple[bytes, bytes]], client: Any, is_private: bool) -> None:
    closed = Guard(SimpleNamespace(has_keys=True, verify=KeyFile(Path("nowhere/x")).verify, refresh=lambda: False), 0, is_private)  # type: ignore[arg-type]
    assert status(closed, {"headers": headers, "client": client}) in (401, 429)


def test_changes_of_the_file_count_within_half_a_second(path: Path, clock: Clock) -> None:
    guard = Guard(KeyFile(path), 0, True, clock=clock)
    assert status(guard, scope_of()) == 200
    _, word = add_key(path, "shop", ["predict"])
    clock.now += 0.5
    assert (status(guard, scope_of()), status(guard, with_key(word))) == (401, 200)
    _, new = rotate_key(path, "shop")
    clock.now += 0.5
    assert (status(guard, with_key(word)), status(guard, with_key(new))) == (200, 200)
    revoke_key(path, "shop")
    clock.now += 0.5
    assert (status(guard, with_key(word)), status(guard, with_key(new)), status(guard, scope_of())) == (401, 401, 401)
    path.unlink()
    clock.now += 0.5
    assert (status(guard, with_key(new)), status(guard, scope_of())) == (401, 401)


def test_what_is_remembered_of_callers_is_bounded(path: Path) -> None:
    _, word = add_key(path, "shop", ["predict"])
    guard = Guard(KeyFile(path), 0, True)
    for n in range(3000):
        assert status(guard, scope_of((b"authorization", b"Basic " + base64.b64encode(b"%d:%s" % (n, word.encode()))))) == 200
    assert len(guard._verified) <= 1024
    nobody = Guard(None, 0, True)
    for n in range(3000):
        assert status(nobody, {"headers": [(b"host", b"localhost:%d" % n)], "client": HERE}) == 200
    assert len(nobody._own) <= 1024


# Without keys


@pytest.mark.parametrize("is_private", [True, False])
@pytest.mark.parametrize(
    ("client", "is_near"),
    [
        (("127.0.0.1", 1), True), (("127.9.9.9", 1), True), (("::1", 1), True), (("::ffff:127.0.0.1", 1), True),
        (("10.0.0.3", 1), False), (("0.0.0.0", 1), False), (("::", 1), False), (("::ffff:10.0.0.3", 1), False),
        (("2001:db8::1", 1), False), (("", 0), False), (None, False),
    ],
)  # fmt: skip
def test_without_a_key_only_this_machine_gets_in(is_private: bool, client: Any, is_near: bool) -> None:
    guard = Guard(None, 0, is_private)
    assert guard.needs_key is not is_private
    for roles in (PREDICTORS, OBSERVERS, ADMIN):
        assert status(guard, scope_of(client=client), roles) == (200 if is_private and is_near else 401)


@pytest.mark.parametrize(
    ("host", "is_own"),
    [
        (b"localhost", True), (b"localhost:3000", True), (b"LOCALHOST:3000", True), (b"127.0.0.1:80", True), (b"[::1]:3000", True),
        (b"app.localhost", True), (b"evil.example", False), (b"localhost.evil.example:3000", False), (b"10.0.0.3:3000", False),
        (b"127.0.0.1.evil.example", False), (b"[::2]", False), (b"evil.example:localhost", False),
    ],
)  # fmt: skip
def test_a_web_page_elsewhere_cannot_lead_a_browser_here(host: bytes, is_own: bool) -> None:
    assert status(Guard(None, 0, True), {"headers": [(b"host", host)], "client": HERE}) == (200 if is_own else 401)


@pytest.mark.parametrize("name", [b"x-forwarded-for", b"forwarded", b"x-real-ip", b"x-forwarded-host"])
def test_what_a_proxy_forwards_needs_a_key(name: bytes, path: Path) -> None:
    assert status(Guard(None, 0, True), scope_of((name, b"127.0.0.1"))) == 401
    _, word = add_key(path, "shop", ["predict"])
    forwarded = scope_of((name, b"10.0.0.3"), (b"authorization", f"Bearer {word}".encode()))
    assert status(Guard(KeyFile(path), 0, False), forwarded) == 200


def test_sockets_say_where_the_process_listens() -> None:
    code = (
        "import socket, sys\n"
        "from ekiben.serving.http.guards import listens_on_loopback as asked\n"
        "said = [asked(), asked(default=True)]\n"
        "open_ = [socket.create_server((host, 0)) for host in ('127.0.0.1', '127.0.0.2')]\n"
        "idle = socket.socket(); idle.bind(('0.0.0.0', 0))\n"
        "said += [asked(), asked(default=True)]\n"
        "open_ += [socket.create_server(('0.0.0.0', 0))]\n"
        "said += [asked(), asked(default=True)]\n"
        "print(said)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == str([False, True, True, True, False, False])


# Limits


@given(
    st.floats(0.01, 1000),
    st.lists(st.floats(0, 3, allow_nan=False, allow_infinity=False), min_size=1, max_size=60),
)
def test_a_bucket_never_lets_more_through_than_its_rate(rate: float, pauses: list[float]) -> None:
    bucket, now, taken = Bucket(rate), 0.0, []
    for pause in pauses:
        now += pause
        if bucket.take(now):
            taken.append(now)
        else:
            assert bucket.wait_s >= 1
            assert bucket.left < 1
    for i, first in enumerate(taken):
        for j in range(i, len(taken)):
            assert j - i + 1 <= max(1.0, rate) + (taken[j] - first) * rate + 1e-6


def test_each_key_has_its_own_limit_and_is_told_when_to_come_again(path: Path, clock: Clock) -> None:
    words = [add_key(path, name, ["predict"])[1] for name in ("a", "b")]
    guard = Guard(KeyFile(path), 3, True, clock=clock)
    assert [status(guard, with_key(words[0])) for _ in range(5)] == [200, 200, 200, 429, 429]
    assert status(guard, with_key(words[1])) == 200
    problem = refused(guard, with_key(words[0]))
    assert problem and dict(problem.headers)[b"retry-after"] == b"1" and b'r=0;t=1' in dict(problem.headers)[b"ratelimit"]
    clock.now += 0.34
    assert [status(guard, with_key(words[0])) for _ in range(2)] == [200, 429]
    add_key(path, "c", ["predict"])  # a change of the file fills nobody's bucket
    clock.now += 0.5
    assert [status(guard, with_key(words[0])) for _ in range(2)] == [200, 429]
    clock.now += 60
    assert [status(guard, with_key(words[0])) for _ in range(4)] == [200, 200, 200, 429]


def test_refusals_for_the_role_count_too_and_callers_without_keys_share_a_limit(path: Path, clock: Clock) -> None:
    _, word = add_key(path, "a", ["predict"])
    guard = Guard(KeyFile(path), 1, True, clock=clock)
    assert [status(guard, with_key(word), OBSERVERS) for _ in range(2)] == [403, 429]
    slow = Guard(None, 0.5, True, clock=clock)
    assert [status(slow, scope_of()) for _ in range(2)] == [200, 429]
    assert dict(refused(slow, scope_of()).headers)[b"retry-after"] == b"2"  # type: ignore[union-attr]


def test_a_flood_of_wrong_keys_is_slowed_and_locks_nobody_out(path: Path, clock: Clock) -> None:
    _, word = add_key(path, "a", ["predict"])
    guard = Guard(KeyFile(path), 0, True, clock=clock)
    seen = [status(guard, with_key(f"ekb_00000000_{n}")) for n in range(500)]
    assert seen == [401] * int(5 * FAILURES_PER_S) + [429] * (500 - int(5 * FAILURES_PER_S))
    assert status(guard, with_key(word)) == 200 and status(guard, scope_of()) == 401
    clock.now += 1
    assert status(guard, with_key("ekb_00000000_x")) == 401


def test_a_flood_leaves_few_lines_in_the_log_and_all_are_counted(
    path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    add_key(path, "a", ["predict"])
    caplog.set_level(logging.WARNING)
    guard = Guard(KeyFile(path), 0, True, clock=clock)
    caplog.clear()
    for _ in range(1000):
        status(guard, scope_of(client=("10.0.0.3", 9)))
        clock.now += 0.01
    assert 5 <= len(caplog.records) <= 22 and guard.refused == 1000
    counted = [int(r.getMessage().split("(")[1].split()[0]) if "(" in r.getMessage() else 0 for r in caplog.records]
    told = sum(counted) + sum("refused 10.0.0.3" in r.getMessage() for r in caplog.records)
    assert 880 <= told <= 1000


def test_a_caller_shows_no_secret(path: Path) -> None:
    key, word = add_key(path, "shop", ["admin"])
    caller = Guard(KeyFile(path), 0, True).admit(with_key(word), ADMIN)
    assert isinstance(caller, Caller) and caller.roles == set(ROLES) and repr(caller) == f"Caller({key.id} shop)"
    assert word_of(b"Bearer " + word.encode()) == word.encode() and not is_loopback("")
