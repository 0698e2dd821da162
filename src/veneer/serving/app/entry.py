"""The door: everything that is decided of a request before any route sees it, and the log line after.

Request id, key, size and slowness of the body, and where a browser's page may call from. Plain ASGI, so that
streams and the client's leaving pass through untouched.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError
from .keys import ANYBODY, Key, Keys
from .record import LOGGER, PLACE, Record, record_of
from .settings import Settings

OPEN = {"/", "/health", "/live", "/ready", "/ping", "/startup", "/version", "/openapi.json"}
SLOWEST = 1 << 20  # bytes a second at which a large body has to arrive
POLLED = OPEN | {"/metrics", "/v1/load"}
UPLOADS = {"/v1/adapters", "/v1/files"}
_ID = re.compile(r"[\x21-\x7e]{1,128}")


class Entry:
    """ASGI middleware around all routes."""

    def __init__(
        self, app: ASGIApp, keys: Keys, settings: Settings, observe: Callable[[Record], None]
    ) -> None:
        self.app, self.keys, self.settings, self.observe = app, keys, settings, observe

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {k: v.decode("latin-1") for k, v in scope["headers"]}
        asked = headers.get(b"x-request-id", "")
        record = Record(
            asked if _ID.fullmatch(asked) else uuid.uuid4().hex, scope["method"], scope["path"][:200]
        )
        scope[PLACE] = record
        started = False

        async def send_named(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                record.status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", record.id.encode())]
            await send(message)

        try:
            self._check_origin(headers)
            self._check_key(scope["path"], headers, record)
            limited = self._limited(scope["path"], headers, receive)
            await self.app(scope, limited, send_named)
        except ApiError as error:
            await error.response()(scope, receive, send_named)
        except Exception:
            LOGGER.exception("request %s failed", record.id)
            record.outcome = record.outcome or "error"
            if started:
                raise
            failed = ApiError(500, f"The server failed on this request; its log says more under {record.id}.")
            await failed.response()(scope, receive, send_named)
        finally:
            self.observe(record)
            # Who asks every second whether the server lives would fill the log.
            is_poll = record.path in POLLED and record.status in (200, 503)
            record.log(logging.DEBUG if is_poll else logging.INFO)

    def _check_origin(self, headers: dict[bytes, str]) -> None:
        """A page of another site must not reach a server that is there for this machine alone."""
        host, origin = headers.get(b"host", ""), headers.get(b"origin")
        hosts = self.settings.hosts
        if hosts is not None and _name(host) not in hosts:
            raise ApiError(403, "This server does not answer to that Host; --host names the one it has.")
        is_other = origin is not None and _place(origin) != host.lower()
        if is_other and origin not in self.settings.allow_origins:
            raise ApiError(403, "Pages of other sites may not call this server; --allow-origin lets one.")

    def _check_key(self, path: str, headers: dict[bytes, str], record: Record) -> None:
        if not self.keys.required or path in OPEN or path.startswith("/page/"):
            record.key = ANYBODY
            return
        kind, _, secret = headers.get(b"authorization", "").partition(" ")
        if kind.lower() != "bearer" or not secret:
            raise ApiError(
                401, "A key is needed: Authorization: Bearer KEY.", code="missing_api_key",
                headers={"www-authenticate": "Bearer"},
            )  # fmt: skip
        key = self.keys.find(secret.strip())
        if key is None:
            raise ApiError(
                401, "This key is not known.", code="invalid_api_key", headers={"www-authenticate": "Bearer"}
            )
        record.key = key

    def _limited(self, path: str, headers: dict[bytes, str], receive: Receive) -> Receive:
        """`receive`, for as many bytes and as long as a body may take."""
        most = self.settings.max_upload if path in UPLOADS else self.settings.max_body
        said = headers.get(b"content-length", "0")
        if not said.isdigit() or int(said) > most:
            raise ApiError(413, f"The body is larger than {most:,} bytes.")
        got, is_whole = 0, False
        size = int(said) or most  # of a body in chunks nobody knows it
        until = time.monotonic() + self.settings.body_seconds + size / SLOWEST

        async def counted() -> Message:
            nonlocal got, is_whole
            if is_whole:  # what comes now is the client's leaving
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, until - time.monotonic()))
            except TimeoutError:
                raise ApiError(408, "The body took too long to arrive.") from None
            if message["type"] == "http.request":
                got += len(message.get("body", b""))
                is_whole = not message.get("more_body", False)
                if got > most:
                    raise ApiError(413, f"The body is larger than {most:,} bytes.")
            return message

        return counted


def authorise(scope: str) -> Callable[[Request], Key]:
    """A dependency of routes: the request's key, if it has this scope."""

    def check(request: Request) -> Key:
        key = record_of(request).key
        if scope not in key.scopes:
            raise ApiError(403, f"This key may not {scope}.", code="missing_scope")
        return key

    return check


def _name(host: str) -> str:
    """localhost:8000 -> localhost, [::1]:8000 -> ::1"""
    return (urlsplit("//" + host).hostname or "") if host and not re.search(r"[\s/@]", host) else ""


def _place(origin: str) -> str:
    return origin.lower().partition("://")[2] or origin


def describe(app: Any, needs_key: bool) -> None:
    """The OpenAPI page of `app`: bodies that do not fit are 400, and which routes need a key."""
    make: Callable[[], dict[str, Any]] = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema:
            return app.openapi_schema
        schema = make()
        parts = schema.setdefault("components", {})
        for name in ("HTTPValidationError", "ValidationError"):
            parts.get("schemas", {}).pop(name, None)
        parts["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for path, methods in schema["paths"].items():
            for operation in methods.values():
                operation.get("responses", {}).pop("422", None)
                operation["security"] = [] if path in OPEN or not needs_key else [{"key": []}]
        return schema

    app.openapi = openapi
