"""AdamW: decoupled weight decay, torch's fused kernel. Loshchilov and Hutter, 2017, arXiv:1711.05101.

    m <- beta1 m + (1 - beta1) g        v <- beta2 v + (1 - beta2) g^2
    p <- (1 - lr decay) p - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

The default. Tensors whose neutral value is not zero come in groups without decay.
"""

import torch

from veneer.edits import hyper

from ._recipe import Group, Recipe, adamw, recipe


@recipe("adamw", paper="arXiv:1711.05101")
class AdamW(Recipe):
    beta1: float = hyper(0.9, "memory of the gradient", at_least=0, at_most=1)
    beta2: float = hyper(0.999, "memory of its square", at_least=0, at_most=1)
    eps: float = hyper(1e-8, "added to the root of the square", more_than=0)

    def optimizer(self, groups: list[Group], lr: float, weight_decay: float) -> torch.optim.Optimizer:
        return adamw(groups, lr, betas=(self.beta1, self.beta2), eps=self.eps)
