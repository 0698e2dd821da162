"""Every method keeps every law that it does not decline: `make test K=lora` runs those of one method.

The fast run takes one base for each law; the slow one takes all bases, and compiles.
"""

import pytest
import torch

import references
from engine_tools import SMALL
from veneer import testing
from veneer.edits import registry
from veneer.testing import Trial, place_as_layer

torch.set_num_threads(1)
METHODS = sorted(registry())

# Bases in the order in which they are tried for a law: the first on which the method has a site and of which
# the law speaks. Rows and caches go by a causal base, the others by an encoder.
ORDER = {"rows": "llama", "cache": "llama", "detach": "llama", "merge": "llama", "cohort": "llama"}
OTHERS = ("bert", "llama", "t5", "vit", "mlp", "conv")
WHERE = {("ssf", "merge"): "bert"}  # a Llama has no bias to hold a shift

# Options for the laws, where a method's own would hide something on bases as small as these.
OPTIONS = {
    "fish_mask": {"keep_ratio": 0.05},  # at 0.005 most sites have no entry
    "compacter": {"reduction": 4},
    "hyperformer": {"tasks": 2},
    "mam": {"length": 4, "hidden": 8},
    "p_tuning": {"length": 4},
    "vera": {"rank": 16},
    "hira": {"rank": 4},
    "lokr": {"rank": 3, "alpha": 6.0},
    **SMALL,
    "boft": {"factors": 2},
    "prompt_tuning": {"length": 4},
    "prefix_tuning": {"length": 4},
    "visual_prompt_tuning": {"deep": True},
}


# ---- how cases of the references become layers


def fields(key):
    return set(registry()[key].__dataclass_fields__)


def _lora(case):
    trial = place_as_layer(case, {"rank", "alpha", "rank_stabilized"})
    if trial is not None:
        options = case["options"]
        trial.options = {
            **trial.options, "lora_bias": bool(options.get("bias")), "init": options.get("start", "default"),
        }  # fmt: skip
    return trial


def _adalora(case):
    if case["options"].get("kind") != "layer":
        return None
    trial = place_as_layer(case, fields("adalora"))
    trial.options = {**trial.options, "target_rank": 1}
    trial.training = True  # the penalty is there in training alone
    return trial


def _oft(case):
    trial = place_as_layer(case, fields("oft"))
    if trial is not None:
        trial.options = {k: v for k, v in trial.options.items() if v is not None}
        trial.options["coft"] = trial.training = (
            "eps" in trial.options
        )  # what is kept small is so in training
    return trial


def _diff_pruning(case):
    options = case["options"]
    if options["training"] or "keep" in options:
        return None  # its noise is drawn by the engine; what `finish` keeps is another adapter
    kept = {"low": options["low"], "high": options["high"], "penalty_weight": options["weight"]}
    return Trial(case["tensors"], case["base"]["W"], case["base"]["bias"], case["inputs"]["x"], kept)


def _full(case):
    base = case["base"]
    options = {"sites": "parameter"}
    return Trial(
        case["tensors"], base["W"], base["bias"], case["inputs"]["x"], options, names={"layer.bias/W": "bias"}
    )


def _bitfit(case):
    if case["options"]["kind"] != "linear":
        return None
    base = case["base"]
    return Trial(case["tensors"], base["W"], base["bias"], case["inputs"]["x"], {"sites": "bias"})


def _invertible(case):
    options = case["options"]
    if options["inverse"]:
        return None  # it stands before a head with more outputs than inputs, which one layer is not
    x = case["inputs"]["x"]
    made = {"coupling": options["form"], "activation": options["activation"]}
    width = options.get("width", x.shape[-1])
    made["reduction"] = width // 2 / case["tensors"]["F_down"].shape[0]
    return Trial(case["tensors"], torch.eye(width, dtype=x.dtype), None, x, made, "output")


PLACES = {
    "lora": _lora, "adalora": _adalora, "oft": _oft, "diff_pruning": _diff_pruning, "full": _full,
    "bitfit": _bitfit, "invertible_adapter": _invertible,
}  # fmt: skip


# ---- the laws


# The convolution has 27 inputs, which a butterfly of two factors cannot cut.
ON_BASE = {("boft", "conv"): {"factors": 1}}


def check(key, law, bases, options=None):
    options = OPTIONS.get(key) if options is None else options
    return testing.check_method(
        key, laws=law, bases=bases, options=options, references=references, place=PLACES.get(key)
    )


def base_for(key, law):
    """The first base on which the method has a site and of which the law speaks."""
    for name in dict.fromkeys((WHERE.get((key, law), ORDER.get(law, "bert")), *OTHERS)):
        base = testing.bases.get(name)
        if testing.LAWS[law].speaks_of(base) and not testing.Subject(key, base, OPTIONS.get(key)).reason:
            return name
    return "bert"


FAST = [law for law in testing.LAWS if law != "compile"]


@pytest.mark.parametrize(("key", "law"), [pytest.param(k, n, id=f"{k}-{n}") for k in METHODS for n in FAST])
def test_law(key, law):
    report = check(key, law, [base_for(key, law)])
    assert report.rows
    report.check()


@pytest.mark.slow
@pytest.mark.parametrize("key", METHODS)
def test_law_of_compiling(key):
    check(key, "compile", [base_for(key, "compile"), "llama"]).check()


@pytest.mark.slow
@pytest.mark.parametrize(("key", "law"), [pytest.param(k, n, id=f"{k}-{n}") for k in METHODS for n in FAST])
def test_law_on_every_base(key, law):
    apart = [base for base in testing.bases.names() if (key, base) in ON_BASE]
    check(key, law, [base for base in testing.bases.names() if base not in apart]).check()
    for base in apart:
        check(key, law, [base], ON_BASE[key, base]).check()


def test_the_equation_of_every_layer_is_held_against_its_reference():
    """Methods of other ports meet their references as functions, beside the methods."""
    held = [key for key in METHODS if check(key, "equation", ["mlp"]).of("equation") == "passed"]
    layers = {
        "lora",
        "dora",
        "vera",
        "adalora",
        "oft",
        "diff_pruning",
        "full",
        "bitfit",
        "ia3",
        "serial_adapter",
        "loha",
        "lokr",
        "hira",
        "fourierft",
        "shira",
        "boft",
    }
    assert layers | {"invertible_adapter"} <= set(held)
