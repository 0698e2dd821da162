"""Recipes: update rules against closed forms and by hand, resumed runs equal to runs that were not cut."""

import copy

import pytest
import torch

from veneer import recipes
from veneer.anatomy import Site
from veneer.edits import zeros
from veneer.errors import BadOption, UnknownName, UnknownOption, Unsupported
from veneer.recipes.galore import GaLoreAdamW, basis, down, up

torch.set_num_threads(1)
SITE = Site("s", "attention.query", "s", "linear", shape=(4, 3), n_in=3, n_out=4, width=4)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(found, expected, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=1e-11, check_dtype=False)


def flat_group(tensors: dict, lr: float = 0.1, weight_decay: float = 0.0) -> dict:
    """A group as the engine makes it: one flat leaf, and the views that cut it."""
    views, start = [], 0
    for name, value in tensors.items():
        views.append((f"a:site/{name}", tuple(value.shape), start, start + value.numel()))
        start += value.numel()
    leaf = torch.nn.Parameter(torch.cat([v.reshape(-1) for v in tensors.values()]))
    return {"params": [leaf], "lr": lr, "rate": 1.0, "weight_decay": weight_decay, "views": views}


def cut(group: dict) -> dict:
    leaf = group["params"][0].detach()
    return {label.rpartition("/")[2]: leaf[a:b].view(shape) for label, shape, a, b in group["views"]}


def quadratic(group: dict, seed: int = 9):
    """Loss |leaf - goal|^2 / 2, whose gradient is leaf - goal."""
    leaf = group["params"][0]
    goal = draw(leaf.numel(), seed=seed)
    return lambda: ((leaf - goal) ** 2).sum() / 2


def train(optimizer, loss, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


# ---- names


def test_recipes_are_found_by_name_and_read_from_text():
    assert set(recipes.registry()) >= {"adamw", "lora_plus", "lora_fa", "galore", "mezo"}
    found = recipes.parse("galore:rank=4,every=10,scale=1e-1")
    assert (found.rank, found.every, found.scale) == (4, 10, 0.1)
    assert str(found) == "galore:rank=4,every=10,scale=0.1"
    assert recipes.parse(str(found)) == found
    assert recipes.parse(found) is found
    assert recipes.parse(None) is None
    assert str(recipes.parse("lora_plus")) == "lora_plus"
    assert recipes.parse("lora_plus:loraplus_lr_ratio=4").ratio == 4


def test_the_recipe_of_an_arm_is_read_too():
    from veneer.comparing.planning.arms import parse_arm

    (one,) = parse_arm("lora:rank=4+lora_plus:ratio=8").recipes
    assert recipes.parse(one).ratio == 8


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("lora_pluss", UnknownName, ("lora_pluss", "lora_plus")),
        ("galore:ranks=3", UnknownOption, ("ranks", "rank")),
        ("galore:rank=0", BadOption, ("rank=0", "at least 1")),
        ("galore:rank=wide", BadOption, ("rank='wide'", "number")),
        ("mezo:eps=0", BadOption, ("eps=0", "more than 0")),
        ("mezo:fast", BadOption, ("fast", "option=value")),
    ],
)
def test_a_bad_recipe_is_refused_in_words(text, error, words):
    with pytest.raises(error) as caught:
        recipes.parse(text)
    assert all(word in str(caught.value) for word in words)


def test_every_recipe_says_what_its_options_mean():
    for entry in recipes.describe():
        assert entry["summary"]
        assert entry["paper"].startswith("arXiv:")
        assert all(option["meaning"] for option in entry["options"].values())


# ---- AdamW and LoRA+


def test_adamw_by_hand():
    """In the first step m = g, v = g^2 without bias: p <- (1 - 0.1 0.5) p - 0.1 sign(g): 2 -> 1.9 - 0.1."""
    group = flat_group({"W": torch.tensor([[2.0]])}, lr=0.1, weight_decay=0.5)
    optimizer = recipes.parse("adamw").optimizer([group], 0.1, 0.5)
    group["params"][0].grad = torch.tensor([3.0])
    optimizer.step()
    close(group["params"][0].detach(), torch.tensor([1.8]), 1e-5)
    assert "views" not in optimizer.param_groups[0]


def test_lora_plus_gives_b_a_rate_of_its_own():
    plus = recipes.parse("lora_plus:ratio=4")
    assert plus.regroup(SITE, "B", zeros(4, 2)) == ("B", 4.0)
    assert plus.regroup(SITE, "B", zeros(4, 2, rate=0.5, group="slow")) == ("slowB", 2.0)
    assert plus.regroup(SITE, "A", zeros(2, 3)) is None
    assert plus.regroup(SITE, "magnitude", zeros(3)) is None
    a, b = flat_group({"A": draw(2, 3)}, lr=0.1), flat_group({"B": draw(4, 2)}, lr=0.4)
    before = {**cut(a), **cut(b)}
    before = {n: v.clone() for n, v in before.items()}
    optimizer = plus.optimizer([a, b], 0.1, 0.0)
    for group in (a, b):
        group["params"][0].grad = torch.ones_like(group["params"][0])
    optimizer.step()
    close(before["A"] - cut(a)["A"], torch.full((2, 3), 0.1), 1e-6)
    close(before["B"] - cut(b)["B"], torch.full((4, 2), 0.4), 1e-6)


def test_lora_plus_refuses_an_adapter_without_a_pair():
    with pytest.raises(Unsupported, match="and this adapter trains scale"):
        recipes.parse("lora_plus").optimizer([flat_group({"scale": draw(3)})], 0.1, 0.0)


# ---- LoRA-FA


@pytest.mark.parametrize("i", [0, 1])
def test_lora_fa_equals_the_reference(i):
    from references import lora_fa

    case = lora_fa.cases()[i]
    o, expected = case["options"], lora_fa.reference(case)
    a, b = flat_group({"A": case["A"]}), flat_group({"B": case["B"]}, weight_decay=o["decay"])
    optimizer = recipes.parse("lora_fa", scale=o["s"]).optimizer([a, b], o["rate"], o["decay"])
    for t, slope in enumerate(case["slopes"]):
        b["params"][0].grad = slope.reshape(-1).clone()
        a["params"][0].grad = torch.ones_like(a["params"][0])  # as a cohort makes it
        optimizer.step()
        close(b["params"][0].grad.view(slope.shape), expected["corrected"][t])
        close(cut(b)["B"], expected["B"][t])
    assert torch.equal(cut(a)["A"], case["A"])
    assert not a["params"][0].requires_grad


@pytest.mark.parametrize("mistake", range(5))
def test_a_mistake_in_the_rule_of_lora_fa_is_told_apart(mistake):
    from references import lora_fa

    name, apart = lora_fa.MUTATIONS[mistake][0], []
    for case in lora_fa.cases():
        wrong, right = lora_fa.mutated(case, name), lora_fa.reference(case)
        apart += [float((wrong[key] - right[key]).abs().max()) for key in right]
    assert max(apart) > 1e-3


def test_a_corrected_step_moves_the_weight_by_its_gradient_on_the_rows_of_a():
    A, G, s = draw(2, 5), draw(3, 5, seed=1), 2.0
    a, b = flat_group({"A": A}), flat_group({"B": torch.zeros(3, 2, dtype=torch.float64)})
    optimizer = recipes.parse("lora_fa", scale=s).optimizer([a, b], 0.1, 0.0)
    b["params"][0].grad = (s * G @ A.mT).reshape(-1)
    optimizer._correct()
    moved = s * b["params"][0].grad.view(3, 2) @ A
    close(moved, G @ torch.linalg.pinv(A) @ A, 1e-6)


def test_pairs_of_several_ranks_kernels_and_experts_are_corrected_each_by_its_own_a():
    shapes = {
        "one": ((2, 5), (3, 2)),
        "two": ((3, 4), (5, 3)),
        "kernel": ((2, 3, 2, 2), (4, 2)),
        "experts": ((2, 2, 4), (2, 3, 2)),
    }
    A = {f"{n}/A": draw(*s, seed=i) for i, (n, (s, _)) in enumerate(shapes.items())}
    B = {f"{n}/B": torch.zeros(s, dtype=torch.float64) for n, (_, s) in shapes.items()}
    groups = [flat_group(A), flat_group(B)]
    optimizer = recipes.parse("lora_fa").optimizer(groups, 0.1, 0.0)
    g = draw(groups[1]["params"][0].numel(), seed=9)
    groups[1]["params"][0].grad = g.clone()
    optimizer._correct()
    for (_, shape, start, stop), own in zip(groups[1]["views"], A.values()):
        own = own.flatten(len(shape) - 1)
        expected = g[start:stop].view(shape) @ torch.linalg.inv(own @ own.mT + 1e-8 * torch.eye(shape[-1]))
        close(groups[1]["params"][0].grad[start:stop].view(shape), expected, 1e-6)


def test_lora_fa_keeps_less_for_the_backward_and_a_where_it_was():
    import veneer
    from veneer import engine

    kept = {}
    for name in ("adamw", "lora_fa"):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 8))
        veneer.attach(model, "lora", "a", sites="linear", rank=4)
        groups = veneer.parameters(model, lr=0.05, weight_decay=0.1, recipe=recipes.parse(name))
        optimizer = recipes.parse(name).optimizer(groups, 0.05, 0.1)
        before = {n: v.clone() for n, v in veneer.trainable(model).items()}
        x, sizes = torch.randn(100, 64), {}

        def keep(v, sizes=sizes):
            sizes[v.data_ptr()] = v.nbytes
            return v

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda v: v):
            loss = model(x).square().mean()
        first = float(loss)
        engine.prepare_training(model)
        for _ in range(5):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            engine.check_gradients(model)  # A has none, as the recipe wants it
            optimizer.step()
        assert float(model(x).square().mean()) < first
        moved = {n for n, v in veneer.trainable(model).items() if not torch.equal(v, before[n])}
        assert {n[-1] for n in moved} == ({"A", "B"} if name == "adamw" else {"B"})
        kept[name] = sum(sizes.values())
    assert kept["lora_fa"] < 0.8 * kept["adamw"]


def test_lora_fa_refuses_an_adapter_without_a_pair():
    with pytest.raises(Unsupported, match="and this adapter trains scale"):
        recipes.parse("lora_fa").optimizer([flat_group({"scale": draw(3)})], 0.1, 0.0)


# ---- GaLore


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
def test_the_projection_is_the_best_of_its_rank(shape):
    G = draw(*shape)
    P = basis(G, 2)
    U, S, Vt = torch.linalg.svd(G, full_matrices=False)
    close(up(down(G, P), P, shape[0] >= shape[1]), U[:, :2] * S[:2] @ Vt[:2])


def test_the_first_step_of_galore_by_hand():
    """G = diag(3, 2, 1), rank 1: R = 3 e1, Adam gives its sign: W_11 moves by lr scale, and nothing else."""
    group = flat_group({"W": torch.zeros(3, 3, dtype=torch.float64)}, lr=0.1)
    optimizer = recipes.parse("galore:rank=1,scale=0.5").optimizer([group], 0.1, 0.0)
    group["params"][0].grad = torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)).reshape(-1)
    optimizer.step()
    expected = torch.zeros(3, 3)
    expected[0, 0] = -0.05
    close(cut(group)["W"], expected, 1e-4)


def galore_by_loop(W, gradients, lr, decay, rank, every, scale):
    """The rule written out on one matrix; rank None projects nothing."""
    m = v = P = None
    for t, G in enumerate(gradients, start=1):
        tall = G.shape[0] >= G.shape[1]
        if (t - 1) % every == 0:
            U, _, Vt = torch.linalg.svd(G, full_matrices=False)
            P = Vt[:rank] if tall else U[:, :rank]
        P = P if rank else torch.eye(min(G.shape), dtype=G.dtype)
        R = G @ P.T if tall else P.T @ G
        m = 0.1 * R if m is None else 0.9 * m + 0.1 * R
        v = 0.001 * R**2 if v is None else 0.999 * v + 0.001 * R**2
        N = m / (v.sqrt() + 1e-6)
        step = lr * (1 - 0.999**t) ** 0.5 / (1 - 0.9**t)
        W = W - step * scale * (N @ P if tall else P @ N)
        W = W - lr * decay * W
    return W


@pytest.mark.parametrize("shape", [(6, 4), (4, 7)])
def test_galore_equals_its_rule_over_changes_of_the_projection(shape):
    W, small = draw(*shape), draw(3)
    group = flat_group({"bias": small, "W": W}, lr=0.05, weight_decay=0.2)
    optimizer = recipes.parse("galore:rank=2,every=3,scale=0.25").optimizer([group], 0.05, 0.2)
    gradients = [draw(*shape, seed=10 + t) for t in range(8)]
    for G in gradients:
        group["params"][0].grad = torch.cat([torch.zeros(3, dtype=torch.float64), G.reshape(-1)])
        optimizer.step()
    close(cut(group)["W"], galore_by_loop(W, gradients, 0.05, 0.2, 2, 3, 0.25))
    other = galore_by_loop(W, gradients, 0.05, 0.2, 2, 100, 0.25)
    assert float((cut(group)["W"] - other).abs().max()) > 1e-3
    state = optimizer.state[group["params"][0]]
    assert state["1.first"].numel() == 2 * max(shape)
    assert state["1.basis"].numel() == 2 * min(shape)


def test_galore_agrees_with_the_package_of_its_authors():
    theirs = pytest.importorskip("galore_torch")
    for shape in [(6, 4), (4, 7)]:
        W = torch.nn.Parameter(draw(*shape))
        group = flat_group({"W": W.detach().clone()}, lr=0.05, weight_decay=0.2)
        ours = recipes.parse("galore:rank=2,every=3,scale=0.25").optimizer([group], 0.05, 0.2)
        setting = {"rank": 2, "update_proj_gap": 3, "scale": 0.25, "proj_type": "std"}
        other = theirs.GaLoreAdamW(
            [{"params": [W], **setting}], lr=0.05, weight_decay=0.2, no_deprecation_warning=True
        )
        for t in range(8):
            W.grad = draw(*shape, seed=10 + t)
            group["params"][0].grad = W.grad.reshape(-1).clone()
            ours.step()
            other.step()
        close(cut(group)["W"], W.detach(), 1e-5)  # their singular vectors are float32's


def test_what_is_not_larger_than_the_rank_gets_plain_adamw():
    thin = draw(2, 9)
    group = flat_group({"thin": thin, "W": draw(5, 6)}, lr=0.05)
    optimizer = GaLoreAdamW([group], 0.05, rank=2, every=5, scale=0.25)
    gradients = [draw(48, seed=t) for t in range(4)]
    for g in gradients:
        group["params"][0].grad = g.clone()
        optimizer.step()
    whole = [g[:18].view(2, 9) for g in gradients]
    close(cut(group)["thin"], galore_by_loop(thin, whole, 0.05, 0.0, None, 100, 1.0))


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"A": draw(8, 64), "B": draw(64, 8)}, ("rank=128", "site/", "(64, 8)")),
        ({"b": draw(9)}, ("vectors alone",)),
    ],
)
def test_galore_refuses_what_it_cannot_project(tensors, words):
    with pytest.raises(Unsupported) as caught:
        recipes.parse("galore").optimizer([flat_group(tensors)], 0.1, 0.0)
    assert all(word in str(caught.value) for word in (*words, "full"))


# ---- MeZO


def test_a_step_of_mezo_is_the_slope_along_z_times_z():
    group = flat_group({"W": draw(3, 4), "b": draw(4, seed=1)}, lr=0.01, weight_decay=0.1)
    before, loss = group["params"][0].detach().clone(), quadratic(group)
    optimizer = recipes.parse("mezo:eps=1e-3,seed=5").optimizer([group], 0.01, 0.1)
    goal = draw(16, seed=9)
    value = optimizer.step(loss)
    ((seed, slope),) = optimizer.record
    generator = torch.Generator().manual_seed(seed)
    z = torch.cat([torch.randn(n, generator=generator, dtype=torch.float64) for n in (12, 4)])
    close(
        torch.tensor(slope), (z * (before - goal)).sum(), 1e-6
    )  # central differences of a quadratic are exact
    close(group["params"][0].detach(), (1 - 0.001) * before - 0.01 * slope * z, 1e-6)
    close(value, ((before - goal) ** 2).sum() / 2 + (0.001 * z).square().sum() / 2, 1e-6)
    assert group["params"][0].grad is None


def test_mezo_descends():
    group = flat_group({"W": draw(3, 4)}, lr=0.02)
    loss = quadratic(group)
    optimizer = recipes.parse("mezo").optimizer([group], 0.02, 0.0)
    first = loss().item()
    for _ in range(300):
        optimizer.step(loss)
    assert loss().item() < 0.05 * first


def test_the_record_of_a_run_makes_its_end_again():
    group = flat_group({"W": draw(3, 4), "b": draw(4)}, lr=0.02, weight_decay=0.1)
    again = copy.deepcopy(group)
    optimizer = recipes.parse("mezo").optimizer([group], 0.02, 0.1)
    for _ in range(20):
        optimizer.step(quadratic(group))
    other = recipes.parse("mezo").optimizer([again], 0.02, 0.1)
    other.replay(optimizer.record)
    close(again["params"][0].detach(), group["params"][0].detach())
    assert len({seed for seed, _ in optimizer.record}) == 20


def test_two_seeds_of_mezo_go_two_ways():
    ends = []
    for seed in (0, 1):
        group = flat_group({"W": draw(3, 4)}, lr=0.02)
        optimizer = recipes.parse(f"mezo:seed={seed}").optimizer([group], 0.02, 0.0)
        optimizer.step(quadratic(group))
        ends.append(group["params"][0].detach())
    assert float((ends[0] - ends[1]).abs().max()) > 1e-4


def test_recipes_say_whether_they_need_a_backward():
    assert recipes.lookup("adamw").backward
    assert not recipes.lookup("mezo").backward


# ---- resuming


@pytest.mark.parametrize("text", ["adamw", "lora_plus:ratio=4", "galore:rank=2,every=4", "mezo:eps=1e-3"])
def test_a_resumed_run_equals_one_that_was_not_cut(text, tmp_path):
    tensors = {"A": draw(5, 6), "B": draw(6, 5, seed=1)}
    whole, part = (
        flat_group(tensors, lr=0.02, weight_decay=0.1),
        flat_group(tensors, lr=0.02, weight_decay=0.1),
    )

    def go(optimizer, group, steps):
        loss = quadratic(group)
        if recipes.parse(text).backward:
            train(optimizer, loss, steps)
        else:
            for _ in range(steps):
                optimizer.step(loss)

    uncut = recipes.parse(text).optimizer([whole], 0.02, 0.1)
    go(uncut, whole, 10)
    first = recipes.parse(text).optimizer([part], 0.02, 0.1)
    go(first, part, 5)
    torch.save({"optimizer": first.state_dict(), "leaf": part["params"][0].detach()}, tmp_path / "state")
    saved = torch.load(tmp_path / "state", weights_only=True)
    new = flat_group(tensors, lr=0.02, weight_decay=0.1)
    with torch.no_grad():
        new["params"][0].copy_(saved["leaf"])
    second = recipes.parse(text).optimizer([new], 0.02, 0.1)
    second.load_state_dict(saved["optimizer"])
    go(second, new, 5)
    assert torch.equal(new["params"][0], whole["params"][0])


# ---- on a model


@pytest.fixture
def llama():
    from zoo import zoo

    model, inputs = zoo()["llama"]()
    return model, {**inputs, "labels": inputs["input_ids"]}


def trained(model, inputs, text: str, lr: float, steps: int) -> list[float]:
    """Losses of training the active adapter under a recipe, as the loop does it."""
    from veneer import engine

    made = recipes.parse(text)
    optimizer = made.optimizer(engine.parameters(model, lr=lr, weight_decay=0.01, recipe=made), lr, 0.01)
    losses = []
    for step in range(1, steps + 1):
        if made.backward:
            optimizer.zero_grad()
            loss = model(**inputs).loss
            loss.backward()
            optimizer.step()
        else:
            loss = optimizer.step(lambda: model(**inputs).loss)
        engine.between_steps(model, step, steps, optimizer)
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize(
    ("text", "method", "lr"),
    [
        ("adamw", "lora", 1e-2),
        ("lora_plus:ratio=4", "lora", 5e-3),
        ("lora_plus:ratio=4", "dora", 5e-3),
        ("galore:rank=4,every=5", "full", 1e-2),
        ("mezo", "full", 1e-3),
    ],
)
def test_a_recipe_trains_an_adapter(llama, text, method, lr):
    import veneer

    model, inputs = llama
    veneer.attach(model, method, name="a")
    losses = trained(model, inputs, text, lr, 30)
    assert losses[-1] < losses[0] - 0.01


def test_the_rates_of_lora_plus_reach_the_groups_of_a_model(llama):
    import veneer
    from veneer import engine

    model, _ = llama
    veneer.attach(model, "lora", name="a")
    groups = engine.parameters(model, lr=0.1, recipe=recipes.parse("lora_plus:ratio=8"))
    rates = {label.rpartition("/")[2]: group["lr"] for group in groups for label, *_ in group["views"]}
    assert rates == pytest.approx({"A": 0.1, "B": 0.8})


def test_recipes_refuse_methods_that_they_cannot_serve(llama):
    import veneer
    from veneer import engine

    model, _ = llama
    veneer.attach(model, "lora", name="a")
    with pytest.raises(Unsupported, match="rank=128"):
        recipes.parse("galore").optimizer(engine.parameters(model), 0.1, 0.0)
    veneer.attach(model, "vera", name="b", rank=4)
    with pytest.raises(Unsupported, match="trains b, d"):
        recipes.parse("lora_plus").optimizer(engine.parameters(model), 0.1, 0.0)
