"""Second formulas of small networks beside and behind sub-layers, rescaling and made prompts: see `_restated`."""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _restated_context as context


def _bottleneck(t, z: Tensor, activation: str) -> Tensor:
    return F.linear(context.ACTIVATIONS[activation](F.linear(z, t["D"], t["D_bias"])), t["U"], t["U_bias"])


def pfeiffer_adapter(t, case) -> Tensor:
    options, base = case["options"], case["base"]
    h = t["y"] + t["r"] if "r" in t else t["y"]
    if base:
        h = F.layer_norm(h, h.shape[-1:], base["gain"], base["shift"], base["eps"])
    return t["y"] + options["scale"] * _bottleneck(t, h, options["activation"])


def parallel_adapter(t, case) -> Tensor:
    options = case["options"]
    r = t["r"] if options["reads"] == "residual" and "r" in t else t["x"]
    return t["y"] + t.get("s", options["scale"]) * _bottleneck(t, r, options["activation"])


def ssf(t, case) -> Tensor:
    base = case["base"]
    if "W" in base:
        y = F.linear(t["x"], base["W"], base["bias"])
    else:
        y = F.layer_norm(t["x"], t["x"].shape[-1:], base["gain"], base["bias"])
    return torch.addcmul(t.get("shift", torch.zeros_like(t["scale"])), y, t["scale"])


def direft(t, case) -> Tensor:
    options, x, prompt = case["options"], t["x"], case["inputs"]["prompt"]
    order = prompt.long().cumsum(1)
    count = order[:, -1:]
    short = count < options["first"] + options["last"] if options["first"] and options["last"] else count < 0
    limit = torch.where(short, count // 2, count)
    first = prompt & (order <= limit.clamp(max=options["first"]))
    last = prompt & (order > count - limit.clamp(max=options["last"]))
    found = x
    for end, where in (("", first & ~last), ("_last", last)):
        end = "" if options["tied"] else end
        change = (x @ t["W" + end].T + t["b" + end]) @ t["R" + end]
        found = found + change * where[..., None]
    return found


def p_tuning(t, case) -> Tensor:
    options, z = case["options"], t["E"]
    if options["encoder"] == "mlp":
        for name in ("L1", "L2"):
            z = F.linear(z, t[name], t[name + "_bias"]).relu()
        return F.linear(z, t["L3"], t["L3_bias"])
    h = options["hidden"]
    for layer in range(options["layers"]):
        net = torch.nn.LSTM(z.shape[1], h, bidirectional=True, dtype=torch.float64)
        own = {}
        for end, other in (("", ""), ("_back", "_reverse")):
            for mine, its in (("W", "ih"), ("V", "hh")):
                own[f"weight_{its}_l0{other}"] = t[f"{mine}{layer}{end}"]
                own[f"bias_{its}_l0{other}"] = t[f"{mine}{layer}{end}_bias"]
        z = torch.func.functional_call(net, own, (z,))[0]
    return F.linear(F.linear(z, t["L1"], t["L1_bias"]).relu(), t["L2"], t["L2_bias"])


def mam(t, case) -> Tensor:
    if case["options"]["part"] == "attention":
        return context.prefix_tuning(t, case)
    return t["y"] + case["options"]["scale"] * _bottleneck(t, t["r"], "relu")


def compacter(t, case) -> Tensor:
    options = case["options"]

    def matrix(A: Tensor, S: Tensor, T: Tensor) -> Tensor:
        return sum(torch.kron(a, s @ w) for a, s, w in zip(A, S, T)).T

    made = {
        "D": matrix(t.get("A", t.get("D_A")), t["D_S"], t["D_T"]),
        "U": matrix(t.get("A", t.get("U_A")), t["U_S"], t["U_T"]),
    }
    return t["y"] + options["scale"] * _bottleneck({**t, **made}, t["y"], options["activation"])
