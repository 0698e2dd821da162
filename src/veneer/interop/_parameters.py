"""`target_parameters` of LORA: matrices and stacks of experts that no module of their own holds.

HF PEFT wraps one module around another where it edits several parameters of one, the last parameter outermost, and
lays experts out in A as (experts, rank) and in B as (rank, experts).
"""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor

from veneer.anatomy import Site
from veneer.engine._plan import SitePlan
from veneer.engine._weights import features
from veneer.errors import NoSiteFound, Unsupported, nearest

from . import _targets
from ._converter import Reading


def parameter_sites(job: Reading) -> list[Site]:
    """Sites of target_parameters, in the order in which HF PEFT wraps them."""
    wanted = job.config["target_parameters"]
    if not wanted:
        return []
    by_name = {f"{s.module}.{s.parameter}": s for s in job.anatomy.whole_sites() if s.module}
    hit = _targets.matcher(wanted, job.config, "target_parameters")
    found = []
    for module_name in ("", *job.anatomy.module_names):
        module = job.host.module(module_name)
        for parameter, _ in module.named_parameters(recurse=False):
            key = f"{module_name}.{parameter}"
            if not hit(key):
                continue
            site = by_name.get(key)
            if site is None or site.kind not in ("experts", "parameter", "linear", "conv1d", "embedding"):
                kind = "no matrix" if site is None else f"of kind '{site.kind}'"
                raise Unsupported(
                    f"LORA: target_parameters names '{key}', which is {kind}; veneer reads matrices "
                    "and stacks of experts.",
                    next_step="an adapter that targets matrices alone",
                )
            found.append(site)
    if not found:
        raise NoSiteFound(
            f"'{job.config.path}': target_parameters={wanted!r:.80} names no parameter of this base.",
            nearest=nearest(wanted[0], by_name),
            next_step="load it on the base that it was trained on",
        )
    return found


def select_parameters(job: Reading, sites: list[Site]) -> list[tuple[str, list[str]]]:
    """For each parameter its name and its selectors: one, or one for each part where the base fuses several.

    A fused parameter whose module holds others that are not edited has no name of its own.
    """
    chosen = {(s.module, s.parameter) for s in sites}
    found = []
    for s in sites:
        known = [o for o in job.anatomy.sites if (o.module, o.parameter) == (s.module, s.parameter)]
        alone = all(
            (o.module, o.parameter) in chosen for o in job.anatomy.whole_sites() if o.module == s.module
        )
        if alone and any(o.ranges for o in known):
            words = [_targets.exact(job.anatomy, s.module)]
        else:
            words = [o.name for o in known] or [s.name]
        if len(words) > 1:
            warnings.warn(
                f"'{job.config.path}': '{s.module}.{s.parameter}' is read as {len(words)} edits of its parts, each "
                "with a copy of A: the outputs are the same, further training moves the copies apart.",
                stacklevel=6,
            )
        found.append((f"{s.module}.{s.parameter}", words))
    return found


def nesting(host: Any, sites: list[Site]) -> dict[tuple[str, str], str]:
    """(module, parameter) -> "base_layer." as often as later parameters of the module are wrapped around it."""
    found = {}
    edited = {(s.module, s.parameter) for s in sites}
    for module in dict.fromkeys(s.module for s in sites):
        names = [n for n, _ in host.module(module).named_parameters(recurse=False) if (module, n) in edited]
        for i, name in enumerate(names):
            found[module, name] = "base_layer." * (len(names) - 1 - i)
    return found


def is_swapped(host: Any, site: Site) -> bool:
    """Whether HF PEFT takes a stored parameter for (in, out) where veneer takes it for (out, in), or the reverse."""
    theirs = bool(getattr(host.module(site.module), "is_transposed", False)) if site.experts else False
    return theirs != site.transposed


def take_parameter(job: Reading, sp: SitePlan, prefix: str) -> dict[str, Tensor]:
    m: Any = sp.method
    site, rank, place = sp.site, m.rank, (sp.site.module, sp.site.parameter)
    if place not in job.pairs:
        job.pairs[place] = _whole_parameter(job, site, rank, prefix + job.nested[place])
    A, B = job.pairs[place]
    if site.ranges:
        B = B.index_select(-2, features(site, B.device))
    return {"A": A, "B": B} if site.experts else {"A": A[0], "B": B[0]}


def _whole_parameter(job: Reading, site: Site, rank: int, prefix: str) -> tuple[Tensor, Tensor]:
    """A (experts, rank, in) and B (experts, out, rank) of the whole parameter."""
    swapped, experts = is_swapped(job.host, site), max(1, site.experts)
    n_out, n_in = job.host.bare(site).shape[-2:]
    if site.transposed != swapped:
        n_out, n_in = n_in, n_out
    A = job.file.take(f"{prefix}lora_A.weight", (experts * rank, n_in)).view(experts, rank, n_in)
    B = job.file.take(f"{prefix}lora_B.weight", (n_out, rank * experts))
    B = B.view(n_out, rank, experts).permute(2, 0, 1)
    return (B.mT, A.mT) if swapped else (A, B)
