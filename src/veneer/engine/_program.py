"""Programs: for one composition of rows, which edits run at which module.

Two forms with the same functions. *Grouped* (eager): each adapter touches its own rows only, several adapters of one
shape at once where their functions broadcast. *Banked* (under torch.compile): every resident adapter of a shape is
stacked and read by a slot a row, slot 0 being the bare row, so that one graph serves every switch and shuffle.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from veneer.edits import Tensors, call
from veneer.errors import Unsupported

from . import _forms, _low_rank
from ._adapter import Adapter
from ._adds import Adds, Piece
from ._forms import is_shift
from ._frame import Names
from ._low_rank import LowRank
from ._plan import SitePlan
from ._residual import reads
from ._rows import Rows
from ._weights import cut

LATER: Any = object()
PORTS = ("input", "weight", "output", "attention", "around", "tokens", "exit")


class Op:
    """One edit at one site for some rows of the call. `rows` None is the whole batch."""

    __slots__ = (
        "adapter",
        "adds_alone",
        "chosen",
        "count",
        "level",
        "live",
        "low",
        "mapped",
        "members",
        "method",
        "plan",
        "port",
        "rowed",
        "rows",
        "singles",
        "site",
        "still",
        "t",
    )

    def __init__(
        self, plan: SitePlan, t: Tensors, rows: Rows | None, rowed: bool, adapter: Adapter, count: int = 0
    ) -> None:
        self.plan, self.t, self.rows, self.rowed, self.adapter = plan, t, rows, rowed, adapter
        self.count = count  # rowed: how many rows its tensors have
        self.method, self.site, self.port = plan.method, plan.site, plan.site.port
        self.members: tuple[Op, ...] = ()
        self.level = 0  # place in the stack of its rows
        self.singles: list[Tensors] = []  # rowed: the tensors of each row's adapter by themselves
        self.live: Tensor | None = None  # banked form: (rows, 1, 1) bool
        self.low: Any = None  # (rows, tokens, in) -> what the edit adds: in place of `branch`
        self.mapped: frozenset[str] = frozenset()  # the `vmap` form: the tensors that rows have of their own
        self.still = False  # its tensors are the adapter's kept ones: no step is about to move them
        self.adds_alone = adds_alone(plan)
        self.chosen = False  # whether a table of measurements chose to go adapter by adapter

    @property
    def by_row(self) -> bool:
        """Whether tensors have a row axis: several adapters, or one that makes them from facts of the rows."""
        return self.rowed or "at" in self.method.arguments.get("derive", ())

    def for_rows(self, rows: Rows, kept: Sequence[tuple[int, int]]) -> Op:
        """The op on some of its rows. kept: (place among the new rows, place among its own)."""
        t = self.t
        if self.rowed:
            chosen = [j for _, j in kept]

            def take(n: str, v: Any) -> Any:
                by_row = n in self.mapped or (
                    isinstance(v, Tensor) and v.dim() >= 3 and v.shape[0] == self.count
                )
                return v[torch.tensor(chosen, device=v.device)] if by_row else v

            t = Tensors({n: take(n, v) for n, v in t.items()})
        made = Op(self.plan, t, None if rows.whole else rows, self.rowed, self.adapter, len(kept))
        made.members, made.live, made.level, made.still = self.members, self.live, self.level, self.still
        made.mapped = self.mapped
        if self.low is not None:
            made.low = self.low.for_rows([j for _, j in kept])
        made.singles = [self.singles[j] for _, j in kept] if self.singles else []
        return made

    def one_by_one(self, total: int) -> list[Op]:
        """A rowed op as one op a row, for forms that serve a single adapter."""
        mine = self.rows.indices if self.rows is not None else tuple(range(total))
        made = [
            Op(self.plan, t, Rows([row], total), False, self.adapter) for row, t in zip(mine, self.singles)
        ]
        for op in made:
            op.level = self.level
        return made


class SiteOps:
    """What runs at one module, by port, in the order of the stack of adapters."""

    __slots__ = (
        "adds",
        "around",
        "attention",
        "capture",
        "exit",
        "input",
        "output",
        "tokens",
        "turned",
        "weight",
    )

    def __init__(self) -> None:
        self.input: list[Op] = []
        self.weight: list[Op] = []
        self.output: list[Op] = []
        self.attention: list[Op] = []
        self.around: list[Op] = []
        self.tokens: list[Op] = []
        self.exit: list[Op] = []
        self.capture = False
        self.adds: Any = None  # a settled program's low-rank edits, in place of `weight`; LATER: not yet made
        self.turned = False  # the module is given (tokens, rows, width): edits see it turned round


Program = dict[str, SiteOps]


def build(
    host: Any,
    rows: Sequence[Names] | Names,
    training: bool,
    find: Callable[[str], Adapter] | None = None,
    form: str | None = None,
    tokens: int = 1,
) -> Program:
    """The program for a whole batch under one stack of names, or for a stack of names a row.

    find: adapters by name; default: those of the host. form: one of FORMS for all rows; None: the best of what is
    known. tokens: of a row, for that choice.
    """
    find = find or host.adapter
    program: Program = {}
    if isinstance(rows, tuple) and all(isinstance(n, str) for n in rows):
        for level, name in enumerate(rows):
            _add(program, host, [(find(name), None)], training, level=level)
        return _settled(program, training, form)
    total = len(rows)
    for level in range(max((len(names) for names in rows), default=0)):
        by_name: dict[str, list[int]] = {}
        for i, names in enumerate(rows):
            if level < len(names):
                by_name.setdefault(names[level], []).append(i)
        banks: dict[Any, list[tuple[Adapter, Rows | None]]] = {}
        for name, indices in by_name.items():
            adapter = find(name)
            chosen: Rows | None = Rows(indices, total)
            if chosen is not None and chosen.whole:
                chosen = None
            banks.setdefault(id(adapter.plan) if _can_bank(adapter) else name, []).append((adapter, chosen))
        for members in banks.values():
            _add(program, host, members, training, total, level, form, tokens)
    return _settled(program, training, form)


def _settled(program: Program, training: bool, form: str | None) -> Program:
    """Sites whose edits all add low-rank products will add them in place, once they are called."""
    if training or torch.is_grad_enabled() or form is not None:
        return program
    for at in program.values():
        alone = len(at.weight) and not (at.capture or any(getattr(at, p) for p in PORTS if p != "weight"))
        if alone and all(op.adds_alone and not (op.site.ranges or op.chosen) for op in at.weight):
            at.adds = LATER
    return program


@torch.no_grad()
def adds_of(ops: Sequence[Op]) -> Adds | None:
    """What the ops of one site add, in place; None where one of them is more than a low-rank product."""
    pieces, total = [], 0
    for op in ops:
        low = op.low
        if not op.rowed:
            how = _low_rank.factors(op.plan, op.t)
            if not how or op.method.low_rank(op.t) is None:  # type: ignore[attr-defined]
                return None
            low = LowRank(
                op.method, [op.t], [0] * (len(op.rows.indices) if op.rows else 1), how == "together"
            )
        if not isinstance(low, LowRank):
            return None
        total = op.rows.total if op.rows is not None else op.count or total
        rows: dict[int, list[int]] = {}
        for row, slot in zip(op.rows.indices if op.rows is not None else range(op.count), low.slots):
            rows.setdefault(slot, []).append(row)
        rank = low.pair(0)[0].shape[0]
        if op.rows is None and not op.rowed:
            pieces.append(Piece(low, 0, None, op.level, rank))
        pieces += [Piece(low, slot, tuple(mine), op.level, rank) for slot, mine in rows.items()]
    n_out, n_in = ops[0].site.shape
    return Adds(pieces, total, n_in, n_out)


def _can_bank(adapter: Adapter) -> bool:
    """Adapters of one plan share a bank, where their tensors have the shapes that the plan declares."""
    return not adapter.of and not adapter.frozen_own


def _add(
    program: Program,
    host: Any,
    members: list[tuple[Adapter, Rows | None]],
    training: bool,
    total: int = 0,
    level: int = 0,
    form: str | None = None,
    tokens: int = 1,
) -> None:
    first = members[0][0]
    tensors = [site_tensors(host, a, training) for a, _ in members]
    slots = rows = None
    if len(members) > 1 or (form not in (None, "segments") and total and _can_bank(first)):
        indices = sorted(
            (i, slot) for slot, (_, r) in enumerate(members) for i in (r.indices if r else range(total))
        )
        rows = Rows([i for i, _ in indices], total)
        slots = torch.tensor([slot for _, slot in indices], device=host.device)
        rows = None if rows.whole else rows
    for i, sp in enumerate(first.plan.sites):
        here = [t[i] for t in tensors]
        way = "segments"
        if slots is not None:
            way = _forms.choose(sp, here, form, training, host.forms, (len(slots), tokens))
        if slots is None or way == "segments":
            ops = [Op(sp, t, r, False, a) for (a, r), t in zip(members, here)]
        else:
            shared = {n for n, key in first.plan.keys[i].items() if key in first.frozen_shared}
            own = _forms.own_names(here, shared)
            free = way == "bmm" and form is None and not training and not torch.is_grad_enabled()
            how = _low_rank.factors(sp, here[0]) if free else ""
            plain = not how and way not in _low_rank.FORMS
            t = _forms.stacked(here, slots, own, way != "vmap") if plain else Tensors()
            op = Op(sp, t, rows, True, first, len(slots))
            op.singles = [here[slot] for slot in slots.tolist()]
            if way == "vmap":
                op.mapped = own
            if how:
                op.low = LowRank(sp.method, here, slots.tolist(), how == "together")
            elif way in _low_rank.FORMS:
                op.low = _low_rank.FORMS[way]([sp.method.low_rank(t) for t in here], slots)  # type: ignore[attr-defined]
            ops = [op]
        for op in ops:
            op.chosen = host.forms is not None and slots is not None and way == "segments"
            op.level, op.still = level, not op.rowed and op.adapter.keeps(i, op.t)
            if op.adapter.of:
                op.members = _members(host, op, training)
            place(program, op)


def banks_of(host: Any, rows: Any) -> list[tuple[dict[str, int], Tensor]]:
    """For compiled code: the live banks of a composition, each with slots (levels, rows); slot 0 is the bare row.

    A bank is all resident adapters of one plan, so that a switch among them changes a tensor and nothing else. For
    whole batches there is one column, which broadcasts.
    """
    table = [rows] if isinstance(rows, tuple) else list(rows)
    levels = max([0, *[len(names) for names in table]])
    plans: dict[int, None] = {}
    for names in table:
        plans.update({id(host.adapter(n).plan): None for n in names})
    banks = []
    for key in sorted(plans, key=list(host.members).index):
        slot = host.members[key]
        numbers = [[slot.get(n[level], 0) if level < len(n) else 0 for n in table] for level in range(levels)]
        leaves = host.adapter(next(iter(slot))).leaves()
        device = leaves[0].device if leaves else None
        banks.append((slot, torch.tensor(numbers, device=device).reshape(levels, len(table))))
    return banks


def build_banked(
    host: Any, banks: Sequence[tuple[dict[str, int], Tensor]], total: int, training: bool
) -> Program:
    """The program in the banked form: all `total` rows run, and `live` chooses."""
    program: Program = {}
    levels = max([0, *[slots.shape[0] for _, slots in banks]])
    read = []
    for members, slots in banks:
        adapters = [host.adapter(n) for n in members]
        tensors = [site_tensors(host, a, training) for a in adapters]
        # By slot; where an adapter left, another one's fill the place that no row names.
        by_slot = [tensors[0]] * max(members.values())
        for slot, made in zip(members.values(), tensors):
            by_slot[slot - 1] = made
        read.append((list(zip(members.values(), adapters)), by_slot, slots))
    for level in range(levels):
        for adapters, tensors, slots in read:
            mine = slots[level]
            mine = (
                mine.expand(total) if mine.shape[0] == 1 else mine.repeat_interleave(total // mine.shape[0])
            )
            for i, sp in enumerate(adapters[0][1].plan.sites):
                if _forms.may_broadcast(sp):
                    t = _forms.stacked([t[i] for t in tensors], (mine - 1).clamp(min=0))
                    op = Op(sp, t, None, True, adapters[0][1], mine.shape[0])
                    op.live, op.level = mine > 0, level
                    place(program, op)
                    continue
                for slot, adapter in adapters:
                    op = Op(sp, tensors[slot - 1][i], None, False, adapter)
                    op.live, op.level = mine == slot, level
                    op.members = _members(host, op, training) if adapter.of else ()
                    place(program, op)
    return program


def place(program: Program, op: Op) -> None:
    site = op.site
    at = program.setdefault(site.module, SiteOps())
    getattr(at, op.port).append(op)
    first = op.adapter.plan.anatomy.tokens_first
    if site.module in first:
        _turn(at, op)
    for each in (op, *op.members):
        for name in reads(each.adapter.plan.anatomy.facts, each.method, site):
            source = program.setdefault(name, SiteOps())
            source.capture = True
            source.turned = name in first


def _turn(at: SiteOps, op: Op) -> None:
    """Where a module is given (tokens, rows, width): layers that treat tokens alike can run turned round, others
    serve whole batches alone."""
    at.turned = at.turned or _can_turn(op)
    stiff = [o for port in PORTS for o in getattr(at, port) if not _can_turn(o)]
    if stiff and (
        at.turned or any(o.port != "weight" or o.rows is not None or o.live is not None for o in stiff)
    ):
        what = "all of it" if stiff[0].port == "weight" else f"its {stiff[0].port}"
        raise Unsupported(
            f"'{op.site.module}' is given tokens before rows, (tokens, rows, width), and '{stiff[0].adapter.name}' "
            f"edits {what}, which is there for whole batches alone.",
            next_step=f"exclude={op.site.module!r}, or a base that is built with batch_first=True",
        )


def _can_turn(op: Op) -> bool:
    """Whether the edit runs on (rows, tokens, width) in a module that is given them the other way round."""
    layer = op.port == "weight" and op.site.kind in ("linear", "conv1d", "embedding", "norm")
    return layer or op.port in ("input", "output")


def adds_alone(sp: SitePlan) -> bool:
    """A weight edit of a plain linear layer that adds to its output and reads its input alone."""
    site, branch = sp.site, sp.method.arguments.get("branch")
    if branch is None or "y" in branch or site.kind not in ("linear", "conv1d"):
        return False
    return not site.experts and len(site.shape) == 2


def by_rows(ops: Sequence[Op], total: int) -> list[tuple[Rows, list[Op]]]:
    """Rows that the same ops touch, each group once, with those ops in their order."""
    touched: dict[int, list[Op]] = {}
    for op in ops:
        for row in range(total) if op.rows is None else op.rows.indices:
            touched.setdefault(row, []).append(op)
    groups: dict[tuple[int, ...], tuple[list[int], list[Op]]] = {}
    for row in sorted(touched):
        groups.setdefault(tuple(id(op) for op in touched[row]), ([], touched[row]))[0].append(row)
    return [(Rows(rows, total), members) for rows, members in groups.values()]


def narrow(program: Program, rows: Rows, module: str) -> Program:
    """The program below `module` for some rows of the call, with the very tensors of the whole: noise included."""
    place_of = {row: j for j, row in enumerate(rows.indices)}
    small: Program = {}
    for name, ops in program.items():
        if module and not name.startswith(module + "."):
            continue
        made = small[name] = SiteOps()
        made.capture, made.turned = ops.capture, ops.turned
        for port in PORTS:
            for op in getattr(ops, port):
                mine = op.rows.indices if op.rows is not None else tuple(range(rows.total))
                kept = [(place_of[row], j) for j, row in enumerate(mine) if row in place_of]
                if kept:
                    getattr(made, port).append(
                        op.for_rows(Rows([p for p, _ in kept], len(rows.indices)), kept)
                    )
    return small


def _members(host: Any, op: Op, training: bool) -> tuple[Op, ...]:
    found = []
    for name in op.adapter.of:
        member = host.adapter(name)
        made = site_tensors(host, member, training=False)
        for i, sp in enumerate(member.plan.sites):
            if sp.site.name == op.site.name and sp.site.port == op.site.port:
                found.append(Op(sp, made[i], None, False, member))
    return tuple(found)


def site_tensors(host: Any, adapter: Adapter, training: bool) -> list[Tensors]:
    """Tensors of each site plan, what `derive` makes included where it does not depend on the rows."""
    adapter.check_prepared()
    if not torch.compiler.is_compiling() and host.pages.limit is not None:
        with host.lock:
            host.pages.use([adapter])
    made = adapter.site_tensors(host.shared, host.dtype, training)
    cached = not torch.compiler.is_compiling() and adapter._cached.get("tensors") is made
    if cached and "derived" in adapter._cached:
        return adapter._cached["derived"]
    derived = []
    for sp, t in zip(adapter.plan.sites, made):
        if "derive" in sp.method.arguments and "at" not in sp.method.arguments["derive"]:
            t = t.with_(**call(sp.method, "derive", t, {"W": host.weight(sp.site), "at": None}))
        derived.append(t)
    if cached:
        adapter._cached["derived"] = derived
    return derived


__all__ = [
    "Op", "Program", "SiteOps", "banks_of", "build", "build_banked", "cut", "is_shift", "place", "site_tensors",
]  # fmt: skip
