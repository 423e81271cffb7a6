"""A server that is told to stop, and connections on which nothing comes: with a real server and real sockets."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from bundles import Project, make_project

from ekiben.serving.journal.journal import read_journal

ROW = {"age": 30, "income": 1.0, "job": "clerk", "place": "L", "member": True, "since": "2020-01-01"}
BODY = json.dumps({"rows": [ROW]}).encode()
HEAD = b"POST /predict HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(BODY)
PATIENCE_S = 60
SERVER = """
import os, sys
from pathlib import Path
import uvicorn
from ekiben.serving.http.app import ServiceApp
from ekiben.serving.http.lifecycle import Idlers
from ekiben.serving.http.state import State
bundle, journal, port, idle_s = sys.argv[1:]
state = State()
state.open(Path(bundle), journal=Path(journal))
app = ServiceApp(state=state)
app.idlers = Idlers(float(idle_s), every_s=0.05)
uvicorn.run(app, host="127.0.0.1", port=int(port), log_level="error", timeout_keep_alive=60)
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Project:
    return make_project(tmp_path_factory.mktemp("census"))


@contextmanager
def serving(project: Project, folder: Path, *, drain_s: float = 0.0, idle_s: float = 600.0) -> Iterator[tuple[subprocess.Popen, int]]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-c", SERVER, str(project.bundle.folder), str(folder), str(port), str(idle_s)]
    process = subprocess.Popen(command, env={**os.environ, "EKIBEN_SERVE__DRAIN_S": str(drain_s)})
    try:
        wait_until(lambda: ask(port, "GET", "/readyz") == 200)
        yield process, port
    finally:
        process.kill()
        process.wait()


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def ask(port: int, method: str, path: str, body: bytes | None = None) -> int | None:
    """Return the status of an answer; None when nobody listens."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)) as connection:
        try:
            connection.request(method, path, body, {"content-type": "application/json"} if body else {})
            return connection.getresponse().status
        except OSError:
            return None


def read_all(connection: socket.socket) -> bytes:
    connection.settimeout(PATIENCE_S)
    found = b""
    while part := connection.recv(65536):
        found += part
    return found


def test_a_service_that_is_told_to_stop_says_so_and_answers_until_it_does(project, tmp_path):
    with serving(project, tmp_path / "journal", drain_s=5) as (process, port):
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: ask(port, "GET", "/readyz") == 503)
        process.send_signal(signal.SIGTERM)  # an init system and an arbiter both say it
        answered = 0
        while (status := ask(port, "POST", "/predict", BODY)) is not None:
            assert status == 200
            answered += 1
            assert ask(port, "GET", "/livez") in (200, None)
        assert answered > 1 and process.wait(PATIENCE_S) == -signal.SIGTERM
    assert len(read_journal(tmp_path / "journal")) >= answered


def test_what_is_in_flight_is_answered_after_the_door_is_closed(project, tmp_path):
    with serving(project, tmp_path / "journal") as (process, port):
        with socket.create_connection(("127.0.0.1", port)) as half:
            half.sendall(HEAD + BODY[:30])
            wait_until(lambda: b"requests_in_flight 1.0" in metrics(port))
            process.send_signal(signal.SIGTERM)
            wait_until(lambda: ask(port, "GET", "/livez") is None)
            half.sendall(BODY[30:])
            answer = read_all(half)
        assert answer.startswith(b"HTTP/1.1 200"), answer
        assert b"connection: close" in answer.lower()
        assert process.wait(PATIENCE_S) == -signal.SIGTERM
    assert len(read_journal(tmp_path / "journal")) == 1


def metrics(port: int) -> bytes:
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)) as connection:
        connection.request("GET", "/metrics")
        return connection.getresponse().read()


def test_an_interrupt_ends_the_grace(project, tmp_path):
    with serving(project, tmp_path / "journal", drain_s=3600) as (process, port):
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: ask(port, "GET", "/readyz") == 503)
        process.send_signal(signal.SIGINT)
        process.wait(PATIENCE_S)


def test_connections_on_which_no_request_comes_are_closed_and_the_others_are_not(project, tmp_path):
    with serving(project, tmp_path / "journal", idle_s=3.0) as (_, port):
        silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(50)]
        slow = socket.create_connection(("127.0.0.1", port))
        slow.sendall(HEAD[:40])
        for connection in (*silent, slow):
            assert read_all(connection) == b"", "closed, with no answer"
            connection.close()
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)) as busy:
            for _ in range(12):
                busy.request("POST", "/predict", BODY, {"content-type": "application/json"})
                assert busy.getresponse().read().startswith(b'{"predictions"')
                time.sleep(0.3)
        with socket.create_connection(("127.0.0.1", port)) as waiting:
            waiting.sendall(HEAD + BODY[:30])
            time.sleep(5)
            waiting.sendall(BODY[30:])
            assert waiting.recv(20).startswith(b"HTTP/1.1 200"), "a body on its way is not idle"


def test_many_open_connections_keep_nobody_out(project, tmp_path):
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    many = min(2_000, hard // 4)
    with serving(project, tmp_path / "journal") as (_, port):
        kept = [socket.create_connection(("127.0.0.1", port)) for _ in range(many)]
        try:
            assert ask(port, "POST", "/predict", BODY) == 200
        finally:
            for connection in kept:
                connection.close()
