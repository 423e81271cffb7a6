"""The Bento's service: a thin shell around `ekiben.serving`, which travels beside this file.

`ServiceApp` answers the hot path (`/predict`, `/explain`, `/feedback`) and the probes before BentoML's own routing sees
them; everything else (the page at `/`, `/docs.json`) is BentoML's.
"""

import os
from pathlib import Path

from ekiben.serving.signing import admit

HERE = Path(__file__).resolve().parent
SEAL = admit(HERE)  # every file of the Bento, before any of the rest is imported

import bentoml  # noqa: E402

from ekiben.serving.app import ServiceApp, State  # noqa: E402
from ekiben.serving.trust import trusted_keys  # noqa: E402

STATE = State()


@bentoml.service(
    name="scorer",
    workers=1,
    threads=2,
    # BentoML keeps a timer for every request until this many seconds have passed, answered or not: keep it short.
    traffic={"timeout": 10},
    # Its tracing middleware costs more than a prediction.
    tracing={"excluded_urls": "predict,explain,feedback,livez,readyz,metrics"},
    logging={"access": {"enabled": False}},
    endpoints={"livez": "/livez", "readyz": "/readyz"},
)
class Scorer:
    """Verifies and loads the bundle, then answers."""

    def __init__(self) -> None:
        journal = os.environ.get("EKIBEN_JOURNAL")
        context = bentoml.server_context
        STATE.trust, STATE.seal = trusted_keys(), SEAL
        tag = "" if context.bento_version == "not available" else f"{context.bento_name}:{context.bento_version}"
        STATE.open(
            Path(os.environ.get("EKIBEN_BUNDLE") or HERE / "bundle"),
            journal=Path(journal) if journal else None,
            bento=tag,
        )

    def __is_ready__(self) -> bool:
        """Tell BentoML's own probe what `/readyz` says."""
        return STATE.scorer is not None


Scorer.add_asgi_middleware(ServiceApp, state=STATE)
