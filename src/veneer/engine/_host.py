"""The host: what a model that carries adapters knows about them. It is the model's child `veneer`.

The base's own `state_dict` keys stay; all adapters sit under this one child. Its tables are replaced and not written
to, under one lock, so that adapters come and go while other threads run the model: a call sees the adapters that there
were when it began.
"""

from __future__ import annotations

import inspect
import threading
import urllib.parse
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from veneer.anatomy import Anatomy, Site
from veneer.errors import BadOption, UnknownAdapter, Unsupported, nearest

from . import _attention, _forms, _residual
from ._adapter import Adapter
from ._frame import Frame, Names, Session, names_in
from ._kept import Kept
from ._pages import Pages
from ._plan import Plan
from ._program import Op, Program, banks_of, build
from ._swap import restore, swap
from ._weights import cut, stored

PROGRAMS_KEPT = 16


class Host(nn.Module):
    """Adapters of one model: which there are, which are active, what is merged, what is shared."""

    root: nn.Module

    def __init__(self, root: nn.Module, found: Anatomy) -> None:
        super().__init__()
        self.__dict__["root"] = root  # not a child: the root is the parent
        self.anatomy = found
        self.names: dict[str, str] = {}  # adapter name -> name of the child module
        self.active: Names = ()
        self.merged: list[str] = []
        self.update_statistics = False  # whether running statistics of the base move in training
        self.members: dict[
            int, dict[str, int]
        ] = {}  # plan -> {adapter: slot}, from 1; a slot that is left is used again
        self._free: dict[int, list[int]] = {}  # plan -> slots that adapters left
        self._combining: tuple[str, ...] = ()  # adapters that combine others
        self.banks: Any = ()  # for compiled code: the active adapters as banks
        # While something is merged: (module, parameter) -> the bare weight; of quantised modules, their own buffers.
        self.kept: dict[tuple[str, str], Tensor] = {}
        self.kept_codes: dict[str, dict[str, Tensor]] = {}
        self.shared: dict[Any, Tensor] = {}  # frozen tensors that adapters share
        self.plans: dict[str, Plan] = {}
        self.flags: dict[str, bool] = {n: p.requires_grad for n, p in root.named_parameters()}
        self.swapped: dict[str, nn.Module] = {}
        self._modules_by_name: dict[str, nn.Module] | None = None
        # composition -> its program, and the adapters whose tensors are in it
        self._programs: OrderedDict[Any, tuple[Program, frozenset[str]]] = OrderedDict()
        self.lock = threading.RLock()
        self.calls = 0  # under way, in all threads
        self._leaving = False
        self.pages = Pages(self)
        self.forms: Any = None  # a table of measurements, by which forms are chosen
        self.dense = Kept(self.base_bytes)  # what settled weight edits made
        self._trained: set[str] = set()  # adapters that ran with gradients since programs were last kept
        for p in root.parameters():
            p.requires_grad_(False)

    # -- adapters -----------------------------------------------------------------------------------------------

    def adapter(self, name: str) -> Adapter:
        child = self.names.get(name)
        if child is None:
            raise UnknownAdapter(
                f"no adapter is called '{name}' on this {type(self.root).__name__}.",
                nearest=nearest(name, self.names) or tuple(self.names),
                next_step="veneer.adapters(model)    lists those that are on it",
            )
        return self._modules[child]  # type: ignore[return-value]

    def add(self, adapter: Adapter, drawn: Mapping[Any, Tensor], replace: bool = False) -> None:
        """Put an adapter in. `drawn`: frozen tensors that it shares with others. `replace`: one of this name leaves."""
        with self.lock:
            child = child_name(adapter.name)
            if adapter.name in self.names:
                if not replace:
                    raise BadOption(
                        f"an adapter is already called '{adapter.name}'.",
                        next_step="choose another name, or veneer.detach(model, name) first",
                    )
                child = self.names[adapter.name]
                self._leave_tables(adapter.name)
            elif hasattr(self, child):
                child += "%"  # "adapter" and the like are names of ours
            self.reach(adapter.plan)
            bank = self.members.get(id(adapter.plan), {})
            free = self._free.get(id(adapter.plan))
            slot = free.pop() if free else len(bank) + 1
            self.shared = {**drawn, **self.shared} if drawn else self.shared
            self.members = {**self.members, id(adapter.plan): {**bank, adapter.name: slot}}
            self._combining += (adapter.name,) if adapter.of else ()
            self.__dict__["_modules"] = {**self._modules, child: adapter}
            self.names = {**self.names, adapter.name: child}
            self._leaving = False
            self.pages.track(adapter)

    def drop(self, name: str) -> None:
        with self.lock:
            self._leave_tables(name)
            self.__dict__["_modules"] = _without(self._modules, self.names[name])
            self.names = _without(self.names, name)
            self.active = tuple(n for n in self.active if n != name)
            self.banks = banks_of(self, self.active)

    def _leave_tables(self, name: str) -> None:
        """Out of every table but the names. Its slot is the next adapter's; nobody else's changes."""
        adapter = self.adapter(name)
        plan = id(adapter.plan)
        self._free.setdefault(plan, []).append(self.members[plan][name])
        self.members = {**self.members, plan: _without(self.members[plan], name)}
        if not self.members[plan]:
            self._free.pop(plan)
        self._combining = tuple(n for n in self._combining if n != name)
        if adapter.frozen_shared:
            others = (a for n, a in self.adapters().items() if n != name)
            used = {store for a in others for store in a.frozen_shared.values()}
            self.shared = {k: v for k, v in self.shared.items() if k in used}
        self.pages.forget(name)
        self.forget_made(name)

    def combiners_of(self, name: str) -> list[str]:
        """Adapters that combine this one."""
        return [n for n in self._combining if name in self.adapter(n).of]

    def forget_made(self, name: str) -> None:
        """Let go of everything that was made of an adapter's tensors."""
        for key in [k for k, (_, used) in self._programs.items() if name in used]:
            del self._programs[key]
        self.dense.drop(name)

    def adapters(self) -> dict[str, Adapter]:
        return {n: self._modules[c] for n, c in self.names.items()}  # type: ignore[misc]

    def set_active(self, names: Names) -> None:
        """Whole batches go through these; only their tensors require gradients."""
        for name in names:
            self.adapter(name)
            if name in self.merged:
                raise Unsupported(
                    f"adapter '{name}' is merged into the base, so it acts already.",
                    next_step="veneer.unmerge(model) takes it out again",
                )
        with self.lock:
            self.pages.use(self.adapter(name) for name in names)
            before = self.active
            self.active = tuple(names)
            self.banks = banks_of(self, self.active)
            for name in {*before, *names}:
                if name in self.names:
                    for leaf in self.adapter(name).leaves():
                        leaf.requires_grad_(name in names)

    # -- reading the base -----------------------------------------------------------------------------------------

    def module(self, name: str) -> nn.Module:
        if self._modules_by_name is None:
            self._modules_by_name = dict(self.root.named_modules(remove_duplicate=False))
        return self._modules_by_name[name]

    @property
    def dtype(self) -> torch.dtype | None:
        """The base's floating dtype: adapters are cast to it at the door."""
        found = self.__dict__.get("_dtype")
        if found is None:
            for n, p in self.root.named_parameters():
                if p.is_floating_point() and not n.startswith("veneer."):
                    found = p.dtype
                    break
            self.__dict__["_dtype"] = found
        return found

    @property
    def device(self) -> torch.device:
        for n, p in self.root.named_parameters():
            if not n.startswith("veneer."):
                return p.device
        return torch.device("cpu")

    def base_bytes(self) -> int:
        """Bytes of the base's own parameters and buffers, as they are stored."""
        tensors = (*self.root.named_parameters(), *self.root.named_buffers())
        return sum(v.numel() * v.element_size() for n, v in tensors if not n.startswith("veneer."))

    def bare(self, site: Site) -> Tensor:
        """The stored bare parameter: what was kept while adapters are merged, else the module's own."""
        kept = self.kept.get((site.module, site.parameter))
        return kept if kept is not None else stored(self.module(site.module), site.parameter)

    def weight(self, site: Site) -> Tensor | None:
        """The bare W of a site in the method's shape; None where the site has none."""
        if not site.parameter or (
            site.port != "weight" and site.kind not in ("linear", "conv1d", "embedding", "conv")
        ):
            return None
        return cut(self.bare(site), site)

    def bias(self, site: Site) -> Tensor | None:
        if not site.bias:
            return None
        b = stored(self.module(site.module), site.bias)
        if b is None or not site.ranges:
            return b
        return torch.cat([b[i:j] for i, j in site.ranges])

    def token_table(self, stack: str) -> Tensor | None:
        """(vocabulary, width): the table of token embeddings of a stack, if it has one."""
        tables = dict(self.anatomy.facts.token_embeddings)
        return stored(self.module(tables[stack]), "weight") if stack in tables else None

    def sibling(self, site: Site, role: str) -> Site:
        """The projection of the same attention: `key` of "block.3.attention"."""
        found = self.__dict__.get("_sites_by_name")
        if found is None:
            found = self.__dict__["_sites_by_name"] = {s.name: s for s in self.anatomy.sites}
        other = found.get(f"{site.name}.{role}")
        if other is not None:
            return other
        raise Unsupported(
            f"the attention '{site.name}' has no projection called '{role}' in this base.",
            next_step="veneer anatomy MODEL    shows the projections of every attention",
        )

    def stack_of(self, module: str) -> str:
        found = self.__dict__.setdefault("_stacks", {})
        if not found:
            for stack, blocks in self.anatomy.facts.blocks:
                found.update(dict.fromkeys(blocks, stack))
        while module:
            if module in found:
                return found[module]
            module = module.rpartition(".")[0]
        return ""

    # -- reaching modules -----------------------------------------------------------------------------------------

    def reach(self, plan: Plan) -> None:
        """Swap the classes that a plan needs, once for each plan."""
        if plan.cache.get("reached") == id(self):
            return
        facts = self.anatomy.facts
        wanted: list[tuple[str, str]] = [("", "door")]
        wanted += [(name, "backbone") for name in facts.backbones]
        wanted += [(block, "block") for _, blocks in facts.blocks for block in blocks]
        for sp in plan.sites:
            site = sp.site
            if site.port == "attention":
                _attention.check(self.module(site.module), site.module)
                self._check_positions(sp.method)
                wanted.append((site.module, "attention"))
            else:
                wanted.append((site.module, "site"))
            wanted += [(name, "site") for name in _residual.reads(facts, sp.method, site)]
            if site.port == "tokens" and not self.has_token_ids(site.stack):
                _attention.register()
                wanted += [
                    (s.module, "attention") for s in self.anatomy.select("attention", port="attention")
                ]
        wanted += [
            (n, "statistics")
            for n, m in self.root.named_modules()
            if isinstance(m, nn.modules.batchnorm._BatchNorm)
        ]
        for name, kind in wanted:
            module = self.root if name == "" else self.module(name)
            swap(module, name, self, kind)
            self.swapped[name] = module
        plan.cache["reached"] = id(self)

    def _check_positions(self, method: Any) -> None:
        """Positions that start behind a prefix can only be given where a backbone takes them."""
        if (
            getattr(method, "position_table", "")
            or not getattr(method, "position_offset", 0)
            or self.anatomy.facts.positions
            not in (
                "absolute",
                "rotary",
            )
        ):
            return
        backbones = [self.module(b) for b in self.anatomy.facts.backbones] or [self.root]
        if not any("position_ids" in inspect.signature(type(b).forward).parameters for b in backbones):
            raise Unsupported(
                f"{method.key}: position_offset={method.position_offset} needs a base that takes position ids, and "
                f"this {self.anatomy.model_class} counts its own.",
                next_step="position_offset=0, or position_table= the table of positions that it reads",
            )

    def has_token_ids(self, stack: str) -> bool:
        return any(s == stack for s, _ in self.anatomy.facts.token_embeddings)

    def leave(self) -> None:
        """Give classes and `requires_grad` back: no adapter is left. Calls under way end first."""
        with self.lock:
            self._leaving = self.calls > 0
            if self._leaving:
                return
            for module in self.swapped.values():
                restore(module)
            for plan in self.plans.values():
                plan.cache.clear()
            for name, parameter in self.root.named_parameters():
                if name in self.flags:
                    parameter.requires_grad_(self.flags[name])
            self.root._modules.pop("veneer", None)

    # -- calls --------------------------------------------------------------------------------------------------

    def begin(self, names: Iterable[str]) -> None:
        """A call starts that uses these adapters. Under the lock under which it found them."""
        self.calls += 1
        self.pages.pin(names)

    def end(self, names: Iterable[str]) -> None:
        with self.lock:
            self.calls -= 1
            self.pages.unpin(names)
            if self._leaving and not self.names:
                self.leave()

    # -- programs -------------------------------------------------------------------------------------------------

    def program(self, rows: Any, training: bool, session: Session | None = None, tokens: int = 1) -> Program:
        """The program for a composition. Without gradients it is kept, and found again at the next call.

        session: a generation's has the adapters that it began with, whatever is called so by now; any may name a form.
        tokens: of a row, for the choice of forms.
        """
        adapters, form = (None, None) if session is None else (session.adapters, session.form)
        with self.lock:
            names = names_in(rows)
            find = self.adapter if adapters is None else _finder(self, adapters)
            used = self._with_members({n: find(n) for n in names})
            self.pages.use(used.values())
            stamps = {n: a.stamp() for n, a in used.items()}
            if torch.is_grad_enabled() or training or None in stamps.values():
                self._trained.update(names if torch.is_grad_enabled() else ())
                return build(self, rows, training, find, form, tokens)
            if not self._trained.isdisjoint(used):  # a step may have moved them since
                self._programs.clear()
                self.dense.drop()
                self._trained.clear()
            versions = tuple((n, id(used[n]), stamps[n]) for n in sorted(used))
            size = _forms.bucket(tokens) if form is None and self.forms is not None else 0
            key = (rows if _is_names(rows) else tuple(rows), versions, self.dtype, len(self.kept), form, size)
            found = self._programs.get(key)
            if found is None:
                found = self._programs[key] = build(self, rows, training, find, form, tokens), frozenset(used)
                while len(self._programs) > PROGRAMS_KEPT:
                    self._programs.popitem(last=False)
            return found[0]

    def _with_members(self, adapters: dict[str, Adapter]) -> dict[str, Adapter]:
        """With those that they combine."""
        found = dict(adapters)
        for adapter in adapters.values():
            found.update({n: self.adapter(n) for n in adapter.of})
        return found

    def implicit_frame(self, training: bool) -> Frame:
        """For a module that is called by itself: the active adapters, and no facts about the rows."""
        from veneer.edits import At

        with self.lock:
            made = Frame(self, self.program(self.active, training), at={"": At(training=training)})
            made.adapters = {n: self.adapter(n) for n in self.active}
        return made

    def rows_for(self, session: Session | None, total: int, stack: str = "") -> Any:
        """Names for this call: one stack of names for the whole batch, or one for each row."""
        if session is None:
            return self.active
        rows = session.by_stack.get(stack) if session.by_stack else session.rows
        if rows is None:
            return self.active if session.names is None else session.names
        # Beams and samples multiply rows in generation alone; elsewhere one name serves all, or each row has its own.
        fits = total % len(rows) == 0 if session.generating else total == len(rows)
        if not total or not (fits or len(rows) == 1):
            raise BadOption(
                f"the batch has {total} rows, but names were given for {len(rows)}.",
                next_step='with veneer.rows(model, ["a", None, ...]):    one name for each row',
            )
        each = total // len(rows)
        spread = [names for names in rows for _ in range(each)]  # beams and samples stand next to one another
        return spread[0] if session.form is None and all(n == spread[0] for n in spread) else spread

    def project(self) -> None:
        """Put constrained tensors back on their constraint, where a step has moved them."""
        for name in self.active:
            self.adapter(name).project()

    def remember(self, frame: Frame, op: Op, key: str, x: Tensor) -> Tensor:
        """x of all tokens so far, kept on the cache object and reordered with it."""
        cache = frame.captured.get("cache")
        # Without a cache yet, the one that the base makes in this call takes it (see `keep_history`).
        history = frame.captured.setdefault("pending", {}) if cache is None else history_of(cache)
        which = None if op.rows is None else op.rows.indices
        name = (op.adapter.name, op.site.name, key, op.level, which)
        full = x
        if op.rows is not None:
            total = frame.captured["total"]
            rows = op.rows
            empty = x.new_zeros(total, *x.shape[1:])  # type: ignore[call-overload]
            full = rows.put(empty, x)
        # One call without a cache has no past: a block that checkpointing runs again says the same once more.
        before = None if cache is None else history.get(name)
        full = full if before is None else torch.cat([before, full], dim=1)
        history[name] = full
        return full if op.rows is None else op.rows.take(full)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        made = super()._apply(fn, recurse)
        # Frozen shared tensors are no buffers (they are not saved), so they have to be moved by hand; a change of
        # dtype is not for them.
        self.shared = {
            k: fn(v) if not v.is_floating_point() else _moved(fn, v) for k, v in self.shared.items()
        }
        self.kept = {k: fn(v) for k, v in self.kept.items()}
        self.__dict__.pop("_dtype", None)
        self._programs.clear()
        self.dense.drop()
        return made

    def train(self, mode: bool = True) -> Host:
        if mode:
            self.dense.drop()
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        state["_programs"] = OrderedDict()
        return {k: v for k, v in state.items() if k not in ("lock", "pages", "dense")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._own_tables()
        self.members, self._free = {}, {}
        for name, adapter in self.adapters().items():
            bank = self.members.setdefault(id(adapter.plan), {})
            bank[name] = len(bank) + 1
        self.banks = banks_of(self, self.active)

    def _own_tables(self) -> None:
        """What a copy does not take over: the lock, what was made, what is where."""
        self.__dict__.update(lock=threading.RLock(), calls=0, _leaving=False)
        self.__dict__.update(dense=Kept(self.base_bytes), pages=Pages(self))
        for adapter in self.adapters().values():
            self.pages.track(adapter)

    def __deepcopy__(self, memo: dict[int, Any]) -> Host:
        import copy

        made = self.__class__.__new__(self.__class__)
        memo[id(self)] = made
        for key, value in self.__dict__.items():
            if key == "_programs":
                made.__dict__[key] = OrderedDict()
            elif key in ("lock", "pages", "dense"):
                continue
            elif key in ("anatomy", "plans"):
                made.__dict__[key] = value if key == "anatomy" else dict(value)
            else:
                made.__dict__[key] = copy.deepcopy(value, memo)
        made._own_tables()
        return made

    def extra_repr(self) -> str:
        return f"active: {', '.join(self.active) or 'none'}"


def _moved(fn: Any, value: Tensor) -> Tensor:
    moved = fn(value)
    return moved if moved.dtype == value.dtype else value.to(moved.device)


def _finder(host: Host, adapters: Mapping[str, Adapter]) -> Callable[[str], Adapter]:
    """Adapters by name, the given ones first."""
    return lambda name: adapters[name] if name in adapters else host.adapter(name)


def _without(table: Mapping[str, Any], name: str) -> dict[str, Any]:
    made = dict(table)
    del made[name]
    return made


def _is_names(rows: Any) -> bool:
    return isinstance(rows, tuple) and all(isinstance(n, str) for n in rows)


def history_of(cache: Any) -> dict[Any, Tensor]:
    """What is kept beside a cache, and follows its reordering."""
    history = cache.__dict__.setdefault("_veneer_history", {})
    if "_veneer_reorder" not in cache.__dict__ and hasattr(cache, "reorder_cache"):
        _follow_reordering(cache, history)
    return history


def keep_history(frame: Frame, y: Any) -> None:
    """Hand what a first call remembered to the cache that it made."""
    pending: dict[Any, Tensor] = frame.captured.get("pending") or {}
    made = y.get("past_key_values") if pending and hasattr(y, "keys") else None
    if made is not None and hasattr(made, "__dict__"):
        history_of(made).update(pending)


def _follow_reordering(cache: Any, history: dict[Any, Tensor]) -> None:
    plain = type(cache).reorder_cache  # compiled code can make a function again, and no bound method

    def reorder_cache(beam_idx: Tensor, *args: Any, **kwargs: Any) -> Any:
        for name, value in history.items():
            history[name] = value.index_select(0, beam_idx.to(value.device))
        return plain(cache, beam_idx, *args, **kwargs)

    cache.__dict__["_veneer_reorder"] = True
    cache.reorder_cache = reorder_cache


def child_name(name: str) -> str:
    """A module name for any adapter name: dots cannot stand in one."""
    if not isinstance(name, str) or not name.strip() or any(ord(c) < 32 for c in name) or len(name) > 200:
        raise BadOption(
            f"adapter name {name!r}: expected 1 to 200 printable characters.", next_step="choose another name"
        )
    return urllib.parse.quote(name, safe=" ").replace(".", "%2E")


__all__ = ["Host", "child_name"]
