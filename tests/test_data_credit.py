"""The simulated table: reproducible, flawed as documented, and true to its own formulas."""

from __future__ import annotations


import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from ekiben.data.credit import BLOCK_ROWS, parse_location, simulate_batches, simulate_credit, truth
from ekiben.errors import DataError


@pytest.fixture(scope="module")
def table() -> pa.Table:
    return simulate_credit("simulated:credit?rows=60000&seed=3")


def test_the_seed_alone_decides_however_the_rows_are_read(table: pa.Table) -> None:
    again = pa.Table.from_batches(simulate_batches("simulated:credit?rows=60000&seed=3", batch_rows=999))
    assert again.equals(table)
    assert not simulate_credit("simulated:credit?rows=60000&seed=4").equals(table)
    assert table.num_rows == 60_000 > 3 * BLOCK_ROWS


def test_the_truth_belongs_to_the_table(table: pa.Table) -> None:
    known = truth("simulated:credit?rows=60000&seed=3")
    assert np.array_equal(known.defaulted, np.array(table["default"]) == "yes")
    sure, unlikely = known.probability > 0.9, known.probability < 0.1
    assert known.defaulted[sure].mean() > 0.9 and known.defaulted[unlikely].mean() < 0.1
    assert abs(known.defaulted.mean() - known.probability.mean()) < 4 * 0.5 / np.sqrt(60_000)
    assert 0.78 <= known.auc <= 0.87


def test_the_injected_disparity_is_the_one_asked_for(table: pa.Table) -> None:
    known = truth("simulated:credit?rows=60000&seed=3")
    none = truth("simulated:credit?rows=60000&seed=3&disparity=0")
    female = np.array(table["sex"]) == "Female"
    assert none.injected == 0 and 0.05 < known.injected < 0.1
    assert known.rate["Female"] == pytest.approx(known.probability[female].mean())
    assert known.rate["Female"] - none.rate["Female"] == pytest.approx(known.injected)
    assert known.rate["Male"] == none.rate["Male"]
    odds = np.log(known.probability / (1 - known.probability)) - np.log(none.probability / (1 - none.probability))
    assert np.allclose(odds, 0.6 * female)
    assert known.parity_ratio == pytest.approx(known.rate["Male"] / known.rate["Female"])


def test_the_flaws_are_as_documented(table: pa.Table) -> None:
    columns = table.to_pandas()
    self_employed = columns["employment"] == "self-employed"
    assert columns["income"][self_employed].isna().mean() == pytest.approx(0.15, abs=0.02)
    assert columns["income"][columns["employment"].isin(["full-time", "part-time"])].isna().mean() == pytest.approx(0.02, abs=0.005)
    assert columns["history_years"].isna().mean() == pytest.approx(0.05, abs=0.005)
    assert columns["employment"].isna().mean() == pytest.approx(0.02, abs=0.005)
    assert (columns["purpose"] != columns["purpose"].str.lower()).mean() == pytest.approx(0.05, abs=0.005)
    assert (columns["income"] > 15_000).mean() == pytest.approx(0.005, abs=0.002)
    copies = columns.drop(columns=["application_id"])
    assert (copies == copies.shift()).where(copies.notna(), copies.shift().isna()).all(axis=1).mean() == pytest.approx(0.005, abs=0.002)
    assert columns["application_id"].is_unique and columns["applied_on"].is_monotonic_increasing
    share = (columns["sex"] == "Female").groupby(columns["postcode"]).mean()
    assert share["01067"] == pytest.approx(0.15, abs=0.03) and share["09111"] == pytest.approx(0.85, abs=0.03)


def test_drift_begins_on_its_day_and_is_of_its_kind() -> None:
    plain = simulate_credit("simulated:credit?rows=40000")
    day = pc.cast(pc.divide(pc.cast(pc.subtract(plain["applied_on"], plain["applied_on"][0]), pa.int64()), 86_400_000_000), pa.int64())
    late = np.array(day) >= 500
    for drift, column in (("mean_shift", "income"), ("category_share", "purpose"), ("concept", "default")):
        moved = simulate_credit(f"simulated:credit?rows=40000&drift={drift}&from_day=500")
        assert moved.filter(pa.array(~late)).equals(plain.filter(pa.array(~late)))
        assert not moved.filter(pa.array(late))[column].equals(plain.filter(pa.array(late))[column])
        if drift == "mean_shift":
            ratio = pc.mean(moved.filter(pa.array(late))["income"]).as_py() / pc.mean(plain.filter(pa.array(late))["income"]).as_py()
            assert ratio == pytest.approx(0.7, abs=0.001)
        if drift == "category_share":
            purpose = pc.utf8_lower(moved.filter(pa.array(late))["purpose"])
            assert pc.mean(pc.cast(pc.equal(purpose, "business"), pa.float64())).as_py() == pytest.approx(0.45, abs=0.02)
        if drift == "concept":
            inputs = [name for name in plain.column_names if name != "default"]
            assert moved.select(inputs).equals(plain.select(inputs))


def test_labels_come_late_and_the_truth_knows_them() -> None:
    late = simulate_credit("simulated:credit?rows=7300&label_delay_days=90")
    assert late["default"].null_count == 900
    assert late["default"][6399].as_py() is not None and late["default"][6400].as_py() is None
    known = truth("simulated:credit?rows=7300&label_delay_days=90")
    assert np.array_equal(known.defaulted, np.array(simulate_credit("simulated:credit?rows=7300")["default"]) == "yes")


@pytest.mark.parametrize(
    ("location", "says"),
    [
        ("simulated:credits", "no simulation `credits`; did you mean `credit`"),
        ("simulated:credit?row=5", "no option `row`; did you mean `rows`"),
        ("simulated:credit?rows=many", "`rows` takes a number, got `many`"),
        ("simulated:credit?rows=0", "must be at least 1"),
        ("simulated:credit?drift=concepts", "did you mean `concept`"),
    ],
)
def test_an_option_that_is_wrong_is_named(location: str, says: str) -> None:
    with pytest.raises(DataError, match=says):
        parse_location(location)


def test_a_million_rows_come_in_batches_that_memory_holds() -> None:
    rows = [b.num_rows for b in simulate_batches("simulated:credit?rows=1000000")]
    assert sum(rows) == 1_000_000 and max(rows) < 200_000
