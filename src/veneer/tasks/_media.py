"""Pictures and sounds as tensors, from paths, bytes or arrays."""

from __future__ import annotations

import io
import wave
from collections.abc import Mapping
from math import gcd
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer.errors import BadData, missing_package


def picture(value: Any) -> Any:
    """A PIL image in RGB from a path, bytes, {"bytes" or "path"}, an array (height, width[, 3]) or an
    image.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise missing_package("pillow", "vision", "reading pictures") from error
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    try:
        if isinstance(value, (str, Path)):
            return Image.open(value).convert("RGB")
        if isinstance(value, bytes):
            return Image.open(io.BytesIO(value)).convert("RGB")
        if hasattr(value, "convert"):
            return value.convert("RGB")
        import numpy as np

        array = np.asarray(value)
        if array.dtype != np.uint8:
            array = (array * (255 if array.max() <= 1 else 1)).astype(np.uint8)
        return Image.fromarray(array).convert("RGB")
    except (OSError, ValueError, TypeError) as error:
        raise BadData(
            f"the picture {str(value)[:60]!r} cannot be read: {error}",
            next_step="veneer check DATA    lists every row that cannot be read",
        ) from error


def pixels(image: Any, size: tuple[int, int], mean: Any, std: Any) -> Tensor:
    """(3, height, width), resized, less the mean of a model's training pictures, over their deviation."""
    import numpy as np
    from PIL import Image

    resized = image.resize((size[1], size[0]), Image.Resampling.BICUBIC)
    found = torch.from_numpy(np.asarray(resized, dtype="float32").copy()).permute(2, 0, 1) / 255
    return (found - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def sound(value: Any, rate: int) -> Any:
    """A float32 array of one channel at `rate` Hz, from a WAV file, bytes, {"array", "sampling_rate"} or an
    array.
    """
    import numpy as np

    if isinstance(value, Mapping) and value.get("array") is not None:
        return resampled(
            np.asarray(value["array"], dtype="float32"), int(value.get("sampling_rate", rate)), rate
        )
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if not isinstance(value, (str, Path, bytes)):
        return np.asarray(value, dtype="float32")
    try:
        with wave.open(io.BytesIO(value) if isinstance(value, bytes) else str(value)) as file:
            width, channels, own = file.getsampwidth(), file.getnchannels(), file.getframerate()
            data = file.readframes(file.getnframes())
    except (OSError, EOFError, wave.Error) as error:
        raise BadData(
            f"the sound {str(value)[:60]!r} cannot be read: {error}.", next_step="convert it to WAV (PCM)"
        ) from error
    kind, scale = {1: ("u1", 128.0), 2: ("<i2", 32768.0), 4: ("<i4", 2147483648.0)}.get(width, ("", 0.0))
    if not kind:
        raise BadData(
            f"the sound has {8 * width} bits a sample; expected 8, 16 or 32.",
            next_step="sox in.wav -b 16 out.wav",
        )
    found = np.frombuffer(data, dtype=kind).astype("float32") / scale - (1.0 if width == 1 else 0.0)
    return resampled(found.reshape(-1, channels).mean(1), own, rate)


def resampled(samples: Any, own: int, rate: int) -> Any:
    if own == rate:
        return samples
    try:
        from scipy.signal import resample_poly
    except ImportError as error:
        raise missing_package("scipy", "train", f"changing {own} Hz to {rate} Hz") from error
    shared = gcd(own, rate)
    return resample_poly(samples, rate // shared, own // shared).astype("float32")
