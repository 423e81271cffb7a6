"""The notebooks, the package that they become, and what is committed of them agree."""

import json
import shutil
from pathlib import Path

import pytest

from ekiben.export import export_notebooks

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "nbs" / "pipeline").glob("[0-9]*.ipynb"))


def cells_of(path: Path) -> list[dict]:
    """Return the cells of a notebook."""
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def test_the_package_is_what_the_notebooks_export(tmp_path: Path) -> None:
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(ROOT / "nbs", tmp_path / "nbs", ignore=shutil.ignore_patterns(".*"))
    export_notebooks(tmp_path / "nbs" / "pipeline")
    stale = [
        path.relative_to(tmp_path).as_posix()
        for path in sorted((tmp_path / "src").rglob("*.py"))
        if path.name != "__init__.py"
        and (not (mine := ROOT / path.relative_to(tmp_path)).exists() or mine.read_bytes() != path.read_bytes())
    ]
    assert not stale, f"not what the notebooks say: {stale}; run `ekiben export`"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_output_is_committed(path: Path) -> None:
    left = [number for number, cell in enumerate(cells_of(path)) if cell.get("outputs") or cell.get("execution_count")]
    assert not left, f"cells {left} of {path.name} have outputs; run `jupyter nbconvert --clear-output --inplace nbs/pipeline/*.ipynb`"


def test_a_step_has_one_parameters_cell() -> None:
    tagged = {
        path.stem: sum("parameters" in cell["metadata"].get("tags", []) for cell in cells_of(path)) for path in NOTEBOOKS
    }
    assert set(tagged.values()) <= {0, 1}, f"cells tagged `parameters`: {tagged}"
    assert sum(tagged.values()) > 0, "no notebook is a step: none has a cell tagged `parameters`"
