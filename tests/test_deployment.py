"""The deployment's folder: what was not signed as it stands, for this place and as the newest, is never taken."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import msgspec
import pytest
from bundles import make_project
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ekiben.errors import IntegrityError, UsageError
from ekiben.serving.bundle import Lineage, load_bundle
from ekiben.serving.hosting.deployment import (
    BUNDLES,
    DEPLOYMENT,
    Arm,
    Deployment,
    GuardLimits,
    add_bundle,
    append_event,
    deployment_folder,
    newest_number,
    now,
    parse_deployment,
    read_deployment,
    read_events,
    write_deployment,
)
from ekiben.serving.security.signer import sign_folder, signing_key
from ekiben.serving.hosting.standing import EVENTS, STATUS, Status, parse_time
from ekiben.serving.security.trust import Trust, trusted_keys

FEW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
CHAMPION = Arm(version="3", digest="d" * 64, bundle="d" * 16)
CHALLENGER = Arm(version="4", digest="e" * 64, bundle="e" * 16, bento="census:v4")


def make(number: int = 1, environment: str = "production", **said: object) -> Deployment:
    parts = {"at": now(), "by": "ada", "why": "it won", "champion": CHAMPION, **said}
    return Deployment(environment=environment, number=number, **parts)


def canary(number: int = 1, **said: object) -> Deployment:
    return make(number, **{"challenger": CHALLENGER, "mode": "canary", "share": 0.25, **said})


@pytest.fixture(scope="module")
def signer():
    return signing_key(say=lambda line: None)


@pytest.fixture(scope="module")
def trust(signer) -> Trust:
    return trusted_keys()


@pytest.fixture
def folder(tmp_path) -> Path:
    return deployment_folder(tmp_path)


texts = st.text(st.characters(codec="utf-8"), max_size=20)
deployments = st.builds(
    Deployment,
    environment=st.just("production"),
    number=st.integers(1, 2**53),
    at=texts,
    by=texts,
    why=texts,
    champion=st.just(CHAMPION),
    challenger=st.just(CHALLENGER),
    mode=st.sampled_from(["shadow", "canary"]),
    share=st.floats(0, 1),
    route_by=texts,
    limits=st.builds(GuardLimits, max_error_rate=st.floats(0, 1), max_loss_gap=st.floats(0, 1e9)),
    expires=st.sampled_from(["", "2026-01-01T00:00:00Z", "2026-01-01"]),
)


@FEW
@given(said=deployments)
def test_whatever_is_signed_is_read_back(said, signer, trust, tmp_path_factory):
    folder = deployment_folder(tmp_path_factory.mktemp("whole"))
    write_deployment(folder, said, signer)
    assert read_deployment(folder, trust) == said
    assert newest_number(folder) == said.number


def test_a_whole_number_for_a_share_is_the_same_share(folder, signer, trust):
    write_deployment(folder, canary(share=1, limits=GuardLimits(max_loss_gap=1)), signer)
    assert read_deployment(folder, trust).share == 1.0


def test_whichever_bit_is_flipped_it_is_refused(folder, signer, trust):
    write_deployment(folder, canary(), signer)
    raw = (folder / DEPLOYMENT).read_bytes()
    for at in range(len(raw)):
        with pytest.raises(IntegrityError):
            parse_deployment(raw[:at] + bytes([raw[at] ^ (1 << at % 8)]) + raw[at + 1 :], folder, trust)


def test_wherever_it_is_cut_off_it_is_refused(folder, signer, trust):
    write_deployment(folder, canary(), signer)
    raw = (folder / DEPLOYMENT).read_bytes()
    for end in range(len(raw)):
        with pytest.raises(IntegrityError):
            parse_deployment(raw[:end], folder, trust)


def test_half_a_character_is_refused_as_everything_else(folder, signer, trust):
    write_deployment(folder, canary(), signer)
    raw = (folder / DEPLOYMENT).read_bytes().replace(b'"it won"', rb'"\ud800"')
    with pytest.raises(IntegrityError):
        parse_deployment(raw, folder, trust)


@FEW
@given(raw=st.binary(max_size=200) | st.text(max_size=50).map(str.encode) | st.just(b"[" * 100_000))
def test_noise_is_refused_in_one_way(raw, trust, tmp_path_factory):
    with pytest.raises(IntegrityError, match="not a signed deployment"):
        parse_deployment(raw, Path("production"), trust)


def test_a_signature_over_something_else_does_not_carry_over(folder, signer, trust):
    write_deployment(folder, canary(), signer)
    said = json.loads((folder / DEPLOYMENT).read_bytes())
    for change in ({"share": 1.0}, {"number": 99}, {"champion": said["deployment"]["challenger"]}, {"expires": ""}, {"mode": "shadow"}):
        (folder / DEPLOYMENT).write_text(json.dumps({**said, "deployment": {**said["deployment"], **change}}, indent=2) + "\n")
        if {**said["deployment"], **change} != said["deployment"]:
            with pytest.raises(IntegrityError, match="not what was signed"):
                read_deployment(folder, trust)


def test_a_signed_bundle_s_signature_is_no_deployment_s(folder, signer, trust, tmp_path):
    write_deployment(folder, canary(), signer)
    said = json.loads((folder / DEPLOYMENT).read_bytes())
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "a").write_text("a")
    sign_folder(tmp_path / "bundle", signer, kind="bundle", name="production")
    said["signature"] = json.loads((tmp_path / "bundle" / "signature.json").read_bytes())
    (folder / DEPLOYMENT).write_text(json.dumps(said, indent=2) + "\n")
    with pytest.raises(IntegrityError, match="not what was signed"):
        read_deployment(folder, trust)


def test_one_environment_s_file_is_not_taken_for_another_s(tmp_path, signer, trust):
    staging, production = (deployment_folder(tmp_path, name) for name in ("staging", "production"))
    write_deployment(staging, make(environment="staging"), signer)
    production.mkdir()
    shutil.copy(staging / DEPLOYMENT, production / DEPLOYMENT)
    with pytest.raises(IntegrityError, match="not taken for another's"):
        read_deployment(production, trust)
    with pytest.raises(UsageError, match="is for staging"):
        write_deployment(production, make(9, environment="staging"), signer)


def test_who_is_not_trusted_deploys_nothing(folder, signer, trust):
    write_deployment(folder, make(), signer)
    with pytest.raises(IntegrityError, match="no signer is trusted"):
        read_deployment(folder, Trust({}))
    with pytest.raises(IntegrityError, match="revoked"):
        read_deployment(folder, Trust({"x": b"x" * 32}, frozenset(trust.keys)))
    with pytest.raises(IntegrityError, match="not trusted here"):
        read_deployment(folder, Trust({"x": b"x" * 32}))


def test_numbers_only_rise_whatever_file_remembers_the_last(folder, signer):
    write_deployment(folder, make(5), signer)
    for number in (1, 5):
        with pytest.raises(UsageError, match="give 6"):
            write_deployment(folder, make(number), signer)
    (folder / DEPLOYMENT).rename(folder / "accepted.json")
    with pytest.raises(UsageError, match="give 6"):
        write_deployment(folder, make(5), signer)
    (folder / STATUS).write_bytes(Status(number=8, at=now(), pid=1, serving="3", mode="full", share=0).to_json())
    with pytest.raises(UsageError, match="give 9"):
        write_deployment(folder, make(6), signer)
    (folder / STATUS).write_bytes(b"half a li")
    write_deployment(folder, make(6), signer)


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ({"mode": "canary"}, "needs a challenger"),
        ({"mode": "shadow"}, "needs a challenger"),
        ({"challenger": CHALLENGER}, "no challenger"),
        ({"champion": Arm(version="3", digest="", bundle="../../secret")}, "no name of a folder"),
        ({"champion": Arm(version="3", digest="", bundle=".new-x")}, "no name of a folder"),
        ({"expires": "tomorrow"}, "is no time"),
        ({"environment": "../x"}, "names no environment"),
    ],
)
def test_what_contradicts_itself_is_not_signed(folder, signer, said, shown):
    with pytest.raises(UsageError, match=shown):
        write_deployment(folder, make(**said), signer)
    assert not (folder / DEPLOYMENT).exists()


@pytest.mark.parametrize("said", [{"share": 1.5}, {"share": -0.1}, {"number": 0}, {"mode": "ab"}, {"more": 1}])
def test_no_file_says_what_no_deployment_may(said):
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({**canary().to_dict(), **said}, Deployment)


# ---- bundles


@pytest.fixture(scope="module")
def signed(tmp_path_factory, signer) -> dict[str, Path]:
    found = {}
    for version in ("3", "4"):
        place = tmp_path_factory.mktemp(f"v{version}")
        project = make_project(place, rounds=5, rows=200, lineage=Lineage(version=version))
        sign_folder(project.bundle.folder, signer, kind="bundle", name=f"census:v{version}")
        found[version] = project.bundle.folder
    return found


def test_a_bundle_comes_in_whole_and_is_known_by_what_it_answers(folder, signed, trust):
    arm = add_bundle(folder, signed["3"], bento="census:v3")
    bundle = load_bundle(folder / BUNDLES / arm.bundle, trust)
    assert arm == Arm(version="3", digest=bundle.digest, bundle=bundle.digest[:16], bento="census:v3")
    assert add_bundle(folder, signed["3"], bento="census:v3") == arm
    assert [p.name for p in (folder / BUNDLES).iterdir()] == [arm.bundle]


def test_two_versions_that_answer_alike_lie_side_by_side(folder, signed, trust):
    third, fourth = add_bundle(folder, signed["3"]), add_bundle(folder, signed["4"])
    assert third.digest == fourth.digest and third.bundle != fourth.bundle
    assert load_bundle(folder / BUNDLES / fourth.bundle, trust).info.lineage.version == "4"
    assert add_bundle(folder, signed["4"]) == fourth


def test_a_damaged_copy_is_replaced_by_a_whole_one(folder, signed, trust):
    arm = add_bundle(folder, signed["3"])
    path = folder / BUNDLES / arm.bundle / "schema.json"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(IntegrityError):
        load_bundle(path.parent, trust)
    assert add_bundle(folder, signed["3"]) == arm
    load_bundle(path.parent, trust)


def test_nothing_of_a_bundle_that_is_unsigned_or_damaged_is_kept(folder, signed, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(signed["3"], copy)
    (copy / "signature.json").unlink()
    with pytest.raises(IntegrityError, match="not signed"):
        add_bundle(folder, copy)
    shutil.copy(signed["3"] / "signature.json", copy)
    (copy / "schema.json").write_text("{}")
    with pytest.raises(IntegrityError, match="changed"):
        add_bundle(folder, copy)
    assert list((folder / BUNDLES).iterdir()) == []


# ---- what the service says


def test_a_line_that_a_crash_cut_off_is_left_out_and_the_others_are_read(folder):
    folder.mkdir(parents=True)
    assert read_events(folder) == []
    first = append_event(folder, "loaded", 1, "3", "it won")
    with (folder / EVENTS).open("ab") as out:
        out.write(b'{"at": "20\xff\n')
    second = append_event(folder, "expired", 1, "4")
    assert read_events(folder) == [first, second]


def test_a_time_without_a_zone_is_utc():
    assert parse_time("2026-01-01T00:00:00") == parse_time("2026-01-01T01:00:00+01:00")
