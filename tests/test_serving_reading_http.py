"""The routes that read: over the whole application, with the reading engine of a tiny base."""

from __future__ import annotations

import base64
import struct

import numpy as np
import pytest
from starlette.testclient import TestClient

from serving_tools import EchoEngine
from test_serving_reading import saved, texts
from training_tiny import saved_bert
from veneer.serving import Engines, Registry, ready_on
from veneer.serving._reading import ReadingEngine
from veneer.serving.app import Keys, Settings, create_app
from veneer.training import Predictor

ADAPTERS = {
    "mood": ("lora", "classify", ("bad", "good")),
    "marks": ("ia3", "multilabel", ("x", "y", "z")),
    "stars": ("lora", "regress", ()),
    "names": ("lora", "tag", ("O", "B-X")),
    "fits": ("lora", "rank", ()),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("reading")
    spec = saved_bert(root / "base")
    folders = {n: saved(root / n, spec, *what, seed=i) for i, (n, what) in enumerate(ADAPTERS.items())}
    echo, reading = EchoEngine(), ReadingEngine.open(spec)
    registry = Registry(root / "registry", check=reading.check)
    for name, folder in folders.items():
        registry.register(name, folder, trusted=True, ready=ready_on(Engines(echo, reading)))
    app = create_app(echo, registry, Settings(hosts=None), Keys(["k"]), reading=reading)
    with TestClient(app, headers={"authorization": "Bearer k"}) as client:
        yield client, folders, registry
    reading.close()
    echo.close()
    registry.close()


def test_classes_are_answered_as_predict_gives_them(world):
    client, folders, registry = world
    given = texts(5)
    answer = client.post("/v1/classify", json={"model": "mood", "input": given})
    assert answer.headers["x-veneer-adapter-version"] == "sha256:" + registry.resolve("mood").digest
    body = answer.json()
    assert body["object"] == "list"
    assert body["model"] == "mood"
    assert (
        body["usage"]["prompt_tokens"]
        == body["usage"]["total_tokens"]
        == sum(len(t.split()) + 2 for t in given)
    )
    for i, (found, wanted) in enumerate(
        zip(body["data"], Predictor.open(folders["mood"], device="cpu").predict(given), strict=True)
    ):
        assert found["index"] == i
        assert found["label"] == wanted["prediction"]
        assert found["scores"] == pytest.approx(wanted["probabilities"], abs=1e-5)
        assert found["score"] == max(found["scores"].values())


def test_several_labels_numbers_and_pairs_have_their_own_forms(world):
    client, folders, _ = world
    marks = client.post("/v1/classify", json={"model": "marks", "input": "good film"}).json()["data"][0]
    assert isinstance(marks["label"], list)
    assert set(marks["scores"]) == {"x", "y", "z"}
    stars = client.post("/v1/classify", json={"model": "stars", "input": "good film"}).json()["data"][0]
    wanted = Predictor.open(folders["stars"], device="cpu").predict("good film")[0]["prediction"]
    assert stars["label"] is None
    assert stars["score"] == pytest.approx(wanted, abs=1e-5)
    row = {"query": "good film", "document": "the story"}
    fits = client.post("/v1/classify", json={"model": "fits", "input": [row, row]}).json()["data"]
    wanted = Predictor.open(folders["fits"], device="cpu").predict([row])[0]["prediction"]
    assert [f["score"] for f in fits] == pytest.approx([wanted] * 2, abs=1e-5)


def test_tags_say_where_each_word_stands(world):
    client, folders, _ = world
    text = "  the good\tfilm\nwas  dull "
    tags = client.post("/v1/tag", json={"model": "names", "input": text}).json()["data"][0]["tags"]
    assert [text[t["start"] : t["end"]] for t in tags] == text.split()
    wanted = Predictor.open(folders["names"], device="cpu").predict([{"tokens": text.split()}])[0]
    assert [t["label"] for t in tags] == wanted["prediction"]
    assert [t["score"] for t in tags] == pytest.approx(wanted["probabilities"], abs=1e-5)


def test_embeddings_are_sent_as_numbers_or_as_bytes_and_cut_to_fewer_dimensions(world):
    client, *_ = world

    def vectors(**more):
        answer = client.post("/v1/embeddings", json={"model": "mood", "input": ["good film", "dull"], **more})
        return [d["embedding"] for d in answer.json()["data"]]

    plain = np.array(vectors())
    assert plain.shape == (2, 32)
    assert np.allclose(np.linalg.norm(plain, axis=1), 1, atol=1e-6)
    packed = [struct.unpack("<32f", base64.b64decode(v)) for v in vectors(encoding_format="base64")]
    assert np.allclose(packed, plain, atol=1e-7)
    cut = np.array(vectors(dimensions=8))
    assert np.allclose(cut, plain[:, :8] / np.linalg.norm(plain[:, :8], axis=1, keepdims=True), atol=1e-6)
    base = client.post("/v1/embeddings", json={"model": "builtin:echo", "input": "good film"}).json()
    assert base["model"] == "builtin:echo"
    assert not np.allclose(base["data"][0]["embedding"], plain[0], atol=1e-2)
    ids = client.post("/v1/embeddings", json={"model": "mood", "input": [[2, 4, 14, 3], [2, 9, 3]]}).json()
    assert np.allclose(next(d["embedding"] for d in ids["data"]), plain[0], atol=1e-5)


def test_the_openai_client_reads_embeddings(world):
    openai = pytest.importorskip("openai")
    client, *_ = world
    asked = openai.OpenAI(base_url="http://testserver/v1", api_key="k", http_client=client)
    found = asked.embeddings.create(model="mood", input=["good film", "dull"])
    plain = client.post("/v1/embeddings", json={"model": "mood", "input": ["good film", "dull"]}).json()
    assert np.allclose([d.embedding for d in found.data], [d["embedding"] for d in plain["data"]], atol=1e-6)
    with pytest.raises(openai.NotFoundError):
        asked.embeddings.create(model="nobody", input="a")


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("classify", {"model": "names", "input": "a"}, 400),
        ("tag", {"model": "mood", "input": "a"}, 400),
        ("translate", {"model": "mood", "input": "a"}, 400),
        ("classify", {"model": "nobody", "input": "a"}, 404),
        ("classify", {"model": "builtin:echo", "input": "a"}, 400),
        ("classify", {"model": "mood", "input": ""}, 400),
        ("classify", {"model": "mood", "input": []}, 400),
        ("classify", {"model": "mood", "input": [""]}, 400),
        ("classify", {"model": "mood", "input": 3}, 400),
        ("classify", {"model": "mood", "input": {"query": "a"}}, 400),
        ("classify", {"model": "mood", "input": {"text": "a", "label": "bad"}}, 400),
        ("classify", {"model": "fits", "input": "a"}, 400),
        ("tag", {"model": "names", "input": " \n "}, 400),
        ("classify", {"input": "a"}, 400),
        ("classify", {"model": "mood"}, 400),
        ("embeddings", {"model": "mood", "input": "a", "dimensions": 33}, 400),
        ("embeddings", {"model": "mood", "input": "a", "dimensions": 0}, 400),
        ("embeddings", {"model": "mood", "input": "a", "encoding_format": "int8"}, 400),
        ("embeddings", {"model": "mood", "input": [10**6]}, 400),
        ("embeddings", {"model": "mood", "input": [[]]}, 400),
        ("embeddings", {"model": "mood", "input": "x" * 1_100_000}, 400),
    ],
)
def test_what_cannot_be_read_is_refused_in_words(world, path, body, status):
    client, *_ = world
    answer = client.post(f"/v1/{path}", json=body)
    assert answer.status_code == status, answer.text[:300]
    error = answer.json()["error"]
    assert error["message"]
    assert error["type"] == "invalid_request_error"


def test_an_adapter_of_another_base_is_not_registered(world, tmp_path):
    _, _, registry = world
    from veneer.errors import VeneerError

    other = saved(tmp_path / "other", saved_bert(tmp_path / "base", seed=7), "lora", "classify", ("a", "b"))
    with pytest.raises(VeneerError, match="other weights"):
        registry.register("other", other, trusted=True)


def test_a_base_that_writes_no_text_is_served_for_reading_alone(tmp_path):
    from veneer.serving import ReadingOnly, check_for

    spec = saved_bert(tmp_path / "base")
    reading = ReadingEngine.open(spec)
    engine = ReadingOnly(reading, "tiny")
    registry = Registry(tmp_path / "registry", check=check_for(engine, reading))
    folder = saved(tmp_path / "mood", spec, "lora", "classify", ("bad", "good"))
    registry.register("mood", folder, trusted=True, ready=ready_on(Engines(engine, reading)))
    with TestClient(create_app(engine, registry, Settings(hosts=None), Keys(), reading=reading)) as client:
        assert [m["id"] for m in client.get("/v1/models").json()["data"]] == ["tiny", "mood"]
        assert client.post("/v1/classify", json={"model": "mood", "input": "good film"}).status_code == 200
        assert client.post("/v1/embeddings", json={"model": "tiny", "input": "good film"}).status_code == 200
        tokens = client.post("/tokenize", json={"prompt": "good film"}).json()["tokens"]
        assert len(tokens) == 4
        refused = client.post("/v1/completions", json={"model": "mood", "prompt": "good film"})
        assert refused.status_code == 400
        assert "does not write text" in refused.json()["error"]["message"]
        assert client.get("/ready").status_code == client.get("/metrics").status_code == 200
    registry.close()
    reading.close()


def test_adapters_that_write_and_adapters_that_read_are_served_over_one_base(tmp_path):
    import veneer
    from training_tiny import saved_llama
    from veneer.serving import check_for, open_engines
    from veneer.tasks import make_task

    spec = saved_llama(tmp_path / "base")
    folders = {"mood": saved(tmp_path / "mood", spec, "lora", "classify", ("bad", "good", "fine"))}
    model = veneer.open_base(spec, task="lm").model
    adapter = veneer.attach(model, "lora", "made", rank=2)
    for leaf in adapter.leaves():
        leaf.data.normal_(0, 0.3)
    folders["says"] = veneer.save(model, "made", tmp_path / "says", extra={"task": make_task("lm").to_dict()})
    engine, reading = open_engines(spec, slots=2)
    registry = Registry(tmp_path / "registry", check=check_for(engine, reading))
    for name, folder in folders.items():
        registry.register(name, folder, trusted=True, ready=ready_on(Engines(engine, reading)))
    with TestClient(create_app(engine, registry, Settings(hosts=None), Keys(), reading=reading)) as client:
        asked = {"model": "says", "prompt": "the film", "max_tokens": 4, "ignore_eos": True}
        said = client.post("/v1/completions", json=asked)
        assert said.json()["usage"]["completion_tokens"] == 4
        read = client.post("/v1/classify", json={"model": "mood", "input": texts(3)}).json()["data"]
        wanted = Predictor.open(folders["mood"], device="cpu").predict(texts(3))
        assert [r["label"] for r in read] == [w["prediction"] for w in wanted]
        for f, w in zip(read, wanted, strict=True):
            assert f["scores"] == pytest.approx(w["probabilities"], abs=1e-5)
        vectors = {
            m: client.post("/v1/embeddings", json={"model": m, "input": "the film"}).json()["data"][0][
                "embedding"
            ]
            for m in ("says", "mood", engine.model_name)
        }
        assert not np.allclose(vectors["says"], vectors[engine.model_name], atol=1e-3)
        assert not np.allclose(vectors["mood"], vectors[engine.model_name], atol=1e-3)
        wrong = client.post("/v1/completions", json={"model": "mood", "prompt": "the film", "max_tokens": 4})
        assert wrong.status_code in (400, 404)
        assert "mood" in wrong.json()["error"]["message"] or "version" in wrong.json()["error"]["message"]
        assert (
            client.delete("/v1/adapters/mood").status_code
            == client.delete("/v1/adapters/says").status_code
            == 200
        )
        assert engine.versions == reading.versions == ()
    places = {s.model.model.layers[1].mlp.up_proj.weight.data_ptr() for s in reading._shells._open.values()}
    assert places == {engine.model.model.layers[1].mlp.up_proj.weight.data_ptr()}
    registry.close()
    reading.close()
    engine.close()


def test_the_routes_that_read_answer_as_their_page_says(world):
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, Phase, given, settings
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi import checks

    client, *_ = world
    held = [not_a_server_error, checks.status_code_conformance, checks.response_schema_conformance,
            checks.content_type_conformance, checks.missing_required_header]  # fmt: skip
    page = schemathesis.openapi.from_asgi("/openapi.json", client.app)
    seen = []

    def answered(case):
        if isinstance(case.body, dict) and "model" in case.body:
            case.body["model"] = "names" if case.operation.path == "/v1/tag" else "mood"
        answer = case.call(headers={"authorization": "Bearer k"})
        case.validate_response(answer, checks=held)
        seen.append((case.operation.path, answer.status_code))

    limits = settings(
        max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), database=None, derandomize=True,
        phases=(Phase.explicit, Phase.generate),
    )  # fmt: skip
    for found in page.include(path_regex="/v1/(classify|tag|translate|embeddings)").get_all_operations():
        limits(given(case=found.ok().as_strategy())(answered))()
    assert {path for path, _ in seen} == {"/v1/classify", "/v1/tag", "/v1/translate", "/v1/embeddings"}
    assert {200, 400} <= {status for _, status in seen}
