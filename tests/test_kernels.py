"""Kernels forked from a zygote: real kernels in all they do, isolated, and gone without a trace."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest

from ekiben.kernels import warm, wire
from ekiben.runner.engine import EkibenEngine, Handle

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="kernels are forked on Linux only")
logging.getLogger("papermill").setLevel(logging.CRITICAL)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A project with nothing but its settings, whose zygote ends with the test."""
    (tmp_path / "settings.ini").write_text("[pipeline]\nkernel_idle_s = 60\n")
    monkeypatch.delenv("EKIBEN_PIPELINE__KERNEL_IDLE_S", raising=False)
    monkeypatch.delenv("EKIBEN_PIPELINE__WARM_KERNELS", raising=False)
    yield tmp_path
    warm.stop(tmp_path)


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A folder with a short path, as sockets need it."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield Path(folder)


def execute(place: Path, *cells: str, env: dict[str, str] | None = None, **more: Any) -> Any:
    """Run cells in one kernel and return the executed notebook."""
    page = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells])
    page.metadata["papermill"] = {}
    page.metadata["kernelspec"] = {"name": "python3", "display_name": "python3", "language": "python"}
    return EkibenEngine.execute_notebook(
        page, "python3", progress_bar=False, kernel_cwd=str(place), env={**os.environ, **(env or {})}, **more
    )


def printed(page: Any) -> str:
    """Return what the cells printed; an error in one of them fails the test with it."""
    errors = [f"{o.ename}: {o.evalue}" for c in page.cells for o in c.outputs if o.output_type == "error"]
    assert not errors
    return "".join(o.text for c in page.cells for o in c.outputs if o.output_type == "stream" and o.name == "stdout").strip()


def statuses(page: Any) -> list[str]:
    return [c.metadata.papermill["status"] for c in page.cells]


def zygotes(place: Path) -> list[dict[str, Any]]:
    return [z for z in warm.running() if z.get("place") == str(place.resolve())]


def eventually(claim: Callable[[], Any], timeout_s: float = 60) -> bool:
    limit = time.monotonic() + timeout_s
    while time.monotonic() < limit:
        if claim():
            return True
        time.sleep(0.05)
    return bool(claim())


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


PARENT = "import os; print(os.getppid())"

WORK = {
    "OpenMP in LightGBM": (
        "import numpy as np, lightgbm as lgb\nX = np.random.rand(2000, 8); y = (X[:, 0] > .5) * 1\n"
        "m = lgb.train({'objective': 'binary', 'num_threads': 2, 'verbose': -1}, lgb.Dataset(X, y), 20)\nprint(m.num_trees())",
        "20",
    ),
    "OpenMP in scikit-learn": (
        "import numpy as np\nfrom sklearn.ensemble import HistGradientBoostingClassifier as H\nX = np.random.rand(2000, 8)\n"
        "print(H(max_iter=20).fit(X, X[:, 0] > .5).score(X, X[:, 0] > .5) > .9)",
        "True",
    ),
    "BLAS with threads": ("import numpy as np\na = np.ones((1200, 1200))\nprint(int((a @ a).sum() / 1200 ** 3))", "1"),
    "multiprocessing by fork": (
        "import multiprocessing as mp\ndef double(x): return 2 * x\n"
        "with mp.get_context('fork').Pool(2) as pool: print(pool.map(double, [1, 2, 3]))",
        "[2, 4, 6]",
    ),
    "multiprocessing by spawn": (
        "import multiprocessing as mp, operator\n"
        "with mp.get_context('spawn').Pool(2) as pool: print(pool.map(operator.neg, [1, 2, 3]))",
        "[-1, -2, -3]",
    ),
    "a pool of processes": (
        "from concurrent.futures import ProcessPoolExecutor as P\nimport math\nwith P(2) as pool: print(list(pool.map(math.sqrt, [4, 9])))",
        "[2.0, 3.0]",
    ),
    "joblib": ("from joblib import Parallel, delayed\nprint(Parallel(n_jobs=2)(delayed(abs)(x) for x in [-1, -2]))", "[1, 2]"),
    "top-level await": ("import asyncio\nprint(await asyncio.sleep(0.01, 'slept'))", "slept"),
    "threads": (
        "import threading\nt = threading.Thread(target=print, args=['from a thread'])\nt.start(); t.join()",
        "from a thread",
    ),
    "subprocesses": ("import subprocess\nprint(subprocess.run(['echo', 'hello'], capture_output=True, text=True).stdout, end='')", "hello"),
    "magics": ("%env EKIBEN_TEST_WORD=yes\nimport os\nprint(os.environ['EKIBEN_TEST_WORD'])", "env: EKIBEN_TEST_WORD=yes\nyes"),
    "shell lines": ("!echo from the shell", "from the shell"),
    "database in memory": ("import duckdb\nprint(duckdb.sql('select 41 + 1').fetchall()[0][0])", "42"),
    "Arrow's threads": (
        "import pyarrow as pa, pyarrow.compute as pc\nprint(pc.sum(pa.chunked_array([range(1000)] * 50)).as_py())",
        "24975000",
    ),
    "interrupts": (
        "import os, signal, time\ntry:\n    os.kill(os.getpid(), signal.SIGINT); time.sleep(5)\nexcept KeyboardInterrupt:\n    print('interrupted')",
        "interrupted",
    ),
}


@pytest.fixture(scope="module", autouse=True)
def as_the_settings_say() -> Iterator[None]:
    """Let each project's settings.ini say how long its zygote waits, whatever the tests are run with."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("EKIBEN_PIPELINE__KERNEL_IDLE_S", "EKIBEN_PIPELINE__WARM_KERNELS"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("workshop")
    (folder / "settings.ini").write_text("[pipeline]\nkernel_idle_s = 60\n")
    yield folder
    warm.stop(folder)


@pytest.mark.parametrize("work", WORK)
def test_a_forked_kernel_does_what_an_ordinary_one_does(workshop: Path, work: str) -> None:
    code, expected = WORK[work]
    done = execute(workshop, code, PARENT)
    *said, parent = printed(done).splitlines()
    assert "\n".join(said) == expected
    assert int(parent) == zygotes(workshop)[0]["pid"], "an ordinary kernel ran it"


def test_figures_are_shown_though_matplotlib_was_imported_before_the_fork(workshop: Path) -> None:
    done = execute(workshop, "import matplotlib.pyplot as plt\nplt.plot([1, 2]);", "import matplotlib\nprint(matplotlib.get_backend())", PARENT)
    assert any("image/png" in o.get("data", {}) for o in done.cells[0].outputs)
    assert "inline" in done.cells[1].outputs[0].text
    assert int(done.cells[2].outputs[0].text) == zygotes(workshop)[0]["pid"]


def test_two_kernels_share_no_state_and_no_random_numbers(workshop: Path) -> None:
    code = "import random, uuid, numpy as np\nprint(random.random(), np.random.rand(), uuid.uuid4(), 'left' in dir(np))\nnp.left = 1"
    first, second = (printed(execute(workshop, code)).split() for _ in range(2))
    assert all(a != b for a, b in zip(first[:3], second[:3], strict=True))
    assert (first[3], second[3]) == ("False", "False")


def test_a_kernel_has_its_callers_environment_folder_and_limits(place: Path) -> None:
    import resource

    execute(place, "1")
    deeper = place / "nbs"
    deeper.mkdir()
    (deeper / "beside.py").write_text("word = 'found beside the notebook'")
    extra = place / "extra"
    extra.mkdir()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 700), hard))
    mask = os.umask(0o027)
    try:
        done = execute(
            deeper,
            "import os, sys, time, resource, beside\nprint(os.getcwd(), os.environ['WORD'], 'LEFT_OUT' in os.environ, time.tzname[0])\n"
            "print(beside.word)\nprint(resource.getrlimit(resource.RLIMIT_NOFILE)[0], oct(os.umask(0)))\nprint(os.getppid())",
            env={"WORD": "given", "TZ": "Asia/Tokyo"},
        )
    finally:
        os.umask(mask)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    where, word, limits, parent = printed(done).splitlines()
    assert where == f"{deeper} given False JST"
    assert word == "found beside the notebook"
    assert limits == f"{min(soft, 700)} 0o27"
    assert int(parent) == zygotes(place)[0]["pid"]


def test_the_projects_own_modules_are_read_anew_by_every_kernel(place: Path) -> None:
    own = place / "src/census"
    own.mkdir(parents=True)
    (own / "__init__.py").write_text("")
    path = {"PYTHONPATH": str(place / "src")}
    seen = []
    for word in ("first", "second"):
        (own / "words.py").write_text(f"word = {word!r}")
        seen.append(printed(execute(place, "from census.words import word\nimport os\nprint(word, os.getppid())", env=path)).split())
    assert [s[0] for s in seen] == ["first", "second"]
    assert seen[0][1] == seen[1][1], "no new zygote is needed for that"


def test_an_edited_library_replaces_the_zygote_while_its_kernels_run_on(place: Path) -> None:
    library = place / "lib"
    library.mkdir()
    (library / "shared_words.py").write_text("word = 'old'")
    path = {"PYTHONPATH": str(library)}
    code = "import shared_words, os\nprint(shared_words.word, os.getppid())"
    done: list[Any] = []
    slow = threading.Thread(
        target=lambda: done.append(execute(place, code, "import time, pathlib\npathlib.Path('began').touch()\ntime.sleep(3)\nprint('whole')", env=path))
    )
    slow.start()
    assert eventually((place / "began").exists)
    (library / "shared_words.py").write_text("word = 'edited'")
    after = printed(execute(place, code, env=path)).split()
    slow.join()
    before = printed(done[0]).split()
    assert (before[0], before[2]) == ("old", "whole")
    assert after[0] == "edited" and after[1] != before[1]
    assert eventually(lambda: not is_running(int(before[1])))


def test_a_changed_variable_that_libraries_read_at_import_replaces_the_zygote(place: Path) -> None:
    code = "import os\nprint(os.getppid(), os.environ.get('OMP_NUM_THREADS'))"
    first = printed(execute(place, code, env={"OMP_NUM_THREADS": "1"})).split()
    same = printed(execute(place, code, env={"OMP_NUM_THREADS": "1", "UNRELATED": "x"})).split()
    other = printed(execute(place, code, env={"OMP_NUM_THREADS": "2"})).split()
    assert first == same
    assert other[0] != first[0] and other[1] == "2"


def test_a_module_beside_the_notebook_that_hides_a_loaded_one_gets_an_ordinary_kernel(place: Path) -> None:
    execute(place, "import threadpoolctl")
    (place / "threadpoolctl.py").write_text("word = 'mine'")
    done = execute(place, "import threadpoolctl, os\nprint(threadpoolctl.word, os.getppid())")
    assert printed(done) == f"mine {os.getpid()}"


def test_an_import_that_starts_a_thread_gets_an_ordinary_kernel(place: Path) -> None:
    library = place / "lib"
    library.mkdir()
    (library / "starts_thread.py").write_text("import threading, time\nthreading.Thread(target=time.sleep, args=[600], daemon=True).start()")
    done = execute(place, "import starts_thread", PARENT, env={"PYTHONPATH": str(library)})
    assert int(printed(done)) == os.getpid()


@pytest.mark.parametrize("why", ["off", "no private folder", "no fork"])
def test_where_there_are_no_warm_kernels_an_ordinary_one_gives_the_same_results(
    place: Path, short_folder: Path, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = {}
    if why == "off":
        env["EKIBEN_PIPELINE__WARM_KERNELS"] = "no"
    elif why == "no private folder":
        open_to_all = short_folder / f"ekiben-{os.getuid()}"
        open_to_all.mkdir()
        open_to_all.chmod(0o755)
    with monkeypatch.context() as patched:
        if why == "no private folder":
            patched.setattr("tempfile.tempdir", str(short_folder))
        elif why == "no fork":
            patched.delattr(os, "fork")
        done = execute(place, "x = 6 * 7\nprint(x)", PARENT, env=env)
    assert printed(done).split() == ["42", str(os.getpid())]


def test_two_projects_have_two_zygotes_and_stop_ends_one_project_s(place: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    (other / "settings.ini").touch()
    try:
        first, second = printed(execute(place, PARENT)), printed(execute(other, PARENT, env={"EKIBEN_PIPELINE__KERNEL_IDLE_S": "60"}))
        assert first != second
        assert warm.stop(place) == 0
        assert not is_running(int(first)) and is_running(int(second))
        assert not wire.zygote_folder(place).exists()
    finally:
        warm.stop(other)


def test_starters_who_come_at_once_get_one_zygote(place: Path) -> None:
    parents: list[str] = []
    threads = [threading.Thread(target=lambda: parents.append(printed(execute(place, PARENT)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(parents) == 4 and len(set(parents)) == 1


def test_an_idle_zygote_ends_and_leaves_nothing(place: Path) -> None:
    pid = int(printed(execute(place, PARENT, env={"EKIBEN_PIPELINE__KERNEL_IDLE_S": "0"})))
    assert eventually(lambda: not is_running(pid))
    assert eventually(lambda: not wire.zygote_folder(place).exists())


def test_a_zygote_goes_when_its_project_goes(tmp_path: Path) -> None:
    import shutil

    root = tmp_path / "census"
    root.mkdir()
    (root / "settings.ini").write_text("[pipeline]\nkernel_idle_s = 60\n")
    pid = int(printed(execute(root, PARENT)))
    shutil.rmtree(root)
    assert eventually(lambda: not is_running(pid))
    assert eventually(lambda: not wire.zygote_folder(root).exists())


ENDS = {
    "os._exit(7)": "the kernel left with exit code 7",
    "os.kill(os.getpid(), signal.SIGKILL)": "the kernel was killed (signal 9; out of memory?)",
    "import ctypes; ctypes.string_at(0)": "the kernel was ended by signal 11",
    "os.abort()": "the kernel was ended by signal 6",
}


@pytest.mark.parametrize("end", ENDS)
def test_a_kernel_that_dies_is_told_with_its_status_and_its_last_words(place: Path, end: str) -> None:
    done = execute(place, "import os, signal, sys", f"print('last words', flush=True)\nimport time; time.sleep(0.3)\n{end}", "print('never')")
    assert statuses(done) == ["completed", "failed", "pending"]
    words, error = done.cells[1].outputs
    assert words.text == "last words\n"
    assert error.ename == "DeadKernelError" and error.evalue.startswith(ENDS[end])


def test_a_killed_zygote_takes_its_kernel_along_and_the_next_run_works(place: Path) -> None:
    child = "import subprocess, pathlib, os\np = subprocess.Popen(['sleep', '600'])\npathlib.Path('child').write_text(str(p.pid))"
    kill = "import signal, time\nos.kill(os.getppid(), signal.SIGKILL)\ntime.sleep(60)"
    done = execute(place, child, kill)
    assert statuses(done) == ["completed", "failed"]
    assert done.cells[1].outputs[0].ename == "DeadKernelError"
    assert eventually(lambda: not is_running(int((place / "child").read_text())))
    assert printed(execute(place, "print('again')")) == "again"


CLIENT = """
import sys, nbformat
from ekiben.runner.engine import EkibenEngine
code = "import subprocess, pathlib, os, time\\np = subprocess.Popen(['sleep', '600'])\\n" \\
       "pathlib.Path('pids').write_text(f'{os.getpid()} {p.pid} {os.getppid()}')\\npathlib.Path('began').touch()\\ntime.sleep(600)"
page = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)], metadata={"papermill": {}})
EkibenEngine.execute_notebook(page, "python3", progress_bar=False, kernel_cwd=sys.argv[1])
"""


def test_a_killed_client_leaves_no_kernel_no_child_and_no_socket(place: Path) -> None:
    before = set(wire.runtime_folder().glob("k-*"))
    client = subprocess.Popen([sys.executable, "-c", CLIENT, str(place)], cwd=place)
    assert eventually((place / "began").exists)
    kernel, child, zygote = map(int, (place / "pids").read_text().split())
    made = [f for f in wire.runtime_folder().glob("k-*") if f not in before and f"{f}/" in Path(f"/proc/{kernel}/net/unix").read_text()]
    client.kill()
    client.wait()
    assert eventually(lambda: not is_running(kernel)) and eventually(lambda: not is_running(child))
    assert made and eventually(lambda: not any(f.exists() for f in made))
    assert is_running(zygote)


def test_a_held_zygote_outlives_its_idle_time(place: Path) -> None:
    with warm.hold(place, idle_s=0):
        assert eventually(lambda: bool(zygotes(place)))
        (first,) = zygotes(place)
        time.sleep(2.5)
        assert is_running(first["pid"])
    assert eventually(lambda: not is_running(first["pid"]))


def test_a_kernel_that_is_kept_can_be_looked_into_and_ends_after_the_idle_time(place: Path) -> None:
    from jupyter_client.blocking import BlockingKernelClient

    file = place / "kept.json"
    done = execute(place, "secret_word = 'ekiben'", "1 / 0", keep=file, env={"EKIBEN_PIPELINE__KERNEL_IDLE_S": "5"})
    assert statuses(done) == ["completed", "failed"]
    assert file.stat().st_mode & 0o777 == 0o600
    client = BlockingKernelClient()
    client.load_connection_file(str(file))
    client.start_channels()
    said: list[str] = []
    client.wait_for_ready(timeout=30)
    client.execute_interactive("import os; print(secret_word, os.getpid())",
                               output_hook=lambda m: said.append(m["content"].get("text", "")), allow_stdin=False)
    word, pid = "".join(said).split()
    time.sleep(7)
    assert word == "ekiben" and is_running(int(pid)), "somebody is looking into it"
    client.stop_channels()
    assert eventually(lambda: not is_running(int(pid)))
    folder = Path(json.loads(file.read_text())["ip"]).parent
    assert eventually(lambda: not folder.exists())


@pytest.mark.parametrize("reason", ["interrupted", "step_timeout"])
def test_a_handle_stops_a_notebook_from_another_thread(place: Path, reason: str) -> None:
    handle = Handle()

    def stop() -> None:
        assert eventually((place / "began").exists)
        assert is_running(handle.kernel_pid)
        handle.stop(reason)

    thread = threading.Thread(target=stop)
    thread.start()
    done = execute(place, "import pathlib, time", "pathlib.Path('began').touch()\ntime.sleep(600)", "1", handle=handle)
    thread.join()
    assert statuses(done) == ["completed", "failed", "pending"]
    assert done.cells[1].outputs[-1].ename == {"interrupted": "KeyboardInterrupt", "step_timeout": "StepTimeoutError"}[reason]


def test_a_notebook_that_was_stopped_before_it_began_runs_no_cell(place: Path) -> None:
    handle = Handle()
    handle.stop("interrupted")
    done = execute(place, "import pathlib\npathlib.Path('ran').touch()", "1", handle=handle)
    assert statuses(done) == ["failed", "pending"]
    assert not (place / "ran").exists()


def test_a_deadline_and_a_cell_s_own_time_are_told_apart(place: Path) -> None:
    late = execute(place, "import time\ntime.sleep(600)", deadline=time.monotonic() + 8)
    slow = execute(place, "import time\ntime.sleep(600)", execution_timeout=1)
    assert late.cells[0].outputs[-1].ename == "StepTimeoutError"
    assert slow.cells[0].outputs[-1].ename == "CellTimeoutError"


def test_processes_that_a_kernel_leaves_behind_end_with_it(place: Path) -> None:
    code = "import subprocess, os\np = subprocess.Popen(['sleep', '600'])\nprint(p.pid, flush=True)\nimport time; time.sleep(.3)\nos._exit(3)"
    done = execute(place, code)
    assert eventually(lambda: not is_running(int(done.cells[0].outputs[0].text)))


def test_exit_handlers_of_a_kernel_are_run(place: Path) -> None:
    code = "import atexit, pathlib\natexit.register(lambda: pathlib.Path('left').write_text('in order'))"
    execute(place, code)
    assert (place / "left").read_text() == "in order"


def test_outputs_are_redacted_before_anybody_sees_them(place: Path) -> None:
    def redact(value: Any) -> Any:
        return nbformat.from_dict(json.loads(json.dumps(value).replace("hunter2", "***")))

    done = execute(
        place,
        "print('my hunter2')",
        "import sys, time\nsys.stdout.write('hun'); sys.stdout.flush(); time.sleep(.5); sys.stdout.write('ter2');",
        "'hunter2'",
        "raise ValueError('hunter2')",
        redact=redact,
    )
    assert "hunter2" not in json.dumps(done) .replace(json.dumps([c.source for c in done.cells]), "").replace("'hunter2'", "").replace("my hunter2')", "")
    assert done.cells[0].outputs[0].text == "my ***\n"
    assert "".join(o.text for o in done.cells[1].outputs) == "***"
    assert done.cells[3].outputs[0].evalue == "***"


def test_leftovers_of_the_dead_are_swept_and_those_of_the_living_are_not(place: Path) -> None:
    dead = subprocess.run(
        [sys.executable, "-c", "from ekiben.kernels.wire import KernelFolder; print(KernelFolder().path)"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()
    living = wire.KernelFolder()
    for path in (Path(dead), living.path):
        os.utime(path, (0, 0))
    wire.sweep()
    assert not Path(dead).exists() and living.path.exists()
    living.remove()


def test_somebody_else_s_folder_is_not_used(place: Path, short_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (short_folder / f"ekiben-{os.getuid()}").symlink_to(place)
    with monkeypatch.context() as patched, pytest.raises(PermissionError, match="not a private folder"):
        patched.setattr("tempfile.tempdir", str(short_folder))
        wire.runtime_folder()
