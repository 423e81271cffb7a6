"""Tiny projects whose notebooks use nothing but `step`: they run in a second or two and show how the runner behaves."""

from __future__ import annotations

import json
import signal
import tempfile
from functools import cache
from pathlib import Path

SETTINGS = """[pipeline]
name = tiny
step_timeout_s = 60

[data]
source = simulated:credit

[columns]
target = default

[gates]
gates =
    auc >= 0.5
"""

PREPARE = [
    "from ekiben import step\nfrom tiny.helper import number\nproject = step.begin('prepare')",
    "step.save('rows', {'n': number()})\nstep.log(rows=number())",
]
TUNE = [
    "from ekiben import step\nproject = step.begin('tune')",
    "rows = step.load('prepare', 'rows')\nstep.save('model', {'n': rows['n'] * factor})",
]
EVALUATE = [
    "from ekiben import gates, step\nfrom ekiben.records import Measure\nproject = step.begin('evaluate')",
    "step.load('tune', 'model')\nmeasures = [Measure(name='auc', value=auc, low=auc - 0.01, high=auc + 0.01, rows=100)]\n"
    "step.log_measures(measures)\nstep.judge([gates.judge(g, measures) for g in project.settings.gates.gates])",
]


def write_notebook(path: Path, parameters: str, cells: list[str], *, title: str = "") -> None:
    """Write a notebook with one parameters cell and these code cells."""
    made = [{"cell_type": "markdown", "id": "title", "metadata": {}, "source": f"# {title or path.stem}\n> A page."}]
    sources = [(parameters, ["parameters"]), *((source, []) for source in cells)]
    for i, (source, tags) in enumerate(sources):
        made.append(
            {
                "cell_type": "code",
                "id": f"cell{i}",
                "metadata": {"tags": tags} if tags else {},
                "source": source,
                "outputs": [],
                "execution_count": None,
            }
        )
    kernel = {"name": "python3", "display_name": "python3", "language": "python"}
    notebook = {"cells": made, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(notebook))


@cache
def empty_tracking_store() -> bytes:
    """Return a new MLflow database, made once: its migrations take seconds."""
    from mlflow.tracking import MlflowClient

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mlflow.db"
        MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
        return path.read_bytes()


def hear_ctrl_c() -> None:
    """Undo, in a child process, that a shell's background job ignores Ctrl-C: the tests may run in one."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def make_project(root: Path, *, auc: float = 0.9, settings: str = SETTINGS) -> Path:
    """Make a project of three steps, prepare → tune → evaluate, and return its folder."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "settings.ini").write_text(settings)
    (root / "mlflow.db").write_bytes(empty_tracking_store())
    (root / "pyproject.toml").write_text(
        '[project]\nname = "tiny"\nversion = "0"\n[tool.nbdev]\nlib_path = "src/tiny"\nnbs_path = "nbs"\n'
    )
    (root / "src/tiny").mkdir(parents=True, exist_ok=True)
    (root / "src/tiny/__init__.py").touch()
    (root / "src/tiny/helper.py").write_text("from .deeper import base\n\n\ndef number():\n    return base() + 1\n")
    (root / "src/tiny/deeper.py").write_text("def base():\n    return 41\n")
    steps = root / "nbs/pipeline"
    write_notebook(steps / "01_prepare.ipynb", "upstream: list[str] = []", PREPARE)
    write_notebook(steps / "02_tune.ipynb", 'upstream: list[str] = ["prepare"]\nfactor: int = 2', TUNE)
    write_notebook(steps / "03_evaluate.ipynb", f'upstream: list[str] = ["tune"]\nauc: float = {auc}', EVALUATE)
    return root
