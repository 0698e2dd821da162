"""What a process used of its machine: memory at the highest, energy, and what the machine is.

The high-water mark is the kernel's own (nothing is sampled, so that no peak is missed), and on Linux it can be
set back to the present, which is what makes "above the loaded model" measurable.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SHARED = 0
"""Bytes of libraries that a forked process uses and its own count leaves out: the nursery sets it."""
RAPL = Path("/sys/class/powercap")


def resident_bytes() -> int:
    """Memory that this process holds now."""
    import psutil

    return int(psutil.Process().memory_info().rss) + SHARED


def high_water_bytes() -> int:
    """The most that this process held since its start, or since `reset_high_water`."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1]) + SHARED
    except OSError:
        pass
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def reset_high_water() -> bool:
    """Set the mark to what is held now; False where the system does not offer it (proc(5), clear_refs)."""
    release_freed()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def release_freed() -> None:
    """Give memory that was freed back to the system, so that what is held is what is used."""
    import gc

    gc.collect()
    if sys.platform.startswith("linux"):
        with contextlib.suppress(AttributeError, OSError):  # a C library without it
            ctypes.CDLL(None).malloc_trim(0)


def available_bytes() -> int:
    """Memory that a further process can have without swapping."""
    import psutil

    return int(psutil.virtual_memory().available)


def energy_counters(root: Path = RAPL) -> dict[str, tuple[int, int]]:
    """{processor package: (microjoules, where the counter wraps)}; empty where none can be read.

    Only whole packages are taken (`intel-rapl:0`, also on AMD); their parts would be counted twice.
    """
    found = {}
    for zone in sorted(root.glob("intel-rapl:*")):
        if zone.name.count(":") != 1:
            continue
        try:
            now = int((zone / "energy_uj").read_text())
            found[zone.name] = (now, int((zone / "max_energy_range_uj").read_text()))
        except (OSError, ValueError):  # readable by root alone, on most machines
            continue
    return found


def joules(before: Mapping[str, tuple[int, int]], after: Mapping[str, tuple[int, int]]) -> float | None:
    """Energy between two readings, a counter that wrapped once included; None without counters."""
    shared = before.keys() & after.keys()
    if not shared:
        return None
    used = 0
    for zone in shared:
        change = after[zone][0] - before[zone][0]
        used += change if change >= 0 else change + after[zone][1]
    return used / 1e6


def machine(device: str = "cpu") -> dict[str, Any]:
    """The name of the processor, cores, memory, system and torch's version."""
    import psutil
    import torch

    is_cuda = device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name(device) if is_cuda else "cpu",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_bytes": int(psutil.virtual_memory().total),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
