"""The comparison files of published claims: they are read, and each rule has the arms that it asks for."""

from __future__ import annotations

from pathlib import Path

import pytest

from veneer.comparing import parse_arms, read_comparison
from veneer.comparing.inference.claims import RULES, check_claim

FILES = sorted((Path(__file__).parents[1] / "studies").glob("c*.toml"))


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
    assert claim["id"] == path.stem.upper()
    assert claim["says"]
    assert claim["source"]
    for name in claim.get("with", ()):
        assert path.with_name(f"{name}.toml") in FILES


def test_every_rule_has_a_study():
    claims = [read_comparison(path).get("claim", {}) for path in FILES]
    assert {claim["rule"] for claim in claims if claim} == set(RULES)


def test_the_halves_of_a_claim_about_orders_differ_in_the_rates_alone():
    one, two = (read_comparison(path) for path in FILES if path.stem.startswith("c8"))
    differing = {key for key in one.keys() | two.keys() if one.get(key) != two.get(key)}
    assert differing == {"claim", "rates", "trials"}
