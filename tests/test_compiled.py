"""Single rows through code written for one bundle: the general way's bits, the general way's errors."""

from __future__ import annotations

import math
import struct
import threading
from collections import OrderedDict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from bundles import LEVELS, fit_model, make_columns, make_schema, make_target
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ekiben import features as vocabulary
from ekiben.columns import Columns
from ekiben.encoding import fit_clip, fit_frequency, fit_impute, fit_preprocessor, fit_rare, fit_unify
from ekiben.errors import RowError
from ekiben.records import Field, Policy, Schema
from ekiben.rows import Check, parse_date
from ekiben.serving.bundle import Limits, write_bundle
from ekiben.portable import load_code
from ekiben.serving.scoring.proof import edge_values
from ekiben.serving.scoring.scorer import Scorer, make_examples
from ekiben.serving.scoring.tracing import find_changing
from ekiben.serving.scoring.vocabulary import TWINS

HEAD = """
import math
import numpy as np
from ekiben import features as f
from ekiben.columns import Columns
from ekiben.features import log1p, month

LONG = {"clerk": 1.5, "smith": 2, "nurse": None}
NAMED = {1.0: "one", 0.0: "none"}

def features(c: Columns) -> Columns:
    return """
VOCABULARY = """c.with_columns(
        a=f.lower(c["job"]), b=f.upper(c["job"]), c=f.strip(c["place"]), d=f.length(c["place"]), e=f.contains(c["job"], "er"),
        f=f.starts_with(c["place"], "P"), g=f.split_part(c["place"], "o", -1), h=f.replace(c["job"], old="e", new="é"),
        i=f.is_missing(c["since"]), j=f.coalesce(c["age"], c["income"], -1), k=f.coalesce(c["job"], c["place"], "none"),
        l=f.year(c["since"]), m=month(c["since"]), n=f.day(c["since"]), o=f.weekday(c["since"]), p=f.hour(c["since"]),
        q=f.day_of_year(c["since"]), r=f.days_between(f.coalesce(c["since"], c["since"]), c["since"]),
        s=f.ratio(c["income"], c["age"]), t=f.difference(c["age"], c["member"]), u=log1p(c["income"]),
        v=f.clip(c["income"], -5, 1e5), w=f.bucket(c["age"], [0, 30, 60]), x=f.as_category(c["income"]),
        y=f.lookup(c["job"], LONG, default=-1), z=f.lookup(c["member"], NAMED), aa=f.combine(c["job"], c["member"], c["since"]),
        bb=f.when(c["age"] > 40, c["income"], 0), cc=f.when(c["member"], c["job"], "other"), dd=f.when(c["age"] > 30, c["since"]),
        ee=f.clip(c["age"], high=50), ff=f.bucket(c["income"], [0.5], labels=["low", "high"]),
    ).drop(["place", "since", "c", "dd"])"""
NUMPY = """c.with_columns(
        a=np.log1p(np.maximum(c["income"], 0)), b=c["income"] / c["age"], c=(c["age"] - 3) * 2.5 + c["member"],
        d=(c["age"] > 30) & ~(c["income"] <= 0) | (c["job"] == "clerk"), e=np.where(c["age"] >= 65, 1, 0),
        f=np.where(np.isnan(c["age"]), -1.0, np.sqrt(np.abs(c["age"]))), g=c["age"] ** 2, h=c["income"] // 7, i=c["income"] % 7,
        j=-c["age"], k=np.isin(c["job"], ["clerk", "nurse"]), l=np.exp(-c["age"] / 10), m=np.clip(c["income"], 0, 10),
        n=1 / c["age"], o=(c["age"] != 3).astype(float), p=np.isfinite(c["income"] * 1e300), q=("flag", c["member"] == 1),
        r=np.log(c["income"]), s=c["age"].astype(bool), t=np.minimum(c["income"], c["age"]), u=2, v="constant",
        w=np.logical_or(c["age"] > 3, c["income"]), x=np.power(c["age"], 1.5), y=np.hypot(3.0, c["age"]), z=np.add(c["age"], 1),
    )"""
BODIES = {"as they are": "c", "the vocabulary": VOCABULARY, "numpy": NUMPY}
CHAINS: dict[str, list[Any]] = {
    "no transformer": [],
    "all transformers": [
        fit_unify, partial(fit_rare, below=40), partial(fit_clip, low=0.05, high=0.95), fit_frequency, fit_impute,
    ],
}  # fmt: skip


def make_scorer(
    folder: Path,
    body: str = "c",
    *,
    chain: Any = (),
    task: str = "binary",
    runtime: str = "lightgbm",
    limits: Limits | None = None,
    policy: Policy | None = None,
    head: str = HEAD,
) -> Scorer:
    """Train a model on the census with these features and return its scorer."""
    code = {"__init__.py": "", "pipeline/__init__.py": "", "pipeline/prepare.py": head + body + "\n"}
    schema, columns = make_schema(task), make_columns(400)
    with np.errstate(all="ignore"):
        made = load_code(code).features(columns.pick([field.name for field in schema.inputs]))
        preprocessor = fit_preprocessor(made, transformers=chain)
        X = preprocessor.transform(made)
    model = fit_model(runtime, task, np.nan_to_num(X, posinf=1e9, neginf=-1e9), make_target(columns, task), preprocessor, 15)
    parts = {
        "name": "census", "schema": schema, "preprocessor": preprocessor, "model": model, "limits": limits, "code": code,
        "policy": policy or Policy(task=task, threshold=0.4),
    }  # fmt: skip
    first = Scorer(write_bundle(folder / "bundle", examples=(), **parts))
    with np.errstate(all="ignore"):
        examples = make_examples(first, columns.rows(np.arange(3)))
    return Scorer(write_bundle(folder / "bundle", examples=examples, **parts))


def outcome(call: Any, row: Any) -> Any:
    """Return the bits of an answer, or all that an error says."""
    try:
        with np.errstate(all="ignore"):
            found = call(row)
    except RowError as error:
        return str(error), error.errors, error.row, error.column
    return [struct.pack("d", v) for v in (found if isinstance(found, list) else [found])]


def is_written(scorer: Scorer, row: Any) -> bool:
    """Tell whether a row is taken by the written code itself."""
    encode = scorer.lane.predict.__globals__["encode"]
    try:
        encode(row)
    except Exception:
        return False
    return True


# ---- what comes

TEXT = st.sampled_from([*LEVELS, "Paris", "CLERK", " nurse ", "", " ", "?", "東京", "ß", "naïve – 東京"]) | st.text(max_size=6)
NUMBER = st.one_of(
    st.integers(0, 120), st.floats(0, 120), st.floats(), st.integers(), st.integers(2**53, 2**60), st.just(-0.0), st.just(10**400),
    st.sampled_from([math.nan, math.inf, -math.inf, 5e-324, 1.7976931348623157e308, 2**1024, 2**53 + 1]),
)  # fmt: skip
DATE = st.one_of(
    st.datetimes().map(lambda d: d.isoformat()), st.dates().map(str), st.just(" 2024-02-29 "),
    st.sampled_from(["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-12:00", "2011-03-27T01:30:00+02:00", "someday", ""]),
)  # fmt: skip
FLAG = st.sampled_from([True, False, 0, 1, 0.0, 1.0, -0.0, 2, 0.5])
WRONG = st.one_of(st.booleans(), NUMBER, TEXT, st.lists(st.integers(), max_size=1), st.just({}), st.just(b"x"))
COLUMNS = {"age": NUMBER, "income": NUMBER, "job": TEXT, "place": TEXT, "member": FLAG, "since": DATE}


@st.composite
def tables(draw: Any, rows: int) -> list[dict[str, Any]]:
    """Return rows mixed from values that hypothesis makes; some lack a column, some have one too many."""
    pools = {
        name: draw(st.lists(st.none() | strategy, min_size=3, max_size=12)) + draw(st.lists(WRONG, max_size=1))
        for name, strategy in COLUMNS.items()
    }
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    # Ranks, most of them low: a wrong value stands last and must not spoil every row.
    made = [{name: pool[int(len(pool) * rng.random() ** 2)] for name, pool in pools.items()} for _ in range(rows)]
    for row in made:
        if rng.random() < 0.05:
            row[str(rng.choice(["sex", "target", "agee", "ünknown"]))] = "F"
        if rng.random() < 0.03:
            del row[str(rng.choice(list(COLUMNS)))]
    return made


def same_on(scorer: Scorer, rows: list[dict[str, Any]]) -> int:
    """Assert that both ways do the same with every row; return how many the written code took itself."""
    for row in rows:
        assert outcome(scorer.predict_row, row) == outcome(scorer._predict_generally, row), row
    return sum(is_written(scorer, row) for row in rows)


CASES = [
    ("as they are", "no transformer", {}),
    ("as they are", "all transformers", {}),
    ("the vocabulary", "no transformer", {}),
    ("the vocabulary", "all transformers", {}),
    ("numpy", "no transformer", {}),
    ("numpy", "all transformers", {"runtime": "linear"}),
    ("as they are", "all transformers", {"limits": Limits(missing="reject", unseen="reject")}),
    ("as they are", "no transformer", {"task": "multiclass"}),
    ("numpy", "no transformer", {"task": "regression"}),
    ("the vocabulary", "no transformer", {"task": "multiclass", "runtime": "linear"}),
]


@pytest.mark.parametrize(("body", "chain", "more"), CASES)
def test_a_row_gets_the_bits_and_the_errors_of_the_general_way(tmp_path, body, chain, more):
    scorer = make_scorer(tmp_path, BODIES[body], chain=CHAINS[chain], **more)
    assert scorer.lane.is_compiled, scorer.lane.why
    taken = 0

    @settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(tables(rows=25))
    def check(rows):
        nonlocal taken
        taken += same_on(scorer, rows)

    check()
    fresh = make_columns(100, seed=3).pick(list(COLUMNS)).to_rows()
    taken += same_on(scorer, fresh)
    assert taken >= (20 if more.get("limits") else 95), "the written code must take rows, or nothing is compared"


@pytest.mark.slow
@pytest.mark.parametrize("body", BODIES)
def test_a_hundred_thousand_rows_get_the_bits_and_the_errors_of_the_general_way(tmp_path, body):
    scorer = make_scorer(tmp_path, BODIES[body], chain=CHAINS["all transformers"])
    assert scorer.lane.is_compiled, scorer.lane.why
    compared = taken = 0

    @settings(max_examples=170, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(tables(rows=200))
    def check(rows):
        nonlocal compared, taken
        taken += same_on(scorer, rows)
        compared += len(rows)

    check()
    assert compared >= 34_000 and taken > compared / 10


def test_all_of_adults_test_rows_get_the_bits_of_the_pipeline(tmp_path, shared_data):
    from ekiben.arrow import from_arrow
    from ekiben.data.infer import infer_fields
    from ekiben.data.sources import read_table
    from ekiben.pipeline.prepare import features

    train = read_table(str(shared_data / "adult" / "train.csv"))
    found = {field.name: field for field in infer_fields(train)}
    fields = tuple(
        Field(
            name=name, kind=f.kind, categories=f.categories, missing=f.missing,
            role="target" if name == "income" else "feature", is_input=name != "income",
        )
        for name, f in found.items()
    )  # fmt: skip
    schema = Schema(fields=fields, task="binary", target="income", classes=("<=50K", ">50K"))
    read = {
        part: from_arrow(read_table(str(shared_data / "adult" / f"{part}.csv"), schema_fields=fields), schema)
        for part in ("train", "test")
    }
    names = [field.name for field in schema.inputs]
    made = features(read["train"].pick(names))
    preprocessor = fit_preprocessor(made, transformers=CHAINS["all transformers"])
    y = np.array([label == ">50K" for label in read["train"]["income"]]).astype(int)
    model = fit_model("lightgbm", "binary", preprocessor.transform(made), y, preprocessor, 60)
    bundle = write_bundle(
        tmp_path / "bundle", name="adult", schema=schema, preprocessor=preprocessor, model=model, policy=Policy(task="binary"),
        code={
            "__init__.py": "", "pipeline/__init__.py": "",
            "pipeline/prepare.py": "from ekiben.columns import Columns\n\ndef features(c: Columns) -> Columns:\n    return c\n",
        },
        examples=(),
    )  # fmt: skip
    scorer = Scorer(bundle)
    assert scorer.lane.is_compiled, scorer.lane.why
    assert read["test"].n == 16_281
    expected = model.predict(preprocessor.transform(features(read["test"].pick(names))))
    rows = read["test"].pick(names).to_rows()
    assert [scorer.predict_row(row) for row in rows] == expected.tolist()
    assert sum(is_written(scorer, row) for row in rows) == len(rows)


# ---- decisions


@pytest.mark.parametrize("task", ["binary", "multiclass", "regression"])
def test_a_row_alone_is_decided_as_in_a_batch(tmp_path, task):
    scorer = make_scorer(tmp_path, task=task)
    rows = make_columns(80, seed=5).pick(list(COLUMNS)).to_rows()
    batch = scorer.to_answers(*scorer.score_columns(scorer.reader.read(rows)))
    assert [scorer.score_row(row) for row in rows] == batch == [scorer.score_rows([row])[0] for row in rows]


@pytest.mark.parametrize("unknown", ["default", "strictest", "lenient"])
def test_a_policy_by_group_finds_the_groups_threshold(tmp_path, unknown):
    policy = Policy(task="binary", threshold=0.4, group_by="sex", thresholds={"F": 0.2, "M": 0.6}, unknown_group=unknown)
    scorer = make_scorer(tmp_path, policy=policy)
    rows = [{**row, "sex": sex} for row in make_columns(40, seed=5).pick(list(COLUMNS)).to_rows() for sex in ("F", " M ", None, "X", "")]
    assert scorer.lane.is_compiled and all(is_written(scorer, row) for row in rows)
    batch = scorer.to_answers(*scorer.score_columns(scorer.reader.read(rows)))
    assert [scorer.score_row(row) for row in rows] == batch
    assert len({answer.label for answer in batch}) == 2
    with pytest.raises(RowError, match="sex"):
        scorer.score_row({k: v for k, v in rows[0].items() if k != "sex"})


@pytest.mark.parametrize("row", [3, None, [], "age", {}])
def test_what_is_no_row_gets_the_readers_error(tmp_path, row):
    scorer = make_scorer(tmp_path)
    assert outcome(scorer.predict_row, row) == outcome(scorer._predict_generally, row)
    assert "row 0" in outcome(scorer.predict_row, row)[0]


def test_a_row_may_be_any_mapping(tmp_path):
    scorer = make_scorer(tmp_path)
    row = make_columns(1, seed=3).pick(list(COLUMNS)).to_rows()[0]
    for other in (OrderedDict(row), MappingProxyType(row), dict(reversed(row.items()))):
        assert scorer.predict_row(other) == scorer.predict_row(row)


def test_a_column_with_far_limits_and_one_with_a_format_are_proved_too():
    far = Check(Field(name="x", kind="number", minimum=5e12, maximum=6e12))
    above, below = (Check(Field(name="x", kind="number", **{end: 5e12})) for end in ("minimum", "maximum"))
    assert all(len(edge_values(check)) > 8 for check in (far, above, below))
    written = Check(Field(name="x", kind="date", format="%d.%m.%Y"))
    assert "05.11.2017" in edge_values(written)


# ---- the vocabulary, and what ends a trace


def test_every_function_of_the_vocabulary_has_a_twin_and_is_compared():
    assert {f.__name__ for f in TWINS} == set(vocabulary.__all__)
    assert all(f"{name}(" in VOCABULARY for name in vocabulary.__all__)


UNTRACED = {
    "a loop": ('c.with_columns(a=np.array([v == "x" for v in c["job"]]))', "a look at the values"),
    "a branch": ('c if len(c["age"]) else c.drop("age")', "a look at the values"),
    "a mean": ('c.with_columns(a=c["age"] - c["age"].mean())', "`.mean`"),
    "a reduction": ('c.with_columns(a=c["age"] - np.max(c["age"]))', "max"),
    "part of a date": ('c.with_columns(a=c["since"].astype("datetime64[Y]").astype(float)).drop("since")', "datetime64"),
    "truth values added": ('c.with_columns(a=(c["age"] > 3) + (c["age"] > 4))', "arithmetic"),
    "the clock": ('c.with_columns(a=np.datetime64("now").astype(float))', "datetime64"),
    "chance": ('c.with_columns(a=np.random.default_rng(0).random(c.n))', "random"),
    "a cube": ('c.with_columns(a=c["age"] ** 3)', "power"),
    "a new table": ('Columns({"age": c["age"]}, {"age": "number"})', "a look at the values"),
    "an array made of it": ('c.with_columns(a=np.asarray(c["age"]))', "not elementwise"),
    "a hidden failure": ('c.with_columns(a=c["age"] * (1 if hasattr(c["age"], "tolist") else 2))', "`.tolist`"),
}


@pytest.mark.parametrize("case", UNTRACED)
def test_features_that_cannot_be_traced_go_the_general_way_and_say_why(tmp_path, case):
    body, reason = UNTRACED[case]
    scorer = make_scorer(tmp_path, body)
    assert not scorer.lane.is_compiled and reason in scorer.lane.why
    assert scorer.lane.proved_rows == 0 and not scorer.lane.source
    rows = make_columns(5, seed=2).pick(list(COLUMNS)).to_rows()
    alone = [scorer.to_answers(*scorer.score_columns(scorer.reader.read([row])))[0] for row in rows]
    assert [scorer.score_row(row) for row in rows] == alone
    assert "takes" in outcome(scorer.predict_row, {**rows[0], "age": "old"})[0]


@pytest.mark.parametrize(
    "line",
    [
        "import time", "from datetime import datetime", "import os", "import numpy.random as r", "from numpy.random import default_rng",
        "from numpy import random", "x = open('a').read()", "import pandas as pd", "eval('1')", "def g():\n    global x\n    x = 1",
        "import functools, requests",
    ],
)  # fmt: skip
def test_code_that_may_change_its_answer_is_not_traced(line):
    assert find_changing({"pipeline/prepare.py": f"{line}\n"})
    assert not find_changing({"pipeline/prepare.py": "import numpy as np\nfrom math import log\nfrom . import places\n"})


@pytest.mark.parametrize("end", ["except Exception:", "except BaseException:", "except:", "finally:"])
def test_code_that_swallows_the_end_of_a_trace_is_not_believed(tmp_path, end):
    head = HEAD.replace("    return ", f"    try:\n        old = c['age'].max() > 200\n        c = c.with_columns(a=0)\n    {end}\n        return c\n    return ")
    scorer = make_scorer(tmp_path, "c", head=head)
    assert not scorer.lane.is_compiled and "`.max`" in scorer.lane.why


def test_features_that_remember_are_found_out_by_the_proof(tmp_path):
    head = HEAD.replace("LONG =", "SEEN = []\nLONG =").replace("    return ", "    SEEN.append(1)\n    return ")
    scorer = make_scorer(tmp_path, "c.with_columns(a=len(SEEN))", head=head)
    assert not scorer.lane.is_compiled and "proof" in scorer.lane.why


def test_a_wrong_twin_is_found_out_by_the_proof(tmp_path, monkeypatch):
    from ekiben.serving.scoring.symbols import Symbol

    body = 'c.with_columns(a=log1p(c["income"]))'
    right = TWINS[vocabulary.log1p]
    # Wrong for infinitely few numbers: those at the edge of where a logarithm is.
    edge = lambda a: Symbol("number", "0.5 if {0} == -1 else {1}", (a, right(a)))  # noqa: E731
    monkeypatch.setitem(TWINS, vocabulary.log1p, edge)
    wrong = make_scorer(tmp_path / "wrong", body)
    assert not wrong.lane.is_compiled and "proof" in wrong.lane.why
    monkeypatch.setitem(TWINS, vocabulary.log1p, right)
    assert make_scorer(tmp_path / "right", body).lane.is_compiled


def test_tracing_leaves_the_users_own_code_and_the_vocabulary_as_they_were(tmp_path):
    import sys

    before = {name: getattr(vocabulary, name) for name in vocabulary.__all__}
    scorer = make_scorer(tmp_path, VOCABULARY)
    modules = {name for name in sys.modules if name.startswith("_ekiben_bundle_")}
    assert scorer.lane.is_compiled
    assert {name for name in sys.modules if name.startswith("_ekiben_bundle_")} <= modules | {scorer.features.__module__}
    assert {name: getattr(vocabulary, name) for name in vocabulary.__all__} == before
    columns = make_columns(5).pick(list(COLUMNS))
    assert isinstance(scorer.features(columns)["u"], np.ndarray)


# ---- in a service


def test_threads_do_not_mix_their_rows(tmp_path):
    scorer = make_scorer(tmp_path, chain=CHAINS["all transformers"])
    rows = make_columns(400, seed=8).pick(list(COLUMNS)).to_rows()
    expected = [scorer.predict_row(row) for row in rows]
    found: dict[int, list[float]] = {}

    def score(start: int) -> None:
        turned = rows[start:] + rows[:start]
        way = scorer._predict_generally if start == 50 else scorer.predict_row
        got = [way(row) for _ in range(5) for row in turned][-len(rows) :]
        found[start] = got[len(rows) - start :] + got[: len(rows) - start]

    threads = [threading.Thread(target=score, args=(start,)) for start in (0, 50, 100, 150, 200, 250)]
    batch = scorer.reader.read(rows)
    threads.append(threading.Thread(target=lambda: [scorer.score_columns(batch) for _ in range(50)]))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(got == expected for got in found.values()) and len(found) == 6


def test_requests_cannot_make_the_tables_grow_without_end(tmp_path):
    scorer = make_scorer(tmp_path)
    row = {"age": 3, "income": 1.0, "job": "clerk", "place": "Lyon", "member": True, "since": "2020-01-01"}
    for i in range(6000):
        scorer.predict_row({**row, "job": f"job {i}"})
    scorer.predict_row({**row, "job": "x" * 10_000})
    from ekiben.serving.scoring.writer import Table

    tables = [v for v in scorer.lane.predict.__globals__.values() if isinstance(v, Table)]
    assert tables and all(len(table) <= 4096 and max(len(k or "") for k in table) <= 100 for table in tables)


def test_a_date_that_has_no_utc_is_an_error_of_the_row_and_not_of_the_service(tmp_path):
    assert parse_date("0001-01-01T00:00:00+14:00") is None and parse_date("9999-12-31T23:59:59-12:00") is None
    scorer = make_scorer(tmp_path, 'c.with_columns(m=month(c["since"]))')
    row = {"age": 3, "income": 1.0, "job": "clerk", "place": "Lyon", "member": True, "since": "0001-01-01T00:00:00+14:00"}
    with pytest.raises(RowError, match="since"):
        scorer.predict_row(row)


@given(st.text("0123456789", max_size=80))
def test_a_long_number_is_no_date(text):
    assert len(text) == 8 or parse_date(text) is parse_date(f"20200101{text}9") is None


@given(st.datetimes(datetime(1, 1, 2), datetime(9999, 12, 30), timezones=st.none() | st.timezones()), st.sampled_from("T t"))
def test_every_moment_that_python_writes_is_read(moment, between):
    meant = moment if moment.tzinfo is None else moment.astimezone(UTC).replace(tzinfo=None)
    assert parse_date(moment.isoformat(between)) == meant
    assert parse_date(moment.date().isoformat()) == parse_date(moment.strftime("%4Y%m%d")) == datetime(*moment.timetuple()[:3])


@pytest.mark.parametrize("text", ["2020-01-01" + "T" * 40, "2020-01-01T10:00:00." + "1" * 100_000, "2020-01-01511:00", "20200101" + "1" * 100_000])
def test_a_text_that_goes_on_for_ever_is_no_date(text, tmp_path):
    assert parse_date(text) is None and parse_date(text, "%d.%m.%Y") is None
    scorer = make_scorer(tmp_path, 'c.with_columns(m=month(c["since"]))')
    row = {"age": 3, "income": 1.0, "job": "clerk", "place": "Lyon", "member": True, "since": text}
    with pytest.raises(RowError, match="since"):
        scorer.predict_row(row)


def test_the_reader_takes_the_same_tables_of_columns(tmp_path):
    """A schema with one column of each kind alone: tables and checks have no neighbour to lean on."""
    for kind, value in (("number", 3), ("flag", True), ("category", "a"), ("text", "b"), ("date", "2020-01-01")):
        fields = (Field(name="x", kind=kind), Field(name="y", kind="number"), Field(name="t", kind="number", role="target", is_input=False))
        schema = Schema(fields=fields, task="regression", target="t")
        train = Columns.from_rows([{"x": value, "y": i} for i in range(30)], schema)
        preprocessor = fit_preprocessor(train)
        model = fit_model("linear", "regression", preprocessor.transform(train), np.arange(30.0), preprocessor)
        code = {"__init__.py": "", "pipeline/__init__.py": "", "pipeline/prepare.py": "def features(c):\n    return c\n"}
        bundle = write_bundle(
            tmp_path / kind, name="one", schema=schema, preprocessor=preprocessor, model=model, policy=Policy(task="regression"),
            code=code, examples=(),
        )  # fmt: skip
        scorer = Scorer(bundle)
        assert scorer.lane.is_compiled, scorer.lane.why
        same_on(scorer, [{"x": v, "y": 2} for v in (value, None, 5, "zz", True, 1.5, "2020-02-02T10:00", "", [])] + [{"y": 2}, {"x": value}])
