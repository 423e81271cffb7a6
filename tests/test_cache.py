"""A step runs again exactly when something it depends on changed, and says what; results that nobody needs go."""

from __future__ import annotations

import ast
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import EVALUATE, SETTINGS, TUNE, make_project, write_notebook

from ekiben import step
from ekiben.errors import UsageError
from ekiben.cache import evict
from ekiben.cache.lookup import Contents, differences
from ekiben.cache.code import hash_code, imported_names, parts_of
from ekiben.history.forecast import forecast
from ekiben.runner.graph import read_steps
from ekiben.cache.imports import Imports
from ekiben.cache.inventory import survey
from ekiben.runner.jobs import Runner
from ekiben.cache.keys import key_of
from ekiben.cache.libraries import Libraries
from ekiben.cache.memo import Memo
from ekiben.runner.plan import Plan
from ekiben.runner.screen import Screen
from ekiben.history.why import why
from ekiben.runs import Layout, Run, StepResult, StepRun
from ekiben.settings import load_settings
from ekiben.store import Store, Stored
from ekiben.watching import digest_of_setting

PREPARE = [
    "from ekiben import step\nfrom tiny.helper import number\nproject = step.begin('prepare')",
    "step.reads([project.root / 'data.csv'])\nlines = (project.root / 'data.csv').read_text().split()\n"
    "step.save('rows', {'n': number(), 'lines': lines, 'held_out': project.settings.data.test_size})",
]
USING_A_LIBRARY = [TUNE[0] + "\nimport ghostly", TUNE[1]]
OPEN_TUNE = 'upstream: list[str] = ["prepare"]\nfactor: int = 2'


def run(root: Path, **plan: object) -> Run:
    return Runner(root, Plan(**plan), Screen(quiet=True)).execute()  # type: ignore[arg-type]


def that_ran(done: Run) -> list[str]:
    assert done.status == "done", done.error
    return [step.name for step in done.steps if step.status == "ran"]


def install(site: Path, name: str, module: str, version: str) -> None:
    """Make a distribution as an installer would leave it, in place of its earlier version."""
    site.mkdir(exist_ok=True)
    for old in site.glob(f"{name}-*.dist-info"):
        shutil.rmtree(old)
    info = site / f"{name}-{version}.dist-info"
    info.mkdir()
    (site / f"{module}.py").write_text(f"VERSION = '{version}'\n")
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "RECORD").write_text(f"{module}.py,,\n{info.name}/METADATA,,\n{info.name}/RECORD,,\n")


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A finished project, prepare → tune → evaluate: it reads a file, uses a library, and another one is installed too."""
    folder = tmp_path_factory.mktemp("house")
    install(folder / "site", "ghost_lib", "ghostly", "1.0")
    install(folder / "site", "other_lib", "otherly", "1.0")
    root = make_project(folder / "tiny")
    (root / "data.csv").write_text("a\n1\n2\n")
    write_notebook(root / "nbs/pipeline/01_prepare.ipynb", "upstream: list[str] = []", PREPARE)
    write_notebook(root / "nbs/pipeline/02_tune.ipynb", OPEN_TUNE, USING_A_LIBRARY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder / "site"))
        patch.syspath_prepend(str(folder / "site"))
        patch.setenv("EKIBEN_PIPELINE__WARM_KERNELS", "no")
        assert that_ran(run(root)) == ["prepare", "tune", "evaluate"]
    yield folder


@pytest.fixture
def project(house: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the finished project."""
    shutil.copytree(house, tmp_path / "house")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "house/site"))
    monkeypatch.setenv("EKIBEN_PIPELINE__WARM_KERNELS", "no")
    monkeypatch.syspath_prepend(str(tmp_path / "house/site"))
    return tmp_path / "house/tiny"


# ---- the table


def rewrite(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def edit_quietly(path: Path, old: bytes, new: bytes) -> None:
    """Edit a file as somebody would who wants it not to be seen: as many bytes, and the time put back."""
    stat, raw = path.stat(), path.read_bytes()
    assert old in raw and len(old) == len(new)
    path.write_bytes(raw.replace(old, new))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def tune_cells(root: Path, cells: list[str]) -> None:
    write_notebook(root / "nbs/pipeline/02_tune.ipynb", OPEN_TUNE, cells)


def stored(root: Path, step: str, name: str) -> Path:
    result = StepResult.from_json(Layout(root).last(step).read_bytes())
    return Store(Layout(root).objects).path(result.outputs[name].digest)


def entry(root: Path, step: str) -> Path:
    return next((root / ".ekiben/runs").glob(f"*/{step}.json"))


def add_an_output(root: Path) -> None:
    path = root / "nbs/pipeline/02_tune.ipynb"
    book = json.loads(path.read_text())
    book["cells"][2] |= {"execution_count": 3, "outputs": [{"output_type": "stream", "name": "stdout", "text": "hello"}]}
    path.write_text(json.dumps(book))


ALL = ["prepare", "tune", "evaluate"]
A_CELL = TUNE[1].replace("* factor", "+ factor")
TABLE: dict[str, tuple[Callable[[Path], object], list[str], str]] = {
    # nothing that a result could depend on
    "prose": (lambda r: rewrite(r / "nbs/pipeline/02_tune.ipynb", "A page.", "A better page."), [], ""),
    "an output": (add_an_output, [], ""),
    "a comment in a cell": (lambda r: tune_cells(r, [USING_A_LIBRARY[0], "# why\n" + TUNE[1] + "  # so"]), [], ""),
    "the layout of a cell": (lambda r: tune_cells(r, [USING_A_LIBRARY[0], TUNE[1].replace("rows = ", "rows   =  ")]), [], ""),
    "a cell of comments": (lambda r: tune_cells(r, [*USING_A_LIBRARY, "# the end"]), [], ""),
    "a comment in a helper": (lambda r: rewrite(r / "src/tiny/deeper.py", "def base", "# deep\n\ndef base"), [], ""),
    "a helper's first sentence": (lambda r: rewrite(r / "src/tiny/deeper.py", "def base", '"""Deep."""\n\ndef base'), [], ""),
    "a module that nobody imports": (lambda r: (r / "src/tiny/other.py").write_text("x = 1\n"), [], ""),
    "a notebook's time": (lambda r: os.utime(r / "nbs/pipeline/02_tune.ipynb"), [], ""),
    "an unrelated section": (lambda r: rewrite(r / "settings.ini", "[gates]", "[serve]\nport = 3001\n\n[gates]"), [], ""),
    "an unrelated key of a section that is read": (
        lambda r: rewrite(r / "settings.ini", "[gates]\n", "[gates]\nconfidence = 0.9\n"), [], ""
    ),
    "the time of an input file": (lambda r: os.utime(r / "data.csv", (1, 1)), [], ""),
    "a library that no step uses": (lambda r: install(r.parent / "site", "other_lib", "otherly", "2.0"), [], ""),
    # code
    "a cell": (lambda r: tune_cells(r, [USING_A_LIBRARY[0], A_CELL]), ["tune", "evaluate"], "cell 2 changed"),
    "a cell more": (lambda r: tune_cells(r, [USING_A_LIBRARY[0], "x = 1", TUNE[1]]), ["tune"], "cell 2 is new"),
    "a cell less": (
        lambda r: write_notebook(r / "nbs/pipeline/01_prepare.ipynb", "upstream: list[str] = []", ["\n".join(PREPARE)]),
        ["prepare"],
        "cell 1 changed",
    ),
    "a magic": (lambda r: tune_cells(r, [*USING_A_LIBRARY, "%pwd"]), ["tune"], "cell 3 is new"),
    "a helper two imports away": (
        lambda r: rewrite(r / "src/tiny/deeper.py", "41", "50"), ALL, "module tiny.deeper: base changed"
    ),
    "a helper, to the same effect": (
        lambda r: rewrite(r / "src/tiny/helper.py", "base() + 1", "1 + base()"), ["prepare"], "module tiny.helper: number changed"
    ),
    "a function more in a helper": (
        lambda r: (r / "src/tiny/deeper.py").write_text("def base():\n    return 41\n\n\ndef more():\n    return 1\n"),
        ["prepare"],
        "module tiny.deeper: more is new",
    ),
    "an import in a helper": (
        lambda r: rewrite(r / "src/tiny/deeper.py", "def base", "import math\n\n\ndef base"),
        ["prepare"],
        "module tiny.deeper changed outside its functions and classes",
    ),
    # parameters, settings, libraries
    "a parameter": (
        lambda r: rewrite(r / "settings.ini", "[gates]", "[tune]\nfactor = 3\n\n[gates]"),
        ["tune", "evaluate"],
        "parameter factor changed from 2 to 3",
    ),
    "a parameter's default": (
        lambda r: rewrite(r / "nbs/pipeline/02_tune.ipynb", "factor: int = 2", "factor: int = 4"),
        ["tune", "evaluate"],
        "parameter factor changed from 2 to 4",
    ),
    "a gate": (lambda r: rewrite(r / "settings.ini", "auc >= 0.5", "auc >= 0.6"), ["evaluate"], "[gates] gates changed"),
    "a key that one step reads": (
        lambda r: rewrite(r / "settings.ini", "[data]\n", "[data]\ntest_size = 0.3\n"),
        ["prepare", "tune"],
        "[data] test_size changed",
    ),
    "the seed": (
        lambda r: rewrite(r / "settings.ini", "name = tiny", "name = tiny\nseed = 7"), ALL, "parameter seed changed from 0 to 7"
    ),
    "a library that one step uses": (
        lambda r: install(r.parent / "site", "ghost_lib", "ghostly", "2.0"), ["tune"], "library ghost-lib changed from 1.0 to 2.0"
    ),
    # data
    "a byte of an input file": (
        lambda r: edit_quietly(r / "data.csv", b"2", b"3"), ["prepare", "tune"], "data.csv changed"
    ),
    # what is stored
    "a stored result, quietly": (
        lambda r: edit_quietly(stored(r, "prepare", "rows"), b"42", b"43"),
        ["prepare"],
        "its stored result rows was changed after it was written",
    ),
    "a stored result, cut": (
        lambda r: os.truncate(stored(r, "tune", "model"), 3), ["tune"], "its stored result model was changed after it was written"
    ),
    "a stored result, deleted": (lambda r: stored(r, "tune", "model").unlink(), ["tune"], "its stored result model is gone"),
    "a figure in a cache entry": (
        lambda r: edit_quietly(entry(r, "evaluate"), b'"value":0.9', b'"value":0.8'), ["evaluate"], "was edited or damaged"
    ),
    "a cache entry, cut": (lambda r: os.truncate(entry(r, "evaluate"), 90), ["evaluate"], "cannot be read"),
    "a cache entry, deleted": (lambda r: entry(r, "tune").unlink(), ["tune"], "it never ran to its end here"),
}


@pytest.mark.parametrize("edit", TABLE)
def test_an_edit_is_foreseen_and_named(project: Path, edit: str) -> None:
    change, reruns, words = TABLE[edit]
    change(project)
    told = {row["step"]: row for row in forecast(project, Plan())}
    assert {step for step, row in told.items() if row["will"] == "cached"} <= set(ALL) - set(reruns)
    if not reruns:
        assert [row["will"] for row in told.values()] == ["cached"] * 3
        assert all(line.startswith(f"`{step}` is unchanged since 2") for step in ALL for line in why(project, step))
        return
    assert told[reruns[0]]["will"] == "run"
    assert words in told[reruns[0]]["why"]
    assert any(words in line for line in why(project, reruns[0]))


@pytest.mark.slow
@pytest.mark.parametrize("edit", TABLE)
def test_an_edit_runs_exactly_the_steps_that_depend_on_it_once(project: Path, edit: str) -> None:
    change, reruns, words = TABLE[edit]
    change(project)
    done = run(project)
    assert that_ran(done) == reruns
    assert words in next((step.why for step in done.steps if step.status == "ran"), "")
    assert that_ran(run(project)) == []


def test_a_parameter_from_the_command_line_counts_and_going_back_is_free(project: Path) -> None:
    done = run(project, overrides={"tune.factor": "3"})
    assert that_ran(done) == ["tune", "evaluate"]
    assert next(s.why for s in done.steps if s.name == "tune") == "parameter factor changed from 2 to 3"
    assert that_ran(run(project)) == []


def test_why_tells_all_that_changed_with_the_lines_of_code_before_and_after(project: Path) -> None:
    tune_cells(project, [USING_A_LIBRARY[0], A_CELL])
    rewrite(project / "settings.ini", "[gates]", "[tune]\nfactor = 3\n\n[gates]")
    install(project.parent / "site", "ghost_lib", "ghostly", "2.0")
    said = why(project, "tune")
    assert [line.strip() for line in said[1:2] + said[-2:]] == [
        "cell 2 changed",
        "parameter factor changed from 2 to 3",
        "library ghost-lib changed from 1.0 to 2.0",
    ]
    assert any(line.strip().startswith("-") and "rows['n'] * factor" in line for line in said)
    assert any(line.strip().startswith("+") and "rows['n'] + factor" in line for line in said)


def test_why_shows_a_changed_function_and_what_a_setting_was(project: Path) -> None:
    rewrite(project / "src/tiny/deeper.py", "41", "50")
    rewrite(project / "settings.ini", "auc >= 0.5", "auc >= 0.6")
    said = [line.strip() for line in why(project, "prepare")]
    assert said[1:] == ["module tiny.deeper: base changed", "def base():", "-    return 41", "+    return 50"]
    told = "\n".join(why(project, "evaluate"))
    assert "[gates] gates changed from auc >= 0.5 to auc >= 0.6" in told
    assert "`prepare` before it would run first" in told


def test_why_does_not_know_a_step_that_is_none(project: Path) -> None:
    with pytest.raises(UsageError, match="did you mean `tune`"):
        why(project, "tun")


def test_a_result_in_an_earlier_form_is_a_miss_that_says_so(project: Path) -> None:
    path = entry(project, "tune")
    result = StepResult.from_json(path.read_bytes())
    path.write_bytes(msgspec.structs.replace(result, key={"cell 1": "aa", "module tiny": "bb"}).to_json())
    assert "form that this version of ekiben does not compare" in forecast(project, Plan())[1]["why"]


def test_a_cell_that_is_edited_while_its_step_runs_was_read_before(project: Path) -> None:
    page = project / "nbs/pipeline/02_tune.ipynb"
    tune_cells(project, [*USING_A_LIBRARY, "page = project.root / 'nbs/pipeline/02_tune.ipynb'\n"
                         "page.write_text(page.read_text().replace('* factor', '+ factor'))"])  # fmt: skip
    whole = page.read_text()
    run(project)
    assert forecast(project, Plan())[1]["why"] == "cell 2 changed"
    page.write_text(whole)
    assert forecast(project, Plan())[1]["will"] == "cached"


def test_code_that_is_edited_while_its_step_runs_makes_a_result_that_never_stands(project: Path) -> None:
    cell = "(project.root / 'src/tiny/deeper.py').write_text('def base():\\n    return 77\\n')"
    write_notebook(project / "nbs/pipeline/01_prepare.ipynb", "upstream: list[str] = []", [*PREPARE, cell])
    run(project)
    assert forecast(project, Plan())[0]["why"] == "module tiny.deeper: base was changed while it ran"


def tree(root: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in sorted(root.rglob("*"))}


def test_a_dry_run_and_why_write_nothing_even_where_a_notebook_is_to_be_exported(project: Path) -> None:
    page = project / "nbs/pipeline/01_prepare.ipynb"
    write_notebook(page, "upstream: list[str] = []", ["#| default_exp pipeline.prepare", *PREPARE, "#| export\ndef half(x): return x / 2"])
    tune_cells(project, ["from tiny.pipeline.prepare import half", *USING_A_LIBRARY])
    before = tree(project)
    told = {row["step"]: row for row in forecast(project, Plan())}
    said = why(project, "tune")
    assert tree(project) == before
    assert told["tune"]["will"] == "run" and told["evaluate"]["will"] == "depends"
    assert "its inputs decide" in told["evaluate"]["why"]
    assert any("module tiny.pipeline.prepare is new" in line for line in said)


@pytest.mark.parametrize(
    ("plan", "will"),
    [
        (Plan(), ["cached", "cached", "cached"]),
        (Plan(force=True), ["run", "run", "run"]),
        (Plan(from_step="tune"), ["cached", "run", "run"]),
        (Plan(only="tune"), ["left out", "cached", "left out"]),
        (Plan(overrides={"tune.factor": "3"}), ["cached", "run", "depends"]),
    ],
    ids=["plain", "force", "from", "only", "parameter"],
)
def test_a_forecast_says_what_a_plan_would_do(project: Path, plan: Plan, will: list[str]) -> None:
    assert [row["will"] for row in forecast(project, plan)] == will


def test_a_setting_that_is_read_last_of_all_is_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_project(tmp_path / "tiny")
    monkeypatch.chdir(root / "nbs/pipeline")
    begun = step.begin("tune")
    assert (begun.settings.data.encoding, begun.name, begun.settings.columns.roles["default"]) == ("utf-8", "tiny", "target")
    read = set(StepResult.from_json(Layout(root).result("by-hand", "tune").read_bytes()).settings_read)
    assert {"data.encoding", "pipeline.name", "columns.target", "columns.sensitive"} <= read
    assert not {"data.test_size", "pipeline.seed", "pipeline.tracking_uri", "gates.gates", "columns.sensitive_as_input"} & read


def test_of_a_secret_only_a_change_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = load_settings(make_project(tmp_path / "tiny"))
    monkeypatch.setenv("WAREHOUSE_TOKEN", "correct-horse")
    before = digest_of_setting(known, "secret.WAREHOUSE_TOKEN")
    monkeypatch.setenv("WAREHOUSE_TOKEN", "battery-staple")
    assert digest_of_setting(known, "secret.WAREHOUSE_TOKEN") != before and len(before) == 4
    result = StepResult(step="tune", run_id="r", started="x", status="done", settings_read={"secret.WAREHOUSE_TOKEN": before})
    result = StepResult.from_json(result.to_json())
    assert [c.words for c in differences(result, {}, known, {}, Contents(tmp_path))] == ["the secret WAREHOUSE_TOKEN changed"]


def test_a_damaged_memory_is_not_believed(project: Path) -> None:
    for path in (project / ".ekiben/memo").glob("*.json"):
        path.write_bytes(path.read_bytes()[:-9] + b"0" * 9)
    assert that_ran(run(project)) == []


# ---- what code is and what it imports

SOURCES = [
    "import os\n\n\ndef half(x, y=2):\n    if x:\n        return x / y\n    return os.sep\n\n\nLIMIT = 3\n",
    "from a import b\n\n\nclass Table:\n    n: int = 1\n\n    def size(self):\n        for i in range(3):\n            yield self.n + i\n",
    "@cached\ndef one():\n    return [1, 'two', 3.0]\n\n\nasync def two():\n    await one()\n\n\nx, y = 1, 2\nx += y\n",
]


def statements(tree: ast.AST) -> list[ast.stmt]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.stmt)]


@settings(max_examples=150, deadline=None)
@given(source=st.sampled_from(SOURCES), at=st.lists(st.integers(0, 99)), words=st.text("ab #'\"", max_size=8), blank=st.booleans())
def test_comments_and_blank_lines_are_not_code(source: str, at: list[int], words: str, blank: bool) -> None:
    lines = source.splitlines()
    starts = sorted({node.lineno for node in statements(ast.parse(source)) if not getattr(node, "decorator_list", None)})
    for number in sorted({starts[i % len(starts)] for i in at}, reverse=True):
        indent = lines[number - 1][: len(lines[number - 1]) - len(lines[number - 1].lstrip())]
        lines[number - 1] += f"  # {words}"
        lines[number - 1 : number - 1] = [f"{indent}# {words}"] + ([""] if blank else [])
    edited = "\n".join(lines)
    assert hash_code(edited) == hash_code(source)
    assert parts_of(edited) == parts_of(source)
    assert parts_of(ast.unparse(ast.parse(edited))) == parts_of(source)


@settings(max_examples=150, deadline=None)
@given(source=st.sampled_from(SOURCES), at=st.integers(0, 10**6))
def test_any_change_of_the_syntax_tree_is_a_change_of_code(source: str, at: int) -> None:
    tree = ast.parse(source)
    nodes = [n for n in ast.walk(tree) if isinstance(n, (ast.Constant, ast.Name, ast.BinOp, ast.arg, ast.FunctionDef))]
    node = nodes[at % len(nodes)]
    match node:
        case ast.Constant():
            node.value = "another"
        case ast.Name():
            node.id += "_"
        case ast.BinOp():
            node.op = ast.Pow()
        case ast.arg():
            node.arg += "_"
        case ast.FunctionDef():
            node.name += "_"
    edited = ast.unparse(tree)
    assert hash_code(edited) != hash_code(source)
    assert parts_of(edited) != parts_of(source)


def test_the_order_of_a_module_is_code() -> None:
    assert parts_of("a = f()\nb = g()\n")["a"] == parts_of("b = g()\na = f()\n")["a"]
    assert parts_of("a = f()\nb = g()\n") != parts_of("b = g()\na = f()\n")


@pytest.mark.parametrize(
    ("cell", "modules"),
    [
        ("import tiny.deeper as d", {"tiny.deeper"}),
        ("from tiny import deeper", {"tiny", "tiny.deeper"}),
        ("%matplotlib inline\nfrom tiny.deeper import base", {"tiny.deeper", "tiny.deeper.base"}),
        ("%%time\nimport tiny", {"tiny"}),
        ("files = !ls -l | grep 'x\nimport tiny", {"tiny"}),
        ("import tiny\ntiny?\n?tiny.deeper\n%timeit tiny", {"tiny"}),
        ("if True:\n    !pip list\n    import tiny", {"tiny"}),
        ("x = (7\n  % 4)\n%cd ..\nimport tiny", {"tiny"}),
        ("!ls \\\n  -l\nimport tiny", {"tiny"}),
        ("def f():\n    import tiny.deeper", {"tiny.deeper"}),
        ("import importlib\nimportlib.import_module('tiny.deeper')", {"importlib", "tiny.deeper"}),
        ("%%bash\nimport tiny", set()),
        ("import tiny\nthis is no Python", set()),
    ],
)
def test_imports_are_found_in_cells_with_magics_and_in_functions(cell: str, modules: set[str]) -> None:
    assert imported_names(cell) == modules


def follow(root: Path, *names: str) -> set[str]:
    imports = Imports(root, Memo(root / "m.json"), Libraries(Memo(root / "l.json")))
    return set(imports.reach(names, root / "nbs/pipeline").modules)


def test_modules_are_followed_through_packages_relative_imports_and_functions(tmp_path: Path) -> None:
    root = make_project(tmp_path / "tiny")
    for path, text in {
        "src/tiny/deep/__init__.py": "from ..near import thing",
        "src/tiny/near.py": "def thing():\n    from . import late\n",
        "src/tiny/late.py": "import importlib\nimportlib.import_module('.lazy', 'tiny')\nimportlib.import_module('tiny.named')",
        "src/tiny/named.py": "import tiny.late",
        "src/tiny/deep/one.py": "",
        "src/loose/part.py": "",
        "nbs/pipeline/beside.py": "from loose import part",
    }.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    expected = {"tiny", "tiny.deep", "tiny.near", "tiny.late", "tiny.named", "tiny.deep.one"}
    assert follow(root, "tiny.deep.one") == expected
    assert follow(root, "beside") == {"beside", "loose.part"}


def test_only_the_libraries_that_a_step_reaches_are_in_its_key(tmp_path: Path) -> None:
    root = make_project(tmp_path / "tiny")
    page = root / "nbs/pipeline/02_tune.ipynb"
    tune_cells(root, ["import json, sklearn.tree\nfrom ekiben.tune.search import search_models"])
    key = key_of(page, {}, root)
    assert {"library scikit-learn", "library optuna", "library lightgbm", "library python"} <= set(key)
    assert not {"library json", "library bentoml", "library fairlearn"} & set(key)
    tune_cells(root, ["from ekiben import step\nstep.begin('tune')"])
    assert "library optuna" not in key_of(page, {}, root)


# ---- the graph

BEGIN = "from ekiben import step\nstep.begin('tune')\n"


@pytest.mark.parametrize(
    "cell",
    [
        BEGIN + "step.load('evaluate', 'auc')",
        BEGIN + "step.available('evaluate', 'auc')",
        BEGIN + "step.result_of(name='evaluate')",
        "from ekiben import step as s\ns.load(step='evaluate', name='auc')",
        "from ekiben.step import load as fetch\n%pwd\nfetch('evaluate', 'auc')",
        "import ekiben.step\nekiben.step.load('evaluate', 'auc')",
    ],
)
def test_a_load_that_is_not_declared_is_refused_before_anything_starts(tmp_path: Path, cell: str) -> None:
    root = make_project(tmp_path / "tiny")
    tune_cells(root, ["x = 1", cell])
    with pytest.raises(UsageError) as said:
        run(root)
    assert "02_tune.ipynb cell 4: `tune` loads from `evaluate`, which is not in its upstream" in str(said.value)
    assert 'upstream: list[str] = ["prepare", "evaluate"]' in str(said.value)
    assert not (root / "reports").exists()


def test_a_load_from_far_upstream_or_of_another_name_is_no_load(tmp_path: Path) -> None:
    root = make_project(tmp_path / "tiny")
    cells = [EVALUATE[0], EVALUATE[1] + "\nstep.load('prepare', 'rows')", "json.load('tune')\nname = 'x'\nstep.load(name, 'y')"]
    write_notebook(root / "nbs/pipeline/03_evaluate.ipynb", 'upstream: list[str] = ["tune"]', cells)
    assert [step.name for step in read_steps(load_settings(root))] == ALL


@pytest.mark.parametrize(
    ("page", "upstream", "cell", "words"),
    [
        ("02_tune", ["prepare"], "step.load('prepar', 'rows')", "loads from `prepar`, which is no step; did you mean `prepare`?"),
        ("02_tune", ["prepare"], "step.load('tune', 'model')", "which is this notebook itself"),
        ("01_prepare", ["evaluate"], "", "in a circle: "),
        ("02_tune", ["prepar"], "", "upstream `prepar` is no step; did you mean `prepare`?"),
        ("07_tune", [], "", "step `tune` is also 02_tune.ipynb; rename one of them"),
    ],
)
def test_a_wrong_graph_is_one_line(tmp_path: Path, page: str, upstream: list[str], cell: str, words: str) -> None:
    root = make_project(tmp_path / "tiny")
    write_notebook(root / f"nbs/pipeline/{page}.ipynb", f"upstream: list[str] = {json.dumps(upstream)}", [BEGIN + cell])
    with pytest.raises(Exception) as said:
        read_steps(load_settings(root))
    assert words in str(said.value) and "\n" not in str(said.value)


# ---- what goes

LONG_AGO = time.time() - 7200


def leave(root: Path, run_id: str, step: str, content: bytes, *, used: float, inputs: dict[str, str] | None = None) -> Stored:
    """Leave a result as a run does, last used so many seconds after long ago."""
    layout = Layout(root)
    kept = Store(layout.objects).put(content)
    result = StepResult(step=step, run_id=run_id, started=run_id, status="done", outputs={"it": kept}, inputs=inputs or {})
    path = layout.result(run_id, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(result.to_json())
    for one in (path, Store(layout.objects).path(kept.digest)):
        os.utime(one, (LONG_AGO + used,) * 2)
    return kept


def there(root: Path) -> set[str]:
    return {f"{e.run_id} {e.step}" for e in survey(Layout(root)).entries}


def test_the_least_recently_used_results_go_first_and_shared_content_stays(tmp_path: Path) -> None:
    shared = leave(tmp_path, "r1", "tune", b"s" * 100, used=1)
    leave(tmp_path, "r2", "tune", b"a" * 100, used=9)
    leave(tmp_path, "r3", "tune", b"b" * 100, used=2)
    leave(tmp_path, "r4", "tune", b"s" * 100, used=10)
    assert evict.prune(Layout(tmp_path), 250) == 100
    assert there(tmp_path) == {"r2 tune", "r4 tune"}
    assert Store(Layout(tmp_path).objects).read(shared) == b"s" * 100
    assert evict.prune(Layout(tmp_path), 250) == 0


def test_what_is_last_or_live_or_by_hand_or_serves_stays_whatever_the_limit(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    rows = leave(tmp_path, "r0", "prepare", b"rows", used=0)
    for number, run_id in enumerate(["r1", "r2", "r3", "by-hand", "r9"]):
        leave(tmp_path, run_id, "tune", run_id.encode() * 20, used=number, inputs={"prepare.it": rows.digest})
    layout.last("tune").parent.mkdir()
    layout.last("tune").write_bytes(layout.result("r9", "tune").read_bytes())
    layout.alive("r3").touch()
    champion = Run(run_id="r4", status="done", started="x", model={"name": "m", "version": "1", "alias": "champion"})
    champion = msgspec.structs.replace(champion, steps=[StepRun(name="tune", status="cached", made_in="r2")])
    layout.report("r4").mkdir(parents=True)
    (layout.report("r4") / "run.json").write_bytes(champion.to_json())
    evict.clear(layout)
    assert there(tmp_path) == {"r2 tune", "r3 tune", "by-hand tune", "r9 tune"}
    assert Store(layout.objects).read(rows) == b"rows"


def test_leftovers_go_when_they_are_old_and_young_ones_stay(tmp_path: Path) -> None:
    store = Store(Layout(tmp_path).objects)
    old, young = store.put(b"old"), store.put(b"young")
    torn = store.path(old.digest).with_name(".torn.tmp")
    torn.write_bytes(b"half")
    for path in (store.path(old.digest), torn):
        os.utime(path, (LONG_AGO,) * 2)
    assert evict.prune(Layout(tmp_path), 1e9) == 7
    assert not store.holds(old) and store.holds(young) and not torn.exists()


def test_content_that_is_stored_again_while_it_is_removed_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(Layout(tmp_path).objects)
    one = store.put(b"content")
    os.utime(store.path(one.digest), (LONG_AGO,) * 2)
    rename = Path.rename

    def put_in_between(self: Path, target: Path) -> Path:
        if self.name == one.digest:
            store.put(b"content")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", put_in_between)
    assert evict.prune(Layout(tmp_path), 1e9) == 0
    assert store.holds(one)


def test_a_result_that_stood_for_a_step_counts_as_used(project: Path) -> None:
    path = entry(project, "tune")
    os.utime(path, (1, 1))
    forecast(project, Plan())
    assert path.stat().st_mtime == 1
    run(project)
    assert path.stat().st_mtime > LONG_AGO


def test_a_small_cache_still_serves_the_next_run_by_hand_and_by_command(project: Path) -> None:
    run(project, overrides={"tune.factor": "3"})
    for path in (project / ".ekiben").rglob("*"):
        if path.is_file():
            os.utime(path, (LONG_AGO,) * 2)
    assert evict.clear(Layout(project)) > 0
    assert that_ran(run(project, overrides={"tune.factor": "3"})) == []
    assert that_ran(run(project)) == ["tune", "evaluate"]


def test_the_table_shows_steps_studies_and_what_would_go(tmp_path: Path) -> None:
    (tmp_path / "settings.ini").write_text(SETTINGS)
    leave(tmp_path, "r1", "tune", b"a" * 1500, used=1)
    leave(tmp_path, "by-hand", "tune", b"h" * 10, used=1)
    Layout(tmp_path).studies.mkdir(parents=True)
    (Layout(tmp_path).studies / "x.db").write_bytes(b"s" * 30)
    rows = {row.name: (row.results, row.bytes, row.goes) for row in evict.usage(Layout(tmp_path), 1000)}
    assert rows == {"tune": (1, 1500, 1), "made by hand": (1, 10, 0), "studies": (1, 30, 0)}
