"""Roles from a traced forward: what a projection feeds, not what it is called.

Queries, keys and values are what reaches those places of an attention; its output is the next matrix call;
an MLP is a matrix call that takes what an activation or a product made of one or two others; a router is
what a top-k reads. Names come in only between `gate` and `up` where the forward treats them alike.
"""

from __future__ import annotations

import torch
from torch import nn

from veneer.anatomy._attention import Attention, find_attentions, heads_of, projections
from veneer.anatomy._blocks import find_stacks
from veneer.anatomy._ends import find_ends
from veneer.anatomy._findings import Core, Findings, Key, Part, Ranges
from veneer.anatomy._graph import NORM_CALLS, Graph
from veneer.anatomy._mlp import MLPs, free_calls
from veneer.anatomy._residual import find_sublayers
from veneer.anatomy._rows import ranges_of
from veneer.anatomy._structure import Weight, inside, is_norm, join, output_projection, parent
from veneer.anatomy._trace import CONVOLUTION_CALLS, RECURRENT_CALLS, Call, Node, Ref, Tape

_PICKS = {"topk", "argmax", "argsort", "sort"}


def read_trace(model: nn.Module, tape: Tape, weights: dict[Key, Weight]) -> Findings:
    """Findings from the tape of one forward."""
    return _Reader(model, tape, weights).read()


class _Reader:
    def __init__(self, model: nn.Module, tape: Tape, weights: dict[Key, Weight]) -> None:
        self.model, self.weights = model, weights
        self.graph = Graph(tape, model)
        self.found = Findings()
        self.taken: dict[int, str] = {}  # matrix call -> role
        self.keys: dict[Key, list[Part]] = {}

    def read(self) -> Findings:
        graph = self.graph
        attentions = find_attentions(graph)
        graph.find_near({a.end.index for a in attentions})
        self._norms()
        self._usage()
        found = self.found
        found.stacks = find_stacks(graph, {a.end.index for a in attentions})
        for block, call in self._regions():
            self._read_attentions(block, call, [a for a in attentions if a.end.index in graph.region(call)])
            self._routers(block, call)
        mlps = MLPs(
            graph, model=self.model, weights=self.weights, found=found, taken=self.taken, add=self._add
        )
        for block, call in self._regions():
            if block or (
                found.cores and not found.stacks
            ):  # a plain net of layers has no roles to tell apart
                mlps.read(block, call)
        self._rest()
        self._siblings()
        attention_roles = {
            a.end.index: ("cross_attention" if self._crossing.get(a.end.index) else "attention")
            for a in attentions
        }
        for stack in found.stacks:
            for block in stack.blocks:
                if graph.calls.get(block):
                    find_sublayers(graph, found, block, self.taken, attention_roles, self._cores)
        self._copy_sublayers()
        find_ends(graph, found, attentions)
        for name, calls in graph.calls.items():
            if calls[0].outputs and len(graph.shape(calls[0].outputs[0])) >= 2:
                found.widths[name] = self._width(calls[0])
        found.notes += self._problems
        return found

    # ------------------------------------------------------------ all modules

    _problems: list[str]

    def _width(self, call: Call) -> int:
        """Last axis of a call's output; images of convolutions have their channels on axis 1."""
        shape = self.graph.shape(call.outputs[0])
        near = list(self.graph.each(self.graph.near_value(call.outputs[0])))
        if len(shape) == 4 and near and any(n.name in CONVOLUTION_CALLS for n in near):
            return shape[1]
        return shape[-1]

    def _norms(self) -> None:
        """Leaves that normalise: vectors only, same shape in and out, a mean of squares or a norm call
        inside."""
        for name, calls in self.graph.calls.items():
            module, call = self.model.get_submodule(name), calls[0]
            if any(True for _ in module.children()) or any(
                p.ndim > 1 for p in module.parameters(recurse=False)
            ):
                continue
            normalises = any(self.graph.nodes[i].name in NORM_CALLS for i in self.graph.region(call))
            same = (
                call.inputs
                and call.outputs
                and self.graph.shape(call.inputs[0]) == self.graph.shape(call.outputs[0])
            )
            if same and (normalises or is_norm(module)):
                self.found.norms.append(name)

    def _usage(self) -> None:
        """How bare matrices are used: orientation, and weights that another module's forward uses."""
        self._problems = []
        self._crossing: dict[int, bool] = {}
        self._cores: dict[int, str] = {}
        for node in self.graph.nodes:
            if not node.weights or node.name in CONVOLUTION_CALLS | RECURRENT_CALLS | {
                "embedding",
                "opaque",
                "multi_head_attention_forward",
            }:
                continue
            key = self.graph.weight_key(node)
            weight = self.weights.get(key)
            if weight is None:
                continue
            if weight.kind in ("experts", "parameter"):
                self.found.transposed.setdefault(key, self.graph.is_transposed(node))
            elif weight.kind in ("linear", "conv1d"):
                self._rehome(key, node)

    def _regions(self) -> list[tuple[str, Call]]:
        """First call of each block; the whole forward where there is no block."""
        blocks = [b for s in self.found.stacks for b in s.blocks if self.graph.calls.get(b)]
        regions = [(b, self.graph.calls[b][0]) for b in blocks]
        root = self.graph.calls.get("")
        if root:
            regions.append(("", root[0]))
        return regions

    def _add(
        self, node: Node, role: str, block: str, ranges: Ranges = (), core: str = "", label: str = ""
    ) -> None:
        key = self.graph.weight_key(node)
        self.taken.setdefault(node.index, role)
        part = Part(key, role, ranges, block or self._block_of(key[0]), core, label)
        mine = self.keys.setdefault(key, [])
        if any(p.role == role or not p.ranges or not ranges for p in mine):
            return  # the same weight at a second call (a shared module, a loop over experts)
        mine.append(part)
        self.found.parts.append(part)

    def _block_of(self, module: str) -> str:
        blocks = {b for s in self.found.stacks for b in s.blocks}
        while module and module not in blocks:
            module = parent(module)
        return module

    def _free(self, region: range) -> list[Node]:
        return free_calls(self.graph, region, self.taken)

    # ------------------------------------------------------------ routers

    def _routers(self, block: str, call: Call) -> None:
        """A top-k over what one small matrix made; it must be a block's, or heads that pick a label would
        be one."""
        region = self.graph.region(call)
        if not block:
            return
        for node in self.graph.nodes[region.start : region.stop]:
            if (
                node.name not in _PICKS
                or not node.inputs
                or not self.graph.values[node.inputs[0]].tensor.is_floating_point()
            ):
                continue
            for origin in self.graph.each(self.graph.near_value(node.inputs[0])):
                if (
                    origin.weights
                    and origin.index in region
                    and origin.name not in CONVOLUTION_CALLS
                    and origin.index not in self.taken
                ):
                    self._add(origin, "router", block)

    # ------------------------------------------------------------ attention

    def _read_attentions(self, block: str, call: Call, attentions: list[Attention]) -> None:
        for attention in attentions:
            if attention.end.index in self._crossing:
                continue
            self._read_attention(block, call, attention)

    def _read_attention(self, block: str, call: Call, attention: Attention) -> None:
        graph = self.graph
        core = attention.core
        cross = self._crossing[attention.end.index] = self._is_cross(attention, call, block)
        prefix = "cross_attention" if cross else "attention"
        self._cores[attention.end.index] = core
        if attention.multihead:
            self._multihead(attention, prefix, block, cross)
            return
        counts: dict[str, int] = {}
        region = graph.region(call)
        sources = {r: projections(graph, getattr(attention, r), region) for r in ("query", "key", "value")}
        shared: dict[int, set[str]] = {}
        for role, made in sources.items():
            for node, _, _ in made[:1]:
                shared.setdefault(node.index, set()).add(role)
        for role, made in sources.items():
            made = [
                m for m in made if m[0].index not in self.taken or self.taken[m[0].index].startswith(prefix)
            ]
            if not made:
                continue
            node, ranges, count = made[0]
            counts[role] = sum(m[2] for m in made) if len(made) > 1 else count
            if ranges is None and len(shared[node.index]) > 1:
                ranges = self._the_rest(node, role, sources)
                if ranges is None:
                    name = join(*graph.weight_key(node))
                    self._problems.append(f"{name}: its rows for {prefix}.{role} could not be told apart")
                    continue
            ranges = ranges or ()
            self._add(node, f"{prefix}.{role}", block, ranges, core)
        heads, kv_heads, size = heads_of(graph, attention, counts)
        self._output(attention, prefix, block, region, core)
        if not any(c.module == core and c.cross == cross for c in self.found.cores):
            self.found.cores.append(
                Core(core, block, heads, kv_heads, size, attention.causal and not cross, cross)
            )

    def _the_rest(self, node: Node, role: str, sources: dict[str, list]) -> Ranges | None:
        """The rows of a fused projection that its other parts leave over (queries that are pooled: Hiera)."""
        others = [m[1] for r, made in sources.items() for m in made[:1] if r != role and m[0] is node]
        if len(others) != 2 or any(not o for o in others):
            return None
        size = self.graph.shape(node.outputs[0])[self.graph.feature_axis(node)]
        taken = {i for ranges in others for a, b in ranges for i in range(a, b)}
        return ranges_of(torch.tensor([i for i in range(size) if i not in taken] or [-1]), size)

    def _output(self, attention: Attention, prefix: str, block: str, region: range, core: str) -> None:
        """The first matrix call that takes the attention's output, before anything else is added to it."""
        graph, end = self.graph, attention.end.index
        allowed = 1 << end
        for index, role in self.taken.items():
            if role.startswith(prefix):
                allowed |= 1 << index
        for node in self._free(region):
            if node.index < end:
                continue
            value = graph.data_input(node)
            near = graph.near_value(value) if value is not None else 0
            if near >> end & 1:
                gates = [n for n in graph.each(near & ~allowed) if not graph.within(n, core)]
                if not gates:
                    self._add(node, f"{prefix}.output", block, (), core)
                return

    def _is_cross(self, attention: Attention, call: Call, block: str) -> bool:
        """Keys come from a state that the block was given beside its own."""
        graph = self.graph
        if attention.multihead:
            sources = (attention.query, attention.key)
        else:
            picked = []
            for value in (attention.query, attention.key):
                made = projections(graph, value, graph.region(call))
                data = graph.data_input(made[0][0]) if made else value
                picked.append(data if data is not None else value)
            sources = (picked[0], picked[1])
        passed = {
            "to",
            "view",
            "reshape",
            "transpose",
            "contiguous",
            "dropout",
            "flatten",
            "permute",
            "float",
        }
        query, key = (graph.same(v, passed) for v in sources)
        if query == key or (graph.near_value(query) == graph.near_value(key) != 0):
            return False  # one state, perhaps pooled on one side
        if not block:
            return graph.near_value(query) != graph.near_value(key)
        own = next(
            (graph.same(v, passed) for v in call.inputs if graph.values[v].tensor.is_floating_point()), None
        )
        return graph.values[key].producer < call.start and key != own

    def _multihead(self, attention: Attention, prefix: str, block: str, cross: bool) -> None:
        module = self.model.get_submodule(attention.core)
        if not isinstance(module, nn.MultiheadAttention):
            self._functional(attention, prefix, block, cross)
            return
        width, core = module.embed_dim, attention.core
        for i, role in enumerate(("query", "key", "value")):
            key, ranges = (core, "in_proj_weight"), ((i * width, (i + 1) * width),)
            if module.in_proj_weight is None:
                key, ranges = (core, f"{role[0]}_proj_weight"), ()
            self._part(Part(key, f"{prefix}.{role}", ranges, block, core))
        self._part(Part((core, f"{output_projection(module)}.weight"), f"{prefix}.output", (), block, core))
        self.taken[attention.end.index] = prefix
        heads = module.num_heads
        self.found.cores.append(
            Core(core, block, heads, heads, module.head_dim, attention.causal and not cross, cross)
        )

    def _functional(self, attention: Attention, prefix: str, block: str, cross: bool) -> None:
        """torch's attention function, called with the weights of other modules (WavLM)."""
        node, core = attention.end, attention.core
        names = {r: node.kwargs.get(f"{r[0]}_proj_weight") for r in ("query", "key", "value")}
        names["output"] = node.args[11] if len(node.args) > 11 else node.kwargs.get("out_proj_weight")
        for role, ref in names.items():
            if isinstance(ref, Ref) and self.graph.values[ref.value].parameters:
                module, _, parameter = self.graph.tape.parameter_name(ref.value, node.module).rpartition(".")
                self._part(Part((module, parameter), f"{prefix}.{role}", (), block, core))
                self._rehome((module, parameter), node)
        self.taken[attention.end.index] = prefix
        heads = node.args[4] if len(node.args) > 4 else 1
        size = self.graph.shape(attention.query)[-1] // heads
        self.found.cores.append(Core(core, block, heads, heads, size, attention.causal and not cross, cross))

    def _rehome(self, key: Key, node: Node) -> None:
        """A weight that a function uses while its own module's forward is never called is a site of the
        user."""
        module = key[0]
        if module not in self.graph.calls and module != node.module and inside(module, node.module):
            below = module[len(node.module) :].lstrip(".")
            self.found.rehomed[key] = (node.module, join(below, key[1]))

    def _part(self, part: Part) -> None:
        self.keys.setdefault(part.key, []).append(part)
        self.found.parts.append(part)

    # ------------------------------------------------------------ what is left

    def _rest(self) -> None:
        """Convolutions, and projections of a block that are neither attention nor MLP: its mixer."""
        for block, call in self._regions():
            if not block:
                continue
            region = self.graph.region(call)
            free = self._free(region)
            for node in free:
                if node.name in CONVOLUTION_CALLS:
                    self._add(node, "convolution", block)
            rest = [n for n in free if n.index not in self.taken]
            taken = [self.taken[i] for i in region if i in self.taken]
            attends = any("attention" in role for role in taken)
            mixes = "convolution" in taken or len(rest) > 2
            if attends or not rest or not mixes:
                continue
            if {r for r in taken if r != "convolution"} and len(rest) < 2:
                continue
            for i, node in enumerate(rest):
                label = "input" if i == 0 else "output" if i == len(rest) - 1 else "inner"
                self._add(node, "mixer", block, (), "", f"mixer.{label}")

    def _siblings(self) -> None:
        """Modules that this input did not reach (experts, blocks) have the roles of their like beside
        them."""
        reached = set(self.keys)
        lists = [n for n, m in self.model.named_modules() if isinstance(m, nn.ModuleList | nn.ModuleDict)]
        for name in reversed(lists):
            children = [join(name, k) for k, _ in self.model.get_submodule(name).named_children()]
            kinds = {type(self.model.get_submodule(c)) for c in children}
            if len(children) < 2 or len(kinds) > 1:
                continue
            known = next((c for c in children if any(inside(key[0], c) for key in self.keys)), None)
            if known is None:
                continue
            for child in children:
                if any(inside(key[0], child) for key in reached | set(self.keys)):
                    continue
                self._copy(known, child)

    def _copy(self, known: str, child: str) -> None:
        swap = lambda name: child + name[len(known) :] if inside(name, known) else name  # noqa: E731
        for part in list(self.found.parts):
            if inside(part.key[0], known) and (swap(part.key[0]), part.key[1]) in self.weights:
                self._part(
                    Part(
                        (swap(part.key[0]), part.key[1]),
                        part.role,
                        part.ranges,
                        swap(part.block),
                        swap(part.core),
                        part.label,
                    )
                )
        for core in list(self.found.cores):
            if inside(core.module, known):
                self.found.cores.append(
                    Core(
                        swap(core.module),
                        swap(core.block),
                        core.heads,
                        core.kv_heads,
                        core.head_dim,
                        core.causal,
                        core.cross,
                    )
                )

    def _copy_sublayers(self) -> None:
        """Blocks that were not reached get the sub-layers of a block of their class that was."""
        for stack in self.found.stacks:
            for block in stack.blocks:
                if self.graph.calls.get(block):
                    continue
                kind = type(self.model.get_submodule(block))
                like = next(
                    (
                        b
                        for b in stack.blocks
                        if self.graph.calls.get(b) and type(self.model.get_submodule(b)) is kind
                    ),
                    None,
                )
                if like is None:
                    continue
                for sub in [s for s in self.found.sublayers if s.block == like]:
                    swap = {
                        f: block + v[len(like) :]
                        for f in ("module", "source", "norm", "core")
                        if inside(v := getattr(sub, f), like) and v
                    }
                    self.found.sublayers.append(type(sub)(**{**vars(sub), **swap, "block": block}))
