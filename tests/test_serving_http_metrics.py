"""`/metrics` of what reads and of what trains, and that no label grows without end."""

from __future__ import annotations

import re
from pathlib import Path

import httpx
from starlette.testclient import TestClient

from serving_tools import EchoEngine, running, until
from test_serving_jobs import conversations, lines, model, tokenizer
from test_serving_reading import saved, texts
from training_tiny import saved_bert
from veneer.serving import Engine, Engines, FineTuning, ReadingEngine, Registry, Wish, check_on, ready_on
from veneer.serving.app import Keys, Settings, create_app


def numbers(text: str) -> dict[str, float]:
    """{name with its labels: value}."""
    return {m[1]: float(m[2]) for m in re.finditer(r"^(\w[^ ]*(?:\{[^}]*\})?) (\S+)$", text, re.M)}


def test_what_is_read_is_counted_by_adapter_and_outcome(tmp_path: Path) -> None:
    spec = saved_bert(tmp_path / "base")
    echo, reading = EchoEngine(), ReadingEngine.open(spec)
    registry = Registry(tmp_path / "registry", check=reading.check)
    for name, method, task in (("mood", "lora", "classify"), ("names", "ia3", "tag")):
        folder = saved(tmp_path / name, spec, method, task, ("O", "B"))
        registry.register(name, folder, trusted=True, ready=ready_on(Engines(echo, reading)))
    with TestClient(create_app(echo, registry, Settings(hosts=None), Keys(), reading=reading)) as web:
        asked = web.post("/v1/classify", json={"model": "mood", "input": texts(3)})
        web.post("/v1/embeddings", json={"model": "mood", "input": "good film"})
        web.post("/v1/tag", json={"model": "names", "input": "good film"})
        assert web.post("/v1/embeddings", json={"model": "mood", "input": [10**6]}).status_code == 400
        found = numbers(web.get("/metrics").text)
    assert found['veneer_requests_total{adapter="mood",method="lora",outcome="done"}'] == 2
    assert found['veneer_requests_total{adapter="mood",method="lora",outcome="refused"}'] == 1
    assert found['veneer_requests_total{adapter="names",method="ia3",outcome="done"}'] == 1
    tokens = asked.json()["usage"]["prompt_tokens"]
    assert found['veneer_tokens_total{adapter="mood",kind="prompt"}'] > tokens > 0
    assert found['veneer_request_seconds_count{adapter="mood"}'] == 2
    assert found["veneer_read_rows_total"] == 5
    assert 1 <= found["veneer_read_forwards_total"] <= 3
    assert found["veneer_read_adapters_resident"] == 2
    assert found["veneer_read_adapter_bytes"] > 0
    assert found["veneer_read_queue_rows"] == 0
    registry.close()
    reading.close()
    echo.close()


def test_jobs_are_counted_with_their_steps_slices_and_refusals(tmp_path: Path) -> None:
    base = model()
    with Engine(base, tokenizer(), name="tiny", slots=4) as engine:
        registry = Registry(tmp_path, check=check_on(base), base="tiny")
        with FineTuning(engine, registry, between_tokens=0.0) as tuning:
            registry.serve(lambda digest, folder: engine.add(digest, folder))
            with running(create_app(engine, registry, Settings(metric_labels=2), tuning=tuning)) as app:

                def look() -> dict[str, float]:
                    return numbers(httpx.get(app.url + "/metrics").text)

                file = tuning.files.add("a.jsonl", lines(conversations(6)))
                jobs = [tuning.create(Wish(file.id, epochs=1, batch_size=3, seed=i)) for i in range(3)]
                assert until(lambda: all(tuning.job(j.id).state == "succeeded" for j in jobs), 40)
                found = look()
                assert found['veneer_train_jobs{state="succeeded"}'] == 3
                steps = {k: v for k, v in found.items() if k.startswith("veneer_train_steps_total")}
                assert list(steps.values()) == [2, 2, 2]
                assert 'veneer_train_steps_total{job="other"}' in steps
                assert all(v > 0 for k, v in found.items() if k.startswith("veneer_train_tokens_total"))
                assert found['veneer_train_slices_total{kind="update"}'] == 6
                turns = found['veneer_step_seconds_count{phase="train"}']
                assert turns == sum(v for k, v in found.items() if k.startswith("veneer_train_slices_total"))
                # Under a load that leaves no time a job stands still, and the refusals say why.
                waits = tuning.create(Wish(file.id, epochs=50, batch_size=3))
                assert until(lambda: tuning.steps[waits.id] > 1)
                before = look()
                engine.generate([5, 6, 7], max_tokens=40, ignore_eos=True)
                after = look()
                assert after["veneer_train_refusals_total"] > before["veneer_train_refusals_total"]
                assert after["veneer_train_members"] == 1
                assert after['veneer_step_seconds_count{phase="serve"}'] >= 40
                assert after["veneer_train_slack_seconds"] < 0
                assert httpx.get(app.url + "/v1/load").json()["training"] == 1
                tuning.cancel(waits.id)
                names = {"job", "adapter", "version", "tier", "state", "kind", "phase", "method", "outcome",
                         "status", "tenant", "le"}  # fmt: skip
                assert set(re.findall(r'[{,](\w+)="', httpx.get(app.url + "/metrics").text)) <= names
        registry.close()
