"""What reading a model finds, before it is written down as sites: the form that both readers fill.

`_by_trace` fills it from a traced forward, `_by_name` from names where no forward can be run.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

Key = tuple[str, str]  # (module, parameter)
Ranges = tuple[tuple[int, int], ...]


@dataclass
class Part:
    """One role of a weight, or of some of its output rows."""

    key: Key
    role: str
    ranges: Ranges = ()
    block: str = ""
    core: str = ""  # attention projections: the module that calls the attention
    label: str = ""  # last part of the site's name where the role says too little ("mixer.input")


@dataclass
class Core:
    """A module that computes queries, keys and values and lets them attend."""

    module: str
    block: str = ""
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    causal: bool = False
    cross: bool = False


@dataclass
class SubLayer:
    """A branch of a block: `module` gives its output before the residual is added, `source` takes its
    input."""

    role: str
    block: str
    module: str
    source: str = ""
    norm: str = ""
    core: str = ""
    order: int = 0


@dataclass
class Stack:
    """A tower of blocks, in the order of the forward."""

    blocks: list[str]
    name: str = ""
    embedding: str = ""
    token_embedding: str = ""
    final: str = ""
    backbones: tuple[str, ...] = ()
    causal: bool = False
    width: int = 0
    callable: bool = True  # False: the blocks are lists of sub-layers, no module gives a block's output
    kind: str = ""  # text, image, audio: what the tower reads


@dataclass
class Findings:
    stacks: list[Stack] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    cores: list[Core] = field(default_factory=list)
    sublayers: list[SubLayer] = field(default_factory=list)
    norms: list[str] = field(default_factory=list)  # modules that normalise, whatever their class is called
    transposed: dict[Key, bool] = field(default_factory=dict)  # bare matrices: whether stored as (in, out)
    rehomed: dict[Key, Key] = field(
        default_factory=dict
    )  # weights used outside of their own module's forward
    loose_embedding: str = ""  # the token embedding of a model without blocks
    loose_final: str = ""  # its last recurrent module
    head: str = ""
    pooler: str = ""
    encoder_decoder: bool = False
    causal: bool = False
    positions: str = "none"
    class_token: bool = False
    norm_place: str = ""
    widths: dict[str, int] = field(default_factory=dict)  # last axis of a module's first output
    tokens_first: frozenset[str] = frozenset()  # modules that are given (tokens, rows, width)
    notes: list[str] = field(default_factory=list)

    def tell_stacks_apart(self) -> None:
        """Each of several stacks has a name of its own: what it reads, else where its blocks are."""
        if len(self.stacks) < 2:
            return
        for stack in self.stacks:
            stack.name = stack.name or stack.kind
        names = [stack.name for stack in self.stacks]
        for stack in self.stacks:
            if names.count(stack.name) > 1 or not stack.name:
                stack.name = stack.blocks[0].rpartition(".")[0]

    def absorb(self, other: Findings, prefix: str) -> None:
        """Takes in what was found in the module `prefix`, which the forward of the whole did not reach."""

        def there(name: str) -> str:
            return f"{prefix}.{name}" if name else prefix

        def maybe(name: str) -> str:
            return there(name) if name else ""

        for stack in other.stacks:
            changes: dict[str, Any] = {
                f: maybe(getattr(stack, f)) for f in ("embedding", "token_embedding", "final")
            }
            backbones = tuple(there(b) for b in stack.backbones)
            self.stacks.append(
                replace(stack, blocks=[there(b) for b in stack.blocks], backbones=backbones, **changes)
            )
        for part in other.parts:
            key = (there(part.key[0]), part.key[1])
            self.parts.append(replace(part, key=key, block=maybe(part.block), core=maybe(part.core)))
        self.cores += [replace(c, module=there(c.module), block=maybe(c.block)) for c in other.cores]
        for sub in other.sublayers:
            changes = {f: maybe(getattr(sub, f)) for f in ("block", "module", "source", "norm", "core")}
            self.sublayers.append(replace(sub, **changes))
        self.norms += [there(n) for n in other.norms]
        self.transposed |= {(there(m), p): v for (m, p), v in other.transposed.items()}
        self.widths |= {there(m): v for m, v in other.widths.items()}
        self.tokens_first |= {there(n) for n in other.tokens_first}
        self.notes += [f"{prefix}: {note}" for note in other.notes]
        self.tell_stacks_apart()
