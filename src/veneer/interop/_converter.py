"""A converter: what one type of HF PEFT is here. Its fields, its options, its tensors, in both directions.

A new type is one class with `@converter`: a table of fields, `options` (config -> hyperparameters), `take` (file
tensors -> a site's tensors), and `write` (their inverse). Choosing sites, modules that are trained whole, what is
missing or left over, and files are the same for all types, and live elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from veneer.anatomy import Anatomy, Site
from veneer.engine import Adapter, Host
from veneer.engine._plan import Plan, SitePlan
from veneer.engine._weights import features
from veneer.errors import NoSiteFound, ShapeDiffers, Unsupported

from . import _targets
from ._config import TARGETS, Config, Field

PREFIX = "base_model.model."
OWN_FORM = (
    "veneer.save(model, name, folder)    keeps veneer's own form"  # what to do with what HF PEFT cannot hold
)


class _Missed(Exception):
    """A tensor is missing or has another shape; what it was for is left out, and the rest is looked at."""


class Tensorfile:
    """The file's tensors, each taken once. What is missing, of another shape, or left over is told together."""

    def __init__(self, tensors: Mapping[str, Tensor], what: str) -> None:
        self._left, self._what = dict(tensors), what
        self.missing: list[str] = []
        self.wrong: list[str] = []
        self.taken = 0

    def has(self, key: str) -> bool:
        return key in self._left

    def names(self) -> list[str]:
        return list(self._left)

    def put(self, key: str, value: Tensor) -> None:
        """The tensor by another name than the file's."""
        self._left[key] = value

    def pop(self, key: str) -> Tensor | None:
        return self._left.pop(key, None)

    def take(self, key: str, *shapes: tuple[int, ...]) -> Tensor:
        """The tensor of this name, of one of these shapes."""
        value = self._left.pop(key, None)
        if value is None:
            self.missing.append(key)
            raise _Missed
        self.taken += 1
        if tuple(value.shape) not in shapes:
            expected = " or ".join(map(str, shapes))
            self.wrong.append(f"'{key}' is {tuple(value.shape)}, expected {expected}")
            raise _Missed
        if not value.is_floating_point():
            self.wrong.append(f"'{key}' is of type {value.dtype}, expected floating numbers")
            raise _Missed
        return value

    @contextmanager
    def together(self, prefix: str) -> Iterator[None]:
        """Inside, a tensor that is not as it should be ends the block, not the reading: one fault a place."""
        try:
            yield
        except _Missed:
            self._left = {k: v for k, v in self._left.items() if not k.startswith(prefix)}

    def check(self, base: str) -> None:
        """Raise ShapeDiffers with everything that does not fit."""
        if not (self.missing or self.wrong or self._left):
            return
        lines = [f"missing '{k}'" for k in self.missing[:3]]
        lines += [f"unexpected '{k}'" for k in sorted(self._left)[:3]] + self.wrong[:3]
        raise ShapeDiffers(
            f"{self._what} does not fit this {base}: {len(self.missing)} places lack a tensor, {len(self._left)} "
            f"tensors are unexpected, {len(self.wrong)} have another shape or type: {'; '.join(lines)}.",
            next_step="load it on the base, and with the config, that it was trained with",
        )


@dataclass
class Reading:
    """One folder on its way in."""

    model: nn.Module
    host: Host
    config: Config
    file: Tensorfile
    prefix: str = PREFIX
    plan: Any = None  # once it is made
    nested: dict[tuple[str, str], str] = field(
        default_factory=dict
    )  # edited parameters without a module of their own
    rows: dict[str, str] = field(default_factory=dict)  # module with trained rows -> its name in the file
    pairs: dict[Any, tuple[Tensor, Tensor]] = field(default_factory=dict)  # what parts of one parameter share

    @property
    def anatomy(self) -> Anatomy:
        return self.host.anatomy


@dataclass
class Request:
    """What `attach` is asked for: a method, its options, and those of the engine."""

    method: str
    options: dict[str, Any]
    places: set[tuple[str, str]] = field(
        default_factory=set
    )  # (module, parameter): edited, no more and no fewer
    total_steps: int | None = None


@dataclass
class Writing:
    """One adapter on its way out."""

    host: Host
    adapter: Adapter
    options: dict[str, Any]  # of the call
    prefix: str = PREFIX
    tensors: dict[str, Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def plan(self) -> Plan:
        return self.adapter.plan

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def values(self) -> list[dict[str, Tensor]]:
        """For each site plan: its tensors by name, cut to their declared shapes."""
        found = {**self.adapter.named(), **self.adapter.frozen(self.host.shared)}
        out = []
        for sp, keys in zip(self.plan.sites, self.plan.keys):
            mine = {}
            for name, key in keys.items():
                value, shape = found[key], sp.specs[name].shape
                if sp.specs[name].scope != "site" and tuple(value.shape) != shape:
                    value = value[tuple(slice(0, n) for n in shape)]
                mine[name] = value
            out.append(mine)
        return out


class Converter:
    """Base of all converters; the defaults serve weight edits that are named by target_modules."""

    peft_type = ""
    methods: tuple[str, ...] = ()  # veneer's keys
    kinds: tuple[str, ...] = ("linear", "conv1d")  # of site, that HF PEFT can hold this type at
    fields: Mapping[str, Field] = TARGETS
    prefix = PREFIX  # of the names of tensors
    stem = "lora_"  # what the type's tensors are called
    beside = True  # whether modules trained whole, heads and rows of tokens may stand beside it

    # -- reading ------------------------------------------------------------------------------------------------

    def request(self, job: Reading) -> Request:
        """Config -> what to attach."""
        modules = self.modules(job)
        options = self.options(job)
        options["sites"] = _targets.selector(job.anatomy, modules, job.config["target_modules"])
        return Request(self.methods[0], options, {(m, "weight") for m in modules})

    def modules(self, job: Reading) -> list[str]:
        """Names of the edited modules: those that the config means, or that the file names where it is silent."""
        modules = _targets.target_modules(job.model, job.anatomy, job.config)
        if job.config["target_modules"] is None:
            modules = self.modules_in(job)
        if not modules:
            raise NoSiteFound(
                f"'{job.config.path}' names no module, and no tensor of the file is one of {self.peft_type}.",
                nearest=sorted(job.file.names())[:3],
                next_step='"target_modules": ["q_proj", "v_proj"] in that file, or copy the folder again',
            )
        self.check_sites(job, modules)
        return modules

    def options(self, job: Reading) -> dict[str, Any]:
        """Config -> hyperparameters of the method."""
        raise NotImplementedError

    def writes(self, adapter: Adapter) -> bool:
        """Whether an adapter has a form of this type: one of its methods, with sites of its own."""
        return adapter.method.key in self.methods and any(sp.part == 0 for sp in adapter.plan.sites)

    def take(self, job: Reading, sp: SitePlan, prefix: str) -> dict[str, Tensor]:
        """File tensors -> the site's tensors, by the names of the method. prefix: "base_model.model.a.b."."""
        raise NotImplementedError

    def modules_in(self, job: Reading) -> list[str]:
        """The modules that the file's tensors name, for a config that does not say its targets."""
        names = {k.removeprefix(job.prefix) for k in job.file.names()}
        return [m for m in job.anatomy.module_names if any(n.startswith(m + "." + self.stem) for n in names)]

    def check_sites(self, job: Reading, modules: list[str]) -> None:
        known = {s.module: s for s in job.anatomy.whole_sites() if s.parameter == "weight"}
        for name in modules:
            site = known.get(name)
            if site is None or site.kind not in self.kinds:
                what = f"of kind '{site.kind}'" if site else f"a {type(job.host.module(name)).__name__}"
                raise Unsupported(
                    f"{self.peft_type} edits '{name}', which is {what}; veneer reads it at {', '.join(self.kinds)}.",
                    next_step="veneer anatomy MODEL    shows every module that can be edited",
                )

    # -- writing ------------------------------------------------------------------------------------------------

    def write(self, job: Writing) -> dict[str, Any]:
        """Fill job.tensors; return the config's own fields, those at HF PEFT's default left out."""
        raise NotImplementedError


_CONVERTERS: dict[str, Converter] = {}


def converter(cls: type[Converter]) -> type[Converter]:
    """Register a converter by its type; a later one of the same type replaces it."""
    _CONVERTERS[cls.peft_type] = cls()
    return cls


def converters() -> dict[str, Converter]:
    """Type of HF PEFT -> its converter."""
    # They register themselves.
    from . import _adalora, _context, _dense, _lora, _lycoris, _tokens, _weights  # noqa: F401

    return dict(_CONVERTERS)


def writer_for(adapter: Adapter) -> Converter:
    """The converter that writes an adapter. Raises Unsupported with the methods that can be written."""
    found = next((c for c in converters().values() if c.writes(adapter)), None)
    if found is None:
        raise Unsupported(
            f"HF PEFT has no form for '{adapter.method.key}' that veneer writes.",
            nearest=sorted({m for c in converters().values() for m in c.methods}),
            next_step=OWN_FORM,
        )
    return found


def beside_default(fields: Mapping[str, Field], values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields whose value says something."""
    return {k: v for k, v in values.items() if k not in fields or v != fields[k].default}


def whole(site: Site, host: Host, part: Tensor, fill: float = 0.0) -> Tensor:
    """Rows of a fused projection put where they belong in all of its rows: (n, ...) -> (all, ...)."""
    if not site.ranges:
        return part
    rows = next(
        s.n_out
        for s in host.anatomy.whole_sites()
        if (s.module, s.parameter) == (site.module, site.parameter)
    )
    out = torch.full((rows, *part.shape[1:]), fill, dtype=part.dtype, device=part.device)
    return out.index_copy(0, features(site, part.device), part)
