"""However a step or its runner ends, run.json, the notebook, the page, the terminal and the CI service say what happened."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from tiny import SETTINGS, TUNE, empty_tracking_store, hear_ctrl_c, make_project, write_notebook

from ekiben.errors import EkibenError, StepError
from ekiben.records import Judgement, Measure
from ekiben.runner.annotate import annotate, code_quality, findings, github_command, line_of_cell, position, summary_table
from ekiben.runner.closing import closing_table, next_command
from ekiben.runner.expected import remaining_s
from ekiben.runner.failure import Failure, read_failure
from ekiben.runner.leftovers import end_in_mlflow, mark_killed, remove_abandoned
from ekiben.runner.account import check_writable
from ekiben.runner.notebooks import execute
from ekiben.runner.screen import Patient, Screen
from ekiben.runner.settle import settle
from ekiben.runs import Layout, Run, StepRun, read_runs, write_run
from ekiben.context import StepContext

PATIENCE_S = 120
EKIBEN = [sys.executable, "-c", "import sys; from ekiben.cli import main; sys.exit(main(sys.argv[1:]))"]
SLEEP = "from pathlib import Path\nimport time\nPath('../../began').touch()\ntime.sleep(100)"
UPSTREAM = 'upstream: list[str] = ["prepare"]\nfactor: int = 2'


def settings_with(**pipeline: object) -> str:
    """The tiny project's settings with other values in [pipeline]."""
    values = {"step_timeout_s": 60, **pipeline}
    lines = "\n".join(f"{name} = {value}" for name, value in values.items())
    return SETTINGS.replace("step_timeout_s = 60", lines)


def wait_for(path: Path) -> None:
    until = time.monotonic() + PATIENCE_S
    while not path.exists():
        assert time.monotonic() < until, f"{path} never came"
        time.sleep(0.05)


def last_run(root: Path) -> Run:
    return read_runs(Layout(root))[0]


def states(notebook: Path) -> list[str]:
    cells = json.loads(notebook.read_text())["cells"]
    return [c["metadata"]["papermill"]["status"] for c in cells if c["cell_type"] == "code"]


def errors_in(notebook: Path) -> list[str]:
    cells = json.loads(notebook.read_text())["cells"]
    return [o["ename"] for c in cells for o in c.get("outputs", []) if o["output_type"] == "error"]


# --- every way a step can end


@dataclass(frozen=True)
class Fault:
    """What a cell does, or what is sent to the runner while it runs, and what is said of it."""

    cell: str
    ename: str
    words: str
    settings: str = SETTINGS
    send: int = 0
    status: str = "failed"
    code: int = 1


FAULTS = {
    "an exception": Fault("raise ValueError('no such thing')", "ValueError", "ValueError: no such thing"),
    "os._exit": Fault("import os\nos._exit(3)", "DeadKernelError", "exit code 3"),
    "a segmentation fault": Fault("import ctypes\nctypes.string_at(0)", "DeadKernelError", "signal 11"),
    "a kill": Fault("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", "DeadKernelError", "signal 9; out of memory?"),
    "the cell's time": Fault(SLEEP, "CellTimeoutError", "[pipeline] cell_timeout_s = …", settings_with(cell_timeout_s=10)),
    "the step's time": Fault(SLEEP, "StepTimeoutError", "[pipeline] step_timeout_s = …", settings_with(step_timeout_s=30)),
    "Ctrl-C": Fault(SLEEP, "KeyboardInterrupt", "interrupted", send=signal.SIGINT, status="interrupted", code=130),
    "SIGTERM": Fault(SLEEP, "KeyboardInterrupt", "interrupted", send=signal.SIGTERM, status="interrupted", code=130),
    "SIGKILL": Fault(SLEEP, "RunnerKilled", "the runner was killed while it ran", send=signal.SIGKILL, status="killed", code=137),
}


SLOW = ("the cell's time", "the step's time")  # short times would be used up by the imports of a busy machine


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in FAULTS])
def test_however_a_step_ends_everything_says_the_same(tmp_path: Path, name: str) -> None:
    fault = FAULTS[name]
    root = make_project(tmp_path / "tiny", settings=fault.settings)
    write_notebook(root / "nbs/pipeline/02_tune.ipynb", UPSTREAM, [TUNE[0], fault.cell, "print('after')"])
    process = subprocess.Popen([*EKIBEN, "run"], cwd=root, stderr=subprocess.PIPE, text=True, preexec_fn=hear_ctrl_c)
    if fault.send:
        wait_for(root / "began")
        process.send_signal(fault.send)
    _, said = process.communicate(timeout=PATIENCE_S)
    if fault.send == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
        subprocess.run([sys.executable, "-m", "ekiben.runner.settle", str(root)], check=True, timeout=PATIENCE_S)
        wait_until_settled(root)
    else:
        assert process.returncode == fault.code, said

    run = last_run(root)
    assert (run.status, run.exit_code) == (fault.status, fault.code)
    assert {s.name: s.status for s in run.steps} == {"prepare": "ran", "tune": "failed", "evaluate": "skipped"}
    step = next(s for s in run.steps if s.status == "failed")
    assert (step.cell, step.ename) == (4, fault.ename)
    assert fault.words in step.error and "\n" not in step.error and "\n" not in run.error
    assert step.seconds > 0

    assert states(root / step.notebook) == ["completed", "completed", "failed", "pending"]
    assert errors_in(root / step.notebook) == [fault.ename]
    page = (root / step.html).read_text()
    assert 'href="#cell-4">cell 4</a>' in page and 'id="cell-4"' in page and fault.ename in page
    told = (root / "reports/runs" / run.run_id / "index.html").read_text()
    assert 'href="02_tune.html#cell-4"' in told and f"ekiben resume {run.run_id}" in told
    assert f'<span class="badge {fault.status}">' in (root / "reports/index.html").read_text()
    for pattern in ("*.tmp", "*.context", "*.progress", "*.cell", "alive"):
        assert not list(root.rglob(pattern))

    shown = said if fault.send != signal.SIGKILL else text_of(closing_table(run, root), 100)
    assert f"ekiben resume {run.run_id}\n" in shown and f"ekiben debug {run.run_id}\n" in shown
    assert step.notebook in shown and f"{step.html}#cell-4" in shown and "tune, cell 4" in shown


def wait_until_settled(root: Path) -> None:
    until = time.monotonic() + PATIENCE_S
    while last_run(root).status == "running" or list(root.rglob("alive")):  # the process that forks kernels may be at it
        assert time.monotonic() < until, last_run(root)
        time.sleep(0.1)


def text_of(what: Any, width: int) -> str:
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    console.print(what, crop=False)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("content", "words"),
    [("print('hello')", "does not appear to be JSON"), ("[]", "is no notebook"), ("{}", "missing"), ("", "is no notebook")],
)
def test_a_file_that_is_no_notebook_is_one_line_and_exit_2(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "01_tiny.ipynb").write_text(content)
    context = StepContext(root=str(tmp_path), run_id="r", step="tiny")
    with pytest.raises(StepError, match=words) as caught:
        execute(
            tmp_path / "01_tiny.ipynb", tmp_path / "out.ipynb", step="tiny", parameters={}, context=context, layout=Layout(tmp_path), timeout_s=60
        )
    assert caught.value.code == 2 and "01_tiny.ipynb" in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("*.context"))


def test_a_folder_that_cannot_be_written_to_is_told_before_anything_starts(tmp_path: Path) -> None:
    check_writable(Layout(tmp_path / "good"))
    assert not list((tmp_path / "good/reports").rglob("*.*"))
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/reports").write_text("a file where the folder should be")
    with pytest.raises(EkibenError, match="cannot write to reports/runs: ") as caught:
        check_writable(Layout(tmp_path / "bad"))
    assert caught.value.exit_code == 1 and "\n" not in str(caught.value)


def test_a_full_disk_is_told_with_what_was_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    import papermill

    root = make_project(tmp_path / "tiny")
    executed = root / "out.ipynb"
    cells = [{"cell_type": "code", "metadata": {"papermill": {"status": s}}} for s in ("completed", "completed", "running", "pending")]
    executed.write_text(json.dumps({"cells": cells}))

    def fill(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(executed))

    monkeypatch.setattr(papermill, "execute_notebook", fill)
    with pytest.raises(StepError) as caught:
        execute(
            root / "nbs/pipeline/02_tune.ipynb",
            executed,
            step="tune",
            parameters={},
            context=StepContext(root=str(root), run_id="r", step="tune"),
            layout=Layout(root),
            timeout_s=60,
        )
    assert str(caught.value) == "tune: No space left on device while saving; out.ipynb holds its first 2 of 4 cells"
    assert caught.value.code == 1


# --- settling the account of a killed runner


def make_killed(root: Path, run_id: str = "20261120-153244-3f9a", *, cell: str = "running") -> Layout:
    """A project as it is found after its runner was killed while `tune` ran its third code cell."""
    make_project(root)
    layout = Layout(root)
    settings = {"pipeline": {"name": "tiny", "notebooks": "nbs/pipeline", "tracking_uri": "sqlite:///mlflow.db"}}
    prepare = StepRun(name="prepare", status="ran", seconds=1.0)
    write_run(layout, Run(run_id=run_id, status="running", started="2026-11-20T15:32:44+00:00", settings=settings, steps=[prepare]))
    made = [
        {
            "cell_type": "code",
            "id": f"cell{i}",
            "source": f"cell({i})",
            "metadata": {"papermill": {"status": status}},
            "outputs": [],
            "execution_count": None,
        }
        for i, status in enumerate(["completed", "completed", cell, "pending"])
    ]
    notebook = {"cells": made, "metadata": {"papermill": {}}, "nbformat": 4, "nbformat_minor": 5}
    (layout.report(run_id) / "02_tune.ipynb").write_text(json.dumps(notebook))
    layout.context(run_id, "tune").parent.mkdir(parents=True, exist_ok=True)
    layout.context(run_id, "tune").write_bytes(StepContext(root=str(root), run_id=run_id, step="tune").to_json())
    layout.context(run_id, "tune").with_suffix(".progress").write_text("{}")
    layout.alive(run_id).touch()
    return layout


def test_settling_tells_what_was_running_and_what_never_began(tmp_path: Path) -> None:
    layout = make_killed(tmp_path / "tiny")
    assert settle(layout) == ["20261120-153244-3f9a"]
    run = last_run(layout.root)
    assert (run.status, run.exit_code) == ("killed", 137)
    assert [(s.name, s.status, s.cell, s.ename) for s in run.steps] == [
        ("prepare", "ran", 0, ""),
        ("tune", "failed", 3, "RunnerKilled"),
        ("evaluate", "skipped", 0, ""),
    ]
    assert run.error == "the runner was killed while tune, cell 3 ran"
    assert states(layout.root / run.steps[1].notebook) == ["completed", "completed", "failed", "pending"]
    assert settle(layout) == []


def test_settling_twice_and_by_many_at_once_is_settling_once(tmp_path: Path) -> None:
    layout = make_killed(tmp_path / "tiny")
    command = [sys.executable, "-m", "ekiben.runner.settle", str(layout.root)]
    several = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    said = [process.communicate(timeout=PATIENCE_S) for process in several]
    assert [process.returncode for process in several] == [0, 0, 0], said
    assert "".join(out for out, _ in said).count("was killed") == 1
    assert errors_in(layout.root / last_run(layout.root).steps[1].notebook) == ["RunnerKilled"]


@pytest.mark.parametrize("after", ["notebook", "run.json"])
def test_a_settler_that_is_itself_killed_leaves_work_that_the_next_one_finishes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: str
) -> None:
    layout = make_killed(tmp_path / "tiny")
    module = sys.modules["ekiben.runner.settle"]
    with monkeypatch.context() as broken, pytest.raises(KeyboardInterrupt):
        name = "write_run" if after == "notebook" else "end_in_mlflow"
        broken.setattr(module, name, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        settle(layout)
    settle(layout)
    run = last_run(layout.root)
    assert run.status == "killed" and run.steps[1].cell == 3
    assert errors_in(layout.root / run.steps[1].notebook) == ["RunnerKilled"]
    assert not layout.alive(run.run_id).exists() and not list(layout.root.rglob("*.context"))


def test_a_live_run_is_left_alone(tmp_path: Path) -> None:
    import fcntl

    layout = make_killed(tmp_path / "tiny")
    before = {path: path.read_bytes() for path in layout.root.rglob("*") if path.is_file()}
    with layout.alive("20261120-153244-3f9a").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert settle(layout) == []
    assert {path: path.read_bytes() for path in layout.root.rglob("*") if path.is_file()} == before


def test_a_run_that_has_only_just_begun_is_left_alone(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    alive = layout.alive("20261120-153244-3f9a")
    alive.parent.mkdir(parents=True)
    alive.touch()
    assert settle(layout) == [] and alive.exists()
    os.utime(alive, (0, 0))
    assert settle(layout) == [] and not alive.exists()


def test_nothing_is_read_where_nothing_is_to_settle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = make_killed(tmp_path / "tiny")
    settle(layout)
    monkeypatch.setattr(Run, "from_json", lambda *_: pytest.fail("a run.json was read"))
    assert settle(layout) == []


@pytest.mark.parametrize(
    ("saved", "mark", "after", "cell"),
    [
        (["pending", "pending", "pending"], "start 1", ["failed", "pending", "pending"], 2),
        (["completed", "running", "pending"], "start 3", ["completed", "completed", "failed"], 4),
        (["completed", "running", "pending"], "done 2", ["completed", "completed", "pending"], 0),
        (["completed", "running", "pending"], "failed 2", ["completed", "failed", "pending"], 3),
        (["completed", "running", "pending"], "", ["completed", "failed", "pending"], 3),
        (["completed", "failed", "pending"], "failed 2", ["completed", "failed", "pending"], 3),
    ],
)
def test_a_notebook_saved_a_moment_before_the_kill_is_brought_to_where_it_was(
    tmp_path: Path, saved: list[str], mark: str, after: list[str], cell: int
) -> None:
    made: list[dict[str, Any]] = [{"cell_type": "markdown", "metadata": {"papermill": {"status": "pending"}}}]
    made += [{"cell_type": "code", "metadata": {"papermill": {"status": status}}, "outputs": []} for status in saved]
    (tmp_path / "n.ipynb").write_text(json.dumps({"cells": made, "metadata": {}}))
    (tmp_path / "n.cell").write_text(mark)
    number, ename, text = mark_killed(tmp_path / "n.ipynb", tmp_path / "n.cell")
    assert states(tmp_path / "n.ipynb") == after
    assert (number, ename) == (cell, "RunnerKilled" if cell else "")
    assert ("was not saved" in text) == (mark == "start 3")


@pytest.mark.parametrize(("result", "status"), [("done", "ran"), ("running", "failed")])
def test_a_step_that_ended_just_before_the_kill_is_told_as_its_result_says(tmp_path: Path, result: str, status: str) -> None:
    from ekiben.runs import StepResult

    layout = make_killed(tmp_path / "tiny", cell="completed")
    run_id = last_run(layout.root).run_id
    layout.context(run_id, "tune").unlink()
    made = StepResult(step="tune", run_id=run_id, started="2026-11-20T15:33:00+00:00", status=result, seconds=4.0)  # type: ignore[arg-type]
    layout.result(run_id, "tune").write_bytes(made.to_json())
    settle(layout)
    step = last_run(layout.root).steps[1]
    assert (step.name, step.status) == ("tune", status)
    assert StepResult.from_json(layout.result(run_id, "tune").read_bytes()).status == ("done" if result == "done" else "failed")
    assert step.error == ("" if result == "done" else "the runner was killed before it could write down how this step ended")


def test_a_cell_that_had_failed_by_itself_keeps_its_error(tmp_path: Path) -> None:
    layout = make_killed(tmp_path / "tiny", cell="failed")
    notebook = layout.report("20261120-153244-3f9a") / "02_tune.ipynb"
    content = json.loads(notebook.read_text())
    content["cells"][2]["outputs"] = [{"output_type": "error", "ename": "ValueError", "evalue": "no trial\nat all", "traceback": []}]
    notebook.write_text(json.dumps(content))
    settle(layout)
    step = last_run(layout.root).steps[1]
    assert (step.cell, step.ename, step.error) == (3, "ValueError", "ValueError: no trial")


def test_a_project_that_was_edited_since_is_settled_too(tmp_path: Path) -> None:
    layout = make_killed(tmp_path / "tiny")
    (layout.root / "settings.ini").write_text("[pipeline]\nno such key = 1\n")
    settle(layout)
    assert [s.name for s in last_run(layout.root).steps] == ["prepare", "tune"]


def test_what_was_open_in_mlflow_is_killed_there_and_nothing_else(tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    (tmp_path / "mlflow.db").write_bytes(empty_tracking_store())
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    runs = {}
    for run_id in ("killed", "alive"):
        runs[run_id] = client.create_run("0", tags={"ekiben.run_id": run_id}).info.run_id
        runs[f"{run_id} step"] = client.create_run("0", tags={"mlflow.parentRunId": runs[run_id]}).info.run_id
        runs[f"{run_id} trial"] = client.create_run("0", tags={"mlflow.parentRunId": runs[f"{run_id} step"]}).info.run_id
    done = client.create_run("0", tags={"mlflow.parentRunId": runs["killed"]}).info.run_id
    client.set_terminated(done, "FINISHED")
    assert end_in_mlflow(tmp_path, "sqlite:///mlflow.db", "killed")
    found = {name: client.get_run(run_id).info for name, run_id in runs.items()}
    assert {name: info.status for name, info in found.items()} == {
        name: "RUNNING" if name.startswith("alive") else "KILLED" for name in runs
    }
    assert all(info.end_time for name, info in found.items() if name.startswith("killed"))
    assert client.get_run(done).info.status == "FINISHED"
    assert not end_in_mlflow(tmp_path, "sqlite:///nowhere.db", "killed")
    (tmp_path / "broken.db").write_text("no database")
    assert not end_in_mlflow(tmp_path, "sqlite:///broken.db", "killed")


def test_only_temporary_files_that_nobody_writes_to_are_removed(tmp_path: Path) -> None:
    names = {"left": ".run.json.a1b2.tmp", "held": ".tune.json.c3d4.tmp", "visible": "notes.tmp", "other": ".hidden"}
    for name in names.values():
        (tmp_path / name).write_text("x")
    code = f"import sys\nf = open({str(tmp_path / names['held'])!r}, 'a')\nprint('open', flush=True)\nsys.stdin.read()"
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "open\n"
    assert [path.name for path in remove_abandoned([tmp_path])] == [names["left"]]
    holder.communicate("", timeout=PATIENCE_S)
    assert [path.name for path in remove_abandoned([tmp_path])] == [names["held"]]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([names["visible"], names["other"]])


# --- what a failed step shows

TRACEBACK = """\x1b[31m---------------------------------------------------------------------------\x1b[39m
\x1b[31mZeroDivisionError\x1b[39m                         Traceback (most recent call last)
\x1b[36mCell\x1b[39m\x1b[36m \x1b[39m\x1b[32mIn[3]\x1b[39m\x1b[32m, line 2\x1b[39m
\x1b[32m      1\x1b[39m rows = load()
\x1b[32m----> \x1b[39m\x1b[32m2\x1b[39m share(rows)

\x1b[36mFile \x1b[39m\x1b[32m{module}:4\x1b[39m, in \x1b[36mshare\x1b[39m\x1b[34m(rows)\x1b[39m
\x1b[32m      3\x1b[39m def share(rows):
\x1b[32m----> \x1b[39m\x1b[32m4\x1b[39m     return mean(rows)

\x1b[36mFile \x1b[39m\x1b[32m/usr/lib/python3/statistics.py:99\x1b[39m, in \x1b[36mmean\x1b[39m\x1b[34m(data)\x1b[39m
\x1b[32m---> \x1b[39m\x1b[32m99\x1b[39m     return total / n

\x1b[31mZeroDivisionError\x1b[39m: 100 % of
nothing"""


def failed_run(root: Path, *, ename: str = "ZeroDivisionError", injected: bool = False, indent: int | None = 1) -> Run:
    """A run of the tiny project whose tune failed in line 2 of its third cell."""
    make_project(root)
    source = root / "nbs/pipeline/02_tune.ipynb"
    write_notebook(source, UPSTREAM, [TUNE[0], "rows = load()\nshare(rows)", "print('after')"])
    content = json.loads(source.read_text())
    for cell in content["cells"]:
        cell["source"] = cell["source"].splitlines(keepends=True)
    source.write_text(json.dumps(content, indent=indent, sort_keys=True))
    traceback = TRACEBACK.replace("{module}", str(root / "src/tiny/helper.py")).split("\n")
    cell = content["cells"][1 if injected else 3]
    failing = {**cell, "outputs": [{"output_type": "error", "ename": ename, "evalue": "100 % of\nnothing", "traceback": traceback}]}
    if injected:
        failing.update(id="0a1b", source=["factor = 3\n", "seed = 1"], metadata={"tags": ["injected-parameters"]})
    executed = root / "reports/runs/20261120-153244-3f9a/02_tune.ipynb"
    executed.parent.mkdir(parents=True)
    executed.write_text(json.dumps({**content, "cells": [*content["cells"][:3], failing]}))
    steps = [
        StepRun(name="prepare", status="cached", why="unchanged since 20261119-101500-77aa"),
        StepRun(
            name="tune",
            status="failed",
            seconds=12.3,
            cell=4,
            ename=ename,
            error=f"{ename}: 100 % of (tune, cell 4; executed notebook: reports/runs/20261120-153244-3f9a/02_tune.ipynb)",
            notebook="reports/runs/20261120-153244-3f9a/02_tune.ipynb",
            html="reports/runs/20261120-153244-3f9a/02_tune.html",
        ),
        StepRun(name="evaluate", status="skipped", why="an earlier step failed"),
    ]
    return Run(
        run_id="20261120-153244-3f9a",
        status="failed",
        started="2026-11-20T15:32:44Z",
        seconds=13.0,
        steps=steps,
        error=steps[1].error,
        settings={"pipeline": {"notebooks": "nbs/pipeline"}},
    )


def test_a_failure_shows_the_last_lines_of_the_users_own_code(tmp_path: Path) -> None:
    run = failed_run(tmp_path / "tiny")
    failure = read_failure(tmp_path / "tiny", run.steps[1])
    assert failure.excerpt == (
        f"File {tmp_path / 'tiny/src/tiny/helper.py'}:4, in share(rows)",
        "      3 def share(rows):",
        "----> 4     return mean(rows)",
    )
    assert (failure.line, failure.first_line) == (2, "rows = load()")
    assert failure.headline == "ZeroDivisionError: 100 % of"
    assert "\x1b" not in "".join(failure.traceback)


def test_an_error_that_says_it_all_is_shown_without_source(tmp_path: Path) -> None:
    run = failed_run(tmp_path / "tiny", ename="DataError")
    failure = read_failure(tmp_path / "tiny", run.steps[1])
    assert failure.excerpt == () and failure.headline == "100 % of"


@pytest.mark.parametrize("width", [40, 60, 100])
def test_files_and_commands_are_whole_at_any_width(tmp_path: Path, width: int) -> None:
    run = failed_run(tmp_path / "tiny")
    lines = [line.strip() for line in text_of(closing_table(run, tmp_path / "tiny"), width).splitlines()]
    assert f"resume    ekiben resume {run.run_id}" in lines
    assert f"debug     ekiben debug {run.run_id}" in lines
    assert f"notebook  {run.steps[1].notebook}" in lines
    assert all(len(line) <= width for line in lines if line.startswith(("│", "╭", "╰")))


@pytest.mark.parametrize(
    ("status", "steps", "command"),
    [
        ("done", True, "ekiben run"),
        ("failed", True, "ekiben resume r1"),
        ("interrupted", True, "ekiben resume r1"),
        ("killed", True, "ekiben resume r1"),
        ("failed", False, "ekiben run"),
        ("running", True, ""),
    ],
)
def test_each_status_has_its_next_command(status: Any, steps: bool, command: str) -> None:
    run = Run(run_id="r1", status=status, started="", steps=[StepRun(name="tune", status="failed", cell=2)] if steps else [])
    assert next_command(run) == command
    shown = text_of(closing_table(run), 60)
    assert command in shown
    assert ("ekiben debug r1" in shown) == (status in ("failed", "interrupted", "killed") and steps)


# --- the screen


def test_steps_side_by_side_are_shown_with_cells_trials_and_what_waits(tmp_path: Path) -> None:
    (tmp_path / "tune.progress").write_text('{"done": 12, "total": 40, "text": "trial 12, best 0.9283"}')
    screen = Screen(Console(width=60, file=io.StringIO()))
    expected = {"prepare": 3.0, "tune": 60.0, "explore": 8.0, "evaluate": 6.0}
    screen.begin("r1", [*expected], expected, upstream={"explore": ["prepare"], "tune": ["prepare"], "evaluate": ["tune", "explore"]}, jobs=2)
    screen.done(StepRun(name="prepare", status="ran", seconds=3.1, why="cell 2 changed"))
    screen.start("tune", "its input changed", tmp_path / "tune.progress")
    screen.start("explore", "its input changed", None)
    screen.cell("tune", "start", 4, 9)
    screen.cell("explore", "done", 2, 3)
    lines = text_of(screen, 60).splitlines()
    assert lines[0].split() == ["✓", "prepare", "3.1", "s", "cell", "2", "changed"]
    assert "tune" in lines[1] and "cell 4/9" in lines[1] and "of about 1 min" in lines[1]
    assert lines[2].strip() == "trial 12, best 0.9283"
    assert "explore" in lines[3] and "cell 3/3" in lines[3]
    assert lines[4].split() == ["·", "evaluate", "waits", "for", "tune,", "explore"]
    assert "about 1 min 6 s left" in lines[5]
    assert max(map(len, lines)) <= 60


def test_a_log_hears_of_a_long_step_now_and_then(tmp_path: Path) -> None:
    (tmp_path / "tune.progress").write_text('{"text": "trial 12, best 0.9283"}')
    out = io.StringIO()
    screen = Screen(Console(width=100, file=out), every_s=0.05)
    screen.begin("r1", ["tune"], {})
    screen.start("tune", "forced", tmp_path / "tune.progress")
    screen.cell("tune", "start", 4, 9)
    until = time.monotonic() + PATIENCE_S
    while "trial 12" not in out.getvalue() and time.monotonic() < until:
        time.sleep(0.02)
    screen.done(StepRun(name="tune", status="ran", seconds=61.0, why="forced"))
    screen.end(Run(run_id="r1", status="done", started=""))
    said = out.getvalue().splitlines()
    assert said[:2] == ["run r1", "  tune: running (forced)"]
    assert said[2].startswith("  tune: cell 4/9, 0.") and said[2].endswith("s, trial 12, best 0.9283")


def test_a_screen_may_be_told_from_many_threads_while_it_draws() -> None:
    out = io.StringIO()
    screen = Screen(Console(width=60, file=out, force_terminal=True))
    names = [f"step{i}" for i in range(8)]
    screen.begin("r1", names, {})
    problems: list[BaseException] = []

    def one(name: str) -> None:
        try:
            screen.start(name, "forced", None)
            for number in range(1, 50):
                screen.cell(name, "start", number, 50)
                text_of(screen, 60)
            screen.done(StepRun(name=name, status="ran"))
        except BaseException as exc:
            problems.append(exc)

    threads = [threading.Thread(target=one, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    screen.end(Run(run_id="r1", status="done", started=""))
    assert problems == []
    assert sorted(entry.name for entry in screen.lines) == names and not screen.running and not screen.waiting


@pytest.mark.parametrize("terminal", [False, True])
def test_a_reader_who_leaves_does_not_end_the_run(terminal: bool) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    screen = Screen(Patient(file=os.fdopen(writing, "w"), force_terminal=terminal))
    screen.begin("r1", ["tune"], {})
    screen.start("tune", "forced", None)
    screen.done(StepRun(name="tune", status="ran"))
    screen.end(Run(run_id="r1", status="done", started=""), problem="MLflow: gone")


def test_a_closed_standard_error_does_not_end_the_run(tmp_path: Path) -> None:
    root = make_project(tmp_path / "tiny")
    done = subprocess.run(["sh", "-c", 'exec "$@" 2>&-', "sh", *EKIBEN, "run", "--only", "prepare"], cwd=root, check=False, timeout=PATIENCE_S)
    assert done.returncode == 0
    assert last_run(root).status == "done"


@given(st.lists(st.floats(0.1, 100), min_size=1, max_size=6), st.integers(1, 6), st.data())
def test_the_time_left_lies_between_the_longest_chain_and_the_sum(times: list[float], jobs: int, data: st.DataObject) -> None:
    names = [f"s{i}" for i in range(len(times))]
    expected = dict(zip(names, times, strict=True))
    upstream = {name: data.draw(st.lists(st.sampled_from(names[:i]), unique=True)) if i else [] for i, name in enumerate(names)}
    chain: dict[str, float] = {}
    for name in names:
        chain[name] = expected[name] + max((chain[n] for n in upstream[name]), default=0.0)
    left = remaining_s(names, {}, expected, upstream, jobs)
    assert left is not None
    assert max(max(chain.values()), sum(times) / jobs) - 1e-6 <= left <= sum(times) + 1e-6
    if jobs == 1:
        assert left == pytest.approx(sum(times))


def test_a_step_never_timed_leaves_the_end_open() -> None:
    assert remaining_s(["tune"], {}, {}, {}, 1) is None
    assert remaining_s([], {"tune": 90.0}, {"tune": 60.0}, {}, 1) == 0.0


# --- CI services


def test_a_failed_step_is_annotated_at_the_line_of_its_cell(tmp_path: Path) -> None:
    root = tmp_path / "tiny"
    run = failed_run(root)
    out = io.StringIO()
    annotate(run, root, {"GITHUB_ACTIONS": "true"}, out=out)
    lines = (root / "nbs/pipeline/02_tune.ipynb").read_text().splitlines()
    line = next(i for i, text in enumerate(lines, start=1) if "share(rows)" in text)
    assert out.getvalue() == (
        f"::error file=nbs/pipeline/02_tune.ipynb,line={line},title=tune failed in cell 4::"
        f"ZeroDivisionError: 100 %25 of%0AFile {root / 'src/tiny/helper.py'}:4, in share(rows)"
        "%0A      3 def share(rows):%0A----> 4     return mean(rows)\n"
    )


def test_a_project_in_a_folder_of_its_repository_is_annotated_from_there(tmp_path: Path) -> None:
    run = failed_run(tmp_path / "models/tiny")
    out = io.StringIO()
    annotate(run, tmp_path / "models/tiny", {"GITHUB_ACTIONS": "true", "GITHUB_WORKSPACE": str(tmp_path)}, out=out)
    assert out.getvalue().startswith("::error file=models/tiny/nbs/pipeline/02_tune.ipynb,line=")


def test_a_failure_in_given_parameters_is_shown_at_the_parameters_cell(tmp_path: Path) -> None:
    root = tmp_path / "tiny"
    run = failed_run(root, injected=True)
    finding = findings(run, root)[0]
    assert 'upstream: list[str] = [\\"prepare\\"]' in (root / finding.path).read_text().splitlines()[finding.line - 1]


@pytest.mark.parametrize("indent", [None, 0, 1, 4])
def test_the_line_is_right_however_the_file_is_laid_out(tmp_path: Path, indent: int | None) -> None:
    root = tmp_path / "tiny"
    run = failed_run(root, indent=indent)
    finding = findings(run, root)[0]
    assert "share(rows)" in (root / finding.path).read_text().splitlines()[finding.line - 1]


def test_a_notebook_that_is_gone_or_broken_is_annotated_all_the_same(tmp_path: Path) -> None:
    root = tmp_path / "tiny"
    run = failed_run(root)
    (root / run.steps[1].notebook).unlink()
    assert (findings(run, root)[0].line, findings(run, root)[0].text) == (1, "ZeroDivisionError: 100 % of")
    (root / "nbs/pipeline/02_tune.ipynb").write_text("{")
    assert line_of_cell(root / "nbs/pipeline/02_tune.ipynb", Failure(step="tune", cell=4, cell_id="cell2")) == 1


def test_what_would_end_a_workflow_command_is_escaped() -> None:
    from ekiben.runner.annotate import Finding

    finding = Finding(level="warning", title="50 %: a, b\r\n", text="50 %: a, b\r\n::error::x", path="a,b:c.ipynb", line=3)
    assert github_command(finding) == (
        "::warning file=a%2Cb%3Ac.ipynb,line=3,title=50 %25%3A a%2C b%0D%0A::50 %25: a, b%0D%0A::error::x"
    )


def judged(name: str, verdict: Any, *, blocking: bool = True, waived: str = "") -> Judgement:
    metric, _, limit = name.split()
    return Judgement(
        name=name, metric=metric, slice="", op=">=", limit=float(limit), value=0.7, low=0.65, high=0.75, verdict=verdict, blocking=blocking, waived=waived
    )


def test_gates_are_annotated_at_their_lines_in_the_settings(tmp_path: Path) -> None:
    root = make_project(tmp_path / "tiny", settings=SETTINGS + "# accuracy >= 0.7 was too much\n    accuracy >= 0.7\n    f1 >= 0.5\n    brier >= 0.9\n")
    gates = [
        judged("auc >= 0.5", "pass"),
        judged("accuracy >= 0.7", "insufficient"),
        judged("f1 >= 0.5", "fail"),
        judged("brier >= 0.9", "fail", waived="a pilot"),
    ]
    run = Run(run_id="r1", status="gate_failed", started="", gates=gates, exit_code=3)
    out = io.StringIO()
    annotate(run, root, {"GITHUB_ACTIONS": "true"}, out=out)
    assert out.getvalue().splitlines() == [
        "::warning file=settings.ini,line=15,title=gate is insufficient::accuracy >= 0.7: measured 0.7000 (0.6500 … 0.7500)",
        "::error file=settings.ini,line=16,title=gate failed::f1 >= 0.5: measured 0.7000 (0.6500 … 0.7500)",
        "::notice file=settings.ini,line=17,title=gate failed::brier >= 0.9: measured 0.7000 (0.6500 … 0.7500), waived: a pilot",
    ]


def test_the_workflows_page_gets_a_table_of_steps_figures_and_gates(tmp_path: Path) -> None:
    root = tmp_path / "tiny"
    run = failed_run(root)
    more = {"measures": [Measure(name="auc", value=0.9288, low=0.924, high=0.933, rows=16281)], "gates": [judged("auc >= 0.5", "pass")]}
    run = Run.from_json(json.dumps({**json.loads(run.to_json()), **{k: [json.loads(x.to_json()) for x in v] for k, v in more.items()}}))
    page = tmp_path / "summary.md"
    page.write_text("before\n")
    annotate(run, root, {"GITHUB_ACTIONS": "true", "GITHUB_STEP_SUMMARY": str(page)}, out=io.StringIO())
    assert page.read_text() == "before\n" + summary_table(run)
    assert summary_table(run) == (
        "### ekiben run 20261120-153244-3f9a: failed\n"
        "\n"
        "> ZeroDivisionError: 100 % of (tune, cell 4; executed notebook: reports/runs/20261120-153244-3f9a/02_tune.ipynb)\n"
        "\n"
        "| step | status | seconds | why |\n"
        "|---|---|---:|---|\n"
        "| prepare | ♻️ cached |  | unchanged since 20261119-101500-77aa |\n"
        "| tune | ❌ failed | 12.3 | ZeroDivisionError: 100 % of |\n"
        "| evaluate | ⏭️ skipped |  | an earlier step failed |\n"
        "\n"
        "| figure | value | interval | rows |\n"
        "|---|---:|---|---:|\n"
        "| auc | 0.9288 | 0.9240 … 0.9330 | 16281 |\n"
        "\n"
        "| gate | measured | interval | verdict |\n"
        "|---|---:|---|---|\n"
        "| `auc >= 0.5` | 0.7000 | 0.6500 … 0.7500 | pass |\n"
        "\n"
    )


def test_gitlab_gets_a_code_quality_report_and_a_folded_traceback(tmp_path: Path) -> None:
    root = tmp_path / "tiny"
    run = failed_run(root)
    out = io.StringIO()
    annotate(run, root, {"GITLAB_CI": "true", "CI_PROJECT_DIR": str(tmp_path)}, out=out)
    (entry,) = json.loads((root / "reports/gl-code-quality-report.json").read_text())
    assert entry["description"] == "tune failed in cell 4: ZeroDivisionError: 100 % of"
    assert (entry["check_name"], entry["severity"]) == ("ekiben.step", "critical")
    assert entry["location"]["path"] == "tiny/nbs/pipeline/02_tune.ipynb" and entry["location"]["lines"]["begin"] > 1
    said = out.getvalue()
    assert "[collapsed=true]\r\x1b[0Ktraceback of tune\n" in said and "ZeroDivisionError: 100 % of\nnothing\n" in said
    assert said.endswith("code quality report: reports/gl-code-quality-report.json (1 found)\n")


def test_a_finding_keeps_its_fingerprint_when_lines_move_and_a_good_run_clears_it(tmp_path: Path) -> None:
    root = tmp_path / "tiny"
    run = failed_run(root)
    before = code_quality(findings(run, root))
    source = root / "nbs/pipeline/02_tune.ipynb"
    source.write_text("\n\n" + source.read_text())
    after = code_quality(findings(run, root))
    assert [a["fingerprint"] for a in after] == [b["fingerprint"] for b in before]
    assert after[0]["location"]["lines"]["begin"] == before[0]["location"]["lines"]["begin"] + 2
    annotate(Run(run_id="r2", status="done", started=""), root, {"GITLAB_CI": "true"}, out=io.StringIO())
    assert json.loads((root / "reports/gl-code-quality-report.json").read_text()) == []


def test_without_a_ci_service_nothing_is_said_or_written(tmp_path: Path) -> None:
    root = tmp_path / "tiny"
    run = failed_run(root)
    before = sorted(root.rglob("*"))
    out = io.StringIO()
    annotate(run, root, {"CI": "true"}, out=out)
    assert out.getvalue() == "" and sorted(root.rglob("*")) == before


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4)
)


@given(JSON, st.sampled_from([None, 0, 1, 4]), st.booleans())
def test_every_value_of_a_json_text_is_found_where_it_stands(value: Any, indent: int | None, ascii_only: bool) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    for path, expected in places(value):
        assert json.JSONDecoder().raw_decode(text, position(text, path))[0] == expected


def places(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[tuple[str | int, ...], Any]]:
    inner: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [(path, value), *(found for key, one in inner for found in places(one, (*path, key)))]


def test_a_notebook_without_a_mark_keeps_the_cells_that_never_ran(tmp_path: Path) -> None:
    from ekiben.runner.leftovers import mark_killed

    notebook = tmp_path / "03_tune.ipynb"
    states = ["completed", "running", "pending", "pending"]
    cells = [
        {"cell_type": "code", "id": f"c{i}", "metadata": {"papermill": {"status": s}}, "source": "1", "outputs": [], "execution_count": None}
        for i, s in enumerate(states)
    ]
    notebook.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    assert mark_killed(notebook, ename="OSError", why="the disk is full") == (2, "OSError", "the disk is full")
    after = [c["metadata"]["papermill"]["status"] for c in json.loads(notebook.read_text())["cells"]]
    assert after == ["completed", "failed", "pending", "pending"]
