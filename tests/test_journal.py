"""The journal: nothing lost, nothing twice, nothing left of a person who is forgotten."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from bundles import LEVELS, make_project
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ekiben.commands.journal  # noqa: F401
from ekiben.cli import main
from ekiben.columns import Columns
from ekiben.erasure import explain_erasures, forget, read_erasures
from ekiben.errors import IntegrityError, ServiceError, UsageError
from ekiben.files import write_whole
from ekiben.prepare.clean import hash_private
from ekiben.prepare.clean import private_key as project_key
from ekiben.records import Field, Schema
from ekiben.rows import RowReader
from ekiben.runs import Layout, StepResult
from ekiben.serving.journal import seal
from ekiben.serving.http.app import State
from ekiben.serving.journal.commit import Committer
from ekiben.serving.journal.erase import Eraser, Person, rekey
from ekiben.serving.journal.journal import Journal, new_ids, read_journal
from ekiben.serving.journal.keeping import JournalOptions
from ekiben.serving.journal.keyring import KeyRing, ring_path
from ekiben.serving.journal.seal import seal_journal
from ekiben.serving.journal.sealed import open_journal, sealed_files
from ekiben.serving.journal.segments import FEEDBACK, PREDICTION, Segment, SegmentWriter, encode_event, frame, list_segments, origin_of
from ekiben.store import Store

SCHEMA = Schema(
    fields=(
        Field(name="age", kind="number"),
        Field(name="member", kind="flag"),
        Field(name="job", kind="category", categories=LEVELS),
        Field(name="place", kind="text"),
        Field(name="since", kind="date"),
        Field(name="_odd", kind="text"),
        Field(name="id", kind="category", role="id", is_input=False),
        Field(name="mail", kind="text", role="private", is_input=False),
        Field(name="sex", kind="category", role="sensitive", is_input=False),
    ),
    task="binary",
    target="paid",
    classes=("no", "yes"),
)
INPUTS = ("age", "member", "job", "place", "since", "_odd")
ORIGIN = origin_of(SCHEMA, INPUTS, {"name": "loans", "version": "3", "bento": "loans:v3"})
FAST = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def make_row(**more: object) -> dict:
    return {"age": 39, "member": True, "job": "clerk", "place": "Lyon", "since": "2020-01-31", "_odd": "x", **more}


def keep(folder: Path, rows: list[dict], *, labels: int = 0, options: JournalOptions | None = None) -> list[str]:
    """Journal some rows and feedback as a service does; return the ids."""
    journal, ids = Journal(folder, ORIGIN, options), new_ids(len(rows))
    journal.predictions(ids, rows, [{"label": "yes", "probability": 0.5 + i / 1000} for i in range(len(rows))])
    for id_ in ids[:labels]:
        journal.feedback(id_, "no")
    journal.close()
    return ids


texts = st.text(max_size=8)
rows = st.fixed_dictionaries(
    {
        "age": st.none() | st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(10**40), 10**40),
        "member": st.none() | st.booleans() | st.sampled_from([0, 1, 0.0]),
        "job": st.none() | st.sampled_from(LEVELS) | texts,
        "place": st.none() | texts,
        "since": st.none() | st.datetimes().map(lambda d: d.isoformat()),
        "_odd": st.none() | texts,
    },
    optional={"id": st.none() | texts | st.integers() | st.lists(st.integers()), "mail": st.none() | texts, "sex": texts},
)


# ---- a segment is whole up to the last good frame


def segment_of(records: list[bytes]) -> bytes:
    segment = Segment(b"")
    segment.origin, segment.records = ORIGIN, records
    return segment.to_bytes()


@FAST
@given(records=st.lists(st.binary(min_size=1, max_size=40), min_size=1, max_size=5))
def test_whatever_byte_the_writer_died_at_the_records_before_it_are_read(records):
    raw = segment_of(records)
    ends = [len(segment_of(records[:n])) for n in range(len(records) + 1)]
    for cut in range(len(raw) + 1):
        read = Segment(raw[:cut])
        whole = sum(end <= cut for end in ends) - 1
        assert read.records == records[: max(whole, 0)]
        assert (read.origin is None) == (whole < 0)
        assert read.torn == (cut - ends[whole] if whole >= 0 else cut)
        assert not read.is_damaged
        zeroed = Segment(raw[:cut] + bytes(50)).records  # what a power cut leaves; the last record may have ended in zeros
        assert zeroed == records[: len(zeroed)] and len(zeroed) >= len(read.records)


@FAST
@given(data=st.data())
def test_a_changed_byte_ends_the_reading_before_its_record(data):
    records = [bytes([n]) * 10 for n in range(4)]
    raw = bytearray(segment_of(records))
    start = len(segment_of([]))
    at = data.draw(st.integers(start, len(raw) - 1))
    raw[at] ^= data.draw(st.integers(1, 255))
    assert Segment(bytes(raw)).records == records[: (at - start) // 18]


def test_a_write_that_the_disk_refuses_leaves_no_half_record(tmp_path, monkeypatch):
    writer = SegmentWriter(tmp_path, ORIGIN)
    assert writer.append([b"first"])
    real = os.write

    def full(handle: int, raw: bytes) -> int:
        real(handle, bytes(raw[: len(raw) // 2]))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space"):
        writer.append([b"second" * 10])
    monkeypatch.setattr(os, "write", real)
    assert writer.append([b"third"])
    assert Segment.read(writer.path).records == [b"first", b"third"]


# ---- sealing


@FAST
@given(asked=st.lists(rows, min_size=1, max_size=6), told=st.integers(0, 6))
def test_sealing_loses_nothing_and_keeps_what_the_model_saw(tmp_path_factory, asked, told):
    folder = tmp_path_factory.mktemp("j") / "journal"
    ids = keep(folder, asked, labels=told)
    before = read_journal(folder)
    sealed = seal_journal(folder)
    assert (sealed.predictions, sealed.feedback, sealed.problems) == (len(asked), min(told, len(asked)), [])
    assert list_segments(folder) == []
    after = read_journal(folder)
    assert [(e["event"], e["id"], e["at"]) for e in after] == [(e["event"], e["id"], e["at"]) for e in before]
    predictions = [e for e in after if e["event"] == "prediction"]
    assert [e["id"] for e in predictions] == ids
    seen = RowReader(ORIGIN.schema).read([{n: r[n] for n in INPUTS} for r in asked])
    assert [e["inputs"] for e in predictions] == seen.to_rows()
    assert [e["output"] for e in predictions] == [e["output"] for e in before if e["event"] == "prediction"]
    assert [e["keys"] for e in predictions] == [e["keys"] for e in before if e["event"] == "prediction"]


@pytest.mark.parametrize("task", ["binary", "multiclass", "regression"])
def test_answers_of_every_task_come_back_from_the_sealed_part(tmp_path, task):
    classes = {"binary": ("no", "yes"), "multiclass": ("a b", "c'd", "é"), "regression": ()}[task]
    answers = {
        "binary": {"label": "yes", "probability": 0.25},
        "multiclass": {"label": "é", "probabilities": {"a b": 0.25, "c'd": 0.25, "é": 0.5}},
        "regression": {"value": -1.5e300},
    }[task]
    schema = Schema(fields=(Field(name="age", kind="number"),), task=task, target="t", classes=classes)
    journal = Journal(tmp_path, origin_of(schema, ["age"], {"name": "m", "version": "1", "bento": ""}))
    (id_,) = new_ids(1)
    journal.predictions([id_], [{"age": 1}], [answers])
    journal.feedback(id_, 2.5 if task == "regression" else classes[0])
    journal.close()
    with open_journal(tmp_path) as db:
        truth = "_true_value" if task == "regression" else "_truth"
        assert db.execute(f"SELECT {truth} FROM journal").fetchall() == [(2.5 if task == "regression" else classes[0],)]
    first, second = read_journal(tmp_path)
    assert first["output"] == answers and second["id"] == id_


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("name", ["replace", "rename", "unlink", "fsync"])
def test_a_sealer_that_dies_at_any_step_leaves_nothing_lost_and_nothing_twice(tmp_path, monkeypatch, name):
    steps = 0
    while True:
        folder = tmp_path / str(steps) / "journal"
        keep(folder, [make_row(age=i) for i in range(5)], labels=2)
        keep(folder, [make_row(age=i) for i in range(5, 8)], labels=1)
        for path in list_segments(folder):
            path.rename(path.with_suffix(".seg"))  # as a service leaves it that still runs, or was killed
        before, count, real = read_journal(folder), 0, getattr(os, name)

        def dies(*args, _real=real, _limit=steps, **kwargs):
            nonlocal count
            count += 1
            if count > _limit:
                raise Killed
            return _real(*args, **kwargs)

        monkeypatch.setattr(os, name, dies)
        try:
            seal_journal(folder, JournalOptions())
            died = False
        except Killed:
            died = True
        monkeypatch.setattr(os, name, real)
        as_dicts = sorted((e["event"], e["id"]) for e in before)
        assert sorted((e["event"], e["id"]) for e in read_journal(folder)) == as_dicts, "while a segment is there, it counts"
        again = seal_journal(folder, JournalOptions(encryption=steps % 2 == 1))
        assert not again.problems and not list_segments(folder)
        assert sorted((e["event"], e["id"]) for e in read_journal(folder)) == as_dicts
        with open_journal(folder) as db:
            assert db.execute("SELECT count(*), count(_told) FROM journal").fetchall() == [(8, 3)]
        names = [path.name.split(".")[0] for path in folder.glob("sealed/*/*/*")]
        assert len(names) == len(set(names)) * 2 == 4, "one file of predictions and one of feedback, with one key"
        if not died:
            break
        steps += 1
    assert steps >= 2


def test_a_segment_whose_values_are_not_what_it_says_is_left_alone_and_told(tmp_path):
    writer = SegmentWriter(tmp_path, ORIGIN)
    writer.append([encode_event(PREDICTION, 0, ["a"], [["old", 1, "clerk", "x", None, "x"]], [], [{}])])
    writer.close()
    sealed = seal_journal(tmp_path)
    assert len(sealed.problems) == 1 and "first record" in sealed.problems[0]
    assert len(list_segments(tmp_path)) == 1


def test_a_segment_that_was_damaged_later_is_kept_and_told(tmp_path):
    keep(tmp_path, [make_row()] * 2, labels=2)
    (path,) = list_segments(tmp_path)
    raw = bytearray(path.read_bytes())
    raw[raw.index(b"clerk")] ^= 1  # in the first record, which says where the rows come from
    path.write_bytes(raw)
    assert "damaged after 0 good records" in seal_journal(tmp_path).problems[0]
    assert list_segments(tmp_path) == [path] and read_journal(tmp_path) == []
    raw[raw.index(b"blerk")] ^= 1
    raw[raw.rindex(b"clerk")] ^= 1
    for start in (bytes(raw), b"J" + bytes(raw)):
        path.write_bytes(start)
        assert "damaged after 0 good records" in seal_journal(tmp_path).problems[0]
    path.write_bytes(bytes(raw[:4]) + bytes(len(raw)))  # zeros are what a power cut leaves of a write
    assert seal_journal(tmp_path).problems == [] and list_segments(tmp_path) == []


def test_a_service_goes_on_writing_while_its_segment_is_sealed(tmp_path):
    journal, stop, asked = Journal(tmp_path / "journal", ORIGIN), threading.Event(), []

    def serve() -> None:
        while not stop.is_set():
            ids = new_ids(3)
            asked.extend(ids)
            journal.predictions(ids, [make_row()] * 3, [{"label": "no", "probability": 0.1}] * 3)
            time.sleep(0.002)

    thread = threading.Thread(target=serve)
    thread.start()
    for _ in range(6):
        time.sleep(0.05)
        assert seal_journal(tmp_path / "journal").problems == []
    stop.set()
    thread.join()
    journal.close()
    seal_journal(tmp_path / "journal")
    found = [e["id"] for e in read_journal(tmp_path / "journal")]
    assert len(found) == len(set(found)) and sorted(found) == sorted(asked)
    assert journal.figures()["dropped"] == 0


def test_several_processes_share_a_journal(tmp_path):
    program = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_journal import keep, make_row
for i in range(20):
    keep(Path({str(tmp_path / "journal")!r}), [make_row(age=i)] * 5)
"""
    writers = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(3)]
    while any(w.poll() is None for w in writers):
        seal_journal(tmp_path / "journal")
        time.sleep(0.05)
    assert [w.returncode for w in writers] == [0, 0, 0]
    seal_journal(tmp_path / "journal")
    ids = [e["id"] for e in read_journal(tmp_path / "journal")]
    assert len(ids) == len(set(ids)) == 300


def test_a_full_segment_is_sealed_by_a_process_of_its_own(tmp_path):
    journal = Journal(tmp_path / "journal", ORIGIN, JournalOptions(segment_bytes=2000))
    for _ in range(40):
        journal.predictions(new_ids(1), [make_row()], [{"label": "no", "probability": 0.1}])
        journal.flush()
    deadline = time.monotonic() + 60
    while not sealed_files(tmp_path / "journal", "predictions") and time.monotonic() < deadline:
        time.sleep(0.1)
    journal.close()
    journal.committer._sealer.wait(60)
    assert sealed_files(tmp_path / "journal", "predictions")
    assert len(read_journal(tmp_path / "journal")) == 40
    assert "v3-" in sealed_files(tmp_path / "journal", "predictions")[0].name


def test_whole_days_go_when_they_are_old(tmp_path):
    for days in (0, 9, 10, 11, 400):
        writer = SegmentWriter(tmp_path, ORIGIN)
        at = time.time_ns() // 1000 - days * 86_400_000_000
        writer.append([encode_event(PREDICTION, at, [f"d{days}"], [[1, 1, "clerk", "x", None, "x"]], [], [{}])])
        writer.append([encode_event(FEEDBACK, at, f"d{days}", "no")])
        writer.close()
    assert seal_journal(tmp_path, JournalOptions(retention_days=10)).expired == 4
    assert {e["id"] for e in read_journal(tmp_path)} == {"d0", "d9", "d10"}
    assert seal_journal(tmp_path, JournalOptions(retention_days=0)).expired == 0


# ---- durability


def test_many_requests_share_one_sync(tmp_path, monkeypatch):
    syncs, real = 0, os.fdatasync

    def slow(handle: int) -> None:
        nonlocal syncs
        syncs += 1
        time.sleep(0.02)
        real(handle)

    monkeypatch.setattr(os, "fdatasync", slow)
    journal, ticks = Journal(tmp_path, ORIGIN, JournalOptions(durability="sync")), []

    async def ask(i: int) -> None:
        await asyncio.sleep(i * 0.0005)
        ticket = journal.predictions(new_ids(1), [make_row()], [{"label": "no", "probability": 0.1}])
        await journal.durable(ticket)
        assert len(read_journal(tmp_path)) >= 1

    async def tick() -> None:
        while True:
            ticks.append(time.monotonic())
            await asyncio.sleep(0.001)

    async def go() -> None:
        ticking = asyncio.create_task(tick())
        await asyncio.gather(*(ask(i) for i in range(100)))
        ticking.cancel()

    asyncio.run(go())
    journal.close()
    assert len(read_journal(tmp_path)) == 100
    assert syncs <= 50, f"{syncs} syncs for 100 requests"


def test_a_stalled_disk_never_blocks_the_event_loop_and_drops_are_counted(tmp_path, monkeypatch):
    stalled, go_on = threading.Event(), threading.Event()
    real = SegmentWriter.append

    def stall(self, records, *, sync=False):
        stalled.set()
        go_on.wait(20)
        return real(self, records, sync=sync)

    monkeypatch.setattr(SegmentWriter, "append", stall)
    journal = Journal(tmp_path, ORIGIN, JournalOptions(queue_bytes=20_000))
    journal.predictions(new_ids(1), [make_row()], [{"label": "no", "probability": 0.1}])
    assert stalled.wait(10)
    tickets = [journal.predictions(new_ids(2), [make_row()] * 2, [{"label": "no", "probability": 0.1}] * 2) for _ in range(500)]
    assert not go_on.is_set() and journal.figures()["lag_s"] > 0
    lost = sum(2 for ticket in tickets if not ticket)
    assert lost > 0 and journal.figures()["dropped"] == lost
    go_on.set()
    journal.flush()
    journal.close()
    assert len(read_journal(tmp_path)) == 1001 - lost and journal.figures()["lag_s"] == 0


def test_what_the_disk_refuses_is_told_to_those_who_wait_and_to_nobody_else(tmp_path, monkeypatch):
    committer = Committer(tmp_path, ORIGIN, JournalOptions(durability="sync"))
    real = SegmentWriter.append

    def refuse(self, records, *, sync=False):
        if b"bad" in records:
            raise OSError(28, "No space left on device")
        return real(self, records, sync=sync)

    monkeypatch.setattr(SegmentWriter, "append", refuse)

    async def go() -> list:
        found = []
        for record in (b"good", b"bad", b"good"):
            found.append(ticket := committer.put(record))
            try:
                await committer.durable(ticket)
            except ServiceError as error:
                found.append(str(error))
        with pytest.raises(ServiceError, match="No space"):
            await committer.durable(2)  # also when the answer comes later
        await committer.durable(3)
        return found

    assert asyncio.run(go()) == [1, 2, "the journal cannot be written: No space left on device", 3]
    committer.close()
    assert (committer.written, committer.dropped) == (2, 1)


def test_with_sync_a_prediction_that_cannot_be_kept_is_not_answered(tmp_path, monkeypatch):
    from test_serving import call

    state = State()
    options = JournalOptions(durability="sync")
    state.open(make_project(tmp_path).bundle.folder, journal=tmp_path / "journal", options=options)
    row = {"age": 30, "income": 1.0, "job": "clerk", "place": "L", "member": True, "since": "2020-01-01"}
    real = SegmentWriter.append

    def refuse(self, records, *, sync=False):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SegmentWriter, "append", refuse)
    answer = call(state, "POST", "/predict", json={"rows": [row]})
    assert answer.status_code == 503 and "No space" in answer.json()["detail"]
    assert call(state, "POST", "/feedback", json={"id": new_ids(1)[0], "label": "no"}).status_code == 503
    monkeypatch.setattr(SegmentWriter, "append", real)
    for rows_ in ([row], [row] * 400):  # a large body is scored off the loop
        said = call(state, "POST", "/predict", json={"rows": rows_}).json()["predictions"]
        kept = {e["id"]: e for e in read_journal(tmp_path / "journal")}
        assert {p["id"] for p in said} <= set(kept), "in the journal before the answer is out"
    assert kept[said[0]["id"]]["output"]["probability"] == said[0]["probability"]
    state.journal.close()


def test_what_json_can_hold_and_a_record_cannot_is_kept_all_the_same(tmp_path):
    keep(tmp_path, [make_row(age=10**30, place="half \ud800 a letter")])
    (event,) = read_journal(tmp_path)
    assert event["inputs"]["age"] == 1e30 and event["inputs"]["place"] == "half ? a letter"


SERVER = """
import sys
from pathlib import Path
import uvicorn
from ekiben.serving.http.app import ServiceApp, State
from ekiben.serving.journal.keeping import JournalOptions
bundle, journal, durability, port, encryption = sys.argv[1:]
state = State()
state.open(Path(bundle), journal=Path(journal), options=JournalOptions(durability=durability, encryption=encryption == "yes"))
print(sorted({"pyarrow", "pandas", "sklearn", "duckdb"} & set(sys.modules)), flush=True)
uvicorn.run(ServiceApp(state=state), host="127.0.0.1", port=int(port), log_level="error")
"""


async def load(port: int, body: bytes, stop: asyncio.Event, answered: dict[str, float]) -> None:
    """Ask without pause over one connection; note when each answer was here."""
    head = b"POST /predict HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        while not stop.is_set():
            writer.write(head + body)
            headers = await reader.readuntil(b"\r\n\r\n")
            assert headers.startswith(b"HTTP/1.1 200"), headers
            length = int(headers.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            said, now = json.loads(await reader.readexactly(length)), time.monotonic()
            answered.update({p["id"]: now for p in said["predictions"]})
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        writer.close()


async def pulse(stop: asyncio.Event, stalls: list[float]) -> None:
    """Note for how long the machine, busy with others, let nothing of ours run."""
    while not stop.is_set():
        began = time.monotonic()
        await asyncio.sleep(0.005)
        stalls.append(time.monotonic() - began - 0.005)


def kill_under_load(
    bundle: Path, folder: Path, durability: str, seconds: float, clients: int = 8, *, encryption: bool = False
) -> tuple[dict, float, set, float]:
    """Start a service, load it, kill it; return what was answered and when, when it was killed, what was kept, the longest stall."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-c", SERVER, str(bundle), str(folder), durability, str(port), "yes" if encryption else "no"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert server.stdout is not None and server.stdout.readline() == b"[]\n", "nothing heavy in the service"
    row = {"age": 30, "income": 1.0, "job": "clerk", "place": "L", "member": True, "since": "2020-01-01", "id": 17}
    body, answered, stalls = json.dumps({"rows": [row]}).encode(), dict[str, float](), [0.0]

    async def go() -> float:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.close()
                break
            except OSError:
                await asyncio.sleep(0.05)
        stop = asyncio.Event()
        asking = [asyncio.create_task(load(port, body, stop, answered)) for _ in range(clients)]
        beating = asyncio.create_task(pulse(stop, stalls))
        await asyncio.sleep(seconds)
        killed = time.monotonic()
        server.send_signal(signal.SIGKILL)
        await asyncio.gather(*asking)
        stop.set()
        await beating
        return killed

    killed = asyncio.run(go())
    server.wait()
    server.stdout.close()
    for path in list_segments(folder):
        assert Segment.read(path).origin is not None, "every segment can be read"
    return answered, killed, {e["id"] for e in read_journal(folder)}, max(stalls)


def check_kills(project, folder: Path, durability: str, times: int) -> list[int]:
    lost, rng = [], random.Random(7)
    for n in range(times):
        place, seconds = folder / str(n) / "journal", rng.uniform(0.2, 0.8)
        answered, killed, kept, stall = kill_under_load(project.bundle.folder, place, durability, seconds, encryption=n % 2 == 1)
        missing = [at for id_, at in answered.items() if id_ not in kept]
        assert len(answered) > 20
        if durability == "sync":
            assert missing == []
        else:
            late = killed - min(missing, default=killed)
            assert late < 0.1 + stall, f"{late:.3f} s of answers are missing; nothing ran for {stall:.3f} s"
        lost.append(len(missing))
    return lost


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return make_project(tmp_path_factory.mktemp("census"))


@pytest.mark.parametrize("durability", ["sync", "async"])
def test_a_killed_service_has_journalled_what_it_promised(project, tmp_path, durability):
    check_kills(project, tmp_path, durability, 2)


@pytest.mark.slow
@pytest.mark.parametrize("durability", ["sync", "async"])
def test_a_service_killed_twenty_times_has_journalled_what_it_promised(project, tmp_path, durability):
    print(durability, check_kills(project, tmp_path, durability, 20))


# ---- private values, encryption


def everything(folder: Path) -> bytes:
    """Return the bytes of every file under a folder, names too."""
    paths = [p for p in folder.rglob("*") if p.is_file()]
    return b"\0".join(p.name.encode() + b"\0" + p.read_bytes() for p in paths)


@FAST
@given(secret=st.text("abcdefghijklmnopqrstuvwxyzäöü", min_size=9, max_size=12))
def test_private_and_sensitive_values_are_in_no_byte_of_the_journal(tmp_path_factory, secret):
    folder = tmp_path_factory.mktemp("j") / "journal"
    keep(folder, [make_row(mail=secret, sex=secret, other=secret)])
    assert secret.encode() not in everything(folder)
    (event,) = read_journal(folder)
    assert len(event["keys"]["mail"]) == 32 and "sex" not in event["keys"]


def test_encrypted_files_hide_everything_and_are_read_with_the_ring(tmp_path, monkeypatch):
    monkeypatch.setattr(seal, "COMPRESSION", "none")
    folder, options = tmp_path / "journal", JournalOptions(encryption=True)
    ids = keep(folder, [make_row(place="Timbuktu-on-Sea", id="c-4711")], labels=1)
    seal_journal(folder, options)
    ring = ring_path(folder)
    assert ring.parent != folder and ring.stat().st_mode & 0o777 == 0o600
    for word in (b"Timbuktu", b"c-4711", b"place", ids[0].encode()):
        assert word not in everything(folder / "sealed")
    keep(folder, [make_row(place="Timbuktu")])
    seal_journal(folder, JournalOptions())  # a plain file beside the encrypted one
    with open_journal(folder) as db:
        assert db.execute("SELECT count(*) FROM journal WHERE place LIKE 'Timbuktu%'").fetchall() == [(2,)]
    old = ring.read_bytes()
    assert rekey(folder) == 3 and KeyRing.load(ring).current == "k2" and "k1" not in KeyRing.load(ring).keys
    assert len(read_journal(folder)) == 3
    ring.write_bytes(old)
    with pytest.raises(IntegrityError, match="k2"):
        read_journal(folder)


def test_a_change_of_keys_that_dies_can_be_given_again(tmp_path, monkeypatch):
    folder = tmp_path / "journal"
    for _ in range(3):
        keep(folder, [make_row()] * 2, labels=1)
    seal_journal(folder, JournalOptions(encryption=True))
    real, count = Path.unlink, 0

    def dies(self, *args, **kwargs):
        nonlocal count
        count += self.suffix == ".parquet"
        if count == 3:
            raise Killed
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Path, "unlink", dies)
    with pytest.raises(Killed):
        rekey(folder)
    monkeypatch.setattr(Path, "unlink", real)
    for again in (False, True):
        if again:
            rekey(folder)
        assert len(read_journal(folder)) == 9
        with open_journal(folder) as db:
            assert db.execute("SELECT count(*), count(_told) FROM journal").fetchall() == [(6, 3)]


# ---- forgetting


@FAST
@given(
    person=st.text("abcdefghijklmnopqrstuvwxyz", min_size=8, max_size=12).map(lambda t: f"q{t}"),
    column=st.sampled_from(["id", "mail", "place", "job"]),
    others=st.lists(st.text("abc", min_size=1, max_size=3), max_size=4),
    encryption=st.booleans(),
)
def test_who_is_forgotten_is_in_no_byte_of_the_journal(tmp_path_factory, monkeypatch, person, column, others, encryption):
    monkeypatch.setattr(seal, "COMPRESSION", "none")
    folder = tmp_path_factory.mktemp("j") / "journal"
    asked = [make_row(**{column: name, "id": name}) for name in [person, *others, person]]
    theirs, kept = [], []
    for sealed in (True, False):
        ids = keep(folder, asked, labels=len(asked), options=JournalOptions(encryption=encryption))
        theirs, kept = [*theirs, ids[0], ids[-1]], kept + ids[1:-1]
        if sealed:
            seal_journal(folder, JournalOptions(encryption=encryption))
    torn = list_segments(folder)[-1]
    torn.write_bytes(torn.read_bytes() + frame(Segment.read(torn).records[0])[:-1])  # its writer was killed
    erased = Eraser(folder, Person.parse(f"{column}={person}")).erase()
    assert (erased.predictions, erased.feedback) == (4, 4)
    left = read_journal(folder)
    assert [e["id"] for e in left if e["event"] == "prediction"] == kept
    assert sorted(e["id"] for e in left if e["event"] == "feedback") == sorted(kept)
    raw = everything(folder)
    for word in (person, *theirs):
        assert word.encode() not in raw
    again = Eraser(folder, Person.parse(f"{column}={person}")).erase()
    assert (again.predictions, again.feedback, again.files) == (0, 0, 0)
    seal_journal(folder, JournalOptions())
    assert len(read_journal(folder)) == 2 * len(kept)


def test_half_a_record_of_who_is_forgotten_goes_too(tmp_path):
    keep(tmp_path, [make_row(id="somebody-else")])
    (path,) = list_segments(tmp_path)
    record = encode_event(PREDICTION, 0, ["a"], [list(make_row().values())], [["ada-lovelace", None]], [{"label": "no"}])
    path.write_bytes(path.read_bytes() + frame(record)[:-1])
    assert b"ada-lovelace" in everything(tmp_path)
    assert Eraser(tmp_path, Person.parse("id=ada-lovelace")).erase().predictions == 0
    assert b"ada-lovelace" not in everything(tmp_path) and len(read_journal(tmp_path)) == 1


@pytest.mark.parametrize("said", ["age=39", "age=39.0", "member=yes", "since=2020-01-31", "since=2020-01-31T00:00:00", "id=17"])
def test_a_value_is_found_by_what_it_means(tmp_path, said):
    keep(tmp_path, [make_row(id=17), make_row(age=40, member=False, since="2021-01-31", id=170)])
    seal_journal(tmp_path)
    keep(tmp_path, [make_row(id=17.0), make_row(age=40, member=False, since="2021-01-31", id="x")])
    assert Eraser(tmp_path, Person.parse(said)).erase().predictions == 2
    assert {e["inputs"]["age"] for e in read_journal(tmp_path)} == {40}


def test_a_service_goes_on_writing_while_a_person_is_forgotten(tmp_path):
    journal = Journal(tmp_path, ORIGIN)
    for name in ("ada", "bob", "ada"):
        journal.predictions(new_ids(1), [make_row(id=name)], [{"label": "no", "probability": 0.1}])
        journal.flush()
    assert Eraser(tmp_path, Person.parse("id=ada")).erase().predictions == 2
    journal.predictions(new_ids(1), [make_row(id="eve")], [{"label": "no", "probability": 0.1}])
    journal.close()
    assert [e["keys"]["id"] for e in read_journal(tmp_path)] == ["bob", "eve"]


@pytest.fixture
def census(tmp_path):
    """A project that prepared a table, and a run of it."""
    (tmp_path / "settings.ini").write_text("[columns]\ntarget = paid\nid = id\nprivate = mail\n")
    (tmp_path / "nbs" / "pipeline").mkdir(parents=True)
    layout, key = Layout(tmp_path), project_key(tmp_path)
    mails = ["ada@example.org", "bob@example.org", None]
    table = Columns(
        {
            "age": np.array([20.0, 40.0, 60.0]),
            "id": np.array(["c-1700", "c-1800", None], dtype=object),
            "mail": np.array(hash_private(mails, key), dtype=object),
        }
    )
    store = Store(layout.objects)
    stored, other = store.put(table), store.put(Columns({"age": np.array([1.0])}))
    result = StepResult(
        step="prepare", run_id="r1", started="", status="done", outputs={"train": stored, "test": other}, facts={"rows": 3}
    )
    for path in (layout.last("prepare"), layout.result("r1", "prepare")):
        write_whole(path, result.to_json())
    (tmp_path / "reports" / "runs" / "r1").mkdir(parents=True)
    (tmp_path / "reports" / "runs" / "r1" / "01_prepare.ipynb").write_text('{"text": "c-1700"}')
    keep(tmp_path / ".ekiben" / "journal", [make_row(id="c-1700", mail="ada@example.org"), make_row(id="c-1800")], labels=2)
    return tmp_path, stored, other


@pytest.mark.parametrize("who", ["id=c-1700", "mail=ada@example.org"])
def test_forget_erases_from_journal_and_tables_and_says_what(census, capsys, who):
    root, stored, other = census
    assert main(["forget", who, "--project", str(root)]) == 0
    said = capsys.readouterr().out
    assert "1 predictions and 1 feedback erased" in said and "prepare.train: 1 rows erased" in said
    assert ("01_prepare.ipynb still shows the value" in said) == (who == "id=c-1700")
    layout = Layout(root)
    for path in (layout.last("prepare"), layout.result("r1", "prepare")):
        result = StepResult.from_json(path.read_bytes())
        assert result.is_sealed and result.outputs["test"] == other
        assert Store(layout.objects).get(result.outputs["train"])["age"].tolist() == [40.0, 60.0]
    assert not Store(layout.objects).path(stored.digest).exists()
    left = pq.read_table(Store(layout.objects).path(result.outputs["train"].digest))["id"].chunk(0)
    assert left.dictionary.to_pylist() == ["c-1800"], "nor does a value stay in a file as a category that no row has"
    (erasure,) = read_erasures(root)
    assert (erasure.column, erasure.predictions, erasure.tables[0].rows) == (who.split("=")[0], 1, 1)
    account = (root / ".ekiben" / "erasures.jsonl").read_bytes()
    for value in (b"c-1700", b"ada@", *[e["id"].encode() for e in read_journal(root / ".ekiben" / "journal")]):
        assert value not in account
    assert b"c-1700" not in everything(root / ".ekiben" / "journal")
    (line,) = explain_erasures(root, "2026-01-01T00:00:00+00:00", [result.outputs["train"].digest])
    assert "1 of prepare.train" in line
    assert explain_erasures(root, "2026-01-01", ["0" * 64]) == [] and explain_erasures(root, "2999-01-01") == []
    assert main(["forget", who, "--project", str(root)]) == 0
    assert "nothing to erase" in capsys.readouterr().out or who == "id=c-1700"
    assert len(read_erasures(root)) == 1


def test_forget_by_the_id_of_a_prediction_takes_its_feedback_too(census):
    root, *_ = census
    id_ = read_journal(root / ".ekiben" / "journal")[0]["id"]
    erasure = forget(root, id_)
    assert (erasure.column, erasure.predictions, erasure.feedback, erasure.tables) == ("_id", 1, 1, [])
    assert id_.encode() not in everything(root / ".ekiben")


def test_a_table_made_of_the_journal_loses_the_rows_too(census):
    import pyarrow as pa

    root, *_ = census
    ids = [e["id"] for e in read_journal(root / ".ekiben" / "journal") if e["event"] == "prediction"]
    layout = Layout(root)
    stored = Store(layout.objects).put(pa.table({"_id": ids, "age": [1.0, 2.0]}))
    write_whole(
        layout.last("retrain"),
        StepResult(step="retrain", run_id="r2", started="", status="done", outputs={"rows": stored}).to_json(),
    )
    erasure = forget(root, "id=c-1700")
    assert {t.names[0] for t in erasure.tables} == {"prepare.train", "retrain.rows"}
    result = StepResult.from_json(layout.last("retrain").read_bytes())
    assert Store(layout.objects).get(result.outputs["rows"])["age"].to_pylist() == [2.0]


def test_an_edited_result_is_not_made_to_look_genuine(census):
    root, *_ = census
    path = Layout(root).last("prepare")
    path.write_bytes(path.read_bytes().replace(b'"rows":3', b'"rows":4'))
    forget(root, "id=c-1700")
    assert not StepResult.from_json(path.read_bytes()).is_sealed


def test_a_column_that_nothing_has_is_refused_with_a_hint(census):
    with pytest.raises(UsageError, match="did you mean `mail`"):
        forget(census[0], "mial=x")
    with pytest.raises(UsageError, match="COLUMN=VALUE"):
        forget(census[0], "id=")


def test_the_commands_show_seal_and_rekey(census, capsys):
    root, *_ = census
    assert main(["journal", "rekey", "--project", str(root)]) == 2
    assert "encryption = yes" in capsys.readouterr().err
    with (root / "settings.ini").open("a") as file:
        file.write("[serve]\nencryption = yes\n")
    for words, said in (
        (["journal"], "not sealed yet"),
        (["journal", "seal"], "1 segments sealed: 2 predictions, 2 feedback"),
        (["journal", "show"], "2"),
        (["journal", "rekey"], "2 files are encrypted with a new key"),
    ):
        assert main([*words, "--project", str(root)]) == 0
        assert said in capsys.readouterr().out
    assert main(["journal", "burn", "--project", str(root)]) == 2


# ---- settings


def test_the_settings_reach_the_service_through_its_environment():
    from ekiben.sections import ServeSection

    section = ServeSection(durability="sync", retention_days=30, encryption=True)
    options = JournalOptions.from_settings(section)
    assert JournalOptions.from_env(options.to_env()) == options
    assert (options.durability, options.retention_days, options.encryption) == ("sync", 30, True)
    for name, text in (("DURABILITY", "maybe"), ("RETENTION_DAYS", "-1"), ("ENCRYPTION", "much")):
        with pytest.raises(UsageError, match=name):
            JournalOptions.from_env({f"EKIBEN_SERVE__{name}": text})


def test_a_place_that_cannot_be_written_is_told_by_the_setting_that_names_it(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EKIBEN_PRIVATE_KEY", str(tmp_path / "private.key"))
    with pytest.raises(ServiceError, match="EKIBEN_JOURNAL"):
        keep(tmp_path / "file" / "journal", [make_row()])
    monkeypatch.setenv("EKIBEN_PRIVATE_KEY", str(tmp_path / "file" / "private.key"))
    with pytest.raises(ServiceError, match="EKIBEN_PRIVATE_KEY"):
        keep(tmp_path / "journal", [make_row()])


def test_ids_never_repeat_across_threads_and_forks() -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(8) as pool:
        found = [id_ for ids in pool.map(lambda n: new_ids(n % 700 + 1), range(400)) for id_ in ids]
    reading, writing = os.pipe()
    if (pid := os.fork()) == 0:
        os.write(writing, " ".join(new_ids(20)).encode())
        os._exit(0)
    os.waitpid(pid, 0)
    found += [*new_ids(20), *os.read(reading, 10_000).decode().split()]
    os.close(reading)
    os.close(writing)
    assert len({id_.partition("-7")[2] for id_ in found}) == len(found)


def test_a_part_of_an_encrypted_journal_can_be_asked_for(tmp_path):
    from ekiben.records import Field, Schema
    from ekiben.serving.journal.journal import Journal, new_ids
    from ekiben.serving.journal.keeping import JournalOptions
    from ekiben.serving.journal.seal import seal_journal
    from ekiben.serving.journal.sealed import open_journal
    from ekiben.serving.journal.segments import Origin

    schema = Schema(fields=(Field(name="age", kind="number"),), task="binary", target="y", classes=("no", "yes"))
    journal, ids = Journal(tmp_path, Origin(model={"name": "c", "version": "3", "bento": ""}, schema=schema)), new_ids(400)
    journal.predictions(ids, [{"age": i % 40} for i in range(400)], [{"label": "no", "probability": 0.5}] * 400)
    journal.feedback(ids[7], "yes")
    journal.close()
    seal_journal(tmp_path, JournalOptions(encryption=True))
    with open_journal(tmp_path, fresh=False) as db:
        asked = {"age >= 20": 200, f"_id = '{ids[7]}' AND _truth = 'yes'": 1, "_version = '3' AND age < 5": 50, "_version = '4'": 0}
        for condition, expected in asked.items():
            assert db.execute(f"SELECT count(*) FROM journal WHERE {condition}").fetchall() == [(expected,)], condition
