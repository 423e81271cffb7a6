"""The services that the benchmarks of HTTP, of starting and of memory compare, all with one model of Adult behind them.

The model is the reference model: 200 trees of 31 leaves, trained on Adult without `sex` and `race`. ekiben's Bento holds
it as a bundle; MLflow's sides hold the same booster parameters in a scikit-learn Pipeline, as its users log one.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

TREES, LEAVES = 200, 31
REPOSITORY = Path(__file__).resolve().parents[2]
ADULT = REPOSITORY.parent / "shared" / "data" / "adult"
LABELS = ("<=50K", ">50K")
OUT = ("income", "sex", "race")
QUIET = {
    "BENTOML_DO_NOT_TRACK": "True",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "OMP_NUM_THREADS": "1",
    "PYTHONWARNINGS": "ignore",
}


@dataclass(frozen=True)
class Side:
    """A service: how it is started, and what it is asked.

    ``{port}`` in the command is the port; ``body`` goes to ``path``, ``alive`` is asked until it answers with 200.
    """

    name: str
    command: list[str]
    body: bytes
    path: str = "/predict"
    alive: str = "/readyz"
    headers: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)


def load_table(folder: Path, name: str) -> Any:
    """Return one file of Adult as a DataFrame, missing values as such, labels without a full stop."""
    import pandas as pd

    table = pd.read_csv(folder / name, skipinitialspace=True, na_values=["?"])
    table["income"] = table["income"].str.rstrip(".")
    return table


def make_bundle(data: Path, folder: Path) -> Any:
    """Train the reference model and write its bundle."""
    from ekiben.columns import Columns
    from ekiben.encoding import fit_preprocessor
    from ekiben.fitting import fit_lightgbm
    from ekiben.profile import profile_of
    from ekiben.records import Field, Policy, Schema
    from ekiben.serving.bundle import Lineage, write_bundle
    from ekiben.serving.scoring.scorer import Scorer, make_examples

    table = load_table(data, "train.csv")
    columns = Columns.from_pandas(table)
    roles = {"income": "target", "sex": "sensitive", "race": "sensitive"}
    levels = {n: tuple(sorted(table[n].dropna().unique())) for n, k in columns.kinds.items() if k == "category"}
    fields = tuple(
        Field(name=n, kind=k, role=roles.get(n, "feature"), is_input=n not in OUT, categories=levels.get(n, ()))  # type: ignore[arg-type]
        for n, k in columns.kinds.items()
    )
    schema = Schema(fields=fields, task="binary", target="income", classes=LABELS)
    inputs = columns.pick([f.name for f in schema.inputs])
    preprocessor = fit_preprocessor(inputs)
    y = (table["income"] == LABELS[1]).to_numpy().astype(np.int64)
    model = fit_lightgbm(
        preprocessor.transform(inputs), y, task="binary", n_classes=2, params={"num_leaves": LEAVES}, rounds=TREES,
        categorical=preprocessor.categorical,
    )  # fmt: skip
    profile = profile_of(inputs).with_predictions(model.predict(preprocessor.transform(inputs)))
    parts: dict[str, Any] = {
        "name": "adult", "schema": schema, "preprocessor": preprocessor, "model": model, "policy": Policy(task="binary"),
        "code": {"__init__.py": "", "pipeline/__init__.py": "", "pipeline/prepare.py": "def features(c):\n    return c\n"},
        "lineage": Lineage(run_id="20260101-120000-aaaa", version="1"),
        "profile": profile.to_json(),
    }  # fmt: skip
    first = Scorer(write_bundle(folder, examples=(), **parts))
    rows = columns.rows(np.flatnonzero(table.notna().all(axis=1))[:8])
    return write_bundle(folder, examples=make_examples(first, rows), **parts)


# ---- the sides


def ekiben_bento(data: Path, home: Path) -> str:
    """Build and sign the Bento in a store of its own under `home`; return its tag."""
    from ekiben.bento import build_bento

    os.environ["BENTOML_HOME"] = str(home / "bentoml")
    os.environ["XDG_CONFIG_HOME"] = str(home / "config")
    (home / "bentoml").mkdir(parents=True, exist_ok=True)
    return build_bento(make_bundle(data, home / "bundle"), REPOSITORY / "bentos" / "scorer" / "service.py").tag


def ekiben_side(tag: str, home: Path, *, name: str, is_guarded: bool, is_journalled: bool) -> Side:
    """Return the packaged service: with keys and the journal, or without."""
    from ekiben.serving.served import bento_folder
    from ekiben.serving.security.trust import trusted_keys

    example = json.loads((bento_folder(tag) / "src" / "bundle" / "examples.json").read_bytes())[0]["row"]
    environment = {"EKIBEN_TRUSTED_KEYS": trusted_keys().to_variable(), "BENTOML_HOME": str(home / "bentoml")}
    headers = {}
    keys = home / f"keys {name}.json"
    environment["EKIBEN_SERVE__KEYS"] = str(keys)
    if is_guarded:
        from ekiben.serving.security.issuing import add_key

        headers["Authorization"] = f"Bearer {add_key(keys, 'bench', ['predict', 'observe'])[1]}"
    if is_journalled:
        environment |= {"EKIBEN_JOURNAL": str(home / f"journal {name}"), "EKIBEN_SERVE__DURABILITY": "async"}
    return Side(
        name=name,
        command=[sys.executable, "-m", "bentoml", "serve", str(bento_folder(tag)), "--host", "127.0.0.1", "--port", "{port}"],
        body=json.dumps({"rows": [example]}).encode(),
        headers=headers,
        environment=environment,
    )


RAW = """
import sys, json
from pathlib import Path
import uvicorn
from ekiben.serving.bundle import load_bundle
from ekiben.serving.scoring.scorer import Scorer
scorer = Scorer(load_bundle(Path(sys.argv[1])))
scorer.lane
HEAD = [(b"content-type", b"application/json")]
import gc, msgspec
decode, encode = msgspec.json.Decoder(dict[str, list[dict]]).decode, msgspec.json.Encoder().encode
gc.collect(); gc.freeze(); gc.set_threshold(200_000, 50, 1_000)

async def app(scope, receive, send):
    if scope["type"] != "http":
        return
    message = await receive()
    body = b"{}"
    if scope["path"] == "/predict":
        body = encode({"predictions": scorer.score_rows(decode(message["body"])["rows"])})
    head = [*HEAD, (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": head})
    await send({"type": "http.response.body", "body": body})

uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[2]), log_level="error", access_log=False, lifespan="off")
"""

FASTAPI = """
import sys
import uvicorn
from fastapi import FastAPI
app = FastAPI()

@app.get("/readyz")
def ready():
    return {}

@app.post("/predict")
async def predict():
    return {"label": "<=50K", "probability": 0.5}

uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="error", access_log=False)
"""


def raw_side(bundle: Path, body: bytes) -> Side:
    """Return uvicorn with nothing but the same scorer."""
    return Side("raw ASGI + the same scorer", [sys.executable, "-c", RAW, str(bundle), "{port}"], body)


def fastapi_side(body: bytes) -> Side:
    """Return FastAPI that answers a constant, without looking at the body."""
    return Side("FastAPI no-op", [sys.executable, "-c", FASTAPI, "{port}"], body)


def save_pyfunc(data: Path, folder: Path) -> dict[str, Any]:
    """Save a scikit-learn Pipeline around the same booster with MLflow, as its users do; return one row."""
    import mlflow
    from lightgbm import LGBMClassifier
    from sklearn.compose import ColumnTransformer
    from sklearn.pipeline import Pipeline
    from sklearn.preprocessing import OrdinalEncoder

    table = load_table(data, "train.csv")
    y, frame = table["income"] == LABELS[1], table.drop(columns=list(OUT))
    numbers = frame.select_dtypes("number").columns.tolist()
    names = [c for c in frame.columns if c not in numbers]
    frame[numbers] = frame[numbers].astype(float)
    encoder = OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=np.nan, encoded_missing_value=np.nan)
    steps = ColumnTransformer([("numbers", "passthrough", numbers), ("names", encoder, names)])
    model = LGBMClassifier(n_estimators=TREES, num_leaves=LEAVES, n_jobs=1, verbose=-1)
    pipeline = Pipeline([("columns", steps), ("model", model)]).fit(frame, y.astype(int))
    mlflow.sklearn.save_model(
        pipeline, folder, pyfunc_predict_fn="predict_proba", input_example=frame.head(2), pip_requirements=["lightgbm", "scikit-learn"],
        skops_trusted_types=["collections.OrderedDict", "lightgbm.basic.Booster", "lightgbm.sklearn.LGBMClassifier", "numpy.dtype"],
    )  # fmt: skip
    whole = table.notna().all(axis=1).to_numpy()
    return json.loads(frame[whole].head(1).to_json(orient="records"))[0]  # type: ignore[no-any-return]


def mlflow_side(folder: Path, row: dict[str, Any]) -> Side:
    """Return ``mlflow models serve`` with one worker, in this environment."""
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", str(folder), "--env-manager", "local", "-h", "127.0.0.1"]
    body = json.dumps({"dataframe_records": [row]}).encode()
    return Side("mlflow models serve", [*command, "-p", "{port}", "-w", "1"], body, path="/invocations", alive="/ping")


PYFUNC_SERVICE = """
import os
import bentoml
import pandas as pd

@bentoml.service(workers=1, threads=1, traffic={"timeout": 10}, logging={"access": {"enabled": False}})
class Pyfunc:
    def __init__(self):
        import mlflow
        self.model = mlflow.pyfunc.load_model(os.environ["PYFUNC"])

    @bentoml.api
    def predict(self, rows: list[dict]) -> list[float]:
        return self.model.predict(pd.DataFrame(rows))[:, 1].tolist()
"""

EMPTY_SERVICE = """
import bentoml

@bentoml.service(workers=1, threads=1, traffic={"timeout": 10}, logging={"access": {"enabled": False}})
class Empty:
    @bentoml.api
    def predict(self, rows: list[dict]) -> list[float]:
        return [0.5] * len(rows)
"""


def bentoml_side(name: str, source: str, kind: str, home: Path, body: bytes, environment: dict[str, str]) -> Side:
    """Return a BentoML service of this source, as its users write one."""
    folder = home / kind.lower()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "service.py").write_text(source)
    command = [sys.executable, "-m", "bentoml", "serve", f"service:{kind}", "--working-dir", str(folder)]
    return Side(name, [*command, "--host", "127.0.0.1", "--port", "{port}"], body, environment={**environment, "BENTOML_HOME": str(home / "bentoml")})


def pyfunc_side(home: Path, model: Path, row: dict[str, Any]) -> Side:
    """Return BentoML around MLflow's pyfunc."""
    body = json.dumps({"rows": [row]}).encode()
    return bentoml_side("BentoML + MLflow pyfunc", PYFUNC_SERVICE, "Pyfunc", home, body, {"PYFUNC": str(model)})


def empty_side(home: Path, row: dict[str, Any]) -> Side:
    """Return a BentoML service without a model."""
    return bentoml_side("empty BentoML service", EMPTY_SERVICE, "Empty", home, json.dumps({"rows": [row]}).encode(), {})


# ---- running them


class Running:
    """A side that runs, pinned to a processor, in a process group of its own.

    Parameters
    ----------
    side : Side
    core : int
        Number of the processor; below 0: any.
    log : Path
        Where it prints.
    """

    def __init__(self, side: Side, core: int, log: Path) -> None:
        self.side, self.log = side, log
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        pin = ["taskset", "-c", str(core)] if core >= 0 else []
        command = [part.replace("{port}", str(self.port)) for part in side.command]
        # Without the variables of whoever measures: a benchmark that ran before must not speak in.
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("EKIBEN_")}
        self.began = time.perf_counter()
        with open(log, "wb") as output:
            self.process = subprocess.Popen(
                [*pin, *command], env={**inherited, **QUIET, **side.environment}, stdout=output, stderr=output, start_new_session=True
            )

    @property
    def url(self) -> str:
        """The address."""
        return f"http://127.0.0.1:{self.port}"

    def answer(self, patience_s: float = 120.0) -> float:
        """Wait for the first prediction; return the seconds since the start of the process."""
        said = "nothing"
        while time.perf_counter() - self.began < patience_s:
            if self.process.poll() is not None:
                break
            try:
                with urllib.request.urlopen(self.request(), timeout=10) as answer:
                    answer.read()
                    return time.perf_counter() - self.began
            except urllib.error.HTTPError as error:
                said = f"{error.code} {error.read()[:300]!r}"
                if error.code < 500 and error.code != 404:
                    break
            except OSError:
                pass
            time.sleep(0.01)
        last = "\n".join(self.log.read_text(errors="replace").splitlines()[-8:])
        raise SystemExit(f"{self.side.name} does not answer ({said}):\n{last}")

    def request(self) -> urllib.request.Request:
        """Return the request that wrk sends."""
        headers = {"Content-Type": "application/json", **self.side.headers}
        return urllib.request.Request(f"{self.url}{self.side.path}", self.side.body, headers)

    def memory_mib(self) -> float:
        """Return the resident memory of its processes; pages that forked ones share are shared out."""
        return sum(_pss_kib(pid) for pid in _group(self.process.pid)) / 1024

    def processor_s(self) -> float:
        """Return the processor time that its processes took."""
        ticks = 0
        for pid in _group(self.process.pid):
            try:
                ticks += sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]))
            except OSError:
                continue
        return ticks / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        """End it and the processes that it started."""
        for signum, patience in ((signal.SIGTERM, 8.0), (signal.SIGKILL, 8.0)):
            try:
                os.killpg(self.process.pid, signum)
            except ProcessLookupError:
                break
            end = time.monotonic() + patience
            while time.monotonic() < end and _group(self.process.pid):
                self.process.poll()
                time.sleep(0.05)
        self.process.wait()


def _group(leader: int) -> list[int]:
    """Return the processes of a session."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
            except OSError:
                continue
            if int(session) == leader and state != "Z":
                found.append(int(entry.name))
    return found


def _pss_kib(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


def wrk_script(side: Side, folder: Path) -> Path:
    """Write what wrk is to send."""
    quoted = side.body.decode().replace("\\", "\\\\").replace("'", "\\'")
    lines = ["wrk.method = 'POST'", f"wrk.body = '{quoted}'", "wrk.headers['Content-Type'] = 'application/json'"]
    lines += [f"wrk.headers['{name}'] = '{text}'" for name, text in side.headers.items()]
    lines.append(
        """
done = function(summary, latency, requests)
    local e = summary.errors
    io.write(string.format("\\n@ %d %d %d %d %d %d %d\\n", summary.requests, summary.duration, latency:percentile(50),
        latency:percentile(99), latency.max, e.status, e.connect + e.read + e.write + e.timeout))
end
"""
    )
    path = folder / f"{''.join(c if c.isalnum() else '-' for c in side.name)}.lua"
    path.write_text("\n".join(lines))
    return path


@dataclass(frozen=True)
class Load:
    """What wrk found: requests a second, and latencies in milliseconds."""

    per_s: float
    p50_ms: float
    p99_ms: float
    max_ms: float
    errors: int


def wrk(running: Running, script: Path, seconds: float, connections: int, core: int) -> Load:
    """Load a side for some seconds, from another processor."""
    pin = ["taskset", "-c", str(core)] if core >= 0 else []
    command = [*pin, "wrk", "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "--timeout", "20s", "-s", str(script)]
    said = subprocess.run([*command, f"{running.url}{running.side.path}"], capture_output=True, text=True)
    line = next((x for x in said.stdout.splitlines() if x.startswith("@ ")), None)
    if line is None:
        raise SystemExit(f"wrk says: {(said.stdout + said.stderr).strip()[-500:]}")
    requests, micros, p50, p99, most, status, other = map(int, line.split()[1:])
    return Load(requests / micros * 1e6, p50 / 1e3, p99 / 1e3, most / 1e3, status + other)
