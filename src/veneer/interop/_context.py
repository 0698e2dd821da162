"""PROMPT_TUNING, P_TUNING, PREFIX_TUNING and ADAPTION_PROMPT of HF PEFT: prompt_tuning, p_tuning, prefix_tuning and
llama_adapter.

HF PEFT serves a prefix as a cache, so the text's positions start behind it, and an encoder-decoder's prefix is cut
from the table four rows a layer of which two are used. Both are followed; what differs is refused.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from veneer.edits import Tensors
from veneer.engine._plan import SitePlan
from veneer.errors import BadFile, NoSiteFound, ShapeDiffers, Unsupported

from . import _targets
from ._config import Field
from ._converter import OWN_FORM, Converter, Reading, Request, Writing, converter
from ._distances import biases_by_distance

_PROMPT = {
    "num_virtual_tokens": Field(None, "any"), "token_dim": Field(None), "num_transformer_submodules": Field(None),
    "num_attention_heads": Field(None), "num_layers": Field(None), "modules_to_save": Field(None, "list of names"),
}  # fmt: skip


def _count(job: Reading, name: str, low: int = 1) -> int:
    value = job.config[name]
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value < 2**31:
        raise BadFile(
            f"'{job.config.path}': {name}={value!r:.40}; a whole number from {low} was expected.",
            next_step=f"correct {name} in that file, or copy it again",
        )
    return value


def _submodules(job: Reading) -> int:
    """1 or 2: HF PEFT counts the halves of an encoder-decoder."""
    value = job.config["num_transformer_submodules"]
    if value is None:
        return 2 if job.config.raw.get("task_type") == "SEQ_2_SEQ_LM" else 1
    if value not in (1, 2) or isinstance(value, bool):
        raise BadFile(
            f"'{job.config.path}': num_transformer_submodules={value!r:.40}; 1 or 2 was expected.",
            next_step="correct it in that file, or copy it again",
        )
    return value


@converter
class PromptTuning(Converter):
    """PROMPT_TUNING. An encoder-decoder has a second half of rows, which HF PEFT stores and never reads."""

    peft_type, methods, prefix = "PROMPT_TUNING", ("prompt_tuning",), "base_model."
    read_as: Mapping[str, Any] = {}
    fields = {
        **_PROMPT, "prompt_tuning_init": Field("RANDOM"), "prompt_tuning_init_text": Field(None),
        "tokenizer_name_or_path": Field(None), "tokenizer_kwargs": Field(None),
    }  # fmt: skip

    def request(self, job: Reading) -> Request:
        _check_first_position(job.anatomy, self.peft_type)
        return Request(self.methods[0], {"length": _count(job, "num_virtual_tokens"), **self.read_as})

    def take(self, job: Reading, sp: SitePlan, prefix: str) -> dict[str, Tensor]:
        length, width = sp.specs["prompt"].shape
        table = job.file.take("prompt_embeddings", (length * _submodules(job), width))
        return {"prompt": table[:length].clone()}

    def write(self, job: Writing) -> dict[str, Any]:
        m = job.adapter.method
        _check_first_position(job.host.anatomy, self.peft_type)
        sites = [(sp, t) for sp, t in zip(job.plan.sites, job.values()) if sp.part == 0]
        place = getattr(m, "place", "first")
        if len(sites) != 1 or place != "first":
            what = f"place={place!r}" if place != "first" else f"{len(sites)} places"
            raise Unsupported(
                f"{self.peft_type}: a prompt with {what} has no form in HF PEFT.", next_step=OWN_FORM
            )
        if m.dropout:
            raise Unsupported(
                f"{self.peft_type}: dropout={m.dropout} has no form in HF PEFT.",
                next_step="train with dropout=0, or veneer.save(model, name, folder)",
            )
        prompt = self.prompt(job, sites[0][1])
        job.tensors["prompt_embeddings"] = prompt
        return {
            "num_virtual_tokens": m.length, "token_dim": prompt.shape[1], "num_transformer_submodules": 1,
            **_size_of_base(job),
        }  # fmt: skip

    def prompt(self, job: Writing, t: dict[str, Tensor]) -> Tensor:
        """(length, width): the rows that the file holds."""
        return t["prompt"]


@converter
class PTuning(PromptTuning):
    """P_TUNING. A file holds the rows themselves, whatever network made them."""

    peft_type, methods, read_as = "P_TUNING", ("p_tuning",), {"encoder": "none"}
    fields = {
        **_PROMPT, "encoder_reparameterization_type": Field("MLP"), "encoder_hidden_size": Field(None),
        "encoder_num_layers": Field(2), "encoder_dropout": Field(0.0),
    }  # fmt: skip

    def prompt(self, job: Writing, t: dict[str, Tensor]) -> Tensor:
        if "E" not in t:
            return t["prompt"]
        job.note("the network behind the rows is left out: HF PEFT's files hold the rows that it makes")
        return job.adapter.method.derive(Tensors(t))["prompt"]


def _check_first_position(anatomy: Any, kind: str) -> None:
    if anatomy.facts.class_token:
        raise Unsupported(
            f"{kind}: this {anatomy.model_class} answers from its first position, and HF PEFT puts the prompt there; "
            "veneer puts it behind.",
            next_step="a method of another port, such as lora",
        )


def _size_of_base(job: Writing) -> dict[str, Any]:
    """HF PEFT reads these off the base's config, under names that not every config has."""
    attention = [s for s in job.host.anatomy.sites if s.role == "attention"]
    if not attention:
        return {}
    return {"num_layers": max(s.blocks for s in attention), "num_attention_heads": attention[0].heads}


@converter
class PrefixTuning(Converter):
    """PREFIX_TUNING. A file holds the prefix itself, whatever network made it."""

    peft_type, methods, prefix = "PREFIX_TUNING", ("prefix_tuning",), "base_model."
    fields = {
        **_PROMPT, "encoder_hidden_size": Field(None), "prefix_projection": Field(False, "flag"),
        "init_weights": Field(None),
    }  # fmt: skip

    def request(self, job: Reading) -> Request:
        table = _check_prefix(job.host)
        length = _count(job, "num_virtual_tokens")
        stack = "decoder." if job.anatomy.facts.encoder_decoder else ""
        biases = _biases(job.host, stack)
        if stack:
            warnings.warn(
                f"'{job.config.path}': blocks of an encoder-decoder share prefixes in HF PEFT; each has a copy here: "
                "the outputs are the same, further training moves the copies apart.",
                stacklevel=6,
            )
        options = {
            "length": length, "position_offset": length, "sites": f"{stack}block.attention",
            "position_table": table and _targets.exact(job.anatomy, table),
            "distances": next((b.shape[1] for b in biases.values()), 0),
        }  # fmt: skip
        job.pairs.update({("bias", module): (b, b) for module, b in biases.items()})
        return Request("prefix_tuning", options)

    def take(self, job: Reading, sp: SitePlan, prefix: str) -> dict[str, Tensor]:
        heads, length, d = sp.specs["K"].shape
        layers = sp.site.blocks
        if "prefix" not in job.pairs:
            table = job.file.take("prompt_embeddings", (length, layers * 2 * heads * d))
            job.pairs["prefix"] = (table, table)
        table = job.pairs["prefix"][0]
        if table.shape[1] != layers * 2 * heads * d:
            raise ShapeDiffers(
                f"'{job.config.path.parent}': the blocks of this base have prefixes of several sizes.",
                next_step="a base whose blocks all have the same heads, or a method of another port, such as lora",
            )
        rows = table.view(length, layers * 2, heads, d).permute(1, 2, 0, 3)  # (2 layers, heads, length, d)
        key, value = _rows_of(sp.site.block or 0, layers, _submodules(job))
        found = {"K": rows[key].clone(), "V": rows[value].clone()}
        return found | ({"bias": job.pairs["bias", sp.site.module][0]} if "bias" in sp.specs else {})

    def write(self, job: Writing) -> dict[str, Any]:
        m, facts = job.adapter.method, job.host.anatomy.facts
        positions = _check_prefix(job.host)
        if facts.positions == "relative" and not m.distances:
            raise Unsupported(
                "PREFIX_TUNING: HF PEFT gives the prefix's keys the bias of their distance, and this prefix was "
                "trained without one.",
                next_step=OWN_FORM,
            )
        if positions and not m.position_table:
            raise Unsupported(
                "PREFIX_TUNING: HF PEFT starts the text's positions behind the prefix, and this base counts them by "
                "itself.",
                next_step=f"train with position_offset={m.length}, position_table={positions!r}",
            )
        if m.position_offset != m.length and facts.positions != "none":
            raise Unsupported(
                f"PREFIX_TUNING: position_offset={m.position_offset}, but HF PEFT starts the text's positions at "
                f"length={m.length}, and this base's positions are {facts.positions}.",
                next_step=f"train with position_offset={m.length}",
            )
        made: dict[int, tuple[Tensor, Tensor]] = {}
        for sp, t in zip(job.plan.sites, job.values()):
            if sp.part != 0:
                continue
            if sp.site.role != "attention" or sp.site.stack not in ("", "decoder"):
                raise Unsupported(
                    f"PREFIX_TUNING at '{sp.site.name}': HF PEFT gives prefixes to self-attention, "
                    "of the decoder where there are two stacks.",
                    next_step="train with sites='attention', or veneer.save(model, name, folder)",
                )
            found = m.derive(Tensors(t)) if m.projection else t
            made[sp.site.block or 0] = (found["K"], found["V"])
        layers = max(sp.site.blocks for sp in job.plan.sites if sp.part == 0)
        if sorted(made) != list(range(layers)):
            raise Unsupported(
                f"PREFIX_TUNING: HF PEFT gives a prefix to every block; here {len(made)} of {layers} have one.",
                next_step="train with sites='attention', or veneer.save(model, name, folder)",
            )
        if m.projection:
            job.note(
                "the network behind the prefix is left out: HF PEFT's files hold the prefix that it makes"
            )
        halves = 2 if facts.encoder_decoder else 1
        heads, length, d = made[0][0].shape
        rows: list[Tensor | None] = [None] * (2 * layers)
        for block, pair in made.items():
            for place, part in zip(_rows_of(block, layers, halves), pair):
                if rows[place] is not None and not torch.equal(rows[place], part):  # type: ignore[arg-type]
                    raise Unsupported(
                        f"PREFIX_TUNING of an encoder-decoder: in HF PEFT blocks share prefixes ({block} and "
                        f"{(block + layers // 2) % layers} of {layers}), and these differ.",
                        next_step=OWN_FORM,
                    )
                rows[place] = part
        table = torch.stack([torch.zeros_like(made[0][0]) if r is None else r for r in rows])
        job.tensors["prompt_embeddings"] = table.permute(2, 0, 1, 3).reshape(length, -1)
        return {
            "num_virtual_tokens": length, "token_dim": heads * d, "num_attention_heads": heads, "num_layers": layers,
            "num_transformer_submodules": halves, "encoder_hidden_size": heads * d,
        }  # fmt: skip


def _rows_of(block: int, layers: int, halves: int) -> tuple[int, int]:
    """Rows of the table with a block's keys and values: four a block in an encoder-decoder, counted around."""
    first = 2 * halves * block
    return first % (2 * layers), (first + 1) % (2 * layers)


def _check_prefix(host: Any) -> str:
    """The table of learned positions that has to be moved; "" where the base is told its positions, or has none."""
    facts, name = host.anatomy.facts, host.anatomy.model_class
    owner, stack = _owner(host), _stack(host)
    if not facts.causal or owner is None:
        raise Unsupported(
            f"PREFIX_TUNING: HF PEFT serves a prefix as a cache, which this {name} has not.",
            next_step=_INSTEAD,
        )
    if facts.positions == "relative":
        return ""
    takes = inspect.signature(host.module(owner).forward).parameters
    if facts.positions == "none" or "position_ids" in takes:
        return ""
    tokens = {module for _, module in facts.token_embeddings}
    tables = [
        s.module for s in host.anatomy.whole_sites()
        if s.kind == "embedding" and s.module.startswith(owner + ".") and s.module not in tokens
    ]  # fmt: skip
    if len(tables) != 1:
        raise Unsupported(
            f"PREFIX_TUNING: HF PEFT starts the text's positions behind the prefix, and the {stack or 'model'} of this "
            f"{name} counts them by itself: it takes no position_ids, and has no single table of positions.",
            next_step=_INSTEAD,
        )
    return tables[0]


def _stack(host: Any) -> str:
    facts = host.anatomy.facts
    return "decoder" if facts.encoder_decoder else next(iter(dict(facts.blocks)), "")


def _owner(host: Any) -> str | None:
    """The innermost module that runs the stack's blocks by itself."""
    facts = host.anatomy.facts
    blocks = dict(facts.blocks).get(_stack(host), ())
    owners = [b for b in facts.backbones if blocks and (not b or blocks[0].startswith(b + "."))]
    return max(owners, key=len, default=None)


def _biases(host: Any, stack: str) -> dict[str, Tensor]:
    """Attention -> what the base adds to its scores by distance; {} where it adds nothing."""
    if host.anatomy.facts.positions != "relative":
        return {}
    found = biases_by_distance(host, f"{stack}block.attention", _owner(host) or "")
    if not found:
        raise Unsupported(
            f"PREFIX_TUNING: HF PEFT's prefix has positions of its own, and this {host.anatomy.model_class} adds to "
            "its scores there what is no bias by distance alone.",
            next_step=_INSTEAD,
        )
    return found


_INSTEAD = "a method of another port, such as lora"


@converter
class AdaptionPrompt(Converter):
    """ADAPTION_PROMPT: LLaMA-Adapter with one plain gate a block, added behind the output projection."""

    peft_type, methods, stem = "ADAPTION_PROMPT", ("llama_adapter",), "adaption_"
    fields = {
        "target_modules": Field(None, "text or nothing"), "adapter_len": Field(None), "adapter_layers": Field(None),
    }  # fmt: skip

    def request(self, job: Reading) -> Request:
        length, count = _count(job, "adapter_len"), _count(job, "adapter_layers")
        name = job.config["target_modules"] or "self_attn"
        sites = [s for s in job.anatomy.sites if s.role == "attention"]
        if not sites or any(s.module.rpartition(".")[2] != name for s in sites):
            raise NoSiteFound(
                f"'{job.config.path}': target_modules={name!r} is not what attention is called here.",
                nearest=sorted({s.module.rpartition(".")[2] for s in sites}),
                next_step="load it on the base that it was trained on",
            )
        if count > len(sites):
            raise NoSiteFound(
                f"'{job.config.path}': adapter_layers={count}, but this base has {len(sites)} blocks.",
                next_step="load it on the base that it was trained on",
            )
        self.check_base(job.anatomy, job.host)
        options = {"length": length, "gate": "layer", "sites": f"block[-{count}:].attention"}
        return Request("llama_adapter", options, {(s.module, "") for s in sites[-count:]})

    def check_base(self, anatomy: Any, host: Any) -> None:
        kind = getattr(getattr(host.root, "config", None), "model_type", "")
        if kind not in ("llama", "mistral"):
            raise Unsupported(
                f"ADAPTION_PROMPT on a base of type {kind or type(host.root).__name__!r}: HF PEFT has it "
                "for llama and mistral, and for gpt2 as another method.",
                next_step="a llama or mistral base, or veneer.save(model, name, folder)",
            )
        for s in anatomy.sites:
            if s.role == "attention.output" and s.bias:
                raise Unsupported(
                    f"ADAPTION_PROMPT: the output projection '{s.module}' has a bias, which HF PEFT adds "
                    "a second time.",
                    next_step="a base without biases there, or veneer.save(model, name, folder)",
                )

    def take(self, job: Reading, sp: SitePlan, prefix: str) -> dict[str, Tensor]:
        length, width = sp.specs["prompt"].shape
        return {
            "prompt": job.file.take(f"{prefix}adaption_prompt", (1, length, width))[0].clone(),
            "gate": job.file.take(f"{prefix}adaption_gate", (1,)).reshape(()),
        }

    def write(self, job: Writing) -> dict[str, Any]:
        m = job.adapter.method
        if m.gate != "layer":
            raise Unsupported(
                f"ADAPTION_PROMPT: gate={m.gate!r} has no form in HF PEFT, whose gate is one plain number a block.",
                next_step='train with gate="layer"',
            )
        self.check_base(job.host.anatomy, job.host)
        if job.plan.whole:
            raise Unsupported("ADAPTION_PROMPT has no modules_to_save in HF PEFT.", next_step=OWN_FORM)
        blocks = {}
        for sp, t in zip(job.plan.sites, job.values()):
            blocks[sp.site.block or 0] = sp.site.module
            prefix = f"{job.prefix}{sp.site.module}."
            job.tensors[f"{prefix}adaption_prompt"] = t["prompt"][None]
            job.tensors[f"{prefix}adaption_gate"] = t["gate"].reshape(1)
        last = job.plan.sites[0].site.blocks
        if sorted(blocks) != list(range(last - len(blocks), last)):
            raise Unsupported(
                f"ADAPTION_PROMPT: HF PEFT takes the last blocks; here {sorted(blocks)} of {last} are edited.",
                next_step=f"train with sites='block[-{len(blocks)}:].attention', or veneer.save(model, name, folder)",
            )
        return {
            "target_modules": next(iter(blocks.values())).rpartition(".")[2], "adapter_len": m.length,
            "adapter_layers": len(blocks),
        }  # fmt: skip
