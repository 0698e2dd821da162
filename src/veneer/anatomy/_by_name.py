"""Roles from names: the reader of last resort, where no forward could be traced.

One table for the leaves, one test for "inside of an attention"; what the tables do not know keeps no role.
Decisions made here are guesses, and `Anatomy.notes` says that they were.
"""

from __future__ import annotations

import contextlib
from typing import Any

from torch import nn

from veneer.anatomy._findings import Core, Findings, Part, Stack, SubLayer
from veneer.anatomy._names import ATTENTION, FUSED, FUSED_MLP, HEADS, MLP
from veneer.anatomy._structure import Weight, containers, inside, is_homogeneous, join, parent

_MATRIX = ("linear", "conv1d", "conv", "recurrent", "parameter", "experts")


def read_names(model: nn.Module, weights: dict[tuple[str, str], Weight]) -> Findings:
    """Findings from module names, classes and shapes alone."""
    found = Findings(norms=[w.module for w in weights.values() if w.kind == "norm"])
    found.stacks = [Stack(blocks) for blocks in _stacks(model, weights)]
    for stack in found.stacks:
        for block in stack.blocks:
            _read_block(model, weights, block, found)
    _name_stacks(model, found)
    for stack in found.stacks:
        _ends(model, weights, stack)
    config = getattr(model, "config", None)
    found.encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))
    found.causal = bool(found.stacks) and _is_causal(model, found.stacks[-1].name)
    for core in found.cores:
        name = next((s.name for s in found.stacks if core.block in s.blocks), None)
        core.causal = not core.cross and name is not None and _is_causal(model, name)
    for stack in found.stacks:
        stack.causal = any(core.causal for core in found.cores if core.block in stack.blocks)
    _around_stacks(model, weights, found)
    return found


def _is_causal(model: nn.Module, stack: str) -> bool:
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False) or stack in ("encoder", "decoder"):
        return stack == "decoder"
    names = (
        " ".join(c.__name__ for c in type(model).__mro__)
        + " "
        + " ".join(getattr(config, "architectures", None) or [])
    )
    return bool(getattr(config, "is_decoder", False)) or "CausalLM" in names or "LMHead" in names


def _stacks(model: nn.Module, weights: dict[tuple[str, str], Weight]) -> list[list[str]]:
    """Blocks by tower. Stages (lists of lists, as in Swin) are opened and make one tower."""
    matrices = [w.module for w in weights.values() if w.kind in _MATRIX]
    every = containers(model)

    def count(name: str, without: str | None = None) -> int:
        return sum(1 for m in matrices if inside(m, name) and (without is None or not inside(m, without)))

    def inner(child: str) -> str | None:
        """The list that makes `child` a stage: of equal blocks, with next to no weight beside it."""
        for name, children in every.items():
            if name != child and inside(name, child) and is_homogeneous(model, children):
                return name if count(child, without=name) <= 1 and min(map(count, children)) >= 2 else None
        return None

    def open_stages(children: list[str]) -> list[str]:
        stages = [inner(child) for child in children]
        if all(stages):
            return [block for stage in stages for block in open_stages(every[stage])]  # type: ignore[index]
        return children

    stacks: list[list[str]] = []
    for _name, children in every.items():
        taken = any(inside(children[0], block) for stack in stacks for block in stack)
        if not taken and min(map(count, children)) >= 2:
            opened = open_stages(children)
            if not any(inside(parent(opened[0]), parent(stack[0])) for stack in stacks) and _is_stack(
                model, opened
            ):
                stacks.append(opened)
    return stacks


def _is_stack(model: nn.Module, children: list[str]) -> bool:
    return is_homogeneous(model, children) or len(children) > 2


def _read_block(model: nn.Module, weights: dict, block: str, found: Findings) -> None:
    """Roles of one block's weights, and its sub-layers."""
    names: dict[str, str] = {}  # role -> module, for the sub-layers
    for key, weight in weights.items():
        if not inside(weight.module, block) or weight.kind == "norm":
            continue
        path = join(*key)[len(block) + 1 :] if block else join(*key)
        parts = [p for p in path.split(".") if p != "weight" and not p.isdigit()]
        if not parts:
            continue
        leaf, above = parts[-1], ".".join(parts[:-1]).lower()
        if weight.kind == "conv":
            found.parts.append(Part(key, "convolution", block=block))
        elif weight.kind == "recurrent":
            found.parts.append(Part(key, "recurrent", block=block))
        elif "attn" in above or "attention" in above:
            _attention_part(model, weight, leaf, above, block, found)
        elif weight.kind in ("linear", "conv1d", "experts", "parameter"):
            _mlp_part(weight, leaf, above, block, found)
    mine = [p for p in found.parts if p.block == block]
    for role in ("attention", "cross_attention", "mlp"):
        whole = [
            p
            for p in mine
            if p.role.startswith(role + ".") or (role == "mlp" and p.role.startswith("expert."))
        ]
        if whole:
            names[role] = _common([p.key[0] for p in whole])
    norms = [
        w.module
        for w in weights.values()
        if w.kind == "norm" and parent(w.module) in (block, *_ancestors(names, block))
    ]
    for order, (role, module) in enumerate(names.items()):
        core = module if role != "mlp" else ""
        last = next((p.key[0] for p in mine if p.role in (f"{role}.output", f"{role}.down")), module)
        if module == block:  # BERT: the two halves of the MLP are two modules
            first = next((p.key[0] for p in mine if p.role == "mlp.up"), "")
            module, source = last, first
        else:
            source = ""
        if core:
            projections = [p.key[0] for p in mine if p.role in (f"{role}.query", f"{role}.key")]
            core = _common(projections) if projections else core
            if core != module:  # BERT: the output projection sits beside the core, under a norm
                module, source = last, core
            _fill_core(model, weights, mine, role, core, block, found)
        norm = norms[min(order, len(norms) - 1)] if norms else ""
        found.sublayers.append(SubLayer(role, block, module, source, norm, core, order))


def _ancestors(names: dict[str, str], block: str) -> list[str]:
    return [parent(name) for name in names.values() if inside(parent(name), block)]


def _common(names: list[str]) -> str:
    """The innermost module that holds all of `names`."""
    if len(set(names)) == 1:
        return parent(names[0])
    split = [name.split(".") for name in names]
    same = []
    for column in zip(*split, strict=False):
        if len(set(column)) > 1:
            break
        same.append(column[0])
    return ".".join(same)


def _attention_part(
    model: nn.Module, weight: Weight, leaf: str, above: str, block: str, found: Findings
) -> None:
    cross = "cross" in above or "encdec" in above or "encoder_attn" in above or "crossattention" in above
    prefix = "cross_attention" if cross else "attention"
    for role, leaves in ATTENTION.items():
        if leaf in leaves:
            found.parts.append(Part(weight.key, f"{prefix}.{role}", block=block))
            return
    if leaf in FUSED:
        for role, ranges in zip(("query", "key", "value"), _split(model, weight, leaf), strict=True):
            found.parts.append(Part(weight.key, f"{prefix}.{role}", ranges, block))


def _split(model: nn.Module, weight: Weight, leaf: str) -> list[tuple[tuple[int, int], ...]]:
    """Rows of queries, keys and values in a fused projection."""
    heads, kv_heads, size = _heads(model, weight.n_in)
    if leaf == "query_key_value" and weight.n_out == 3 * weight.n_in and heads:
        # Each head's rows lie together: its query, key and value (GPT-NeoX, BLOOM, Falcon).
        return [
            tuple((3 * h * size + i * size, 3 * h * size + (i + 1) * size) for h in range(heads))
            for i in range(3)
        ]
    third = weight.n_out // 3
    query = heads * size if heads and heads * size + 2 * kv_heads * size == weight.n_out else third
    key = query + (weight.n_out - query) // 2
    return [((0, query),), ((query, key),), ((key, weight.n_out),)]


def _heads(model: nn.Module, width: int) -> tuple[int, int, int]:
    """(query heads, key and value heads, size of a head) as the config says; 0 where it says nothing."""
    config: Any = getattr(model, "config", None)

    def setting(*names: str) -> int:
        for name in names:
            # Some configs refuse a setting that differs from layer to layer.
            with contextlib.suppress(Exception):
                value = getattr(config, name, None)
                if isinstance(value, int) and value:
                    return value
        return 0

    heads = setting("num_attention_heads", "n_head", "num_heads", "n_heads", "encoder_attention_heads")
    size = setting("head_dim") or (width // heads if heads else 0)
    return heads, setting("num_key_value_heads") or heads, size


def _mlp_part(weight: Weight, leaf: str, above: str, block: str, found: Findings) -> None:
    expert = weight.kind == "experts" or ("expert" in above and "shared" not in above)
    prefix = "expert" if expert else "mlp"
    if leaf in FUSED_MLP:
        half = weight.n_out // 2
        found.parts.append(Part(weight.key, f"{prefix}.gate", ((0, half),), block))
        found.parts.append(Part(weight.key, f"{prefix}.up", ((half, 2 * half),), block))
        return
    if leaf in ("router", "gate") and (weight.kind == "parameter" or weight.n_out < weight.n_in // 2):
        found.parts.append(Part(weight.key, "router", block=block))
        return
    if leaf == "dense":  # BERT: intermediate.dense and output.dense
        leaf = "up_proj" if "intermediate" in above else "down_proj" if above.endswith("output") else leaf
    for role, leaves in MLP.items():
        if leaf in leaves or leaf.removesuffix("_proj") + "_proj" in leaves:
            found.parts.append(Part(weight.key, f"{prefix}.{role}", block=block))
            return


def _fill_core(
    model: nn.Module, weights: dict, parts: list[Part], role: str, core: str, block: str, found: Findings
) -> None:
    query = next((p for p in parts if p.role == f"{role}.query"), None)
    key = next((p for p in parts if p.role == f"{role}.key"), None)
    heads, kv_heads, size = _heads(model, weights[query.key].n_in if query else 0)
    if query and size:
        rows = sum(b - a for a, b in query.ranges) or weights[query.key].n_out
        heads, kv_heads = max(1, rows // size), kv_heads
        if key:
            kv_heads = max(1, (sum(b - a for a, b in key.ranges) or weights[key.key].n_out) // size)
    for part in parts:
        if part.role.startswith(role + "."):
            part.core = core
    found.cores.append(Core(core, block, heads, kv_heads, size, cross=role == "cross_attention"))


def _name_stacks(model: nn.Module, found: Findings) -> None:
    if len(found.stacks) < 2:
        return
    cross = {sub.block for sub in found.sublayers if sub.role == "cross_attention"}
    for stack in found.stacks:
        path = stack.blocks[0].lower()
        words = {
            "vision": "image",
            "visual": "image",
            "text": "text",
            "encoder": "encoder",
            "decoder": "decoder",
            "audio": "audio",
        }
        stack.name = next(
            (label for word, label in words.items() if word in path), parent(parent(stack.blocks[0]))
        )
        if cross & set(stack.blocks):
            stack.name = "decoder"
    if len({s.name for s in found.stacks}) < len(found.stacks):
        for stack in found.stacks:
            stack.name = parent(stack.blocks[0])


def _ends(model: nn.Module, weights: dict, stack: Stack) -> None:
    """Embedding, final norm and backbones of one tower, from what stands beside its blocks."""
    order = [name for name, _ in model.named_modules()]
    first, last = order.index(stack.blocks[0]), stack.blocks[-1]
    home = parent(parent(stack.blocks[0]))
    level = home
    while True:
        near = [w for w in weights.values() if inside(w.module, level)]
        tokens = [
            w.module
            for w in near
            if w.kind == "embedding" and not any(inside(w.module, b) for b in stack.blocks)
        ]
        if tokens or not level:
            break
        level = parent(level)
    stack.token_embedding = tokens[0] if tokens else ""
    before = [
        n
        for n in order[:first]
        if n and inside(n, level) and not inside(stack.blocks[0], n) and parent(n) == level
    ]
    holding = [n for n in before if any(inside(w.module, n) for w in weights.values())]
    composite = [n for n in holding if any(True for _ in model.get_submodule(n).children())]
    stack.embedding = (composite or [stack.token_embedding])[-1]
    after = [
        w.module for w in weights.values() if w.kind == "norm" and order.index(w.module) > order.index(last)
    ]
    finals = [n for n in after if not inside(n, last) and parent(n) in (home, level)]
    stack.final = finals[0] if finals else last
    stack.width = max((w.n_out for w in weights.values() if w.module == stack.token_embedding), default=0)
    stack.backbones = (
        (level,) if level == home else (level, home) if tokens and inside(tokens[0], home) else (level,)
    )


def _around_stacks(model: nn.Module, weights: dict, found: Findings) -> None:
    children = dict(model.named_children())
    blocks = [b for s in found.stacks for b in s.blocks]
    for name in children:
        holds = any(inside(b, name) for b in blocks)
        if name in HEADS and not holds:
            found.head = name
    poolers = [
        n
        for n, _ in model.named_modules()
        if n.rpartition(".")[2] == "pooler" and not any(inside(b, n) for b in blocks)
    ]
    found.pooler = poolers[0] if poolers else ""
    found.class_token = bool(found.pooler)
