"""`ekiben new`: a whole project from a table that nobody has seen, or nothing at all."""

from __future__ import annotations

import csv
import json
import os
import sqlite3
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ekiben.new import scaffold, template
from ekiben.data.schema import fields_from_pandera
from ekiben.data.sources import find_paths
from ekiben.errors import DataError, EkibenError, UsageError
from ekiben.new.first_settings import locate
from ekiben.new.question import Question
from ekiben.new.scaffold import new_project
from ekiben.settings import load_settings
from ekiben.new.survey import survey_table
from ekiben.new.template import package_name

ROOT = Path(__file__).resolve().parents[1]


def write_table(path: Path, header: Iterable[str], rows: Iterable[Iterable[object]], encoding: str = "utf-8") -> Path:
    with open(path, "w", newline="", encoding=encoding) as file:
        csv.writer(file).writerows([header, *rows])
    return path


def odd_table(path: Path) -> Path:
    """Write a table whose column names are as bad as names get."""
    header = ["Größe (cm)", "größe (cm)", "class", "for", "a,b", "50%", "x[1]", 'naïve "q"', "sex*x", "#id", "{y}", "üb er"]
    rows = (
        [i % 30, i % 17, "ja" if i * 7 % 11 < 5 else "nein", i % 4, i % 6, i % 9, i % 8, i % 2, "mf"[i % 2], i, i % 5, "?" if i % 10 == 0 else "v"]
        for i in range(240)
    )
    return write_table(path, header, rows)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder that holds one table of loans."""
    monkeypatch.chdir(tmp_path)
    rows = ([20 + i % 50, i % 9, "Female" if i % 3 else "Male", "yes" if i * 5 % 13 > 6 else "no"] for i in range(200))
    write_table(tmp_path / "loans.csv", ["age", "loans", "sex", "repaid"], rows)
    return tmp_path


def run_in(folder: Path, *command: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], cwd=folder, capture_output=True, text=True, check=False, env={**os.environ, **env}
    )


def test_a_project_has_everything_that_it_needs(place: Path) -> None:
    made = new_project("loan-risk", data="loans.csv", target="repaid", positive="yes", sensitive=["sex"])
    files = {p.relative_to(made.folder).as_posix() for p in made.folder.rglob("*") if p.is_file()}
    assert made.package == "loan_risk"
    assert files >= {
        "README.md", "pyproject.toml", "settings.ini", ".gitignore", ".gitattributes", ".github/workflows/pipeline.yml",
        ".gitlab-ci.yml", "bentos/scorer/service.py", "nbs/pipeline/00_schema.ipynb", "src/loan_risk/__init__.py",
        "src/loan_risk/pipeline/__init__.py", "src/loan_risk/pipeline/schema.py",
        "tests/test_features.py", "tests/test_notebooks.py", "tests/test_settings.py",
    }  # fmt: skip
    assert {p.name for p in (ROOT / "nbs" / "pipeline").glob("[0-9]*.ipynb")} == {p.name for p in made.folder.glob("nbs/pipeline/*")}
    assert sorted(os.listdir(place)) == ["loan-risk", "loans.csv"]


def test_gitlab_keeps_the_report_that_a_run_writes_there(place: Path) -> None:
    made = new_project("loan-risk", data="loans.csv", target="repaid")
    job = msgspec.yaml.decode((made.folder / ".gitlab-ci.yml").read_bytes())["pipeline"]
    assert "ekiben run" in job["script"] and job["artifacts"]["when"] == "always"
    assert job["artifacts"]["reports"]["codequality"] == "reports/gl-code-quality-report.json"


def test_nothing_in_a_project_speaks_of_the_template(place: Path) -> None:
    made = new_project("loan-risk", data="loans.csv", target="repaid")
    for path in made.folder.rglob("*"):
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            assert "ekiben.pipeline" not in text and "<<" not in text and str(ROOT) not in text, path


def test_notebooks_are_the_repositorys_own_but_for_package_and_schema(place: Path) -> None:
    made = new_project("loan-risk", data="loans.csv", target="repaid")
    for path in (ROOT / "nbs" / "pipeline").glob("[0-9]*.ipynb"):
        sources = ["".join(c["source"]).replace("ekiben.pipeline", "loan_risk.pipeline") for c in json.loads(path.read_text())["cells"]]
        cells = json.loads((made.folder / "nbs" / "pipeline" / path.name).read_text())["cells"]
        changed = [a for a, b in zip(sources, cells, strict=True) if a.replace("src/ekiben/", "src/loan_risk/") != "".join(b["source"])]
        assert len(changed) == (path.name == "00_schema.ipynb"), path.name
        assert not any(cell.get("outputs") for cell in cells)


def test_settings_say_what_was_asked_and_what_was_found(place: Path) -> None:
    rows = ([f"2024-{1 + i // 28:02d}-{1 + i % 28:02d}", 1000 + i, i % 7, i % 5, "a" if i % 2 else "b", i % 3 + i % 7] for i in range(280))
    write_table(place / "sales.csv", ["sold on", "id", "shop", "size", "region", "units"], rows)
    made = new_project("sales", data="sales.csv", target="units", task="regression", sensitive=["region"], group="", ignore=["size"])
    settings = load_settings(made.folder, env={})
    assert settings.data.task == "regression" and settings.data.split == "time"
    assert settings.columns.roles == {
        "units": "target", "sold on": "time", "id": "id", "region": "sensitive", "size": "ignore",
    }  # fmt: skip
    assert [gate.name for gate in settings.gates.gates] == ["r2 >= 0.2"]
    assert [gate.name for gate in settings.gates.watch] == ["mae_ratio[region] >= 0.8"]
    assert settings.pipeline.name == settings.pipeline.package == "sales"


def test_a_sum_that_gives_the_target_away_is_named_and_one_sign_takes_it_out(place: Path) -> None:
    rows = ([i * 37 % 101, i * 53 % 97, i % 24, i * 37 % 101 + i * 53 % 97] for i in range(600))
    write_table(place / "rides.csv", ["casual", "registered", "hour", "cnt"], rows)
    made = new_project("rides", data="rides.csv", target="cnt")
    assert made.survey.suggest == {"ignore": ("casual", "registered")}
    assert any("`casual`" in text and "`registered`" in text for text in made.warnings)
    assert load_settings(made.folder, env={}).columns.ignore == ()
    path = made.folder / "settings.ini"
    path.write_text(path.read_text().replace("# ignore = casual", "ignore = casual"))
    assert load_settings(made.folder, env={}).columns.ignore == ("casual", "registered")


def test_every_suggestion_can_be_acted_on_at_once(place: Path) -> None:
    rows = ([f"u{i % 90}@example.org", f"v{i % 80}@example.org", f"19{50 + i % 40}-01-07", i * 7 % 11, "ab"[i % 2]] for i in range(300))
    write_table(place / "people.csv", ["email", "contact", "birth_date", "amount", "y"], rows)
    made = new_project("people", data="people.csv", target="y", sensitive=["email"])
    path = made.folder / "settings.ini"
    text = path.read_text()
    for role, names in made.survey.suggest.items():
        assert "email" not in names
        text = text.replace(f"# {role} = {names[0]}", f"{role} = {names[0]}")
    path.write_text(text)
    acted = load_settings(made.folder, env={}).columns
    assert {"contact", "birth_date"} == {*acted.private, *acted.ignore}


def test_the_table_is_found_from_the_project(place: Path) -> None:
    for folder in ("near", "a/little/deeper"):
        made = new_project(folder, data="loans.csv", target="repaid")
        source = load_settings(made.folder, env={}).data.source
        assert not os.path.isabs(source)
        assert find_paths(source, made.folder)[0].resolve() == place / "loans.csv"


@given(st.lists(st.sampled_from(["a", "b c", "ü"]), max_size=6), st.lists(st.sampled_from(["a", "b c", "x"]), min_size=1, max_size=6))
def test_a_located_path_is_always_the_same_file(to_file: list[str], to_folder: list[str]) -> None:
    whole, folder = Path("/r", *to_file, "t.csv"), Path("/r", *to_folder)
    for given_as in (str(whole), os.path.relpath(whole, "/r/a")):
        written, remark = locate(given_as, folder, Path("/r/a"))
        assert os.path.normpath(folder / written) == str(whole)
        assert bool(remark) == os.path.isabs(written)


@pytest.mark.parametrize("url", ["postgresql://me:s3cret@db.example.org/loans", "mysql+pymysql://me:s3cret@db/loans"])
def test_a_password_is_not_written_down(url: str) -> None:
    written, remark = locate(url, Path("/p"), Path("/"))
    assert "s3cret" not in written and written.startswith(url.split(":")[0]) and "EKIBEN_DATA__SOURCE" in remark


def test_a_database_is_a_table_too(place: Path) -> None:
    with sqlite3.connect(place / "loans.db") as database:
        database.execute("CREATE TABLE loans (age INTEGER, kind TEXT, repaid TEXT)")
        database.executemany("INSERT INTO loans VALUES (?, ?, ?)", [(i % 60, "abc"[i % 3], "yn"[i * 5 % 7 > 3]) for i in range(150)])
    made = new_project("loans", data="sqlite:///loans.db", query="SELECT * FROM loans", target="repaid")
    settings = load_settings(made.folder, env={})
    assert (settings.data.source, settings.data.query) == ("sqlite:///../loans.db", "SELECT * FROM loans")
    assert made.survey.rows == 150


def test_a_given_test_table_is_held_out_and_its_categories_are_allowed(place: Path) -> None:
    rows = [[i % 40, "AB"[i % 2], i * 3 % 5 > 2] for i in range(100)]
    write_table(place / "train.csv", ["x", "kind", "y"], rows)
    write_table(place / "test.csv", ["x", "kind", "y"], [*rows[:30], [3, "C", True]])
    made = new_project("given", data="train.csv", test="test.csv", target="y")
    settings = load_settings(made.folder, env={})
    assert (settings.data.test, settings.data.split, made.survey.test_rows) == ("../test.csv", "file", 31)
    allowed = made.survey.schema["kind"].categories
    assert not allowed or "C" in allowed


MISTAKES = {
    "a target that is not there": (dict(target="repayed"), UsageError, "did you mean `repaid`"),
    "a target in other letters": (dict(target="Repaid"), UsageError, "did you mean `repaid`"),
    "no target": (dict(target=""), UsageError, "--target is empty"),
    "a positive value that is not there": (dict(positive="maybe"), UsageError, "`no`, `yes`"),
    "a sensitive column that is not there": (dict(sensitive=["gender", "sex"]), UsageError, "--sensitive gender"),
    "a column with two roles": (dict(sensitive=["age"], ignore=["age"]), UsageError, "--sensitive and by --ignore"),
    "a time that is none": (dict(time="sex"), UsageError, "holds neither dates nor numbers"),
    "an unknown task": (dict(task="binry"), UsageError, "did you mean `binary`"),
    "a split without its column": (dict(split="group"), UsageError, "needs --group"),
    "a task that does not fit": (dict(task="regression"), DataError, "regression needs numbers"),
    "a file that is not there": (dict(data="loan.csv"), DataError, "did you mean `loans.csv`"),
    "an empty file": (dict(data="empty.csv"), DataError, "empty.csv: the file is empty"),
    "a header only": (dict(data="header.csv"), DataError, "header.csv: line 1"),
    "a ragged file": (dict(data="ragged.csv"), DataError, "ragged.csv: line 3"),
    "a column name twice": (dict(data="twice.csv"), DataError, "`age` comes twice"),
    "another encoding": (dict(data="latin.csv"), DataError, "--encoding latin-1"),
    "one class only": (dict(data="one.csv"), DataError, "`yes` in every row"),
    "a class too rare": (dict(data="rare.csv"), DataError, "`no` (2 rows)"),
    "a test table with another target": (dict(test="dotted.csv"), DataError, "dotted.csv: the target `repaid` has a class `no.`"),
    "a test table without a column": (dict(test="narrow.csv"), DataError, "there is no column `loans`"),
    "a database without a query": (dict(data="sqlite:///x.db"), DataError, "--query"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_with_exit_code_2_and_leaves_nothing(mistake: str, place: Path) -> None:
    header = ["age", "loans", "sex", "repaid"]
    (place / "empty.csv").touch()
    (place / "header.csv").write_text("age,repaid\n")
    (place / "ragged.csv").write_text("age,repaid\n1,yes\n2\n3,no\n")
    (place / "twice.csv").write_text("age,age\n1,yes\n")
    write_table(place / "latin.csv", ["größe", "repaid"], [[i, "yes" if i % 2 else "no"] for i in range(60)], "latin-1")
    write_table(place / "one.csv", header, [[i, i, "m", "yes"] for i in range(60)])
    write_table(place / "rare.csv", header, [[i, i, "m", "no" if i < 2 else "yes"] for i in range(60)])
    write_table(place / "dotted.csv", header, [[i, i, "m", "yes." if i % 2 else "no."] for i in range(60)])
    write_table(place / "narrow.csv", ["age", "sex", "repaid"], [[i, "m", "yes" if i % 2 else "no"] for i in range(60)])
    before = sorted(os.listdir(place))
    options, error, says = MISTAKES[mistake]
    with pytest.raises(error) as caught:
        new_project("deep/er/census", **{"data": "loans.csv", "target": "repaid"} | options)
    assert says in str(caught.value) and "\n" not in str(caught.value) and "settings.ini" not in str(caught.value)
    assert caught.value.exit_code == 2
    assert sorted(os.listdir(place)) == before


@pytest.mark.parametrize("name", ["class", "match", "json", "numpy", "ekiben", "2024-loans", "ええ", "tests"])
def test_a_name_that_cannot_be_imported_is_refused_with_one_that_can(name: str, place: Path) -> None:
    with pytest.raises(UsageError) as caught:
        new_project(name, data="loans.csv", target="repaid")
    made = new_project(str(caught.value.suggestion), data="loans.csv", target="repaid")
    assert made.package == caught.value.suggestion


@given(st.text(st.characters(exclude_characters="/\0"), min_size=1))
def test_every_name_becomes_a_package_or_a_suggestion_that_does(name: str) -> None:
    assume(name not in (".", ".."))
    try:
        assert package_name(name).isidentifier()
    except UsageError as refusal:
        assert package_name(str(refusal.suggestion)) == refusal.suggestion


def test_a_folder_with_files_is_refused_and_force_touches_none_of_them(place: Path) -> None:
    mine = place / "census" / "README.md"
    mine.parent.mkdir()
    mine.write_text("my own words")
    with pytest.raises(UsageError, match="is not empty"):
        new_project("census", data="loans.csv", target="repaid")
    assert os.listdir(mine.parent) == ["README.md"]
    made = new_project("census", data="loans.csv", target="repaid", force=True)
    assert mine.read_text() == "my own words" and made.kept == ("README.md",)
    assert load_settings(made.folder, env={}).columns.target == "repaid"


def test_an_empty_folder_may_be_the_current_one(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "census").mkdir()
    monkeypatch.chdir(place / "census")
    made = new_project(".", data="../loans.csv", target="repaid")
    assert made.package == "census" and Path("settings.ini").is_file() and made.next_command == "ekiben run"


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, EkibenError("no")])
def test_whatever_happens_while_it_is_built_leaves_nothing(error: BaseException, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(scaffold, "export_notebooks", fail)
    with pytest.raises(error if isinstance(error, type) else type(error)):
        new_project("some/where/census", data="loans.csv", target="repaid")
    assert os.listdir(place) == ["loans.csv"]


def test_the_schema_page_holds_the_columns_of_the_table(place: Path) -> None:
    odd_table(place / "odd.csv")
    made = new_project("odd", data="odd.csv", target="class", sensitive=["for"])
    space: dict[str, object] = {}
    exec((made.folder / "src/odd/pipeline/schema.py").read_text(encoding="utf-8"), space)
    declared = fields_from_pandera(space["table"])  # type: ignore[arg-type]
    assert [f.name for f in declared] == [f.name for f in made.survey.schema.fields]
    assert next(f for f in declared if f.name == "üb er").missing == ("?",)


def test_only_a_date_that_most_rows_differ_in_is_taken_as_time(place: Path) -> None:
    def found(**columns: Callable[[int], object]) -> str:
        write_table(place / "t.csv", [*columns, "x", "y"], ([*(f(i) for f in columns.values()), i % 7, i % 2] for i in range(120)))
        return survey_table(Question(data="t.csv", target="y")).time

    def day(i: int) -> str:
        return f"2024-{1 + i // 28:02d}-{1 + i % 28:02d}"

    assert found(sold_on=day) == "sold_on"
    assert found(birth_date=day) == ""
    assert found(sold_on=day, sent_on=day) == ""
    assert found(sold_on=lambda i: "" if i == 5 else day(i)) == ""
    assert found(quarter_end=lambda i: f"2024-{3 * (i % 4) + 1:02d}-01") == ""


@pytest.mark.parametrize("task", ["binary", "multiclass", "regression"])
def test_gates_are_such_that_the_task_can_be_judged_by(task: str, place: Path) -> None:
    target: Callable[[int], object] = {
        "binary": lambda i: "ab"[i * 7 % 10 > 6], "multiclass": lambda i: "abc"[min(2, i * 7 % 10 // 3)],
        "regression": lambda i: i * 7 % 83 / 2,
    }[task]  # fmt: skip
    write_table(place / "t.csv", ["x", "sex", "y"], ([i % 11, "mf"[i % 2], target(i)] for i in range(200)))
    made = new_project("judged", data="t.csv", target="y", sensitive=["sex"])
    settings = load_settings(made.folder, env={})  # refuses a metric that the task does not have
    assert made.survey.schema.task == settings.data.task == task
    assert len(settings.gates.gates) == len(settings.gates.watch) == 1
    if task == "multiclass":  # class c has 40 % of the rows: always saying so is not enough
        assert settings.gates.gates[0].limit == pytest.approx(max(made.survey.shares.values()), abs=0.01)


def test_its_own_tests_pass_whatever_the_columns_are_called(place: Path) -> None:
    odd_table(place / "odd.csv")
    made = new_project("odd", data="odd.csv", target="class", sensitive='for, sex*x, "a,b"')
    assert load_settings(made.folder, env={}).columns.sensitive == ("for", "sex*x", "a,b")
    done = run_in(made.folder, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout


@pytest.mark.slow
def test_its_own_tests_fail_when_a_feature_looks_at_other_rows(place: Path) -> None:
    made = new_project("peek", data="loans.csv", target="repaid")
    page = made.folder / "nbs/pipeline/01_prepare.ipynb"
    book = json.loads(page.read_text())
    cell = next(c for c in book["cells"] if "def features(" in "".join(c["source"]))
    cell["source"] = ["#| export\ndef features(c: Columns) -> Columns:\n    return c.with_columns(age=c['age'] - c['age'].mean())\n"]
    page.write_text(json.dumps(book))
    done = run_in(made.folder, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_notebooks.py")
    assert done.returncode == 1 and "not what the notebooks say: ['src/peek/pipeline/prepare.py']" in done.stdout
    scaffold.export_notebooks(page.parent)
    done = run_in(made.folder, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_features.py", "-k", "one_row")
    assert done.returncode == 1 and "`age` of row 0" in done.stdout


def test_the_summary_says_everything_once_and_ends_with_the_next_command(place: Path) -> None:
    made = new_project("my census", data="loans.csv", target="repaid", sensitive=["sex"])
    lines = str(made).splitlines()
    assert lines[-1] == "next: cd 'my census' && ekiben run"
    assert len(set(made.warnings)) == len(made.warnings)
    from rich.console import Console

    console = Console(width=200, record=True, file=open(os.devnull, "w"))
    console.print(made)
    printed = console.export_text()
    assert all(text in printed for text in [*made.warnings, "[columns]", "auc >= 0.6", "demographic_parity_ratio[sex] >= 0.8"])


def test_real_tables_are_understood(shared_data: Path, place: Path) -> None:
    adult = new_project(
        "census", data=str(shared_data / "adult/train.csv"), test=str(shared_data / "adult/test.csv"),
        target="income", positive=">50K", sensitive=["sex", "race"],
    )  # fmt: skip
    settings = load_settings(adult.folder, env={})
    assert settings.columns.sensitive == ("sex", "race") and settings.data.split == "file"
    assert [g.name for g in settings.gates.watch] == [f"demographic_parity_ratio[{name}] >= 0.8" for name in ("sex", "race")]
    assert len(adult.survey.schema.inputs) == 12 and adult.survey.test_rows == 16_281
    bikes = new_project("bikes", data=str(shared_data / "bike_sharing/hour.csv"), target="cnt")
    assert (bikes.survey.method, bikes.survey.time, bikes.survey.ids) == ("time", "dteday", ("instant",))
    assert set(bikes.survey.suggest["ignore"]) == {"casual", "registered"}
    power = new_project("power", data=str(shared_data / "electricity/elec.csv"), target="class")
    assert power.survey.schema.task == "binary" and power.survey.schema.classes == ("0", "1")


@pytest.mark.parametrize("name", ["wine", "breast_cancer", "diabetes"])
def test_scikit_learns_tables_are_understood(name: str, place: Path) -> None:
    import sklearn.datasets

    getattr(sklearn.datasets, f"load_{name}")(as_frame=True).frame.to_csv(place / "t.csv", index=False)
    made = new_project(f"{name}_1", data="t.csv", target="target")
    assert made.survey.schema.task == {"wine": "multiclass", "breast_cancer": "binary", "diabetes": "regression"}[name]
    assert made.survey.watch == ()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from this checkout, without a network."""
    pytest.importorskip("hatchling", reason="hatchling is not here, and may not be fetched")
    folder = tmp_path_factory.mktemp("wheel")
    done = run_in(ROOT, "-c", f"import os; from hatchling.build import build_wheel; print(build_wheel({str(folder)!r}))")
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*.whl"))


def test_the_wheel_carries_the_template(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    books = [p.name for p in (ROOT / "nbs" / "pipeline").glob("[0-9]*.ipynb")]
    assert {f"ekiben/_template/nbs/pipeline/{name}" for name in books} <= set(names)
    assert {"ekiben/_template/bentos/scorer/service.py", "ekiben/project_files/pyproject.toml.in"} <= set(names)
    assert not [name for name in names if "checkpoints" in name or "__pycache__" in name or name.endswith((".db", ".parquet"))]


@pytest.mark.slow
def test_an_installed_wheel_makes_projects_whose_tests_pass(wheel: Path, place: Path) -> None:
    zipfile.ZipFile(wheel).extractall(place / "site")
    site = str(place / "site")
    make = (
        "import ekiben, sys; from ekiben.new.scaffold import new_project; from ekiben.new.template import template_root\n"
        "assert ekiben.__file__.startswith(sys.argv[1]) and str(template_root()).startswith(sys.argv[1])\n"
        "new_project('loan-risk', data='loans.csv', target='repaid')"
    )
    done = run_in(place, "-c", make, site, PYTHONPATH=site)
    assert done.returncode == 0, done.stderr
    done = run_in(place / "loan-risk", "-m", "pytest", "-q", "-p", "no:cacheprovider", PYTHONPATH=site)
    assert done.returncode == 0, done.stdout


def test_the_package_of_a_new_project_is_not_found_installed() -> None:
    assert not template._is_installed("census_that_nobody_has") and template._is_installed("pytest")
