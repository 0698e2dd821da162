"""Law 12: compiled code is the same function, in one graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from veneer import engine

from .._law import Broken, agree, law
from .._subject import Subject


class Counter:
    """A backend that runs what it is given, and counts graphs."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.graphs += 1
        return graph.forward


@law(12, "compile")
def compile(s: Subject) -> str:
    """Compiled (one full graph) equals eager; a switch and a shuffle of rows make no new graph."""
    model = s.model()
    s.attach(model, "a", 1)
    s.attach(model, "b", 2)
    contents = s.base.contents(4)
    counter = Counter()
    torch._dynamo.reset()
    try:
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        whole = [_whole(s, model, compiled, contents, n) for n in ("a", "b", "a")]
        first = counter.graphs
        worst = max(agree(f, e, f"compiled against eager, '{n}' active") for (f, e), n in zip(whole, "aba"))
        if first != 1:
            raise Broken(f"a switch from 'a' to 'b' makes {first} graphs in place of one", first)
        for names in (["a", None, "b", "a"], ["b", "a", None, "a"], [None, "b", "b", "a"]):
            found, expected = _rows(s, model, compiled, contents, names)
            worst = max(worst, agree(found, expected, f"compiled against eager, rows {names}"))
        if counter.graphs - first > 1:
            raise Broken(
                f"shuffles of rows make {counter.graphs - first} graphs in place of one",
                counter.graphs - first,
            )
    finally:
        torch._dynamo.reset()
    return f"{counter.graphs} graphs, {worst:.1e}"


@torch.no_grad()
def _whole(s: Subject, model: nn.Module, compiled: Any, contents: Any, name: str) -> tuple[Any, Any]:
    engine.activate(model, name)
    return _both(s, model, compiled, contents)


@torch.no_grad()
def _rows(s: Subject, model: nn.Module, compiled: Any, contents: Any, names: Any) -> tuple[Any, Any]:
    with engine.rows(model, names):
        return _both(s, model, compiled, contents)


def _both(s: Subject, model: nn.Module, compiled: Any, contents: Any) -> tuple[Any, Any]:
    inputs = s.inputs(contents)
    return _logits(compiled(**inputs)), _logits(model(**inputs))


def _logits(y: Any) -> torch.Tensor:
    return y if isinstance(y, torch.Tensor) else y["logits"]
