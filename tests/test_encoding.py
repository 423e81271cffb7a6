"""Fitted transformers and the matrix: learnt once, applied row by row."""

from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ekiben.columns import Columns, is_absent
from ekiben.encoding import (
    Preprocessor,
    encode_levels,
    fit_clip,
    fit_frequency,
    fit_impute,
    fit_preprocessor,
    fit_rare,
    fit_unify,
)
from ekiben.errors import DataError, IntegrityError

LEVELS = ["car", "Car", " CAR", "van", "bike", "boat", "", None]


def _objects(values):
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


@st.composite
def tables(draw, min_rows=1):
    n = draw(st.integers(min_rows, 12))
    column = lambda elements: draw(st.lists(elements, min_size=n, max_size=n))  # noqa: E731
    return Columns(
        {
            "x": np.array(column(st.floats(-1e6, 1e6) | st.just(float("nan")))),
            "f": np.array(column(st.sampled_from([0.0, 1.0, float("nan")]))),
            "c": _objects(column(st.sampled_from(LEVELS))),
            "d": np.array(column(st.just(np.datetime64("2024-01-01", "us")))),
        },
        {"x": "number", "f": "flag", "c": "category", "d": "date"},
    )


CHAINS = {
    "nothing": [],
    "clip": [partial(fit_clip, low=0.1, high=0.9)],
    "impute": [fit_impute],
    "unify and pool": [fit_unify, partial(fit_rare, below=2)],
    "frequency": [fit_frequency],
    "all": [fit_unify, partial(fit_rare, below=2), fit_clip, fit_frequency, fit_impute],
}


@pytest.mark.parametrize("chain", CHAINS)
def test_the_matrix_of_one_row_is_its_row_of_the_batch_after_a_way_through_json(chain):
    @given(tables(min_rows=3), tables())
    def check(train, new):
        fitted = fit_preprocessor(train, transformers=CHAINS[chain])
        read = Preprocessor.from_json(fitted.to_json())
        assert read == fitted
        X = fitted.transform(new)
        assert X.shape == (new.n, len(fitted.names)) and X.dtype == np.float64 and X.flags.c_contiguous
        rows = [read.transform(new.rows([i])) for i in range(new.n)]
        assert np.vstack(rows).tobytes() == X.tobytes()

    check()


@given(tables(min_rows=3), tables())
def test_codes_stand_for_the_levels_and_missing_or_unseen_is_nan(train, new):
    fitted = fit_preprocessor(train)
    levels = fitted.categories["c"]
    codes = fitted.transform(new)[:, fitted.names.index("c")]
    for value, code in zip(new["c"], codes, strict=True):
        assert np.isnan(code) if value not in levels else levels[int(code)] == value
    assert fitted.categorical == (fitted.names.index("c"),) and fitted.n_levels == (len(levels),)


def test_levels_come_by_frequency_and_then_alphabet_or_as_declared():
    train = Columns({"c": _objects(["b", "a", "z", "z", "b", "c", None])})
    assert fit_preprocessor(train).categories == {"c": ("b", "z", "a", "c")}
    declared = fit_preprocessor(train, categories={"c": ["z", "y"], "other": ["q"]})
    assert declared.categories == {"c": ("z", "y")}
    assert encode_levels(train["c"], ("z", "y")).tolist()[2] == 0 and np.isnan(encode_levels(train["c"], ("z", "y"))[0])


def test_each_transformer_is_fitted_on_what_those_before_it_make():
    train = Columns({"c": _objects(["Car", "Car", "car", "van"])})
    fitted = fit_preprocessor(train, transformers=[fit_unify, partial(fit_rare, below=3)])
    assert fitted.categories == {"c": ("Car", "(rare)")}
    assert fitted.transform(Columns({"c": _objects(["CAR", "van", "tram", None])}))[:3, 0].tolist() == [0, 1, 1]


def test_a_fitted_transformer_can_be_given_as_it_is():
    train, other = Columns({"x": np.arange(10.0)}), Columns({"x": np.array([100.0])})
    clip = fit_clip(train, low=0, high=1)
    assert fit_preprocessor(other, transformers=[clip]).transform(other).tolist() == [[9.0]]


def test_limits_and_medians_are_those_of_the_present_values():
    train = Columns({"x": np.append(np.arange(101.0), np.nan), "f": np.array([1.0] * 60 + [0.0] * 42)}, {"x": "number", "f": "flag"})
    assert fit_clip(train, low=0.1, high=0.9).limits == {"x": (10.0, 90.0)}
    assert fit_impute(train).numbers == {"x": 50.0, "f": 1.0}
    assert fit_frequency(Columns({"c": _objects(["a", "a", "b", None])})).shares == {"c": {"a": 0.5, "b": 0.25}}


def test_columns_with_no_value_at_all_are_left_alone():
    empty = Columns({"x": np.full(3, np.nan), "c": _objects([None] * 3)})
    for fit in (fit_clip, fit_impute, fit_rare, fit_unify, fit_frequency):
        after = fit(empty).apply(empty)
        assert is_absent(after["x"]).all() and is_absent(after["c"]).all()
    assert np.isnan(fit_preprocessor(empty).transform(empty)).all()


@given(tables(min_rows=3))
def test_applying_a_transformer_changes_neither_kinds_nor_rows_nor_the_original(train):
    before = Columns(dict(train), train.kinds)
    for fit in (fit_clip, fit_impute, fit_rare, fit_unify):
        after = fit(train).apply(train)
        assert after.kinds == train.kinds and after.n == train.n
    assert train == before


def test_texts_and_dates_that_are_left_over_are_named_and_no_feature_at_all_is_refused():
    left = Columns({"x": [1.0], "note": ("x",), "d": np.array(["2024-01-01"], dtype="datetime64[us]")}, {"x": "number", "note": "text", "d": "date"})
    assert fit_preprocessor(left).dropped == ("note", "d")
    with pytest.raises(DataError, match="no feature is left"):
        fit_preprocessor(left.drop("x"))


def test_a_transformer_for_another_kind_of_column_is_refused_by_name():
    with pytest.raises(DataError, match="column `c` is a category; this takes number"):
        fit_clip(Columns({"c": _objects(["a"])}), names=["c"])


def test_a_stored_preprocessor_with_an_unknown_transformer_is_refused():
    raw = fit_preprocessor(Columns({"x": [1.0, 2.0]}), transformers=[fit_clip]).to_json()
    with pytest.raises(IntegrityError, match="not a stored Preprocessor"):
        Preprocessor.from_json(raw.replace(b'"clip"', b'"exec"'))
