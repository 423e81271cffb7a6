"""The image: built for real, run on a read-only root by nobody in particular, asked, and stopped."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import socket
import ssl
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from bundles import make_columns, make_project
from images import Store, end, start_image, why_not
from test_tls import make_pair

from ekiben.bento import build_bento
from ekiben.image.containerfile import USER
from ekiben.image.containerize import containerize, find_backend
from ekiben.errors import IntegrityError, ServiceError, UsageError
from ekiben.image.installer import pip_settings
from ekiben.serving.bundle import Lineage, stamp_bundle
from ekiben.serving.container import serve_command
from ekiben.serving.security.issuing import add_key
from ekiben.serving.served import bento_folder
from ekiben.serving.scoring.scorer import Scorer
from ekiben.serving.security.signer import signing_key
from ekiben.serving.security.trust import write_key

SERVICE = Path(__file__).resolve().parents[1] / "bentos" / "scorer" / "service.py"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def ask(port: int, path: str, body: object = None, key: str = "", tls: ssl.SSLContext | None = None) -> tuple[int, dict]:
    headers = {"content-type": "application/json", **({"authorization": f"Bearer {key}"} if key else {})}
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{'https' if tls else 'http'}://127.0.0.1:{port}{path}", data, headers)
    try:
        with urllib.request.urlopen(request, timeout=30, context=tls) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def wait_ready(port: int, process: subprocess.Popen[str], patience_s: float = 120.0, tls: ssl.SSLContext | None = None) -> dict:
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        assert process.poll() is None, process.stdout.read()
        try:
            code, said = ask(port, "/readyz", tls=tls)
            if code == 200:
                return said
        except OSError:
            pass
        time.sleep(0.1)
    raise AssertionError("never ready")


# ------------------------------------------------------------------ without an image


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("BENTOML_HOME", str(tmp_path / "bentoml"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("EKIBEN_TRUSTED_KEYS", raising=False)
    return tmp_path


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """A PATH with nothing but tools that a test puts there."""
    folder = tmp_path / "tools"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def put(name: str, script: str = "exit 1") -> None:
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)

    return put


def test_the_first_tool_that_is_there_builds(tools):
    with pytest.raises(UsageError, match="none of docker, podman, buildah is installed"):
        find_backend()
    tools("buildah")
    assert find_backend() == "buildah"
    tools("podman")
    assert find_backend() == "podman"
    with pytest.raises(UsageError, match="`docker` is not installed"):
        find_backend("docker")


def test_folders_of_this_machine_do_not_reach_the_build():
    listed = "\n".join(
        [
            ":env:.index-url='https://token@mirror.example/simple'",
            "global.index-url='https://other.example/simple'",
            "global.extra-index-url='file:///opt/pypi https://more.example/simple'",
            "global.find-links='/opt/wheels'",
            "freeze.timeout='1'",
            "global.user='true'",
        ]
    )
    assert pip_settings(listed, {"SSL_CERT_FILE": "/ca.crt"}) == {
        "index-url": "https://token@mirror.example/simple",
        "extra-index-url": "https://more.example/simple",
        "cert": "/ca.crt",
    }


def test_what_cannot_become_an_image_is_refused(home, tools, monkeypatch):
    tools("podman")
    with pytest.raises(UsageError, match="`nobody:v1` is not in BentoML's store"):
        containerize(home, "nobody:v1")
    monkeypatch.setenv("PATH", f"{os.environ['PATH']}:/usr/bin:/bin")
    fact = build_bento(make_project(home / "made").bundle, SERVICE, say=lambda line: None)
    card = bento_folder(fact.tag) / "README.md"
    card.write_text(card.read_text() + " ")
    with pytest.raises(IntegrityError, match=r"README\.md"):
        containerize(home, fact.tag)


def test_a_build_that_fails_says_why(home, tools, monkeypatch):
    tools("podman", "echo 'error building at STEP 3: no space left on device' >&2; exit 1")
    monkeypatch.setenv("PATH", f"{os.environ['PATH']}:/usr/bin:/bin")
    fact = build_bento(make_project(home / "made").bundle, SERVICE, say=lambda line: None)
    with pytest.raises(ServiceError, match=r"podman made no image: .* no space left on device; all it said is in") as raised:
        containerize(home, fact.tag, say=lambda line: None)
    assert "no space left" in Path(str(raised.value).rpartition("`")[0].rpartition("`")[2]).read_text()


def test_the_start_refuses_what_would_open_the_service(home, tmp_path):
    keys = tmp_path / "keys.json"
    env = {"EKIBEN_SERVE__KEYS": str(keys), "BENTOML_PORT": "4000"}
    with pytest.raises(UsageError, match=r"no keys yet.*keys\.json"):
        serve_command(Path("/opt/bento"), env)
    assert serve_command(Path("/b"), {**env, "BENTOML_HOST": "127.0.0.1"})[-4:] == ["--host", "127.0.0.1", "--port", "4000"]
    add_key(keys, "caller", ["predict"])
    assert serve_command(Path("/b"), {**env, "PORT": "5000"})[-4:] == ["--host", "0.0.0.0", "--port", "5000"]
    with pytest.raises(UsageError, match="EKIBEN_SERVE__RATE_LIMIT"):
        serve_command(Path("/b"), {**env, "EKIBEN_SERVE__RATE_LIMIT": "fast"})


# ------------------------------------------------------------------ the image itself


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A project, its image, and the storage that holds it; all of it is removed at the end."""
    if why := why_not():
        pytest.skip(why)
    top = tmp_path_factory.mktemp("image")
    patch = pytest.MonkeyPatch()
    store = Store(top / "store").make()
    patch.setenv("BENTOML_HOME", str(top / "bentoml"))
    patch.setenv("XDG_CONFIG_HOME", str(top / "config"))
    patch.delenv("EKIBEN_TRUSTED_KEYS", raising=False)
    for name, text in store.environment.items():
        if name != "TMPDIR":
            patch.setenv(name, text)
    try:
        project = make_project(top / "made", lineage=Lineage(run_id="20260101-120000-aaaa", git="c" * 40))
        bundle = stamp_bundle(project.bundle.folder, top / "stamped", version="3", mlflow_run="m1")
        fact = build_bento(bundle, SERVICE, say=lambda line: None)
        base = store.make_base("localhost/ekiben-base")
        image = containerize(
            top, fact.tag, backend="buildah", tag="localhost/census:3", base=base, sbom=top / "sbom.json", audit=False,
            say=lambda line: None,
        )
        settings = top / "settings"
        (settings / "trusted").mkdir(parents=True)
        (settings / "trusted" / "us.pub").write_text(write_key(signing_key().public) + "\n")
        _, word = add_key(settings / "keys.json", "caller", ["predict", "feedback"])
        shutil.chown(settings / "keys.json", USER, USER)
        yield project, image, store, top, word
    finally:
        store.remove()
        patch.undo()


@pytest.fixture(scope="module")
def root(made):
    """The root of a container, and the image's configuration."""
    _project, image, store, _top, _word = made
    with store.mounted(image.tag) as folder:
        yield folder, store.describe(image.tag)["config"]


def inside(root, *command: str, **more) -> tuple[int, str]:
    """Run a command in the image; return its code and what it prints."""
    folder, config = root
    process = start_image(folder, config, command=command, **more)
    said, _ = process.communicate(timeout=120)
    return process.returncode, said


@pytest.mark.image
def test_it_answers_as_the_pipeline_does_and_stops_when_told(made, root):
    project, image, _store, top, word = made
    folder, config = root
    state = top / "state"
    state.mkdir()
    shutil.chown(state, USER, USER)
    port = free_port()
    process = start_image(
        folder, config, settings=top / "settings", state=state, env={"BENTOML_PORT": str(port), "EKIBEN_SERVE__DRAIN_S": "0"}
    )
    try:
        said = wait_ready(port, process)
        assert said["bento"]["name"] == image.bento and said["bento"]["state"] == "verified"
        status = Path(f"/proc/{process.pid}/status").read_text()
        assert f"Uid:\t{USER}\t{USER}" in status

        inputs = [f.name for f in project.schema.inputs]
        rows = make_columns(50, seed=7).pick(inputs).to_rows()
        code, answered = ask(port, "/predict", {"rows": rows}, key=word)
        assert code == 200
        scorer = Scorer(project.bundle)
        assert [one["probability"] for one in answered["predictions"]] == [one.probability for one in scorer.score_rows(rows)]
        assert ask(port, "/predict", {"rows": rows[:1]})[0] == 401

        env = {"BENTOML_PORT": str(port)}
        assert inside(root, *config["Healthcheck"]["Test"][1:], settings=top / "settings", env=env)[0] == 0
    finally:
        code = end(process)
    assert code == 0, process.stdout.read()
    assert any(path.stat().st_size for path in (state / "journal").rglob("*") if path.is_file())
    code, said = inside(root, *config["Healthcheck"]["Test"][1:], env={"BENTOML_PORT": str(port)})
    assert code == 1 and "not ready" in said


@pytest.mark.image
def test_over_tls_it_finishes_what_it_began_before_it_stops(made, root):
    project, _image, _store, top, word = made
    folder, config = root
    mounted = top / "settings"
    certificate, _private = make_pair(mounted, "server")
    for path in mounted.glob("server.*"):
        shutil.chown(path, USER, USER)
    state = top / "state-tls"
    state.mkdir()
    shutil.chown(state, USER, USER)
    port, drain_s = free_port(), 6.0
    env = {
        "BENTOML_PORT": str(port), "EKIBEN_SERVE__DRAIN_S": str(drain_s), "EKIBEN_SERVE__ENCRYPTION": "yes",
        "EKIBEN_SERVE__TLS_CERTIFICATE": "/etc/ekiben/server.pem", "EKIBEN_SERVE__TLS_KEY": "/etc/ekiben/server.key",
        "EKIBEN_DEPLOYMENT": "/var/lib/ekiben/deployments/production",  # nobody has deployed yet: the Bento's own bundle serves
    }  # fmt: skip
    trusted = ssl.create_default_context(cafile=str(certificate))
    rows = [row for row in make_columns(50, seed=7).pick([f.name for f in project.schema.inputs]).to_rows() if None not in row.values()]
    body = json.dumps({"rows": rows}).encode()
    head = f"POST /predict HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {word}\r\ncontent-type: application/json\r\n"
    head += f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
    process = start_image(folder, config, settings=mounted, state=state, env=env)
    try:
        wait_ready(port, process, tls=trusted)
        code, answered = ask(port, "/predict", {"rows": rows}, word, tls=trusted)
        assert code == 200
        expected = [one.probability for one in Scorer(project.bundle).score_rows(rows)]
        assert [one["probability"] for one in answered["predictions"]] == expected
        with pytest.raises(OSError):
            ask(port, "/livez")  # not without TLS
        with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
            ask(port, "/livez", tls=ssl.create_default_context())
        said = inside(root, *config["Healthcheck"]["Test"][1:], settings=mounted, env=env)
        assert said[0] == 0, said

        with trusted.wrap_socket(socket.create_connection(("127.0.0.1", port)), server_hostname="localhost") as begun:
            begun.settimeout(60)
            begun.sendall(head.encode() + body[:100])
            time.sleep(0.5)
            told = time.monotonic()
            process.send_signal(signal.SIGTERM)
            while (said := ask(port, "/readyz", tls=trusted))[0] == 200:
                assert time.monotonic() < told + drain_s, "it never said that it stops"
                time.sleep(0.05)
            assert said[0] == 503
            assert ask(port, "/livez", tls=trusted)[0] == 200
            assert inside(root, *config["Healthcheck"]["Test"][1:], settings=mounted, env=env)[0] == 1
            assert ask(port, "/predict", {"rows": rows[:1]}, word, tls=trusted)[0] == 200, "who was sent here is still answered"
            begun.sendall(body[100:])
            answer = b"".join(iter(lambda: begun.recv(65536), b""))
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert [one["probability"] for one in json.loads(answer.partition(b"\r\n\r\n")[2])["predictions"]] == expected
        assert process.wait(60) == 0, process.stdout.read()
        assert drain_s - 0.5 < time.monotonic() - told < drain_s + 30
    finally:
        end(process, 1)
    raw = b"".join(path.read_bytes() for path in (state / "journal").rglob("*") if path.is_file())
    assert b"EKJ2" in raw and (state / "journal.keys").is_file()
    assert b"Lyon" not in raw and b"probability" not in raw, "the journal is written encrypted"
    (mounted / "server.key").write_text("nothing")
    code, said = inside(root, *config["Entrypoint"], settings=mounted, env=env)
    assert code == 2 and "server.key" in said and "nothing" not in said and said.count("error:") == 1


@pytest.mark.image
def test_it_starts_only_for_who_trusts_its_signer_and_only_as_it_was_signed(made, root):
    _project, _image, _store, top, _word = made
    _folder, config = root
    assert "no signer is trusted" in inside(root, *config["Entrypoint"])[1]
    script = "import shutil, sys; shutil.copytree('/opt/bento', '/tmp/bento'); from pathlib import Path; from ekiben.serving.container import start; "
    script += "import os; p = Path('/tmp/bento/src/service.py'); p.chmod(0o644); p.write_text(p.read_text() + '#'); start(Path('/tmp/bento'), os.environ)"
    code, said = inside(root, "python3", "-c", script, settings=top / "settings")
    assert code != 0 and "src/service.py" in said


@pytest.mark.image
def test_nothing_in_it_can_be_changed_by_the_service(made, root):
    folder, _config = root
    for place in ("/opt/bento/src/new.py", "/opt/venv/new", "/etc/new", "/var/lib/ekiben/new"):
        code, said = inside(root, "sh", "-c", f"echo x > {place}")
        assert code != 0 and ("Read-only file system" in said or "Permission denied" in said), said
    assert inside(root, "sh", "-c", "echo x > /tmp/new && cat /tmp/new") == (0, "x\n")
    # Also where the root is not mounted read-only, the user may change nothing that is loaded.
    loose = [p for top in ("opt/bento", "opt/venv") for p in (folder / top).rglob("*") if not p.is_symlink()]
    assert loose and not [p for p in loose if p.stat().st_uid != 0 or p.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH)]


@pytest.mark.image
def test_it_holds_no_compiler_no_installer_and_nothing_of_the_machine_that_built_it(made, root):
    _project, image, store, _top, _word = made
    folder, config = root
    assert inside(root, "sh", "-c", "command -v python3") == (0, "/opt/venv/bin/python3\n")
    for name in ("gcc", "cc", "c++", "make", "pip", "pip3", "uv", "git"):
        assert inside(root, "sh", "-c", f"command -v {name}")[0] != 0, name
    found = {p.name.partition("-")[0] for p in (folder / "opt" / "venv").rglob("*.dist-info")}
    assert "numpy" in found
    assert not found & {"pandas", "scikit_learn", "mlflow", "optuna", "scipy", "pip", "setuptools", "matplotlib"}
    for path in ("etc/pip.conf", "run/secrets", "root/.cache", "tmp/requirements.txt"):
        place = folder / path
        assert not place.exists() or not any(place.iterdir()), path
    history = json.dumps(store.describe(image.tag)["history"])
    assert "run/secrets" not in history and "pip install" not in history
    # Neither half of the signing key, no key of a caller.
    told = write_key(signing_key().public).encode()
    assert not [p for p in (folder / "opt" / "bento").rglob("*") if p.is_file() and told in p.read_bytes()]
    assert not any((folder / "etc" / "ekiben" / "trusted").iterdir())
    assert config["User"] == f"{USER}:{USER}" and "/var/lib/ekiben" in config["Volumes"]


@pytest.mark.image
def test_labels_and_bill_of_materials_say_what_it_is(made, root):
    project, image, _store, top, _word = made
    folder, config = root
    labels = config["Labels"]
    assert labels["ekiben.bento"] == image.bento and labels["ekiben.key"] == image.key
    assert labels["ekiben.run"] == "20260101-120000-aaaa" and labels["org.opencontainers.image.revision"] == "c" * 40
    assert labels["org.opencontainers.image.version"] == "3" and labels["org.opencontainers.image.base.name"] == "localhost/ekiben-base"
    bill = (folder / "opt" / "sbom.cdx.json").read_bytes()
    assert hashlib.sha256(bill).hexdigest() == image.sbom == labels["ekiben.image.sbom"].removeprefix("sha256:")
    assert bill == (top / "sbom.json").read_bytes()
    told = json.loads(bill)
    components = {c["name"]: c for c in told["components"]}
    python = {c["purl"].removeprefix("pkg:pypi/").partition("@")[0] for c in told["components"] if "pypi" in c.get("purl", "")}
    there = {p.name.partition("-")[0].lower().replace("_", "-") for p in (folder / "opt" / "venv").rglob("*.dist-info")}
    assert python == {name.replace(".", "-") for name in there}
    assert "libgomp1" in components and components["census"]["hashes"][0]["content"] == project.bundle.digest
    pinned = (bento_folder(image.bento) / "env" / "python" / "requirements.txt").read_text()
    assert f"numpy=={components['numpy']['version']}" in pinned


def test_the_bill_of_materials_follows_its_standard():
    from datetime import UTC, datetime

    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator
    from ekiben.image.sbom import take_inventory, write_sbom

    labels = {"ekiben.model": "census", "ekiben.version": "none", "ekiben.digest": "ab" * 32}
    bill = write_sbom(take_inventory([sys.executable]), name="census:v3-ab", labels=labels, made=datetime(2026, 1, 1, tzinfo=UTC))
    try:
        assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(bill.decode()) is None
    except ImportError:
        pytest.skip("the validator needs cyclonedx-python-lib[json-validation]")
