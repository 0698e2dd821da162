"""Mix-and-match: a prefix in each attention, a parallel adapter at each MLP. He et al., 2022, arXiv:2110.04366.

    attention      K' = [P_K ; K]     V' = [P_V ; V]        P_K, P_V: (kv_heads, length, head_dim)
    MLP            y' = y + s (U act(D r + b_D) + b_U)      D: (m, width)   U: (width, m)

A few keys steer what attention reads, and the larger part of the numbers goes where the paper found them to
count for more: beside the MLP, m = width // reduction. r is the stream that the MLP starts from (see
`parallel_adapter`). While training the prefix comes from a network, [P_K, P_V] = V tanh(D E) with biases,
shared but for its last layer, as in `prefix_tuning`; `projection=False` trains the prefix itself.

U starts at zero; the prefix takes a share of the softmax whatever its value, so the model does not begin as
its base, and nothing merges. Values are AdapterHub's: a prefix of 30 made at width 800, reduction 2, s = 4.
The paper's own best runs have m = 512. An encoder-decoder has a third attention: name it in `sites`.
"""

from torch import Tensor

from veneer.edits import (
    ACTIVATIONS,
    Method,
    Site,
    Sites,
    Specs,
    Tensors,
    before,
    bottleneck,
    bottleneck_tensors,
    hyper,
    made_prefix,
    method,
    open_before,
    prefix_tensors,
)
from veneer.errors import Unsupported


@method(
    "mam",
    paper="arXiv:2110.04366",
    family="hybrid/union",
    starts_as_identity=False,
    reason="a prefix of any value takes a share of the softmax",
    mergeable=False,
    rates=(3e-5, 1e-3),
)
class MAM(Method):
    length: int = hyper(30, "keys of the prefix", at_least=1, alias="prefix_length", size=True)
    projection: bool = hyper(True, "make keys and values by a network while training")
    hidden: int = hyper(800, "width inside that network", at_least=1, alias="bottleneck_size")
    reduction: float = hyper(
        2.0, "width of the stream over width of the adapter", more_than=0, alias="reduction_factor"
    )
    activation: str = hyper("relu", "act, between D and U", choices=tuple(ACTIVATIONS), alias="non_linearity")
    scale: float = hyper(4.0, "s, the size of what the adapter adds", alias="scaling")
    sites: Sites = hyper(
        {"attention": "attention", "output": "mlp"}, "where the prefix and the adapter stand"
    )

    def tensors(self, site: Site) -> Specs:
        if site.port == "attention":
            return prefix_tensors(site, self.length, self.hidden if self.projection else 0)
        if site.n_in != site.width:
            raise Unsupported(
                f"{self.key} reads what enters '{site.name}': {site.n_in} features, and its output has {site.width}.",
                next_step="sites={'attention': 'attention', 'output': 'mlp'}, its own",
            )
        return bottleneck_tensors(site.width, max(1, int(site.width // self.reduction)))

    def derive(self, t: Tensors) -> dict[str, Tensor]:
        """The prefix that the network makes: K and V, (kv_heads, length, head_dim)."""
        return made_prefix(t)

    def attention(self, t: Tensors, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, attend) -> Tensor:  # type: ignore[no-untyped-def]
        """q: (rows, heads, queries, head_dim), k and v: (rows, kv_heads, keys, head_dim) -> like q"""
        return attend(q, before(t.K, k), before(t.V, v), open_before(mask, self.length))

    def output(self, t: Tensors, x: Tensor, y: Tensor, residual: Tensor | None) -> Tensor:
        """(..., width) -> (..., width)"""
        r = x if residual is None else residual
        return y + self.scale * bottleneck(r, t.D, t.D_bias, t.U, t.U_bias, self.activation)
