"""`make capabilities`: docs/capabilities.md, from laws that are run now, each as `test_laws.py` runs it."""

import sys
from pathlib import Path

import test_laws
from veneer import testing

MEANING = """\
Which laws each method was seen to hold when this page was written: `yes` where the law ran and held, `no` where
the method does not claim it (its reason is below), a dash where the law does not apply or the engine refuses the
case in words. Each law ran on one base, the first of the tiny BERT, Llama, T5, ViT, MLP and conv net that it and
the method speak of; `compile` is one full graph with the eager backend. The slow tests run all bases. `equation`
speaks of methods that one layer shows; the references of the others are met as functions in the tests."""
PAGE = Path(__file__).parent.parent / "docs" / "capabilities.md"


def report(key):
    """One method's laws, each on the first base on which the method has a site and of which the law speaks."""
    rows = []
    for law in testing.LAWS:
        print(f"{key} {law}", file=sys.stderr)
        rows += test_laws.check(key, law, [test_laws.base_for(key, law)]).rows
    return testing.LawReport(key, rows)


def page(reports):
    found = testing.capabilities(reports)
    laws = sorted(testing.LAWS.values(), key=lambda each: each.number)
    return "\n".join([
        "<!-- Written by `make capabilities`, which runs the laws. Change a method, not this page. -->",
        "# Capabilities", "",
        MEANING,
        "",
        *(f"- {each.number} `{each.name}`: {each.meaning}" for each in laws), "", found.markdown().rstrip(), "",
    ])  # fmt: skip


if __name__ == "__main__":
    keys = sys.argv[1:] or test_laws.METHODS
    PAGE.write_text(page([report(key) for key in keys]), encoding="utf-8")
