"""What a step costs beside its own cells, and what six empty steps cost, against papermill and Ploomber on the same notebooks.

Run it as ``python tests/benchmarks/bench_runner.py [REPEATS]``. Every notebook imports pandas, scikit-learn, LightGBM, Optuna,
Fairlearn and MLflow, and does nothing else. Two tables come out, with medians and ratios:

- a step: wall time of ``papermill.execute_notebook`` less what its cells did when the libraries are there already;
- six steps, the whole command: ``ekiben run --force`` with a warm zygote and without any, six ``papermill`` commands, and
  ``ploomber build --force``. Ploomber gets a virtual environment of its own below the user's cache folder; where it does not
  install, the table says so.

Exits with 1 when an aim is missed: 0.5 s and a tenth of papermill's for the step; an eighth of both when warm, a third when cold.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

IMPORTS = "import pandas, sklearn.ensemble, lightgbm, optuna, fairlearn.metrics, mlflow"
STEPS = [f"step{i}" for i in range(1, 7)]
AIM_S, AIM_STEP, AIM_WARM, AIM_COLD = 0.5, 10.0, 8.0, 3.0
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ekiben-bench"


def write_page(path: Path, cells: list[str]) -> None:
    """Write a notebook whose first cell is tagged ``parameters``."""
    made = [
        {"cell_type": "code", "id": f"c{i}", "metadata": {"tags": ["parameters"]} if i == 0 else {}, "source": source,
         "outputs": [], "execution_count": None}
        for i, source in enumerate(cells)
    ]  # fmt: skip
    kernel = {"name": "python3", "display_name": "python3", "language": "python"}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"cells": made, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}))


def make_project(root: Path) -> Path:
    """Make an ekiben project of six steps, one after the other."""
    from mlflow.tracking import MlflowClient

    root.mkdir(parents=True)
    (root / "settings.ini").write_text("[pipeline]\nname = bench\nkernel_idle_s = 600\n\n[columns]\ntarget = y\n")
    (root / "pyproject.toml").write_text('[project]\nname = "bench"\nversion = "0"\n[tool.nbdev]\nlib_path = "src/bench"\nnbs_path = "nbs"\n')
    (root / "src/bench").mkdir(parents=True)
    (root / "src/bench/__init__.py").touch()
    before = ""
    for i, name in enumerate(STEPS, start=1):
        upstream = f"upstream: list[str] = [{before!r}]" if before else "upstream: list[str] = []"
        write_page(root / f"nbs/pipeline/0{i}_{name}.ipynb", [upstream, IMPORTS, f"from ekiben import step\nstep.begin({name!r})"])
        before = name
    MlflowClient(tracking_uri=f"sqlite:///{root / 'mlflow.db'}").search_experiments()  # its migrations are nobody's step
    return root


def timed(call: Callable[[], object]) -> float:
    """Return the seconds that a call takes."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def command(*words: str, cwd: Path) -> None:
    """Run a command, which must succeed."""
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, check=False, env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"})
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} failed with {done.returncode}:\n{(done.stdout + done.stderr)[-2000:]}")


def measure_step(folder: Path, repeats: int) -> dict[str, list[float]]:
    """Return overheads [s] by engine: wall time less the cells' own work.

    Importing is what the step waits for, not its work: it counts as work only as long as it takes when everything is loaded.
    """
    import logging

    import papermill

    from ekiben.kernels import warm

    logging.getLogger("papermill").setLevel(logging.ERROR)
    folder.mkdir()
    (folder / "settings.ini").write_text("[pipeline]\nkernel_idle_s = 600\n")
    write_page(folder / "step.ipynb", ["word = 'x'", IMPORTS, "print(pandas.__name__)"])
    found: dict[str, list[float]] = {}
    work_s = 0.0
    for engine in ("ekiben", None):
        for attempt in range(repeats + 1):
            began = time.perf_counter()
            page = papermill.execute_notebook(
                str(folder / "step.ipynb"), str(folder / "done.ipynb"), engine_name=engine, cwd=str(folder), progress_bar=False
            )
            wall_s = time.perf_counter() - began
            if engine == "ekiben":
                work_s = sum(cell.metadata.papermill.duration for cell in page.cells)
            if attempt:  # the first one starts the zygote, or fills the disk's cache
                found.setdefault(engine or "papermill", []).append(wall_s - work_s)
    warm.stop(folder)
    return found


def ploomber_runner(folder: Path) -> Callable[[], None] | str:
    """Return what runs the six steps with Ploomber, or why it cannot."""
    home = CACHE / f"ploomber-{sys.version_info[0]}.{sys.version_info[1]}"
    python = home / "bin/python"
    if not (home / "complete").exists():
        shutil.rmtree(home, ignore_errors=True)
        uv = shutil.which("uv")
        make = [uv, "venv", "--python", sys.executable, str(home)] if uv else [sys.executable, "-m", "venv", str(home)]
        install = [uv, "pip", "install", "--python", str(python)] if uv else [str(python), "-m", "pip", "install"]
        libraries = ["pandas", "scikit-learn", "lightgbm", "optuna", "fairlearn", "mlflow", "ipykernel", "ploomber", "setuptools<81"]
        for line in (make, [*install, *libraries]):
            done = subprocess.run(line, capture_output=True, text=True, check=False)
            if done.returncode:
                return f"does not install here: {(done.stderr.strip().splitlines() or ['?'])[-1][:100]}"
        (home / "complete").touch()
    tasks = []
    for i, name in enumerate(STEPS):
        upstream = f"upstream = [{STEPS[i - 1]!r}]" if i else "upstream = None"
        write_page(folder / f"{name}.ipynb", [f"{upstream}\nproduct = None", IMPORTS])
        tasks.append({"source": f"{name}.ipynb", "name": name, "product": {"nb": f"out/{name}.ipynb"}})
    (folder / "pipeline.yaml").write_text(json.dumps({"tasks": tasks}))  # JSON is YAML
    line = [str(home / "bin/ploomber"), "build", "--force"]
    env = {**os.environ, "PLOOMBER_STATS_ENABLED": "false", "MLFLOW_DISABLE_TELEMETRY": "true", "PATH": f"{home / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True, check=False, env=env)
    if done.returncode:
        return f"installs, but fails: {(done.stdout + done.stderr).strip()[-200:]}"
    return lambda: subprocess.run(line, cwd=folder, capture_output=True, check=True, env=env) and None


def measure_pipeline(folder: Path, repeats: int) -> tuple[dict[str, list[float]], str]:
    """Return wall times [s] of six empty steps as whole commands, and why Ploomber is not among them."""
    from ekiben.kernels import warm

    root = make_project(folder / "bench")
    run = [sys.executable, "-c", "import sys; from ekiben.cli import main; sys.exit(main(['run', '--force', '--quiet']))"]
    pages = sorted((root / "nbs/pipeline").glob("*.ipynb"))
    plain = folder / "plain"
    for page in pages:
        write_page(plain / page.name, ["word = 'x'", IMPORTS])

    def six() -> None:
        for page in pages:
            command(sys.executable, "-m", "papermill", "--no-progress-bar", page.name, f"done-{page.name}", cwd=plain)

    found: dict[str, list[float]] = {"ekiben, cold": [], "ekiben, warm": [], "papermill": []}
    command(*run, cwd=root)
    for _ in range(repeats):
        warm.stop(root)
        found["ekiben, cold"].append(timed(lambda: command(*run, cwd=root)))
        found["ekiben, warm"].append(timed(lambda: command(*run, cwd=root)))
        found["papermill"].append(timed(six))
    warm.stop(root)
    rival = ploomber_runner(plain)
    if isinstance(rival, str):
        return found, rival
    found["ploomber"] = [timed(rival) for _ in range(repeats)]
    return found, ""


def show(title: str, found: dict[str, list[float]], ours: str) -> dict[str, float]:
    """Print medians with their ratios to one of them, and return the medians."""
    medians = {name: statistics.median(values) for name, values in found.items()}
    print(f"\n{title}")
    for name, median in medians.items():
        print(f"  {name:14} {median:7.3f} s   {median / medians[ours]:6.1f} ×   ({min(found[name]):.3f} … {max(found[name]):.3f})")
    return medians


def main() -> int:
    """Measure, print, and say whether the aims are met."""
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    os.environ.pop("CI", None)  # a warm zygote is what is measured
    with tempfile.TemporaryDirectory(prefix="bench-") as place:
        step = show("one step, beside its cells' own work", measure_step(Path(place) / "step", repeats), "ekiben")
        found, missing = measure_pipeline(Path(place), repeats)
        six = show("six steps that import and do nothing, the whole command", found, "ekiben, warm")
    if missing:
        print(f"  ploomber       {missing}")
    others = [six[name] for name in ("papermill", "ploomber") if name in six]
    claims = {
        f"a step's overhead is at most {AIM_S} s": step["ekiben"] <= AIM_S,
        f"and {AIM_STEP:.0f} times less than papermill's": step["papermill"] >= AIM_STEP * step["ekiben"],
        f"six warm steps are {AIM_WARM:.0f} times faster than the others": all(o >= AIM_WARM * six["ekiben, warm"] for o in others),
        f"six cold steps are {AIM_COLD:.0f} times faster": all(o >= AIM_COLD * six["ekiben, cold"] for o in others),
    }
    print()
    for claim, holds in claims.items():
        print(f"  {'yes' if holds else 'NO '}  {claim}")
    return 0 if all(claims.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
