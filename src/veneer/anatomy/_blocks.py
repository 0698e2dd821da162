"""Finding the blocks of a base: the modules that a hidden state passes one after another, each adding to it.

A block is a member of a list of modules in whose forward two different paths from one state are added.
Lists in lists (the stages of Swin or ResNet) are opened; a list of unlike sub-layers (T5) is not.
"""

from __future__ import annotations

from torch import nn

from veneer.anatomy._findings import Stack
from veneer.anatomy._graph import ADDS, Graph
from veneer.anatomy._structure import inside, join, parent
from veneer.anatomy._trace import Call, Node


def merges(graph: Graph) -> list[Node]:
    """Additions of two hidden states that come from different matrix calls."""
    found = []
    for node in graph.nodes:
        if node.name in ADDS and len(node.inputs) >= 2:
            a, b = node.inputs[:2]
            if graph.is_state(a) and graph.is_state(b) and graph.near_value(a) != graph.near_value(b):
                found.append(node)
    return found


def find_stacks(graph: Graph, attention_nodes: set[int]) -> list[Stack]:
    """Towers of blocks, in the order of the forward; names are given later (`_ends`)."""
    finder = _Finder(graph, attention_nodes)
    stacks: list[list[str]] = []
    homes: list[str] = []
    for container, module in graph.model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential | nn.ModuleDict):
            continue
        if any(inside(container, block) for stack in stacks for block in stack) or any(
            inside(container, h) for h in homes
        ):
            continue
        blocks = finder.blocks_of(container)
        if blocks:
            stacks.append(blocks)
            homes.append(container)
    order = {
        block: finder.first(block).start for stack in stacks for block in stack if graph.calls.get(block)
    }
    made = sorted(
        (Stack(blocks) for blocks in stacks),
        key=lambda s: min((order[b] for b in s.blocks if b in order), default=0),
    )
    for stack in made:
        stack.callable = not any(block in graph.listed for block in stack.blocks)
    return finder.joined(made)


class _Finder:
    def __init__(self, graph: Graph, attention_nodes: set[int]) -> None:
        self.graph = graph
        self.attention_nodes = attention_nodes
        self.merges = merges(graph)

    def first(self, module: str) -> Call:
        return self.graph.calls[module][0]

    def _candidates(self, container: str) -> list[str]:
        """Children of a list that were called, hold two matrix calls or more, and add."""
        module = self.graph.model.get_submodule(container)
        names = [join(container, key) for key, _ in module.named_children()]
        good = [name for name in names if self._adds(name)]
        kinds = {type(self.graph.model.get_submodule(name)) for name in good}
        # A first block of a stage that projects its residual, or one that this input did not reach.
        return [n for n in names if n in good or (good and type(self.graph.model.get_submodule(n)) in kinds)]

    def _adds(self, name: str) -> bool:
        if not self.graph.calls.get(name):
            return False
        listed, region = name in self.graph.listed, self.graph.region(self.first(name))
        matrices = sum(1 for i in region if self.graph.nodes[i].weights)
        return matrices >= 2 and any(
            n.index in region and (listed or inside(n.module, name)) for n in self.merges
        )

    def blocks_of(self, container: str) -> list[str]:
        blocks = self._candidates(container)
        if not blocks:
            return []
        inner = [self._stage(block) for block in blocks]
        if all(inner):
            return [b for stage in inner for b in stage]
        return blocks

    def _stage(self, block: str) -> list[str]:
        """The blocks inside of `block`, where it is no more than a list of like blocks; else none."""
        if not self.graph.calls.get(block) or block in self.graph.listed:
            return []
        region = self.graph.region(self.first(block))
        mine = [n for n in self.merges if n.index in region]
        for name, module in self.graph.model.get_submodule(block).named_modules(prefix=block):
            if name == block or not isinstance(module, nn.ModuleList | nn.Sequential | nn.ModuleDict):
                continue
            inner = self.blocks_of(name)
            if not inner:
                continue
            covered = all(any(inside(n.module, b) for b in inner) for n in mine)
            return inner if covered and self._alike(inner) else []
        return []

    def _alike(self, blocks: list[str]) -> bool:
        """Same class, and all or none of them attend: sub-layers of one block differ in that."""
        kinds = {type(self.graph.model.get_submodule(b)) for b in blocks}
        attends = {
            any(i in self.attention_nodes for i in self.graph.region(self.first(b)))
            for b in blocks
            if self.graph.calls.get(b)
        }
        return len(kinds) == 1 and len(attends) <= 1

    def joined(self, stacks: list[Stack]) -> list[Stack]:
        """Lists side by side in one module that feed one another (torchvision's layer1 ... layer4) are one
        tower."""
        out: list[Stack] = []
        for stack in stacks:
            last = out[-1] if out else None
            if last is not None and self._follows(last, stack):
                last.blocks += stack.blocks
            else:
                out.append(stack)
        return out

    def _follows(self, first: Stack, second: Stack) -> bool:
        a, b = first.blocks[-1], second.blocks[0]
        if parent(parent(a)) != parent(parent(b)) or not (
            self.graph.calls.get(a) and self.graph.calls.get(b)
        ):
            return False
        if self._reads_two(second) != self._reads_two(first):
            return False
        value = next((v for v in self.first(b).inputs if self.graph.is_data(v)), None)
        made = self.graph.producer(self.first(a).outputs[0]) if self.first(a).outputs else None
        return (
            value is not None and made is not None and bool(self.graph.before_value(value) >> made.index & 1)
        )

    def _reads_two(self, stack: Stack) -> bool:
        """Whether a block gets a second hidden state from outside (cross-attention)."""
        call = self.first(stack.blocks[0])
        states = {self.graph.near_value(v) for v in call.inputs if self.graph.is_data(v)}
        return len(states) > 1
