"""Fixtures that several test files share."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("BENTOML_DO_NOT_TRACK", "True")
os.environ.setdefault("EKIBEN_PIPELINE__KERNEL_IDLE_S", "0")  # a test's project is never run again: keep nothing warm for it

# A pair of keys of the tests' own: what they package is signed, and the developer's keys are left alone.
KEYS = tempfile.TemporaryDirectory(prefix="ekiben-keys-")
os.environ["EKIBEN_CONFIG"] = KEYS.name
for variable in ("EKIBEN_SIGNING_KEY", "EKIBEN_TRUSTED_KEYS"):
    os.environ.pop(variable, None)


# The same examples every time, so that a change is what makes a test fail; `make fuzz` draws others.
settings.register_profile("same", derandomize=True)
settings.register_profile("other", derandomize=False, print_blob=True)
settings.load_profile("same")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of real tables beside the repository, or skip."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"the real tables are not here ({folder})")
    return folder
