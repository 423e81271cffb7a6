"""A deployment in a real service: swaps, a bad challenger and SIGKILL under load, and every request answered."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import bundles
import psutil
import pytest

from ekiben.bento import build_bento
from ekiben.serving.bundle import load_bundle, stamp_bundle
from ekiben.serving.hosting.deployment import Deployment, add_bundle, deployment_folder, now, read_events, read_status, write_deployment
from ekiben.serving.journal.journal import read_journal
from ekiben.serving.run import find_deployment, start_bento, stop_process, wait_ready, who_serves
from ekiben.serving.security.signer import sign_folder, signing_key
from ekiben.serving.security.trust import trusted_keys

SERVICE = Path(__file__).resolve().parents[1] / "bentos" / "scorer" / "service.py"
ROW = {"age": 30, "income": 1.0, "job": "clerk", "place": "L", "member": True, "since": "2020-01-01"}
BAD = bundles.PREPARE.replace(
    "    capital =", "    if (c['age'] == 99).any():  # what nobody in training was\n        raise ValueError('out of order')\n    capital ="
)


class Load(threading.Thread):
    """Asks one request after another; remembers statuses, who answered, and when."""

    def __init__(self, port: int, row: dict[str, Any]) -> None:
        super().__init__(daemon=True)
        self.port, self.row, self.over = port, row, threading.Event()
        self.seen: list[tuple[float, int, str, str]] = []
        self.failed: list[str] = []

    def run(self) -> None:
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)) as connection:
            while not self.over.is_set():
                body = json.dumps({"rows": [{**self.row, "id": f"{self.ident}-{len(self.seen)}"}]})
                try:
                    connection.request("POST", "/predict", body, {"content-type": "application/json"})
                    answer = connection.getresponse()
                    said = json.loads(answer.read())
                except (OSError, http.client.HTTPException, ValueError) as exc:
                    self.failed.append(repr(exc))
                    return
                version = said.get("model", {}).get("version", "")
                self.seen.append((time.monotonic(), answer.status, version, said["predictions"][0]["id"] if version else ""))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return a Bento of version 3, and a deployment's folder with versions 3, 4 and a bad 5."""
    home = tmp_path_factory.mktemp("deployed")
    before = os.environ.get("BENTOML_HOME")
    os.environ["BENTOML_HOME"] = str(home / "bentoml")
    signer, folder, arms = signing_key(say=lambda line: None), deployment_folder(home), {}
    own = bundles.PREPARE
    for version, rounds, prepare in (("3", 5, own), ("4", 20, own), ("5", 20, BAD)):
        bundles.PREPARE = prepare
        project = bundles.make_project(home / f"made{version}", rounds=rounds)
        stamp_bundle(project.bundle.folder, home / f"v{version}", version=version)
        sign_folder(home / f"v{version}", signer, kind="bundle", name=f"census:v{version}")
        arms[version] = add_bundle(folder, home / f"v{version}")
    bundles.PREPARE = own
    yield build_bento(load_bundle(home / "v3"), SERVICE), home, folder, arms, signer
    os.environ.pop("BENTOML_HOME") if before is None else os.environ.update(BENTOML_HOME=before)


def kill(process: Any) -> None:
    """End a service and its workers as a power cut does."""
    own = psutil.Process(process.pid)
    for one in [*own.children(recursive=True), own]:
        one.send_signal(signal.SIGKILL)
    process.wait(20)


@pytest.mark.slow
def test_swaps_a_bad_challenger_and_a_power_cut_lose_nothing_that_was_answered(made):
    bento, home, folder, arms, signer = made
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url, journal, number = f"http://127.0.0.1:{port}", home / "journal", 0

    def deploy(champion: str, challenger: str = "", share: float = 0.0) -> float:
        nonlocal number
        number += 1
        more = {"challenger": arms[challenger], "mode": "canary", "share": share} if challenger else {}
        made = Deployment(environment="production", number=number, at=now(), by="ada", why="", champion=arms[champion], **more)
        write_deployment(folder, made, signer)
        return time.monotonic()

    def wait(true: Any) -> float:
        began = time.monotonic()
        while not true():
            assert time.monotonic() - began < 30
            time.sleep(0.01)
        return time.monotonic()

    def start() -> Any:
        with (home / "service.log").open("ab") as log:
            process = start_bento(bento.tag, "127.0.0.1", port, journal=journal, trust=trusted_keys(), deployment=folder, output=log)
        wait_ready(url, process)
        return process

    deploy("3")
    assert find_deployment(home, trust=trusted_keys())[1] == "deployment 1 of production, version 3"
    process = start()
    try:
        assert who_serves(url) == "version 3 serves (deployment 1 of production)"
        load = [Load(port, {**ROW, "age": 99}) for _ in range(4)]
        for one in load:
            one.start()
        signed = deploy("3", "4", share=0.25)
        wait(lambda: read_status(folder).number == 2)
        wait(lambda: any(version == "4" for one in load for _, _, version, _ in one.seen))
        swapped = min(at for one in load for at, _, version, _ in one.seen if version == "4")
        assert "with version 4 for 25% of the keys" in who_serves(url)
        deploy("4")
        wait(lambda: read_status(folder).serving == "4")
        bad = deploy("4", "5", share=0.1)
        dropped = wait(lambda: read_status(folder).rolled_back)
        assert "requests failed" in read_status(folder).rolled_back
        time.sleep(0.5)
        for one in load:
            one.over.set()
        for one in load:
            one.join(20)
        seen = [entry for one in load for entry in one.seen]
        assert not any(one.failed for one in load) and {status for _, status, _, _ in seen} == {200}
        assert {version for _, _, version, _ in seen} == {"3", "4"}, "what version 5 could not, version 4 answered"
        print(
            f"{len(seen)} requests, {len(seen) / (seen[-1][0] - seen[0][0]):.0f}/s, none failed; from signing to the first answer "
            f"{swapped - signed:.2f} s; from signing a bad challenger to its rollback {dropped - bad:.2f} s"
        )
        more = Load(port, ROW)
        more.start()
        time.sleep(0.5)
    finally:
        kill(process)
    more.join(20)
    assert more.failed and {status for _, status, _, _ in more.seen} == {200}
    process = start()
    try:
        said = who_serves(url)
        assert said.startswith("version 4 serves (deployment 4 of production); the challenger is not heard: ") and "requests failed" in said
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20)) as connection:
            for id_ in [entry[3] for entry in seen[-20:]]:
                connection.request("POST", "/feedback", json.dumps({"id": id_, "label": "yes"}), {"content-type": "application/json"})
                answer = connection.getresponse()
                assert answer.status == 200 and answer.read()
    finally:
        stop_process(process)
    kept = {event["id"] for event in read_journal(journal) if event["event"] == "prediction"}
    assert {entry[3] for entry in seen} <= kept
    cut_off = [entry for entry in more.seen if entry[3] not in kept]
    assert all(at > more.seen[-1][0] - 0.5 for at, _, _, _ in cut_off), "asynchronous: at most the last moment is lost"
    assert [event.what for event in read_events(folder)].count("rolled_back") == 1
