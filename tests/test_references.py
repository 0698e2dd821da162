"""The references themselves: every seeded mistake shows, every gradient and output has a second formula or
witness.

The references stand apart from the package; nothing here imports it.
"""

import importlib
import pkgutil

import pytest
import torch

import references
from references._loops import inverse, listed, matmul, singular_vectors, tensor, transpose
from references._restated import RESTATED

torch.set_num_threads(1)
METHODS = sorted(
    name
    for _, name, _ in pkgutil.iter_modules(references.__path__)
    if not name.startswith("_") and name != "counts"
)
MODULES = {name: importlib.import_module(f"references.{name}") for name in METHODS}
PAIRS = [(name, mistake) for name, module in MODULES.items() for mistake, _ in module.MUTATIONS]


def close(found, expected, rtol: float = 1e-9, atol: float = 1e-10) -> None:
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol, check_dtype=False)


def slopes_close(found, expected) -> None:
    """Five-point differences at step 1e-4 lose about five of the sixteen digits."""
    close(found, expected, rtol=1e-8, atol=3e-9)


def case_named(method: str, part: str):
    return next(case for case in MODULES[method].cases() if part in case["name"])


# ---- all files alike


@pytest.mark.parametrize("method", METHODS)
def test_a_reference_has_the_agreed_form(method):
    cases = MODULES[method].cases()
    assert len({case["name"] for case in cases}) == len(cases) > 0
    for case in cases:
        found = MODULES[method].reference(case)
        assert all(value.isfinite().all() for value in found.values())
        if "cotangent" not in case:
            continue
        assert found["output"].dtype == torch.float64
        assert found["output"].shape == case["cotangent"].shape
        assert set(case["trained"]) <= set(case["tensors"])
        assert all(value.dtype == torch.float64 for value in case["tensors"].values())


@pytest.mark.parametrize("method", METHODS)
def test_a_reference_gives_the_same_cases_and_outputs_again(method):
    first, second = MODULES[method].cases(), MODULES[method].cases()
    for one, other in zip(first, second):
        a, b = MODULES[method].reference(one), MODULES[method].reference(other)
        assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_name_all_trained_tensors_and_none_is_zero(method):
    for case in MODULES[method].cases():
        found = MODULES[method].gradients(case)
        if not found:
            continue
        null = case.get("null_gradient", ())
        for name in case["trained"]:
            if name in found:
                assert found[name].shape == case["tensors"][name].shape
                assert (found[name].abs().max() > 1e-4) == (name not in null), name


@pytest.mark.parametrize(("method", "mistake"), PAIRS)
def test_a_seeded_mistake_is_caught(method, mistake):
    module = MODULES[method]
    largest = 0.0
    for case in module.cases():
        truth, wrong = module.reference(case), module.mutated(case, mistake)
        if any(name.startswith("gradient.") for name in wrong):
            truth = truth | {f"gradient.{name}": value for name, value in module.gradients(case).items()}
        assert wrong.keys() <= truth.keys()
        for name, value in wrong.items():
            if value.shape != truth[name].shape:
                largest = float("inf")
            else:
                largest = max(largest, (value.double() - truth[name].double()).abs().max().item())
    assert largest > 5e-4


# ---- second formulas


def with_gradients(case):
    values = {**case["tensors"], **case["inputs"]}
    return {
        name: value.clone().requires_grad_() if value.is_floating_point() else value
        for name, value in values.items()
        if value is not None
    }


@pytest.mark.parametrize("method", sorted(set(RESTATED) & set(METHODS)))
def test_loops_and_differences_agree_with_matrices_and_autograd(method):
    for case in MODULES[method].cases():
        if "cotangent" not in case:
            continue
        t = with_gradients(case)
        output = RESTATED[method](t, case)
        close(output, MODULES[method].reference(case)["output"])
        output.backward(case["cotangent"])
        for name, slope in MODULES[method].gradients(case).items():
            if not name.startswith("penalty."):
                slopes_close(t[name].grad, slope)


@pytest.mark.parametrize(
    "method", sorted(n.removesuffix("_penalty") for n in RESTATED if n.endswith("_penalty"))
)
def test_penalties_agree_with_matrices_and_autograd(method):
    tried = 0
    for case in MODULES[method].cases():
        expected = MODULES[method].reference(case)
        if "penalty" not in expected:
            continue
        t = with_gradients(case)
        penalty = RESTATED[f"{method}_penalty"](t, case)
        close(penalty, expected["penalty"])
        penalty.backward()
        for name, slope in MODULES[method].gradients(case).items():
            if name.startswith("penalty."):
                slopes_close(t[name.removeprefix("penalty.")].grad, slope)
                tried += 1
    assert tried


@pytest.mark.parametrize("method", ["lora", "dora", "vera", "adalora", "oft"])
def test_the_dense_delta_gives_the_same_output(method):
    for case in MODULES[method].cases():
        found = MODULES[method].reference(case)
        if "delta" not in found or case["options"].get("dropout"):
            continue
        W, bias = case["base"]["W"] + found["delta"], case["base"]["bias"]
        y = torch.nn.functional.linear(case["inputs"]["x"], W, bias)
        close(found["output"], y + found.get("bias_delta", 0.0))


# ---- facts of the equations


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


# ---- a second witness: HF PEFT's layers, given the tensors of the case


def peft_output(case, config, values: dict):
    """The case's base layer under HF PEFT; values: {end of a parameter's name: tensor}."""
    peft = pytest.importorskip("peft")
    W, bias = case["base"]["W"], case["base"]["bias"]
    base = torch.nn.Sequential()
    base.layer = torch.nn.Linear(W.shape[1], W.shape[0], bias=bias is not None)
    model = peft.get_peft_model(base, config).double().eval()
    values = {"base_layer.weight": W, "base_layer.bias": bias, **values}
    named = [*model.named_parameters(), *model.named_buffers()]
    left = {name for name, value in values.items() if value is not None}
    with torch.no_grad():
        for name, parameter in named:
            for end, value in values.items():
                if value is not None and (name.endswith(end) or f"{end}.default" in name):
                    parameter.copy_(value.reshape(parameter.shape))
                    left.discard(end)
    assert not left, f"nothing is called {left} among {[name for name, _ in named]}"
    return model(case["inputs"]["x"])


def test_hf_peft_agrees_on_lora():
    peft = pytest.importorskip("peft")
    for case in MODULES["lora"].cases():
        options, t = case["options"], case["tensors"]
        if options.get("dropout") or options.get("start"):
            continue
        config = peft.LoraConfig(
            r=options["rank"],
            lora_alpha=options["alpha"],
            use_rslora=options.get("rank_stabilized", False),
            lora_bias=options.get("bias", False),
            target_modules=["layer"],
        )
        values = {"lora_A.default.weight": t["A"], "lora_B.default.weight": t["B"]}
        if options.get("bias"):
            values["lora_B.default.bias"] = t["bias"]
        close(peft_output(case, config, values), MODULES["lora"].reference(case)["output"])


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_hf_peft_starts_where_the_self_subtracting_starts_do(start):
    peft = pytest.importorskip("peft")
    case = case_named("lora", start)
    options, W = case["options"], case["base"]["W"]
    base = torch.nn.Sequential()
    base.layer = torch.nn.Linear(W.shape[1], W.shape[0], bias=False)
    base.layer.weight.data.copy_(W)
    config = peft.LoraConfig(
        r=options["rank"], lora_alpha=options["alpha"], init_lora_weights=start, target_modules=["layer"]
    )
    layer = peft.get_peft_model(base, config).base_model.model.layer
    product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    s = MODULES["lora"].scale(options)
    expected = MODULES["lora"].start(start, W, options["rank"], s)["product"]
    # HF PEFT computes the start in float32.
    torch.testing.assert_close(product.double(), expected, rtol=1e-5, atol=1e-5)
    whole = layer.base_layer.weight + s * product
    torch.testing.assert_close(whole.double(), W, rtol=1e-5, atol=1e-5)


def test_hf_peft_agrees_on_dora():
    peft = pytest.importorskip("peft")
    for case in MODULES["dora"].cases():
        options, t = case["options"], case["tensors"]
        config = peft.LoraConfig(
            r=options["rank"],
            lora_alpha=options["alpha"],
            use_rslora=options.get("rank_stabilized", False),
            use_dora=True,
            target_modules=["layer"],
        )
        values = {
            "lora_A.default.weight": t["A"],
            "lora_B.default.weight": t["B"],
            "lora_magnitude_vector.default.weight": t["magnitude"],
        }
        close(peft_output(case, config, values), MODULES["dora"].reference(case)["output"])


def test_hf_peft_agrees_on_vera():
    peft = pytest.importorskip("peft")
    for case in MODULES["vera"].cases():
        t = case["tensors"]
        config = peft.VeraConfig(r=case["options"]["rank"], target_modules=["layer"])
        values = {
            "vera_A": t["A"],
            "vera_B": t["B"],
            "vera_lambda_d": t["d"],
            "vera_lambda_b": t["b"],
        }
        close(peft_output(case, config, values), MODULES["vera"].reference(case)["output"])


def test_hf_peft_agrees_on_ia3():
    peft = pytest.importorskip("peft")
    for case in MODULES["ia3"].cases():
        feedforward = ["layer"] if case["options"]["side"] == "input" else []
        config = peft.IA3Config(target_modules=["layer"], feedforward_modules=feedforward)
        values = {"ia3_l": case["tensors"]["scale"]}
        close(peft_output(case, config, values), MODULES["ia3"].reference(case)["output"])


def test_hf_peft_agrees_on_oft():
    peft = pytest.importorskip("peft")
    for case in MODULES["oft"].cases():
        options = case["options"]
        config = peft.OFTConfig(
            r=0,
            oft_block_size=options["block_size"],
            use_cayley_neumann=options["cayley"] == "neumann",
            num_cayley_neumann_terms=options.get("terms", 5),
            block_share=options.get("block_share", False),
            coft=options.get("eps") is not None,
            eps=options.get("eps") or 6e-5,
            target_modules=["layer"],
        )
        found = peft_output(case, config, {"oft_R.default.weight": case["tensors"]["Q"]})
        close(found, MODULES["oft"].reference(case)["output"])


def test_hf_peft_agrees_on_adalora():
    peft = pytest.importorskip("peft")
    for case in MODULES["adalora"].cases():
        options = case["options"]
        if options["kind"] != "layer":
            continue
        config = peft.AdaLoraConfig(
            init_r=options["rank"], lora_alpha=options["alpha"], total_step=10, target_modules=["layer"]
        )
        # HF PEFT holds 1e-5 beside the rank in float32.
        found = peft_output(case, config, {f"lora_{name}": case["tensors"][name] for name in "ABE"})
        close(found, MODULES["adalora"].reference(case)["output"], rtol=1e-8)


def test_hf_peft_agrees_on_the_schedule_of_adalora():
    peft = pytest.importorskip("peft")
    for case in MODULES["adalora"].cases():
        o = case["options"]
        if o["kind"] != "schedule":
            continue
        base = torch.nn.Sequential()
        for i, site in enumerate(case["sites"]):
            base.add_module(f"site{i}", torch.nn.Linear(site["A"].shape[1], site["B"].shape[0], bias=False))
        config = peft.AdaLoraConfig(
            init_r=o["rank"],
            target_r=o["target_rank"],
            tinit=o["tinit"],
            tfinal=o["tfinal"],
            deltaT=o["delta_t"],
            total_step=o["total_steps"],
            beta1=o["beta1"],
            beta2=o["beta2"],
            target_modules=[f"site{i}" for i in range(len(case["sites"]))],
        )
        model = peft.get_peft_model(base, config).double()
        layers = [getattr(model.base_model.model, f"site{i}") for i in range(len(case["sites"]))]
        held = [{name: getattr(layer, f"lora_{name}")["default"] for name in "ABE"} for layer in layers]
        for parameters, site in zip(held, case["sites"]):
            for name, parameter in parameters.items():
                parameter.data.copy_(site[name].reshape(parameter.shape))
        expected = MODULES["adalora"].reference(case)
        for t, step in enumerate(case["gradient_steps"], start=1):
            for parameters, slopes in zip(held, step):
                for name, parameter in parameters.items():
                    parameter.grad = slopes[name].reshape(parameter.shape).clone()
                    parameter.data -= o["rate"] * parameter.grad
            model.base_model.update_and_allocate(t)
            for i, parameters in enumerate(held):
                close(parameters["E"].data[:, 0], expected["E"][t - 1, i])


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
