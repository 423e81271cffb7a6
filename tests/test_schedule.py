"""Steps side by side, a run carried on, and the process that keeps the books."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import make_project, write_notebook

from ekiben.errors import UsageError
from ekiben.runner.jobs import Runner
from ekiben.runner.plan import Plan, carry_on
from ekiben.runner.schedule import Interruption, run_steps
from ekiben.runner.scribe import Closing, Opening, Scribe, StepWritten
from ekiben.runner.screen import Screen
from ekiben.runs import Layout, Run, read_run


def run(root: Path, plan: Plan | None = None, **options: object) -> Run:
    return Runner(root, plan or Plan(**options), Screen(quiet=True)).execute()  # type: ignore[arg-type]


def statuses(done: Run) -> dict[str, str]:
    return {step.name: step.status for step in done.steps}


def two_that_meet(root: Path, *, left: str = "", right: str = "") -> Path:
    """Make a project whose steps `left` and `right` only need `prepare`; each waits until the other has begun."""
    make_project(root)
    for path in (root / "nbs/pipeline").glob("0[23]*.ipynb"):
        path.unlink()
    wait = (
        "from pathlib import Path\nimport time\nPath('../../{me}').touch()\nend = time.monotonic() + {patience}\n"
        "while not Path('../../{other}').exists() and time.monotonic() < end:\n    time.sleep(0.05)\n"
        "met = Path('../../{other}').exists()"
    )
    for number, me, other, more in ((2, "left", "right", left), (3, "right", "left", right)):
        begin = f"from ekiben import step\nstep.begin({me!r})"
        meet = wait.format(me=me, other=other, patience=60 if not more else 1)
        write_notebook(
            root / f"nbs/pipeline/0{number}_{me}.ipynb",
            'upstream: list[str] = ["prepare"]',
            [begin, meet, more or "step.log(met=met)"],
        )
    return root


def test_independent_steps_run_side_by_side_when_asked_to(tmp_path: Path) -> None:
    done = run(two_that_meet(tmp_path / "tiny"), jobs=2)
    assert statuses(done) == {"prepare": "ran", "left": "ran", "right": "ran"}
    assert done.metrics["met"] == 1.0  # neither could have seen the other, had they run one after the other


def test_a_step_that_fails_lets_the_one_beside_it_finish_and_resume_repeats_only_itself(tmp_path: Path) -> None:
    root = two_that_meet(tmp_path / "tiny", left="raise ValueError('no')", right="import time\ntime.sleep(2)\nstep.log(met=1)")
    first = run(root, jobs=2, force=True)
    assert statuses(first) == {"prepare": "ran", "left": "failed", "right": "ran"}
    write_notebook(
        root / "nbs/pipeline/02_left.ipynb",
        'upstream: list[str] = ["prepare"]',
        ["from ekiben import step\nstep.begin('left')"],
    )
    second = run(root, carry_on(first))
    assert statuses(second) == {"prepare": "cached", "right": "cached", "left": "ran"}
    assert second.resumes == first.run_id and second.plan["force"] is True


def test_a_run_that_came_to_its_end_cannot_be_carried_on(tmp_path: Path) -> None:
    done = Run(run_id="20260101-000000-aaaa", status="done", started="")
    with pytest.raises(UsageError, match="nothing to carry on"):
        carry_on(done)


def test_what_one_step_raises_in_the_scheduler_comes_after_the_others_have_ended() -> None:
    from ekiben.runner.graph import Step

    ended = []

    class Work:
        def decide(self, step: Step) -> object:
            if step.name == "b":
                raise UsageError("b cannot")
            return lambda: time.sleep(0.2) or ended.append(step.name)

        def finished(self, step: Step, outcome: object) -> bool:
            return True

        def stop(self) -> None:
            raise AssertionError("nobody asked")

    with pytest.raises(UsageError, match="b cannot"):
        run_steps([Step(name="a", notebook=""), Step(name="b", notebook="")], Work(), jobs=2, interruption=Interruption())
    assert ended == ["a"]


def test_a_tracking_store_that_cannot_be_opened_is_said_and_spoils_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    root = make_project(tmp_path / "tiny")
    (root / "mlflow.db").write_text("this is no database")
    done = run(root)
    assert done.status == "done"
    assert "MLflow" in capfd.readouterr().err
    assert all((root / step.html).is_file() for step in done.steps)


def messages(root: Path) -> list[bytes]:
    notebook = root / "reports/runs/20260101-000000-aaaa/01_prepare.ipynb"
    write_notebook(notebook, "", ["1 + 1"])
    opening = Opening(root=str(root), tracking_uri="sqlite:///mlflow.db", experiment="toy", run_id="20260101-000000-aaaa")
    return [opening.to_json(), StepWritten(name="prepare", status="ran", notebook=str(notebook)).to_json()]


def test_the_scribe_writes_pages_and_mlflow_and_says_so(tmp_path: Path) -> None:
    root = make_project(tmp_path / "tiny")
    opening, step = messages(root)
    scribe = Scribe(Opening.from_json(opening))
    told = scribe.wait()
    scribe.log_step(StepWritten.from_json(step))
    scribe.close(Closing(status="done"))
    assert scribe.problem == "" and told["run_id"] == scribe.run_id
    assert (root / "reports/runs/20260101-000000-aaaa/01_prepare.html").is_file()
    assert not list(root.rglob("scribe.log"))


def test_a_scribe_whose_runner_vanished_marks_the_run_killed(tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    root = make_project(tmp_path / "tiny")
    layout = Layout(root)
    lines = messages(root)
    run_ = Run(run_id="20260101-000000-aaaa", status="running", started="2026-01-01T00:00:00+00:00")
    (layout.report(run_.run_id) / "run.json").write_bytes(run_.to_json())
    layout.alive(run_.run_id).parent.mkdir(parents=True)
    layout.alive(run_.run_id).touch()
    ended = subprocess.run(
        [sys.executable, "-m", "ekiben.runner.scribe"], input=b"\n".join(lines) + b"\n", capture_output=True, check=True,
        env={**os.environ, "MLFLOW_LOGGING_LEVEL": "ERROR"},
    )
    mlflow_run = json.loads(ended.stdout.splitlines()[0])["run_id"]
    assert MlflowClient(tracking_uri=f"sqlite:///{root / 'mlflow.db'}").get_run(mlflow_run).info.status == "KILLED"
    assert read_run(layout, "last").status == "killed" and not layout.alive(run_.run_id).exists()


