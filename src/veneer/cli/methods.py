"""`veneer methods`: the catalogue, and the page of one method."""

from __future__ import annotations

import contextlib
import re
import textwrap
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from veneer.cli._common import AsJson, Debug, Quiet, result
from veneer.cli._table import facts, table, terminal_width
from veneer.errors import BadOption, UnknownName, VeneerError, nearest

if TYPE_CHECKING:
    from veneer.catalogue import MethodInfo

EXAMPLES = ("veneer methods loreft", "veneer methods --family additive --below 0.1% --json")


def methods(
    name: Annotated[str | None, typer.Argument(help="one method; default: all of them")] = None,
    family: Annotated[
        str | None, typer.Option(help="a family, or the beginning of one: additive, additive/prompt")
    ] = None,
    mergeable: Annotated[
        bool, typer.Option("--mergeable", help="only those that can become part of the base")
    ] = False,
    below: Annotated[
        str | None, typer.Option(help="at most this share of a BERT of base size is trained: 0.1%")
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """The catalogue; with NAME one method's equation, paper, options and capabilities."""
    from veneer import catalogue

    if name is not None:
        found = catalogue.info(name)
        result(found, page(found))
        return
    rows = catalogue.methods(family=family, mergeable=True if mergeable else None)
    if family is not None and not rows and not mergeable:
        families = {m.family for m in catalogue.methods()}
        families |= {f.split("/")[0] for f in families}
        raise UnknownName(
            f"no family is called '{family}'.", nearest=nearest(family, sorted(families)) or sorted(families),
            next_step="veneer methods    shows each method's family",
        )  # fmt: skip
    trained: dict[str, float] = {}
    if below is not None:
        most = share(below)
        trained = shares([m.key for m in rows])
        rows = [m for m in rows if trained.get(m.key, 1.0) <= most]
    plain = [m.to_dict() | ({"share": trained[m.key]} if below is not None else {}) for m in rows]
    result(plain, listing(plain))


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
    return (
        table(head, cells, drop=drop, right=("trained",))
        + f"\n\n{len(rows)} methods; veneer methods NAME shows one"
    )


def page(found: MethodInfo) -> str:
    """One method for a terminal: what its page in a paper would say, its options, what it can."""
    lines = [*reflowed(found.doc), "", "options:"]
    for option in found.hyperparameters:
        limits = f" ({words(option.bounds)})" if option.bounds else ""
        alias = f"; also {', '.join(option.alias)}" if option.alias else ""
        lines.append(_hanging(f"{option.name} = {shown(option.default)}", f"{option.meaning}{limits}{alias}"))
    return "\n".join([*lines, "", facts(facts_of(found)), "", f"try: veneer plan builtin:minilm {found.key}"])


def reflowed(doc: str) -> list[str]:
    """The paragraphs of a docstring as wide as the terminal; equations and tables, which are indented, as they are."""
    lines: list[str] = []
    for paragraph in doc.split("\n\n"):
        is_prose = not any(line.startswith(" ") for line in paragraph.split("\n"))
        text = textwrap.wrap(" ".join(paragraph.split()), terminal_width(), break_on_hyphens=False)
        lines += [*(text if is_prose else paragraph.split("\n")), ""]
    return lines[:-1]


def facts_of(found: MethodInfo) -> list[tuple[str, str]]:
    """What is true of a method, as (name, words); the pages of the docs have the same."""
    shared = f" and {found.shared_lines} that no other method uses" if found.shared_lines else ""
    start = "the base, unchanged" if found.starts_as_identity else "another model than the base"
    return [
        ("paper", found.paper),
        ("family", found.family),
        ("ports", ", ".join(found.ports) or "none: it trains parameters of the base"),
        ("starts as", start + (f": {found.reason}" if found.reason and not found.starts_as_identity else "")),
        ("merges", "yes" if found.mergeable else "no"),
        ("rates", "{:g} to {:g} are searched".format(*found.rates)),
        ("HF PEFT", found.parity or "has no such method"),
        ("witness", found.witness),
        ("size", f"{found.lines} lines" + shared),
        *(("not claimed", f"law {law}: {why}") for law, why in found.not_claimed),
    ]  # fmt: skip


def words(bounds: dict[str, Any]) -> str:
    """{"at_least": 1} -> "at least 1"."""
    found = [f"{name.replace('_', ' ')} {bounds[name]:g}" for name in bounds if name != "choices"]
    if bounds.get("choices"):
        found.append("one of " + ", ".join(map(str, bounds["choices"])))
    return ", ".join(found)


def shown(value: Any) -> str:
    if isinstance(value, str):
        return value or '""'
    return f"{value:g}" if isinstance(value, float) else repr(value)


def shares(keys: Iterable[str]) -> dict[str, float]:
    """The share of parameters that each method trains on a BERT of base size, by its own defaults.

    Methods that do not fit a text encoder are left out.
    """
    import torch
    import transformers

    from veneer import engine

    with torch.device("meta"):
        shell = transformers.BertModel(transformers.BertConfig())
    model = shell.to_empty(device="cpu")  # no values are needed, so that none are drawn
    total = sum(p.numel() for p in model.parameters())
    found = {}
    for key in keys:
        with contextlib.suppress(VeneerError):
            found[key] = engine.plan(model, key).trainable_parameters / total
    return found


def _hanging(name: str, text: str) -> str:
    return "\n".join(textwrap.wrap(f"  {name}    {text}", terminal_width(), subsequent_indent="      "))
