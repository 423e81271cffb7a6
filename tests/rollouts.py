"""Three versions of one model, a registry without MLflow, and a service that does what a test tells it: for rollouts."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from bundles import make_project

from ekiben.registry import TAKEN_BACK, Version
from ekiben.rollout.plan import World
from ekiben.serving.bundle import Bundle, Lineage, load_bundle, stamp_bundle
from ekiben.serving.hosting.deployment import ArmStatus, Status, read_deployment
from ekiben.serving.run import trust_of
from ekiben.serving.security.signer import sign_folder, signing_key

SETTINGS = """[pipeline]
name = census

[columns]
target = target
id = id
sensitive = sex

[deploy]
steps = 5, 25, 100
hold_s = 60
min_requests = 100
"""


def make_versions(folder: Path, versions: str = "123") -> Path:
    """Write signed, stamped bundles ``v1``, ``v2`` … that answer differently; return their folder."""
    signer = signing_key(say=lambda line: None)
    for version in versions:
        project = make_project(folder / f"made{version}", runtime="linear", rows=300, seed=int(version), lineage=Lineage(run_id=f"run{version}"))
        assert project.bundle.folder is not None
        stamp_bundle(project.bundle.folder, folder / f"v{version}", version=version)
        sign_folder(folder / f"v{version}", signer, kind="bundle", name="census")
    return folder


class FakeRegistry:
    """What a rollout asks of the registry, kept in a file so that processes share it."""

    def __init__(self, root: Path, bundles: Path, *, champion: str = "1", challenger: str = "2") -> None:
        self.root, self.bundles, self.path = root, bundles, root / "registry.json"
        if not self.path.exists():
            self._write({"aliases": {"champion": champion, **({"challenger": challenger} if challenger else {})}, "tags": {}})

    def _read(self) -> Any:
        return msgspec.json.decode(self.path.read_bytes())

    def _write(self, said: Any) -> None:
        from ekiben.files import write_whole

        write_whole(self.path, msgspec.json.encode(said))

    @property
    def aliases(self) -> dict[str, str]:
        """Alias → version."""
        return dict(self._read()["aliases"])

    def versions(self, name: str) -> list[Version]:
        said, found = self._read(), []
        for place in sorted(self.bundles.glob("v?"), reverse=True):
            number = place.name[1:]
            aliases = tuple(sorted(a for a, v in said["aliases"].items() if v == number))
            digest = load_bundle(place).digest
            found.append(Version(name=name, version=number, digest=digest, aliases=aliases, tags=said["tags"].get(number, {})))
        return found

    def holder(self, name: str, alias: str) -> Version | None:
        return next((v for v in self.versions(name) if alias in v.aliases), None)

    def fetch(self, version: Version, out: Path) -> Bundle:
        shutil.copytree(self.bundles / f"v{version.version}", out)
        return load_bundle(out)

    def make_champion(self, version: Version, alias: str = "champion") -> None:
        said = self._read()
        said["aliases"][alias] = version.version
        if said["aliases"].get("challenger") == version.version:
            del said["aliases"]["challenger"]
        said["tags"].get(version.version, {}).pop(TAKEN_BACK, None)
        self._write(said)

    def take_back(self, version: Version, why: str) -> None:
        said = self._read()
        said["tags"].setdefault(version.version, {})[TAKEN_BACK] = why
        if said["aliases"].get("challenger") == version.version:
            del said["aliases"]["challenger"]
        self._write(said)


def make_root(folder: Path, settings: str = SETTINGS) -> Path:
    """Make a project that only has settings."""
    (folder / "nbs/pipeline").mkdir(parents=True, exist_ok=True)
    (folder / "settings.ini").write_text(settings)
    return folder


@dataclass
class FakeService:
    """A service on a clock of its own: it takes what is deployed, counts, and falls back when a test says so.

    Attributes
    ----------
    folder : Path
    rate : float
        Requests a second.
    faults : float
        Share of the challenger's requests that fail.
    happens : list of (float, callable)
        What is called at which second, with this service.
    """

    folder: Path
    rate: float = 50.0
    faults: float = 0.0
    loss: tuple[float, float] | None = None
    happens: list[tuple[float, Callable[[FakeService], None]]] = field(default_factory=list)
    now: float = 1_000_000.0
    pid: int = 4242
    is_up: bool = True
    is_deaf: bool = False
    rolled_back: str = ""
    refused: str = ""
    seen: list[Any] = field(default_factory=list)
    counts: dict[str, list[float]] = field(default_factory=dict)
    began: float = 1_000_000.0
    _at: float = 1_000_000.0
    _current: Any = None

    def look(self, folder: Path) -> Status | None:
        while self.happens and self.now - self.began >= self.happens[0][0]:
            self.happens.pop(0)[1](self)
        if not self.is_up:
            return None
        new = read_deployment(folder, trust_of(folder.parents[2]))
        passed, self._at = self.now - self._at, self.now
        deployment = self._current
        if deployment is not None:
            share = 0.0 if self.rolled_back or deployment.mode != "canary" else deployment.share
            for arm, part in ((deployment.champion, 1 - share), (deployment.challenger, share)):
                if arm is not None:
                    count = self.counts.setdefault(arm.version, [0.0, 0.0])
                    bad = self.faults if arm is deployment.challenger else 0.0
                    count[0] += passed * self.rate * part * (1 - bad)
                    count[1] += passed * self.rate * part * bad
        if not self.is_deaf and (deployment is None or new.number > deployment.number):
            self._current = new
            self.seen.append((self.now - self.began, new))
        d = self._current
        arms = {}
        for arm, role in ((d.champion, "champion"), (d.challenger, "challenger")):
            if arm is not None:
                answered, failed = self.counts.get(arm.version, [0.0, 0.0])
                loss = {}
                if self.loss:
                    loss = {"labels": int(answered), "loss_mean": self.loss[role == "challenger"], "loss_sd": 0.2}
                arms[arm.version] = ArmStatus(
                    version=arm.version, role=role, requests=int(answered), errors=int(failed), seconds_median=1e-5, **loss
                )
        return Status(
            number=d.number, at="2026-01-01T00:00:00Z", pid=self.pid, serving=d.champion.version, mode=d.mode, share=d.share,
            rolled_back=self.rolled_back, refused=self.refused, arms=arms,
        )  # fmt: skip

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        if self.now - self.began > 1_000:
            raise TimeoutError("this rollout never ends")

    def world(self, **more: Any) -> World:
        """Return what a controller takes for the world."""
        return World(
            clock=lambda: self.now, sleep=self.sleep, look=self.look, alive=lambda status: self.is_up and status is not None,
            tick_s=1.0, **more,
        )  # fmt: skip
