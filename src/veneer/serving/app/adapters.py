"""Adapters over HTTP: registered, listed, moved, taken back and removed while the server runs; vLLM's routes too.

The routes only translate. What may be read and what an adapter must be is the registry's; what it takes to serve one
is the engine's. Both may wait for a disk, so they are called on threads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile

from veneer.errors import BadFile, BadOption, UnknownAdapter, VeneerError

from .._registry import Registry, Version
from .._registry_content import allowed_folder, is_adapter
from .._registry_engine import Adapters, gone_from, ready_on
from .errors import as_api_error, without_paths

LARGEST_UPLOAD = 1 << 30  # bytes


class NewAdapter(BaseModel):
    """An adapter in a folder that the server may read."""

    model_config = ConfigDict(extra="forbid")
    name: str = Field(description="the name that clients ask for")
    path: str = Field(description="a folder under one of those that adapters may be read from")


class AliasChange(BaseModel):
    """Where a name should point: to a version, or back to the one before."""

    model_config = ConfigDict(extra="forbid")
    version: str | None = Field(None, description="a digest or its first digits, of the name's history")
    rollback: bool = False


class LoadBody(BaseModel):
    """vLLM's body of /v1/load_lora_adapter."""

    lora_name: str | None = None
    lora_path: str | None = None
    load_inplace: bool = False


class UnloadBody(BaseModel):
    """vLLM's body of /v1/unload_lora_adapter."""

    lora_name: str | None = None
    lora_int_id: int | None = None


def card(found: Version) -> dict[str, Any]:
    """A version as the API shows it: no path of the server is in it."""
    base = {k: without_paths(str(v)) for k, v in found.base.items()}
    return {
        "id": found.name or found.digest, "object": "adapter", "version": f"sha256:{found.digest}",
        "method": found.method, "task": found.task, "bytes": found.bytes, "base": base,
        "created": int(found.created), "score": found.score, "metric": found.metric, "state": found.state,
        "reason": found.reason and without_paths(found.reason),
    }  # fmt: skip


def router(
    engine: Adapters,
    registry: Registry,
    authorise: Callable[[str], Callable[..., Any]],
    *,
    largest_upload: int = LARGEST_UPLOAD,
) -> APIRouter:
    """The routes. authorise: scope ("use" or "manage") -> the dependency that lets a request in, or raises."""
    made = APIRouter(tags=["adapters"])
    use, manage = Depends(authorise("use")), [Depends(authorise("manage"))]
    keeper = _Keeper(engine, registry)

    @made.get("/v1/adapters")
    async def list_adapters(key: Any = use) -> Response:
        """Every name and the version that it points to."""
        return await _answered(lambda: keeper.listed(key))

    @made.get("/v1/adapters/{name}")
    async def get_adapter(name: str, key: Any = use) -> Response:
        """One name: its version, its earlier ones, and its history."""
        return await _answered(lambda: keeper.described(name, key))

    @made.post("/v1/adapters", dependencies=manage, status_code=201, openapi_extra=_BODIES)
    async def add_adapter(request: Request) -> Response:
        """Register an adapter, from a folder on the server (JSON) or uploaded as one archive (multipart)."""
        try:
            name, source = await _source(request, largest_upload)
        except VeneerError as error:
            return _refusal(error)
        return await _answered(lambda: card(keeper.register(name, source)), 201)

    @made.put("/v1/adapters/{name}/alias", dependencies=manage)
    async def move_alias(name: str, change: AliasChange) -> Response:
        """Point a name to another of its versions, or back to the one before, in one step."""
        return await _answered(lambda: card(keeper.move(name, change)))

    @made.delete("/v1/adapters/{name}", dependencies=manage)
    async def remove_adapter(name: str) -> Response:
        """Take a name away. Requests that run end with what they began with."""
        return await _answered(lambda: keeper.removed(name))

    for prefix in ("/v1", ""):
        _vllm(made, prefix, keeper, manage)
    return made


class _Keeper:
    """Registry and engine together: a name points to a version only when the engine knows it."""

    def __init__(self, engine: Adapters, registry: Registry) -> None:
        self.registry, self.ready, self.gone = registry, ready_on(engine), gone_from(engine)

    def register(self, name: str, source: str | bytes) -> Version:
        return self.registry.register(name, source, ready=self.ready)

    def listed(self, key: Any) -> dict[str, Any]:
        return {"object": "list", "data": [card(v) for v in self.registry.versions() if _sees(key, v.name)]}

    def described(self, name: str, key: Any) -> dict[str, Any]:
        registry = self.registry
        found = registry.aliases().get(name) or registry.resolve(name)
        if not _sees(key, found.name):
            raise UnknownAdapter(
                f"no adapter is called '{name[:150]}'.", next_step="GET /v1/adapters    lists them"
            )
        moves = [
            {"at": m.at, "action": m.action, "version": m.digest and f"sha256:{m.digest}"}
            for m in registry.history(found.name)
        ]
        return {
            **card(found),
            "versions": [card(v) for v in registry.versions_of(found.name)],
            "history": moves,
        }

    def move(self, name: str, change: AliasChange) -> Version:
        if change.rollback == (change.version is not None):
            raise BadOption(
                "expected either a version or a rollback.",
                next_step='{"version": "DIGEST"} or {"rollback": true}',
            )
        if change.version is None:
            return self.registry.rollback(name, ready=self.ready)
        return self.registry.move(name, change.version, ready=self.ready)

    def removed(self, name: str) -> dict[str, Any]:
        self.remove(name)
        return {"id": name, "object": "adapter", "deleted": True}

    def remove(self, name: str) -> None:
        self.registry.remove(name, gone=self.gone)


def _sees(key: Any, name: str) -> bool:
    """A key may be for some adapters alone."""
    allowed = getattr(key, "adapters", None)
    return allowed is None or name in allowed


async def _source(request: Request, largest: int) -> tuple[str, str | bytes]:
    """(name, path or archive) of a body in one of the two forms."""
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > largest + (1 << 20):
        raise BadFile(
            f"the body has {int(declared):,} bytes, and at most {largest:,} are taken.",
            next_step="put the folder where --adapters looks, and name its path",
        )
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        return _new_adapter(await request.body())
    form = await request.form(max_files=1, max_fields=8)
    name, archive = form.get("name"), form.get("archive")
    if not isinstance(name, str) or not isinstance(archive, UploadFile):
        raise BadOption("expected the fields 'name' (a text) and 'archive' (a zip or tar file).",
                        next_step="curl -F name=mine -F archive=@adapter.zip")  # fmt: skip
    data = await archive.read(largest + 1)
    if len(data) > largest:
        raise BadFile(f"the archive has more than {largest:,} bytes.", next_step="a smaller adapter")
    return name, data


def _new_adapter(body: bytes) -> tuple[str, str]:
    try:
        asked = NewAdapter.model_validate_json(body)
    except ValueError as error:
        first = error.errors()[0] if hasattr(error, "errors") else {"loc": (), "msg": "no JSON"}
        where = ".".join(map(str, first["loc"])) or "body"
        raise BadOption(f"{where}: {first['msg']}.", next_step='{"name": NAME, "path": FOLDER}') from None
    return asked.name, asked.path


_BODIES: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": NewAdapter.model_json_schema()},
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["name", "archive"],
                    "properties": {
                        "name": {"type": "string"},
                        "archive": {"type": "string", "format": "binary"},
                    },
                }
            },
        },
    }
}


def _refusal(error: VeneerError) -> Response:
    return as_api_error(error).response()


async def _answered(act: Callable[[], dict[str, Any]], status: int = 200) -> Response:
    try:
        return JSONResponse(await run_in_threadpool(act), status)
    except VeneerError as error:
        return _refusal(error)


# -- vLLM's routes ----------------------------------------------------------------------------------------------------


def _vllm(made: APIRouter, prefix: str, keeper: _Keeper, manage: list[Any]) -> None:
    shown = prefix != ""

    @made.post(f"{prefix}/load_lora_adapter", dependencies=manage, include_in_schema=shown,
               name=f"load_lora_adapter{prefix}")  # fmt: skip
    async def load(body: LoadBody) -> Response:
        """vLLM's way to register an adapter from a folder."""
        return await _texted(lambda: _load(keeper, body))

    @made.post(f"{prefix}/unload_lora_adapter", dependencies=manage, include_in_schema=shown,
               name=f"unload_lora_adapter{prefix}")  # fmt: skip
    async def unload(body: UnloadBody) -> Response:
        """vLLM's way to take an adapter away."""
        return await _texted(lambda: _unload(keeper, body))


class _VllmError(Exception):
    def __init__(self, status: int, kind: str, message: str) -> None:
        super().__init__(message)
        self.status, self.kind = status, kind

    def response(self) -> Response:
        body = {"message": str(self), "type": self.kind, "param": None, "code": self.status}
        return JSONResponse({"error": body}, self.status)


def _load(keeper: _Keeper, body: LoadBody) -> str:
    if not body.lora_name or not body.lora_path:
        raise _VllmError(400, "InvalidUserInput", "Both 'lora_name' and 'lora_path' must be provided.")
    registry = keeper.registry
    if body.lora_name in registry.aliases() and not body.load_inplace:
        raise _VllmError(
            400, "InvalidUserInput",
            f"The lora adapter '{body.lora_name}' has already been loaded. If you want to load the adapter in place, "
            "set 'load_inplace' to True.",
        )  # fmt: skip
    try:
        there = is_adapter(allowed_folder(body.lora_path, registry.allowed))
    except BadFile:
        there = False
    if not there:
        said = f"Loading lora {body.lora_name} failed: No adapter found for {body.lora_path}"
        raise _VllmError(404, "NotFoundError", said)
    try:
        keeper.register(body.lora_name, body.lora_path)
    except BadOption as error:
        raise _VllmError(400, "InvalidUserInput", error.what) from None
    except VeneerError as error:
        raise _VllmError(500, "InternalServerError", without_paths(error.what)) from None
    return f"Success: LoRA adapter '{body.lora_name}' added successfully."


def _unload(keeper: _Keeper, body: UnloadBody) -> str:
    if not body.lora_name:
        raise _VllmError(
            400, "InvalidUserInput", "'lora_name' needs to be provided to unload a LoRA adapter."
        )
    try:
        keeper.remove(body.lora_name)
    except UnknownAdapter:
        raise _VllmError(
            404, "NotFoundError", f"The lora adapter '{body.lora_name}' cannot be found."
        ) from None
    return f"Success: LoRA adapter '{body.lora_name}' removed successfully."


async def _texted(act: Callable[[], str]) -> Response:
    try:
        return PlainTextResponse(await run_in_threadpool(act))
    except _VllmError as error:
        return error.response()
