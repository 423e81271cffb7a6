"""Cold start to the first prediction, and memory: ekiben's packaged service, an empty BentoML service, `mlflow models serve`.

Run it as ``python tests/benchmarks/bench_start.py [--rounds 5] [--data FOLDER]``. FOLDER holds Adult as ``train.csv``.
Every round starts each side once, one after the other and in turn from the front and from the back, and asks it for a
prediction until it gives one; a round before them, which is not counted, fills the file cache and compiles what Python
compiles. Memory is what its processes hold after 200 predictions, pages that they share counted once. The medians are
shown; differences and ratios are taken within each round.

Ends with 1 when an aim is missed: at most 0.5 s over the empty BentoML service, and a third of `mlflow models serve`'s
time.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import urllib.request
from pathlib import Path
from statistics import median

from servers import ADULT, Running, Side, ekiben_bento, ekiben_side, empty_side, mlflow_side, save_pyfunc

EKIBEN, EMPTY, MLFLOW = "ekiben, everything on", "empty BentoML service", "mlflow models serve"
OVER_EMPTY_S, MLFLOW_SHARE, PREDICTIONS = 0.5, 1 / 3, 200


def start(side: Side, log: Path) -> tuple[float, float]:
    """Return the seconds to the first prediction, and the memory [MiB] after `PREDICTIONS` of them."""
    running = Running(side, -1, log)
    try:
        seconds = running.answer()
        for _ in range(PREDICTIONS):
            with urllib.request.urlopen(running.request(), timeout=60) as answer:
                answer.read()
        return seconds, running.memory_mib()
    finally:
        running.stop()


def main() -> int:
    """Start every side in turn, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--data", type=Path, default=ADULT, help="folder with train.csv of Adult")
    options = parser.parse_args()
    if not (options.data / "train.csv").is_file():
        print(f"no Adult table in {options.data}; say where with --data")
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        tag = ekiben_bento(options.data, home)
        row = save_pyfunc(options.data, home / "pyfunc")
        ekiben = ekiben_side(tag, home, name=EKIBEN, is_guarded=True, is_journalled=True)
        sides = [ekiben, empty_side(home, row), mlflow_side(home / "pyfunc", row)]
        found: dict[str, list[tuple[float, float]]] = {side.name: [] for side in sides}
        for turn in range(options.rounds + 1):
            for side in sides if turn % 2 == 0 else reversed(sides):
                seconds, memory = start(side, home / "log")
                if turn:
                    found[side.name].append((seconds, memory))
                print(f"  {'warm-up' if not turn else f'round {turn}'}: {side.name:24}{seconds:>8.2f} s{memory:>8.0f} MiB", flush=True)
    print(f"\n{'':26}{'first answer s':>16}{'memory MiB':>14}")
    for name, pairs in found.items():
        print(f"{name:26}{median(s for s, _ in pairs):>16.2f}{median(m for _, m in pairs):>14.0f}")
    over = median(a - b for (a, _), (b, _) in zip(found[EKIBEN], found[EMPTY], strict=True))
    share = median(a / b for (a, _), (b, _) in zip(found[EKIBEN], found[MLFLOW], strict=True))
    aims = [
        (f"{over:+.2f} s over the empty BentoML service (aim at most {OVER_EMPTY_S:g} s)", over <= OVER_EMPTY_S),
        (f"{share:.2f} of mlflow models serve's time (aim at most {MLFLOW_SHARE:.2f})", share <= MLFLOW_SHARE),
    ]
    print()
    for text, is_met in aims:
        print(f"{'ok         ' if is_met else 'NOT reached'}  {text}")
    return 0 if all(is_met for _, is_met in aims) else 1


if __name__ == "__main__":
    sys.exit(main())
