"""The stage `prepare`, and its notebook on tables of every task."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandera.pandas as pandera
import pyarrow as pa
import pytest

from ekiben import step
from ekiben.columns import Columns
from ekiben.data.infer import infer_fields
from ekiben.data.schema import pandera_source
from ekiben.data.sources import read_table
from ekiben.data.table import target_of
from ekiben.encoding import fit_clip, fit_frequency, fit_preprocessor, fit_rare, fit_unify
from ekiben.errors import DataError
from ekiben.features import month, ratio
from ekiben.prepare.clean import RawRows, clean_rows, load_rows, private_key
from ekiben.prepare.learn import divide_rows, prepare_rows, prove_row_by_row
from ekiben.sections import ColumnsSection, DataSection

NOTEBOOK = Path(__file__).resolve().parents[1] / "nbs" / "pipeline" / "01_prepare.ipynb"


def page_of(table: pa.Table) -> pandera.DataFrameSchema:
    """Return the table of the schema page that `ekiben new` would write."""
    names: dict = {"pa": pandera}
    exec(pandera_source(infer_fields(table)), names)
    return names["table"]


def settings_of(columns: dict, **data) -> SimpleNamespace:
    return SimpleNamespace(data=DataSection(**data), columns=ColumnsSection(**columns))


def shop(n: int = 300, seed: int = 0) -> pa.Table:
    random = np.random.default_rng(seed)
    visits = random.integers(0, 9, n)
    return pa.table({
        "joined": np.datetime64("2024-01-01", "us") + np.arange(n) * np.timedelta64(1, "D"),
        "customer": [f"person {i % 50}" for i in range(n)],
        "spent": pa.array(np.where(random.random(n) < 0.1, np.nan, random.gamma(2, 50, n)), from_pandas=True),
        "visits": visits.astype(float),
        "city": random.choice(np.array(["Kyoto", "kyoto", "Osaka", None], dtype=object), n, p=[0.4, 0.2, 0.35, 0.05]).tolist(),
        "back": np.where(visits + random.normal(size=n) > 4, "yes", "no"),
    })  # fmt: skip


def raw_of(table: pa.Table) -> RawRows:
    return RawRows(table, None, "a test", (), True, "0")


COLUMNS = {"target": "back", "time": "joined", "private": ("customer",)}


def clean_shop(table: pa.Table, key: bytes = b"key", **data):
    return clean_rows(raw_of(table), page_of(shop()), settings_of(COLUMNS, **data), key=key)


def features(c: Columns) -> Columns:
    return c.with_columns(per_visit=ratio(c["spent"], c["visits"]), month=month(c["joined"])).drop("joined")


CHAIN = [fit_unify, partial(fit_rare, below=5), fit_clip, fit_frequency]


def test_nothing_is_learnt_from_the_held_out_rows():
    settings, table = settings_of(COLUMNS), shop()
    other = table.to_pandas()
    held = divide_rows(clean_shop(table), settings).test.n
    other.loc[len(other) - held :, "spent"] = 1e6
    other.loc[len(other) - held :, "city"] = "Osaka"
    two = [prepare_rows(clean_shop(t), settings, features=features, transformers=CHAIN) for t in (table, pa.Table.from_pandas(other, preserve_index=False))]
    assert two[0].test != two[1].test
    assert two[0].preprocessor.to_json() == two[1].preprocessor.to_json()
    assert two[0].profile.to_json() == two[1].profile.to_json() and two[0].train == two[1].train


def test_preparing_again_gives_the_same_bytes():
    settings = settings_of(COLUMNS)
    two = [prepare_rows(clean_shop(shop()), settings, features=features, transformers=CHAIN, seed=3) for _ in range(2)]
    for name in ("preprocessor", "profile", "schema"):
        assert getattr(two[0], name).to_json() == getattr(two[1], name).to_json()
    assert two[0].train == two[1].train and two[0].test == two[1].test and two[0].summary == two[1].summary


def test_rows_are_validated_by_earlier_ones_where_there_is_a_time():
    divided = divide_rows(clean_shop(shop()), settings_of(COLUMNS))
    fold, moment = divided.train["_fold"], divided.train["joined"]
    assert divided.method == "time" and set(fold) == {-1, 0, 1, 2, 3, 4}
    for j in range(5):
        assert moment[fold < j].max() < moment[fold == j].min()
    assert moment.max() < divided.test["joined"].min()


PEEKING = {
    "a mean": lambda c: c["visits"] - np.mean(c["visits"]),
    "a rank": lambda c: np.argsort(np.argsort(c["visits"])).astype(float),
    "the row before": lambda c: np.roll(c["visits"], 1),
    "a running sum": lambda c: np.cumsum(c["visits"]),
    "the number of rows": lambda c: np.full(c.n, float(c.n)),
    "the batch's commonest category": lambda c: np.array([c["city"].tolist().count(v) > c.n / 3 for v in c["city"]]),
}


@pytest.mark.parametrize("what", PEEKING)
def test_a_feature_that_looks_at_other_rows_is_named(what):
    clean, settings = clean_shop(shop()), settings_of(COLUMNS)
    peeking = lambda c: features(c).with_columns(peek=PEEKING[what](c))  # noqa: E731
    with pytest.raises(DataError, match="the feature `peek` of row"):
        prepare_rows(clean, settings, features=peeking)


def test_a_feature_that_depends_on_the_kinds_of_values_at_hand_is_caught():
    clean, settings = clean_shop(shop()), settings_of(COLUMNS)
    moody = lambda c: features(c).drop("spent") if np.isnan(c["spent"]).all() else features(c)  # noqa: E731
    with pytest.raises(DataError):
        prepare_rows(clean, settings, features=moody)


def test_the_proof_tries_real_rows_and_rows_with_every_input_blanked():
    clean = clean_shop(shop())
    divided = divide_rows(clean, settings_of(COLUMNS))
    seen = []
    spy = lambda c: seen.append(c) or features(c)  # noqa: E731
    fitted = fit_preprocessor(features(divided.train.pick(f.name for f in clean.schema.inputs)))
    assert prove_row_by_row(spy, fitted, divided.train, clean.schema, rows=50) == 50 + 3 * 4
    assert any(c.n == 1 and np.isnan(c["visits"][0]) for c in seen) and any(c.n == 1 and c["city"][0] is None for c in seen)


def test_private_values_are_only_kept_as_hashes_with_the_projects_key(tmp_path):
    table = shop().to_pandas()
    table.loc[3, "visits"] = -1.0
    table = pa.Table.from_pandas(table, preserve_index=False)
    key = private_key(tmp_path)
    assert key == private_key(tmp_path) and (tmp_path / ".ekiben/private.key").stat().st_mode & 0o77 == 0
    clean = clean_shop(table, key=key, on_invalid="quarantine")
    hashes = clean.columns["customer"]
    assert len(set(hashes)) == 50 and clean_shop(table, key=b"another", on_invalid="quarantine").columns["customer"][0] != hashes[0]
    assert clean.quarantine.num_rows == 1 and clean.quarantine["_table"].to_pylist() == ["train"]
    everything = json.dumps([clean.columns.to_rows(), clean.quarantine.to_pylist()], default=str)
    assert "person" not in everything and "customer" not in [f.name for f in clean.schema.inputs]


def test_ignored_columns_and_rows_without_a_target_are_gone_and_counted():
    table = shop()
    back = table["back"].to_pylist()
    table = table.set_column(5, "back", pa.array([None, None, *back[2:]]))
    clean = clean_rows(raw_of(table), page_of(shop()), settings_of(COLUMNS | {"private": (), "ignore": ("customer",)}))
    assert "customer" not in clean.columns and "customer" not in clean.schema
    assert clean.counts["without_target"] == 2 and clean.columns.n == 298 == len(target_of(clean.columns, clean.schema))


def test_a_class_that_no_training_fold_has_seen_is_refused_with_what_to_do():
    table = shop().to_pandas()
    table["back"] = ["no"] * 200 + ["yes", "no"] * 50
    with pytest.raises(DataError, match="without class `yes` of `back`; use fewer folds, or another `split`"):
        divide_rows(clean_shop(pa.Table.from_pandas(table, preserve_index=False)), settings_of(COLUMNS))


def test_spellings_and_outliers_are_warned_of_by_name():
    table = shop().to_pandas()
    table.loc[5, "spent"] = 1e7
    divided = divide_rows(clean_shop(pa.Table.from_pandas(table, preserve_index=False)), settings_of(COLUMNS))
    found = {(w.kind, w.columns) for w in divided.warnings}
    assert {("spelling", ("city",)), ("outliers", ("spent",))} <= found


def test_a_sample_is_drawn_with_the_seed_and_keeps_the_order(tmp_path):
    settings = settings_of({"target": "default"}, source="simulated:credit?rows=500")
    parts = [load_rows(SimpleNamespace(settings=settings, root=tmp_path, seed=s, sample=50)).table["application_id"].to_pylist() for s in (0, 0, 1)]
    assert parts[0] == parts[1] != parts[2] and len(parts[0]) == 50
    whole = load_rows(SimpleNamespace(settings=settings, root=tmp_path, seed=0, sample=0)).table["application_id"].to_pylist()
    assert parts[0] == [name for name in whole if name in set(parts[0])]


# The notebook itself, cell by cell, as a person would run it.


def notebook_of(*cells: str) -> str:
    made = [{"cell_type": "code", "id": f"c{i}", "metadata": {}, "source": s, "outputs": [], "execution_count": None} for i, s in enumerate(cells)]
    return json.dumps({"cells": made, "metadata": {"kernelspec": {"name": "python3", "language": "python", "display_name": "python3"}}, "nbformat": 4, "nbformat_minor": 5})


def run_notebook(root: Path, monkeypatch, *, name: str, settings: str, source: str, prepare: dict | None = None) -> dict:
    """Make a project around the notebook, run its cells in this process, and return what they left behind."""
    pages = root / "nbs" / "pipeline"
    pages.mkdir(parents=True)
    (root / "pyproject.toml").write_text(f'[project]\nname = "{name}"\n[tool.nbdev]\nlib_path = "src/{name}"\nnbs_path = "nbs"\n')
    (root / "settings.ini").write_text(settings)
    declared = pandera_source(infer_fields(read_table(source)))
    (pages / "00_schema.ipynb").write_text(
        notebook_of("#| default_exp pipeline.schema", "#| export\nimport pandera.pandas as pa", f"#| export\n{declared}")
    )
    text = NOTEBOOK.read_text().replace("ekiben.pipeline", f"{name}.pipeline")
    (pages / "01_prepare.ipynb").write_text(text)
    monkeypatch.chdir(root)
    monkeypatch.delenv("EKIBEN_CONTEXT", raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path])
    names: dict = {}
    for cell in json.loads(text)["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
            if "parameters" in cell["metadata"].get("tags", []):
                names.update(prepare or {})
    return {key: step.load("prepare", key) for key in ("schema", "preprocessor", "train", "test", "profile", "summary")}


def test_the_notebook_prepares_this_repositorys_own_data(tmp_path, monkeypatch):
    source = "simulated:credit?rows=4000"
    settings = (
        f"[data]\nsource = {source}\n[columns]\ntarget = default\npositive = yes\ntime = applied_on\nsensitive = sex\nid = application_id\n"
    )
    got = run_notebook(tmp_path, monkeypatch, name="credit_page", settings=settings, source=source, prepare={"outliers": "clip"})
    names = got["preprocessor"].names
    assert "applied_on_month" in names and not {"sex", "application_id", "default", "applied_on"} & set(names)
    assert len(got["preprocessor"].categories["purpose"]) == 6, "18 spellings of 6 purposes become 6"
    assert {"spelling", "outliers"} <= {w["kind"] for w in got["summary"]["warnings"]}
    assert [type(t).__name__ for t in got["preprocessor"].transformers] == ["Clip", "Unify", "Rare"]
    assert got["train"]["applied_on"].max() < got["test"]["applied_on"].min()


def test_the_notebook_prepares_adult_with_its_given_test_file(tmp_path, monkeypatch, shared_data):
    folder = shared_data / "adult"
    settings = (
        f"[data]\nsource = {folder}/train.csv\ntest = {folder}/test.csv\nsample = 4000\n"
        "[columns]\ntarget = income\npositive = >50K\nsensitive = sex, race\n"
    )
    got = run_notebook(tmp_path, monkeypatch, name="adult_page", settings=settings, source=f"{folder}/train.csv")
    assert got["schema"].classes == ("<=50K", ">50K") and got["schema"].having("sensitive") == ("race", "sex")
    assert not {"sex", "race", "income"} & set(got["preprocessor"].names) and {"sex", "race"} <= set(got["train"])
    assert got["profile"]["workclass"].missing > 100 and "?" not in got["profile"]["workclass"].levels
    assert set(got["train"]["_fold"]) == {0, 1, 2, 3, 4} and 0.2 < target_of(got["test"], got["schema"]).mean() < 0.28


def test_the_notebook_prepares_bike_sharing_and_names_its_leak(tmp_path, monkeypatch, shared_data):
    source = f"{shared_data}/bike_sharing/hour.csv"
    settings = f"[data]\nsource = {source}\n[columns]\ntarget = cnt\ntime = dteday\n"
    got = run_notebook(tmp_path, monkeypatch, name="bike_page", settings=settings, source=source, prepare={"folds": 3})
    assert got["schema"].task == "regression"
    leaks = {name for w in got["summary"]["warnings"] if w["kind"] == "leak" for name in w["columns"]}
    assert leaks == {"casual", "registered"}
    assert {"dteday_month", "dteday_weekday"} <= set(got["preprocessor"].names) and "instant" not in got["preprocessor"].names
    assert got["train"]["dteday"].max() < got["test"]["dteday"].min() and set(got["train"]["_fold"]) == {-1, 0, 1, 2}


def test_the_notebook_prepares_wine_with_three_classes_and_nothing_sensitive(tmp_path, monkeypatch):
    from sklearn.datasets import load_wine

    source = tmp_path / "wine.csv"
    load_wine(as_frame=True).frame.to_csv(source, index=False)
    settings = f"[data]\nsource = {source}\n[columns]\ntarget = target\n"
    got = run_notebook(tmp_path, monkeypatch, name="wine_page", settings=settings, source=str(source))
    assert got["schema"].task == "multiclass" and len(got["schema"].classes) == 3
    assert got["preprocessor"].transform(got["train"].pick(got["preprocessor"].names)).shape == (got["train"].n, 13)
    assert got["train"].n + got["test"].n == 178
