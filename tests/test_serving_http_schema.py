"""The server's own OpenAPI page is true: what it allows and what it does not are both answered as it says."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks
from starlette.testclient import TestClient

from registry_tiny import adapter
from serving_tools import EchoEngine
from veneer.serving import Registry
from veneer.serving.app import Keys, Settings, create_app
from veneer.serving.app.entry import OPEN

# Not held: that all of what the page allows is accepted. A well-formed body may ask for a model that is not there.
CHECKS = [
    not_a_server_error, checks.status_code_conformance, checks.content_type_conformance,
    checks.response_schema_conformance, checks.response_headers_conformance, checks.negative_data_rejection,
    checks.missing_required_header, checks.unsupported_method,
]  # fmt: skip


@functools.cache
def app():
    place = Path(tempfile.mkdtemp(prefix="veneer-schema-"))
    atexit.register(shutil.rmtree, place)
    registry = Registry(place / "registry", [place])
    registry.register("support", adapter(place / "support"))
    engine = EchoEngine(max_length=1 << 32, longest_answer=6)
    return create_app(engine, registry, Settings(hosts=None), Keys(["letmein"]))


schema = schemathesis.openapi.from_asgi("/openapi.json", app())


@schema.parametrize()
@settings(
    max_examples=8, deadline=None, suppress_health_check=list(HealthCheck), phases=(Phase.explicit, Phase.generate),
    derandomize=True, database=None,
)  # fmt: skip
def test_every_route_answers_as_its_page_says(case):
    if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
        case.body["model"] = "support"  # else nearly all that is asked for is not there
    case.call_and_validate(headers={"authorization": "Bearer letmein"}, checks=CHECKS)


def test_the_page_names_every_route_and_no_other_form_of_error():
    page = app().openapi()
    assert {"/v1/models", "/v1/completions", "/v1/chat/completions", "/tokenize", "/metrics"} <= set(
        page["paths"]
    )
    assert "422" not in str(page)
    for path, methods in page["paths"].items():
        for operation in methods.values():
            assert operation["security"] == ([] if path in OPEN else [{"key": []}])


def test_every_route_that_is_not_open_needs_a_key():
    with TestClient(app()) as client:
        for path, methods in app().openapi()["paths"].items():
            for method in methods:
                for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic letmein"}):
                    answer = client.request(method, path.replace("{name}", "x"), headers=headers)
                    assert answer.status_code == (200 if path in OPEN else 401), (method, path)
                    assert path in OPEN or answer.json()["error"]["type"] == "authentication_error"
