"""Prompts and prefixes as pure functions: by hand, against references, with a row axis."""

import math

import pytest
import torch
from torch import tensor
from torch.testing import assert_close

from references import prefix_tuning as prefix_reference
from veneer.anatomy import Site
from veneer.edits import At, Tensors, add_row_axis, build

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


def attend(q, k, v, mask):
    """Softmax attention with grouped key heads, masks of both kinds."""
    k, v = (z.repeat_interleave(q.shape[1] // z.shape[1], 1) for z in (k, v))
    scores = q @ k.mT / math.sqrt(q.shape[-1])
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


# ---- all of them


@pytest.mark.parametrize(("key", "options"), [("prefix_tuning", {"length": 2})])
def test_a_row_an_adapter_equals_each_adapter_alone(key, options):
    method = build(key, **options)
    several = [randomised(method, attention_site(), seed) for seed in range(3)]
    q, k, v = normal(3, 4, 5, 3), normal(3, 2, 5, 3, seed=1), normal(3, 2, 5, 3, seed=2)
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    together = method.attention(by_rows(several), q, k, v, mask, attend, At())
    for i, t in enumerate(several):
        one = slice(i, i + 1)
        assert_close(together[one], method.attention(t, q[one], k[one], v[one], mask, attend, At()))
