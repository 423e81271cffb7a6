"""What README.md says is true: its commands exist, its settings are valid, its marked blocks run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow.csv
import pytest
import typer.main

from ekiben.cli import app
from ekiben.data.credit import simulate_credit
from ekiben.export import notebooks_in
from ekiben.settings import load_settings

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS: dict[str, typer.core.TyperCommand] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
FENCE = re.compile(r"(?:<!-- tested: (\w+) -->\n)?```(\w*)\n(.*?)```", re.S)


def blocks(language: str, *marks: str) -> list[str]:
    """Return the README's blocks in a language, all of them or those with one of these marks."""
    return [text for mark, kind, text in FENCE.findall(README) if kind == language and (not marks or mark in marks)]


def documents() -> list[Path]:
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "src/ekiben/project_files/README.md"]


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_command_and_option_that_is_named_exists(path: Path) -> None:
    for line in re.findall(r"`(ekiben [^`\n]+)`|^\s*(ekiben .+)$", path.read_text(encoding="utf-8"), re.M):
        words = "".join(line).split("#")[0].split()
        if words[1].startswith("-") or words[1].isupper():
            continue
        assert words[1] in COMMANDS, f"{path.name} names `ekiben {words[1]}`"
        known = {option for parameter in COMMANDS[words[1]].params for option in parameter.opts} | {"--help"}
        assert {word.split("=")[0] for word in words if word.startswith("-")} <= known, f"{path.name}: {' '.join(words)}"


def test_every_command_has_one_line_in_the_table() -> None:
    rows = re.findall(r"^\| `ekiben (\w+)` \| (.+) \|$", README, re.M)
    assert sorted(name for name, _ in rows) == sorted(COMMANDS)
    assert all(len(says) < 90 for _, says in rows)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_an_example_that_calls_it(name: str) -> None:
    text = COMMANDS[name].help or ""
    assert re.search(rf"Example: ekiben {name}\b", text), f"no example in the help of {name}"
    assert all(getattr(p, "help", "") for p in COMMANDS[name].params if p.name not in ("help",))


def test_every_make_target_that_is_named_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):.*##", (ROOT / "Makefile").read_text(), re.M))
    for path in documents()[:2]:
        named = re.findall(r"^\s*make ([a-z]+)|`make ([a-z]+)`", path.read_text(encoding="utf-8"), re.M)
        assert {"".join(pair) for pair in named} <= targets


def test_every_file_that_is_named_is_there() -> None:
    for path in documents()[:2]:
        text = path.read_text(encoding="utf-8")
        links = [to for to in re.findall(r"\]\(([^)#]+)\)", text) if not to.startswith("http")]
        places = re.findall(r"^\| `([\w./]+)` \|", text, re.M)
        for name in [*links, *places]:
            assert (ROOT / name).exists(), f"{path.name} names {name}"


def test_the_settings_that_are_shown_are_valid(tmp_path: Path) -> None:
    (shown,) = blocks("ini")
    (tmp_path / "settings.ini").write_text(shown, encoding="utf-8")
    (tmp_path / "nbs").mkdir()
    (tmp_path / "nbs" / "pipeline").symlink_to(ROOT / "nbs" / "pipeline")
    settings = load_settings(tmp_path, env={})
    assert settings.steps["tune"]["budget_s"] == 60 and len(settings.gates.declared) == 2


def test_the_diagram_names_the_steps_that_there_are() -> None:
    steps = [path.stem for path in notebooks_in(ROOT / "nbs" / "pipeline") if path.stem != "00_schema"]
    shown = re.findall(r"\b(\d\d_\w+) ─▶", README)
    assert shown == [step for step in steps if step in shown] and len(shown) == 5


def run_blocks(folder: Path, *marks: str) -> subprocess.CompletedProcess[str]:
    """Run the marked blocks one after the other, as a person would, beside a small loans.csv."""
    pyarrow.csv.write_csv(simulate_credit("simulated:credit?rows=3000"), folder / "loans.csv")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    script = "set -euo pipefail\n" + "\n".join(blocks("sh", *marks))
    return subprocess.run(
        ["bash", "-c", script], cwd=folder, capture_output=True, text=True, check=False,
        env={**os.environ, "PATH": path, "EKIBEN_TUNE__BUDGET_S": "10"},
    )  # fmt: skip


def test_the_quick_blocks_run(tmp_path: Path) -> None:
    done = run_blocks(tmp_path, "quick")
    assert done.returncode == 0, done.stderr
    settings = load_settings(tmp_path / "loans", env={})
    assert settings.columns.target == "default" and "next: cd loans && ekiben run" in done.stdout


@pytest.mark.slow
def test_the_slow_blocks_run(tmp_path: Path) -> None:
    done = run_blocks(tmp_path, "quick", "slow")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert list((tmp_path / "loans" / "reports" / "runs").glob("*/05_package.ipynb"))


@pytest.mark.slow
def test_the_journey_page_runs() -> None:
    done = subprocess.run(
        [str(Path(sys.executable).with_name("nbdev-test")), "nbs/index.ipynb", "--n-workers", "0"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def test_no_document_speaks_of_this_machine() -> None:
    for path in [*documents(), *(ROOT / "src/ekiben/project_files").rglob("*")]:
        if path.is_file():
            assert not re.search(r"(?<!\w)/(home|work|tmp|root)/", path.read_text(encoding="utf-8")), path


def test_whatever_new_project_takes_can_be_said_on_the_command_line() -> None:
    import inspect

    from ekiben.new.scaffold import new_project

    options = {option for parameter in COMMANDS["new"].params for option in parameter.opts}
    takes = {f"--{name}" for name in inspect.signature(new_project).parameters if name != "folder"}
    assert takes <= options, "messages of `ekiben new` name these options"
