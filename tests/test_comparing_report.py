"""The report: complete, self-contained, safe with odd names, and without overflow on a phone."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from test_comparing_fake import RATES, SIZES, FakeTrainer
from veneer.comparing import compare, from_results
from veneer.comparing.reporting.axes import Axis, LogAxis
from veneer.comparing.reporting.disagreements import pair_counts, read_scores
from veneer.comparing.reporting.filling import digest
from veneer.comparing.reporting.report import write_report

ARMS = ["lora:rank=1", "lora:rank=4", "broken", "impossible"]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    return compare(
        "builtin:m", "builtin:d", ARMS, output=folder, run_arm=FakeTrainer(), rates=RATES, budget="demo",
        sizes=SIZES, progress=None,
    )  # fmt: skip


@pytest.fixture(scope="module")
def page(result):
    return result.report.read_text()


class Tags(HTMLParser):
    """Every start tag with its attributes, and unclosed tags."""

    def __init__(self, text):
        super().__init__()
        self.found, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in ("meta", "input", "img", "wbr"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_fetches_nothing(page):
    tags = Tags(page)
    assert tags.open == []
    for tag, attributes in tags.found:
        assert tag not in ("link", "iframe", "object", "base", "form")
        assert attributes.get("src", "data:").startswith("data:")
        assert attributes.get("href", "#").startswith("#")
        assert not {"srcset", "style", "onload", "onclick", "action"} & set(attributes)
    assert "url(" not in page
    assert "@import" not in page
    assert not re.search(
        r"\b(?:https?:)?//(?!\s)[\w-]+\.\w", re.sub(r"<script>.*?</script>", "", page, flags=re.S)
    )


def test_the_policy_allows_this_pages_script_and_style_alone(page):
    policy = next(
        a["content"] for t, a in Tags(page).found if a.get("http-equiv") == "Content-Security-Policy"
    )
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    scripts = re.findall(r"<script>(.*?)</script>", page, re.S)
    assert rules["script-src"] == " ".join(map(digest, scripts))
    assert len(scripts) == 2  # the theme, before anything is painted, and the rest
    assert rules["style-src"] == digest(re.search(r"<style>(.*?)</style>", page, re.S)[1])
    assert "unsafe" not in policy
    assert "http" not in policy


def test_the_page_begins_with_the_answer_and_how_sure_it_is(page, result):
    main = page[page.index("<main") :]
    lead = html.unescape(re.sub(r"<[^>]+>", "", main[main.index('class="lead"') : main.index("<section")]))
    assert result.best in lead
    assert "95 % interval" in lead.replace("\N{NO-BREAK SPACE}", " ")
    assert "would usually be missed" in lead
    assert "Demonstration budget: a screen, no claims" in lead


def test_every_arm_stands_in_the_tables_the_charts_and_the_commands(page, result):
    text = html.unescape(page)
    for arm in result.analysis.arms:
        assert text.count(arm.arm) >= 5
    assert "impossible, not applicable (this base has no attention)" in re.sub(r"<[^>]+>", "", text)
    assert "--method lora:rank=4" in text
    assert "--learning-rate 1 " in text
    assert "broken (6 of 6 seeds)" in text


def test_it_says_what_the_design_cannot_say(page, result):
    limits = page[page.index('class="limits"') :]
    assert "does not make them equal" in limits
    assert "one data set and one base" in limits
    assert result.design.sha256 in limits
    assert "(cannot decide)" in page


def test_the_page_can_be_used_without_eyes_or_mouse(page):
    tags = Tags(page).found
    assert ("html", {"lang": "en"}) in tags
    charts = [attributes for tag, attributes in tags if tag == "svg"]
    assert charts
    assert all(a["role"] == "img" and len(a["aria-label"]) > 20 for a in charts)
    tables = [tag for tag, _ in tags if tag == "table"]
    assert len(tables) == sum(tag == "caption" for tag, _ in tags)
    assert all("scope" in attributes for tag, attributes in tags if tag == "th")
    scrolling = [attributes for _, attributes in tags if attributes.get("class") == "scroll"]
    assert all(a["tabindex"] == "0" and a["aria-label"] for a in scrolling)
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {a["aria-labelledby"] for tag, a in tags if tag == "section"} == set(ids) - {"item-data"}
    assert {a["href"][1:] for tag, a in tags if tag == "a"} <= set(ids)
    levels = [tag for tag, _ in tags if tag in ("h1", "h2", "h3")]
    assert levels[0] == "h1"
    assert levels.count("h1") == 1


def test_names_from_outside_are_text_and_never_markup(tmp_path):
    path = tmp_path / "x.jsonl"
    names = ["<script>alert(1)</script>", 'a"onload="x', "</style><b>", "\u202eright to left {{ 7 * 7 }}"]
    text = "</script><script>alert(2)</script><!-- <img src=x onerror=alert(3)> \u2028 ' \" &"
    lines = [
        {"arm": name, "seed": seed, "item": f"{item}{text}", "score": (item * (place + 2) + seed) % 3 > 0}
        for place, name in enumerate(names)
        for seed in range(3)
        for item in range(30)
    ]
    path.write_text("".join(json.dumps({**line, "score": float(line["score"])}) + "\n" for line in lines))
    page = from_results(path).report.read_text()
    tags = Tags(page)
    assert sum(tag == "script" for tag, _ in tags.found) == 3  # the theme, the data and the script
    assert not any("onload" in attributes for _, attributes in tags.found)
    assert not any(tag in ("img", "b") and "onerror" in attributes for tag, attributes in tags.found)
    assert "alert(2)" not in re.sub(r'<script type="application/json".*?</script>', "", html_of_scripts(page))
    shown = html.unescape(page.replace("<wbr>", ""))
    assert all(name in shown for name in names)
    data = json.loads(re.search(r'id="item-data">(.*?)</script>', page, re.S)[1])
    assert set(data["arms"]) == set(names)
    assert data["items"][0]["i"].endswith(text)


def html_of_scripts(page):
    return "".join(re.findall(r"<script.*?</script>", page, re.S))


def test_ticks_are_round_and_within_the_axis():
    axis = Axis.of([0.62], [0.91], 0, 100)
    assert axis.ticks() == pytest.approx([0.7, 0.8, 0.9])
    log = LogAxis.of([700, 2e7], 0, 100)
    assert log.ticks() == pytest.approx([1e3, 1e4, 1e5, 1e6, 1e7])
    one = LogAxis.of([0.02, 0.02], 0, 100)
    assert 0.02 in [round(tick, 6) for tick in one.ticks()]
    assert axis(0.62) < axis(0.91)


def chromium(tmp_path, address):
    """The page at `address` after its scripts ran, as HTML."""
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync --dump-dom"
    flags += " --disable-background-networking --disable-component-update --virtual-time-budget=4000"
    return subprocess.run(
        [CHROMIUM, *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", address],
        capture_output=True,
        text=True,
        timeout=120,
    ).stdout


def in_browser(tmp_path, page, script, width):
    """What `script` (an expression over `d`, the page's document) says in a frame of this width."""
    outer = tmp_path / "outer.html"
    outer.write_text(
        f'<body><iframe style="width:{width}px;height:900px;border:0" srcdoc="{html.escape(page)}"></iframe>'
        "<pre id=said></pre><script>onload = () => {const d = frames[0].document;"
        f"said.textContent = JSON.stringify({script})}}</script>"
    )
    shown = chromium(tmp_path, outer.as_uri())
    return json.loads(html.unescape(re.search(r'<pre id="said">(.*?)</pre>', shown, re.S)[1]))


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [320, 375, 768, 1400])
def test_nothing_runs_over_the_edge(tmp_path, page, width):
    script = """{width: d.documentElement.scrollWidth, over: [...d.querySelectorAll("main *")]
        .filter(e => !e.closest("svg"))
        .filter(e => d.defaultView.getComputedStyle(e.closest(".scroll") || e).overflowX !== "auto")
        .filter(e => e.getBoundingClientRect().right > d.defaultView.innerWidth + 1)
        .map(e => e.outerHTML.slice(0, 80))}"""
    found = in_browser(tmp_path, page, script, width)
    assert found["width"] <= width
    assert found["over"] == []


ACTIONS = """(() => {
    const w = d.defaultView, said = {};
    const key = (e, k) => e.dispatchEvent(new w.KeyboardEvent("keydown", {key: k, bubbles: true}));
    const change = (e, value, type) => { e.value = value; e.dispatchEvent(new w.Event(type, {bubbles: true})); };
    const all = [...d.querySelectorAll("#arms ~ .tablebox tbody tr")];
    const rows = () => all.filter(r => !r.hidden).map(r => r.dataset.arm);
    const tip = d.querySelector(".tip"), chart = d.querySelector("#groups ~ * svg");
    said.controls = [...d.querySelectorAll(".controls")].every(c => !c.hidden);
    key(chart, "ArrowRight"); said.first = [tip.hidden, tip.textContent];
    key(chart, "ArrowRight"); said.second = tip.textContent;
    key(chart, "Escape"); said.gone = tip.hidden;
    said.titles = d.querySelectorAll("svg title").length;
    said.all = rows();
    change(d.querySelector(".filter"), "rank=1", "input"); said.filtered = rows();
    said.faded = d.querySelectorAll("#groups ~ * svg .out").length;
    change(d.querySelector(".filter"), "", "input");
    change(d.querySelector(".verdict"), "worse", "change"); said.worse = rows();
    change(d.querySelector(".verdict"), "", "change"); said.back = rows();
    const axis = d.querySelector("select.axis"); change(axis, "step_seconds", "change");
    said.figures = [...d.querySelectorAll("figure[data-cost]")].filter(f => !f.hidden).map(f => f.dataset.cost);
    const [first, second] = ["first", "second"].map(name => d.querySelector("select." + name));
    const arms = [...first.options].map(o => o.textContent);
    change(first, arms.indexOf("full"), "change"); change(second, arms.indexOf("linear_probe"), "change");
    said.dispute = d.querySelector(".disputed .says").textContent;
    said.listed = d.querySelectorAll(".disputes li").length;
    d.querySelector(".disputed .plain").click(); said.more = d.querySelectorAll(".disputes li").length;
    change(d.querySelector(".search"), "test-17", "input");
    said.found = [...d.querySelectorAll(".what")].map(p => p.textContent);
    change(second, arms.indexOf("full"), "change"); said.same = d.querySelector(".disputed").textContent;
    return said})()"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_the_page_answers_keys_filters_and_choices(tmp_path, page, result):
    said = in_browser(tmp_path, page, ACTIONS, 1000)
    names = [arm.arm for arm in result.analysis.arms]
    assert said["controls"]
    assert said["first"][0] is False
    assert said["first"][1].startswith(names[0])
    assert said["second"].startswith(names[1])
    assert said["gone"]
    assert said["titles"] == 0  # the script shows them, so that the browser must not
    assert said["all"] == said["back"] == names
    assert said["filtered"] == ["lora:rank=1"]
    assert said["faded"] == len(names) - 1
    assert said["worse"] == [arm.arm for arm in result.analysis.arms if not arm.tied_with_best]
    assert said["figures"] == ["step_seconds"]
    scores = read_scores(result.folder / "scores.jsonl", ["full", "linear_probe"])
    more, less = pair_counts(scores)["0,1"]
    assert said["dispute"].startswith(f"full is better on {more} items, linear_probe on {less}, of 300.")
    assert said["listed"] == 12
    assert said["more"] == min(36, more + less)
    assert all("test-17" in text for text in said["found"])
    assert "two different arms" in said["same"]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_the_policy_lets_the_page_run_and_nothing_else(tmp_path, page):
    """The page by itself, as a person opens it, with a handler and a script that somebody smuggled in."""
    smuggled = '<p onclick="document.title = 1" id="trap"></p><script>document.title = "taken over"</script>'
    path = tmp_path / "page.html"
    path.write_text(page.replace("</main>", smuggled + "</main>"))
    shown = chromium(tmp_path, path.as_uri())
    assert "taken over" not in re.search(r"<title>(.*?)</title>", shown)[1]
    assert 'class="controls">' in shown or 'class="controls"' in shown.replace(' hidden=""', "")
    assert '<button type="button">Mean</button>' in shown  # the page's own script ran


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_click_on_a_heading_sorts_the_table(tmp_path, page):
    script = """(() => {
        const t = d.querySelector("table"), head = t.tHead.rows[0].cells[3], said = [];
        for (const _ of [1, 2]) {
            head.querySelector("button").click();
            const cells = [...t.tBodies[0].rows].map(row => row.cells[3].textContent);
            said.push([head.getAttribute("aria-sort"), cells]);
        }
        return said})()"""
    (first, up), (second, down) = in_browser(tmp_path, page, script, 1000)
    assert (first, second) == ("ascending", "descending")
    numbers = [int(text) for text in up if text != "–"]
    assert numbers == sorted(numbers)
    assert up[-1] == "–"  # what was not measured stays last
    assert [int(text) for text in down if text != "–"] == numbers[::-1]
    assert down[-1] == "–"


def test_a_control_that_misbehaves_is_said_before_anything_else(result, tmp_path):
    for name in ("summary.json", "results.jsonl", "scores.jsonl"):
        (tmp_path / name).write_text((result.folder / name).read_text())
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["controls"]
    assert "A control did not behave" not in write_report(tmp_path).read_text()
    bad = {
        "arm": "full",
        "control": "duplicate",
        "expected": "not separable from its anchor",
        "against": "lora",
    }
    bad |= {"behaved": False, "said": "<lora> is better", "difference": 0.1, "low": 0.05, "high": 0.15}
    summary |= {"controls": [bad], "notes": ["A note <of> the source."]}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    page = write_report(tmp_path).read_text()
    head = page[: page.index("<nav")]
    assert "A control did not behave: &lt;lora&gt; is better" in head
    assert "+10.0" in page
    assert "A note &lt;of&gt; the source." in page[page.index('id="limits"') :]


def test_the_conclusion_says_how_sure_it_is(result):
    tied = sum(arm.tied_with_best for arm in result.analysis.arms)
    assert tied > 1
    assert f"The best arm is one of those {tied}, with 95 % confidence." in result.sentence


THEMES = """(() => {
    const w = d.defaultView, b = d.querySelector(".theme"), said = [b.hidden];
    const paper = () => w.getComputedStyle(d.body).backgroundColor;
    b.focus(); said.push(d.activeElement === b);
    for (let i = 0; i < 4; i++) { said.push([b.textContent, paper()]); b.click(); }
    return said})()"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_the_colours_are_the_systems_until_a_button_chooses_others(tmp_path, page):
    hidden, focused, *shown = in_browser(tmp_path, page, THEMES, 1000)
    assert not hidden
    assert focused
    light, dark = "rgb(255, 255, 255)", "rgb(20, 24, 28)"
    assert [text for text, _ in shown] == [
        f"Colours: {t}" for t in ("automatic", "light", "dark", "automatic")
    ]
    assert [paper for _, paper in shown] == [light, light, dark, light]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_chosen_theme_is_there_when_the_file_is_opened_again(tmp_path, page):
    path = tmp_path / "page.html"
    path.write_text(page)
    outer = tmp_path / "outer.html"
    outer.write_text(
        f'<iframe src="{path.as_uri()}"></iframe><script>localStorage.setItem("veneer-theme", "dark")</script>'
    )
    chromium(tmp_path, outer.as_uri())  # files share one storage in this browser
    shown = chromium(tmp_path, path.as_uri())
    assert '<html lang="en" data-theme="dark">' in shown
    assert "Colours: dark" in shown
