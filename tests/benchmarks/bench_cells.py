"""A thousand cells and 10 MB of output: the engine beside nbclient alone and beside papermill itself.

Run with ``python tests/benchmarks/bench_cells.py``. Every program executes the same notebook in a kernel of its own and saves
it; before a time counts, the saved notebook must hold all that was printed. The programs take turns, and the ratio is the
median of pairs that ran one after the other. ekiben's kernels are warm: the process that forks them is there, as it is after
the first step of any run.
"""

import os
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import nbformat
import numpy as np

CELLS, OUTPUT_MB, PAIRS, SIZES = 1000, 10, 5, (250, 500, 1000)
LINES = round(OUTPUT_MB * 1e6 / CELLS / 100)  # a cell's, of 100 characters each
LIMIT = 1.2
os.environ.setdefault("EKIBEN_PIPELINE__KERNEL_IDLE_S", "120")


def make_notebook(path, cells):
    """Write a notebook whose cells print their share of the output."""
    source = f"for i in range({LINES}):\n    print(f'{{i:099d}}')"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for _ in range(cells)])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "python3", "language": "python"}
    nbformat.write(notebook, path)


def run_nbclient(path, out):
    """Execute a notebook by nbclient alone."""
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, kernel_name="python3", timeout=None).execute()
    nbformat.write(notebook, out)


def run_papermill(path, out, engine=None):
    """Execute a notebook by papermill."""
    import papermill

    papermill.execute_notebook(str(path), str(out), engine_name=engine, progress_bar=False)


def run_ekiben(path, out):
    """Execute a notebook by papermill with ekiben's engine."""
    run_papermill(path, out, engine="ekiben")


def seconds(program, path, out):
    """Return the time of one execution, after making sure that all of its output was kept."""
    out.unlink(missing_ok=True)
    began = time.perf_counter()
    program(path, out)
    taken = time.perf_counter() - began
    cells = nbformat.read(out, as_version=4).cells
    kept, printed = sum(len(o["text"]) for c in cells for o in c.outputs), LINES * 100 * len(cells)
    if kept != printed:
        raise SystemExit(f"{program.__name__} kept {kept:,} characters of output; {printed:,} were printed")
    return taken


def main():
    """Print the times, their ratio, and how they grow with the number of cells."""
    from ekiben.kernels import warm

    with tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder) / "in.ipynb", Path(folder) / "out.ipynb"
        make_notebook(path, 10)
        for program in (run_nbclient, run_ekiben, run_papermill):  # imports, and the process that forks kernels
            seconds(program, path, out)
        try:
            make_notebook(path, CELLS)
            pairs = []
            for i in range(PAIRS):
                order = (run_nbclient, run_ekiben) if i % 2 else (run_ekiben, run_nbclient)
                taken = {program: seconds(program, path, out) for program in order}
                pairs.append((taken[run_ekiben], taken[run_nbclient]))
            ours, theirs = np.median(pairs, axis=0)
            ratio = float(np.median([a / b for a, b in pairs]))
            print(f"{CELLS:,} cells that print {OUTPUT_MB} MB, {PAIRS} pairs")
            print(f"  papermill --engine ekiben  {ours:8.2f} s   {ours / CELLS * 1e3:6.2f} ms a cell")
            print(f"  nbclient alone             {theirs:8.2f} s   {theirs / CELLS * 1e3:6.2f} ms a cell")
            print(f"  ratio to nbclient          {ratio:8.2f}     limit {LIMIT}, pairs {', '.join(f'{a / b:.2f}' for a, b in pairs)}")
            growth = {}
            for cells in SIZES:
                make_notebook(path, cells)
                growth[cells] = float(np.median([seconds(run_ekiben, path, out) for _ in range(3)]))
            print("time by cells")
            for cells, taken in growth.items():
                print(f"  {cells:5,d} cells                {taken:8.2f} s   {taken / cells * 1e3:6.2f} ms a cell")
            for few, many in pairwise(growth):
                print(f"  from {few} to {many:,}        {(growth[many] - growth[few]) / (many - few) * 1e3:15.2f} ms for each more")
            make_notebook(path, SIZES[0])
            plain = seconds(run_papermill, path, out)  # it saves the whole notebook twice a cell: 1,000 of them take minutes
            print(f"  papermill itself, {SIZES[0]} cells {plain:6.2f} s   {plain / growth[SIZES[0]]:6.1f} times ekiben's")
        finally:
            warm.stop(None)
    if ratio > LIMIT:
        raise SystemExit(f"{ratio:.2f} times nbclient's time; the limit is {LIMIT}")


if __name__ == "__main__":
    main()
