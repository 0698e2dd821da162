"""Second formulas: the same equations as matrix products in torch, whose gradients come from autograd.

`RESTATED[key](t, case)` gives the output; t holds the adapter's tensors and the inputs, with gradients on.
They check the loops, and the loops' gradients by differences; where both agree a slip must have been made
twice.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _restated_adapters, _restated_context
from ._restated_context import ACTIVATIONS


def lora(t, case) -> Tensor:
    options, base = case["options"], case["base"]
    s = options["alpha"] / options["rank"] ** (0.5 if options.get("rank_stabilized") else 1)
    x = t["x"] * t.get("dropout_mask", 1.0)
    y = F.linear(t["x"], base["W"], base["bias"]) + s * F.linear(F.linear(x, t["A"]), t["B"], t.get("bias"))
    return y - s * x @ (t["B0"] @ t["A0"]).T if "A0" in t else y


def lora_convolution(t, case) -> Tensor:
    options, base = case["options"], case["base"]
    s = options["alpha"] / options["rank"]
    steps = {name: base[name] for name in ("stride", "padding", "dilation")}
    if not options["dora"]:
        inner = F.conv2d(t["x"], t["A"], **steps)
        return F.conv2d(t["x"], base["W"], base["bias"], **steps) + s * F.conv2d(
            inner, t["B"][:, :, None, None]
        )
    V = base["W"] + s * (t["B"] @ t["A"].flatten(1)).view_as(base["W"])
    c = t["magnitude"] / V.flatten(1).norm(dim=1).detach()
    return F.conv2d(t["x"], c[:, None, None, None] * V, base["bias"], **steps)


def lora_embedding(t, case) -> Tensor:
    s = case["options"]["alpha"] / case["options"]["rank"]
    ids = case["inputs"]["ids"]
    return F.embedding(ids, case["base"]["table"]) + s * F.embedding(ids, t["A"].T) @ t["B"].T


def dora(t, case) -> Tensor:
    options, base = case["options"], case["base"]
    s = options["alpha"] / options["rank"] ** (0.5 if options.get("rank_stabilized") else 1)
    V = base["W"] + s * t["B"] @ t["A"]
    c = t["magnitude"] / V.norm(dim=1).detach()
    y = c * (t["x"] @ base["W"].T + s * (t["x"] @ t["A"].T) @ t["B"].T)
    return y if base["bias"] is None else y + base["bias"]


def vera(t, case) -> Tensor:
    update = t["b"] * ((t["d"] * (t["x"] @ t["A"].T)) @ t["B"].T)
    return F.linear(t["x"], case["base"]["W"], case["base"]["bias"]) + update


def loha(t, case) -> Tensor:
    base, s = case["base"], case["options"]["alpha"] / case["options"]["rank"]
    return F.linear(t["x"], base["W"] + s * (t["B1"] @ t["A1"]) * (t["B2"] @ t["A2"]), base["bias"])


def hira(t, case) -> Tensor:
    base = case["base"]
    x = t["x"] * t.get("dropout_mask", 1.0)
    return F.linear(t["x"], base["W"], base["bias"]) + F.linear(x, base["W"] * (t["B"] @ t["A"]))


def lokr(t, case) -> Tensor:
    base, s = case["base"], case["options"]["alpha"] / case["options"]["rank"]
    C = t["C"] if "C" in t else t["C_B"] @ t["C_A"]
    D = t["D"] if "D" in t else t["B"] @ t["A"]
    return F.linear(t["x"], base["W"] + s * torch.kron(C, D), base["bias"])


def fourierft(t, case) -> Tensor:
    base, scale = case["base"], case["options"]["scale"]
    S = torch.zeros(base["W"].numel(), dtype=torch.float64).index_put((t["index"],), t["c"])
    D = torch.fft.ifft2(S.view_as(base["W"])).real
    return F.linear(t["x"], base["W"] + scale * D, base["bias"])


def shira(t, case) -> Tensor:
    W = case["base"]["W"]
    moved = W.flatten().index_add(0, t["index"], t["values"]).view_as(W)
    return F.linear(t["x"], moved, case["base"]["bias"])


def norm_tuning(t, case) -> Tensor:
    base, x = case["base"], t["x"]
    if base["shift"] is None:
        return F.rms_norm(x, x.shape[-1:], base["gain"] + t["v"], base["eps"])
    return F.layer_norm(x, x.shape[-1:], base["gain"] + t["v"], base["shift"] + t["v_shift"], base["eps"])


def boft(t, case) -> Tensor:
    """By permutations: even pieces of a span first, then the odd ones, as the authors' code has it."""
    W, b, n = case["base"]["W"], case["options"]["block_size"], case["base"]["W"].shape[1]
    eye, R = torch.eye(b, dtype=torch.float64), torch.eye(n, dtype=torch.float64)
    for i, M in enumerate(t["M"]):
        Q = (M - M.mT) / 2
        blocks = torch.block_diag(*((eye - Q) @ torch.linalg.inv(eye + Q)))
        order = torch.arange(n)
        if i:
            pieces = order.view(-1, 2 ** (i + 1), b // 2)
            order = torch.cat([pieces[:, 0::2], pieces[:, 1::2]], 1).flatten()
        P = torch.eye(n, dtype=torch.float64)[order]
        R = P @ blocks @ P.T @ R
    y = t["s"] * F.linear(t["x"] @ R, W)
    return y if case["base"]["bias"] is None else y + case["base"]["bias"]


def ia3(t, case) -> Tensor:
    base = case["base"]
    if case["options"]["side"] == "input":
        return F.linear(t["x"] * t["scale"], base["W"], base["bias"])
    return F.linear(t["x"], base["W"], base["bias"]) * t["scale"]


def serial_adapter(t, case) -> Tensor:
    hidden = ACTIVATIONS[case["options"]["activation"]](F.linear(t["y"], t["D"], t["D_bias"]))
    return t["y"] + case["options"]["scale"] * F.linear(hidden, t["U"], t["U_bias"])


def bitfit(t, case) -> Tensor:
    base = case["base"]
    if case["options"]["kind"] == "linear":
        return F.linear(t["x"], base["W"], base["bias"] + t["b"])
    return F.layer_norm(t["x"], t["x"].shape[-1:], base["weight"], base["bias"] + t["b"], base["eps"])


def adalora(t, case) -> Tensor:
    options, base = case["options"], case["base"]
    update = (t["x"] @ (t["A"] * t["E"][:, None]).T) @ t["B"].T
    return F.linear(t["x"], base["W"], base["bias"]) + update * options["alpha"] / (options["rank"] + 1e-5)


def adalora_penalty(t, case) -> Tensor:
    eye = torch.eye(len(t["E"]), dtype=torch.float64)
    gaps = torch.linalg.norm(t["A"] @ t["A"].T - eye) + torch.linalg.norm(t["B"].T @ t["B"] - eye)
    return case["options"]["orthogonality"] * gaps / 2


def oft(t, case) -> Tensor:
    options, base = case["options"], case["base"]
    b, n_in = options["block_size"], base["W"].shape[1]
    Q = t["Q"].expand(n_in // b, -1) if options.get("block_share") else t["Q"]
    upper = torch.zeros(len(Q), b, b, dtype=torch.float64)
    rows, columns = torch.triu_indices(b, b, 1)
    upper = upper.index_put((torch.arange(len(Q))[:, None], rows, columns), Q)
    S = upper - upper.mT
    if options.get("eps") is not None:
        limit = options["eps"] / math.sqrt(len(t["Q"]))
        S = S * (limit / torch.linalg.matrix_norm(S)).clamp(max=1)[:, None, None]
    eye = torch.eye(b, dtype=torch.float64)
    if options["cayley"] == "exact":
        R = (eye - S) @ torch.linalg.inv(eye + S)
    elif options["terms"] == 2:
        R = eye + 2 * S
    else:
        last = max(options["terms"] - 1, 3)
        powers = [torch.linalg.matrix_power(S, k) for k in range(last + 1)]
        R = powers[0] + 2 * sum(powers[1:last]) + powers[last]
    blocks = t["x"].unflatten(-1, (n_in // b, b))
    return F.linear(torch.einsum("rtkb,kbc->rtkc", blocks, R).flatten(-2), base["W"], base["bias"])


def loreft(t, case) -> Tensor:
    options, form = case["options"], case["options"]["form"]
    prompt = case["inputs"]["prompt"]
    n = prompt.sum(1, keepdim=True)
    short = n < options["first"] + options["last"]
    ends = [torch.where(short, (n // 2).clamp(max=end), end) for end in (options["first"], options["last"])]
    from_start, from_end = prompt.cumsum(1), prompt.flip(1).cumsum(1).flip(1)
    chosen = [prompt & (from_start <= ends[0]), prompt & (from_end <= ends[1])]
    y = t["x"]
    for places, end in zip(chosen, ("", "" if options["tied"] else "_last")):
        R, W, b = t["R" + end], t.get("W" + end), t["b" + end]
        target = b if W is None else t["x"] @ W.T + b
        if form in ("loreft", "noreft", "consreft"):
            target = target - t["x"] @ R.T
        y = torch.where(places[..., None], t["x"] + target @ R, y)
    return y


def full(t, case) -> Tensor:
    return F.linear(t["x"], t["W"], t.get("bias"))


def fish_mask(t, case) -> Tensor:
    """Scores by autograd, one sample at a time."""
    base = {name: value.clone().requires_grad_() for name, value in case["base"].items()}
    score = [torch.zeros_like(value) for value in base.values()]
    for x, y in zip(case["inputs"]["x"], case["inputs"]["y"]):
        logits = base["W2"] @ (base["W1"] @ x) + base["b2"]
        losses = -logits.log_softmax(0)
        weights = losses.neg().exp().detach() if case["options"]["expected"] else F.one_hot(y, len(losses))
        for loss, weight in zip(losses, weights):
            slopes = torch.autograd.grad(loss, list(base.values()), retain_graph=True)
            score = [total + weight * slope**2 for total, slope in zip(score, slopes)]
    flat = torch.cat([value.flatten() for value in score])
    k = int(case["options"]["keep_ratio"] * len(flat))
    indices = flat.argsort(descending=True, stable=True)[:k].sort().values
    moved = torch.cat([value.detach().flatten() for value in base.values()])
    moved = moved.index_add(0, indices, t["values"])
    W1, W2, b2 = (
        part.view(value.shape)
        for part, value in zip(moved.split([v.numel() for v in base.values()]), base.values())
    )
    return F.linear(F.linear(t["x"], W1), W2, b2)


def _hard_concrete(alpha, u, options) -> Tensor:
    s = torch.sigmoid(torch.logit(u) + alpha)
    return (s * (options["high"] - options["low"]) + options["low"]).clamp(0, 1)


def diff_pruning(t, case) -> Tensor:
    options, half = case["options"], torch.tensor(0.5, dtype=torch.float64)
    u, u_group = (t["u"], t["u_group"]) if options["training"] else (half, half)
    z = _hard_concrete(t["alpha"], u, options) * _hard_concrete(t["alpha_group"], u_group, options)
    delta = z * t["w"]
    if options.get("keep") is not None:
        kept = delta.abs().flatten().topk(options["keep"]).indices
        delta = delta * torch.zeros(delta.numel(), dtype=torch.float64).index_fill(0, kept, 1.0).view_as(
            delta
        )
    return F.linear(t["x"], case["base"]["W"] + delta, case["base"]["bias"])


def diff_pruning_penalty(t, case) -> Tensor:
    options = case["options"]
    ratio = math.log(-options["low"] / options["high"])
    return options["weight"] * (
        torch.sigmoid(t["alpha"] - ratio).sum() + torch.sigmoid(t["alpha_group"] - ratio)
    )


def invertible_adapter(t, case) -> Tensor:
    options = case["options"]

    def coupling(net, v):
        hidden = ACTIVATIONS[options["activation"]](F.linear(v, t[f"{net}_down"], t[f"{net}_down_bias"]))
        out = F.linear(hidden, t[f"{net}_up"], t[f"{net}_up_bias"])
        if options["form"] == "nice":
            return torch.ones_like(out), out
        s, shift = out.chunk(2, -1)
        return (5 * 0.636 * (s / 5).atan()).exp(), shift

    first, second = t["x"].chunk(2, -1)
    if options["inverse"]:
        c, shift = coupling("G", first)
        second = (second - shift) / c
        c, shift = coupling("F", second)
        return torch.cat([(first - shift) / c, second], -1)
    c, shift = coupling("F", second)
    first = first * c + shift
    c, shift = coupling("G", first)
    return torch.cat([first, second * c + shift], -1)


def _public(namespace: dict, module: str) -> dict:
    return {
        name: function
        for name, function in namespace.items()
        if callable(function)
        and getattr(function, "__module__", None) == module
        and not name.startswith("_")
        and name != "attention_mask"
    }


RESTATED = _public(dict(globals()), __name__)
for _more in (_restated_adapters, _restated_context):
    RESTATED |= _public(vars(_more), _more.__name__)
