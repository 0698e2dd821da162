"""The comparison files of published claims: they are read, and each rule has the arms that it asks for."""

from __future__ import annotations

from pathlib import Path

import pytest

from veneer.comparing import parse_arms, read_comparison
from veneer.comparing.inference.claims import RULES, check_claim

STUDIES = Path(__file__).parents[1] / "studies"
FILES = sorted([*STUDIES.glob("c*.toml"), *STUDIES.glob("reduced-c*.toml")])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_study_is_a_comparison_with_a_claim_that_can_be_decided(path):
    fields = read_comparison(path)
    arms = [str(arm) for arm in parse_arms(fields["methods"])]
    claim = fields.get("claim")
    if claim is None:
        assert path.stem in {
            name for other in FILES for name in read_comparison(other).get("claim", {}).get("with", ())
        }
        return
    check_claim(claim, arms)
    assert claim["id"] == path.stem.removeprefix("reduced-").upper()
    assert claim["says"]
    assert claim["source"]
    for name in claim.get("with", ()):
        assert path.with_name(f"{name}.toml") in FILES


def test_every_rule_has_a_study():
    claims = [read_comparison(path).get("claim", {}) for path in FILES]
    assert {claim["rule"] for claim in claims if claim} == set(RULES)


def test_the_halves_of_a_claim_about_orders_differ_in_the_rates_alone():
    for name in ("c8", "reduced-c8"):
        one, two = (read_comparison(STUDIES / f"{file}.toml") for file in (name, f"{name}-shared"))
        differing = {key for key in one.keys() | two.keys() if one.get(key) != two.get(key)}
        assert differing == {"claim", "rates", "trials"}


@pytest.mark.parametrize("path", sorted(STUDIES.glob("reduced-c*.toml")), ids=lambda path: path.stem)
def test_a_reduced_claim_is_decided_by_the_rule_of_the_whole_one(path):
    part = read_comparison(path)
    whole = read_comparison(path.with_name(path.name.removeprefix("reduced-")))
    assert set(part["methods"]) <= set(whole["methods"]) | {"lora:rank=8"}
    for key in ("id", "says", "source", "rule", "margin", "alike_above", "share", "signs"):
        assert part.get("claim", {}).get(key) == whole.get("claim", {}).get(key)
