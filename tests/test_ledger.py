"""The ledger: whatever is done to it by hand is found, whatever a killed writer leaves is made whole."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
from ekiben import ledger
from ekiben.chain import FIRST, Head, Memory, canonical, hash_of, read_head, read_lines, write_head
from ekiben.errors import EkibenError, IntegrityError, UsageError
from ekiben.ledger import append, ledger_path, read, verify
from ekiben.serving.security.signer import key_path, revoke_key, rotate_key, signing_key
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


@pytest.fixture(autouse=True)
def nobody(tmp_path, monkeypatch):
    """Give each test a machine without a signing key."""
    monkeypatch.setenv("EKIBEN_CONFIG", str(tmp_path / "config"))
    for name in ("EKIBEN_SIGNING_KEY", "EKIBEN_TRUSTED_KEYS", "EKIBEN_USER", "EKIBEN_SIGNING_PASSWORD"):
        monkeypatch.delenv(name, raising=False)


def make(root: Path, n: int = 5) -> bytes:
    """Write `n` entries and return the file."""
    for i in range(n):
        append(root, "run", why=f"reason {i} – 東京", who="ana", run_id=f"2026-{i}", auc=0.9 + i / 1000)
    return ledger_path(root).read_bytes()


def make_key() -> None:
    signing_key(make=True, say=lambda _: None)


def chained(entries: list[dict]) -> bytes:
    """Return a ledger whose numbers and hashes are all right, whatever it says."""
    lines, previous = [], FIRST
    for number, said in enumerate(entries, 1):
        said = {**said, "number": number, "previous": previous}
        said["hash"] = previous = hash_of(said)
        lines.append(canonical(said) + b"\n")
    return b"".join(lines)


def refused(root: Path, **options: str) -> IntegrityError:
    with pytest.raises(IntegrityError, match="entry") as caught:
        verify(root, **options)
    assert isinstance(caught.value.entry, int) and str(caught.value.entry) in str(caught.value)
    assert "\n" not in str(caught.value)
    return caught.value


# ------------------------------------------------------------------------------------------------------ what is written


def test_entries_say_who_what_when_and_why(tmp_path, monkeypatch):
    monkeypatch.setenv("EKIBEN_USER", "ben")
    append(tmp_path, "waiver", why="a short month", gate="auc >= 0.9")
    append(tmp_path, "promotion", who="controller", version="4")
    first, second = read(tmp_path)
    assert (first.number, first.who, first.what, first.why, first.facts) == (1, "ben", "waiver", "a short month", {"gate": "auc >= 0.9"})
    assert first.previous == FIRST and second.previous == first.hash and second.who == "controller"
    assert first.time.endswith("Z") and first.time <= second.time


def test_a_line_can_be_checked_without_ekiben(tmp_path):
    import hashlib

    previous = "0" * 64
    for line in make(tmp_path).decode("ascii").splitlines():
        said = json.loads(line)
        found = said.pop("hash")
        assert said["previous"] == previous
        previous = hashlib.sha256(json.dumps(said, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
        assert found == previous


def test_facts_become_plain_json(tmp_path):
    from datetime import date

    from ekiben.records import Measure

    append(
        tmp_path, "run", nan=float("nan"), inf=[float("inf")], big=2**70, half="\ud800", when=date(2026, 7, 1),
        measure=Measure(name="auc", value=0.5), source="postgresql://ana:geheim1@db/x", pair=(1, None, True),
    )  # fmt: skip
    facts = read(tmp_path)[0].facts
    assert facts["nan"] is None and facts["inf"] == [None] and facts["big"] == str(2**70) and facts["half"] == "?"
    assert facts["when"] == "2026-07-01" and facts["measure"]["name"] == "auc" and facts["pair"] == [1, None, True]
    assert "geheim1" not in ledger_path(tmp_path).read_text()
    assert verify(tmp_path).count == 1


def test_an_unknown_kind_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(UsageError, match="did you mean `rollback`"):
        append(tmp_path, "rolback")
    assert not ledger_path(tmp_path).exists()


def test_a_ledger_that_cannot_be_written_is_said_in_one_line_and_stays_as_it_was(tmp_path, monkeypatch):
    before = make(tmp_path, 2)
    head = read_head(ledger_path(tmp_path))

    def full(handle, raw):
        os.pwrite(handle, raw[:10], os.fstat(handle).st_size)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(ledger, "_put", full)
        with pytest.raises(EkibenError, match=r"No space left on device.*not accounted for") as caught:
            append(tmp_path, "promotion", version="3")
    assert "\n" not in str(caught.value)
    assert ledger_path(tmp_path).read_bytes() == before and read_head(ledger_path(tmp_path)) == head
    assert append(tmp_path, "run").number == 3 and verify(tmp_path).count == 3


def test_a_ledger_in_the_way_of_a_file_is_said(tmp_path):
    (tmp_path / ".ekiben").write_text("not a folder")
    with pytest.raises(EkibenError, match="cannot be written"):
        append(tmp_path, "run")


def test_no_ledger_is_no_error(tmp_path):
    assert read(tmp_path) == [] and verify(tmp_path).count == 0


def test_reading_filters_by_kind_and_time(tmp_path):
    from datetime import UTC, datetime, timedelta

    make(tmp_path, 2)
    append(tmp_path, "export")
    assert [e.number for e in read(tmp_path, what="export")] == [3]
    assert read(tmp_path, since=datetime.now(UTC) + timedelta(hours=1)) == []
    assert len(read(tmp_path, since=datetime.now(UTC) - timedelta(hours=1))) == 3


def test_a_reader_may_append_while_it_reads(tmp_path):
    make(tmp_path, 3)
    for entry in read(tmp_path):
        append(tmp_path, "export", of=entry.number)
    assert verify(tmp_path).count == 6


# ----------------------------------------------------------------------------------------------------- what is found


@pytest.mark.parametrize("has_key", [False, True])
def test_any_byte_changed_added_or_removed_is_found_with_its_entry(tmp_path, has_key):
    if has_key:
        make_key()
    genuine, path = make(tmp_path, 4), ledger_path(tmp_path)
    starts = [0, *[i + 1 for i, byte in enumerate(genuine) if byte == 10]]

    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(("flip", "insert", "delete")), st.integers(0, len(genuine) - 1), st.integers(0, 255))
    def edit(how, at, byte):
        if how == "flip":
            edited = genuine[:at] + bytes([genuine[at] ^ (byte or 1)]) + genuine[at + 1 :]
        elif how == "insert":
            edited = genuine[:at] + bytes([byte]) + genuine[at:]
        else:
            edited = genuine[:at] + genuine[at + 1 :]
        if edited == genuine:
            return
        path.write_bytes(edited)
        found = refused(tmp_path).entry
        assert found == max(n for n, start in enumerate(starts, 1) if start <= at)

    edit()
    path.write_bytes(genuine + b"x")
    assert refused(tmp_path).entry == 5
    path.write_bytes(genuine)
    assert verify(tmp_path).count == 4


@pytest.mark.parametrize(
    ("order", "entry", "problem"),
    [
        ((2, 3, 4), 1, "missing"),
        ((1, 3, 4), 2, "missing"),
        ((1, 2, 3), 4, "truncated"),
        ((1,), 2, "truncated"),
        ((), 1, "truncated"),
        ((1, 3, 2, 4), 2, "missing"),
        ((1, 1, 2, 3, 4), 2, "added"),
        ((1, 2, 3, 4, 4), 5, "added"),
        ((1, 2, 2, 4), 3, "added"),
    ],
)
def test_entries_removed_moved_or_repeated_are_found(tmp_path, order, entry, problem):
    lines = make(tmp_path, 4).splitlines(keepends=True)
    ledger_path(tmp_path).write_bytes(b"".join(lines[i - 1] for i in order))
    found = refused(tmp_path)
    assert (found.entry, found.problem) == (entry, problem)


def test_a_ledger_that_was_deleted_under_its_head_is_found(tmp_path):
    make(tmp_path, 3)
    ledger_path(tmp_path).unlink()
    assert refused(tmp_path).problem == "truncated"
    append(tmp_path, "run")
    assert refused(tmp_path).entry == 1  # also when it went on


def test_an_entry_added_by_hand_with_right_hashes_is_found_even_after_others_follow(tmp_path):
    make(tmp_path, 3)
    path = ledger_path(tmp_path)
    path.write_bytes(chained([*(e.to_dict() for e in read(tmp_path)), read(tmp_path)[-1].to_dict() | {"what": "approval"}]))
    assert (refused(tmp_path).entry, refused(tmp_path).problem) == (4, "added")
    append(tmp_path, "run")
    assert refused(tmp_path).entry == 5  # the genuine entry 4 stands after the one that was added
    assert read_head(path).count == 4


def test_a_tail_written_anew_is_found_even_after_others_follow(tmp_path):
    make(tmp_path, 3)
    ledger_path(tmp_path).write_bytes(chained([e.to_dict() | {"who": "eve"} for e in read(tmp_path)]))
    assert refused(tmp_path).entry == 3
    append(tmp_path, "run")
    assert refused(tmp_path).entry == 4


def test_without_a_key_verify_says_what_it_cannot_know(tmp_path):
    make(tmp_path, 3)
    assert "not signed" in verify(tmp_path).notes[0]
    path = ledger_path(tmp_path)
    path.write_bytes(chained([e.to_dict() | {"who": "eve"} for e in read(tmp_path)]))
    write_head(path, Head(count=3, hash=read(tmp_path)[-1].hash))
    assert verify(tmp_path).count == 3  # the page says so: whoever can write both, can write both anew
    assert verify(tmp_path).notes


@pytest.mark.parametrize("claim", [True, False])
def test_with_a_key_a_ledger_written_anew_as_a_whole_is_found(tmp_path, claim):
    make_key()
    make(tmp_path, 3)
    path, genuine = ledger_path(tmp_path), read_head(ledger_path(tmp_path))
    assert verify(tmp_path).key == genuine.key
    changes = {"who": "eve"} if claim else {"who": "eve", "key": ""}
    path.write_bytes(chained([e.to_dict() | changes for e in read(tmp_path)]))
    last = read(tmp_path)[-1].hash
    for forged in (
        Head(count=3, hash=last),
        msgspec.structs.replace(genuine, hash=last),
        msgspec.structs.replace(genuine, hash=last, signed_hash=last),
    ):
        write_head(path, forged)
        assert refused(tmp_path).entry in (1, 2, 3)
        before = path.read_bytes(), path.with_suffix(".head").read_bytes(), Memory.path(path).read_bytes()
        append(tmp_path, "run")  # a genuine entry does not make good what stands before it
        refused(tmp_path)
        Memory.path(path).unlink()
        assert refused(tmp_path).problem == "break"  # whoever looks, and wherever
        for file, raw in zip((path, path.with_suffix(".head"), Memory.path(path)), before, strict=True):
            file.write_bytes(raw)


def test_entries_forged_after_the_signature_are_not_made_good_by_the_next_one(tmp_path):
    make_key()
    make(tmp_path, 2)
    path, head = ledger_path(tmp_path), read_head(ledger_path(tmp_path))
    forged = [*(e.to_dict() for e in read(tmp_path)), read(tmp_path)[-1].to_dict() | {"what": "approval"}]
    path.write_bytes(chained(forged))
    write_head(path, msgspec.structs.replace(head, count=3, hash=read(tmp_path)[-1].hash))
    assert (refused(tmp_path).entry, refused(tmp_path).problem) == (3, "signature")
    append(tmp_path, "run")
    assert [e.what for e in read(tmp_path)][2:] == ["approval", "break", "run"]
    assert refused(tmp_path).entry == 4 and "entry 3" in str(refused(tmp_path))


def test_a_head_that_was_deleted_is_found_now_and_ever_after(tmp_path):
    make_key()
    make(tmp_path, 3)
    head = ledger_path(tmp_path).with_suffix(".head")
    for spoilt in (None, b"", b"{}", head.read_bytes()[:-4], head.read_bytes() + b" "):
        head.unlink() if spoilt is None else head.write_bytes(spoilt)
        assert (refused(tmp_path).entry, refused(tmp_path).problem) == (3, "head")
    append(tmp_path, "run")
    assert [e.what for e in read(tmp_path)] == ["run"] * 3 + ["break", "run"]
    assert refused(tmp_path).entry == 4


def test_ledger_and_head_put_back_together_are_found_here_and_elsewhere_by_a_kept_word(tmp_path, monkeypatch):
    make_key()
    make(tmp_path, 3)
    path = ledger_path(tmp_path)
    older = path.read_bytes(), path.with_suffix(".head").read_bytes()
    make(tmp_path, 2)
    word = verify(tmp_path).word
    path.write_bytes(older[0])
    path.with_suffix(".head").write_bytes(older[1])
    assert (refused(tmp_path).entry, refused(tmp_path).problem) == (4, "memory")
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(Memory, "read", lambda ledger: None)
        assert verify(tmp_path).count == 3
        assert refused(tmp_path, known=word).problem == "known"
    append(tmp_path, "run")
    assert refused(tmp_path).problem == "break"


def test_a_ledger_that_is_gone_with_its_head_is_remembered_and_a_new_one_says_so_first(tmp_path):
    make_key()
    make(tmp_path, 3)
    path = ledger_path(tmp_path)
    path.unlink()
    path.with_suffix(".head").unlink()
    assert "this machine remembers 3" in str(refused(tmp_path))
    append(tmp_path, "run")
    assert [e.what for e in read(tmp_path)] == ["break", "run"]
    found = verify(tmp_path)
    assert found.count == 2 and "remembers 3 entries" in found.notes[0]


def test_the_memory_is_brought_up_to_date_after_others_wrote(tmp_path, monkeypatch):
    make_key()
    make(tmp_path, 2)
    config = os.environ["EKIBEN_CONFIG"]
    monkeypatch.setenv("EKIBEN_CONFIG", str(tmp_path / "another machine"))
    make(tmp_path, 2)
    monkeypatch.setenv("EKIBEN_CONFIG", config)
    assert verify(tmp_path).count == 4
    make(tmp_path, 1)
    assert Memory.read(ledger_path(tmp_path)).count == 5 and verify(tmp_path).count == 5


def test_a_home_that_cannot_be_written_to_stops_nothing(tmp_path):
    make_key()
    (Path(os.environ["EKIBEN_CONFIG"]) / "ledgers").write_text("in the way")
    make(tmp_path, 2)
    assert verify(tmp_path).count == 2


def test_a_word_kept_elsewhere_shows_later_that_nothing_before_it_changed(tmp_path):
    make(tmp_path, 2)
    word = verify(tmp_path).word
    make(tmp_path, 2)
    assert verify(tmp_path, known=word).count == 4
    number, _, start = word.partition(":")
    assert refused(tmp_path, known=f"{number}:{'0' * len(start)}").entry == 2
    with pytest.raises(UsageError, match="no word of a ledger"):
        verify(tmp_path, known="yesterday")


# ---------------------------------------------------------------------------------------------------------- the key


def test_a_key_made_later_covers_what_was_written_before_and_says_so(tmp_path):
    make(tmp_path, 2)
    make_key()
    assert "not signed" in verify(tmp_path).notes[0]
    make(tmp_path, 1)
    found = verify(tmp_path)
    assert found.key and found.notes == ["2 of 3 entries were written where there was no signing key, the last of them entry 2"]


def test_somebody_without_the_key_may_add_and_the_signature_stays(tmp_path, monkeypatch):
    make_key()
    make(tmp_path, 2)
    config = os.environ["EKIBEN_CONFIG"]
    monkeypatch.setenv("EKIBEN_CONFIG", str(tmp_path / "another machine"))
    make(tmp_path, 1)
    assert "not trusted here" in str(refused(tmp_path))
    monkeypatch.setenv("EKIBEN_CONFIG", config)
    found = verify(tmp_path)
    assert found.count == 3 and found.key and "entry 3" in found.notes[0]
    make(tmp_path, 1)
    assert verify(tmp_path).count == 4


def test_a_rotated_key_goes_on_and_a_revoked_one_is_not_believed_until_the_next_signs(tmp_path):
    make_key()
    make(tmp_path, 2)
    old = read_head(ledger_path(tmp_path)).key
    new = rotate_key().id
    assert verify(tmp_path).key == old
    make(tmp_path, 1)
    assert verify(tmp_path).key == new
    revoke_key(old)
    assert verify(tmp_path).key == new
    revoke_key(new)
    assert "revoked" in str(refused(tmp_path))
    make(tmp_path, 1)  # nobody signs, and the action is accounted for all the same
    rotate_key()
    make(tmp_path, 1)
    assert verify(tmp_path).count == 5


def test_an_unreadable_key_does_not_stop_the_account(tmp_path):
    make_key()
    key_path().chmod(0o644)
    assert append(tmp_path, "rollback").key == ""
    assert read(tmp_path)[0].what == "rollback"


# ------------------------------------------------------------------------------------------------- writers that die


def leave(root: Path, cut: int | None) -> bytes:
    """Write an entry as a process would that was killed after `cut` bytes of its line (None: before the head was done)."""
    path = ledger_path(root)
    before = path.read_bytes() if path.exists() else b""
    append(root, "promotion", version="9")
    line = path.read_bytes()[len(before) :]
    write_head(path, msgspec.structs.replace(read_head(path), writing=line[:-1].decode()))
    path.write_bytes(before + (line if cut is None else line[:cut]))
    return line


@pytest.mark.parametrize("has_key", [False, True])
@pytest.mark.parametrize("cut", [0, 1, 80, -2, -1, None])
def test_what_a_killed_writer_left_is_read_verified_and_completed(tmp_path, cut, has_key, capsys):
    if has_key:
        make_key()
    make(tmp_path, 2)
    leave(tmp_path, cut)
    assert [e.what for e in read(tmp_path)] == ["run", "run", "promotion"]
    found = verify(tmp_path)
    assert found.count == 3 and any("killed" in note for note in found.notes) == (cut is not None)
    append(tmp_path, "run")
    assert ("was killed" in capsys.readouterr().err) == (cut is not None)
    assert [e.what for e in read(tmp_path)] == ["run", "run", "promotion", "run"] and verify(tmp_path).count == 4
    assert len(ledger_path(tmp_path).read_bytes().splitlines()) == 4


def test_a_first_writer_that_was_killed_is_completed_too(tmp_path):
    leave(tmp_path, 5)
    assert verify(tmp_path).count == 1
    append(tmp_path, "run")
    assert [e.what for e in read(tmp_path)] == ["promotion", "run"] and verify(tmp_path).count == 2


def test_bytes_that_are_no_entry_are_set_aside_and_said(tmp_path, capsys):
    make(tmp_path, 2)
    with ledger_path(tmp_path).open("ab") as out:
        out.write(b'{"facts":{"half')
    assert refused(tmp_path).entry == 3
    append(tmp_path, "run")
    assert "15 bytes" in capsys.readouterr().err
    assert ledger_path(tmp_path).with_suffix(".torn").read_bytes() == b'{"facts":{"half\n'
    assert verify(tmp_path).count == 3


def test_somebody_who_pretends_that_a_writer_was_killed_takes_nothing_away(tmp_path):
    make(tmp_path, 3)
    path = ledger_path(tmp_path)
    genuine = path.read_bytes()
    *kept, last = genuine.splitlines(keepends=True)
    other = last[:-1].replace(b"reason", b"nosaer")
    write_head(path, msgspec.structs.replace(read_head(path), writing=other.decode()))
    path.write_bytes(b"".join(kept))
    assert refused(tmp_path).entry == 3
    write_head(path, msgspec.structs.replace(read_head(path), writing=last[:-1].decode()))
    assert verify(tmp_path).count == 3 and read_lines(path).is_torn  # the entry is still there, in the head


WRITER = """
import sys
from pathlib import Path
from ekiben.ledger import append
root, name, n = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
for i in range(n):
    append(root, "run", who=name, i=i, filler="x" * 3000)
    print(i, flush=True)
"""


def start(root: Path, name: str, n: int) -> subprocess.Popen:
    command = [sys.executable, "-c", WRITER, str(root), name, str(n)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def test_processes_that_append_at_once_do_not_collide(tmp_path):
    make_key()
    writers = [start(tmp_path, f"w{i}", 15) for i in range(4)]
    assert [w.wait(timeout=60) for w in writers] == [0] * 4
    assert verify(tmp_path).count == 60
    for i in range(4):
        assert [e.facts["i"] for e in read(tmp_path) if e.who == f"w{i}"] == list(range(15))


def test_writers_killed_at_any_moment_lose_nothing_that_was_said_to_be_written(tmp_path):
    make_key()
    for round_ in range(4):
        writers = [start(tmp_path, f"{round_}-{i}", 10_000) for i in range(2)]
        for writer in writers:
            assert writer.stdout.readline() == "0\n"
        time.sleep(0.02 + 0.013 * round_)
        for writer in writers:
            writer.send_signal(signal.SIGKILL)
        said = {f"{round_}-{i}": [0, *map(int, w.communicate()[0].split())][-1] for i, w in enumerate(writers)}
        verify(tmp_path)
        append(tmp_path, "run", who="between")
        for name, last in said.items():
            found = [e.facts["i"] for e in read(tmp_path) if e.who == name]
            assert found == list(range(len(found))) and len(found) in (last + 1, last + 2)
    found = verify(tmp_path)
    assert found.count == len(read(tmp_path)) and not any("killed" in note for note in found.notes)


def test_importing_it_is_cheap():
    code = "import sys, ekiben.ledger; print([m for m in ('cryptography', 'numpy', 'pandas', 'mlflow', 'duckdb') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
