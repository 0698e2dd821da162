"""ADALORA of HF PEFT: method adalora."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from veneer.engine._plan import SitePlan
from veneer.errors import BadFile, Unsupported

from . import _targets
from ._config import Field, only
from ._converter import OWN_FORM, Converter, Reading, Request, Writing, beside_default, converter, whole
from ._lora import Lora, own_bias, token_rows
from ._pairs import give_bias


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
        "lora_bias": only(False, "HF PEFT makes no such bias for this type"),
        "use_rslora": Field(False),  # without effect there
        "use_dora": only(False),
        "target_parameters": only(None),
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
            raise BadFile(
                f"'{job.config.path}': total_step={steps!r}; a number of steps was expected.",
                next_step='"total_step": 1000 in that file',
            )
        made.total_steps = steps
        token_rows(job, made, job.config["trainable_token_indices"])
        return made

    def options(self, job: Reading) -> dict[str, Any]:
        c = job.config
        options = {ours: c[theirs] for ours, theirs in self._names.items()}
        options["target_rank"] = min(c["target_r"], c["init_r"])
        return {
            **options,
            "bias": c["bias"],
            "alpha": c["lora_alpha"] if c["lora_alpha"] > 0 else float(c["init_r"]),
        }

    def take(self, job: Reading, sp: SitePlan, prefix: str) -> dict[str, Tensor]:
        n_out, n_in = sp.site.shape
        m: Any = sp.method
        rank, kept = m.rank, None
        for key, mask in (job.config["rank_pattern"] or {}).items():
            if key in (f"{sp.site.module}.lora_E", f"{job.prefix}{sp.site.module}.lora_E"):
                kept = mask
        if kept is not None and len(kept) != rank:
            raise BadFile(
                f"'{job.config.path}': rank_pattern of '{sp.site.module}' has {len(kept)} entries, "
                f"init_r={rank} was expected.",
                next_step="copy the folder again: its config and its tensors are of two runs",
            )
        left = rank if kept is None else sum(kept)
        A = job.file.take(f"{prefix}lora_A", (left, n_in))
        B = job.file.take(f"{prefix}lora_B", (n_out, left))
        E = job.file.take(f"{prefix}lora_E", (left, 1)).flatten()
        beside = own_bias(job, sp, prefix)
        if kept is None or left == rank:
            return {"A": A, "B": B, "E": E, **beside}
        # Dropped triplets are zero in all three tensors: they get no gradient, so they stay dropped.
        live = torch.tensor(kept).nonzero().flatten()
        return {
            "A": A.new_zeros(rank, n_in).index_copy(0, live, A),
            "B": B.new_zeros(n_out, rank).index_copy(1, live, B),
            "E": E.new_zeros(rank).index_copy(0, live, E),
            **beside,
        }

    def write(self, job: Writing) -> dict[str, Any]:
        m = job.adapter.method
        if m.alpha <= 0:
            raise Unsupported(
                f"ADALORA: alpha={m.alpha} means another scale in HF PEFT, which takes a positive one.",
                next_step=f"train with alpha={m.rank}, or veneer.save(model, name, folder)",
            )
        modules = []
        for sp, t in zip(job.plan.sites, job.values()):
            if sp.part != 0:
                continue
            site, own, prefix = sp.site, sp.method.options(), f"{job.prefix}{sp.site.module}."
            if site.kind not in self.kinds or own["rank"] != m.rank or f"{prefix}lora_A" in job.tensors:
                why = (
                    f"a site of kind '{site.kind}'" if site.kind not in self.kinds
                    else "its own rank" if own["rank"] != m.rank else "two parts of one fused projection"
                )  # fmt: skip
                raise Unsupported(
                    f"ADALORA at '{site.name}': {why} has no form in HF PEFT.", next_step=OWN_FORM
                )
            modules.append(site.module)
            job.tensors[f"{prefix}lora_A"] = t["A"]
            job.tensors[f"{prefix}lora_B"] = whole(site, job.host, t["B"]) * (own["alpha"] / m.alpha)
            job.tensors[f"{prefix}lora_E"] = t["E"][:, None]
            if "base_bias" in t:
                give_bias(job, site, whole(site, job.host, t["base_bias"]))
        fields = {theirs: getattr(m, ours) for ours, theirs in self._names.items()} | {"bias": m.bias}
        words = _targets.words_for(job.host, modules, job.plan.whole)
        fields["fan_in_fan_out"] = any(sp.site.kind == "conv1d" for sp in job.plan.sites)
        steps = (
            job.adapter.total_steps or m.tinit + m.tfinal + 1
        )  # HF PEFT wants a number, also for use alone
        return {
            "init_r": m.rank, "target_r": m.target_rank, "lora_alpha": m.alpha, "total_step": steps,
            **beside_default(self.fields, fields), "target_modules": words,
        }  # fmt: skip
