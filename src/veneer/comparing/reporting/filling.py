"""Templates of the page, filled: style and script inside, and a policy that allows those alone."""

from __future__ import annotations

import base64
import hashlib
import json
from importlib import resources
from typing import Any


def fill(template: str, **given: Any) -> str:
    """A template of the page, with its style, script and policy."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(part), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters["breakable"] = _breakable
    css, js, theme = part("report.css"), part("report.js"), part("theme.js")
    policy = (
        f"default-src 'none'; script-src {digest(theme)} {digest(js)}; style-src {digest(css)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    return environment.get_template(template).render(
        css=Markup(css), js=Markup(js), theme=Markup(theme), policy=Markup(policy), chart=Markup, **given
    )


def part(name: str) -> str:
    """A template, style sheet or script of the page."""
    return (resources.files("veneer.comparing.reporting") / "page" / name).read_text(encoding="utf-8")


def digest(text: str) -> str:
    """As a content security policy names an inline script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def script_json(value: Any) -> str:
    """JSON that can stand in a script element: no character there can end it or begin a comment."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _breakable(name: str) -> Any:
    """A name that a line may break behind its punctuation."""
    from markupsafe import Markup, escape

    found = escape(name)
    for mark in "_:,+=":
        found = found.replace(mark, Markup(mark + "<wbr>"))
    return found
