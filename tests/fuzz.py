"""Bodies that are almost right, made from a seed, and a process that sends any number of them to the application.

`python tests/fuzz.py BUNDLE FOLDER NUMBER SEED` prints as JSON what became of them; in a process of its own, a crash of a
reader written in C is a failed test and not the end of all tests, and its memory is that of the service.
"""

from __future__ import annotations

import asyncio
import csv
import faulthandler
import gc
import gzip
import io
import json
import logging
import random
import sys
import time
from array import array
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from bundles import make_columns

from ekiben.serving.http import media
from ekiben.serving.http.app import ServiceApp
from ekiben.serving.security.issuing import add_key
from ekiben.serving.options import ServiceOptions
from ekiben.serving.http.state import State

PATIENCE_S = 120
FIRST_ID = "00000000-0000-7000-8000-000000000000"
WORDS = (
    b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-1e999", b"1e-999", b"-0", b"9" * 5_000, b"9" * 310, b"0x10", b"01", b"1.", b".5",
    b"null", b"true", b"[]", b"{}", b'""', b'"\\ud800"', b'"\\udfff\\ud800"', b'"\\u0000"', b'"\xed\xa0\x80"', b"\xff", b"\xc0\x80",
    b"\xef\xbb\xbf", b"\x00", b'"', b'""', b"\\", b"/*", b"//", b"'", b"[" * 2_000, b'{"a":' * 1_500, b"18446744073709551616",
    b'"9999-12-31T23:59:59-23:59"', b'"0001-01-01T00:00:00+14:00"', b'"24:00"', b"'\r\n'", b"\r", b"\n", b",", b":", b";", b"\t",
    b'"' + b"x" * 70_000 + b'"', b'"\xe2\x80\xa8"', b'"\xf0\x9f\x98\x80"', b'"age"', b'"rows"', b'"no such column"', b'"\\ud800":1,',
)  # fmt: skip
NUMBERS = (0, 1, -1, 127, 128, 255, 256, 2**15, 2**16 - 1, 2**31 - 1, -(2**31), 2**32 - 1, 2**62, 2**63 - 1, -(2**63))


@dataclass(frozen=True)
class Body:
    """What is sent.

    Attributes
    ----------
    path : str
    headers : tuple of (bytes, bytes)
    parts : tuple of bytes
    """

    path: str
    headers: tuple[tuple[bytes, bytes], ...]
    parts: tuple[bytes, ...]


@dataclass
class Outcome:
    """What became of the bodies."""

    statuses: Counter[int] = field(default_factory=Counter)
    failed: list[str] = field(default_factory=list)  # which answers were none, or none that may be given
    refusal_us: dict[str, array[float]] = field(default_factory=dict)
    slowest_s: float = 0.0
    largest: int = 0
    blocks: list[int] = field(default_factory=list)
    resident_mb: list[float] = field(default_factory=list)


class Bodies:
    """Whole bodies of every kind, and what is made of them.

    Parameters
    ----------
    seed : int
        The same body comes of the same seed and number.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.whole: list[tuple[str, bytes, bytes]] = []
        rows = make_columns(3, 5).to_rows()
        table = pa.Table.from_pylist(rows)
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        for many in ({"rows": rows[:1]}, {"rows": rows}):
            for path in ("/predict", "/explain"):
                self.whole.append((path, media.JSON.encode(), json.dumps(many).encode()))
        for label in ("yes", 1.5):
            self.whole.append(("/feedback", media.JSON.encode(), json.dumps({"id": FIRST_ID, "label": label}).encode()))
        self.whole += [("/predict", media.CSV.encode(), text.getvalue().encode())] * 3
        coded = table.set_column(2, "job", table["job"].dictionary_encode())
        views = table.set_column(3, "place", table["place"].cast(pa.string_view()))
        for one, options in ((table, {}), (coded, {}), (views, {}), (table, {"compression": "lz4"}), (table, {"compression": "zstd"})):
            for kind, make in ((media.ARROW_STREAM, pa.ipc.new_stream), (media.ARROW_FILE, pa.ipc.new_file)):
                sink = pa.BufferOutputStream()
                with make(sink, one.schema, options=pa.ipc.IpcWriteOptions(**options)) as stream:
                    stream.write_table(one)
                self.whole.append(("/predict", kind.encode(), sink.getvalue().to_pybytes()))
        for options in (
            {}, {"compression": "none"}, {"compression": "zstd", "use_dictionary": False}, {"data_page_version": "2.0"},
            {"compression": "gzip"}, {"compression": "brotli"}, {"use_dictionary": False, "column_encoding": "PLAIN"},
            {"use_dictionary": False, "column_encoding": {"age": "BYTE_STREAM_SPLIT", "place": "DELTA_LENGTH_BYTE_ARRAY"}},
        ):  # fmt: skip
            file = io.BytesIO()
            pq.write_table(table, file, **options)
            self.whole.append(("/predict", media.PARQUET.encode(), file.getvalue()))

    def make(self, number: int) -> Body:
        """Return the body of a number."""
        rng = random.Random(f"{self.seed} {number}")
        path, kind, raw = rng.choice(self.whole)
        is_binary = kind not in (media.JSON.encode(), media.CSV.encode())
        packing = rng.random()
        if packing < 0.05:
            raw = self._spoil(gzip.compress(raw, 1, mtime=0), rng, True)
        else:
            for _ in range(rng.choice((1, 1, 1, 2, 5))):
                raw = self._spoil(raw, rng, is_binary)
            raw = gzip.compress(raw, 1, mtime=0) if packing < 0.12 else raw
        headers = [(b"content-type", kind if rng.random() < 0.98 else rng.choice(self.whole)[1])]
        if packing < 0.12:
            headers.append((b"content-encoding", b"gzip"))
        if rng.random() < 0.05:
            headers.append((b"accept", rng.choice((b"text/csv", b"application/vnd.apache.parquet", b"\xff;q=\xfe", b",;=;,"))))
        if rng.random() < 0.03:
            headers.append((b"idempotency-key", b"%d" % rng.randrange(20)))
        if rng.random() < 0.1:
            headers.append((b"traceparent", rng.randbytes(55)))
        cuts = sorted(rng.randrange(len(raw) + 1) for _ in range(rng.choice((0, 0, 0, 1, 3))))
        return Body(path, tuple(headers), tuple(raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True)))

    def _spoil(self, raw: bytes, rng: random.Random, is_binary: bool) -> bytes:
        if not raw:
            return rng.randbytes(8)
        at = rng.randrange(len(raw))
        to = min(len(raw), at + rng.choice((1, 1, 2, 4, 8, 30, 200)))
        way = rng.randrange(9)
        if way == 0:
            return raw[:at]
        if way == 1:
            return raw[:at] + raw[to:]
        if way == 2:
            return raw[:to] + raw[at:to] * rng.choice((1, 1, 2, 300)) + raw[to:]
        if way == 3:
            return raw[:at] + bytes([raw[at] ^ 1 << rng.randrange(8)]) + raw[at + 1 :]
        if way == 4:
            other = rng.choice(self.whole)[2]
            start = rng.randrange(len(other))
            return raw[:at] + other[start : start + rng.randrange(1, 200)] + raw[to:]
        if way == 5:
            return raw[:at] + rng.randbytes(to - at) + raw[to:]
        if is_binary:
            size = rng.choice((1, 2, 4, 8))
            number = (rng.choice(NUMBERS) % 2 ** (8 * size)).to_bytes(size, "little")
            return raw[:at] + number + raw[at + size :]
        if way == 6:
            return raw[:at] + rng.choice(WORDS) + raw[to:]
        # A value is replaced as a whole: such a body is read further than one that is broken anywhere.
        marks = [i for i, byte in enumerate(raw) if byte in b":,[]{}\n"] or [0]
        first = rng.randrange(len(marks))
        end = marks[first + 1] if first + 1 < len(marks) else len(raw)
        return raw[: marks[first] + 1] + rng.choice(WORDS) + raw[end:]


def open_state(bundle: Path, folder: Path) -> tuple[State, bytes]:
    """Return an application's state with everything on, and a key to it."""
    keys = folder / "keys.json"
    word = add_key(keys, "fuzz", ["predict", "feedback"])[1]
    state = State()
    state.open(bundle, journal=folder / "journal", service=ServiceOptions(keys=str(keys), cache_entries=100))
    return state, word.encode()


async def send(app: ServiceApp, word: bytes, body: Body) -> tuple[int, dict[bytes, bytes], bytes]:
    """Return status, headers and body of the answer."""
    left = list(body.parts)
    answer: dict[str, Any] = {"status": 0, "headers": (), "body": b""}

    async def receive() -> dict[str, Any]:
        part = left.pop(0) if left else b""
        return {"type": "http.request", "body": part, "more_body": bool(left)}

    async def take(message: Any) -> None:
        if message["type"] == "http.response.start":
            answer.update(status=message["status"], headers=message["headers"])
        else:
            answer["body"] += message["body"]

    scope = {
        "type": "http", "method": "POST", "path": body.path, "raw_path": body.path.encode(), "query_string": b"", "scheme": "http",
        "headers": [(b"host", b"localhost"), (b"x-api-key", word), *body.headers], "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }  # fmt: skip
    await app(scope, receive, take)
    return answer["status"], dict(answer["headers"]), answer["body"]


def fault_of(status: int, headers: dict[bytes, bytes], said: bytes) -> str:
    """Return what is wrong with an answer; empty: nothing."""
    if not 200 <= status < 500:
        return f"status {status}"
    try:
        if headers[b"content-type"] == b"application/problem+json" and json.loads(said)["status"] != status:
            return "another status in the document than on the answer"
    except ValueError:
        return "no JSON"
    if status >= 400 and headers[b"content-type"] != b"application/problem+json":
        return f"a refusal as {headers[b'content-type'].decode()}"
    if status >= 400 and len(said) > 16_384:
        return f"a refusal of {len(said)} bytes"
    return ""


async def send_all(state: State, word: bytes, bodies: Bodies, number: int, *, looks: int = 5) -> Outcome:
    """Send bodies, and look at the memory now and then."""
    app, found = ServiceApp(state=state), Outcome()
    for i in range(number):
        if i % 100 == 0:
            faulthandler.dump_traceback_later(PATIENCE_S, exit=True)
        body = bodies.make(i)
        began = time.perf_counter()
        try:
            status, headers, said = await send(app, word, body)
            fault = fault_of(status, headers, said)
        except Exception as exc:
            status, said, fault = 0, b"", f"{type(exc).__name__}: {exc}"
        took = time.perf_counter() - began
        found.statuses[status] += 1
        if fault:
            found.failed.append(f"seed {bodies.seed}, body {i}, {body.path} as {body.headers[0][1].decode()}: {fault}")
        if status >= 400:
            kind = body.headers[0][1].decode() + (" in gzip" if (b"content-encoding", b"gzip") in body.headers else "")
            found.refusal_us.setdefault(kind, array("d")).append(took * 1e6)
        found.slowest_s, found.largest = max(found.slowest_s, took), max(found.largest, len(said))
        if i % max(1, number // looks) == max(1, number // looks) - 1:
            gc.collect()
            pa.default_memory_pool().release_unused()
            found.blocks.append(sys.getallocatedblocks())
            found.resident_mb.append(resident_mb())
    faulthandler.cancel_dump_traceback_later()
    return found


def resident_mb(process: int | str = "self") -> float:
    """Return the resident memory of a process."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def main(bundle: str, folder: str, number: str, seed: str) -> None:
    """Send bodies and print what became of them."""
    logging.disable()
    state, word = open_state(Path(bundle), Path(folder))
    found = asyncio.run(send_all(state, word, Bodies(int(seed)), int(number)))
    state.close()
    medians = {kind: sorted(took)[len(took) // 2] for kind, took in found.refusal_us.items()}
    print(json.dumps({**found.__dict__, "refusal_us": medians, "failed": found.failed[:20]}))


if __name__ == "__main__":
    main(*sys.argv[1:])
