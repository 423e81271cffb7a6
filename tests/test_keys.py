"""The keys that callers show: the file under faults and under load, and the commands that change it."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import stat
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ekiben.cli import main
from ekiben.errors import EkibenError, IntegrityError, SettingsError, UsageError
from ekiben.serving.security.issuing import add_key, revoke_key, rotate_key
from ekiben.serving.security.keys import ApiKey, KeyFile, Keys, keys_path, read_keys

NOW = datetime.now(UTC)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def states(path: Path) -> list[str]:
    return [key.state(datetime.now(UTC)) for key in read_keys(path).keys]


# The file


def test_a_key_is_long_random_and_kept_as_a_hash_that_its_owner_alone_reads(path: Path) -> None:
    key, word = add_key(path, "shop", ["feedback", "predict"])
    assert re.fullmatch(rf"ekb_{key.id}_[A-Za-z0-9_-]{{43}}", word) and key.roles == ("predict", "feedback")
    assert key.digest == hashlib.sha256(word.encode()).hexdigest() and word.split("_", 2)[2] not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len({add_key(path, f"n{i}", ["predict"])[1] for i in range(20)}) == 20


@pytest.mark.parametrize("name", ["", "a b", "-x", "x" * 65, "ä", "a\n", "0123abcd", "../x", "ekb_x"])
def test_names_are_plain(path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="name is up to 64"):
        add_key(path, name, ["predict"])
    assert not path.exists()


@pytest.mark.parametrize(("roles", "says"), [([], "got none"), (["boss"], "`boss`"), (["predict", "root"], "`root`")])
def test_roles_are_known(path: Path, roles: list[str], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        add_key(path, "shop", roles)


def test_a_name_is_in_use_once_and_free_again_after_revoking(path: Path) -> None:
    add_key(path, "shop", ["predict"])
    with pytest.raises(UsageError, match="rotate shop"):
        add_key(path, "shop", ["predict"])
    revoke_key(path, "shop")
    add_key(path, "shop", ["predict"])
    assert states(path) == ["revoked", "active"]


def test_rotating_keeps_name_roles_and_life_and_ends_the_old_key_after_its_grace(path: Path) -> None:
    old, old_word = add_key(path, "shop", ["predict", "observe"], lasts=timedelta(days=90))
    new, new_word = rotate_key(path, "shop", grace=timedelta(hours=2))
    assert (new.name, new.roles) == (old.name, old.roles) and new.expires - new.created == timedelta(days=90)
    before = read_keys(path).keys[0]
    assert before.replaced_by == new.id and timedelta(0) < before.expires - new.created < timedelta(hours=2, minutes=5)
    later = [0.0]
    os.utime(path, (1e9, 1e9))  # an old file is not read again, so that only the clock can end the key
    file = KeyFile(path, clock=lambda: time.time() + later[0])
    assert file.verify(old_word.encode()) and file.verify(new_word.encode())
    later[0] = 2 * 3600 + 1
    assert file.refresh() and file.verify(old_word.encode()) is None and file.verify(new_word.encode())
    later[0] = 91 * 86400
    assert file.refresh() and file.in_use == 0 and file.has_keys


def test_a_grace_never_makes_a_key_last_longer_and_none_ends_it_at_once(path: Path) -> None:
    old, _ = add_key(path, "a", ["predict"], lasts=timedelta(hours=1))
    rotate_key(path, "a", grace=timedelta(days=7))
    assert read_keys(path).keys[0].expires == old.expires
    add_key(path, "b", ["predict"])
    rotate_key(path, "b", grace=timedelta(0))
    assert states(path) == ["replaced", "active", "revoked", "active"]


def test_a_key_is_rotated_once_and_a_name_revokes_all_its_keys(path: Path) -> None:
    old, _ = add_key(path, "shop", ["predict"])
    new, _ = rotate_key(path, old.id)
    with pytest.raises(UsageError, match=f"replaced by {new.id}"):
        rotate_key(path, old.id)
    assert [key.id for key in revoke_key(path, "shop")] == [old.id, new.id]
    with pytest.raises(UsageError, match="there is none"):
        revoke_key(path, "shop")
    with pytest.raises(UsageError, match="revoked already"):
        revoke_key(path, old.id)
    assert all(key.digest == "" for key in read_keys(path).keys)


def test_an_id_revokes_one_key_of_a_name(path: Path) -> None:
    old, _ = add_key(path, "shop", ["predict"])
    rotate_key(path, "shop")
    revoke_key(path, old.id)
    assert states(path) == ["revoked", "active"]


def test_processes_that_add_at_once_lose_no_key(path: Path) -> None:
    code = "import sys; from pathlib import Path; from ekiben.serving.security.issuing import add_key\n"
    code += "for i in range(8): add_key(Path(sys.argv[1]), f'{sys.argv[2]}{i}', ['predict'])"
    started = [subprocess.Popen([sys.executable, "-c", code, str(path), name]) for name in "abcd"]
    assert [process.wait(120) for process in started] == [0] * 4
    assert {key.name for key in read_keys(path).keys} == {f"{name}{i}" for name in "abcd" for i in range(8)}


def test_a_damaged_file_is_not_written_over(path: Path) -> None:
    path.write_text('{"format": 1, "keys": [')
    path.chmod(0o600)
    with pytest.raises(IntegrityError, match=re.escape(str(path))):
        add_key(path, "shop", ["predict"])
    assert path.read_text() == '{"format": 1, "keys": ['


def test_what_the_operator_made_of_the_file_stays(path: Path) -> None:
    real = path.with_name("real.json")
    add_key(real, "a", ["predict"])
    path.symlink_to(real)
    real.chmod(0o640)
    add_key(path, "b", ["predict"])
    assert path.is_symlink() and stat.S_IMODE(real.stat().st_mode) == 0o640 and len(read_keys(real).keys) == 2


def key_of(**fields: object) -> dict[str, object]:
    return {"id": "0" * 8, "name": "a", "roles": ["predict"], "digest": "0" * 64, "created": "2026-01-01T00:00:00Z"} | fields


@pytest.mark.parametrize(
    "content",
    [
        "", "[]", "{}garbage", '{"format": 2, "keys": []}', '{"format": 1, "keys": [], "more": 1}',
        *(json.dumps({"format": 1, "keys": [key_of(**wrong)]}) for wrong in (
            {"id": "zz"}, {"digest": "0" * 63}, {"digest": "G" * 64}, {"roles": ["boss"]}, {"created": "2026-01-01T00:00:00"},
            {"expires": "soon"}, {"secret": "x"},
        )),
        json.dumps({"format": 1, "keys": [key_of(), key_of(name="b")]}),
    ],
)  # fmt: skip
def test_a_file_that_is_not_right_is_refused_whole(path: Path, content: str) -> None:
    path.write_text(content)
    path.chmod(0o600)
    with pytest.raises(IntegrityError, match="damaged"):
        read_keys(path)
    with pytest.raises(IntegrityError):
        KeyFile(path)


@pytest.mark.parametrize("mode", [0o602, 0o620, 0o666])
def test_a_file_that_others_can_write_is_refused(path: Path, mode: int) -> None:
    add_key(path, "a", ["predict"])
    path.chmod(mode)
    with pytest.raises(SettingsError, match="chmod go-w"):
        KeyFile(path)


# Reading while it changes


def test_a_running_service_sees_every_change(path: Path) -> None:
    file = KeyFile(path)
    assert not file.has_keys and file.verify(b"ekb_00000000_x") is None and not file.refresh()
    _, word = add_key(path, "shop", ["predict"])
    assert file.refresh() and file.has_keys and file.verify(word.encode()).name == "shop"
    revoke_key(path, "shop")
    assert file.refresh() and file.verify(word.encode()) is None and file.has_keys


def test_a_file_that_is_gone_shuts_and_its_return_opens(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, word = add_key(path, "shop", ["predict"])
    file, kept = KeyFile(path), path.read_bytes()
    path.unlink()
    assert file.refresh() and file.verify(word.encode()) is None and file.has_keys
    for _ in range(3):
        assert not file.refresh()
    assert len(caplog.records) == 1 and "gone" in caplog.text
    path.write_bytes(kept)
    path.chmod(0o600)
    assert file.refresh() and file.verify(word.encode()) and file.trouble == ""


def test_a_folder_that_is_gone_shuts_too(tmp_path: Path) -> None:
    path = tmp_path / "mount" / "keys.json"
    _, word = add_key(path, "shop", ["predict"])
    file = KeyFile(path)
    (tmp_path / "mount").rename(tmp_path / "elsewhere")
    assert file.refresh() and file.verify(word.encode()) is None and file.has_keys


@pytest.mark.parametrize("harm", ["cut", "empty", "folder", "writable"])
def test_what_cannot_be_read_changes_nothing_and_is_said_once(path: Path, harm: str, caplog: pytest.LogCaptureFixture) -> None:
    _, word = add_key(path, "shop", ["predict"])
    file, whole = KeyFile(path), path.read_bytes()
    if harm == "folder":
        path.unlink()
        path.mkdir()
    elif harm == "writable":
        path.chmod(0o666)
    else:
        path.write_bytes(whole[: len(whole) // 2 if harm == "cut" else 0])
    for _ in range(3):
        assert not file.refresh() and file.verify(word.encode())
    assert len(caplog.records) == 1 and "stay as they were" in caplog.text and file.trouble
    if harm == "folder":
        path.rmdir()
        path.touch(0o600)
    path.chmod(0o600)
    path.write_bytes(Keys().to_json())
    assert file.refresh() and file.verify(word.encode()) is None and file.trouble == "" and file.has_keys


def test_a_change_within_one_tick_of_the_clock_is_seen(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, word = add_key(path, "shop", ["predict"])
    text = path.read_text()
    found, now = path.stat(), time.time()
    same = SimpleNamespace(st_mtime=now, st_mtime_ns=1, st_ctime_ns=1, st_ino=found.st_ino, st_size=found.st_size)
    with monkeypatch.context() as patch:
        patch.setattr("ekiben.serving.security.keys.os.stat", lambda _: same)
        file = KeyFile(path)
        path.write_text(text.replace(json.loads(text)["keys"][0]["digest"], "0" * 64))
        assert file.refresh() and file.verify(word.encode()) is None


def test_a_link_that_is_turned_is_followed(tmp_path: Path) -> None:
    """As Kubernetes changes what it mounts."""
    words = [add_key(tmp_path / version / "keys.json", "shop", ["predict"])[1].encode() for version in ("v1", "v2")]
    (tmp_path / "data").symlink_to("v1")
    (tmp_path / "keys.json").symlink_to("data/keys.json")
    file = KeyFile(tmp_path / "keys.json")
    assert file.verify(words[0]) and not file.verify(words[1])
    (tmp_path / "next").symlink_to("v2")
    (tmp_path / "next").rename(tmp_path / "data")
    assert file.refresh() and file.verify(words[1]) and not file.verify(words[0])


def test_a_writer_and_a_reader_at_once_never_meet_half_a_file(path: Path) -> None:
    _, word = add_key(path, "shop", ["predict"])
    code = "import sys; from pathlib import Path; from ekiben.serving.security.issuing import add_key\n"
    code += "for i in range(40): add_key(Path(sys.argv[1]), f'n{i}', ['predict'])"
    file = KeyFile(path)
    writer = subprocess.Popen([sys.executable, "-c", code, str(path)])
    try:
        while writer.poll() is None:
            file.refresh()
            assert file.verify(word.encode()) and file.trouble == ""
    finally:
        assert writer.wait(120) == 0
    file.refresh()
    assert file.in_use == 41


def test_an_unknown_key_is_compared_as_a_known_one_is(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, word = add_key(path, "shop", ["predict"])
    file, compared = KeyFile(path), []

    compare_digest = hmac.compare_digest

    def compare(a: bytes, b: bytes) -> bool:
        compared.append((len(a), len(b)))
        return compare_digest(a, b)

    monkeypatch.setattr(hmac, "compare_digest", compare)
    shown = [word, f"ekb_{key.id}_wrong", "ekb_00000000_wrong", "", "x", word[:-1], word + "x", word.upper()]
    assert [bool(file.verify(one.encode())) for one in shown] == [True] + [False] * 7
    assert compared == [(32, 32)] * len(shown)


@given(st.binary(max_size=120))
def test_no_bytes_are_a_key_by_chance(shown: bytes) -> None:
    file = KeyFile(Path("nowhere") / "keys.json")
    file._taken = {"00000000": (hashlib.sha256(b"ekb_00000000_right").digest(), msgspec.convert(key_of(), type=ApiKey))}
    assert file.verify(shown) is None and file.verify(b"ekb_00000000_" + shown) is None


# The commands


def test_the_key_alone_is_on_standard_output(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "add", "shop", "--role", "predict", "--role", "feedback", "--days", "30", "--file", str(path)]) == 0
    said = capsys.readouterr()
    word = said.out.removesuffix("\n")
    assert KeyFile(path).verify(word.encode()).roles == ("predict", "feedback") and word not in said.err
    assert "predict and feedback, until 20" in said.err and "from now on every caller needs one" in said.err
    assert main(["keys", "rotate", "shop", "--grace", "30m", "--file", str(path)]) == 0
    said = capsys.readouterr()
    assert KeyFile(path).verify(said.out.strip().encode()) and "is taken until" in said.err
    assert main(["keys", "list", "--json", "--file", str(path)]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [key["state"] for key in listed] == ["replaced", "active"] and not any("digest" in key for key in listed)
    assert main(["keys", "revoke", "shop", "--file", str(path)]) == 0
    assert capsys.readouterr().out.count("revoked") == 2
    assert main(["keys", "list", "--file", str(path)]) == 0
    assert "active" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [
        ["add", "a b"], ["add", "a", "--role", "boss"], ["add", "a", "--days", "0"], ["rotate", "none"], ["revoke", "none"],
        ["rotate", "shop", "--grace", "1w"], ["rotate", "shop", "--grace", "-1h"], ["rotate", "shop", "--grace", "999999d"], ["add"],
    ],
)  # fmt: skip
def test_wrong_calls_are_exit_2_in_one_line_and_change_nothing(
    path: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    add_key(path, "shop", ["predict"])
    before = path.read_bytes()
    assert main(["keys", *words, "--file", str(path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and path.read_bytes() == before


def test_the_file_is_where_the_settings_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("EKIBEN_SERVE__KEYS", raising=False)
    project = tmp_path / "project"
    (project / "nbs" / "pipeline").mkdir(parents=True)
    settings = "[data]\nsource = a.csv\n[columns]\ntarget = y\n"
    (project / "settings.ini").write_text(settings)
    assert main(["keys", "add", "a", "--project", str(project)]) == 0
    assert read_keys(project / ".ekiben" / "keys.json").keys[0].name == "a" and keys_path(project).is_file()
    (project / "settings.ini").write_text(settings + "[serve]\nkeys = ops/keys.json\n")
    assert main(["keys", "add", "b", "--project", str(project)]) == 0
    assert read_keys(project / "ops" / "keys.json").keys[0].name == "b"
    monkeypatch.setenv("EKIBEN_SERVE__KEYS", str(tmp_path / "mounted.json"))
    monkeypatch.chdir(tmp_path)
    assert main(["keys", "add", "c"]) == 0  # no project is needed, where the variable says it
    assert main(["keys", "add", "d", "--project", str(project)]) == 0
    assert [key.name for key in read_keys(tmp_path / "mounted.json").keys] == ["c", "d"]
    monkeypatch.delenv("EKIBEN_SERVE__KEYS")
    assert main(["keys", "list"]) == 2
    capsys.readouterr()


def test_a_key_that_leaked_can_be_revoked_by_itself_and_is_never_shown(path: Path) -> None:
    old, word = add_key(path, "shop", ["predict"])
    rotate_key(path, word)
    assert [key.id for key in revoke_key(path, word)] == [old.id] and states(path) == ["revoked", "active"]
    with pytest.raises(EkibenError) as refused:
        revoke_key(path, f"ekb_0_{word}")
    assert word not in str(refused.value)
