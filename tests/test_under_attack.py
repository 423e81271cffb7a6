"""The Bento as a real server, and clients that mean it no good: slow, endless, far too many, malformed."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import resource
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bundles import make_columns, make_project
from fuzz import resident_mb

from ekiben.bento import build_bento
from ekiben.serving.bundle import Limits, stamp_bundle
from ekiben.serving.security.issuing import add_key
from ekiben.serving.options import ServiceOptions
from ekiben.serving.run import start_bento, stop_process, wait_ready

SERVICE = Path(__file__).resolve().parents[1] / "bentos" / "scorer" / "service.py"
PATIENCE_S = 120
MB = 2**20
BODY = json.dumps({"rows": make_columns(1, 5).to_rows()}).encode()
pytestmark = pytest.mark.slow


@dataclass
class Target:
    """The service under attack."""

    port: int
    worker: int
    key: bytes
    log: Path
    files: int  # how many may be open

    def connect(self) -> socket.socket:
        """Return a connection."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE_S)

    def head(self, line: bytes, *fields: bytes, key: bool = True) -> bytes:
        """Return the head of a request."""
        fields = (b"host: localhost", *([b"x-api-key: " + self.key] if key else []), *fields)
        return line + b" HTTP/1.1\r\n" + b"".join(field + b"\r\n" for field in fields) + b"\r\n"

    def predict(self, body: bytes = BODY, *fields: bytes) -> bytes:
        """Return a request for predictions."""
        return self.head(b"POST /predict", b"content-type: application/json", b"content-length: %d" % len(body), *fields) + body

    def ask(self, request: bytes) -> tuple[int, bytes]:
        """Return the status of what comes first, and all that came until the server closed or had answered once."""
        with closing(self.connect()) as connection:
            connection.sendall(request)
            return read_answer(connection)

    def is_well(self) -> None:
        """Check that other clients are answered, like `ask` in good time."""
        assert self.ask(self.predict())[0] == 200
        assert self.ask(self.head(b"GET /readyz"))[0] == 200

    def watch_mb(self) -> float:
        """Return the memory that the worker has; from now on its most is kept."""
        Path(f"/proc/{self.worker}/clear_refs").write_text("5")
        return resident_mb(self.worker)

    def peak_mb(self) -> float:
        """Return the most memory the worker had since."""
        said = Path(f"/proc/{self.worker}/status").read_text()
        return int(re.findall(r"VmHWM:\s+(\d+) kB", said)[0]) / 1024


def read_answer(connection: socket.socket) -> tuple[int, bytes]:
    """Return the status of the next answer (0: none came) and its bytes."""
    found = b""
    try:
        while not (whole := re.search(rb"\r\n\r\n", found)) or len(found) < whole.end() + length_of(found):
            part = connection.recv(65536)
            if not part:
                break
            found += part
    except ConnectionError:
        pass
    status = re.match(rb"HTTP/1\.1 (\d{3})", found)
    return int(status[1]) if status else 0, found


def length_of(answer: bytes) -> int:
    said = re.search(rb"(?i)\r\ncontent-length: (\d+)", answer)
    return int(said[1]) if said else 0


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """A Bento with keys, a journal, and a line in the log for each request."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    home, before = tmp_path_factory.mktemp("attacked"), os.environ.get("BENTOML_HOME")
    os.environ["BENTOML_HOME"] = str(home / "bentoml")
    key = add_key(home / "keys.json", "someone", ["predict", "feedback", "observe"])[1]
    made = make_project(home / "made", limits=Limits(max_body_mb=0.5))
    bento = build_bento(stamp_bundle(made.bundle.folder, home / "stamped", version="3", mlflow_run="m1"), SERVICE)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = ServiceOptions(keys=str(home / "keys.json"), log_requests=True, drain_s=0.0)
    with (home / "log").open("wb") as log:
        process = start_bento(bento.tag, "127.0.0.1", port, journal=home / "journal", service=options, output=log)
        try:
            wait_ready(f"http://127.0.0.1:{port}", process, PATIENCE_S)
            children = psutil.Process(process.pid).children(recursive=True)
            worker = max(children, key=lambda child: child.memory_info().rss).pid
            yield Target(port, worker, key.encode(), home / "log", hard)
            assert psutil.pid_exists(worker), "the worker is still the one that was started"
        finally:
            stop_process(process)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            os.environ.pop("BENTOML_HOME") if before is None else os.environ.update(BENTOML_HOME=before)


# ---- malformed bodies, in a process of their own


def test_a_hundred_thousand_malformed_bodies_are_refused_and_leave_nothing_behind(tmp_path: Path) -> None:
    bundle = make_project(tmp_path / "made", limits=Limits(max_body_mb=0.5)).bundle.folder
    command = [sys.executable, str(Path(__file__).with_name("fuzz.py")), str(bundle), str(tmp_path), "100000", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    print(found)
    assert found["failed"] == []
    assert sum(found["statuses"].values()) == 100_000 and found["statuses"]["422"] > 2_000 and found["statuses"]["400"] > 20_000
    # The first look is after a fifth of the bodies: what is loaded or filled once is there by then.
    assert found["blocks"][-1] - found["blocks"][0] < 8_000, "objects that stay"
    assert found["resident_mb"][-1] - found["resident_mb"][0] < 32


# ---- slow clients


def test_heads_that_do_not_end_keep_nobody_out(target: Target) -> None:
    with ExitStack() as stack:
        slow = [stack.enter_context(closing(target.connect())) for _ in range(500)]
        for connection in slow:
            connection.sendall(b"POST /predict HTTP/1.1\r\nhost: localhost\r\nx-")
        deadline = time.monotonic() + PATIENCE_S
        while slow and time.monotonic() < deadline:
            target.is_well()
            slow = [connection for connection in slow if drip(connection)]
            time.sleep(0.5)
        assert not slow, "none of them is open for ever, though a byte comes now and then"
    target.is_well()


def drip(connection: socket.socket, byte: bytes = b"x") -> bool:
    """Send a byte; tell whether the connection is still open."""
    try:
        if select.select([connection], [], [], 0)[0] and not connection.recv(65536, socket.MSG_PEEK):
            return False
        connection.sendall(byte)
    except OSError:
        return False
    return True


def test_bodies_that_do_not_end_keep_nobody_out(target: Target) -> None:
    many = ServiceOptions().max_concurrency + 100
    with ExitStack() as stack:
        slow = [stack.enter_context(closing(target.connect())) for _ in range(many)]
        for connection in slow:
            connection.sendall(target.predict()[:-100])
        waiting, answered, deadline = list(slow), 0, time.monotonic() + PATIENCE_S
        while answered < 20 and time.monotonic() < deadline:
            waiting = [connection for connection in waiting if not is_answered(connection) and drip(connection, b" ")]
            answered += target.ask(target.predict())[0] == 200
            time.sleep(0.1)
        assert answered == 20 and len(waiting) > many / 2, "others were answered while the slow ones still held on"
        statuses = [read_answer(connection)[0] for connection in slow]
        assert set(statuses) == {408, 503}
    target.is_well()


def is_answered(connection: socket.socket) -> bool:
    return bool(select.select([connection], [], [], 0)[0])


def test_clients_that_do_not_read_their_answers_are_left(target: Target) -> None:
    before = resident_mb(target.worker)
    with ExitStack() as stack:
        deaf = [stack.enter_context(closing(socket.socket())) for _ in range(100)]
        for connection in deaf:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", target.port))
            connection.sendall(target.head(b"GET /openapi.json") * 30)
        target.is_well()
        print(f"100 deaf clients: {resident_mb(target.worker) - before:.0f} MB more")
        assert resident_mb(target.worker) - before < 100
        deadline = time.monotonic() + PATIENCE_S
        while len(server_side(target)) > 10 and time.monotonic() < deadline:
            target.is_well()
            time.sleep(0.5)
        assert len(server_side(target)) <= 10, "the server closed them"


def server_side(target: Target) -> list[object]:
    return [c for c in psutil.Process(target.worker).net_connections("tcp") if c.status == "ESTABLISHED" and c.laddr.port == target.port]


# ---- too many, too much


def test_ten_thousand_open_connections_keep_nobody_out(target: Target) -> None:
    many = min(10_000, target.files - 1_000)
    print(f"{many} connections, {target.files} files may be open")
    with ExitStack() as stack:
        for i in range(many):
            connection = stack.enter_context(closing(target.connect()))
            if i % 2:
                connection.sendall(b"POST /predict HTTP/1.1\r\nhost: localhost\r\n")
            if i % 1_000 == 999:
                target.is_well()
        print(f"{len(server_side(target))} of them open at once, {resident_mb(target.worker):.0f} MB")
        for _ in range(20):
            target.is_well()
    target.is_well()


def flood(target: Target, head: bytes, block: bytes, number: int, tail: bytes = b"") -> tuple[int, int, float]:
    """Send a block again and again until the server has enough; return status, bytes that it took and MB that it grew."""
    target.is_well()
    before, sent = target.watch_mb(), 0
    with closing(target.connect()) as connection:
        try:
            connection.sendall(head)
            for _ in range(number):
                connection.sendall(block)
                sent += len(block)
                if is_answered(connection):
                    break
            else:
                connection.sendall(tail)
        except OSError:
            pass
        status = read_answer(connection)[0]
    target.is_well()
    return status, sent, target.peak_mb() - before


@pytest.mark.parametrize("how", ["its length is said", "in chunks", "in chunks and gzip", "its length is said, and no key"])
def test_a_body_of_a_gigabyte_is_refused_early(target: Target, how: str) -> None:
    kind, block = b"content-type: application/json", bytes(MB)
    chunk = b"%x\r\n" % MB + block + b"\r\n"
    if how.startswith("its"):
        has_key = "no key" not in how
        head = target.head(b"POST /predict", kind, b"content-length: %d" % 2**30, key=has_key)
        status, sent, grew = flood(target, head, block, 1024)
        assert status == (413 if has_key else 401)
    else:
        gz = [b"content-encoding: gzip"] if "gzip" in how else []
        head = target.head(b"POST /predict", kind, b"transfer-encoding: chunked", *gz)
        status, sent, grew = flood(target, head, chunk, 1024, b"0\r\n\r\n")
        assert status in (0, 413)  # a server that closes while much is on its way may lose its answer
    print(how, status, f"{sent / MB:.0f} MB sent, grew by {grew:.1f} MB")
    assert sent < 64 * MB and grew < 32


def test_bombs_are_refused_before_they_go_off(target: Target) -> None:
    rows = pa.table({"age": pa.array([30.0]).take(pa.array([0] * 3_000_000, pa.int32()))})
    people = pa.Table.from_pylist(make_columns(2_000, 5).to_rows())
    wide = people.set_column(3, "place", pa.DictionaryArray.from_arrays(pa.array([0] * 2_000, pa.int32()), ["x" * 200_000]))
    bombs = {"json": gzip.compress(bytes(400 * MB), 9), "vnd.apache.parquet": b"", "parquet of one text": b""}
    for name, table in (("vnd.apache.parquet", rows), ("parquet of one text", wide)):
        file = io.BytesIO()
        pq.write_table(table, file, compression="zstd")
        bombs[name] = file.getvalue()
    before = target.watch_mb()
    for name, bomb in bombs.items():
        kind = b"application/" + (b"json" if name == "json" else b"vnd.apache.parquet")
        fields = [b"content-type: " + kind, b"content-length: %d" % len(bomb), *([b"content-encoding: gzip"] if name == "json" else [])]
        assert len(bomb) < 0.5 * MB
        for _ in range(5):
            status, said = target.ask(target.head(b"POST /predict", *fields) + bomb)
            assert status == 413, said
    assert target.peak_mb() - before < 200  # opened, the smallest of them is twice that
    target.is_well()


@pytest.mark.parametrize(("name", "start", "block", "number"), [
    ("one header", b"GET /livez HTTP/1.1\r\nhost: localhost\r\nx: ", b"x" * MB, 256),
    ("the name of a header", b"GET /livez HTTP/1.1\r\nhost: localhost\r\n", b"x" * MB, 256),
    ("many headers", b"GET /livez HTTP/1.1\r\nhost: localhost\r\n", b"x: y\r\n" * 100_000, 256),
    ("the address", b"GET /", b"x" * MB, 256),
    ("empty lines", b"", b"\r\n" * (MB // 2), 256),
])  # fmt: skip
def test_heads_without_end_are_refused(target: Target, name: str, start: bytes, block: bytes, number: int) -> None:
    status, sent, grew = flood(target, start, block, number)
    print(name, status, f"{sent / MB:.0f} MB sent, grew by {grew:.1f} MB")
    assert status in (0, 400, 431) and sent < 32 * MB and grew < 32


def test_requests_that_queue_on_one_connection_are_few(target: Target) -> None:
    status, sent, grew = flood(target, b"", target.head(b"GET /openapi.json") * 1_000, 256)
    print(status, f"{sent / MB:.0f} MB sent, grew by {grew:.1f} MB")
    assert status in (0, 200, 400) and sent < 32 * MB and grew < 32


@pytest.mark.parametrize(("name", "start", "block"), [
    ("trailers", b"2\r\n{}\r\n0\r\n", b"x: y\r\n" * 100_000),
    ("one trailer", b"2\r\n{}\r\n0\r\nx: ", b"x" * MB),
    ("a chunk's extension", b"2;", b"x" * MB),
])  # fmt: skip
def test_what_stands_around_a_body_is_bounded_too(target: Target, name: str, start: bytes, block: bytes) -> None:
    head = target.head(b"POST /predict", b"content-type: application/json", b"transfer-encoding: chunked")
    status, sent, grew = flood(target, head + start, block, 256)
    print(name, status, f"{sent / MB:.0f} MB sent, grew by {grew:.1f} MB")
    assert status in (0, 400, 431) and sent < 32 * MB and grew < 32


# ---- odd requests


def test_requests_in_one_write_are_answered_in_their_order(target: Target) -> None:
    """Pipelining: 30 requests, of which every third is wrong."""
    with closing(target.connect()) as connection:
        connection.sendall(b"".join(target.predict(BODY if i % 3 else b"{") for i in range(30)))
        found, seen = b"", 0
        while (seen := len(re.findall(rb"HTTP/1\.1 \d{3}", found))) < 30 or not found.endswith(b"}"):
            part = connection.recv(65536)
            assert part, f"closed after {seen} answers"
            found += part
    assert [int(s) for s in re.findall(rb"HTTP/1\.1 (\d{3})", found)] == [200 if i % 3 else 400 for i in range(30)]


SMUGGLED = b"GET /metrics HTTP/1.1\r\nhost: localhost\r\n\r\n"
ODD = {
    "HEAD": (b"HEAD /readyz HTTP/1.1\r\nhost: localhost\r\n\r\n", {200}),
    "OPTIONS": (b"OPTIONS /predict HTTP/1.1\r\nhost: localhost\r\nx-api-key: KEY\r\norigin: http://evil\r\n\r\n", {405}),
    "OPTIONS *": (b"OPTIONS * HTTP/1.1\r\nhost: localhost\r\n\r\n", {400, 401}),
    "TRACE": (b"TRACE /predict HTTP/1.1\r\nhost: localhost\r\nx-api-key: KEY\r\n\r\n", {400, 405}),
    "CONNECT": (b"CONNECT localhost:80 HTTP/1.1\r\nhost: localhost\r\n\r\n", {0, 400, 401}),
    "no such method": (b"BREW /predict HTTP/1.1\r\nhost: localhost\r\n\r\n", {400, 401}),
    "another host": (b"GET /model HTTP/1.1\r\nhost: evil.example\r\nx-api-key: KEY\r\n\r\n", {200}),
    "two hosts": (b"GET /model HTTP/1.1\r\nhost: a\r\nhost: b\r\nx-api-key: KEY\r\n\r\n", {200, 400}),
    "no host": (b"GET /model HTTP/1.1\r\nx-api-key: KEY\r\n\r\n", {200, 400}),
    "a path that is no text": (b"GET /\xff\xfe\x80 HTTP/1.1\r\nhost: localhost\r\n\r\n", {400, 401}),
    "a coded path that is no text": (b"GET /%ff%00%c0%80 HTTP/1.1\r\nhost: localhost\r\n\r\n", {401}),
    "a way out": (b"GET /livez/../../../etc/passwd HTTP/1.1\r\nhost: localhost\r\n\r\n", {400, 401}),
    "the whole address": (b"GET http://evil/model HTTP/1.1\r\nhost: localhost\r\nx-api-key: KEY\r\n\r\n", {200, 400}),
    "no address": (b"GET  HTTP/1.1\r\nhost: localhost\r\n\r\n", {400}),
    "HTTP/0.9": (b"GET /\r\n\r\n", {0, 400, 401}),
    "HTTP/1.0": (b"GET /livez HTTP/1.0\r\n\r\n", {200}),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", {0, 400}),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(60), {400}),
    "nothing but zeros": (bytes(1000), {400}),
    "a folded header": (b"GET /livez HTTP/1.1\r\nhost: localhost\r\ntracestate: a=1\r\n\tx-evil: 1\r\n\r\n", {200, 400}),
    "a zero in a header": (b"GET /livez HTTP/1.1\r\nhost: localhost\r\ntracestate: a\x00b\r\n\r\n", {400}),
    "a lone CR in a header": (b"GET /livez HTTP/1.1\r\nhost: localhost\r\ntracestate: a\rx-evil: 1\r\n\r\n", {400}),
    "a space before the colon": (b"GET /livez HTTP/1.1\r\nhost : localhost\r\n\r\n", {400}),
    "another key": (b"GET /model HTTP/1.1\r\nhost: localhost\r\nx-api-key: \xff\xfe\x80\r\n\r\n", {401}),
    "Basic that is none": (b"GET /model HTTP/1.1\r\nhost: localhost\r\nauthorization: Basic \xff\r\n\r\n", {401}),
    "a key of 60 kB": (b"GET /model HTTP/1.1\r\nhost: localhost\r\nx-api-key: " + b"k" * 60_000 + b"\r\n\r\n", {401}),
    "3,000 headers": (b"GET /livez HTTP/1.1\r\nhost: localhost\r\n" + b"".join(b"x%d: y\r\n" % i for i in range(3_000)) + b"\r\n", {200, 431}),
    "two lengths": (b"POST /predict HTTP/1.1\r\nhost: l\r\ncontent-length: 2\r\ncontent-length: 9\r\n\r\n{}" + SMUGGLED, {400}),
    "a length and chunks": (b"POST /predict HTTP/1.1\r\nhost: l\r\ncontent-length: 9\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n" + SMUGGLED, {400}),
    "chunked, and not last": (b"POST /predict HTTP/1.1\r\nhost: l\r\ntransfer-encoding: chunked, identity\r\n\r\n0\r\n\r\n", {400, 401}),
    "a negative length": (b"POST /predict HTTP/1.1\r\nhost: localhost\r\ncontent-length: -1\r\n\r\n", {400}),
    "a length that is none": (b"POST /predict HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1e3\r\n\r\n", {400}),
    "a length of 5,000 digits": (b"POST /predict HTTP/1.1\r\nhost: localhost\r\ncontent-length: " + b"9" * 5_000 + b"\r\n\r\n", {400}),
    "a chunk of 2**70 bytes": (
        b"POST /predict HTTP/1.1\r\nhost: localhost\r\nx-api-key: KEY\r\ncontent-type: application/json\r\n"
        b"transfer-encoding: chunked\r\n\r\nfffffffffffffffffff\r\n", {0, 400}),
    "an upgrade": (b"GET /predict HTTP/1.1\r\nhost: l\r\nconnection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n"
                   b"sec-websocket-key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n\r\n", {400, 401, 403, 404}),
    "an upgrade to HTTP/2": (b"GET /model HTTP/1.1\r\nhost: l\r\nconnection: upgrade, http2-settings\r\nupgrade: h2c\r\n"
                             b"http2-settings: AAMAAABkAAQAAP__\r\n\r\n", {400, 401}),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_odd_requests_are_answered_plainly(target: Target, name: str) -> None:
    request, statuses = ODD[name]
    with closing(target.connect()) as connection:
        connection.sendall(request.replace(b"KEY", target.key))
        connection.shutdown(socket.SHUT_WR)
        found = b""
        try:
            while part := connection.recv(65536):
                found += part
        except ConnectionError:
            pass
    told = [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3})", found)] or [0]
    print(told, found[:300])
    assert told[0] in statuses and b"\r\nx-evil" not in found.lower(), found
    assert target.key not in found and b"Traceback" not in found
    assert 200 not in told[1:], "a request that was smuggled behind another's body got an answer"
    target.is_well()


def test_a_body_that_waits_to_be_asked_for_is(target: Target) -> None:
    request = target.predict(BODY, b"expect: 100-continue")
    with closing(target.connect()) as connection:
        connection.sendall(request[: -len(BODY)])
        assert read_answer(connection)[0] == 100
        connection.sendall(BODY)
        assert read_answer(connection)[0] == 200
    for wrong in (request.replace(target.key, b"wrong"), request.replace(b"application/json", b"text/html")):
        assert target.ask(wrong[: -len(BODY)])[0] in (401, 415), "refused without the body"


def test_nothing_that_a_client_sends_gets_into_the_log_or_between_its_lines(target: Target) -> None:
    word = b"INJECTED"
    forged = b'%0a{"level":"error","msg":"INJECTED"}%0d%0aset-cookie:%20INJECTED%1b[31m'
    lines = (b"GET /" + forged, b"POST /predict?INJECTED=" + forged, b"GET /model?x=INJECTED", b"INJECTED /model")
    for line in lines:
        for field in (b"x-api-key: " + word, b"authorization: Basic " + word, b"traceparent: 00-" + word, b"user-agent: " + word,
                      b"idempotency-key: " + word, b"host: " + word, b"x-forwarded-for: " + word, b"tracestate: a=1\x1b[31m"):  # fmt: skip
            for key in (True, False):
                _, said = target.ask(target.head(line, field, b"content-length: 0", key=key))
                assert word not in said and b"set-cookie" not in said.lower() and b"\x1b" not in said, said
    for body in (b'{"rows":[{"age":"INJECTED\\n"}]}', b'{"INJECTED', BODY.replace(b'"Tokyo"', b'"INJECTED"'), b'"INJECTED"'):
        target.ask(target.predict(body, b"idempotency-key: " + word))
    target.is_well()
    log = target.log.read_bytes()
    assert word not in log and target.key not in log and b"\x1b" not in log and b"Traceback" not in log
    told = [json.loads(line) for line in log.splitlines() if line.startswith(b"{")]
    assert sum(line["msg"] == "request" for line in told) > 100
    assert not [line for line in told if line.get("status", 0) >= 500 and line["status"] != 503]
