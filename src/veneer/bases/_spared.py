"""Weights that lie in a mapped file: read from there by whoever asks for them, and no memory while nobody does.

The one idea: the mapping is shared, so its pages may be dropped at any time, and the next read brings back what was
written. A parameter stays the parameter that it was; only its storage is another.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from veneer._disk import mapped

# weight -> its room in a file: held as long as the weight, so that nothing else gets that address meanwhile
_ROOMS: Any = WeakTensorKeyDictionary()


def into_file(weight: Tensor) -> bool:
    """Move a weight on the CPU into a file that has no name any more; False where it cannot be. In place."""
    if weight.device.type != "cpu" or not weight.is_contiguous() or _advise() is None:
        return False
    if lies_in_file(weight):
        return True
    try:
        room = mapped(weight.numel(), weight.dtype)
    except OSError:
        return False
    with torch.no_grad():
        weight.data = room.view(weight.shape).copy_(weight)
    _ROOMS[weight] = room
    let_go(weight)
    return True


def into_memory(weight: Tensor) -> None:
    """Bring a weight back that lies in a file."""
    if lies_in_file(weight):
        with torch.no_grad():
            weight.data = weight.detach().clone()
    _ROOMS.pop(weight, None)


def lies_in_file(weight: Tensor) -> bool:
    room = _ROOMS.get(weight)
    return room is not None and room.data_ptr() == weight.data_ptr()


def let_go(weight: Tensor) -> None:
    """Drop the pages of a weight in a file of ours; nothing for any other, whose pages may be the only ones."""
    advise = _advise()
    if advise is not None and lies_in_file(weight):
        advise(weight.data_ptr(), weight.nbytes, mmap.MADV_DONTNEED)


@functools.cache
def _advise() -> Any:
    """libc's madvise(address, bytes, advice), None where there is none."""
    if not hasattr(mmap, "MADV_DONTNEED"):
        return None
    with contextlib.suppress(OSError, AttributeError):
        found = ctypes.CDLL(None).madvise
        found.argtypes, found.restype = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int], ctypes.c_int
        return found
    return None
