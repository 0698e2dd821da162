"""The HTTP server over an engine and a registry: OpenAI's routes, one ASGI application.

`create_app(engine, registry, settings, keys)` gives the application; `veneer serve` runs it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI

import veneer
from veneer.serving import Engines

from . import adapters, chat, completions, front, health, jobs, models, tokens
from . import reading as reading_room
from .entry import Entry, authorise, describe
from .errors import REFUSALS, ApiError, install
from .keys import Key, Keys, new_key
from .limits import Limits
from .metrics import Metrics
from .service import Late, Service
from .settings import Settings

__all__ = ["ApiError", "Key", "Keys", "Late", "Settings", "authorise", "create_app", "new_key"]


def create_app(
    engine: Any,
    registry: Any,
    settings: Settings | None = None,
    keys: Keys | None = None,
    *,
    reading: Any = None,
    tuning: Any = None,
) -> FastAPI:
    """The application.

    Args:
        engine: a `veneer.serving.Engine`, or a `Late` one that is put there when the server listens.
        registry: what names mean, a `veneer.serving.Registry`, or a `Late` one.
        settings: limits and strictness.
        keys: who may come in; without keys everybody may.
        reading: a `veneer.serving.ReadingEngine`, or a `Late` one; without it nothing is classified or embedded.
        tuning: a `veneer.serving.FineTuning`, or a `Late` one; without it there are no routes for jobs.
    """
    settings, keys = settings or Settings(), keys or Keys()

    def stats_of(thing: Any) -> Any:
        return None if thing is None else lambda: thing.stats() if getattr(thing, "is_open", True) else {}

    metrics = Metrics(
        stats_of(engine), settings.metric_labels, settings.vllm_names,
        reading=stats_of(reading), training=stats_of(tuning),
    )  # fmt: skip
    service = Service(engine, registry, keys, settings, metrics, Limits(settings), reading, tuning)

    @contextlib.asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        service.begin(asyncio.get_running_loop())
        yield
        service.end()

    app = FastAPI(
        title="veneer", version=veneer.__version__, lifespan=life, docs_url=None, redoc_url=None,
        description="Adapters of any method behind one running base.",
    )  # fmt: skip
    app.state.service = service
    install(app)
    served = engine if reading is None else Engines(engine, reading)
    lifecycle = adapters.router(served, registry, authorise, largest_upload=settings.max_upload)
    app.include_router(lifecycle, responses=REFUSALS)
    for room in (models, completions, chat, tokens, health):
        app.include_router(room.router(service))
    if reading is not None:
        app.include_router(reading_room.router(service, reading))
    if tuning is not None:
        app.include_router(jobs.router(service, tuning))
    app.include_router(front.router())
    app.add_middleware(Entry, keys=keys, settings=settings, observe=metrics.answered)
    describe(app, keys.required)
    return app
