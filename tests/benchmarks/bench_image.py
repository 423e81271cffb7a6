"""The image of a Bento beside that of a Bento around MLflow's pyfunc: size, cold start, memory and answers of the same model.

Run as root with ``python tests/benchmarks/bench_image.py [--starts N] [--keep FOLDER]``. Both images stand on the same
base (a minimal Debian made with debootstrap), are built by buildah from the same recipe, and are started in turn on a
read-only root, so that only what they hold differs. ``--keep`` names a folder in which the built images stay for the next
call; without it everything is removed. Exits with 1 when ours is not the smaller one or does not start faster, or when
an answer differs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import socket
import statistics
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import msgspec

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bundles import make_columns, make_project
from images import Store, end, start_image, why_not

SERVICE = Path(__file__).resolve().parents[2] / "bentos" / "scorer" / "service.py"
PYFUNC = '''
from pathlib import Path

import bentoml
import mlflow
import pandas as pd


@bentoml.service(name="pyfunc", workers=1)
class Pyfunc:
    def __init__(self) -> None:
        self.model = mlflow.pyfunc.load_model(str(Path(__file__).parent / "model"))

    @bentoml.api
    def predict(self, rows: list[dict]) -> list[float]:
        return self.model.predict(pd.DataFrame(rows))["probability"].tolist()
'''
OURS, THEIRS, BASE = "localhost/ekiben-census:1", "localhost/mlflow-census:1", "localhost/ekiben-base"


def free_port() -> int:
    """Return a port that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def ask(port: int, body: object, key: str = "") -> dict | list:
    """Return what /predict answers."""
    headers = {"content-type": "application/json", "authorization": f"Bearer {key}"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/predict", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


def build_ours(store: Store, home: Path) -> None:
    """Package the model and build its image."""
    from ekiben.bento import build_bento
    from ekiben.image.containerize import containerize
    from ekiben.serving.bundle import stamp_bundle

    bundle = stamp_bundle(home / "made" / "bundle", home / "stamped", version="1")
    fact = build_bento(bundle, SERVICE)
    containerize(home, fact.tag, backend="buildah", tag=OURS, base=BASE, audit=False)


def build_theirs(store: Store, home: Path) -> None:
    """Register the same model with MLflow, and build an image that serves it with `mlflow.pyfunc`, from the same recipe."""
    import mlflow

    from ekiben.image.containerfile import pin_requirements, write_containerfile
    from ekiben.image.installer import build_secrets
    from ekiben.registry import Registry
    from ekiben.serving.bundle import load_bundle

    for name in ("registry", "pyfunc", "fetched", "secrets"):
        shutil.rmtree(home / name, ignore_errors=True)  # of a call that did not come to its end
    registry = Registry(home / "registry")
    registry.root.mkdir()
    version = registry.register(load_bundle(home / "made" / "bundle"), mlflow_run="")
    bento = home / "pyfunc"
    (bento / "src").mkdir(parents=True)
    mlflow.set_tracking_uri(registry.uri)
    fetched = mlflow.artifacts.download_artifacts(version.uri, dst_path=str(home / "fetched"))
    shutil.copytree(next(Path(fetched).rglob("MLmodel")).parent, bento / "src" / "model")
    (bento / "src" / "service.py").write_text(PYFUNC)
    (bento / "src" / "bentofile.yaml").write_bytes(msgspec.yaml.encode({"service": "service:Pyfunc"}))
    (bento / "env" / "python").mkdir(parents=True)
    pins = pin_requirements(["bentoml", "mlflow", "lightgbm", "cryptography", "msgspec"])
    (bento / "env" / "python" / "requirements.txt").write_text("\n".join(pins) + "\n")
    recipe = write_containerfile({}, needs=["scipy"]).split("HEALTHCHECK")[0].replace('PYTHONPATH="/opt/bento/src"', 'X="1"')
    recipe += 'ENTRYPOINT ["bentoml", "serve", "service:Pyfunc", "--working-dir", "/opt/bento/src"]\n'
    (home / "Containerfile").write_text(recipe)
    secrets = home / "secrets"
    secrets.mkdir(mode=0o700)
    more = [word for option in build_secrets(secrets) for word in ("--secret", option.removeprefix("secret="))]
    where = ["--file", str(home / "Containerfile"), "--build-arg", f"BASE_IMAGE={BASE}", *more]
    store.buildah("build", "--format", "docker", "--tag", THEIRS, *where, str(bento))


def size_mb(root: Path) -> float:
    """Return what the files of a root take, links counted once."""
    seen = {(s.st_dev, s.st_ino): s.st_size for s in (p.lstat() for p in root.rglob("*") if not p.is_dir() or p.is_symlink())}
    return sum(seen.values()) / 1e6


def memory_mb(session: int) -> float:
    """Return the memory of all processes of a session, shared pages shared out."""
    total = 0
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            if int((place / "stat").read_text().rpartition(")")[2].split()[3]) == session:
                lines = (place / "smaps_rollup").read_text().splitlines()
                total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1e3


@contextlib.contextmanager
def started(root: Path, config: dict, settings: Path, body: object, key: str) -> Iterator[tuple[int, float, int]]:
    """Start an image; give its port, the seconds to its first answer and its session."""
    port = free_port()
    began = time.perf_counter()
    env = {"BENTOML_PORT": str(port), "BENTOML_HOST": "0.0.0.0", "EKIBEN_SERVE__DRAIN_S": "0", "EKIBEN_JOURNAL": ""}
    process = start_image(root, config, settings=settings, env=env, output=None)
    try:
        while True:
            if process.poll() is not None:
                raise SystemExit("an image does not start; its lines above say why")
            with contextlib.suppress(OSError, urllib.error.URLError):
                ask(port, body, key)
                break
            time.sleep(0.02)
        yield port, time.perf_counter() - began, process.pid
    finally:
        end(process)


def main() -> int:
    """Build both, start both in turn, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=5, help="how often each is started")
    parser.add_argument("--keep", type=Path, help="folder in which the built images stay")
    said = parser.parse_args()
    if why := why_not():
        print(f"not measured: {why}")
        return 0
    from ekiben.serving.security.issuing import add_key
    from ekiben.serving.security.signer import signing_key
    from ekiben.serving.security.trust import write_key

    with contextlib.ExitStack() as stack:
        home = said.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-image-")))
        store = Store(home / "store")
        if said.keep is None:
            stack.callback(store.remove)
        os.environ |= {"BENTOML_HOME": str(home / "bentoml"), "XDG_CONFIG_HOME": str(home / "config")}
        os.environ |= {name: text for name, text in store.environment.items() if name != "TMPDIR"}
        project = make_project(home / "made", rows=5000, rounds=200)
        if not store.folder.exists():
            store.make().make_base(BASE)
        there = store.buildah("images", "--format", "{{.Name}}:{{.Tag}}").split()
        for tag, build in ((OURS, build_ours), (THEIRS, build_theirs)):
            if tag not in there:
                began = time.perf_counter()
                build(store, home)
                print(f"{tag} took {time.perf_counter() - began:.0f} s", flush=True)
        settings = home / "settings"
        if not settings.exists():
            (settings / "trusted").mkdir(parents=True)
            (settings / "trusted" / "us.pub").write_text(write_key(signing_key().public) + "\n")
            (settings / "key").write_text(add_key(settings / "keys.json", "bench", ["predict"])[1])
            shutil.chown(settings / "keys.json", 10001, 10001)
        key = (settings / "key").read_text()
        rows = make_columns(200, seed=5).pick([f.name for f in project.schema.inputs]).to_rows()
        images = {"ekiben": OURS, "MLflow pyfunc": THEIRS}
        roots = {name: stack.enter_context(store.mounted(tag)) for name, tag in images.items()}
        configs = {name: store.describe(tag)["config"] for name, tag in images.items()}
        with store.mounted(BASE) as base:
            below = size_mb(base)
        sizes = {name: size_mb(root) for name, root in roots.items()}
        starts: dict[str, list[float]] = {name: [] for name in images}
        memory: dict[str, float] = {}
        answers: dict[str, list[float]] = {}
        for _ in range(said.starts):
            for name, root in roots.items():
                with started(root, configs[name], settings, {"rows": rows[:1]}, key) as (port, seconds, session):
                    starts[name].append(seconds)
                    given = ask(port, {"rows": rows}, key)
                    answers[name] = given if isinstance(given, list) else [one["probability"] for one in given["predictions"]]
                    memory[name] = memory_mb(session)
    print(f"\nbase image {below:.0f} MB; {said.starts} cold starts each, in turn\n")
    print(f"{'':14} {'image':>9} {'over base':>10} {'cold start':>11} {'memory':>8}")
    for name in images:
        print(
            f"{name:14} {sizes[name]:6.0f} MB {sizes[name] - below:7.0f} MB {statistics.median(starts[name]):9.2f} s {memory[name]:5.0f} MB"
        )
    apart = max(abs(a - b) for a, b in zip(*answers.values(), strict=True))
    print(f"\nlargest difference between the answers to {len(rows)} rows: {apart:g}")
    ours, theirs = images
    is_met = sizes[ours] < sizes[theirs] and statistics.median(starts[ours]) < statistics.median(starts[theirs]) and apart == 0
    print("met" if is_met else "NOT met")
    return 0 if is_met else 1


if __name__ == "__main__":
    sys.exit(main())
