"""HyperFormer: a network writes the adapters of every task. Karimi Mahabadi et al., 2021, arXiv:2106.04489.

    y' = y + LN(U act(D y + b_D) + b_U)       D: (m, width)   U: (width, m)   LN with scale and shift
    D, b_D, U, b_U, scale, shift = G I + c, a generator G each      I = LN(trunk2 relu(trunk1 [z ; l ; p]))

z is the task's learned vector, l the block's, p the place's (attention or MLP). All tasks share one
network, so what helps one helps the others, and a new task costs one vector. The adapters stand behind both
sub-layers, as the serial ones do. `variant="plain"` is the first form: I is made from z alone and each
place has generators of its own, which for twelve blocks is an order of magnitude larger; "++" is the
default, and the form of the paper's main results.

Which task a row belongs to comes with the call; with one task nothing needs to be said. The generators of
scale and shift start at zero, so an adapted model begins as its base model (the paper draws them from N(0,
0.01^2) too, and begins near it: `init="normal"`). The paper's runs train the base's norms as well
(`train_norms`). An encoder and a decoder share the network here; the paper has one for each.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from veneer.edits import (
    ACTIVATIONS,
    At,
    Method,
    OutputMethod,
    Site,
    Sites,
    Specs,
    Tensors,
    TrainedCopy,
    bottleneck,
    hyper,
    kaiming,
    layer_norm,
    method,
    normal,
    ones,
    zeros,
)
from veneer.errors import BadOption

WHOLE = {"scope": "adapter"}


@method(
    "hyperformer",
    paper="arXiv:2106.04489",
    family="mixture/multi-task",
    rates=(1e-4, 3e-3),
)
class HyperFormer(OutputMethod):
    tasks: int = hyper(1, "tasks that the network knows", at_least=1)
    reduction: float = hyper(
        32.0,
        "width of the stream over width of the adapter",
        more_than=0,
        alias="reduction_factor",
        size=True,
    )
    embedding: int = hyper(64, "width of z, l and p", at_least=1, alias="task_embedding_dim")
    hidden: int = hyper(128, "width inside the network that makes I", at_least=1, alias="task_hidden_dim")
    code: int = hyper(64, "width of I", at_least=1, alias="projected_task_embedding_dim")
    activation: str = hyper(
        "gelu_new", "act, between D and U", choices=tuple(ACTIVATIONS), alias="non_linearity"
    )
    variant: str = hyper("++", "one network for all places, or generators for each", choices=("++", "plain"))
    init: str = hyper(
        "identity", "start of the generators of scale and shift", choices=("identity", "normal")
    )
    train_norms: bool = hyper(False, "train the base's norms as well")
    sites: Sites = "{attention,mlp}"

    def tensors(self, site: Site) -> Specs:
        vectors = 3 if self.variant == "++" else 1
        specs: Specs = {
            "task": normal(1.0, self.tasks, self.embedding, decay=False, **WHOLE),
            "trunk1": kaiming(self.hidden, vectors * self.embedding, **WHOLE),
            "trunk1_bias": zeros(self.hidden, decay=False, **WHOLE),
            "trunk2": kaiming(self.code, self.hidden, **WHOLE),
            "trunk2_bias": zeros(self.code, decay=False, **WHOLE),
            "trunk_norm": ones(self.code, decay=False, **WHOLE),
            "trunk_norm_bias": zeros(self.code, decay=False, **WHOLE),
        }
        if self.variant == "++":
            specs["layer"] = normal(1.0, self.embedding, scope="block", decay=False)
            specs["position"] = normal(1.0, 2, self.embedding, decay=False, **WHOLE)
        scope = WHOLE if self.variant == "++" else {}
        for _, name, shape in self.generated(site.width):
            size, quiet = math.prod(shape), self.init == "identity" and name.startswith("norm")
            specs[name] = zeros(size, self.code, **scope) if quiet else normal(0.01, size, self.code, **scope)
            specs[name + "_bias"] = zeros(size, decay=False, **scope)
        return specs

    def generated(self, d: int) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
        """(tensor, its generator, its shape) of each generated tensor."""
        m = self.width(d)
        return (
            ("D", "down_weight", (m, d)), ("D_bias", "down_bias", (1, m)),
            ("U", "up_weight", (d, m)), ("U_bias", "up_bias", (1, d)),
            ("scale", "norm_scale", (1, d)), ("shift", "norm_shift", (1, d)),
        )  # fmt: skip

    def width(self, width: int) -> int:
        return max(1, int(width // self.reduction))

    def derive(self, t: Tensors, at: At) -> dict[str, Tensor]:
        """The site's adapter for the task of each row: matrices (rows, out, in), vectors (rows, 1, size)."""
        code = self.task_code(t, at)
        return {
            made: (code @ getattr(t, name).mT + getattr(t, name + "_bias")).unflatten(-1, shape).squeeze(-3)
            for made, name, shape in self.generated(at.site.width)  # type: ignore[union-attr]
        }

    def task_code(self, t: Tensors, at: At) -> Tensor:
        """I: (rows, 1, code), or (1, code) where there is one task"""
        if at.tasks is not None:
            number = at.tasks.long()[:, None, None].expand(-1, 1, self.embedding)
            known = torch.take_along_dim(t.task.expand(number.shape[0], -1, -1), number, -2)
        elif self.tasks == 1:
            known = t.task
        else:
            raise BadOption(
                f"hyperformer knows {self.tasks} tasks, and the call does not say which one each row has.",
                next_step="pass tasks=<one number a row> with the batch, or name the data's task column",
            )
        if self.variant == "++":
            place = 0 if "attention" in at.site.role else 1  # type: ignore[union-attr]
            known = torch.cat(
                torch.broadcast_tensors(known, t.layer, t.position[..., place : place + 1, :]), -1
            )
        inner = torch.relu(known @ t.trunk1.mT + t.trunk1_bias) @ t.trunk2.mT + t.trunk2_bias
        return layer_norm(inner, t.trunk_norm, t.trunk_norm_bias)

    def output(self, t: Tensors, y: Tensor) -> Tensor:
        """(rows, tokens, width) -> (rows, tokens, width)"""
        f = bottleneck(y, t.D, t.D_bias, t.U, t.U_bias, self.activation)
        return y + layer_norm(f, t.scale, t.shift)

    def also(self) -> Sequence[Method]:
        return (TrainedCopy(sites="norm"),) if self.train_norms else ()
