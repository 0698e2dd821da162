"""A subject: one method on one tiny base, with what laws ask of it: models, adapters, outputs, losses.

Every tensor of an adapter is randomised first, trained or not zero: a zero update passes anything.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from veneer import engine
from veneer.edits import Method, build
from veneer.errors import BadOption, NoSiteFound, Unsupported

from ._law import DoesNotApply
from .bases import Content, TinyBase

Names = Any  # an adapter's name, None, or a list of names on top of one another
Options = Mapping[str, Any]
ENGINE = ("exclude", "layers", "patterns", "whole", "allow_partial", "total_steps", "modules_to_save")
STEPS = 10  # of a schedule, for methods that need to know
SPREAD = 0.2  # standard deviation of what is added to starting values


class Subject:
    """A method on a base.

    method: a class or an instance; options: its hyperparameters, and attach's own options; reference: what
    the law of the equation compares with, place: how a reference's case becomes one of this method (see
    laws/equation).
    """

    def __init__(
        self,
        method: Any,
        base: TinyBase,
        options: Options | None = None,
        reference: Any = None,
        place: Any = None,
    ) -> None:
        self.base, self.reference, self.place = base, reference, place
        options = dict(options or {})
        self.extra_inputs: Callable[..., dict[str, Tensor]] | None = options.pop("inputs", None)
        self.attach_options = {k: options.pop(k) for k in list(options) if k in ENGINE}
        self.given = method
        self.method: Method = build(method, **options)
        if not self.method.ports:  # it trains the task's head and nothing else
            self.attach_options.setdefault("whole", self._head())
        self.method = self._placed(self.method)
        if getattr(self.method, "needs_total_steps", False):
            self.attach_options.setdefault("total_steps", STEPS)

    @property
    def key(self) -> str:
        return self.method.key

    @property
    def facts(self) -> Any:
        return self.method.facts

    # -- does it apply ---------------------------------------------------------------------------------------

    def _placed(self, method: Method) -> Method:
        """The method at its own sites, or where it has none here at the base's."""
        self.reason = self._why_not(method)
        if not self.reason or len(method.ports) != 1 or method.ports[0] not in self.base.sites:
            return method
        elsewhere = method.changed(sites=self.base.sites[method.ports[0]])
        reason = self._why_not(elsewhere)
        if reason:
            return method
        self.reason = ""
        return elsewhere

    def _head(self) -> tuple[str, ...]:
        head = engine.read(_bare(self.base.name)).facts.head
        return (head,) if head else ()

    def _why_not(self, method: Method) -> str:
        """Why the method says nothing on this base; "" where it has sites and something to train there."""
        engine_options = {k: v for k, v in self.attach_options.items() if k != "total_steps"}
        try:
            found = engine.plan(_bare(self.base.name), method, **engine_options)
        except (NoSiteFound, Unsupported) as e:
            return e.what
        if not self.base.sides and any(n.endswith("_ids") for n in getattr(method, "inputs", ())):
            return f"{method.key} reads token ids, and this base has none"
        if not found.sites:
            return f"{method.key} edits nothing here"
        if method.facts.data and not self.base.labelled:
            return f"{method.key} starts from {method.facts.data}, and this base has no loss"
        return ""

    def check_applies(self) -> None:
        if self.reason:
            raise DoesNotApply(self.reason)

    # -- models and adapters ---------------------------------------------------------------------------------

    def model(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        return self.base.model(dtype)

    def attach(
        self,
        model: nn.Module,
        name: str = "a",
        seed: int = 0,
        *,
        method: Method | None = None,
        random: bool = True,
        spread: float = SPREAD,
        like: Any = None,
    ) -> Any:
        """Attach the method (or `method`) under a name, randomised, or with the tensors of the adapter `like`."""
        m = method or self.method
        options: dict[str, Any] = {**self.attach_options} if m.key == self.key else {}
        if getattr(m, "needs_members", False):
            options["of"] = self._members(model, m)
        if like is not None:
            random, options["values"] = False, {**like.named(), **own_frozen(like)}
        elif m.facts.data:
            options["data"] = [self.labelled(self.base.contents(4, seed=99 + seed))]
        made = engine.attach(model, m, name, seed=seed, **options)
        if random:
            randomise(made, seed, spread)
        return made

    def _members(self, model: nn.Module, m: Method) -> tuple[str, ...]:
        names = ("member.1", "member.2")
        for i, name in enumerate(names):
            if name not in engine.adapters(model):
                member = engine.attach(model, "serial_adapter", name, sites=m.sites, activate=False)
                randomise(member, 50 + i)
        return names

    @functools.cached_property
    def other_size(self) -> Method | None:
        """The same method of another size: another rank, another length. None where it has no such knob."""
        for f in dataclasses.fields(self.method):  # type: ignore[arg-type]
            if not f.metadata.get("size"):
                continue
            now = getattr(self.method, f.name)
            half = now // 2 if isinstance(now, int) else now / 2
            for value in (half - 1 if isinstance(now, int) else half, half, now + 1, now * 2, 4):
                try:
                    m = self.method.changed(**{f.name: value})
                except BadOption:
                    continue
                if self._size(m) not in (None, self._size(self.method)):
                    return m
        return None

    def _size(self, m: Method) -> int | None:
        try:
            return engine.plan(_bare(self.base.name), m).trainable_parameters
        except (NoSiteFound, Unsupported, BadOption):
            return None

    @functools.cached_property
    def partner(self) -> Method | None:
        """Another method that has sites here: what a mixed batch mixes with."""
        for key in ("lora", "serial_adapter"):
            for sites in (None, *self.base.sites.values()):
                m = build(key, **({} if sites is None else {"sites": sites}))
                if key != self.key and self._size(m):
                    return m
        return None

    @functools.cached_property
    def dense(self) -> Method | None:
        """Another method that edits the same weights, by a dense W', where this one edits weights."""
        if self.method.ports != ("weight",) or self.key == "oft":
            return None
        m = build("oft", sites=self.method.sites)
        try:
            return m if self._size(m) else None
        except Exception:
            return None

    # -- calls -----------------------------------------------------------------------------------------------

    def inputs(
        self,
        contents: Sequence[Content],
        dtype: torch.dtype = torch.float64,
        side: str = "right",
        extra: int = 0,
    ) -> dict[str, Tensor]:
        """The forward's keyword arguments, and what the method asks for beside them."""
        made: dict[str, Any] = self.base.inputs(contents, dtype, side, extra)
        return {**made, **self.asked(contents)}

    def asked(self, contents: Sequence[Content]) -> dict[str, Tensor]:
        """Inputs that the method declares (`inputs = (...)`), made from each row alone, and its tasks."""
        if self.extra_inputs is not None:
            return self.extra_inputs(contents)
        found = {}
        for i, name in enumerate(getattr(self.method, "inputs", ())):
            if name.endswith("_ids") and self.base.sides:
                found[name] = torch.stack([c["ids"].roll(i)[:3] for c in contents])
            elif name.endswith("_mask") and self.base.sides:
                found[name] = torch.ones(len(contents), 3, dtype=torch.bool)
        if getattr(self.method, "tasks", 1) > 1:
            tasks = self.method.tasks  # type: ignore[attr-defined]
            found["tasks"] = torch.stack([c["label"] % tasks for c in contents])
        return found

    def labelled(self, contents: Sequence[Content]) -> dict[str, Tensor]:
        made = self.inputs(contents)
        return {**made, **self.base.labels(contents, made)}

    def outputs(
        self, model: nn.Module, contents: Sequence[Content], *, dtype: torch.dtype = torch.float64,
        side: str = "right", extra: int = 0, states: bool = True,
    ) -> list[Tensor]:  # fmt: skip
        """What each row gives, padding left out; states=False reads an encoder's logits alone."""
        inputs: dict[str, Any] = self.base.inputs(contents, dtype, side, extra)
        if (
            "veneer" in model._modules
        ):  # a base that nothing is attached to knows nothing of an adapter's inputs
            inputs |= self.asked(contents)
        return self.base.read(model(**inputs, **(self.base.flags if states else {})), inputs)

    def evaluated(self, model: nn.Module, contents: Sequence[Content], **layout: Any) -> list[Tensor]:
        """`outputs` without gradients."""
        with torch.no_grad():
            return self.outputs(model, contents, **layout)

    def alone(self, model: nn.Module, names: Names, content: Content) -> Tensor:
        """One row by itself, unpadded, through its adapters as a whole batch."""
        with engine.active(model, list(names) if isinstance(names, tuple) else names):
            return self.evaluated(model, [content])[0]

    def losses(self, model: nn.Module, contents: Sequence[Content], **layout: Any) -> list[Tensor]:
        """A loss for each row, to which every real output contributes."""
        return [(row * weights_like(row)).sum() for row in self.outputs(model, contents, **layout)]

    @contextmanager
    def training(self, model: nn.Module) -> Iterator[None]:
        model.train()
        try:
            yield
        finally:
            model.eval()


def weights_like(row: Tensor) -> Tensor:
    """Fixed weights of a row's outputs."""
    draw = torch.Generator().manual_seed(row.numel())
    return torch.randn(row.shape, generator=draw, dtype=torch.float64).to(row.dtype) / row.numel() ** 0.5


@torch.no_grad()
def randomise(adapter: Any, seed: int = 0, spread: float = SPREAD) -> None:
    """Move every trained tensor of an adapter off its start, onto its constraint where it has one."""
    draw = torch.Generator().manual_seed(1000 + seed)
    for view in adapter.named().values():
        noise = torch.randn(view.shape, generator=draw, dtype=torch.float64)
        view.add_(spread * noise.to(view.dtype))
    for leaf in adapter.leaves():
        torch.autograd.graph.increment_version(leaf)
    adapter._cached.clear()
    adapter.project()


def own_frozen(adapter: Any) -> dict[str, Tensor]:
    """Frozen tensors that no seed makes again, by key."""
    return {key: getattr(adapter, buffer) for key, buffer in adapter.frozen_own.items()}


def gradients(adapter: Any) -> dict[str, Tensor]:
    """Entry -> its gradient; zeros where a leaf has none."""
    found = {k: v.clone() for k, v in adapter.gradients().items()}
    return {k: found.get(k, torch.zeros_like(v)) for k, v in adapter.named().items()}


def clear(adapter: Any) -> None:
    for leaf in adapter.leaves():
        leaf.grad = None


def bits(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of the base, copied; nothing that sits under `veneer`."""
    return {k: v.clone() for k, v in model.state_dict().items() if not k.startswith("veneer.")}


@functools.cache
def _bare(name: str) -> nn.Module:
    """A model to plan on: it carries a host, so that its anatomy is read once."""
    from . import bases

    model = bases.get(name).model()
    engine.host_of(model, make=True)
    return model


quiet = nullcontext
