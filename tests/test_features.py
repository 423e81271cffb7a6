"""Every function of the vocabulary: row by row the same as the batch, and missing in, missing out."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ekiben import features as f
from ekiben.columns import is_absent
from ekiben.errors import DataError

SIZES = st.shared(st.integers(1, 12), key="n")


def _texts(n):
    values = st.none() | st.text(max_size=6) | st.sampled_from(["a b c", "A-B", "x", "north"])
    return st.lists(values, min_size=n, max_size=n).map(_objects)


def _objects(values):
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


TEXTS = SIZES.flatmap(_texts)
NUMBERS = SIZES.flatmap(lambda n: hnp.arrays(np.float64, n, elements=st.floats(allow_nan=True, allow_infinity=False) | st.sampled_from([0.0, -1.0, 1.0])))
FLAGS = SIZES.flatmap(lambda n: hnp.arrays(np.float64, n, elements=st.sampled_from([0.0, 1.0, np.nan])))
DATES = SIZES.flatmap(
    lambda n: hnp.arrays("datetime64[us]", n, elements=st.integers(-(10**15) * 4, 4 * 10**15).map(lambda v: np.datetime64(v, "us")) | st.just(np.datetime64("NaT", "us")))
)

CASES = {
    "lower": (f.lower, TEXTS),
    "upper": (f.upper, TEXTS),
    "strip": (f.strip, TEXTS),
    "length": (f.length, TEXTS),
    "contains": (lambda a: f.contains(a, "a"), TEXTS),
    "starts_with": (lambda a: f.starts_with(a, "a"), TEXTS),
    "split_part": (lambda a: f.split_part(a, " ", 1), TEXTS),
    "split_part from the end": (lambda a: f.split_part(a, " ", -2), TEXTS),
    "replace": (lambda a: f.replace(a, "a", "bb"), TEXTS),
    "is_missing": (f.is_missing, TEXTS),
    "is_missing of numbers": (f.is_missing, NUMBERS),
    "is_missing of dates": (f.is_missing, DATES),
    "coalesce": (lambda a, b: f.coalesce(a, b, 0.5), NUMBERS, NUMBERS),
    "coalesce of texts": (lambda a, b: f.coalesce(a, b, "?"), TEXTS, TEXTS),
    "year": (f.year, DATES),
    "month": (f.month, DATES),
    "day": (f.day, DATES),
    "weekday": (f.weekday, DATES),
    "hour": (f.hour, DATES),
    "day_of_year": (f.day_of_year, DATES),
    "days_between": (f.days_between, DATES, DATES),
    "ratio": (f.ratio, NUMBERS, NUMBERS),
    "difference": (f.difference, NUMBERS, NUMBERS),
    "log1p": (f.log1p, NUMBERS),
    "clip": (lambda a: f.clip(a, -1, 2), NUMBERS),
    "bucket": (lambda a: f.bucket(a, [-1, 0, 3.5]), NUMBERS),
    "as_category": (f.as_category, NUMBERS),
    "as_category of dates": (f.as_category, DATES),
    "lookup": (lambda a: f.lookup(a, {"x": 1.0, "north": 2}), TEXTS),
    "lookup of numbers": (lambda a: f.lookup(a, {0: "nothing", 1: "one"}, "many"), NUMBERS),
    "combine": (lambda a, b, c: f.combine(a, b, c), TEXTS, FLAGS, NUMBERS),
    "when": (lambda a, b, c: f.when(a, b, c), FLAGS, NUMBERS, NUMBERS),
    "when of texts": (lambda a, b: f.when(a > 0, "big", b), NUMBERS, TEXTS),
    "when of dates": (lambda a, b: f.when(a, b), FLAGS, DATES),
}


def test_every_public_function_of_the_vocabulary_is_tried():
    assert {name.split(" ")[0] for name in CASES} == set(f.__all__)


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
@pytest.mark.parametrize("case", CASES)
def test_one_row_at_a_time_gives_the_bits_of_the_batch(case):
    function, *columns = CASES[case]

    @given(st.tuples(*columns))
    def check(arrays):
        whole = function(*arrays)
        assert whole.shape == arrays[0].shape
        for i in range(len(whole)):
            one = function(*[a[i : i + 1] for a in arrays])
            assert one.dtype == whole.dtype
            assert one.tolist() == whole[i : i + 1].tolist() or one.tobytes() == whole[i : i + 1].tobytes()

    check()


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
@pytest.mark.parametrize("case", [c for c in CASES if not c.startswith(("is_missing", "coalesce", "lookup", "when"))])
def test_a_row_with_a_missing_value_has_a_missing_result(case):
    function, *columns = CASES[case]

    @given(st.tuples(*columns))
    def check(arrays):
        gone = np.any([is_absent(a) for a in arrays], axis=0)
        assert is_absent(function(*arrays))[gone].all()

    check()


@given(DATES)
def test_parts_of_dates_are_those_of_the_standard_library(dates):
    parts = np.column_stack([f.year(dates), f.month(dates), f.day(dates), f.weekday(dates), f.hour(dates), f.day_of_year(dates)])
    for moment, found in zip(dates.tolist(), parts, strict=True):
        if moment is None:
            assert np.isnan(found).all()
        else:
            expected = (moment.year, moment.month, moment.day, moment.weekday(), moment.hour, moment.timetuple().tm_yday)
            assert tuple(found) == expected


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: f.lower(np.array([1.0])), "`lower` takes a category or text column, got float64"),
        (lambda: f.ratio(_objects(["a"]), np.array([1.0])), "`ratio` takes a number or flag column"),
        (lambda: f.year(np.array([2024.0])), "`year` takes a date column"),
        (lambda: f.bucket(np.array([1.0]), [2, 1]), "in rising order"),
        (lambda: f.bucket(np.array([1.0]), [1], ["low"]), "takes 2 labels, got 1"),
    ],
)
def test_the_wrong_kind_of_column_is_answered_in_words(call, message):
    with pytest.raises(DataError, match=message):
        call()
