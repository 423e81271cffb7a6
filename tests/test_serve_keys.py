"""`ekiben serve` and the Bento itself, with keys and over HTTPS, as real processes."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bundles import make_project
from test_tls import make_pair

from ekiben.bento import build_bento
from ekiben.cli import main
from ekiben.serving.bundle import stamp_bundle
from ekiben.serving.security.issuing import add_key
from ekiben.serving.options import ServiceOptions
from ekiben.serving.run import start_bento, stop_process, wait_ready
from ekiben.serving.served import Served
from ekiben.serving.security.tls import check_tls

SERVICE = Path(__file__).resolve().parents[1] / "bentos" / "scorer" / "service.py"
pytestmark = pytest.mark.slow


def ask(url: str, word: str = "", context: ssl.SSLContext | None = None) -> int:
    request = urllib.request.Request(url, headers={"x-api-key": word} if word else {})
    try:
        with urllib.request.urlopen(request, timeout=60, context=context) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A project whose champion is packaged, in a store of its own."""
    home = tmp_path_factory.mktemp("project")
    before = os.environ.get("BENTOML_HOME")
    os.environ["BENTOML_HOME"] = str(home / "bentoml")
    made = make_project(home / "made")
    bento = build_bento(stamp_bundle(made.bundle.folder, home / "stamped", version="3", mlflow_run="m1"), SERVICE)
    (home / "settings.ini").write_text("[columns]\ntarget = target\n")
    (home / "nbs" / "pipeline").mkdir(parents=True)
    Served.path(home).parent.mkdir()
    Served.path(home).write_bytes(Served(bento=bento.tag, name="census", version="3", digest=made.bundle.digest).to_json())
    yield home
    os.environ.pop("BENTOML_HOME") if before is None else os.environ.update(BENTOML_HOME=before)


def test_serve_over_https_on_all_addresses_asks_for_keys(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["keys", "add", "shop", "--role", "predict", "--project", str(project)]) == 0
    word = capsys.readouterr().out.strip()
    certificate, private = make_pair(tmp_path, "service")
    program = (
        "import sys; from pathlib import Path; from ekiben.serving.run import serve; "
        f"sys.exit(serve(Path({str(project)!r}), host='0.0.0.0', say=lambda t: print(t, flush=True)))"
    )
    said = {"EKIBEN_SERVE__PORT": "0", "EKIBEN_SERVE__TLS_CERTIFICATE": str(certificate), "EKIBEN_SERVE__TLS_KEY": str(private)}
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=os.environ | said)
    lines: list[str] = []
    try:
        assert process.stdout
        for line in process.stdout:
            lines.append(line)
            if line.startswith("curl"):
                break
        assert "callers need a key, 1 key is in use)" in lines[-2], lines
        url = re.findall(r"https://127\.0\.0\.1:\d+", lines[-2])[0]
        context = check_tls(str(certificate), str(private)).client_context()  # type: ignore[union-attr]
        shown = subprocess.run(["sh", "-c", lines[-1]], capture_output=True, text=True, env=os.environ | {"KEY": word})
        assert 0 <= json.loads(shown.stdout)["predictions"][0]["probability"] <= 1
        assert shlex.split(lines[-1])[0] == "curl" and word not in "".join(lines)
        statuses = {path: ask(url + path, word, context) for path in ("/model", "/metrics", "/docs.json", "/readyz")}
        assert statuses == {"/model": 200, "/metrics": 403, "/docs.json": 403, "/readyz": 200}
        assert [ask(url + path, context=context) for path in ("/model", "/livez")] == [401, 200]
        with pytest.raises(OSError):
            ask(url.replace("https", "http") + "/livez")
        assert main(["keys", "revoke", "shop", "--project", str(project)]) == 0
        deadline = time.monotonic() + 60
        while ask(url + "/model", word, context) == 200 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert ask(url + "/model", word, context) == 401
        process.terminate()
        assert process.wait(60) == 0
    finally:
        process.terminate()  # it ends the service that it started; killed, it could not
        try:
            process.wait(60)
        finally:
            process.kill()
            process.wait()
        if process.stdout:
            process.stdout.close()
        (project / ".ekiben" / "keys.json").unlink()


@pytest.mark.parametrize(("host", "expected"), [("0.0.0.0", 401), ("127.0.0.1", 200)])
def test_a_bento_without_keys_answers_only_where_nobody_else_can_reach_it(project: Path, host: str, expected: int) -> None:
    tag = Served.from_json(Served.path(project).read_bytes()).bento
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    keys = project / "mounted" / "keys.json"
    process: Any = start_bento(tag, host, port, service=ServiceOptions(keys=str(keys)))
    url = f"http://127.0.0.1:{port}"
    try:
        wait_ready(url, process)
        assert [ask(url + path) for path in ("/model", "/docs.json", "/")] == [expected] * 3
        _, word = add_key(keys, f"made-{expected}", ["observe"])
        deadline = time.monotonic() + 60
        while ask(url + "/model", word) != 200 or ask(url + "/model") != 401:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert [ask(url + path, word) for path in ("/metrics", "/docs.json", "/")] == [200, 403, 403]
    finally:
        stop_process(process)
        keys.unlink(missing_ok=True)
