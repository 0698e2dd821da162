"""Code that inductor makes computes what eager code does, for one method of each port, whole batches and mixed rows."""

import pytest
import torch

from veneer import engine, testing

PORTS = {
    "weight": ("lora", "bert"),
    "weight, dense": ("oft", "bert"),
    "input and output": ("ia3", "bert"),
    "output": ("serial_adapter", "bert"),
    "attention": ("prefix_tuning", "llama"),
    "tokens": ("prompt_tuning", "bert"),
    "exit": ("ladder_side_tuning", "bert"),
    "mixture": ("unipelt", "bert"),
}
ROUNDING = {"bert": 1e-9, "llama": 1e-5}  # Llama's norms compute in float32 whatever the model's type


@pytest.mark.slow
@pytest.mark.parametrize(("key", "base"), PORTS.values(), ids=PORTS)
@torch.no_grad()
def test_inductor_gives_what_eager_gives(key, base):
    options = {"length": 4} if key in ("prefix_tuning", "prompt_tuning") else None
    subject = testing.Subject(key, testing.bases.get(base), options)
    model = subject.model()
    subject.attach(model, "a", 1)
    subject.attach(model, "b", 2)
    inputs = subject.inputs(subject.base.contents(4))
    torch._dynamo.reset()
    try:
        compiled = torch.compile(model, fullgraph=True)
        for names in (["a"] * 4, ["b"] * 4, ["a", None, "b", "a"], [None, "b", "b", "a"]):
            with engine.rows(model, names):
                found, expected = compiled(**inputs)["logits"], model(**inputs)["logits"]
            torch.testing.assert_close(found, expected, rtol=0, atol=ROUNDING[base])
            assert (expected - model(**inputs, adapters=None)["logits"]).abs().max() > 1e-4
    finally:
        torch._dynamo.reset()
