"""A secret's value is in no file and on no screen that a run leaves behind; its variable is asked for before it starts."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from spelled import ENCODINGS
from tiny import PREPARE, SETTINGS, make_project, write_notebook

from ekiben.errors import SettingsError, UsageError
from ekiben.parameters import parse_parameters, read_cells, schema_of
from ekiben.redaction import Hidden, redactor_of
from ekiben.settings import load_settings

SECRET = "p4ss\"w'rd\\n/é&<7> +%ü"
PASSWORD = "db-p%40ssw0rd"
URL = f"postgresql://ada:{PASSWORD}@db.example/credit"
PARAMETERS = 'from ekiben.redaction import Secret\nupstream: list[str] = []\ntoken: Secret = "WAREHOUSE_TOKEN"  # of the warehouse'
LEAKY = [
    PREPARE[0].replace("from tiny.helper import number", "import base64, html, json, sys, urllib.parse"),
    "key = step.secret(token)\nstep.save('rows', {'n': 42})\nstep.log(rows=42)",
    "key",
    "print('raw:', key)",
    "print('repr:', repr(str(key)), [str(key)])",
    "print('json:', json.dumps({'key': key}), json.dumps(json.dumps([key])), json.dumps(key, ensure_ascii=False))",
    "print('url:', 'https://h/?q=' + urllib.parse.quote_plus(key), urllib.parse.quote(key, safe=''))",
    "print('base64:', *(base64.b64encode(('x' * n + key + 'y' * n).encode()).decode() for n in range(4)))",
    "print('broken:', base64.encodebytes((key * 4).encode()).decode())",
    "print('hex:', key.encode().hex())",
    "print('bytes:', key.encode())",
    "print('half: ' + key[:9], end='', flush=True)\nimport time; time.sleep(0.5)\nprint(key[9:])",
    "print('stderr:', key, file=sys.stderr)\nimport warnings; warnings.warn(str(key))",
    "import os; os.write(1, ('fd: ' + key + '\\n').encode()); os.system('printf \"child: %s\" \"$WAREHOUSE_TOKEN\"')",
    "from IPython.display import HTML, JSON, Markdown, display\n"
    "display(HTML('<b>' + html.escape(key) + '</b>'), Markdown('`' + key + '`'), JSON({'key': str(key), str(key): 1}))",
    "handle = display('first', display_id=True)\nhandle.update(str(key))",
    "{'dict': str(key), 'list': [str(key)]}",
    "print('settings:', project.settings.data.source)",
    "step.record(data={'source': project.settings.data.source, 'with': f'Bearer {key}', 'rows': 42})",
    "step.log_trials([{'number': 0, 'value': 1.0, 'seconds': 0.1, 'params': {'key': str(key)}}])",
    "step.progress(1, 2, f'reading with {key}')",
    "import logging; logging.basicConfig(force=True); logging.error('logged: %s', key)",
]
RAISES = [
    "from ekiben import step\nproject = step.begin('tune')",
    "import json\nkey = step.secret(key_name)\nstep.save('model', {'n': 1})",
    "def call(header):\n    raise ValueError('no access with ' + header + json.dumps(header))\ncall(f'Bearer {key}')",
]


def spellings() -> list[bytes]:
    """Return the bytes that must be nowhere: the secret and the database's password in every encoding."""
    texts = {encode(secret) for secret in (SECRET, PASSWORD, "db-p@ssw0rd") for encode in ENCODINGS.values()}
    # In the middle of a longer text base64 looks different: what the secret alone decides of it.
    for offset in (1, 2):
        for secret in (SECRET, PASSWORD, "db-p@ssw0rd"):
            texts.add(base64.b64encode(bytes(offset) + secret.encode()).decode()[4:16])
    return sorted(text.encode("utf-8", "surrogateescape") for text in texts)


def leaks(root: Path, *more: bytes) -> list[str]:
    """Return where any of the spellings stands, in the files that a run writes and in what it printed."""
    places = {"screen": b"\n".join(more)}
    for name in ("reports", ".ekiben", "mlflow.db", "mlflow.db-wal", "mlartifacts"):
        for path in [root / name, *(root / name).rglob("*")]:
            if path.is_file():
                places[str(path.relative_to(root))] = path.read_bytes()
    return [f"{place}: {text!r}" for place, content in places.items() for text in spellings() if text in content]


def ekiben(root: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[bytes]:
    env = {**os.environ, "CI": "1", "PYTEST_CURRENT_TEST": "", **variables}  # ipykernel captures less while pytest runs
    env = {name: value for name, value in env.items() if value}
    return subprocess.run([sys.executable, "-c", "import sys; from ekiben.cli import main; sys.exit(main())", *words], cwd=root, capture_output=True, env=env, check=False)


@pytest.fixture(scope="module")
def leaky(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[bytes]]:
    """Run a project that shows its secret in every way, in a step that succeeds and in one that raises."""
    root = make_project(tmp_path_factory.mktemp("leaky") / "tiny")
    write_notebook(root / "nbs/pipeline/01_prepare.ipynb", PARAMETERS, LEAKY)
    parameters = 'from ekiben.redaction import Secret\nupstream: list[str] = ["prepare"]\nkey_name: Secret = "OTHER_TOKEN"\nurl: str = ""'
    write_notebook(root / "nbs/pipeline/02_tune.ipynb", parameters, RAISES)
    words = ("run", "--json", "-p", "tune.key_name=WAREHOUSE_TOKEN", "-p", f"tune.url={URL}")
    return root, ekiben(root, *words, WAREHOUSE_TOKEN=SECRET, EKIBEN_DATA__SOURCE=URL)


def test_a_secret_is_in_no_file_and_on_no_screen_after_a_run(leaky: tuple[Path, Any]) -> None:
    root, done = leaky
    assert len(list(root.glob("reports/runs/*/*.ipynb"))) == 2
    assert leaks(root, done.stdout, done.stderr) == []


def test_the_outputs_are_there_with_stars_in_the_place_of_the_secret(leaky: tuple[Path, Any]) -> None:
    root, done = leaky
    assert done.returncode == 1
    (run,) = (json.loads(path.read_text()) for path in root.glob("reports/runs/*/run.json"))
    assert [(step["name"], step["status"]) for step in run["steps"][:2]] == [("prepare", "ran"), ("tune", "failed")]
    assert run["data"] == {"source": "postgresql://ada:***@db.example/credit", "with": "Bearer ***", "rows": 42}
    assert "ValueError: no access with Bearer ***" in run["error"]
    notebook = json.loads((root / run["steps"][0]["notebook"]).read_text())
    shown = json.dumps([cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code"])
    for label in ("raw", "repr", "json", "url", "base64", "broken", "hex", "bytes", "half", "stderr", "fd", "child", "settings", "logged"):
        after = shown.split(f"{label}: ", 1)[1] if f"{label}: " in shown else shown.split(f"{label}:", 1)[1]
        assert "***" in after[:60], label
    assert "<b>***</b>" in shown
    raised = json.loads((root / run["steps"][1]["notebook"]).read_text())["cells"][-1]["outputs"][-1]
    assert raised["ename"] == "ValueError" and raised["evalue"].startswith("no access with Bearer ***")
    for step in run["steps"][:2]:
        assert "***" in (root / step["html"]).read_text()


def test_mlflow_has_the_figures_and_the_variables_name(leaky: tuple[Path, Any]) -> None:
    from mlflow.tracking import MlflowClient

    root, _ = leaky
    client = MlflowClient(tracking_uri=f"sqlite:///{root}/mlflow.db")
    runs = {run.info.run_name: run.data for run in client.search_runs([e.experiment_id for e in client.search_experiments()])}
    assert runs["prepare"].params["token"] == "WAREHOUSE_TOKEN"
    assert runs["prepare"].metrics["rows"] == 42
    assert runs["trial 0"].params["key"] == "***"
    assert runs["tune"].params["url"] == "postgresql://ada:***@db.example/credit"
    assert list(root.glob("mlartifacts/**/01_prepare.ipynb"))


def secret_project(root: Path, parameters: str = PARAMETERS, cell: str = "step.save('rows', {'n': 1})") -> Path:
    make_project(root)
    write_notebook(root / "nbs/pipeline/01_prepare.ipynb", parameters, ["from ekiben import step\nproject = step.begin('prepare')", cell])
    return root


def test_a_missing_variable_is_named_before_anything_starts(tmp_path: Path) -> None:
    root = secret_project(tmp_path / "tiny")
    done = ekiben(root, "run", WAREHOUSE_TOKEN="")
    assert done.returncode == 2
    assert done.stderr.decode().strip().endswith(
        "step `prepare` needs the environment variable `WAREHOUSE_TOKEN` (parameter `token`), which is not set; export it first"
    )
    assert not list(root.glob("reports/runs/*/*.ipynb"))


def test_a_value_in_the_place_of_a_name_is_refused_without_being_shown(tmp_path: Path) -> None:
    root = secret_project(tmp_path / "tiny")
    value = "tok-3f9a77c1"
    done = ekiben(root, "run", "-p", f"prepare.token={value}")
    assert done.returncode == 2
    assert b"prepare.token" in done.stderr and b"the name of an environment variable" in done.stderr
    assert value.encode() not in done.stdout + done.stderr
    (root / "settings.ini").write_text(SETTINGS + f"\n[prepare]\ntoken = {value}\n")
    with pytest.raises(SettingsError, match=r"settings\.ini line \d+: \[prepare\] `token` takes the name") as refused:
        load_settings(root, env={})
    assert value not in everything_in(refused.value)
    with pytest.raises(SettingsError, match="EKIBEN_PREPARE__TOKEN") as refused:
        load_settings(secret_project(tmp_path / "other"), env={"EKIBEN_PREPARE__TOKEN": value})
    assert value not in everything_in(refused.value)
    with pytest.raises(SettingsError, match="but its default is something else") as refused:
        parse_parameters(f'token: Secret = "{value}"')
    assert value not in everything_in(refused.value)


def everything_in(exc: BaseException | None) -> str:
    """Return what an error and those behind it say, fields included (but not the source lines of a traceback)."""
    said = ""
    while exc is not None:
        said += f"{exc} {exc.args} {getattr(exc, 'fields', '')}\n"
        exc = exc.__cause__ or (None if exc.__suppress_context__ else exc.__context__)
    return said


@pytest.mark.parametrize("text", ["warehouse_token", "WAREHOUSE-TOKEN", "1TOKEN", "TOKEN ", "", "WÄRE", "A B", "$TOKEN"])
def test_only_a_plausible_variable_may_be_named_in_the_notebook(text: str) -> None:
    with pytest.raises(SettingsError, match="takes the name of an environment variable"):
        parse_parameters(f"token: Secret = {text!r}")


@pytest.mark.parametrize("annotation", ["Secret | str", "list[Secret]", "Secret | int | None", "Optional[Secret | str]"])
def test_beside_a_secret_only_none_may_stand(annotation: str) -> None:
    with pytest.raises(SettingsError, match="is no type of a parameter"):
        parse_parameters(f'token: {annotation} = "TOKEN"')


@pytest.mark.parametrize("annotation", ["Secret | None", "Optional[Secret]", "None | Secret", "redaction.Secret | None"])
@pytest.mark.parametrize("default", ['""', "None"])
def test_a_secret_that_need_not_be_is_none(tmp_path: Path, annotation: str, default: str) -> None:
    root = secret_project(tmp_path / "tiny", f"upstream: list[str] = []\ntoken: {annotation} = {default}")
    assert load_settings(root, env={}).secrets == {}
    assert load_settings(root, env={}).steps["prepare"]["token"] is None
    settings = load_settings(root, env={}, overrides={"prepare.token": "MY_TOKEN"})
    assert settings.secrets == {"prepare.token": "MY_TOKEN"}
    assert redactor_of(settings, {"MY_TOKEN": "hunter2"}).text("hunter2") == "***"


def test_settings_name_another_variable_and_the_run_records_the_name(tmp_path: Path) -> None:
    root = secret_project(tmp_path / "tiny")
    (root / "settings.ini").write_text(SETTINGS + "\n[prepare]\ntoken = FROM_FILE\n")
    assert load_settings(root, env={}).secrets == {"prepare.token": "FROM_FILE"}
    settings = load_settings(root, env={"EKIBEN_PREPARE__TOKEN": "FROM_ENV"})
    assert settings.to_dict()["prepare"]["token"] == "FROM_ENV"
    assert load_settings(root, env={}, overrides={"prepare.token": "BY_P"}).secrets == {"prepare.token": "BY_P"}


def test_the_schema_says_that_it_is_a_secret(tmp_path: Path) -> None:
    root = secret_project(tmp_path / "tiny", 'a: Secret = "A"\nb: Secret | None = None')
    properties = schema_of(read_cells(root / "nbs/pipeline")["prepare"])["properties"]
    for name in ("a", "b"):
        assert properties[name]["x-secret"] is properties[name]["writeOnly"] is True
    assert (properties["a"]["type"], properties["b"]["type"]) == ("string", ["string", "null"])


@pytest.fixture
def by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Begin `prepare` by hand, with a secret in the environment."""
    from ekiben import step

    monkeypatch.delenv("EKIBEN_CONTEXT", raising=False)
    monkeypatch.setenv("WAREHOUSE_TOKEN", SECRET)
    monkeypatch.chdir(secret_project(tmp_path / "tiny"))
    monkeypatch.setattr(step, "_session", None)
    monkeypatch.setattr(sys, "path", list(sys.path))
    step.begin("prepare")
    return step


def test_by_hand_the_value_comes_from_the_environment_and_hides_itself(by_hand: Any) -> None:
    value = by_hand.secret("WAREHOUSE_TOKEN")
    assert isinstance(value, Hidden)
    assert value == SECRET and repr(value) == "'***'"
    assert by_hand.secret("") is None and by_hand.secret(None) is None


def test_by_hand_a_missing_variable_is_said_at_the_call(by_hand: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WAREHOUSE_TOKEN")
    with pytest.raises(UsageError) as refused:
        by_hand.secret("WAREHOUSE_TOKEN")
    assert str(refused.value) == (
        "step `prepare` needs the environment variable `WAREHOUSE_TOKEN` (parameter `token`), which is not set; export it first"
    )


def test_what_no_secret_parameter_names_is_refused_because_it_would_not_be_redacted(by_hand: Any) -> None:
    with pytest.raises(UsageError, match="takes a `Secret` parameter of `prepare` as it was set: `token`") as refused:
        by_hand.secret("hunter2")
    assert "hunter2" not in str(refused.value)


def test_by_hand_facts_figures_and_trials_are_kept_without_the_secret(by_hand: Any) -> None:
    by_hand.record(data={"header": f"Bearer {SECRET}", SECRET: [SECRET]})
    by_hand.log_trials([{"number": 0, "params": {"key": SECRET}}])
    by_hand.log(**{f"rows {SECRET}": 1.0})
    assert leaks(Path.cwd()) == []
    kept = json.loads(Path(".ekiben/runs/by-hand/prepare.json").read_text())
    assert kept["facts"] == {"data": {"header": "Bearer ***", "***": ["***"]}}
    assert [measure["name"] for measure in kept["measures"]] == ["rows ***"]


@pytest.mark.parametrize("value", [{"key": SECRET}, [SECRET], SECRET, {SECRET: 1}, {"a": {"b": [f"Bearer {SECRET}"]}}])
def test_a_result_that_holds_a_secret_is_not_saved(by_hand: Any, value: Any) -> None:
    with pytest.raises(UsageError, match="`config` holds a secret"):
        by_hand.save("config", value)
    assert leaks(Path.cwd()) == []


def test_a_notebook_run_by_hand_in_a_kernel_does_not_keep_the_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbformat
    from nbclient import NotebookClient

    root = make_project(tmp_path / "tiny")
    path = root / "nbs/pipeline/01_prepare.ipynb"
    write_notebook(path, PARAMETERS, [*LEAKY, "raise ValueError(key)"])
    monkeypatch.setenv("WAREHOUSE_TOKEN", SECRET)
    monkeypatch.delenv("EKIBEN_CONTEXT", raising=False)
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}, allow_errors=True).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert outputs[-1].output_type == "error" and outputs[-1].evalue == "***"
    (root / "reports").mkdir(exist_ok=True)
    halves = [cell for cell in notebook.cells if "half: " in cell.source]
    notebook.cells = [cell for cell in notebook.cells if cell not in halves]  # only a runner sees both halves
    nbformat.write(notebook, root / "reports/by-hand.ipynb")
    assert leaks(root) == []


def test_a_secret_that_is_a_number_or_a_status_does_not_break_run_json(tmp_path: Path) -> None:
    from ekiben.records import Measure
    from ekiben.redaction import Redactor
    from ekiben.runner.account import Account
    from ekiben.runs import Layout, Run, StepRun, read_run

    layout = Layout(tmp_path)
    run = Run(run_id="20260101-000000-abcd", status="running", started="2026-01-01T00:00:00+00:00")
    account = Account(layout, run, Redactor(["done", "1234567"]))
    failed = StepRun(name="tune", status="failed", seconds=1234567.5, error="not done with 1234567")
    account.update(status="done", steps=[failed], measures=[Measure(name="rows", value=1234567.0)], metrics={"rows": 1234567.0})
    kept = read_run(layout, run.run_id)
    assert (kept.status, kept.metrics) == ("done", {"rows": 1234567.0})
    assert (kept.steps[0].seconds, kept.steps[0].error) == (1234567.5, "not *** with ***")
