"""What stands before and after the blocks: embeddings, final states, backbones, pooler, head."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from veneer.anatomy._attention import Attention
from veneer.anatomy._findings import Findings, Stack
from veneer.anatomy._graph import ADDS, MOVES, MULTIPLIES, SAME, Graph
from veneer.anatomy._positions import read_positions
from veneer.anatomy._structure import inside, parent
from veneer.anatomy._trace import RECURRENT_CALLS, Call, Ref, tensors_in

_IMAGE = ("pixel_values", "image", "images", "pixel_values_videos")
_SOUND = ("input_features", "input_values", "audio")


def find_ends(graph: Graph, found: Findings, attentions: list[Attention]) -> None:
    """Fills what `Findings` says of the whole model."""
    ends = _Ends(graph, found)
    for stack in found.stacks:
        ends.before(stack)
        ends.after(stack)
        ends.backbones(stack)
        cores = [c for c in found.cores if c.block in stack.blocks and not c.cross]
        stack.causal = bool(cores) and all(c.causal for c in cores)
    if found.stacks and not any(s.backbones for s in found.stacks):
        for stack in found.stacks:
            stack.backbones = ("",)
    ends.stack_names()
    if not found.stacks:
        ends.embedding_alone()
    last = [
        s for s in found.stacks if not any(ends.feeds(s, other) for other in found.stacks if other is not s)
    ]
    found.causal = bool(last) and all(s.causal for s in last)
    found.encoder_decoder = {s.name for s in found.stacks} >= {"encoder", "decoder"}
    ends.head()
    ends.pooler()
    read_positions(graph, found, attentions, [(s, ends.entry(s)) for s in found.stacks])


class _Ends:
    def __init__(self, graph: Graph, found: Findings) -> None:
        self.graph, self.found = graph, found
        self.blocks = {b for s in found.stacks for b in s.blocks}

    def _holds_block(self, module: str) -> bool:
        return any(inside(b, module) for b in self.blocks)

    def _first(self, stack: Stack) -> Call:
        called = [self.graph.calls[b][0] for b in stack.blocks if self.graph.calls.get(b)]
        return min(called, key=lambda c: c.start)

    def _last(self, stack: Stack) -> Call:
        called = [self.graph.calls[b][-1] for b in stack.blocks if self.graph.calls.get(b)]
        return max(called, key=lambda c: c.start)

    def entry(self, stack: Stack) -> int | None:
        call = self._first(stack)
        states = [v for v in call.inputs if self.graph.is_state(v)]
        return states[0] if states else None

    # ------------------------------------------------------------ before the blocks

    def before(self, stack: Stack) -> None:
        """The embedding: the module that is called once and whose output, dropout aside, enters the first
        block."""
        entry, graph = self.entry(stack), self.graph
        if entry is None:
            return
        start = self._first(stack).start
        stack.width = graph.shape(entry)[-1] if len(graph.shape(entry)) == 3 else 0
        for value in self._back(entry):
            calls = [
                c
                for c in graph.made_by(value)
                if c.module and not self._holds_block(c.module) and c.stop <= start
            ]
            calls = [
                c
                for c in calls
                if not any(inside(c.module, b) for b in self.blocks) and len(graph.calls[c.module]) == 1
            ]
            if calls:
                stack.embedding = calls[-1].module
                break
        stack.token_embedding = self._tokens(graph.before_value(entry))
        if not stack.embedding:
            stack.embedding = stack.token_embedding or self._any_before(entry, start)

    def _back(self, value: int) -> list[int]:
        """The value, and what it was before dropout and casts."""
        out = [value]
        while True:
            node = self.graph.producer(out[-1])
            if node is None or node.name not in SAME or not node.inputs:
                return out
            out.append(node.inputs[0])

    def _any_before(self, entry: int, start: int) -> str:
        bits = self.graph.before_value(entry)
        fits = []
        for call in self.graph.tape.calls:
            if (
                0 <= call.stop <= start
                and call.module
                and call.outputs
                and not self._holds_block(call.module)
            ):
                made = self.graph.producer(call.outputs[0])
                same = self.graph.shape(call.outputs[0]) == self.graph.shape(entry)
                if made and bits >> made.index & 1 and same and len(self.graph.calls[call.module]) == 1:
                    fits.append(call)
        return max(fits, key=lambda c: (c.stop, -c.depth)).module if fits else ""

    def _tokens(self, bits: int) -> str:
        """The lookup, among these nodes, whose indices are an input of the forward as it came."""
        found: tuple[int, str] = (0, "")
        for node in self.graph.each(bits):
            if node.name != "embedding" or not node.weights:
                continue
            index = next((i for i in node.inputs if i not in node.weights), None)
            if index is None:
                continue
            name = self.graph.values[self.graph.same(index, SAME | MOVES | {"pad", "long"})].input_name
            rows = self.graph.shape(node.weights[0])[0]
            if name and "type" not in name and "position" not in name and rows > found[0]:
                found = rows, self.graph.weight_key(node)[0]
        return found[1]

    def embedding_alone(self) -> None:
        """No blocks (an LSTM tagger): the token embedding is all there is to name."""
        name = self._tokens((1 << len(self.graph.nodes)) - 1)
        if name:
            self.found.loose_embedding = name
        for call in self.graph.tape.closed:
            region = self.graph.nodes[call.start : call.stop]
            recurrent = any(n.name in RECURRENT_CALLS and n.module == call.module for n in region)
            if recurrent and call.outputs and self.graph.is_data(call.outputs[0]):
                self.found.loose_final = call.module

    # ------------------------------------------------------------ after the blocks

    def after(self, stack: Stack) -> None:
        call = self._last(stack)
        stack.final = call.module if stack.callable else ""
        if not call.outputs:
            return
        state = call.outputs[0]
        norms = set(self.found.norms)
        for other in self.graph.tape.calls:
            if not any(inside(b, parent(other.module)) for b in stack.blocks):
                continue  # deep inside of what comes after
            if (
                other.start < call.stop
                or other.module not in norms
                or not other.inputs
                or any(inside(other.module, b) for b in self.blocks)
            ):
                continue
            if (
                self.graph.same(other.inputs[0]) == self.graph.same(state)
                and len(self.graph.calls[other.module]) == 1
            ):
                stack.final = other.module
                return

    def _final_values(self) -> set[int]:
        out = set()
        for stack in self.found.stacks:
            for call in self.graph.calls.get(stack.final, [])[-1:]:
                out |= {self.graph.same(v) for v in call.outputs[:1]}
        return out

    def backbones(self, stack: Stack) -> None:
        """Modules that hold all blocks and start from raw inputs."""
        entry = self.entry(stack)
        if entry is None:
            return
        bits = self.graph.before_value(entry)
        for name, calls in self.graph.calls.items():
            if not name or name in self.blocks or not all(inside(b, name) for b in stack.blocks):
                continue
            given = [v for v in calls[0].inputs if self.graph.is_data(v)]
            fed = any((made := self.graph.producer(v)) is not None and bits >> made.index & 1 for v in given)
            if not fed:
                stack.backbones = (*stack.backbones, name)

    # ------------------------------------------------------------ names of stacks

    def stack_names(self) -> None:
        stacks = self.found.stacks
        for stack in stacks:
            stack.kind = self._kind(stack)
        if len(stacks) < 2:
            return
        crossing = {c.block for c in self.found.cores if c.cross}
        decoders = [s for s in stacks if crossing & set(s.blocks)]
        for stack in stacks:
            feeds = any(stack is not d and self.feeds(stack, d) for d in decoders)
            stack.name = "decoder" if stack in decoders else "encoder" if feeds else stack.kind
        self.found.tell_stacks_apart()

    def feeds(self, first: Stack, second: Stack) -> bool:
        made = self.graph.producer(self._last(first).outputs[0]) if self._last(first).outputs else None
        inputs = self._last(second).inputs
        return made is not None and any(self.graph.before_value(v) >> made.index & 1 for v in inputs)

    def _kind(self, stack: Stack) -> str:
        entry = self.entry(stack)
        bits = self.graph.before_value(entry) if entry is not None else 0
        names = {self.graph.values[i].input_name for n in self.graph.each(bits) for i in n.inputs}
        if names & {"input_ids", "decoder_input_ids"}:
            return "text"
        return "image" if names & set(_IMAGE) else "audio" if names & set(_SOUND) else ""

    # ------------------------------------------------------------ head and pooler

    def _logits(self) -> int | None:
        out: Any = self.graph.tape.output
        if isinstance(out, dict):
            for key in ("logits", "prediction_logits", "start_logits", "reconstruction"):
                if isinstance(out.get(key), Tensor):
                    return self.graph.tape.value(out[key])
            return None
        first = next(tensors_in(out), None)
        return self.graph.tape.value(first) if first is not None else None

    def head(self) -> None:
        value = self._logits()
        finals = self._final_values()
        earliest = next((n.index for n in self.graph.nodes if n.weights), -1)
        steps = 0
        while value is not None and steps < 20:
            if self.graph.same(value) in finals:
                return
            for call in reversed(self.graph.made_by(value)):
                if self._is_head(call, earliest):
                    self.found.head = call.module
                    return
            node = self.graph.producer(value)
            if (
                node is None
                or node.weights
                or not (node.name in MOVES | SAME | ADDS | MULTIPLIES or len(node.inputs) == 1)
            ):
                return
            value, steps = node.inputs[0], steps + 1

    def _is_head(self, call: Call, earliest: int) -> bool:
        region = self.graph.region(call)
        matrices = [self.graph.nodes[i] for i in region if self.graph.nodes[i].weights]
        bad = (
            call.module == ""
            or self._holds_block(call.module)
            or any(inside(call.module, b) for b in self.blocks)
        )
        recurrent = any(n.name == "embedding" or n.name in RECURRENT_CALLS for n in matrices)
        return bool(matrices) and not bad and not recurrent and earliest not in region

    def pooler(self) -> None:
        """A module, not the head, that takes one position out of the final state."""
        finals = self._final_values()
        done = max((c.stop for b in self.blocks for c in self.graph.calls.get(b, [])), default=0)
        for node in self.graph.nodes[done:]:
            if node.name not in ("__getitem__", "select", "index_select") or not node.inputs:
                continue
            source, shape = node.inputs[0], self.graph.shape(node.inputs[0])
            if self.graph.same(source) not in finals or len(shape) != 3:
                continue
            if len(self.graph.shape(node.outputs[0])) == 3 and self.graph.shape(node.outputs[0])[1] != 1:
                continue
            self.found.class_token = self.found.class_token or _takes_first(node.args)
            module = node.module
            if (
                module
                and not self._holds_block(module)
                and not (self.found.head and inside(module, self.found.head))
            ):
                self.found.pooler = self.found.pooler or module


def _takes_first(args: tuple) -> bool:
    """x[:, 0], x[:, :1], x.select(1, 0)"""
    index = args[1] if len(args) > 1 else None
    if isinstance(index, tuple) and len(index) > 1:
        place = index[1]
        return (
            place == 0
            if not isinstance(place, slice | Ref | Tensor)
            else isinstance(place, slice) and (place.start or 0, place.stop) == (0, 1)
        )
    return len(args) > 2 and args[1] == 1 and args[2] == 0
