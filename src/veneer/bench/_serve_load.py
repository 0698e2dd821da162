"""The load generator of `veneer bench serve`, run by its path as a process of its own: it imports nothing of veneer.

A line of JSON on standard input is a plan: {"url", "at_once", "requests": [{"model", "prompt", "max_tokens"}]}, and
"fields" that go into every request, where there are others than those of veneer. A line
on standard output answers it: seconds of the whole, and of each request when it began, spoke first, and ended.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

import httpx

FIELDS = {"stream": True, "temperature": 0, "ignore_eos": True}


async def ask(client: httpx.AsyncClient, free: asyncio.Semaphore, body: dict[str, Any]) -> dict[str, Any]:
    """One streamed completion; seconds since the beginning of the plan are made by the caller."""
    async with free:
        began, first = time.perf_counter(), None
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                await answer.aread()
                raise RuntimeError(f"{answer.status_code}: {answer.text[:300]}")
            async for line in answer.aiter_lines():
                if first is None and line.startswith("data: {"):
                    first = time.perf_counter()
        return {"model": body["model"], "began": began, "first": first, "ended": time.perf_counter()}


async def run(plan: dict[str, Any]) -> dict[str, Any]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=plan["url"], timeout=600, limits=limits) as client:
        free = asyncio.Semaphore(plan["at_once"])
        began = time.perf_counter()
        rows = await asyncio.gather(
            *(ask(client, free, {**r, **plan.get("fields", FIELDS)}) for r in plan["requests"])
        )
    for row in rows:
        row.update({name: row[name] - began for name in ("began", "first", "ended")})
    return {"seconds": time.perf_counter() - began, "rows": rows}


def main() -> None:
    for line in sys.stdin:
        print(json.dumps(asyncio.run(run(json.loads(line)))), flush=True)


if __name__ == "__main__":
    main()
