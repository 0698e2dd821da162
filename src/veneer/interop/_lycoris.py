"""LOHA and LOKR of HF PEFT: methods loha and lokr. The same numbers under other names.

| here | in HF PEFT |
|---|---|
| B1 (out, rank), A1 (rank, in, height, width) | `hada_w1_a` (out, r), `hada_w1_b` (r, in height width) |
| with a core: T1 (rank, rank, height, width), B1, A1 (rank, in) | `hada_t1`, `hada_w1_a` (r, out), `hada_w1_b` |
| a part of a fused projection | all of it, zero rows in B1 and B2 for the rest; no form in LOKR |
| C (m1, n1), or C_B, C_A; D (m2, n2, height, width) | `lokr_w1`, or `lokr_w1_a`, `lokr_w1_b`; `lokr_w2` |
| B (m2, rank), A (rank, n2, height, width) | `lokr_w2_a`, `lokr_w2_b` (r, n2 height width); with a core as above |
"""

from __future__ import annotations

import math

from torch import Tensor

from veneer.anatomy import Site
from veneer.engine._plan import SitePlan

from ._config import Field
from ._converter import Reading, Writing, converter, whole
from ._plain import BY_PATTERN, PLAIN, Plain

DROPOUTS = {"rank_dropout": Field(0.0, "number"), "module_dropout": Field(0.0, "number")}
SAME = {"tucker": "use_effective_conv2d", "rank_dropout": "rank_dropout", "module_dropout": "module_dropout"}
SIZES = {
    "r": Field(8, "whole"), "alpha": Field(8, "number"), "use_effective_conv2d": Field(False, "flag"),
    "init_weights": Field(True),
}  # fmt: skip


@converter
class Loha(Plain):
    """LOHA. Its start is what trains from here, and no part of what a folder means."""

    peft_type, methods, stem = "LOHA", ("loha",), "hada_"
    kinds = ("linear", "conv")
    fields = {**PLAIN, **BY_PATTERN, **SIZES, **DROPOUTS}
    same, patterned = SAME, {"rank": "r", "alpha": "alpha"}

    def take(self, job: Reading, sp: SitePlan, prefix: str) -> dict[str, Tensor]:
        found = {}
        for i in "12":
            B, A = sp.specs[f"B{i}"].shape, sp.specs[f"A{i}"].shape
            w = f"{prefix}hada_w{i}"
            if f"T{i}" in sp.specs:
                found[f"T{i}"] = take_core(job, f"{prefix}hada_t{i}", sp.specs[f"T{i}"].shape)
                found[f"B{i}"] = job.file.take(f"{w}_a", B[::-1]).mT
            else:
                found[f"B{i}"] = job.file.take(f"{w}_a", B)
            found[f"A{i}"] = job.file.take(f"{w}_b", (A[0], math.prod(A[1:]))).reshape(A)
        return found

    def give(self, job: Writing, sp: SitePlan, t: dict[str, Tensor], prefix: str) -> None:
        for i in "12":
            B, w = whole(sp.site, job.host, t[f"B{i}"]), f"{prefix}hada_w{i}"
            if f"T{i}" in t:
                job.tensors[f"{prefix}hada_t{i}"] = core_as_written(t[f"T{i}"])
                B = B.mT
            job.tensors[f"{w}_a"], job.tensors[f"{w}_b"] = B, t[f"A{i}"].flatten(1)


@converter
class Lokr(Plain):
    """LOKR. Sizes of C and D follow from `decompose_factor` by the same rule."""

    peft_type, methods, stem = "LOKR", ("lokr",), "lokr_"
    kinds = ("linear", "conv")
    fields = {
        **PLAIN, **BY_PATTERN, **SIZES, **DROPOUTS, "decompose_both": Field(False, "flag"),
        "decompose_factor": Field(-1, "whole"), "rank_dropout_scale": Field(False, "flag"),
    }  # fmt: skip
    same = {
        **SAME, "decompose_both": "decompose_both", "factor": "decompose_factor",
        "rank_dropout_scale": "rank_dropout_scale",
    }  # fmt: skip
    patterned = {"rank": "r", "alpha": "alpha"}
    names = {"C": "w1", "C_B": "w1_a", "C_A": "w1_b", "D": "w2", "B": "w2_a", "A": "w2_b", "T": "t2"}

    def check_site(self, site: Site) -> None:
        super().check_site(site)
        self.check_whole(site)

    def take(self, job: Reading, sp: SitePlan, prefix: str) -> dict[str, Tensor]:
        found = {}
        for name, spec in sp.specs.items():
            if spec.noise:
                continue
            key, shape = f"{prefix}lokr_{self.names[name]}", spec.shape
            if name == "T":
                found[name] = take_core(job, key, shape)
            elif name == "B" and "T" in sp.specs:
                found[name] = job.file.take(key, shape[::-1]).mT
            elif name == "A":
                found[name] = job.file.take(key, (shape[0], math.prod(shape[1:]))).reshape(shape)
            else:
                found[name] = job.file.take(key, shape)
        return found

    def give(self, job: Writing, sp: SitePlan, t: dict[str, Tensor], prefix: str) -> None:
        for name, value in t.items():
            if name == "T":
                value = core_as_written(value)
            elif name == "B" and "T" in t:
                value = value.mT
            elif name == "A":
                value = value.flatten(1)
            job.tensors[f"{prefix}lokr_{self.names[name]}"] = value


def take_core(job: Reading, key: str, shape: tuple[int, ...]) -> Tensor:
    """A core of a kernel over lines has a last axis of one in the file."""
    return job.file.take(key, shape if len(shape) == 4 else (*shape, 1)).reshape(shape)


def core_as_written(T: Tensor) -> Tensor:
    return T if T.dim() == 4 else T[..., None]
