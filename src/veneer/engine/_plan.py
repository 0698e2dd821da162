"""Plans: which sites a method edits on a base, and which tensors that declares.

A plan is pure data, computed once for each (base, method shape), so that attaching or loading the thousandth
adapter costs what the first did.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from veneer.anatomy import Anatomy, Site
from veneer.edits import Method, Spec, TrainedCopy, call
from veneer.errors import BadOption, NoSiteFound, Unsupported, nearest


@dataclass(frozen=True)
class SitePlan:
    """One site of one part: the method with that site's own options, and the tensors that it declares there."""

    site: Site
    method: Method
    specs: dict[str, Spec]
    part: int

    def owner(self, spec: Spec) -> str:
        """Where a tensor lives: the site's name, the block's, or "shared" for the whole adapter."""
        if spec.scope == "site":
            return self.site.name
        if spec.scope == "block":
            stack = f"{self.site.stack}." if self.site.stack else ""
            return f"{stack}block.{self.site.block}"
        if spec.scope == "stack":
            return f"{self.site.stack}.shared" if self.site.stack else "shared"
        return "shared"


@dataclass(frozen=True)
class Entry:
    """One stored tensor of an adapter."""

    key: str  # owner/tensor: its name in files
    tensor: str
    shape: tuple[int, ...]
    spec: Spec
    first: int  # index of the first site plan that declares it


@dataclass
class Plan:
    """What attaching a method to a base would do. Prints as a table; `.to_dict()` for programs."""

    method: Method
    options: dict[str, Any]
    sites: list[SitePlan]
    entries: list[Entry]
    keys: list[dict[str, str]]  # for each site plan: tensor name -> entry key
    anatomy: Anatomy
    whole: tuple[str, ...] = ()
    cache: dict[Any, Any] = field(default_factory=dict, repr=False)

    def __deepcopy__(self, memo: Any) -> Plan:
        return self

    def __reduce__(self) -> Any:
        # Starts are functions, which no pickle holds; the plan is made again from what made it.
        return _remake, (self.anatomy, self.method, self.options, self.whole)

    @property
    def trainable_parameters(self) -> int:
        return sum(
            e.spec.size if e.shape == e.spec.shape else _size(e.shape) for e in self.entries if e.spec.trained
        )

    @property
    def bytes_on_disk(self) -> int:
        """Bytes of the tensors in the saved file, float32."""
        return sum(4 * _size(e.shape) for e in self.entries if is_saved(e.spec))

    def memory(self, batch_size: int = 8, length: int = 256, **options: Any) -> dict[str, int]:
        """Forecast in bytes: weights, gradients, optimiser, activations, and their total."""
        from veneer.anatomy import forecast

        base = sum(_size(s.shape) * max(1, s.experts) for s in self.anatomy.parameter_sites())
        return forecast.memory(
            self.anatomy.facts,
            base,
            self.trainable_parameters,
            batch_size=batch_size,
            length=length,
            **options,
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "method": self.method.key,
            "options": self.method.options(),
            "trainable_parameters": self.trainable_parameters,
            "bytes_on_disk": self.bytes_on_disk,
            "sites": [
                {"site": sp.site.name, "module": sp.site.module, "port": sp.site.port,
                 "tensors": {n: list(s.shape) for n, s in sp.specs.items()}}
                for sp in self.sites
            ],
        }  # fmt: skip

    def __str__(self) -> str:
        total = sum(_size(s.shape) * max(1, s.experts) for s in self.anatomy.parameter_sites())
        share = 100 * self.trainable_parameters / max(1, total)
        lines = [
            f"{self.method}: {len(self.sites)} sites, {self.trainable_parameters:,} of {total:,} parameters train "
            f"({share:.3g} %), {self.bytes_on_disk:,} bytes on disk"
        ]
        groups: dict[tuple[str, str], list[SitePlan]] = {}
        for sp in self.sites:
            groups.setdefault((sp.site.role or sp.site.kind, sp.site.port), []).append(sp)
        for (role, port), members in groups.items():
            shapes = ", ".join(f"{n} {tuple(s.shape)}" for n, s in members[0].specs.items())
            lines.append(f"  {role:24} {port:10} x {len(members):<4} {members[0].site.module:40} {shapes}")
        return "\n".join([*lines, *(f"  note: {text}" for text in self.remarks())])

    def remarks(self) -> list[str]:
        """What the method says of its start on this base, from shapes alone; each once."""
        if "remark" not in self.method.arguments:
            return []

        def have(sp: SitePlan) -> dict[str, Any]:
            def blocks(role: str) -> list[torch.Tensor]:
                found = self.anatomy.by_block(sp.site.stack, role)
                return [torch.empty(s.shape, device="meta") for s in found]

            return {"site": sp.site, "blocks": blocks}

        said = (call(sp.method, "remark", None, have(sp)) for sp in self.sites if sp.part == 0)
        return list(dict.fromkeys(text for text in said if text))


def _size(shape: Sequence[int]) -> int:
    total = 1
    for n in shape:
        total *= n
    return total


def is_saved(spec: Spec) -> bool:
    if spec.saved is not None:
        return spec.saved
    return not spec.noise and not spec.seeded


def make_plan(
    found: Anatomy,
    method: Method,
    *,
    exclude: Any = None,
    layers: Any = None,
    patterns: Mapping[str, Mapping[str, Any]] | None = None,
    whole: Sequence[str] = (),
    allow_partial: bool = False,
) -> Plan:
    """Choose sites, resolve options by site, collect the declared tensors."""
    plans: list[SitePlan] = []
    for part, m in enumerate(_parts(method)):
        own = part == 0
        sites = _sites_of(
            found, m, exclude if own else None, layers if own else None, allow_partial or not own
        )
        methods = _patterned(found, m, sites, patterns if own else None)
        plans += [SitePlan(s, methods[s.name], methods[s.name].tensors(s), part) for s in sites]
    plans = _tied(found, plans)
    plans = [_null_gradients(found, sp) for sp in plans]
    copied = (sp.site for sp in plans if sp.part > 0 and isinstance(sp.method, TrainedCopy))
    taken = {(site.module, site.parameter) for site in copied}
    copies = []
    for name in whole:
        copy = TrainedCopy(sites=name)
        sites = [s for s in _whole_sites(found, name) if (s.module, s.parameter) not in taken]
        copies += [SitePlan(s, copy, copy.tensors(s), -1) for s in sites]
    plans = _apart_from(copies, plans) + copies
    entries, keys = _entries(plans)
    options = {"exclude": exclude, "layers": layers, "patterns": dict(patterns or {})}
    return Plan(method, options, plans, entries, keys, found, tuple(whole))


def _apart_from(copies: list[SitePlan], plans: list[SitePlan]) -> list[SitePlan]:
    """Without edits of parameters that are trained whole: those would be trained twice, and the two added.

    Where nothing else is edited they are what was asked for, and stay.
    """
    own = {(sp.site.module, sp.site.parameter) for sp in copies}
    left = [sp for sp in plans if sp.site.port != "weight" or (sp.site.module, sp.site.parameter) not in own]
    return left if any(sp.part == 0 for sp in left) else plans


def _remake(found: Anatomy, method: Method, options: dict[str, Any], whole: tuple[str, ...]) -> Plan:
    return make_plan(found, method, whole=whole, **options)


def _parts(method: Method) -> list[Method]:
    return [method, *method.also()]


def _sites_of(found: Anatomy, m: Method, exclude: Any, layers: Any, partial: bool) -> list[Site]:
    chosen: list[Site] = []
    by_port = m.sites if isinstance(m.sites, Mapping) else None
    if by_port is None and len(m.ports) > 1 and m.sites:
        by_port = dict.fromkeys(m.ports, m.sites)
    if by_port is None:
        by_port = {m.ports[0]: m.sites} if m.ports and m.sites else {}
    for port, selector in by_port.items():
        if port not in m.ports:
            raise BadOption(
                f"{m.key}: sites names the port '{port}', which the method does not use.",
                nearest=m.ports,
                next_step=f"sites={{{m.ports[0]!r}: ...}}" if m.ports else "leave sites= out",
            )
        if port in ("tokens", "exit"):
            chosen += _stream_sites(found, port, selector)
            continue
        # A person's list has to match whole; a method's own default says where it would act if it could.
        loose = partial or selector == _default_sites(m, port)
        sites = found.select(selector, port=port, exclude=exclude, layers=layers, allow_partial=loose)
        kinds = m.facts.kinds
        wrong = [s for s in sites if kinds and s.kind not in kinds]
        if wrong:
            raise Unsupported(
                f"{m.key} edits sites of kind {', '.join(kinds)}; '{wrong[0].name}' is of kind '{wrong[0].kind}'.",
                next_step="veneer anatomy MODEL    shows every role and its modules",
            )
        if port == "attention":  # the module that makes q, k and v and calls the attention
            sites = [dataclasses.replace(s, module=dict(s.options).get("core", s.module)) for s in sites]
        if getattr(m, "with_bias", False):
            biases = {(s.module, s.bias) for s in sites if s.bias} - {(s.module, s.parameter) for s in sites}
            sites = [*sites, *(s for s in found.parameter_sites() if (s.module, s.parameter) in biases)]
        chosen += [s if s.port == port else s.at(port) for s in sites]
    return chosen


def _tied(found: Anatomy, plans: list[SitePlan]) -> list[SitePlan]:
    """A site is a parameter: one that two modules share is edited at both, with the same tensors."""
    groups: dict[str, set[str]] = {}  # parameter -> all parameters that are the same tensor
    for a, b in found.facts.tied:
        joined = groups.get(a, {a}) | groups.get(b, {b})
        groups.update(dict.fromkeys(joined, joined))
    if not groups:
        return plans
    owners = {(s.module, s.parameter): s for s in found.sites}
    names: dict[
        tuple[int, str], str
    ] = {}  # (part, parameter of a group) -> the name of the site that came first
    out, more = [], []
    for sp in plans:
        own = f"{sp.site.module}.{sp.site.parameter}"
        if sp.site.port != "weight" or own not in groups:
            out.append(sp)
            continue
        first = names.setdefault((sp.part, min(groups[own])), sp.site.name)
        # Another selected site of the same tensor is no second edit: it reads the tensors of the first.
        out.append(sp if first == sp.site.name else _named(sp, first))
    chosen = {(sp.part, sp.site.module, sp.site.parameter) for sp in out if sp.site.port == "weight"}
    for sp in out:
        own = f"{sp.site.module}.{sp.site.parameter}"
        for name in sorted(groups.get(own, ())) if sp.site.port == "weight" else ():
            module, _, parameter = name.rpartition(".")
            if (sp.part, module, parameter) in chosen:
                continue
            chosen.add((sp.part, module, parameter))
            there = owners.get((module, parameter))
            # An owner that no role names is a table of tokens, like the one that was chosen.
            kind, bias = (there.kind, there.bias) if there is not None else (sp.site.kind, "")
            site = dataclasses.replace(sp.site, module=module, parameter=parameter, kind=kind, bias=bias)
            more.append(dataclasses.replace(sp, site=site))
    return [*out, *more]


def _named(sp: SitePlan, name: str) -> SitePlan:
    return dataclasses.replace(sp, site=dataclasses.replace(sp.site, name=name))


def _null_gradients(found: Anatomy, sp: SitePlan) -> SitePlan:
    """Shifts of unrotated keys shift every score of a query alike, and the softmax does not see it."""
    if sp.site.port == "output":
        shifts = getattr(sp.method, "shifts", ())
    else:
        shifts = tuple(sp.specs) if len(sp.site.shape) == 1 and sp.site.parameter.endswith("bias") else ()
    if not shifts or found.facts.positions == "rotary":
        return sp
    keys = {s.module for s in found.sites if s.role.endswith("attention.key") and not s.ranges}
    if sp.site.module not in keys:
        return sp
    why = "a shift of all scores of a query leaves its softmax alone"
    moved = getattr(sp.method, "penalised", ())  # a penalty of their own still moves these
    specs = {
        n: s
        if n in moved or n not in shifts
        else dataclasses.replace(s, null_gradient=s.null_gradient or why)
        for n, s in sp.specs.items()
    }
    return dataclasses.replace(sp, specs=specs)


def _default_sites(m: Method, port: str) -> Any:
    for f in dataclasses.fields(m):  # type: ignore[arg-type]
        if f.name == "sites":
            made = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
            return made.get(port) if isinstance(made, Mapping) else made
    return None


def _stream_sites(found: Anatomy, port: str, selector: Any) -> list[Site]:
    """Sites of the whole stream: where tokens are put in, where the last hidden state comes out.

    Roles come from the facts, since one stack has exactly one of each.
    """
    where = "embedding" if port == "tokens" else "final"
    wanted = selector if selector not in ("", None, True) else where
    facts = dict(found.facts.blocks)
    like = {s.stack: s for s in found.sites if s.role == "attention"}
    reading = {s.stack for s in found.sites if s.role == "cross_attention"}
    sites = []
    for s in found.select(wanted, port=port):
        attention = like.get(s.stack, s)  # a side network takes its heads and its causality from the stack
        sites.append(
            s.at(port, blocks=len(facts.get(s.stack, ())), heads=attention.heads, kv_heads=attention.kv_heads,
                 head_dim=attention.head_dim, causal=attention.causal, cross=s.stack in reading)
        )  # fmt: skip
    if port == "tokens" and found.facts.encoder_decoder:
        sites = [s for s in sites if s.stack != "decoder"] or sites
    ids = {stack for stack, _ in found.facts.token_embeddings}
    if port == "tokens" and any(s.stack not in ids for s in sites) and not found.facts.class_token:
        raise Unsupported(
            f"this {found.model_class} has neither token ids nor a class token: its blocks count on a grid of a fixed "
            "size, so positions cannot be added.",
            next_step="veneer methods    lists methods of other ports, that edit weights or outputs",
        )
    if not sites:
        raise NoSiteFound(
            f"this base has no '{where}', which the port '{port}' needs.",
            next_step="veneer methods    shows the ports of every method; veneer anatomy MODEL what this base has",
        )
    return sites


def _patterned(
    found: Anatomy, m: Method, sites: Sequence[Site], patterns: Mapping[str, Mapping[str, Any]] | None
) -> dict[str, Method]:
    """Options by site: for each site the first pattern that names it wins; one that names none is an error."""
    methods = {s.name: m for s in sites}
    done: set[str] = set()
    for selector, options in (patterns or {}).items():
        names = {s.name for s in found.select(selector, port="weight", allow_partial=False)}
        hit = [s.name for s in sites if s.name in names]
        if not hit:
            raise NoSiteFound(
                f"pattern {selector!r} names no site that {m.key} edits here.",
                nearest=sorted({s.role for s in sites if s.role})[:5],
                next_step="veneer anatomy MODEL    shows every role and its modules",
            )
        for name in hit:
            if name not in done:
                methods[name] = m.changed(**options)
                done.add(name)
    return methods


def _whole_sites(found: Anatomy, name: str) -> list[Site]:
    """Every parameter of the modules that `name` selects: a role, or a module's name or suffix."""
    parameters = found.parameter_sites()
    modules = {s.module for s in found.sites if s.role == name}
    if not modules:
        modules = {
            s.module for s in parameters
            if s.module == name or s.module.endswith("." + name) or s.module.startswith(name + ".")
            or ("." + name + ".") in ("." + s.module + ".")
        }  # fmt: skip
    chosen = [s for s in parameters if s.module in modules]
    if not chosen:
        leaves = {n.rpartition(".")[2] for n in found.module_names}
        raise NoSiteFound(
            f"no module is called '{name}', which was to be trained whole.",
            nearest=nearest(name.rpartition(".")[2], leaves) or nearest(name, found.module_names),
            next_step="veneer anatomy MODEL    shows every role and its modules",
        )
    return [s if s.port == "weight" else s.at("weight") for s in chosen]


def _entries(plans: Sequence[SitePlan]) -> tuple[list[Entry], list[dict[str, str]]]:
    entries: dict[str, Entry] = {}
    keys: list[dict[str, str]] = []
    owners: dict[str, tuple[int, str]] = {}
    for i, sp in enumerate(plans):
        names: dict[str, str] = {}
        for name, spec in sp.specs.items():
            if spec.noise:
                continue
            key = f"{sp.owner(spec)}/{name}"
            # Two parts (or two ports) of one adapter may declare a tensor of the same name at the same place.
            n = 1
            while (
                owners.setdefault(key, (sp.part, sp.site.port)) != (sp.part, sp.site.port)
                and spec.scope == "site"
            ):
                n += 1
                key = f"{sp.owner(spec)}/{name}#{n}"
            shape = (sp.site.experts, *spec.shape) if sp.site.experts and spec.scope == "site" else spec.shape
            known = entries.get(key)
            if known is None:
                entries[key] = Entry(key, name, shape, spec, i)
            elif known.shape != shape:
                if len(known.shape) != len(shape):
                    raise BadOption(
                        f"tensor '{key}' is declared with shapes {known.shape} and {shape}.",
                        next_step="give one of them another name, or scope='site'",
                    )
                largest = tuple(max(a, b) for a, b in zip(known.shape, shape))
                entries[key] = Entry(key, name, largest, known.spec, known.first)
            names[name] = key
        keys.append(names)
    return list(entries.values()), keys


def shape_key(method: Method, **options: Any) -> str:
    """What makes two adapters of one shape: they share a plan, and rows of both share a bank."""
    return json.dumps(
        [method.key, type(method).__qualname__, method.options(), options], sort_keys=True, default=str
    )
