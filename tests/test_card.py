"""The model card says what was recorded, all of it, and nothing else."""

import re

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from ekiben.evaluate.card import CardFacts, build_card, library_versions
from ekiben.evaluate.slices import Slice, SliceSearch
from ekiben.records import Field, Judgement, Measure, Policy, Schema


def schema(target="paid", sensitive=True):
    fields = [Field(name="age", kind="number"), Field(name=target, kind="flag", role="target", is_input=False)]
    if sensitive:
        fields.append(Field(name="sex", kind="category", role="sensitive", is_input=False))
    return Schema(fields=tuple(fields), task="binary", target=target, classes=("no", "yes"))


def section(card, title):
    return next(s for s in card["sections"] if s["title"] == title)


def line(verdict, **changes):
    fields = {"name": "auc >= 0.9", "metric": "auc", "slice": "", "op": ">=", "limit": 0.9, "value": 0.85, "low": 0.8, "high": 0.88,
              "verdict": verdict, "blocking": True}  # fmt: skip
    return Judgement(**fields | changes)


def test_without_facts_nothing_is_claimed():
    card = build_card(CardFacts(name="loans", schema=schema()))
    for title, names in {
        "What it is": ("model", "runtime", "intended use", "answers for it"),
        "Data": ("source", "fingerprint", "split", "training rows", "held-out rows"),
        "Training": ("metric of the search", "trials", "inputs after features"),
        "How it decides": ("policy",),
        "Where it comes from": ("run", "commit", "seed"),
    }.items():
        for name in names:
            assert section(card, title)["facts"][name] == "not recorded", name
    assert not re.search(r"\d", card["markdown"])
    assert "Fairness" in card["markdown"] and "No gate" in card["markdown"]


def test_no_sensitive_column_is_said_to_mean_no_fairness_measured():
    card = build_card(CardFacts(name="loans", schema=schema(sensitive=False)))
    assert "fairness was not measured" in section(card, "Fairness")["notes"][0]


def test_figures_stand_with_their_intervals_and_rows():
    measures = [Measure(name="auc", value=0.9273, low=0.9229, high=0.9314, rows=16281),
                Measure(name="value_gain", slice="baseline", value=1.5, low=1.1, high=1.9, rows=16281)]  # fmt: skip
    fairness = [Measure(name="demographic_parity_ratio", slice="sex", value=0.32, low=0.29, high=0.35, rows=16281, note="2 groups")]
    card = build_card(CardFacts(name="loans", schema=schema(), measures=measures, fairness=fairness))
    assert section(card, "Quality on held-out rows")["tables"][0]["rows"] == [["AUC", "0.927", "0.923 to 0.931", "16,281", ""]]
    assert section(card, "Against other ways to decide")["tables"][0]["rows"][0][0] == "value per row gain [baseline]"
    assert section(card, "Fairness on held-out rows")["tables"][0]["rows"][0][1:3] == ["0.320", "0.290 to 0.350"]


def test_failures_waivers_and_open_verdicts_stand_under_limits():
    judged = [line("fail", waived="pilot, agreed"), line("insufficient", name="f1 >= 0.7", rows_needed=9000), line("pass", name="accuracy >= 0.1")]
    limits = section(build_card(CardFacts(name="loans", schema=schema(), judgements=judged)), "Limits")["notes"]
    assert "`auc >= 0.9` fails: surely not above 0.9, waived: pilot, agreed." in limits
    assert any("f1 >= 0.7" in note and "9,000 rows would decide" in note for note in limits)
    assert not any("accuracy" in note for note in limits)


def test_bad_slices_and_data_warnings_are_not_left_out():
    worst = SliceSearch(
        slices=(
            Slice(name="town is east", rows=400, value=0.4, low=0.3, high=0.5, rest=0.1, surely_by=0.2),
            Slice(name="town is west", rows=40, value=0.2, low=0.1, high=0.4, rest=0.1, surely_by=-0.1),
        ),
        tested=77, overall=0.12, min_rows=30,
    )  # fmt: skip
    data = {"warnings": [{"kind": "leak", "columns": ["paid_on"], "message": "`paid_on` alone gives the target away"}, "12 rows come twice"]}
    card = build_card(CardFacts(name="loans", schema=schema(), slices=worst, data=data))
    limits = section(card, "Limits")["notes"]
    assert any("town is east" in n for n in limits) and not any("town is west" in n for n in limits)
    assert "77 parts" in card["markdown"] and "worse, may be chance" in card["markdown"]
    assert section(card, "Data")["notes"] == ["Warning from the data: `paid_on` alone gives the target away", "Warning from the data: 12 rows come twice"]


def test_a_policy_that_needs_the_attribute_says_so():
    policy = Policy(task="binary", group_by="sex", thresholds={"F": 0.4, "M": 0.6}, unknown_group="strictest", mitigation="thresholds")
    card = build_card(CardFacts(name="loans", schema=schema(), policy=policy))
    assert section(card, "How it decides")["facts"]["needs at prediction"] == "sex"
    assert section(card, "How it decides")["facts"]["threshold by group"] == "F = 0.4, M = 0.6"
    assert any("without it the rule is `strictest`" in n for n in section(card, "Limits")["notes"])


def test_the_way_back_names_commit_and_trials():
    facts = CardFacts(name="loans", schema=schema(), run={"run_id": "r1", "commit": "abc123", "dirty": False, "seed": 7}, training={"trials": 51})
    origin = section(build_card(facts), "Where it comes from")["facts"]
    assert origin["to make it again"] == "`git checkout abc123`, then `ekiben run -p tune.trials=51`"
    assert origin["uncommitted changes"] == "no" and origin["seed"] == "7"


def test_the_same_facts_give_the_same_card_and_json_holds_it():
    facts = CardFacts(name="loans", schema=schema(), judgements=[line("fail")], versions=library_versions())
    card = build_card(facts)
    assert card == build_card(facts)
    assert msgspec.json.decode(msgspec.json.encode(card)) == card


@settings(max_examples=80, deadline=None)
@given(st.text(min_size=1, max_size=40).filter(str.strip))
def test_texts_from_the_data_stay_texts(odd):
    part = Slice(name=odd, rows=40, value=0.4, low=0.3, high=0.5, rest=0.1, surely_by=0.2)
    search = SliceSearch(slices=(part,), tested=1, overall=0.1, min_rows=30)
    facts = CardFacts(name=odd, schema=schema(target=odd), contact=odd, slices=search, data={"warnings": [odd]})
    text = build_card(facts)["markdown"]
    plain = build_card(CardFacts(name="x", schema=schema(target="x"), contact="x", data={"warnings": ["x"]},
                                 slices=SliceSearch(slices=(Slice(**part.to_dict() | {"name": "x"}),), tested=1, overall=0.1, min_rows=30)))  # fmt: skip
    assert len(text.splitlines()) == len(plain["markdown"].splitlines())
    assert not re.search(r"<[A-Za-z/!?]", text) and "](" not in text.replace("]\\(", "")
    for one, other in zip(text.splitlines(), plain["markdown"].splitlines(), strict=True):
        if other.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", one)) == len(re.findall(r"(?<!\\)\|", other))


def test_versions_are_those_installed():
    import numpy

    assert library_versions(["numpy", "surely-not-installed"]).get("numpy") == numpy.__version__
    assert "surely-not-installed" not in library_versions(["surely-not-installed"])
