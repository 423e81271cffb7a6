"""The Bento, installed from nothing but its own requirements: it answers the same, without what trains."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from bundles import make_columns, make_project

from ekiben.bento import build_bento
from ekiben.image.containerfile import pin_requirements
from ekiben.serving.bundle import Lineage, stamp_bundle
from ekiben.serving.run import stop_process
from ekiben.serving.scoring.scorer import Scorer
from ekiben.serving.security.signer import signing_key
from ekiben.serving.security.trust import write_key

SERVICE = Path(__file__).resolve().parents[1] / "bentos" / "scorer" / "service.py"
TRAINING = {"pandas", "sklearn", "mlflow", "optuna", "fairlearn", "shap", "matplotlib", "nbdev", "papermill", "ekiben"}
MLFLOW = ("bentoml", "mlflow", "lightgbm")  # what a Bento around `mlflow.pyfunc.load_model` asks for


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def ask(url: str, body: object = None) -> dict:
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url, data, {"content-type": "application/json"}), timeout=30) as answer:
        return json.loads(answer.read())


def install(place: Path, requirements: Path) -> Path:
    """Make an environment with the requirements alone; return its Python."""
    python = place / "bin" / "python"
    if uv := shutil.which("uv"):
        commands = [[uv, "venv", "--quiet", "--python", sys.executable, str(place)]]
        commands += [[uv, "pip", "install", "--quiet", "--python", str(python), "-r", str(requirements)]]
    else:
        commands = [[sys.executable, "-m", "venv", str(place)]]
        commands += [[str(python), "-m", "pip", "install", "--quiet", "-r", str(requirements)]]
    for command in commands:
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr
    return python


def installed_mb(names: list[str]) -> float:
    """Return what packages take on this machine's disk, in megabytes."""
    found = [importlib.metadata.distribution(line.partition("==")[0]) for line in names]
    paths = {Path(str(file.locate())) for dist in found for file in dist.files or ()}
    return sum(path.stat().st_size for path in paths if path.is_file() and path.suffix != ".pyc") / 1e6


@pytest.mark.slow
def test_it_answers_the_same_from_its_own_requirements_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("BENTOML_HOME", str(tmp_path / "bentoml"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("EKIBEN_TRUSTED_KEYS", raising=False)
    project = make_project(tmp_path / "made", lineage=Lineage(run_id="20260101-120000-aaaa"))
    fact = build_bento(stamp_bundle(project.bundle.folder, tmp_path / "stamped", version="3"), SERVICE, say=lambda line: None)
    folder = Path(fact.folder)
    requirements = folder / "env" / "python" / "requirements.txt"
    python = install(tmp_path / "empty", requirements)

    look = "import importlib.util as u, sys; print(*[n for n in sys.argv[1:] if u.find_spec(n)])"
    found = subprocess.run([python, "-I", "-c", look, *sorted(TRAINING)], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []

    port = free_port()
    url = f"http://127.0.0.1:{port}"
    env = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path / "home"),
        "BENTOML_HOME": str(tmp_path / "home" / "bentoml"),
        "BENTOML_DO_NOT_TRACK": "True",
        "PYTHONDONTWRITEBYTECODE": "1",
        "EKIBEN_TRUSTED_KEYS": write_key(signing_key().public),
        "EKIBEN_JOURNAL": str(tmp_path / "journal"),
    }
    log = (tmp_path / "log").open("w+")
    process = subprocess.Popen(
        [str(python), "-m", "bentoml", "serve", str(folder), "--host", "127.0.0.1", "--port", str(port)],
        env=env, cwd=tmp_path, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
    )
    try:
        deadline, ready = time.monotonic() + 120, False
        while not ready and time.monotonic() < deadline:
            assert process.poll() is None, (tmp_path / "log").read_text()
            try:
                ready = ask(f"{url}/readyz")["status"] == "ready"
            except OSError:
                time.sleep(0.1)
        assert ready, (tmp_path / "log").read_text()
        rows = make_columns(200, seed=3).pick([f.name for f in project.schema.inputs]).to_rows()
        answered = ask(f"{url}/predict", {"rows": rows})["predictions"]
        assert [one["probability"] for one in answered] == [one.probability for one in Scorer(project.bundle).score_rows(rows)]
        for row, one in zip(rows[:5], answered, strict=False):
            assert ask(f"{url}/predict", {"rows": [row]})["predictions"][0]["probability"] == one["probability"]
    finally:
        stop_process(process)
        log.close()

    ours = installed_mb([line for line in requirements.read_text().split() if line != "--"])
    theirs = installed_mb(pin_requirements(MLFLOW))
    with capsys.disabled():
        print(f"\nthe Bento's requirements: {ours:.0f} MB; those of an MLflow-based Bento: {theirs:.0f} MB")
    assert ours < theirs


def test_every_requirement_has_a_version_and_nothing_is_left_open(tmp_path):
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    pins = pin_requirements(["bentoml", "lightgbm", "numpy"])
    assert all("==" in line for line in pins) and pins == sorted(set(pins))
    names = {line.partition("==")[0] for line in pins}
    for name in names:
        for need in map(Requirement, importlib.metadata.requires(name) or ()):
            if need.marker is None or need.marker.evaluate({"extra": ""}):
                assert canonicalize_name(need.name) in names, f"{name} needs {need}"
    assert "numpy==1.0" in pin_requirements(["numpy==1.0", "lightgbm"])
