"""Facts that the equations imply, each checked on the references' own cases."""

import torch

from references._check import MODULES, case_named, close
from references._loops import inverse, listed, matmul, singular_vectors, tensor, transpose

torch.set_num_threads(1)


def test_the_loops_find_what_torch_finds():
    A = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    U, S, V = singular_vectors(listed(A))
    close(tensor(S), torch.linalg.svdvals(A))
    close(tensor(transpose(U)) @ torch.diag(tensor(S)) @ tensor(V), A)
    square = A[:, :4]
    close(tensor(matmul(inverse(listed(square)), listed(square))), torch.eye(4, dtype=torch.float64))


def test_a_start_of_lora_is_the_best_low_rank_part_of_W():
    lora = MODULES["lora"]
    case = case_named("lora", "pissa")
    W, options = case["base"]["W"], case["options"]
    s = lora.scale(options)
    U, S, Vh = torch.linalg.svd(W)
    r = options["rank"]
    found = lora.start("pissa", W, r, s)
    close(s * found["product"], (U[:, :r] * S[:r]) @ Vh[:r])
    close(found["gram_A"], torch.diag(S[:r] / s))
    close(found["gram_B"], torch.diag(S[:r] / s))
    Q, R = torch.linalg.qr(case_named("lora", "olora")["base"]["W"])
    close(lora.start("olora", case_named("lora", "olora")["base"]["W"], r, s)["product"], Q[:, :r] @ R[:r])


def test_a_self_subtracting_start_changes_nothing_at_the_start():
    case = case_named("lora", "pissa")
    start = {**case["tensors"], "A": case["tensors"]["A0"], "B": case["tensors"]["B0"]}
    found = MODULES["lora"].reference({**case, "tensors": start})
    assert found["delta"].abs().max() == 0.0


def test_rows_of_dora_have_the_length_of_the_magnitude():
    for case in MODULES["dora"].cases():
        W = case["base"]["W"] + MODULES["dora"].reference(case)["delta"]
        close(W.norm(dim=1), case["tensors"]["magnitude"])


def test_an_exact_cayley_block_is_orthogonal_and_the_series_is_its_transpose_to_third_order():
    for case in MODULES["oft"].cases():
        R = MODULES["oft"].reference(case)["R"]
        if case["options"]["cayley"] == "exact":
            close(R @ R.T, torch.eye(len(R), dtype=torch.float64))
    S = MODULES["oft"].skew([0.01, -0.02, 0.015], 3)
    exact = tensor(MODULES["oft"].rotation(S, "exact"))
    series = tensor(MODULES["oft"].rotation(S, "neumann", terms=5))
    torch.testing.assert_close(series, exact.T, rtol=0, atol=1e-6)
    assert not torch.allclose(series, exact, rtol=0, atol=1e-3)
    assert MODULES["oft"].rotation(S, "neumann", terms=1) == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]


def test_ia3_on_the_upper_branch_of_a_gated_mlp_is_ia3_on_the_input_of_its_last_linear():
    draw = torch.Generator().manual_seed(0)
    gate, up = (torch.randn(2, 5, generator=draw, dtype=torch.float64) for _ in range(2))
    scale, down = (torch.randn(*s, generator=draw, dtype=torch.float64) for s in ((5,), (3, 5)))
    case = {
        "options": {"side": "input"},
        "base": {"W": down, "bias": None},
        "tensors": {"scale": scale},
        "inputs": {"x": (torch.nn.functional.silu(gate) * up)[None]},
    }
    close(
        MODULES["ia3"].reference(case)["output"][0], (torch.nn.functional.silu(gate) * (up * scale)) @ down.T
    )


def test_the_merged_layer_of_ia3_gives_the_same_output():
    for case in MODULES["ia3"].cases():
        found = MODULES["ia3"].reference(case)
        y = torch.nn.functional.linear(case["inputs"]["x"], found["merged_W"], found.get("merged_bias"))
        close(found["output"], y)


def test_adalora_keeps_its_target_at_the_end():
    for case in MODULES["adalora"].cases():
        if case["options"]["kind"] == "schedule":
            found = MODULES["adalora"].reference(case)
            target = case["options"]["target_rank"] * len(case["sites"])
            assert found["kept"][-1].sum() == found["budget"][-1] == target
            assert (found["E"][-1][found["kept"][-1] == 0] == 0).all()
            assert (found["budget"].diff() <= 0).all()


def test_loreft_edits_no_token_twice_and_leaves_the_others_bit_for_bit():
    for case in MODULES["loreft"].cases():
        found = MODULES["loreft"].reference(case)
        edited, prompt = found["edited"], case["inputs"]["prompt"]
        assert not (edited & ~prompt).any()
        assert torch.equal(found["output"][~edited], case["inputs"]["x"][~edited])
        for row in prompt:
            first, last = MODULES["loreft"].positions(listed(row), case["options"]["first"], 2)
            assert not set(first) & set(last)


def test_a_prompt_taken_out_again_leaves_the_sequence():
    for case in MODULES["prompt_tuning"].cases():
        found = MODULES["prompt_tuning"].reference(case)
        assert torch.equal(found["trimmed"], case["inputs"]["x"])
        for mask, positions in zip(found["mask"], found["position_ids"]):
            assert positions[mask].tolist() == list(range(int(mask.sum())))


def test_of_equal_fish_scores_two_lie_on_either_side_of_the_cut():
    case = case_named("fish_mask", "tied True")
    found = MODULES["fish_mask"].reference(case)
    score = torch.cat([found[f"score.{name}"].flatten() for name in ("W1", "W2", "b2")])
    chosen = torch.zeros(len(score), dtype=torch.bool).index_fill(0, found["indices"], True)
    lowest = score[chosen].min()
    assert lowest == score[~chosen].max()
    assert (score == lowest).nonzero()[0, 0] in found["indices"]


def test_a_gate_of_diff_pruning_is_open_with_the_probability_of_its_penalty():
    module, options = MODULES["diff_pruning"], {"low": -0.1, "high": 1.1}
    levels = [(i + 0.5) / 20_000 for i in range(20_000)]
    for alpha in (-1.5, 0.2, 2.0):
        open_share = sum(module.gate(alpha, u, options) > 0 for u in levels) / len(levels)
        assert abs(open_share - module.expected_open(alpha, options)) < 1e-4


def test_an_inverted_embedding_is_the_embedding():
    module = MODULES["invertible_adapter"]
    for case in module.cases():
        there = {**case, "options": {**case["options"], "inverse": False}}
        o = module.reference(there)["output"]
        back = {**case, "options": {**case["options"], "inverse": True}, "inputs": {"x": o}}
        close(module.reference(back)["output"], case["inputs"]["x"])


def test_a_closed_gate_of_llama_adapter_leaves_the_attention_alone():
    module = MODULES["llama_adapter"]
    for case in module.cases():
        shut = {**case["tensors"], "gate": torch.zeros_like(case["tensors"]["gate"])}
        found = module.reference({**case, "tensors": shut})["output"]
        far = {**case["tensors"], "prompt": case["tensors"]["prompt"] * 5}
        assert not torch.allclose(module.reference({**case, "tensors": far})["output"], found)
        shut_far = {**far, "gate": shut["gate"]}
        close(module.reference({**case, "tensors": shut_far})["output"], found)


def test_a_gated_prompt_added_before_or_behind_the_output_projection_is_the_same():
    for case in MODULES["llama_adapter"].cases():
        found, base = MODULES["llama_adapter"].reference(case), case["base"]
        shut = {**case["tensors"], "gate": torch.zeros_like(case["tensors"]["gate"])}
        plain = MODULES["llama_adapter"].reference({**case, "tensors": shut})
        extra = (found["output"] - plain["output"]).transpose(1, 2).flatten(2)
        close(found["projected"], plain["projected"] + extra @ base["out_W"].T)


def test_a_fusion_of_equal_adapters_is_that_adapter():
    module = MODULES["adapter_fusion"]
    case = case_named("adapter_fusion", "static True")
    same = case["inputs"]["z"][:1].expand_as(case["inputs"]["z"])
    found = module.reference({**case, "inputs": {**case["inputs"], "z": same}})["output"]
    close(found, same[0] + case["inputs"]["residual"])


def test_an_identity_as_fusion_value_costs_no_penalty():
    module = MODULES["adapter_fusion"]
    case = case_named("adapter_fusion", "static False")
    eye = torch.eye(3, dtype=torch.float64)
    assert module.reference({**case, "tensors": {**case["tensors"], "V": eye}})["penalty"] == 0.0


def test_equal_tasks_get_equal_generated_weights():
    case = case_named("hyperformer", "tasks [1, 1]")
    found = MODULES["hyperformer"].reference(case)
    assert torch.equal(found["D"][0], found["D"][1])
    other = MODULES["hyperformer"].reference(case_named("hyperformer", "tasks [0, 2]"))
    assert not torch.allclose(other["D"][0], other["D"][1])


def test_no_reference_lets_a_real_token_see_a_pad():
    """Pads filled with other numbers change nothing at real tokens."""
    states = {
        "prefix_tuning": {"k": 2, "v": 2, "q": 2},
        "llama_adapter": {"k": 2, "v": 2, "q": 2},
        "unipelt": {"x": 1, "y": 1, "k": 2, "v": 2, "q": 2},
        "ladder_side_tuning": {"h_0": 1, "h_1": 1, "h_2": 1},
        "linear_probe": {"h": 1},
    }
    for method, axes in states.items():
        for case in MODULES[method].cases():
            if "mask" not in case["inputs"]:
                continue
            inputs, mask = dict(case["inputs"]), case["inputs"]["mask"]
            for name, axis in axes.items():
                if name in inputs:
                    value = inputs[name].clone()
                    live = mask[:, -value.shape[axis] :]
                    value.movedim(axis, 1)[~live] = 7.0
                    inputs[name] = value
            found = MODULES[method].reference({**case, "inputs": inputs})["output"]
            close(found, MODULES[method].reference(case)["output"])


def test_no_causal_reference_lets_a_token_see_the_future():
    for method, names in (
        ("prefix_tuning", "kv"),
        ("unipelt", "xkvq"),
        ("ladder_side_tuning", ("h_1", "h_2")),
    ):
        for case in MODULES[method].cases():
            if not case["options"].get("causal") or "mask" not in case["inputs"]:
                continue
            inputs = dict(case["inputs"])
            for name in names:
                if name in inputs:
                    inputs[name] = inputs[name].clone()
                    inputs[name].select(-2, -1).fill_(3.0)  # the last token
            before = MODULES[method].reference(case)["output"]
            after = MODULES[method].reference({**case, "inputs": inputs})["output"]
            assert torch.equal(before[..., :-1, :], after[..., :-1, :])
            assert not torch.allclose(before[0, ..., -1, :], after[0, ..., -1, :])


# ---- update rules


def test_one_projected_adam_step_is_torch_adam_in_the_small_space():
    module = MODULES["galore"]
    for case in module.cases():
        if "projections" in case:
            continue
        o, found = case["options"], module.reference(case)
        P = found["P.1"]
        right = case["W"].shape[0] >= case["W"].shape[1]
        small = torch.nn.Parameter(torch.zeros_like(case["W"] @ P.T if right else P.T @ case["W"]))
        adam = torch.optim.Adam([small], lr=1.0, betas=(o["beta1"], o["beta2"]), eps=o["eps"])
        W = case["W"]
        for step, G in enumerate(case["slopes"]):
            before = small.detach().clone()
            small.grad = G @ P.T if right else P.T @ G
            adam.step()
            moved = small.detach() - before
            back = moved @ P if right else P @ moved
            W = W * (1 - o["rate"] * o["decay"]) + o["rate"] * o["scale"] * back
            close(found["W"][step], W)


def test_a_projection_spans_the_first_singular_vectors():
    for case in MODULES["galore"].cases():
        P = MODULES["galore"].reference(case)["P.1"]
        G, rank = case["slopes"][0], case["options"]["rank"]
        U, _, Vh = torch.linalg.svd(G, full_matrices=False)
        if G.shape[0] >= G.shape[1]:
            close(P.T @ P, Vh[:rank].T @ Vh[:rank])
        else:
            close(P @ P.T, U[:, :rank] @ U[:, :rank].T)


def test_signs_of_singular_vectors_matter_only_when_the_projection_is_renewed():
    module = MODULES["galore"]
    for case in module.cases():
        o = case["options"]
        renewed = o["refresh"] < len(case["slopes"])
        steps = range(1, len(case["slopes"]) + 1, o["refresh"])
        given = case.get("projections") or {1: module.reference(case)["P.1"]}
        flipped = {t: given[t] if t < max(steps) else -given[t] for t in steps}
        found = module.reference({**case, "projections": flipped})["W"]
        assert torch.allclose(found, module.reference(case)["W"], atol=1e-12) != renewed


def test_the_two_point_estimate_tends_to_the_directional_derivative():
    module = MODULES["mezo"]
    case = module.cases()[0]
    tensors = {name: value.clone().requires_grad_() for name, value in case["tensors"].items()}
    x, y = case["inputs"]["x"][0], case["inputs"]["y"][0]
    out = (tensors["norm"] * x) @ tensors["W"].T + tensors["bias"]
    ((out - y).square() / 2 + 0.1 * out**3).sum(1).mean().backward()
    along = sum((tensors[name].grad * case["z"][0][name]).sum() for name in tensors)
    torch.testing.assert_close(module.reference(case)["g"][0], along, rtol=1e-4, atol=0)


def test_a_mezo_run_is_replayed_from_its_seeds_and_estimates():
    module = MODULES["mezo"]
    for case in module.cases():
        found, o = module.reference(case), case["options"]
        theta = {name: case["tensors"][name] for name in module.ORDER}
        for g, seed in zip(found["g"], case["seeds"]):
            drawn = module.draws(seed, [value.shape for value in theta.values()])
            for (name, value), z in zip(theta.items(), drawn):
                decay = o["decay"] if name == "W" else 0.0
                theta[name] = value - o["rate"] * (g * z + decay * value)
        for name in theta:
            close(theta[name], found[name][-1])
