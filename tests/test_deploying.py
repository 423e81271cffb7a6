"""A real service under load: a version comes to serve step by step, another is killed on the way, the first comes back. No request is lost."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bundles import make_columns, make_project
from tiny import empty_tracking_store

from ekiben import ledger
from ekiben.challenge import Comparison
from ekiben.package import release
from ekiben.registry import Registry
from ekiben.rollout.place import current, environment_folder, look
from ekiben.serving.bundle import Lineage
from ekiben.serving.run import trust_of, wait_ready
from ekiben.serving.security.signer import sign_folder, signing_key

SERVICE = Path(__file__).resolve().parents[1] / "bentos" / "scorer" / "service.py"
SETTINGS = """[pipeline]
name = census

[columns]
target = target
id = id

[deploy]
hold_s = 1.5
min_requests = 15
"""
EKIBEN = [sys.executable, "-c", "import sys; from ekiben.cli import main; sys.exit(main())"]

pytestmark = pytest.mark.slow


class Load:
    """Threads that ask without a break, each over one connection, and count what they are answered."""

    def __init__(self, port: int, threads: int = 3) -> None:
        rows = make_columns(200, seed=9).to_rows()
        self.port, self.rows, self.over = port, rows, threading.Event()
        self.statuses: Counter[int] = Counter()
        self.versions: Counter[str] = Counter()
        self.of_key: dict[str, set[str]] = {}
        self.lost: list[str] = []
        self.threads = [threading.Thread(target=self._ask, args=(i,), daemon=True) for i in range(threads)]

    def _ask(self, place: int) -> None:
        connection, n = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20), 0
        while not self.over.is_set():
            n += 1
            key = f"{place}-{n % 400}"
            body = json.dumps({"rows": [self.rows[n % len(self.rows)]]})
            try:
                connection.request("POST", "/predict", body, {"content-type": "application/json", "Routing-Key": key})
                answer = connection.getresponse()
                said = json.loads(answer.read())
            except (OSError, http.client.HTTPException, ValueError) as exc:
                self.lost.append(repr(exc))
                connection.close()
                continue
            self.statuses[answer.status] += 1
            if answer.status == 200:
                self.versions[said["model"]["version"]] += 1
            time.sleep(0.004)

    def __enter__(self) -> Load:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        for thread in self.threads:
            thread.join(30)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Yield a project with three registered versions; 1 is champion and has a Bento, 2 and 3 lie in the registry alone."""
    home = tmp_path_factory.mktemp("deploying")
    root = home / "census"
    (root / "nbs/pipeline").mkdir(parents=True)
    (root / "settings.ini").write_text(SETTINGS)
    (root / "mlflow.db").write_bytes(empty_tracking_store())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BENTOML_HOME", str(home / "bentoml"))
        registry = Registry(root, experiment="census")
        for version in "123":
            made = make_project(home / f"made{version}", rows=400, rounds=10, seed=int(version), lineage=Lineage(run_id=f"run{version}"))
            if version == "1":
                release(made.bundle, registry, service=SERVICE, promote="never", compare=lambda champion: Comparison())
            else:
                assert made.bundle.folder is not None
                sign_folder(made.bundle.folder, signing_key(), kind="bundle", name="census")
                registry.register(made.bundle)
        yield root


def ekiben(root: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen([*EKIBEN, *words, "--project", str(root)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run(root: Path, *words: str) -> tuple[int, str]:
    process = ekiben(root, *words)
    said, _ = process.communicate(timeout=120)
    return process.returncode, said


@contextlib.contextmanager
def serving(root: Path) -> Iterator[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = ekiben(root, "serve", "--port", str(port))
    try:
        wait_ready(f"http://127.0.0.1:{port}", process, 90)  # type: ignore[arg-type]
        yield port
    finally:
        process.terminate()
        process.communicate(timeout=60)


def champion(root: Path) -> Any:
    found = current(environment_folder(root), trust_of(root))
    assert found is not None
    return found.champion.version


def test_versions_come_and_go_under_load_and_no_request_is_lost(project: Path) -> None:
    code, said = run(project, "deploy")
    assert (code, champion(project)) == (0, "1"), said
    folder = environment_folder(project)
    with serving(project) as port, Load(port) as load:
        code, said = run(project, "deploy", "2")
        assert code == 0, said
        assert champion(project) == "2"
        assert "version 2 answers everything in production (the service serves it)" in said
        assert set(load.versions) == {"1", "2"}

        killed = ekiben(project, "deploy", "3")
        end = time.monotonic() + 60
        while ((status := look(folder)) is None or status.mode != "canary") and time.monotonic() < end:
            time.sleep(0.05)
        killed.kill()
        killed.communicate()
        assert champion(project) == "2"

        code, said = run(project, "rollback", "1", "--reason", "complaints")
        assert code == 0, said
        assert "the service serves it" in said
        before = Counter(load.versions)
        time.sleep(1.0)
        assert set(load.versions - before) == {"1"}
    assert load.lost == []
    assert set(load.statuses) == {200}
    assert load.statuses[200] > 1000
    ledger.verify(project)
    whats = [entry.what for entry in ledger.read(project)]
    assert {"rollout", "promotion", "rollback"} <= set(whats)


def test_the_registry_is_told_by_the_process_that_the_rollback_left_behind(project: Path) -> None:
    registry, end = Registry(project, experiment="census"), time.monotonic() + 60
    while (environment_folder(project) / "aliases.json").exists():
        assert time.monotonic() < end, (environment_folder(project) / "aliases.log").read_text()
        time.sleep(0.5)
    held = registry.holder("census", "champion")
    assert held is not None
    assert held.version == "1"


def test_who_serves_is_shown(project: Path) -> None:
    code, said = run(project, "deploy", "--status")
    assert code == 0
    assert "production  version 1" in said
    assert "`ekiben rollback` can go to version" in said
