"""The page at ``/`` in a real browser: the key, the form, the prediction and what it is made of."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn
from browser import CHROMIUM, browsing
from bundles import Project, make_project

from ekiben.serving.http.app import ServiceApp
from ekiben.serving.bundle import Limits
from ekiben.serving.security.issuing import add_key
from ekiben.serving.options import ServiceOptions
from ekiben.serving.http.state import State

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="no Chromium here (apt-get install chromium)"),
]
PICTURES = os.environ.get("EKIBEN_PICTURES", "")


@contextlib.contextmanager
def serving(project: Project, keys: Path | None = None) -> Iterator[str]:
    state = State()
    state.open(project.bundle.folder, service=ServiceOptions(keys=str(keys or "")))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(ServiceApp(state=state), host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.02)
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.should_exit = True
        thread.join(20)


def keep(browser, name: str) -> None:
    """Keep pictures of the page where EKIBEN_PICTURES says, for a person to look at."""
    if not PICTURES:
        return
    for look in ({}, {"dark": True}, {"width": 390, "height": 800}):
        browser.look(**look)
        browser.picture(Path(PICTURES) / f"{name}-{'dark' if look.get('dark') else 'narrow' if look else 'light'}.png")
    browser.look()


FITS = "document.documentElement.scrollWidth <= document.documentElement.clientWidth"


def test_a_person_gets_in_fills_the_form_and_reads_prediction_and_explanation(tmp_path):
    project = make_project(tmp_path / "census", limits=Limits(missing="reject"))
    _, key = add_key(tmp_path / "keys.json", "ann", ("predict",))
    with serving(project, tmp_path / "keys.json") as url, browsing(tmp_path / "profile", password=key) as browser:
        browser.look()
        browser.open(url)
        assert browser.prompts == [url], "the browser asks for the key before it shows the page"
        assert browser.run("document.title") == "census"
        keep(browser, "form")

        browser.run("document.getElementById('f0').value = 'old'; document.querySelector('button[type=submit]').click()")
        assert "takes a number" in browser.wait("[...document.querySelectorAll('.error')].filter(e => !e.hidden).map(e => e.textContent)[0]")
        assert browser.run("document.activeElement.id") == "f0" and browser.run("document.getElementById('f0').ariaInvalid") == "true"
        keep(browser, "refused")

        expected = next(example for example in project.bundle.examples if None not in example.row.values())
        browser.run(f"fill({json.dumps(expected.row)}); document.querySelector('button[type=submit]').click()")
        said = browser.wait("document.querySelector('.said')?.textContent")
        assert said == expected.decision
        shown = browser.run("document.querySelector('.track').ariaLabel")
        assert shown == f"probability of yes: {100 * expected.prediction:.1f} %"
        terms = browser.run("[...document.querySelectorAll('tbody tr')].map(r => r.cells[0].textContent)")
        assert {"age", "income", "member"} <= set(terms) and len(terms) == len(project.preprocessor.names)
        widths = browser.run("[...document.querySelectorAll('.axis span')].map(s => s.getBoundingClientRect().width)")
        assert max(widths) > 20 and widths == sorted(widths, reverse=True), "the bars are drawn, the longest first"
        assert f"http://127.0.0.1:{url.split(':')[2].rstrip('/')}/predict" in browser.run("document.querySelector('pre').textContent")
        keep(browser, "answer")
        for look in ({}, {"width": 390, "height": 800}, {"width": 280, "height": 600}):
            browser.look(**look)
            assert browser.run(FITS), look

        browser.look()
        browser.said.clear()
        browser.run("document.getElementById('key').value = 'ek_wrong'; document.querySelector('button[type=submit]').click()")
        assert "key" in browser.wait("!problem.hidden && problem.textContent").lower()
        assert browser.run("document.getElementById('access').open && document.activeElement.id") == "key"
        assert browser.prompts == [url], "a wrong key in the field is said on the page, not asked for in a window above it"
        keep(browser, "wrong-key")
        browser.run(f"document.getElementById('key').value = ' {key} '; document.querySelector('button[type=submit]').click()")
        assert browser.wait("problem.hidden && document.querySelector('.said')?.textContent") == expected.decision
        assert "$KEY" in browser.run("document.querySelector('pre').textContent")
        assert key not in browser.run("document.body.innerText + JSON.stringify(localStorage) + document.cookie + location.href")
        assert not [text for text in browser.said if "401" not in text], browser.said


@pytest.mark.parametrize(("task", "runtime"), [("multiclass", "lightgbm"), ("regression", "linear"), ("binary", "python")])
def test_every_kind_of_answer_is_shown_and_nothing_is_refused_by_the_policy(tmp_path, task, runtime):
    project = make_project(tmp_path / "census", task=task, runtime=runtime)
    with serving(project) as url, browsing(tmp_path / "profile") as browser:
        browser.look()
        browser.open(url)
        browser.run("document.querySelector('button[type=submit]').click()")
        said = browser.wait("document.querySelector('.said')?.textContent")
        expected = project.bundle.examples[0]
        if task == "regression":
            assert abs(float(said.replace(",", "")) - expected.prediction) < 1e-4 * max(1, abs(expected.prediction))
        else:
            assert said == expected.decision
        if task == "multiclass":
            assert browser.run("document.querySelectorAll('.track').length") == 3
            before = browser.run("document.querySelector('tbody').innerText")
            browser.run("const of = document.getElementById('of'); of.value = [...of.options].find(o => !o.selected).value; of.dispatchEvent(new Event('change'))")
            assert browser.run("document.querySelector('tbody').innerText") != before
        if runtime == "python":
            assert "no exact contributions" in browser.run("answer.innerText")
        else:
            assert browser.run("document.querySelectorAll('tfoot tr').length") == 2
        browser.run("document.getElementById('next').click(); document.querySelector('button[type=submit]').click()")
        browser.wait("document.querySelector('.said') && !answer.ariaBusy")
        browser.run("document.getElementById('empty').click()")
        assert browser.run("facts.fields.every((_, i) => control(i).value === '')")
        keep(browser, f"{task}-{runtime}")
        assert browser.run(FITS) and not browser.said and not browser.prompts
