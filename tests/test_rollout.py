"""A challenger comes to serve only while it holds, and whatever happens one verified champion serves."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rollouts import SETTINGS, FakeRegistry, FakeService, make_root, make_versions

from ekiben import ledger
from ekiben.errors import GateError, IntegrityError, SettingsError, UsageError
from ekiben.records import Judgement
from ekiben.registry import TAKEN_BACK
from ekiben.rollout.aliases import Note, leave_note, settle
from ekiben.rollout.approval import Asked, approve, ask, sign_facts, standing_of
from ekiben.rollout.back import roll_back
from ekiben.rollout.control import roll_out
from ekiben.rollout.place import controlling, current, environment_folder, publish, remove_leftovers
from ekiben.rollout.promote import promote
from ekiben.serving.bundle import load_bundle
from ekiben.serving.hosting.deployment import Arm, Deployment, append_event, now, parse_time
from ekiben.serving.run import trust_of
from ekiben.serving.served import Served
from ekiben.serving.security.signer import Signer, signing_key
from ekiben.serving.security.trust import Trust
from ekiben.settings import load_settings


def quiet(line: str) -> None:
    """Say nothing."""


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_versions(tmp_path_factory.mktemp("bundles"))


class Site:
    """A project whose champion, version 1, is deployed, and whose service runs."""

    def __init__(self, root: Path, bundles: Path, settings: str = SETTINGS) -> None:
        self.root, self.registry = make_root(root, settings), FakeRegistry(root, bundles)
        self.folder = environment_folder(root)
        self.service = FakeService(self.folder)

    def begin(self) -> Site:
        assert self.deploy("1", mode="full").status == "promoted"
        return self

    def deploy(self, version: str = "", *, mode: Any = "canary", world: Any = None, **more: Any) -> Any:
        lines: list[str] = []
        self.said = lines
        world = world or self.service.world()
        return roll_out(self.root, version, mode=mode, registry=self.registry, world=world, say=lines.append, **more)  # type: ignore[arg-type]

    @property
    def deployment(self) -> Deployment:
        found = current(self.folder, trust_of(self.root))
        assert found is not None
        return found

    def entries(self, what: str) -> list[Any]:
        return [entry for entry in ledger.read(self.root) if entry.what == what]


@pytest.fixture
def site(tmp_path: Path, bundles: Path) -> Site:
    return Site(tmp_path, bundles).begin()


def test_the_first_deployment_is_the_champion_at_full(tmp_path: Path, bundles: Path) -> None:
    site = Site(tmp_path, bundles)
    done = site.deploy("")  # the challenger is not even asked about, for there is nothing it could stand beside
    assert (done.status, done.version, done.serving) == ("promoted", "1", "1")
    assert (site.deployment.mode, site.deployment.champion.version, site.deployment.challenger) == ("full", "1", None)


def test_it_advances_by_itself_while_it_holds_and_ends_as_champion(site: Site) -> None:
    done = site.deploy()
    assert (done.status, done.version, done.serving) == ("promoted", "2", "2")
    shares = [round(d.share, 2) for _, d in site.service.seen if d.mode == "canary"]
    assert sorted(set(shares)) == [0.05, 0.25, 1.0]
    assert shares == sorted(shares)
    assert site.deployment.champion.version == "2"
    assert site.deployment.challenger is None
    assert site.registry.aliases == {"champion": "2"}
    assert [entry.facts["share"] for entry in site.entries("rollout") if "share" in entry.facts] == [0.05, 0.25, 1.0]
    assert site.entries("promotion")[-1].facts["version"] == "2"
    ledger.verify(site.root)


def test_a_share_holds_for_its_seconds_and_its_requests(site: Site) -> None:
    site.service.rate = 8.0  # 5 % of 8/s: 100 answers take 250 s; 25 %: 50 s, so that its 60 s decide
    site.deploy()
    first = {share: next(at for at, d in site.service.seen if d.share == share) for share in (0.05, 0.25, 1.0)}
    assert 245 <= first[0.25] - first[0.05] <= 260
    assert 60 <= first[1.0] - first[0.25] <= 65


def test_without_requests_it_never_advances(site: Site) -> None:
    site.service.rate = 0.0
    with pytest.raises(TimeoutError):
        site.deploy()
    assert max(d.share for _, d in site.service.seen) == 0.05
    assert site.deployment.challenger is None  # whatever ended the controller, the champion answers


def test_the_lease_is_short_and_renewed_as_long_as_the_controller_lives(site: Site) -> None:
    site.deploy()
    leases = [(at, d) for at, d in site.service.seen if d.mode == "canary"]
    for at, d in leases:
        left = parse_time(d.expires).timestamp() - site.service.began - at
        assert 0 < left <= 30
    ends = [parse_time(d.expires).timestamp() - site.service.began for _, d in leases]
    assert all(later < end for (later, _), end in zip(leases[1:], ends, strict=False))  # renewed before it ends


def test_too_many_errors_take_it_back_and_no_run_promotes_it_by_itself(site: Site) -> None:
    site.service.faults = 0.2
    done = site.deploy()
    assert done.status == "rolled_back"
    assert "of its requests failed" in done.why
    assert (site.deployment.mode, site.deployment.champion.version) == ("full", "1")
    version = next(v for v in site.registry.versions("census") if v.version == "2")
    assert TAKEN_BACK in version.tags
    assert version.aliases == ()
    assert site.entries("rollback")[-1].facts["by_itself"] is True


def test_a_loss_that_is_surely_worse_takes_it_back_and_one_that_is_not_does_not(tmp_path: Path, bundles: Path) -> None:
    worse = Site(tmp_path / "worse", bundles).begin()
    worse.service.loss = (0.10, 0.25)
    assert "its loss is" in worse.deploy().why
    same = Site(tmp_path / "same", bundles).begin()
    same.service.loss = (0.10, 0.12)
    assert same.deploy().status == "promoted"


def test_the_service_s_own_fall_back_ends_it_with_its_reason(site: Site) -> None:
    site.service.happens = [(70, lambda s: setattr(s, "rolled_back", "its error rate broke the limit"))]
    done = site.deploy()
    assert (done.status, done.why) == ("rolled_back", "its error rate broke the limit")
    assert site.deployment.champion.version == "1"


def test_a_lease_that_ran_out_stops_it_without_a_mark_on_the_version(site: Site) -> None:
    def sleep_too_long(service: FakeService) -> None:
        append_event(site.folder, "expired", site.deployment.number, "2", "the lease ran out")
        service.rolled_back = "the lease ran out"

    site.service.happens = [(20, sleep_too_long)]
    assert site.deploy().status == "stopped"
    assert site.registry.aliases == {"champion": "1", "challenger": "2"}


def test_a_service_that_is_away_for_a_while_is_waited_for_and_one_that_stays_away_is_not(tmp_path: Path, bundles: Path) -> None:
    def restart(service: FakeService) -> None:
        service.is_up, service.pid, service.counts = True, 4243, {}

    back = Site(tmp_path / "back", bundles).begin()
    back.service.happens = [(20, lambda s: setattr(s, "is_up", False)), (60, restart)]
    assert back.deploy().status == "promoted"
    gone = Site(tmp_path / "gone", bundles).begin()
    gone.service.happens = [(20, lambda s: setattr(s, "is_up", False))]
    done = gone.deploy()
    assert done.status == "stopped"
    assert "no service answers" in done.why
    assert gone.deployment.challenger is None


def test_a_service_that_refuses_the_file_stops_it(site: Site) -> None:
    def deafen(service: FakeService) -> None:
        service.is_deaf, service.refused = True, "the challenger's bundle does not verify"

    site.service.look(site.folder)
    deafen(site.service)
    done = site.deploy()
    assert done.status == "stopped"
    assert "does not verify" in done.why


def test_a_rollback_stops_a_rollout_that_is_under_way(site: Site) -> None:
    def back(service: FakeService) -> None:
        roll_back(site.root, who="grace", reason="complaints", patience_s=0, settle_with=lambda root, to: None)

    site.service.happens = [(70, back)]
    done = site.deploy()
    assert done.status == "stopped"
    assert "grace" in done.why
    assert "complaints" in done.why
    assert (site.deployment.by, site.deployment.mode, site.deployment.champion.version) == ("grace", "full", "1")


def test_ctrl_c_leaves_the_champion(site: Site) -> None:
    def interrupt(service: FakeService) -> None:
        raise KeyboardInterrupt

    site.service.happens = [(70, interrupt)]
    with pytest.raises(KeyboardInterrupt):
        site.deploy()
    assert (site.deployment.mode, site.deployment.champion.version) == ("full", "1")
    assert site.registry.aliases["challenger"] == "2"


def test_a_fairness_gate_that_fails_takes_it_back_and_a_watched_one_does_not(tmp_path: Path, bundles: Path) -> None:
    parts = {"name": "demographic_parity_ratio[sex] >= 0.8", "metric": "demographic_parity_ratio", "slice": "sex", "op": ">=", "limit": 0.8}
    for blocking, status in ((True, "rolled_back"), (False, "promoted")):
        site = Site(tmp_path / status, bundles).begin()
        failed = Judgement(**parts, value=0.5, low=0.4, high=0.6, verdict="fail", blocking=blocking)
        done = site.deploy(world=site.service.world(fairness=lambda failed=failed: [failed]))
        assert done.status == status
        assert ("demographic_parity_ratio" in done.why) is blocking


def test_a_canary_is_held_once_and_left_without_a_lease(site: Site) -> None:
    done = site.deploy(steps=(0.1,))
    assert (done.status, done.serving) == ("canary", "1")
    assert (site.deployment.share, site.deployment.expires) == (0.1, "")
    rest = site.deploy()  # the steps go on above what it holds already
    shares = {round(d.share, 2) for at, d in site.service.seen if d.mode == "canary"}
    assert rest.status == "promoted"
    assert shares == {0.1, 0.25, 1.0}


def test_a_shadow_needs_no_lease_and_no_controller(site: Site) -> None:
    done = site.deploy(mode="shadow")
    assert done.status == "shadowing"
    assert (site.deployment.mode, site.deployment.expires, site.deployment.share) == ("shadow", "", 0.0)


def test_no_canary_begins_where_no_service_is_there_to_watch(site: Site) -> None:
    site.service.is_up, before = False, site.deployment
    with pytest.raises(UsageError, match="no service serves production"):
        site.deploy()
    assert site.deployment == before


def test_what_serves_already_is_not_deployed_again(site: Site) -> None:
    before = site.deployment
    assert site.deploy("1").why.endswith("already")
    assert site.deployment == before


def test_nothing_is_written_for_a_bundle_that_does_not_verify(site: Site, bundles: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    import shutil

    copy = shutil.copytree(bundles, tmp_path_factory.mktemp("bad") / "bundles")
    path = next((copy / "v2" / "model").iterdir())
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    site.registry.bundles = bundles
    before, there = site.deployment, sorted(p.name for p in (site.folder / "bundles").iterdir())
    known = site.registry.versions("census")
    site.registry.versions = lambda name: known  # type: ignore[method-assign]
    site.registry.bundles = copy
    with pytest.raises(IntegrityError):
        site.deploy()
    assert site.deployment == before
    assert sorted(p.name for p in (site.folder / "bundles").iterdir()) == there


def test_a_second_controller_is_refused_and_told_who_the_first_is(site: Site) -> None:
    with controlling(site.folder), pytest.raises(UsageError, match=rf"process {os.getpid()}.*ekiben rollback") as refused:
        site.deploy()
    assert refused.value.exit_code == 2
    assert "\n" not in str(refused.value)
    site.deploy("1")


@pytest.mark.parametrize("name", ["../production", "Production", "", "champion", "latest", "a/b", "x" * 80])
def test_an_environment_has_a_plain_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        environment_folder(tmp_path, name)


def test_another_environment_moves_an_alias_of_its_own(site: Site) -> None:
    served = Served.path(site.root)
    done = roll_out(site.root, "3", to="staging", mode="full", registry=site.registry, say=quiet)  # type: ignore[arg-type]
    assert done.environment == "staging"
    assert site.registry.aliases == {"champion": "1", "challenger": "2", "staging": "3"}
    assert not served.exists()


def test_a_key_that_no_service_trusts_signs_nothing(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from ekiben.serving.security.trust import write_key

    other = Ed25519PrivateKey.generate().public_key().public_bytes_raw()
    monkeypatch.setenv("EKIBEN_TRUSTED_KEYS", write_key(other))
    with pytest.raises(SettingsError, match="not trusted here"):
        site.deploy("3", mode="full")


def test_the_steps_of_the_settings_must_rise(tmp_path: Path) -> None:
    for steps in ("25, 5", "0, 5", "50, 101", "5, 5"):
        make_root(tmp_path, SETTINGS.replace("5, 25, 100", steps))
        with pytest.raises(SettingsError, match=r"\[deploy\] `steps` takes rising shares"):
            load_settings(tmp_path, env={})


# ------------------------------------------------------------------------------------------------ approvals


@pytest.fixture
def colleague(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Signer:
    """Return a second pair of keys, trusted here."""
    monkeypatch.setenv("EKIBEN_SIGNING_KEY", str(tmp_path / "grace.key"))
    pair = signing_key(make=True, say=quiet)
    monkeypatch.delenv("EKIBEN_SIGNING_KEY")
    return pair


def test_a_promotion_waits_for_somebody_else_and_then_goes_through(tmp_path: Path, bundles: Path, colleague: Signer) -> None:
    site = Site(tmp_path / "p", bundles, SETTINGS + "approvals = 1\n").begin()
    trust = trust_of(site.root)
    with pytest.raises(GateError, match=rf"waits for 1 approval .*`ekiben approve 2`.*{colleague.id}") as waits:
        promote(site.root, "2", who="ada", registry=site.registry, say=quiet)  # type: ignore[arg-type]
    assert waits.value.exit_code == 3
    assert site.deployment.champion.version == "1"
    digest = next(v.digest for v in site.registry.versions("census") if v.version == "2")
    asked = Asked(name="census", version="2", digest=digest)
    with pytest.raises(UsageError, match="the same key"):
        approve(site.root, asked, 1, signer=signing_key(), trust=trust, who="grace")
    with pytest.raises(UsageError, match="the same person"):
        approve(site.root, asked, 1, signer=colleague, trust=trust, who="ada")
    with pytest.raises(UsageError, match="not trusted"):
        approve(site.root, asked, 1, signer=colleague, trust=Trust({signing_key().id: signing_key().public}), who="grace")
    assert approve(site.root, asked, 1, signer=colleague, trust=trust, who="grace").is_granted
    done = promote(site.root, "2", who="ada", registry=site.registry, say=quiet)  # type: ignore[arg-type]
    assert done.status == "promoted"
    assert site.deployment.champion.version == "2"
    assert not standing_of(ledger.read(site.root), asked, 1, trust).request  # it was good for one promotion


def test_a_rollout_stays_below_its_last_step_until_somebody_approves(tmp_path: Path, bundles: Path, colleague: Signer) -> None:
    site = Site(tmp_path / "p", bundles, SETTINGS + "approvals = 1\n").begin()
    with pytest.raises(GateError):
        site.deploy(who="ada")
    assert (site.deployment.mode, site.deployment.share, site.deployment.expires) == ("canary", 0.25, "")
    assert any("waits for 1 approval" in line for line in site.said)  # said at the start, so that nobody waits for nothing
    digest = next(v.digest for v in site.registry.versions("census") if v.version == "2")
    approve(site.root, Asked(name="census", version="2", digest=digest), 1, signer=colleague, trust=trust_of(site.root), who="grace")
    waited = site.deployment.number
    assert site.deploy(who="ada").status == "promoted"
    assert {d.share for _, d in site.service.seen if d.mode == "canary" and d.number > waited} == {1.0}


def test_an_approval_is_of_one_request_and_cannot_be_forged_or_used_again(tmp_path: Path, colleague: Signer) -> None:
    own, root = signing_key(say=quiet), tmp_path
    trust = Trust({own.id: own.public, colleague.id: colleague.public})
    asked = Asked(name="census", version="2", digest="d" * 64)
    ask(root, asked, 1, signer=own, trust=trust, who="ada")
    request = next(e for e in ledger.read(root) if e.what == "request")
    name = standing_of(ledger.read(root), asked, 1, trust).request

    def granted() -> bool:
        return standing_of(ledger.read(root), asked, 1, trust).is_granted

    good = sign_facts("approval", {**asked.to_dict(), "request": name, "by": "grace"}, colleague)
    for forged in (
        {**good, "by": "heidi"},  # another name than was signed
        {**good, "key": own.id},
        {**good, "signature": sign_facts("request", {**asked.to_dict(), "request": name, "by": "grace"}, colleague)["signature"]},
        sign_facts("approval", {**asked.to_dict(), "request": name, "by": "grace"}, own),  # the requester's key
        sign_facts("approval", {**asked.to_dict(), "request": "0" * 16, "by": "grace"}, colleague),
        sign_facts("approval", {**asked.to_dict(), "digest": "e" * 64, "request": name, "by": "grace"}, colleague),
        sign_facts("approval", {**asked.to_dict(), "environment": "staging", "request": name, "by": "grace"}, colleague),
    ):
        ledger.append(root, "approval", who="grace", **forged)
        assert not granted()
    ledger.append(root, "approval", who="grace", **good)
    assert granted()
    ledger.append(root, "promotion", **asked.to_dict())
    assert not granted()
    ledger.append(root, "request", who="ada", **request.facts)  # the old request and its approval, written down once more
    ledger.append(root, "approval", who="grace", **good)
    assert not granted()


def test_the_first_deployment_of_a_champion_needs_no_second_approval(tmp_path: Path, bundles: Path) -> None:
    assert Site(tmp_path, bundles, SETTINGS + "approvals = 2\n").begin().deployment.champion.version == "1"


# ------------------------------------------------------------------------------------------------ killed anywhere


def test_a_note_whose_deployment_never_appeared_counts_for_nothing(site: Site) -> None:
    ghost = Note(number=site.deployment.number + 1, name="census", champion=Arm(version="3", digest="", bundle="b"))
    leave_note(site.folder, ghost)
    settle(site.root, site.registry)  # type: ignore[arg-type]
    assert site.registry.aliases["champion"] == "1"
    site.deploy("2", mode="full")
    assert site.registry.aliases["champion"] == "2"
    assert Note.read(site.folder) is None


def test_a_note_that_nobody_settled_is_settled_by_the_next_command(site: Site) -> None:
    site.deploy("2", mode="full")
    roll_back(site.root, patience_s=0, settle_with=lambda root, to: None)  # as if that process had been killed
    assert site.registry.aliases["champion"] == "2"
    site.deploy("1")
    assert site.registry.aliases["champion"] == "1"


def test_whoever_has_not_seen_the_deployment_in_force_does_not_replace_it(site: Site) -> None:
    from ekiben.rollout.place import Overtaken

    trust, old = trust_of(site.root), site.deployment

    def make(before: Deployment | None, number: int) -> Deployment:
        return Deployment(environment="production", number=number, at=now(), by="ada", why="", champion=old.champion)

    publish(site.folder, make, signing_key(), trust, after=old.number)
    with pytest.raises(Overtaken):
        publish(site.folder, make, signing_key(), trust, after=old.number)


def test_leftovers_are_removed_and_nothing_else(site: Site) -> None:
    (site.folder / "bundles" / ".new-abc" / "bundle").mkdir(parents=True)
    (site.folder / ".deployment.json.x.tmp").write_text("{")
    before = sorted(p.name for p in (site.folder / "bundles").glob("[!.]*"))
    assert remove_leftovers(site.folder) == 2
    assert sorted(p.name for p in (site.folder / "bundles").iterdir()) == before
    assert site.deployment.champion.version == "1"


KILLED = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from rollouts import FakeRegistry, FakeService
from ekiben.rollout.control import roll_out
from ekiben.rollout.place import environment_folder
root = Path({root!r})
service = FakeService(environment_folder(root), rate=1e6)
world = service.world()
world.sleep = lambda seconds: (service.sleep(20), print("tick", flush=True))
print("ready", flush=True)
for version in "23132123":
    roll_out(root, version, registry=FakeRegistry(root, Path({bundles!r})), world=world, say=lambda line: None)
"""


def test_sigkill_at_any_moment_leaves_one_verified_champion(site: Site, bundles: Path) -> None:
    script = KILLED.format(tests=str(Path(__file__).parent), root=str(site.root), bundles=str(bundles))
    rng, trust, numbers = random.Random(7), trust_of(site.root), []
    for _ in range(7):
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=os.environ)
        assert process.stdout is not None
        for _ in range(1 + rng.choice((0, 0, 3, 7, 12, 20))):  # while it brings a bundle, or at some step of some rollout
            assert process.stdout.readline()
        time.sleep(rng.uniform(0.0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        found = site.deployment  # verifies, or raises
        for arm in filter(None, (found.champion, found.challenger)):
            assert load_bundle(site.folder / "bundles" / arm.bundle, trust).digest == arm.digest
        if found.mode == "canary":
            assert found.expires  # nobody renews it any more
        numbers.append(found.number)
        ledger.verify(site.root)
    assert numbers == sorted(numbers)
    assert numbers[-1] > numbers[0]
    site.deploy("3", mode="full")
    assert not [p for p in site.folder.rglob(".*") if p.name.endswith(".tmp") or p.name.startswith(".new-")]
    assert site.registry.aliases["champion"] == "3"


def test_the_settings_file_of_the_notes_is_plain_json(site: Site) -> None:
    leave_note(site.folder, Note(number=99, name="census", dropped={"2": "why"}))
    assert json.loads(Note.path(site.folder).read_text())["dropped"] == {"2": "why"}


# ------------------------------------------------------------------------------------------------ fairness, packaging, the command


def write_answers(journal: Path, version: str, role: str, chance: dict[str, float], ids: dict[str, str]) -> None:
    """Keep an answer for everybody: positive with the chance of their group."""
    from bundles import make_schema

    from ekiben.serving.journal.journal import Journal, new_ids
    from ekiben.serving.journal.keeping import JournalOptions
    from ekiben.serving.journal.segments import origin_of

    origin = origin_of(make_schema("binary"), ["age"], {"name": "census", "version": version, "bento": "", "role": role})
    rng, book = random.Random(3), Journal(journal, origin, JournalOptions())
    for person, group in ids.items():
        label = "yes" if rng.random() < chance[group] else "no"
        id_ = new_ids(1)[0]
        book.predictions([id_], [{"age": 40.0, "id": person}], [{"id": id_, "label": label, "probability": 0.9 if label == "yes" else 0.1}])
    book.close()


def test_fairness_is_judged_on_the_challenger_s_own_answers_joined_with_the_restricted_table(tmp_path: Path) -> None:
    from datetime import UTC, datetime, timedelta

    from bundles import make_schema
    from tiny import write_notebook

    from ekiben.rollout.fairness import judge_fairness, why_not_judged

    gate = "[gates]\ngates =\n    demographic_parity_ratio[sex] >= 0.8\n"
    root = make_root(tmp_path, SETTINGS + gate)
    write_notebook(root / "nbs/pipeline/06_monitor.ipynb", 'groups: str = ""\ngroup_id: str = ""', [])
    assert "names no `groups` table" in why_not_judged(load_settings(root, env={}), make_schema("binary"))
    (root / "settings.ini").write_text(SETTINGS + gate + "[monitor]\ngroups = people.csv\n")
    people = {f"p{i}": "FM"[i % 2] for i in range(1200)}
    (root / "people.csv").write_text("id,sex\n" + "".join(f"{person},{sex}\n" for person, sex in people.items()))
    settings, schema, since = load_settings(root, env={}), make_schema("binary"), datetime.now(UTC) - timedelta(minutes=1)
    assert why_not_judged(settings, schema) == ""
    assert judge_fairness(settings, schema, "2", since) == ()
    journal = root / ".ekiben" / "journal"
    write_answers(journal, "1", "champion", {"F": 0.5, "M": 0.5}, people)
    write_answers(journal, "2", "challenger", {"F": 0.2, "M": 0.6}, people)
    verdicts = {version: [j.verdict for j in judge_fairness(settings, schema, version, since)] for version in "12"}
    assert verdicts == {"1": ["pass"], "2": ["fail"]} or verdicts == {"1": ["insufficient"], "2": ["fail"]}


def test_a_version_that_was_taken_back_gets_no_alias_from_packaging_until_somebody_promotes_it(site: Site) -> None:
    from ekiben.challenge import Comparison
    from ekiben.package import earn_alias

    site.service.faults = 0.2
    site.deploy()
    versions = {v.version: v for v in site.registry.versions("census")}
    better = Comparison(metric="auc", champion=0.8, newcomer=0.9, gain=0.1, low=0.05, high=0.15, rows=100)
    assert earn_alias(site.registry, versions["2"], "if_better", better, versions["1"]) == ""  # type: ignore[arg-type]
    assert site.registry.aliases == {"champion": "1"}
    promote(site.root, "2", registry=site.registry, say=quiet)  # type: ignore[arg-type]
    assert TAKEN_BACK not in next(v for v in site.registry.versions("census") if v.version == "2").tags
    assert site.registry.aliases == {"champion": "2"}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--shadow", "--full"], "exclude each other"),
        (["--canary", "0"], "above 0 and below 100"),
        (["--canary", "100"], "above 0 and below 100"),
        (["--to", "No Good"], "names no environment"),
        (["--status", "--size", "0"], "above 0"),
    ],
)
def test_a_call_that_makes_no_sense_is_refused_in_one_line(words: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from ekiben.cli import main

    assert main(["deploy", *words, "--project", str(make_root(tmp_path))]) == 2
    line = capsys.readouterr().err.strip()
    assert says in line
    assert "\n" not in line


def test_who_serves_is_shown_also_where_nothing_does(site: Site, capsys: pytest.CaptureFixture[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    from ekiben.cli import main

    assert main(["deploy", "--status", "--project", str(make_root(tmp_path_factory.mktemp("empty")))]) == 0
    assert "nothing is deployed to production yet" in capsys.readouterr().out
    site.deploy(mode="shadow")
    assert main(["deploy", "--status", "--json", "--project", str(site.root)]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["champion"], said["challenger"], said["mode"], said["is_served"]) == ("1", "2", "shadow", False)


@pytest.mark.slow
def test_a_detached_rollout_that_ends_at_once_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from ekiben.cli import main

    make_root(tmp_path)
    words = ["deploy", "--detach", "--project", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["ekiben", *words])
    assert main(words) == 1
    assert "no version of `census` is registered yet" in capsys.readouterr().err
    assert (environment_folder(tmp_path) / "rollout.log").is_file()


def test_a_controller_that_was_killed_is_seen_to_be_gone(tmp_path: Path) -> None:
    from ekiben.rollout.place import controller

    folder = environment_folder(make_root(tmp_path))
    code = "import sys, time; from pathlib import Path; from ekiben.rollout.place import controlling\nwith controlling(Path(sys.argv[1])): print('in', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    assert controller(folder) == process.pid
    process.kill()
    process.wait()
    process.stdout.close()
    assert controller(folder) == 0
    with controlling(folder):
        pass
