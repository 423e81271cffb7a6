"""What happens is in the ledger, once, and nothing of a person or a secret with it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from ekiben import accounted
from ekiben.accounted import account_release, is_about
from ekiben.chain import Entry
from ekiben.cli import main
from ekiben.erasure import Erasure
from ekiben.ledger import append, ledger_path, read, verify
from ekiben.runner.jobs import Runner
from ekiben.runner.plan import Plan
from ekiben.runner.screen import Screen
from ekiben.runner.settle import settle
from ekiben.runs import Layout, Run
from tiny import SETTINGS, make_project, write_notebook


@pytest.fixture(autouse=True)
def somebody(tmp_path, monkeypatch):
    """Give each test keys and a name of its own."""
    monkeypatch.setenv("EKIBEN_CONFIG", str(tmp_path / "config"))
    monkeypatch.setenv("EKIBEN_USER", "ana")
    monkeypatch.chdir(tmp_path)


def run(root: Path, **plan: Any) -> Run:
    return Runner(root, Plan(**plan), Screen(quiet=True)).execute()


def kinds(root: Path) -> list[str]:
    return [entry.what for entry in read(root)]


# --------------------------------------------------------------------------------------------- runs, gates and waivers


def test_a_run_is_entered_when_a_step_ran_and_not_when_nothing_changed(tmp_path):
    root = make_project(tmp_path / "tiny")
    done = run(root)
    (entry,) = read(root)
    assert (entry.what, entry.who) == ("run", "ana")
    assert entry.facts["run"] == done.run_id and entry.facts["status"] == "done" and entry.facts["steps"] == {"ran": ["prepare", "tune", "evaluate"]}
    before = ledger_path(root).read_bytes()
    assert all(step.status == "cached" for step in run(root).steps)
    assert ledger_path(root).read_bytes() == before
    again = run(root, force=True)
    assert read(root)[-1].facts["metrics"] == entry.facts["metrics"] and read(root)[-1].facts["run"] == again.run_id


def test_a_failed_gate_is_entered_once_and_the_waiver_that_lets_it_pass_each_time_it_is_given(tmp_path):
    root = make_project(tmp_path / "tiny", auc=0.4)
    failed = run(root)
    assert failed.exit_code == 3 and kinds(root) == ["gate", "run"]
    gate = read(root)[0]
    assert gate.facts["gate"] == "auc >= 0.5" and gate.facts["verdict"] == "fail" and gate.facts["run"] == failed.run_id
    assert run(root).exit_code == 3 and kinds(root) == ["gate", "run"]  # nothing ran, nothing new
    waived = run(root, waivers={"auc >= 0.5": "agreed with the board"})
    assert waived.exit_code == 0
    entry = read(root)[-1]
    assert (entry.what, entry.why, entry.facts["run"]) == ("waiver", "agreed with the board", waived.run_id)
    assert kinds(root) == ["gate", "run", "waiver"]


@pytest.mark.slow
def test_a_failed_and_a_resumed_run_are_entered_as_what_they_are(tmp_path):
    root = make_project(tmp_path / "tiny")
    write_notebook(root / "nbs/pipeline/02_tune.ipynb", 'upstream: list[str] = ["prepare"]', ["raise ValueError('no')"])
    failed = run(root)
    facts = read(root)[-1].facts
    assert (facts["status"], facts["exit_code"], facts["steps"]) == ("failed", 1, {"ran": ["prepare"], "failed": ["tune"]})
    run(root, resume=failed.run_id)
    assert read(root)[-1].why == f"carries on {failed.run_id}"


@pytest.mark.slow
def test_a_run_whose_runner_was_killed_is_entered_by_the_next_command(tmp_path):
    root = make_project(tmp_path / "tiny")
    write_notebook(root / "nbs/pipeline/02_tune.ipynb", 'upstream: list[str] = ["prepare"]', ["import time\ntime.sleep(60)"])
    code = f"from test_accounted import run; from pathlib import Path; run(Path({str(root)!r}))"
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    process = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)}, start_new_session=True)
    for _ in range(600):
        if list(root.glob(".ekiben/runs/*/tune.context")):
            break
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    for _ in range(100):  # the scribe may have settled it already
        settle(Layout(root))
        if ledger_path(root).is_file() and read(root):
            break
        time.sleep(0.1)
    facts = read(root)[-1].facts
    assert facts["status"] == "killed" and facts["exit_code"] == 137
    settle(Layout(root))
    assert kinds(root).count("run") == 1 and verify(root).count == len(read(root))


def test_a_ledger_that_cannot_be_written_is_said_and_the_run_keeps_its_account(tmp_path, capsys):
    root = make_project(tmp_path / "tiny")
    ledger_path(root).mkdir(parents=True)
    done = run(root)
    assert done.status == "done" and (root / "reports/runs" / done.run_id / "index.html").is_file()
    said = capsys.readouterr()
    assert "cannot be written" in " ".join((said.out + said.err).split())


@pytest.mark.slow
def test_secrets_of_a_project_do_not_reach_its_ledger(tmp_path, monkeypatch):
    secret = "postgresql://ana:correct-horse@db/x"
    root = make_project(tmp_path / "tiny", settings=SETTINGS.replace("simulated:credit", secret))
    run(root)
    append(root, "waiver", why=f"because {secret}", where=[{secret: secret}])
    assert "correct-horse" not in ledger_path(root).read_text()


# ------------------------------------------------------------------------------------------------------------ releases


def release(root: Path, version: str = "1", **changes: Any) -> list[str]:
    said = {"name": "census", "digest": "d" * 64, "alias": "champion", "replaces": "", "why": "first", "is_new": True, "run": "r1"}
    return [entry.what for entry in account_release(root, version=version, **said | changes)]


def test_a_release_is_entered_once_and_made_up_for_after_a_kill(tmp_path):
    assert release(tmp_path) == ["registration", "promotion"]
    assert release(tmp_path, is_new=False) == []
    append(tmp_path, "promotion", name="census", version="2", environment="production")
    assert release(tmp_path, "2", is_new=False) == ["registration"]  # somebody else moved the alias
    assert release(tmp_path, "3", is_new=False) == ["registration", "promotion"]  # killed after the registry, before the ledger
    assert release(tmp_path, "4", alias="challenger") == ["registration", "promotion"]
    assert release(tmp_path, "4", is_new=False, replaces="3") == ["promotion"]
    assert verify(tmp_path).count == len(read(tmp_path))


def test_a_release_is_entered_into_a_damaged_ledger_too(tmp_path):
    release(tmp_path)
    ledger_path(tmp_path).write_bytes(ledger_path(tmp_path).read_bytes().replace(b"first", b"fifth"))
    assert release(tmp_path, "2") == ["registration", "promotion"]


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({"model": "census", "version": "3"}, True),
        ({"name": "census", "version": 3}, True),
        ({"model": {"name": "census"}, "version": "3"}, True),
        ({"name": "census", "version": "4", "back_to": "3"}, True),
        ({"name": "other", "version": "3"}, False),
        ({"name": "census", "version": "33"}, False),
        ({"version": "3"}, False),
        ({}, False),
    ],
)
def test_entries_are_told_apart_by_model_and_version(facts, expected):
    entry = Entry(number=1, time="", who="", what="promotion", why="", facts=facts, key="", previous="")
    assert is_about(entry, "census", "3") is expected and not is_about(entry, "census", "")


# ----------------------------------------------------------------------------------------------------- keys, erasures


def test_changes_of_keys_are_entered_without_the_keys(tmp_path, capsys):
    root = make_project(tmp_path / "tiny")
    words = []
    for command in (["add", "shop", "--role", "predict", "--days", "9"], ["rotate", "shop", "--grace", "1h"]):
        assert main(["keys", *command, "--project", str(root)]) == 0
        words.append(capsys.readouterr().out.strip())
    assert main(["keys", "revoke", "shop", "--project", str(root)]) == 0
    os.chdir(root)
    assert main(["keys", "signing"]) == 0
    assert main(["keys", "signing"]) == 0  # made once
    assert main(["keys", "signing", "--rotate"]) == 0
    entries = read(root)
    assert [(e.facts["change"], e.facts["kind"]) for e in entries] == [
        ("made", "caller"), ("rotated", "caller"), ("revoked", "caller"), ("revoked", "caller"), ("made", "signing"), ("rotated", "signing"),
    ]  # fmt: skip
    raw = ledger_path(root).read_text()
    assert all(word and word not in raw and word.split(".")[-1] not in raw for word in words)
    assert entries[0].facts["roles"] == ["predict"] and entries[1].facts["replaces"] == entries[0].facts["id"]


def test_keys_of_another_file_and_outside_of_a_project_are_nobodys_account(tmp_path):
    root = make_project(tmp_path / "tiny")
    os.chdir(root)
    assert main(["keys", "add", "shop", "--file", str(tmp_path / "other.json")]) == 0
    os.chdir(tmp_path)
    assert main(["keys", "signing"]) == 0
    assert read(root) == [] and not (tmp_path / ".ekiben").exists()


def test_an_erasure_names_the_column_and_never_the_person(tmp_path):
    assert accounted.account_erasure(tmp_path, Erasure(time="t", column="mail")) is None
    accounted.account_erasure(tmp_path, Erasure(time="t", column="mail", predictions=2, files=1, mentions=["reports/ana@example.org.html"]))
    assert "ana@example.org" not in ledger_path(tmp_path).read_text()
    assert read(tmp_path)[0].facts == {"column": "mail", "predictions": 2, "feedback": 0, "files": 1, "tables": {}, "mentions": 1}


# -------------------------------------------------------------------------------------------------------- the command


def called(capsys, *words: str) -> tuple[int, str, str]:
    code = main(["ledger", *words])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_the_command_shows_filters_and_verifies(tmp_path, capsys, monkeypatch):
    root = make_project(tmp_path / "tiny")
    where = ("--project", str(root))
    assert called(capsys, *where)[:2] == (0, "the ledger has no entry yet\n")
    assert called(capsys, "verify", *where)[:2] == (0, "the ledger has no entry yet\n")
    append(root, "waiver", why="a short month [really]", gate="auc >= 0.9")
    append(root, "promotion", model="census", version="4", alias="champion")
    code, said, _ = called(capsys, *where)
    assert code == 0 and "auc >= 0.9" in said and "a short month [really]" in said and "version 4" in said
    assert "version 4" not in called(capsys, "--what", "waiver", *where)[1]
    assert "no such entry" in called(capsys, "--since", "2999-01-01", *where)[1]
    assert len(json.loads(called(capsys, "--since", "1h", "--json", *where)[1])) == 2
    code, said, _ = called(capsys, "verify", *where)
    assert code == 0 and said.startswith("2 entries since ") and "word 2:" in said
    word = said.split("word ")[1].split("\n")[0]
    assert called(capsys, "verify", "--known", word, *where)[0] == 0
    assert json.loads(called(capsys, "verify", "--json", *where)[1])["count"] == 2
    path = ledger_path(root)
    path.write_bytes(path.read_bytes().replace(b"short", b"shark"))
    code, out, err = called(capsys, "verify", *where)
    assert (code, out) == (1, "") and err.count("\n") == 1 and err.startswith("error: entry 1 of the ledger")


@pytest.mark.parametrize("words", [("prove",), ("--what", "promotions"), ("--since", "yesterday"), ("verify", "--known", "4")])
def test_a_wrong_call_ends_with_2(tmp_path, capsys, words):
    root = make_project(tmp_path / "tiny")
    append(root, "run")
    code, _, err = called(capsys, *words, "--project", str(root))
    assert code == 2 and err.count("\n") == 1
