"""Gates about the service: read with the others, judged by `ekiben loadtest`, entered into the run that made the Bento."""

from __future__ import annotations

import json
from collections import Counter
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from fake_service import RUN, Fake, made_sent, made_test
from msgspec import structs
from rich.console import Console

from ekiben.cli import main
from ekiben.errors import ServiceError, SettingsError, UsageError
from ekiben.gates import Gate, check_gates, is_pending, judge, parse_gates
from ekiben.history.agreement import match_runs
from ekiben.loadtest.levels import Level, LoadTest
from ekiben.loadtest.run import enter_verdict, judge_service, run_loadtest
from ekiben.loadtest.service import ask_service
from ekiben.package import require_gates
from ekiben.records import Measure
from ekiben.runner.closing import closing_table, next_command
from ekiben.runner.plan import stopping
from ekiben.runs import Layout, Run, read_run, read_runs, write_run
from ekiben.settings import load_settings
from ekiben.store import Store

# ---- the gates


def gate(line: str, *, blocking: bool = True) -> Gate:
    (one,) = parse_gates(line, blocking=blocking)
    return one


def test_a_line_about_the_service_may_name_the_requests_at_once():
    assert (gate("p99_ms[8] <= 5").slice, gate("p99_ms <= 5").slice) == ("8", "")
    assert gate("p99_ms[8] <= 5").is_of_service and not gate("auc >= 0.7").is_of_service
    check_gates([gate("p99_ms[8] <= 5"), gate("errors <= 0.01")], sensitive=[], task="regression")


@pytest.mark.parametrize("line", ["p99_ms[sex] <= 5", "p99_ms[0] <= 5", "p99_ms[8*2] <= 5", "p99_ms[] <= 5", "errors[1.5] <= 0"])
def test_anything_else_in_brackets_is_refused(line: str):
    with pytest.raises(SettingsError, match="number of requests at once"):
        parse_gates(line, blocking=True)


@pytest.mark.parametrize("line", ["p99_ms <= -1", "errors <= 2", "requests_per_s >= -5"])
def test_a_limit_that_can_never_matter_is_refused(line: str):
    with pytest.raises(SettingsError, match="can never"):
        parse_gates(line, blocking=True)


def test_a_run_is_not_stopped_by_what_only_the_service_can_show(tmp_path):
    (tmp_path / "nbs" / "pipeline").mkdir(parents=True)
    text = "[data]\nsource = x.csv\n[columns]\ntarget = y\n[gates]\ngates =\n    p99_ms <= 5\ninsufficient = block\n"
    (tmp_path / "settings.ini").write_text(text)
    pending = judge(gate("p99_ms <= 5"), [])
    assert is_pending(pending) and pending.note == "measured by `ekiben loadtest`"
    settings = load_settings(tmp_path)
    assert not stopping([pending], settings)
    require_gates([pending], insufficient="block")
    measured = judge(gate("p99_ms <= 5"), [Measure(name="p99_ms", value=5.0, low=4.0, high=6.0)])
    assert measured.verdict == "insufficient" and not is_pending(measured) and stopping([measured], settings)
    assert not is_pending(judge(gate("auc >= 0.7"), []))


# ---- the verdict in the run


def made_run(layout: Layout, **changes: Any) -> Run:
    pending = [judge(gate(line), []) for line in ("p99_ms[8] <= 5", "errors <= 0")]
    passed = judge(gate("auc >= 0.7"), [Measure(name="auc", value=0.9)])
    run = Run(
        run_id=RUN, status="done", started="2026-01-01T12:00:00+00:00", gates=[pending[0], passed, pending[1]],
        measures=[Measure(name="auc", value=0.9)], metrics={"auc": 0.9},
    )  # fmt: skip
    run = structs.replace(run, **changes)
    write_run(layout, run)
    return run


def judged_test(*lines: str, **how: Any) -> LoadTest:
    test = made_test(Level.of(made_sent(**how)))
    return structs.replace(test, gates=judge_service([gate(line) for line in lines], test.measures))


def test_the_verdict_takes_the_place_that_waited_for_it(tmp_path):
    layout = Layout(tmp_path)
    made_run(layout)
    assert enter_verdict(layout, judged_test("p99_ms[8] <= 5", "errors <= 0"))
    run = read_run(layout, RUN)
    assert [(g.name, g.verdict) for g in run.gates] == [("p99_ms[8] <= 5", "pass"), ("auc >= 0.7", "pass"), ("errors <= 0", "pass")]
    assert run.status == "done" and run.metrics["auc"] == 0.9 and run.metrics["p99_ms[8]"] == run.metrics["p99_ms"] < 5
    assert "p99_ms[8]" in (layout.report(RUN) / "index.html").read_text()


def test_a_later_test_replaces_the_figures_of_an_earlier_one(tmp_path):
    layout = Layout(tmp_path)
    made_run(layout)
    enter_verdict(layout, judged_test("p99_ms[8] <= 5"))
    enter_verdict(layout, judged_test("p99_ms[8] <= 5", at_once=8, median_ms=20.0))
    run = read_run(layout, RUN)
    assert Counter(m.label for m in run.measures).most_common(1)[0][1] == 1
    assert run.gates[0].verdict == "fail" and run.metrics["p99_ms[8]"] > 5
    other = made_test(Level.of(made_sent(at_once=16)))
    enter_verdict(layout, other)
    assert "p99_ms[8]" not in read_run(layout, RUN).metrics


def test_a_waiver_of_the_run_stays(tmp_path):
    layout = Layout(tmp_path)
    waived = structs.replace(judge(gate("p99_ms[8] <= 5"), []), waived="a pilot")
    made_run(layout, gates=[waived])
    run = enter_verdict(layout, judged_test("p99_ms[8] <= 5", median_ms=20.0))
    assert (run.gates[0].verdict, run.gates[0].waived) == ("fail", "a pilot")


@pytest.mark.parametrize("model", [{"run_id": "20990101-000000-ffff"}, {"run_id": ""}, {"run_id": "../../x"}, {"run_id": ".."}])
def test_a_run_that_is_not_here_is_left_alone(tmp_path, model):
    made_run(Layout(tmp_path))
    assert enter_verdict(Layout(tmp_path), made_test(Level.of(made_sent()), **model)) is None


def test_the_verdict_goes_to_the_newest_run_that_packaged_the_bento(tmp_path):
    layout = Layout(tmp_path)
    made_run(layout)
    for day, tag in (("02", "census:v3-b"), ("03", "census:v3-b"), ("04", "census:v3-c")):
        made_run(layout, run_id=f"202601{day}-120000-aaaa", bento={"tag": tag})
    test = structs.replace(judged_test("errors <= 0"), model={"run_id": RUN, "bento": "census:v3-b"})
    assert enter_verdict(layout, test).run_id == "20260103-120000-aaaa"
    pending = [run.run_id for run in read_runs(layout) if any(map(is_pending, run.gates[2:]))]
    assert pending == ["20260104-120000-aaaa", "20260102-120000-aaaa", RUN]


def test_a_run_says_what_it_waits_for_until_then(tmp_path):
    layout = Layout(tmp_path)
    run = made_run(layout, bento={"tag": "census:v3"})
    console = Console(width=120, record=True, file=StringIO())
    console.print(closing_table(run))
    assert next_command(run) == "ekiben loadtest" and "waits for `ekiben loadtest`" in console.export_text()
    assert next_command(enter_verdict(layout, judged_test("p99_ms[8] <= 5", "errors <= 0"))) == "ekiben serve"


def test_a_run_that_goes_on_is_left_alone(tmp_path):
    made_run(Layout(tmp_path), status="running")
    assert enter_verdict(Layout(tmp_path), judged_test("errors <= 0")) is None


def test_a_reproduced_run_agrees_although_only_one_was_loaded(tmp_path):
    layout, store = Layout(tmp_path), Store(tmp_path / "objects")
    again = structs.replace(made_run(layout), run_id="20260102-120000-bbbb")
    then = enter_verdict(layout, judged_test("p99_ms[8] <= 5", "errors <= 0"))
    found = match_runs(then, again, ({}, {}), (store, store))
    assert {m.name for m in found if m.kind == "verdict"} == {"auc >= 0.7"}
    assert {m.name for m in found if m.kind == "figure"} == {"auc"}


# ---- the command


def make_root(folder: Path, gates: str = "") -> Path:
    (folder / "nbs" / "pipeline").mkdir(parents=True)
    lines = ["[data]", "source = x.csv", "[columns]", "target = y", "[gates]", "gates =", *(f"    {x}" for x in gates.split(";") if x)]
    (folder / "settings.ini").write_text("\n".join(lines) + "\n")
    return folder


def call(root: Path, fake: Fake, *more: str) -> int:
    return main(["loadtest", "--project", str(root), "--url", fake.url, "--seconds", "0.3", "--concurrency", "2", *more])


@pytest.mark.parametrize(
    ("gates", "code"),
    [("", 0), ("p99_ms <= 60000;errors <= 0", 0), ("p99_ms[3] <= 0.0001", 3), ("requests_per_s >= 100000000", 3), ("auc >= 0.7", 0)],
)
def test_a_gate_that_fails_ends_with_3(tmp_path, capsys, gates, code):
    root = make_root(tmp_path, gates)
    made_run(Layout(root))
    with Fake() as fake:
        assert call(root, fake) == code
        assert {len(json.loads(b)["rows"]) for b in fake.bodies} == {1}
    said = capsys.readouterr().out
    assert "census version 3" in said and "reports/runs" in said
    assert ("p99_ms[3]" in said) == ("[3]" in gates) and "auc" not in said
    test = LoadTest.from_json((Layout(root).report(RUN) / "loadtest.json").read_bytes())
    assert [level.at_once for level in test.levels] == ([2, 3] if "[3]" in gates else [2])
    assert (Layout(root).report(RUN) / "loadtest.html").is_file()
    assert "loadtest.html" in (Layout(root).report(RUN) / "index.html").read_text()


def test_errors_of_the_service_are_counted_by_status_and_judged(tmp_path, capsys):
    root = make_root(tmp_path, "errors <= 0.01")
    with Fake(lambda n: 503 if n % 2 == 0 else 200) as fake:
        assert call(root, fake, "--rows", "2") == 3
        assert {len(json.loads(b)["rows"]) for b in fake.bodies[1:]} == {2}
    assert "× 503" in capsys.readouterr().out
    assert (root / "reports" / "loadtest" / "loadtest.html").is_file()


def test_json_is_all_that_is_printed(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)  # no project here: a service is measured all the same
    with Fake() as fake:
        assert main(["loadtest", "--url", fake.url, "--seconds", "0.2", "--concurrency", "1", "--json"]) == 0
    test = LoadTest.from_json(capsys.readouterr().out)
    assert test.model["name"] == "census" and test.levels[0].at_once == 1 and not test.gates


def test_a_key_is_sent_and_never_shown(tmp_path, capsys, monkeypatch):
    root = make_root(tmp_path)
    with Fake(key="ekb_secret") as fake:
        assert call(root, fake) == 2
        assert "--key" in capsys.readouterr().err
        assert call(root, fake, "--key", "wrong") == 2
        monkeypatch.setenv("EKIBEN_API_KEY", "ekb_secret")
        assert call(root, fake) == 0
    assert "secret" not in capsys.readouterr().out
    assert not [p for p in root.rglob("*") if p.is_file() and b"ekb_secret" in p.read_bytes()]


@pytest.mark.parametrize("more", [("--concurrency", "many"), ("--seconds", "0"), ("--rows", "0"), ("--processes", "0"), ("--url", "ftp://x")])
def test_a_wrong_call_ends_with_2_before_anything_is_sent(tmp_path, capsys, more):
    with Fake() as fake:
        assert call(make_root(tmp_path), fake, *more) == 2
        assert not fake.bodies
    assert capsys.readouterr().err.startswith("error: ")


def test_a_service_that_answers_no_prediction_is_an_error_with_its_own_words():
    with Fake(lambda n: 503) as fake, pytest.raises(ServiceError, match=r"/predict answers 503: busy"):
        ask_service(fake.url)


def test_without_a_champion_there_is_nothing_to_test(tmp_path):
    with pytest.raises(UsageError, match="nothing to serve yet"):
        run_loadtest(make_root(tmp_path))


@pytest.mark.slow
def test_the_champion_is_started_with_a_key_of_its_own_and_leaves_nothing_behind(tmp_path, monkeypatch, capsys):
    from bundles import make_project

    from ekiben.bento import build_bento
    from ekiben.registry import Registry
    from ekiben.serving.bundle import Lineage, stamp_bundle
    from ekiben.serving.served import Served

    root = make_root(tmp_path / "project", "errors <= 0;p99_ms <= 60000")
    monkeypatch.setenv("BENTOML_HOME", str(tmp_path / "bentoml"))
    (tmp_path / "bentoml").mkdir()
    registry = Registry(root)
    tracked = registry.client.create_run(registry.experiment_id()).info.run_id
    project = make_project(tmp_path / "made", lineage=Lineage(run_id=RUN, mlflow_run=tracked))
    bundle = stamp_bundle(project.bundle.folder, tmp_path / "stamped", version="3")
    bento = build_bento(bundle, Path(__file__).resolve().parents[1] / "bentos" / "scorer" / "service.py")
    Served.path(root).parent.mkdir(parents=True)
    Served.path(root).write_bytes(Served(bento=bento.tag, name="census", version="3", digest=bundle.digest).to_json())
    made_run(Layout(root))
    capsys.readouterr()
    assert main(["loadtest", "--project", str(root), "--seconds", "0.5", "--concurrency", "1,4"]) == 0
    said = capsys.readouterr()
    assert bento.tag in said.out and "INFO" not in said.out + said.err
    run = read_run(Layout(root), RUN)
    assert [(g.name, g.verdict) for g in run.gates if g.name == "errors <= 0"] == [("errors <= 0", "pass")]
    assert not (root / ".ekiben" / "journal").exists() and not (root / ".ekiben" / "keys.json").exists()
    test = LoadTest.from_json((Layout(root).report(RUN) / "loadtest.json").read_bytes())
    assert test.is_own and test.model["bento"] == bento.tag
    with pytest.raises(ServiceError, match="does not answer"):
        ask_service(test.url)
    seen = registry.client.get_metric_history(tracked, "p99_ms")
    assert [(m.step, m.value) for m in seen] == [(level.at_once, level["p99_ms"].value) for level in test.levels]
    assert [a.path for a in registry.client.list_artifacts(tracked, "loadtest") if a.path.endswith("html")] == ["loadtest/loadtest.html"]
