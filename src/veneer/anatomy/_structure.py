"""What the modules of a model are by themselves: which hold weights, of what kind and shape.

Nothing here runs the model. A module is known by its class where torch defines the class, else by what it
holds (`in_features`, `nf`, a single vector called weight), never by the name it has inside of its parent.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase, nn.RMSNorm, nn.LocalResponseNorm)
_RECURRENT = (nn.RNNBase, nn.RNNCellBase)


@dataclass(frozen=True)
class Weight:
    """One weight as a method sees it: `shape` is (out, in) for every matrix; `experts` is its leading
    axis."""

    module: str
    kind: str
    parameter: str = "weight"
    bias: str = ""
    shape: tuple[int, ...] = ()
    transposed: bool = False
    groups: int = 1
    experts: int = 0
    n_in: int = 0
    n_out: int = 0

    @property
    def key(self) -> tuple[str, str]:
        return self.module, self.parameter


def join(module: str, parameter: str) -> str:
    """The dotted name of a parameter (or child) of a module; the root is ''."""
    return f"{module}.{parameter}" if module and parameter else module or parameter


def parent(name: str) -> str:
    return name.rpartition(".")[0]


def inside(name: str, ancestor: str) -> bool:
    """Whether `name` is `ancestor` or lies below it; everything lies below the root ''."""
    return not ancestor or name == ancestor or name.startswith(ancestor + ".")


def class_names(module: nn.Module) -> set[str]:
    return {c.__name__ for c in type(module).__mro__}


def is_norm(module: nn.Module) -> bool:
    """A torch norm, or a leaf of a class called ...Norm... with at most one vector `weight` and its bias."""
    if isinstance(module, _NORMS):
        return True
    if any(True for _ in module.children()):
        return False
    named = any("norm" in name.lower() for name in class_names(module))
    return named and all(p.ndim <= 1 for p in module.parameters(recurse=False))


def _shape(module: nn.Module, name: str) -> tuple[int, ...]:
    return tuple(getattr(module, name).shape)


def _holds(module: nn.Module, name: str) -> bool:
    return isinstance(getattr(module, name, None), torch.Tensor)


def _bias(module: nn.Module) -> str:
    return "bias" if _holds(module, "bias") else ""


def weight_of(name: str, module: nn.Module) -> Iterator[Weight]:
    """The weights that `module` holds itself and that have a known kind."""
    if isinstance(module, nn.MultiheadAttention):
        yield from _multihead(name, module)
    elif isinstance(module, _RECURRENT):
        yield from _recurrent(name, module)
    elif isinstance(module, _CONVOLUTIONS):
        shape = _shape(module, "weight")
        n_out, n_in = module.out_channels, module.in_channels
        yield Weight(name, "conv", "weight", _bias(module), shape, False, module.groups, 0, n_in, n_out)
    elif isinstance(module, nn.Embedding) and _holds(module, "weight"):
        rows, width = module.num_embeddings, module.embedding_dim
        yield Weight(name, "embedding", "weight", "", (rows, width), n_in=rows, n_out=width)
    elif isinstance(module, nn.Bilinear):
        return
    elif hasattr(module, "in_features") and hasattr(module, "out_features") and _holds(module, "weight"):
        # Sizes from the attributes: a quantised weight is stored packed.
        n_out, n_in = int(module.out_features), int(module.in_features)  # type: ignore[arg-type]
        yield Weight(name, "linear", "weight", _bias(module), (n_out, n_in), n_in=n_in, n_out=n_out)
    elif hasattr(module, "nf") and _holds(module, "weight") and module.weight.ndim == 2:
        n_in, n_out = _shape(module, "weight")
        yield Weight(name, "conv1d", "weight", _bias(module), (n_out, n_in), True, n_in=n_in, n_out=n_out)
    elif is_norm(module):
        holds = _holds(module, "weight")
        shape = _shape(module, "weight") if holds else ()
        size = shape[0] if shape else 0
        yield Weight(name, "norm", "weight" if holds else "", _bias(module), shape, n_in=size, n_out=size)
    else:
        yield from _plain(name, module)


def _multihead(name: str, module: nn.MultiheadAttention) -> Iterator[Weight]:
    width = module.embed_dim
    bias = "in_proj_bias" if module.in_proj_bias is not None else ""
    if module.in_proj_weight is not None:
        yield Weight(
            name, "parameter", "in_proj_weight", bias, (3 * width, width), n_in=width, n_out=3 * width
        )
    else:
        for part in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
            n_out, n_in = _shape(module, part)
            yield Weight(name, "parameter", part, "", (n_out, n_in), n_in=n_in, n_out=n_out)
    # The forward of its output projection is never called, a function takes the weight: a weight of this
    # module.
    child = output_projection(module)
    bias = f"{child}.bias" if module.out_proj.bias is not None else ""
    yield Weight(name, "parameter", f"{child}.weight", bias, (width, width), n_in=width, n_out=width)


def output_projection(module: nn.MultiheadAttention) -> str:
    """The name under which torch's attention keeps its output projection."""
    return next(key for key, child in module.named_children() if child is module.out_proj)


def _recurrent(name: str, module: nn.Module) -> Iterator[Weight]:
    for parameter, p in module.named_parameters(recurse=False):
        if parameter.startswith("weight") and p.ndim == 2:
            bias = parameter.replace("weight", "bias")
            bias = bias if _holds(module, bias) else ""
            n_out, n_in = p.shape
            yield Weight(name, "recurrent", parameter, bias, (n_out, n_in), n_in=n_in, n_out=n_out)


def _plain(name: str, module: nn.Module) -> Iterator[Weight]:
    """Matrices held as bare parameters: (E, out, in) is taken for experts, (out, in) for a matrix.

    A trace of the model decides later how the matrix is used (`_by_trace`), this is the usual way.
    """
    for parameter, p in module.named_parameters(recurse=False):
        if "bias" in parameter:
            continue
        bias = parameter + "_bias" if _holds(module, parameter + "_bias") else ""
        if parameter == "weight":
            bias = _bias(module)
        if p.ndim == 3 and p.shape[0] > 1:
            experts, n_out, n_in = p.shape
            yield Weight(name, "experts", parameter, bias, (n_out, n_in), False, 1, experts, n_in, n_out)
        elif p.ndim == 2:
            n_out, n_in = p.shape
            yield Weight(name, "parameter", parameter, bias, (n_out, n_in), n_in=n_in, n_out=n_out)


def weights(model: nn.Module) -> dict[tuple[str, str], Weight]:
    """All weights of known kind, by (module, parameter), in the order of the modules."""
    found: dict[tuple[str, str], Weight] = {}
    covered: set[str] = set()  # weights that an enclosing module uses by itself
    for name, module in model.named_modules():
        for weight in weight_of(name, module):
            full = join(weight.module, weight.parameter)
            if full in covered:
                continue
            if "." in weight.parameter:
                covered.add(full)
            found[weight.key] = weight
    return found


def tied_parameters(model: nn.Module) -> tuple[list[tuple[str, str]], dict[str, str]]:
    """Pairs of names of one tensor, and for each name the first name of its tensor."""
    first: dict[int, str] = {}
    pairs, canonical = [], {}
    for name, p in model.named_parameters(remove_duplicate=False):
        if id(p) in first:
            pairs.append((first[id(p)], name))
        canonical[name] = first.setdefault(id(p), name)
    return pairs, canonical


def containers(model: nn.Module) -> dict[str, list[str]]:
    """Lists of composite modules: container -> its children, in order; the places where blocks are kept."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential | nn.ModuleDict):
            children = [(join(name, key), child) for key, child in module.named_children()]
            composite = [key for key, child in children if _is_composite(child)]
            if composite and len(composite) == len(children):
                found[name] = composite
    return found


def _is_composite(module: nn.Module) -> bool:
    return any(True for _ in module.children()) and any(True for _ in module.parameters())


def is_homogeneous(model: nn.Module, children: list[str]) -> bool:
    return len({type(model.get_submodule(name)) for name in children}) == 1
