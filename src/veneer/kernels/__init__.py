"""Kernels: products of a batch with the low-rank factors of many adapters, gathered by row or by segment.

The one idea: each has a form in plain PyTorch that is its reference and its fallback; a kernel is used only where it
was tried on the device and gave what the reference gives.
"""

from ._ready import ready
from ._reference import bgmv_reference, sgmv_reference
from ._tiles import Tiles, padded, tiles_of

__all__ = ["Tiles", "bgmv", "bgmv_reference", "padded", "ready", "sgmv", "sgmv_reference", "tiles_of"]


def __getattr__(name: str) -> object:
    if name in ("bgmv", "sgmv"):  # they need triton
        from . import _triton

        return getattr(_triton, name)
    raise AttributeError(f"module 'veneer.kernels' has no attribute '{name}'")
