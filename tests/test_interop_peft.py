"""HF PEFT's folders, with HF PEFT itself as the witness: the same outputs and gradients after reading, the same
outputs after writing. Every tensor is random first, since an update of zero agrees with anything."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import veneer
import zoo

peft = pytest.importorskip("peft")
torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore")


def base_of(family: str) -> tuple[nn.Module, dict[str, Any]]:
    """A tiny base, the same one at each call: in float64, or as it is where the name ends in "32"."""
    name = family.removesuffix("32")
    model, kwargs = (NETS.get(name) or zoo.zoo()[name])()
    if name != family:
        return model, kwargs
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
        self.point = nn.Conv2d(8, 8, 1)
        self.middle = nn.Linear(96, 10)
        self.last = nn.Linear(10, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.point(self.patch(self.table(ids)[:, None]))
        return self.last(torch.tanh(self.middle(x.flatten(1))))


def net() -> tuple[nn.Module, dict[str, Any]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net().eval(), {"ids": torch.arange(10).view(2, 5)}


class Kernels(nn.Module):
    """Convolutions over lines and over blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Conv1d(3, 4, 3, padding=1)
        self.block = nn.Conv3d(1, 5, (2, 1, 3), stride=(1, 2, 1), bias=False)
        self.last = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(torch.tanh(self.line(x)).view(x.shape[0], 1, 4, 2, 4))
        return self.last(y.flatten(2).mean(-1))


def kernels() -> tuple[nn.Module, dict[str, Any]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Kernels().eval(), {"x": torch.randn(2, 3, 8)}


def biased_llama() -> tuple[nn.Module, dict[str, Any]]:
    import transformers as t

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = t.LlamaForCausalLM(t.LlamaConfig(**zoo._LLAMA, attention_bias=True)).eval()
        for n, p in model.named_parameters():
            if n.endswith("bias"):
                nn.init.normal_(p)
        return model, {"input_ids": torch.arange(3, 13).view(2, 5)}


def llama_classes() -> tuple[nn.Module, dict[str, Any]]:
    import transformers as t

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = t.LlamaForSequenceClassification(t.LlamaConfig(**zoo._LLAMA)).eval()
        return model, {
            "input_ids": torch.arange(3, 13).view(2, 5),
            "attention_mask": torch.ones(2, 5, dtype=torch.long),
        }


NETS: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {
    "net": net,
    "kernels": kernels,
    "biased_llama": biased_llama,
    "llama_classes": llama_classes,
}


def lora(**options: Any) -> Callable[[], Any]:
    return lambda: peft.LoraConfig(**{"r": 4, "lora_alpha": 7, **options})


CASES: dict[str, tuple[str, Callable[[], Any]]] = {
    "lora of a decoder": ("llama", lora(target_modules=["q_proj", "v_proj", "down_proj"])),
    "lora of an encoder": (
        "bert",
        lora(target_modules=["query", "value", "output.dense"], task_type="SEQ_CLS"),
    ),
    "rows of some tokens": ("llama", lora(target_modules=["q_proj"], trainable_token_indices=[3, 7, 60])),
    "rows of tokens that the head shares": (
        "gpt2",
        lora(target_modules=["c_attn"], trainable_token_indices={"wte": [5, 4]}, use_dora=True),
    ),
    "rows of tokens of an encoder-decoder": (
        "t5",
        lora(target_modules=["q"], trainable_token_indices=[4, 9]),
    ),
    "rows of tokens at both ends": (
        "llama",
        lora(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [3, 4], "lm_head": [8]}),
    ),
    "rows alone": ("llama", lambda: peft.TrainableTokensConfig(token_indices=[3, 7, 60])),
    "rows alone, that the head shares": ("gpt2", lambda: peft.TrainableTokensConfig(token_indices=[5, 4])),
    "rows alone, of an encoder-decoder": ("t5", lambda: peft.TrainableTokensConfig(token_indices=[4, 9])),
    "rows alone, with a task": (
        "bert",
        lambda: peft.TrainableTokensConfig(token_indices=[3, 7], task_type="SEQ_CLS"),
    ),
    "rows alone, at both ends": (
        "llama",
        lambda: peft.TrainableTokensConfig(token_indices=[8, 3], target_modules=["embed_tokens", "lm_head"]),
    ),
    "lora of Conv1D layers": ("gpt2", lora(target_modules=["c_attn", "mlp.c_proj"], fan_in_fan_out=True)),
    "lora of an encoder-decoder": ("t5", lora(target_modules=["q", "v", "wo"])),
    "rank and alpha by pattern, rank-stabilised": (
        "llama",
        lora(
            target_modules=["q_proj", "k_proj", "up_proj"],
            use_rslora=True,
            rank_pattern={"k_proj": 2, r"layers\.1\.mlp\..*": 3},
            alpha_pattern={"model.layers.0.self_attn.q_proj": 5},
        ),
    ),
    "an expression, some layers of a list, exclusion": (
        "llama",
        lora(target_modules=r".*\.(q|v)_proj", exclude_modules=["model.layers.0.self_attn.v_proj"]),
    ),
    "layers_to_transform": (
        "gpt2",
        lora(target_modules=["c_attn"], layers_to_transform=[1], layers_pattern="h"),
    ),
    "all-linear": ("llama", lora(target_modules="all-linear")),
    "bias lora_only": ("bert", lora(target_modules=["query", "intermediate.dense"], bias="lora_only")),
    "bias all and a head": (
        "bert",
        lora(target_modules=["query"], bias="all", modules_to_save=["classifier"]),
    ),
    "bias of B": ("gpt2", lora(target_modules=["c_fc"], lora_bias=True, bias="lora_only")),
    "a head of Conv1D layers and norms": (
        "gpt2",
        lora(target_modules=["c_fc"], modules_to_save=["ln_f", "h.1.attn.c_proj"]),
    ),
    "convolution, embedding, linear": ("net", lora(target_modules=["table", "patch", "middle"])),
    "bias all on a plain network": ("net", lora(target_modules=["patch", "middle"], bias="all")),
    "dora": ("llama", lora(target_modules=["q_proj", "down_proj"], use_dora=True, use_rslora=True)),
    "dora of Conv1D layers": ("gpt2", lora(target_modules=["c_attn", "c_fc"], use_dora=True)),
    "dora of a convolution": ("net", lora(target_modules=["patch", "middle"], use_dora=True)),
    "dora of an embedding": ("net", lora(target_modules=["table", "middle"], use_dora=True)),
    "dora of a token table": ("llama", lora(target_modules=["embed_tokens", "q_proj"], use_dora=True)),
    "bias of B and of the base at convolutions": (
        "net",
        lora(target_modules=["patch", "middle"], lora_bias=True, bias="lora_only"),
    ),
    "dora and the biases of its sites": (
        "biased_llama",
        lora(target_modules=["q_proj", "down_proj"], use_dora=True, bias="lora_only"),
    ),
    "dora and the biases of its Conv1D layers": (
        "gpt2",
        lora(target_modules=["c_attn", "c_fc"], use_dora=True, bias="lora_only"),
    ),
    "dora and the biases of its kernels": (
        "net",
        lora(target_modules=["table", "patch", "last"], use_dora=True, bias="lora_only"),
    ),
    "dora and all biases": ("bert", lora(target_modules=["query"], use_dora=True, bias="all")),
    "dora, pissa": ("llama32", lora(target_modules=["q_proj"], init_lora_weights="pissa", use_dora=True)),
    "dora, olora, rank-stabilised": (
        "llama32",
        lora(target_modules=["k_proj"], init_lora_weights="olora", use_dora=True, use_rslora=True),
    ),
    "dora, pissa, of Conv1D layers": (
        "gpt232",
        lora(target_modules=["c_fc"], init_lora_weights="pissa", use_dora=True),
    ),
    "dora, orthogonal": (
        "llama",
        lora(target_modules=["q_proj"], init_lora_weights="orthogonal", use_dora=True),
    ),
    "pissa of Conv1D layers": ("gpt232", lora(target_modules=["c_attn"], init_lora_weights="pissa")),
    "lora of lines and blocks": ("kernels", lora(target_modules=["line", "block"])),
    "dora of lines and blocks": ("kernels", lora(target_modules=["line", "block", "last"], use_dora=True)),
    "dora with a head": ("bert", lora(target_modules=["value"], use_dora=True, task_type="SEQ_CLS")),
    "experts": (
        "mixtral32",
        lora(target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"]),
    ),
    "experts of one parameter, and attention": (
        "mixtral32",
        lora(
            target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"], rank_pattern={"q_proj": 2}
        ),
    ),
    "the weight of a linear layer by its name": (
        "net",
        lora(target_modules=[], target_parameters=["middle.weight"]),
    ),
    "pissa": ("llama32", lora(target_modules=["q_proj", "down_proj"], init_lora_weights="pissa")),
    "olora, rank-stabilised": (
        "llama32",
        lora(target_modules=["v_proj"], init_lora_weights="olora", use_rslora=True),
    ),
    "vera": ("llama", lambda: peft.VeraConfig(r=6, target_modules=["q_proj", "v_proj", "down_proj"])),
    "vera of Conv1D layers, drawn again": (
        "gpt2",
        lambda: peft.VeraConfig(
            r=6, target_modules=["c_attn", "c_fc"], save_projection=False, projection_prng_key=3
        ),
    ),
    "oft": ("llama", lambda: peft.OFTConfig(oft_block_size=5, target_modules=["q_proj", "down_proj"])),
    "oft with dropped blocks": (
        "llama",
        lambda: peft.OFTConfig(oft_block_size=4, target_modules=["q_proj"], module_dropout=0.5),
    ),
    "oft, exact, shared, by number of blocks": (
        "bert",
        lambda: peft.OFTConfig(
            r=4,
            oft_block_size=0,
            target_modules=["query", "output.dense"],
            use_cayley_neumann=False,
            block_share=True,
        ),
    ),
    "oft of an embedding, and of a kernel of one place": (
        "net",
        lambda: peft.OFTConfig(
            oft_block_size=3, target_modules=["point", "table", "last"], num_cayley_neumann_terms=4
        ),
    ),
    "ia3": (
        "llama",
        lambda: peft.IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
        ),
    ),
    "ia3 of an encoder-decoder": (
        "t5",
        lambda: peft.IA3Config(
            target_modules=["k", "v", "wo"], feedforward_modules=["wo"], task_type="SEQ_2_SEQ_LM"
        ),
    ),
    "ia3 of Conv1D layers": (
        "gpt2",
        lambda: peft.IA3Config(target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"]),
    ),
    "ia3 with a head": (
        "bert",
        lambda: peft.IA3Config(
            target_modules=["key", "value", "output.dense"],
            feedforward_modules=["output.dense"],
            task_type="SEQ_CLS",
        ),
    ),
    "loha, rank and alpha by pattern": (
        "llama",
        lambda: peft.LoHaConfig(  # scales that float32 holds, as HF PEFT keeps them
            r=4,
            alpha=6,
            target_modules=["q_proj", "down_proj"],
            rank_pattern={"down_proj": 2},
            alpha_pattern={"layers.0.self_attn.q_proj": 4},
        ),
    ),
    "loha of kernels": ("net", lambda: peft.LoHaConfig(r=2, target_modules=["patch", "point", "last"])),
    "loha of kernels by cores": (
        "net",
        lambda: peft.LoHaConfig(r=2, target_modules=["patch", "point"], use_effective_conv2d=True),
    ),
    "loha of lines by cores": (
        "kernels",
        lambda: peft.LoHaConfig(r=2, target_modules=["line", "last"], use_effective_conv2d=True),
    ),
    "lokr": (
        "llama",
        lambda: peft.LoKrConfig(r=2, alpha=3, target_modules=["q_proj", "k_proj", "down_proj"]),
    ),
    "lokr, both factored, by factor and pattern": (
        "llama",
        lambda: peft.LoKrConfig(
            r=2,
            alpha=4,
            decompose_factor=8,
            decompose_both=True,
            target_modules=["q_proj", "up_proj"],
            rank_pattern={"up_proj": 1},
        ),
    ),
    "lokr of kernels": ("net", lambda: peft.LoKrConfig(r=1, target_modules=["patch", "point", "last"])),
    "lokr of kernels by cores": (
        "net",
        lambda: peft.LoKrConfig(
            r=1, decompose_factor=2, target_modules=["patch", "point"], use_effective_conv2d=True
        ),
    ),
    "lokr of lines by cores": (
        "kernels",
        lambda: peft.LoKrConfig(r=1, decompose_factor=1, target_modules=["line"], use_effective_conv2d=True),
    ),
    "hira": (
        "llama",
        lambda: peft.HiraConfig(r=3, target_modules=["q_proj", "down_proj"], rank_pattern={"down_proj": 2}),
    ),  # a pattern that HF PEFT itself ignores
    "hira of Conv1D layers": ("gpt2", lambda: peft.HiraConfig(r=3, target_modules=["c_attn", "mlp.c_proj"])),
    "hira of a table and of kernels": (
        "net",
        lambda: peft.HiraConfig(r=3, target_modules=["table", "patch", "middle"]),
    ),
    "hira of lines and blocks": ("kernels", lambda: peft.HiraConfig(r=2, target_modules=["line", "block"])),
    "fourierft": (
        "llama32",
        lambda: peft.FourierFTConfig(
            n_frequency=40,
            target_modules=["q_proj", "down_proj"],
            n_frequency_pattern={"down_proj": 11},
            random_loc_seed=5,
        ),
    ),
    "fourierft of Conv1D layers": (
        "gpt232",
        lambda: peft.FourierFTConfig(n_frequency=30, scaling=20.0, target_modules=["c_attn"]),
    ),
    "shira": ("llama", lambda: peft.ShiraConfig(r=2, target_modules=["q_proj", "down_proj"], random_seed=3)),
    "shira of a mask without a seed": ("llama", lambda: peft.ShiraConfig(r=1, target_modules=["v_proj"])),
    "boft": ("llama", lambda: peft.BOFTConfig(boft_block_size=4, target_modules=["q_proj", "down_proj"])),
    "boft by number of blocks": (
        "bert",
        lambda: peft.BOFTConfig(
            boft_block_size=0, boft_block_num=2, target_modules=["query", "output.dense"]
        ),
    ),
    "boft of kernels of one place": (
        "net",
        lambda: peft.BOFTConfig(boft_block_size=2, target_modules=["point", "middle"]),
    ),
    "norms of a decoder": (
        "llama",
        lambda: peft.LNTuningConfig(target_modules=["input_layernorm", "model.norm"], task_type="CAUSAL_LM"),
    ),
    "norms of an encoder with a head": (
        "bert",
        lambda: peft.LNTuningConfig(target_modules=["output.LayerNorm"], task_type="SEQ_CLS"),
    ),
    "adalora": (
        "llama",
        lambda: peft.AdaLoraConfig(
            target_modules=["q_proj", "down_proj"], init_r=5, target_r=3, total_step=9
        ),
    ),
    "adalora and rows of some tokens": (
        "llama",
        lambda: peft.AdaLoraConfig(
            target_modules=["q_proj"], init_r=5, target_r=3, total_step=9, trainable_token_indices=[3, 7]
        ),
    ),
    "adalora, rows of tokens that the head shares, and the biases of its sites": (
        "gpt2",
        lambda: peft.AdaLoraConfig(
            target_modules=["c_attn"],
            init_r=5,
            target_r=3,
            total_step=9,
            trainable_token_indices={"wte": [3, 7]},
            bias="lora_only",
        ),
    ),
    "adalora and all biases": (
        "bert",
        lambda: peft.AdaLoraConfig(
            target_modules=["value"], init_r=5, target_r=3, total_step=9, bias="all", task_type="SEQ_CLS"
        ),
    ),
    "adalora, cut": (
        "gpt2",
        lambda: peft.AdaLoraConfig(
            target_modules=["c_attn"],
            init_r=4,
            target_r=2,
            lora_alpha=3,
            total_step=9,
            modules_to_save=["ln_f"],
        ),
    ),
    "prompt of a decoder": (
        "llama",
        lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    ),
    "prompt of absolute positions": (
        "gpt2",
        lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    ),
    "prompt of an encoder-decoder": (
        "t5",
        lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="SEQ_2_SEQ_LM"),
    ),
    "prompt with a head": (
        "llama_classes",
        lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="SEQ_CLS"),
    ),
    "p-tuning of a decoder": (
        "llama",
        lambda: peft.PromptEncoderConfig(num_virtual_tokens=3, task_type="CAUSAL_LM", encoder_hidden_size=8),
    ),
    "p-tuning by an LSTM, of an encoder-decoder": (
        "t5",
        lambda: peft.PromptEncoderConfig(
            num_virtual_tokens=3,
            task_type="SEQ_2_SEQ_LM",
            encoder_hidden_size=8,
            encoder_reparameterization_type="LSTM",
        ),
    ),
    "prefix of a decoder": (
        "llama",
        lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    ),
    "prefix of absolute positions": (
        "gpt2",
        lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    ),
    "prefix of an encoder-decoder that counts positions by itself": (
        "bart",
        lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="SEQ_2_SEQ_LM"),
    ),
    "prefix of an encoder-decoder with sinusoids": (
        "marian",
        lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="SEQ_2_SEQ_LM"),
    ),
    "prefix of an encoder-decoder with a bias by distance": (
        "t5",
        lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="SEQ_2_SEQ_LM"),
    ),
    "prefix by a network": (
        "llama",
        lambda: peft.PrefixTuningConfig(
            num_virtual_tokens=3, task_type="CAUSAL_LM", prefix_projection=True, encoder_hidden_size=8
        ),
    ),
    "llama adapter": (
        "llama32",
        lambda: peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=1, task_type="CAUSAL_LM"),
    ),
    "gaussian": ("net", lora(target_modules=["middle"], init_lora_weights="gaussian")),
}


def witness(family: str, config: Any, folder: Path) -> tuple[nn.Module, Tensor]:
    """An HF PEFT model with random tensors, saved to `folder`; the model and its output."""
    model, kwargs = base_of(family)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        adapted = peft.get_peft_model(copy.deepcopy(model), config).eval()
        adapted = adapted.to(next(model.parameters()).dtype)  # prompts come in float32
        for n, p in adapted.named_parameters():
            if p.requires_grad and "ranknum" not in n:  # a constant that HF PEFT counts as trained
                p.data = torch.randn(p.shape, dtype=p.dtype) * 0.2
    if getattr(config, "init_r", 0) == 4:  # some triplets dropped, as training would
        config.rank_pattern = {
            f"transformer.h.{i}.attn.c_attn.lora_E": [True, False, True, i == 0] for i in (0, 1)
        }
        for n, p in adapted.named_parameters():
            if ".lora_E." in n:
                p.data[
                    ~torch.tensor(config.rank_pattern[n.split("model.", 2)[2].replace(".default", "")])
                ] = 0
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
        table = adapted.prompt_encoder.default.embedding.weight.grad
        heads = {n.replace(".modules_to_save.default", ""): p.grad for n, p in adapted.named_parameters()
                 if ".modules_to_save." in n}  # fmt: skip
        return {"prompt_embeddings": table, **heads}
    named = adapted.named_parameters(remove_duplicate=False)  # one table may have several names
    grads = {n: p.grad for n, p in named if p.grad is not None}
    every = {**adapted.state_dict(), **grads}
    return peft.get_peft_model_state_dict(adapted, state_dict=every)


def test_a_folder_of_hf_peft_reads_to_the_same_outputs_and_gradients_and_is_written_back(case, tmp_path):
    family, config = case
    adapted, expected = witness(family, config, tmp_path / "theirs")
    model, kwargs = base_of(family)
    adapter = veneer.load(model, tmp_path / "theirs", "mine")
    found = output(model, kwargs)
    close = 1e-5 if expected.dtype == torch.float32 else 1e-10
    torch.testing.assert_close(found, expected, rtol=0, atol=close)

    loss_of(expected).backward()
    loss_of(found).backward()
    made = getattr(config, "prefix_projection", False) or config.peft_type == "P_TUNING"
    if not made:  # the network that was trained is not in the file
        compare_gradients(model, adapter, adapted, close, tmp_path)

    report = veneer.export(model, "mine", tmp_path / "ours", format="peft", probe=kwargs)
    assert report.largest_difference == pytest.approx(0, abs=close)
    bare, _ = base_of(family)
    again = peft.PeftModel.from_pretrained(bare, tmp_path / "ours").eval()
    with torch.no_grad():
        tokens = expected.shape[1] if config.is_prompt_learning and expected.dim() == 3 else None
        close = 1e-6 if config.is_prompt_learning else close  # HF PEFT rounds what it loads to float32
        torch.testing.assert_close(output(again, kwargs, tokens), expected.detach(), rtol=0, atol=close)


@pytest.mark.parametrize("family", ["bart", "marian", "t5"])
def test_positions_of_a_prefix_move_for_its_rows_alone(family, tmp_path):
    """These decoders count by themselves: the table is read further for rows with the prefix, and not for bare ones."""
    config = peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="SEQ_2_SEQ_LM")
    _, expected = witness(family, config, tmp_path / "theirs")
    model, kwargs = base_of(family)
    bare = output(model, kwargs).detach()
    veneer.load(model, tmp_path / "theirs", "mine")
    with veneer.rows(model, ["mine", None]), torch.no_grad():
        found = output(model, kwargs)
    torch.testing.assert_close(found[0], expected[0].detach(), rtol=0, atol=1e-10)
    torch.testing.assert_close(found[1], bare[1], rtol=0, atol=1e-12)


def test_a_prefix_with_a_bias_by_distance_decodes_with_a_cache_and_far_from_its_keys(tmp_path):
    """Blocks with tables of their own (UMT5), a text longer than any distance that is told apart, one token a step."""
    import transformers as t

    def umt5() -> nn.Module:
        sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            settings = t.UMT5Config(**sizes, num_decoder_layers=2, relative_attention_max_distance=20)
            return t.UMT5ForConditionalGeneration(settings).eval().double()

    config = peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="SEQ_2_SEQ_LM")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        theirs = peft.get_peft_model(umt5(), config).eval().double()
        theirs.prompt_encoder.default.embedding.weight.data.normal_()
    theirs.save_pretrained(tmp_path / "theirs")
    ours, ids = umt5(), torch.arange(3, 13).view(2, 5)
    adapter = veneer.load(ours, tmp_path / "theirs", "mine")
    assert adapter.method.distances >= 20
    text = torch.randint(3, 60, (2, 40), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = theirs(input_ids=ids, decoder_input_ids=text).logits
        torch.testing.assert_close(
            ours(input_ids=ids, decoder_input_ids=text).logits, expected, rtol=0, atol=1e-9
        )
        written = [ours.generate(ids, max_new_tokens=30, do_sample=False, use_cache=c) for c in (True, False)]
        assert torch.equal(*written)
        bias = next(v for k, v in adapter.frozen(ours.veneer.shared).items() if k.endswith("bias"))
        bias.zero_()
        assert (ours(input_ids=ids, decoder_input_ids=text).logits - expected).abs().max() > 1e-4

    veneer.detach(ours, "mine")
    veneer.load(ours, tmp_path / "theirs", "mine")
    veneer.save(ours, "mine", tmp_path / "own")
    again = umt5()
    veneer.load(again, tmp_path / "own", "mine")
    with torch.no_grad():
        torch.testing.assert_close(
            again(input_ids=ids, decoder_input_ids=text).logits, expected, rtol=0, atol=1e-6
        )
    with pytest.raises(veneer.VeneerError, match=r"distances=20.*comes with a folder of HF PEFT"):
        veneer.attach(umt5(), "prefix_tuning", distances=20)


def compare_gradients(model: nn.Module, adapter: Any, adapted: nn.Module, close: float, folder: Path) -> None:
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
    biases |= {keys["D"]: host.bare(sp.site).detach()[list(sp.method.ids)]
               for sp, keys in zip(adapter.plan.sites, adapter.plan.keys) if hasattr(sp.method, "ids")}  # fmt: skip
    biases |= {keys["v"]: host.bare(sp.site).detach()
               for sp, keys in zip(adapter.plan.sites, adapter.plan.keys) if "v" in keys}  # fmt: skip
    assert set(found) == set(wanted)
    for key, value in wanted.items():
        # Parts of one parameter have copies of one A, blocks of one prefix: its gradient is the sum of theirs.
        end = key[-2:]
        copies = [
            k
            for k in wanted
            if end in ("/A", "/K", "/V") and k.endswith(end) and torch.equal(wanted[k], value)
        ]
        if key[:-2] + "T" + key[-1] in wanted and "/B" in key:
            continue  # HF PEFT's own backward of kernels by cores gives B1 the part of B2, and B2 that of B1
        got = sum((found[k] for k in copies), torch.zeros_like(value)) if copies else found[key]
        value = (
            value + biases[key] if key in biases else value
        )  # a file holds the bias or row, not its change
        torch.testing.assert_close(got, value, rtol=10 * close, atol=close, msg=lambda m, k=key: f"{k}: {m}")
    veneer.detach(model, "gradients")
