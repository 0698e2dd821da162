"""The catalogue: what it says of a method is what the method's class and file say."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import veneer
from veneer import catalogue
from veneer.edits import registry
from veneer.errors import UnknownMethod


def test_every_registered_method_is_in_the_catalogue_once():
    keys = [m.key for m in veneer.methods()]
    assert sorted(keys) == sorted(registry())
    assert len(keys) == len(set(keys)) > 20


def test_the_catalogue_is_called_by_its_name_whatever_was_imported_before():
    for first in (
        "",
        "veneer.edits.registry(); ",
        "veneer.attach; veneer.edits.registry(); ",
        "import veneer.methods; ",
    ):
        code = f"import veneer; {first}print(len(veneer.methods()))"
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert found.stdout.strip() == str(len(registry())), (first, found.stderr[-300:])


def test_a_method_is_its_class():
    assert veneer.method("lora") is registry()["lora"]
    with pytest.raises(UnknownMethod, match="nearest: lora"):
        veneer.method("lorra")


@pytest.mark.parametrize("key", sorted(registry()))
def test_an_entry_is_complete_and_speaks_json(key):
    info = catalogue.info(key)
    found = json.loads(json.dumps(info.to_dict()))
    assert found["key"] == key
    assert found["name"] == registry()[key].__name__
    assert len(info.doc.splitlines()) > 3
    assert info.sentence
    assert 0 < info.rates[0] < info.rates[1]
    assert [h["name"] for h in found["hyperparameters"]][-1] == "sites"
    assert all(h["meaning"] for h in found["hyperparameters"])
    assert info.starts_as_identity or info.reason
    assert key in str(info)


def test_an_entry_tells_what_the_declaration_tells():
    info = catalogue.info("lora")
    rank = next(h for h in info.hyperparameters if h.name == "rank")
    assert (rank.default, rank.alias, rank.bounds, rank.size) == (8, ("r",), {"at_least": 1}, True)
    bias = next(h for h in info.hyperparameters if h.name == "bias")
    assert bias.bounds["choices"] == ("none", "all", "lora_only")
    assert info.ports == ("weight",)
    assert info.paper == "arXiv:2106.09685"


def test_lines_are_those_of_the_file():
    for info in veneer.methods():
        file = Path(importlib.import_module(registry()[info.key].__module__).__file__)
        assert info.lines == len(file.read_text().splitlines())


def test_blocks_of_one_user_count_for_it_and_shared_ones_for_nobody():
    lines = {m.key: m.shared_lines for m in veneer.methods()}
    assert lines["lora"] == 0  # the starts beside it are DoRA's too
    assert lines["ia3"] == 0
    assert lines["oft"] > 3  # skew


def test_what_merges_is_what_the_engine_merges():
    merges = {m.key: m.mergeable for m in veneer.methods()}
    assert merges["lora"]
    assert merges["ia3"]
    assert not merges["prefix_tuning"]
    assert not merges["loreft"]
    assert not merges["linear_probe"]
    assert {m.key for m in veneer.methods(mergeable=True)} == {k for k, yes in merges.items() if yes}


def test_filters_leave_what_was_asked_for():
    assert {m.key for m in veneer.methods(family="additive/prompt")} < {
        m.key for m in veneer.methods(family="additive")
    }
    assert all(m.family.startswith("additive/") for m in veneer.methods(family="additive"))
    assert veneer.methods(family="add") == []
    assert all("attention" in m.ports for m in veneer.methods(port="attention"))
    assert {m.key for m in veneer.methods(parity=True)} == set(catalogue.PARITY) & set(registry())


def test_parity_names_methods_and_types_that_there_are():
    assert set(catalogue.PARITY) <= set(registry())
    assert set(catalogue.WITNESS) <= set(registry())
    peft = pytest.importorskip("peft")
    for kind in catalogue.PARITY.values():
        assert kind.split()[0] in peft.PeftType.__members__


def test_a_method_of_a_users_own_joins_the_catalogue():
    from veneer.edits import Sites, WeightMethod, hyper, method, zeros
    from veneer.edits._method import _REGISTRY

    try:

        @method("of_my_own", paper="", family="selective/mine")
        class OfMyOwn(WeightMethod):
            """Mine: an update of every entry."""

            strength: float = hyper(1.0, "times the update", more_than=0)
            sites: Sites = "attention.query"

            def tensors(self, site):
                return {"D": zeros(*site.shape)}

            def delta(self, t, W):
                return self.strength * t.D

        found = catalogue.info("of_my_own")
        assert found.mergeable
        assert found.witness == catalogue.UNWITNESSED
        assert found.parity == ""
        assert "of_my_own" in [m.key for m in veneer.methods(family="selective")]
    finally:
        _REGISTRY.pop("of_my_own", None)
