"""The references themselves: every seeded mistake shows, every gradient and output has a second formula or
witness.

The references stand apart from the package; nothing here imports it. Facts of single equations, the witness
of HF PEFT and the published counts are checked beside the references, in references/test_*.py.
"""

import re
from pathlib import Path

import pytest
import torch

from references._check import METHODS, MODULES, close, slopes_close
from references._restated import RESTATED

torch.set_num_threads(1)
PAIRS = [(name, mistake) for name, module in MODULES.items() for mistake, _ in module.MUTATIONS]


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
        assert all(value.dtype in (torch.float64, torch.int64) for value in case["tensors"].values())


@pytest.mark.parametrize("method", METHODS)
def test_a_reference_imports_nothing_that_it_judges(method):
    text = Path(MODULES[method].__file__).read_text()
    imports = re.findall(r"^(?:from|import) (\S+)", text, re.MULTILINE)
    assert set(imports) <= {"math", "torch", "._cases", "._loops", ".lora", ".prefix_tuning"}


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


def test_only_update_rules_are_without_a_second_formula():
    assert set(METHODS) - set(RESTATED) == {"lora_plus", "galore", "mezo", "lora_fa"}


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


@pytest.mark.parametrize(
    "method", ["lora", "dora", "vera", "adalora", "oft", "loha", "hira", "lokr", "fourierft", "shira", "boft"]
)
def test_the_dense_delta_gives_the_same_output(method):
    for case in MODULES[method].cases():
        found = MODULES[method].reference(case)
        if "delta" not in found or case["options"].get("dropout"):
            continue
        W, bias = case["base"]["W"] + found["delta"], case["base"]["bias"]
        y = torch.nn.functional.linear(case["inputs"]["x"], W, bias)
        close(found["output"], y + found.get("bias_delta", 0.0))
