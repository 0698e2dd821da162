"""Edits: what a method is written with. Ports, declared tensors, building blocks; pure functions that know no model."""

from veneer.anatomy import Site

from ._at import At, parse_positions
from ._blocks import (
    ACTIVATIONS,
    TrainedCopy,
    before,
    block_diagonal,
    bottleneck,
    dropout,
    layer_norm,
    masked_mean,
    open_before,
    repeat_heads,
    running_mean,
    skew,
    split_heads,
)
from ._method import (
    FUNCTIONS,
    PORTS,
    AttentionMethod,
    ExitMethod,
    Facts,
    InputMethod,
    Method,
    OutputMethod,
    Sites,
    TokensMethod,
    WeightMethod,
    build,
    call,
    delta_of,
    hyper,
    lookup,
    method,
    registry,
    resolve,
)
from ._spec import (
    Spec,
    Specs,
    constant,
    from_base,
    kaiming,
    noise,
    normal,
    ones,
    orthogonal,
    orthonormal_rows,
    truncated_normal,
    uniform,
    xavier,
    zeros,
)
from ._tensors import Tensors, add_row_axis

__all__ = [name for name in dir() if not name.startswith("_")]
