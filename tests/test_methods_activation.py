"""Adapters, rescaling and representation edits as pure functions: by hand, by reference, with a row axis."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import tensor
from torch.testing import assert_close

import veneer
from references import adapter_fusion as fusion_reference
from references import hyperformer as hyperformer_reference
from references import ia3 as ia3_reference
from references import invertible_adapter as invertible_reference
from references import loreft as loreft_reference
from references import serial_adapter as serial_reference
from references import unipelt as unipelt_reference
from veneer import testing
from veneer.anatomy import Site
from veneer.edits import At, Tensors, add_row_axis, build, orthonormal_rows
from veneer.errors import BadOption
from zoo import zoo

torch.set_num_threads(1)


def site(port="output", width=6, role="mlp", **more):
    return Site(
        "block.0." + role, role, "m." + role, role, n_in=width, n_out=width, width=width, port=port, **more
    )


def randomised(method, where, seed=0):
    """Every declared tensor drawn from a normal distribution, in float64; what has a constraint keeps it."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, spec in method.tensors(where).items():
        value = torch.randn(spec.shape, generator=generator, dtype=torch.float64)
        made[name] = spec.keep(value) if spec.keep else value
    return Tensors(made)


def by_rows(several):
    """Tensors of several adapters -> one with a row axis, a row an adapter."""
    return Tensors(
        {
            name: add_row_axis(
                torch.stack([getattr(t, name) for t in several]), getattr(several[0], name).dim()
            )
            for name in several[0]
        }
    )


def count(method, *sites):
    """Trained numbers over sites; tensors of the adapter's or a block's scope count once."""
    seen = {}
    for s in sites:
        for name, spec in method.tensors(s).items():
            owner = {"site": s.name, "block": s.block, "adapter": None}[spec.scope]
            if spec.trained:
                seen[owner, name] = spec.size
    return sum(seen.values())


def normal(*shape, seed=9):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradients_agree(module, case, output, t, inputs):
    """d sum(output * cotangent) of every tensor and input equals the reference's."""
    wanted = {**dict(t.items()), **inputs}
    found = torch.autograd.grad((output * case["cotangent"]).sum(), list(wanted.values()))
    expected = module.gradients(case)
    for name, value in zip(wanted, found):
        assert_close(value, expected[name], rtol=1e-7, atol=1e-8)


def leaves(case):
    return Tensors({n: v.clone().requires_grad_() for n, v in case["tensors"].items()})


# ---- serial adapter


def test_serial_adapter_by_hand():
    """D = [1 -1], U = [2 3]^T, biases 1 and (0, 5): y = (4, 1) -> relu(3 + 1) = 4 -> y + (8, 12 + 5)."""
    t = Tensors(
        D=tensor([[1.0, -1.0]]), D_bias=tensor([1.0]), U=tensor([[2.0], [3.0]]), U_bias=tensor([0.0, 5.0])
    )
    adapter = build("serial_adapter", reduction=2, activation="relu")
    assert_close(adapter.output(t, tensor([[[4.0, 1.0]]]), At()), tensor([[[12.0, 18.0]]]))


@pytest.mark.parametrize("case", serial_reference.cases(), ids=lambda c: c["name"])
def test_serial_adapter_equals_its_reference(case):
    adapter = build("serial_adapter", **case["options"])
    t, y = leaves(case), case["inputs"]["y"].clone().requires_grad_()
    output = adapter.output(t, y, At())
    assert_close(output, serial_reference.reference(case)["output"])
    gradients_agree(serial_reference, case, output, t, {"y": y})
    for mistake, _ in serial_reference.MUTATIONS:
        changed = serial_reference.mutated(case, mistake)["output"]
        if not torch.equal(changed, serial_reference.reference(case)["output"]):
            assert not torch.allclose(output, changed), mistake


def test_serial_adapter_starts_as_the_base_unless_it_is_told_otherwise():
    y = torch.randn(2, 3, 8)
    for init, same in (("identity", True), ("houlsby", False), ("bert", False)):
        adapter = build("serial_adapter", reduction=2, init=init)
        generator = torch.Generator().manual_seed(1)
        t = Tensors({n: s.start(s.shape, generator) for n, s in adapter.tensors(site(width=8)).items()})
        assert torch.equal(adapter.output(t, y, At()), y) is same, init


def test_serial_adapter_drops_out_in_training_only():
    adapter = build("serial_adapter", reduction=2, dropout=0.5)
    t, y = randomised(adapter, site()), normal(2, 3, 6)
    assert_close(adapter.output(t, y, At()), build("serial_adapter", reduction=2).output(t, y, At()))
    torch.manual_seed(0)
    assert ((adapter.output(t, y, At(training=True)) - y) == 0).any()


def test_serial_adapter_trains_the_norms_when_asked():
    assert [m.sites for m in build("serial_adapter", train_norms=True).also()] == ["norm"]
    assert not build("serial_adapter").also()


# ---- (IA)^3


@pytest.mark.parametrize("case", ia3_reference.cases(), ids=lambda c: c["name"])
def test_ia3_equals_its_reference_beside_the_weight_and_merged_into_it(case):
    method, t, x = build("ia3"), leaves(case), case["inputs"]["x"].clone().requires_grad_()
    W, bias, side = case["base"]["W"], case["base"]["bias"], case["options"]["side"]
    expected = ia3_reference.reference(case)
    linear = torch.nn.functional.linear
    output = method.output(t, linear(x, W, bias)) if side == "output" else linear(method.input(t, x), W, bias)
    assert_close(output, expected["output"])
    gradients_agree(ia3_reference, case, output, t, {"x": x})
    scale, shift = method.affine(t)
    assert shift is None
    assert_close(scale[:, None] * W if side == "output" else W * scale, expected["merged_W"])


def test_ia3_by_hand():
    """Keys scaled by (2, 0): the second key feature is gone, the first is doubled."""
    t = Tensors(scale=tensor([2.0, 0.0]))
    assert_close(build("ia3").output(t, tensor([[[3.0, 4.0]]])), tensor([[[6.0, 0.0]]]))


def test_ia3_has_no_decay_and_starts_at_one():
    spec = build("ia3").tensors(site())["scale"]
    assert not spec.decay
    assert torch.equal(spec.start(spec.shape, torch.Generator()), torch.ones(6))


# ---- LoReFT


def reft(case):
    o = case["options"]
    terms = [f"prompt[:{o['first']}]"] * bool(o["first"]) + [f"prompt[-{o['last']}:]"] * bool(o["last"])
    return build("loreft", rank=o["rank"], variant=o["form"], positions=" + ".join(terms), tied=o["tied"])


@pytest.mark.parametrize("case", loreft_reference.cases(), ids=lambda c: c["name"])
def test_loreft_equals_its_reference(case):
    method, t, x = reft(case), leaves(case), case["inputs"]["x"].clone().requires_grad_()
    at = At(mask=case["inputs"]["mask"], prompt=case["inputs"]["prompt"])
    output, expected = method.output(t, x, at), loreft_reference.reference(case)
    assert_close(output, expected["output"])
    untouched = ~expected["edited"]
    assert torch.equal(output[untouched], x[untouched])
    gradients_agree(loreft_reference, case, output, t, {"x": x})
    assert set(method.tensors(site("output", 4))) == set(case["tensors"])
    for mistake, _ in loreft_reference.MUTATIONS:
        changed = loreft_reference.mutated(case, mistake)["output"]
        if not torch.equal(changed, expected["output"]):
            assert not torch.allclose(output, changed), mistake


def test_loreft_by_hand():
    """R = [1 0], W = [0 1], b = 2: the first coordinate becomes h_2 + 2, the second stays."""
    t = Tensors(R=tensor([[1.0, 0.0]]), W=tensor([[0.0, 1.0]]), b=tensor([2.0]))
    h = tensor([[[5.0, 7.0], [1.0, 1.0]]])
    assert_close(
        build("loreft", rank=1, positions="all").output(t, h, At()), tensor([[[9.0, 7.0], [3.0, 1.0]]])
    )
    assert_close(
        build("loreft", rank=1, positions="prompt[:1]").output(t, h, At()), tensor([[[9.0, 7.0], [1.0, 1.0]]])
    )


def test_loreft_leaves_generated_tokens_alone():
    method = build("loreft")
    y = normal(2, 1, 6)
    assert method.output(randomised(method, site()), y, At(past=3)) is y


def test_loreft_keeps_the_rows_of_R_orthonormal_and_those_of_its_ablations_free():
    R = orthonormal_rows(normal(3, 8))
    assert_close(R @ R.mT, torch.eye(3, dtype=torch.float64))
    for variant in ("loreft", "consreft", "lobireft"):
        assert build("loreft", variant=variant).tensors(site())["R"].keep is orthonormal_rows
    for variant in ("noreft", "direft"):
        assert build("loreft", variant=variant).tensors(site())["R"].keep is None


def test_a_position_that_does_not_exist_is_refused_at_once():
    with pytest.raises(BadOption, match="prompt"):
        build("loreft", positions="prompt[4]")


# ---- invertible adapters


@pytest.mark.parametrize("case", invertible_reference.cases(), ids=lambda c: c["name"])
def test_invertible_adapter_equals_its_reference(case):
    o, m = case["options"], case["tensors"]["F_down"].shape[0]
    width = case["inputs"]["x"].shape[-1]
    method = build(
        "invertible_adapter", coupling=o["form"], activation=o["activation"], reduction=width / 2 / m
    )
    t, x = leaves(case), case["inputs"]["x"].clone().requires_grad_()
    assert {n: v.shape for n, v in t.items()} == {
        n: s.shape for n, s in method.tensors(site("output", width)).items()
    }
    output = method.input(t, x) if o["inverse"] else method.output(t, x)
    assert_close(output, invertible_reference.reference(case)["output"])
    gradients_agree(invertible_reference, case, output, t, {"x": x})


@pytest.mark.parametrize("coupling", ["nice", "glow"])
def test_the_inverse_of_an_invertible_adapter_undoes_it(coupling):
    method = build("invertible_adapter", coupling=coupling)
    t, e = randomised(method, site(width=8)), normal(2, 5, 8)
    assert not torch.allclose(method.output(t, e), e)
    assert_close(method.input(t, method.output(t, e)), e, rtol=1e-10, atol=1e-12)
    assert_close(method.output(t, method.input(t, e)), e, rtol=1e-10, atol=1e-12)


def test_the_inverse_stands_before_a_head_of_tokens_only():
    method = build("invertible_adapter")
    tokens, classes = (replace(site("input", 8), n_in=8, n_out=n) for n in (50, 2))
    assert set(method.tensors(tokens)) == set(method.tensors(site(width=8)))
    assert method.tensors(classes) == {}
    x = normal(2, 8)
    assert method.input(Tensors(), x) is x
    assert all(spec.scope == "adapter" for spec in method.tensors(tokens).values())


# ---- fusion


def fusion_of(case):
    variant = "static" if case["options"]["static"] else "dynamic"
    return build("adapter_fusion", variant=variant, temperature=case["options"]["temperature"])


@pytest.mark.parametrize("case", fusion_reference.cases(), ids=lambda c: c["name"])
def test_adapter_fusion_equals_its_reference(case):
    method, t = fusion_of(case), leaves(case)
    inputs = {n: v.clone().requires_grad_() for n, v in case["inputs"].items()}
    output = inputs["residual"] + method.fused(t, inputs["h"], inputs["z"])
    expected = fusion_reference.reference(case)
    assert_close(output, expected["output"])
    gradients_agree(fusion_reference, case, output, t, inputs)
    if "V" in t:
        assert_close(method.penalty(t), expected["penalty"])
        slope = torch.autograd.grad(method.penalty(t), t.V)[0]
        assert_close(slope, fusion_reference.gradients(case)["penalty.V"], rtol=1e-6, atol=1e-8)
    else:
        assert method.penalty(t) == 0


def test_fusion_reads_what_its_members_add():
    """Two members that add 1 and 3, with equal scores: the fusion adds 2."""
    method = build("adapter_fusion")
    t = Tensors(
        Q=torch.zeros(2, 2), Q_bias=torch.zeros(2), K=torch.eye(2), K_bias=torch.zeros(2), V=torch.eye(2)
    )
    at = At(members=(lambda x, y: y + 1, lambda x, y: y + 3))
    x, y = torch.randn(1, 3, 2), torch.randn(1, 3, 2)
    assert_close(method.output(t, x, y, at), y + 2)
    assert method.output(t, x, y, At()) is y


def test_fusion_starts_near_a_plain_mixture():
    spec = build("adapter_fusion").tensors(site())["V"]
    V = spec.start(spec.shape, torch.Generator())
    assert_close(V.diagonal(), torch.ones(6))
    assert_close(V - torch.eye(6) * V, torch.full((6, 6), 1e-6) * (1 - torch.eye(6)))


# ---- UniPELT


@pytest.mark.parametrize("case", unipelt_reference.cases(), ids=lambda c: c["name"])
def test_unipelt_equals_its_reference(case):
    part, mask = case["options"]["part"], case["inputs"]["mask"]
    o, t = case["options"], leaves(case)
    inputs = {n: v.clone().requires_grad_() for n, v in case["inputs"].items() if v.is_floating_point()}
    x = inputs["x"]
    role = {"adapter": "mlp", "prefix": "attention", "lora": "query"}[part]
    at = At(site=replace(site("output", 4, role), port=UNIPELT_PORTS[part], causal=o["causal"]), mask=mask)
    if part == "lora":
        output = torch.nn.functional.linear(x, case["base"]["W"], case["base"]["bias"])
        output = output + build("unipelt", rank=o["rank"]).branch(t, x)
    elif part == "adapter":
        output = build("unipelt", reduction=4 / 3, activation=o["activation"]).output(t, x, inputs["y"], at)
    else:
        method = build("unipelt", length=o["length"])
        q, k, v = (inputs[n] for n in "qkv")
        seen = mask[:, None, None, :].expand(-1, 1, 3, -1)
        seen = seen & torch.ones(3, 3, dtype=torch.bool).tril() if o["causal"] else seen

        def attend(q, k, v, m):
            k, v = (z.repeat_interleave(2, 1) for z in (k, v))
            return (q @ k.mT / 2**0.5).masked_fill(~m, -1e30).softmax(-1) @ v

        output = method.attention(t, q, k, v, seen, attend, at.with_(hidden=x))
    real = mask[:, None, :, None] if part == "prefix" else mask[..., None]
    expected = unipelt_reference.reference(case)["output"]
    assert_close(output * real, expected)
    gradients_agree(unipelt_reference, case, output * real, t, inputs)
    for mistake, _ in unipelt_reference.MUTATIONS:
        changed = unipelt_reference.mutated(case, mistake)["output"]
        if not torch.equal(changed, expected):
            assert not torch.allclose(output * real, changed), mistake


UNIPELT_PORTS = {"adapter": "output", "prefix": "attention", "lora": "weight"}


def test_the_gates_of_unipelt_in_a_causal_base_are_the_same_token_by_token():
    method = build("unipelt", reduction=2)
    where = replace(site("output"), causal=True)
    t, x, y = randomised(method, where), normal(2, 4, 6), normal(2, 4, 6, seed=1)
    mask = torch.tensor([[True] * 4, [False, True, True, True]])
    at = At(site=where, mask=mask)
    whole = method.output(t, x, y, at)
    kept = {}

    def history(key, new):
        kept[key] = torch.cat([kept[key], new], -2) if key in kept else new
        return kept[key]

    for i in range(4):
        step = At(site=where, mask=mask[:, i : i + 1], mask_all=mask[:, : i + 1], past=i, _history=history)
        assert_close(method.output(t, x[:, i : i + 1], y[:, i : i + 1], step), whole[:, i : i + 1])


def test_the_tensors_of_unipelt_follow_the_port():
    method = build("unipelt", rank=2, reduction=2, length=3)
    weight = Site("q", "attention.query", "m.q", "linear", n_in=6, n_out=4, width=4, port="weight")
    heads = replace(site("attention", 6, "attention"), heads=4, kv_heads=2, head_dim=3)
    shapes = {n: s.shape for n, s in method.tensors(weight).items()}
    assert shapes == {"A": (2, 6), "B": (4, 2), "gate_lora": (6,), "gate_lora_bias": ()}
    assert {n: s.shape for n, s in method.tensors(heads).items()} == {
        "K": (2, 3, 3), "V": (2, 3, 3), "gate_prefix": (6,), "gate_prefix_bias": ()
    }  # fmt: skip
    assert "gate_adapter" in method.tensors(site("output"))


# ---- HyperFormer


def hyperformer_of(case):
    o, t = case["options"], case["tensors"]
    return build(
        "hyperformer", tasks=3, reduction=o["width"] / o["m"], embedding=t["task"].shape[1],
        hidden=t["trunk1"].shape[0], code=t["trunk2"].shape[0], activation=o["activation"],
        variant="++" if o["plus"] else "plain",
    )  # fmt: skip


@pytest.mark.parametrize("case", hyperformer_reference.cases(), ids=lambda c: c["name"])
def test_hyperformer_equals_its_reference(case):
    method, o = hyperformer_of(case), case["options"]
    where = site("output", o["width"], ("attention", "mlp")[o["position"]])
    t, y = leaves(case), case["inputs"]["y"].clone().requires_grad_()
    seen = t.with_(layer=t.layer[o["layer"]]) if "layer" in t else t
    assert {n: v.shape for n, v in seen.items()} == {n: s.shape for n, s in method.tensors(where).items()}
    at = At(site=where, tasks=case["inputs"]["task_ids"])
    made = method.derive(seen, at)
    output = method.output(seen.with_(**made), y)
    expected = hyperformer_reference.reference(case)
    assert_close(output, expected["output"])
    assert_close(made["D"], expected["D"])
    gradients_agree(hyperformer_reference, case, output, t, {"y": y})
    for mistake, _ in hyperformer_reference.MUTATIONS:
        changed = hyperformer_reference.mutated(case, mistake)["output"]
        if not torch.equal(changed, expected["output"]):
            assert not torch.allclose(output, changed), mistake


def test_hyperformer_with_one_task_needs_no_task_and_with_several_asks_for_it():
    one, several = (build("hyperformer", tasks=n, reduction=2, embedding=4, hidden=5, code=3) for n in (1, 3))
    t, at, y = randomised(one, site()), At(site=site()), normal(2, 3, 6)
    alone = one.output(t.with_(**one.derive(t, at)), y)
    told = one.output(t.with_(**one.derive(t, at.with_(tasks=torch.tensor([0, 0])))), y)
    assert_close(alone, told)
    with pytest.raises(BadOption, match="3 tasks"):
        several.derive(randomised(several, site()), at)


def test_hyperformer_starts_as_the_base_unless_it_is_told_otherwise():
    for init, same in (("identity", True), ("normal", False)):
        method = build("hyperformer", init=init, reduction=2, embedding=4, hidden=5, code=3)
        generator = torch.Generator().manual_seed(0)
        t = Tensors({n: s.start(s.shape, generator) for n, s in method.tensors(site()).items()})
        y = torch.randn(2, 3, 6)
        assert torch.equal(method.output(t.with_(**method.derive(t, At(site=site()))), y), y) is same


# ---- all of them


@pytest.mark.parametrize(
    ("key", "options"),
    [
        ("serial_adapter", {"reduction": 2}),
        ("ia3", {}),
        ("loreft", {}),
        ("loreft", {"tied": False, "positions": "prompt[:2] + prompt[-1:]"}),
        ("loreft", {"variant": "direft", "positions": "all"}),
        ("loreft", {"variant": "lobireft"}),
        ("invertible_adapter", {}),
        ("invertible_adapter", {"coupling": "glow"}),
        ("adapter_fusion", {}),
        ("adapter_fusion", {"variant": "static"}),
        ("unipelt", {"reduction": 2}),
    ],
)
def test_a_row_an_adapter_equals_each_adapter_alone(key, options):
    method = build(key, **options)
    several = [randomised(method, site(), seed) for seed in range(3)]
    y, mask = normal(3, 7, 6), torch.ones(3, 7, dtype=torch.bool)
    mask[1, :3] = mask[2, 5:] = False
    members = (lambda x, y: y + x, lambda x, y: 2 * y)
    at = At(prompt=mask, mask=mask, members=members, site=site())
    have = {"t": by_rows(several), "x": 2 * y, "y": y, "at": at}
    together = method.output(*(have[n] for n in method.arguments["output"]))
    for i, t in enumerate(several):
        one = mask[i : i + 1]
        at = at.with_(prompt=one, mask=one)
        have = {"t": t, "x": 2 * y[i : i + 1], "y": y[i : i + 1], "at": at}
        assert_close(together[i : i + 1], method.output(*(have[n] for n in method.arguments["output"])))


def sublayers(width, blocks, *roles):
    return [
        replace(site("output", width, role), name=f"block.{i}.{role}", block=i, blocks=blocks)
        for i in range(blocks)
        for role in roles
    ]


def test_counts_on_bert_base_are_those_published():
    both = sublayers(768, 12, "attention", "mlp")
    assert count(build("serial_adapter", reduction=16), *both) == 1_789_056
    assert count(build("loreft", rank=1, tied=False), *sublayers(768, 12, "block")) == 36_888
    scaled = sublayers(768, 12, "key", "value") + sublayers(3072, 12, "down")
    assert count(build("ia3"), *scaled) == 55_296
    inversion = count(build("invertible_adapter"), site(width=768), replace(site("input", 768), n_out=30522))
    assert inversion == 296_064
    fusion = build("adapter_fusion")
    assert count(fusion, site(width=768)) == 3 * 768**2 + 2 * 768
    assert count(build("hyperformer", tasks=5), *both) == 2_581_464 + 5 * 64


@pytest.mark.parametrize(
    ("family", "targets"), [("llama", ["k_proj", "v_proj", "down_proj"]), ("gpt2", ["mlp.c_proj"])]
)
def test_ia3_is_hf_pefts(family, targets):
    peft = pytest.importorskip("peft")
    model, batch = zoo()[family]()
    down = targets[-1]
    config = peft.IA3Config(
        target_modules=targets, feedforward_modules=[down], fan_in_fan_out=family == "gpt2"
    )
    other = peft.get_peft_model(copy.deepcopy(model), config).eval()
    sites = {"input": "mlp.down"} | ({"output": "attention.{key,value}"} if family == "llama" else {})
    veneer.attach(model, "ia3", name="x", sites=sites)
    named = veneer.adapters(model)["x"].named()
    roles = {"k_proj": "attention.key", "v_proj": "attention.value", down.rpartition(".")[2]: "mlp.down"}
    with torch.no_grad():
        bare = model(**batch, adapters=None).logits
        for name, parameter in other.named_parameters():
            if "ia3_l" in name:
                parameter.copy_(normal(*parameter.shape, seed=len(name)))
                block = next(part for part in name.split(".") if part.isdigit())
                role = next(r for leaf, r in roles.items() if f".{leaf}." in name)
                named.pop(f"block.{block}.{role}/scale").copy_(parameter.flatten())
        assert not named, "every scale has a partner"
        found, expected = model(**batch).logits, other(**batch).logits
        assert not torch.allclose(bare, found, atol=1e-3)
        assert_close(found, expected, rtol=1e-5, atol=1e-6)
        veneer.merge(model, "x")
        assert_close(model(**batch).logits, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ends", [(4, 1), (1, 4), (2, 2), (3, 3)])
@pytest.mark.parametrize("length", range(1, 8))
def test_untied_sets_never_meet_on_a_short_prompt(length, ends):
    """R = 0, W = 0 and b, b_last of 1 and 10 mark which set edited a token."""
    method = build(
        "loreft", rank=1, variant="direft", tied=False, positions=f"prompt[:{ends[0]}] + prompt[-{ends[1]}:]"
    )
    zero = torch.zeros(1, 2)
    t = Tensors(R=zero + 1, W=zero, b=tensor([1.0]), R_last=zero + 1, W_last=zero, b_last=tensor([10.0]))
    marks = method.output(t, torch.zeros(1, length, 2), At())[0, :, 0].tolist()
    edited = [mark for mark in marks if mark]
    assert edited == sorted(edited)
    assert edited.count(1.0) <= ends[0]
    assert edited.count(10.0) <= ends[1]
    assert marks[: edited.count(1.0)] == [1.0] * edited.count(1.0)
    if length >= 2:
        assert edited.count(1.0) >= 1
        assert edited.count(10.0) >= 1
        assert marks[-1] == 10.0


def test_rows_of_a_base_without_tokens_are_no_tokens():
    """(rows, width): each of twelve rows is edited, not the first four and the last four."""
    base = testing.bases.get("mlp")
    subject = testing.Subject("loreft", base)
    model = subject.model()
    subject.attach(model, "a", 1)
    inputs = subject.inputs(base.contents(12))
    with torch.no_grad():
        whole = model(**inputs)
        bare = model(**inputs, adapters=None)
    assert ((whole - bare).abs().amax(-1) > 1e-6).all()
