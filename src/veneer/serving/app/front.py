"""The page at `/`: adapters, a playground that asks several of them side by side, and the live load.

Three files that are sent as they are. The page fetches nothing from elsewhere and asks the same routes as any client.
"""

from __future__ import annotations

import hashlib
from importlib import resources

from fastapi import APIRouter, Request
from starlette.responses import Response

FILES = {
    "index.html": "text/html; charset=utf-8",
    "page.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
}
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'self'"
    ),
    "cache-control": "no-cache",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


def router() -> APIRouter:
    routes = APIRouter(include_in_schema=False)
    for name in FILES:
        _route(routes, "/" if name == "index.html" else f"/page/{name}", name)
    return routes


def _route(routes: APIRouter, path: str, name: str) -> None:
    content = resources.files(__package__).joinpath("page", name).read_bytes()
    tag = '"' + hashlib.sha256(content).hexdigest()[:16] + '"'

    async def send(request: Request) -> Response:
        headers = {**HEADERS, "etag": tag}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=FILES[name], headers=headers)

    routes.add_api_route(path, send, methods=["GET"], name=name)
