"""Prompts and prefixes as pure functions: by hand, against references, with a row axis."""

import copy
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import tensor
from torch.testing import assert_close

import veneer
from references import ladder_side_tuning as ladder_reference
from references import llama_adapter as llama_reference
from references import prefix_tuning as prefix_reference
from references import q_peft as q_peft_reference
from references import visual_prompt_tuning as visual_reference
from veneer.anatomy import Site
from veneer.edits import At, Tensors, add_row_axis, build
from veneer.errors import BadOption
from zoo import zoo

torch.set_num_threads(1)


def normal(*shape, seed=9):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def attention_site(heads=4, kv_heads=2, head_dim=3, width=12, **more):
    return Site(
        "block.0.attention", "attention", "m.attention", "attention", n_in=width, n_out=width, width=width,
        heads=heads, kv_heads=kv_heads, head_dim=head_dim, port="attention", **more,
    )  # fmt: skip


def embedding_site(width=6):
    return Site("embedding", "embedding", "m.e", "other", n_in=width, n_out=width, width=width, port="tokens")


def randomised(method, where, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = {
        n: torch.randn(s.shape, generator=generator, dtype=torch.float64)
        for n, s in method.tensors(where).items()
    }
    return Tensors(made)


def by_rows(several):
    return Tensors(
        {
            name: add_row_axis(
                torch.stack([getattr(t, name) for t in several]), getattr(several[0], name).dim()
            )
            for name in several[0]
        }
    )


def attend(q, k, v, mask, scale=None):
    """Softmax attention with grouped key heads, masks of both kinds."""
    k, v = (z.repeat_interleave(q.shape[1] // z.shape[1], 1) for z in (k, v))
    scores = q @ k.mT * (scale or 1 / math.sqrt(q.shape[-1]))
    scores = scores.masked_fill(~mask, -1e30) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1) @ v


def mask_for(case):
    """(rows, 1, queries, keys) bool of a case: real keys, and for causal ones no later key."""
    real, queries = case["inputs"]["mask"], case["inputs"]["q"].shape[2]
    keys = real.shape[1]
    seen = real[:, None, None, :].expand(-1, 1, queries, -1)
    if case["options"]["causal"]:
        now = torch.arange(keys - queries, keys)[:, None]
        seen = seen & (torch.arange(keys)[None] <= now)
    return seen


# ---- prefix tuning

PLAIN = [c for c in prefix_reference.cases() if not c["options"].get("projected")]


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("case", PLAIN, ids=lambda c: c["name"])
def test_prefix_tuning_equals_its_reference(case, kind):
    t = Tensors({n: v.clone().requires_grad_() for n, v in case["tensors"].items()})
    q, k, v = (case["inputs"][n].clone().requires_grad_() for n in "qkv")
    mask = mask_for(case)
    if kind == "float":
        mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -1e30)
    method = build("prefix_tuning", length=case["options"]["length"])
    output = method.attention(t, q, k, v, mask, attend, At())
    real = case["inputs"]["mask"][:, -q.shape[2] :, None][:, None]
    expected = prefix_reference.reference(case)["output"]
    assert_close(output * real, expected)
    wanted = {**dict(t.items()), "q": q, "k": k, "v": v}
    found = torch.autograd.grad((output * real * case["cotangent"]).sum(), list(wanted.values()))
    slopes = prefix_reference.gradients(case)
    for name, value in zip(wanted, found):
        assert_close(value, slopes[name], rtol=1e-7, atol=1e-8)
    for mistake, _ in prefix_reference.MUTATIONS:
        changed = prefix_reference.mutated(case, mistake)["output"]
        if not torch.equal(changed, expected):
            assert not torch.allclose(output * real, changed), mistake


def test_the_network_of_prefix_tuning_makes_the_prefix_of_its_reference():
    case = next(c for c in prefix_reference.cases() if c["options"].get("projected"))
    o, own = case["options"], case["tensors"]
    method = build("prefix_tuning", length=o["length"], projection=True, hidden=own["D"].shape[0])
    U = own["U"].view(o["layers"], 2, o["kv_heads"], o["head_dim"], -1)
    U_bias = own["U_bias"].view(o["layers"], 2, o["kv_heads"], 1, o["head_dim"])
    expected = prefix_reference.reference(case)["output"]
    where = attention_site(o["kv_heads"], o["kv_heads"], o["head_dim"], own["E"].shape[1])
    for layer in range(o["layers"]):
        t = Tensors(E=own["E"], D=own["D"], D_bias=own["D_bias"], U=U[layer], U_bias=U_bias[layer])
        assert {n: v.shape for n, v in t.items()} == {n: s.shape for n, s in method.tensors(where).items()}
        made = method.derive(t)
        assert_close(torch.stack([made["K"], made["V"]]), expected[layer])
        rows = method.derive(by_rows([t, t.with_(E=2 * t.E)]))
        assert_close(rows["K"][0], made["K"])
        assert_close(rows["V"][1], method.derive(t.with_(E=2 * t.E))["V"])


def test_prefix_tuning_by_hand():
    """A zero query weighs all keys alike: a prefix value of 6 beside own values 0 and 3 gives 3."""
    t = Tensors(K=tensor([[[1.0]]]), V=tensor([[[6.0]]]))
    q, k, v = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 2, 1), tensor([[[[0.0], [3.0]]]])
    mask = torch.ones(1, 1, 1, 2, dtype=torch.bool)
    assert_close(
        build("prefix_tuning", length=1).attention(t, q, k, v, mask, attend, At()), tensor([[[[3.0]]]])
    )


def test_counts_of_prefix_tuning_on_bert_base():
    sites = [attention_site(12, 12, 64, 768) for _ in range(12)]
    flat = build("prefix_tuning", num_virtual_tokens=30)
    assert sum(spec.size for s in sites for spec in flat.tensors(s).values()) == 552_960
    made = build("prefix_tuning", num_virtual_tokens=30, prefix_projection=True, hidden=512)
    shared = {n: s.size for n, s in made.tensors(sites[0]).items() if s.scope == "adapter"}
    own = sum(p.size for s in sites for p in made.tensors(s).values() if p.scope == "site")
    assert own + sum(shared.values()) == 9_872_384


# ---- prompt tuning


def start(method, W, seed=0):
    where = embedding_site(4)
    spec = method.tensors(where)["prompt"]
    t = Tensors(prompt=spec.start(spec.shape, torch.Generator().manual_seed(seed)))
    return t.with_(**method.start(where, W, t))


def test_a_prompt_starts_from_rows_of_the_vocabulary():
    W = torch.arange(40.0).view(10, 4)
    rows = start(build("prompt_tuning", length=200), W).prompt
    assert {tuple(r) for r in rows.tolist()} == {tuple(r) for r in W.tolist()}
    few = start(build("prompt_tuning", length=200, frequent=3), W).prompt
    assert {tuple(r) for r in few.tolist()} == {tuple(r) for r in W[:3].tolist()}
    assert not torch.equal(rows, start(build("prompt_tuning", length=200), W, seed=1).prompt)


def test_a_prompt_starts_from_a_text_repeated_or_cut():
    W = torch.arange(40.0).view(10, 4)
    assert_close(start(build("prompt_tuning", length=5, init_ids=(7, 2)), W).prompt, W[[7, 2, 7, 2, 7]])
    assert_close(start(build("prompt_tuning", length=1, init_ids=(7, 2)), W).prompt, W[[7]])


def test_a_prompt_starts_uniform_when_asked_and_where_there_is_no_vocabulary():
    for method, W in (
        (build("prompt_tuning", init="uniform"), torch.ones(10, 4)),
        (build("prompt_tuning"), None),
    ):
        prompt = start(method, W).prompt
        assert prompt.abs().max() <= 0.5
        assert prompt.std() > 0.2


def test_prompt_tuning_gives_its_rows():
    method = build("prompt_tuning", num_virtual_tokens=3)
    t = randomised(method, embedding_site())
    assert method.place == "first"
    assert torch.equal(method.tokens(t, At()), t.prompt)
    assert t.prompt.shape == (3, 6)


# ---- LLaMA-Adapter


def project_of(case):
    """at.project of a case's own frozen projections."""

    def project(role, z):
        y = torch.nn.functional.linear(z, case["base"][f"{role}_W"], case["base"][f"{role}_bias"])
        return y.unflatten(-1, (-1, case["inputs"]["q"].shape[-1]))

    return project


@pytest.mark.parametrize("case", llama_reference.cases(), ids=lambda c: c["name"])
def test_llama_adapter_equals_its_reference(case):
    t = Tensors({n: v.clone().requires_grad_() for n, v in case["tensors"].items()})
    q, k, v = (case["inputs"][n].clone().requires_grad_() for n in "qkv")
    method = build("llama_adapter", length=case["options"]["length"], gate=case["options"]["gate"])
    where = attention_site(q.shape[1], k.shape[1], q.shape[-1], t.prompt.shape[-1])
    assert {n: v.shape for n, v in t.items()} == {n: s.shape for n, s in method.tensors(where).items()}
    output = method.attention(t, q, k, v, mask_for(case), attend, At(_project=project_of(case)))
    real = case["inputs"]["mask"][:, None, :, None]
    expected = llama_reference.reference(case)["output"]
    assert_close(output * real, expected)
    wanted = {**dict(t.items()), "q": q, "k": k, "v": v}
    found = torch.autograd.grad((output * real * case["cotangent"]).sum(), list(wanted.values()))
    slopes = llama_reference.gradients(case)
    for name, value in zip(wanted, found):
        assert_close(value, slopes[name], rtol=1e-7, atol=1e-8)
    for mistake, _ in llama_reference.MUTATIONS:
        changed = llama_reference.mutated(case, mistake)["output"]
        if not torch.equal(changed, expected):
            assert not torch.allclose(output * real, changed), mistake


def test_llama_adapter_starts_as_the_base_bit_for_bit():
    method, where = build("llama_adapter", length=2), attention_site(4, 2, 3, 12)
    generator = torch.Generator().manual_seed(0)
    t = Tensors({n: s.start(s.shape, generator) for n, s in method.tensors(where).items()})
    q, k, v = torch.randn(2, 4, 5, 3), torch.randn(2, 2, 5, 3), torch.randn(2, 2, 5, 3)
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    at = At(_project=lambda role, z: z[..., :6].unflatten(-1, (2, 3)))
    assert torch.equal(method.attention(t, q, k, v, mask, attend, at), attend(q, k, v, mask))


def test_count_of_llama_adapter_as_published():
    method = build("llama_adapter")
    where = attention_site(32, 32, 128, 4096)
    assert 30 * sum(spec.size for spec in method.tensors(where).values()) == 1_229_760


# ---- visual prompt tuning


@pytest.mark.parametrize("case", visual_reference.cases(), ids=lambda c: c["name"])
def test_visual_prompts_equal_their_reference(case):
    o = case["options"]
    method = build("visual_prompt_tuning", length=o["length"], deep=o["deep"])
    expected = visual_reference.reference(case)
    x, t = case["inputs"]["x"], case["tensors"]
    first = method.tokens(Tensors(prompt=t["prompt_0" if o["deep"] else "prompt"]), At())
    entered = torch.cat([x[:, :1], first.expand(x.shape[0], -1, -1), x[:, 1:]], 1)
    assert method.place == "after_first"
    assert_close(entered, expected["input.0"])
    added = torch.zeros(entered.shape[:2], dtype=torch.bool)
    added[:, 1 : 1 + o["length"]] = True
    for block in range(1, o["blocks"]):
        own = Tensors(prompt=t[f"prompt_{block}"]) if o["deep"] else Tensors()
        new = method.input(own, expected[f"before.{block}"], At(added=added))
        assert_close(new, expected[f"input.{block}"])


def test_deep_prompts_are_renewed_where_each_row_has_them():
    method = build("visual_prompt_tuning", length=2, deep=True)
    where = embedding_site()
    t, x = randomised(method, where), normal(2, 5, 6)
    added = torch.tensor([[False, True, True, False, False], [False, False, False, True, True]])
    new = method.input(t, x, At(added=added))
    assert_close(new[0, 1:3], t.prompt)
    assert_close(new[1, 3:], t.prompt)
    assert torch.equal(new[~added], x[~added])


def test_counts_and_bound_of_visual_prompts():
    sites = [embedding_site(768)] + [
        replace(embedding_site(768), port="input", block=i) for i in range(1, 12)
    ]
    for deep, blocks in ((False, 1), (True, 12)):
        method = build("visual_prompt_tuning", length=10, deep=deep)
        assert sum(s.size for where in sites for s in method.tensors(where).values()) == blocks * 10 * 768
    spec = build("visual_prompt_tuning", length=50).tensors(sites[0])["prompt"]
    start = spec.start(spec.shape, torch.Generator().manual_seed(0))
    assert 0.99 * (6 / 1536) ** 0.5 < start.abs().max() <= (6 / 1536) ** 0.5


# ---- ladder side tuning


def ladder_of(case):
    """The method and its tensors, rungs stacked, from a case that numbers them."""
    o, t = case["options"], case["tensors"]
    kept = [int(i) for i in o["kept"]]
    stacked = {}
    for name in ("D", "D_bias", "gate"):
        first, _, rest = name.partition("_")
        stacked[name] = torch.stack([t[f"{first}_{i}" + f"_{rest}" * bool(rest)] for i in kept])
    for part in [n.partition(".")[2] for n in t if n.startswith(f"{kept[0]}.")]:
        stacked[part] = torch.stack([t[f"{i}.{part}"] for i in kept])
    vectors = {
        n: v[:, None, :] if v.dim() == 2 else v.view(-1, 1, 1) if v.dim() == 1 else v
        for n, v in stacked.items()
    }
    whole = {n: t[n] for n in ("D_0", "D_0_bias", "norm", "norm_bias", "U", "U_bias")}
    method = build(
        "ladder_side_tuning", heads=o["heads"], activation=o["activation"], rungs=tuple(i - 1 for i in kept)
    )
    return method, Tensors({n: v.clone().requires_grad_() for n, v in {**whole, **vectors}.items()}), kept


@pytest.mark.parametrize("case", ladder_reference.cases(), ids=lambda c: c["name"])
def test_the_ladder_equals_its_reference(case):
    method, t, kept = ladder_of(case)
    mask = case["inputs"]["mask"]
    taps = {i - 1: case["inputs"][f"h_{i}"] for i in range(3)}
    at = At(site=ladder_site(5, causal=case["options"]["causal"]), mask=mask, mask_all=mask)
    output = method.exit(t, taps, torch.zeros(()), at) * mask[..., None]
    expected = ladder_reference.reference(case)["output"]
    assert_close(output, expected)
    found = torch.autograd.grad((output * case["cotangent"]).sum(), [v for _, v in t.items()])
    slopes = ladder_reference.gradients(case)
    for (name, _), value in zip(t.items(), found):
        if name in slopes:
            assert_close(value, slopes[name], rtol=1e-7, atol=1e-8)
        else:
            for row, i in enumerate(kept):
                own = {"D": f"D_{i}", "D_bias": f"D_{i}_bias", "gate": f"gate_{i}"}.get(name, f"{i}.{name}")
                assert_close(value[row].view_as(slopes[own]), slopes[own], rtol=1e-7, atol=1e-8)
    for mistake, _ in ladder_reference.MUTATIONS:
        changed = ladder_reference.mutated(case, mistake)["output"]
        if not torch.equal(changed, expected):
            assert not torch.allclose(output, changed), mistake


def ladder_site(width=16, causal=True, blocks=2, stack=""):
    return Site("final", "final", "m.norm", "norm", n_in=width, n_out=width, width=width, causal=causal,
                blocks=blocks, stack=stack, heads=4, port="exit")  # fmt: skip


def test_the_ladder_of_a_decoder_reads_the_encoder_as_an_attention_of_torch_does():
    method = build("ladder_side_tuning", reduction=2, heads=2)
    where = replace(ladder_site(), cross=True)
    stacked = randomised(method, where)
    own = Tensors({n: v[0] for n, v in stacked.items() if v.dim() == 3})
    z, memory = normal(2, 3, 8), normal(2, 5, 16, seed=4)
    real = torch.tensor([[True] * 5, [True, True, False, False, True]])
    at = At(site=where, memory=memory, memory_mask=real)
    theirs = torch.nn.MultiheadAttention(8, 2, kdim=16, vdim=16, batch_first=True).double()
    with torch.no_grad():
        theirs.q_proj_weight.copy_(own.cross_query)
        theirs.k_proj_weight.copy_(own.cross_key)
        theirs.v_proj_weight.copy_(own.cross_value)
        biases = [own.cross_query_bias, own.cross_key_bias, own.cross_value_bias]
        theirs.in_proj_bias.copy_(torch.cat([b.flatten() for b in biases]))
        theirs.out_proj.weight.copy_(own.cross_out)
        theirs.out_proj.bias.copy_(own.cross_out_bias.flatten())
        expected, _ = theirs(z, memory, memory, key_padding_mask=~real)
        assert_close(method.read(own, z, at), expected, rtol=1e-9, atol=1e-9)
        with_encoder = method.block(own, z, 0, at)
        assert not torch.allclose(with_encoder, method.block(own, z, 0, At(site=where)), atol=1e-2)
    assert not any(n.startswith("cross") for n in method.tensors(ladder_site()))


@pytest.mark.parametrize("family", ["t5", "marian", "whisper", "torch_transformer"])
def test_a_decoder_s_ladder_is_given_the_encoder_of_every_kind_of_base(family):
    model, kwargs = zoo()[family]()
    adapter = veneer.attach(model, "ladder_side_tuning")
    y = model(**kwargs)
    (y if isinstance(y, torch.Tensor) else y["logits"]).square().mean().backward()
    read = {n: g for n, g in adapter.gradients().items() if "/cross_" in n and "key_bias" not in n}
    assert len(read) == 7
    assert all(float(g.abs().max()) > 0 for g in read.values())


def test_the_ladder_begins_as_the_base_s_blocks_pruned_where_their_shapes_map():
    model, _ = zoo()["gpt2"]()
    plan = veneer.plan(model, "ladder_side_tuning", reduction=2)
    assert "note: the rungs begin as pruned blocks" in str(plan)
    t = veneer.attach(model, "ladder_side_tuning", reduction=2).named()
    d, heads = model.config.n_embd, model.config.n_head
    w, hidden = d // 2, 2 * d
    blocks = [b.attn.c_attn.weight.mT.split(d) for b in model.transformer.h]  # q, k, v: (out, in)
    outs = [b.attn.c_proj.weight.mT for b in model.transformer.h]
    ups, downs = ([getattr(b.mlp, n).weight.mT for b in model.transformer.h] for n in ("c_fc", "c_proj"))

    def best(score, count):
        return sorted(sorted(range(len(score)), key=lambda i: -float(score[i]))[:count])

    size = sum(W.abs().sum(0) for b in blocks for W in b) + sum(W.abs().sum(0) for W in ups)
    size = size + sum(W.abs().sum(1) for W in (*outs, *downs))
    kept = best(size, w)
    for i, (q, k, v) in enumerate(blocks):
        rows = []
        for h in range(heads):
            own = slice(h * d // heads, (h + 1) * d // heads)
            inside = best(q[own].abs().sum(1) + k[own].abs().sum(1), w // heads)
            rows += [own.start + j for j in inside]
        assert torch.equal(t["final/query"][i], q[rows][:, kept].detach())
        assert torch.equal(t["final/key"][i], k[rows][:, kept].detach())
        chosen = best(ups[i].abs().sum(1) + downs[i].abs().sum(0), hidden)
        assert torch.equal(t["final/mlp_up"][i], ups[i][chosen][:, kept].detach())
        assert torch.equal(t["final/mlp_down"][i], downs[i][kept][:, chosen].detach())
        assert v.shape == (d, d)


@pytest.mark.parametrize(
    ("family", "options", "said"),
    [
        ("llama", {}, "no square matrices"),
        ("gpt2", {"begin": "new"}, "begin new"),
        ("t5", {"reduction": 2}, "narrower"),
    ],
)
def test_the_plan_says_where_a_ladder_begins_new(family, options, said):
    model, kwargs = zoo()[family]()
    assert said in str(veneer.plan(model, "ladder_side_tuning", **options))
    veneer.attach(model, "ladder_side_tuning", **options)
    model(**kwargs)


def test_the_ladder_step_by_step_equals_the_ladder_at_once():
    method = build("ladder_side_tuning", reduction=2, heads=2)
    where = ladder_site()
    t = randomised(method, where)
    taps = {i: normal(2, 4, 16, seed=i + 2) for i in (-1, 0, 1)}
    mask = torch.tensor([[True] * 4, [False, True, True, True]])
    whole = method.exit(t, taps, taps[1], At(site=where, mask=mask, mask_all=mask))
    kept = {}

    def history(key, new):
        kept[key] = torch.cat([kept[key], new], -2) if key in kept else new
        return kept[key]

    for i in range(4):
        step = {b: h[:, i : i + 1] for b, h in taps.items()}
        at = At(site=where, mask=mask[:, i : i + 1], mask_all=mask[:, : i + 1], past=i, _history=history)
        new = method.exit(t, step, step[1], at)
        assert_close(new[mask[:, i]], whole[:, i : i + 1][mask[:, i]])


def test_the_ladder_can_mix_the_base_in_and_leaves_an_encoder_alone():
    mixed = build("ladder_side_tuning", reduction=2, heads=2, merge_base=True)
    t = randomised(mixed, ladder_site())
    taps = {i: normal(2, 4, 16, seed=i + 2) for i in (-1, 0, 1)}
    at = At(site=ladder_site())
    alone = build("ladder_side_tuning", reduction=2, heads=2).exit(t, taps, taps[1], at)
    mu = torch.sigmoid(t.gate_last / 0.1)
    assert_close(mixed.exit(t, taps, taps[1], at), mu * alone + (1 - mu) * taps[1])
    ends_in_a_block = {b: h for b, h in taps.items() if b < 1}
    assert_close(mixed.exit(t, ends_in_a_block, taps[1], at), mixed.exit(t, taps, taps[1], at))
    assert mixed.tensors(ladder_site(stack="encoder")) == {}
    assert mixed.exit(Tensors(), taps, taps[1], at) is taps[1]
    assert mixed.wanted_taps == "all"
    assert build("ladder_side_tuning", rungs=(1,)).wanted_taps == (-1, 1)


def test_count_of_the_ladder_by_its_formula():
    d, w, blocks = 768, 96, 12
    rung = w * d + w + 1 + 4 * w + 4 * (w * w + w) + 8 * w * w + 5 * w
    specs = build("ladder_side_tuning").tensors(ladder_site(d, blocks=blocks))
    assert sum(s.size for s in specs.values()) == blocks * rung + 2 * w * d + w + d + 2 * w


# ---- Q-PEFT


def hints_of(case, **options):
    """The method, its tensors and condition's inputs; states stand in for embedded ids."""
    o, t, given = case["options"], case["tensors"], case["inputs"]
    rank = (t["query"] if o["form"] == "A" else t["down"]).shape[0]
    variant = {"A": "attend", "R": "retrieve"}[o["form"]]
    method = build(
        "q_peft", variant=variant, length=0, rank=rank, heads=o["heads"] or 1, k=o["chosen"] or 1, **options
    )
    states = {"query": given["query_states"], "document": given["document_states"]}
    inputs = {
        f"{n}_ids": torch.arange(s.shape[1]).expand(2, -1) + 100 * (n == "query") for n, s in states.items()
    }
    inputs |= {f"{n}_mask": given[f"{n}_mask"] for n in states}
    inputs["embed"] = lambda ids: states["query" if ids[0, 0] >= 100 else "document"]
    tensors = Tensors({n: v.clone().requires_grad_() for n, v in t.items()})
    return method, tensors, inputs


@pytest.mark.parametrize("case", q_peft_reference.cases(), ids=lambda c: c["name"])
def test_the_hints_of_q_peft_equal_their_reference(case):
    method, t, inputs = hints_of(case)
    assert {n: v.shape for n, v in t.items()} == {
        n: s.shape for n, s in method.tensors(embedding_site(4)).items()
    }
    hints = method.condition(t, inputs, At())["hints"]
    found = method.tokens(t, At(conditions={"hints": hints}))
    soft = q_peft_reference.reference(case)["soft"]  # hints of all rows, one below the other
    real = inputs["query_mask"] if case["options"]["form"] == "A" else torch.ones_like(found[..., 0]).bool()
    assert_close(found[real], soft)
    assert (found[~real] == 0).all()
    slopes = torch.autograd.grad(found[real].sum(), [v for _, v in t.items()], allow_unused=True)
    assert all(slope is not None for slope in slopes)


def test_q_peft_leaves_out_the_tokens_of_the_query_and_fills_what_is_missing():
    method = build("q_peft", length=3, k=3, rank=2)
    t = randomised(method, embedding_site(4))
    table = normal(10, 4)
    inputs = {
        "query_ids": tensor([[1, 2]]), "document_ids": tensor([[2, 5, 1, 7]]), "embed": lambda ids: table[ids]
    }  # fmt: skip
    hints = method.condition(t, inputs, At())["hints"]
    made = table[[5, 7]] + torch.relu(table[[5, 7]] @ t.down.mT + t.down_bias) @ t.up.mT + t.up_bias
    assert_close(hints[0, :2], made)
    assert (hints[0, 2] == 0).all()
    tokens = method.tokens(t, At(conditions={"hints": hints}))
    assert tokens.shape == (1, 6, 4)
    with pytest.raises(BadOption, match="query_ids"):
        method.condition(t, {"input_ids": tensor([[1]])}, At())
    assert torch.equal(tokens[0, :3], t.prompt)


# ---- all of them


@pytest.mark.parametrize(
    ("key", "options"),
    [
        ("prefix_tuning", {"length": 2}),
        ("llama_adapter", {"length": 2}),
        ("llama_adapter", {"length": 2, "gate": "layer"}),
        ("unipelt", {"length": 2}),
    ],
)
def test_a_row_an_adapter_equals_each_adapter_alone(key, options):
    method = build(key, **options)
    several = [randomised(method, attention_site(), seed) for seed in range(3)]
    q, k, v = normal(3, 4, 5, 3), normal(3, 2, 5, 3, seed=1), normal(3, 2, 5, 3, seed=2)
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    hidden, scaled = normal(3, 5, 12, seed=3), partial(attend, scale=3**-0.5)
    for causal in (False, True):
        at = At(
            site=attention_site(causal=causal),
            _project=lambda role, z: z[..., :6].unflatten(-1, (2, 3)),
            hidden=hidden,
        )
        together = method.attention(by_rows(several), q, k, v, mask, scaled, at)
        for i, t in enumerate(several):
            one = slice(i, i + 1)
            alone = method.attention(t, q[one], k[one], v[one], mask, scaled, at.with_(hidden=hidden[one]))
            assert_close(together[one], alone)


def test_a_row_an_adapter_of_deep_prompts_equals_each_alone():
    method = build("visual_prompt_tuning", length=2, deep=True)
    several = [randomised(method, embedding_site(), seed) for seed in range(3)]
    x, added = normal(3, 5, 6), torch.tensor([[False, True, True, False, False]] * 3)
    together = method.input(by_rows(several), x, At(added=added))
    for i, t in enumerate(several):
        assert_close(together[i : i + 1], method.input(t, x[i : i + 1], At(added=added[:1])))


# ---- the same tensors in HF PEFT give the same outputs


def llama_twice():
    """A tiny Llama with grouped key heads, and a copy of it for the other library."""
    pytest.importorskip("peft")
    model, given = zoo()["llama"]()
    ids = given["input_ids"]
    return model, copy.deepcopy(model), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def same_as(model, other, method, tensors, batch, skipped=0, **options):
    veneer.attach(model, method, name="x", **options)
    with torch.no_grad():
        bare = model(**batch, adapters=None).logits
        named = veneer.adapters(model)["x"].named()
        assert set(named) == set(tensors)
        for name, value in tensors.items():
            named[name].copy_(value)
        found, expected = model(**batch).logits, other(**batch).logits[:, skipped:]
    assert not torch.allclose(bare, found, atol=1e-3)
    assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_prefix_tuning_is_hf_pefts_once_positions_start_behind_the_prefix():
    model, copied, batch = llama_twice()
    import peft

    other = peft.get_peft_model(copied, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    keys = other.prompt_encoder["default"].embedding.weight.view(3, 4, 2, 8).permute(1, 2, 0, 3)
    tensors = {f"block.{i}.attention/{n}": keys[2 * i + j] for i in range(2) for j, n in enumerate("KV")}
    positions = torch.arange(3, 8).expand(2, -1)  # HF serves the prefix as a cache
    veneer.attach(model, "prefix_tuning", name="x", length=3)
    with torch.no_grad():
        named = veneer.adapters(model)["x"].named()
        for name, value in tensors.items():
            named[name].copy_(value)
        assert_close(model(**batch, position_ids=positions).logits, other.eval()(**batch).logits)


def test_prompt_tuning_is_hf_pefts():
    model, copied, batch = llama_twice()
    import peft

    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    other = peft.get_peft_model(copied, config).eval()
    prompt = other.prompt_encoder["default"].embedding.weight
    same_as(model, other, "prompt_tuning", {"embedding/prompt": prompt}, batch, skipped=3, length=3)


def test_llama_adapter_with_a_gate_a_layer_is_hf_pefts_adaption_prompt():
    model, copied, batch = llama_twice()
    import peft

    config = peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=2, task_type="CAUSAL_LM")
    other = peft.get_peft_model(copied, config).eval()
    tensors = {}
    for name, parameter in other.named_parameters():
        if "adaption" in name:
            parameter.data.copy_(normal(*parameter.shape, seed=len(name)))
            block = name.partition(".layers.")[2].partition(".")[0]
            kind = "gate" if "gate" in name else "prompt"
            tensors[f"block.{block}.attention/{kind}"] = parameter.detach().squeeze(0)
    same_as(model, other, "llama_adapter", tensors, batch, length=3, gate="layer")


# ---- generation: what an edit has to remember, it remembers


@pytest.mark.parametrize(
    ("key", "options", "more"),
    [
        ("loreft", {"positions": "prompt[:1] + prompt[-1:]"}, {}),
        ("prefix_tuning", {"length": 3}, {}),
        ("prompt_tuning", {"length": 3}, {}),
        ("unipelt", {"length": 3, "reduction": 4, "rank": 2}, {}),
        ("ladder_side_tuning", {"reduction": 2}, {}),
        (
            "q_peft",
            {"length": 2, "k": 2, "rank": 4},
            {"query_ids": [[4, 5], [9, 10]], "document_ids": [[3, 6], [8, 11]]},
        ),
    ],
)
def test_two_padded_rows_with_a_cache_generate_what_each_does_alone_without(key, options, more):
    model, _ = zoo()["llama"]()
    for seed, name in enumerate("ab"):
        adapter = veneer.attach(model, key, name=name, **options)
        for leaf in adapter.leaves():
            leaf.data.copy_(0.5 * normal(*leaf.shape, seed=seed))
    ids = tensor([[0, 0, 3, 4, 5], [6, 7, 8, 9, 10]])
    more = {name: tensor(value) for name, value in more.items()}
    how = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    how |= {"output_logits": True, "return_dict_in_generate": True}
    with veneer.rows(model, ["a", "b"]):
        together = model.generate(input_ids=ids, attention_mask=(ids > 0).long(), **more, **how)
    for row, name in enumerate("ab"):
        own = ids[row : row + 1][:, ids[row] > 0]
        mine = {n: v[row : row + 1] for n, v in more.items()}
        alone = model.generate(
            input_ids=own, attention_mask=torch.ones_like(own), use_cache=False, adapters=name, **mine, **how
        )
        assert torch.equal(together.sequences[row, -5:], alone.sequences[0, -5:])
        assert_close(together.logits[-1][row], alone.logits[-1][0], rtol=1e-4, atol=1e-5)
