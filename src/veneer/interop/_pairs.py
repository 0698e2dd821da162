"""LoRA pairs on their way out: one scale * B A for each parameter, whatever the sites that edit it look like."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from veneer.anatomy import Site
from veneer.engine._plan import SitePlan
from veneer.engine._weights import features
from veneer.errors import Unsupported

from ._converter import OWN_FORM, Writing, whole
from ._parameters import is_swapped


@dataclass
class Pair:
    """What is written at one parameter: scale * B A. A: (rank, in, ...), B: (out, rank); experts in front."""

    site: Site
    A: Tensor
    B: Tensor
    scale: float
    given_alpha: float | None = None  # where one site is written as it is
    magnitude: Tensor | None = None
    bias: Tensor | None = None
    base_bias: Tensor | None = None

    @property
    def is_parameter(self) -> bool:
        return self.site.kind in ("experts", "parameter")

    @property
    def name(self) -> str:
        return f"{self.site.module}.{self.site.parameter}" if self.is_parameter else self.site.module

    @property
    def rank(self) -> int:
        return self.B.shape[-1]

    def alpha(self, rank_stabilized: bool) -> float:
        found = self.given_alpha
        if found is None:
            found = self.scale * (self.rank**0.5 if rank_stabilized else self.rank)
        return int(found) if float(found).is_integer() else float(found)

    def give(self, job: Writing, nested: dict[tuple[str, str], str]) -> None:
        site, A, B = self.site, self.A, self.B
        prefix = f"{job.prefix}{site.module}." + nested.get((site.module, site.parameter), "")
        if self.is_parameter:
            if is_swapped(job.host, site):
                A, B = B.mT, A.mT
            A, B = (A, B) if site.experts else (A[None], B[None])
            job.tensors[f"{prefix}lora_A.weight"] = A.flatten(0, 1)
            job.tensors[f"{prefix}lora_B.weight"] = B.permute(1, 2, 0).flatten(1)
            return
        if site.kind == "embedding":
            job.tensors[f"{prefix}lora_embedding_A"] = B.mT
            job.tensors[f"{prefix}lora_embedding_B"] = A.mT
            if self.magnitude is not None:
                job.tensors[f"{prefix}lora_magnitude_vector"] = self.magnitude
            return
        job.tensors[f"{prefix}lora_A.weight"] = A
        job.tensors[f"{prefix}lora_B.weight"] = B.reshape(*B.shape, *[1] * (A.dim() - 2))
        if self.magnitude is not None:
            m = self.magnitude
            job.tensors[f"{prefix}lora_magnitude_vector"] = (
                m if A.dim() == 2 else m.reshape(1, -1, *[1] * (A.dim() - 2))
            )
        if self.bias is not None:
            job.tensors[f"{prefix}lora_B.bias"] = self.bias
        if self.base_bias is not None:
            give_bias(job, site, self.base_bias)


def give_bias(job: Writing, site: Site, change: Tensor) -> None:
    """Write the base's own bias of an edited module, with its change: (out,) of the whole module."""
    bare: Any = job.host.bias(replace(site, ranges=()))
    job.tensors[f"{job.prefix}{site.module}.base_layer.bias"] = bare.detach().to(change) + change


def pairs_of(job: Writing) -> list[Pair]:
    """One pair for each parameter that is edited, parts of fused ones put together."""
    members: dict[tuple[str, str], list[tuple[SitePlan, dict[str, Tensor]]]] = {}
    for sp, t in zip(job.plan.sites, job.values()):
        if sp.part == 0:
            members.setdefault((sp.site.module, sp.site.parameter), []).append((sp, t))
    return [_pair(job, parts) for parts in members.values()]


def _pair(job: Writing, parts: list[tuple[SitePlan, dict[str, Tensor]]]) -> Pair:
    first: Any = parts[0][0].method
    site, scale = parts[0][0].site, first.scale
    As, Bs, bias, base_bias = [], [], None, None
    for sp, t in parts:
        m: Any = sp.method
        factor = m.scale / scale if m.scale != scale else 1.0
        pairs = [(t["A"], t["B"])] + ([(t["A0"], -t["B0"])] if "A0" in t else [])
        for A, B in pairs:
            As.append(A)
            Bs.append(_placed(job, sp.site, factor * B if factor != 1 else B))
        if "bias" in t:
            add = whole(sp.site, job.host, factor * t["bias"])
            bias = add if bias is None else bias + add
        if "base_bias" in t:
            add = whole(sp.site, job.host, t["base_bias"])
            base_bias = add if base_bias is None else base_bias + add
        if "A0" in t:
            job.note(
                f"a start that was subtracted ({m.init}) is written as an ordinary pair of twice the rank"
            )
        if sp.site.ranges:
            job.note("parts of fused projections are written as edits of the whole, with zero rows elsewhere")
    if len(As) > 1 and not any("A0" in t for _, t in parts) and all(torch.equal(As[0], A) for A in As[1:]):
        # Copies of one A: the edit of the whole that they were read from.
        As, Bs = As[:1], [sum(Bs[1:], Bs[0])]
    alone = len(As) == 1
    axis = 1 if site.experts else 0
    return Pair(
        site,
        As[0] if alone else torch.cat(As, axis),
        Bs[0] if alone else torch.cat(Bs, -1),
        scale,
        first.alpha if alone else None,
        _magnitude(job, parts),
        bias,
        base_bias,
    )


def _placed(job: Writing, site: Site, B: Tensor) -> Tensor:
    if not site.experts or not site.ranges:
        return whole(site, job.host, B)
    return torch.stack([whole(site, job.host, b) for b in B])


def _magnitude(job: Writing, parts: list[tuple[SitePlan, dict[str, Tensor]]]) -> Tensor | None:
    """DoRA's lengths of all rows; those of rows that no part edits are the rows' own, so that they stay."""
    if "magnitude" not in parts[0][1]:
        return parts[0][1].get("columns")
    site = parts[0][0].site
    if not site.ranges:
        return parts[0][1]["magnitude"]
    W = job.host.bare(site).detach()
    W = W.mT if site.transposed else W
    m = W.to(parts[0][1]["magnitude"].dtype).flatten(1).norm(dim=1)
    for sp, t in parts:
        m = m.index_copy(0, features(sp.site, m.device), t["magnitude"])
    return m


def check_writable(job: Writing, pairs: list[Pair]) -> None:
    m = job.adapter.method
    for p in pairs:
        s = p.site
        if s.kind == "recurrent":
            raise Unsupported(
                f"LORA at '{p.name}', a recurrent weight: HF PEFT's edit of it would have no effect.",
                next_step=OWN_FORM,
            )
        if s.groups > 1:
            raise Unsupported(
                f"LORA at '{s.module}', a convolution in {s.groups} groups, is another function in HF PEFT.",
                next_step=f"exclude={s.module!r} when it is attached, or veneer.save(model, name, folder)",
            )
        if p.is_parameter and not s.module:
            raise Unsupported(
                f"'{s.parameter}' is a parameter of the model itself, which HF PEFT cannot edit.",
                next_step=OWN_FORM,
            )
        if p.is_parameter and (m.dropout or m.key == "dora" or p.bias is not None):
            what = (
                "dora" if m.key == "dora" else "lora_bias" if p.bias is not None else f"dropout={m.dropout}"
            )
            raise Unsupported(
                f"HF PEFT edits '{p.name}' (target_parameters) without {what}.", next_step=OWN_FORM
            )
        if m.key == "dora" and s.experts:
            raise Unsupported(
                f"DoRA of the experts at '{p.name}' has no form in HF PEFT.",
                next_step="lora at the experts, or veneer.save(model, name, folder)",
            )
    if not pairs:
        raise Unsupported(
            f"adapter '{job.adapter.name}' edits nothing that HF PEFT could hold.",
            next_step="veneer.plan(model, method, ...)    shows what it edits",
        )
