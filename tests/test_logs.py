"""One request through headers, log lines and spans: any header, any message, a collector that is there or away."""

from __future__ import annotations

import gzip
import io
import json
import logging
import logging.config
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from ekiben.errors import RowError, UsageError
from ekiben.serving.signals import logs, otel
from ekiben.serving.signals.otel import Exporter, endpoint_of
from ekiben.serving.signals.traces import CURRENT, STATE_BYTES, UNRECORDED, Sampling, Trace

TRACE_ID, SPAN_ID = b"4bf92f3577b34da6a3ce929d0e0e4736", b"00f067aa0ba902b7"
CAME = b"00-" + TRACE_ID + b"-" + SPAN_ID + b"-01"

# Traces


@given(st.lists(st.tuples(st.sampled_from([b"traceparent", b"tracestate", b"host"]), st.binary(max_size=80)), max_size=5))
@settings(deadline=None)
def test_any_header_gives_a_valid_trace(headers):
    trace = Trace.of(headers)
    again = Trace.of(trace.to_headers())
    assert (again.trace_id, again.parent_id) == (trace.trace_id, trace.span_id)
    assert again.span_id != trace.span_id


@pytest.mark.parametrize(
    "value",
    [
        b"", b"-", b"00", CAME[:-1], CAME + b"-", CAME + b"0", b"0" + CAME, CAME.upper(), b" " + CAME, CAME + b"\n",
        b"ff" + CAME[2:], b"0g" + CAME[2:], CAME.replace(TRACE_ID, b"0" * 32), CAME.replace(SPAN_ID, b"0" * 16),
        CAME.replace(b"-", b"_"), CAME * 2, CAME + b"," + CAME, "٠".encode() * 28, b"\x00" * 55,
    ],
)  # fmt: skip
def test_what_is_no_traceparent_starts_a_trace(value):
    trace = Trace.of([(b"traceparent", value), (b"tracestate", b"a=1")])
    assert trace.trace_id != TRACE_ID.decode() and trace.parent_id == "" and trace.state == b""


@pytest.mark.parametrize(("flags", "told"), [(b"00", b"00"), (b"01", b"01"), (b"ff", b"01"), (b"02", b"00")])
def test_a_trace_is_continued(flags, told):
    trace = Trace.of([(b"tracestate", b"a=1"), (b"traceparent", CAME[:-2] + flags), (b"tracestate", b"b=2")])
    assert (trace.trace_id, trace.parent_id) == (TRACE_ID.decode(), SPAN_ID.decode())
    assert trace.to_headers() == [
        (b"traceparent", b"00-" + TRACE_ID + b"-" + trace.span_id.encode() + b"-" + told),
        (b"tracestate", b"a=1,b=2"),
    ]


def test_a_later_version_may_say_more():
    assert Trace.of([(b"traceparent", b"cc" + CAME[2:] + b"-what-the-future-will-be")]).parent_id == SPAN_ID.decode()
    assert Trace.of([(b"traceparent", b"cc" + CAME[2:] + b"what")]).parent_id == ""


def test_a_state_that_is_too_long_is_left_out_whole():
    kept, left = b"a=" + b"x" * (STATE_BYTES - 2), b"a=" + b"x" * (STATE_BYTES - 1)
    assert Trace.of([(b"traceparent", CAME), (b"tracestate", kept)]).state == kept
    assert Trace.of([(b"traceparent", CAME), (b"tracestate", left)]).state == b""


@pytest.mark.parametrize(
    ("name", "argument", "new", "recorded", "unrecorded"),
    [
        ("", "", True, True, False), ("always_on", "", True, True, True), ("always_off", "", False, False, False),
        ("parentbased_always_off", "", False, True, False), ("traceidratio", "1.0", True, True, True),
        ("parentbased_traceidratio", "0", False, True, False),
    ],
)  # fmt: skip
def test_samplers_are_the_standards(name, argument, new, recorded, unrecorded):
    sampling = Sampling.from_env({"OTEL_TRACES_SAMPLER": name, "OTEL_TRACES_SAMPLER_ARG": argument})
    assert Trace.of([], sampling).is_sampled is new
    assert Trace.of([(b"traceparent", CAME)], sampling).is_sampled is recorded
    assert Trace.of([(b"traceparent", CAME[:-1] + b"0")], sampling).is_sampled is unrecorded
    assert Trace.of([], UNRECORDED).is_sampled is False


@pytest.mark.parametrize("env", [{"OTEL_TRACES_SAMPLER": "often"}] + [
    {"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": x} for x in ("two", "1.1", "-0.1", "nan")
])  # fmt: skip
def test_a_sampler_that_is_none_is_named(env):
    with pytest.raises(UsageError, match="OTEL_TRACES_SAMPLER"):
        Sampling.from_env(env)


# The log


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """What the log holds, with every logger as it was before afterwards."""
    names = [*logs.TAKEN_OVER, "ekiben"]
    before = {n: (list((lg := logging.getLogger(n)).handlers), lg.level, lg.propagate) for n in names}
    out = io.StringIO()
    logs.configure(stream=out)
    yield out
    for name, (handlers, level, propagate) in before.items():
        logger = logging.getLogger(name)
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)
    logging.captureWarnings(False)


def lines_of(out: io.StringIO) -> list[dict]:
    return [json.loads(line) for line in out.getvalue().splitlines()]


@given(st.text(max_size=50))
@settings(max_examples=100, deadline=None)
def test_any_message_is_one_line(text):
    record = logging.LogRecord("ekiben", logging.INFO, "", 0, "%s", (text,), None)
    line = logs.JsonFormatter().format(record)
    assert "\n" not in line and "\r" not in line
    assert json.loads(line)["msg"] == text.encode("utf-8", "replace").decode()


def test_half_a_character_does_not_lose_the_line(log, monkeypatch):
    root = logging.getLogger()  # without pytest's own handlers, whose report goes to another process
    monkeypatch.setattr(root, "handlers", [h for h in root.handlers if not type(h).__module__.startswith("_pytest")])
    logging.getLogger("ekiben").warning("file \udcff is not there")
    assert lines_of(log)[0]["msg"] == "file ? is not there"


@pytest.mark.parametrize("name", ["ekiben.serving", "bentoml.serve", "uvicorn.error", "uvicorn.access", "asyncio", "circus"])
def test_every_logger_speaks_json_once(log, name):
    logs.configure(stream=log)  # a second time
    logging.getLogger(name).error("it is %s", "so")
    (line,) = lines_of(log)
    assert (line["logger"], line["level"], line["msg"]) == (name, "error", "it is so")
    assert line["ts"].endswith("Z") and "trace_id" not in line


def test_warnings_are_lines_too(log):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("old", DeprecationWarning, stacklevel=1)
    assert lines_of(log)[0]["logger"] == "py.warnings"


def test_bentomls_own_handlers_are_taken_over(log):
    from bentoml._internal.log import CLI_LOGGING_CONFIG, SERVER_LOGGING_CONFIG

    logging.config.dictConfig({**CLI_LOGGING_CONFIG, "disable_existing_loggers": False})
    assert not logs.take_over()  # a process that builds
    logging.config.dictConfig({**SERVER_LOGGING_CONFIG, "disable_existing_loggers": False})
    root = logging.getLogger().handlers
    assert logs.take_over() and len(root) == 1 and isinstance(root[0].formatter, logs.JsonFormatter)
    assert logging.getLogger("bentoml").handlers == []


def fail(word: str) -> None:
    try:
        float(word)
    except ValueError as exc:
        raise KeyError(word) from exc


def test_an_exception_of_a_request_quotes_nothing(log):
    token = CURRENT.set(Trace.of([(b"traceparent", CAME)]))
    try:
        fail("secret")
    except KeyError:
        logging.getLogger("ekiben.serving").exception("it failed")
    try:
        raise RowError("row 0: column `age` takes a number, got a text", row=0)
    except RowError:
        logging.getLogger("ekiben.serving").exception("it failed")
    CURRENT.reset(token)
    first, second = lines_of(log)
    assert "secret" not in log.getvalue()
    assert first["trace_id"] == TRACE_ID.decode() and first["span_id"] != SPAN_ID.decode()
    assert first["exception"]["type"] == "KeyError" and first["exception"]["cause"] == "ValueError"
    assert first["exception"]["at"][-1].endswith(" fail")
    assert second["exception"]["message"].startswith("row 0")
    try:
        fail("a path")
    except KeyError:
        logging.getLogger("bentoml").exception("the start failed")
    assert lines_of(log)[2]["exception"]["message"] == "'a path'"


@pytest.mark.parametrize(("status", "wanted", "told"), [(200, False, 0), (422, False, 0), (503, False, 1), (200, True, 1)])
def test_a_request_is_a_line_when_wanted_or_failed(log, status, wanted, told):
    trace = Trace.of([])
    logs.log_request(trace, "POST", "/predict", status, 0.00234, key="k7", is_wanted=wanted)
    lines = lines_of(log)
    assert len(lines) == told
    for line in lines:
        assert (line["route"], line["status"], line["ms"], line["key"]) == ("/predict", status, 2.34, "k7")
        assert line["trace_id"] == trace.trace_id and line["level"] == ("error" if status >= 500 else "info")


def test_a_probe_that_says_not_ready_is_no_failure(log):
    logs.log_request(Trace.of([]), "GET", "/readyz", 503, 0.0001)
    assert log.getvalue() == ""
    logs.log_request(Trace.of([]), "GET", "/readyz", 503, 0.0001, is_wanted=True)
    assert lines_of(log)[0]["status"] == 503


# Spans


class Collector:
    """An OpenTelemetry collector on this machine, as far as spans need one."""

    def __init__(self, status: int = 200) -> None:
        self.status, self.headers, self.requests = status, [], []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                raw = self.rfile.read(int(self.headers["content-length"]))
                raw = gzip.decompress(raw) if self.headers["content-encoding"] == "gzip" else raw
                outer.headers.append((self.path, dict(self.headers)))
                outer.requests.append(ExportTraceServiceRequest.FromString(raw))
                self.send_response(outer.status)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *args: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    @property
    def spans(self) -> list:
        return [s for r in self.requests for part in r.resource_spans for scope in part.scope_spans for s in scope.spans]

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join(30)


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.close()


def wait_for(found: object, seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not found() and time.monotonic() < until:
        time.sleep(0.02)


def test_a_span_says_what_happened(collector, monkeypatch):
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Basic%20abc")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip")
    exporter = Exporter.from_env(collector.url, {}, {"service.name": "census", "service.version": "3"})
    trace = Trace.of([(b"traceparent", CAME), (b"tracestate", b"vendor=7")], exporter.sampling)
    exporter.add(trace, "POST", "/predict", 503, 0.25)
    exporter.add(Trace.of([], exporter.sampling), "GET", "/model", 200, 0.001)
    exporter.close()
    failed, fine = collector.spans
    assert (failed.trace_id.hex(), failed.parent_span_id.hex()) == (TRACE_ID.decode(), SPAN_ID.decode())
    assert failed.span_id.hex() == trace.span_id and failed.trace_state == "vendor=7"
    assert (failed.name, failed.kind, failed.status.code) == ("POST /predict", 2, 2)
    assert failed.end_time_unix_nano - failed.start_time_unix_nano == 250_000_000
    assert {a.key: a.value.int_value for a in failed.attributes}["http.response.status_code"] == 503
    assert (fine.parent_span_id, fine.status.code) == (b"", 0)
    resource = {a.key: a.value.string_value for a in collector.requests[0].resource_spans[0].resource.attributes}
    assert (resource["service.name"], resource["deployment.environment.name"]) == ("census", "test")
    path, headers = collector.headers[0]
    assert path == "/v1/traces" and headers["authorization"] == "Basic abc"


def test_the_operators_name_comes_first(collector, monkeypatch):
    monkeypatch.setenv("OTEL_SERVICE_NAME", "scoring-eu")
    exporter = Exporter.from_env("", {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url}, {"service.name": "census"})
    exporter.add(Trace.of([], exporter.sampling), "GET", "/model", 200, 0.001)
    exporter.close()
    resource = {a.key: a.value.string_value for a in collector.requests[0].resource_spans[0].resource.attributes}
    assert resource["service.name"] == "scoring-eu"


def test_spans_go_by_themselves_and_in_batches(collector):
    exporter = Exporter.from_env(collector.url, {})
    for _ in range(1_300):
        exporter.add(Trace.of([], exporter.sampling), "POST", "/predict", 200, 0.001)
    wait_for(lambda: len(collector.spans) == 1_300)
    exporter.close()
    assert len(collector.spans) == 1_300 and 3 <= len(collector.requests) < 100
    assert exporter.figures() == {"spans_exported": 1_300, "spans_dropped": 0}
    assert len({span.span_id for span in collector.spans}) == 1_300


def test_what_is_not_recorded_is_not_sent(collector):
    exporter = Exporter.from_env(collector.url, {"OTEL_TRACES_SAMPLER": "parentbased_always_off"})
    exporter.add(Trace.of([], exporter.sampling), "POST", "/predict", 200, 0.001)
    exporter.add(Trace.of([(b"traceparent", CAME)], exporter.sampling), "POST", "/predict", 200, 0.001)
    exporter.add(Trace.of([(b"traceparent", CAME)], exporter.sampling), "GET", "/readyz", 200, 0.001)
    exporter.close()
    assert [span.trace_id.hex() for span in collector.spans] == [TRACE_ID.decode()]


def test_a_collector_that_refuses_costs_spans_and_says_so(log):
    collector = Collector(status=400)
    exporter = Exporter.from_env(collector.url, {})
    for _ in range(3):
        exporter.add(Trace.of([], exporter.sampling), "POST", "/predict", 200, 0.001)
        wait_for(lambda: not exporter._queue)
    exporter.close()
    collector.close()
    assert exporter.figures() == {"spans_exported": 0, "spans_dropped": 3}
    why, what = lines_of(log)  # said once, however often it happens
    assert "400" in why["msg"] and "dropped" in what["msg"]


def test_a_collector_that_is_away_holds_nobody_up(monkeypatch):
    monkeypatch.setattr(otel, "QUEUE", 100)
    exporter = Exporter("http://127.0.0.1:9/v1/traces")
    for _ in range(5_000):
        exporter.add(Trace.of([], exporter.sampling), "POST", "/predict", 200, 0.001)
        assert len(exporter._queue) <= 100
    exporter.close(0.2)
    wait_for(lambda: not exporter._thread.is_alive())
    assert not exporter._thread.is_alive()
    assert exporter.figures() == {"spans_exported": 0, "spans_dropped": 5_000}


@pytest.mark.parametrize(
    ("setting", "env", "address"),
    [
        ("", {}, ""),
        ("http://a:4318", {}, "http://a:4318/v1/traces"),
        ("http://a/otlp/", {}, "http://a/otlp/v1/traces"),
        ("http://a", {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://b"}, "http://a/v1/traces"),
        ("", {"OTEL_EXPORTER_OTLP_ENDPOINT": "https://b"}, "https://b/v1/traces"),
        ("", {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://b", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c/x"}, "http://c/x"),
        ("http://a", {"OTEL_SDK_DISABLED": "true"}, ""),
        ("http://a", {"OTEL_TRACES_EXPORTER": "none"}, ""),
    ],
)
def test_the_address_is_found_as_the_standard_says(setting, env, address):
    assert endpoint_of(setting, env) == address


def test_what_cannot_be_sent_is_refused_at_the_start(monkeypatch):
    with pytest.raises(UsageError, match="http://collector:4318"):
        endpoint_of("collector:4318", {})
    with pytest.raises(UsageError, match="OTEL_EXPORTER_OTLP_PROTOCOL"):
        endpoint_of("http://a", {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"})
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(UsageError, match=r"ekiben\[otel\]"):
        Exporter.from_env("http://a", {})


def test_without_a_collector_nothing_of_opentelemetry_is_loaded():
    code = """
import sys
from ekiben.serving.signals.otel import Exporter
from ekiben.serving.signals import logs, telemetry
assert Exporter.from_env("", {}) is None
print([name for name in sys.modules if name.startswith(("opentelemetry", "prometheus_client", "requests"))])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr
