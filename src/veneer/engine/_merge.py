"""Merging: write a weight edit into the weight and drop it.

Only weight edits and affine edits merge. Edits of outputs and context depend on the input, and stay beside the
model. The base weight is kept aside, not recomputed: subtracting an update in bfloat16 does not give W back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from veneer.edits import call
from veneer.errors import Unsupported

from ._attach import host_of
from ._dense import dense_delta
from ._host import Host
from ._program import Op, build, site_tensors
from ._swap import plain_class, twin
from ._weights import cut, paste, stored


@dataclass
class MergeReport:
    """What a merge did. Errors are of outputs on a probe batch, merged against attached, in the base's precision."""

    adapters: list[str]
    sites: dict[str, float] = field(
        default_factory=dict
    )  # site -> largest change lost to rounding, over the largest change
    max_abs_error: float | None = None
    relative_error: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "adapters": self.adapters, "max_abs_error": self.max_abs_error,
            "relative_error": self.relative_error, "sites": self.sites,
        }  # fmt: skip

    def __str__(self) -> str:
        worst = max(self.sites.items(), key=lambda s: s[1], default=("-", 0.0))
        lines = [f"merged {', '.join(self.adapters)} into {len(self.sites)} weights"]
        if self.max_abs_error is not None:
            lines.append(
                f"  outputs differ by at most {self.max_abs_error:.3g} (relative {self.relative_error:.3g})"
            )
        lines.append(f"  rounding loses at most {worst[1]:.3g} of the change, at {worst[0]}")
        return "\n".join(lines)


def why_not(adapter: Any) -> str:
    """The reason why an adapter cannot be merged; "" where it can."""
    for sp in adapter.plan.sites:
        if sp.site.port == "weight":
            continue
        if (
            sp.site.port in ("input", "output")
            and "affine" in sp.method.arguments
            and (
                sp.site.kind in ("linear", "conv1d")
                or (sp.site.port == "output" and sp.site.kind in ("conv", "norm"))
            )
        ):
            continue
        return f"{sp.method.key} edits the {sp.site.port} at '{sp.site.name}', which depends on the input"
    if adapter.of:
        return f"{adapter.method.key} combines other adapters"
    if not adapter.plan.sites:
        return f"{adapter.method.key} edits nothing"
    if adapter.method.facts.mergeable is False:
        return adapter.method.facts.reason or f"{adapter.method.key} does not merge"
    return ""


def merge(
    model: nn.Module,
    name: str | list[str] | None = None,
    *,
    probe: Mapping[str, Any] | None = None,
    requantise: bool = False,
    keep: bool = True,
) -> MergeReport:
    """Write adapters (default: the active ones) into the base's weights. `unmerge` gives every bit back.

    probe: a batch; its outputs before and after make the report's error. keep=False drops the bare weights and the
    adapters: the merge is final. requantise: needed where the base is quantised, since that rounds.
    Raises Unsupported with the reason where a method does not merge.
    """  # fmt: skip
    host = host_of(model)
    names = [name] if isinstance(name, str) else list(name if name is not None else host.active)
    if not names:
        raise Unsupported(
            "no adapter is active, so there is nothing to merge.", next_step="veneer.merge(model, name)"
        )
    for n in names:
        reason = why_not(host.adapter(n))
        if reason:
            raise Unsupported(
                f"adapter '{n}' does not merge: {reason}.",
                next_step="keep it attached; serving does not need a merge",
            )
        if n in host.merged:
            raise Unsupported(f"adapter '{n}' is merged already.", next_step="veneer.unmerge(model)")
        _check_affine(host, n, names)
        if any("at" in sp.method.arguments.get("derive", ()) for sp in host.adapter(n).plan.sites):
            raise Unsupported(
                f"adapter '{n}' does not merge: its weights depend on the rows.",
                next_step="keep it attached; serving does not need a merge",
            )
    before = _outputs(model, host, names, probe)
    report = MergeReport(names)
    active, kept, codes = host.active, dict(host.kept), dict(host.kept_codes)
    host.set_active(tuple(n for n in active if n not in names))
    host.merged += names
    try:
        _write(host, report, requantise)
    except Exception:  # nothing was written yet: weights change after all of them are formed
        host.merged = [n for n in host.merged if n not in names]
        host.kept, host.kept_codes = kept, codes
        host.set_active(active)
        raise
    if before is not None:
        after = _outputs(model, host, [], probe)
        assert after is not None
        report.max_abs_error = float((after - before).abs().max())
        report.relative_error = report.max_abs_error / max(float(before.abs().max()), 1e-30)
    if not keep:
        host.kept.clear()
        host.kept_codes.clear()
        for n in list(host.merged):
            host.merged.remove(n)
            host.drop(n)
        if not host.names:
            host.leave()
    return report


def unmerge(model: nn.Module) -> list[str]:
    """Give the bare weights back, bit for bit; the adapters are active again. Returns their names."""
    host = host_of(model)
    names, host.merged = list(host.merged), []
    for (module, parameter), W in host.kept.items():
        _set(host.module(module), parameter, W)
    for (
        module,
        codes,
    ) in host.kept_codes.items():  # a quantised weight goes back by its codes, not by rounding again
        for name, value in codes.items():
            getattr(host.module(module), name).data.copy_(value)
    host.kept.clear()
    host.kept_codes.clear()
    host._programs.clear()
    host.set_active((*host.active, *names))
    return names


@torch.no_grad()
def _write(host: Host, report: MergeReport, requantise: bool) -> None:
    """Every touched weight: the bare one plus all merged changes, formed in float32 and rounded once."""
    ops: dict[tuple[str, str], list[Op]] = {}
    for n in host.merged:
        adapter = host.adapter(n)
        dtype = host.__dict__.get("_dtype")
        host.__dict__["_dtype"] = torch.float64 if host.dtype == torch.float64 else torch.float32
        try:
            tensors = site_tensors(host, adapter, training=False)
        finally:
            host.__dict__["_dtype"] = dtype
            adapter._cached.clear()
        for sp, t in zip(adapter.plan.sites, tensors):
            ops.setdefault((sp.site.module, sp.site.parameter), []).append(Op(sp, t, None, False, adapter))
            shift = _bias_change(Op(sp, t, None, False, adapter), host)
            if shift is not None:
                ops.setdefault((sp.site.module, sp.site.bias), [])
    changes: dict[tuple[str, str], Tensor] = {}
    for (module_name, parameter), members in ops.items():
        module = host.module(module_name)
        key = (module_name, parameter)
        bare = host.kept.get(key)
        if bare is None:
            now = stored(module, parameter)
            if now is None:
                continue
            if parameter == "weight" and hasattr(module, "dense_weight"):
                _check_quantised(module_name, requantise)
                host.kept_codes[module_name] = {n: b.detach().clone() for n, b in module.named_buffers()}
            bare = host.kept[key] = now.detach().clone()
        wide = bare.to(torch.float64) if bare.dtype == torch.float64 else bare.float()
        new = wide
        if any(op.site.kind == "norm" and op.site.port == "output" for op in members):
            _check_norm_scales(module, module_name)
        for op in members:
            new = _changed(op, wide, new)
        for op in (
            o
            for many in ops.values()
            for o in many
            if o.site.module == module_name and o.site.bias == parameter
        ):
            shift = _bias_change(op, host)
            if shift is not None:
                new = new + shift.to(new.dtype)
        changes[key] = new
    for key, new in changes.items():
        module, bare = host.module(key[0]), host.kept[key]
        _set(module, key[1], new.to(bare.dtype))
        written = stored(module, key[1]).float()
        change = float((new.float() - bare.float()).abs().max())
        lost = float((written - new.float()).abs().max())
        site = next((o.site.name for o in ops[key]), f"{key[0]}.{key[1]}")
        report.sites[site] = lost / change if change > 0 else 0.0
    host._programs.clear()


def _changed(op: Op, bare: Tensor, now: Tensor) -> Tensor:
    """The stored parameter with one more edit. bare, now: as stored."""
    site = op.site
    W = cut(bare, site)
    if site.port == "weight":
        return paste(now, cut(now, site) + dense_delta(op.plan, op.t, W).to(now.dtype), site)
    scale, _ = call(op.method, "affine", op.t, {"at": None})
    ahead = [1] * (W.dim() - 1)  # the other axes of a matrix or a kernel
    factor = scale.reshape(-1, *ahead) if site.port == "output" else scale.reshape(1, -1)
    return paste(now, cut(now, site) + (factor.to(now.dtype) - 1) * W, site)


def _check_norm_scales(module: nn.Module, name: str) -> None:
    """A norm whose output is its weight times something takes a scale; one that adds 1 to it (Gemma) does not."""
    if plain_class(module).__module__.startswith("torch.nn."):
        return
    own = dict(module.named_parameters(recurse=False))
    weight = own.get("weight")
    width = weight.shape[-1] if weight is not None else 1
    x = torch.linspace(-1, 1, 2 * width, device=weight.device if weight is not None else None)
    x = x.reshape(1, 2, width).to(weight.dtype if weight is not None else x.dtype)
    with torch.no_grad():
        y = twin(module, {n: torch.zeros_like(p) for n, p in own.items()})(x)
    if weight is None or bool((y != 0).any()):
        raise Unsupported(
            f"'{name}' is a norm whose output is not its weight times something: a scale does not merge.",
            next_step="leave the norms out (sites='linear'), or keep the adapter beside the model",
        )


def _bias_change(op: Op, host: Host) -> Tensor | None:
    """What an edit of the weight adds to the bias: affine edits scale it, some methods train one."""
    site = op.site
    b = host.bias(site) if site.bias else None
    if site.port == "weight":
        if not hasattr(op.method, "bias_delta"):
            return None
        change = op.method.bias_delta(op.t)
        if not isinstance(change, Tensor):
            return None
        if b is None:
            raise Unsupported(
                f"'{site.name}' has no bias, and {op.method.key} adds one, so it does not merge there.",
                next_step=f"exclude={site.name!r} when it is attached, or keep it attached",
            )
        return _wide_bias(change, site, host)
    if "affine" not in op.method.arguments:
        return None
    scale, shift = call(op.method, "affine", op.t, {"at": None})
    change = None
    if site.port == "output" and b is not None:
        bare = host.kept.get((site.module, site.bias), b)
        bare = bare if not site.ranges or bare is b else torch.cat([bare[i:j] for i, j in site.ranges])
        change = (scale.reshape(-1) - 1) * bare.to(scale.dtype)
    if shift is not None:
        add = (
            shift.reshape(-1)
            if site.port == "output"
            else cut(host.bare(site), site).to(shift.dtype) @ shift.reshape(-1)
        )
        if b is None and bool((add != 0).any()):
            raise Unsupported(
                f"'{site.name}' has no bias to hold the shift of {op.method.key}.",
                next_step=f"exclude={site.name!r} when it is attached, or keep it attached",
            )
        change = add if change is None else change + add
    return None if change is None or b is None else _wide_bias(change, site, host)


def _wide_bias(change: Tensor, site: Any, host: Host) -> Tensor:
    if not site.ranges:
        return change
    whole = torch.zeros_like(stored(host.module(site.module), site.bias), dtype=change.dtype)
    start = 0
    for i, j in site.ranges:
        whole[i:j] = change[start : start + j - i]
        start += j - i
    return whole


def _check_affine(host: Host, name: str, names: list[str]) -> None:
    """An affine edit of an output scales what live weight edits add; merged alone it would not."""
    mine = {
        (sp.site.module, sp.site.port) for sp in host.adapter(name).plan.sites if sp.site.port != "weight"
    }
    for other in (*host.active, *names):
        if other == name:
            continue
        for sp in host.adapter(other).plan.sites:
            if mine and any(m == sp.site.module for m, _ in mine):
                raise Unsupported(
                    f"adapter '{name}' scales what '{other}' adds at '{sp.site.name}'; merging would change that.",
                    next_step=f"veneer.activate(model, '{name}') alone, then merge",
                )


def _check_quantised(name: str, requantise: bool) -> None:
    if not requantise:
        raise Unsupported(
            f"'{name}' is quantised: merging rounds W + dW to its grid again, which changes the model.",
            next_step="veneer.merge(model, ..., requantise=True), or dequantise the base first",
        )


def _set(module: nn.Module, parameter: str, value: Tensor) -> None:
    owner: Any = module
    *path, last = parameter.split(".")
    for step in path:
        owner = getattr(owner, step)
    with torch.no_grad():
        if last == "weight" and hasattr(owner, "requantise_"):
            owner.requantise_(value)
        else:
            getattr(owner, last).copy_(value)  # not `.data`: copies of the weight go by its version


@torch.no_grad()
def _outputs(
    model: nn.Module, host: Host, names: list[str], probe: Mapping[str, Any] | None
) -> Tensor | None:
    if probe is None:
        return None
    training = model.training
    model.eval()
    active = host.active
    try:
        host.active = tuple(dict.fromkeys((*active, *names)))
        y = model(**probe)
    finally:
        host.active = active
        model.train(training)
    if isinstance(y, Tensor):
        return y.float()
    return (y["logits"] if "logits" in y else y[0]).float()


__all__ = ["MergeReport", "build", "merge", "unmerge", "why_not"]
