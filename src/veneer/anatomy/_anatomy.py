"""Anatomy: what was read from one model, and the questions one can ask of it.

It holds names, shapes and facts, never the model, so that it can be kept beside a model without keeping it
alive.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from veneer.anatomy._axes import tokens_first
from veneer.anatomy._by_name import read_names
from veneer.anatomy._by_trace import read_trace
from veneer.anatomy._facts import bias_names, build_facts, known_weights, parameter_sites
from veneer.anatomy._findings import Findings
from veneer.anatomy._probe import causal_by_trial, run_probe
from veneer.anatomy._quantised import dense_stand_ins
from veneer.anatomy._select import Selector, select
from veneer.anatomy._sites import Places, build_sites, weight_site
from veneer.anatomy._structure import inside, join
from veneer.anatomy._types import BaseFacts, Site
from veneer.errors import BadOption


class Anatomy:
    """The sites of a base, its roles, and facts about the whole. `read` makes it."""

    def __init__(self, model: nn.Module, found: Findings) -> None:
        known = known_weights(model, found)
        places = Places(found.stacks)
        self.model_class = type(model).__name__
        self.module_names: list[str] = [name for name, _ in model.named_modules() if name]
        self.sites: list[Site] = build_sites(model, known, found)
        self.facts: BaseFacts = build_facts(model, known, found)
        self.tokens_first: frozenset[str] = found.tokens_first  # modules that are given (tokens, rows, width)
        self.notes: list[str] = list(found.notes)
        self.stacks: dict[str, tuple[str, ...]] = {s.name: tuple(s.blocks) for s in found.stacks}
        self._order = {name: i for i, name in enumerate(self.module_names)}
        self._widths = dict(found.widths)
        self._places = places
        self._parameters = parameter_sites(model, known, found)
        biases = bias_names(model, known)
        self._biases = [dataclasses.replace(s, role="bias") for s in self._parameters if s.name in biases]
        split = {(s.module, s.parameter): s for s in self.sites if s.ranges}
        whole = {(s.module, s.parameter): s for s in self.sites if s.parameter and not s.ranges}
        for key, part in split.items():
            whole[key] = dataclasses.replace(
                weight_site(known[key], places), **{f: getattr(part, f) for f in ("causal", "cross")}
            )
        self._whole = sorted(whole.values(), key=lambda s: self.order_of(s.module))

    @property
    def blocks(self) -> tuple[str, ...]:
        """Names of all blocks, stack by stack."""
        return tuple(name for blocks in self.stacks.values() for name in blocks)

    @property
    def roles(self) -> dict[str, list[str]]:
        """Role -> names of the modules that have it, in the order of the model."""
        found: dict[str, list[str]] = {}
        for site in [*self.sites, *self._biases, *self._parameters]:
            if site.role:
                modules = found.setdefault(site.role, [])
                if not modules or modules[-1] != site.module:
                    modules.append(site.module)
        return found

    def select(
        self,
        selector: Selector,
        *,
        port: str = "weight",
        exclude: Selector | None = None,
        layers: int | str | Iterable[int] | None = None,
        allow_partial: bool = False,
    ) -> list[Site]:
        """The sites that a selector names, for one port (`NoSiteFound` where it, or a part of it, names
        none).

        `exclude` takes any selector; `layers` keeps only these block numbers (HF's `layers_to_transform`);
        with `allow_partial` the members of a list that match nothing are passed over.
        """
        return select(self, selector, port=port, exclude=exclude, layers=layers, allow_partial=allow_partial)

    def parameter_sites(self) -> list[Site]:
        """Every parameter of the base once (the first name of a tied tensor), named by its own dotted
        name."""
        return list(self._parameters)

    def bias_sites(self) -> list[Site]:
        """Every bias parameter."""
        return list(self._biases)

    def whole_sites(self) -> list[Site]:
        """Every weight as one site: fused projections are not split."""
        return list(self._whole)

    def linear_sites(self) -> list[Site]:
        """Every linear layer (transformers' Conv1D included) but those of the head, whole."""
        heads = {s.module for s in self.sites if s.role == "head"}
        return [s for s in self._whole if s.kind in ("linear", "conv1d") and s.module not in heads]

    def module_site(self, name: str) -> Site:
        """A module that has no site of its own, as a place for edits of its input or output."""
        width = self._widths.get(name, 0)
        fields = self._places.fields(name)
        return Site(name, "", name, "other", "", n_in=width, n_out=width, width=width, **fields)

    def by_block(self, stack: str, role: str) -> list[Site]:
        """The weights with a role in the blocks of a stack, in order; [] where a block has none, or several."""
        found = [s for s in self.sites if s.role == role and s.stack == stack and len(s.shape) == 2]
        depth = len(self.stacks.get(stack, ()))
        return found if [s.block for s in found] == list(range(depth)) else []

    def order_of(self, module: str) -> int:
        """Place of a module in the order of `named_modules`."""
        return self._order.get(module, -1)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            "model": self.model_class,
            "roles": self.roles,
            "blocks": {stack: list(blocks) for stack, blocks in self.stacks.items()},
            "facts": dataclasses.asdict(self.facts),
            "tokens_first": sorted(self.tokens_first),
            "sites": [dataclasses.asdict(site) for site in self.sites],
            "notes": self.notes,
        }

    def __repr__(self) -> str:
        return f"Anatomy({self.model_class}: {len(self.blocks)} blocks, {len(self.sites)} sites)"

    def __str__(self) -> str:
        """A table: role, count, an example module, its shape."""
        first: dict[str, Site] = {}
        counts: Counter[str] = Counter()
        for site in [*self.sites, *self._biases, *self._parameters]:
            if site.role:
                counts[site.role] += 1
                first.setdefault(site.role, site)
        rows = [("role", "sites", "for example", "shape")]
        for role, site in first.items():
            where = site.module if site.parameter in ("", "weight") else join(site.module, site.parameter)
            shape = " x ".join(map(str, site.shape or (site.width,)))
            rows.append(
                (
                    role,
                    str(counts[role]),
                    where or "(the model)",
                    f"{site.experts} x ({shape})" if site.experts else shape,
                )
            )
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows
        ]
        title = (
            ", ".join(f"{len(b)} blocks" + (f" in {s}" if s else "") for s, b in self.stacks.items())
            or "no blocks"
        )
        return "\n".join([f"{self.model_class}: {title}", *lines, *(f"note: {note}" for note in self.notes)])


def read(model: nn.Module, *, probe: Mapping[str, Any] | torch.Tensor | None = None) -> Anatomy:
    """The anatomy of `model`, which is left exactly as it was.

    Roles come from a traced forward of a tiny input. `probe` gives that input (a dict of arguments, or one
    tensor) where it cannot be made from the model's config and layers; where no forward runs, names
    decide, and `notes` say so.
    """
    if not isinstance(model, nn.Module):
        raise BadOption(
            f"{type(model).__name__} is no torch.nn.Module.", next_step="veneer.anatomy(model) with a module"
        )
    with dense_stand_ins(model):
        return Anatomy(model, _find(model, probe))


def _find(model: nn.Module, probe: Mapping[str, Any] | torch.Tensor | None) -> Findings:
    known = known_weights(model)
    tape, arguments, notes = run_probe(model, probe)
    found = None
    if tape is not None:
        try:
            found = read_trace(model, tape, known)
        except Exception as problem:  # a forward stranger than any that was tried must not stop the user
            notes = [
                f"the traced forward could not be read ({type(problem).__name__}: {problem}): names decide"
            ]
    if found is None or tape is None:
        found = read_names(model, known)
        found.notes = notes + found.notes
        return found
    if not found.cores and causal_by_trial(model, arguments):
        found.causal = True
        for stack in found.stacks:
            stack.causal = True
    found.tokens_first = tokens_first(model, tape, arguments)
    reached = {call.module for call in tape.calls}
    towers: list[str] = []
    for name, module in model.named_modules():
        # A vision tower is not reached by text alone: it is a model of its own, with its own inputs.
        alone = hasattr(module, "main_input_name") and not any(inside(name, t) for t in towers)
        if not name or not alone or any(inside(r, name) for r in reached if r):
            continue
        if any(isinstance(m, nn.ModuleList) for m in module.modules()):
            towers.append(name)
            found.absorb(_find(module, None), name)
    return found
