"""Attaching: a method becomes an adapter on a base."""

from __future__ import annotations

import dataclasses
import functools
import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veneer import anatomy
from veneer.edits import Method, build, call
from veneer.errors import BadOption, NotPrepared, UnknownAdapter, Unsupported

from ._adapter import Adapter, draw
from ._host import Host
from ._plan import Entry, Plan, SitePlan, is_saved, make_plan, shape_key
from ._statistics import squared_gradients

_READ: dict[int, Any] = {}
ENGINE_OPTIONS = {"modules_to_save": "whole", "exclude_modules": "exclude", "layers_to_transform": "layers"}


def host_of(model: nn.Module, make: bool = False) -> Host:
    """The model's host. Without one: made, or an error that says what to do."""
    if not isinstance(model, nn.Module):
        raise BadOption(
            f"expected a PyTorch module, got {type(model).__name__}.", next_step="veneer.attach(model, ...)"
        )
    host = model._modules.get("veneer")
    if isinstance(host, Host):
        return host
    if hasattr(model, "veneer"):
        raise Unsupported(
            f"this {type(model).__name__} has an attribute 'veneer' of its own, where adapters would live.",
            next_step="rename it",
        )
    if not make:
        raise UnknownAdapter(
            f"this {type(model).__name__} carries no adapter.",
            next_step='veneer.attach(model, "lora", name="mine")',
        )
    host = Host(model, read(model))
    model.add_module("veneer", host)
    return host


def read(model: nn.Module) -> anatomy.Anatomy:
    """The anatomy of a model: of its bare base, where it carries adapters."""
    host = model._modules.get("veneer")
    return host.anatomy if isinstance(host, Host) else anatomy.read(model)


def plan(model: nn.Module, method: str | Method | type[Method], **options: Any) -> Plan:
    """What attaching would do, without doing it: sites, tensors, parameters, bytes."""
    engine, own = _split(options)
    return _plan_for(model, build(method, **own), **engine)


def _split(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of the engine (sites by exclusion, layers, patterns, modules trained whole) and of the method."""
    engine: dict[str, Any] = {}
    own: dict[str, Any] = {}
    patterns: dict[str, dict[str, Any]] = dict(options.get("patterns") or {})
    for name, value in options.items():
        if name in ("exclude", "layers", "whole", "allow_partial"):
            engine[name] = value
        elif name in ENGINE_OPTIONS:
            engine[ENGINE_OPTIONS[name]] = value
        elif name in ("rank_pattern", "alpha_pattern"):
            for selector, number in (value or {}).items():
                patterns[selector] = {**patterns.get(selector, {}), name.removesuffix("_pattern"): number}
        elif name != "patterns":
            own[name] = value
    if patterns:
        engine["patterns"] = patterns
    engine = {k: v for k, v in engine.items() if v not in (None, (), [], {})}
    if "whole" in engine:
        engine["whole"] = tuple([engine["whole"]] if isinstance(engine["whole"], str) else engine["whole"])
    return engine, own


def _plan_for(model: nn.Module, method: Method, **options: Any) -> Plan:
    host = model._modules.get("veneer")
    if not isinstance(host, Host):
        return make_plan(read(model), method, **options)
    key = shape_key(method, **options)
    found = host.plans.get(key)
    if found is None:
        # Another thread may have made it meanwhile: adapters of one shape share one plan.
        found = host.plans.setdefault(key, make_plan(host.anatomy, method, **options))
    return found


def attach(
    model: nn.Module,
    method: str | Method | type[Method],
    name: str | None = None,
    *,
    activate: bool = True,
    replace: bool = False,
    seed: int = 0,
    dtype: str = "float32",
    data: Iterable[Mapping[str, Any]] | None = None,
    total_steps: int | None = None,
    of: Sequence[str] = (),
    values: Mapping[str, Tensor] | None = None,
    **options: Any,
) -> Adapter:
    """Put an adapter on `model`, in place; return it. It becomes the active one unless activate=False.

    replace: one of this name leaves for it, at one moment; calls under way end with the one that they began with.

    method: a key, a method's class, or an instance; `options` are its hyperparameters (HF PEFT's names too), and
    exclude=, layers=, patterns=, rank_pattern=, alpha_pattern=, whole= (modules that are trained whole).
    seed: of the starting values; the global generator is not touched. dtype: of the trained tensors, "float32" or
    "base". data: batches (dicts with labels), for methods whose start needs them. total_steps: for schedules.
    of: adapters that this one combines. Raises UnknownMethod, UnknownOption, NoSiteFound, Unsupported.
    """
    engine, own = _split(options)
    made = build(method, **own)
    fresh = "veneer" not in getattr(model, "_modules", ())
    host = host_of(model, make=True)
    try:
        found = _plan_for(model, made, **engine)
        name = name if name is not None else _free_name(host, made.key)
        adapter = Adapter(name, found, seed, _dtype(host, dtype))
        adapter.of = tuple(of)
        if replace and name in host.names:
            check_free(host, name)
        _check_members(host, adapter)
        drawn = _fill(host, adapter, values, data)
        adapter.total_steps = total_steps
        _warn_of_size(found)
        adapter.train(model.training)
        adapter.to(host.device)
        for leaf in adapter.leaves():
            leaf.requires_grad_(replace and name in host.active)
        host.add(adapter, drawn, replace)
    except Exception:
        if fresh:
            host.leave()
        raise
    if activate:
        host.set_active((name,))
    return adapter


def _warn_of_size(found: Plan) -> None:
    """More numbers than the layer itself has are seldom meant, where a knob sets how many there are."""
    knob = any(f.metadata.get("size") for f in dataclasses.fields(found.method))  # type: ignore[arg-type]
    if not knob or found.cache.get("sized"):
        return
    found.cache["sized"] = True
    for sp in found.sites:
        trained = sum(s.size for s in sp.specs.values() if s.trained and s.scope == "site")
        own = 1
        for n in sp.site.shape:
            own *= n
        if sp.part == 0 and sp.site.port == "weight" and len(sp.site.shape) > 1 and trained > own:
            warnings.warn(
                f"{sp.method} trains {trained:,} numbers at '{sp.site.name}', which has {own:,} itself; a smaller size "
                "says as much.",
                stacklevel=3,
            )
            return


def _dtype(host: Host, dtype: str) -> torch.dtype | None:
    if dtype not in ("float32", "base"):
        raise BadOption(
            f'dtype={dtype!r}: expected "float32" or "base".',
            next_step='dtype="float32", or dtype="base" for that of the base',
        )
    return torch.float32 if dtype == "float32" and host.dtype != torch.float64 else host.dtype


def _free_name(host: Host, key: str) -> str:
    if key not in host.names:
        return key
    n = 2
    while f"{key}-{n}" in host.names:
        n += 1
    return f"{key}-{n}"


def _check_members(host: Host, adapter: Adapter) -> None:
    wants = "members" in adapter.method.facts.data or getattr(adapter.method, "needs_members", False)
    if wants and not adapter.of:
        raise NotPrepared(
            f"{adapter.method.key} combines other adapters, and none were named.",
            next_step=f'veneer.attach(model, "{adapter.method.key}", of=["a", "b"])',
        )
    for name in adapter.of:
        member = host.adapter(name)
        sites = {(sp.site.name, sp.site.port) for sp in member.plan.sites}
        missing = [
            sp.site.name
            for sp in adapter.plan.sites
            if sp.part == 0 and (sp.site.name, sp.site.port) not in sites
        ]
        if missing:
            raise Unsupported(
                f"adapter '{name}' ({member.method.key}) edits no '{missing[0]}', where "
                f"{adapter.method.key} would combine it.",
                next_step="name adapters that edit the same sites, or give sites=",
            )


def _fill(host: Host, adapter: Adapter, values: Mapping[str, Tensor] | None, data: Any) -> dict[Any, Tensor]:
    """Starting values: given ones, drawn ones, those that need W, those that need data. Returns the frozen tensors
    that are shared with other adapters, by their key in the host's store."""
    found: dict[str, Tensor] = {}
    shared: dict[Any, Tensor] = {}
    for e in adapter.plan.entries:
        if e.spec.seeded and not (values and e.key in values):
            seed = frozen_seed(adapter.method, adapter.seed)
            store = (adapter.method.key, e.key, e.shape, seed)
            known = host.shared.get(store)
            if known is None:
                known = draw(e.spec, e.shape, seed, f"{adapter.method.key}:{e.key}").to(host.device)
            shared[store] = known
            adapter.frozen_shared[e.key] = store
        elif values is not None and e.key in values:
            found[e.key] = values[e.key]
        elif values is None:
            found[e.key] = draw(e.spec, e.shape, adapter.seed, e.key)
    if values is None:
        found.update(_from_base(host, adapter, found))
        _prepare(host, adapter, found, data)
    for e in adapter.plan.entries:
        if not e.spec.trained and e.key in found:
            value = found[e.key]
            adapter.own_buffer(e.key, value.to(adapter.keep_dtype) if value.is_floating_point() else value)
    adapter.lay_out(found)
    return shared


def _from_base(host: Host, adapter: Adapter, drawn: dict[str, Tensor]) -> dict[str, Tensor]:
    from veneer.edits import Tensors

    found: dict[str, Tensor] = {}
    started: set[tuple[str, ...]] = set()
    for sp, keys in zip(adapter.plan.sites, adapter.plan.keys):
        owned = tuple(keys.values())
        if "start" not in sp.method.arguments or owned in started:  # another owner of a shared parameter
            continue
        started.add(owned)
        W = None
        if getattr(sp.method, "start_reads_weight", True):
            W = host.token_table(sp.site.stack) if sp.site.port == "tokens" else host.weight(sp.site)
        t = Tensors({n: drawn[k] for n, k in keys.items() if k in drawn})
        W = None if W is None else W.detach().float() if host.dtype != torch.float64 else W.detach()
        if sp.site.experts and W is not None:
            own = {n for n, spec in sp.specs.items() if spec.scope == "site"}
            each = [
                call(
                    sp.method, "start", Tensors({n: v[i] if n in own else v for n, v in t.items()}),
                    {"site": sp.site, "W": w},
                )
                for i, w in enumerate(W)
            ]  # fmt: skip
            made = {n: torch.stack([m[n] for m in each]) for n in each[0]}
        else:
            given = {"site": sp.site, "W": W, "blocks": functools.partial(_of_blocks, host, sp.site.stack)}
            made = call(sp.method, "start", t, given)
        found.update({keys[n]: v.clone() for n, v in made.items()})
    return found


def _of_blocks(host: Host, stack: str, role: str) -> list[Tensor]:
    """What the blocks of a stack hold at a role, in order: a start that is cut from the base reads it."""
    sites = (dataclasses.replace(s, port="weight") for s in host.anatomy.by_block(stack, role))
    return [W.detach().float() for s in sites if (W := host.weight(s)) is not None]


def frozen_seed(method: Method, seed: int) -> int:
    """The seed of frozen draws: the method's own where it has one, so that it can be told apart and shared."""
    own = getattr(method, "seed", None)
    return seed if own is None else int(own) * 1_000_003 + seed


def _prepare(host: Host, adapter: Adapter, found: dict[str, Tensor], data: Any) -> None:
    """Starts that need data; without it the adapter is unprepared, and says so when it is used."""
    if "prepare" not in adapter.method.arguments:
        return
    mine = [i for i, sp in enumerate(adapter.plan.sites) if sp.part == 0]
    if data is None and adapter.method.facts.data:
        adapter.prepared = False
        return
    sites = [adapter.plan.sites[i].site for i in mine]
    stats = squared_gradients(host, sites, data) if data is not None else {}
    given = {s.name: SiteData(s, host.weight(s), stats.get(s.name)) for s in sites}
    made = adapter.method.prepare(given)
    for i in mine:
        for tensor, value in made.get(adapter.plan.sites[i].site.name, {}).items():
            found[adapter.plan.keys[i][tensor]] = value


class SiteData:
    """What `prepare` sees of one site: the site, its bare W, and the statistic that it asked for (W's shape)."""

    def __init__(self, site: Any, W: Tensor | None, stats: Tensor | None) -> None:
        self.site, self.W, self.stats = site, W, stats


def detach(model: nn.Module, name: str) -> None:
    """Take an adapter off. With the last one the base is what it was: classes, hooks, `requires_grad`, bits."""
    host = host_of(model)
    with host.lock:
        check_free(host, name)
        host.drop(name)
        if not host.names and not host.merged:
            host.leave()


def check_free(host: Host, name: str) -> None:
    """Whether an adapter may leave: nothing else stands on it."""
    host.adapter(name)
    if name in host.merged:
        raise Unsupported(
            f"adapter '{name}' is merged into the base; taking it off would leave its change behind.",
            next_step="veneer.unmerge(model) first, or veneer.merge(model, name, keep=False) to make it final",
        )
    for other in host.combiners_of(name):
        raise Unsupported(
            f"adapter '{name}' is combined by '{other}'.",
            next_step=f"veneer.detach(model, '{other}') first",
        )


def relayout(
    model: nn.Module, name: str, regroup: Callable[[Any, str, Any], tuple[str, float] | None]
) -> None:
    """Sort an adapter's tensors into other leaves: regroup(site, tensor, spec) -> (group, rate) or None."""
    adapter = host_of(model).adapter(name)
    sites = adapter.plan.sites

    def of_entry(e: Entry) -> tuple[str, float] | None:
        return regroup(sites[e.first].site, e.tensor, e.spec)

    active = any(p.requires_grad for p in adapter.leaves())
    adapter.lay_out(adapter.named(), of_entry)
    for leaf in adapter.leaves():
        leaf.requires_grad_(active)


__all__ = [
    "SiteData",
    "SitePlan",
    "attach",
    "detach",
    "host_of",
    "is_saved",
    "json",
    "plan",
    "read",
    "relayout",
]
