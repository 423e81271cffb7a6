"""`papermill --engine ekiben` does what papermill's own engine does on the same notebook, where that tells the truth."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import papermill
import pytest
from papermill.exceptions import PapermillExecutionError

from ekiben.kernels import warm

PAGES: dict[str, list[Any]] = {
    "streams": ["print('out')", "import sys\nprint('err', file=sys.stderr)\nprint('out again')", "!echo shell"],
    "results": ["1 + 1", "None", "'text'", "[1, 2]\n\n{'a': 1}"],
    "rich": ["from IPython.display import HTML, display\ndisplay(HTML('<b>x</b>'))\nHTML('<i>y</i>')"],
    "figure": ["import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()"],
    "updated display": ["from IPython.display import display\nh = display('a', display_id='one')", "h.update('b')"],
    "cleared output": ["from IPython.display import clear_output\nprint('a')\nclear_output()\nprint('b')"],
    "markdown and raw": [nbformat.v4.new_markdown_cell("# title"), "1", nbformat.v4.new_raw_cell("raw"), ""],
    "parameters": [nbformat.v4.new_code_cell("n = 1\nword = 'x'", metadata={"tags": ["parameters"]}), "print(n, word)"],
    "parameters without a cell": ["print(n, word)"],
    "skipped": [nbformat.v4.new_code_cell("print('no')", metadata={"tags": ["skip-execution"]}), "print('yes')"],
    "expected error": [nbformat.v4.new_code_cell("1 / 0", metadata={"tags": ["raises-exception"]}), "print('after')"],
    "error": ["print('before')", "def f():\n    raise ValueError('no such thing')\nf()", "print('never')"],
    "syntax error": ["print('a'", "1"],
    "exit": ["import sys\nprint('bye')\nsys.exit(0)", "print('never')"],
    "exit with a status": ["import sys\nsys.exit(3)", "print('never')"],
    "described": ["# papermill_description=Loading\nprint(1)"],
    "magics": ["%%time\nx = 1", "%%bash\necho hello", "%config InlineBackend.figure_format = 'svg'"],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("papermill")
    (folder / "settings.ini").write_text("[pipeline]\nkernel_idle_s = 60\n")
    yield folder
    warm.stop(folder)


def write_page(path: Path, cells: list[Any]) -> Path:
    made = [nbformat.v4.new_code_cell(c) if isinstance(c, str) else c for c in cells]
    page = nbformat.v4.new_notebook(cells=made)
    for number, cell in enumerate(page.cells):
        cell.id = f"cell{number}"
    page.metadata["kernelspec"] = {"name": "python3", "display_name": "python3", "language": "python"}
    nbformat.write(page, path)
    return path


def run(place: Path, page: Path, engine: str | None, **more: Any) -> tuple[dict[str, Any], str]:
    """Execute by one engine; return the executed notebook and the error that papermill raised."""
    output = page.with_suffix(f".{engine}.ipynb")
    error = ""
    try:
        papermill.execute_notebook(
            str(page), str(output), {"n": 21, "word": "given"}, engine_name=engine, cwd=str(place), progress_bar=False, **more
        )
    except PapermillExecutionError as exc:
        error = f"{exc.ename}: {exc.evalue} in {exc.cell_index}"
    return json.loads(output.read_text()), error


def comparable(notebook: dict[str, Any]) -> dict[str, Any]:
    """Return a notebook without what two runs of one engine do not share either: times, temporary names and cell ids."""
    text = json.dumps(notebook, ensure_ascii=False)
    text = re.sub(r'"(start_time|end_time|duration|busy_s)": ("[^"]*"|[0-9.e-]+|null)', r'"\1": 0', text)
    text = re.sub(r"\d{4}-\d\d-\d\dT[\d:.]+(Z|\+00:00)", "…", text)
    text = re.sub(r"ipykernel_\d+/\d+\.py|\.(None|ekiben)\.ipynb|at 0x[0-9a-f]+|<ipython-input[^>]*>", "…", text)
    text = re.sub(r"(CPU times|Wall time): [^\\]*", r"\1", text)
    page = json.loads(text)
    page["metadata"]["papermill"].pop("busy_s", None)
    for cell in page["cells"]:
        cell.pop("id", None)
        for output in cell.get("outputs", []):
            output.get("data", {}).pop("image/png", None)
    return page  # type: ignore[no-any-return]


def without_statuses(page: dict[str, Any]) -> dict[str, Any]:
    for cell in page["cells"]:
        cell["metadata"].get("papermill", {}).pop("status", None)
    return page


@pytest.mark.parametrize("name", PAGES)
def test_outputs_metadata_and_errors_are_those_of_papermill_s_own_engine(place: Path, name: str) -> None:
    page = write_page(place / f"{name.replace(' ', '_')}.ipynb", PAGES[name])
    theirs, their_error = run(place, page, None)
    ours, our_error = run(place, page, "ekiben")
    assert our_error == their_error
    if their_error or name == "exit":  # papermill says `completed` of cells that never ran
        after = [c["metadata"]["papermill"]["status"] for c in ours["cells"] if "never" in str(c["source"])]
        assert after in ([], ["pending"])
        theirs, ours = without_statuses(theirs), without_statuses(ours)
    assert comparable(ours) == comparable(theirs)


def command(*arguments: str, cwd: Path, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "papermill", *arguments], cwd=cwd, capture_output=True, text=True, check=False, **more)


@pytest.mark.parametrize("engine", [None, "ekiben"])
def test_the_command_line_s_options_mean_the_same(place: Path, engine: str | None) -> None:
    page = write_page(place / "options.ipynb", [*PAGES["parameters"], "import sys, os\nprint('warned', file=sys.stderr)\nprint(os.getcwd())"])
    choice = ["--engine", engine] if engine else []
    done = command(
        *choice, "-p", "n", "5", "-r", "word", "7", "--log-output", "--no-progress-bar", "--stdout-file", f"out-{engine}.txt",
        "--stderr-file", f"err-{engine}.txt", "--start-timeout", "90", "--execution-timeout", "60", "--autosave-cell-every", "1",
        "--request-save-on-cell-execute", page.name, f"done-{engine}.ipynb", cwd=place,
    )
    assert done.returncode == 0, done.stderr
    assert (place / f"out-{engine}.txt").read_text() == f"5 7\n{place}\n"
    assert (place / f"err-{engine}.txt").read_text() == "warned\n"
    assert "5 7" in done.stderr and "warned" in done.stderr and "Executing Cell 1" in done.stderr
    told = json.loads((place / f"done-{engine}.ipynb").read_text())["metadata"]["papermill"]
    assert told["parameters"] == {"n": 5, "word": "7"}
    assert told["exception"] is None and told["duration"] > 0


def test_prepare_only_writes_the_parameters_and_runs_nothing(place: Path) -> None:
    page = write_page(place / "prepare.ipynb", PAGES["parameters"])
    assert command("--engine", "ekiben", "--prepare-only", "-p", "n", "3", page.name, "prepared.ipynb", cwd=place).returncode == 0
    cells = json.loads((place / "prepared.ipynb").read_text())["cells"]
    assert "injected-parameters" in cells[1]["metadata"]["tags"]
    assert all(not c.get("outputs") for c in cells)


def test_a_failed_cell_is_announced_at_the_top_with_a_link(place: Path) -> None:
    page = write_page(place / "banner.ipynb", PAGES["error"])
    done = command("--engine", "ekiben", "--progress-bar", page.name, "banner-done.ipynb", cwd=place)
    assert done.returncode == 1 and "ValueError: no such thing" in done.stderr and "Executing" in done.stderr
    cells = json.loads((place / "banner-done.ipynb").read_text())["cells"]
    assert "An Exception was encountered at" in "".join(cells[0]["source"]) and "In [2]" in "".join(cells[0]["source"])
    assert 'id="papermill-error-cell"' in "".join(cells[2]["source"])


def test_a_dead_kernel_and_a_timeout_are_failures_where_papermill_says_completed(place: Path) -> None:
    for name, code, options in (("dead", "import os\nos._exit(7)", []), ("late", "import time\ntime.sleep(60)", ["--execution-timeout", "1"])):
        page = write_page(place / f"{name}.ipynb", ["1", code, "2"])
        done = command("--engine", "ekiben", *options, page.name, f"{name}-done.ipynb", cwd=place)
        assert done.returncode == 1
        cells = [c for c in json.loads((place / f"{name}-done.ipynb").read_text())["cells"] if c["cell_type"] == "code"]
        assert [c["metadata"]["papermill"]["status"] for c in cells] == ["completed", "failed", "pending"]


def begin(place: Path, name: str, *options: str) -> subprocess.Popen[bytes]:
    code = f"import time, pathlib\npathlib.Path('{name}-began').touch()\ntime.sleep(60)"
    write_page(place / f"{name}.ipynb", ["print('first')", code, "3"])
    line = [sys.executable, "-m", "papermill", "--engine", "ekiben", *options, f"{name}.ipynb", f"{name}-done.ipynb"]
    process = subprocess.Popen(line, cwd=place, stderr=subprocess.DEVNULL, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    limit = time.monotonic() + 90
    while not (place / f"{name}-began").exists() and time.monotonic() < limit:
        time.sleep(0.05)
    assert (place / f"{name}-began").exists()
    return process


def code_cells(path: Path) -> list[dict[str, Any]]:
    return [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, None), (signal.SIGTERM, -signal.SIGTERM)])
def test_a_stopped_papermill_leaves_a_true_notebook(place: Path, number: signal.Signals, status: int | None) -> None:
    process = begin(place, f"stopped{number}")
    process.send_signal(number)
    process.wait(30)
    assert process.returncode == status if status is not None else process.returncode != 0
    cells = code_cells(place / f"stopped{number}-done.ipynb")
    assert [c["metadata"]["papermill"]["status"] for c in cells] == ["completed", "failed", "pending"]
    assert cells[1]["outputs"][-1]["ename"] == "KeyboardInterrupt"


def test_the_saved_notebook_shows_a_silent_cell_while_it_runs_and_is_always_whole(place: Path) -> None:
    process = begin(place, "silent", "--autosave-cell-every", "1")
    limit = time.monotonic() + 30
    seen: list[str] = []
    while seen[1:2] != ["running"] and time.monotonic() < limit:  # a save that fell into the first cell is true too
        time.sleep(0.05)
        seen = [c["metadata"]["papermill"]["status"] for c in code_cells(place / "silent-done.ipynb")]
    process.kill()
    process.wait()
    assert seen == ["completed", "running", "pending"]
    assert code_cells(place / "silent-done.ipynb")[0]["outputs"][0]["text"] in (["first\n"], "first\n")
    assert not list(place.glob("*.tmp"))


def test_a_missing_output_folder_is_refused_as_papermill_refuses_it(place: Path) -> None:
    page = write_page(place / "nowhere.ipynb", ["1"])
    done = command("--engine", "ekiben", page.name, "not/here/out.ipynb", cwd=place)
    assert done.returncode != 0 and "FileNotFoundError" in done.stderr
    assert not (place / "not").exists()


def test_outside_any_project_kernels_are_warm_too(tmp_path: Path) -> None:
    write_page(tmp_path / "in.ipynb", ["import os\nprint(os.getppid())"])
    env = {**os.environ, "EKIBEN_PIPELINE__KERNEL_IDLE_S": "60"}
    env.pop("EKIBEN_PIPELINE__WARM_KERNELS", None)
    parents = []
    for output in ("first.ipynb", "second.ipynb"):
        assert command("--engine", "ekiben", "in.ipynb", output, cwd=tmp_path, env=env).returncode == 0
        parents.append("".join(code_cells(tmp_path / output)[0]["outputs"][0]["text"]).strip())
    assert parents[0] == parents[1]
    (zygote,) = [z for z in warm.running() if z.get("place") == str(tmp_path.resolve())]
    assert zygote["pid"] == int(parents[0])
    os.kill(zygote["pid"], signal.SIGTERM)
