"""One row at a time and all rows at once give the same features: what is trained on is what the service computes."""

from pathlib import Path

import numpy as np
import pytest

from ekiben.columns import Columns
from ekiben.data.convert import to_columns
from ekiben.data.schema import fields_from_pandera
from ekiben.data.sources import read_table
from ekiben.errors import DataError
from ekiben.pipeline.prepare import features
from ekiben.pipeline.schema import table as declared
from ekiben.settings import load_settings

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def rows() -> Columns:
    """Return up to 200 real rows, spread over the beginning of the table, with the columns that `features` sees."""
    settings, fields = load_settings(ROOT), fields_from_pandera(declared)
    try:
        table = read_table(
            settings.data.source, settings_data=settings.data, schema_fields=fields, limit=5_000, root=ROOT
        )
    except DataError as exc:
        pytest.skip(f"the data cannot be read here: {exc}")
    roles = settings.columns.roles
    seen = {"feature", "time"} | ({"sensitive"} if settings.columns.sensitive_as_input else set())
    inputs = [f.name for f in fields if roles.get(f.name, "id" if f.unique else "feature") in seen]
    columns = to_columns(table, fields).pick(inputs)
    return columns.rows(np.unique(np.linspace(0, columns.n - 1, 200).astype(int)))


def with_missing(rows: Columns, *names: str) -> Columns:
    """Return the rows with nothing in these columns."""
    nothing = {"number": np.nan, "flag": np.nan, "date": np.datetime64("NaT")}
    gaps = {name: np.full(rows.n, nothing.get(rows.kinds[name]), dtype=rows[name].dtype) for name in names}
    return rows.with_columns(**{name: (rows.kinds[name], values) for name, values in gaps.items()})


def assert_same(rows: Columns) -> None:
    """Compare the features of all rows at once with those of each row alone."""
    batch = features(rows)
    for i in range(rows.n):
        alone = features(rows.rows([i]))
        assert list(alone) == list(batch) and alone.kinds == batch.kinds
        for name in batch:
            np.testing.assert_array_equal(alone[name], batch[name][i : i + 1], err_msg=f"`{name}` of row {i}")


def test_one_row_at_a_time_equals_the_batch(rows: Columns) -> None:
    assert_same(rows)


def test_rows_with_missing_values_do_too(rows: Columns) -> None:
    few = rows.rows(range(min(3, rows.n)))
    for name in rows:
        assert_same(with_missing(few, name))
    assert_same(with_missing(few, *rows))


def test_the_order_of_rows_does_not_matter(rows: Columns) -> None:
    batch, turned = features(rows), features(rows.rows(np.arange(rows.n)[::-1]))
    for name in batch:
        np.testing.assert_array_equal(turned[name][::-1], batch[name], err_msg=f"`{name}`")
