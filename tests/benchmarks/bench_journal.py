"""The journal: what it costs a request, what a SIGKILL takes, and how ten million rows are read.

Run it as ``python tests/benchmarks/bench_journal.py [KILLS] [SECONDS]``. Server and clients are processes of their own;
the three ways to keep a journal (off, async, sync) take turns on the same machine, so that their ratios count and not
their digits. Exits with 1 when a promise is broken: an answered prediction that ``sync`` did not keep, more than 100 ms
that ``async`` lost, memory that grows with the rows that are read.
"""

# ruff: noqa: E402
from __future__ import annotations

import asyncio
import json
import os
import random
import resource
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from bundles import make_project
from test_journal import INPUTS, ORIGIN, SERVER, kill_under_load, load, make_row

from ekiben.serving.journal.journal import Journal, new_ids
from ekiben.serving.journal.keeping import JournalOptions
from ekiben.serving.journal.seal import feedback_table, parquet_writer, predictions_table, seal_journal, sealed_path
from ekiben.serving.journal.segments import list_segments

ROW = {"age": 30, "income": 1.0, "job": "clerk", "place": "L", "member": True, "since": "2020-01-01", "id": 17}
LIMIT_MS, COPIES, CHUNK = 100.0, 100, 100_000


def time_call(folder: Path) -> float:
    """Return the microseconds that one row's `predictions` takes on the event loop, the median of many."""
    journal = Journal(folder, ORIGIN, JournalOptions(queue_bytes=1 << 30))
    row, answer, times = make_row(id=17, mail="ada@example.org"), [{"label": "yes", "probability": 0.5}], []
    for _ in range(20_000):
        ids = new_ids(1)
        began = time.perf_counter()
        journal.predictions(ids, [row], answer)
        times.append(time.perf_counter() - began)
    journal.close()
    return sorted(times)[len(times) // 2] * 1e6


def time_sealing(folder: Path) -> float:
    """Return the rows a second that are sealed."""
    journal = Journal(folder, ORIGIN, JournalOptions(queue_bytes=1 << 30))
    for _ in range(100):
        journal.predictions(new_ids(1000), [make_row()] * 1000, [{"label": "yes", "probability": 0.5}] * 1000)
    journal.close()
    began = time.perf_counter()
    done = seal_journal(folder)
    return done.predictions / (time.perf_counter() - began)


def cpu_s(pid: int) -> float:
    """Return the seconds of processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def throughput(bundle: Path, folder: Path, durability: str, seconds: float, clients: int = 32) -> tuple[float, ...]:
    """Return what a service with this journal does: requests a second, its processor's µs for each, p50 and p99 [ms]."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = SERVER if durability != "off" else SERVER.replace("journal=Path(journal), options=JournalOptions(durability=durability)", "")
    command = [sys.executable, "-c", program, str(bundle), str(folder), durability, str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    body, answered = json.dumps({"rows": [ROW]}).encode(), dict[str, float]()

    async def go() -> tuple[float, float, list[float]]:
        for _ in range(600):
            try:
                (await asyncio.open_connection("127.0.0.1", port))[1].close()
                break
            except OSError:
                await asyncio.sleep(0.05)
        stop = asyncio.Event()
        asking = [asyncio.create_task(load(port, body, stop, answered)) for _ in range(clients)]
        await asyncio.sleep(1.0)
        answered.clear()
        began, used = time.monotonic(), cpu_s(server.pid)
        await asyncio.sleep(seconds)
        n, took, used = len(answered), time.monotonic() - began, cpu_s(server.pid) - used
        alone = await one_by_one(port, body)
        stop.set()
        await asyncio.gather(*asking)
        return n / took, used / n * 1e6, alone

    try:
        rate, cost, alone = asyncio.run(go())
    finally:
        server.terminate()
        server.wait()
    alone.sort()
    return rate, cost, alone[len(alone) // 2] * 1e3, alone[int(len(alone) * 0.99)] * 1e3


async def one_by_one(port: int, body: bytes, n: int = 300) -> list[float]:
    """Return the seconds that each of `n` requests took beside the load."""
    head = b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    times = []
    for _ in range(n):
        began = time.perf_counter()
        writer.write(head + body)
        headers = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(headers.lower().split(b"content-length: ")[1].split(b"\r\n")[0]))
        times.append(time.perf_counter() - began)
    writer.close()
    return times


def kill(bundle: Path, folder: Path, durability: str, times: int) -> tuple[int, int, float]:
    """Kill a loaded service again and again; return answers given, answers lost, and the most milliseconds lost."""
    answers = lost = 0
    worst, rng = 0.0, random.Random(1)
    for n in range(times):
        answered, killed, kept, _ = kill_under_load(bundle, folder / f"{durability}{n}", durability, rng.uniform(0.3, 1.2))
        missing = [at for id_, at in answered.items() if id_ not in kept]
        answers, lost = answers + len(answered), lost + len(missing)
        worst = max([worst, *((killed - at) * 1e3 for at in missing)])
    return answers, lost, worst


def make_large(folder: Path, copies: int) -> None:
    """Write a sealed journal of `copies` × 100,000 predictions with ids of their own; the truth is told about a tenth."""
    import duckdb

    rows = [(id_, 1_760_000_000_000_000 + i, [make_row(age=i % 90)[n] for n in INPUTS], ["17", None], {"label": "yes", "probability": 0.5})
            for i, id_ in enumerate(new_ids(CHUNK))]  # fmt: skip
    table = predictions_table(ORIGIN, rows)
    first = sealed_path(folder, "predictions", "2026-01-31", "v3-0")
    with parquet_writer(first, table.schema) as writer:
        writer.write_table(table)
    told = feedback_table(ORIGIN, [(row[0], row[1], "yes") for row in rows[::10]])
    with parquet_writer(sealed_path(folder, "feedback", "2026-01-31", "v3-0"), told.schema) as writer:
        writer.write_table(told)
    with duckdb.connect() as db:
        db.execute("SET preserve_insertion_order = false")
        for n in range(1, copies):
            day = f"2026-01-{1 + n % 28:02}"
            places = [sealed_path(folder, kind, day, f"v3-{n}") for kind in ("predictions", "feedback")]
            for place in places:
                place.parent.mkdir(parents=True, exist_ok=True)
            db.execute(f"CREATE OR REPLACE TABLE p AS SELECT * REPLACE (uuid()::VARCHAR AS _id) FROM '{first}'")
            db.execute(f"COPY p TO '{places[0]}' (FORMAT parquet, COMPRESSION zstd)")
            db.execute(f"COPY (SELECT _id, _time, 'yes' AS _truth FROM p LIMIT {CHUNK // 10}) TO '{places[1]}' (FORMAT parquet)")


READ = "SELECT job, count(*), avg(age), avg(_probability), count(_told) FROM {} GROUP BY ALL"


def read_large(folder: Path) -> None:
    """Read a journal with DuckDB and print rows, seconds and the peak of memory [MiB]."""
    from ekiben.serving.journal.sealed import open_journal

    with open_journal(folder) as db:
        began = time.perf_counter()
        rows = sum(row[1] for row in db.execute(READ.format("journal")).fetchall())
        took = time.perf_counter() - began
    print(json.dumps([rows, took, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))


def main(kills: int = 20, seconds: float = 5.0) -> int:
    """Measure and print; return the exit code."""
    broken = []
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        bundle = make_project(home / "census").bundle.folder
        print(f"one row on the event loop      {time_call(home / 'call'):8.1f} µs")
        print(f"sealing                        {time_sealing(home / 'seal'):8,.0f} rows/s")
        print("\nover HTTP, 32 connections, one row a request; p50 and p99 of a 33rd beside them")
        rates: dict[str, list[tuple[float, ...]]] = {"off": [], "async": [], "sync": []}
        for turn in range(3):
            for way in rates:
                rates[way].append(throughput(bundle, home / f"{way}-{turn}", way, seconds))
        best = {way: max(found) for way, found in rates.items()}
        for way, (rate, _, p50, p99) in best.items():
            cost = min(found[1] for found in rates[way])
            print(f"journal {way:6} {rate:8,.0f} requests/s {cost:6.0f} µs of processor   p50 {p50:6.1f} ms   p99 {p99:6.1f} ms")
        print(f"\nSIGKILL under load, {kills} times")
        for way in ("sync", "async"):
            answers, lost, worst = kill(bundle, home / "kills", way, kills)
            print(f"{way:6} {answers:8,} answered, {lost} not in the journal, the oldest {worst:.1f} ms before the kill")
            broken += [f"{way} lost {lost} answers, {worst:.0f} ms"] if (lost and way == "sync") or worst > LIMIT_MS else []
        print("\nreading with DuckDB: feedback joined, grouped")
        peaks = []
        for copies in (COPIES // 10, COPIES):
            make_large(home / f"large{copies}", copies)
            command = [sys.executable, __file__, "--read", str(home / f"large{copies}")]
            rows, took, peak = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            peaks.append(peak)
            print(f"{rows:12,} rows {took:6.1f} s   peak memory {peak:6.0f} MiB")
        broken += [f"memory grew from {peaks[0]:.0f} to {peaks[1]:.0f} MiB"] if peaks[1] > peaks[0] + 256 else []
        assert not list_segments(home / "seal") and os.path.isdir(home)
    print("\n" + ("; ".join(broken) or "every promise held"))
    return int(bool(broken))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--read"]:
        read_large(Path(sys.argv[2]))
    else:
        sys.exit(main(*(int(a) if i == 0 else float(a) for i, a in enumerate(sys.argv[1:]))))
