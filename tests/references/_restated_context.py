"""Second formulas of what adds tokens, keys, gates or networks: see `_restated`."""

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


def linear_probe(t, case) -> Tensor:
    mask, pool = case["inputs"]["mask"], case["options"]["pool"]
    if pool == "mean":
        weights = mask.double() / mask.sum(1, keepdim=True)
    else:
        places = torch.arange(mask.shape[1]).expand_as(mask)
        best = (
            places.masked_fill(~mask, 99).min(1) if pool == "first" else places.masked_fill(~mask, -1).max(1)
        )
        weights = F.one_hot(best.values, mask.shape[1]).double()
    return F.linear(torch.einsum("rt,rtd->rd", weights, t["h"]), t["W"], t["b"])


def llama_adapter(t, case) -> Tensor:
    base, options = case["base"], case["options"]
    heads, kv_heads, queries, head_dim = t["q"].shape[1], t["k"].shape[1], *t["q"].shape[2:]
    groups = heads // kv_heads

    def split(flat):
        return flat.unflatten(-1, (kv_heads, head_dim)).transpose(0, 1).repeat_interleave(groups, 0)

    K_A = split(F.linear(t["prompt"], base["key_W"], base["key_bias"]))
    V_A = split(F.linear(t["prompt"], base["value_W"], base["value_bias"]))
    extra = (t["q"] @ K_A.mT / math.sqrt(head_dim)).softmax(-1) @ V_A
    g = t["gate"].tanh()[:, None, None] if options["gate"] == "head_tanh" else t["gate"]
    k, v = t["k"].repeat_interleave(groups, 1), t["v"].repeat_interleave(groups, 1)
    mask = case["inputs"]["mask"]
    seen = attention_mask(mask, queries, options["causal"])
    real = mask[:, -queries:][:, None, :, None]
    own = F.scaled_dot_product_attention(t["q"], k, v, seen)
    return torch.where(real, own + g * extra, 0.0)


def visual_prompt_tuning(t, case) -> Tensor:
    options, base = case["options"], case["base"]

    def rows_of(prompt):
        return prompt.expand(len(t["x"]), -1, -1)

    h = torch.cat([t["x"][:, :1], rows_of(t["prompt_0" if options["deep"] else "prompt"]), t["x"][:, 1:]], 1)
    for block in range(options["blocks"]):
        if options["deep"]:
            new = rows_of(t[f"prompt_{block}"])
            h = torch.cat([h[:, :1], new, h[:, 1 + options["length"] :]], 1)
        h = h + torch.tanh(base[f"M_{block}"] @ h @ base[f"N_{block}"].T)
    return h


def q_peft(t, case) -> Tensor:
    options = case["options"]
    query_mask, document_mask = case["inputs"]["query_mask"], case["inputs"]["document_mask"]
    if options["form"] == "A":
        packed = torch.cat([t[name] for name in ("query", "key", "value")])
        packed_bias = torch.cat([t[f"{name}_bias"] for name in ("query", "key", "value")])
        q, k = t["query_states"].transpose(0, 1), t["document_states"].transpose(0, 1)
        soft, _ = F.multi_head_attention_forward(
            q, k, k, q.shape[-1], options["heads"], packed, packed_bias, None, None, False, 0.0,
            t["output"], t["output_bias"], key_padding_mask=~document_mask,
        )  # fmt: skip
        soft = [rows[mask] for rows, mask in zip(soft.transpose(0, 1), query_mask)]
    else:
        near = F.cosine_similarity(t["document_states"][:, :, None], t["query_states"][:, None], dim=-1)
        near = near.masked_fill(~query_mask[:, None], -2).max(-1).values.masked_fill(~document_mask, -2)
        picked = near.topk(options["chosen"]).indices.sort().values
        e = torch.stack([rows[i] for rows, i in zip(t["document_states"], picked)])
        soft = e + F.linear(F.relu(F.linear(e, t["down"], t["down_bias"])), t["up"], t["up_bias"])
    rows = [
        torch.cat([s, t["instruction"], d[m], q[n]])
        for s, d, m, q, n in zip(soft, t["document_states"], document_mask, t["query_states"], query_mask)
    ]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side=options["padding"])


def unipelt(t, case) -> Tensor:
    part, causal, mask = case["options"]["part"], case["options"]["causal"], case["inputs"]["mask"]
    own = torch.sigmoid(t["x"] @ t[f"gate_{part}"] + t[f"gate_{part}_bias"])
    live = mask.double()
    if causal:
        G = (own * live).cumsum(1) / live.cumsum(1).clamp(min=1)
    else:
        G = ((own * live).sum(1, keepdim=True) / live.sum(1, keepdim=True)).expand_as(own)
    if part == "lora":
        base = case["base"]
        update = own[..., None] * F.linear(F.linear(t["x"], t["A"]), t["B"])
        return (F.linear(t["x"], base["W"], base["bias"]) + update) * live[..., None]
    if part == "adapter":
        hidden = ACTIVATIONS[case["options"]["activation"]](F.linear(t["y"], t["D"], t["D_bias"]))
        return (t["y"] + G[..., None] * F.linear(hidden, t["U"], t["U_bias"])) * live[..., None]
    groups, queries = t["q"].shape[1] // t["k"].shape[1], t["q"].shape[2]
    k, v, K, V = (t[name].repeat_interleave(groups, -3) for name in ("k", "v", "K", "V"))
    seen = attention_mask(mask, queries, causal)
    size = G[:, None, :, None]  # scales the scores of the prefix, as it scales its keys
    scores = torch.cat([size * (t["q"] @ K.mT), (t["q"] @ k.mT).masked_fill(~seen, -1e300)], -1)
    weights = (scores / math.sqrt(t["q"].shape[-1])).softmax(-1)
    mixed = size * (weights[..., : K.shape[-2]] @ V) + weights[..., K.shape[-2] :] @ v
    return mixed * live[:, None, :, None]


def adapter_fusion(t, case) -> Tensor:
    q, k = F.linear(t["h"], t["Q"], t["Q_bias"]), F.linear(t["z"], t["K"], t["K_bias"])
    p = (torch.einsum("rtd,nrtd->rtn", q, k) / case["options"]["temperature"]).softmax(-1)
    mixed = torch.einsum("rtn,nrtd->rtd", p, t["z"])
    return (F.linear(mixed, t["V"]) if "V" in t else mixed) + t["residual"]


def adapter_fusion_penalty(t, case) -> Tensor:
    return case["options"]["weight"] * (torch.eye(len(t["V"]), dtype=torch.float64) - t["V"]).square().sum()


def hyperformer(t, case) -> Tensor:
    options, ids = case["options"], case["inputs"]["task_ids"]
    known = t["task"][ids]
    if options["plus"]:
        place = torch.cat([t["layer"][options["layer"]], t["position"][options["position"]]])
        known = torch.cat([known, place.expand(len(ids), -1)], -1)
    known = F.linear(F.relu(F.linear(known, t["trunk1"], t["trunk1_bias"])), t["trunk2"], t["trunk2_bias"])
    known = F.layer_norm(known, known.shape[-1:], t["trunk_norm"], t["trunk_norm_bias"])

    def made(name, *shape):
        return F.linear(known, t[name], t[f"{name}_bias"]).view(len(ids), *shape)

    d, m = options["width"], options["m"]
    hidden = t["y"] @ made("down_weight", m, d).mT + made("down_bias", 1, m)
    branch = ACTIVATIONS[options["activation"]](hidden) @ made("up_weight", d, m).mT + made("up_bias", 1, d)
    return t["y"] + F.layer_norm(branch, (d,)) * made("norm_scale", 1, d) + made("norm_shift", 1, d)


def ladder_side_tuning(t, case) -> Tensor:
    options, mask = case["options"], case["inputs"]["mask"]
    heads = options["heads"]
    s = F.linear(t["h_0"], t["D_0"], t["D_0_bias"])
    for i in options["kept"]:

        def through(name, x, i=i):
            return F.linear(x, t[f"{i}.{name}"], t[f"{i}.{name}_bias"])

        def normed(name, x, i=i):
            return F.layer_norm(x, x.shape[-1:], t[f"{i}.{name}"], t[f"{i}.{name}_bias"])

        mu = torch.sigmoid(10 * t[f"gate_{i}"])
        s = mu * s + (1 - mu) * F.linear(t[f"h_{i}"], t[f"D_{i}"], t[f"D_{i}_bias"])
        x = normed("norm1", s)
        q, k, v = (
            through(name, x).unflatten(-1, (heads, -1)).transpose(1, 2) for name in ("query", "key", "value")
        )
        seen = attention_mask(mask, mask.shape[1], options["causal"])
        seen = seen | torch.eye(
            mask.shape[1], dtype=torch.bool
        )  # pads see themselves, so that none sees nothing
        s = s + through("out", F.scaled_dot_product_attention(q, k, v, seen).transpose(1, 2).flatten(2))
        hidden = ACTIVATIONS[options["activation"]](through("mlp_up", normed("norm2", s)))
        s = s + through("mlp_down", hidden)
    s = F.layer_norm(s, s.shape[-1:], t["norm"], t["norm_bias"])
    return F.linear(s, t["U"], t["U_bias"]) * mask[..., None]
