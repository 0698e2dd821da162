"""LORA and ADALORA of HF PEFT: methods lora, dora and adalora.

The same numbers under other names, but for five forms:

| here | in HF PEFT |
|---|---|
| a part of a fused projection | all of it, with zero rows in B for the rest; two parts of one are one of their ranks' sum |
| s (B A - B0 A0), a start that W keeps | an ordinary pair of twice the rank: [B, -B0] [A; A0] |
| an embedding's A (rank, width), B (rows, rank) | `lora_embedding_B` = A^T, `lora_embedding_A` = B^T |
| experts' A (experts, rank, in), B (experts, out, rank) | A (experts rank, in), B (out, rank experts): other orders |
| a change of a bias | the bias itself, `base_layer.bias` |
"""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from veneer.anatomy import Site
from veneer.engine._plan import SitePlan
from veneer.engine._weights import features
from veneer.errors import BadFile, NoSiteFound, ShapeDiffers, Unsupported, nearest

from . import _targets
from ._config import TARGETS, Config, Field, only
from ._converter import Converter, Reading, Request, Writing, beside_default, converter, whole

_REWRITTEN = "its start rewrites the base's weights from data that the folder does not hold"
_VARIANTS: dict[str, Field] = {
    "megatron_config": only(None), "megatron_core": Field("megatron.core"), "loftq_config": only({}, _REWRITTEN),
    "eva_config": Field(None), "corda_config": only(None, _REWRITTEN), "lora_ga_config": only(None, _REWRITTEN),
    "velora_config": only(None), "alora_invocation_tokens": only(None), "use_qalora": only(False),
    "qalora_group_size": Field(16), "monteclora_config": only(None), "layer_replication": only(None),
    "runtime_config": Field(None), "use_bdlora": only(None), "arrow_config": only(None), "kasa_config": only(None),
    "ensure_weight_tying": only(False),
}  # fmt: skip
_START = "an adapter that was saved as an ordinary LoRA (path_initial_model_for_weight_conversion in HF PEFT)"


@converter
class Lora(Converter):
    """LORA: lora, and dora where the config says use_dora."""

    peft_type = "LORA"
    methods = ("lora", "dora")
    kinds = ("linear", "conv1d", "conv", "embedding")
    fields = {
        **TARGETS,
        **_VARIANTS,
        "r": Field(8, "whole"),
        "lora_alpha": Field(8, "number"),
        "lora_dropout": Field(0.0, "number"),
        "bias": Field("none", "text"),
        "use_rslora": Field(False, "flag"),
        "init_lora_weights": Field(True, "start"),
        "rank_pattern": Field({}, "numbers by name"),
        "alpha_pattern": Field({}, "numbers by name"),
        "use_dora": Field(False, "flag"),
        "lora_bias": Field(False, "flag"),
        "target_parameters": Field(None, "list of names"),
        "trainable_token_indices": Field(None, "tokens"),
    }

    # -- reading ------------------------------------------------------------------------------------------------

    def request(self, job: Reading) -> Request:
        config = job.config
        parameters = _parameter_sites(job)
        modules = _targets.target_modules(job.model, job.anatomy, config)
        if config["target_modules"] is None and not parameters:
            modules = self.modules_in(job)
        self.check_sites(job, modules)
        if not modules and not parameters:
            raise NoSiteFound(
                f"'{config.path}' names no module, and the file holds no tensor that names one."
            )
        options = self.options(job)
        keys = [(m, _targets.exact(job.anatomy, m)) for m in modules]
        own: Any = _targets.selector(job.anatomy, modules, config["target_modules"]) if modules else []
        if parameters:
            chosen = _select_parameters(job, parameters)
            keys += [(name, word) for name, words in chosen for word in words]
            own = ([own] if isinstance(own, str) else list(own)) + [w for _, words in chosen for w in words]
            own = list(dict.fromkeys(own))
            if config["lora_dropout"] or config["lora_bias"] or config["use_dora"]:
                raise BadFile(
                    f"'{config.path}': target_parameters goes with neither dropout, lora_bias nor use_dora."
                )
        options["sites"] = own
        options["patterns"] = _patterns(config, keys)
        places = {(m, "weight") for m in modules} | {(s.module, s.parameter) for s in parameters}
        job.nested = _nesting(job.host, parameters)
        return Request(self.method_of(config), options, places, rows=_token_rows(job))

    def method_of(self, config: Config) -> str:
        return "dora" if config["use_dora"] else "lora"

    def options(self, job: Reading) -> dict[str, Any]:
        c = job.config
        options = {
            "rank": c["r"], "alpha": c["lora_alpha"], "rank_stabilized": c["use_rslora"], "dropout": c["lora_dropout"],
        }  # fmt: skip
        start = _start(c)
        if not c["use_dora"]:
            return {**options, "init": start, "bias": c["bias"], "lora_bias": c["lora_bias"]}
        for name, value, plain in (("bias", c["bias"], "none"), ("lora_bias", c["lora_bias"], False)):
            if value != plain:
                raise Unsupported(f"LORA: {name}={value!r} together with use_dora=True has no form here.")
        if start.startswith(("pissa", "olora")):
            raise Unsupported(f"LORA: init_lora_weights={start!r} together with use_dora=True has no form here.",
                              next_step=_START)  # fmt: skip
        return options

    def take(self, job: Reading, sp: SitePlan, prefix: str) -> dict[str, Tensor]:
        site, m, file = sp.site, sp.method, job.file
        n_out, rank, inner = site.shape[0], m.rank, site.shape[1:]
        if (site.module, site.parameter) in job.nested:
            return _take_parameter(job, sp, prefix)
        if site.kind == "embedding":
            B = file.take(f"{prefix}lora_embedding_A", (rank, n_out)).mT
            return {"A": file.take(f"{prefix}lora_embedding_B", (*inner, rank)).mT, "B": B}
        if site.groups > 1:
            raise Unsupported(f"LORA at '{site.module}', a convolution in {site.groups} groups: HF PEFT's A reads all "
                              "inputs there, which no change of the weight does.", next_step="exclude it")  # fmt: skip
        found = {
            "A": file.take(f"{prefix}lora_A.weight", (rank, *inner)),
            "B": file.take(f"{prefix}lora_B.weight", (n_out, rank, *[1] * (len(inner) - 1))).flatten(1),
        }
        if "magnitude" in sp.specs:
            shapes = (n_out,), (1, n_out, *[1] * (len(inner) - 1))
            found["magnitude"] = file.take(f"{prefix}lora_magnitude_vector", *shapes).flatten()
        if "bias" in sp.specs:
            found["bias"] = file.take(f"{prefix}lora_B.bias", (n_out,))
        if "base_bias" in sp.specs:
            bare = job.host.bias(site)
            found["base_bias"] = file.take(f"{prefix}base_layer.bias", (n_out,)) - bare.detach().cpu()
        return found

    # -- writing ------------------------------------------------------------------------------------------------

    def write(self, job: Writing) -> dict[str, Any]:
        m = job.adapter.method
        pairs = pairs_of(job)
        _check_writable(job, pairs)
        ranks = {p.name: (p.rank, p.alpha(m.rank_stabilized)) for p in pairs}
        r, alpha = Counter(ranks.values()).most_common(1)[0][0]
        fields = {
            "r": r, "lora_alpha": alpha, "lora_dropout": m.dropout, "use_rslora": m.rank_stabilized,
            "bias": getattr(m, "bias", "none"), "lora_bias": getattr(m, "lora_bias", False),
            "use_dora": m.key == "dora",
            "rank_pattern": {n: v[0] for n, v in ranks.items() if v[0] != r},
            "alpha_pattern": {n: v[1] for n, v in ranks.items() if v[1] != alpha},
            "fan_in_fan_out": any(p.site.kind == "conv1d" for p in pairs),
        }  # fmt: skip
        # HF PEFT's defaults have changed before: the two that set the scale are always written.
        out = {"r": r, "lora_alpha": alpha, **beside_default(self.fields, fields)}
        modules = [p.site.module for p in pairs if not p.is_parameter]
        out["target_modules"] = _targets.words_for(job.host, modules, job.plan.whole) if modules else []
        if any(p.is_parameter for p in pairs):
            out["target_parameters"] = [p.name for p in pairs if p.is_parameter]
        nested = _nesting(job.host, [p.site for p in pairs if p.is_parameter])
        for pair in pairs:
            pair.give(job, nested)
        return out


def _start(config: Config) -> str:
    """`init` of a config's init_lora_weights. Only starts that are subtracted matter to what a folder means."""
    given = config["init_lora_weights"]
    start = {True: "default", False: "none"}.get(given, str(given))
    if start.lower() in ("corda", "loftq", "lora_ga", "mica"):
        why = "half of its tensors stay frozen" if start.lower() == "mica" else _REWRITTEN
        raise Unsupported(f"LORA: init_lora_weights={given!r} has no form here: {why}.", next_step=_START)
    if start.lower().startswith("pissa_niter"):
        warnings.warn(
            f"'{config.path}': init_lora_weights={given!r} is a random approximation in HF PEFT, made anew at each load; "
            "the exact start is used here.",
            stacklevel=6,
        )
        return "pissa"
    return "default" if start == "eva" else start.lower()


def _patterns(config: Config, keys: list[tuple[str, str]]) -> dict[str, dict[str, Any]]:
    """Options by site, for the modules that rank_pattern or alpha_pattern changes."""
    found: dict[str, dict[str, Any]] = {}
    if not (config["rank_pattern"] or config["alpha_pattern"]):
        return found
    for key, selector in keys:
        rank = _targets.by_pattern(config["rank_pattern"], key, config["r"], config, "rank_pattern")
        alpha = _targets.by_pattern(
            config["alpha_pattern"], key, config["lora_alpha"], config, "alpha_pattern"
        )
        if (rank, alpha) != (config["r"], config["lora_alpha"]):
            found[selector] = {"rank": rank, "alpha": alpha}
    for option in ("rank_pattern", "alpha_pattern"):
        for name in config[option]:
            if not any(_targets.pattern(rf"(.*\.)?({name})$", config, option).match(key) for key, _ in keys):
                raise NoSiteFound(
                    f"'{config.path}': {option} names '{name}', which is none of the {len(keys)} places that it edits.",
                    nearest=nearest(name, {k.rpartition(".")[2] for k, _ in keys}),
                    next_step="load it on the base that it was trained on",
                )
    return found


# -- parameters without a module of their own ---------------------------------------------------------------------


def _parameter_sites(job: Reading) -> list[Site]:
    """Sites of target_parameters, in the order in which HF PEFT wraps them."""
    wanted = job.config["target_parameters"]
    if not wanted:
        return []
    by_name = {f"{s.module}.{s.parameter}": s for s in job.anatomy.whole_sites() if s.module}
    hit = _targets.matcher(wanted, job.config, "target_parameters")
    found = []
    for module_name, module in job.host.root.named_modules():
        for parameter, _ in module.named_parameters(recurse=False):
            key = f"{module_name}.{parameter}"
            if not hit(key):
                continue
            site = by_name.get(key)
            if site is None or site.kind not in ("experts", "parameter", "linear", "conv1d", "embedding"):
                kind = "no matrix" if site is None else f"of kind '{site.kind}'"
                raise Unsupported(f"LORA: target_parameters names '{key}', which is {kind}; veneer reads matrices "
                                  "and stacks of experts.")  # fmt: skip
            found.append(site)
    if not found:
        raise NoSiteFound(
            f"'{job.config.path}': target_parameters={wanted!r:.80} names no parameter of this base.",
            nearest=nearest(wanted[0], by_name),
        )
    return found


def _select_parameters(job: Reading, sites: list[Site]) -> list[tuple[str, list[str]]]:
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
                f"'{job.config.path}': '{s.module}.{s.parameter}' is read as {len(words)} edits of its parts, each with "
                "a copy of A: the outputs are the same, further training moves the copies apart.",
                stacklevel=6,
            )
        found.append((f"{s.module}.{s.parameter}", words))
    return found


def _nesting(host: Any, sites: list[Site]) -> dict[tuple[str, str], str]:
    """(module, parameter) -> "base_layer." as often as later parameters of the module are wrapped around it."""
    found = {}
    edited = {(s.module, s.parameter) for s in sites}
    for module in dict.fromkeys(s.module for s in sites):
        names = [n for n, _ in host.module(module).named_parameters(recurse=False) if (module, n) in edited]
        for i, name in enumerate(names):
            found[module, name] = "base_layer." * (len(names) - 1 - i)
    return found


def _is_swapped(host: Any, site: Site) -> bool:
    """Whether HF PEFT takes a stored parameter for (in, out) where veneer takes it for (out, in), or the reverse."""
    theirs = bool(getattr(host.module(site.module), "is_transposed", False)) if site.experts else False
    return theirs != site.transposed


def _take_parameter(job: Reading, sp: SitePlan, prefix: str) -> dict[str, Tensor]:
    site, rank, place = sp.site, sp.method.rank, (sp.site.module, sp.site.parameter)
    if place not in job.pairs:
        job.pairs[place] = _whole_parameter(job, site, rank, prefix + job.nested[place])
    A, B = job.pairs[place]
    if site.ranges:
        B = B.index_select(-2, features(site, B.device))
    return {"A": A, "B": B} if site.experts else {"A": A[0], "B": B[0]}


def _whole_parameter(job: Reading, site: Site, rank: int, prefix: str) -> tuple[Tensor, Tensor]:
    """A (experts, rank, in) and B (experts, out, rank) of the whole parameter."""
    swapped, experts = _is_swapped(job.host, site), max(1, site.experts)
    n_out, n_in = job.host.bare(site).shape[-2:]
    if site.transposed != swapped:
        n_out, n_in = n_in, n_out
    A = job.file.take(f"{prefix}lora_A.weight", (experts * rank, n_in)).view(experts, rank, n_in)
    B = job.file.take(f"{prefix}lora_B.weight", (n_out, rank * experts))
    B = B.view(n_out, rank, experts).permute(2, 0, 1)
    return (B.mT, A.mT) if swapped else (A, B)


# -- trained rows of the token table ------------------------------------------------------------------------------


def _token_rows(job: Reading) -> dict[str, list[int]]:
    """Module -> ids of its trained rows. Here the table is trained whole, so that all rows would move."""
    given = job.config["trainable_token_indices"]
    if not given:
        return {}
    if isinstance(given, list):
        tables = [m for _, m in job.anatomy.facts.token_embeddings]
        given = {tables[0]: given} if tables else {}
    rows = {}
    for name, ids in given.items():
        modules = [n for n in job.anatomy.module_names if n.endswith(name)]
        table = next((getattr(job.host.module(n), "weight", None) for n in modules), None)
        if len(modules) != 1 or table is None or table.dim() != 2:
            raise NoSiteFound(f"'{job.config.path}': trainable_token_indices names '{name}', which is no single table "
                              "of this base.", nearest=nearest(name, job.anatomy.module_names))  # fmt: skip
        if any(f"{modules[0]}.weight" in pair for pair in job.anatomy.facts.tied):
            raise Unsupported(f"LORA: trainable_token_indices at '{modules[0]}', whose weight the head shares: rows "
                              "trained for both have no form here.")  # fmt: skip
        if len(set(ids)) != len(ids) or (ids and max(ids) >= table.shape[0]):
            raise ShapeDiffers(f"'{job.config.path}': trainable_token_indices of '{name}' go up to {max(ids)}, the "
                               f"table has {table.shape[0]} rows, and each id stands once.")  # fmt: skip
        rows[modules[0]] = ids
    warnings.warn(
        f"'{job.config.path}': trainable_token_indices is read as a trained copy of {', '.join(rows)}: the outputs are "
        "the same, further training would move every row.",
        stacklevel=6,
    )
    return rows


# -- writing --------------------------------------------------------------------------------------------------------


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
            if _is_swapped(job.host, site):
                A, B = B.mT, A.mT
            A, B = (A, B) if site.experts else (A[None], B[None])
            job.tensors[f"{prefix}lora_A.weight"] = A.flatten(0, 1)
            job.tensors[f"{prefix}lora_B.weight"] = B.permute(1, 2, 0).flatten(1)
            return
        if site.kind == "embedding":
            job.tensors[f"{prefix}lora_embedding_A"] = B.mT
            job.tensors[f"{prefix}lora_embedding_B"] = A.mT
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
            bare = job.host.bias(replace(site, ranges=()))
            job.tensors[f"{prefix}base_layer.bias"] = bare.detach().to(self.base_bias) + self.base_bias


def pairs_of(job: Writing) -> list[Pair]:
    """One pair for each parameter that is edited, parts of fused ones put together."""
    members: dict[tuple[str, str], list[tuple[SitePlan, dict[str, Tensor]]]] = {}
    for sp, t in zip(job.plan.sites, job.values()):
        if sp.part == 0:
            members.setdefault((sp.site.module, sp.site.parameter), []).append((sp, t))
    return [_pair(job, parts) for parts in members.values()]


def _pair(job: Writing, parts: list[tuple[SitePlan, dict[str, Tensor]]]) -> Pair:
    site = parts[0][0].site
    scale = parts[0][0].method.scale
    As, Bs, bias, base_bias = [], [], None, None
    for sp, t in parts:
        factor = sp.method.scale / scale
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
                f"a start that was subtracted ({sp.method.init}) is written as an ordinary pair of twice the rank"
            )
        if sp.site.ranges:
            job.note("parts of fused projections are written as edits of the whole, with zero rows elsewhere")
    if len(As) > 1 and not any("A0" in t for _, t in parts) and all(torch.equal(As[0], A) for A in As[1:]):
        As, Bs = (
            As[:1],
            [sum(Bs[1:], Bs[0])],
        )  # copies of one A: the edit of the whole that they were read from
    alone = len(As) == 1
    axis = 1 if site.experts else 0
    m = parts[0][0].method
    return Pair(
        site,
        As[0] if alone else torch.cat(As, axis),
        Bs[0] if alone else torch.cat(Bs, -1),
        scale,
        m.alpha if alone else None,
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
        return None
    site = parts[0][0].site
    if not site.ranges:
        return parts[0][1]["magnitude"]
    W = job.host.bare(site).detach()
    W = W.mT if site.transposed else W
    m = W.to(parts[0][1]["magnitude"].dtype).flatten(1).norm(dim=1)
    for sp, t in parts:
        m = m.index_copy(0, features(sp.site, m.device), t["magnitude"])
    return m


def _check_writable(job: Writing, pairs: list[Pair]) -> None:
    m = job.adapter.method
    for p in pairs:
        s = p.site
        if s.kind == "recurrent":
            raise Unsupported(
                f"LORA at '{p.name}', a recurrent weight: HF PEFT's edit of it would have no effect."
            )
        if s.groups > 1:
            raise Unsupported(
                f"LORA at '{s.module}', a convolution in {s.groups} groups, is another function in HF PEFT."
            )
        if p.is_parameter and not s.module:
            raise Unsupported(
                f"'{s.parameter}' is a parameter of the model itself, which HF PEFT cannot edit."
            )
        if p.is_parameter and (m.dropout or m.key == "dora" or p.bias is not None):
            what = (
                "dora" if m.key == "dora" else "lora_bias" if p.bias is not None else f"dropout={m.dropout}"
            )
            raise Unsupported(f"HF PEFT edits '{p.name}' (target_parameters) without {what}.")
        if m.key == "dora" and s.experts:
            raise Unsupported(f"DoRA of the experts at '{p.name}' has no form in HF PEFT.")
    if not pairs:
        raise Unsupported(f"adapter '{job.adapter.name}' edits nothing that HF PEFT could hold.")


# -- AdaLoRA --------------------------------------------------------------------------------------------------------


@converter
class AdaLora(Lora):
    """ADALORA. Tensors are cut to the triplets that live (`rank_pattern`), the scale keeps the rank of the start."""

    peft_type = "ADALORA"
    methods = ("adalora",)
    kinds = ("linear", "conv1d")
    fields = {
        **{k: v for k, v in Lora.fields.items() if k not in ("rank_pattern",)},
        "r": Field(8),  # HF PEFT ignores it
        "rank_pattern": Field(None, "masks by name"),
        "alpha_pattern": only({}),
        "bias": only("none"),
        "lora_bias": only(False),
        "use_rslora": Field(False),  # without effect there
        "use_dora": only(False),
        "target_parameters": only(None),
        "trainable_token_indices": only(None),
        "target_r": Field(8, "whole"),
        "init_r": Field(12, "whole"),
        "tinit": Field(0, "whole"),
        "tfinal": Field(0, "whole"),
        "deltaT": Field(1, "whole"),
        "beta1": Field(0.85, "number"),
        "beta2": Field(0.85, "number"),
        "orth_reg_weight": Field(0.5, "number"),
        "total_step": Field(None, "any"),
    }
    _names = {
        "target_rank": "target_r", "rank": "init_r", "tinit": "tinit", "tfinal": "tfinal", "every": "deltaT",
        "beta1": "beta1", "beta2": "beta2", "orthogonality": "orth_reg_weight", "dropout": "lora_dropout",
    }  # fmt: skip

    def request(self, job: Reading) -> Request:
        made = Converter.request(self, job)
        steps = job.config["total_step"]
        if steps is not None and (not isinstance(steps, int) or isinstance(steps, bool) or steps < 1):
            raise BadFile(f"'{job.config.path}': total_step={steps!r}; a number of steps was expected.")
        made.total_steps = steps
        return made

    def options(self, job: Reading) -> dict[str, Any]:
        c = job.config
        options = {ours: c[theirs] for ours, theirs in self._names.items()}
        options["target_rank"] = min(c["target_r"], c["init_r"])
        return {**options, "alpha": c["lora_alpha"] if c["lora_alpha"] > 0 else float(c["init_r"])}

    def take(self, job: Reading, sp: SitePlan, prefix: str) -> dict[str, Tensor]:
        n_out, n_in = sp.site.shape
        rank, kept = sp.method.rank, None
        for key, mask in (job.config["rank_pattern"] or {}).items():
            if key in (f"{sp.site.module}.lora_E", f"{job.prefix}{sp.site.module}.lora_E"):
                kept = mask
        if kept is not None and len(kept) != rank:
            raise BadFile(f"'{job.config.path}': rank_pattern of '{sp.site.module}' has {len(kept)} entries, "
                          f"init_r={rank} was expected.")  # fmt: skip
        left = rank if kept is None else sum(kept)
        A = job.file.take(f"{prefix}lora_A", (left, n_in))
        B = job.file.take(f"{prefix}lora_B", (n_out, left))
        E = job.file.take(f"{prefix}lora_E", (left, 1)).flatten()
        if kept is None or left == rank:
            return {"A": A, "B": B, "E": E}
        live = (
            torch.tensor(kept).nonzero().flatten()
        )  # dropped triplets are zero in all three: they stay dropped
        return {
            "A": A.new_zeros(rank, n_in).index_copy(0, live, A),
            "B": B.new_zeros(n_out, rank).index_copy(1, live, B),
            "E": E.new_zeros(rank).index_copy(0, live, E),
        }

    def write(self, job: Writing) -> dict[str, Any]:
        m = job.adapter.method
        modules = []
        for sp, t in zip(job.plan.sites, job.values()):
            if sp.part != 0:
                continue
            site, prefix = sp.site, f"{job.prefix}{sp.site.module}."
            if site.kind not in self.kinds or sp.method.rank != m.rank or f"{prefix}lora_A" in job.tensors:
                why = (
                    f"a site of kind '{site.kind}'" if site.kind not in self.kinds
                    else "its own rank" if sp.method.rank != m.rank else "two parts of one fused projection"
                )  # fmt: skip
                raise Unsupported(f"ADALORA at '{site.name}': {why} has no form in HF PEFT.")
            modules.append(site.module)
            job.tensors[f"{prefix}lora_A"] = t["A"]
            job.tensors[f"{prefix}lora_B"] = whole(site, job.host, t["B"]) * (sp.method.alpha / m.alpha)
            job.tensors[f"{prefix}lora_E"] = t["E"][:, None]
        fields = {theirs: getattr(m, ours) for ours, theirs in self._names.items()}
        fields["fan_in_fan_out"] = any(sp.site.kind == "conv1d" for sp in job.plan.sites)
        steps = (
            job.adapter.total_steps or m.tinit + m.tfinal + 1
        )  # HF PEFT wants a number, also for use alone
        return {
            "init_r": m.rank, "target_r": m.target_rank, "lora_alpha": m.alpha, "total_step": steps,
            **beside_default(self.fields, fields), "target_modules": _targets.words_for(job.host, modules, job.plan.whole),
        }  # fmt: skip
