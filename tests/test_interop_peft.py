"""HF PEFT's folders, with HF PEFT itself as the witness: the same outputs and gradients after reading, the same
outputs after writing. Every tensor is random first, since an update of zero agrees with anything."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import zoo
from torch import Tensor, nn

import veneer

peft = pytest.importorskip("peft")
torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore")


def base_of(family: str) -> tuple[nn.Module, dict[str, Any]]:
    """A tiny base in float64, the same one at each call."""
    model, kwargs = (NETS.get(family) or zoo.zoo()[family])()
    return model.double(), {k: v.double() if v.is_floating_point() else v for k, v in kwargs.items()}


def output(model: nn.Module, kwargs: dict[str, Any], tokens: int | None = None) -> Tensor:
    y = model(**kwargs)
    y = y if isinstance(y, Tensor) else y["logits"] if "logits" in y else y[0]
    return y if tokens is None else y[:, -tokens:]


class Net(nn.Module):
    """An embedding, a convolution, a linear layer with its bias: the kinds of layer that a transformer lacks."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 6)
        self.patch = nn.Conv2d(1, 8, (3, 2), stride=2, padding=1)
        self.middle = nn.Linear(8 * 3 * 4, 10)
        self.last = nn.Linear(10, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.patch(self.table(ids)[:, None])
        return self.last(torch.tanh(self.middle(x.flatten(1))))


def net() -> tuple[nn.Module, dict[str, Any]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net().eval(), {"ids": torch.arange(10).view(2, 5)}


def biased_llama() -> tuple[nn.Module, dict[str, Any]]:
    import transformers as t

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = t.LlamaForCausalLM(t.LlamaConfig(**zoo._LLAMA, attention_bias=True)).eval()
        for n, p in model.named_parameters():
            if n.endswith("bias"):
                nn.init.normal_(p)
        return model, {"input_ids": torch.arange(3, 13).view(2, 5)}


NETS: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {"net": net, "biased_llama": biased_llama}


def lora(**options: Any) -> Callable[[], Any]:
    return lambda: peft.LoraConfig(**{"r": 4, "lora_alpha": 7, **options})


CASES: dict[str, tuple[str, Callable[[], Any]]] = {
    "lora of a decoder": ("llama", lora(target_modules=["q_proj", "v_proj", "down_proj"])),
    "lora of an encoder": (
        "bert",
        lora(target_modules=["query", "value", "output.dense"], task_type="SEQ_CLS"),
    ),
    "lora of Conv1D layers": ("gpt2", lora(target_modules=["c_attn", "mlp.c_proj"], fan_in_fan_out=True)),
    "lora of an encoder-decoder": ("t5", lora(target_modules=["q", "v", "wo"])),
}


def witness(family: str, config: Any, folder: Path) -> tuple[nn.Module, Tensor]:
    """An HF PEFT model with random tensors, saved to `folder`; the model and its output."""
    model, kwargs = base_of(family)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        adapted = peft.get_peft_model(copy.deepcopy(model), config).eval()
        for p in adapted.parameters():
            if p.requires_grad:
                p.data = torch.randn(p.shape, dtype=p.dtype) * 0.2
    adapted.save_pretrained(folder)
    tokens = (
        kwargs["input_ids"].shape[1]
        if config.is_prompt_learning and "decoder_input_ids" not in kwargs
        else None
    )
    y = output(adapted, kwargs, tokens)
    with torch.no_grad():
        assert (y - output(model, kwargs)).abs().max() > 1e-4, (
            "the adapter has no effect: nothing would be tested"
        )
    return adapted, y


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> tuple[str, Any]:
    family, config = CASES[request.param]
    return family, config()


def loss_of(y: Tensor) -> Tensor:
    return (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum()


def gradients_as_file(adapted: nn.Module) -> dict[str, Tensor]:
    """HF PEFT's gradients by the names that its files use."""
    if adapted.active_peft_config.is_prompt_learning:
        return {"prompt_embeddings": next(p.grad for p in adapted.parameters() if p.grad is not None)}
    grads = {n: p.grad for n, p in adapted.named_parameters() if p.grad is not None}
    every = {**adapted.state_dict(), **grads}
    return peft.get_peft_model_state_dict(adapted, state_dict=every)


def test_a_folder_of_hf_peft_reads_to_the_same_outputs_and_gradients_and_is_written_back(case, tmp_path):
    family, config = case
    adapted, expected = witness(family, config, tmp_path / "theirs")
    model, kwargs = base_of(family)
    adapter = veneer.load(model, tmp_path / "theirs", "mine")
    found = output(model, kwargs)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)

    loss_of(expected).backward()
    loss_of(found).backward()
    compare_gradients(model, adapter, adapted, config, tmp_path)

    report = veneer.export(model, "mine", tmp_path / "ours", format="peft", probe=kwargs)
    assert report.largest_difference == pytest.approx(0, abs=1e-10)
    bare, _ = base_of(family)
    again = peft.PeftModel.from_pretrained(bare, tmp_path / "ours").eval()
    with torch.no_grad():
        tokens = expected.shape[1] if config.is_prompt_learning else None
        torch.testing.assert_close(output(again, kwargs, tokens), expected.detach(), rtol=0, atol=1e-10)


def compare_gradients(model: nn.Module, adapter: Any, adapted: nn.Module, config: Any, folder: Path) -> None:
    """Gradients are read like tensors: whatever a tensor's name and layout become, its gradient's become too."""
    (folder / "grads").mkdir()
    text = (folder / "theirs" / "adapter_config.json").read_text()
    (folder / "grads" / "adapter_config.json").write_text(text)
    tensors = {k: v.clone().contiguous() for k, v in gradients_as_file(adapted).items()}
    safetensors.torch.save_file(tensors, folder / "grads" / "adapter_model.safetensors")
    wanted = veneer.load(model, folder / "grads", "gradients", activate=False).named()
    found = adapter.gradients()
    host = model.veneer
    biases = {k: host.bias(sp.site) for sp, keys in zip(adapter.plan.sites, adapter.plan.keys)
              for n, k in keys.items() if n == "base_bias"}  # fmt: skip
    assert set(found) == set(wanted)
    for key, value in wanted.items():
        value = value + biases[key] if key in biases else value  # a file holds the bias, not its change
        torch.testing.assert_close(found[key], value, rtol=1e-8, atol=1e-10, msg=lambda m, k=key: f"{k}: {m}")
    veneer.detach(model, "gradients")
