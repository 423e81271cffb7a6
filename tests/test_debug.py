"""What `ekiben debug` opens: the kernel that was kept, or the same cells again, with nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import psutil
import pytest
from tiny import PREPARE, TUNE, make_project, write_notebook

from ekiben.errors import UsageError
from ekiben.kernels.warm import options, stop
from ekiben.kernels.wire import KernelFolder, runtime_folder
from ekiben.history.debug import connected, debug, find_failed
from ekiben.runner.jobs import Runner
from ekiben.runner.plan import Plan
from ekiben.runner.screen import Screen
from ekiben.runs import Layout, Run, write_run

CELL = "changed = before + 1\nraise ValueError('no good')"
PARAMETERS = 'upstream: list[str] = ["prepare"]\nfactor: int = 2'
EKIBEN = [sys.executable, "-c", "import sys; from ekiben.cli import main; sys.exit(main(sys.argv[1:]))"]


def run(root: Path, **plan: object) -> Run:
    return Runner(root, Plan(**plan), Screen(quiet=True)).execute()  # type: ignore[arg-type]


def make_failing(root: Path, cell: str = CELL) -> Path:
    make_project(root)
    before = "rows = step.load('prepare', 'rows')\nbefore = rows['n'] * factor"
    write_notebook(root / "nbs/pipeline/02_tune.ipynb", PARAMETERS, [TUNE[0], before, cell, "after = 1"])
    return root


@pytest.fixture(scope="module", autouse=True)
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for temporary files of our own, with a short path, and ordinary kernels: whatever is left is left by mistake."""
    tmp_path_factory.getbasetemp()  # where the other modules' files go is settled before
    with tempfile.TemporaryDirectory(prefix="e-") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("EKIBEN_PIPELINE__WARM_KERNELS", "no")
        patch.setenv("TMPDIR", folder)
        patch.setenv("IPYTHONDIR", f"{folder}/ipython")
        patch.setenv("TINY_TOKEN", "sesame-0451")
        patch.setattr(tempfile, "tempdir", None)
        yield Path(folder)


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run]:
    root = make_failing(tmp_path_factory.mktemp("projects") / "tiny")
    return root, run(root, overrides={"tune.factor": "3"})


def console(root: Path, lines: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*EKIBEN, "debug", *words], cwd=root, input=lines, capture_output=True, text=True, check=False)


def everything_below(*folders: Path) -> dict[str, bytes]:
    files = [p for folder in folders for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    return {str(p): p.read_bytes() for p in files}


def kernels_of(root: Path) -> list[int]:
    """Processes that were started for a step of this project."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("EKIBEN_CONTEXT", "").startswith(str(root)) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def kernel_folders() -> set[Path]:
    return set(runtime_folder().glob("k-*"))


def wait_until_gone(root: Path) -> list[int]:
    for _ in range(100):
        if not (left := kernels_of(root)):
            break
        time.sleep(0.1)
    return left


def test_lines_from_a_pipe_see_the_variables_from_before_the_failing_cell_and_the_parameters(
    failed: tuple[Path, Run], surroundings: Path
) -> None:
    root, done = failed
    files, folders = everything_below(root), kernel_folders()
    lines = "before\nfactor\n'changed' in globals()\nfor i in range(2):\n    print(i)\n\nimport os; os.environ['TINY_TOKEN']\n"
    said = console(root, lines, "last")
    assert said.returncode == 0, said.stderr
    assert said.stdout.splitlines() == ["126", "3", "False", "0", "1", "'sesame-0451'"]
    assert f"tune of run {done.run_id} failed in cell 6" in said.stderr
    assert "▸   2 raise ValueError('no good')" in said.stderr and "ValueError: no good" in said.stderr
    assert everything_below(root) == files
    assert wait_until_gone(root) == [] and kernel_folders() <= folders
    assert not any(b"sesame-0451" in content for content in everything_below(root, surroundings).values())


def test_an_error_in_the_console_is_shown_without_colours_and_ends_nothing(failed: tuple[Path, Run]) -> None:
    root, _ = failed
    said = console(root, "1 / 0\nbefore\nexit()\nfactor\n", "last", "tune")
    assert (said.returncode, said.stdout) == (0, "126\n")
    assert "ZeroDivisionError: division by zero" in said.stderr and "\x1b[" not in said.stderr


def test_a_kernel_that_dies_in_the_console_is_exit_1(failed: tuple[Path, Run]) -> None:
    root, _ = failed
    said = console(root, "import os; os._exit(7)\nbefore\n", "last")
    assert said.returncode == 1 and said.stdout == ""
    assert said.stderr.splitlines()[-1] == "the kernel died"


@pytest.mark.slow
def test_upstream_results_are_those_of_the_run_although_others_were_made_since(tmp_path: Path) -> None:
    root = make_failing(tmp_path / "tiny")
    run(root)
    second = run(root)
    assert [s.status for s in second.steps] == ["cached", "failed", "skipped"]
    write_notebook(root / "nbs/pipeline/01_prepare.ipynb", "upstream: list[str] = []", [PREPARE[0], PREPARE[1].replace("number()", "7")])
    run(root)
    assert console(root, "before\n", second.run_id).stdout == "84\n"
    assert console(root, "before\n", "last").stdout == "14\n"


def test_a_cell_that_fails_earlier_this_time_is_where_the_console_opens(tmp_path: Path) -> None:
    root = make_failing(tmp_path / "tiny")
    tune = root / "nbs/pipeline/02_tune.ipynb"
    write_notebook(tune, PARAMETERS, [TUNE[0], "import tiny.helper\nn = tiny.helper.number()", CELL.replace("before", "n")])
    run(root)
    (root / "src/tiny/helper.py").write_text("def number():\n    raise KeyError('gone')\n")
    said = console(root, "factor\n'n' in globals()\n", "last")
    assert said.stdout.splitlines() == ["2", "False"]
    assert "code cell 3 failed already" in said.stderr and "KeyError: 'gone'" in said.stderr


@pytest.mark.parametrize("when", ["while cells run again", "while the console waits"])
def test_a_console_that_is_ended_by_a_signal_takes_its_kernel_along(tmp_path: Path, when: str) -> None:
    slow = "from pathlib import Path\nimport time\n(project.root / 'began').touch()\ntime.sleep(60 * (project.root / 'slow').exists())"
    root = make_failing(tmp_path / "tiny")
    write_notebook(root / "nbs/pipeline/02_tune.ipynb", PARAMETERS, [TUNE[0], slow, CELL])
    run(root)
    (root / "began").unlink()
    if when == "while cells run again":
        (root / "slow").touch()
    files, folders = everything_below(root), kernel_folders()
    process = subprocess.Popen([*EKIBEN, "debug", "last"], cwd=root, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if ("ran again" if when == "while the console waits" else "running the") in line:
            break
    while not (root / "began").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert wait_until_gone(root) == []
    (root / "began").unlink()
    assert everything_below(root) == files and kernel_folders() <= folders


def test_a_run_without_a_failed_step_says_where_one_failed(tmp_path: Path) -> None:
    root = make_project(tmp_path / "tiny")
    layout = Layout(root)
    with pytest.raises(UsageError, match="no run"):
        debug(root)
    run(root)
    with pytest.raises(UsageError, match=r"it is done, and no step of it failed; no run here has a failed step$"):
        debug(root)
    write_notebook(root / "nbs/pipeline/02_tune.ipynb", PARAMETERS, [TUNE[0], CELL])
    broken = run(root)
    write_notebook(root / "nbs/pipeline/02_tune.ipynb", PARAMETERS, TUNE)
    run(root)
    said = console(root, "", "last")
    assert said.returncode == 2
    assert said.stderr.startswith("error: nothing to debug in run") and said.stderr.count("\n") == 1
    assert f"failed lately: {broken.run_id} (tune)" in said.stderr
    with pytest.raises(UsageError, match=r"`prepare` is cached there; failed: tune"):
        find_failed(layout, broken.run_id, "prepare")
    with pytest.raises(UsageError, match=r"no step `tunr`; did you mean `tune`\?"):
        find_failed(layout, broken.run_id, "tunr")


@pytest.mark.slow
@pytest.mark.skipif(not options(None, {})[0], reason="no warm kernels here, and an ordinary one cannot be kept")
def test_a_kernel_that_the_run_kept_holds_what_the_failing_cell_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EKIBEN_PIPELINE__WARM_KERNELS", "yes")
    monkeypatch.setenv("EKIBEN_PIPELINE__KERNEL_IDLE_S", "300")
    root = make_failing(tmp_path / "tiny")
    try:
        done = run(root, keep=True)
        assert done.steps[1].kernel and (root / done.steps[1].kernel).stat().st_mode & 0o077 == 0
        said = console(root, "changed\nimport sys; sys.last_value\nquit\n", "last")
        assert said.stdout.splitlines() == ["85", "ValueError('no good')"]
        assert "this is the kernel in which it failed" in said.stderr
        assert console(root, "changed\n", "last").stdout == "85\n"
        stop(root)
        assert wait_until_gone(root) == []
        assert console(root, "before\n'changed' in globals()\n", "last").stdout.splitlines() == ["84", "False"]
        assert not (root / done.steps[1].kernel).exists()
    finally:
        stop(root)


@pytest.fixture
def kept(failed: tuple[Path, Run]) -> Iterator[tuple[Path, str, Path]]:
    """A run whose `run.json` names a kernel, and that kernel, in which a cell has just raised."""
    from jupyter_client.manager import KernelManager

    root, done = failed
    folder = KernelFolder()
    kernel = KernelManager(transport="ipc", ip=str(folder.path / "k"), connection_file=str(folder.path / "kernel.json"))
    kernel.start_kernel(env={**os.environ, "EKIBEN_CONTEXT": f"{root}/kept"})
    with_client = kernel.blocking_client()
    with_client.start_channels()
    with_client.wait_for_ready(timeout=60)
    with_client.execute("before = 20", reply=True)
    with_client.execute(CELL, reply=True)
    with_client.stop_channels()
    file = root / ".ekiben/runs" / "20000101-000000-0000" / "tune.kernel"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(Path(kernel.connection_file).read_bytes())
    steps = [msgspec.structs.replace(s, kernel=str(file.relative_to(root))) if s.name == "tune" else s for s in done.steps]
    write_run(Layout(root), msgspec.structs.replace(done, run_id="20000101-000000-0000", steps=steps))
    yield root, "20000101-000000-0000", file
    kernel.shutdown_kernel(now=True)
    folder.remove()
    file.unlink(missing_ok=True)
    (root / "reports/runs/20000101-000000-0000/run.json").unlink()


def test_a_kept_kernel_is_attached_to_and_stays_until_it_is_ended(kept: tuple[Path, str, Path]) -> None:
    root, run_id, file = kept
    said = console(root, "changed\n%debug\np before + 100\nq\nexit\n", run_id)
    assert said.returncode == 0, said.stderr
    assert "this is the kernel in which it failed" in said.stderr and "before it again" not in said.stderr
    assert said.stdout.splitlines()[0] == "21" and "120" in said.stdout
    with connected(file) as client:
        assert client is not None
    assert debug_with_lines(root, run_id, "changed\n", end=True) == (0, "21\n")
    assert wait_until_gone(root) == [] and not file.exists()


def test_when_the_kept_kernel_is_gone_the_cells_run_again(kept: tuple[Path, str, Path]) -> None:
    root, run_id, file = kept
    with connected(file) as client:
        client.shutdown(reply=True, timeout=10)
    assert wait_until_gone(root) == []
    said = console(root, "before\n'changed' in globals()\n", run_id)
    assert said.stdout.splitlines() == ["126", "False"]


def debug_with_lines(root: Path, run_id: str, lines: str, *, end: bool) -> tuple[int, str]:
    code = f"from pathlib import Path; from ekiben.history.debug import debug; raise SystemExit(debug(Path(), {run_id!r}, end={end}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, input=lines, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout


@pytest.mark.slow
def test_at_a_terminal_the_failing_cell_waits_in_the_input_line(failed: tuple[Path, Run]) -> None:
    pexpect = pytest.importorskip("pexpect", reason="needs a pseudo-terminal")
    root, _ = failed
    terminal = pexpect.spawn(EKIBEN[0], [*EKIBEN[1:], "debug", "last"], cwd=str(root), dimensions=(40, 120), timeout=60, encoding="utf-8")
    try:
        terminal.expect("Ctrl-D leaves")
        terminal.expect(r"\x1b\[6n")  # where the cursor is, asked by the line editor
        terminal.send("\x1b[1;1R")
        terminal.expect("raise")
        terminal.send("\r")
        terminal.expect("ValueError")
        terminal.expect("no good")
        terminal.send("print('now', changed)\r")
        terminal.expect("now 127")
        terminal.send("\x04")
        terminal.expect(pexpect.EOF)
    finally:
        terminal.close(force=True)
    assert terminal.exitstatus == 0
    assert wait_until_gone(root) == []


