"""OpenAI's error object: every refusal and failure of the server leaves as one, whatever raised it.

{"error": {"message": str, "type": str, "param": str | null, "code": str | null}}
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import orjson
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response

from veneer.errors import UnknownAdapter, VeneerError

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    408: "invalid_request_error",
    409: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
}
LONGEST_MESSAGE = 2000
_PATH = re.compile(r"(?<![\w:/.])(?:[A-Za-z]:)?/(?:[\w.@+-]+/)+([\w.@+-]*)")


class ApiError(HTTPException):
    """An answer that is an error. `kind` is OpenAI's type, by the status where none is given."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str | None = None,
        retry_after: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        given = dict(headers or {})
        if retry_after is not None:
            given["retry-after"] = str(max(1, round(retry_after + 0.499)))
        super().__init__(status, message, given)
        self.message, self.param, self.code = _sendable(message)[:LONGEST_MESSAGE], _sendable(param), code
        self.kind = kind or TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        content = orjson.dumps(self.body())
        return Response(content, self.status_code, dict(self.headers or {}), "application/json")


def _sendable(text: Any) -> Any:
    return text if text is None else text.encode("utf-8", "replace").decode()


class ErrorObject(BaseModel):
    """What went wrong, in words for people, and by name for programs."""

    message: str
    type: str
    param: str | None
    code: str | int | None


class ErrorBody(BaseModel):
    error: ErrorObject


REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {
        "model": ErrorBody,
        "description": "The request cannot be understood, or asks for what is not there",
    },
    401: {"model": ErrorBody, "description": "No key, or one that is not known"},
    403: {"model": ErrorBody, "description": "The key does not allow this"},
    404: {"model": ErrorBody, "description": "There is no such model"},
    408: {"model": ErrorBody, "description": "The body took too long to arrive"},
    413: {"model": ErrorBody, "description": "The body is too large"},
    429: {"model": ErrorBody, "description": "Too much at once: try again after Retry-After seconds"},
    500: {"model": ErrorBody, "description": "The model failed on this request"},
    503: {
        "model": ErrorBody,
        "description": "The server is starting or stopping, or has not enough memory now",
    },
}


def some(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Of the refusals those that a route can give."""
    return {status: REFUSALS[status] for status in statuses}


def without_paths(text: str) -> str:
    """Folders of the server are nobody's business: of an absolute path the last part alone stays."""
    return _PATH.sub(r"\1", text)


def as_api_error(error: BaseException, param: str | None = None) -> ApiError:
    """Any exception as the answer that a client should see; what is not a user's mistake stays unsaid.

    The engine's own refusals are told by what they carry: `retry_after` (seconds) or `status`.
    """
    if isinstance(error, ApiError):
        return error
    retry_after = getattr(error, "retry_after", None)
    if retry_after is not None:
        return ApiError(429, without_paths(_words(error)), code="queue_full", retry_after=retry_after)
    if isinstance(error, UnknownAdapter):
        return ApiError(404, without_paths(_words(error)), param="model", code="model_not_found")
    if isinstance(error, VeneerError):
        return ApiError(400, without_paths(_words(error)), param=param)
    if _is_out_of_memory(error):
        return ApiError(
            503, "There was not enough memory for this request beside the others: try again, or ask for less.",
            code="out_of_memory", retry_after=5,
        )  # fmt: skip
    return ApiError(500, "The server failed on this request; its log says more under the request's id.")


def _is_out_of_memory(error: BaseException) -> bool:
    """By its name and words: nothing here knows torch, whose CPU raises a plain RuntimeError."""
    name, said = type(error).__name__, str(error)
    return (
        name in ("OutOfMemoryError", "MemoryError")
        or "allocate memory" in said
        or "not enough memory" in said
    )


def _words(error: BaseException) -> str:
    if not isinstance(error, VeneerError):
        return str(error)
    nearest = f" Nearest: {', '.join(error.nearest)}." if error.nearest else ""
    return error.what + nearest


def of_validation(errors: list[Any]) -> ApiError:
    """The first complaint about a body, with its place; the value itself is not sent back."""
    if not errors:
        return ApiError(400, "The body cannot be read.")
    first = _telling(errors)
    if first["type"] == "json_invalid":
        return ApiError(
            400, f"The body is not JSON: {first.get('ctx', {}).get('error', 'it cannot be read')}."
        )
    param = _param(first)
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        said = f"'{param}' is missing." if param else "A JSON object is needed as the body."
    else:
        said = f"'{param}': {message}." if param else f"{message}."
    return ApiError(400, said, param=param)


def _telling(errors: list[Any]) -> Any:
    """Of the complaints about the first place that is wrong the one that says most.

    A field that may have several forms has a complaint for each; that it has none of the other forms says little.
    """
    param = _param(errors[0])
    alike = [one for one in errors if _param(one) == param]
    return next((one for one in alike if not one["type"].endswith("_type")), alike[0])


def _param(error: Any) -> str | None:
    """("body", "messages", 0, "content", "str") -> messages.0.content: what follows a field's name may be a type's."""
    place = [part for part in error["loc"] if part not in ("body", "query", "path", "header")]
    kept: list[str] = []
    for i, part in enumerate(place):
        is_type = i > 0 and isinstance(part, str) and not part.isidentifier()
        if is_type or part in ("str", "int", "float", "bool"):
            break
        kept.append(str(part))
    return ".".join(kept) or None


def install(app: FastAPI) -> None:
    """Make every error of `app` an OpenAI error object."""

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if isinstance(error, ApiError):
            return error.response()
        said = error.detail if isinstance(error.detail, str) else "The request was refused."
        if error.status_code == 404:
            said = f"There is nothing at {request.method} {request.url.path[:200]}."
        if error.status_code == 405:
            said = f"{request.url.path[:200]} does not take {request.method}."
        return ApiError(error.status_code, said, headers=error.headers).response()

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return of_validation(list(error.errors())).response()

    async def veneer_error(request: Request, error: Exception) -> Response:
        return as_api_error(error).response()

    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(VeneerError, veneer_error)
