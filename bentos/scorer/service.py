"""The Bento's service: a thin shell around `ekiben.serving`, which travels beside this file.

`ServiceApp` stands before everything of BentoML's: it asks for keys, answers its own addresses (`/predict`, `/explain`,
`/feedback`, the page at `/`, the probes, the metrics), and lets administrators through to the rest (`/docs.json`). What
an operator sets are the variables `EKIBEN_SERVE__*`.
"""

import os
from pathlib import Path

from ekiben.serving.security.signing import admit

HERE = Path(__file__).resolve().parent
SEAL = admit(HERE)  # every file of the Bento, before any of the rest is imported

import bentoml  # noqa: E402

from ekiben.errors import EkibenError  # noqa: E402
from ekiben.serving.http.app import ServiceApp  # noqa: E402
from ekiben.serving.signals.logs import take_over  # noqa: E402
from ekiben.serving.options import ServiceOptions  # noqa: E402
from ekiben.serving.http.state import State  # noqa: E402
from ekiben.serving.security.trust import trusted_keys  # noqa: E402

take_over()  # from here on, BentoML has set up its own logs
STATE = State()
try:
    OPTIONS = ServiceOptions.from_env(os.environ)
except EkibenError as exc:
    raise SystemExit(f"error: not served: {exc}") from None


@bentoml.service(
    name="scorer",
    workers=1,
    threads=2,
    # For its own pages; requests for ours never meet BentoML's middleware (see ekiben.serving.http.lifecycle).
    traffic={"timeout": 10},
    logging={"access": {"enabled": False}},
    ssl={"enabled": True, "certfile": OPTIONS.tls_certificate, "keyfile": OPTIONS.tls_key}
    if OPTIONS.tls_certificate
    else {"enabled": False},
    endpoints={"livez": "/livez", "readyz": "/readyz"},
)
class Scorer:
    """Verifies and loads the bundle, then answers."""

    def __init__(self) -> None:
        journal, deployment = os.environ.get("EKIBEN_JOURNAL"), os.environ.get("EKIBEN_DEPLOYMENT")
        context = bentoml.server_context
        STATE.trust, STATE.seal = trusted_keys(), SEAL
        tag = "" if context.bento_version == "not available" else f"{context.bento_name}:{context.bento_version}"
        STATE.open(
            Path(os.environ.get("EKIBEN_BUNDLE") or HERE / "bundle"),
            journal=Path(journal) if journal else None,
            bento=tag,
            service=OPTIONS,
            deployment=Path(deployment) if deployment else None,
        )

    def __is_ready__(self) -> bool:
        """Tell BentoML's own probe what `/readyz` says."""
        return STATE.scorer is not None


Scorer.add_asgi_middleware(ServiceApp, state=STATE)
