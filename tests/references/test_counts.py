"""Published counts: two origins of every integer, and bases of the published size."""

import re

import pytest
import torch

from references import counts


@pytest.mark.parametrize("entry", counts.COUNTS, ids=lambda e: f"{e.method}-{e.architecture}-{e.count}")
def test_a_published_count_is_what_its_rule_gives(entry):
    assert entry.rule(counts.ARCHITECTURES[entry.architecture], entry.options) == entry.count


def digits(text: str) -> tuple[float, float] | None:
    """("4.2M") -> (4.2e6, half a unit of its last digit); None for percentages and bytes."""
    match = re.fullmatch(r"([\d.,]+)([KM]?)", text)
    if not match:
        return None
    number, unit = match[1].replace(",", ""), {"": 1, "K": 1e3, "M": 1e6}[match[2]]
    decimals = len(number.partition(".")[2])
    return float(number) * unit, 0.5 * unit * 10**-decimals


@pytest.mark.parametrize("entry", counts.COUNTS, ids=lambda e: f"{e.method}-{e.architecture}-{e.count}")
def test_a_count_said_to_agree_rounds_to_the_published_number(entry):
    printed = digits(entry.published)
    if printed:
        value, half = printed
        # Rounded, or cut off behind the last printed digit: both are in use.
        assert (-half <= entry.count - value < 2 * half or entry.count == value) == entry.agrees


def test_counts_have_no_twins():
    keys = [(e.method, e.architecture, e.sites, str(e.options)) for e in counts.COUNTS]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("name", [n for n, a in counts.ARCHITECTURES.items() if a.total])
def test_an_architecture_has_the_published_number_of_parameters(name):
    transformers = pytest.importorskip("transformers")
    a = counts.ARCHITECTURES[name]
    with torch.device("meta"):
        model = getattr(transformers, a.model).from_config(getattr(transformers, a.config)(**a.settings))
    assert sum(parameter.numel() for parameter in model.parameters()) == a.total
