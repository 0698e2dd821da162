"""The routes of files and jobs answer as the server's own OpenAPI page says, whatever is sent to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks
from starlette.testclient import TestClient

from serving_tools import until
from test_serving_jobs import conversations, lines, model, tokenizer
from veneer.serving import Engine, FineTuning, Registry, check_on
from veneer.serving._jobs import OPEN
from veneer.serving.app import Keys, Settings, create_app

HELD = [
    not_a_server_error, checks.status_code_conformance, checks.content_type_conformance,
    checks.response_schema_conformance, checks.missing_required_header, checks.unsupported_method,
]  # fmt: skip


def test_files_and_jobs_answer_as_their_page_says(tmp_path: Path) -> None:
    base = model()
    with Engine(base, tokenizer(), name="tiny", slots=2) as engine:
        registry = Registry(tmp_path, check=check_on(base), base="tiny")
        with FineTuning(engine, registry) as tuning:
            app = create_app(engine, registry, Settings(hosts=None), Keys(["k"]), tuning=tuning)
            file = tuning.files.add("a.jsonl", lines(conversations(4))).id
            with TestClient(app, headers={"authorization": "Bearer k"}) as web:
                seen = _ask_everything(app, file)
                left = web.get("/v1/fine_tuning/jobs", params={"limit": 100}).json()["data"]
                for job in left:
                    web.post(f"/v1/fine_tuning/jobs/{job['id']}/cancel")
                assert until(lambda: not tuning.spare.wanted, 20)
            assert all(tuning.job(j["id"]).state not in OPEN for j in left)
            assert engine.generate([5, 6, 7], max_tokens=3).tokens
        registry.close()
    paths = {path for path, _, _ in seen}
    jobs = "/v1/fine_tuning/jobs"
    assert {
        "/v1/files",
        "/v1/files/{id}/content",
        jobs,
        f"{jobs}/{{id}}/cancel",
        f"{jobs}/{{id}}/events",
    } <= paths
    posted = {status for path, method, status in seen if (path, method) == (jobs, "POST")}
    assert {200, 400} <= posted
    assert {200, 404} <= {status for path, _, status in seen if path == f"{jobs}/{{id}}"}


def _ask_everything(app: Any, file: str) -> set[tuple[str, str, int]]:
    """What hypothesis makes of the page, with a model, a file and a job that are there in most of it."""
    page, seen, jobs = schemathesis.openapi.from_asgi("/openapi.json", app), set(), [""]

    def answered(case: Any) -> None:
        if isinstance(case.body, dict) and "training_file" in case.body:
            case.body = {**case.body, "model": "tiny", "training_file": file, "validation_file": None}
        if (
            jobs[-1]
            and isinstance(case.path_parameters, dict)
            and len(str(case.path_parameters.get("id"))) % 2
        ):
            case.path_parameters = {"id": jobs[-1] if "jobs" in case.path else file}
        if case.method == "DELETE":
            case.path_parameters = {"id": "file-gone"}
        answer = case.call(headers={"authorization": "Bearer k"})
        case.validate_response(answer, checks=HELD)
        seen.add((case.path, case.method, answer.status_code))
        if case.path == "/v1/fine_tuning/jobs" and case.method == "POST" and answer.status_code == 200:
            jobs.append(answer.json()["id"])

    limits = settings(
        max_examples=8, deadline=None, suppress_health_check=list(HealthCheck), database=None, derandomize=True,
        phases=(Phase.explicit, Phase.generate),
    )  # fmt: skip
    found = [o.ok() for o in page.include(path_regex="/v1/(files|fine_tuning)").get_all_operations()]
    for operation in sorted(found, key=lambda o: o.method != "post"):  # jobs first, so that there are some
        limits(given(case=operation.as_strategy())(answered))()
    return seen
