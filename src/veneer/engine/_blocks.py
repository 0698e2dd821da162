"""Blocks carry the frame through checkpointing and leave taps; batch statistics stay the base's."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from ._around import leave
from ._frame import Frame, current, entered, local
from ._outputs import first, with_first
from ._swap import HOST, NAME, kind, twin


@kind("block")
def _block(base: type) -> dict[str, Any]:
    plain, plain_call = base.forward, base.__call__  # type: ignore[attr-defined]

    @functools.wraps(plain)
    def forward(self: Any, *args: Any, _veneer_frame: Frame | None = None, **kwargs: Any) -> Any:
        if _veneer_frame is None or local.frame is _veneer_frame:
            return plain(self, *args, **kwargs)
        with entered(_veneer_frame):  # recomputation, maybe on another thread
            return plain(self, *args, **kwargs)

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        frame = current(self.__dict__[HOST])
        if frame is None:
            return plain_call(self, *args, **kwargs)
        if self.training and torch.is_grad_enabled():
            kwargs["_veneer_frame"] = frame
        if frame.taps is None and frame.prefix is None:
            return _slowly(self, plain_call, args, kwargs)
        stack, block = _block_number(self)
        run = functools.partial(_slowly, self, plain_call, args, kwargs)
        if frame.prefix is not None and frame.prefix.prefix.stack == stack:
            entering = args[0] if args else kwargs.get("hidden_states")
            run = functools.partial(frame.prefix.block, block, entering, run)
        if frame.taps is None:
            return run()
        taps = frame.taps.setdefault(stack, {})
        if block == 0:
            entering = args[0] if args else kwargs.get("hidden_states")
            if isinstance(entering, Tensor):
                taps[-1] = entering.detach()
        y = run()
        taps[block] = first(y).detach()  # outside of the checkpoint, so that recomputation leaves it alone
        ops = frame.program.get(self.__dict__[NAME])
        for op in ops.exit if ops is not None else ():
            y = with_first(y, leave(op, frame, first(y)))
        return y

    return {"forward": forward, "__call__": __call__}


def _block_number(module: nn.Module) -> tuple[str, int]:
    host = module.__dict__[HOST]
    found = host.__dict__.get("_block_numbers")
    if found is None:
        found = {b: (s, i) for s, blocks in host.anatomy.facts.blocks for i, b in enumerate(blocks)}
        host.__dict__["_block_numbers"] = found
    return found[module.__dict__[NAME]]


def without_fast_path(plain: Any, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """`plain` of a module, its children called one by one."""
    return _slowly(module, plain, args, kwargs)


def _slowly(module: nn.Module, plain_call: Any, args: tuple, kwargs: dict) -> Any:
    """torch's own encoder layer has a fused path that never calls its children; edits inside need the other one."""
    if not isinstance(module, nn.TransformerEncoderLayer) or module.training:
        return plain_call(module, *args, **kwargs)
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        return plain_call(module, *args, **kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@kind("statistics")
def _statistics(base: type) -> dict[str, Any]:
    """Normalisation over the batch keeps the base's running statistics: they are part of the frozen base."""
    plain = base.forward  # type: ignore[attr-defined]

    @functools.wraps(plain)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.training or self.__dict__[HOST].update_statistics or not self.track_running_stats:
            return plain(self, *args, **kwargs)
        return plain(twin(self, {}, training=False), *args, **kwargs)

    return {"forward": forward}
