"""Whether the server lives, whether it is ready, its version and its metrics."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel
from starlette.responses import Response

import veneer

from .entry import authorise
from .errors import some
from .keys import Key
from .service import Service
from .wire import Json


class VersionBody(BaseModel):
    version: str


def router(service: Service) -> APIRouter:
    routes = APIRouter()

    async def health() -> Response:
        """The process and its engine live. Reading the base counts as living."""
        is_open = getattr(service.engine, "is_open", True)
        return Response(status_code=200 if not is_open or service.engine.alive else 503)

    async def ready() -> Response:
        """Requests are taken: the base is in memory, and the server is not stopping."""
        return Response(status_code=200 if service.is_ready else 503)

    for path in ("/health", "/live"):
        _looked_at(routes, path, health)
    for path in ("/ready", "/ping", "/startup"):
        _looked_at(routes, path, ready)

    @routes.get("/version", response_model=VersionBody)
    async def version() -> Any:
        return Json({"version": veneer.__version__})

    refusals = some(401, 403)

    @routes.get("/metrics", response_class=Response, responses=refusals, summary="For Prometheus")
    async def metrics(http: Request, key: Key = Depends(authorise("use"))) -> Response:  # noqa: B008
        # On another thread: the engine's numbers may have to be waited for.
        body, kind = await asyncio.to_thread(service.metrics.text, http.headers.get("accept", ""))
        return Response(body, headers={"content-type": kind})

    return routes


def _looked_at(routes: APIRouter, path: str, answer: Callable[..., Any]) -> None:
    """GET, and HEAD as some balancers do."""
    not_yet: dict[int | str, dict[str, Any]] = {503: {"description": "Not now"}}
    routes.add_api_route(path, answer, response_class=Response, responses=not_yet, name=path[1:])
    routes.add_api_route(path, answer, methods=["HEAD"], include_in_schema=False, name=path[1:] + "-head")
