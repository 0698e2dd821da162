"""HIRA, FOURIERFT, SHIRA, BOFT and LN_TUNING of HF PEFT: hira, fourierft, shira, boft and norm_tuning.

| here | in HF PEFT |
|---|---|
| hira's A (rank, in), B (out, rank) | `hira_A`, `hira_B`; at an embedding `hira_embedding_B` = A^T, `.._A` = B^T |
| fourierft's c; its places are drawn anew from the seed | `fourierft_spectrum` |
| shira's values, its places as flat indices | `shira_weight`, `shira_indices` (2, k) of rows and columns |
| boft's M, s (out,) | `boft_R`, `boft_s` (out, 1) |
| norm_tuning's changes v of gain and shift | the gain and the shift themselves, `ln_tuning_layers.weight`, `.bias` |
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from veneer.anatomy import Site
from veneer.engine._plan import SitePlan
from veneer.errors import BadFile, ShapeDiffers, Unsupported

from . import _targets
from ._config import TARGETS, Field, only
from ._converter import OWN_FORM, Converter, Reading, Request, Writing, converter, whole
from ._plain import PLAIN, Plain

_BIAS = {"bias": only("none")}


@converter
class Hira(Plain):
    """HIRA. A part of a fused projection becomes all of it, with zero rows in B for the rest.

    Release 0.21.2 takes a rank_pattern, and makes all factors of rank r: so it is read here, too.
    """

    peft_type, methods, stem = "HIRA", ("hira",), "hira_"
    kinds = ("linear", "conv1d", "conv", "embedding")
    kernels = 3
    fields = {
        **TARGETS, "r": Field(32, "whole"), "hira_dropout": Field(0.0, "number"), "init_weights": Field(True, "start"),
        "rank_pattern": Field({}, "numbers by name"),
    }  # fmt: skip
    same = {"rank": "r", "dropout": "hira_dropout"}

    def check_site(self, site: Site) -> None:
        super().check_site(site)
        if site.groups > 1:
            raise Unsupported(
                f"HIRA at '{site.name}', a convolution in {site.groups} groups, has no form in HF PEFT.",
                next_step=OWN_FORM,
            )

    def take(self, job: Reading, sp: SitePlan, prefix: str) -> dict[str, Tensor]:
        A, B = sp.specs["A"].shape, sp.specs["B"].shape
        if sp.site.kind == "embedding":
            return {
                "A": job.file.take(f"{prefix}hira_embedding_B", A[::-1]).mT,
                "B": job.file.take(f"{prefix}hira_embedding_A", B[::-1]).mT,
            }
        ones = (1,) * (len(A) - 2)
        return {
            "A": job.file.take(f"{prefix}hira_A", A),
            "B": job.file.take(f"{prefix}hira_B", (*B, *ones)).reshape(B),
        }

    def give(self, job: Writing, sp: SitePlan, t: dict[str, Tensor], prefix: str) -> None:
        A, B = t["A"], whole(sp.site, job.host, t["B"])
        if sp.site.kind == "embedding":
            job.tensors[f"{prefix}hira_embedding_A"], job.tensors[f"{prefix}hira_embedding_B"] = B.mT, A.mT
        else:
            job.tensors[f"{prefix}hira_A"] = A
            job.tensors[f"{prefix}hira_B"] = B.reshape(*B.shape, *[1] * (A.dim() - 2))


@converter
class Fourierft(Plain):
    """FOURIERFT. The file has no places: both sides draw them from the seed by the same rule."""

    peft_type, methods, stem = "FOURIERFT", ("fourierft",), "fourierft_"
    fields = {
        **TARGETS, **_BIAS, "n_frequency": Field(1000, "whole"), "scaling": Field(150.0, "number"),
        "random_loc_seed": Field(777, "whole"), "init_weights": Field(False),
        "n_frequency_pattern": Field({}, "numbers by name"),
    }  # fmt: skip
    same, patterned = {"scale": "scaling", "seed": "random_loc_seed"}, {"frequencies": "n_frequency"}

    def check_site(self, site: Site) -> None:
        super().check_site(site)
        self.check_whole(site)

    def take(self, job: Reading, sp: SitePlan, prefix: str) -> dict[str, Tensor]:
        return {"c": job.file.take(f"{prefix}fourierft_spectrum", sp.specs["c"].shape)}

    def give(self, job: Writing, sp: SitePlan, t: dict[str, Tensor], prefix: str) -> None:
        job.tensors[f"{prefix}fourierft_spectrum"] = t["c"]


@converter
class Shira(Plain):
    """SHIRA. Places come with the file, whatever drew them."""

    peft_type, methods, stem = "SHIRA", ("shira",), "shira_"
    kinds = ("linear",)
    fields = {
        **{k: v for k, v in TARGETS.items() if k in ("target_modules", "modules_to_save", "fan_in_fan_out")},
        "r": Field(32, "whole"), "mask_type": Field("random", "text"), "random_seed": Field(None),
        "init_weights": Field(True),
    }  # fmt: skip

    same = {"rank": "r"}

    def options(self, job: Reading) -> dict[str, Any]:
        return {**super().options(job), "seed": job.config["random_seed"] or 0, "save_index": True}

    def check_site(self, site: Site) -> None:
        super().check_site(site)
        self.check_whole(site)

    def take(self, job: Reading, sp: SitePlan, prefix: str) -> dict[str, Tensor]:
        values = job.file.take(f"{prefix}shira_weight", sp.specs["values"].shape)
        places, (n_out, n_in) = job.file.pop(f"{prefix}shira_indices"), sp.site.shape
        if places is None or tuple(places.shape) != (2, len(values)) or places.is_floating_point():
            raise ShapeDiffers(f"'{job.config.path.parent}' has no {prefix}shira_indices of (2, {len(values)}).",
                               next_step="copy the folder again")  # fmt: skip
        k, l = places.long()
        if k.min() < 0 or l.min() < 0 or k.max() >= n_out or l.max() >= n_in:
            raise ShapeDiffers(f"{prefix}shira_indices go beyond '{sp.site.name}', which is {n_out} x {n_in}.",
                               next_step="load it on the base that it was trained on")  # fmt: skip
        return {"values": values, "index": k * n_in + l}

    def write(self, job: Writing) -> dict[str, Any]:
        m = job.adapter.method
        return {**super().write(job), **({"random_seed": m.seed} if m.mask == "random" else {})}

    def give(self, job: Writing, sp: SitePlan, t: dict[str, Tensor], prefix: str) -> None:
        index, n_in = t["index"], sp.site.shape[1]
        job.tensors[f"{prefix}shira_weight"] = t["values"]
        job.tensors[f"{prefix}shira_indices"] = torch.stack([index // n_in, index % n_in]).to(torch.int32)


@converter
class Boft(Plain):
    """BOFT. Of convolutions those with square kernels: HF PEFT measures a kernel by its height alone."""

    peft_type, methods, stem = "BOFT", ("boft",), "boft_"
    kinds = ("linear", "conv")
    fields = {
        **TARGETS, **_BIAS, "boft_block_size": Field(4, "whole"), "boft_block_num": Field(0, "whole"),
        "boft_n_butterfly_factor": Field(1, "whole"), "boft_dropout": Field(0.0, "number"), "init_weights": Field(True),
    }  # fmt: skip
    same = {
        "block_size": "boft_block_size", "blocks": "boft_block_num", "factors": "boft_n_butterfly_factor",
        "dropout": "boft_dropout",
    }  # fmt: skip

    def request(self, job: Reading) -> Request:
        c = job.config
        if (c["boft_block_size"] > 0) == (c["boft_block_num"] > 0):
            raise BadFile(f"'{c.path}': boft_block_size={c['boft_block_size']} and boft_block_num="
                          f"{c['boft_block_num']}: exactly one is to be over 0.",
                          next_step="set the other to 0 in the config")  # fmt: skip
        return super().request(job)

    def check_site(self, site: Site) -> None:
        super().check_site(site)
        self.check_whole(site)
        if site.kind == "conv" and (site.groups > 1 or len(site.shape) != 4 or len({*site.shape[2:]}) > 1):
            raise Unsupported(
                f"BOFT at '{site.name}', a convolution with a kernel of {tuple(site.shape[2:])} in {site.groups} "
                "groups, has no form in HF PEFT.",
                next_step=OWN_FORM,
            )

    def take(self, job: Reading, sp: SitePlan, prefix: str) -> dict[str, Tensor]:
        (n_out,) = sp.specs["s"].shape
        M = job.file.take(f"{prefix}boft_R", sp.specs["M"].shape)
        return {"M": M, "s": job.file.take(f"{prefix}boft_s", (n_out, 1), (1, n_out)).flatten()}

    def write(self, job: Writing) -> dict[str, Any]:
        found = super().write(job)
        shapes = {sp.specs["M"].shape for sp in job.plan.sites if sp.part == 0}
        by = {"boft_block_size": {s[2] for s in shapes}, "boft_block_num": {s[1] for s in shapes}}
        one = next((name for name, values in by.items() if len(values) == 1), "")
        if not one or len({s[0] for s in shapes}) > 1:
            raise Unsupported(f"BOFT: HF PEFT has one block size or one number of blocks for all sites; these are "
                              f"{sorted(by['boft_block_size'])}.", next_step=OWN_FORM)  # fmt: skip
        return {**found, "boft_block_size": 0, "boft_block_num": 0, one: by[one].pop()}

    def give(self, job: Writing, sp: SitePlan, t: dict[str, Tensor], prefix: str) -> None:
        s = t["s"][None] if sp.site.kind == "conv" else t["s"][:, None]
        job.tensors[f"{prefix}boft_R"], job.tensors[f"{prefix}boft_s"] = t["M"], s


@converter
class LnTuning(Converter):
    """LN_TUNING. The file has whole norms; a module that is no norm is refused."""

    peft_type, methods, stem = "LN_TUNING", ("norm_tuning",), "ln_tuning_layers."
    kinds = ("norm",)
    fields = {k: v for k, v in PLAIN.items() if not k.startswith("layers_")}

    def options(self, job: Reading) -> dict[str, Any]:
        return {}

    def request(self, job: Reading) -> Request:
        modules = self.modules(job)
        bias = {s.module: s.bias for s in job.anatomy.whole_sites() if s.kind == "norm"}
        places = {(m, "weight") for m in modules} | {(m, bias[m]) for m in modules if bias[m]}
        sites = [_targets.exact(job.anatomy, m) for m in modules]
        return Request("norm_tuning", {"sites": sites}, places)

    def take(self, job: Reading, sp: SitePlan, prefix: str) -> dict[str, Tensor]:
        base = job.host.bare(sp.site).detach().cpu()
        value = job.file.take(f"{prefix}ln_tuning_layers.{sp.site.parameter}", tuple(base.shape))
        wide = torch.promote_types(value.dtype, base.dtype)
        return {"v": value.to(wide) - base.to(wide)}

    def write(self, job: Writing) -> dict[str, Any]:
        modules: dict[str, set[str]] = {}
        for sp, t in zip(job.plan.sites, job.values()):
            if sp.part != 0:
                continue
            site, base = sp.site, job.host.bare(sp.site).detach()
            modules.setdefault(site.module, set()).add(site.parameter)
            key = f"{job.prefix}{site.module}.ln_tuning_layers.{site.parameter}"
            job.tensors[key] = base.to(t["v"].dtype) + t["v"]
        for name in modules:  # HF PEFT copies all of a module: what is not trained is the base's
            for key, value in job.host.module(name).state_dict().items():
                job.tensors.setdefault(f"{job.prefix}{name}.ln_tuning_layers.{key}", value)
        return {"target_modules": _targets.words_for(job.host, list(modules), job.plan.whole)}
