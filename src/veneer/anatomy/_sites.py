"""From findings to sites: names, shapes, block numbers, written down once and for both readers."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import nn

from veneer.anatomy._findings import Core, Findings, Part, Stack, SubLayer
from veneer.anatomy._structure import Weight, inside, join
from veneer.anatomy._types import Site

_SUBLAYER_KIND = {
    "attention": "attention",
    "cross_attention": "attention",
    "mlp": "mlp",
    "mixer": "other",
    "convolution": "other",
}


class Places:
    """Where a module lies: its stack, its block and the block's number."""

    def __init__(self, stacks: list[Stack]) -> None:
        self._of = {block: (stack, i) for stack in stacks for i, block in enumerate(stack.blocks)}
        self._stacks = stacks

    def of(self, module: str) -> tuple[Stack | None, int | None]:
        name = module
        while name:
            if name in self._of:
                return self._of[name]
            name = name.rpartition(".")[0]
        return None, None

    def fields(self, module: str) -> dict:
        stack, index = self.of(module)
        if stack is None:
            return {}
        return {"stack": stack.name, "block": index, "blocks": len(stack.blocks), "causal": stack.causal}

    def prefix(self, module: str) -> str:
        stack, index = self.of(module)
        return "" if stack is None else join(stack.name, f"block.{index}")


def build_sites(model: nn.Module, known: dict[tuple[str, str], Weight], found: Findings) -> list[Site]:
    """All role sites: weights first in the order of the modules, then sub-layers and blocks."""
    places = Places(found.stacks)
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    sites = _weight_sites(known, found, places)
    sites += _sublayer_sites(model, known, found, places)
    sites.sort(key=lambda s: order.get(s.module, 0))
    return _unique(sites)


def _size(weight: Weight, ranges: Iterable[tuple[int, int]]) -> int:
    return sum(b - a for a, b in ranges) or weight.n_out


def weight_site(
    weight: Weight,
    places: Places,
    role: str = "",
    name: str = "",
    part: Part | None = None,
    core: Core | None = None,
) -> Site:
    """One weight, or the rows of it that `part` names, as a site."""
    ranges = part.ranges if part else ()
    n_out = _size(weight, ranges) if ranges else weight.n_out
    shape = (n_out, *weight.shape[1:]) if ranges else weight.shape
    fields = places.fields(weight.module)
    if core:
        fields |= {"heads": core.heads, "kv_heads": core.kv_heads, "head_dim": core.head_dim,
            "cross": core.cross,
                   "options": (("core", core.module),)}  # fmt: skip
    return Site(
        name=name or join(weight.module,
            "" if weight.parameter == "weight" else weight.parameter) or "weight",
        role=role, module=weight.module, kind=weight.kind, parameter=weight.parameter, bias=weight.bias,
            shape=shape,
        ranges=ranges, transposed=weight.transposed, experts=weight.experts, groups=weight.groups,
        n_in=weight.n_in, n_out=n_out, width=n_out, **fields,
    )  # fmt: skip


def _weight_sites(known: dict[tuple[str, str], Weight], found: Findings, places: Places) -> list[Site]:
    parts: dict[tuple[str, str], list[Part]] = {}
    for part in found.parts:
        parts.setdefault(part.key, []).append(part)
    cores = {(core.module, core.cross): core for core in found.cores}
    tokens = {s.token_embedding for s in found.stacks if s.token_embedding}
    loose = found.loose_embedding
    # A plain net of linear layers has no base below its head: all of it is "linear".
    only_linear = all(w.kind in ("linear", "norm") for w in known.values()) and not found.stacks
    numbers = _Numbers()
    for key, weight in known.items():
        for part in parts.get(key, []):
            numbers.count(places.prefix(weight.module), part.label or part.role)
        if weight.kind == "norm" and key not in parts:
            numbers.count(places.prefix(weight.module), "norm")
    sites = []
    for key, weight in known.items():
        prefix = places.prefix(weight.module)
        for part in parts.get(key, []):
            core = cores.get((part.core, part.role.startswith("cross_"))) if part.core else None
            name = numbers.name(prefix, part.label or part.role) if prefix else ""
            if not prefix and part.ranges:
                name = join(
                    join(weight.module, "" if weight.parameter == "weight" else weight.parameter),
                    part.role.rpartition(".")[2],
                )
            sites.append(weight_site(weight, places, part.role, name, part, core))
        if key in parts:
            continue
        role, name = "", ""
        if weight.kind == "norm":
            role, name = "norm", numbers.name(prefix, "norm") if prefix else ""
        elif loose and weight.module == loose:
            role, name = "token_embedding", "token_embedding"
        elif weight.module in tokens:
            stack = next(s for s in found.stacks if s.token_embedding == weight.module)
            shared = sum(s.token_embedding == weight.module for s in found.stacks) > 1
            role, name = (
                "token_embedding",
                "token_embedding" if shared else join(stack.name, "token_embedding"),
            )
        elif found.head and inside(weight.module, found.head) and not only_linear:
            role, name = "head", "head" if weight.module == found.head else ""
        elif found.pooler and inside(weight.module, found.pooler):
            role = "pooler"
        elif weight.kind in ("linear", "conv1d"):
            role, name = "linear", numbers.again(prefix, "linear") if prefix else ""
        elif weight.kind == "conv":
            role, name = "convolution", numbers.again(prefix, "convolution") if prefix else ""
        elif weight.kind == "recurrent":
            role = "recurrent"
        sites.append(weight_site(weight, places, role, name))
    return sites


class _Numbers:
    """Names within a block: "block.0.attention.query", numbered only where a role occurs more than once."""

    def __init__(self) -> None:
        self._total: Counter[tuple[str, str]] = Counter()
        self._next: Counter[tuple[str, str]] = Counter()

    def count(self, prefix: str, role: str) -> None:
        self._total[prefix, role] += 1

    def name(self, prefix: str, role: str) -> str:
        if self._total[prefix, role] < 2:
            return f"{prefix}.{role}"
        number = self._next[prefix, role]
        self._next[prefix, role] += 1
        return f"{prefix}.{role}.{number}"

    def again(self, prefix: str, role: str) -> str:
        self._total[prefix, role] = 2
        return self.name(prefix, role)


def _sublayer_sites(model: nn.Module, known: dict, found: Findings, places: Places) -> list[Site]:
    cores = {(core.module, core.cross): core for core in found.cores}
    totals = Counter((sub.block, sub.role) for sub in found.sublayers)
    seen: Counter[tuple[str, str]] = Counter()
    sites = []
    for sub in found.sublayers:
        label = sub.role
        if totals[sub.block, sub.role] > 1:
            label = f"{sub.role}.{seen[sub.block, sub.role]}"
            seen[sub.block, sub.role] += 1
        sites.append(
            _sublayer(sub, label, cores.get((sub.core, sub.role == "cross_attention")), known, found, places)
        )
    inside_blocks = {sub.core for sub in found.sublayers}
    for core in found.cores:  # attention outside of any block, or in a block without a residual: still a port
        if core.module not in inside_blocks:
            sub = SubLayer(
                "cross_attention" if core.cross else "attention", core.block, core.module, core=core.module
            )
            prefix = places.prefix(core.module)
            site = _sublayer(sub, sub.role, core, known, found, places)
            sites.append(site if prefix else dataclasses.replace(site, name=f"{core.module}.{sub.role}"))
    for stack in found.stacks:
        for i, block in enumerate(stack.blocks if stack.callable else ()):
            width = block_width(block, known, found) or stack.width
            sites.append(_plain_site(join(stack.name, f"block.{i}"), "block", block, "block", width, places))
    return sites + _end_sites(model, known, found, places)


def _sublayer(
    sub: SubLayer, label: str, core: Core | None, known: dict, found: Findings, places: Places
) -> Site:
    width = _output_width(sub, known, found)
    fields = places.fields(sub.block or sub.module)
    options: tuple[tuple[str, object], ...] = ()
    if core:
        fields |= {
            "heads": core.heads,
            "kv_heads": core.kv_heads,
            "head_dim": core.head_dim,
            "cross": core.cross,
            "causal": core.causal,
        }
        options = (("core", core.module),)
    prefix = places.prefix(sub.block or sub.module)
    source = "" if sub.source == sub.module else sub.source
    return Site(
        name=join(prefix, label), role=sub.role, module=sub.module, kind=_SUBLAYER_KIND.get(sub.role,
            "other"), parameter="",
        n_in=width, n_out=width, width=width, source=source, norm=sub.norm, options=options, **fields,
    )  # fmt: skip


def _output_width(sub: SubLayer, known: dict, found: Findings) -> int:
    last = {"attention": "attention.output", "cross_attention": "cross_attention.output"}
    roles = (last.get(sub.role, "mlp.down"), "expert.down", "mixer")
    mine = [p for p in found.parts if p.block == sub.block and p.role in roles and p.key in known]
    below = (
        [p for p in mine if inside(p.key[0], sub.module)] or [p for p in mine if p.role == roles[0]] or mine
    )
    if below:
        return known[below[-1].key].n_out
    matrices = [w.n_out for w in known.values() if inside(w.module, sub.module) and len(w.shape) >= 2]
    return matrices[-1] if matrices else 0


def block_width(block: str, known: dict, found: Findings) -> int:
    """Width of a block's output, from the last sub-layer of the block."""
    widths = [_output_width(sub, known, found) for sub in found.sublayers if sub.block == block]
    if widths:
        return widths[-1]
    matrices = [w.n_out for w in known.values() if inside(w.module, block) and len(w.shape) >= 2]
    return matrices[-1] if matrices else 0


def _plain_site(
    name: str, role: str, module: str, kind: str, width: int, places: Places, **fields: Any
) -> Site:
    fields = places.fields(module) | fields
    return Site(
        name=name,
        role=role,
        module=module,
        kind=kind,
        parameter="",
        n_in=width,
        n_out=width,
        width=width,
        **fields,
    )


def _end_sites(model: nn.Module, known: dict, found: Findings, places: Places) -> list[Site]:
    """The embedding and final state of each stack, the head and the pooler as wholes."""
    sites: list[Site] = []
    done: set[tuple[str, str]] = set()
    by_module = {w.module: w for w in known.values()}

    def add(name: str, role: str, module: str, width: int, stack: Stack | None = None) -> None:
        if not module or (role, module) in done:
            return
        done.add((role, module))
        weight = by_module.get(module)
        kind = weight.kind if weight and weight.kind in ("embedding", "norm", "linear") else "other"
        fields = {"stack": stack.name, "causal": stack.causal} if stack else {}
        sites.append(_plain_site(name, role, module, kind, width, places, **fields))

    add(
        "embedding",
        "embedding",
        found.loose_embedding,
        by_module[found.loose_embedding].n_out if found.loose_embedding else 0,
    )
    for stack in found.stacks:
        first, last = (block_width(stack.blocks[i], known, found) or stack.width for i in (0, -1))
        add(join(stack.name, "embedding"), "embedding", stack.embedding, stack.width or first, stack)
        add(join(stack.name, "final"), "final", stack.final, last, stack)
    for role, module in (("head", found.head), ("pooler", found.pooler)):
        if module and module not in by_module:
            matrices = [w for w in known.values() if inside(w.module, module) and len(w.shape) == 2]
            add(role, role, module, matrices[-1].n_out if matrices else 0)
            if matrices and sites and sites[-1].module == module:  # it reads what its first matrix reads
                sites[-1] = dataclasses.replace(sites[-1], n_in=matrices[0].n_in)
    return sites


def _unique(sites: list[Site]) -> list[Site]:
    seen: Counter[str] = Counter()
    out = []
    for site in sites:
        seen[site.name] += 1
        if seen[site.name] > 1:
            site = dataclasses.replace(site, name=f"{site.name}.{seen[site.name] - 1}")
        out.append(site)
    return out
