"""A service in a thread that misbehaves as it is told, for the tests of what calls one."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from typing import Any

import numpy as np

from ekiben.loadtest.client import Sent
from ekiben.loadtest.levels import Level, LoadTest
from ekiben.records import Judgement

RUN = "20260101-120000-aaaa"
MODEL = {
    "name": "census", "version": "3", "bento": "census:v3", "runtime": "lightgbm", "digest": "d" * 64,
    "lineage": {"run_id": RUN, "mlflow_run": ""},
}  # fmt: skip
OPENAPI = {
    "paths": {"/predict": {"post": {"requestBody": {"content": {"application/json": {"example": {"rows": [{"age": 39}, {"age": 50}]}}}}}}}
}


class Fake:
    """A service in a thread, which answers `/predict` as its `behave` says: a status, raw bytes, or None to hang up."""

    def __init__(self, behave: Any = lambda n: 200, *, key: str = "", delay_s: float = 0.0) -> None:
        self.behave, self.key, self.delay_s = behave, key, delay_s
        self.bodies: list[bytes] = []
        self.at_once = self.most_at_once = self.connections = 0
        self.loop = asyncio.new_event_loop()
        self.ready, self.port = threading.Event(), 0
        self.thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Fake:
        self.thread.start()
        assert self.ready.wait(30)
        return self

    def __exit__(self, *_: object) -> None:
        self.loop.call_soon_threadsafe(self.stop.set)
        self.thread.join(30)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        with contextlib.suppress(asyncio.CancelledError):
            self.loop.run_until_complete(self._serve())

    async def _serve(self) -> None:
        self.stop = asyncio.Event()
        server = await asyncio.start_server(self._client, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self.ready.set()
        await self.stop.wait()
        server.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
                length = next((int(x.split(":")[1]) for x in head.split("\r\n") if x.startswith("content-length")), 0)
                body = await reader.readexactly(length)
                self.at_once += 1
                self.most_at_once = max(self.at_once, self.most_at_once)
                said = await self._answer(head, body)
                self.at_once -= 1
                if said is None:
                    break
                writer.write(said)
                await writer.drain()
        writer.close()

    async def _answer(self, head: str, body: bytes) -> bytes | None:
        route = head.split()[1]
        if self.key and f"bearer {self.key}" not in head:
            return http_answer(401, {"detail": "a key is needed"})
        if route == "/model":
            return http_answer(200, MODEL)
        if route == "/openapi.json":
            return http_answer(200, OPENAPI)
        self.bodies.append(body)
        if self.delay_s:
            await asyncio.sleep(self.delay_s)
        said = self.behave(len(self.bodies))
        return http_answer(said, {"detail": "busy"}) if isinstance(said, int) else said


def http_answer(status: int, said: object) -> bytes:
    body = json.dumps(said).encode()
    return b"HTTP/1.1 %d X\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % (status, len(body)) + body


def made_sent(at_once: int = 8, n: int = 4000, median_ms: float = 2.0, errors: int = 0, seed: int = 0) -> Sent:
    rng = np.random.default_rng(seed)
    took = rng.gamma(9, median_ms / 9e3, n)
    failed = np.sort(rng.uniform(0, 4, errors))
    return Sent(at_once, 4.0, took, np.sort(rng.uniform(0, 4, n)), {"503": errors} if errors else {}, failed, 0.4)


def made_test(*levels: Level, gates: list[Judgement] | None = None, **model: str) -> LoadTest:
    found = {"name": "census", "version": "3", "run_id": RUN} | model
    return LoadTest(started="2026-01-01T12:00:00Z", url="http://x", is_own=False, model=found, rows=1, levels=list(levels), gates=gates or [])
