"""MLflow's registry holds bundles: once each, found again, loadable anywhere."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from bundles import make_columns, make_project

from ekiben.errors import RegistryError
from ekiben.pyfunc import requirements_of
from ekiben.registry import Registry
from ekiben.serving.bundle import load_bundle


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("registry")
    project = make_project(root / "one")
    registry = Registry(root, "sqlite:///mlflow.db", "census")
    return project, registry, registry.register(project.bundle)


def test_the_same_content_is_registered_once(place, tmp_path):
    project, registry, version = place
    assert (version.version, version.is_new) == ("1", True)
    from ekiben.serving.bundle import stamp_bundle

    again = registry.register(stamp_bundle(project.bundle.folder, tmp_path / "again", run_id="another run"))
    assert (again.version, again.is_new) == ("1", False)
    assert len(registry.versions("census")) == 1


def test_a_version_leads_back_to_run_git_and_data(place):
    _, registry, version = place
    tags = registry.versions("census")[0].tags
    assert tags["ekiben.run"] == "20260101-120000-aaaa"
    assert tags["ekiben.git"] == "0" * 40 and tags["ekiben.fingerprint"] == "f" * 16
    assert registry.client.get_run(version.mlflow_run).info.status == "FINISHED"


def test_store_and_artefacts_lie_in_the_project(place):
    _, registry, _ = place
    assert (registry.root / "mlflow.db").is_file()
    assert list((registry.root / "mlartifacts").rglob("bundle.json"))
    assert not [p for p in (registry.root / "mlartifacts").rglob("*.pkl")]


def test_the_fetched_bundle_is_the_registered_one(place, tmp_path):
    project, registry, version = place
    fetched = registry.fetch(version, tmp_path / "bundle")
    assert fetched.digest == project.bundle.digest
    assert load_bundle(tmp_path / "bundle").folder == tmp_path / "bundle"


def test_aliases_move(place, tmp_path):
    _project, registry, version = place
    registry.set_alias(version, "champion")
    other = registry.register(make_project(tmp_path, rounds=5).bundle)
    assert other.version == "2"
    registry.set_alias(other, "challenger")
    assert registry.holder("census", "challenger").version == "2"
    registry.set_alias(other, "champion")
    assert registry.holder("census", "champion").version == "2"
    registry.drop_alias("census", "challenger")
    assert registry.holder("census", "challenger") is None
    assert registry.holder("nobody", "champion") is None
    registry.set_alias(version, "champion")


def test_pyfunc_answers_the_same_in_a_fresh_process(place, tmp_path):
    project, registry, _ = place
    fresh = make_columns(40, seed=8)
    fresh.to_pandas().to_parquet(tmp_path / "rows.parquet")
    program = f"""
import json, logging, sys
logging.disable(logging.CRITICAL)
import mlflow, pandas as pd
mlflow.set_tracking_uri({registry.uri!r})
model = mlflow.pyfunc.load_model("models:/census/1")
frame = pd.read_parquet({str(tmp_path / "rows.parquet")!r})
said = model.predict(frame)
import ekiben
print(json.dumps([said["probability"].tolist(), said["label"].tolist(), ekiben.__file__, sorted(sys.modules)]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    probability, label, home, modules = json.loads(done.stdout.strip().split("\n")[-1])
    expected = project.predict(fresh)
    assert np.array_equal(probability, expected)
    assert label == ["yes" if p >= 0.4 else "no" for p in expected]
    assert "mlartifacts" in home, "the code that travels inside the model is what runs"
    assert not {"lightgbm", "sklearn", "optuna"} & set(modules)


def test_a_version_whose_files_are_gone_is_registered_anew(tmp_path):
    project = make_project(tmp_path)
    registry = Registry(tmp_path, experiment="census")
    first = registry.register(project.bundle)
    shutil.rmtree(tmp_path / "mlartifacts")
    assert not registry.holds(first)
    assert registry.register(project.bundle).version == "2"


def test_a_run_that_is_given_is_left_as_it_is(tmp_path):
    registry = Registry(tmp_path, experiment="census")
    run = registry.client.create_run(registry.experiment_id()).info.run_id
    version = registry.register(make_project(tmp_path).bundle, mlflow_run=run)
    assert version.mlflow_run == run
    assert registry.client.get_run(run).info.status == "RUNNING"


def test_mlflows_global_settings_are_left_alone(place, monkeypatch):
    import os

    import mlflow

    _project, registry, version = place
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", "sqlite:////elsewhere.db")
    before = {k: v for k, v in os.environ.items() if k.startswith("MLFLOW")}
    registry.holds(version)
    assert {k: v for k, v in os.environ.items() if k.startswith("MLFLOW")} == before
    assert not mlflow.is_tracking_uri_set()


def test_requirements_are_what_the_runtime_needs(tmp_path):
    for runtime, more in (("lightgbm", {"lightgbm"}), ("linear", set()), ("python", {"scikit-learn", "skops"})):
        needs = requirements_of(make_project(tmp_path / runtime, runtime=runtime).bundle)
        assert {n.split("==")[0] for n in needs} == {"numpy", "msgspec"} | more


def test_a_store_that_cannot_be_opened_is_one_line(tmp_path):
    (tmp_path / "mlflow.db").write_text("this is no database, whatever its name says" * 100)
    with pytest.raises(RegistryError) as caught:
        Registry(tmp_path).versions("census")
    assert "\n" not in str(caught.value)
