"""VERA, OFT and IA3 of HF PEFT: methods vera, oft and ia3."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from veneer.anatomy import Site
from veneer.engine._plan import SitePlan
from veneer.errors import BadFile, ShapeDiffers, Unsupported

from . import _targets
from ._config import TARGETS, Field, only, version_of
from ._converter import OWN_FORM, Converter, Reading, Request, Writing, beside_default, converter, whole

_PLAIN = {"bias": only("none"), "init_weights": Field(True)}
_TARGETS = {k: v for k, v in TARGETS.items() if k != "exclude_modules"}


@converter
class Vera(Converter):
    """VERA. The frozen pair is read from the file, or drawn again as HF PEFT draws it, and then kept."""

    peft_type, methods, stem = "VERA", ("vera",), "vera_lambda"
    fields = {
        **_TARGETS, **_PLAIN, "r": Field(256, "whole"), "projection_prng_key": Field(0, "whole"),
        "save_projection": Field(True, "flag"), "vera_dropout": Field(0.0, "number"),
        "d_initial": Field(0.1, "number"),
    }  # fmt: skip

    def options(self, job: Reading) -> dict[str, Any]:
        c = job.config
        return {
            "rank": c["r"], "seed": c["projection_prng_key"], "dropout": c["vera_dropout"],
            "d_start": c["d_initial"], "save_projection": True,
        }  # fmt: skip

    def take(self, job: Reading, sp: SitePlan, prefix: str) -> dict[str, Tensor]:
        rank: int = sp.method.rank  # type: ignore[attr-defined]
        found = {
            "d": job.file.take(f"{prefix}vera_lambda_d", (rank,)),
            "b": job.file.take(f"{prefix}vera_lambda_b", (sp.site.shape[0],)),
        }
        if "vera" not in job.pairs:
            job.pairs["vera"] = self._frozen(job, rank)
        A, B = job.pairs["vera"]
        return {**found, "A": A, "B": B}

    def _frozen(self, job: Reading, rank: int) -> tuple[Tensor, Tensor]:
        """A (rank, widest in), B (widest out, rank)."""
        shapes = {e.tensor: e.shape for e in job.plan.entries if e.tensor in ("A", "B")}
        A, B = job.file.pop("base_model.vera_A"), job.file.pop("base_model.vera_B")
        if A is None or B is None:
            if job.config["save_projection"]:
                raise ShapeDiffers(
                    f"'{job.config.path.parent}' says save_projection, and its file has no base_model.vera_A and "
                    "base_model.vera_B.",
                    next_step="copy the folder again",
                )
            return drawn_by_hf(shapes["A"], shapes["B"], job.config["projection_prng_key"])
        (r, n_in), (n_out, _) = shapes["A"], shapes["B"]
        if (
            A.dim() != 2
            or B.dim() != 2
            or A.shape[0] != r
            or A.shape[1] < n_in
            or B.shape[1] != r
            or len(B) < n_out
        ):
            raise ShapeDiffers(
                f"the frozen pair of '{job.config.path.parent}' is {tuple(A.shape)} and {tuple(B.shape)}; this base "
                f"needs {shapes['A']} and {shapes['B']}.",
                next_step="load it on the base that it was trained on",
            )
        return A[:, :n_in].clone(), B[:n_out].clone()  # wider where other adapters of that model were

    def write(self, job: Writing) -> dict[str, Any]:
        m = job.adapter.method
        save = bool(job.options.pop("save_projection", True))
        frozen = job.adapter.frozen(job.host.shared)
        pair = {e.tensor: frozen[e.key] for e in job.plan.entries if e.tensor in ("A", "B")}
        modules = []
        for sp, t in zip(job.plan.sites, job.values()):
            if sp.part != 0:
                continue
            site, prefix = sp.site, f"{job.prefix}{sp.site.module}."
            if site.kind not in self.kinds or f"{prefix}vera_lambda_d" in job.tensors:
                why = (
                    "two parts of one fused projection"
                    if site.kind in self.kinds
                    else f"of kind '{site.kind}'"
                )
                raise Unsupported(
                    f"VERA at '{site.name}', {why}, has no form in HF PEFT.", next_step=OWN_FORM
                )
            if site.ranges and site.ranges != ((0, site.n_out),):
                raise Unsupported(f"VERA at '{site.name}': HF PEFT would use other rows of the frozen B at this part "
                                  "of a fused projection.", next_step="edit all of it, by its module name")  # fmt: skip
            modules.append(site.module)
            job.tensors[f"{prefix}vera_lambda_d"] = t["d"]
            job.tensors[f"{prefix}vera_lambda_b"] = whole(site, job.host, t["b"])
        if save:
            job.tensors["base_model.vera_A"], job.tensors["base_model.vera_B"] = pair["A"], pair["B"]
        else:
            drawn = drawn_by_hf(tuple(pair["A"].shape), tuple(pair["B"].shape), m.seed)
            if not all(torch.equal(d, p.cpu().to(d.dtype)) for d, p in zip(drawn, (pair["A"], pair["B"]))):
                raise Unsupported("VERA: save_projection=False, but the frozen pair is not the one that HF PEFT draws "
                                  f"from projection_prng_key={m.seed}.", next_step="save_projection=True")  # fmt: skip
        fields = {
            "projection_prng_key": m.seed, "save_projection": save, "vera_dropout": m.dropout, "d_initial": m.d_start,
            "fan_in_fan_out": any(sp.site.kind == "conv1d" for sp in job.plan.sites),
        }  # fmt: skip
        words = _targets.words_for(job.host, modules, job.plan.whole)
        return {"r": m.rank, **beside_default(self.fields, fields), "target_modules": words}


def drawn_by_hf(a: tuple[int, ...], b: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor]:
    """HF PEFT's frozen pair: A, then B, uniform by Kaiming's rule for ReLU, from one generator."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for shape in (a, b):
        bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(shape[1]))
        found.append(torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator))
    return found[0], found[1]


@converter
class Oft(Converter):
    """OFT. A block size that does not divide a width goes to the nearest that does, as in HF PEFT.

    Of convolutions those with kernels of one place: HF PEFT turns overlapping patches of the input, and adds them up
    where they overlap, which is no edit of the weight.
    """

    peft_type, methods, stem = "OFT", ("oft",), "oft_"
    kinds = ("linear", "conv", "embedding")
    fields = {
        **TARGETS, **_PLAIN, "r": Field(0, "whole"), "oft_block_size": Field(32, "whole"),
        "module_dropout": Field(0.0, "number"), "coft": Field(False, "flag"), "eps": Field(6e-5, "number"),
        "block_share": Field(False, "flag"), "use_cayley_neumann": Field(True, "flag"),
        "num_cayley_neumann_terms": Field(5, "whole"),
    }  # fmt: skip

    def request(self, job: Reading) -> Request:
        made = super().request(job)
        c = job.config
        if (c["r"] > 0) == (c["oft_block_size"] > 0):
            raise BadFile(
                f"'{c.path}': r={c['r']} and oft_block_size={c['oft_block_size']}: exactly one is to be over 0.",
                next_step='"r": 0, "oft_block_size": 32 in that file',
            )
        if c["use_cayley_neumann"] and version_of(c.raw) < (0, 18):
            warnings.warn(
                f"'{c.path}' was written before HF PEFT 0.18, with another series; it is read as 0.21.2 reads it.",
                stacklevel=6,
            )
        sites = {s.module: s for s in job.anatomy.whole_sites() if (s.module, s.parameter) in made.places}
        sizes = {name: self._size(job, site) for name, site in sites.items()}
        usual = Counter(sizes.values()).most_common(1)[0][0]
        made.options["block_size"] = usual
        made.options["patterns"] = {
            _targets.exact(job.anatomy, name): {"block_size": n} for name, n in sizes.items() if n != usual
        }
        return made

    def _size(self, job: Reading, site: Site) -> int:
        width = math.prod(site.shape[1:])
        _check_kernel(site)
        given = job.config["r"] or job.config["oft_block_size"]
        size = _nearest_divisor(width, given)
        return width // size if job.config["r"] else size

    def options(self, job: Reading) -> dict[str, Any]:
        c = job.config
        return {
            "cayley": "neumann" if c["use_cayley_neumann"] else "exact", "terms": c["num_cayley_neumann_terms"],
            "coft": c["coft"], "eps": c["eps"], "block_share": c["block_share"],
            "module_dropout": c["module_dropout"],
        }  # fmt: skip

    def take(self, job: Reading, sp: SitePlan, prefix: str) -> dict[str, Tensor]:
        shape = sp.specs["Q"].shape
        if sp.site.kind == "embedding":  # HF PEFT turns the rows that come out: the other way round
            return {"Q": -job.file.take(f"{prefix}oft_embedding_R.weight", shape)}
        return {"Q": job.file.take(f"{prefix}oft_R.weight", shape)}

    def write(self, job: Writing) -> dict[str, Any]:
        m = job.adapter.method
        sizes: dict[str, int] = {}
        for sp, t in zip(job.plan.sites, job.values()):
            if sp.part != 0:
                continue
            site = sp.site
            if site.kind not in self.kinds or site.ranges:
                what = "a part of a fused projection" if site.ranges else f"of kind '{site.kind}'"
                raise Unsupported(
                    f"OFT at '{site.name}', {what}, has no form in HF PEFT.", next_step=OWN_FORM
                )
            _check_kernel(site)
            name = "oft_embedding_R" if site.kind == "embedding" else "oft_R"
            Q = -t["Q"] if site.kind == "embedding" else t["Q"]
            job.tensors[f"{job.prefix}{site.module}.{name}.weight"] = Q
            sizes[site.module] = (1 + math.isqrt(1 + 8 * Q.shape[-1])) // 2
        widths = {sp.site.module: math.prod(sp.site.shape[1:]) for sp in job.plan.sites if sp.part == 0}
        asked = {"r": 0, "oft_block_size": max(sizes.values())}
        if any(_nearest_divisor(widths[n], asked["oft_block_size"]) != size for n, size in sizes.items()):
            counts = {widths[n] // size for n, size in sizes.items()}
            if len(counts) > 1:
                raise Unsupported(
                    f"OFT: HF PEFT has one block size or one number of blocks for all sites; these are "
                    f"{sorted(set(sizes.values()))}.",
                    next_step="train with blocks=4, or veneer.save(model, name, folder)",
                )
            asked = {"r": counts.pop(), "oft_block_size": 0}
        fields = {
            "coft": m.coft, "eps": m.eps, "block_share": m.block_share, "module_dropout": m.module_dropout,
            "use_cayley_neumann": m.cayley in ("neumann", True), "num_cayley_neumann_terms": m.terms,
        }  # fmt: skip
        words = _targets.words_for(job.host, list(sizes), job.plan.whole)
        return {**asked, "use_cayley_neumann": fields["use_cayley_neumann"],
                **beside_default(self.fields, fields), "target_modules": words}  # fmt: skip


def _check_kernel(site: Site) -> None:
    if site.kind == "conv" and (site.groups > 1 or math.prod(site.shape[2:]) > 1):
        raise Unsupported(
            f"OFT at '{site.module}', a convolution with a kernel of {tuple(site.shape[2:])} in {site.groups} groups: "
            "HF PEFT turns patches of its input there, which no weight does.",
            next_step="exclude it, or train lora there",
        )


def _nearest_divisor(width: int, wanted: int) -> int:
    """HF PEFT's choice: `wanted` where it divides, else the nearest divisor, the smaller of two that are as near."""
    if wanted >= width:
        return width
    above = next(n for n in range(wanted, width + 1) if width % n == 0)
    below = next(n for n in range(wanted, 0, -1) if width % n == 0)
    return below if wanted - below <= above - wanted else above


@converter
class Ia3(Converter):
    """IA3. `feedforward_modules` are scaled at their input, all others at their output."""

    peft_type, methods, stem = "IA3", ("ia3",), "ia3_l"
    fields = {
        **{k: v for k, v in TARGETS.items() if not k.startswith("layers_")},
        "feedforward_modules": Field(None, "names"), "init_ia3_weights": Field(True),
    }  # fmt: skip

    def request(self, job: Reading) -> Request:
        c = job.config
        modules = self.modules(job)
        inner = c["feedforward_modules"] or []
        whole_name = (
            _targets.pattern(inner, c, "feedforward_modules").fullmatch if isinstance(inner, str) else None
        )
        inputs = [n for n in modules if (whole_name(n) if whole_name else n.endswith(tuple(inner)))]
        outputs = [n for n in modules if n not in inputs]
        sites = {
            port: [_targets.exact(job.anatomy, n, port) for n in names]
            for port, names in (("output", outputs), ("input", inputs)) if names
        }  # fmt: skip
        return Request("ia3", {"sites": sites}, {(n, "") for n in modules})

    def take(self, job: Reading, sp: SitePlan, prefix: str) -> dict[str, Tensor]:
        (n,) = sp.specs["scale"].shape
        shape = (n, 1) if sp.site.port == "output" else (1, n)
        return {"scale": job.file.take(f"{prefix}ia3_l", shape).flatten()}

    def write(self, job: Writing) -> dict[str, Any]:
        layers = {s.module: s for s in job.host.anatomy.whole_sites() if s.parameter == "weight"}
        outputs: dict[str, Tensor] = {}
        inputs: dict[str, Tensor] = {}
        for sp, t in zip(job.plan.sites, job.values()):
            if sp.part != 0:
                continue
            site, layer = sp.site, layers.get(sp.site.module)
            if layer is None or layer.kind not in self.kinds or (site.ranges and site.port == "input"):
                what = "the input of a part of a fused projection" if site.ranges else "no linear layer"
                raise Unsupported(
                    f"IA3 at '{site.name}', {what}, has no form in HF PEFT.", next_step=OWN_FORM
                )
            if site.port == "input":
                inputs[site.module] = t["scale"]
            else:
                placed = whole(_as_weight(site, layer), job.host, t["scale"], fill=1.0)
                outputs[site.module] = outputs.get(site.module, torch.ones_like(placed)) * placed
        both = set(inputs) & set(outputs)
        if both:
            raise Unsupported(
                f"IA3 scales the input and the output of '{sorted(both)[0]}'; HF PEFT does one of them.",
                next_step=OWN_FORM,
            )
        for name, scale in outputs.items():
            job.tensors[f"{job.prefix}{name}.ia3_l"] = scale[:, None]
        for name, scale in inputs.items():
            job.tensors[f"{job.prefix}{name}.ia3_l"] = scale[None]
        words = _targets.words_for(job.host, [*outputs, *inputs], job.plan.whole)
        inner = sorted({n.rpartition(".")[2] for n in inputs})
        if (
            isinstance(words, str)
            or not set(inner) <= set(words)
            or any(n.endswith(tuple(inner)) for n in outputs if inner)
        ):
            # HF PEFT wants one list inside the other, unless one of them is an expression.
            words = _targets.expression([*outputs, *inputs])
            return {"target_modules": words, "feedforward_modules": _targets.expression(list(inputs)),
                    **self._flag(layers, [*outputs, *inputs])}  # fmt: skip
        return {
            "target_modules": words,
            "feedforward_modules": inner,
            **self._flag(layers, [*outputs, *inputs]),
        }

    def _flag(self, layers: dict[str, Site], names: list[str]) -> dict[str, Any]:
        return {"fan_in_fan_out": True} if any(layers[n].kind == "conv1d" for n in names) else {}


def _as_weight(site: Site, layer: Site) -> Site:
    """The site with the parameter of its layer, so that its rows can be counted."""
    import dataclasses

    return dataclasses.replace(site, parameter=layer.parameter)
