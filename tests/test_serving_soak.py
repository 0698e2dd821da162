"""A soak of the server: everything that clients and operators do, at random and at once, and kills of the process.

It takes VENEER_SOAK_SECONDS seconds (60); `VENEER_SOAK_SECONDS=600 pytest tests/test_serving_soak.py` is the long one.
"""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path

import httpx
import pytest

from serving_soak import Soak, World, fresh_server
from serving_tools import until

SECONDS = float(os.environ.get("VENEER_SOAK_SECONDS", "60"))
SEED = int(os.environ.get("VENEER_SOAK_SEED", "0"))
GROWTH = 0.1  # of resident memory, over the last life of the process, after its first third


@pytest.mark.slow
def test_a_soak_loses_nothing_mixes_nothing_and_does_not_grow(tmp_path: Path) -> None:
    world = World(tmp_path)
    with fresh_server(world, tmp_path) as server:
        server.start()
        soak = Soak(world, server, SEED)
        sizes: list[int] = []
        with soak.running():
            for _ in range(2):
                time.sleep(SECONDS / 4)
                server.kill()
                server.start()
            end = time.monotonic() + SECONDS / 2
            while time.monotonic() < end:
                time.sleep(SECONDS / 200)
                sizes.append(server.memory)
        soak.nothing_is_lost()
        load = {}

        def is_idle() -> bool:
            load.update(httpx.get(server.url + "/v1/load", timeout=10).json())
            return load["rows"] == load["queue"] == 0

        assert until(is_idle, 20), f"rows are left over: {load}"
        print(dict(soak.counts), f"memory {sizes[0] / 1e6:.0f} to {sizes[-1] / 1e6:.0f} MB")
        assert soak.faults == []
        third = len(sizes) // 3
        early, late = statistics.median(sizes[third : 2 * third]), statistics.median(sizes[2 * third :])
        assert late - early < GROWTH * early, f"memory grew from {early / 1e6:.1f} to {late / 1e6:.1f} MB"
        for kind in ("answers", "uploads", "moves", "removes", "disconnects", "malformed", "jobs"):
            assert soak.counts[kind] > 0, f"no {kind}: {soak.counts}"
        assert soak.counts["differing answers"] <= 0.005 * soak.counts["answers"]
        assert server.end() == 0
