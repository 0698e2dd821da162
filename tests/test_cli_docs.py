"""The pages of the docs are what the code declares, and the demo's runs are those that compare would make."""

from __future__ import annotations

from pathlib import Path

import pytest

import veneer
from veneer.cli import docs

COMMITTED = Path(__file__).parent.parent / "docs" / "catalogue.md"


def test_the_committed_catalogue_is_up_to_date():
    assert COMMITTED.read_text(encoding="utf-8") == docs.catalogue_page(), "make docs writes it anew"


def test_the_pages_are_the_same_each_time(tmp_path):
    assert docs.write(tmp_path / "one").read_bytes() == docs.write(tmp_path / "two").read_bytes()


def test_every_method_and_every_option_is_on_the_page():
    text = docs.catalogue_page()
    for found in veneer.methods():
        assert f"\n### {found.key}\n" in text
        assert f"[{found.key}](#{found.key})" in text
        part = text.split(f"\n### {found.key}\n")[1].split("\n### ")[0]
        for option in found.hyperparameters:
            assert f"| `{option.name}` |" in part
        assert found.paper in part


def test_every_row_of_a_table_has_the_cells_of_its_head():
    head = 0
    for line in docs.catalogue_page().split("\n"):
        cells = line.replace(r"\|", "").count("|") if line.startswith("|") else 0
        if cells and head:
            assert cells == head, line
        head = cells


def test_code_in_a_docstring_keeps_its_underscores():
    assert docs._prose("a_b `c_d` <e>\n    f_g * h") == [r"a\_b `c_d` &lt;e>", "    f_g * h"]


def test_every_method_is_in_the_table_of_capabilities():
    text = COMMITTED.with_name("capabilities.md").read_text(encoding="utf-8")
    for found in veneer.methods():
        assert f"\n| {found.key} |" in text
    assert "**fails**" not in text, "make capabilities runs the laws anew"


def test_the_demo_compares_ten_methods_of_every_family():
    from veneer.cli.demo import ARMS

    families = {m.key: m.family.split("/")[0] for m in veneer.methods()}
    assert len(ARMS) >= 10
    assert {families[arm] for arm in ARMS} >= {"additive", "hybrid", "reparameterized", "selective", "side"}


@pytest.mark.slow
def test_runs_made_ahead_are_the_runs_that_compare_would_make(tmp_path, monkeypatch, capsys):
    """In worker processes, out of order: the ledger holds the same figures as one after the other."""
    import json

    import training_tiny as tiny
    from veneer.cli import demo
    from veneer.comparing import compare

    folder = tiny.saved_bert(tmp_path / "bert")
    data = tiny.opened(24, 16, 16)
    data.labels = ["bad", "good"]
    monkeypatch.setattr(demo, "OPTIONS", {"batch_size": 4, "device": "cpu"})
    given = {"model": folder, "data": data, "arms": ("lora:rank=2",), "seeds": 2, "workers": 2}
    demo.main(tmp_path / "ahead", **given)
    shown = capsys.readouterr()
    assert "lora:rank=2" in shown.out
    assert "no claims" in shown.out
    plain = compare(
        folder, data, "lora:rank=2", output=tmp_path / "plain", budget="demo", seeds=2, correction="fdr_bh",
        progress=None, **demo.OPTIONS,
    )  # fmt: skip

    def runs(found):
        lines = [json.loads(line) for line in (found.folder / "ledger.jsonl").read_text().splitlines()]
        return {(x["stage"], x["arm"], x["seed"], x["learning_rate"]): (x["validation"], x.get("sealed_sha256"))
                for x in lines if x["kind"] == "run"}  # fmt: skip

    assert len(runs(plain)) == 1 + 3 * (3 + 2) + 2  # a random direction takes its anchor's rate
    again = demo.run(tmp_path / "ahead", **given)  # all of it is there
    assert runs(again) == runs(plain)
    assert (again.best_folder / "veneer.json").is_file() == ("in a process of its own" in shown.out)
