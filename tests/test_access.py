"""No route of the application answers without the right role, whatever is sent to it."""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import pytest
from bundles import make_project

from ekiben.errors import IntegrityError
from ekiben.serving.http.app import ServiceApp
from ekiben.serving.security.issuing import add_key, revoke_key
from ekiben.serving.security.keys import CHECK_EVERY_S, ROLES, Role
from ekiben.serving.options import ServiceOptions
from ekiben.serving.http.routes import ROUTES
from ekiben.serving.http.state import State

INNER = ("/docs.json", "/schema.json", "/predict/", "//predict", "/predict/x", "/static/x.js", "/PREDICT", "/unknown", "*", "")
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "BREW")


class Asked:
    """Calls the application and notes what it did."""

    def __init__(self, state: State, *, with_inner: bool = True) -> None:
        self.reached: list[str] = []
        self.read = 0
        self.app = ServiceApp(self._inner if with_inner else None, state=state)

    async def _inner(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        self.reached.append(scope["path"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"inner"})

    def __call__(self, method: str, path: str, word: str = "", *, client: str = "127.0.0.1", **more: Any) -> int:
        self.headers: dict[bytes, bytes] = {}
        self.body = b""
        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        headers += [(b"authorization", f"Bearer {word}".encode())] if word else []
        scope = {"type": "http", "method": method, "path": path, "headers": headers, "client": (client, 1), "scheme": "http"}
        status = 0

        async def receive() -> dict[str, Any]:
            self.read += 1
            return {"type": "http.request", "body": b'{"rows": []}', "more_body": False}

        async def send(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                self.headers = dict(message["headers"])
            self.body += message.get("body", b"")

        asyncio.run(self.app(scope | {"raw_path": path.encode(), "query_string": b""} | more, receive, send))
        return status


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> tuple[State, dict[Role, str], Path]:
    path = tmp_path_factory.mktemp("keys") / "keys.json"
    words: dict[Role, str] = {role: add_key(path, role, [role])[1] for role in ROLES}
    state = State()
    folder = make_project(tmp_path_factory.mktemp("census")).bundle.folder
    state.open(folder, journal=path.parent / "journal", service=ServiceOptions(keys=str(path)))
    yield state, words, path
    state.close()


def test_every_route_and_method_wants_a_key_but_the_probes(served) -> None:
    asked = Asked(served[0])
    for method in METHODS:
        for path in (*ROUTES, *INNER):
            for word in ("", "wrong"):
                status = asked(method, path, word)
                if path in ("/livez", "/readyz"):
                    assert status == (200 if method in ("GET", "HEAD") else 405)
                else:
                    assert status in (401, 429), (method, path, status)
    assert not asked.reached and not asked.read


@pytest.mark.parametrize("with_inner", [True, False])
def test_each_role_opens_its_routes_and_no_other(served, with_inner: bool) -> None:
    state, words, _ = served
    asked = Asked(state, with_inner=with_inner)
    for role, word in words.items():
        for route in ROUTES.values():
            for method in route.methods:
                status = asked(method, route.path, word)
                may = not route.roles or role in route.roles or role == "admin"
                assert (status not in (401, 403)) is may, (role, method, route.path, status)
                assert may or status == 403
        asked.reached.clear()
        for path in INNER:
            assert asked("GET", path, word) == (403 if role != "admin" else 200 if with_inner else 404)
        assert asked.reached == (list(INNER) if with_inner and role == "admin" else [])


def test_what_is_refused_is_not_read_and_tells_nothing_of_the_service(served) -> None:
    state, words, _ = served
    asked = Asked(state)
    for word, status in (("", 401), (words["observe"], 403)):
        assert asked("POST", "/predict", word) == status and asked.read == 0
        assert b"census" not in asked.body and words["observe"].encode() not in asked.body
        assert asked.headers[b"content-type"] == b"application/problem+json"
    assert asked("POST", "/predict", words["predict"]) == 422 and asked.read == 1


def test_a_key_that_is_revoked_is_refused_by_the_next_check(served) -> None:
    state, _, path = served
    asked = Asked(state)
    _, word = add_key(path, "short", ["observe"])
    asyncio.run(asyncio.sleep(CHECK_EVERY_S + 0.1))
    assert asked("GET", "/metrics", word) == 200
    revoke_key(path, "short")
    asyncio.run(asyncio.sleep(CHECK_EVERY_S + 0.1))
    assert asked("GET", "/metrics", word) == 401


def test_without_keys_this_machine_is_let_in_and_no_other(tmp_path: Path) -> None:
    state = State()
    state.open(make_project(tmp_path).bundle.folder, service=ServiceOptions(keys=str(tmp_path / "keys.json")))
    asked = Asked(state)
    for path in (*ROUTES, *INNER):
        assert asked("GET", path) not in (401, 403), path
        status = asked("GET", path, client="10.0.0.3")
        assert status == (200 if path in ("/livez", "/readyz") else 401), path


def test_the_limit_of_a_key_holds_for_the_application(tmp_path: Path) -> None:
    path, state = tmp_path / "keys.json", State()
    _, word = add_key(path, "shop", ["predict"])
    state.open(make_project(tmp_path).bundle.folder, service=ServiceOptions(keys=str(path), rate_limit=0.01))
    asked = Asked(state)
    assert asked("GET", "/model", word) == 200
    assert asked("GET", "/model", word) == 429 and int(asked.headers[b"retry-after"]) > 60
    assert asked("GET", "/livez") == 200


def test_keys_that_cannot_be_read_keep_the_service_from_starting(tmp_path: Path) -> None:
    path, state = tmp_path / "keys.json", State()
    path.write_text("{")
    path.chmod(0o600)
    with pytest.raises(IntegrityError, match="damaged"):
        state.open(make_project(tmp_path).bundle.folder, service=ServiceOptions(keys=str(path)))
    assert Asked(state)("GET", "/readyz") == 503
