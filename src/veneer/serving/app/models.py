"""`/v1/models`: the base and its adapters, each a card. No card says where on the server's disk anything is."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel

from .entry import authorise
from .errors import ApiError, some
from .keys import Key
from .service import Service
from .wire import Json


class AdapterFacts(BaseModel):
    method: str
    version: str
    state: str
    bytes: int | None = None
    score: Any = None


class Card(BaseModel):
    id: str
    object: str
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int
    permission: list[Any]
    adapter: AdapterFacts | None = None


class Cards(BaseModel):
    object: str
    data: list[Card]


def router(service: Service) -> APIRouter:
    routes = APIRouter()
    use = authorise("use")
    refusals = some(401, 403, 404, 503)

    @routes.get("/v1/models", response_model=Cards, responses=refusals, summary="The base and its adapters")
    async def models(key: Key = Depends(use)) -> Any:  # noqa: B008
        return Json({"object": "list", "data": await cards(service, key)})

    @routes.get("/v1/models/{name:path}", response_model=Card, responses=refusals, summary="One of them")
    async def model(name: str, key: Key = Depends(use)) -> Any:  # noqa: B008
        target = await service.target(name, key)
        for card in await cards(service, key):
            if card["id"] == target.name:
                return Json(card)
        raise ApiError(404, f"No model is called {name[:100]!r}.", param="model", code="model_not_found")

    @routes.get("/v1/load", responses=refusals, summary="How busy the server is, for people's pages")
    async def load(http: Request, key: Key = Depends(use)) -> Any:  # noqa: B008
        return Json(busy(service))

    return routes


async def cards(service: Service, key: Key) -> list[dict[str, Any]]:
    base = {
        "id": service.base,
        "object": "model",
        "created": int(service.began),
        "owned_by": "veneer",
        "root": service.base,
        "parent": None,
        "max_model_len": service.engine.max_length,
        "permission": [],
    }
    return [base, *(_card(service, version, base) for version in await service.listed(key))]


def _card(service: Service, version: Any, base: dict[str, Any]) -> dict[str, Any]:
    digest = str(version.digest).removeprefix("sha256:")
    return {
        **base,
        "id": version.name,
        "created": int(version.created),
        "root": f"sha256:{digest}",
        "parent": base["id"],
        "adapter": {
            "method": version.method,
            "version": f"sha256:{digest}",
            "state": version.state,
            "bytes": version.bytes,
            "score": version.score,
        },
    }


def busy(service: Service) -> dict[str, Any]:
    """Plain numbers of the engine; no name of an adapter or a key."""
    stats = service.engine.stats()
    tokens = sum(c.get("generated", 0) for c in stats.get("tokens", {}).values())
    names = ("rows", "queue", "slots", "adapters_running", "steps", "resident_bytes", "cache_bytes")
    in_memory = sum(r["bytes"] > 0 for r in stats.get("residents", {}).values())
    return {
        **{n: stats.get(n, 0) for n in names},
        "generated": tokens,
        "in_memory": in_memory,
        "training": service.training,
    }
