"""The client of `ekiben loadtest` counts what was answered and what was not; the figures are those of the answers."""

from __future__ import annotations

import socket
from typing import Any

import numpy as np
import pytest
from fake_service import Fake, made_sent, made_test

from ekiben.errors import ServiceError, UsageError
from ekiben.gates import parse_gates
from ekiben.loadtest.client import Sent, load_service
from ekiben.loadtest.levels import Level, LoadTest, block_interval, worst_of
from ekiben.loadtest.report import write_figure, write_loadtest
from ekiben.loadtest.run import judge_service
from ekiben.loadtest.target import Target, post_request, read_answer


def load(fake: Fake, **how: Any) -> Sent:
    target = Target.of(fake.url)
    return load_service(target, [post_request(target, "/predict", b"{}", {})], **{"at_once": 4, "seconds": 0.4, "warm_s": 0.0} | how)


# ---- the client


def test_every_request_that_was_sent_is_counted_once():
    with Fake(lambda n: 503 if n % 5 == 0 else 200) as fake:
        sent = load(fake)
        assert sent.requests == len(fake.bodies) == len(sent.took) + len(sent.failed) > 20
        assert sent.errors == {"503": len(fake.bodies) // 5}
        assert len(sent.took) == len(sent.done) and (sent.took > 0).all()


def test_no_more_requests_are_on_their_way_than_asked_for():
    with Fake(delay_s=0.02) as fake:
        sent = load(fake, at_once=7)
        assert fake.most_at_once == 7 == fake.connections
        assert sent.took.min() >= 0.019


def test_slow_answers_that_come_after_the_end_are_counted():
    with Fake(delay_s=0.6) as fake:
        sent = load(fake, at_once=3, seconds=0.3)
        assert len(sent.took) == 3 and not sent.errors and (sent.took >= 0.59).all()


def test_the_warm_up_is_not_counted():
    with Fake() as fake:
        sent = load(fake, seconds=0.2, warm_s=0.3)
        assert 0 < sent.requests < len(fake.bodies)


def test_what_takes_too_long_is_given_up_and_called_a_timeout():
    with Fake(delay_s=30.0) as fake:
        sent = load(fake, at_once=2, seconds=0.3, timeout_s=0.2)
        assert set(sent.errors) == {"timeout"} and len(sent.took) == 0 and sent.requests >= 2


def test_a_service_that_hangs_up_is_asked_again_over_a_new_connection():
    with Fake(lambda n: None if n % 3 == 0 else 200) as fake:
        sent = load(fake)
        assert set(sent.errors) == {"connection"} and len(sent.took) > 3
        assert sent.errors["connection"] == len(fake.bodies) // 3


def test_an_answer_that_closes_its_connection_is_a_good_one():
    answer = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}"
    with Fake(lambda n: answer) as fake:
        sent = load(fake)
        assert not sent.errors and sent.requests == len(fake.bodies) > 5


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\ncontent-length:2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    ],
)
def test_an_answer_is_whole_at_its_last_byte_and_not_before(answer: bytes):
    assert [read_answer(answer[:i]) for i in range(len(answer))] == [None] * len(answer)
    assert read_answer(answer) == (200, True)


@pytest.mark.parametrize("raw", [b"SSH-2.0-OpenSSH\r\n", b"HTTP/1.1 200 OK\r\nx: y\r\n\r\n{}", b"x" * 70_000])
def test_what_is_no_http_is_refused(raw: bytes):
    with pytest.raises(ServiceError):
        read_answer(raw)


def test_nobody_there_is_an_error_for_every_try_and_ends_in_time():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        target = Target("127.0.0.1", probe.getsockname()[1])
    sent = load_service(target, [b"x"], at_once=2, seconds=0.2, warm_s=0)
    assert set(sent.errors) == {"connection"} and len(sent.took) == 0


def test_large_requests_go_through_in_parts():
    with Fake() as fake:
        target = Target.of(fake.url)
        body = b" " * 6_000_000
        sent = load_service(target, [post_request(target, "/predict", body, {})], at_once=2, seconds=0.3, warm_s=0)
        assert len(sent.took) >= 2 and not sent.errors and {len(b) for b in fake.bodies} == {6_000_000}


def test_several_processes_share_the_connections():
    with Fake(delay_s=0.005) as fake:
        sent = load(fake, at_once=5, processes=2, seconds=0.5)
        assert sent.processes == 2 and fake.connections == 5 and len(sent.took) > 10
        assert sent.at_once == 5 and sent.busy_s > 0


@pytest.mark.parametrize("url", ["ftp://x", "http://", "http://user:pw@host:1", "http://host:port", "http://host?x=1", ""])
def test_only_plain_addresses_are_taken(url: str):
    with pytest.raises(UsageError, match="looks like"):
        Target.of(url)


def test_a_header_cannot_smuggle_another():
    with pytest.raises(UsageError):
        post_request(Target("h", 1), "/predict", b"", {"Authorization": "Bearer x\r\nX-Evil: y"})


# ---- the figures


def test_percentiles_are_those_of_the_answers_and_the_interval_is_around_them():
    sent = made_sent(errors=40)
    level = Level.of(sent)
    for name, q in (("p50_ms", 50), ("p90_ms", 90), ("p99_ms", 99)):
        m = level[name]
        assert m.value == pytest.approx(np.percentile(sent.took, q) * 1e3)
        assert m.low <= m.value <= m.high and m.slice == "8" and m.high - m.low < m.value
    assert level["requests_per_s"].value == 1000 and level["errors"].value == pytest.approx(40 / 4040)
    assert level["errors"].low < level["errors"].value < level["errors"].high
    assert level.max_ms == pytest.approx(sent.took.max() * 1e3)
    assert np.all(np.diff([q for q, _ in level.curve]) > 0) and np.all(np.diff([ms for _, ms in level.curve]) >= 0)


def test_a_slow_second_widens_the_interval_more_than_as_many_slow_answers_anywhere():
    rng = np.random.default_rng(0)
    took, done = np.full(4000, 1e-3), np.sort(rng.uniform(0, 4, 4000))
    together, scattered = took.copy(), took.copy()
    together[done < 0.1] = 0.05
    scattered[rng.choice(4000, int((done < 0.1).sum()), replace=False)] = 0.05
    widths = [np.diff(block_interval(Sent(1, 4.0, t, done), 0.99))[0] for t in (together, scattered)]
    assert widths[0] > 10 * widths[1]


def test_an_interval_is_the_same_twice():
    assert block_interval(made_sent(), 0.99) == block_interval(made_sent(), 0.99)


def test_the_worst_level_stands_for_the_test_and_the_best_throughput():
    slow = Level.of(made_sent(32, 2000, 9.0, errors=4))
    found = {m.name: m for m in worst_of([Level.of(made_sent()), slow])}
    assert found["p99_ms"].value == slow["p99_ms"].value and found["p99_ms"].note == "32 requests at once"
    assert found["requests_per_s"].value == 1000 and found["errors"].value == slow["errors"].value
    assert all(m.slice == "" for m in found.values())


def test_a_level_without_an_answer_is_the_worst():
    dead = Level.of(Sent(4, 1.0, np.empty(0), np.empty(0), {"timeout": 4}, np.full(4, 0.5)))
    (p99,) = [m for m in worst_of([Level.of(made_sent()), dead]) if m.name == "p99_ms"]
    assert np.isnan(p99.value) and "no request was answered" in p99.note
    assert judge_service(parse_gates("p99_ms <= 5", blocking=True), [p99])[0].verdict == "fail"
    assert LoadTest.from_json(made_test(dead).to_json()).levels[0].errors == {"timeout": 4}


@pytest.mark.parametrize(("name", "value", "said"), [("p99_ms", 0.123, "0.12"), ("p99_ms", 45.6, "45.6"), ("errors", 0.0, "0"), ("errors", 2e-5, "2.0e-05"), ("p99_ms", float("nan"), "none"), ("requests_per_s", 12345.6, "12,346")])  # fmt: skip
def test_figures_are_written_with_three_digits(name: str, value: float, said: str):
    assert write_figure(name, value) == said


def test_the_page_stands_alone_and_escapes_what_others_said(tmp_path):
    level = Level.of(made_sent())
    page = write_loadtest(made_test(level, name="<script>alert(1)</script>"), tmp_path / "out")
    assert "<script>" not in page.read_text() and sorted(p.suffix for p in page.parent.iterdir()) == [".html", ".json", ".png", ".svg"]
