"""settings.ini can be read, and speaks of columns that the schema page knows."""

from pathlib import Path

from ekiben.data.schema import fields_from_pandera
from ekiben.pipeline.schema import table
from ekiben.settings import load_settings

ROOT = Path(__file__).resolve().parents[1]


def test_every_column_with_a_role_is_in_the_schema() -> None:
    known = {field.name for field in fields_from_pandera(table)}
    assert set(load_settings(ROOT).columns.roles) <= known


def test_a_model_must_reach_something_before_it_is_packaged() -> None:
    assert load_settings(ROOT).gates.gates


def test_fairness_is_judged_for_every_sensitive_column() -> None:
    settings = load_settings(ROOT)
    judged = {name.strip() for gate in settings.gates.declared for name in gate.slice.split("*")}
    assert {name for name in settings.columns.sensitive if not set("[]*") & set(name)} <= judged
