"""Tables that are larger than they look, and damaged ones: nothing is unpacked that is too large, nothing breaks."""

from __future__ import annotations

import io
import random
import struct

import numpy as np
import pyarrow as pa
import pyarrow.ipc as ipc
import pyarrow.parquet as pq
import pytest
from bundles import make_project
from test_media import TABLES, people, refused, to_parquet, to_stream, write

from ekiben.serving.http import media
from ekiben.serving.bundle import Limits
from ekiben.serving.http.claims import claim_of_arrow, claim_of_parquet
from ekiben.serving.problem import Problem
from ekiben.serving.scoring.scorer import Scorer


@pytest.fixture(scope="module")
def scorer(tmp_path_factory) -> Scorer:
    return Scorer(make_project(tmp_path_factory.mktemp("census"), limits=Limits(max_rows=2000, max_body_mb=1)).bundle)


# ---- tables that are larger than they look


def wide(n: int, **columns: pa.Array) -> pa.Table:
    return pa.table({"age": pa.nulls(n), "income": pa.nulls(n), "job": pa.nulls(n), "place": pa.nulls(n),
                     "member": pa.nulls(n), "since": pa.nulls(n), **columns})  # fmt: skip


LONG = "x" * 100_000


@pytest.mark.parametrize("kind", TABLES)
def test_too_many_rows(scorer, kind):
    assert media.read_columns(kind, write(kind, people(2000)), scorer).n == 2000
    problem = refused(kind, write(kind, people(2001)), scorer)
    assert problem.status == 413 and "2000 rows" in str(problem)


@pytest.mark.parametrize("compression", ["zstd", "lz4"])
def test_arrow_that_unpacks_to_too_much_is_not_unpacked(scorer, compression):
    raw = to_stream(wide(1, place=pa.array(["x" * 50_000_000])), compression=compression)
    assert claim_of_arrow(pa.py_buffer(raw)).size >= 50_000_000
    before = pa.total_allocated_bytes()
    assert refused(media.ARROW_STREAM, raw, scorer).status == 413
    assert pa.total_allocated_bytes() == before
    small = to_stream(people(100), compression=compression)
    assert media.read_columns(media.ARROW_STREAM, small, scorer).equals(media.read_columns(media.CSV, write(media.CSV, people(100)), scorer))


def test_an_arrow_claim_is_held_to_what_it_said(scorer):
    raw = to_stream(wide(1, place=pa.array(["x" * 50_000_000])), compression="zstd")
    assert raw.count(struct.pack("<q", 50_000_000))
    raw = raw.replace(struct.pack("<q", 50_000_000), struct.pack("<q", 1000))
    assert refused(media.ARROW_STREAM, raw, scorer).status == 400


def test_views_and_dictionaries_that_repeat_a_long_text(scorer):
    coded = pa.DictionaryArray.from_arrays(pa.array([0] * 500, pa.int32()), pa.array([LONG]))
    assert refused(media.ARROW_STREAM, to_stream(wide(500, place=coded)), scorer).status == 413
    raw = to_parquet(wide(500, place=pa.array([LONG] * 500)))
    assert len(raw) < 300_000
    assert refused(media.PARQUET, raw, scorer).status == 413
    views = struct.pack("<i4sii", len(LONG), LONG[:4].encode(), 0, 0) * 500
    viewed = pa.Array.from_buffers(pa.string_view(), 500, [None, pa.py_buffer(views), pa.py_buffer(LONG.encode())])
    viewed.validate(full=True)
    assert refused(media.ARROW_STREAM, to_stream(wide(500, place=viewed)), scorer).status == 413


@pytest.mark.parametrize("options", [{}, {"use_dictionary": False}, {"data_page_version": "2.0"}, {"use_dictionary": False, "data_page_version": "2.0"}])
@pytest.mark.parametrize("compression", ["zstd", "snappy", "gzip", "brotli", "lz4", "none"])
def test_the_pages_of_any_parquet_are_counted(scorer, options, compression):
    table = people(1500)
    raw = to_parquet(table, compression=compression, **options)
    metadata = pq.ParquetFile(io.BytesIO(raw)).metadata
    claim = claim_of_parquet(raw)
    assert claim.rows == 1500
    chunks = [metadata.row_group(0).column(i) for i in range(metadata.num_columns)]
    assert sum(c.total_uncompressed_size for c in chunks) * 0.8 < claim.size <= sum(c.total_uncompressed_size for c in chunks)
    assert media.read_columns(media.PARQUET, raw, scorer).n == 1500


def test_parquet_that_unpacks_to_too_much_is_not_unpacked(scorer):
    raw = to_parquet(wide(1, place=pa.array(["x" * 50_000_000])), compression="zstd", use_dictionary=False)
    before = pa.total_allocated_bytes()
    assert refused(media.PARQUET, raw, scorer).status == 413
    assert pa.total_allocated_bytes() == before


def test_a_page_that_claims_more_than_the_footer_is_believed(scorer):
    table = wide(1500, age=pa.array(np.arange(1500) % 100, pa.float64()))
    raw = bytearray(to_parquet(table, use_dictionary=False))
    at = pq.ParquetFile(io.BytesIO(bytes(raw))).metadata.row_group(0).column(0).data_page_offset
    assert raw[at] == 0x15 and raw[at + 2] == 0x15  # the type of the page, then its size when opened
    end = next(i for i in range(at + 3, at + 13) if raw[i] < 128) + 1
    raw[at + 3 : end] = b"\xfe" + b"\xff" * (end - at - 5) + b"\x7f"
    assert refused(media.PARQUET, bytes(raw), scorer).status in (400, 413)
    assert claim_of_parquet(bytes(raw), ["age"]).size >= 2 ** (7 * (end - at - 3) - 2)


def test_delta_byte_arrays_are_refused(scorer):
    raw = to_parquet(people(10), use_dictionary=False, column_encoding={"place": "DELTA_BYTE_ARRAY"})
    assert refused(media.PARQUET, raw, scorer).status == 400


def test_deltas_and_many_messages_are_refused(scorer):
    assert refused(media.ARROW_STREAM, to_stream(people(1500), chunk=1), scorer).status == 400
    table = wide(2, job=pa.chunked_array([pa.array(["a"]).dictionary_encode(), pa.array(["b"]).dictionary_encode()]))
    schema = table.schema
    parts = [["a"], ["a", "b"]]
    sink = pa.BufferOutputStream()
    with ipc.new_stream(sink, schema, options=ipc.IpcWriteOptions(emit_dictionary_deltas=True)) as stream:
        for levels in parts:
            job = pa.DictionaryArray.from_arrays(pa.array([0], pa.int32()), pa.array(levels))
            stream.write_batch(pa.record_batch([job if n == "job" else pa.nulls(1) for n in schema.names], schema=schema))
    assert refused(media.ARROW_STREAM, sink.getvalue().to_pybytes(), scorer).status == 400


# ---- damage


@pytest.mark.parametrize("kind", TABLES)
def test_no_damage_is_more_than_a_refusal(scorer, kind):
    chance = random.Random(kind)
    options: list[bytes] = [write(kind, people(40))]
    if kind == media.PARQUET:
        options += [to_parquet(people(40), compression="zstd", use_dictionary=False)]
    elif kind != media.CSV:
        options += [to_stream(people(40), compression="zstd")]
    statuses = set()
    for turn in range(600):
        raw = bytearray(chance.choice(options))
        if turn % 3 == 0:
            del raw[chance.randrange(len(raw)) :]
        else:
            for _ in range(chance.randint(1, 4)):
                raw[chance.randrange(len(raw))] = chance.choice([0, 1, 127, 128, 255, chance.randrange(256)])
        try:
            media.read_columns(kind, bytes(raw), scorer)
        except Problem as problem:
            statuses.add(problem.status)
    assert statuses <= {400, 413, 422} and 400 in statuses | ({400} if kind == media.CSV else set())
