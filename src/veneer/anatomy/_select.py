"""Selectors: how a person names sites.

    "attention.query"   "attention.{query,value}"   "block[-4:].mlp.down"
    "encoder.block[0,2].attention.query"
    "model.layers.*.self_attn.q_proj"   ["q_proj", "v_proj"]   r".*\\.(q|v)_proj"   "all-linear"   "bias"
    "all"

One string is tried in this order: the name of a site, a role (with braces, a slice of blocks, a stack), a
glob on module names, a regular expression on whole module names, the end of module names. A list is the
union of its members. What matches nothing is an error that names it, never an empty list.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import itertools
import re
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING

from veneer.anatomy._misses import BLOCK, NEXT, Selector, describe, nothing, show
from veneer.anatomy._structure import inside
from veneer.anatomy._types import Site
from veneer.errors import BadOption, NoSiteFound, nearest

if TYPE_CHECKING:
    from veneer.anatomy._anatomy import Anatomy

PORTS = ("weight", "input", "output", "attention", "tokens", "exit", "around")
ROLES = (
    *(f"{a}.{b}" for a in ("attention", "cross_attention") for b in ("query", "key", "value", "output")),
    *(f"{a}.{b}" for a in ("mlp", "expert") for b in ("up", "gate", "down")),
    "attention", "cross_attention", "mlp", "router", "norm", "embedding", "token_embedding", "block",
    "convolution",
    "mixer", "recurrent", "head", "pooler", "final", "linear", "bias", "parameter",
)  # fmt: skip
_WHOLE = {"bias", "parameter"}  # roles of parameters, not of places in the forward


class _BadIndex(Exception):
    """A block number beyond the last block, or a slice that cannot be read."""


def select(
    anatomy: Anatomy,
    selector: Selector,
    *,
    port: str = "weight",
    exclude: Selector | None = None,
    layers: int | str | Iterable[int] | None = None,
    allow_partial: bool = False,
) -> list[Site]:
    """The sites that `selector` names, for one port, each once, in the order of the model."""
    if port not in PORTS:
        raise BadOption(
            f"port={port!r} is no port of a site.",
            nearest=nearest(str(port), PORTS),
            next_step="one of " + ", ".join(PORTS),
        )
    picked, missing, wrong_port = _match_all(anatomy, _as_list(selector), port)
    if not picked or (missing and not allow_partial):
        raise nothing(anatomy, selector, missing, wrong_port, port)
    if layers is not None:
        wanted = _layers(anatomy, layers)
        kept = [site for site in picked if site.block is not None and site.block in wanted]
        if not kept:
            raise NoSiteFound(
                f"sites={show(selector)} has no site in layers={layers!r} of {describe(anatomy)}.",
                next_step=NEXT,
            )
        picked = kept
    if exclude is not None:
        picked = _without(anatomy, picked, selector, exclude, port)
    return [site.at(port) for site in _once(picked, anatomy)]


def _as_list(selector: Selector) -> list[str | Site]:
    if isinstance(selector, str | Site):
        return [selector]
    if not isinstance(selector, Iterable):
        raise BadOption(
            f"sites={selector!r} is no selector; a string or a list of strings was expected.",
            next_step='sites="attention.{query,value}"',
        )
    members = list(selector)
    for member in members:
        if not isinstance(member, str | Site):
            raise BadOption(
                f"sites: {member!r} is {type(member).__name__}; strings were expected.",
                next_step='sites=["q_proj", "v_proj"]',
            )
    if isinstance(selector, set | frozenset):  # HF PEFT keeps target_modules as a set: give it an order
        members.sort(key=str)
    return members


def _match_all(
    anatomy: Anatomy, members: list[str | Site], port: str
) -> tuple[list[Site], list[str], list[Site]]:
    """(sites, members that match nothing, sites that matched but have no such port)"""
    picked: list[Site] = []
    missing: list[str] = []
    wrong: list[Site] = []
    for member in members:
        if isinstance(member, Site):
            picked.append(member)
            continue
        for alternative in _braces(member.strip()):
            try:
                sites = _match(anatomy, alternative, port)
            except _BadIndex as bad:
                raise NoSiteFound(
                    f"sites={member!r}: {bad} in {describe(anatomy)}.", next_step=NEXT
                ) from None
            fitting = _fitting(anatomy, sites, port)
            picked += fitting
            if not fitting:
                missing.append(alternative)
                wrong += sites
    return picked, missing, wrong


def _braces(text: str) -> list[str]:
    """'a.{b,c}' -> ['a.b', 'a.c']; a regular expression such as 'x{2}' has no comma between names and
    stays."""
    found = re.search(r"\{([A-Za-z_][^{}]*)\}", text)
    if not found:
        return [text]
    options = [option.strip() for option in found.group(1).split(",")]
    rest = _braces(text[found.end() :])
    return [text[: found.start()] + a + b for a, b in itertools.product(options, rest)]


# ---------------------------------------------------------------- one string


def _match(anatomy: Anatomy, text: str, port: str) -> list[Site]:
    if not text:
        return []
    named = [site for site in anatomy.sites if site.name == text]
    if named and text not in ROLES:
        return named
    if text in ("all-linear", "linear"):
        return anatomy.linear_sites()
    by_role = _by_role(anatomy, text, port)
    if by_role is not None:
        return by_role
    return _by_module(anatomy, text, port)


def _by_role(anatomy: Anatomy, text: str, port: str) -> list[Site] | None:
    """Sites by [stack.][block[slice].]role; None where the string is no such expression."""
    stack, rest = None, text
    for name in sorted((s for s in anatomy.stacks if s), key=len, reverse=True):
        if text == name or text.startswith(name + "."):
            stack, rest = name, text[len(name) + 1 :]
            break
    found = BLOCK.match(rest)
    numbers = None
    if found:
        rest = found["rest"] or "block"
        if found["slice"] is not None:
            numbers = found["slice"]
        elif found["rest"] is None:
            rest = "block"
    rest = "parameter" if rest == "all" else rest
    if rest not in ROLES and rest not in anatomy.roles:
        return None
    pool = (
        anatomy.bias_sites()
        if rest == "bias"
        else anatomy.parameter_sites()
        if rest == "parameter"
        else anatomy.sites
    )
    sites = [s for s in pool if (s.role == rest or rest == "linear") and (stack is None or s.stack == stack)]
    if rest == "linear":
        sites = [s for s in anatomy.linear_sites() if stack is None or s.stack == stack]
    if (found and rest not in ("block",)) or numbers is not None:
        sites = [s for s in sites if s.block is not None]
    if numbers is not None:
        wanted = {
            name: _indices(numbers, len(blocks))
            for name, blocks in anatomy.stacks.items()
            if stack in (None, name)
        }
        sites = [s for s in sites if s.block in wanted.get(s.stack, ())]
    return sites


def _indices(text: str, count: int) -> set[int]:
    """'-4:', '0,2', '::2', '3' of `count` blocks. A single number beyond the last block is an error."""
    wanted: set[int] = set()
    for piece in text.split(","):
        bounds = piece.strip().split(":")
        try:
            numbers = [int(b) if b.strip() else None for b in bounds]
        except ValueError:
            raise _BadIndex(f"the slice [{text}] cannot be read") from None
        if len(numbers) == 1:
            if numbers[0] is None or not -count <= numbers[0] < count:
                raise _BadIndex(f"block [{piece.strip()}] is not among the {count} blocks")
            wanted.add(numbers[0] % count)
        elif len(numbers) <= 3 and not (len(numbers) == 3 and numbers[2] == 0):
            wanted |= set(range(count)[slice(*numbers)])
        else:
            raise _BadIndex(f"the slice [{text}] cannot be read")
    return wanted


def _by_module(anatomy: Anatomy, text: str, port: str) -> list[Site]:
    """Sites of modules by exact name, glob, regular expression (whole name), or the end of the name."""
    names = anatomy.module_names
    if text in names:
        return _of_modules(anatomy, [text], port)
    if any(c in text for c in "*?["):
        globbed = [name for name in names if fnmatch.fnmatchcase(name, text)]
        if globbed:
            return _of_modules(anatomy, globbed, port)
        sites = [site for site in anatomy.sites if fnmatch.fnmatchcase(site.name, text)]
        if sites:
            return sites
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pattern = re.compile(text)
        matched = [name for name in names if pattern.fullmatch(name)]
    except (re.error, RecursionError, OverflowError):
        matched = []
    matched = matched or [name for name in names if name.endswith("." + text)]
    return _of_modules(anatomy, matched, port)


def _of_modules(anatomy: Anatomy, names: list[str], port: str) -> list[Site]:
    """What an edit of these modules means at this port: their whole parameters, or their output."""
    chosen = set(names)
    if port == "weight":
        return [site for site in anatomy.whole_sites() if site.module in chosen]
    if port in ("attention", "around"):
        return [s for s in anatomy.sites if s.module in chosen or dict(s.options).get("core") in chosen]
    sites: list[Site] = []
    for name in names:
        here = [s for s in anatomy.sites if s.module == name and not s.ranges]
        sites.append(here[0] if here else anatomy.module_site(name))
    return sites


# ---------------------------------------------------------------- ports


def _fitting(anatomy: Anatomy, sites: list[Site], port: str) -> list[Site]:
    """Of `sites`, those that have this port; a whole that is one weight stands for that weight."""
    if port == "attention":
        return [s for s in sites if s.kind == "attention" and s.role in ("attention", "cross_attention")]
    if port == "around":
        return [s for s in sites if s.role == "block"]
    if port == "weight":
        holding = [s for s in sites if s.parameter]
        if holding or not sites:
            return holding
        modules = {s.module for s in sites if s.role in ("embedding", "head", "pooler", "final")}
        return [s for s in anatomy.whole_sites() if s.module in modules]
    wholes = [s for s in sites if not s.parameter]
    kept = {s.role for s in wholes}
    # A mixer or a composite head is one place for an output edit, several for weights.
    return [
        s
        for s in sites
        if s.role not in _WHOLE and (not s.parameter or s.role not in kept or s.kind == "norm")
    ]


def _layers(anatomy: Anatomy, layers: int | str | Iterable[int]) -> set[int]:
    count = max((len(blocks) for blocks in anatomy.stacks.values()), default=0)
    if isinstance(layers, bool) or not isinstance(layers, int | str | Iterable):
        raise BadOption(
            f"layers={layers!r} is no layer number, list of them, or slice.",
            next_step="layers=[0, 1]  or  layers='-4:'",
        )
    pieces = [layers] if isinstance(layers, int | str) else list(layers)
    try:
        return (
            set().union(*(_indices(str(piece).strip("[]"), count) for piece in pieces)) if pieces else set()
        )
    except _BadIndex as bad:
        raise NoSiteFound(f"layers={layers!r}: {bad} in {describe(anatomy)}.", next_step=NEXT) from None


def _without(
    anatomy: Anatomy, picked: list[Site], selector: Selector, exclude: Selector, port: str
) -> list[Site]:
    out: list[Site] = []
    for member in _as_list(exclude):
        found, _missing, wrong = _match_all(anatomy, [member], port)
        found = found or wrong
        if not found:
            raise nothing(anatomy, [member], [str(member)], [], port, "exclude")
        out += found
    exact = {(s.module, s.parameter, s.ranges) for s in out} if port == "weight" else set()
    whole = {s.module for s in out if not s.ranges and (s.role not in _WHOLE or port != "weight")}
    wholes = {s.module for s in out if not s.parameter and s.kind in ("attention", "mlp", "block", "other")}

    def excluded(site: Site) -> bool:
        below = any(inside(site.module, name) for name in wholes) if port == "weight" else False
        return (site.module, site.parameter, site.ranges) in exact or site.module in whole or below

    kept = [site for site in picked if not excluded(site)]
    if not kept:
        raise NoSiteFound(
            f"exclude={show(exclude)} leaves nothing of sites={show(selector)} in {describe(anatomy)}.",
            next_step=NEXT,
        )
    return kept


def _once(sites: list[Site], anatomy: Anatomy) -> list[Site]:
    """Each place once, in the order of the model; a part of a parameter goes where the whole was chosen
    too."""
    whole = {(s.module, s.parameter) for s in sites if not s.ranges}
    rank = {site.name: i for i, site in enumerate(anatomy.sites)}
    chosen: dict[tuple, Site] = {}
    for site in sites:
        if not site.ranges or (site.module, site.parameter) not in whole:
            kind = "" if site.parameter else site.role
            chosen.setdefault(
                (site.module, site.parameter, site.ranges, kind), dataclasses.replace(site, port="")
            )
    return sorted(chosen.values(), key=lambda s: (anatomy.order_of(s.module), rank.get(s.name, len(rank))))
