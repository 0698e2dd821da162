"""`make docs`: the page of the catalogue, written from what the code declares.

The same code gives the same pages, byte for byte; a test holds the committed catalogue to that.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from veneer.catalogue import MethodInfo

WRITTEN = "<!-- Written by `make docs`. Change the method's file, not this page. -->"


def catalogue_page() -> str:
    """docs/catalogue.md: a table of all methods, then a page for each."""
    from veneer import catalogue

    found = catalogue.methods()
    families: dict[str, list[MethodInfo]] = {}
    for each in found:
        families.setdefault(each.family.split("/")[0], []).append(each)
    lines = [
        WRITTEN,
        "# The catalogue",
        "",
        f"{len(found)} methods in {len(families)} families. `veneer methods NAME` shows the same page in a terminal; "
        "[capabilities](capabilities.md) says which laws each of them holds.",
        "",
        "| method | what it is | ports | merges | HF PEFT |",
        "|---|---|---|---|---|",
    ]
    for each in found:
        lines.append(
            f"| [{each.key}](#{each.key}) | {_cell(each.sentence)} | {', '.join(each.ports) or 'none'} | "
            f"{'yes' if each.mergeable else 'no'} | {each.parity or ''} |"
        )
    for family, members in families.items():
        lines += ["", f"## {family[:1].upper()}{family[1:]}"]
        for each in members:
            lines += ["", *_method(each)]
    return "\n".join(lines) + "\n"


def _method(found: MethodInfo) -> list[str]:
    """One method: its docstring with the equation as it is set there, its options, its facts."""
    from veneer.cli.methods import facts_of, shown, words

    lines = [f"### {found.key}", "", *_prose(found.doc), ""]
    if found.hyperparameters:
        lines += ["| option | default | what it does | accepts | also called |", "|---|---|---|---|---|"]
    for option in found.hyperparameters:
        alias = ", ".join(f"`{name}`" for name in option.alias)
        lines.append(
            f"| `{option.name}` | `{_cell(shown(option.default))}` | {_cell(option.meaning)} | "
            f"{_cell(words(option.bounds))} | {alias} |"
        )
    lines += ["", *(f"- {name}: {value}" for name, value in facts_of(found) if name != "size")]
    return lines


def _prose(doc: str) -> list[str]:
    """A docstring as Markdown: indented lines and what stands in backticks are code there as well."""
    lines = []
    for line in doc.split("\n"):
        parts = line.split("`")
        plain = [
            part if at % 2 else part.replace("*", r"\*").replace("<", "&lt;").replace("_", r"\_")
            for at, part in enumerate(parts)
        ]
        lines.append(line if line.startswith("    ") else "`".join(plain))
    return lines


def _cell(text: str) -> str:
    return text.replace("|", r"\|").replace("\n", " ")


def write(folder: Path) -> Path:
    """Write the catalogue into `folder`; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / "catalogue.md"
    page.write_text(catalogue_page(), encoding="utf-8")
    return page


def main() -> None:
    """`python -m veneer.cli.docs [FOLDER]`."""
    print(write(Path(sys.argv[1] if len(sys.argv) > 1 else "docs")))


if __name__ == "__main__":
    main()
