"""Whatever is killed in a model's life, the service, a training, a rollout: one verified version serves, nothing told is lost.

A project of simulated loan applications is made once and copied for each test. Its service answers callers throughout;
processes are ended by SIGKILL at random moments, and what is left is examined.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest

from ekiben.serving.bundle import load_bundle
from ekiben.serving.hosting.deployment import deployment_folder, read_deployment, read_status
from ekiben.serving.security.trust import trusted_keys
from ekiben.simulate.client import Callers, Orders
from ekiben.simulate.operator import Operator
from ekiben.simulate.plan import Plan
from ekiben.simulate.prove import count_labels
from ekiben.simulate.service import Running
from ekiben.simulate.stage import Stage, credit_stage, own_environment, world_table
from ekiben.simulate.traffic import CreditTraffic

pytestmark = pytest.mark.faults
PLAN = Plan(days=6, drift_day=1, drift="reversal", rate=80, day_s=4.0, label_delay=1, hold_s=1.0, share=0.2)
KILLS = int(os.environ.get("EKIBEN_KILLS", "6"))  # of each kind


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """Return a project with a champion, version 1, and a second version that nobody deployed."""
    base = tmp_path_factory.mktemp("life")
    stage = credit_stage(base, PLAN)
    settings = stage.root / "settings.ini"
    text = re.sub(r"^groups = .*\n", "", settings.read_text(), flags=re.M)  # who the callers are is written down by a simulation alone
    settings.write_text(text.replace("[serve]\n", "[serve]\ndurability = sync\n", 1))
    pq.write_table(world_table(stage.traffic, 0, 6000, 50_000), base / "second.parquet")  # type: ignore[arg-type]
    spread_over_days(base / "second.parquet")
    stage.operator.do("run", "-p", "package.promote=never", env={"EKIBEN_DATA__SOURCE": str(base / "second.parquet")})
    stage.operator.do("kernels", "stop", fine=(0, 1, 2))
    return stage


def spread_over_days(path: Path) -> None:
    """Give rows of one day those of ten, so that they can be split by time."""
    table = pq.read_table(path)
    days = table["applied_on"].to_numpy() + (np.arange(table.num_rows) % 10) * np.timedelta64(1, "D")
    import pyarrow as pa

    pq.write_table(table.set_column(table.column_names.index("applied_on"), "applied_on", pa.array(days, pa.timestamp("us"))), path)


@pytest.fixture
def stage(template: Stage, tmp_path: Path) -> Iterator[Stage]:
    """Return a copy of the project, with the store, the keys and the registry of its own."""
    base = tmp_path / "b"
    shutil.copytree(template.base, base, symlinks=True)
    for path in [base / "credit" / "settings.ini", *(base / "credit").glob("mlflow.db")]:
        raw = path.read_bytes()  # same length: paths inside the database's rows stay whole
        path.write_bytes(raw.replace(str(template.base).encode(), str(base).encode())) if path.suffix == ".ini" else move_paths(path, template.base, base)
    operator = Operator(base / "credit", own_environment(base), base / "log.txt")
    made = replace(template, root=base / "credit", operator=operator, base=base)
    yield made
    operator.do("kernels", "stop", fine=tuple(range(256)))
    left = processes_of(base)
    for process in left:
        process.kill()
    assert not left, f"still alive: {[' '.join(p.cmdline())[:120] for p in left]}"


def move_paths(database: Path, old: Path, new: Path) -> None:
    """Let a copy of MLflow's database speak of the copy's files."""
    import sqlite3

    with sqlite3.connect(database) as db:
        for (table,) in db.execute("select name from sqlite_master where type = 'table'").fetchall():
            for column in [row[1] for row in db.execute(f"pragma table_info('{table}')") if "CHAR" in str(row[2]).upper() or "TEXT" in str(row[2]).upper()]:
                db.execute(f'update "{table}" set "{column}" = replace("{column}", ?, ?)', (str(old), str(new)))


def processes_of(base: Path) -> list[psutil.Process]:
    """Return the living processes whose environment or command names a test's folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE and str(base) in " ".join([*process.cmdline(), *process.environ().values()]):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return found


def start(stage: Stage, *words: str) -> subprocess.Popen[bytes]:
    """Start a command in a session of its own."""
    log = open(stage.base / "log.txt", "ab")
    code = "import sys; from ekiben.cli import main; sys.exit(main())"
    return subprocess.Popen(
        [sys.executable, "-c", code, *words], cwd=stage.root, env={**os.environ, **stage.operator.env}, stdout=log, stderr=log,
        stdin=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip


def kill(process: subprocess.Popen[bytes]) -> bool:
    """Kill a command, not its children; return whether it still lived."""
    living = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    return living


def examine(stage: Stage, known: set[str]) -> str:
    """Check that what is deployed is verified down to its bundles and the ledger holds; return the champion's version."""
    folder = deployment_folder(stage.root)
    env = {"EKIBEN_CONFIG": stage.operator.env["EKIBEN_CONFIG"]}
    before = os.environ.get("EKIBEN_CONFIG")
    os.environ.update(env)
    try:
        trust = trusted_keys((), stage.root)
        deployment = read_deployment(folder, trust)
        for arm in filter(None, (deployment.champion, deployment.challenger)):
            assert load_bundle(folder / "bundles" / arm.bundle, trust).digest == arm.digest
            assert arm.version in known
    finally:
        os.environ.pop("EKIBEN_CONFIG")
        if before is not None:
            os.environ["EKIBEN_CONFIG"] = before
    assert not [p for p in folder.rglob("*.tmp") if time.time() - p.stat().st_mtime > 60], "half-written files were left"
    stage.operator.do("ledger", "verify")
    return deployment.champion.version


def wait_until_served(stage: Stage, number: int, patience_s: float = 20.0) -> None:
    """Wait until the service says that it took a deployment."""
    end = time.monotonic() + patience_s
    while time.monotonic() < end:
        status = read_status(deployment_folder(stage.root))
        if status is not None and status.number >= number:
            return
        time.sleep(0.05)
    raise AssertionError(f"the service never took deployment {number}: {status}")


def callers_of(stage: Stage, running: Running, days: int = 40) -> Callers:
    return Callers(
        Orders(running.url, CreditTraffic(PLAN, 60), (PLAN.rate,) * days, PLAN.day_s, 1.0, stage.schema.classes, running.key, timeout_s=5.0)
    )


def test_a_service_killed_at_any_moment_starts_with_one_verified_version_and_keeps_every_label(stage: Stage) -> None:
    rng = random.Random(1)
    with Running(stage) as running:
        callers = callers_of(stage, running)
        try:
            for day in range(KILLS):
                callers.day(day)
                time.sleep(rng.uniform(0.3, PLAN.day_s))
                running.kill()
                assert examine(stage, {"1"}) == "1"
                running.start()
                assert running.version == "1"
            callers.day(KILLS)
            time.sleep(PLAN.day_s)
            played = callers.stop()
        finally:
            callers.close()
    assert set(played.versions) == {"1"} and {why for _, why in played.failed} <= {"connection", "timeout", "503"}
    assert len(played.late) > PLAN.rate and len(played.at) > PLAN.rate  # how long it is away says nothing of what it keeps
    assert count_labels(stage.root) >= len(played.late)
    stage.operator.do("verify")


def test_a_rollout_killed_at_any_moment_leaves_one_champion_and_fails_no_request(stage: Stage) -> None:
    rng = random.Random(2)
    hits = 0
    with Running(stage) as running:
        callers = callers_of(stage, running)
        try:
            for day in range(KILLS):
                callers.day(day)
                process = start(stage, "deploy", "2", "--reason", "try")
                time.sleep(rng.uniform(0.2, 9.0))
                hits += kill(process)
                champion = examine(stage, {"1", "2"})
                status = read_status(deployment_folder(stage.root))
                assert status is not None and status.serving in {"1", "2"}
                if champion == "2":
                    stage.operator.do("rollback", "--reason", "again")
                    assert examine(stage, {"1", "2"}) == "1"
            assert stage.operator.do("deploy", "2", "--reason", "to its end", "--json").json()["status"] == "promoted"
            assert examine(stage, {"1", "2"}) == "2"
            played = callers.stop()
        finally:
            callers.close()
    assert not played.failed and not played.labels_failed, (played.failed[:5], played.labels_failed[:5])
    assert set(played.versions) == {"1", "2"} and hits >= KILLS // 2
    assert count_labels(stage.root) >= len(played.late)


def test_a_training_killed_at_any_moment_loses_no_label_and_the_next_one_decides(stage: Stage) -> None:
    rng = random.Random(3)
    with Running(stage) as running:
        callers = callers_of(stage, running)
        try:
            for day in range(1, 5):  # of the new world
                callers.day(day)
                time.sleep(PLAN.day_s)
            told = count_labels(stage.root)
            assert told > 200
            hits = 0
            for _ in range(KILLS):
                process = start(stage, "retrain", "--quiet")
                time.sleep(rng.uniform(0.5, 40.0))
                hits += kill(process)
                assert examine(stage, {str(v) for v in range(1, 20)}) == "1"
                assert count_labels(stage.root) >= told
            done = stage.operator.do("retrain", "--json", "--quiet", fine=(0, 3)).json()
            assert done["decision"] in ("promoted", "shadow", "rejected") and done["version"]
            played = callers.stop()
        finally:
            callers.close()
    assert hits >= KILLS // 2 and not played.failed, played.failed[:5]
    assert count_labels(stage.root) >= len(played.late)
    assert examine(stage, {str(v) for v in range(1, 20)}) == "1"
