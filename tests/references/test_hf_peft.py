"""A second witness: HF PEFT's layers and AdaLoRA schedule, given the tensors of the cases."""

import pytest
import torch

from references._check import MODULES, case_named, close

torch.set_num_threads(1)


def run_with(model, values: dict, inputs):
    """values: {end of a parameter's name, or its part before the adapter's name: tensor}; all must exist."""
    model = model.double().eval()
    named = [*model.named_parameters(), *model.named_buffers()]
    left = {name for name, value in values.items() if value is not None}
    with torch.no_grad():
        for name, parameter in named:
            for end, value in values.items():
                if value is not None and (name.endswith(end) or f"{end}.default" in name):
                    parameter.copy_(value.reshape(parameter.shape))
                    left.discard(end)
    assert not left, f"nothing is called {left} among {[name for name, _ in named]}"
    return model(inputs)


def peft_output(case, config, values: dict):
    """The case's base linear under HF PEFT."""
    peft = pytest.importorskip("peft")
    W, bias = case["base"]["W"], case["base"]["bias"]
    base = torch.nn.Sequential()
    base.layer = torch.nn.Linear(W.shape[1], W.shape[0], bias=bias is not None)
    values = {"base_layer.weight": W, "base_layer.bias": bias, **values}
    return run_with(peft.get_peft_model(base, config), values, case["inputs"]["x"])


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


def test_hf_peft_agrees_on_lora_and_dora_of_a_convolution():
    peft = pytest.importorskip("peft")
    for case in MODULES["lora_convolution"].cases():
        options, W, t = case["options"], case["base"]["W"], case["tensors"]
        if case["base"]["dilation"] != (1, 1):
            continue  # HF PEFT 0.21.2 builds A without the base's dilation, and fails on the shapes
        base = torch.nn.Sequential()
        steps = {name: case["base"][name] for name in ("stride", "padding", "dilation")}
        has_bias = case["base"]["bias"] is not None
        base.layer = torch.nn.Conv2d(W.shape[1], W.shape[0], W.shape[2:], bias=has_bias, **steps)
        config = peft.LoraConfig(
            r=options["rank"], lora_alpha=options["alpha"], use_dora=options["dora"], target_modules=["layer"]
        )
        values = {"lora_A.default.weight": t["A"], "lora_B.default.weight": t["B"]}
        values |= {"base_layer.weight": W, "base_layer.bias": case["base"]["bias"]}
        if options["dora"]:
            values["lora_magnitude_vector.default.weight"] = t["magnitude"]
        found = run_with(peft.get_peft_model(base, config), values, case["inputs"]["x"])
        close(found, MODULES["lora_convolution"].reference(case)["output"])


def test_hf_peft_agrees_on_lora_of_an_embedding():
    peft = pytest.importorskip("peft")
    for case in MODULES["lora_embedding"].cases():
        options, table, t = case["options"], case["base"]["table"], case["tensors"]
        base = torch.nn.Sequential()
        base.layer = torch.nn.Embedding(*table.shape)
        config = peft.LoraConfig(r=options["rank"], lora_alpha=options["alpha"], target_modules=["layer"])
        values = {
            "base_layer.weight": table,
            "lora_embedding_A": t["A"],
            "lora_embedding_B": t["B"],
        }
        found = run_with(peft.get_peft_model(base, config), values, case["inputs"]["ids"])
        close(found, MODULES["lora_embedding"].reference(case)["output"])


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


def test_hf_peft_agrees_on_loha():
    peft = pytest.importorskip("peft")
    for case in MODULES["loha"].cases():
        options, t = case["options"], case["tensors"]
        config = peft.LoHaConfig(r=options["rank"], alpha=options["alpha"], target_modules=["layer"])
        values = {f"hada_w{i}_{end}": t[f"{n}{i}"] for i in (1, 2) for end, n in (("a", "B"), ("b", "A"))}
        close(peft_output(case, config, values), MODULES["loha"].reference(case)["output"])


def test_hf_peft_agrees_on_lokr():
    peft = pytest.importorskip("peft")
    names = {"C": "w1", "C_B": "w1_a", "C_A": "w1_b", "D": "w2", "B": "w2_a", "A": "w2_b"}
    for case in MODULES["lokr"].cases():
        options, t = case["options"], case["tensors"]
        config = peft.LoKrConfig(
            r=options["rank"],
            alpha=options["alpha"],
            decompose_factor=options.get("factor", -1),
            decompose_both=options.get("decompose_both", False),
            target_modules=["layer"],
        )
        values = {f"lokr_{names[n]}": v for n, v in t.items()}
        close(peft_output(case, config, values), MODULES["lokr"].reference(case)["output"])


def test_hf_peft_agrees_on_hira():
    peft = pytest.importorskip("peft")
    for case in MODULES["hira"].cases():
        if case["options"].get("dropout"):
            continue
        config = peft.HiraConfig(r=case["options"]["rank"], target_modules=["layer"])
        values = {f"hira_{n}": v for n, v in case["tensors"].items()}
        close(peft_output(case, config, values), MODULES["hira"].reference(case)["output"])


@pytest.mark.parametrize("factors", [1, 2, 3])
def test_hf_peft_agrees_on_boft(factors, monkeypatch):
    """Several factors need its CUDA extension, in whose place a block diagonal in plain torch stands here."""
    peft = pytest.importorskip("peft")
    from peft.tuners.boft import layer

    def block_diagonal(blocks):
        return torch.stack([torch.block_diag(*one) for one in blocks])

    monkeypatch.setattr(layer, "get_fbd_cuda", lambda: factors > 1)
    monkeypatch.setattr(layer.FastBlockDiag, "apply", block_diagonal)
    case = next(c for c in MODULES["boft"].cases() if c["options"]["factors"] == factors)
    config = peft.BOFTConfig(
        boft_block_size=case["options"]["block_size"],
        boft_n_butterfly_factor=factors,
        target_modules=["layer"],
    )
    values = {"boft_R": case["tensors"]["M"], "boft_s": case["tensors"]["s"]}
    close(peft_output(case, config, values), MODULES["boft"].reference(case)["output"], rtol=1e-8, atol=1e-9)


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
