"""What is served was signed by somebody the operator trusts, and has not changed by one byte since."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
from bundles import make_columns, make_project

import ekiben.commands.security  # noqa: F401  its commands are part of the program
from ekiben.bento import build_bento, executed_notebooks
from ekiben.cli import main
from ekiben.errors import IntegrityError, ServiceError, SettingsError, UsageError
from ekiben.runs import Layout, StepResult
from ekiben.serving.http.app import State
from ekiben.serving.bundle import load_bundle, stamp_bundle
from ekiben.serving.inspection import find_signed, inspect
from ekiben.serving.security.integrity import MANIFEST, SIGNATURE, describe_folder, open_folder, seal_folder
from ekiben.serving.run import find_served, start_bento, stop_process, trust_of, wait_ready
from ekiben.serving.served import Served, is_whole
from ekiben.serving.security.signer import Signer, key_path, list_keys, revoke_key, rotate_key, sign_folder, signing_key, trust_key
from ekiben.serving.security.signing import admit, check_signature, verify_folder
from ekiben.serving.security.trust import key_id, read_key, trusted_keys, write_key

SERVICE = Path(__file__).resolve().parents[1] / "bentos" / "scorer" / "service.py"


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A person who has no keys yet."""
    monkeypatch.setenv("EKIBEN_CONFIG", str(tmp_path / "config"))
    return tmp_path / "config"


@pytest.fixture
def signer(home) -> Signer:
    return signing_key(say=str)


@pytest.fixture
def folder(tmp_path, signer) -> Path:
    """A signed folder with files of several kinds."""
    place = tmp_path / "bundle"
    seal_folder(place, {"card.md": b"# A model\n", "model/booster.txt": b"tree\n" * 50, "empty.json": b"", "code/ü.py": b"x = 1\n"})
    sign_folder(place, signer, kind="bundle", name="hiring 3")
    return place


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A Bento with a report in it, in a store of its own, signed by a person of its own."""
    top = tmp_path_factory.mktemp("signed")
    patch = pytest.MonkeyPatch()
    patch.setenv("BENTOML_HOME", str(top / "bentoml"))
    patch.setenv("EKIBEN_CONFIG", str(top / "config"))
    project = make_project(top / "made")
    note = Layout(top).report("20260101-120000-aaaa") / "02_tune.ipynb"
    note.parent.mkdir(parents=True)
    cell = {"cell_type": "markdown", "id": "a", "metadata": {}, "source": "# How it was tuned"}
    note.write_text(json.dumps({"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    result = StepResult(step="tune", run_id="20260101-120000-aaaa", started="2026-01-01")
    said: list[str] = []
    report = executed_notebooks(top, [result])
    bundle = stamp_bundle(project.bundle.folder, top / "stamped", version="3")
    fact = build_bento(bundle, SERVICE, report=report, say=said.append)
    assert fact.is_new
    yield fact, lambda: build_bento(bundle, SERVICE, report=report, say=said.append), said, top
    patch.undo()


def flip(path: Path) -> bytes:
    """Change one bit in the middle of a file; give back what it was."""
    raw = path.read_bytes()
    at = len(raw) // 2
    path.chmod(0o644)
    path.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :] if raw else b"\0")
    return raw


def files_of(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def problem(folder: Path, **expected: str) -> tuple[object, object]:
    with pytest.raises(IntegrityError) as caught:
        verify_folder(folder, trusted_keys(), **expected)
    return caught.value.file, caught.value.problem


# ---- a signed folder


def test_what_was_signed_is_verified_and_said(folder, signer):
    seal = verify_folder(folder, trusted_keys(), kind="bundle", name="hiring 3")
    assert (seal.kind, seal.name, seal.key, seal.files) == ("bundle", "hiring 3", signer.id, 4)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", seal.signed)
    assert seal.to_dict()["state"] == "verified"


def test_a_bit_in_any_byte_of_any_file_is_noticed_and_named(folder):
    for name in files_of(folder):
        path = folder / name
        raw = path.read_bytes()
        for at in range(len(raw)) if len(raw) < 800 else (0, len(raw) // 2, len(raw) - 1):
            for bit in (1, 64):
                path.write_bytes(raw[:at] + bytes([raw[at] ^ bit]) + raw[at + 1 :])
                file, what = problem(folder)
                # A flip in the signature's own words may make it speak of another key, or be no signature at all.
                assert file == name or (name == SIGNATURE and file == SIGNATURE), (name, at)
                assert what in ("changed", "untrusted")
        path.write_bytes(raw)
    verify_folder(folder, trusted_keys())


def test_white_space_in_the_signature_is_a_change_too(folder):
    path = folder / SIGNATURE
    path.write_bytes(path.read_bytes() + b"\n")
    assert problem(folder) == (SIGNATURE, "changed")


@pytest.mark.parametrize("extra", ["new.py", "code/__pycache__/ü.cpython-311.pyc", ".hidden", "model/deep/er"])
def test_an_added_file_is_named(folder, extra):
    (folder / extra).parent.mkdir(parents=True, exist_ok=True)
    (folder / extra).write_text("x")
    assert problem(folder) == (extra, "added")


def test_a_missing_file_is_named(folder):
    for name in files_of(folder):
        raw = (folder / name).read_bytes()
        (folder / name).unlink()
        assert problem(folder) == (name, "missing")
        (folder / name).write_bytes(raw)


def test_the_signature_of_another_folder_does_not_hold(folder, signer, tmp_path):
    other = tmp_path / "other"
    seal_folder(other, {"card.md": b"# Another\n"})
    sign_folder(other, signer, kind="bundle", name="hiring 3")
    shutil.copy(other / SIGNATURE, folder / SIGNATURE)
    assert problem(folder) == (MANIFEST, "changed")


def test_a_manifest_made_again_without_the_key_does_not_hold(folder):
    (folder / "card.md").write_bytes(b"# A worse model\n")
    signature = (folder / SIGNATURE).read_bytes()
    (folder / SIGNATURE).unlink()
    files = open_folder_unchecked(folder)
    seal_folder(folder, files)
    assert problem(folder) == (SIGNATURE, "missing")
    (folder / SIGNATURE).write_bytes(signature)
    assert problem(folder) == (MANIFEST, "changed")
    said = json.loads(signature)
    said["manifest"] = hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
    (folder / SIGNATURE).write_bytes(json.dumps(said, indent=2, sort_keys=True).encode())
    assert problem(folder) == (SIGNATURE, "changed")


def open_folder_unchecked(folder: Path) -> dict[str, bytes]:
    return {n: (folder / n).read_bytes() for n in files_of(folder) if n not in (MANIFEST, SIGNATURE)}


@pytest.mark.parametrize("field", ["key", "kind", "name", "signed", "manifest"])
def test_no_word_of_the_statement_can_be_changed(folder, signer, field):
    said = json.loads((folder / SIGNATURE).read_bytes())
    said[field] = "0" * len(said[field])
    (folder / SIGNATURE).write_bytes(json.dumps(said, indent=2, sort_keys=True).encode())
    assert problem(folder) == (SIGNATURE, "untrusted" if field == "key" else "changed")


def test_a_strangers_key_does_not_become_trusted_by_lying_in_the_folder(folder, home, tmp_path, monkeypatch):
    mine = trusted_keys()
    monkeypatch.setenv("EKIBEN_CONFIG", str(tmp_path / "stranger"))
    stranger = signing_key(say=str)
    sign_folder(folder, stranger, kind="bundle", name="hiring 3")
    with pytest.raises(IntegrityError, match=f"{stranger.id}, which is not trusted") as caught:
        verify_folder(folder, mine)
    assert caught.value.problem == "untrusted" and caught.value.key == stranger.id


def test_a_genuine_folder_in_the_place_of_another_is_refused(folder):
    assert problem(folder, kind="bento") == (SIGNATURE, "another")
    assert problem(folder, name="hiring 4") == (SIGNATURE, "another")


@pytest.mark.parametrize("broken", [b"", b"{}", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"signature": 1}'])
def test_a_signature_or_manifest_that_is_none_is_said_in_one_line(folder, broken):
    for name in (SIGNATURE, MANIFEST):
        raw = (folder / name).read_bytes()
        (folder / name).write_bytes(broken)
        assert problem(folder) == (name, "changed")
        (folder / name).write_bytes(raw)


def test_names_that_lead_out_of_the_folder_are_refused(tmp_path, signer):
    place = tmp_path / "b"
    seal_folder(place, {"a": b""})
    for name in ("../a", "/etc/passwd", "x/../../a", "a//b", "./a", "c\\d"):
        (place / MANIFEST).write_text(json.dumps({"files": {name: {"size": 0, "sha256": "0"}}, "format": 1}))
        with pytest.raises(IntegrityError, match="not a path inside"):
            open_folder(place)


# ---- files that are not plain files


@pytest.mark.parametrize("name", ["card.md", MANIFEST, SIGNATURE])
def test_a_link_is_not_followed_even_to_the_same_bytes(folder, tmp_path, name):
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    assert problem(folder) == (name, "changed")


def test_a_linked_folder_is_named(folder, tmp_path):
    (folder / "model").rename(tmp_path / "model")
    (folder / "model").symlink_to(tmp_path / "model")
    assert problem(folder) == ("model", "added")


def test_a_pipe_is_named_and_not_waited_for(folder):
    (folder / "card.md").unlink()
    os.mkfifo(folder / "card.md")
    assert problem(folder) == ("card.md", "changed")


def test_the_mode_of_a_file_is_not_what_was_signed_but_it_must_be_readable(folder):
    (folder / "card.md").chmod(0o400)
    (folder / "model" / "booster.txt").chmod(0o755)
    verify_folder(folder, trusted_keys())
    if os.geteuid() == 0:
        pytest.skip("root can read everything")
    (folder / "card.md").chmod(0)
    assert problem(folder) == ("card.md", "unreadable")


def test_a_huge_file_is_signed_and_verified_in_flat_memory(tmp_path, signer):
    place = tmp_path / "huge"
    place.mkdir()
    with (place / "model.bin").open("wb") as file:
        file.truncate(400_000_000)
    tracemalloc.start()
    sign_folder(place, signer, kind="bundle", name="huge")
    assert verify_folder(place, trusted_keys()).files == 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5_000_000
    with (place / "model.bin").open("r+b") as file:
        file.seek(399_999_999)
        file.write(b"\1")
    assert problem(place) == ("model.bin", "changed")


def test_what_is_damaged_is_not_signed(folder, signer):
    (folder / "card.md").write_bytes(b"# Damaged\n")
    with pytest.raises(IntegrityError, match=r"card\.md"):
        sign_folder(folder, signer, kind="bundle", name="hiring 3")


# ---- keys


def test_the_pair_is_made_once_kept_to_its_owner_and_outside_the_project(home):
    said: list[str] = []
    first = signing_key(say=said.append)
    assert signing_key(say=said.append).id == first.id
    assert len(said) == 1 and str(key_path()) in said[0] and "\n" not in said[0]
    assert key_path() == home / "keys" / "signing.key"
    assert stat.S_IMODE(key_path().stat().st_mode) == 0o600
    assert key_path().read_text().startswith("-----BEGIN PRIVATE KEY-----")
    assert base64.b64encode(first.private.private_bytes_raw()).decode() not in "".join(said)
    assert list(trusted_keys().keys) == [first.id]


def test_two_processes_that_need_the_first_key_at_once_get_the_same(home):
    program = "from ekiben.serving.security.signer import signing_key; print(signing_key(say=str).id)"
    started = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(4)]
    assert {p.communicate()[0].strip() for p in started} == {signing_key(say=str).id}
    assert len(trusted_keys().keys) == 1


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o666])
def test_a_private_half_that_others_can_read_is_not_used(signer, mode):
    key_path().chmod(mode)
    with pytest.raises(SettingsError, match="chmod 600"):
        signing_key(say=str)


def test_a_trusted_key_that_everybody_can_write_is_not_believed(signer, home):
    (home / "trusted" / f"{signer.id}.pub").chmod(0o666)
    with pytest.raises(SettingsError, match="everybody"):
        trusted_keys()


def test_a_key_named_by_the_environment_must_be_there_and_be_a_key(home, tmp_path, monkeypatch):
    monkeypatch.setenv("EKIBEN_SIGNING_KEY", str(tmp_path / "ci.key"))
    with pytest.raises(SettingsError, match=r"ci\.key.*ekiben keys signing"):
        signing_key(say=str)
    (tmp_path / "ci.key").write_text("no key")
    (tmp_path / "ci.key").chmod(0o600)
    with pytest.raises(SettingsError, match="no private key"):
        signing_key(say=str)
    (tmp_path / "ci.key").unlink()
    made = signing_key(make=True, say=str)
    assert made.path == tmp_path / "ci.key" and signing_key(say=str).id == made.id


def test_a_key_of_another_kind_is_refused(home, tmp_path, monkeypatch):
    from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    raw = generate_private_key(SECP256R1()).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (tmp_path / "ec.key").write_bytes(raw)
    (tmp_path / "ec.key").chmod(0o600)
    monkeypatch.setenv("EKIBEN_SIGNING_KEY", str(tmp_path / "ec.key"))
    with pytest.raises(SettingsError, match="Ed25519"):
        signing_key(say=str)


def test_a_password_locks_the_private_half(home, monkeypatch):
    monkeypatch.setenv("EKIBEN_SIGNING_PASSWORD", "correct horse")
    made = signing_key(say=str)
    assert "ENCRYPTED" in key_path().read_text()
    assert signing_key(say=str).id == made.id
    for wrong in ("", "battery staple"):
        monkeypatch.setenv("EKIBEN_SIGNING_PASSWORD", wrong)
        with pytest.raises(SettingsError, match="EKIBEN_SIGNING_PASSWORD"):
            signing_key(say=str)


def test_openssl_reads_the_pair(signer):
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is not here")
    der = subprocess.run([openssl, "pkey", "-in", str(key_path()), "-pubout", "-outform", "DER"], capture_output=True, check=True)
    assert der.stdout[-32:] == signer.public


def test_a_rolled_key_signs_and_what_the_old_one_signed_stays_good_until_it_is_revoked(folder, signer):
    old_private = key_path().read_bytes()
    newer = rotate_key()
    assert newer.id != signer.id and signing_key(say=str).id == newer.id
    assert old_private not in [p.read_bytes() for p in key_path().parent.iterdir()]
    assert verify_folder(folder, trusted_keys()).key == signer.id
    assert [(k.id, k.state) for k in list_keys()] == [(newer.id, "signs"), (signer.id, "trusted")]
    assert revoke_key(signer.id[:8]) == signer.id
    assert problem(folder) == (SIGNATURE, "revoked")
    sign_folder(folder, newer, kind="bundle", name="hiring 3")
    assert verify_folder(folder, trusted_keys()).key == newer.id


def test_a_revoked_key_is_trusted_nowhere_on_this_machine_and_signs_nothing(folder, signer, home, monkeypatch):
    rotate_key()
    revoke_key(signer.id)
    for variable in ("", signer.word):
        monkeypatch.setenv("EKIBEN_TRUSTED_KEYS", variable)
        with pytest.raises(IntegrityError):
            verify_folder(folder, trusted_keys((signer.word,)).plus(signer.public))
    monkeypatch.delenv("EKIBEN_TRUSTED_KEYS")
    with pytest.raises(IntegrityError, match="revoked"):
        trust_key(signer.word)
    current = signing_key(say=str).id
    revoke_key(current)
    with pytest.raises(IntegrityError, match="--rotate"):
        signing_key(say=str)
    rotate_key()
    assert signing_key(say=str).id not in (signer.id, current)


def test_revoking_needs_a_name_that_means_one_key(signer):
    for unclear in ("", "zz", "\0"):
        with pytest.raises(UsageError, match=signer.id):
            revoke_key(unclear)


def test_the_operator_says_who_is_trusted_in_each_of_the_ways(folder, signer, tmp_path, monkeypatch):
    monkeypatch.setenv("EKIBEN_CONFIG", str(tmp_path / "empty"))
    with pytest.raises(IntegrityError, match="no signer is trusted"):
        verify_folder(folder, trusted_keys())
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "team.pub").write_text(f"# the team\n\n{signer.word} since spring\n")
    stranger = write_key(bytes(32))
    for variable in (signer.word, f"{stranger}, {signer.word}", str(tmp_path / "keys"), str(tmp_path / "keys" / "team.pub")):
        monkeypatch.setenv("EKIBEN_TRUSTED_KEYS", variable)
        assert verify_folder(folder, trusted_keys()).key == signer.id
    monkeypatch.setenv("EKIBEN_TRUSTED_KEYS", stranger)
    assert list(trusted_keys((signer.word,)).keys) == [key_id(bytes(32))], "the variable is all that counts"
    monkeypatch.delenv("EKIBEN_TRUSTED_KEYS")
    (tmp_path / "settings.ini").write_text("[columns]\ntarget = y\n[serve]\ntrusted_keys = keys/team.pub\n")
    (tmp_path / "nbs" / "pipeline").mkdir(parents=True)
    assert verify_folder(folder, trust_of(tmp_path)).key == signer.id
    assert trust_key(str(tmp_path / "keys" / "team.pub")) == [signer.id]
    assert verify_folder(folder, trusted_keys()).key == signer.id


@pytest.mark.parametrize("wrong", ["ed25519:", "ed25519:AAAA", "ed25519:" + "!" * 44, "/no/such/file.pub", "rsa:AAAA"])
def test_a_trusted_key_that_is_none_is_said_and_not_passed_over(home, monkeypatch, wrong):
    monkeypatch.setenv("EKIBEN_TRUSTED_KEYS", wrong)
    with pytest.raises(SettingsError):
        trusted_keys()


def test_a_public_key_is_one_word_that_reads_back():
    raw = bytes(range(32))
    assert read_key(write_key(raw)) == raw and " " not in write_key(raw) and len(key_id(raw)) == 16


# ---- bundles and the service's state


def test_a_service_that_asks_for_a_signature_gets_one_or_nothing(tmp_path, signer):
    bundle = make_project(tmp_path).bundle
    state = State()
    state.trust = trusted_keys()
    with pytest.raises(IntegrityError, match="not signed"):
        state.open(bundle.folder)
    assert state.scorer is None and "not signed" in state.why
    sign_folder(bundle.folder, signer, kind="bundle", name="census")
    state.open(bundle.folder)
    said = json.loads(state.documents["ready"])["signature"]
    assert said == {"state": "verified", **{k: said[k] for k in ("signed",)}, "kind": "bundle", "name": "census", "key": signer.id, "files": 12}
    for name in files_of(bundle.folder):
        raw = flip(bundle.folder / name)
        fresh = State()
        fresh.trust = state.trust
        with pytest.raises(IntegrityError, match=re.escape(name)):
            fresh.open(bundle.folder)
        assert fresh.scorer is None
        (bundle.folder / name).write_bytes(raw)


def test_a_signed_bundle_is_still_the_same_bundle(tmp_path, signer):
    bundle = make_project(tmp_path).bundle
    before = load_bundle(bundle.folder)
    sign_folder(bundle.folder, signer, kind="bundle", name="census")
    after = load_bundle(bundle.folder, trusted_keys())
    assert after.digest == before.digest and after.files == before.files
    assert SIGNATURE not in after.files and before.seal is None and after.seal.key == signer.id


# ---- Bentos


def test_all_of_a_bento_is_signed_with_model_code_schema_card_and_report(built):
    fact, _, said, _ = built
    folder = Path(fact.folder)
    seal, manifest = check_signature(folder, trusted_keys())
    names = set(manifest.files)
    assert names == set(files_of(folder)) - {MANIFEST, SIGNATURE, "env/docker/Dockerfile"}
    assert {"bento.yaml", "README.md", "env/python/requirements.txt", "env/docker/entrypoint.sh", "src/service.py"} <= names
    assert {f"src/bundle/{n}" for n in ("model/booster.txt", "schema.json", "card.md", "code/pipeline/prepare.py")} <= names
    assert {"src/ekiben/serving/http/app.py", "src/report/02_tune.html", "src/report/index.html"} <= names
    assert "How it was tuned" in (folder / "src" / "report" / "02_tune.html").read_text()
    assert (seal.kind, seal.name, seal.key) == ("bento", fact.tag, fact.key)
    assert len(said) == 1 and "made the signing key" in said[0]


def test_the_private_half_and_the_way_to_it_are_nowhere_in_the_bento(built):
    fact, _, _, top = built
    private = signing_key(say=str).private.private_bytes_raw()
    words = [private, base64.b64encode(private), private.hex().encode(), b"BEGIN PRIVATE KEY", str(top / "config").encode()]
    for name in files_of(Path(fact.folder)):
        raw = (Path(fact.folder) / name).read_bytes()
        assert not any(word in raw for word in words), name


def test_the_verifier_runs_before_anything_else_of_the_bento(built):
    fact, *_ = built
    source = Path(fact.folder) / "src"
    program = f"""
import sys
sys.path.insert(0, {str(source)!r})
sys.dont_write_bytecode = True
import ekiben.serving.security.signing as signing
loaded = sorted(n for n in sys.modules if n.split(".")[0] in ("ekiben", "numpy", "msgspec", "cryptography"))
print(loaded)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    parts = ("", ".errors", ".serving", ".serving.security", ".serving.security.integrity", ".serving.security.signing", ".serving.security.trust")
    assert done.stdout.strip() == str([f"ekiben{part}" for part in parts])


def test_no_service_starts_with_one_bit_changed_in_any_signed_file(built, tmp_path):
    """Each start is a real import of the service in a process of its own, forked where BentoML is imported already."""
    fact, *_ = built
    copy = tmp_path / "bento"
    shutil.copytree(fact.folder, copy)
    program = r"""
import contextlib, io, os, sys
from pathlib import Path
import bentoml, numpy, msgspec
from cryptography.hazmat.primitives.asymmetric import ed25519
top = Path(sys.argv[1])
sys.path.insert(0, str(top / "src"))
sys.dont_write_bytecode = True

def start():
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        said = "served"
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                import service
                service.STATE.trust = service.trusted_keys()
                service.STATE.open(top / "src" / "bundle")
        except BaseException as exc:
            said = f"{type(exc).__name__}: {exc}".splitlines()[0]
        os.write(write, said.encode()[:2000])
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        said = pipe.read().decode()
    os.waitpid(child, 0)
    return said or "died"

print("whole", start(), sep="\t")
for path in sorted(p for p in top.rglob("*") if p.is_file()):
    name = path.relative_to(top).as_posix()
    if name == "env/docker/Dockerfile":
        continue
    raw = path.read_bytes()
    at = len(raw) // 2
    path.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1:] if raw else b"\0")
    print(name, start(), sep="\t")
    path.write_bytes(raw)
print("whole", start(), sep="\t")
"""
    done = subprocess.run([sys.executable, "-c", program, str(copy)], capture_output=True, text=True, check=True)
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert lines[0] == lines[-1] == ["whole", "served"]
    starts = dict(lines[1:-1])
    assert set(starts) == set(files_of(copy)) - {"env/docker/Dockerfile"} and len(starts) > 60
    assert not [name for name, said in starts.items() if said == "served"]
    unnamed = [name for name, said in starts.items() if name not in said]
    # Only what runs before the check can fail in another way than by being named.
    first = ("service", "ekiben/__init__", "ekiben/errors", "serving/__init__", "integrity", "signing", "trust", "signature.json")
    assert [name for name in unnamed if not any(part in name for part in first)] == []


def test_a_bento_by_hand_is_admitted_only_whole(built, tmp_path, monkeypatch):
    fact, *_ = built
    source = Path(fact.folder) / "src"
    assert admit(source).name == fact.tag
    assert admit(SERVICE.parent) is None, "the folder that a Bento is built from is none yet"
    (source / "evil.py").write_text("")
    with pytest.raises(SystemExit, match=r"error: not served: .*src/evil\.py"):
        admit(source)
    (source / "evil.py").unlink()
    monkeypatch.setenv("EKIBEN_CONFIG", str(tmp_path))
    with pytest.raises(SystemExit, match=r"^error: not served: no signer is trusted here[^\n]*$"):
        admit(source)


def test_only_a_whole_bento_is_taken_again_and_a_damaged_one_is_built_and_signed_anew(built):
    fact, build, *_ = built
    assert is_whole(fact.tag)
    page = Path(fact.folder) / "README.md"
    flip(page)
    assert not is_whole(fact.tag)
    again = build()
    assert (again.tag, again.is_new, again.key) == (fact.tag, True, fact.key)
    assert is_whole(fact.tag) and not build().is_new


def test_an_image_of_bentoml_holds_the_same_signed_files(built):
    import bentoml
    from bentoml._internal.container import construct_containerfile

    fact, *_ = built
    with construct_containerfile(bentoml.get(fact.tag)) as (context, _dockerfile):
        assert verify_folder(Path(context), trusted_keys(), kind="bento").name == fact.tag
        (Path(context) / "env" / "docker" / "setup.sh").write_text("")
        assert problem(Path(context)) == ("env/docker/setup.sh", "added")


def test_what_a_project_serves_is_verified_first(built, tmp_path):
    fact, *_ = built
    bundle = load_bundle(Path(fact.folder) / "src" / "bundle")
    Served.path(tmp_path).parent.mkdir()
    Served.path(tmp_path).write_bytes(Served(bento=fact.tag, name="census", version="3", digest=bundle.digest).to_json())
    assert find_served(tmp_path)[1].seal.key == fact.key
    yaml = Path(fact.folder) / "bento.yaml"
    raw = flip(yaml)
    with pytest.raises(IntegrityError, match=r"bento\.yaml"):
        find_served(tmp_path)
    yaml.write_bytes(raw)


@pytest.fixture
def start(built):
    """Start the Bento as `bentoml serve` does, with an environment, and give its address and process."""
    fact, *_ = built
    running = []

    def go(**environment: str):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, "-m", "bentoml", "serve", fact.folder, "--host", "127.0.0.1", "--port", str(port)]
        process = subprocess.Popen(
            command, env={**os.environ, **environment}, stderr=subprocess.STDOUT, stdout=subprocess.PIPE, start_new_session=True
        )
        running.append(process)
        return f"http://127.0.0.1:{port}", process

    yield go
    for process in running:
        stop_process(process)


def test_bentoml_serves_with_the_operators_key_and_says_who_signed(built, start, tmp_path):
    import urllib.request

    fact, *_ = built
    word = next(iter(trusted_keys().keys.values()))
    (tmp_path / "signer.pub").write_text(write_key(word))
    url, process = start(EKIBEN_CONFIG=str(tmp_path / "none"), EKIBEN_TRUSTED_KEYS=str(tmp_path / "signer.pub"))
    wait_ready(url, process)
    with urllib.request.urlopen(f"{url}/readyz") as answer:
        said = json.loads(answer.read())
    assert (said["signature"]["state"], said["signature"]["key"]) == ("verified", fact.key)
    assert (said["bento"]["name"], said["bento"]["key"]) == (fact.tag, fact.key)
    rows = json.dumps({"rows": make_columns(2, seed=1).to_rows()}).encode()
    request = urllib.request.Request(f"{url}/predict", rows, {"content-type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        assert len(json.loads(answer.read())["predictions"]) == 2
    assert is_whole(fact.tag), "serving leaves no file in the Bento"


def test_without_a_trusted_key_bentoml_does_not_serve_and_says_why(start, tmp_path):
    url, process = start(EKIBEN_CONFIG=str(tmp_path / "none"))
    with pytest.raises(ServiceError, match="ended at its start"):
        wait_ready(url, process)
    said = process.stdout.read().decode()
    assert [line for line in said.splitlines() if "error: not served: no signer is trusted here" in line]


# ---- the command line


def test_verify_says_what_was_signed_by_whom_and_when(built, capsys, tmp_path):
    fact, *_ = built
    name = fact.tag.partition(":")[0]
    for what in (fact.tag, name, f"{name}:latest", fact.folder, str(Path(fact.folder) / "src" / "bundle")):
        assert main(["verify", what]) == 0, what
        said = capsys.readouterr().out
        assert fact.key in said and "verified" in said
    raw = flip(Path(fact.folder) / "src" / "report" / "index.html")
    try:
        assert main(["verify", fact.tag]) == 1
        said = capsys.readouterr()
        assert "src/report/index.html" in said.err and "error: " in said.err
        assert main(["verify", fact.tag, "--json"]) == 1
        found = json.loads(capsys.readouterr().out)
        assert [(f["path"], f["holds"]) for f in found] == [(".", False), ("src/bundle", True)]
        assert found[0]["name"] == fact.tag and found[0]["key"] == fact.key
    finally:
        (Path(fact.folder) / "src" / "report" / "index.html").write_bytes(raw)


def test_verify_refuses_a_genuine_bento_under_another_tag(built):
    fact, *_ = built
    folder = Path(fact.folder)
    older = folder.with_name("v2-0123456789ab")
    shutil.copytree(folder, older)
    try:
        assert main(["verify", f"census:{older.name}"]) == 1
        assert main(["verify", str(older)]) == 0, "a copy by its folder is what it was signed as"
    finally:
        shutil.rmtree(older)


def test_verify_says_when_there_is_nothing_to_verify(home, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("BENTOML_HOME", str(tmp_path / "bentoml"))
    monkeypatch.chdir(tmp_path)
    assert main(["verify", "nobody:v1"]) == 1
    assert main(["verify", "no/such/folder"]) == 2
    assert main(["verify"]) == 2
    (tmp_path / "plain").mkdir()
    assert main(["verify", "plain"]) == 1
    assert "not signed" in capsys.readouterr().err
    with pytest.raises(ServiceError, match="BentoML's store"):
        find_signed("nobody", tmp_path)


def test_every_signed_folder_inside_is_verified(tmp_path, signer):
    top = tmp_path / "deployment"
    for name in ("a", "b"):
        seal_folder(top / name, {"card.md": name.encode()})
        sign_folder(top / name, signer, kind="bundle", name=name)
    sign_folder(top, signer, kind="deployment", name="live")
    assert [(i.path, i.kind, i.holds) for i in inspect(top, trusted_keys())] == [
        (".", "deployment", True), ("a", "bundle", True), ("b", "bundle", True)
    ]  # fmt: skip
    (top / "b" / "card.md").write_text("c")
    assert [i.holds for i in inspect(top, trusted_keys())] == [False, True, False]


def test_the_command_makes_lists_rolls_trusts_and_revokes_keys(home, capsys):
    assert main(["keys", "signing", "--list"]) == 0
    assert "no keys yet" in capsys.readouterr().out and not home.exists()
    assert main(["keys", "signing"]) == 0
    said = capsys.readouterr().out
    first = signing_key(say=str)
    assert str(first.path) in said and first.word in said and first.id in said
    assert main(["keys", "signing", "--rotate"]) == 0
    assert signing_key(say=str).id != first.id and signing_key(say=str).id in capsys.readouterr().out
    assert main(["keys", "signing", "--revoke", first.id]) == 0
    assert main(["keys", "signing", "--list"]) == 0
    assert re.search(rf"{first.id}\s+revoked", capsys.readouterr().out)
    other = write_key(bytes(range(32)))
    assert main(["keys", "signing", "--trust", other]) == 0
    assert key_id(bytes(range(32))) in trusted_keys().keys
    assert main(["keys", "signing", "--trust", first.word]) == 1
    assert main(["keys", "signing", "--revoke", "zz"]) == 2
    assert main(["keys", "signing", "--rotate", "--list"]) == 2


def test_describing_a_folder_leaves_nothing_out_and_follows_nothing(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_bytes(b"1")
    assert list(describe_folder(tmp_path).files) == ["a/b"]
    (tmp_path / "c").symlink_to(tmp_path / "a" / "b")
    with pytest.raises(IntegrityError, match="is a link"):
        describe_folder(tmp_path)


def test_start_bento_hands_over_whom_to_trust(built, monkeypatch):
    fact, *_ = built
    seen = {}
    monkeypatch.setattr(subprocess, "Popen", lambda command, **kwargs: seen.update(kwargs["env"]))
    trust = trusted_keys()
    start_bento(fact.tag, "127.0.0.1", 1, trust=trust)
    monkeypatch.setenv("EKIBEN_TRUSTED_KEYS", seen["EKIBEN_TRUSTED_KEYS"])
    assert trusted_keys().keys == trust.keys
