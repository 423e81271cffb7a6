"""The built Bento: it answers over HTTP as the pipeline does, also when it was exported and knows nothing of the project."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import msgspec
import pytest
from bundles import make_columns, make_project
from tiny import hear_ctrl_c

from ekiben.bento import build_bento
from ekiben.errors import IntegrityError, ServiceError, UsageError
from ekiben.serving.bundle import Lineage, load_bundle, stamp_bundle
from ekiben.serving.journal.journal import read_journal
from ekiben.serving.run import check_host, check_port, find_served, start_bento, stop_process, wait_ready
from ekiben.serving.served import Served, bento_folder, is_whole

SERVICE = Path(__file__).resolve().parents[1] / "bentos" / "scorer" / "service.py"
TRAINING = {"pandas", "sklearn", "mlflow", "optuna", "lightgbm", "scipy", "pyarrow", "fairlearn", "shap", "matplotlib"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def ask(url: str, path: str, body: object = None) -> tuple[int, dict]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A project, its Bento, and a store of its own."""
    home = tmp_path_factory.mktemp("bentos")
    before = os.environ.get("BENTOML_HOME")
    os.environ["BENTOML_HOME"] = str(home / "bentoml")
    project = make_project(home / "made", rows=2000, lineage=Lineage(run_id="20260101-120000-aaaa", git="c" * 40))
    bundle = stamp_bundle(project.bundle.folder, home / "stamped", version="3", mlflow_run="m1")
    yield project, build_bento(bundle, SERVICE), home
    os.environ.pop("BENTOML_HOME") if before is None else os.environ.update(BENTOML_HOME=before)


@pytest.fixture(scope="module")
def served(built):
    """The Bento, answering; gives its address and its journal."""
    _project, bento, home = built
    port = free_port()
    process = start_bento(bento.tag, "127.0.0.1", port, journal=home / "journal")
    url = f"http://127.0.0.1:{port}"
    try:
        wait_ready(url, process)
        yield url, home / "journal"
    finally:
        stop_process(process)


def test_the_same_bundle_is_the_same_bento(built):
    project, bento, home = built
    again = build_bento(stamp_bundle(project.bundle.folder, home / "again", version="3", mlflow_run="m1"), SERVICE)
    assert (bento.is_new, again.is_new, again.tag) == (True, False, bento.tag)
    assert bento.tag.startswith("census:v3-")


def test_labels_lead_back_to_run_version_and_commit(built):
    project, bento, _ = built
    labels = msgspec.yaml.decode((bento_folder(bento.tag) / "bento.yaml").read_bytes())["labels"]
    assert labels["ekiben.run"] == "20260101-120000-aaaa" and labels["ekiben.git"] == "c" * 40
    assert (labels["ekiben.model"], labels["ekiben.version"], labels["ekiben.mlflow_run"]) == ("census", "3", "m1")
    assert labels["ekiben.digest"] == project.bundle.digest


def test_the_bento_asks_for_little(built):
    _, bento, _ = built
    lines = (bento_folder(bento.tag) / "env" / "python" / "requirements.txt").read_text().split()
    names = {line.split("==")[0] for line in lines if "==" in line}
    assert names >= {"bentoml", "cryptography", "httptools", "lightgbm", "msgspec", "numpy", "prometheus-client", "pyarrow", "uvloop"}
    assert not names & {"pandas", "scikit-learn", "skops", "mlflow", "optuna", "fairlearn", "matplotlib", "nbdev", "papermill"}
    assert all("==" in line for line in lines), "what it needs in turn has a version too"


def test_every_row_over_http_equals_the_pipeline(built, served):
    project, bento, _ = built
    fresh = make_columns(4000, seed=21)
    rows, expected = fresh.to_rows(), project.predict(fresh)
    for start in range(0, 4000, 1000):
        status, said = ask(served[0], "/predict", {"rows": rows[start : start + 1000]})
        assert status == 200 and said["model"] == {"name": "census", "version": "3", "bento": bento.tag}
        assert [p["probability"] for p in said["predictions"]] == expected[start : start + 1000].tolist()
    alone = [ask(served[0], "/predict", {"rows": [row]})[1]["predictions"][0]["probability"] for row in rows[:50]]
    assert alone == expected[:50].tolist()


def test_the_routes_are_ours_and_the_rest_is_bentomls(served):
    url, _ = served
    assert ask(url, "/livez")[1] == {"status": "alive"}
    assert ask(url, "/readyz")[1]["self_test"] == 4
    assert ask(url, "/model")[1]["lineage"]["run_id"] == "20260101-120000-aaaa"
    assert ask(url, "/openapi.json")[1]["openapi"] == "3.1.0"
    status, problem = ask(url, "/predict", {"rows": [{"age": "x"}]})
    assert status == 422 and problem["errors"][0]["row"] == 0
    with urllib.request.urlopen(url + "/metrics") as answer:
        assert b"ekiben_request_seconds_bucket" in answer.read()
    with urllib.request.urlopen(url + "/docs.json") as answer:
        assert answer.status == 200


def test_what_was_answered_is_in_the_journal(built, served):
    url, folder = served
    row = make_columns(1, seed=22).to_rows()[0]
    said = ask(url, "/predict", {"rows": [row]})[1]["predictions"][0]
    assert ask(url, "/feedback", {"id": said["id"], "label": "yes"})[0] == 200
    events = [e["event"] for e in read_journal(folder) if e["id"] == said["id"]]
    assert events == ["prediction", "feedback"]


def test_the_serving_code_in_the_bento_needs_no_project_and_no_training_library(built, tmp_path):
    _project, bento, _ = built
    source = bento_folder(bento.tag) / "src"
    program = f"""
import sys
sys.path.insert(0, {str(source)!r})
from pathlib import Path
import ekiben
assert ekiben.__file__.startswith({str(source)!r}), ekiben.__file__
from ekiben.serving.http.app import State
state = State()
state.open(Path({str(source / "bundle")!r}))
print(sorted({TRAINING!r} & set(sys.modules)), state.model["version"])
"""
    done = subprocess.run([sys.executable, "-B", "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[] 3"


@pytest.mark.slow
def test_an_exported_bento_holds_all_it_needs_and_serves(built, tmp_path):
    project, bento, _ = built
    subprocess.run(
        [sys.executable, "-m", "bentoml", "export", bento.tag, str(tmp_path / "census.bento")], check=True, capture_output=True
    )
    unpacked = tmp_path / "unpacked"
    unpacked.mkdir()
    subprocess.run(["tar", "xf", str(tmp_path / "census.bento"), "-C", str(unpacked)], check=True)
    load_bundle(unpacked / "src" / "bundle")
    port = free_port()
    environment = {**os.environ, "BENTOML_HOME": str(tmp_path / "empty"), "BENTOML_DO_NOT_TRACK": "True"}
    command = [sys.executable, "-m", "bentoml", "serve", str(unpacked), "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        wait_ready(f"http://127.0.0.1:{port}", process)
        fresh = make_columns(20, seed=23)
        said = ask(f"http://127.0.0.1:{port}", "/predict", {"rows": fresh.to_rows()})[1]
        assert [p["probability"] for p in said["predictions"]] == project.predict(fresh).tolist()
        row = {"id": said["predictions"][0]["id"], "label": "yes"}
        assert ask(f"http://127.0.0.1:{port}", "/feedback", row)[0] == 501, "no journal was asked for"
    finally:
        stop_process(process)


def make_served(root: Path, built) -> None:
    project, bento, _ = built
    (root / "settings.ini").write_text("[columns]\ntarget = target\n")
    (root / "nbs" / "pipeline").mkdir(parents=True, exist_ok=True)
    Served.path(root).parent.mkdir(exist_ok=True)
    served = Served(bento=bento.tag, name="census", version="3", digest=project.bundle.digest)
    Served.path(root).write_bytes(served.to_json())


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_serve_says_how_to_ask_and_ends_in_order(built, tmp_path, signum, code):
    make_served(tmp_path, built)
    port = free_port()
    program = (
        "import sys; from pathlib import Path; from ekiben.serving.run import serve; "
        f"sys.exit(serve(Path({str(tmp_path)!r}), port={port}, say=lambda t: print(t, flush=True)))"
    )
    command = [sys.executable, "-c", program]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=hear_ctrl_c)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("curl"):
            break
    done = subprocess.run(shlex.split(lines[-1]), capture_output=True, text=True)
    assert 0 <= json.loads(done.stdout)["predictions"][0]["probability"] <= 1
    process.send_signal(signum)
    try:
        assert process.wait(30) == code
    finally:
        process.kill()
        process.stdout.close()
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return
        time.sleep(0.1)
    raise AssertionError("something still listens")


def test_what_cannot_be_served_is_said_in_one_line(built, tmp_path):
    with pytest.raises(UsageError, match="ekiben run"):
        find_served(tmp_path)
    make_served(tmp_path, built)
    assert find_served(tmp_path)[0].version == "3"
    served = Served.from_json(Served.path(tmp_path).read_bytes())
    Served.path(tmp_path).write_bytes(msgspec.structs.replace(served, digest="0" * 64).to_json())
    with pytest.raises(IntegrityError, match="another bundle"):
        find_served(tmp_path)
    Served.path(tmp_path).write_bytes(msgspec.structs.replace(served, bento="census:v9-none").to_json())
    with pytest.raises(ServiceError, match="BENTOML_HOME"):
        find_served(tmp_path)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "192.168.1.2"])
def test_other_machines_are_not_let_in_without_keys(host):
    with pytest.raises(UsageError, match="no keys"):
        check_host(host)


def test_loopback_and_free_ports_are_taken():
    assert check_host("localhost") == check_host("") == "127.0.0.1"
    assert check_host("::1") == "::1" and check_host("127.0.0.2") == "127.0.0.2"
    assert check_port("127.0.0.1", 0) > 0
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ServiceError, match=rf"port {port} .* --port \d+"):
            check_port("127.0.0.1", port)


def test_a_changed_file_in_the_bento_stops_the_service(built, tmp_path):
    _project, bento, _ = built
    model = bento_folder(bento.tag) / "src" / "bundle" / "model" / "booster.txt"
    raw = model.read_bytes()
    try:
        model.write_bytes(raw.replace(b"leaf_value=", b"leaf_value= ", 1))
        assert not is_whole(bento.tag)
        process = start_bento(bento.tag, "127.0.0.1", port := free_port())
        try:
            with pytest.raises(ServiceError):
                wait_ready(f"http://127.0.0.1:{port}", process, 15)
        finally:
            stop_process(process)
    finally:
        model.write_bytes(raw)
    assert is_whole(bento.tag)
