"""OpenAI's routes of fine-tuning: files of conversations, and jobs that train an adapter of any method on them.

A job names its method either as OpenAI does (`supervised`, which is LoRA here) or as
`{"type": "veneer", "veneer": {"method": "dora", "options": {"rank": 4}}}`. Whoever may train may manage.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import Response
from pydantic import ConfigDict, Field
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile

from veneer.errors import VeneerError

from .._jobs import OPEN, Wish
from .._jobs_files import NotThere, TrainingFile
from .._registry_jobs import Job, JobEvent
from .bodies import Body, Text
from .entry import authorise
from .errors import ApiError, as_api_error, some
from .service import Service
from .wire import Json

T = TypeVar("T")
Auto = Literal["auto"]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=1024)]
Epochs = Annotated[int, Field(ge=1, le=1000)]
Limit = Annotated[int, Query(ge=1, le=10_000)]


class Numbers(Body):
    """OpenAI's hyperparameters."""

    model_config = ConfigDict(extra="forbid", strict=True)
    n_epochs: Epochs | Auto | None = None
    batch_size: Count | Auto | None = None
    learning_rate_multiplier: Positive | Auto | None = None


class Own(Numbers):
    """An adapter of any method, with its own options."""

    method: Text = "lora"
    options: dict[str, Any] = {}
    learning_rate: Positive | None = None
    max_length: Annotated[int, Field(ge=2)] | None = None


class Supervised(Body):
    hyperparameters: Numbers | None = None


class Method(Body):
    type: Literal["supervised", "veneer"]
    supervised: Supervised | None = None
    veneer: Own | None = None


class NewJob(Body):
    model: Text
    training_file: Text
    validation_file: Text | None = None
    suffix: Text | None = Field(None, description="the name that the adapter is served under")
    hyperparameters: Numbers | None = None
    method: Method | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    metadata: dict[str, str] | None = None
    integrations: list[Any] | None = None


def router(service: Service, tuning: Any) -> APIRouter:
    """The routes. tuning: a `FineTuning`, or a `Late` one."""
    routes = APIRouter(tags=["fine-tuning"], dependencies=[Depends(authorise("manage"))])
    _file_routes(routes, tuning)
    _job_routes(routes, service, tuning)
    return routes


# -- files -------------------------------------------------------------------------------------------------------------


def _file_routes(routes: APIRouter, tuning: Any) -> None:
    @routes.post("/v1/files", responses=some(400, 401, 403, 413, 503), openapi_extra=_FORM)
    async def upload(request: Request) -> Any:
        """Upload conversations as JSON lines; they are read through before they are kept."""
        form = await request.form(max_files=1, max_fields=8)
        file, purpose = form.get("file"), form.get("purpose")
        if not isinstance(file, UploadFile) or not isinstance(purpose, str):
            raise ApiError(
                400, "The fields 'file' and 'purpose' are needed, as multipart/form-data.", param="file"
            )
        files = tuning.files
        data = await file.read(files.largest + 1)
        return Json(_file(await _done(lambda: files.add(file.filename or "file.jsonl", data, purpose))))

    @routes.get("/v1/files", responses=some(401, 403, 503))
    async def files(purpose: str | None = None, after: str | None = None, limit: Limit = 10_000) -> Any:
        """The files, the newest first."""
        found = await _done(lambda: tuning.files.listed() if purpose in (None, "fine-tune") else [])
        return Json(_page([_file(f) for f in found], after, limit))

    @routes.get("/v1/files/{id}", responses=some(401, 403, 404, 503))
    async def file(id: str) -> Any:
        """One file's record."""
        return Json(_file(await _done(lambda: tuning.files.get(id))))

    lines: dict[int | str, Any] = {
        200: {"content": {"application/jsonl": {"schema": {"type": "string"}}}, "description": "JSON lines"}
    }

    @routes.get(
        "/v1/files/{id}/content", response_class=Response, responses={**some(401, 403, 404, 503), **lines}
    )
    async def content(id: str) -> Any:
        """One file's bytes."""
        return Response(await _done(lambda: tuning.files.content(id)), media_type="application/jsonl")

    @routes.delete("/v1/files/{id}", responses=some(401, 403, 404, 503))
    async def delete(id: str) -> Any:
        """Forget a file."""
        await _done(lambda: tuning.files.remove(id))
        return Json({"id": id, "object": "file", "deleted": True})


_FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": ["fine-tune"]},
                    },
                }
            }
        },
    }
}


def _file(found: TrainingFile) -> dict[str, Any]:
    return {
        "id": found.id, "object": "file", "bytes": found.bytes, "created_at": int(found.created),
        "filename": found.name, "purpose": "fine-tune", "status": "processed", "expires_at": None,
        "status_details": None,
    }  # fmt: skip


# -- jobs --------------------------------------------------------------------------------------------------------------


def _job_routes(routes: APIRouter, service: Service, tuning: Any) -> None:
    place = "/v1/fine_tuning/jobs"
    known, refusals = some(401, 403, 404, 503), some(400, 401, 403, 404, 503)

    @routes.post(place, responses=refusals)
    async def create(body: NewJob) -> Any:
        """Train an adapter on a file, beside the requests that are served; it is served when it is done."""
        if body.model not in (service.base, tuning.engine.model_name):
            raise ApiError(
                404, f"Jobs train on the served base, {service.base!r}, not on {body.model[:100]!r}.",
                param="model", code="model_not_found",
            )  # fmt: skip
        wish = wish_of(body)
        return Json(shown(await _done(lambda: tuning.create(wish), 400), service.base))

    @routes.get(place, responses=known)
    async def jobs(after: str | None = None, limit: Limit = 20) -> Any:
        """The jobs, the newest first."""
        found = await _done(lambda: tuning.listed())
        return Json(_page([shown(job, service.base) for job in found], after, limit))

    @routes.get(place + "/{id}", responses=known)
    async def job(id: str) -> Any:
        """One job."""
        return Json(shown(await _done(lambda: tuning.job(id)), service.base))

    @routes.get(place + "/{id}/events", responses=known)
    async def events(id: str, after: str | None = None, limit: Limit = 20) -> Any:
        """What became of a job, the newest first."""
        found = await _done(lambda: tuning.events(id))
        return Json(_page([_event(event) for event in found], after, limit))

    @routes.get(place + "/{id}/checkpoints", responses=known)
    async def checkpoints(id: str) -> Any:
        """None: what a job keeps on the way is its own."""
        await _done(lambda: tuning.job(id))
        return Json(_page([], None, 1))

    @routes.post(place + "/{id}/cancel", responses=refusals)
    async def cancel(id: str) -> Any:
        """End a job."""
        return Json(shown(await _done(lambda: tuning.cancel(id)), service.base))


def wish_of(body: NewJob) -> Wish:
    """A job's body in either form. Numbers of the method go before those beside it."""
    method = body.method
    own = method.veneer if method is not None and method.type == "veneer" else None
    beside = method.supervised.hyperparameters if method is not None and method.supervised else None
    found: dict[str, Any] = {}
    for numbers in (body.hyperparameters, beside, own):
        if numbers is not None:
            given = numbers.model_dump(include={"n_epochs", "batch_size", "learning_rate_multiplier"})
            found |= {k: v for k, v in given.items() if v not in (None, "auto")}
    more = {"method": method.model_dump(exclude_none=True) if method else None, "metadata": body.metadata}
    return Wish(
        body.training_file, body.validation_file, own.method if own else "lora", own.options if own else {},
        suffix=body.suffix,
        epochs=found.get("n_epochs", Wish.epochs), batch_size=found.get("batch_size", Wish.batch_size),
        learning_rate=own.learning_rate if own else None,
        learning_rate_multiplier=found.get("learning_rate_multiplier", Wish.learning_rate_multiplier),
        max_length=own.max_length if own else None, seed=body.seed or 0, more=more,
    )  # fmt: skip


def shown(job: Job, base: str) -> dict[str, Any]:
    """A job as OpenAI's object."""
    body = job.body
    numbers = {
        "n_epochs": body["epochs"], "batch_size": body["batch_size"],
        "learning_rate_multiplier": body["learning_rate_multiplier"],
    }  # fmt: skip
    own = {"method": body["method"], "options": body["options"], "learning_rate": body["rate"]}
    failed = body.get("error")
    return {
        "id": job.id, "object": "fine_tuning.job", "model": base, "created_at": int(job.created),
        "finished_at": None if job.state in OPEN else int(job.changed),
        "fine_tuned_model": body.get("model") if job.state == "succeeded" else None,
        "status": job.state, "training_file": body["training_file"], "validation_file": body["validation_file"],
        "hyperparameters": numbers, "method": body["more"].get("method") or {"type": "veneer", "veneer": own},
        "trained_tokens": body.get("tokens"), "error": {**failed, "param": None} if failed else None,
        "user_provided_suffix": body["suffix"], "seed": body["seed"], "metadata": body["more"].get("metadata"),
        "result_files": [], "organization_id": "veneer", "estimated_finish": None, "integrations": [],
    }  # fmt: skip


def _event(found: JobEvent) -> dict[str, Any]:
    body = found.body
    return {
        "id": f"ftevent-{found.number}", "object": "fine_tuning.job.event", "created_at": int(found.at),
        "level": body["level"], "message": body["message"], "data": body["data"],
        "type": "metrics" if body["data"] and "step" in body["data"] else "message",
    }  # fmt: skip


def _page(found: Sequence[dict[str, Any]], after: str | None, limit: int) -> dict[str, Any]:
    """The part of a list that follows `after`; an `after` that is not there is the beginning."""
    ids = [one["id"] for one in found]
    start = ids.index(after) + 1 if after in ids else 0
    data = found[start : start + limit]
    return {
        "object": "list", "data": data, "has_more": start + limit < len(found),
        "first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None,
    }  # fmt: skip


async def _done(act: Callable[[], T], missing: int = 404) -> T:
    """What a thread makes of it: tables and files lie on a disk. missing: the status where an id is of nothing."""
    try:
        return await run_in_threadpool(act)
    except NotThere as error:
        raise ApiError(missing, as_api_error(error).message) from None
    except VeneerError as error:
        raise as_api_error(error) from None
