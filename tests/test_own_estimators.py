"""Estimators of the project's own and of other packages: trained, kept, refused, packaged and served."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import Project, make_columns, make_package, make_schema, make_target
from sklearn.linear_model import LogisticRegression
from sklearn.tree import DecisionTreeClassifier
from test_http import call

from ekiben.encoding import fit_preprocessor
from ekiben.errors import IntegrityError, ServiceError, SettingsError, UsageError
from ekiben.fitting import fit_sklearn
from ekiben.models import SklearnModel, load_model
from ekiben.package import make_bundle
from ekiben.portable import collect_code, load_code
from ekiben.records import Policy
from ekiben.pyfunc import requirements_of
from ekiben.runtimes import candidate_models
from ekiben.scoring import score_file
from ekiben.serving.bundle import Bundle, Limits, Lineage, load_bundle
from ekiben.serving.options import ServiceOptions
from ekiben.serving.scoring.scorer import Scorer, self_test
from ekiben.serving.http.state import State
from ekiben.skopsfile import dump_estimator, load_estimator, named_types
from ekiben.store import Store
from ekiben.trusted import VARIABLE, declare_types, declared_types, trusted_types
from ekiben.tune.problem import Problem
from ekiben.tune.search import search_models

NAME = "census.pipeline.tune.TwoModels"
TUNE = '''
"""An estimator of our own."""
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from census.blend import mix


class TwoModels(ClassifierMixin, BaseEstimator):
    """A forest and a straight line, mixed."""

    def __init__(self, depth=3):
        self.depth = depth

    def fit(self, X, y, sample_weight=None):
        self.line_ = make_pipeline(SimpleImputer(), LogisticRegression(max_iter=200)).fit(X, y)
        self.trees_ = HistGradientBoostingClassifier(max_depth=self.depth, max_iter=5, random_state=0).fit(X, y, sample_weight)
        self.classes_ = self.trees_.classes_
        return self

    def predict_proba(self, X):
        return mix(self.line_.predict_proba(X), self.trees_.predict_proba(X))

    def predict(self, X):
        return self.classes_[self.predict_proba(X).argmax(axis=1)]

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        return tags
'''
BLEND = "def mix(a, b):\n    return SHARE * a + (1 - SHARE) * b\n"


@pytest.fixture(autouse=True)
def nothing_declared(monkeypatch):
    """Let no test see what another one vouched for, or imported."""
    monkeypatch.delenv(VARIABLE, raising=False)
    yield
    declare_types([])
    forget("census", "boosting", "tripwire")


def forget(*tops: str) -> None:
    for name in [n for n in sys.modules if n.split(".")[0] in tops]:
        del sys.modules[name]


def write_project(folder: Path, share: float = 0.25) -> Path:
    """Write the census with an estimator of its own; return the folder of its package."""
    package = make_package(folder)
    (package / "pipeline" / "tune.py").write_text(TUNE)
    (package / "blend.py").write_text(f"SHARE = {share}\n{BLEND}")
    return package


def import_from(monkeypatch, source: Path, name: str) -> type:
    """Import a class from a project's or package's folder, as it is there."""
    module, _, last = name.rpartition(".")
    forget(module.split(".")[0])
    with monkeypatch.context() as patch:
        patch.syspath_prepend(str(source))
        importlib.invalidate_caches()
        return getattr(importlib.import_module(module), last)


def census(package: Path) -> tuple[Any, Any, np.ndarray, np.ndarray, Any]:
    """Return features, preprocessor, matrix, target and columns of the census."""
    features = load_code(collect_code("census", package)).features
    columns = make_columns(400)
    made = features(columns.pick([f.name for f in make_schema("binary").inputs]))
    preprocessor = fit_preprocessor(made)
    return features, preprocessor, preprocessor.transform(made), make_target(columns, "binary"), columns


def bundle_of(folder: Path, package: Path, model: Any) -> Project:
    features, preprocessor, _, _, columns = census(package)
    bundle = make_bundle(
        folder, name="census", package="census", package_root=package, schema=make_schema("binary"), preprocessor=preprocessor,
        model=model, policy=Policy(task="binary", threshold=0.4), sample=columns, lineage=Lineage(), limits=Limits(),
    )  # fmt: skip
    return Project(bundle, features, preprocessor, model, Policy(task="binary", threshold=0.4), columns, make_schema("binary"))


def own_model(monkeypatch, package: Path) -> SklearnModel:
    """Fit the project's own estimator as a notebook would."""
    kind = import_from(monkeypatch, package.parent, NAME)
    _, _, X, y, _ = census(package)
    return fit_sklearn(kind(), X, y, task="binary", n_classes=2)


def ask(bundle: Bundle, columns: Any, **options: Any) -> np.ndarray:
    """Return what a service says of rows."""
    state = State()
    state.open(bundle.folder, service=ServiceOptions(**options))
    rows = columns.pick([f.name for f in state.scorer.request_schema.inputs]).to_rows()
    body = json.dumps({"rows": rows}, default=str).encode()
    answer = call(state, "POST", "/predict", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 200, answer.text
    return np.array([p["probability"] for p in answer.json()["predictions"]])


# ---- an estimator of the project's own


def test_ones_own_class_goes_from_the_search_through_the_store_into_a_service_that_answers_the_same_bits(tmp_path, monkeypatch):
    package = write_project(tmp_path)
    monkeypatch.syspath_prepend(str(package.parent))
    declare_types([NAME])
    _, _, X, y, columns = census(package)
    rows = np.arange(len(X))
    problem = Problem(X=X, y=y, task="binary", folds=[(rows[100:], rows[:100]), (rows[:300], rows[300:])])
    asked = []

    def space(trial, estimator):
        asked.append(estimator)
        return {"depth": trial.suggest_int("depth", 2, 4)} if estimator == NAME else {}

    found = search_models(problem, space, trials=3, estimators=[NAME])
    assert found.result.estimator == NAME and NAME in asked
    store = Store(tmp_path / "objects")
    model = store.get(store.put(found.model))
    assert model.predict(X).tobytes() == found.model.predict(X).tobytes()
    project = bundle_of(tmp_path / "bundle", package, model)
    assert project.bundle.info.runtime == "python"
    assert "model/code/census/blend.py" in project.bundle.files and "model/code/census/pipeline/tune.py" in project.bundle.files
    assert "pickle" not in " ".join(project.bundle.files)

    monkeypatch.undo()
    forget("census")
    declare_types([])
    answered = ask(project.bundle, columns, trusted_types=(NAME,))
    assert answered.tobytes() == found.model.predict(X).tobytes()
    assert "census" not in sys.modules, "nothing of the project is installed where it is served"


def test_score_needs_no_more_than_the_bundle(tmp_path, monkeypatch):
    import pyarrow.parquet as pq

    package = write_project(tmp_path)
    declare_types([NAME])
    project = bundle_of(tmp_path / "bundle", package, own_model(monkeypatch, package))
    forget("census")
    pq.write_table(project.columns.to_arrow(), tmp_path / "rows.parquet")
    score_file(str(tmp_path / "rows.parquet"), tmp_path / "out.parquet", project.bundle)
    assert np.array_equal(pq.read_table(tmp_path / "out.parquet")["probability"].to_numpy(), project.predict(project.columns))


def test_what_audit_trains_again_is_still_the_class_it_was(tmp_path, monkeypatch):
    from ekiben.audit.recipe import Recipe

    package = write_project(tmp_path)
    declare_types([NAME])
    model = load_model(own_model(monkeypatch, package).to_files())
    (package / "blend.py").write_text(f"SHARE = 0.9\n{BLEND}")
    forget("census")
    _, _, X, y, _ = census(package)
    recipe = Recipe(model=model, X=X, pairs=[], params={}, rounds=0, n_classes=2)
    again = recipe.fit(slice(None), y, np.ones(len(y)))
    files = again.to_files()
    assert files["code/census/blend.py"].startswith(b"SHARE = 0.25")
    assert load_model(files).predict(X).tobytes() == again.predict(X).tobytes() == model.predict(X).tobytes()


def test_two_versions_of_a_class_answer_side_by_side_each_with_its_own_code(tmp_path, monkeypatch):
    declare_types([NAME])
    projects = []
    for name, share in (("old", 0.25), ("new", 0.75)):
        package = write_project(tmp_path / name, share)
        model = own_model(monkeypatch, package)
        projects.append((bundle_of(tmp_path / name / "bundle", package, model), model))
    forget("census")
    scorers = [Scorer(load_bundle(project.bundle.folder)) for project, _ in projects]
    said = [scorer.score_columns(project.columns)[0] for scorer, (project, _) in zip(scorers, projects, strict=True)]
    for answers, (project, model) in zip(said, projects, strict=True):
        assert answers.tobytes() == model.predict(project.preprocessor.transform(project.features(project.columns))).tobytes()
    assert np.abs(said[0] - said[1]).max() > 0.01
    assert [self_test(scorer) for scorer in scorers] == [len(s.bundle.examples) for s in scorers]
    kinds = {type(scorer.engine.model.estimator) for scorer in scorers}
    assert len(kinds) == 2 and {kind.__name__ for kind in kinds} == {"TwoModels"}
    assert projects[0][0].bundle.digest != projects[1][0].bundle.digest


def test_champion_and_challenger_of_one_class_answer_in_one_service(tmp_path, monkeypatch):
    from test_hosting import Place

    from ekiben.serving.bundle import stamp_bundle
    from ekiben.serving.security.signer import sign_folder, signing_key

    signer, signed, said = signing_key(say=lambda line: None), {}, {}
    declare_types([NAME])
    for version, share in (("3", 0.25), ("4", 0.75)):
        package = write_project(tmp_path / version, share)
        project = bundle_of(tmp_path / version / "bundle", package, own_model(monkeypatch, package))
        signed[version] = stamp_bundle(project.bundle.folder, tmp_path / f"v{version}", version=version).folder
        sign_folder(signed[version], signer, kind="bundle", name=f"census:v{version}")
        said[version] = project.predict(project.columns)
    forget("census")
    declare_types([])
    monkeypatch.setenv(VARIABLE, NAME)  # as a container's operator says it
    place = Place(tmp_path / "place", signed, signer)
    place.deploy("3", "4", share=0.5)
    state = place.open(journal=False)
    try:
        rows = project.columns.pick([f.name for f in project.schema.inputs]).to_rows()
        body, answered = json.dumps({"rows": rows}, default=str).encode(), set()
        for n in range(12):
            answer = call(state, "POST", "/predict", content=body, headers={"content-type": "application/json", "routing-key": f"k{n}"}).json()
            version = answer["model"]["version"]
            assert [p["probability"] for p in answer["predictions"]] == said[version].tolist()
            answered.add(version)
        assert answered == {"3", "4"}
    finally:
        state.close()


def test_other_code_is_another_model_even_when_it_learnt_the_same_numbers(tmp_path, monkeypatch):
    declare_types([NAME])
    files = []
    for share in (0.25, 0.25, 0.75):
        package = write_project(tmp_path, share)
        files.append(own_model(monkeypatch, package).to_files())
    assert files[0] == files[1], "equal content is equal bytes"
    assert files[0]["estimator.skops"] == files[2]["estimator.skops"] and files[0] != files[2]
    store = Store(tmp_path / "objects")
    assert len({store.put(load_model(one)).digest for one in files}) == 2


def test_parts_of_two_versions_make_no_model(tmp_path, monkeypatch):
    declare_types([NAME])
    parts = []
    for share in (0.25, 0.75):
        package = write_project(tmp_path, share)
        parts.append(load_model(own_model(monkeypatch, package).to_files()).estimator)
    with pytest.raises(UsageError, match="two versions of `census`"):
        dump_estimator({"old": parts[0], "new": parts[1]})


def test_no_faster_runtime_is_made_up_for_it(tmp_path, monkeypatch):
    package = write_project(tmp_path)
    declare_types([NAME])
    found = candidate_models(own_model(monkeypatch, package), 4)
    assert isinstance(found["onnx"], str) and found["python"].runtime == "python"


# ---- who vouches


def test_a_type_that_nobody_vouches_for_is_refused_with_the_line_that_would_let_it_in(tmp_path, monkeypatch):
    package = write_project(tmp_path)
    declare_types(["boosting.core.Boost", NAME])
    model = own_model(monkeypatch, package)
    files = model.to_files()
    declare_types(["boosting.core.Boost"])
    line = f"boosting.core.Boost, {NAME}"
    for attempt in (model.to_files, lambda: load_model(files)):
        with pytest.raises((UsageError, IntegrityError)) as told:
            attempt()
        said = str(told.value)
        assert f"`{NAME}`, which nobody vouches for here" in said and "runs its code" in said and "\n" not in said
        assert f"`trusted_types = {line}` under [serve] in settings.ini" in said and f'{VARIABLE}="{line}"' in said
    declare_types(line.split(", "))
    assert load_model(files).runtime == "python"
    declare_types([])
    monkeypatch.setenv(VARIABLE, line)
    assert set(declared_types()) == {"boosting.core.Boost", NAME} and load_model(files).runtime == "python"


def test_a_service_without_the_declaration_stays_unready_and_says_which(tmp_path, monkeypatch):
    package = write_project(tmp_path)
    declare_types([NAME])
    project = bundle_of(tmp_path / "bundle", package, own_model(monkeypatch, package))
    declare_types([])
    state = State()
    with pytest.raises(IntegrityError, match="nobody vouches for"):
        state.open(project.bundle.folder, service=ServiceOptions())
    answer = call(state, "GET", "/readyz")
    assert answer.status_code == 503 and NAME in answer.json()["detail"]


def test_a_search_asks_for_the_declaration_with_its_first_fold(tmp_path, monkeypatch):
    package = write_project(tmp_path)
    monkeypatch.syspath_prepend(str(package.parent))
    _, _, X, y, _ = census(package)
    rows, done = np.arange(len(X)), []
    problem = Problem(X=X, y=y, task="binary", folds=[(rows[100:], rows[:100])] * 3)
    with pytest.raises(UsageError, match=r"trusted_types = census\.pipeline\.tune\.TwoModels"):
        search_models(problem, lambda trial, name: {}, trials=50, estimators=[NAME], progress=lambda n, *_: done.append(n))
    assert len(done) <= 1, "the linear baseline, at most, came before"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("census.pipeline.tune.TwoModel", "has no estimator `TwoModel`.*did you mean `TwoModels`"),
        ("census.pipeline.nothing.TwoModels", "cannot be imported: No module named.*export the notebook"),
        ("nowhere.Boost", "cannot be imported: No module named 'nowhere'; install its package"),
        ("census.blend.mix", "has no estimator `mix`"),
        ("sklearn.linear_model.Ridge", "is no classifier"),
        ("TwoModels", "a class of your own or of another package is named in full"),
    ],
)
def test_an_estimator_that_cannot_be_is_named_in_one_line(tmp_path, monkeypatch, name, says):
    from ekiben.tune.estimators import find_estimator

    monkeypatch.syspath_prepend(str(write_project(tmp_path).parent))
    with pytest.raises(SettingsError, match=says):
        find_estimator(name, is_classifier=True)


def test_a_class_in_a_notebooks_memory_is_told_where_to_go(monkeypatch):
    kind = type("Mine", (LogisticRegression,), {"__module__": "__main__"})
    monkeypatch.setattr(sys.modules["__main__"], "Mine", kind, raising=False)
    with pytest.raises(UsageError, match=r"notebook's memory.*export its cell"):
        SklearnModel(kind().fit([[0.0], [1.0]], [0, 1]), "binary", 2).to_files()


def test_the_list_of_a_project_counts_in_its_steps_and_in_no_pattern(tmp_path):
    declare_types(["census.pipeline.*", "census.pipeline.tune"])
    assert NAME not in trusted_types()
    assert ServiceOptions.from_env({VARIABLE: f"{NAME}, boosting.core.Boost"}).trusted_types == (NAME, "boosting.core.Boost")
    options = ServiceOptions(trusted_types=(NAME, "boosting.core.Boost"))
    assert ServiceOptions.from_env(options.to_env()) == options
    assert ServiceOptions.from_env(ServiceOptions().to_env()).trusted_types == ()


# ---- what a file may not do

TRIP = '''
from pathlib import Path

WIRE = Path({wire!r})


def touch(*_):
    WIRE.touch()


class Trip:
    def __new__(cls, *_):
        touch()
        return super().__new__(cls)

    def __init__(self, *_):
        touch()

    def __setstate__(self, state):
        touch()

    def __reduce__(self):
        return (Trip, (1,))


class Quiet(Trip):
    def __reduce__(self):
        return object.__new__, (Quiet,), {{"n": 1}}

    def __getstate__(self):
        return {{"n": 1}}
'''


@pytest.fixture
def wire(tmp_path, monkeypatch):
    """A file that appears when a class of the module `tripwire` is made."""
    path = tmp_path / "touched"
    (tmp_path / "lib" / "site-packages" / "tripwire").mkdir(parents=True)
    (tmp_path / "lib" / "site-packages" / "tripwire" / "__init__.py").write_text(TRIP.format(wire=str(path)))
    monkeypatch.syspath_prepend(str(tmp_path / "lib" / "site-packages"))
    return path


@pytest.mark.parametrize("kind", ["Trip", "Quiet"])
@pytest.mark.parametrize("inside", [True, False])
def test_a_type_that_is_not_named_is_never_made(wire, kind, inside):
    import tripwire

    estimator = LogisticRegression().fit([[0.0], [1.0]], [0, 1])
    estimator.more = getattr(tripwire, kind)(1)
    declare_types([f"tripwire.{kind}"])
    held = SklearnModel(estimator, "binary", 2).to_files() if inside else {**SklearnModel(estimator, "binary", 2).to_files(), **dump_estimator(estimator.more)}
    wire.unlink()
    load_estimator(held)
    assert wire.exists(), "the tripwire works"
    wire.unlink()
    declare_types(["tripwire.Tri", "sklearn.linear_model._logistic.LogisticRegression"])
    header = json.loads(held["model.json"])
    held["model.json"] = json.dumps({**header, "trusted": [f"tripwire.{kind}"], "trusted_types": [f"tripwire.{kind}"]}).encode()
    forget("tripwire")
    with pytest.raises(IntegrityError, match=f"tripwire.{kind}"):
        load_model(held)
    assert not wire.exists() and "tripwire" not in sys.modules, "not even imported"


@pytest.mark.parametrize(
    "state",
    [
        {"__class__": "system", "__module__": "posix", "__loader__": "FunctionNode"},
        {"__class__": "touch", "__module__": "tripwire", "__loader__": "FunctionNode"},
        {"__class__": "Trip", "__module__": "tripwire", "__loader__": "TypeNode"},
        {"__class__": "Trip", "__module__": "tripwire", "__loader__": "ListNode", "content": []},
        {"__class__": "Trip", "__module__": "tripwire", "__loader__": "SetNode", "content": []},
        {"__class__": "Trip", "__module__": "tripwire", "__loader__": "NoSuchNode"},
        {"__class__": "Trip", "__module__": "tripwire"},
        {"__class__": 1, "__module__": "tripwire", "__loader__": "ObjectNode"},
    ],
)
def test_no_node_of_a_forged_file_runs_anything(wire, state):
    files = dump_estimator([1, 2])
    schema = {**state, "protocol": 2, "_skops_version": "0"}
    from ekiben.skopsfile import FILE, _close, _open

    schema["protocol"] = _open(files[FILE])[0]["protocol"]
    with pytest.raises(IntegrityError):
        load_estimator({FILE: _close(schema, {})})
    assert not wire.exists() and "tripwire" not in sys.modules


def test_a_file_cannot_bring_a_scikit_learn_of_its_own(wire):
    tree = DecisionTreeClassifier().fit([[0.0], [1.0]], [0, 1])
    files = dump_estimator(tree)
    text = f"from pathlib import Path\nPath({str(wire)!r}).touch()\nclass DecisionTreeClassifier:\n    pass\n"
    for package, module in (("sklearn", "tree/_classes.py"), ("numpy", "__init__.py"), ("builtins", "__init__.py")):
        files |= {f"code/{package}/__init__.py": text.encode(), f"code/{package}/{module}": text.encode(), f"code/{package}/tree/__init__.py": b""}
    with pytest.raises(IntegrityError, match=r"sklearn\.tree\._classes\.DecisionTreeClassifier"):
        load_estimator(files)
    assert not wire.exists()


def test_code_that_no_declared_type_asks_for_is_not_run(wire):
    files = dump_estimator(DecisionTreeClassifier().fit([[0.0], [1.0]], [0, 1]))
    files |= {"code/other/__init__.py": f"from pathlib import Path\nPath({str(wire)!r}).touch()\n".encode()}
    assert load_estimator(files).predict([[0.9]]) == [1]
    assert not wire.exists()


@pytest.mark.parametrize("raw", [b"", b"PK", b"PK\x05\x06" + bytes(18)])
def test_a_damaged_file_is_said_to_be_damaged(raw):
    with pytest.raises(IntegrityError):
        load_estimator({"estimator.skops": raw})


# ---- an estimator of another package

BOOST = '''
import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin


class Stump:
    def __init__(self, column, limit):
        self.column, self.limit = column, limit


class Boost(ClassifierMixin, BaseEstimator):
    def __init__(self, rounds=5):
        self.rounds = rounds

    def fit(self, X, y):
        self.classes_ = np.unique(y)
        self.stumps_ = [Stump(i % X.shape[1], float(np.nanmean(X[:, i % X.shape[1]]))) for i in range(self.rounds)]
        return self

    def predict_proba(self, X):
        X = np.asarray(X)
        p = np.mean([np.nan_to_num(X[:, s.column]) > s.limit for s in self.stumps_], axis=0)
        return np.column_stack([1 - p, p])

    def predict(self, X):
        return self.classes_[self.predict_proba(X).argmax(axis=1)]
'''


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder of installed packages with `boosting`, whose distribution is called boosting-lib."""
    folder = tmp_path / "venv" / "site-packages"
    (folder / "boosting").mkdir(parents=True)
    (folder / "boosting" / "core.py").write_text(BOOST)
    (folder / "boosting" / "__init__.py").write_text("from .core import Boost\n")
    info = folder / "boosting_lib-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: boosting-lib\nVersion: 1.2\n")
    (info / "RECORD").write_text("boosting/__init__.py,,\nboosting/core.py,,\n")
    (info / "top_level.txt").write_text("boosting\n")
    monkeypatch.syspath_prepend(str(folder))
    importlib.invalidate_caches()
    return folder


def test_an_estimator_of_another_package_is_served_and_required(site, tmp_path, monkeypatch):
    from boosting import Boost

    package = make_package(tmp_path)
    _, _, X, y, _ = census(package)
    model = fit_sklearn(Boost(), X, y, task="binary", n_classes=2)
    with pytest.raises(UsageError, match=r"trusted_types = boosting\.core\.Boost, boosting\.core\.Stump"):
        model.to_files()
    kinds = ("boosting.core.Boost", "boosting.core.Stump")
    declare_types(kinds)
    project = bundle_of(tmp_path / "bundle", package, model)
    assert not [name for name in project.bundle.files if name.startswith("model/code")]
    assert project.bundle.info.needs == ("boosting",)
    assert "boosting-lib==1.2" in requirements_of(project.bundle)
    declare_types([])
    assert ask(project.bundle, project.columns, trusted_types=kinds).tobytes() == project.predict(project.columns).tobytes()

    declare_types(kinds)
    sys.path.remove(str(site))
    forget("boosting")
    with pytest.raises(ServiceError, match="needs `boosting`; pip install boosting"):
        Scorer(load_bundle(project.bundle.folder)).engine  # noqa: B018
    with pytest.raises(UsageError, match="`boosting`, which no installed distribution provides"):
        requirements_of(project.bundle)


def test_lightgbm_within_an_estimator_is_required_too(tmp_path):
    from lightgbm import LGBMClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    package = make_package(tmp_path)
    _, _, X, y, _ = census(package)
    model = SklearnModel(make_pipeline(StandardScaler(), LGBMClassifier(n_estimators=3, verbose=-1)).fit(X, y), "binary", 2)
    bundle = bundle_of(tmp_path / "bundle", package, model).bundle
    assert [need.partition("==")[0] for need in requirements_of(bundle)] == ["lightgbm", "msgspec", "numpy", "scikit-learn", "skops"]


def test_a_class_of_ones_own_that_wraps_another_package_requires_it(site, tmp_path, monkeypatch):
    package = make_package(tmp_path)
    (package / "pipeline" / "tune.py").write_text("from boosting import Boost\n\n\nclass Mine(Boost):\n    pass\n")
    kind = import_from(monkeypatch, package.parent, "census.pipeline.tune.Mine")
    _, _, X, y, _ = census(package)
    model = fit_sklearn(kind(), X, y, task="binary", n_classes=2)
    declare_types(["census.pipeline.tune.Mine", "boosting.core.Stump"])
    bundle = bundle_of(tmp_path / "bundle", package, model).bundle
    assert bundle.info.needs == ("boosting",) and "boosting-lib==1.2" in requirements_of(bundle)
    assert ("census.pipeline.tune", "Mine") in named_types(bundle.files["model/estimator.skops"])


def test_a_step_runs_again_when_the_class_that_a_parameter_names_changes(tmp_path):
    from ekiben.cache.keys import key_of

    package = write_project(tmp_path)
    page = tmp_path / "nbs" / "02_tune.ipynb"
    page.parent.mkdir()
    page.write_text(json.dumps({"cells": [{"cell_type": "code", "metadata": {}, "source": "import json"}]}))
    (package / "models.py").write_text("from census.blend import mix\n\n\nclass Mine:\n    pass\n")

    def key(*estimators: str) -> dict[str, str]:
        return key_of(page, {"estimators": list(estimators)}, tmp_path, save=False)

    before, plain = key("census.models.Mine"), key("linear")
    assert "module census.models: Mine" in before and any(part.startswith("module census.blend") for part in before)
    assert not any(part.startswith("module census") for part in plain)
    (package / "blend.py").write_text("SHARE = 0.9\n" + BLEND)
    after = key("census.models.Mine")
    assert {part for part in after if after[part] != before.get(part)} and key("linear") == plain


# ---- a whole project


@pytest.mark.slow
def test_a_notebooks_own_class_is_run_registered_scored_and_served(tmp_path):
    from test_projects import edit_settings, ekiben, example_rows, pipeline_predictions, predict, run_project, serving

    ekiben("new", "loans", "--data", "simulated:credit?rows=3000", "--target", "default", "--positive", "yes", cwd=tmp_path)
    root = tmp_path / "loans"
    page = root / "nbs/pipeline/02_tune.ipynb"
    notebook = json.loads(page.read_text())
    place = next(i for i, cell in enumerate(notebook["cells"]) if "def search_space" in "".join(cell["source"]))
    source = "#| export\n" + TUNE.replace("from census.blend import mix", "from loans.blend import mix").lstrip()
    own = {"cell_type": "code", "id": "own", "metadata": {}, "outputs": [], "execution_count": None, "source": source}
    notebook["cells"].insert(place, own)
    page.write_text(json.dumps(notebook))
    (root / "src/loans/blend.py").write_text(f"SHARE = 0.25\n{BLEND}")
    name = "loans.pipeline.tune.TwoModels"
    asked = ("-p", f"tune.estimators={name}", "-p", "tune.trials=2")

    refused = run_project(root, *asked, code=2)
    assert {step["name"]: step["status"] for step in refused["steps"]}["tune"] == "failed"
    assert f"trusted_types = {name}" in json.dumps(refused)

    edit_settings(root, ("[serve]\n", f"[serve]\ntrusted_types = {name}\n"))
    told = run_project(root, *asked)
    assert told["model"]["runtime"] == "python" and told["model"]["alias"] == "champion"
    again = run_project(root, *asked)
    assert {step["status"] for step in again["steps"]} == {"cached"}
    rows, expected = pipeline_predictions(root, told)
    with serving(root) as url:
        answered = [p for start in range(0, len(rows), 400) for p in predict(url, rows[start : start + 400])]
        assert predict(url, example_rows(url)[:1])[0]["label"] in ("yes", "no")
    assert np.array_equal([p["probability"] for p in answered], expected)

    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ekiben("score", "rows.jsonl", "scored.parquet", cwd=root)
    import pyarrow.parquet as pq

    assert np.array_equal(pq.read_table(root / "scored.parquet")["probability"].to_numpy(), expected)

    program = """
import logging, sys, json
logging.disable(logging.CRITICAL)
import mlflow, pandas as pd
mlflow.set_tracking_uri("sqlite:///mlflow.db")
model = mlflow.pyfunc.load_model("models:/loans@champion")
frame = pd.DataFrame(json.loads(open("rows.json").read()))
print(json.dumps(model.predict(frame)["probability"].tolist()))
assert "loans" not in sys.modules
"""
    (root / "rows.json").write_text(json.dumps(rows))
    command = [sys.executable, "-c", program]
    apart = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, env={**apart, VARIABLE: name}, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert np.array_equal(json.loads(done.stdout.strip().splitlines()[-1]), expected)
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, env=apart, check=False)
    assert done.returncode and f'{VARIABLE}="{name}"' in done.stderr
