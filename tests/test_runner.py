"""What a run does when things go right, change, break, or are interrupted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import TUNE, make_project, write_notebook

from ekiben.cli import main
from ekiben.errors import UsageError
from ekiben.runner.jobs import Runner
from ekiben.runner.plan import Plan, read_waivers
from ekiben.runner.screen import Screen
from ekiben.runs import Layout, Run
from ekiben.settings import load_settings
from ekiben.context import StepContext


def run(root: Path, **plan: object) -> Run:
    return Runner(root, Plan(**plan), Screen(quiet=True)).execute()  # type: ignore[arg-type]


def statuses(done: Run) -> dict[str, str]:
    return {step.name: step.status for step in done.steps}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run]:
    root = make_project(tmp_path_factory.mktemp("projects") / "tiny")
    return root, run(root)


def test_a_run_tells_everything_in_run_json(finished: tuple[Path, Run]) -> None:
    root, done = finished
    told = json.loads((root / "reports/runs" / done.run_id / "run.json").read_text())
    assert told["status"] == "done"
    assert [s["name"] for s in told["steps"]] == ["prepare", "tune", "evaluate"]
    assert told["metrics"] == {"rows": 42.0, "auc": 0.9}
    assert told["gates"][0]["verdict"] == "pass"
    for step in told["steps"]:
        assert (root / step["notebook"]).is_file()
        assert "<main>" in (root / step["html"]).read_text()
        assert 0 <= step["overhead_s"] <= step["seconds"]
    assert (root / "reports/index.html").is_file()


def test_a_run_is_in_mlflow_with_a_child_for_each_step(finished: tuple[Path, Run]) -> None:
    from mlflow.tracking import MlflowClient

    root, done = finished
    client = MlflowClient(tracking_uri=f"sqlite:///{root / 'mlflow.db'}")
    parent = client.get_run(done.mlflow["run_id"])
    children = client.search_runs([parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    assert parent.info.status == "FINISHED"
    assert parent.data.metrics["auc"] == 0.9
    assert {c.data.tags["ekiben.step"] for c in children} == {"prepare", "tune", "evaluate"}


def test_nothing_changed_means_nothing_runs(finished: tuple[Path, Run]) -> None:
    root, first = finished
    again = run(root)
    assert set(statuses(again).values()) == {"cached"}
    assert again.metrics == first.metrics
    assert again.gates == first.gates


def test_wrong_data_found_in_a_notebook_is_exit_2_in_one_line(tmp_path: Path) -> None:
    root = make_project(tmp_path / "tiny")
    cell = "from ekiben.errors import DataError\nraise DataError('column `income` is not in the table')"
    write_notebook(root / "nbs/pipeline/02_tune.ipynb", 'upstream: list[str] = ["prepare"]', [TUNE[0], cell])
    done = run(root)
    assert done.exit_code == 2
    assert done.error.startswith("column `income` is not in the table (tune, cell ") and "\n" not in done.error


def test_after_a_broken_step_is_mended_the_next_run_carries_on(tmp_path: Path) -> None:
    root = make_project(tmp_path / "tiny")
    tune = root / "nbs/pipeline/02_tune.ipynb"
    whole = tune.read_text()
    write_notebook(tune, 'upstream: list[str] = ["prepare"]\nfactor: int = 2', [TUNE[0], "raise ValueError('no such thing')"])
    assert statuses(run(root)) == {"prepare": "ran", "tune": "failed", "evaluate": "skipped"}
    tune.write_text(whole)
    assert statuses(run(root)) == {"prepare": "cached", "tune": "ran", "evaluate": "ran"}


def test_a_failed_gate_ends_the_run_with_exit_3_and_a_waiver_with_a_reason_lets_it_pass(tmp_path: Path) -> None:
    root = make_project(tmp_path / "tiny", auc=0.3)
    write_notebook(
        root / "nbs/pipeline/04_report.ipynb",
        'upstream: list[str] = ["evaluate"]',
        ["from ekiben import step\nstep.begin('report')"],
    )
    done = run(root)
    assert done.exit_code == 3
    assert statuses(done)["report"] == "skipped"
    settings = load_settings(root)
    waived = run(root, waivers=read_waivers(["auc"], "a pilot of two weeks", settings))
    assert waived.exit_code == 0
    assert waived.gates[0].waived == "a pilot of two weeks"
    assert statuses(waived)["report"] == "ran"
    assert run(root).exit_code == 3


def test_a_waiver_needs_a_known_gate_and_a_reason(tmp_path: Path) -> None:
    settings = load_settings(make_project(tmp_path / "tiny"))
    with pytest.raises(UsageError, match="needs --reason"):
        read_waivers(["auc"], " ", settings)
    with pytest.raises(UsageError, match="no gate `acc`"):
        read_waivers(["acc"], "because", settings)


def test_a_step_alone_without_what_it_needs_is_a_failed_run_and_exit_2(tmp_path: Path) -> None:
    done = run(make_project(tmp_path / "tiny"), only="evaluate")
    assert (done.status, done.exit_code) == ("failed", 2)
    assert "`evaluate` needs `prepare`" in done.error or "`evaluate` needs `tune`" in done.error


def test_a_sample_never_reaches_package(tmp_path: Path) -> None:
    root = make_project(tmp_path / "tiny")
    write_notebook(
        root / "nbs/pipeline/04_package.ipynb",
        'upstream: list[str] = ["evaluate"]',
        ["from ekiben import step\nstep.begin('package')"],
    )
    done = run(root, overrides={"data.sample": "10"})
    assert "package" not in statuses(done)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["run", "-p", "tune.factr=3"], 2, "factor"),
        (["run", "-p", "tune.factor=x"], 2, "whole number"),
        (["run", "--only", "tun"], 2, "did you mean `tune`?"),
        (["run", "--waive", "auc"], 2, "--reason"),
        (["run", "--sample", "0", "--only", "evaluate"], 2, "no good results yet"),
        (["params", "tuna"], 2, "did you mean `tune`?"),
    ],
)
def test_a_wrong_call_is_one_line_and_exit_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, words: str
) -> None:
    monkeypatch.chdir(make_project(tmp_path / "tiny"))
    assert main(arguments) == code
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith("error: ") and words in said[-1]


def test_by_hand_a_notebook_finds_the_last_good_results(finished: tuple[Path, Run], monkeypatch: pytest.MonkeyPatch) -> None:
    root, _ = finished
    code = "from ekiben import step\nstep.begin('tune')\nprint(step.load('prepare', 'rows'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=root / "nbs/pipeline", capture_output=True, text=True, check=True)
    assert "{'n': 42}" in done.stdout


def test_a_context_round_trips(tmp_path: Path) -> None:
    context = StepContext(root=str(tmp_path), run_id="r", step="tune", waivers={"auc >= 0.5": "why"})
    assert StepContext.from_json(context.to_json()) == context
    assert Layout(tmp_path).result("r", "tune").name == "tune.json"


def test_papermill_itself_finds_the_engine_and_keeps_its_behaviour(tmp_path: Path) -> None:
    write_notebook(tmp_path / "in.ipynb", "n: int = 1", ["print(n * 2)", "1 / 0"])
    command = [sys.executable, "-m", "papermill", "--engine", "ekiben", "-p", "n", "21", "in.ipynb", "out.ipynb"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr
    cells = json.loads((tmp_path / "out.ipynb").read_text())["cells"]
    printed = [o["text"] for c in cells for o in c.get("outputs", []) if o["output_type"] == "stream"]
    assert [["42\n"]] == [p if isinstance(p, list) else [p] for p in printed]
    assert any("injected-parameters" in c["metadata"].get("tags", []) for c in cells)


@pytest.mark.parametrize("module", ["ekiben.runner.engine", "ekiben.runner.plugin", "papermill", "ekiben.runner.notebooks"])
def test_engine_and_papermill_can_be_imported_in_any_order(module: str) -> None:
    code = f"import {module}; from papermill.engines import papermill_engines as e; e.get_engine('ekiben')"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
