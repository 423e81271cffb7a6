"""Faults on purpose: a project of five small steps runs in processes of its own, is disturbed, and is examined afterwards.

Every process that a `Site` starts carries the site's folder in its environment, has its own folder for temporary files and
for Jupyter's sockets, and notes what it does in a ledger outside the project. So whatever is left behind can be told from
what other programs on the machine are doing.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import nbformat
import psutil
from tiny import hear_ctrl_c, make_project, write_notebook

from ekiben.runs import Layout, Run

MARK = "EKIBEN_FAULTS"
PATIENCE_S = 120.0  # for what must happen; nothing is judged by how long it takes
BUDGET = 10
STEPS = ("prepare", "profile", "tune", "evaluate", "report")

SETTINGS = """[data]
source = simulated:credit

[columns]
target = default

[gates]
gates =
    auc >= 0.5
"""

PACE = '''"""What the steps tell the test, and where they wait for it."""

import json
import os
import time
from pathlib import Path

HERE = Path(os.environ["EKIBEN_FAULTS"])


def note(event, place, **more):
    run = Path(os.environ["EKIBEN_CONTEXT"]).parent.name
    line = json.dumps({"event": event, "place": place, "run": run, "pid": os.getpid(), **more}) + "\\n"
    with open(HERE / "ledger", "a") as ledger:
        ledger.write(line)


def at(place):
    note("at", place)
    while (HERE / f"hold-{place}").exists():
        time.sleep(0.01)
    time.sleep(0.05)
'''

BEGIN = "from ekiben import step\nfrom tiny import pace\nproject = step.begin({name!r})\npace.note('begin', {name!r})"
END = "pace.at('end of {name}')\npace.note('end', {name!r})"
WORK = {
    "prepare": ["pace.at('prepare')\nstep.save('rows', {'n': list(range(2000))})\nstep.log(rows=2000)"],
    "profile": [
        "pace.at('profile')\nrows = step.load('prepare', 'rows')['n']",
        "print(*rows, sep='\\n')\nstep.save('mean', {'mean': sum(rows) / len(rows)})\nstep.log(mean=sum(rows) / len(rows))",
    ],
    "tune": [
        "from ekiben.tune.studies import Study, hold_lock, open_storage\n"
        "spread = step.load('prepare', 'rows')['n'][-1] / 1000",
        "pace.at('tune')\n"
        "with hold_lock(step.scratch() / f'{study_name}.lock'):\n"
        "    storage = open_storage(step.scratch() / f'{study_name}.db')\n"
        "    study = Study(storage, 'tiny', direction='minimize', seed=project.seed, starts=[])\n"
        "    while (done := len(study.finished)) < trials:\n"
        "        trial = study.ask()\n"
        "        x = trial.suggest_float('x', -spread, spread)\n"
        "        pace.note('trial', 'tune', number=done)\n"
        "        pace.at(f'trial {done}')\n"
        "        study.tell(trial, {'value': (x - 1) ** 2, 'seconds': 0.05, 'folds': [0]}, (x - 1) ** 2)\n"
        "        pace.note('told', 'tune', number=done, value=(x - 1) ** 2)\n"
        "        step.progress(done + 1, trials)",
        "best = study.optuna.best_trial\n"
        "step.save('best', best.params)\nstep.log(best=best.value, trials=len(study.finished))",
    ],
    "evaluate": [
        "from ekiben import gates\nfrom ekiben.records import Measure\npace.at('evaluate')\n"
        "auc = 1 / (1 + abs(step.load('tune', 'best')['x'] - 1))\n"
        "measures = [Measure(name='auc', value=auc, low=auc, high=auc, rows=100)]\nstep.log_measures(measures)\n"
        "step.judge([gates.judge(g, measures) for g in project.settings.gates.gates])\nstep.save('auc', {'auc': auc})"
    ],
    "report": [
        "pace.at('report')\n"
        "step.log(score=step.load('evaluate', 'auc')['auc'] + step.load('profile', 'mean')['mean'])\n"
        "step.save('text', {'text': 'all is well'})"
    ],
}
TUNED = f"\ntrials: int = {BUDGET}\nstudy_name: str = 'tiny'"
UPSTREAM = {"prepare": [], "profile": ["prepare"], "tune": ["prepare"], "evaluate": ["tune"], "report": ["profile", "evaluate"]}


def settings_with(**pipeline: object) -> str:
    """Return settings.ini with these keys, and those that every site needs, in ``[pipeline]``."""
    keys = {"name": "tiny", "step_timeout_s": 60, "kernel_idle_s": 0, **pipeline}
    return "\n".join(["[pipeline]", *(f"{key} = {value}" for key, value in keys.items()), "", SETTINGS])


def step_path(root: Path, name: str) -> Path:
    return root / "nbs/pipeline" / f"{STEPS.index(name) + 1:02d}_{name}.ipynb"


def write_step(root: Path, name: str, work: Sequence[str] = ()) -> None:
    """Write the notebook of a step, with other cells in its middle where they are given."""
    parameters = f"upstream: list[str] = {json.dumps(UPSTREAM[name])}" + TUNED * (name == "tune")
    cells = [BEGIN.format(name=name), *(work or WORK[name]), END.format(name=name)]
    write_notebook(step_path(root, name), parameters, cells)


def make_template(root: Path) -> Path:
    """Make the project that every site copies."""
    make_project(root, settings=settings_with())
    for path in (root / "nbs/pipeline").glob("*.ipynb"):
        path.unlink()
    (root / "src/tiny/pace.py").write_text(PACE)
    for name in STEPS:
        write_step(root, name)
    return root


class Site:
    """A copy of the project in a folder of its own, and everything that is started there.

    Parameters
    ----------
    template : Path
    settings : str
        Another settings.ini.
    mount_bytes : int
        Put the project on a file system of this size; needs the right to mount.
    keeps_zygote : bool
        The process that forks kernels waits for the next run, as it does by default; else it ends with each run.
    has_mlflow : bool
        Without it a run takes a third of the time, and says that MLflow could not be written to.
    """

    def __init__(
        self, template: Path, *, settings: str = "", mount_bytes: int = 0, keeps_zygote: bool = False, has_mlflow: bool = True
    ) -> None:
        self.base = Path(tempfile.mkdtemp(prefix="f-"))  # short: a socket's path has at most 104 bytes
        self.root, self.temp, self.runtime = (self.base / name for name in ("p", "t", "j"))
        self.mounts: list[Path] = []
        for folder in (self.root, self.temp, self.runtime):
            folder.mkdir()
        if mount_bytes:
            self.mount(["-t", "tmpfs", "-o", f"size={mount_bytes}", "tmpfs"], self.root)
        shutil.copytree(template, self.root, dirs_exist_ok=True)
        self.keeps_zygote, self.has_mlflow = keeps_zygote, has_mlflow
        if settings or keeps_zygote:
            (self.root / "settings.ini").write_text(settings or settings_with(kernel_idle_s=600))
        if not has_mlflow:
            (self.base / "without").mkdir()
            (self.base / "without/mlflow.py").write_text("raise ImportError('there is no mlflow here')\n")
        self.layout = Layout(self.root)
        self.started: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Site:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        for started in self.started:
            started.wait()
        for path in reversed(self.mounts):
            subprocess.run(["umount", "--lazy", str(path)], check=False)
        shutil.rmtree(self.base, ignore_errors=True)

    def mount(self, options: list[str], path: Path) -> None:
        """Mount something for as long as the site is there."""
        subprocess.run(["mount", *options, str(path)], check=True, capture_output=True)
        self.mounts.append(path)

    # --- starting and waiting

    def start(self, *words: str, stdout: int | None = None) -> Any:
        """Start the command line in a process group of its own, as a terminal does."""
        hidden = ("CI", "GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY", "GITLAB_CI", "XDG_RUNTIME_DIR", "EKIBEN_CONTEXT")
        ours = {MARK: str(self.base), "TMPDIR": str(self.temp), "JUPYTER_RUNTIME_DIR": str(self.runtime)}
        env = {k: v for k, v in os.environ.items() if k not in hidden and not k.startswith("EKIBEN_PIPELINE__")} | ours
        if not self.has_mlflow:
            env["PYTHONPATH"] = os.pathsep.join([str(self.base / "without"), *filter(None, [env.get("PYTHONPATH")])])
        code = "import sys; from ekiben.cli import main; sys.exit(main(sys.argv[1:]))"
        with open(self.base / "out", "ab") as out, open(self.base / "err", "ab") as err:
            process = subprocess.Popen(
                [sys.executable, "-c", code, *words],
                cwd=self.root, env=env, stdin=subprocess.DEVNULL, stdout=stdout or out, stderr=err,
                start_new_session=True, preexec_fn=hear_ctrl_c,
            )  # fmt: skip
        self.started.append(process)
        return process

    def call(self, *words: str) -> int:
        """Start the command line and wait for its exit code."""
        return int(self.start(*words).wait(PATIENCE_S))

    def said(self) -> str:
        """Return what all commands together wrote to their standard error."""
        return (self.base / "err").read_text(errors="replace")

    def notes(self, event: str = "", place: str = "") -> list[dict[str, Any]]:
        """Return the lines of the ledger, one kind of them where it is named."""
        path = self.base / "ledger"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [n for n in lines if event in ("", n["event"]) and place in ("", n["place"])]

    def wait_for(self, place: str, process: Any = None) -> dict[str, Any]:
        """Wait until a step has come to a place and return what it noted there."""
        return until(lambda: next(iter(self.notes("at", place)[-1:]), None), f"`{place}`", self, process)

    def hold(self, place: str) -> None:
        """Let the steps wait at a place until it is released."""
        (self.base / f"hold-{place}").touch()

    def release(self, place: str) -> None:
        (self.base / f"hold-{place}").unlink()

    # --- what is left

    def processes(self) -> list[psutil.Process]:
        """Return the living processes that were started here, however far they have gone from their parents."""
        found = []
        for process in psutil.process_iter():
            try:
                belongs = process.environ().get(MARK) == str(self.base) or str(self.base) in " ".join(process.cmdline())
                if belongs and process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
                continue
        return found

    def wait_until_quiet(self) -> list[str]:
        """Wait until nothing that was started here lives any more; return what does all the same."""
        end = time.monotonic() + PATIENCE_S / 2
        while (living := self._unexpected()) and time.monotonic() < end:
            time.sleep(0.05)
        return [f"process {describe(p)} still lives" for p in living]

    def zygotes(self) -> list[psutil.Process]:
        """Return the processes that fork kernels, without the kernels, which look the same."""
        parents = {}
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                if "ekiben.kernels.zygote" in " ".join(process.cmdline()):
                    parents[process] = process.ppid()
        pids = {process.pid for process in parents}
        return [process for process, parent in parents.items() if parent not in pids]

    def _unexpected(self) -> list[psutil.Process]:
        spared = self.zygotes() if self.keeps_zygote else []
        return [p for p in self.processes() if p not in spared]

    def leftovers(self) -> list[str]:
        """Return the files, folders and sockets that were left in the folders for temporary ones."""
        found = [p for folder in (self.temp, self.runtime) for p in sorted(folder.rglob("*"))]
        if self.keeps_zygote:  # its own folder, and that of all of them
            found = [p for p in found if not any(part.startswith("z-") for part in p.parts) and not p.match(f"ekiben-{os.getuid()}")]
        return [f"{p.relative_to(self.base)} was left behind" for p in found if not p.match(MLFLOW_LOCK) and not is_empty_home(p)]

    def runs(self) -> list[Run]:
        """Return every run that wrote its account, oldest first."""
        paths = self.layout.reports.glob("runs/*/run.json")
        begun = {p: (p.parent.name[:15], p.stat().st_mtime_ns) for p in paths}  # a run's name tells its second
        return [Run.from_json(p.read_bytes()) for p in sorted(begun, key=begun.__getitem__)]

    def trials(self) -> dict[int, float]:
        """Return the finished trials of the study: number → value."""
        path = self.layout.studies / "tiny.db"
        if not path.exists():
            return {}
        query = "select t.number, v.value from trials t join trial_values v using (trial_id) where t.state = 'COMPLETE'"
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as database:
            try:
                return dict(database.execute(query).fetchall())
            except sqlite3.OperationalError:  # killed before the tables were made
                return {}


MLFLOW_LOCK = "db_init_lock-*"  # MLflow's own: it locks the making of its tables by a file that it never removes


def is_empty_home(path: Path) -> bool:
    """Return whether this is the user's folder for all zygotes and kernels, with none of them in it."""
    return path.name == f"ekiben-{os.getuid()}" and path.is_dir() and not any(path.iterdir())


def describe(process: psutil.Process) -> str:
    with suppress(psutil.NoSuchProcess):
        return f"{process.pid} ({process.status()}, child of {process.ppid()}): {' '.join(process.cmdline())[:160]}"
    return str(process.pid)


def until(look: Callable[[], Any], what: str, site: Site | None = None, process: Any = None) -> Any:
    """Look until something is there and return it."""
    end = time.monotonic() + PATIENCE_S
    while True:
        gone = process is not None and process.poll() is not None
        if found := look():
            return found
        if gone or time.monotonic() > end:
            raise AssertionError(f"{what} never came" + (f"; it ended with {process.returncode}" if gone else "") + (site.said() if site else ""))
        time.sleep(0.01)


def moments(count: int, seed: int) -> list[float]:
    """Return moments spread over a run, as parts of its length: one at random in each of `count` equal parts."""
    rng = random.Random(seed)
    return [(i + rng.random()) / count for i in range(count)]


# --- the examination


def expect_nothing(problems: list[str]) -> None:
    """Fail with every problem in a line of its own."""
    assert not problems, f"{len(problems)} problems:\n" + "\n".join(problems)


def audit(site: Site, code: int | None = None) -> list[str]:
    """Examine everything that a run left and return what is wrong.

    Parameters
    ----------
    site : Site
    code : int, optional
        With what exit code the newest run ended; None when it was killed.
    """
    problems = site.wait_until_quiet()
    if site.call("runs"):
        problems.append("`ekiben runs` failed: " + site.said()[-300:])
    problems += site.wait_until_quiet() + site.leftovers() + audit_files(site) + audit_statuses(site)
    runs = site.runs()
    if code is not None and runs and runs[-1].exit_code != code:
        problems.append(f"the command ended with {code}, run.json says {runs[-1].exit_code}")
    return problems


def audit_files(site: Site) -> list[str]:
    """Return the files that are not whole, and those that should be gone."""
    problems = []
    if not site.root.exists():
        return []
    for path in sorted(p for top in (site.layout.reports, site.layout.state, site.root / "nbs") for p in top.rglob("*") if p.is_file()):
        name, raw = path.relative_to(site.root), path.read_bytes()
        with suppress(ValueError, nbformat.ValidationError):
            if path.suffix == ".json":
                first, _, rest = raw.partition(b"\n")
                json.loads(rest if first.decode() == hashlib.sha256(rest).hexdigest() else raw)
            elif path.suffix == ".ipynb":
                nbformat.validate(nbformat.reads(raw.decode(), as_version=4))
            elif path.suffix == ".html" and not raw.rstrip().endswith(b"</html>"):
                raise ValueError
            elif path.parent.parent == site.layout.objects and hashlib.sha256(raw).hexdigest() != path.name:
                raise ValueError
            if path.suffix in (".tmp", ".context", ".progress"):
                problems.append(f"{name} was left behind")
            continue
        problems.append(f"{name} is not whole ({len(raw)} bytes)")
    return problems


def audit_statuses(site: Site) -> list[str]:
    """Return what run.json and the executed notebooks claim although it is not so."""
    problems = []
    ended = {(n["run"], n["place"]) for n in site.notes("end")}
    begun = {(n["run"], n["place"]) for n in site.notes("begin")}
    for run in site.runs():
        where = f"{run.run_id} ({run.status}): "
        told = {entry.name: entry for entry in run.steps}
        if run.status == "running":
            problems.append(where + "nobody runs it any more")
        if run.status == "done" and {e.status for e in run.steps} - {"ran", "cached"}:
            problems.append(where + f"yet {[(e.name, e.status) for e in run.steps]}")
        if (run.exit_code == 0) != (run.status == "done"):
            problems.append(where + f"exit code {run.exit_code}")
        for entry in run.steps:
            if entry.status == "ran" and (run.run_id, entry.name) not in ended:
                problems.append(where + f"{entry.name} is said to have run, and did not come to its end")
            if entry.status in ("skipped", "cached") and (run.run_id, entry.name) in begun:
                problems.append(where + f"{entry.name} is said to be {entry.status}, and ran")
            if entry.status == "ran" and not all((site.root / p).is_file() for p in (entry.notebook, entry.html)):
                problems.append(where + f"{entry.name} has no executed notebook or page")
        if missing := {step for run_id, step in begun if run_id == run.run_id} - set(told):
            problems.append(where + f"says nothing of {sorted(missing)}, which began")
        for path in sorted(site.layout.report(run.run_id).glob("*.ipynb")):
            entry = told.get(path.stem[3:])
            problems += [where + p for p in audit_cells(path, entry.status if entry else "")]
        with suppress(FileNotFoundError), open(site.layout.alive(run.run_id)) as alive:
            try:
                fcntl.flock(alive, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                problems.append(where + "its lock is still held")
    return problems


def audit_cells(path: Path, status: str) -> list[str]:
    """Return what is wrong about the states of an executed notebook's cells, given what its step is said to be."""
    cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    states = [c.metadata.get("papermill", {}).get("status") for c in cells]
    rest = states[states.count("completed") :]
    said = f"{path.name} of a step that `{status}` has cells {states}"
    if status == "ran":
        return [said] if rest else []
    if states[: len(states) - len(rest)] != ["completed"] * (len(states) - len(rest)):
        return [said]
    allowed = {"pending"} if rest[:1] != ["failed"] else {"pending", "failed"}
    wrong = set(rest) - allowed or rest.count("failed") > 1
    return [said] if wrong else []


def audit_tracking(site: Site) -> list[str]:
    """Return the runs that MLflow believes to be still running."""
    with sqlite3.connect(f"file:{site.root / 'mlflow.db'}?mode=ro", uri=True) as database:
        rows = database.execute("select name from runs where status = 'RUNNING'").fetchall()
    return [f"MLflow says that `{name}` is still running" for (name,) in rows]


def carry_on(site: Site, metrics: dict[str, float]) -> list[str]:
    """Resume what was disturbed and return what is wrong about the outcome.

    Parameters
    ----------
    site : Site
    metrics : dict of str to float
        Those of an undisturbed run.
    """
    runs, trials = site.runs(), site.trials()
    told = {n["number"] for n in site.notes("told")}
    problems = [f"{len(told)} trials finished, the study knows {len(trials)}"] if len(told) > len(trials) else []
    finished = {entry.name: run.run_id for run in reversed(runs) for entry in run.steps if entry.status == "ran"}  # the first
    again = bool(runs) and runs[-1].status != "done"
    code = site.call("resume") if again else site.call("run")
    problems += audit(site, code)
    last = site.runs()[-1]
    if code or last.status != "done":
        return [*problems, f"resumed, it ended with {code}: {last.status} {last.error} {site.said()[-500:]}"]
    if again and last.resumes != runs[-1].run_id:
        problems.append(f"it resumes `{last.resumes}`, not `{runs[-1].run_id}`")
    if last.metrics != metrics:
        problems.append(f"metrics {last.metrics} are not those of an undisturbed run, {metrics}")
    for name, run_id in finished.items():
        begun = [note["run"] for note in site.notes("begin", name)]
        if begun.index(run_id) < len(begun) - 1:
            why = [entry.why for run in site.runs() for entry in run.steps if entry.name == name]
            problems.append(f"{name} had finished in {run_id} and ran again: {why}")
    for number, value in trials.items():
        if site.trials().get(number) != value:
            problems.append(f"trial {number} was finished and is lost")
    if len(site.trials()) != BUDGET:
        problems.append(f"{len(site.trials())} finished trials instead of {BUDGET}")
    if site.keeps_zygote:
        site.keeps_zygote = False
        site.call("kernels", "stop")
        problems += site.wait_until_quiet() + site.leftovers()
    return problems + audit_tracking(site)


@contextmanager
def watched_memory(process: Any) -> Iterator[dict[str, float]]:
    """Watch the memory of a process and yield a mapping whose ``peak`` [bytes] it keeps up to date."""
    import threading

    seen, over = {"peak": 0.0}, threading.Event()

    def watch() -> None:
        with suppress(psutil.NoSuchProcess):
            here = psutil.Process(process.pid)
            while not over.wait(0.05):
                seen["peak"] = max(seen["peak"], float(here.memory_info().rss))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def can_mount() -> bool:
    """Return whether this user may mount a file system here."""
    if os.geteuid() != 0 or not shutil.which("mount"):
        return False
    with tempfile.TemporaryDirectory() as folder:
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, check=False).returncode:
            return False
        subprocess.run(["umount", folder], check=True)
    return True


def send(process: Any, how: int, *, group: bool = False) -> None:
    """Send a signal to a process, or, as a terminal's Ctrl-C does, to its whole group."""
    with suppress(ProcessLookupError):
        (os.killpg if group else os.kill)(process.pid, signal.Signals(how))
