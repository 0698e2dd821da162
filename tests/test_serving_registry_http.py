"""The routes of adapters, over a bare application and an engine that only remembers."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import stat
import struct
import tarfile
import zipfile
from types import SimpleNamespace

import httpx
import pytest
from fastapi import FastAPI, Header, HTTPException

from registry_tiny import adapter
from veneer.errors import BadFile, Unsupported
from veneer.serving._archive import unpack
from veneer.serving._registry import Registry
from veneer.serving.app.adapters import router


class Engine:
    """Remembers what it serves."""

    def __init__(self):
        self.served, self.removed, self.refuses = {}, [], False

    def add(self, version, folder):
        if self.refuses:
            raise Unsupported("this engine is full.")
        assert version not in self.served, "a version is added once"
        assert (folder / "veneer.json").is_file() or (folder / "adapter_config.json").is_file()
        self.served[version] = folder

    @property
    def versions(self):
        return tuple(self.served)

    def remove(self, version, *, drain=True):
        del self.served[version]
        self.removed.append((version, drain))


def authorise(scope):
    def check(x_scopes: str = Header("use manage")):
        if scope not in x_scopes.split():
            raise HTTPException(403, "no")
        return SimpleNamespace(adapters={"only"} if "only" in x_scopes else None)

    return check


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("saved")
    for seed in (1, 2):
        adapter(root / f"lora{seed}", seed=seed)
    return root


@pytest.fixture
def world(tmp_path, saved):
    engine, registry = Engine(), Registry(tmp_path / "r", [saved])
    app = FastAPI()
    app.include_router(router(engine, registry, authorise, largest_upload=200_000))

    def call(method, url, **options):
        async def go():
            async with httpx.AsyncClient(
                transport=httpx.ASGITransport(app), base_url="http://test"
            ) as client:
                return await client.request(method, url, **options)

        return asyncio.run(go())

    yield SimpleNamespace(engine=engine, registry=registry, call=call, app=app)
    registry.close()


def zipped(folder, prefix="mine/", extra=()):
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for path in sorted(folder.iterdir()):
            archive.write(path, prefix + path.name)
        for name, data in extra:
            archive.writestr(name, data)
    return made.getvalue()


def tarred(folder, mode="w:gz", prefix="mine/", extra=()):
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode=mode) as archive:
        for path in sorted(folder.iterdir()):
            archive.add(path, prefix + path.name)
        for info, data in extra:
            archive.addfile(info, io.BytesIO(data))
    return made.getvalue()


def test_an_adapter_is_registered_listed_moved_taken_back_and_removed(world, saved):
    one = world.call("POST", "/v1/adapters", json={"name": "mine", "path": str(saved / "lora1")})
    assert one.status_code == 201
    assert one.json()["id"] == "mine"
    assert one.json()["method"] == "lora"
    two = world.call("POST", "/v1/adapters", json={"name": "mine", "path": "lora2"}).json()
    assert one.json()["version"] != two["version"]
    assert set(world.engine.served) == {v["version"].removeprefix("sha256:") for v in (one.json(), two)}
    listed = world.call("GET", "/v1/adapters").json()
    assert listed["object"] == "list"
    assert [c["version"] for c in listed["data"]] == [two["version"]]
    back = world.call("PUT", "/v1/adapters/mine/alias", json={"rollback": True})
    assert back.status_code == 200
    assert back.json()["version"] == one.json()["version"]
    forward = world.call("PUT", "/v1/adapters/mine/alias", json={"version": two["version"][:20]})
    assert forward.json()["version"] == two["version"]
    whole = world.call("GET", "/v1/adapters/mine").json()
    assert [m["action"] for m in whole["history"]] == ["moved", "moved", "rolled back", "moved"]
    assert len(whole["versions"]) == 2
    assert world.call("DELETE", "/v1/adapters/mine").json() == {
        "id": "mine",
        "object": "adapter",
        "deleted": True,
    }
    assert world.engine.served == {}
    assert all(drain for _, drain in world.engine.removed)
    assert world.call("GET", "/v1/adapters/mine").status_code == 404
    assert str(saved) not in json.dumps(whole)


def test_an_archive_is_taken_as_a_folder_is(world, saved):
    versions = set()
    for data in (
        zipped(saved / "lora1"),
        zipped(saved / "lora1", ""),
        tarred(saved / "lora1"),
        tarred(saved / "lora1", "w:xz", ""),
    ):
        answer = world.call("POST", "/v1/adapters", data={"name": "up"}, files={"archive": ("a", data)})
        assert answer.status_code == 201, answer.text
        versions.add(answer.json()["version"])
    versions.add(world.call("POST", "/v1/adapters", json={"name": "down", "path": "lora1"}).json()["version"])
    assert len(versions) == 1


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b'{"name": "a"}', b'{"path": "lora1"}', b'{"name": 3, "path": "lora1"}',
             b'{"name": "a", "path": "lora1", "more": 1}', b"\xff\xfe", b'{"name": "a/b", "path": "lora1"}',
             b'{"name": "a", "path": "../../etc"}',
             b'{"name": "a", "path": "lora1\\u0000"}', b'{"name": "a", "path": ""}'],
)  # fmt: skip
def test_bodies_that_cannot_be_meant_are_400_with_an_error_object(world, body):
    answer = world.call("POST", "/v1/adapters", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert world.registry.names() == []
    assert world.engine.served == {}


@pytest.mark.parametrize("form", [{}, {"data": {"name": "a"}}, {"files": {"archive": ("a", b"PK")}},
             {"data": {"name": "a"}, "files": {"archive": ("a", b"PK\3\4 no")}}])  # fmt: skip
def test_forms_that_lack_something_are_400(world, form):
    form = form or {"content": b"--x--", "headers": {"content-type": "multipart/form-data; boundary=x"}}
    answer = world.call("POST", "/v1/adapters", **form)
    assert answer.status_code == 400
    assert "error" in answer.json()


def test_an_archive_above_the_limit_is_refused(world):
    answer = world.call("POST", "/v1/adapters", data={"name": "a"}, files={"archive": ("a", b"x" * 200_001)})
    assert answer.status_code == 400
    assert "200,000" in answer.json()["error"]["message"]


def test_scopes_decide_who_may_look_and_who_may_change(world, saved):
    use = {"x-scopes": "use"}
    assert world.call("GET", "/v1/adapters", headers=use).status_code == 200
    for method, url in [("POST", "/v1/adapters"), ("PUT", "/v1/adapters/a/alias"), ("DELETE", "/v1/adapters/a"),
                        ("POST", "/v1/load_lora_adapter"), ("POST", "/unload_lora_adapter")]:  # fmt: skip
        body = {"json": {"rollback": True}} if method != "DELETE" else {}
        assert world.call(method, url, headers=use, **body).status_code == 403, url
    for name in ("only", "other"):
        world.call("POST", "/v1/adapters", json={"name": name, "path": "lora1"})
    seen = world.call("GET", "/v1/adapters", headers={"x-scopes": "use only"}).json()["data"]
    assert [c["id"] for c in seen] == ["only"]
    assert world.call("GET", "/v1/adapters/other", headers={"x-scopes": "use only"}).status_code == 404


def test_an_engine_that_refuses_leaves_the_name_where_it_was(world):
    first = world.call("POST", "/v1/adapters", json={"name": "mine", "path": "lora1"}).json()["version"]
    world.engine.refuses = True
    answer = world.call("POST", "/v1/adapters", json={"name": "mine", "path": "lora2"})
    assert answer.status_code == 400
    assert "full" in answer.json()["error"]["message"]
    assert world.call("GET", "/v1/adapters").json()["data"][0]["version"] == first


@pytest.mark.parametrize("prefix", ["/v1", ""])
def test_vllms_routes_answer_with_its_texts_and_errors(world, saved, prefix):
    load, unload = f"{prefix}/load_lora_adapter", f"{prefix}/unload_lora_adapter"
    body = {"lora_name": "sql", "lora_path": str(saved / "lora1"), "is_3d_lora_weight": False}
    answer = world.call("POST", load, json=body)
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'sql' added successfully.")
    again = world.call("POST", load, json=body)
    assert again.status_code == 400
    assert again.json()["error"]["type"] == "InvalidUserInput"
    assert again.json()["error"]["code"] == 400
    assert (
        world.call("POST", load, json={**body, "load_inplace": True, "lora_path": "lora2"}).status_code == 200
    )
    for missing in ({}, {"lora_name": "x"}, {"lora_path": "lora1"}, {"lora_name": "", "lora_path": "lora1"}):
        found = world.call("POST", load, json=missing)
        assert (found.status_code, found.json()["error"]["type"]) == (400, "InvalidUserInput")
    for path in ("nothing", "/etc", "."):
        found = world.call("POST", load, json={"lora_name": "x", "lora_path": path})
        assert (found.status_code, found.json()["error"]["type"], found.json()["error"]["code"]) == (
            404,
            "NotFoundError",
            404,
        )
    gone = world.call("POST", unload, json={"lora_name": "sql", "lora_int_id": 3})
    assert (gone.status_code, gone.text) == (200, "Success: LoRA adapter 'sql' removed successfully.")
    assert world.engine.served == {}
    lost = world.call("POST", unload, json={"lora_name": "sql"})
    assert (lost.status_code, lost.json()["error"]["type"]) == (404, "NotFoundError")
    assert world.call("POST", unload, json={}).json()["error"]["type"] == "InvalidUserInput"


# -- archives ----------------------------------------------------------------------------------------------------------


def link(name, target, kind=tarfile.SYMTYPE):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info, b""


def member(name, data=b"x", **facts):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in facts.items():
        setattr(info, key, value)
    return info, data


@pytest.mark.parametrize(
    "extra", [link("mine/README.md", "/etc/passwd"), link("mine/x", "../../x"),
              link("x", "mine/veneer.json", tarfile.LNKTYPE),
              link("pipe", "", tarfile.FIFOTYPE), link("device", "", tarfile.CHRTYPE), member("../veneer.json"),
              member("/etc/x"), member("mine/../../x"), member("mine/model.bin"), member("a.pkl"),
              member("mine/veneer.json"),
              member("other/README.md"), member("a\\..\\b"), member("C:x"), member("a/b/c/d/e"), member("x" * 500)],
    ids=lambda e: f"{e[0].name[:20]}-{e[0].linkname}",
)  # fmt: skip
def test_a_tar_that_reaches_outside_or_holds_a_link_or_a_pickle_is_refused(saved, tmp_path, extra):
    into = tmp_path / "into"
    into.mkdir()
    with pytest.raises(BadFile):
        unpack(tarred(saved / "lora1", extra=[extra]), into)
    assert list(into.iterdir()) == []
    assert sorted(os.listdir(tmp_path)) == ["into"]


def test_a_zip_that_reaches_outside_or_holds_a_link_is_refused(saved, tmp_path):
    symbolic = zipfile.ZipInfo("mine/README.md")
    symbolic.external_attr = (stat.S_IFLNK | 0o777) << 16
    for extra in [
        ("../veneer.json", "{}"),
        ("/x", ""),
        (symbolic, "/etc/passwd"),
        ("mine/training_args.bin", ""),
        ("a\\..\\..\\b", ""),
    ]:
        with pytest.raises(BadFile):
            unpack(zipped(saved / "lora1", extra=[extra]), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_archives_with_too_many_entries_or_bytes_are_refused(saved, tmp_path):
    with pytest.raises(BadFile, match="more than 64 entries"):
        unpack(zipped(saved / "lora1", extra=[(f"mine/{i}", "") for i in range(70)]), tmp_path)
    with pytest.raises(BadFile, match="more than 64 entries"):
        unpack(tarred(saved / "lora1", extra=[member(f"mine/{i}") for i in range(70)]), tmp_path)
    for data in (zipped(saved / "lora1"), tarred(saved / "lora1")):
        with pytest.raises(BadFile, match="more than 1,000 bytes"):
            unpack(data, tmp_path, largest=1000)
    assert not any(p.stat().st_size > 1000 for p in tmp_path.iterdir())


def test_a_zip_that_lies_about_its_sizes_writes_no_more_than_it_said(saved, tmp_path):
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted((saved / "lora1").iterdir()):
            archive.write(path, path.name)
        archive.writestr("README.md", b"\0" * 5_000_000)
    data = bytearray(made.getvalue())
    for at in [i for i in range(len(data)) if data[i : i + 4] == struct.pack("<I", 5_000_000)]:
        data[at : at + 4] = struct.pack("<I", 10)  # both headers say 10 bytes
    with contextlib.suppress(BadFile):
        unpack(bytes(data), tmp_path, largest=100_000)
    assert sum(p.stat().st_size for p in tmp_path.iterdir()) < 100_000


def test_damaged_archives_are_refused_and_never_raise_anything_else(saved, tmp_path):
    for whole in (
        zipped(saved / "lora1"),
        tarred(saved / "lora1"),
        tarred(saved / "lora1", "w:xz"),
        tarred(saved / "lora1", "w"),
    ):
        for cut in (0, 1, 10, len(whole) // 3, len(whole) // 2, len(whole) - 30):
            into = tmp_path / f"{len(whole)}-{cut}"
            into.mkdir()
            try:
                unpack(whole[:cut], into)
            except BadFile:
                continue
        for seed in range(40):
            changed = bytearray(whole)
            changed[(seed * 7919) % len(whole)] ^= 0x55
            changed[(seed * 104729) % min(600, len(whole))] ^= 0xAA
            into = tmp_path / f"{len(whole)}-x{seed}"
            into.mkdir()
            with contextlib.suppress(BadFile):
                unpack(bytes(changed), into)
