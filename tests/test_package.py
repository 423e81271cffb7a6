"""Packaging: gates stop it, parity is proved, the better version becomes champion, nothing piles up."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import numpy as np
import pytest
from bundles import PREPARE, make_columns, make_package, make_project, make_target


from ekiben.challenge import Comparison, compare_bundles, compare_predictions
from ekiben.errors import GateError, IntegrityError, ServiceError
from ekiben.package import (
    make_bundle,
    release,
    require_gates,
)
from ekiben.parity import prove_parity, require_parity
from ekiben.records import Judgement
from ekiben.runner.standing import what_is_gone
from ekiben.registry import Registry
from ekiben.serving.bundle import Limits, Lineage
from ekiben.serving.run import find_served
from ekiben.serving.served import Served, bento_folder, is_whole

SERVICE = Path(__file__).resolve().parents[1] / "bentos" / "scorer" / "service.py"


def judgement(**changes) -> Judgement:
    plain = Judgement(
        name="auc >= 0.9", metric="auc", slice="", op=">=", limit=0.9, value=0.8, low=0.7, high=0.9,
        verdict="fail", blocking=True,
    )  # fmt: skip
    return msgspec.structs.replace(plain, **changes)


def test_a_failed_gate_stops_unless_waived_or_only_watched():
    require_gates([judgement(waived="pilot"), judgement(blocking=False), judgement(verdict="pass")])
    require_gates([judgement(verdict="insufficient")])
    for blocked, how in ((judgement(), "warn"), (judgement(verdict="insufficient"), "block")):
        with pytest.raises(GateError, match=r"auc >= 0\.9") as caught:
            require_gates([blocked], insufficient=how)
        assert caught.value.exit_code == 3


@pytest.mark.parametrize(("runtime", "task"), [("lightgbm", "binary"), ("linear", "multiclass"), ("python", "regression")])
def test_parity_is_proved_on_every_held_out_row(tmp_path, runtime, task):
    project = make_project(tmp_path, runtime=runtime, task=task)
    held_out = make_columns(500, seed=3)
    prediction = project.predict(held_out)
    parity = prove_parity(project.bundle, held_out, prediction, project.policy.decide(prediction))
    assert parity.is_proved and (parity.rows, parity.single_rows, parity.refused) == (500, 500, 0)
    if runtime != "python":
        assert parity.different_bits == 0 and parity.tolerance == 0


def test_one_bit_is_enough_to_disprove_parity(tmp_path):
    project = make_project(tmp_path)
    held_out = make_columns(50, seed=3)
    prediction = project.predict(held_out)
    prediction[7] = np.nextafter(prediction[7], 1)
    parity = prove_parity(project.bundle, held_out, prediction, project.policy.decide(prediction))
    assert parity.different_bits == 3, "in the batch, alone, and alone in the code written for the bundle"
    with pytest.raises(IntegrityError, match="3 answers differ"):
        require_parity(parity)


def test_a_feature_that_looks_at_other_rows_is_caught(tmp_path):
    project = make_project(tmp_path)
    package = make_package(tmp_path)
    flag = 'member=("flag", (c["member"] + (c.n > 1)) % 2)'
    prepare = PREPARE.replace("capital=capital,", f"capital=capital, {flag},")
    (package / "pipeline" / "prepare.py").write_text(prepare)
    bundle = make_bundle(
        tmp_path / "leaky", name="census", package="census", package_root=package, schema=project.schema,
        preprocessor=project.preprocessor, model=project.model, policy=project.policy, sample=project.columns,
        lineage=Lineage(), limits=Limits(),
    )  # fmt: skip
    held_out = make_columns(200, seed=3)
    from ekiben.serving.scoring.scorer import Scorer

    prediction, decision = Scorer(bundle).score_columns(held_out)
    with pytest.raises(IntegrityError, match="depends on other rows"):
        require_parity(prove_parity(bundle, held_out, prediction, decision))


def test_rows_outside_the_limits_are_counted_and_still_compared(tmp_path):
    project = make_project(tmp_path, limits=Limits(missing="reject"))
    held_out = make_columns(100, seed=3)
    prediction = project.predict(held_out)
    parity = prove_parity(project.bundle, held_out, prediction, project.policy.decide(prediction))
    assert parity.is_proved and 20 < parity.refused < 80


def test_the_bundles_examples_show_whole_rows_and_gaps(tmp_path):
    project = make_project(tmp_path)
    bundle = make_bundle(
        tmp_path / "b", name="census", package="census", package_root=make_package(tmp_path), schema=project.schema,
        preprocessor=project.preprocessor, model=project.model, policy=project.policy, sample=project.columns,
        lineage=Lineage(), limits=Limits(),
    )  # fmt: skip
    gaps = [any(v is None for v in e.row.values()) for e in bundle.examples]
    assert len(gaps) == 8 and sum(gaps) == 3


@pytest.mark.parametrize("task", ["binary", "multiclass", "regression"])
def test_better_means_the_whole_interval(tmp_path, task):
    rng = np.random.default_rng(1)
    n = 3000
    if task == "regression":
        y = rng.normal(size=n)
        good, bad = y + rng.normal(scale=0.5, size=n), y + rng.normal(scale=0.8, size=n)
    elif task == "binary":
        p = rng.random(n)
        y = (rng.random(n) < p).astype(np.int64)
        good, bad = p, np.clip(p + rng.normal(scale=0.4, size=n), 0, 1)
    else:
        p = rng.dirichlet([1, 1, 1], size=n)
        y = np.array([rng.choice(3, p=row) for row in p])
        good, bad = p, 0.5 * p + 0.5 / 3
    better, worse = compare_predictions(task, y, bad, good), compare_predictions(task, y, good, bad)
    assert better.is_better and better.low <= better.gain <= better.high
    assert not worse.is_better and worse.high < 0
    assert not compare_predictions(task, y, good, good).is_better
    assert better.gain == pytest.approx(-worse.gain)


def test_the_same_seed_gives_the_same_interval():
    rng = np.random.default_rng(1)
    y, a, b = rng.integers(0, 2, 500), rng.random(500), rng.random(500)
    assert compare_predictions("binary", y, a, b, seed=4) == compare_predictions("binary", y, a, b, seed=4)


def test_other_tasks_are_not_comparable(tmp_path):
    one, other = make_project(tmp_path / "a"), make_project(tmp_path / "b", task="regression")
    said = compare_bundles(one.bundle, other.bundle, one.columns, np.zeros(600))
    assert said.gain is None and "not comparable" in said.note


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("BENTOML_HOME", str(tmp_path / "bentoml"))
    return tmp_path


def nothing_to_compare(champion) -> Comparison:
    raise AssertionError("there is no champion to compare with")


@pytest.mark.slow
def test_the_first_is_champion_and_later_ones_earn_it(home):
    registry = Registry(home, experiment="census")
    strong = make_project(home / "strong", rounds=40, rows=3000)
    weak = make_project(home / "weak", rounds=1, rows=3000)
    held_out = make_columns(2000, seed=11)
    y = make_target(held_out, "binary", seed=11)

    def go(project, promote="if_better", compare=None):
        fallback = lambda champion: compare_bundles(champion, project.bundle, held_out, y)  # noqa: E731
        return release(project.bundle, registry, service=SERVICE, promote=promote, compare=compare or fallback)

    first = go(weak, compare=nothing_to_compare)
    assert (first.version, first.alias, first.is_new) == ("1", "champion", True)
    again = go(weak, compare=nothing_to_compare)
    assert (again.version, again.alias, again.is_new, again.bento) == ("1", "champion", False, first.bento)
    assert len(list(bento_folder(first.bento).parent.glob("v*"))) == 1, "the same content is the same Bento"

    held_back = go(strong, promote="never")
    assert (held_back.version, held_back.alias) == ("2", "challenger")
    assert find_served(home)[0].version == "1"

    better = go(strong)
    assert better.comparison.is_better and better.alias == "champion"
    assert registry.holder("census", "champion").version == "2"
    assert registry.holder("census", "challenger") is None, "no version is both"
    served, bundle = find_served(home)
    assert (served.version, served.bento) == ("2", better.bento)
    assert bundle.info.lineage.version == "2" and bundle.info.lineage.mlflow_run

    worse = go(weak)
    assert worse.alias == "challenger" and not worse.comparison.is_better
    assert find_served(home)[0].version == "2"

    facts = {"model": better.to_dict(), "bento": {"tag": better.bento}}

    def gone() -> str:
        return what_is_gone(home, "sqlite:///mlflow.db", facts)

    assert gone() == ""
    label = json.loads(json.dumps(msgspec.yaml.decode((bento_folder(better.bento) / "bento.yaml").read_bytes())))["labels"]
    assert label["ekiben.version"] == "2" and label["ekiben.run"] == "20260101-120000-aaaa"
    assert label["ekiben.digest"] == better.digest and label["ekiben.git"] == "0" * 40

    card = bento_folder(better.bento) / "src" / "bundle" / "card.md"
    card.write_text("another card")
    assert not is_whole(better.bento) and "was changed" in gone()
    with pytest.raises(IntegrityError, match=r"card\.md"):
        find_served(home)
    assert go(strong).bento == better.bento and is_whole(better.bento), "a damaged Bento is built again"
    registry.set_alias(registry.versions("census")[1], "champion")
    assert "no longer holds census version 2 as champion" in gone()


def test_a_service_that_is_not_there_is_named(home):
    from ekiben.package import build_bento

    with pytest.raises(ServiceError, match=r"service\.py"):
        build_bento(make_project(home).bundle, home / "service.py")


def test_a_service_that_cannot_be_built_says_why(home):
    from ekiben.package import build_bento

    (home / "service.py").write_text("raise RuntimeError('no such thing')\n")
    with pytest.raises(ServiceError, match="no such thing"):
        build_bento(make_project(home).bundle, home / "service.py")


def test_what_serves_is_read_back(tmp_path):
    served = Served(bento="census:v1-ab", name="census", version="1", digest="ab")
    assert Served.from_json(served.to_json()) == served
