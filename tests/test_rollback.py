"""Back to what served before: verified, in well under two seconds, whatever else is going on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from rollouts import FakeRegistry, make_root, make_versions

from ekiben import ledger
from ekiben.cli import main
from ekiben.errors import IntegrityError, UsageError
from ekiben.files import write_whole
from ekiben.rollout.aliases import Note, settle, write_served
from ekiben.rollout.back import roll_back
from ekiben.rollout.control import roll_out
from ekiben.rollout.earlier import champions, deployed_versions
from ekiben.rollout.place import current, environment_folder
from ekiben.serving.hosting.deployment import Arm, Deployment, Status, now, read_deployment, write_deployment
from ekiben.serving.run import trust_of
from ekiben.serving.served import Served
from ekiben.serving.security.signer import signing_key


def nobody(root: Path, to: str) -> None:
    """Leave no process behind."""


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_versions(tmp_path_factory.mktemp("bundles"))


@pytest.fixture
def root(tmp_path: Path, bundles: Path) -> Path:
    """Return a project in which version 3 serves, and before it 2 and 1 did."""
    make_root(tmp_path)
    for version in "123":
        deploy(tmp_path, bundles, version)
    return tmp_path


def deploy(root: Path, bundles: Path, version: str, **more: Any) -> None:
    roll_out(root, version, registry=FakeRegistry(root, bundles), say=lambda line: None, **{"mode": "full", **more})  # type: ignore[arg-type]


def back(root: Path, version: str = "", **more: Any) -> Any:
    return roll_back(root, version, settle_with=nobody, patience_s=more.pop("patience_s", 0), **more)


def in_force(root: Path) -> Deployment:
    found = current(environment_folder(root), trust_of(root))
    assert found is not None
    return found


def test_it_goes_to_the_champion_before_and_twice_goes_two_back(root: Path) -> None:
    assert back(root).serving == "2"
    assert in_force(root).champion.version == "2"
    assert back(root).serving == "1"
    with pytest.raises(UsageError, match="no champion before version 1"):
        back(root)
    assert [arm.version for arm in champions(environment_folder(root), trust_of(root))] == ["1"]


def test_a_version_that_was_promoted_once_more_goes_back_to_the_one_it_replaced(root: Path, bundles: Path) -> None:
    deploy(root, bundles, "2")
    assert back(root).serving == "3"
    deploy(root, bundles, "1", mode="shadow")  # what came back stays what it is, whatever stands beside it meanwhile
    assert back(root).serving == "3"
    assert back(root).serving == "2"
    assert back(root).serving == "1"


def test_it_goes_to_any_version_that_lies_in_the_folder(root: Path) -> None:
    assert back(root, "1").serving == "1"
    assert back(root, "v3").serving == "3"  # it is no champion that came before, but its bundle is there
    with pytest.raises(UsageError, match=r"version 9 .*there: 1, 2, 3") as missing:
        back(root, "9")
    assert missing.value.exit_code == 2


def test_while_a_challenger_is_heard_it_goes_to_the_champion(root: Path, bundles: Path) -> None:
    deploy(root, bundles, "2", mode="shadow")
    done = back(root, reason="enough")
    assert (done.serving, done.version, done.status) == ("3", "2", "rolled_back")
    assert (in_force(root).mode, in_force(root).champion.version, in_force(root).why) == ("full", "3", "enough")


def test_what_was_taken_back_loses_its_alias_when_the_registry_is_told(root: Path, bundles: Path) -> None:
    registry = FakeRegistry(root, bundles)
    assert registry.aliases["champion"] == "3"
    back(root, reason="complaints")
    assert Note.read(environment_folder(root)) is not None
    settle(root, registry)  # type: ignore[arg-type]
    assert registry.aliases["champion"] == "2"
    assert "complaints" in next(iter(v for v in registry.versions("census") if v.version == "3")).tags.values()
    assert Note.read(environment_folder(root)) is None


def test_it_is_accounted_for(root: Path) -> None:
    back(root, reason="complaints from branch 12", who="grace")
    entry = ledger.read(root)[-1]
    assert (entry.what, entry.who, entry.why) == ("rollback", "grace", "complaints from branch 12")
    assert {name: entry.facts[name] for name in ("version", "back_to", "environment")} == {"version": "3", "back_to": "2", "environment": "production"}


def test_a_bundle_that_does_not_verify_takes_no_traffic(root: Path) -> None:
    before = in_force(root)
    arm = champions(environment_folder(root), trust_of(root))[-2]
    path = environment_folder(root) / "bundles" / arm.bundle / "bundle.json"
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(IntegrityError):
        back(root)
    with pytest.raises((IntegrityError, UsageError)):
        back(root, arm.version)
    assert in_force(root) == before


def test_a_bundle_in_the_place_of_another_is_refused(root: Path) -> None:
    folder, stack = environment_folder(root), champions(environment_folder(root), trust_of(root))
    one, two = (folder / "bundles" / arm.bundle for arm in stack[:2])
    os.rename(two, folder / "bundles" / "aside")
    os.rename(one, two)
    with pytest.raises(IntegrityError, match="another bundle"):
        back(root)


def test_history_that_nobody_trusted_signed_is_not_believed(root: Path) -> None:
    folder = environment_folder(root)
    for path in (folder / "history").glob("*.json"):
        said = json.loads(path.read_text())
        said["deployment"]["champion"]["bundle"] = "evil"
        path.write_text(json.dumps(said, indent=2))
    with pytest.raises(UsageError, match="no champion before"):
        back(root)
    assert back(root, "2").serving == "2"  # by its own signature


def test_a_damaged_deployment_is_mended_from_what_the_service_took_last(root: Path) -> None:
    folder = environment_folder(root)
    raw = (folder / "deployment.json").read_bytes()
    (folder / "deployment.json").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(IntegrityError):
        back(root)
    (folder / "accepted.json").write_bytes(raw)
    number = read_deployment(folder, trust_of(root), name="accepted.json").number
    assert back(root).serving == "2"
    assert in_force(root).number > number


def test_nothing_to_go_back_from_is_a_line_and_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_root(tmp_path)
    assert main(["rollback", "--project", str(tmp_path), "--to", "staging"]) == 2
    assert "nothing is deployed to staging yet" in capsys.readouterr().err


def test_what_serve_starts_follows_when_the_version_has_a_bento(root: Path, bundles: Path) -> None:
    folder, before = environment_folder(root), in_force(root)
    with_bento = Arm(**{**before.champion.to_dict(), "bento": "census:v3-abc"})
    new = Deployment(environment="production", number=before.number + 1, at=now(), by="ada", why="", champion=with_bento)
    write_deployment(folder, new, signing_key())
    deploy(root, bundles, "1")
    write_served(root, "census", Arm(version="1", digest="", bundle="", bento="census:v1-abc"))
    assert back(root, "3").serving == "3"
    assert Served.from_json(Served.path(root).read_bytes()).bento == "census:v3-abc"


class Service(threading.Thread):
    """Writes the status of a service that takes what is deployed after a moment, or never."""

    def __init__(self, folder: Path, *, takes: bool = True) -> None:
        super().__init__(daemon=True)
        self.folder, self.takes, self.over = folder, takes, threading.Event()
        self._write(read_deployment(folder, trust_of(folder.parents[2])))

    def _write(self, d: Deployment, **more: Any) -> None:
        status = Status(number=d.number, at=now(), pid=os.getpid(), serving=d.champion.version, mode=d.mode, share=d.share, **more)
        write_whole(self.folder / "status.json", status.to_json())

    def run(self) -> None:
        trust = trust_of(self.folder.parents[2])
        while not self.over.wait(0.1):
            if self.takes:
                self._write(read_deployment(self.folder, trust))


def test_it_returns_when_the_service_serves_it_and_says_when_none_does(root: Path) -> None:
    assert not back(root, "1").is_served
    service = Service(environment_folder(root))
    service.start()
    done = back(root, "2", patience_s=5)
    service.over.set()
    service.join()
    assert done.is_served
    deaf = Service(environment_folder(root), takes=False)
    deaf.start()
    assert not back(root, "3", patience_s=0.3).is_served
    deaf.over.set()


def test_the_whole_command_imports_nothing_heavy(root: Path) -> None:
    """The registry's note is left for a process that is cut off here: the project has no registry."""
    code = (
        "import sys; from ekiben.cli import main; import ekiben.rollout.aliases as a; "
        "code = main(sys.argv[1:]); "
        "heavy = {'mlflow', 'pandas', 'sklearn', 'lightgbm', 'optuna', 'duckdb', 'scipy', 'bentoml', 'pyarrow'} & set(sys.modules); "
        "print(heavy or 'light', file=sys.stderr); sys.exit(code)"
    )
    for version in ("2", "1", "3"):
        done = subprocess.run(
            [sys.executable, "-c", code, "rollback", version, "--project", str(root)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr.strip().splitlines()[-1] == "light"
        assert f"version {version} answers everything" in done.stdout
    assert in_force(root).champion.version == "3"


def test_the_versions_of_a_folder_are_listed_by_number(root: Path) -> None:
    assert deployed_versions(environment_folder(root)) == ["1", "2", "3"]
