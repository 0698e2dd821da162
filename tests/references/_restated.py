"""Second formulas: the same equations as matrix products in torch, whose gradients come from autograd.

`RESTATED[key](t, case)` gives the output; t holds the adapter's tensors and the inputs, with gradients on.
They check the loops, and the loops' gradients by differences; where both agree a slip must have been made
twice.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {
    "identity": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
}


def lora(t, case) -> Tensor:
    options, base = case["options"], case["base"]
    s = options["alpha"] / options["rank"] ** (0.5 if options.get("rank_stabilized") else 1)
    x = t["x"] * t.get("dropout_mask", 1.0)
    y = F.linear(t["x"], base["W"], base["bias"]) + s * F.linear(F.linear(x, t["A"]), t["B"], t.get("bias"))
    return y - s * x @ (t["B0"] @ t["A0"]).T if "A0" in t else y


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


def prompt_tuning(t, case) -> Tensor:
    mask, after = case["inputs"]["mask"], int(case["options"]["place"] == "after_first")
    start = mask.long().argmax(1) + after
    return torch.stack([torch.cat([x[:n], t["prompt"], x[n:]]) for x, n in zip(t["x"], start)])


def attention_mask(mask: Tensor, queries: int, causal: bool) -> Tensor:
    """(rows, keys) -> (rows, 1, queries, keys) bool"""
    keys = mask.shape[1]
    seen = mask[:, None, None, :].expand(-1, 1, queries, -1)
    if causal:
        seen = seen & torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    return seen


def prefix_tuning(t, case) -> Tensor:
    options = case["options"]
    if options.get("projected"):
        flat = F.linear(torch.tanh(F.linear(t["E"], t["D"], t["D_bias"])), t["U"], t["U_bias"])
        shape = (options["length"], options["layers"], 2, options["kv_heads"], options["head_dim"])
        return flat.view(shape).permute(1, 2, 3, 0, 4)
    rows, heads, queries, _ = t["q"].shape
    mask = case["inputs"]["mask"]
    groups = heads // t["k"].shape[1]
    k = torch.cat([t["K"].expand(rows, -1, -1, -1), t["k"]], 2).repeat_interleave(groups, 1)
    v = torch.cat([t["V"].expand(rows, -1, -1, -1), t["v"]], 2).repeat_interleave(groups, 1)
    seen = F.pad(attention_mask(mask, queries, options["causal"]), (options["length"], 0), value=True)
    real = mask[:, -queries:][:, None, :, None]
    return F.scaled_dot_product_attention(t["q"], k, v, seen) * real


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


RESTATED = {
    name: function
    for name, function in list(globals().items())
    if callable(function) and getattr(function, "__module__", None) == __name__ and name != "attention_mask"
}
