"""settings.ini: one file, read whole, every mistake named with its line."""

from __future__ import annotations

import configparser
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from ekiben.errors import SettingsError, UsageError
from ekiben.inifile import Ini, read_ini
from ekiben.parameters import read_cells
from ekiben.sections import MISSING, SECTIONS, Settings
from ekiben.settings import find_root, load_settings, render_settings

TUNE = (
    'upstream: list[str] = ["prepare"]\n'
    "budget_s: float = 60.0  # seconds of search\n"
    "trials: int | None = None\n"
    'learner: Literal["lightgbm", "linear"] = "lightgbm"\n'
)

patient = hypothesis_settings(deadline=None)


def project(root: Path, text: str, **notebooks: str) -> Path:
    folder = root / "nbs" / "pipeline"
    folder.mkdir(parents=True, exist_ok=True)
    for number, (step, source) in enumerate((notebooks or {"tune": TUNE}).items(), 1):
        cell = {"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": source}
        (folder / f"{number:02}_{step}.ipynb").write_text(json.dumps({"cells": [cell]}))
    (root / "settings.ini").write_bytes(text.encode())
    return root


def load(root: Path, text: str, *, env: dict[str, str] | None = None, **overrides: str) -> Settings:
    named = {key.replace("__", "."): value for key, value in overrides.items()}
    return load_settings(project(root, text), env=env or {}, overrides=named)


def refusal(root: Path, text: str, **options: Any) -> str:
    with pytest.raises(SettingsError) as refused:
        load(root, text, **options)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_the_shortest_file_gives_every_default(tmp_path: Path) -> None:
    settings = load(tmp_path / "census", "[columns]\ntarget = income\n")
    assert settings.root == (tmp_path / "census").resolve()
    assert (settings.pipeline.name, settings.pipeline.package) == ("census", "census")
    assert (settings.pipeline.notebooks, settings.pipeline.seed) == ("nbs/pipeline", 0)
    assert settings.pipeline.tracking_uri == "sqlite:///mlflow.db"
    assert (settings.data.source, settings.data.split, settings.data.missing) == ("simulated:credit", "auto", MISSING)
    assert settings.columns.roles == {"income": "target"}
    assert (settings.gates.declared, settings.gates.insufficient) == ((), "warn")
    assert (settings.serve.host, settings.serve.port) == ("127.0.0.1", 3000)
    assert settings.steps == {"tune": {"budget_s": 60.0, "trials": None, "learner": "lightgbm"}}


def test_a_full_file_is_read_with_its_types(tmp_path: Path) -> None:
    text = """
# a comment
[pipeline]
name = credit risk
seed = 7
[data]
source = data/*.parquet
sources =
    customers = data/c.csv on id
    # not this one
    rates = data/r.csv on id, day asof time
split = time
missing = ?, "a, b"
test_size = .25
[columns]
target = default
positive = yes
time = applied_on
sensitive = sex
    age group
private = "name, first"
sensitive_as_input = no
[gates]
gates =
    auc >= 0.70

    ; a comment
    demographic_parity_ratio[age group] >= 0.8
watch = brier <= 0.2
insufficient = block
[tune]
trials = 30
learner = linear
"""
    settings = load(tmp_path, text.replace("\n", "\r\n"))
    assert settings.data.sources == "customers = data/c.csv on id\nrates = data/r.csv on id, day asof time"
    assert (settings.data.missing, settings.data.test_size) == (("?", "a, b"), 0.25)
    assert settings.columns.sensitive == ("sex", "age group")
    assert settings.columns.roles["name, first"] == "private"
    assert [(g.name, g.blocking, g.where) for g in settings.gates.declared] == [
        ("auc >= 0.70", True, "settings.ini line 25"),
        ("demographic_parity_ratio[age group] >= 0.8", True, "settings.ini line 28"),
        ("brier <= 0.2", False, "settings.ini line 29"),
    ]
    assert [g.name for g in settings.gates.watch] == ["brier <= 0.2"]
    assert settings.steps["tune"] == {"budget_s": 60.0, "trials": 30, "learner": "linear"}
    assert settings.pipeline.package == "credit_risk"
    assert settings.where("columns", "time") == "settings.ini line 18"
    assert settings.where("columns") == "settings.ini line 15"
    assert settings.where("serve", "port") == "settings.ini"


BASE = "[columns]\ntarget = y\nsensitive = sex\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[tune]\nbudgets = 3", "settings.ini line 5: [tune] has no key `budgets`; did you mean `budget_s`?"),
        ("[tune]\nupstream = x", "settings.ini line 5: [tune] `upstream` cannot be set; change it in 01_tune.ipynb"),
        ("[tune]\nbudget_s = 1_0", "settings.ini line 5: [tune] `budget_s` takes a number, got `1_0`"),
        ("[tune]\ntrials = 1e3", "settings.ini line 5: [tune] `trials` takes a whole number or nothing, got `1e3`"),
        (
            "[tune]\nlearner = linnear",
            "line 5: [tune] `learner` takes one of `lightgbm`, `linear`, got `linnear`; did you mean `linear`?",
        ),
        ("[tunes]\nx = 1", "settings.ini line 4: no section [tunes]; did you mean `tune`?"),
        ("[Data]\nx = 1", "settings.ini line 4: no section [Data]; did you mean `data`?"),
        ("[data]\nsorce = a.csv", "settings.ini line 5: [data] has no key `sorce`; did you mean `source`?"),
        ("[data]\nSource = a.csv", "settings.ini line 5: [data] has no key `Source`; did you mean `source`?"),
        ("[monitor]\nx = 1", "settings.ini line 5: [monitor] has no key `x`"),
        ("[data]\n\nsplit = tme", "settings.ini line 6: [data] `split` takes one of"),
        ("[data]\ntest_size = 1.5", "settings.ini line 5: [data] `test_size` should be less than 1, got `1.5`"),
        (
            "[serve]\nport = 70000",
            "settings.ini line 5: [serve] `port` should be less than or equal to 65535, got `70000`",
        ),
        ("[serve]\nport = 3000 # local", "got `3000 # local`; a comment goes on a line of its own"),
        ("[gates]\ngates =\n    auc >= 1.7", "settings.ini line 6: `auc >= 1.7` can never be met"),
        ("[gates]\nwatch =\n    # hm\n    auk >= 0.7", "settings.ini line 7: no metric `auk`; did you mean `auc`?"),
        (
            "[gates]\nauc >= 0.7",
            "settings.ini line 5: `auc >= 0.7` is neither [section] nor `key = value`; a gate stands indented",
        ),
        (
            "[gates]\ngates = demographic_parity_ratio[sx] >= 0.8",
            "settings.ini line 5: `sx` is not in [columns] sensitive; did you mean `sex`?",
        ),
        (
            "[data]\ntask = regression\n[gates]\ngates = auc >= 0.7",
            "settings.ini line 7: `auc` is not measured for regression",
        ),
        ("[data]\nsplit = time", "settings.ini line 5: [data] split = time needs [columns] `time`"),
        ("[data]\nsplit = group", "settings.ini line 5: [data] split = group needs [columns] `group`"),
        ("[data]\nsplit = file", "settings.ini line 5: [data] split = file needs [data] `test`"),
        ("[data]\ntest = t.csv\nsplit = stratified", "settings.ini line 5: [data] `test` is given"),
        ("[columns]\nid = x", "settings.ini line 4: section [columns] is already there in line 1"),
        ("id = x\nid = z", "settings.ini line 5: [columns] `id` is already set in line 4"),
        ("id = sex", "settings.ini line 3: [columns] `sex` is both id and sensitive"),
        ("ignore = a, y", "settings.ini line 4: [columns] `y` is both target and ignore"),
        ("[data]\ntask = regression\n[columns2]", "settings.ini line 6: no section [columns2]"),
        (
            "[data\nsource = x",
            "settings.ini line 4: `[data` is neither [section] nor `key = value`; a section is its name",
        ),
        ("[data] # mine", "settings.ini line 4: `[data] # mine` is neither"),
        (
            "[data]\nsource: x",
            "settings.ini line 5: `source: x` is neither [section] nor `key = value`; write `=`, not `:`",
        ),
        ("[data]\n  source = x", "settings.ini line 5: `source = x` is indented but continues nothing"),
        ('[data]\nmissing = "?', "settings.ini line 5: [data] `missing` takes a list"),
    ],
)
def test_a_mistake_names_its_line_and_what_was_meant(tmp_path: Path, text: str, says: str) -> None:
    message = refusal(tmp_path, BASE + text)
    assert says in message
    assert message.startswith("settings.ini line ")


def test_a_positive_label_needs_two_classes(tmp_path: Path) -> None:
    message = refusal(tmp_path, "[columns]\ntarget = y\npositive = 1\n[data]\ntask = regression")
    assert message == "settings.ini line 3: [columns] `positive` is for binary, but [data] task = regression"


@pytest.mark.parametrize(
    ("text", "where"),
    [("", "settings.ini:"), ("\n[columns]\n", "settings.ini line 2:"), ("[columns]\ntarget =", "settings.ini line 2:")],
)
def test_a_target_must_be_named(tmp_path: Path, text: str, where: str) -> None:
    assert refusal(tmp_path, text) == f"{where} [columns] needs `target`: the column to predict"


def test_a_missing_file_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"^no settings.ini in .*; `ekiben new` makes a project$"):
        load_settings(tmp_path, env={})


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"\xef\xbb\xbf[data]\n", "line 1: starts with a byte-order mark"),
        ("[data]\n".encode("utf-16"), "line 1: is UTF-16"),
        ("[data]\n# Größe\nsource = x".encode("latin-1"), "line 2: byte 0xf6 is not UTF-8"),
        (b"source = x\n", "line 1: `source` stands before the first [section]"),
        (b"\xff\xfe\x00", "line 1: is UTF-16"),
        (b"[data]\rsource\r", "line 2: `source` is neither"),
    ],
)
def test_a_file_that_is_no_ini_in_utf8_names_the_line(tmp_path: Path, raw: bytes, says: str) -> None:
    (tmp_path / "settings.ini").write_bytes(raw)
    with pytest.raises(SettingsError) as refused:
        read_ini(tmp_path / "settings.ini")
    assert str(refused.value).startswith(f"settings.ini {says}")


def test_a_folder_of_that_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "settings.ini").mkdir()
    with pytest.raises(SettingsError, match="cannot be read"):
        load_settings(tmp_path, env={})


def test_the_command_line_outweighs_the_environment_and_that_the_file(tmp_path: Path) -> None:
    text = BASE + "[tune]\nbudget_s = 1\n[data]\nsource = a.csv"
    env = {"EKIBEN_TUNE__BUDGET_S": "2", "EKIBEN_DATA__SOURCE": "b.csv", "EKIBEN_CONTEXT": "x", "HOME__X": "y"}
    assert load(tmp_path, text).steps["tune"]["budget_s"] == 1.0
    settings = load(tmp_path, text, env=env)
    assert (settings.steps["tune"]["budget_s"], settings.data.source) == (2.0, "b.csv")
    settings = load(tmp_path, text, env=env, tune__budget_s="3")
    assert (settings.steps["tune"]["budget_s"], settings.data.source) == (3.0, "b.csv")
    assert settings.where("tune", "budget_s") == "the command line's tune.budget_s"
    assert settings.where("data", "source") == "EKIBEN_DATA__SOURCE"


def test_the_real_environment_is_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EKIBEN_SERVE__PORT", "8080")
    assert load_settings(project(tmp_path, BASE)).serve.port == 8080


@pytest.mark.parametrize(
    ("env", "overrides", "says"),
    [
        (
            {"EKIBEN_TUNE__BUDGETS": "2"},
            {},
            "`EKIBEN_TUNE__BUDGETS`, which is no setting; did you mean `EKIBEN_TUNE__BUDGET_S`?",
        ),
        ({"EKIBEN_TUNE__UPSTREAM": "x"}, {}, "`EKIBEN_TUNE__UPSTREAM`, which is no setting"),
        ({"EKIBEN_TUNE__BUDGET_S": "x"}, {}, "EKIBEN_TUNE__BUDGET_S: [tune] `budget_s` takes a number, got `x`"),
        (
            {"EKIBEN_SERVE__PORT": "-1"},
            {},
            "EKIBEN_SERVE__PORT: [serve] `port` should be greater than or equal to 0, got `-1`",
        ),
        ({"EKIBEN_GATES__GATES": "auc >= 0.7, auk >= 1"}, {}, "EKIBEN_GATES__GATES line 1: no metric `auk`"),
        ({"EKIBEN_COLUMNS__ID": "sex"}, {}, "is both"),
        ({}, {"tune__budgets": "2"}, "the command line's tune.budgets: [tune] has no key `budgets`; did you mean"),
        (
            {},
            {"tunes__budget_s": "2"},
            "the command line sets `tunes.budget_s`, but no section is called [tunes]; did you mean `tune`?",
        ),
        ({}, {"budget_s": "2"}, "the command line sets `budget_s`; write section.key=value"),
        ({}, {"tune__budget_s": ""}, "the command line's tune.budget_s: [tune] `budget_s` takes a number, got nothing"),
    ],
)
def test_a_mistake_outside_the_file_names_its_place_too(
    tmp_path: Path, env: dict[str, str], overrides: dict[str, str], says: str
) -> None:
    assert says in refusal(tmp_path, BASE, env=env, **overrides)


def test_a_section_of_ours_with_a_step_of_the_same_name_holds_both(tmp_path: Path) -> None:
    root = project(
        tmp_path,
        BASE + "[monitor]\ndays = 7\n[serve]\nport = 1\nworkers = 2",
        monitor="days: int = 1",
        serve="workers: int = 1",
    )
    settings = load_settings(root, env={"EKIBEN_MONITOR__DAYS": "8"})
    assert settings.steps == {"monitor": {"days": 8}, "serve": {"workers": 2}}
    assert settings.serve.port == 1
    assert settings.to_dict()["serve"]["workers"] == 2


def test_notebooks_may_stand_elsewhere(tmp_path: Path) -> None:
    project(tmp_path, "")
    (tmp_path / "nbs" / "pipeline").rename(tmp_path / "steps")
    text = BASE + "[pipeline]\nnotebooks = steps\n[tune]\nbudget_s = 5"
    (tmp_path / "settings.ini").write_text(text)
    assert load_settings(tmp_path, env={}).steps["tune"]["budget_s"] == 5.0
    (tmp_path / "settings.ini").write_text(text.replace("steps", "nowhere"))
    with pytest.raises(SettingsError, match=r"no section \[tune\]"):
        load_settings(tmp_path, env={})
    assert load_settings(tmp_path, env={"EKIBEN_PIPELINE__NOTEBOOKS": "steps"}).steps["tune"]["budget_s"] == 5.0


def test_the_package_is_the_one_that_nbdev_exports_to(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text('[tool.nbdev]\nlib_path = "src/census"\n')
    assert load(tmp_path, BASE).pipeline.package == "census"
    (tmp_path / "pyproject.toml").write_text("[tool.nbdev\n")
    assert refusal(tmp_path, BASE).startswith("pyproject.toml: ")


def test_settings_cannot_be_changed(tmp_path: Path) -> None:
    settings = load(tmp_path, BASE)
    for holder, key in ((settings, "data"), (settings.data, "source"), (settings.columns, "new")):
        with pytest.raises(ValueError):
            setattr(holder, key, "x")


def test_a_moved_line_changes_no_setting(tmp_path: Path) -> None:
    text = BASE + "[gates]\ngates = auc >= 0.70"
    before = load(tmp_path, text)
    after = load(tmp_path, "# first\n\n" + text)
    assert before.gates.gates[0].where != after.gates.gates[0].where
    assert before.to_dict() == after.to_dict()
    assert before.gates.model_dump(mode="json") == after.gates.model_dump(mode="json")


def test_to_dict_is_json_and_hides_passwords(tmp_path: Path) -> None:
    url = "postgresql://ada:s3cr3t@db/credit"
    text = BASE + f"[data]\nsource = {url}\nsources =\n    c = {url} on id\n[gates]\nwatch = auc >= 0.7"
    settings = load(tmp_path, text)
    plain = settings.to_dict()
    assert settings.data.source == url
    assert json.loads(json.dumps(plain)) == plain
    assert "s3cr3t" not in json.dumps(plain)
    assert plain["data"]["source"] == "postgresql://ada:***@db/credit"
    assert plain["gates"]["watch"] == ["auc >= 0.7"]
    assert plain["tune"]["budget_s"] == 60.0
    assert "root" not in plain


def test_the_root_is_the_nearest_folder_with_settings(tmp_path: Path) -> None:
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    (tmp_path / "settings.ini").touch()
    assert find_root(inner) == tmp_path.resolve()
    (inner / "settings.ini").touch()
    assert find_root(inner) == inner.resolve()


def test_no_project_anywhere_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="ekiben new"):
        find_root(tmp_path)


words = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1)
texts = st.lists(words, min_size=1).map(" ".join)
lines = st.lists(texts.filter(lambda t: t[0] not in "#;"), min_size=1).map("\n".join)
names = st.lists(texts, unique=True, max_size=4).map(tuple)


@patient
@given(
    st.fixed_dictionaries(
        {
            "pipeline": st.fixed_dictionaries({}, optional={"name": texts, "seed": st.integers(0, 2**32 - 1)}),
            "data": st.fixed_dictionaries(
                {},
                optional={
                    "source": texts,
                    "sources": lines,
                    "query": st.just("") | lines,
                    "missing": names,
                    "test_size": st.floats(0.01, 0.99),
                    "on_invalid": st.sampled_from(["fail", "quarantine"]),
                },
            ),
            "columns": st.fixed_dictionaries(
                {"target": texts},
                optional={"positive": texts, "sensitive_as_input": st.booleans()},
            ),
            "gates": st.fixed_dictionaries(
                {}, optional={"gates": st.just("auc >= 0.7\nbrier <= 0.2"), "confidence": st.floats(0.6, 0.99)}
            ),
            "tune": st.fixed_dictionaries(
                {}, optional={"trials": st.none() | st.integers(), "budget_s": st.floats(-1e300, 1e300)}
            ),
        }
    ),
    names,
)
def test_a_rendered_file_loads_to_what_it_was_rendered_from(
    tmp_path_factory: pytest.TempPathFactory, values: dict[str, dict[str, Any]], sensitive: tuple[str, ...]
) -> None:
    sensitive = tuple(name for name in sensitive if name != values["columns"]["target"])
    values["columns"]["sensitive"] = sensitive
    root = project(tmp_path_factory.mktemp("p"), "")
    text = render_settings(values, read_cells(root / "nbs/pipeline"))
    (root / "settings.ini").write_text(text, encoding="utf-8", newline="")
    settings = load_settings(root, env={})
    for section, pairs in values.items():
        for key, value in pairs.items():
            got = settings.steps["tune"][key] if section == "tune" else getattr(getattr(settings, section), key)
            got = "\n".join(g.name for g in got) if key == "gates" else got
            assert got == value
    assert render_settings(values, read_cells(root / "nbs/pipeline")) == text


@pytest.mark.parametrize("value", ["a\n# b", " a", "a\n\nb", "a\n;b", "a\rb"])
def test_a_text_that_would_come_back_changed_is_not_written(value: str) -> None:
    with pytest.raises(SettingsError, match="cannot be written"):
        render_settings({"data": {"query": value}})


def test_a_rendered_file_shows_every_key_with_its_default(tmp_path: Path) -> None:
    root = project(tmp_path, "")
    text = render_settings({"columns": {"target": "y"}}, read_cells(root / "nbs/pipeline"))
    for section, model in SECTIONS.items():
        assert f"[{section}]" in text or not model.model_fields
        for key in model.model_fields:
            assert f"\n{key} = " in text or f"\n# {key} =" in text
    assert "# seconds of search\n# budget_s = 60\n" in text
    bare = text.replace("\n# ", "\n")
    shown = [line for line in bare.splitlines() if " = " in line]
    assert "port = 3000" in shown and "learner = lightgbm" in shown


def test_the_defaults_that_are_shown_are_the_defaults_that_hold(tmp_path: Path) -> None:
    root = project(tmp_path, BASE)
    plain = load_settings(root, env={}).to_dict()
    comments = render_settings({"columns": {"target": "y", "sensitive": ["sex"]}}, read_cells(root / "nbs/pipeline"))
    keys = {key for model in SECTIONS.values() for key in model.model_fields} | {"budget_s", "trials", "learner"}
    live = [
        line[2:] if line.startswith("# ") and line[2:].split(" =")[0] in keys else line
        for line in comments.splitlines()
    ]
    (root / "settings.ini").write_text("\n".join(live))
    assert load_settings(root, env={}).to_dict() == plain


ini_lines = st.lists(
    st.sampled_from(
        [
            "[a]",
            "[b]",
            "[c d]",
            "x = 1",
            "y=2",
            "z =",
            "  more",
            "\tand = more",
            "",
            "# note",
            "  ; note",
            "x = 3",
            "w = a = b",
            "v = [b]",
        ]
    ),
    max_size=12,
)


@patient
@given(ini_lines)
def test_what_is_accepted_means_the_same_to_configparser(rows: list[str]) -> None:
    text = "\n".join(rows)
    try:
        ini = Ini.parse(text)
    except SettingsError:
        return
    parser = configparser.ConfigParser(delimiters=("=",), interpolation=None, default_section="\0")
    parser.optionxform = str  # type: ignore[method-assign,assignment]
    parser.read_string(text)
    assert list(ini.sections) == parser.sections()
    ours = {place: [line for line in entry.text.split("\n") if line] for place, entry in ini.entries.items()}
    theirs = {(s, k): [line for line in parser[s][k].split("\n") if line] for s in parser.sections() for k in parser[s]}
    assert ours == theirs
    for (_, key), entry in ini.entries.items():
        for offset, line in enumerate(entry.text.split("\n")):
            assert line in rows[entry.line - 1 + offset]
        assert rows[entry.line - 1].startswith(key)


@patient
@given(st.text())
def test_any_text_is_ini_or_a_settings_error_with_a_line(text: str) -> None:
    try:
        Ini.parse(text)
    except SettingsError as exc:
        assert str(exc).startswith("settings.ini line ")


def test_reading_settings_needs_no_library_of_the_data() -> None:
    heavy = "{'numpy', 'pandas', 'pyarrow', 'sklearn', 'lightgbm', 'mlflow', 'optuna', 'matplotlib', 'msgspec'}"
    code = f"import sys, ekiben.settings; found = {heavy} & set(sys.modules); assert not found, found"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_this_repositorys_own_settings_load() -> None:
    root = Path(__file__).resolve().parents[1]
    settings = load_settings(root, env={})
    assert settings.data.source == "simulated:credit"
    assert (settings.columns.target, settings.columns.positive) == ("default", "yes")
    assert [gate.name for gate in settings.gates.gates] == ["auc >= 0.70"]
    assert all(gate.slice in settings.columns.sensitive for gate in settings.gates.watch)
