"""A past run is made again from what it recorded; runs are listed, shown and compared."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rich.console import Console
from tiny import EVALUATE, SETTINGS, empty_tracking_store, make_project, write_notebook

from ekiben.errors import DataError, IntegrityError, UsageError
from ekiben.records import Judgement, Measure
from ekiben.history import reproduce as module
from ekiben.history.agreement import Match, match_verdicts
from ekiben.history.compare import FigurePair, RunComparison, compare
from ekiben.history.comparison import show_comparison, write_comparison_page
from ekiben.history.find import find_run, results_of
from ekiben.runner.jobs import Runner
from ekiben.runner.plan import Plan
from ekiben.history.reproduce import Reproduction, reproduce
from ekiben.history.reproduction import show_reproduction
from ekiben.runner.screen import Screen
from ekiben.history.show import chosen_settings, describe_in_full, describe_run, list_runs, runs_table, show_run
from ekiben.cache.snapshot import changed_since, digests_of, materialize, read_file, take
from ekiben.runs import Layout, Run, read_run, write_run
from ekiben.serving.served import Served
from ekiben.settings import load_settings
from ekiben.store import Store

GATES = SETTINGS.replace("step_timeout_s = 60", "step_timeout_s = 60\nwarm_kernels = no").replace("auc >= 0.5", "auc >= 0.95")
WAIVERS = {"auc >= 0.95": "a first look"}

READ = [
    "from ekiben import step\nfrom tiny.helper import number\nproject = step.begin('prepare')",
    "path = project.root / project.settings.data.source\nstep.reads([path])\nrows = path.read_text().splitlines()",
    "step.save('rows', {'n': number() + len(rows)})\nstep.record(data={'rows': len(rows)})\nstep.log(rows=len(rows))",
]
SEARCH = [
    "import time\nfrom ekiben import step\nproject = step.begin('tune')",
    "rows = step.load('prepare', 'rows')\ndone = trials or 3 + time.time_ns() // 1000 % 900  # the clock decides",
    "step.log_trials([{'number': i} for i in range(done)])\nstep.save('model', {'n': rows['n'] * factor * done})",
    "step.log(trials=done, searched_s=time.time())\nstep.varies('searched_s')",
]
SEARCH_PARAMETERS = 'upstream: list[str] = ["prepare"]\nfactor: int = 2\nbudget_s: float = 0.1\ntrials: int = 0'


def run(root: Path, **plan: Any) -> Run:
    return Runner(root, Plan(**plan), Screen(quiet=True)).execute()


def make_reader(root: Path, source: str = "data/rows.csv") -> Path:
    """Make a project that reads a file, searches by the clock, and fails a gate unless that is waived."""
    make_project(root, settings=GATES.replace("simulated:credit", source))
    write_notebook(root / "nbs/pipeline/01_prepare.ipynb", "upstream: list[str] = []", READ)
    write_notebook(root / "nbs/pipeline/02_tune.ipynb", SEARCH_PARAMETERS, SEARCH)
    (root / source).parent.mkdir(parents=True, exist_ok=True)
    (root / source).write_text("1\n2\n3\n")
    return root


def text_of(renderable: object) -> str:
    console = Console(width=200, no_color=True)
    with console.capture() as said:
        console.print(renderable)
    return said.get()


@pytest.fixture(autouse=True, scope="module")
def _new_stores_are_copies() -> Iterator[None]:
    """A new MLflow store takes seconds to make; the folder of a reproduction gets a copy of an empty one."""
    real = module.workplace

    @contextmanager
    def with_store(*given: Any, **named: Any) -> Iterator[Path]:
        with real(*given, **named) as folder:
            assert not (folder / "mlflow.db").exists(), "the project's own store must not be there"
            (folder / "mlflow.db").write_bytes(empty_tracking_store())
            yield folder

    module.workplace = with_store  # type: ignore[assignment]
    yield
    module.workplace = real


def state_of(root: Path) -> dict[str, str]:
    """Return what a reproduction must not change."""
    paths = [*(root / ".ekiben/last").iterdir(), *(root / ".ekiben/runs").rglob("*.json"), root / "mlflow.db"]
    return {str(p): str(p.stat().st_mtime_ns) for p in paths} | {"runs": str(sorted(os.listdir(root / "reports/runs")))}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run, Run]:
    """A project after two runs with options and a waiver; the second took every step from the cache."""
    root = make_reader(tmp_path_factory.mktemp("projects") / "tiny")
    plan = {"overrides": {"tune.factor": "5"}, "waivers": WAIVERS}
    return root, run(root, **plan), run(root, **plan)


@pytest.fixture(scope="module")
def again(finished: tuple[Path, Run, Run], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run, Reproduction, dict[str, Any]]:
    """The second run made again, after the work tree was changed in every way but the data."""
    root = tmp_path_factory.mktemp("edited") / "tiny"
    shutil.copytree(finished[0], root)
    (root / "src/tiny/deeper.py").write_text("def base():\n    raise RuntimeError('the work tree was used')\n")
    (root / "src/tiny/newer.py").write_text("")
    write_notebook(root / "nbs/pipeline/03_evaluate.ipynb", 'upstream: list[str] = ["tune"]\nauc: float = 0.1', EVALUATE)
    write_notebook(root / "nbs/pipeline/04_more.ipynb", "upstream: list[str] = []", ["raise RuntimeError('a newer step ran')"])
    (root / "settings.ini").write_text(GATES.replace("simulated:credit", "data/rows.csv").replace("0.95", "0.99"))
    before = state_of(root)
    made = reproduce(root, finished[2].run_id)
    return root, finished[2], made, {"before": before, "after": state_of(root)}


def test_a_run_made_again_is_identical_although_the_work_tree_changed(again: tuple[Path, Run, Reproduction, dict[str, Any]]) -> None:
    _, original, made, _ = again
    assert {s.status for s in original.steps} == {"cached"}
    assert made.error == "" and made.ended == "done"
    assert made.exit_code == 0 and made.first == ""
    verdicts = {(m.step, m.name): m.verdict for m in made.matches if m.kind != "verdict"}
    assert verdicts == {
        ("prepare", "rows"): "identical", ("tune", "model"): "identical", ("tune", "trials"): "identical",
        ("tune", "searched_s"): "varies", ("evaluate", "auc"): "identical",
    }  # fmt: skip


def test_options_waivers_and_the_number_of_trials_are_replayed(again: tuple[Path, Run, Reproduction, dict[str, Any]]) -> None:
    root, original, made, _ = again
    trials = next(int(m.value) for m in original.measures if m.label == "trials")
    assert made.replayed == {"tune.trials": str(trials)}
    gate = next(m for m in made.matches if m.kind == "verdict")
    assert (gate.name, gate.then, gate.now) == ("auc >= 0.95", "fail, waived", "fail, waived")
    model = results_of(Layout(root), original)["tune"].outputs["model"]
    assert Store(Layout(root).objects).get(model) == {"n": 45 * 5 * trials}


def test_a_reproduction_leaves_the_project_as_it_was(again: tuple[Path, Run, Reproduction, dict[str, Any]]) -> None:
    root, _, made, state = again
    assert state["before"] == state["after"]
    assert list((root / ".ekiben/reproduce").iterdir()) == [] and made.kept == ""


def test_the_outcome_is_kept_beside_the_run_and_printed(again: tuple[Path, Run, Reproduction, dict[str, Any]]) -> None:
    root, original, made, _ = again
    folder = root / "reports/runs" / original.run_id
    assert Reproduction.from_json((folder / "reproduction.json").read_bytes()) == made
    assert "Every figure, result and verdict is identical." in (folder / "reproduction.html").read_text()
    said = text_of(show_reproduction(made))
    assert "1 identical, 1 varies" in said and "identical." in said and original.run_id in said


def copy_of(finished: tuple[Path, Run, Run], folder: Path) -> Path:
    return Path(shutil.copytree(finished[0], folder / "tiny"))


def test_changed_data_is_named_and_stops_with_exit_code_2(finished: tuple[Path, Run, Run], tmp_path: Path) -> None:
    root = copy_of(finished, tmp_path)
    (root / "data/rows.csv").write_text("1\n2\n3\n4\n")
    with pytest.raises(DataError, match=r"data/rows\.csv: 6 bytes, .* → 8 bytes, .*--anyway") as stopped:
        reproduce(root, "last")
    assert stopped.value.exit_code == 2
    assert not (root / "reports/runs" / finished[2].run_id / "reproduction.json").exists()
    made = reproduce(root, "last", anyway=True)
    assert made.exit_code == 1 and made.first == "prepare"
    assert [c.what for c in made.data] == ["data/rows.csv"] and "data/rows.csv" in made.verdict
    notes = {(m.kind, m.name): m.note for m in made.matches if m.step == "prepare"}
    assert notes == {("result", "rows"): "n: 45 → 46", ("figure", "rows"): "by +1"}


def test_data_that_is_gone_is_named(finished: tuple[Path, Run, Run], tmp_path: Path) -> None:
    root = copy_of(finished, tmp_path)
    (root / "data/rows.csv").unlink()
    with pytest.raises(DataError, match=r"data/rows\.csv: 6 bytes, .* → none"):
        reproduce(root, "last")


def test_relative_data_outside_is_found_and_a_version_that_differs_is_named(tmp_path: Path) -> None:
    root = make_reader(tmp_path / "work/tiny", "../../shared/rows.csv")
    done = run(root, waivers=WAIVERS)
    assert done.status == "done", done.error
    then = {**done.environment, "python": "3.11.0", "threads": {"OMP_NUM_THREADS": "64"}, "ekiben": "0" * 64}
    write_run(Layout(root), msgspec.structs.replace(done, versions={**done.versions, "numpy": "0.0.1"}, environment=then))
    made = reproduce(root, done.run_id, keep=True)
    assert made.exit_code == 0, made.verdict
    assert (root / made.kept / "../../shared/rows.csv").resolve() == tmp_path / "shared/rows.csv"
    assert (root / made.kept / "reports/runs").is_dir()
    named = {c.what: c.then for c in made.environment}
    assert named == {"Python": "3.11.0", "OMP_NUM_THREADS": "64", "ekiben's own code": "0" * 12, "numpy": "0.0.1"}
    assert "numpy: 0.0.1 → " in text_of(show_reproduction(made))


def test_the_first_step_that_differs_is_named_and_that_nothing_else_changed(tmp_path: Path) -> None:
    root = make_project(tmp_path / "tiny", settings=GATES.replace("0.95", "0.5"))
    tune = ["from ekiben import step\nproject = step.begin('tune')", "import secrets\nstep.save('model', {'n': secrets.token_hex(8)})"]
    write_notebook(root / "nbs/pipeline/02_tune.ipynb", 'upstream: list[str] = ["prepare"]', tune)
    later = [EVALUATE[0], EVALUATE[1], "step.save('copy', step.load('tune', 'model'))"]
    write_notebook(root / "nbs/pipeline/03_evaluate.ipynb", 'upstream: list[str] = ["tune"]\nauc: float = 0.9', later)
    run(root)
    made = reproduce(root, "last")
    assert made.exit_code == 1 and made.first == "tune"
    assert {(m.step, m.name) for m in made.matches if not m.agrees} == {("tune", "model"), ("evaluate", "copy")}
    unchanged = msgspec.structs.replace(made, environment=[], data=[])
    assert unchanged.verdict.startswith("`tune` is the first step that differs. Neither data nor environment changed")


def test_a_run_of_one_step_is_made_again_with_what_it_stood_on(finished: tuple[Path, Run, Run], tmp_path: Path) -> None:
    root = copy_of(finished, tmp_path)
    done = run(root, only="evaluate", waivers=WAIVERS, overrides={"evaluate.auc": "0.97"})
    assert [s.name for s in done.steps] == ["evaluate"] and done.metrics["auc"] == 0.97
    made = reproduce(root, done.run_id)
    assert {(m.step, m.name): (m.verdict, m.now) for m in made.matches if m.kind == "figure"}[("evaluate", "auc")] == ("identical", 0.97)


def test_a_failed_run_fails_again_in_the_same_step(tmp_path: Path) -> None:
    root = make_project(tmp_path / "tiny", settings=GATES)
    broken = ["from ekiben import step\nproject = step.begin('tune')", "raise ValueError('no')"]
    write_notebook(root / "nbs/pipeline/02_tune.ipynb", 'upstream: list[str] = ["prepare"]', broken)
    assert run(root).status == "failed"
    made = reproduce(root, "last")
    assert (made.status, made.ended, made.exit_code) == ("failed", "failed", 0)


def test_what_the_environment_set_then_is_set_again_and_what_it_sets_now_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_project(tmp_path / "tiny", settings=GATES)
    monkeypatch.setenv("EKIBEN_EVALUATE__AUC", "0.96")
    done = run(root)
    assert done.metrics["auc"] == 0.96 and done.plan["overrides"] == {}
    monkeypatch.delenv("EKIBEN_EVALUATE__AUC")
    monkeypatch.setenv("EKIBEN_TUNE__FACTOR", "9")
    made = reproduce(root, done.run_id)
    assert made.exit_code == 0, made.verdict
    assert made.replayed == {"evaluate.auc": "0.96", "tune.factor": "2"}


def test_a_run_that_kept_no_code_or_lost_it_is_refused(finished: tuple[Path, Run, Run], tmp_path: Path) -> None:
    root = copy_of(finished, tmp_path)
    layout, last = Layout(root), read_run(Layout(root), "last")
    Store(layout.objects).path(last.code["src/tiny/deeper.py"]).unlink()
    with pytest.raises(IntegrityError, match=r"no longer kept, such as src/tiny/deeper\.py"):
        reproduce(root, "last")
    write_run(layout, msgspec.structs.replace(last, code={}))
    with pytest.raises(UsageError, match="recorded no code"):
        reproduce(root, "last")


# ── the snapshot ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_snapshot_keeps_code_without_outputs_and_no_data(finished: tuple[Path, Run, Run]) -> None:
    root, first, _ = finished
    store = Store(Layout(root).objects)
    kept = {"settings.ini", "pyproject.toml", *(f"nbs/pipeline/0{i}_{s}.ipynb" for i, s in enumerate(("prepare", "tune", "evaluate"), 1))}
    assert set(first.code) == kept | {f"src/tiny/{n}.py" for n in ("__init__", "helper", "deeper")}
    executed = json.loads((root / "reports/runs" / first.run_id / "01_prepare.ipynb").read_text())
    (root / "nbs/pipeline/01_prepare.ipynb").write_text(json.dumps({**executed, "cells": executed["cells"]}))
    code, environment = take(load_settings(root), store)
    cells = json.loads(read_file(store, code["nbs/pipeline/01_prepare.ipynb"]))["cells"]
    assert cells and all(c["outputs"] == [] and c["execution_count"] is None for c in cells if c["cell_type"] == "code")
    assert b"numpy==" in read_file(store, environment["distributions"])
    assert digests_of(first) == {*first.code.values(), first.environment["distributions"]}
    write_notebook(root / "nbs/pipeline/01_prepare.ipynb", "upstream: list[str] = []", READ)
    assert changed_since(first, root) == {}


def test_an_edit_of_the_same_length_at_once_is_not_missed(tmp_path: Path) -> None:
    root = make_project(tmp_path / "tiny")
    settings, store = load_settings(root), Store(tmp_path / "objects")
    seen = set()
    for number in range(20):
        (root / "src/tiny/deeper.py").write_text(f"def base():\n    return {10 + number}\n")
        seen.add(take(settings, store)[0]["src/tiny/deeper.py"])
    assert len(seen) == 20


def test_an_object_that_was_removed_is_kept_again(tmp_path: Path) -> None:
    root = make_project(tmp_path / "tiny")
    settings, store = load_settings(root), Store(tmp_path / "objects")
    for path in root.rglob("*"):
        os.utime(path, (1_700_000_000, 1_700_000_000))
    digest = take(settings, store)[0]["src/tiny/deeper.py"]
    store.path(digest).unlink()
    assert take(settings, store)[0]["src/tiny/deeper.py"] == digest
    assert b"return 41" in read_file(store, digest)


@pytest.mark.parametrize("name", ["../out.py", "/out.py", "src/../../out.py", "src//out.py", "src/./out.py", "..\\out.py", "", "a\0b"])
def test_code_is_never_written_outside_of_the_folder(name: str, tmp_path: Path) -> None:
    store = Store(tmp_path / "objects")
    code = {name: store.put(b"x").digest, "ok.py": store.put(b"y").digest}
    with pytest.raises(IntegrityError, match="no path inside a project"):
        materialize(Run(run_id="a", status="done", started="", code=code), store, tmp_path / "deep" / "folder")
    assert not (tmp_path / "deep").exists() and not (tmp_path / "out.py").exists()


def test_code_does_not_follow_a_link_out_of_the_folder(tmp_path: Path) -> None:
    store = Store(tmp_path / "objects")
    (tmp_path / "folder").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "folder/src").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(IntegrityError, match="leads out of it"):
        materialize(Run(run_id="a", status="done", started="", code={"src/out.py": store.put(b"x").digest}), store, tmp_path / "folder")
    assert list((tmp_path / "elsewhere").iterdir()) == []


# ── list, show, compare ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def three(finished: tuple[Path, Run, Run], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Run]]:
    """A project after a third run: other code, settings and data, and a gate that fails."""
    root = copy_of(finished, tmp_path_factory.mktemp("three"))
    (root / "src/tiny/deeper.py").write_text("import math\n\n\ndef base():\n    return math.floor(40.5)\n")
    (root / "src/tiny/newer.py").write_text("")
    cells = [READ[0], READ[1] + "\nrows = rows[:-1]", READ[2]]
    write_notebook(root / "nbs/pipeline/01_prepare.ipynb", "upstream: list[str] = []", cells)
    (root / "settings.ini").write_text((root / "settings.ini").read_text().replace("target = default", "target = late"))
    third = run(root, overrides={"tune.trials": "4", "evaluate.auc": "0.7"})
    return root, [finished[1], finished[2], third]


def test_runs_are_listed_newest_first_and_by_status(three: tuple[Path, list[Run]]) -> None:
    root, runs = three
    layout = Layout(root)
    listed = list_runs(layout)
    assert [r.run_id for r in listed] == sorted((r.run_id for r in runs), reverse=True)
    assert [r.run_id for r in list_runs(layout, limit=1)] == [listed[0].run_id]
    assert [r.run_id for r in list_runs(layout, status="gate_failed")] == [runs[2].run_id]
    facts = {r.run_id: describe_run(r) for r in listed}
    assert facts[runs[1].run_id]["steps"] == {"cached": 3} and facts[runs[0].run_id]["steps"] == {"ran": 3}
    assert facts[runs[2].run_id]["gates"] == "0 of 1 pass, 1 failed" and facts[runs[0].run_id]["gates"] == "0 of 1 pass, 1 waived"
    assert facts[runs[2].run_id]["metrics"] == {"auc": 0.7}
    said = text_of(runs_table(listed))
    assert all(r.run_id in said for r in runs) and "3 cached" in said and "auc 0.9000" in said and "gate failed" in said


def test_a_run_is_shown_with_what_was_chosen_and_what_changed_since(three: tuple[Path, list[Run]]) -> None:
    root, runs = three
    layout = Layout(root)
    chosen = {c.what: (c.then, c.now) for c in chosen_settings(runs[0], Store(layout.objects))}
    assert chosen["tune.factor"] == ("2", "5") and chosen["gates.gates"][1] == "auc >= 0.95"
    assert "tune.budget_s" not in chosen and "gates.confidence" not in chosen
    facts = describe_in_full(layout, runs[0])
    changed = {"nbs/pipeline/01_prepare.ipynb": "changed", "settings.ini": "changed", "src/tiny/deeper.py": "changed", "src/tiny/newer.py": "new"}
    assert facts["changed_files"] == changed
    assert json.loads(msgspec.json.encode(facts))["metrics"]["auc"] == 0.9
    said = text_of(show_run(layout, runs[0]))
    for piece in ("a first look", "tune.factor", "src/tiny/deeper.py changed", "0.8900 … 0.9100", f"reports/runs/{runs[0].run_id}/index.html"):
        assert piece in said, piece


def test_a_part_in_brackets_is_printed_as_it_is(tmp_path: Path) -> None:
    label = {"name": "demographic_parity_ratio", "slice": "sex"}
    gate = Judgement(name="demographic_parity_ratio[sex] >= 0.8", metric=label["name"], slice="sex", op=">=", limit=0.8, value=0.5,
                     low=0.4, high=0.6, verdict="fail", blocking=False)  # fmt: skip
    metrics = {"demographic_parity_ratio[sex]": 0.5}
    done = Run(run_id="a", status="done", started="", measures=[Measure(**label, value=0.5)], metrics=metrics, gates=[gate])
    pair = FigurePair(label="demographic_parity_ratio[sex]", a=done.measures[0])
    odd = [Match(kind="figure", step="evaluate", name=pair.label, verdict="gone", then=0.5)]
    for shown in (
        runs_table([done]), show_run(Layout(tmp_path), done), show_reproduction(Reproduction(run_id="a", status="done", started="", matches=odd)),
        show_comparison(RunComparison(a=done, b=done, figures=[pair], verdicts=match_verdicts([gate], []))),
    ):  # fmt: skip
        assert "demographic_parity_ratio[sex]" in text_of(shown)


def test_champion_means_the_run_that_made_what_is_served(three: tuple[Path, list[Run]], tmp_path: Path) -> None:
    root = Path(shutil.copytree(three[0], tmp_path / "tiny"))
    layout, runs = Layout(root), three[1]
    with pytest.raises(UsageError, match="no champion"):
        find_run(layout, "champion")
    for one in runs[:2]:
        write_run(layout, msgspec.structs.replace(one, bento={"tag": "tiny:v1"}))
    Served.path(root).write_bytes(Served(bento="tiny:v1", name="tiny", version="1", digest="").to_json())
    assert find_run(layout, "champion").run_id == runs[0].run_id
    assert find_run(layout, "last").run_id == runs[2].run_id
    with pytest.raises(UsageError, match="no run `nothing`"):
        find_run(layout, "nothing")


@pytest.fixture(scope="module")
def compared(three: tuple[Path, list[Run]]) -> RunComparison:
    root, runs = three
    return compare(Layout(root), runs[0].run_id, runs[2].run_id)


def test_two_runs_are_compared_in_everything_that_was_recorded(compared: RunComparison) -> None:
    settings = {c.what: (c.then, c.now) for c in compared.settings}
    assert settings == {
        "columns.target": ("default", "late"), "tune.factor": ("5", "2"), "tune.trials": ("0", "4"), "evaluate.auc": ("0.9", "0.7"),
    }  # fmt: skip
    assert [(c.what, c.then, c.now) for c in compared.data] == [("rows", "3", "2")]
    auc = next(p for p in compared.figures if p.label == "auc")
    assert auc.apart and round(auc.difference or 0, 6) == -0.2
    assert [(m.then, m.now) for m in compared.verdicts] == [("fail, waived", "fail")]
    code = {c.path: (c.status, c.parts) for c in compared.code}
    assert code == {
        "nbs/pipeline/01_prepare.ipynb": ("changed", ["cell 4"]),
        "src/tiny/deeper.py": ("changed", ["module level", "base"]),
        "src/tiny/newer.py": ("new", []),
    }
    assert "+    return math.floor(40.5)" in next(c.diff for c in compared.code if c.path.endswith("deeper.py"))


def test_a_comparison_is_printed_and_is_a_page(three: tuple[Path, list[Run]], compared: RunComparison) -> None:
    root, runs = three
    said = text_of(show_comparison(compared))
    page = write_comparison_page(Layout(root), compared)
    assert page.name == f"compare-{runs[0].run_id}-{runs[2].run_id}.html"
    for piece in ("tune.factor", "columns.target", "rows = rows[:-1]", "apart", "src/tiny/newer.py"):
        assert piece in said, piece
        assert piece in page.read_text(), piece


def test_a_run_does_not_differ_from_itself(three: tuple[Path, list[Run]]) -> None:
    root, runs = three
    same = compare(Layout(root), runs[0].run_id, runs[0].run_id)
    assert same.summary == "They do not differ in anything that was recorded."
    assert not [*same.settings, *same.data, *same.environment, *same.code]


# ── a real table ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_every_figure_and_result_of_the_adult_run_is_identical(shared_data: Path, tmp_path: Path) -> None:
    adult = shared_data / "adult"
    environment = {**os.environ, "BENTOML_HOME": str(tmp_path / "bentoml")}

    def ekiben(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", "import sys; from ekiben.cli import main; sys.exit(main())", *words]
        return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, env=environment, timeout=1200)

    new = ["new", "census", "--data", str(adult / "train.csv"), "--test", str(adult / "test.csv"), "--target", "income"]
    assert ekiben(*new, "--positive", ">50K", "--sensitive", "sex,race", cwd=tmp_path).returncode == 0
    root = tmp_path / "census"
    ran = ekiben("run", "-p", "tune.budget_s=8", cwd=root)
    assert ran.returncode == 0, ran.stderr[-3000:]
    served = Served.path(root).read_bytes()
    done = ekiben("reproduce", "last", cwd=root)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-3000:]
    made = Reproduction.from_json((root / "reports/runs" / find_run(Layout(root), "last").run_id / "reproduction.json").read_bytes())
    figures = [m for m in made.matches if m.kind == "figure"]
    assert len(figures) > 30 and {m.verdict for m in figures} == {"identical"}
    assert [m.name for m in made.matches if m.verdict == "varies"] == ["runtimes", "registered"]
    assert {"prepare", "tune", "audit", "evaluate", "package"} == {m.step for m in made.matches if m.kind == "result"}
    assert list(made.replayed) == ["tune.trials"]
    assert Served.path(root).read_bytes() == served
