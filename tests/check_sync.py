"""Fail when the notebooks and what stands in src/ differ, or when a notebook is not clean.

Run by ``make check``: exports into a copy of the repository and compares, so nothing here is touched.
"""

from __future__ import annotations

import filecmp
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def modules(root: Path) -> dict[str, Path]:
    """Return the Python files of the package by relative name."""
    return {str(p.relative_to(root)): p for p in (root / "src").rglob("*.py")}


def differences() -> list[str]:
    """Return one line for each file that an export or a clean would change."""
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "copy"
        copy.mkdir()
        for name in ("nbs", "src", "pyproject.toml", "settings.ini", "README.md"):
            source = ROOT / name
            (shutil.copytree if source.is_dir() else shutil.copy2)(source, copy / name)
        for command in ("nbdev-export", "nbdev-clean"):
            done = subprocess.run([command], cwd=copy, capture_output=True, text=True, check=False)
            if done.returncode:
                return [f"{command} failed: {done.stderr.strip()[-2000:]}"]
        here, there = modules(ROOT), modules(copy)
        for name in sorted({*here, *there}):
            if name not in here or name not in there or not filecmp.cmp(here[name], there[name], shallow=False):
                found.append(f"{name} is not what its notebook exports; run `make sync`")
        for notebook in sorted((ROOT / "nbs").rglob("*.ipynb")):
            cleaned = copy / notebook.relative_to(ROOT)
            if notebook.read_bytes() != cleaned.read_bytes():
                found.append(f"{notebook.relative_to(ROOT)} is not clean; run `make sync`")
            if notebook.parent.name == "pipeline":
                found += with_outputs(notebook)
    return found


def with_outputs(notebook: Path) -> list[str]:
    """Return a line when a pipeline notebook was committed with outputs."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    if any(cell.get("outputs") for cell in cells):
        return [f"{notebook.relative_to(ROOT)} holds outputs; pipeline notebooks are committed without (reports/ has them)"]
    return []


if __name__ == "__main__":
    lines = differences()
    print("\n".join(lines) or "notebooks and src agree")
    sys.exit(bool(lines))
