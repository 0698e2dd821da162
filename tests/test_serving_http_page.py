"""The page at `/`: it fetches nothing from elsewhere, shows what is served, and asks several adapters side by side."""

from __future__ import annotations

import html
import json
import re
from types import SimpleNamespace

import httpx
import pytest
from fastapi.responses import HTMLResponse

from registry_tiny import adapter
from serving_tools import EchoEngine, running
from test_comparing_report import CHROMIUM, chromium
from veneer.serving import Registry
from veneer.serving.app import Keys, Settings, create_app

NAMES = ("deep", "an-adapter-with-a-name-that-is-as-long-as-names-of-adapters-become", "<b>soft</b>")
# A page of the same origin has the page in a frame, uses it as a person would, and writes down what it saw.
DRIVER = """<body><iframe id=frame src="/" style="border:0;width:%(width)dpx;height:900px"></iframe><pre id=said></pre>
<script>
document.getElementById("frame").onload = async (event) => {
  const d = event.target.contentDocument, get = (id) => d.getElementById(id);
  const soon = () => new Promise((done) => setTimeout(done, 20));
  const until = async (true_) => { for (let i = 0; i < 500 && !true_(); i++) await soon(); };
  await until(() => d.querySelectorAll("tbody tr").length > 2);
  %(script)s
};
</script>"""
ASK = """
  get("prompt").value = "abc";
  get("tokens").value = 7;
  get("prompt").focus();
  d.dispatchEvent(new KeyboardEvent("keydown", {key: "Enter", ctrlKey: true, bubbles: true}));
  await until(() => get("said").textContent.includes("answered"));
  await until(() => get("slots").textContent === "64");
  const root = d.documentElement;
  document.getElementById("said").textContent = JSON.stringify({
    on: get("adapters-title").textContent, jobs: get("training").hidden,
    title: d.title, base: get("base").textContent, said: get("said").textContent, slots: get("slots").textContent,
    rows: [...d.querySelectorAll("tbody tr")].map((row) => row.cells[1].textContent),
    answers: [...d.querySelectorAll("article")].map((a) => [
      a.querySelector("h3").firstChild.textContent, a.querySelector(".text").textContent, a.getAttribute("aria-busy")]),
    bold: d.querySelectorAll("b b, td b, th b, h3 b").length,
    wide: [root.scrollWidth, root.clientWidth],
    unnamed: [...d.querySelectorAll("input, select, textarea")].filter((x) => !x.labels.length).length,
  });
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    root = tmp_path_factory.mktemp("page")
    registry, engine = Registry(root / "registry", [root]), EchoEngine()
    for i, name in enumerate(NAMES):
        made = adapter(root / str(i), seed=i)
        with (
            pytest.MonkeyPatch.context() as patch
        ):  # such a name cannot be registered: the page must not rely on it
            patch.setattr("veneer.serving._registry.check_name", lambda name: None)
            registry.register(name, made)
    app, scripts = create_app(engine, registry), {}

    def drive(script: str, width: int):
        return HTMLResponse(DRIVER % {"script": scripts[script], "width": width})

    app.add_api_route("/page/drive", drive)
    with running(app) as found:
        yield SimpleNamespace(url=found.url, scripts=scripts, engine=engine)
    engine.close()
    registry.close()


def test_the_page_and_its_files_are_sent_with_a_policy_and_fetch_nothing_from_elsewhere(server):
    page = httpx.get(server.url + "/")
    assert page.headers["content-type"].startswith("text/html")
    assert not re.search(r"""(?:src|href)=["'](?:https?:)?//""", page.text)
    assert not re.search(r"<[^>]* (?:on[a-z]+|style)=", page.text)
    for path in ("/page/page.js", "/page/page.css"):
        answer = httpx.get(server.url + path)
        assert answer.status_code == 200
        assert "http://" not in answer.text
        assert "https://" not in answer.text
        assert "innerHTML" not in answer.text
        assert "script-src 'self'" in answer.headers["content-security-policy"]
        again = httpx.get(server.url + path, headers={"if-none-match": answer.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
    assert httpx.get(server.url + "/page/..%2f__init__.py").status_code == 404


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [1280, 400])
def test_one_prompt_goes_to_several_adapters_and_every_answer_is_shown_as_it_came(server, tmp_path, width):
    server.scripts["ask"] = ASK
    shown = chromium(tmp_path, f"{server.url}/page/drive?script=ask&width={width}")
    found = json.loads(html.unescape(re.search(r'<pre id="said">(.*?)</pre>', shown, re.S)[1]))
    assert found["base"] == "builtin:echo"
    assert (found["on"], found["jobs"]) == ("Adapters on builtin:echo", True)
    assert found["title"] == "builtin:echo · veneer"
    assert found["rows"] == ["builtin:echo", *sorted(NAMES)]
    assert found["said"] == "3 answered."
    assert found["answers"] == [[name, "cbacbac", "false"] for name in found["rows"][:3]]
    assert found["bold"] == 0
    assert found["unnamed"] == 0
    assert found["wide"][0] <= found["wide"][1] <= width


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_page_without_its_key_asks_for_it(tmp_path):
    engine = EchoEngine()
    registry = Registry(tmp_path / "registry")
    with running(create_app(engine, registry, Settings(), Keys(["letmein"]))) as server:
        shown = chromium(tmp_path, server.url + "/")
    door = re.search(r"<form id=\"door\"[^>]*>", shown)[0]
    assert "hidden" not in door
    engine.close()
    registry.close()
