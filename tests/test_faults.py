"""Whatever goes wrong while a project runs: what is said of it is true, nothing is half-written, and `resume` ends the same.

Each test disturbs a run of five small steps in processes of its own and has `faults.audit` examine what is left.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from faults import (
    BUDGET,
    PATIENCE_S,
    STEPS,
    Site,
    audit,
    audit_tracking,
    can_mount,
    carry_on,
    expect_nothing,
    make_template,
    moments,
    send,
    settings_with,
    step_path,
    until,
    watched_memory,
    write_step,
)

pytestmark = pytest.mark.faults
needs_mounts = pytest.mark.skipif(not can_mount(), reason="a full or read-only disk is made by mounting one, which needs root")
SIDE_BY_SIDE = max(2, (os.cpu_count() or 2) // 2)


@dataclass(frozen=True)
class Calm:
    """The project, and how a run of it ends that nobody disturbs."""

    template: Path
    metrics: dict[str, float]
    seconds: float
    seconds_without_mlflow: float


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Calm:
    template = make_template(tmp_path_factory.mktemp("faults") / "template")

    def one(has_mlflow: bool) -> tuple[dict[str, float], float]:
        with Site(template, has_mlflow=has_mlflow) as site:
            began = time.monotonic()
            code = site.call("run")
            seconds = time.monotonic() - began
            assert code == 0, site.said()
            expect_nothing(audit(site, code) + audit_tracking(site))
            return site.runs()[-1].metrics, seconds

    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:  # side by side as later, so that the moments fall all over a run
        (metrics, seconds), (same, without) = pool.map(one, (True, False))
    assert metrics == same
    return Calm(template, metrics, seconds, without)


@pytest.fixture
def site(calm: Calm) -> Iterator[Site]:
    with Site(calm.template) as made:
        yield made


def statuses(site: Site) -> dict[str, str]:
    return {entry.name: entry.status for entry in site.runs()[-1].steps}


def disturb(calm: Calm, count: int, seed: int, fault: Callable[[Site, Any], bool], **more: Any) -> None:
    """Disturb runs at moments spread over their length, a few side by side; examine and resume each of them.

    `fault` says whether there was still something to disturb. One in five writes to MLflow, whose imports are most of what
    a small run takes; every second has two jobs.
    """
    longest = {True: calm.seconds, False: calm.seconds_without_mlflow}

    def one(numbered: tuple[int, float]) -> tuple[bool, list[str]]:
        number, part = numbered
        has_mlflow = number % 5 == 0
        moment = part * longest[has_mlflow]
        with Site(calm.template, has_mlflow=has_mlflow, **more) as site:
            process = site.start("run", *(["--jobs", "2"] if number % 2 else []))
            time.sleep(moment)
            hit = fault(site, process)
            code = process.wait(PATIENCE_S)
            at = [f"{n['event']} {n['place']}" for n in site.notes()[-1:]]
            problems = [*audit(site, None if code < 0 else code), *carry_on(site, calm.metrics)]
            return hit, [f"moment {number} ({moment:.2f} s, after {at}, exit {code}): {problem}" for problem in problems]

    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        outcomes = list(pool.map(one, enumerate(moments(count, seed))))
    expect_nothing([problem for _, found in outcomes for problem in found])
    assert sum(hit for hit, _ in outcomes) >= count // 2, "most moments came too late to disturb anything"


def is_living(process: Any) -> bool:
    return process.poll() is None


# --- killed


@pytest.mark.parametrize("place", ["prepare", "profile", "trial 4", "evaluate", "report"])
def test_a_kernel_that_is_killed_fails_its_step_and_resume_ends_as_if_nothing_had_been(site: Site, calm: Calm, place: str) -> None:
    step = "tune" if place.startswith("trial") else place
    site.hold(place)
    process = site.start("run")
    kernel = site.wait_for(place, process)["pid"]
    os.kill(kernel, signal.SIGKILL)
    site.release(place)
    code = process.wait(PATIENCE_S)
    assert code == 1, site.said()
    (entry,) = [e for e in site.runs()[-1].steps if e.status == "failed"]
    assert (entry.name, entry.ename) == (step, "DeadKernelError")
    assert "killed" in entry.error and "02_profile.ipynb".replace("02_profile", step_path(site.root, step).stem) in entry.error
    expect_nothing(audit(site, code) + carry_on(site, calm.metrics))


def test_a_runner_killed_at_any_moment_loses_nothing_and_leaves_nothing(calm: Calm) -> None:
    def kill(site: Site, process: Any) -> bool:
        living = is_living(process)
        send(process, signal.SIGKILL)
        return living

    disturb(calm, 50, 1, kill, keeps_zygote=True)


def test_a_runner_killed_with_ordinary_kernels_leaves_nothing_either(calm: Calm) -> None:
    def kill(site: Site, process: Any) -> bool:
        living = is_living(process)
        send(process, signal.SIGKILL)
        return living

    disturb(calm, 4, 2, kill, settings=settings_with(warm_kernels="no"))


def test_a_run_killed_again_and_again_gets_to_its_end(site: Site, calm: Calm) -> None:
    """Each of the five runs gets one step further before its runner is killed."""
    for i, place in enumerate(["prepare", "trial 2", "trial 5", "evaluate", "report"]):
        site.hold(place)
        process = site.start("resume" if i else "run")
        site.wait_for(place, process)
        send(process, signal.SIGKILL)
        process.wait()
        site.release(place)
        expect_nothing(audit(site))
        assert site.runs()[-1].status == "killed"
    expect_nothing(carry_on(site, calm.metrics))


def test_a_kernel_killed_at_any_moment_is_told_and_mended(calm: Calm) -> None:
    def kill(site: Site, process: Any) -> bool:
        living = is_living(process)
        for note in site.notes("begin")[-1:]:
            with suppress(ProcessLookupError):
                os.kill(note["pid"], signal.SIGKILL)
        return living

    disturb(calm, 4, 3, kill)


def test_without_the_process_that_forks_kernels_a_run_ends_in_truth(calm: Calm) -> None:
    def kill(site: Site, process: Any) -> bool:
        zygotes = site.zygotes()
        for zygote in zygotes:
            zygote.kill()
        return bool(zygotes)

    disturb(calm, 4, 4, kill)


# --- asked to stop


@pytest.mark.parametrize(
    ("how", "times", "group"),
    [(signal.SIGTERM, 1, False), (signal.SIGINT, 1, True), (signal.SIGINT, 3, True), (signal.SIGHUP, 1, True)],
    ids=["SIGTERM", "Ctrl-C", "Ctrl-C three times", "the terminal closes"],
)
def test_a_run_that_is_told_to_stop_at_any_moment_stops_whole(calm: Calm, how: signal.Signals, times: int, group: bool) -> None:
    def stop(site: Site, process: Any) -> bool:
        living = is_living(process)
        for i in range(times):
            time.sleep(0.1 * bool(i))
            send(process, how, group=group)
        return living

    disturb(calm, 4, 5 + times, stop)


STUBBORN = {
    "sleeps": "import time\ntime.sleep(600)",
    "hears no signals": "import signal\nfor s in (2, 15):\n    signal.signal(s, signal.SIG_IGN)\nwhile True:\n    pass",
    "never lets go of the interpreter": "import re\nre.match('(a|a)*$', 'a' * 60 + 'b')",
}


@pytest.mark.parametrize(
    ("how", "ename", "cell"),
    [
        ("cell_timeout_s", "CellTimeoutError", "sleeps"),
        ("cell_timeout_s", "CellTimeoutError", "never lets go of the interpreter"),
        ("step_timeout_s", "StepTimeoutError", "hears no signals"),
        ("Ctrl-C", "KeyboardInterrupt", "hears no signals"),
        ("Ctrl-C", "KeyboardInterrupt", "never lets go of the interpreter"),
    ],
)
def test_a_cell_that_never_ends_is_ended(calm: Calm, how: str, ename: str, cell: str) -> None:
    limits = {"cell_timeout_s": {how: 4}, "step_timeout_s": {how: 20}, "Ctrl-C": {}}[how]
    with Site(calm.template, settings=settings_with(**limits)) as site:
        write_step(site.root, "profile", ["pace.at('never')", STUBBORN[cell], "print('never printed')"])
        process = site.start("run")
        site.wait_for("never", process)
        if how == "Ctrl-C":
            time.sleep(0.5)
            send(process, signal.SIGINT, group=True)
        code = process.wait(PATIENCE_S)
        (entry,) = [e for e in site.runs()[-1].steps if e.status == "failed"]
        assert (entry.name, entry.ename, entry.cell) == ("profile", ename, 5)
        assert code == (130 if how == "Ctrl-C" else 1)
        expect_nothing(audit(site, code))
        (site.root / "settings.ini").write_text(settings_with())
        write_step(site.root, "profile")
        expect_nothing(carry_on(site, calm.metrics))


# --- what a notebook does to its machine

FORKS = (
    "import os, subprocess, time\n"
    "if os.fork() == 0:\n    time.sleep(600)\n    os._exit(0)\n"
    "subprocess.Popen(['sleep', '600'])\n"
    "pace.note('forked', 'profile')"
)


@pytest.mark.parametrize("then", ["it ends well", "it raises", "its kernel is killed", "the runner is killed"])
def test_processes_that_a_notebook_started_end_with_its_kernel(site: Site, calm: Calm, then: str) -> None:
    work = ["pace.at('profile')\nrows = step.load('prepare', 'rows')['n']\nstep.log(mean=sum(rows) / len(rows))", FORKS]
    work += {"it ends well": [], "it raises": ["1 / 0"]}.get(then, ["pace.at('forked')"])
    write_step(site.root, "profile", [*work, "step.save('mean', {'mean': sum(rows) / len(rows)})"])
    if then.endswith("killed"):
        site.hold("forked")
    process = site.start("run")
    if then.endswith("killed"):
        kernel = site.wait_for("forked", process)["pid"]
        os.kill(kernel if then == "its kernel is killed" else process.pid, signal.SIGKILL)
        site.release("forked")
    code = process.wait(PATIENCE_S)
    assert site.notes("forked")
    expect_nothing(audit(site, None if code < 0 else code))
    assert code == {"it ends well": 0, "the runner is killed": -signal.SIGKILL}.get(then, 1)
    if then == "it raises":
        write_step(site.root, "profile")
    expect_nothing(carry_on(site, calm.metrics))


@pytest.mark.parametrize(
    "cell",
    ["for i in range(100_000):\n    print(f'{i:999d}')", "print('x' * 100_000_000)", "import os\nos.system('yes a line of some length | head -c 100000000')"],
    ids=["in 100,000 lines", "in one line", "from another program"],
)
def test_a_notebook_that_prints_100_mb_fills_neither_memory_nor_the_page(site: Site, calm: Calm, cell: str) -> None:
    write_step(site.root, "report", [f"pace.at('printing')\n{cell}", *REPORT])
    process = site.start("run")
    with watched_memory(process) as seen:
        site.wait_for("printing", process)
        before = seen["peak"]
        code = process.wait(PATIENCE_S)
    entry = site.runs()[-1].steps[-1]
    sizes = {p: (site.root / p).stat().st_size / 1e6 for p in (entry.notebook, entry.html)}
    print(f"runner {before / 1e6:.0f} MB, then {seen['peak'] / 1e6:.0f} MB; " + ", ".join(f"{p}: {mb:.1f} MB" for p, mb in sizes.items()))
    assert code == 0, site.said()
    expect_nothing(audit(site, code) + carry_on(site, calm.metrics))
    assert max(sizes.values()) < 30, "no browser opens such a page with pleasure"
    assert seen["peak"] - before < 300e6


REPORT = ["step.log(score=step.load('evaluate', 'auc')['auc'] + step.load('profile', 'mean')['mean'])\nstep.save('text', {'text': ''})"]


# --- what the machine does to a run


@needs_mounts
@pytest.mark.parametrize("place", ["prepare", "trial 4", "report"])
def test_a_full_disk_is_told_and_leaves_nothing_half_written(calm: Calm, place: str) -> None:
    with Site(calm.template, mount_bytes=40_000_000) as site:
        site.hold(place)
        process = site.start("run")
        site.wait_for(place, process)
        filler = site.root / "filler"
        with suppress(OSError), open(filler, "wb", buffering=0) as out:
            while out.write(bytes(1 << 16)):
                pass
        site.release(place)
        code = process.wait(PATIENCE_S)
        assert code == 1, site.said()
        assert "No space left" in site.said()
        filler.unlink()
        expect_nothing(audit(site) + carry_on(site, calm.metrics))


@needs_mounts
def test_a_full_folder_for_temporary_files_is_told(calm: Calm) -> None:
    with Site(calm.template) as site:
        site.mount(["-t", "tmpfs", "-o", "size=4k,nr_inodes=2", "tmpfs"], site.temp)
        (site.temp / "filler").touch()
        code = site.call("run")
        (site.temp / "filler").unlink()
        assert code in (0, 1) and "Traceback" not in site.said()
        expect_nothing(audit(site, code) + carry_on(site, calm.metrics))


@needs_mounts
@pytest.mark.parametrize("place", ["", "trial 4"])
def test_a_read_only_reports_folder_is_told_in_one_line(calm: Calm, place: str) -> None:
    with Site(calm.template) as site:
        site.layout.reports.mkdir()
        site.mount(["--bind", str(site.layout.reports)], site.layout.reports)
        process = None
        if place:
            site.hold(place)
            process = site.start("run")
            site.wait_for(place, process)
        subprocess.run(["mount", "-o", "remount,ro,bind", str(site.layout.reports)], check=True)
        if place:
            site.release(place)
        else:
            process = site.start("run")
        code = process.wait(PATIENCE_S)
        assert code in (1, 2) and site.said().strip().splitlines()[-1].startswith("error: ")
        assert "reports" in site.said() and "Traceback" not in site.said()
        subprocess.run(["mount", "-o", "remount,rw,bind", str(site.layout.reports)], check=True)
        expect_nothing(audit(site) + carry_on(site, calm.metrics))


def test_reports_deleted_during_a_run_take_no_result_with_them(site: Site, calm: Calm) -> None:
    site.hold("evaluate")
    process = site.start("run")
    site.wait_for("evaluate", process)
    shutil.rmtree(site.layout.reports)
    site.release("evaluate")
    code = process.wait(PATIENCE_S)
    problems = audit(site, code) + carry_on(site, calm.metrics)
    expect_nothing([p for p in problems if "has no executed notebook or page" not in p])


def test_a_project_deleted_during_a_run_leaves_no_process_and_no_socket(site: Site) -> None:
    site.hold("trial 4")
    process = site.start("run")
    site.wait_for("trial 4", process)
    shutil.rmtree(site.root)
    site.release("trial 4")
    assert process.wait(PATIENCE_S) != 0
    expect_nothing(site.wait_until_quiet() + site.leftovers())
    assert "Traceback" not in site.said()


@pytest.mark.parametrize("place", ["before", "evaluate"])
def test_sockets_that_vanish_are_told_or_made_again(site: Site, calm: Calm, place: str) -> None:
    if place == "before":
        shutil.rmtree(site.temp)
        shutil.rmtree(site.runtime)
        process = site.start("run")
    else:
        site.hold(place)
        process = site.start("run")
        site.wait_for(place, process)
        for folder in (site.temp, site.runtime):
            shutil.rmtree(folder)
            folder.mkdir()
        site.release(place)
    code = process.wait(PATIENCE_S)
    assert code in (0, 1) and "Traceback" not in site.said()
    expect_nothing(audit(site, code) + carry_on(site, calm.metrics))


def test_a_run_whose_listener_goes_away_still_ends(site: Site, calm: Calm) -> None:
    """As in `ekiben run | head -1`."""
    reading, writing = os.pipe()
    process = site.start("run", stdout=writing)
    os.close(writing)
    os.read(reading, 1)
    os.close(reading)
    code = process.wait(PATIENCE_S)
    expect_nothing(audit(site, code) + carry_on(site, calm.metrics))


# --- two at once


def test_two_runs_at_once_both_end_well(site: Site, calm: Calm) -> None:
    both = [site.start("run"), site.start("run", "-p", "tune.study_name=other")]
    assert [process.wait(PATIENCE_S) for process in both] == [0, 0], site.said()
    expect_nothing(audit(site, 0) + audit_tracking(site))
    assert [run.metrics for run in site.runs()] == [calm.metrics] * 2
    assert site.call("run") == 0
    assert set(statuses(site).values()) == {"cached"}


def test_two_runs_of_the_same_search_at_once_never_mix_their_trials(site: Site, calm: Calm) -> None:
    both = [site.start("run"), site.start("run")]
    codes = sorted(process.wait(PATIENCE_S) for process in both)
    assert codes[0] == 0, site.said()
    assert codes[1] == 0 or "another process is running this very search" in site.said()
    expect_nothing(audit(site) + audit_tracking(site))
    assert {run.status for run in site.runs()} <= {"done", "failed"}
    assert all(run.metrics == calm.metrics for run in site.runs() if run.status == "done")
    assert len(site.trials()) == len(site.notes("told")) == BUDGET


def test_a_killed_run_takes_no_other_run_with_it(site: Site, calm: Calm) -> None:
    site.hold("trial 4")
    killed = site.start("run", "-p", "tune.study_name=other")
    first = site.wait_for("trial 4", killed)["run"]
    living = site.start("run")
    until(lambda: len(site.notes("at", "trial 4")) == 2, "the second run's trial 4", site, living)
    send(killed, signal.SIGKILL)
    killed.wait()
    until(lambda: site.call("runs") == 0 and "killed" in {r.status for r in site.runs()}, "the news of the killed run", site)
    assert {run.run_id == first: run.status for run in site.runs()} == {True: "killed", False: "running"}
    site.release("trial 4")
    assert living.wait(PATIENCE_S) == 0, site.said()
    expect_nothing(audit(site))
    assert site.call("resume", first) == 0, site.said()
    expect_nothing(audit(site, 0) + audit_tracking(site))
    assert [run.metrics for run in site.runs() if run.status == "done"] == [calm.metrics] * 2


# --- files that were damaged


@pytest.mark.parametrize("damage", ["emptied", "halved", "of another kind", "not text"])
def test_a_damaged_run_json_costs_that_run_and_no_other(site: Site, calm: Calm, damage: str) -> None:
    site.hold("evaluate")
    process = site.start("run")
    site.wait_for("evaluate", process)
    send(process, signal.SIGKILL)
    process.wait()
    site.release("evaluate")
    site.wait_until_quiet()
    (path,) = site.layout.reports.glob("runs/*/run.json")
    whole = path.read_bytes()
    path.write_bytes({"emptied": b"", "halved": whole[: len(whole) // 2], "of another kind": b'{"run_id": 3}'}.get(damage, b"\xff\x00" * 50))
    assert site.call("runs") == 0, site.said()
    assert site.call("resume") == 2
    assert site.said().strip().splitlines()[-1].startswith("error: ") and "Traceback" not in site.said()
    shutil.rmtree(path.parent)
    expect_nothing(carry_on(site, calm.metrics))
    assert len(site.notes("begin", "tune")) == 1


@pytest.mark.parametrize(
    ("what", "damage"),
    [
        ("objects", "cut in half"),
        ("objects", "one byte changed"),
        ("last", "cut in half"),
        ("runs", "cut in half"),
        ("everything else", "cut in half"),
        ("everything else", "one byte changed"),
    ],
)
def test_damaged_state_is_noticed_and_made_again(site: Site, calm: Calm, what: str, damage: str) -> None:
    assert site.call("run") == 0
    state = site.layout.state
    known = {"objects", "last", "runs", "studies"}
    files = [p for p in state.rglob("*") if p.is_file() and p.stat().st_size]
    chosen = [p for p in files if (top := p.relative_to(state).parts[0]) == what or (what == "everything else" and top not in known)]
    for path in chosen:
        raw = path.read_bytes()
        middle = len(raw) // 2
        path.write_bytes(raw[:middle] + (b"" if damage == "cut in half" else bytes([raw[middle] ^ 1]) + raw[middle + 1 :]))
    if not chosen:
        pytest.skip("there is nothing else in .ekiben")
    first = site.runs()[-1].run_id
    assert site.call("run") == 0, site.said()
    kept = [str(path.relative_to(site.root)) for path in chosen if what == "runs"]  # a past run's account is nobody's to rewrite
    expect_nothing([problem for problem in audit(site, 0) if not any(problem.startswith(name) for name in kept)])
    assert site.call("show", first) in (0, 1, 2) and "Traceback" not in site.said()
    assert site.runs()[-1].metrics == calm.metrics
    assert site.call("run") == 0
    assert set(statuses(site).values()) == {"cached"} and list(statuses(site)) == list(STEPS)
