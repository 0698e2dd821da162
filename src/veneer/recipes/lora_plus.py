"""LoRA+: the second factor of a low-rank pair learns faster. Hayou et al., 2024, arXiv:2402.12354.

    rate of B = ratio * rate of A        B: the factor that starts at zero, named B in every method here

In wide layers one rate for both factors is too small for B, or too large for A. The paper takes a ratio of
16 and a rate of A near LoRA's own or somewhat lower. Other trained tensors of the adapter (magnitudes,
singular values, heads) keep the rate of A; HF PEFT gives vectors the rate of B, and embeddings one of their
own.
"""

import torch

from veneer.anatomy import Site
from veneer.edits import Spec, hyper
from veneer.errors import Unsupported

from ._recipe import Group, Recipe, adamw, labels, recipe


@recipe("lora_plus", paper="arXiv:2402.12354", rates=(1e-5, 1e-3))
class LoRAPlus(Recipe):
    ratio: float = hyper(16.0, "rate of B over rate of A", alias="loraplus_lr_ratio", more_than=0)

    def regroup(self, site: Site, name: str, spec: Spec) -> tuple[str, float] | None:
        return (f"{spec.group}B", spec.rate * self.ratio) if name == "B" else None

    def optimizer(self, groups: list[Group], lr: float, weight_decay: float) -> torch.optim.Optimizer:
        names = {label.rpartition("/")[2] for label, _ in labels(groups)}
        if "B" not in names:
            raise Unsupported(
                "lora_plus gives the trained tensor B of a low-rank pair B A its own rate, and this adapter "
                f"trains {', '.join(sorted(names)) or 'nothing'}.",
                next_step="use it with a method that trains A and B, such as lora, dora or adalora",
            )
        return adamw(groups, lr)
