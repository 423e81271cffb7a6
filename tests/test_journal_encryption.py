"""An encrypted journal: nothing of it is on the disk in the clear, and nothing is lost with its keys while they change."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_journal import FAST, ORIGIN, everything, keep, make_row

from ekiben.cli import main
from ekiben.errors import IntegrityError, ServiceError
from ekiben.serving.journal import seal
from ekiben.serving.journal.cipher import Cipher
from ekiben.serving.journal.erase import Eraser, Person, rekey
from ekiben.serving.journal.journal import Journal, new_ids, read_journal
from ekiben.serving.journal.keeping import JournalOptions
from ekiben.serving.journal.keyring import KeyRing, ring_for, ring_path
from ekiben.serving.journal.seal import seal_journal
from ekiben.serving.journal.sealed import open_journal
from ekiben.serving.journal.segments import HEAD, VEILED, Segment, SegmentWriter, frame, keys_of_segments, list_segments

SECRET = JournalOptions(encryption=True)
RING = KeyRing().with_new()


def veiled(records: list[bytes]) -> bytes:
    segment = Segment(b"")
    segment.origin, segment.records, segment.cipher = ORIGIN, records, Cipher(RING)
    return segment.to_bytes()


def ids_of(folder: Path) -> list[str]:
    return [event["id"] for event in read_journal(folder) if event["event"] == "prediction"]


@pytest.mark.parametrize("durability", ["async", "sync"])
def test_nothing_is_in_the_clear_before_and_after_it_is_sealed(tmp_path, monkeypatch, durability):
    monkeypatch.setattr(seal, "COMPRESSION", "none")
    folder = tmp_path / "journal"
    journal = Journal(folder, ORIGIN, JournalOptions(encryption=True, durability=durability))
    ids = new_ids(2)
    journal.predictions(ids, [make_row(place="Timbuktu-on-Sea", id="c-4711")] * 2, [{"label": "yes", "probability": 0.5}] * 2)
    journal.feedback(ids[0], "no-truth")
    journal.flush()
    for state in ("growing", "closed", "sealed"):
        if state == "closed":
            journal.close()
        elif state == "sealed":
            assert seal_journal(folder, SECRET).predictions == 2
        raw = everything(folder)
        for word in (b"Timbuktu", b"c-4711", b"place", b"probability", b"no-truth", b"loans", ids[0].encode()):
            assert word not in raw, (state, word)
        assert ids_of(folder) == ids
    with open_journal(folder, options=SECRET) as db:
        assert db.execute("SELECT count(*), count(_told) FROM journal").fetchall() == [(2, 1)]


@FAST
@given(records=st.lists(st.binary(min_size=1, max_size=40), min_size=1, max_size=5))
def test_whatever_byte_the_writer_died_at_the_records_before_it_are_read(records):
    raw = veiled(records)
    assert Segment(raw, RING).records == records and not Segment(raw, RING).is_damaged
    ends = [len(raw) - sum(HEAD.size + len(r) + 28 for r in records[n:]) for n in range(len(records) + 1)]
    for cut in range(len(raw) + 1):
        read = Segment(raw[:cut], RING)
        whole = sum(end <= cut for end in ends) - 1
        assert read.records == records[: max(whole, 0)] and (read.origin is None) == (whole < 0)
        assert not read.is_damaged and (whole < 0 or read.torn == cut - ends[whole])
        zeroed = Segment(raw[:cut] + bytes(50), RING).records  # what a power cut leaves
        assert zeroed == records[: len(zeroed)] and len(zeroed) >= len(read.records)


@FAST
@given(data=st.data())
def test_a_record_that_was_changed_is_noticed_although_its_crc_is_right(data):
    records = [bytes([n]) * 10 for n in range(4)]
    raw = veiled(records)
    which, at = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 37))
    size = HEAD.size + 38
    start = len(raw) - (4 - which) * size
    hidden = bytearray(raw[start + HEAD.size : start + size])
    hidden[at] ^= data.draw(st.integers(1, 255))
    read = Segment(raw[:start] + frame(bytes(hidden)) + raw[start + size :], RING)
    assert read.records == records[:which] and read.is_damaged and read.torn == (4 - which) * size


def test_two_records_alike_are_not_alike_on_the_disk_and_neither_are_two_copies():
    raw = veiled([b"the same record"] * 2)
    assert raw[-(28 + 15) :] != raw[-2 * (28 + 15) - HEAD.size : -(28 + 15) - HEAD.size]
    assert veiled([b"x"]) != veiled([b"x"])


def test_a_changed_segment_is_kept_and_told(tmp_path):
    folder = tmp_path / "journal"
    keep(folder, [make_row()] * 3, options=SECRET)
    (path,) = list_segments(folder)
    raw = path.read_bytes()
    record = Segment.read(path).records[0]
    hidden = bytearray(raw[-(len(record) + 28) :])
    hidden[20] ^= 1
    path.write_bytes(raw[: -len(hidden) - HEAD.size] + frame(bytes(hidden)))
    sealed = seal_journal(folder, SECRET)
    assert len(sealed.problems) == 1 and "damaged" in sealed.problems[0] and list_segments(folder) == [path]


def test_a_write_that_the_disk_refuses_leaves_no_half_record(tmp_path, monkeypatch):
    writer = SegmentWriter(tmp_path / "journal", ORIGIN, encryption=True)
    real = os.write

    def full(handle: int, raw: bytes) -> int:
        real(handle, bytes(raw[: len(raw) // 2]))
        raise OSError(28, "No space left on device")

    for n, record in enumerate((b"first", b"third")):  # once before anything was written, once after
        monkeypatch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space"):
            writer.append([b"second" * 10])
        monkeypatch.setattr(os, "write", real)
        assert writer.append([record])
        assert Segment.read(writer.path).records == [b"first", b"third"][: n + 1]


def test_without_its_key_a_segment_says_which_it_needs_and_stays(tmp_path):
    folder = tmp_path / "journal"
    keep(folder, [make_row()], options=SECRET)
    ring = ring_path(folder).read_bytes()
    KeyRing(keys={"k9": KeyRing.from_json(ring).keys["k1"]}).save(ring_path(folder))
    with pytest.raises(IntegrityError, match="key `k1` is not in its key ring"):
        read_journal(folder)
    assert "key `k1`" in seal_journal(folder, SECRET).problems[0]
    ring_path(folder).write_bytes(ring)
    assert len(read_journal(folder)) == 1 and not seal_journal(folder, SECRET).problems


def test_a_service_that_cannot_write_its_first_key_does_not_start(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EKIBEN_JOURNAL_KEYS", str(tmp_path / "file" / "journal.keys"))
    with pytest.raises(ServiceError, match="EKIBEN_JOURNAL_KEYS names their file"):
        Journal(tmp_path / "journal", ORIGIN, SECRET)


def test_all_who_come_first_get_the_same_key(tmp_path):
    folder, rings = tmp_path / "journal", []
    start = threading.Barrier(8)

    def begin() -> None:
        start.wait()
        rings.append(keep(folder, [make_row()], options=SECRET))

    threads = [threading.Thread(target=begin) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(KeyRing.load(ring_path(folder)).keys) == ["k1"] and len(ids_of(folder)) == 8


def test_a_new_key_reaches_what_is_not_sealed_and_who_is_writing(tmp_path):
    folder = tmp_path / "journal"
    journal = Journal(folder, ORIGIN, SECRET)
    kept = new_ids(3)
    for n, id_ in enumerate(kept):
        journal.predictions([id_], [make_row()], [{"label": "yes", "probability": 0.5}])
        journal.flush()
        assert rekey(folder) == n + 1 and list(KeyRing.load(ring_path(folder)).keys) == [f"k{n + 2}"]
        assert ids_of(folder) == kept[: n + 1]
    journal.close()
    keep(folder, [make_row()])  # and a plain segment, of a service that does not encrypt
    assert rekey(folder) == 4 and not list_segments(folder) and len(ids_of(folder)) == 4
    assert rekey(folder) == 4 and len(ids_of(folder)) == 4


def test_changing_keys_under_load_loses_nothing(tmp_path):
    folder = tmp_path / "journal"
    options = JournalOptions(encryption=True, segment_bytes=8_000, pause_s=0.0005)
    journal, kept = Journal(folder, ORIGIN, options), new_ids(150)

    def write() -> None:
        for id_ in kept:
            assert journal.predictions([id_], [make_row()], [{"label": "yes", "probability": 0.5}])
            time.sleep(0.002)

    thread, changes = threading.Thread(target=write), 0
    thread.start()
    while thread.is_alive() or not changes:
        rekey(folder)
        changes += 1
        assert keys_of_segments(folder) <= set(KeyRing.load(ring_path(folder)).keys)
    thread.join()
    journal.close()
    if journal.committer._sealer is not None:
        journal.committer._sealer.wait(60)
    assert journal.figures()["dropped"] == 0
    assert sorted(ids_of(folder)) == sorted(kept)


def test_the_key_of_a_segment_that_cannot_be_sealed_is_not_forgotten(tmp_path, capsys):
    folder = tmp_path / "journal"
    keep(folder, [make_row()] * 2, options=SECRET)
    (path,) = list_segments(folder)
    whole = path.read_bytes()
    path.write_bytes(whole[:-40] + b"?" + whole[-39:] + frame(b"more"))
    (tmp_path / "settings.ini").write_text("[columns]\ntarget = y\n[serve]\nencryption = yes\n")
    assert main(["journal", "rekey", "--project", str(tmp_path), "--journal", str(folder)]) == 0
    assert "older keys stay for segments that are damaged: k1" in capsys.readouterr().out
    assert list(KeyRing.load(ring_path(folder)).keys) == ["k1", "k2"] and list_segments(folder) == [path]
    path.write_bytes(whole)
    assert len(ids_of(folder)) == 2
    rekey(folder)
    assert list(KeyRing.load(ring_path(folder)).keys) == ["k3"] and len(ids_of(folder)) == 2


def test_who_is_forgotten_is_in_no_record_of_an_encrypted_segment(tmp_path):
    folder = tmp_path / "journal"
    keep(folder, [make_row(id="ada"), make_row(id="bob")], options=SECRET)
    (path,) = list_segments(folder)
    before = path.read_bytes()
    assert Eraser(folder, Person.parse("id=ada")).erase().predictions == 1
    after = path.read_bytes()
    assert after.startswith(VEILED) and before[:80] != after[:80], "anew, under a salt of its own"
    assert len(ids_of(folder)) == 1 and keys_of_segments(folder) == {"k1"}
    assert [record for record in Segment.read(path).records if b"ada" in record] == []


def test_a_journal_that_was_plain_goes_on_encrypted_and_back(tmp_path):
    folder = tmp_path / "journal"
    for options in (JournalOptions(), SECRET, JournalOptions()):
        keep(folder, [make_row()], labels=1, options=options)
    assert len(read_journal(folder)) == 6
    seal_journal(folder, JournalOptions())
    assert len(read_journal(folder)) == 6 and ring_for(folder, False) == KeyRing()
