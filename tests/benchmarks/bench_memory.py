"""Memory under load: whether the packaged service, with everything on, stays as large as it was.

Run it as ``python tests/benchmarks/bench_memory.py [--seconds 300] [--connections 32] [--data FOLDER]``. FOLDER holds Adult
as ``train.csv``. The server has one processor and wrk another. Memory is read every second, over all processes of the
service, pages that they share counted once; the first tenth of the time, in which buffers and pools fill, is shown and not
judged. Latency is read in ten parts, because what grows (BentoML keeps a timer for every request) shows there too.

Ends with 1 when memory grows by more than 5 % and 5 MiB from the second tenth to the last, when anything is answered
with an error, or when the journal lost a record.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import threading
import urllib.request
from pathlib import Path
from statistics import median

from servers import ADULT, Running, ekiben_bento, ekiben_side, wrk, wrk_script

PARTS, GROWTH, GROWTH_MIB = 10, 0.05, 5.0


class Watch(threading.Thread):
    """Reads a service's memory every second.

    Attributes
    ----------
    seen : list of float
        MiB.
    """

    def __init__(self, running: Running) -> None:
        super().__init__(daemon=True)
        self.running, self.seen, self.ended = running, list[float](), threading.Event()

    def run(self) -> None:
        """Read until `ended` is set."""
        while not self.ended.is_set():
            self.seen.append(self.running.memory_mib())
            self.ended.wait(1.0)


def main() -> int:
    """Load the service, print memory and latency over time."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--data", type=Path, default=ADULT, help="folder with train.csv of Adult")
    options = parser.parse_args()
    if not (options.data / "train.csv").is_file():
        print(f"no Adult table in {options.data}; say where with --data")
        return 0
    if missing := [tool for tool in ("wrk", "taskset") if not shutil.which(tool)]:
        print(f"this needs {' and '.join(missing)}, which are not installed")
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        side = ekiben_side(ekiben_bento(options.data, home), home, name="ekiben", is_guarded=True, is_journalled=True)
        running = Running(side, 0, home / "log")
        try:
            running.answer()
            script, watch = wrk_script(side, home), Watch(running)
            print(f"at the start{running.memory_mib():>9.1f} MiB", flush=True)
            watch.start()
            errors, medians = 0, []
            for part in range(PARTS):
                mark = len(watch.seen)
                load = wrk(running, script, options.seconds / PARTS, options.connections, 1)
                medians.append(median(watch.seen[mark:] or [running.memory_mib()]))
                errors += load.errors
                print(
                    f"{(part + 1) * options.seconds / PARTS:>8,.0f} s {medians[-1]:>9.1f} MiB{load.per_s:>10,.0f}/s"
                    f"   p50 {load.p50_ms:.2f} ms   p99 {load.p99_ms:.2f} ms   errors {load.errors}",
                    flush=True,
                )
            watch.ended.set()
            lost = figure(running, "ekiben_journal_dropped_total")
        finally:
            running.stop()
    grown = medians[-1] - medians[1]
    is_flat = grown <= max(GROWTH * medians[1], GROWTH_MIB)
    print(f"\n{grown:+.1f} MiB from the second tenth to the last ({grown / medians[1]:+.1%}); {errors} errors, {lost:g} records lost")
    is_good = is_flat and not errors and not lost
    print("ok: memory is flat" if is_good else "NOT reached: memory grows" if not is_flat else "NOT reached")
    return 0 if is_good else 1


def figure(running: Running, name: str) -> float:
    """Return a figure of the service's metrics; NaN when it is not there."""
    request = urllib.request.Request(f"{running.url}/metrics", headers=running.side.headers)
    with urllib.request.urlopen(request, timeout=20) as answer:
        lines = answer.read().decode().splitlines()
    return next((float(line.split()[-1]) for line in lines if line.startswith(f"{name} ")), float("nan"))


if __name__ == "__main__":
    sys.exit(main())
