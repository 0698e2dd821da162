"""Adapters, rescaling and representation edits as pure functions: by hand, against references, with a row axis."""

from dataclasses import replace

import pytest
import torch
from torch import tensor
from torch.testing import assert_close

from references import ia3 as ia3_reference
from references import loreft as loreft_reference
from references import serial_adapter as serial_reference
from veneer.anatomy import Site
from veneer.edits import At, Tensors, add_row_axis, build, orthonormal_rows
from veneer.errors import BadOption

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
    ],
)
def test_a_row_an_adapter_equals_each_adapter_alone(key, options):
    method = build(key, **options)
    several = [randomised(method, site(), seed) for seed in range(3)]
    y, mask = normal(3, 7, 6), torch.ones(3, 7, dtype=torch.bool)
    mask[1, :3] = mask[2, 5:] = False
    have = {"t": by_rows(several), "y": y, "at": At(prompt=mask)}
    together = method.output(*(have[n] for n in method.arguments["output"]))
    for i, t in enumerate(several):
        have = {"t": t, "y": y[i : i + 1], "at": At(prompt=mask[i : i + 1])}
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
