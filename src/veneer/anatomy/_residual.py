"""Sub-layers of a block: the branches that are added to its stream, where each begins, ends and is
normalised."""

from __future__ import annotations

from veneer.anatomy._findings import Findings, SubLayer
from veneer.anatomy._graph import ADDS, MOVES, MULTIPLIES, SAME, Graph
from veneer.anatomy._structure import inside
from veneer.anatomy._trace import Call, Node

_PASSED = SAME | (MOVES - {"cat", "concat", "stack"}) | {"pad"}  # one state, moved about (windows of Swin)


def find_sublayers(
    graph: Graph,
    found: Findings,
    block: str,
    taken: dict[int, str],
    attentions: dict[int, str],
    cores: dict[int, str],
) -> None:
    """Adds the sub-layers of one block to `found`, in the order of the forward."""
    call = graph.calls[block][0]
    reader = _Branches(graph, found, block, call, taken, attentions, cores)
    for node in graph.nodes[call.start : call.stop]:
        if reader.is_sum(node):
            reader.read(node)
    reader.finish()


class _Branches:
    def __init__(
        self,
        graph: Graph,
        found: Findings,
        block: str,
        call: Call,
        taken: dict,
        attentions: dict,
        cores: dict,
    ) -> None:
        self.graph, self.found, self.block, self.call = graph, found, block, call
        self.taken, self.attentions, self.cores = taken, attentions, cores
        self.done: set[str] = set()
        self.order = 0
        self.entries: list[tuple[str, int, int]] = []  # (role, input, first node of the branch)

    def is_sum(self, node: Node) -> bool:
        """An addition of two states that is not itself only a term of another one."""
        return self._adds(node) and not self._is_term(node.outputs[0])

    def _adds(self, node: Node | None) -> bool:
        if (
            node is None
            or node.name not in ADDS
            or len(node.inputs) < 2
            or not self.call.start <= node.index < self.call.stop
        ):
            return False
        return all(self.graph.is_state(i) for i in node.inputs[:2])

    def _is_term(self, value: int) -> bool:
        """Used by one more addition and by nothing else; a sum that a module gives is a whole."""
        if any(c.module != self.block and inside(c.module, self.block) for c in self.graph.made_by(value)):
            return False
        users = self._users(value)
        return len(users) == 1 and self._adds(users[0])

    def _users(self, value: int) -> list[Node]:
        """The calls that use a value, dropout and casts passed over."""
        out: list[Node] = []
        for node in self.graph.consumers.get(value, []):
            if node.name in SAME and node.outputs:
                out += self._users(node.outputs[0])
            else:
                out.append(node)
        return out

    def _terms(self, value: int, first: bool = False) -> list[int]:
        node = self.graph.producer(self.graph.same(value))
        if node is not None and self._adds(node) and (first or self._is_term(node.outputs[0])):
            return [*self._terms(node.inputs[0]), *self._terms(node.inputs[1])]
        return [value]

    def read(self, node: Node) -> None:
        """One sum: the term that others were made from is the stream, those others are branches."""
        terms = self._terms(node.outputs[0], first=True)
        for stream in terms:
            source = self._unscaled(stream)
            branches = [t for t in terms if t != stream and self.graph.made_from(t, source)]
            branches = [b for b in branches if self._has_matrix(b, source)]
            if branches:
                for branch in branches:
                    self._branch(branch, source, node)
                return

    def _unscaled(self, value: int) -> int:
        """The state behind dropout, casts and a scale that no state made (learned weights of a residual)."""
        while True:
            value = self.graph.same(value)
            node = self.graph.producer(value)
            if node is None or node.name not in MULTIPLIES or len(node.inputs) > 2:
                return value
            states = [i for i in node.inputs if self.graph.is_state(i)]
            if len(states) != 1:
                return value
            value = states[0]

    def _own(self, branch: int, stream: int) -> int:
        """Nodes that only the branch needs."""
        return self.graph.before_value(branch) & ~self.graph.before_value(stream) & self.graph.mask(self.call)

    def _has_matrix(self, branch: int, stream: int) -> bool:
        return any(
            n.weights or n.index in self.attentions for n in self.graph.each(self._own(branch, stream))
        )

    # ------------------------------------------------------------ one branch

    def _branch(self, branch: int, stream: int, add: Node) -> None:
        nodes = list(self.graph.each(self._own(branch, stream)))
        roles = {self.taken[n.index] for n in nodes if n.index in self.taken}
        attends = [n for n in nodes if n.index in self.attentions]
        if attends:
            role, core = self.attentions[attends[0].index], self.cores.get(attends[0].index, "")
        elif any(r.startswith(("mlp.", "expert.")) for r in roles):
            role, core = "mlp", ""
        elif "mixer" in roles or "convolution" in roles:
            role, core = "mixer" if "mixer" in roles else "convolution", ""
        else:
            return
        module = self._module(branch, stream, nodes)
        norm = self._norm_before(stream, nodes)
        entry = self.graph.same(norm[1]) if norm else self._entry(nodes)
        if not module or (role, module) in self.done:
            return
        self.done.add((role, module))  # type: ignore[arg-type]
        source = self._source(entry, core, nodes) if entry is not None else module
        name, place = (norm[0], "pre") if norm else self._norm_after(branch, add)
        self.found.sublayers.append(SubLayer(role, self.block, module, source, name, core, self.order))
        self.order += 1
        self.entries.append((role, entry if entry is not None else -1, nodes[0].index))
        if place and not self.found.norm_place:
            self.found.norm_place = place

    def _module(self, branch: int, stream: int, nodes: list[Node]) -> str:
        """The outermost module below the block that gives the branch, before dropout, scaling and a last
        norm."""
        graph, value = self.graph, branch
        own = {n.index for n in nodes}
        for _ in range(64):
            for call in reversed(graph.made_by(value)):
                if call.module != self.block and inside(call.module, self.block) and self._computes(call):
                    return call.module
            node = graph.producer(value)
            if node is None or node.index not in own:
                break
            if node.weights or node.index in self.attentions:
                if node.module != self.block:
                    return node.module
                return graph.weight_key(node)[0] if node.weights else ""
            if not self._carries(node):
                return ""  # put together from several (experts in a loop): no module gives the whole
            # Step to the operand that carries the branch's own matrices.
            nexts = [
                i
                for i in node.inputs
                if graph.is_data(i) and graph.before_value(i) & self._own(branch, stream)
            ]
            if not nexts:
                break
            value = max(nexts, key=lambda i: graph.before_value(i).bit_count())
        return ""

    def _carries(self, node: Node) -> bool:
        """Whether a call hands on one state: moved, cast, scaled, biased or normalised."""
        if node.name in _PASSED | MULTIPLIES | ADDS | {"div", "__truediv__", "where", "masked_fill"}:
            return True
        return any(inside(node.module, norm) for norm in self.found.norms)

    def _computes(self, call: Call) -> bool:
        """Dropout and norms give a branch as well, but they do not make it."""
        return any(self.graph.nodes[i].weights or i in self.attentions for i in self.graph.region(call))

    def _entry(self, nodes: list[Node]) -> int | None:
        """What the first matrices of the branch read."""
        own = 0
        for n in nodes:
            if n.weights or n.index in self.attentions:
                own |= 1 << n.index
        for node in nodes:
            if not (node.weights or node.index in self.attentions) or node.name == "embedding":
                continue
            if (self.graph.before[node.index] & own) == 1 << node.index:
                value = self.graph.data_input(node) if node.weights else node.inputs[0]
                if node.name == "multi_head_attention_forward":
                    value = node.inputs[0]
                if value is not None and self.graph.is_state(value):
                    return self.graph.same(value, _PASSED)
        return None

    def _source(self, entry: int, core: str, nodes: list[Node]) -> str:
        """The module whose first input is `entry`: the attention's core, else the outermost below the
        block."""
        first = nodes[0].index
        fits: list[Call] = []
        for call in self.graph.tape.calls:
            inner = call.module != self.block and inside(call.module, self.block)
            if (
                not inner
                or not (self.call.start <= call.start and call.stop <= self.call.stop)
                or not call.inputs
            ):
                continue
            values = [self.graph.same(v, _PASSED) for v in call.inputs[:1]]
            if entry in values and call.stop > first and self._computes(call):
                fits.append(call)
        if any(c.module == core for c in fits):
            return core
        return min(fits, key=lambda c: (c.start, c.depth)).module if fits else ""

    def _norm_before(self, stream: int, nodes: list[Node]) -> tuple[str, int] | None:
        """(norm, its output): the norm that reads the stream and that only this branch goes through."""
        own, norms = {n.index for n in nodes}, set(self.found.norms)
        for call in self.graph.tape.calls:
            if (
                call.module in norms
                and self.call.start <= call.start < self.call.stop
                and call.inputs
                and call.outputs
            ):
                made = self.graph.values[call.outputs[0]].producer
                if made in own and self.graph.same(call.inputs[0]) == stream:
                    return call.module, call.outputs[0]
        return None

    def _norm_after(self, branch: int, add: Node) -> tuple[str, str]:
        """The norm that alone reads the sum, or the one that ends the branch."""
        norms = set(self.found.norms)
        after, users = {self.graph.same(v) for v in add.outputs}, self._users(add.outputs[0])
        for call in self.graph.tape.calls:
            if call.module not in norms or not call.inputs or call.start < add.index:
                continue
            alone = all(call.start <= n.index < call.stop for n in users)
            if alone and inside(call.module, self.block) and self.graph.same(call.inputs[0]) in after:
                return call.module, "post"
        for call in self.graph.made_by(self.graph.same(branch)):
            if call.module in norms:
                return call.module, "post"
        return "", ""

    def finish(self) -> None:
        """Parallel: the MLP's input does not depend on the attention of the same block."""
        attends = [(start, entry) for role, entry, start in self.entries if role == "attention"]
        mlps = [entry for role, entry, _ in self.entries if role == "mlp" and entry >= 0]
        if attends and mlps:
            ends = [i for i in self.attentions if self.call.start <= i < self.call.stop]
            if not any(self.graph.before_value(entry) >> i & 1 for entry in mlps for i in ends):
                self.found.norm_place = "parallel"
