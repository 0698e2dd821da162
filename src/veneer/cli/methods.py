"""`veneer methods`: the catalogue, and the page of one method."""

from __future__ import annotations

import re
from typing import Annotated, Any

import typer

from veneer.cli._common import AsJson, Debug, Quiet, result
from veneer.cli._table import facts, table, terminal_width
from veneer.errors import BadOption, UnknownName, nearest

EXAMPLES = ("veneer methods loreft", "veneer methods --family additive --below 0.1% --json")


def methods(
    name: Annotated[str | None, typer.Argument(help="one method; default: all of them")] = None,
    family: Annotated[str | None, typer.Option(help="a family, or the beginning of one: additive, additive/prompt")] = None,
    mergeable: Annotated[bool, typer.Option("--mergeable", help="only those that can become part of the base")] = False,
    below: Annotated[str | None, typer.Option(help="at most this share of a BERT of base size is trained: 0.1%")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """The catalogue; with NAME one method's equation, paper, options and capabilities."""
    from veneer.cli._catalogue import entries, entry

    if name is not None:
        found = entry(name)
        result(found, page(found))
        return
    rows = entries()
    if family is not None:
        families = sorted({row["family"] for row in rows} | {row["family"].split("/")[0] for row in rows})
        kept = [row for row in rows if f"{row['family']}/".startswith(f"{family.strip('/')}/")]
        if not kept:
            raise UnknownName(f"no family is called '{family}'.", nearest=nearest(family, families) or families,
                              next_step="veneer methods    shows each method's family")  # fmt: skip
        rows = kept
    if mergeable:
        rows = [row for row in rows if row["mergeable"]]
    if below is not None:
        most = share(below)
        from veneer.cli._catalogue import shares

        trained = shares([row["key"] for row in rows])
        rows = [row | {"share": trained[row["key"]]} for row in rows if trained.get(row["key"], 1.0) <= most]
    result(rows, listing(rows))


def share(text: str) -> float:
    """`0.1%` -> 0.001; `0.001` -> 0.001."""
    match = re.fullmatch(r"\s*([0-9.eE+-]+)\s*(%?)\s*", text)
    try:
        number = float(match.group(1)) if match else -1.0
    except ValueError:
        number = -1.0
    number /= 100 if match and match.group(2) else 1
    if not 0 < number <= 1:
        raise BadOption(f"--below {text!r} is no share.", next_step="--below 0.1%")
    return number


def listing(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return "no method is like that"
    with_share = "share" in rows[0]
    head = ["method", "family", "ports", "merges", *(["trained"] if with_share else []), "what it is"]
    cells = [
        [row["key"], row["family"], " ".join(row["ports"]), "yes" if row["mergeable"] else "no",
         *([f"{100 * row['share']:.3g} %"] if with_share else []), row["sentence"]]
        for row in rows
    ]  # fmt: skip
    drop = ("ports", "merges", "family") if terminal_width() < 90 else ("ports",)
    return table(head, cells, drop=drop, right=("trained",)) + f"\n\n{len(rows)} methods; veneer methods NAME shows one"


def page(found: dict[str, Any]) -> str:
    """One method for a terminal: what its page in a paper would say, its options, what it can."""
    lines = [found["doc"], "", "options:"]
    for option in found["options"]:
        limits = f" ({option['limits']})" if option["limits"] else ""
        alias = f"; also {', '.join(option['alias'])}" if option["alias"] else ""
        lines.append(_hanging(f"{option['name']} = {option['default']}", f"{option['meaning']}{limits}{alias}"))
    facts_of = [
        ("paper", found["paper"]),
        ("family", found["family"]),
        ("ports", ", ".join(found["ports"])),
        ("starts as", "the base, unchanged" if found["starts_as_identity"] else f"another model than the base{': ' + found['reason'] if found['reason'] else ''}"),
        ("merges", "yes" if found["mergeable"] else "no"),
        ("rates", "{:g} to {:g} are searched".format(*found["rates"])),
        *((("needs", found["needs"]),) if found["needs"] else ()),
        *(("not claimed", f"law {law}: {why}") for law, why in found["not_claimed"]),
    ]  # fmt: skip
    return "\n".join([*lines, "", facts(facts_of), "", f"try: veneer plan builtin:minilm {found['key']}"])


def _hanging(name: str, text: str) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(f"  {name}    {text}", terminal_width(), subsequent_indent="      "))
