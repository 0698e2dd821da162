"""Weight methods as pure functions: equal to independent references, to the same functions row by row, and to
numbers that were worked by hand or published. No model is needed here.
"""

import dataclasses
import importlib
import math

import pytest
import torch

import veneer
from veneer.anatomy import Site
from veneer.edits import At, Tensors, add_row_axis, build, call, delta_of, skew
from veneer.errors import BadOption, NoSiteFound

torch.set_num_threads(1)
TRAINING = At(training=True)


def linear(n_in: int, n_out: int, name: str = "s", bias: str = "bias", **facts) -> Site:
    facts = {"kind": "linear", "shape": (n_out, n_in), "role": "", "module": name, **facts}
    return Site(name, n_in=n_in, n_out=n_out, width=n_out, bias=bias, **facts)


def vector(n: int, name: str = "v") -> Site:
    return Site(name, "bias", name, "parameter", "bias", shape=(n,), n_in=0, n_out=n, width=n)


def conv(n_in: int, n_out: int, size: int = 3) -> Site:
    return Site(
        "c", "convolution", "c", "conv", shape=(n_out, n_in, size, size), n_in=n_in, n_out=n_out, width=n_out
    )


def embedding(rows: int, width: int) -> Site:
    return Site(
        "e", "token_embedding", "e", "embedding", shape=(rows, width), n_in=rows, n_out=width, width=width
    )


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def started(method, site: Site, W: torch.Tensor, seed: int = 0) -> Tensors:
    """What a fresh adapter holds at one site, in float64."""
    generator = torch.Generator().manual_seed(seed)
    specs = method.tensors(site)
    drawn = {n: s.start(s.shape, generator) for n, s in specs.items() if not s.noise}
    t = Tensors({n: v.double() if v.is_floating_point() else v for n, v in drawn.items()})
    return t.with_(**method.start(site, W, t)) if "start" in method.arguments else t


def randomized(method, site: Site, seed: int = 0) -> Tensors:
    """Tensors of the declared shapes with entries that nothing hides behind."""
    specs = method.tensors(site)
    return Tensors(
        {n: 0.3 + draw(*s.shape, seed=seed + i) for i, (n, s) in enumerate(specs.items()) if not s.noise}
    )


def derived(method, t: Tensors, W: torch.Tensor) -> Tensors:
    return t.with_(**call(method, "derive", t, {"W": W})) if "derive" in method.arguments else t


def output(
    method, t: Tensors, W: torch.Tensor, x: torch.Tensor, bias=None, at: At = TRAINING
) -> torch.Tensor:
    """The edited layer's output: by `branch` where there is one, else by the dense W'."""
    t = derived(method, t, W)
    if "branch" in method.arguments and W.dim() == 2:
        y = x @ W.mT
        y = y + call(method, "branch", t, {"x": x, "y": y, "at": at})
    else:
        y = x @ (W + delta_of(method, t, W)).mT
    return y if bias is None else y + bias


def close(found, expected, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=1e-10, check_dtype=False)


# ---- equal to the references, gradients too; and not equal to them once they are made wrong


def _lora(options):
    options = dict(options)
    options.pop("start", None)
    if options.pop("bias", False):
        options["lora_bias"] = True
    return build("lora", **options)


def _oft(options):
    options = {k: v for k, v in options.items() if v is not None}
    return build("oft", coft="eps" in options, **options)


def _diff_pruning(options):
    return build("diff_pruning", low=options["low"], high=options["high"], penalty_weight=options["weight"])


METHODS = {
    "lora": _lora,
    "dora": lambda options: build("dora", **options),
    "vera": lambda options: build("vera", **options),
    "adalora": lambda options: build(
        "adalora", target_rank=1, **{k: v for k, v in options.items() if k != "kind"}
    ),
    "oft": _oft,
    "diff_pruning": _diff_pruning,
    **{
        key: lambda options, key=key: build(key, **options)
        for key in ("loha", "hira", "lokr", "fourierft", "shira", "boft")
    },
}


def reference(key: str):
    return importlib.import_module(f"references.{key}")


def layer_cases(key: str):
    plain = [c for c in reference(key).cases() if c["options"].get("kind", "layer") == "layer"]
    return [c for c in plain if "keep" not in c["options"]]


CASES = [
    pytest.param(key, i, id=f"{key}: {c['name']}") for key in METHODS for i, c in enumerate(layer_cases(key))
]
MISTAKES = [(key, name) for key in METHODS for name, _ in reference(key).MUTATIONS]


@pytest.fixture
def fixed_dropout(monkeypatch):
    """Dropout whose mask is the case's, in every method file that drops."""

    def use(case):
        mask = case["inputs"].get("dropout_mask")
        for key in METHODS:
            module = importlib.import_module(f"veneer.methods.{key}")
            if mask is not None and hasattr(module, "dropout"):
                monkeypatch.setattr(module, "dropout", lambda x, p, at: x * mask if p and at.training else x)

    return use


def ours(key: str, case: dict) -> dict:
    """Output, delta and gradients of the method under test, from a case's tensors."""
    method, W, bias = METHODS[key](case["options"]), case["base"]["W"], case["base"]["bias"]
    keep = {n: s.keep for n, s in method.tensors(linear(W.shape[1], W.shape[0])).items()}  # as after a step
    held = {n: keep[n](v) if keep.get(n) else v for n, v in case["tensors"].items()}
    if case["options"].get("training"):  # noise as the engine draws it, in (0, 1)
        held |= {n: (v - 1e-4) / (1 - 2e-4) for n, v in case["inputs"].items() if n.startswith("u")}
    t = Tensors({n: v.clone().requires_grad_(n in case["trained"]) for n, v in held.items()})
    x = case["inputs"]["x"].clone().requires_grad_()
    y = output(method, t, W, x, bias)
    (y * case["cotangent"]).sum().backward()
    found = {"output": y.detach(), "delta": delta_of(method, derived(method, t, W), W).detach()}
    if "bias_delta" in reference(key).reference(case):
        shift = method.bias_delta(t)
        found["bias_delta"] = torch.zeros(len(W)) if shift is None else shift.detach()
    found |= {f"gradient.{n}": getattr(t, n).grad for n in case["trained"]}
    if "penalty" in method.arguments:
        clean = Tensors({n: v.clone().requires_grad_() for n, v in held.items() if n in case["trained"]})
        found["penalty"] = method.penalty(clean)
        found["penalty"].backward()
        found |= {f"penalty.{n}": v.grad for n, v in clean.items() if v.grad is not None}
        found["penalty"] = found["penalty"].detach()
    return {**found, "gradient.x": x.grad}


@pytest.mark.parametrize(("key", "index"), CASES)
def test_outputs_and_gradients_equal_the_reference(key, index, fixed_dropout):
    case = layer_cases(key)[index]
    fixed_dropout(case)
    found, expected = ours(key, case), reference(key).reference(case)
    for name in found.keys() & expected.keys():
        close(found[name], expected[name])
    for name, gradient in reference(key).gradients(case).items():
        close(found[name if name.startswith("penalty") else f"gradient.{name}"], gradient, 1e-7)


@pytest.mark.parametrize(("key", "mistake"), MISTAKES)
def test_a_reference_with_a_mistake_in_it_is_told_apart(key, mistake, fixed_dropout):
    apart = 0.0
    for case in layer_cases(key):
        fixed_dropout(case)
        found = ours(key, case)
        for name, value in reference(key).mutated(case, mistake).items():
            if name in found:
                apart = max(apart, float((found[name] - value).abs().max()))
    assert apart > 1e-4 or mistake in SCHEDULES


SCHEDULES = {  # mistakes of what comes before or behind the layer, which have their own tests
    "nothing is pruned",
    "scores are summed, not averaged",
    "uncertainty is left out",
    "masking at every step",
    "importance of the parameters before the step",
}


# ---- one form


OPTIONS = [
    ("lora", {"rank": 3}),
    ("lora", {"rank": 2, "rank_stabilized": True, "init": "pissa"}),
    ("lora", {"rank": 2, "lora_bias": True, "bias": "lora_only"}),
    ("dora", {"rank": 3, "bias": "lora_only"}),
    ("vera", {"rank": 4}),
    ("adalora", {"rank": 3, "target_rank": 2, "bias": "lora_only"}),
    ("loha", {"rank": 3}),
    ("hira", {"rank": 3}),
]


@pytest.mark.parametrize(("key", "options"), OPTIONS)
def test_branch_equals_the_dense_delta_forward_and_gradient(key, options):
    method, site = build(key, **options), linear(5, 3)
    W, x = draw(3, 5), draw(2, 4, 5, seed=1)
    gradients = []
    for form in ("branch", "delta"):
        t = Tensors({n: v.clone().requires_grad_() for n, v in randomized(method, site).items()})
        full = derived(method, t, W)
        y = x @ W.mT
        if form == "branch":
            dy = call(method, "branch", full, {"x": x, "y": y, "at": At()})
        else:
            dy = x @ delta_of(method, full, W).mT
            shift = method.bias_delta(t) if hasattr(method, "bias_delta") else None
            dy = dy if shift is None else dy + shift
        (dy * draw(2, 4, 3, seed=2)).sum().backward()
        gradients.append([dy.detach(), *(v.grad for _, v in t.items())])
    assert float(gradients[0][0].abs().max()) > 0.1
    for a, b in zip(*gradients):
        close(a, b)


ROWED = [(k, o, linear(5, 3)) for k, o in OPTIONS]
ROWED += [
    ("lora", {"rank": 2}, conv(3, 4)),
    ("dora", {"rank": 2}, conv(3, 4)),
    ("lora", {"rank": 2}, embedding(6, 4)),
]
ROWED += [
    ("oft", options, site)
    for options in ({}, {"cayley": "neumann"}, {"block_share": True})
    for site in (linear(6, 4), conv(4, 3), embedding(5, 6))
]
ROWED += [("adalora", {"rank": 2, "target_rank": 1}, conv(3, 4))]
ROWED += [("hira", {"rank": 2}, conv(3, 4)), ("hira", {"rank": 2}, embedding(6, 4))]
ROWED += [("lokr", {"rank": 1}, site) for site in (linear(8, 9), conv(4, 6), embedding(8, 9))]
ROWED += [("lokr", {"rank": 1, "factor": 2, "tucker": True, "decompose_both": True}, conv(4, 6))]
ROWED += [("boft", {"block_size": 2, "factors": f}, s) for f in (1, 2) for s in (linear(8, 4), conv(4, 3))]
ROWED += [("norm_tuning", {}, vector(4))]
ROWED += [("loha", {"rank": 2}, conv(3, 4)), ("loha", {"rank": 2, "tucker": True}, conv(3, 4))]
ROWED += [("diff_pruning", {}, site) for site in (linear(5, 3), conv(2, 3), vector(4))]
ROWED += [
    ("bitfit", {}, vector(4)),
    ("bitfit", {}, linear(5, 3)),
    ("full", {}, linear(5, 3)),
    ("full", {}, vector(4)),
]


@pytest.mark.parametrize(("key", "options", "site"), ROWED)
def test_a_row_axis_gives_what_a_loop_over_adapters_gives(key, options, site):
    method, W = build(key, **options), draw(*site.shape)
    alone = [derived(method, randomized(method, site, seed=10 * i), W) for i in range(3)]
    rows = Tensors(
        {n: add_row_axis(torch.stack([getattr(t, n) for t in alone]), v.dim()) for n, v in alone[0].items()}
    )
    expected = torch.stack([delta_of(method, t, W) for t in alone])
    expected = expected.unsqueeze(1) if W.dim() == 1 else expected
    close(delta_of(method, rows, W).expand_as(expected), expected)
    if "branch" in method.arguments and site.kind == "linear":
        x = draw(3, 2, site.n_in, seed=5)
        y = x @ W.mT
        each = [call(method, "branch", t, {"x": x[i], "y": y[i], "at": At()}) for i, t in enumerate(alone)]
        close(call(method, "branch", rows, {"x": x, "y": y, "at": At()}), torch.stack(each))


IDENTITIES = [
    ("lora", {"rank": 2, "init": i}) for i in ("default", "gaussian", "pissa", "olora", "pissa_niter_3")
]
IDENTITIES += [("adalora", {}), ("oft", {}), ("oft", {"cayley": "neumann"}), ("oft", {"block_share": True})]
IDENTITIES += [("diff_pruning", {}), ("diff_pruning", {"structured": False})]
IDENTITIES += [("dora", {"rank": 2}), ("vera", {"rank": 3}), ("bitfit", {}), ("full", {})]
IDENTITIES += [(k, {}) for k in ("hira", "lokr", "norm_tuning")]
IDENTITIES += [("shira", {"rank": 1}), ("shira", {"rank": 1, "mask": "magnitude"})]
IDENTITIES += [
    ("fourierft", {"frequencies": 5}),
    ("lokr", {"rank": 1, "init": "lycoris", "decompose_both": True}),
]
IDENTITIES += [("loha", {"rank": 2}), ("loha", {"rank": 2, "tucker": True})]
IDENTITIES += [("lora", {"rank": 2, "lora_bias": True, "bias": "lora_only"})]
IDENTITIES += [("dora", {"rank": 2, "bias": "lora_only"}), ("adalora", {"bias": "lora_only"})]


PLACES = [linear(6, 4), conv(3, 4), embedding(7, 5), vector(4)]


def _fits(key: str, options: dict, site: Site) -> bool:
    """Whether this is a site of the method."""
    kinds = build(key, **options).facts.kinds
    if key == "bitfit":
        return site.kind in ("linear", "parameter")
    if options.get("lora_bias"):
        return site.kind in ("linear", "conv")
    return not kinds or (site.kind in kinds and len(site.shape) > 1)


@pytest.mark.parametrize(
    ("key", "options", "site"),
    [
        pytest.param(k, o, s, id=f"{k} {o} at {s.kind}")
        for k, o in IDENTITIES
        for s in PLACES
        if _fits(k, o, s)
    ],
)
def test_a_fresh_adapter_is_the_identity_bit_for_bit(key, options, site):
    method = build(key, **options)
    W = draw(*site.shape)
    t = derived(method, started(method, site, W), W)
    assert torch.equal(W + delta_of(method, t, W), W)
    if "branch" in method.arguments and site.kind == "linear":
        x = draw(2, 3, 6, seed=1)
        y = x @ W.mT
        assert torch.equal(y + call(method, "branch", t, {"x": x, "y": y, "at": At()}), y)


def bitfit_output(case, through: str):
    """A case's layer with its bias edited as a vector of its own, or at the matrix."""
    base, method, b = case["base"], build("bitfit"), case["tensors"]["b"].clone().requires_grad_()
    x = case["inputs"]["x"].clone().requires_grad_()
    if through == "matrix":
        t = Tensors(bias=b)
        y = x @ base["W"].mT + base["bias"] + method.branch(t, x)
        close(
            base["bias"] + method.bias_delta(t).detach(), reference("bitfit").reference(case)["trained_bias"]
        )
        return y, b, x
    bias = base["bias"] + method.delta(Tensors(b=b), base["bias"])
    if "W" in base:
        return torch.nn.functional.linear(x, base["W"], bias), b, x
    return torch.nn.functional.layer_norm(x, x.shape[-1:], base["weight"], bias, base["eps"]), b, x


BITFIT = [
    (c, w)
    for c in reference("bitfit").cases()
    for w in ("vector", "matrix")
    if w == "vector" or "W" in c["base"]
]


@pytest.mark.parametrize(("case", "through"), BITFIT, ids=lambda v: v if isinstance(v, str) else v["name"])
def test_bitfit_equals_the_reference_at_a_vector_and_at_its_matrix(case, through):
    y, b, x = bitfit_output(case, through)
    close(y.detach(), reference("bitfit").reference(case)["output"])
    (y * case["cotangent"]).sum().backward()
    gradients = reference("bitfit").gradients(case)
    close(b.grad, gradients["b"], 1e-7)
    close(x.grad, gradients["x"], 1e-7)
    for mistake, _ in reference("bitfit").MUTATIONS:
        wrong = reference("bitfit").mutated(case, mistake)["output"]
        assert float((wrong - y.detach()).abs().max()) > 1e-3


@pytest.mark.parametrize("case", reference("full").cases(), ids=lambda c: c["name"])
def test_full_equals_the_reference(case):
    base, method, module = case["base"], build("full"), reference("full")
    t = {n: v.clone().requires_grad_() for n, v in case["tensors"].items()}
    x = case["inputs"]["x"].clone().requires_grad_()
    new = {n: None if v is None else method.weight(Tensors(W=t[n]), v) for n, v in base.items()}
    y = torch.nn.functional.linear(x, new["W"], new["bias"])
    (y * case["cotangent"]).sum().backward()
    close(y.detach(), module.reference(case)["output"])
    close(delta_of(method, Tensors(W=t["W"]), base["W"]).detach(), module.reference(case)["delta"])
    for name, gradient in module.gradients(case).items():
        close((x if name == "x" else t[name]).grad, gradient, 1e-7)
    apart = [float((module.mutated(case, m)["output"] - y.detach()).abs().max()) for m, _ in module.MUTATIONS]
    assert apart[0] > 1e-3
    assert apart[2] > 1e-3


def test_full_fine_tuning_is_a_copy_that_is_the_weight():
    W = draw(3, 2)
    t = started(build("full"), linear(2, 3), W)
    assert torch.equal(t.W, W)
    assert torch.equal(build("full").weight(Tensors(W=2 * W), W), 2 * W)


# ---- by hand


def test_lora_by_hand():
    """A = [1 2], B = [3 4]^T, s = 2:  s B A = [[6, 12], [8, 16]]."""
    t = Tensors(A=torch.tensor([[1.0, 2.0]]), B=torch.tensor([[3.0], [4.0]]))
    close(
        build("lora", rank=1, alpha=2.0).delta(t, torch.zeros(2, 2)), torch.tensor([[6.0, 12.0], [8.0, 16.0]])
    )


@pytest.mark.parametrize(
    ("rank", "stabilized", "s"), [(4, False, 4.0), (16, False, 1.0), (4, True, 8.0), (16, True, 4.0)]
)
def test_the_scale_of_lora(rank, stabilized, s):
    assert build("lora", rank=rank, alpha=16.0, rank_stabilized=stabilized).scale == s


def test_dora_by_hand():
    """W = [[3, 0], [0, 1]], B A = [[0, 4], [0, 0]]: rows of length 5 and 1; m = [10, 2]: [[6, 8], [0, 2]]."""
    W = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    t = Tensors(
        A=torch.tensor([[0.0, 4.0]]), B=torch.tensor([[1.0], [0.0]]), magnitude=torch.tensor([10.0, 2.0])
    )
    method = build("dora", rank=1, alpha=1.0)
    close(W + method.delta(derived(method, t, W), W), torch.tensor([[6.0, 8.0], [0.0, 2.0]]))


def test_vera_by_hand():
    """A = [1 2], B = [3 4]^T, d = [5], b = [1 10]: [[15, 30], [200, 400]]."""
    t = Tensors(
        A=torch.tensor([[1.0, 2.0]]),
        B=torch.tensor([[3.0], [4.0]]),
        d=torch.tensor([5.0]),
        b=torch.tensor([1.0, 10.0]),
    )
    close(build("vera", rank=1).delta(t, torch.zeros(2, 2)), torch.tensor([[15.0, 30.0], [200.0, 400.0]]))


# ---- starts of LoRA


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_a_start_in_W_has_the_factors_of_its_paper(kind):
    W, s = draw(5, 4), 1.5
    t = started(build("lora", rank=2, alpha=3.0, init=kind), linear(4, 5), W)
    expected = reference("lora").start(kind, W, 2, s)
    for A, B in ((t.A, t.B), (t.A0, t.B0)):
        close(B @ A, expected["product"])
        # The signs of single columns are the decomposition's to choose.
        close((A @ A.mT).abs(), expected["gram_A"].abs())
        close((B.mT @ B).abs(), expected["gram_B"].abs())


def test_subspace_iteration_finds_the_factors_of_pissa():
    U, V = torch.linalg.qr(draw(8, 6))[0], torch.linalg.qr(draw(6, 6, seed=1))[0]
    W = U @ torch.diag(torch.tensor([9.0, 7.0, 0.5, 0.4, 0.2, 0.1], dtype=torch.float64)) @ V.mT
    exact = started(build("lora", rank=2, init="pissa"), linear(6, 8), W)
    found = started(build("lora", rank=2, init="pissa_niter_8"), linear(6, 8), W)
    close(found.B0 @ found.A0, exact.B0 @ exact.A0, 1e-7)
    rough = started(build("lora", rank=2, init="pissa_niter_1"), linear(6, 8), W)
    assert not torch.allclose(rough.B0 @ rough.A0, exact.B0 @ exact.A0, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("site", [linear(6, 5), conv(2, 5)], ids=["linear", "conv"])
def test_the_orthogonal_start_has_two_live_factors_and_no_product(site):
    t = started(build("lora", rank=4, init="orthogonal"), site, draw(*site.shape))
    assert float(t.A.abs().max()) > 0.05
    assert float(t.B.abs().max()) > 0.05
    assert float((t.B @ t.A.flatten(1)).abs().max()) < 1e-7


def test_the_start_for_tests_is_not_the_identity():
    t = started(build("lora", rank=2, init_lora_weights=False), linear(4, 3), draw(3, 4))
    assert float(build("lora", rank=2).delta(t, draw(3, 4)).abs().max()) > 1e-3


def test_lora_of_an_embedding_is_zero_where_rows_are_looked_up():
    t = started(build("lora", rank=2), embedding(50, 30), draw(50, 30))
    assert not t.B.any()
    assert 0.7 < float(t.A.std()) < 1.3


def test_lora_of_a_convolution_is_the_convolution_with_A_then_a_mix_by_B():
    method, site = build("lora", rank=2, alpha=6.0), conv(3, 4)
    t, x = randomized(method, site), draw(2, 3, 5, 5)
    two_steps = 3.0 * torch.einsum("or,brhw->bohw", t.B, torch.nn.functional.conv2d(x, t.A, padding=1))
    close(torch.nn.functional.conv2d(x, method.delta(t, draw(4, 3, 3, 3)), padding=1), two_steps)


def test_lora_trains_all_biases_of_the_base_when_asked():
    (other,) = build("lora", bias="all").also()
    assert other.sites == "bias"
    assert build("lora").also() == ()
    only = build("lora", bias="lora_only")
    assert "base_bias" in only.tensors(linear(4, 3))
    assert "base_bias" not in only.tensors(linear(4, 3, bias=""))


# ---- what DoRA must do with dropout, kernels and the norm


def test_dora_with_dropout_drops_the_input_of_the_base_term_too(monkeypatch):
    method = build("dora", rank=2, alpha=4.0, dropout=0.5)
    W, x = draw(3, 5), draw(2, 4, 5, seed=1)
    t, mask = randomized(method, linear(5, 3)), (draw(2, 4, 5, seed=2) > 0).double() * 2
    monkeypatch.setattr("veneer.methods.dora.dropout", lambda x, p, at: x * mask if at.training else x)
    V = W + 2.0 * t.B @ t.A
    gain = t.magnitude / V.norm(dim=1)
    expected = x @ W.mT + (gain - 1) * ((x * mask) @ W.mT) + gain * 2.0 * ((x * mask) @ t.A.mT @ t.B.mT)
    close(output(method, t, W, x), expected)
    close(output(method, t, W, x, at=At()), x @ (gain[:, None] * V).mT)


def test_dora_of_a_1x1_convolution_is_dora_of_the_linear_layer():
    method = build("dora", rank=2)
    small, dense = conv(5, 3, size=1), linear(5, 3)
    t, W = randomized(method, dense), draw(3, 5)
    kernel = t.with_(A=t.A[..., None, None])
    close(method.delta(kernel, W[..., None, None]), method.delta(t, W)[..., None, None])
    assert method.tensors(small)["magnitude"].shape == (3,)


def test_the_norm_of_a_large_update_is_that_of_the_dense_matrix():
    method, W = build("dora", rank=3, alpha=300.0), draw(4, 6)
    t = randomized(method, linear(6, 4))
    gain = method.derive(t, W)["gain"]
    close(gain, t.magnitude / (W + 100.0 * t.B @ t.A).norm(dim=1))


# ---- VeRA's pair


def test_the_frozen_pair_of_vera_depends_on_its_seed_alone():
    first, again, other = (build("vera", rank=4, seed=s).tensors(linear(5, 3)) for s in (3, 3, 4))
    generators = [torch.Generator().manual_seed(s) for s in (0, 1)]
    for name in "AB":
        spec = first[name]
        assert not spec.trained
        assert spec.scope == "adapter"
        a, b = spec.start((9, 9), generators[0]), again[name].start((9, 9), generators[1])
        assert torch.equal(a, b)
        assert not torch.equal(a, other[name].start((9, 9), generators[0]))
    assert not torch.equal(first["A"].start((9, 9), generators[0]), first["B"].start((9, 9), generators[0]))


def test_the_bound_of_the_frozen_pair_is_that_of_the_shared_tensor():
    spec = build("vera", rank=4).tensors(linear(6, 3))["A"]
    drawn = spec.start((4, 600), torch.Generator())
    assert 0.9 * (6 / 600) ** 0.5 < float(drawn.abs().max()) <= (6 / 600) ** 0.5


# ---- published numbers of trained parameters


def trained(method, sites) -> int:
    return sum(s.size for site in sites for s in method.tensors(site).values() if s.trained)


def square(d: int, blocks: int, per_block: int = 2):
    return [linear(d, d)] * (blocks * per_block)


LLAMA_7B = (
    [linear(4096, 4096)] * 96 + [linear(4096, 11008)] * 32 + [linear(11008, 4096)] * 32
)  # q, k, v, up, down
LLAMA_3B = [linear(3072, 3072)] * 28 + [linear(3072, 1024)] * 28  # q, v of Llama-3.2-3B

COUNTS = [
    ("lora", {"rank": 8}, square(4096, 32), 4_194_304),
    ("lora", {"rank": 8}, square(768, 12), 294_912),
    ("lora", {"rank": 4}, square(1024, 24), 393_216),
    ("lora", {"rank": 1}, square(12288, 96), 4_718_592),
    ("lora", {"rank": 32}, LLAMA_7B, 56_098_816),
    ("lora", {"rank": 32}, LLAMA_3B, 9_175_040),
    ("dora", {"rank": 32}, LLAMA_7B, 56_975_360),
    ("dora", {"rank": 16}, LLAMA_7B, 28_925_952),
    ("dora", {"rank": 32}, LLAMA_3B, 9_289_728),
    ("adalora", {"rank": 64}, LLAMA_3B, 18_353_664),
    ("oft", {"blocks": 32}, LLAMA_3B, 8_171_520),
    ("oft", {"block_size": 16}, [linear(4096, 4096)] * 192 + [linear(11008, 4096)] * 32, 8_540_160),
    ("vera", {"rank": 1024}, square(768, 12), 43_008),
    ("vera", {"rank": 256}, square(1024, 24), 61_440),
    ("vera", {"rank": 1024}, square(1280, 36), 165_888),
    ("vera", {"rank": 256}, LLAMA_3B, 129_024),
    ("loha", {"rank": 32}, LLAMA_3B, 18_350_080),
    ("hira", {"rank": 32}, LLAMA_3B, 9_175_040),
    ("lokr", {"rank": 32, "factor": 4}, LLAMA_3B, 2_294_656),
    ("fourierft", {"frequencies": 1000}, LLAMA_3B, 56_000),
    ("shira", {"rank": 32}, LLAMA_3B, 9_175_040),
    ("boft", {"block_size": 4}, LLAMA_3B, 802_816),
    ("norm_tuning", {}, [vector(3072)] * 57, 175_104),
]


@pytest.mark.parametrize(("key", "options", "sites", "count"), COUNTS)
def test_counts_are_those_that_were_published(key, options, sites, count):
    assert trained(build(key, **options), sites) == count


def test_bitfit_counts_the_biases_of_bert_base():
    """L12, d768, f3072: q, k, v, o, down, two norms: 768, up: 3072; the embeddings' norm, the pooler."""
    block = [vector(768)] * 7 + [vector(3072)]
    assert trained(build("bitfit"), block * 12 + [vector(768)] * 2) == 102_912


def test_full_counts_every_entry():
    assert trained(build("full"), [linear(5, 3), vector(3), conv(2, 3)]) == 15 + 3 + 54


# ---- what must not be decayed, and what is refused


def test_vectors_with_a_neutral_value_are_not_decayed():
    assert not build("dora").tensors(linear(4, 3))["magnitude"].decay
    assert not build("bitfit").tensors(vector(3))["b"].decay
    assert not build("full").tensors(vector(3))["W"].decay
    assert build("full").tensors(linear(4, 3))["W"].decay


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: build("lora", init="pisa"), ("init='pisa'", "pissa")),
        (lambda: build("lora", init="orthogonal", rank=3), ("rank=3", "even")),
        (lambda: build("lora", rank=0), ("rank=0", "at least 1")),
        (lambda: build("lora", bias="some"), ("bias='some'", "none")),
        (lambda: build("lora", lora_bias=True).tensors(embedding(3, 4)), ("lora_bias", "embedding")),
        (
            lambda: build("lora", rank=5, init="pissa").start(
                linear(4, 3), draw(3, 4), Tensors(A=draw(5, 4))
            ),
            ("rank=5", "'s'", "rank=3"),
        ),
    ],
)
def test_a_bad_option_is_refused_in_words(make, words):
    with pytest.raises(BadOption) as caught:
        make()
    assert all(word in str(caught.value) for word in words)


def test_bitfit_at_a_matrix_without_bias_says_so():
    with pytest.raises(NoSiteFound, match="'s' has none"):
        build("bitfit").tensors(linear(4, 3, bias=""))


def test_hf_option_names_are_accepted():
    method = build("lora", r=4, lora_alpha=8, lora_dropout=0.1, use_rslora=True, init_lora_weights=True)
    assert (method.rank, method.alpha, method.dropout, method.scale) == (4, 8, 0.1, 4.0)


# ---- OFT


def test_oft_by_hand():
    """Q = [1]: S = [[0, 1], [-1, 0]], R = (I - S)(I + S)^-1 = [[0, -1], [1, 0]]; [1 2] R^T = [-2 1]."""
    method = build("oft", block_size=2)
    t, W = Tensors(Q=torch.ones(1, 1)), torch.tensor([[1.0, 2.0]])
    close(method.rotation(t.Q), torch.tensor([[[0.0, -1.0], [1.0, 0.0]]]))
    close(W + method.delta(t, W), torch.tensor([[-2.0, 1.0]]))


def test_the_two_cayley_forms_turn_in_opposite_directions():
    Q = 1e-3 * draw(3, 6)
    exact = build("oft").rotation(Q)
    series = build("oft", use_cayley_neumann=True).rotation(-Q)
    close(exact, series, 1e-7)
    assert float((exact - build("oft", cayley="neumann").rotation(Q)).abs().max()) > 1e-3


def test_the_exact_form_is_orthogonal_and_the_series_drifts_with_the_turn():
    one = torch.eye(4, dtype=torch.float64)
    gap = lambda R: float((R @ R.mT - one).abs().max())  # noqa: E731
    assert gap(build("oft").rotation(3 * draw(2, 6))) < 1e-12
    small, large = (gap(build("oft", cayley="neumann").rotation(a * draw(2, 6))) for a in (0.01, 0.3))
    assert small < 1e-5 < large


def test_constrained_oft_keeps_the_turn_within_its_bound():
    keep = build("oft", coft=True, eps=0.5, block_size=3).tensors(linear(12, 3))["Q"].keep
    Q = torch.cat([draw(2, 3), 1e-3 * draw(2, 3)])
    kept = keep(Q)
    norms = skew(kept, 3).flatten(1).norm(dim=1)
    close(norms[:2], torch.full((2,), 0.25, dtype=torch.float64))
    assert torch.equal(kept[2:], Q[2:])
    close(kept[:2] / kept[:2].norm(dim=1, keepdim=True), Q[:2] / Q[:2].norm(dim=1, keepdim=True))


@pytest.mark.parametrize(
    ("options", "width", "blocks", "entries"),
    [({}, 64, 2, 496), ({}, 100, 4, 300), ({"block_size": 4}, 12, 3, 6), ({"r": 2}, 12, 2, 15)],
)
def test_blocks_cover_the_width(options, width, blocks, entries):
    assert build("oft", **options).tensors(linear(width, 3))["Q"].shape == (blocks, entries)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: build("oft", block_size=5).tensors(linear(12, 3)),
            ("block_size=5", "12", "'s'", "block_size=4"),
        ),
        (lambda: build("oft", blocks=5).tensors(linear(12, 3)), ("blocks=5", "12")),
        (lambda: build("oft", blocks=5, block_size=2), ("both given",)),
        (lambda: build("oft", cayley="euler"), ("cayley='euler'", "neumann")),
        (lambda: build("oft").tensors(linear(37, 3)), ("block_size=0", "37")),
    ],
)
def test_oft_refuses_what_it_cannot_cut(make, words):
    with pytest.raises(BadOption) as caught:
        make()
    assert all(word in str(caught.value) for word in words)


# ---- AdaLoRA's schedule


class Run:
    """What `between_steps` sees, for tests."""

    def __init__(self, t, grad, step, total_steps, state):
        self.t, self.grad, self.step, self.total_steps, self.state = t, grad, step, total_steps, state

    def forget(self, site, tensor, mask=None):
        raise AssertionError("nothing is forgotten")


def adalora_run(case: dict, method) -> dict:
    """The trajectory of a schedule case: plain SGD, then `between_steps`."""
    o, state = case["options"], {}
    sites = {str(i): Tensors({n: v.clone() for n, v in s.items()}) for i, s in enumerate(case["sites"])}
    found = {"E": [], "kept": []}
    for step, gradients in enumerate(case["gradient_steps"], start=1):
        grad = {str(i): Tensors(g) for i, g in enumerate(gradients)}
        for name, t in sites.items():
            for n, v in t.items():
                v -= o["rate"] * getattr(grad[name], n)
        method.between_steps(Run(sites, grad, step, o["total_steps"], state))
        found["E"].append(torch.stack([t.E.clone() for t in sites.values()]))
        ones = torch.ones(o["rank"])
        found["kept"].append(torch.stack([state.get(f"{name}/kept", ones).double() for name in sites]))
    found = {n: torch.stack(v) for n, v in found.items()}
    return found | {f"{n}{i}": getattr(t, n) for i, t in sites.items() for n in "AB"}


SCHEDULE_CASES = [c for c in reference("adalora").cases() if c["options"]["kind"] == "schedule"]


def scheduled(options: dict):
    names = ("rank", "target_rank", "tinit", "tfinal", "beta1", "beta2")
    return build("adalora", every=options["delta_t"], **{n: options[n] for n in names})


@pytest.mark.parametrize("case", SCHEDULE_CASES, ids=lambda c: c["name"])
def test_the_trajectory_of_adalora_equals_the_reference(case):
    expected, found = reference("adalora").reference(case), adalora_run(case, scheduled(case["options"]))
    for name, value in found.items():
        close(value, expected[name])
    o, sites = case["options"], len(case["sites"])
    counts = [
        scheduled(o).budget(t, o["total_steps"], o["rank"] * sites, o["target_rank"] * sites)
        for t in range(1, o["total_steps"] + 1)
    ]
    close(torch.tensor(counts, dtype=torch.float64), expected["budget"])
    assert found["kept"][-1].sum() == o["target_rank"] * sites


@pytest.mark.parametrize("mistake", sorted(SCHEDULES - {"nothing is pruned"}))
def test_a_mistake_in_the_schedule_is_told_apart(mistake):
    apart = 0.0
    for case in SCHEDULE_CASES:
        found, wrong = (
            adalora_run(case, scheduled(case["options"])),
            reference("adalora").mutated(case, mistake),
        )
        apart = max(apart, *(float((found[n] - wrong[n]).abs().max()) for n in ("E", "kept")))
    assert apart > 1e-3


def test_the_budget_falls_by_a_cube():
    """From 120 to 80 over steps 10 to 90: at 30, 80 + 40 (3/4)^3 = 96.9, cut to 96; at 50, 80 + 40 / 8."""
    method = build("adalora", rank=12, target_rank=8, tinit=10, tfinal=10)
    assert [method.budget(t, 100, 120, 80) for t in (1, 10, 30, 50, 70, 90, 95)] == [
        120,
        120,
        96,
        85,
        80,
        80,
        80,
    ]


def test_a_schedule_without_room_is_refused():
    method = build("adalora", tinit=5, tfinal=5)
    with pytest.raises(BadOption, match="tinit=5 and tfinal=5 leave no step of 10"):
        method.between_steps(Run({}, {}, 1, 10, {}))
    with pytest.raises(BadOption, match="target_rank=20"):
        build("adalora", target_rank=20)


# ---- diff pruning


def test_the_gate_by_hand():
    """alpha = 0: s = 1/2, z = 0. alpha = log 2: s = 2/3, z = 0.5. alpha = 5: stretched beyond 1, z = 1."""
    method = build("diff_pruning")
    alpha = torch.tensor([0.0, math.log(2.0), 5.0], dtype=torch.float64)
    close(method.gate(alpha, None), torch.tensor([0.0, 0.5, 1.0]))
    close(method.gate(alpha, torch.full((3,), 0.5, dtype=torch.float64)), torch.tensor([0.0, 0.5, 1.0]))


def test_the_noise_of_a_gate_stays_finite_at_its_ends():
    method = build("diff_pruning")
    assert method.gate(torch.zeros(2), torch.tensor([0.0, 1.0])).tolist() == [0.0, 1.0]
    alpha = torch.zeros(2, requires_grad=True)
    method.gate(alpha, torch.tensor([0.0, 1.0])).sum().backward()
    assert alpha.grad.isfinite().all()


def test_gates_learn_at_their_own_rate_and_are_not_decayed():
    specs = build("diff_pruning", gate_rate=100.0).tensors(linear(5, 3))
    assert specs["w"].rate == 1.0
    assert specs["w"].decay
    for name in ("alpha", "alpha_group"):
        assert (specs[name].rate, specs[name].decay, specs[name].group) == (100.0, False, "gates")
    assert specs["u"].noise
    assert specs["u_group"].shape == ()
    assert "alpha_group" not in build("diff_pruning", structured=False).tensors(linear(5, 3))


def test_what_finish_leaves_equals_the_reference():
    (case,) = [c for c in reference("diff_pruning").cases() if "keep" in c["options"]]
    o, W = case["options"], case["base"]["W"]
    method = _diff_pruning(o).changed(keep_ratio=(o["keep"] + 0.5) / W.numel())
    left = method.finish({"s": Tensors(case["tensors"])})["s"]
    found = build("fish_mask").delta(Tensors(left), W)
    close(found, reference("diff_pruning").reference(case)["delta"])
    assert int((found != 0).sum()) == o["keep"]
    whole = reference("diff_pruning").mutated(case, "nothing is pruned")["delta"]
    assert float((found - whole).abs().max()) > 1e-3


def test_finish_chooses_over_all_sites_together():
    """10 entries, keep_ratio 0.3: the three largest changes are two of the first site, one of the second."""
    method = build("diff_pruning", keep_ratio=0.3)
    open_gates = {"alpha_group": torch.tensor(9.0)}
    first = Tensors(w=torch.tensor([[5.0, 0.0], [-7.0, 1.0]]), alpha=torch.full((2, 2), 9.0), **open_gates)
    second = Tensors(
        w=torch.tensor([0.0, 2.0, 3.0, 0.0, 0.0, 1.0]), alpha=torch.full((6,), 9.0), **open_gates
    )
    left = method.finish({"a": first, "b": second})
    assert left["a"]["index"].tolist() == [0, 2]
    assert left["a"]["values"].tolist() == [5.0, -7.0]
    assert left["b"]["index"].tolist() == [2]


# ---- FISH mask


class Prepared:
    """What `prepare` sees of a site, for tests."""

    def __init__(self, site, W, stats):
        self.site, self.W, self.stats = site, W, stats


def fish(case, per_sample: bool = True):
    """(method, {name: Tensors}) of a reference case: scores by autograd, one sample at a time."""
    base = {n: v.clone().requires_grad_() for n, v in case["base"].items()}
    stats = {n: torch.zeros_like(v) for n, v in case["base"].items()}
    for x, y in zip(case["inputs"]["x"], case["inputs"]["y"]):
        logits = base["W2"] @ (base["W1"] @ x) + base["b2"]
        loss = torch.nn.functional.cross_entropy(logits[None], y[None])
        for n, g in zip(base, torch.autograd.grad(loss, list(base.values()))):
            stats[n] += g**2
    method = build("fish_mask", keep_ratio=case["options"]["keep_ratio"])
    sites = {
        n: Prepared(Site(n, "", n, "parameter", shape=tuple(v.shape)), v, stats[n])
        for n, v in case["base"].items()
    }
    return method, {n: Tensors(t) for n, t in method.prepare(sites).items()}


FISH = [c for c in reference("fish_mask").cases() if not c["options"]["expected"]]


@pytest.mark.parametrize("case", FISH, ids=lambda c: c["name"])
def test_the_mask_is_that_of_the_reference(case):
    method, made = fish(case)
    expected, place, used = reference("fish_mask").reference(case), 0, 0
    flat = []
    for name, W in case["base"].items():
        t = made[name]
        values = case["tensors"]["values"][used : used + len(t.index)]
        used += len(t.index)
        flat += (t.index + place).tolist()
        place += W.numel()
        assert not t.values.any()
        assert t.values.shape == t.index.shape
        close(W + method.delta(Tensors(index=t.index, values=values), W), expected[f"adapted.{name}"])
    assert flat == expected["indices"].tolist()


def test_each_mistake_of_the_mask_is_told_apart():
    for mistake in (
        "the square of the batch's gradient",
        "of equal scores the highest index",
        "absolute values for squares",
    ):
        apart = []
        for case in FISH:
            _, made = fish(case)
            wrong = reference("fish_mask").mutated(case, mistake)
            for name, W in case["base"].items():
                mask = torch.zeros(W.numel(), dtype=torch.float64)
                mask[made[name].index] = 1
                apart.append(not torch.equal(mask.view(W.shape), wrong[f"mask.{name}"]))
        assert any(apart), mistake


def test_fish_mask_by_hand():
    """Scores [[1, 9], [3, 0]] and [9, 2]: with k = 3 both nines and the three."""
    sites = {
        "a": Prepared(None, None, torch.tensor([[1.0, 9.0], [3.0, 0.0]])),
        "b": Prepared(None, None, torch.tensor([9.0, 2.0])),
    }
    made = build("fish_mask", keep_ratio=0.5).prepare(sites)
    assert made["a"]["index"].tolist() == [1, 2]
    assert made["b"]["index"].tolist() == [0]
    t = Tensors(index=made["a"]["index"], values=torch.tensor([5.0, 7.0]))
    close(build("fish_mask").delta(t, torch.zeros(2, 2)), torch.tensor([[0.0, 5.0], [7.0, 0.0]]))


def test_a_site_may_get_no_entry():
    sites = {n: Prepared(None, None, s * torch.ones(4)) for n, s in (("a", 1.0), ("b", 2.0))}
    made = build("fish_mask", keep_ratio=0.5).prepare(sites)
    assert [len(made[n]["index"]) for n in "ab"] == [0, 4]
    t = Tensors(made["a"])
    assert torch.equal(build("fish_mask").delta(t, torch.ones(2, 2)), torch.zeros(2, 2))


@pytest.mark.parametrize("shape", [(3, 4), (5,), (2, 3, 2, 2)])
def test_masked_changes_of_rows_equal_a_loop(shape):
    method, W = build("fish_mask"), draw(*shape)
    alone = [
        Tensors(index=torch.tensor(i), values=draw(2, seed=s)) for s, i in enumerate([[0, 3], [4, 1], [2, 4]])
    ]
    rows = Tensors(
        {n: add_row_axis(torch.stack([getattr(t, n) for t in alone]), 1) for n in ("index", "values")}
    )
    expected = torch.stack([method.delta(t, W) for t in alone])
    close(method.delta(rows, W), expected.unsqueeze(1) if W.dim() == 1 else expected)


def test_an_empty_mask_names_the_ratio():
    with pytest.raises(BadOption, match="keep_ratio=0 should be more than 0"):
        build("fish_mask", keep_ratio=0)
    with pytest.raises(BadOption, match=r"keep_ratio=0\.01 of 4 entries is none"):
        build("fish_mask", keep_ratio=0.01).prepare({"a": Prepared(None, None, torch.ones(4))})
    with pytest.raises(BadOption, match=r"keep_ratio=0\.01"):
        build("diff_pruning", keep_ratio=0.01).finish(
            {"a": Tensors(w=torch.ones(4), alpha=torch.ones(4), alpha_group=torch.ones(()))}
        )


# ---- on a model


@pytest.fixture
def llama():
    from zoo import zoo

    model, inputs = zoo()["llama"]()
    return model, {**inputs, "labels": inputs["input_ids"]}


def trained_steps(model, inputs, steps: int, lr: float, weight_decay: float = 0.0) -> list[float]:
    from veneer import engine

    engine.prepare_training(model, steps)
    optimizer = torch.optim.AdamW(
        [
            {n: v for n, v in g.items() if n != "views"}
            for g in engine.parameters(model, lr=lr, weight_decay=weight_decay)
        ]
    )
    losses = []
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        engine.between_steps(model, step, steps, optimizer)
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_2", "orthogonal"])
def test_a_start_never_touches_the_base(llama, init):
    model, inputs = llama
    before = {n: v.clone() for n, v in model.state_dict().items()}
    bare = model(**inputs).logits.detach()
    veneer.attach(model, "lora", name="a", rank=4, init=init)
    assert float((model(**inputs).logits.detach() - bare).norm() / bare.norm()) < 1e-6
    losses = trained_steps(model, inputs, 8, 1e-2)
    assert losses[-1] < losses[0]
    after = model.state_dict()
    assert all(torch.equal(v, after[n]) for n, v in before.items())


def test_adalora_reaches_its_target_on_a_model(llama):
    model, inputs = llama
    veneer.attach(
        model, "adalora", name="a", rank=6, target_rank=2, tinit=3, tfinal=4, every=2, total_steps=20
    )
    losses = trained_steps(model, inputs, 20, 2e-2)
    E = [v for n, v in veneer.trainable(model).items() if n.endswith("/E")]
    assert len(E) == 4
    assert sum(int((v != 0).sum()) for v in E) == 2 * 4
    assert losses[-1] < losses[0]


def test_a_mask_holds_through_decay_and_momentum(llama):
    """The W in use differs from the base at the mask's entries alone, after steps with weight decay."""
    model, inputs = llama
    adapter = veneer.attach(model, "fish_mask", name="a", keep_ratio=0.02, data=[inputs])
    total = sum(p.numel() for n, p in model.named_parameters() if not n.startswith("veneer"))
    assert adapter.trainable_parameters == int(0.02 * total)
    losses = trained_steps(model, inputs, 10, 1e-2, weight_decay=0.5)
    assert losses[-1] < losses[0]
    bare = {n: v.clone() for n, v in model.state_dict().items()}
    veneer.merge(model, "a")
    changed = sum(
        int((v != bare[n]).sum()) for n, v in model.state_dict().items() if not n.startswith("veneer")
    )
    assert 0.9 * int(0.02 * total) < changed <= int(0.02 * total)


def test_an_unprepared_mask_says_what_it_needs(llama):
    from veneer.errors import NotPrepared

    model, inputs = llama
    veneer.attach(model, "fish_mask", name="a")
    with pytest.raises(NotPrepared, match="data="):
        model(**inputs)


def test_a_method_with_a_schedule_asks_for_the_number_of_steps(llama):
    from veneer import engine
    from veneer.errors import NotPrepared

    model, _ = llama
    veneer.attach(model, "adalora", name="a")
    with pytest.raises(NotPrepared, match="total_steps"):
        engine.prepare_training(model)


# ---- a second witness: HF PEFT


def hf(config: str, layer: torch.nn.Module, **options):
    """The layer as HF PEFT adapts it, float64, its trained tensors drawn at random."""
    peft = pytest.importorskip("peft")
    settings = getattr(peft, config)(target_modules=["layer"], **options)
    model = peft.get_peft_model(torch.nn.ModuleDict({"layer": layer}), settings)
    layer = model.base_model.model["layer"].double().eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in sorted(layer.named_parameters()):
            if "base_layer" not in name and p.requires_grad:
                p.copy_(0.4 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return layer


def held(layer, **names: str) -> Tensors:
    """Our tensors from HF PEFT's attributes."""
    state = {n.replace(".default", ""): v.detach() for n, v in layer.state_dict(keep_vars=True).items()}
    return Tensors({ours: state[theirs] for ours, theirs in names.items()})


PAIR = {"A": "lora_A.weight", "B": "lora_B.weight"}


@pytest.mark.parametrize(
    ("key", "config", "theirs", "options", "names"),
    [
        ("lora", "LoraConfig", {"r": 2, "lora_alpha": 6, "use_rslora": True}, {}, PAIR),
        ("lora", "LoraConfig", {"r": 2, "lora_alpha": 6, "lora_bias": True}, {},
         {**PAIR, "bias": "lora_B.bias"}),
        ("dora", "LoraConfig", {"r": 2, "lora_alpha": 6, "use_dora": True}, {},
         {**PAIR, "magnitude": "lora_magnitude_vector.weight"}),
        ("adalora", "AdaLoraConfig", {"init_r": 3, "target_r": 2, "lora_alpha": 6, "total_step": 9}, {},
         {"A": "lora_A", "B": "lora_B", "E": "lora_E"}),
        ("oft", "OFTConfig", {"oft_block_size": 3, "use_cayley_neumann": False}, {}, {"Q": "oft_R.weight"}),
        ("oft", "OFTConfig", {"oft_block_size": 3, "use_cayley_neumann": True}, {}, {"Q": "oft_R.weight"}),
        ("oft", "OFTConfig", {"oft_block_size": 3, "use_cayley_neumann": True, "num_cayley_neumann_terms": 7},
         {}, {"Q": "oft_R.weight"}),
        ("oft", "OFTConfig", {"oft_block_size": 2, "block_share": True}, {"use_cayley_neumann": True},
         {"Q": "oft_R.weight"}),
        ("vera", "VeraConfig", {"r": 3}, {}, {"d": "vera_lambda_d", "b": "vera_lambda_b"}),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)  # fmt: skip
def test_a_linear_layer_equals_hf_peft_with_its_own_options(key, config, theirs, options, names):
    torch.manual_seed(0)
    layer = hf(config, torch.nn.Linear(6, 5), **theirs)
    ignored = {"use_dora", "total_step"}
    method = build(key, **{n: v for n, v in theirs.items() if n not in ignored}, **options)
    t = held(layer, **names)
    if key == "vera":
        t = t.with_(A=layer.vera_A["default"].double(), B=layer.vera_B["default"].double())
    if key == "adalora":
        t = t.with_(E=t.E.squeeze(1))
    base = layer.base_layer
    x = draw(2, 4, 6, seed=5)
    expected = layer(x).detach()
    found = output(method, t, base.weight.detach(), x, base.bias.detach(), At())
    assert float((found - base(x)).abs().max()) > 0.05
    close(found, expected, 1e-5 if key == "adalora" else 1e-6)


def test_dora_of_a_table_has_the_lengths_of_columns():
    """A table of two columns (3, 4) and (5, 0), with m one and a half of their lengths: by hand."""
    method, W = build("dora", rank=1), torch.tensor([[3.0, 5.0], [4.0, 0.0]])
    t = started(method, embedding(2, 2), W)
    assert t.columns.tolist() == [5.0, 5.0]
    t = t.with_(columns=torch.tensor([7.5, 5.0]))
    close(W + method.delta(t, W), torch.tensor([[4.5, 5.0], [6.0, 0.0]]))


@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal", "gaussian", "none"])
def test_dora_begins_as_its_base_with_every_start(init):
    method, W = build("dora", rank=2, init=init), draw(6, 5)
    t = started(method, linear(5, 6), W)
    assert float((t.A**2).sum()) > 0
    assert (float((t.B**2).sum()) > 0) == (init != "gaussian")
    change = method.delta(t, W)
    if init == "none":  # as HF PEFT: the lengths are those of W + s B A, so that only directions differ
        close((W + change).norm(dim=1), (W + method.scale * t.B @ t.A).norm(dim=1))
    else:
        close(change, torch.zeros(6, 5), 1e-6)


def test_oft_drops_whole_blocks_in_training_and_a_fixed_number_of_them():
    method, W = build("oft", block_size=2, module_dropout=0.5), draw(3, 8)
    assert "u" not in build("oft", block_size=2).tensors(linear(8, 3))
    t = randomized(method, linear(8, 3))
    plain = method.delta(t, W)
    change = method.delta(t.with_(u=torch.tensor([0.4, 0.9, 0.1, 0.6]).view(4, 1, 1)), W)
    assert [bool(c.any()) for c in change.split(2, dim=1)] == [False, True, False, True]
    close(change[:, 2:4], plain[:, 2:4])
    close(change[:, 6:], plain[:, 6:])


def test_trained_tokens_change_their_rows_and_their_logits_alone():
    """W' = W with D added to rows 2 and 0, worked by hand; as a head the same rows read x."""
    (part,) = build("lora", trainable_tokens=[2, 0]).also()
    t = Tensors(D=torch.tensor([[1.0, 2.0], [10.0, 0.0]]))
    W = torch.ones(3, 2)
    assert (W + part.delta(t, W)).tolist() == [[11.0, 1.0], [1.0, 1.0], [2.0, 3.0]]
    site = dataclasses.replace(embedding(3, 2), kind="linear")
    x = torch.tensor([[1.0, -1.0]])
    assert part.branch(t, x, At(site=site)).tolist() == [[10.0, 0.0, -1.0]]


def test_bitfit_takes_the_steps_of_a_plain_loop_over_the_biases():
    import zoo

    plain, kwargs = zoo.zoo()["bert"]()
    adapted, _ = zoo.zoo()["bert"]()
    adapter = veneer.attach(adapted, "bitfit")
    moved = [p.requires_grad_(n.endswith("bias")) for n, p in plain.named_parameters()]
    optimizers = [torch.optim.SGD([p for p in moved if p.requires_grad], lr=0.5),
                  torch.optim.SGD(veneer.parameters(adapted, lr=0.5), lr=0.5)]  # fmt: skip
    for _ in range(3):
        for model, optimizer in zip((plain, adapted), optimizers):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(**kwargs).logits, torch.tensor([0, 1])).backward()
            optimizer.step()
    fresh, _ = zoo.zoo()["bert"]()
    named = adapter.named()
    assert len(named) == sum(n.endswith("bias") for n, _ in plain.named_parameters())
    for name, shift in named.items():
        where = name.removesuffix("/b")
        before, after = fresh.get_parameter(where), plain.get_parameter(where)
        torch.testing.assert_close(before + shift, after, rtol=1e-5, atol=1e-6)
    assert max(float(v.abs().max()) for v in named.values()) > 1e-3


def test_trained_tokens_are_one_tensor_for_every_owner_of_a_shared_table():
    import zoo

    for family, owners in (("gpt2", 2), ("t5", 4), ("llama", 1)):
        model, kwargs = zoo.zoo()[family]()
        adapter = veneer.attach(model, "lora", trainable_tokens=[4, 7])
        rows = [(sp, keys) for sp, keys in zip(adapter.plan.sites, adapter.plan.keys) if "D" in keys]
        assert len(rows) == owners
        assert len({keys["D"] for _, keys in rows}) == 1
        with torch.no_grad():
            for view in veneer.trainable(model).values():
                view.add_(0.3 * torch.randn(view.shape, generator=torch.Generator().manual_seed(0)))
            attached = model(**kwargs).logits
            tables = [model.get_parameter(f"{sp.site.module}.weight") for sp, _ in rows]
            bare = tables[0].clone()
            veneer.merge(model)
            torch.testing.assert_close(model(**kwargs).logits, attached, rtol=1e-4, atol=1e-5)
        moved = (tables[0] != bare).any(-1)
        assert moved.nonzero().flatten().tolist() == [4, 7]


@pytest.mark.parametrize("method", ["full", "bitfit", "diff_pruning"])
def test_a_head_that_is_trained_whole_is_not_trained_a_second_time(method):
    import zoo

    model, _ = zoo.zoo()["bert"]()
    found = veneer.plan(model, method, whole=["classifier"])
    assert [sp.part for sp in found.sites if sp.site.module == "classifier"] == [-1, -1]
    if method == "full":
        assert found.trainable_parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ([3, 3], "names 3 twice"),
        ([-1], "-1 is no row"),
        ([10**6], "1000000 is no row"),
        (["<new>"], "token ids"),
    ],
)
def test_trained_tokens_that_are_no_rows_are_refused_with_what_to_type(tokens, words):
    import zoo

    model, _ = zoo.zoo()["llama"]()
    with pytest.raises(BadOption, match=words) as caught:
        veneer.attach(model, "dora", trainable_tokens=tokens)
    assert caught.value.next_step
    assert "veneer" not in model._modules


def test_the_kernels_of_lora_and_dora_equal_hf_peft():
    x = draw(2, 3, 6, 6, seed=5)
    for dora in (False, True):
        layer = hf("LoraConfig", torch.nn.Conv2d(3, 4, 3, padding=1), r=2, lora_alpha=6, use_dora=dora)
        t = held(layer, **PAIR)
        t = t.with_(B=t.B.flatten(1))
        if dora:
            t = t.with_(magnitude=layer.lora_magnitude_vector["default"].weight.detach().flatten())
        W, bias = layer.base_layer.weight.detach(), layer.base_layer.bias.detach()
        change = build("dora" if dora else "lora", rank=2, alpha=6).delta(t, W)
        close(torch.nn.functional.conv2d(x, W + change, bias, padding=1), layer(x).detach(), 1e-6)


def test_the_table_of_lora_equals_hf_peft_with_factors_swapped():
    layer = hf("LoraConfig", torch.nn.Embedding(7, 5), r=2, lora_alpha=6)
    t = Tensors(
        A=layer.lora_embedding_B["default"].detach().mT, B=layer.lora_embedding_A["default"].detach().mT
    )
    ids, W = torch.tensor([[0, 3, 6]]), layer.base_layer.weight.detach()
    close((W + build("lora", rank=2, alpha=6).delta(t, W))[ids], layer(ids).detach())


@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal"])
def test_starts_equal_those_of_hf_peft(init):
    """HF PEFT moves the start of pissa and olora out of W; with ours in the adapter W stays."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = torch.nn.Linear(6, 5)
    W = base.weight.detach().clone()
    config = peft.LoraConfig(r=2, lora_alpha=6, init_lora_weights=init, target_modules=["layer"])
    layer = peft.get_peft_model(torch.nn.ModuleDict({"layer": base}), config).base_model.model["layer"]
    A, B = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
    t = started(build("lora", rank=2, alpha=6, init=init), linear(6, 5), W)
    if init == "orthogonal":
        assert float((B @ A).abs().max()) < 1e-6
        assert float((t.B @ t.A).abs().max()) < 1e-6
        return
    close((t.B0 @ t.A0).float(), B @ A, 1e-4)
    close((W - 3.0 * t.B0 @ t.A0).float(), layer.base_layer.weight.detach(), 1e-3)


def test_the_budget_of_adalora_equals_hf_peft():
    allocator = pytest.importorskip("peft.tuners.adalora.layer").RankAllocator
    options = {"init_r": 12, "target_r": 4, "tinit": 7, "tfinal": 13, "deltaT": 3}
    config = pytest.importorskip("peft").AdaLoraConfig(total_step=80, **options)
    theirs = allocator.__new__(allocator)
    theirs.peft_config, theirs.init_bgt, theirs.target_bgt = config, 12 * 5, 4 * 5
    ours = build("adalora", **options)
    for step in range(1, 81):
        assert ours.budget(step, 80, 60, 20) == theirs.budget_schedule(step)[0]
