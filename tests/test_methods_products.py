"""Weight methods whose update is a product of another kind: worked by hand, and what their papers claim of them."""

import pytest
import torch

import veneer
from test_methods_weight import conv, delta_of, draw, linear, randomized, vector
from veneer.edits import Tensors, build
from veneer.errors import BadOption
from veneer.methods.boft import butterfly
from veneer.methods.lokr import two_factors

torch.set_num_threads(1)


def matrix(*rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def close(found, expected, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=1e-12, check_dtype=False)


# ---- LoHa


def test_loha_by_hand():
    """(1; 2) (3 4) = (3 4; 6 8) times (1; -1) (5 1) = (5 1; -5 -1), times 4 / 1: (60 16; -120 -32)."""
    t = Tensors(B1=matrix([1], [2]), A1=matrix([3, 4]), B2=matrix([1], [-1]), A2=matrix([5, 1]))
    method = build("loha", rank=1, alpha=4)
    close(method.delta(t, matrix([0, 0], [0, 0])), matrix([60, 16], [-120, -32]))
    close(method.branch(t, matrix([1, 2])), matrix([92, -184]))


def test_the_update_of_loha_has_the_rank_of_a_product():
    D = delta_of(m := build("loha", rank=3), randomized(m, linear(20, 15)), draw(15, 20))
    assert torch.linalg.matrix_rank(D) == 9


def test_a_kernel_by_a_core_is_three_products():
    method = build("loha", rank=2, alpha=2, tucker=True)
    t, W = randomized(method, conv(3, 4)), draw(4, 3, 3, 3)
    halves = [torch.zeros(4, 3, 3, 3, dtype=torch.float64) for _ in "12"]
    for i, half in enumerate(halves, start=1):
        T, B, A = (getattr(t, f"{name}{i}") for name in "TBA")
        for k in range(2):
            for j in range(2):
                half += B[:, k, None, None, None] * A[j, :, None, None] * T[k, j]
    close(method.delta(t, W), halves[0] * halves[1])
    assert "T1" not in build("loha", tucker=True).tensors(linear(4, 3))


@pytest.mark.parametrize("key", ["loha", "lokr"])
def test_rows_of_the_update_are_dropped_in_training_and_what_stays_grows(key):
    method = build(key, rank=2, rank_dropout=0.5)
    assert method.tensors(linear(5, 4))["u"].noise
    t, W, x = randomized(method, linear(5, 4)), draw(4, 5), draw(2, 3, 5)
    whole = method.delta(t, W)
    u = torch.tensor([0.2, 0.9, 0.6, 0.7], dtype=torch.float64)
    dropped = t.with_(u=u)
    grown = 4 / 3 if key == "loha" else 1.0  # as HF PEFT has it
    expected = whole * matrix([0], [grown], [grown], [grown])
    close(method.delta(dropped, W), expected)
    close(method.branch(dropped, x), x @ expected.mT)
    rows = Tensors({n: torch.stack([v, v]) for n, v in t.items()}).with_(
        u=torch.stack([u, u.flip(0)])[:, None]
    )
    close(method.delta(rows, W)[0], expected)
    close(method.branch(rows, x)[0], x[0] @ expected.mT)


@pytest.mark.parametrize("key", ["loha", "lokr"])
def test_the_whole_update_is_dropped_at_times(key):
    method = build(key, rank=2, module_dropout=0.5)
    t, W, x = randomized(method, linear(5, 4)), draw(4, 5), draw(2, 3, 5)
    assert not method.branch(t.with_(u_whole=torch.tensor(0.4)), x).any()
    close(method.delta(t.with_(u_whole=torch.tensor(0.6)), W), method.delta(t, W))


# ---- LoKr


def test_lokr_by_hand():
    """(1 2) (x) (3; 4) = (3 6; 4 8), times 6 / 2; a whole D, since 2 is no less than half of 2."""
    method = build("lokr", rank=2, alpha=6)
    t = Tensors(C=matrix([1, 2]), D=matrix([3], [4]))
    close(method.delta(t, matrix([0, 0], [0, 0])), 3 * matrix([3, 6], [4, 8]))
    close(method.branch(t, matrix([1, -1])), matrix([-9, -12]))


def test_lokr_scales_by_alpha_over_rank_with_whole_factors_too():
    assert set(build("lokr", rank=8).tensors(linear(8, 8))) == {"C", "D"}
    assert set(build("lokr", rank=1, decompose_both=True).tensors(linear(64, 64))) == {"C_B", "C_A", "B", "A"}
    assert build("lokr", rank=8, alpha=4).scale == 0.5


@pytest.mark.parametrize(
    ("n", "factor", "sizes"),
    [
        (256, -1, (16, 16)),
        (128, -1, (8, 16)),
        (127, -1, (1, 127)),
        (128, 4, (4, 32)),
        (10, 4, (2, 5)),
        (6, 6, (6, 1)),
    ],
)
def test_a_width_is_cut_as_lycoris_cuts_it(n, factor, sizes):
    assert two_factors(n, factor) == sizes


@pytest.mark.parametrize("tucker", [False, True])
def test_a_kernel_by_kroneckers_product_is_one_for_each_place(tucker):
    method = build("lokr", rank=1, alpha=1, factor=2, tucker=tucker)
    t, W = randomized(method, conv(4, 6)), draw(6, 4, 3, 3)
    assert ("T" in t) == tucker
    D = method.delta(t, W)
    right = t.T[0, 0] if tucker else None
    for i in range(3):
        for j in range(3):
            pair = t.B @ (t.A * right[i, j] if tucker else t.A[..., i, j])
            close(D[..., i, j], torch.kron(t.C, pair))


# ---- HiRA


def test_hira_by_hand():
    """B A = (2 4; 3 6), W = (1 0; -1 2): dW = (2 0; -3 12)."""
    t = Tensors(A=matrix([1, 2]), B=matrix([2], [3]))
    close(build("hira", rank=1).delta(t, matrix([1, 0], [-1, 2])), matrix([2, 0], [-3, 12]))


def test_hira_leaves_zeros_of_the_weight_and_has_its_rank():
    method, W = build("hira", rank=1), draw(6, 6)
    W[2] = 0.0
    D = method.delta(randomized(method, linear(6, 6)), W)
    assert not D[2].any()
    assert torch.linalg.matrix_rank(D) == 5


# ---- FourierFT


def test_one_frequency_is_one_wave():
    """c = 3 at (1, 0) of (2, 2): 150 / 4 * 3 cos(pi p)."""
    t = Tensors(c=torch.tensor([3.0], dtype=torch.float64), index=torch.tensor([2]))
    close(
        build("fourierft", frequencies=1).delta(t, matrix([0, 0], [0, 0])),
        matrix([112.5, 112.5], [-112.5, -112.5]),
    )


def test_the_places_are_those_that_hf_peft_draws():
    order = torch.randperm(20, generator=torch.Generator().manual_seed(777))
    spec = build("fourierft", frequencies=7).tensors(linear(5, 4))["index"]
    assert torch.equal(spec.start(spec.shape, torch.Generator().manual_seed(3)), order[:7])
    assert not spec.trained
    assert spec.seeded


def test_every_frequency_of_a_real_weight_is_reached():
    """With all places the update is any matrix with the symmetry of a real spectrum's real part."""
    method = build("fourierft", frequencies=12, scale=12)
    t = randomized(method, linear(4, 3)).with_(index=torch.arange(12))
    close(method.delta(t, draw(3, 4)), torch.fft.ifft2(t.c.view(3, 4)).real * 12)


@pytest.mark.parametrize("key", ["fourierft", "shira"])
def test_rows_with_places_of_their_own_equal_a_loop(key):
    method, W = build(key, **({"frequencies": 6} if key == "fourierft" else {"rank": 1})), draw(4, 5)
    name = "c" if key == "fourierft" else "values"
    alone = []
    for i in range(3):
        index = torch.randperm(20, generator=torch.Generator().manual_seed(i))[
            : method.tensors(linear(5, 4))[name].size
        ]
        alone.append(Tensors(**{name: draw(len(index), seed=i), "index": index}))
    expected = torch.stack([method.delta(t, W) for t in alone])
    rows = Tensors({n: torch.stack([getattr(t, n) for t in alone])[:, None] for n in (name, "index")})
    if key == "shira":
        close(method.delta(rows, W), expected)
    else:
        rows = rows.with_(D=expected)  # made for each adapter by itself
        x = draw(3, 2, 5)
        close(method.branch(rows, x), x @ expected.mT)


# ---- SHiRA


def test_shira_trains_the_largest_weights_when_asked():
    method, W = build("shira", rank=1, mask="magnitude"), torch.arange(-10.0, 10).view(4, 5)
    found = method.start(linear(5, 4), W, Tensors(values=torch.zeros(9)))["index"]
    assert torch.equal(found, torch.tensor([0, 1, 2, 3, 4, 16, 17, 18, 19]))
    assert not method.tensors(linear(5, 4))["index"].seeded


def test_masks_of_other_seeds_rarely_meet():
    places = []
    for seed in (1, 2):
        spec = build("shira", rank=1, seed=seed).tensors(linear(100, 100))["index"]
        places.append(set(spec.start(spec.shape, torch.Generator()).tolist()))
        assert len(places[-1]) == 200
    assert len(places[0] & places[1]) < 20


# ---- norms


def test_norm_tuning_equals_the_reference_at_the_gain_and_the_shift():
    from references import norm_tuning

    method = build("norm_tuning")
    for case in norm_tuning.cases():
        base, x = case["base"], case["inputs"]["x"].clone().requires_grad_()
        t = {n: v.clone().requires_grad_() for n, v in case["tensors"].items()}
        gain = base["gain"] + method.delta(Tensors(v=t["v"]), base["gain"])
        if base["shift"] is None:
            y = torch.nn.functional.rms_norm(x, x.shape[-1:], gain, base["eps"])
        else:
            shift = base["shift"] + method.delta(Tensors(v=t["v_shift"]), base["shift"])
            y = torch.nn.functional.layer_norm(x, x.shape[-1:], gain, shift, base["eps"])
        close(y.detach(), norm_tuning.reference(case)["output"])
        (y * case["cotangent"]).sum().backward()
        for name, slope in norm_tuning.gradients(case).items():
            close((x if name == "x" else t[name]).grad, slope, 1e-7)
        for mistake, _ in norm_tuning.MUTATIONS[:2]:
            assert (norm_tuning.mutated(case, mistake)["output"] - y).abs().max() > 1e-3
    assert not method.tensors(vector(3))["v"].decay


# ---- BOFT


def test_boft_by_hand():
    """One block of 2 with M = (0 1; -1 0): R = (I - Q) (I + Q)^-1 = (0 -1; 1 0), so W R^T = (-2 1), times 3."""
    t = Tensors(M=matrix([0, 1], [-1, 0])[None, None], s=torch.tensor([3.0], dtype=torch.float64))
    W = matrix([1, 2])
    close(W + build("boft", block_size=2).delta(t, W), matrix([-6, 3]))


def test_factors_and_their_product_are_orthogonal_and_reach_all_inputs():
    method = build("boft", block_size=4, factors=3)
    t = randomized(method, linear(16, 16)).with_(s=torch.ones(16, dtype=torch.float64))
    eye = torch.eye(16, dtype=torch.float64)
    R = (eye + method.delta(t, eye)).mT
    close(R @ R.mT, eye)
    assert (R.abs() > 1e-9).all()
    first = t.with_(M=torch.cat([t.M[:1], torch.zeros_like(t.M[1:])]))
    assert int(((eye + method.delta(first, eye)).abs() > 1e-9).sum()) == 4 * 16


def test_the_butterfly_is_that_of_the_authors_code():
    """Even pieces of a span first, then the odd ones, is the way back of the blocks' own order."""
    for i in (1, 2, 3):
        pieces = torch.arange(32).view(-1, 2 ** (i + 1), 2)
        order = torch.cat([pieces[:, 0::2], pieces[:, 1::2]], 1).flatten()
        assert torch.equal(butterfly(i, 4, 32).argsort(), order)


def test_dropped_blocks_of_one_factor_are_the_identity():
    method = build("boft", block_size=2, factors=2, dropout=0.5)
    t = randomized(method, linear(8, 3))
    u = torch.tensor([0.1, 0.9, 0.2, 0.8], dtype=torch.float64).view(4, 1, 1)
    R = method.rotations(t.with_(u=u, u_factor=torch.tensor(0.7, dtype=torch.float64)))
    whole, eye = method.rotations(t), torch.eye(2, dtype=torch.float64)
    close(R[0], whole[0])
    close(R[1], torch.stack([eye, whole[1, 1], eye, whole[1, 3]]))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: build("boft", block_size=3).tensors(linear(8, 2)),
            ("block_size=3", "8 inputs", "block_size=2"),
        ),
        (lambda: build("boft", block_size=3, factors=2).tensors(linear(12, 2)), ("factors=2", "even width")),
        (lambda: build("boft", blocks=3).tensors(linear(8, 2)), ("blocks=3", "block_size=2")),
        (lambda: build("boft", block_size=2, blocks=2).tensors(linear(8, 2)), ("both given",)),
        (lambda: build("fourierft", frequencies=30).tensors(linear(5, 4)), ("frequencies=30", "20 entries")),
        (lambda: build("shira", rank=4).tensors(linear(5, 4)), ("rank=4", "36 entries", "20")),
        (lambda: build("hira", init="pissa"), ("init='pissa'", "gaussian")),
    ],
)
def test_a_size_that_does_not_fit_is_refused_in_words(make, words):
    with pytest.raises(BadOption) as caught:
        make()
    assert all(word in str(caught.value) for word in words)


# ---- counts on bases of the published size, without weights


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama32_3b", "llama_7b", "roberta_base", "opt_125m"])
def test_counts_on_bases_of_the_published_size(name):
    transformers = pytest.importorskip("transformers")
    from references import counts

    a = counts.ARCHITECTURES[name]
    with torch.device("meta"):
        model = getattr(transformers, a.model).from_config(getattr(transformers, a.config)(**a.settings))
    mine = ("loha", "hira", "lokr", "fourierft", "boft", "norm_tuning")
    tried = [e for e in counts.COUNTS if e.method in mine and e.architecture == name]
    assert tried
    for e in tried:
        sites = {"sites": e.sites} if e.sites else {}
        if name == "opt_125m":  # its MLP works on flat tokens, where roles are not found
            sites = {"sites": ["q_proj", "k_proj", "v_proj", "fc1", "fc2"]}
        assert veneer.plan(model, e.method, **e.options, **sites).trainable_parameters == e.count
