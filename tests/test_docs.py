"""The pages: every Python block runs, every `veneer` line is understood, every table is that of the code.

A page is one program: its blocks run in order, in one namespace, in an empty folder. Comments steer what is run:
`<!-- slow -->` before a block leaves it to the slow tests, `<!-- prints -->` before a text block says that the
Python block above it prints exactly this. `python tests/test_docs.py` writes the tables anew.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import io
import re
import shlex
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
GENERATED = {"catalogue.md", "capabilities.md"}
PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
    + [p for p in (ROOT / "docs").rglob("*.md") if p.name not in GENERATED]
)


# -- reading pages -------------------------------------------------------------------------------------------


@dataclass
class Block:
    """One fenced block: its language, its text, the comment right above it, and its line in the page."""

    language: str
    text: str
    marks: tuple[str, ...]
    line: int


def blocks_of(page: Path) -> list[Block]:
    found: list[Block] = []
    lines = page.read_text(encoding="utf-8").splitlines()
    i = 0
    while i < len(lines):
        if lines[i].startswith("```"):
            end = next(j for j in range(i + 1, len(lines)) if lines[j].startswith("```"))
            above = next((line for line in reversed(lines[:i]) if line.strip()), "")
            marks = tuple(re.findall(r"<!-- (\w+) -->", above))
            found.append(Block(lines[i][3:].strip(), "\n".join(lines[i + 1 : end]) + "\n", marks, i + 1))
            i = end
        i += 1
    return found


def commands_of(page: Path) -> list[str]:
    """The `veneer` lines of the page's shell blocks, continued lines joined, comments left out."""
    found = []
    for block in blocks_of(page):
        if block.language in ("sh", "console"):
            for line in block.text.replace("\\\n", " ").splitlines():
                words = shlex.split(line.removeprefix("$ "), comments=True)
                if words and words[0] == "veneer":
                    found.append(shlex.join(words[1:]))
    return found


def run_page(page: Path, folder: Path, slow: bool) -> list[str]:
    """Run a page's Python blocks; what differs from what the page says they print."""
    import torch

    torch.set_num_threads(1)
    module = types.ModuleType("page")  # a real one: what a page defines can be pickled
    wrong: list[str] = []
    said: str | None = None  # by the block above; None where it was left out
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "page", module)
        for block in blocks_of(page):
            if block.language == "python":
                if "slow" in block.marks and not slow:
                    said = None
                    continue
                out = io.StringIO()
                # Lines of the page, so that a traceback names them.
                code = compile("\n" * block.line + block.text, str(page), "exec", dont_inherit=True)
                with contextlib.redirect_stdout(out):
                    exec(code, vars(module))
                said = out.getvalue()
            elif "prints" in block.marks and said is not None and said.rstrip() != block.text.rstrip():
                wrong.append(f"{page.name}:{block.line} says\n{block.text}but it prints\n{said}")
    return wrong


def _with_python(slow: bool) -> list[Any]:
    chosen = []
    for page in PAGES:
        python = [b for b in blocks_of(page) if b.language == "python"]
        if any("slow" in b.marks for b in python) if slow else any("slow" not in b.marks for b in python):
            chosen.append(pytest.param(page, id=str(page.relative_to(ROOT))))
    return chosen


@pytest.fixture
def clean_registry():
    """A page's own methods stay on the page."""
    from veneer.edits import registry

    before = dict(registry())
    yield
    registry().clear()
    registry().update(before)


# -- the pages are true --------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", _with_python(slow=False))
def test_every_python_block_of_a_page_runs_and_prints_what_the_page_says(page, tmp_path, clean_registry):
    assert run_page(page, tmp_path, slow=False) == []


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize("page", _with_python(slow=True))
def test_slow_blocks_run_too(page, tmp_path, clean_registry):
    assert run_page(page, tmp_path, slow=True) == []


def _all_commands() -> list[Any]:
    return [
        pytest.param(command, id=f"{page.name}: {command[:60]}")
        for page in PAGES
        for command in dict.fromkeys(commands_of(page))
    ]


@pytest.mark.parametrize("command", _all_commands())
def test_every_veneer_line_of_a_page_is_understood(command):
    """Names of commands, flags, methods, recipes and options, as the command itself would look them up."""
    parse(command)


def parse(line: str) -> Any:
    """The click context of a command line, after the names that the command reads by itself were looked up."""
    import typer

    from veneer.cli._app import app
    from veneer.cli._common import STATE, method_options, typed_options

    words = shlex.split(line)
    assert words, "`veneer` alone is no example"
    command = typer.main.get_command(app).get_command(None, words[0])
    assert command is not None, f"veneer has no command '{words[0]}'"
    try:
        ctx = command.make_context(words[0], words[1:])
    finally:
        STATE.restore()
    arguments = list(ctx.args)
    if words[0] == "compare":
        from veneer.cli._compare_fields import split_file

        _, arguments = split_file(arguments)
    extras = _extras(arguments, words[0])
    given = typed_options(ctx.params.get("option"))
    flags = [o for p in command.params for o in p.opts]
    if words[0] == "compare":
        from veneer.cli._compare_fields import training_options

        training_options(extras, flags)
        _arms(ctx.params["methods"])
    elif words[0] in ("plan", "train"):
        from veneer.comparing.planning.arms import parse_arm
        from veneer.edits import build, registry, resolve
        from veneer.recipes import registry as recipes
        from veneer.training import Settings

        arm = parse_arm(ctx.params["method"], registry(), recipes())
        build(arm.method, **dict(arm.options))
        own = {k: v for k, v in extras.items() if k not in Settings.__dataclass_fields__}
        options = method_options(arm.method, {**own, **given}, words[0], flags)
        engine = ("exclude", "layers", "whole")
        build(
            arm.method,
            **resolve(type(build(arm.method)), {k: v for k, v in options.items() if k not in engine}),
        )
    elif extras:
        raise AssertionError(f"veneer {words[0]} leaves {extras} unread")
    for name in ("model", "data"):
        _builtin(name, ctx.params.get(name))
    return ctx


def _extras(arguments: list[str], command: str) -> dict[str, Any]:
    from veneer.cli._common import extra_options

    return extra_options(arguments, command)


def _arms(text: str) -> None:
    from veneer.comparing.planning.arms import parse_arms
    from veneer.edits import build, registry
    from veneer.recipes import registry as recipes

    families = {key: cls.facts.family for key, cls in registry().items()}
    if text:
        for arm in parse_arms(text, families, recipes(), families):
            if arm.is_trained:
                build(arm.method, **dict(arm.options))


def _builtin(kind: str, value: Any) -> None:
    from veneer.bases import builtin_bases
    from veneer.data import builtin_data

    if isinstance(value, str) and value.startswith("builtin:"):
        known = builtin_bases() if kind == "model" else builtin_data()
        assert value.removeprefix("builtin:") in known, f"{value} is not among {', '.join(known)}"


def test_a_stale_flag_a_wrong_method_and_a_wrong_option_are_seen():
    """The test above can fail."""
    from veneer.errors import VeneerError

    for line in (
        "plan builtin:minilm lorra",
        "plan builtin:minilm lora --ranks 8",
        "train --model builtin:minilm --data x.csv --method lora:rnk=8 --output runs/one",
        "compare --model builtin:minilm --data x.csv --methods lora,lorra --output runs/which",
        "compare --model builtin:minilm --data x.csv --methods lora --seedz 6 --output runs/which",
    ):
        with pytest.raises(VeneerError):
            parse(line)
    for line in ("plam builtin:minilm lora", "train --model builtin:tinylm --data x.csv --output runs/one"):
        with pytest.raises(AssertionError):
            parse(line)
    with pytest.raises(Exception, match="No such option"):
        parse("check x.csv --tsk classify")


def test_a_page_that_says_what_it_does_not_print_is_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python\nprint(1 + 1)\n```\n<!-- prints -->\n```text\n3\n```\n")
    (wrong,) = run_page(page, tmp_path, slow=False)
    assert "page.md:5 says\n3\nbut it prints\n2" in wrong


def prose_of(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)


@pytest.mark.parametrize("page", [pytest.param(p, id=str(p.relative_to(ROOT))) for p in PAGES])
def test_commands_flags_and_names_in_the_text_exist(page):
    """`veneer train`, `--max-length`, `veneer.engine.plan`, `src/veneer/...`: no name of the text is stale."""
    import typer

    import veneer
    from veneer.cli._app import app
    from veneer.cli._page import COMMANDS

    words = re.findall(r"`([^`]+)`", prose_of(page))
    group = typer.main.get_command(app)
    wrong = []
    for word in words:
        command = re.match(r"veneer (\w+)", word)
        if command and command[1] not in COMMANDS:
            wrong.append(word)
        flag = re.fullmatch(r"(--[a-z-]+)( .*)?", word)
        if flag and not any(flag[1] in _flags(group, name) for name in COMMANDS):
            wrong.append(word)
        dotted = re.match(r"veneer((\.[A-Za-z_]\w*)+)", word)
        if dotted and word != "veneer.json" and not _resolves(veneer, dotted[1][1:].split(".")):
            wrong.append(word)
        if re.fullmatch(r"(src|tests|docs)/[\w./-]+", word) and not (ROOT / word).exists():
            wrong.append(word)
    assert wrong == []


def _flags(group: Any, name: str) -> set[str]:
    try:
        command = group.get_command(None, name)
    except ModuleNotFoundError:
        return set()
    plain = {o for p in command.params for o in (*p.opts, *p.secondary_opts)}
    if name in ("train", "plan"):  # options of methods, by their names
        from veneer.edits import registry

        fields = [f for cls in registry().values() for f in dataclasses.fields(cls)]
        names = [n for f in fields for n in (f.name, *f.metadata.get("alias", ()))]
        plain |= {"--" + n.replace("_", "-") for n in names}
    return plain


def _resolves(thing: Any, path: list[str]) -> bool:
    for name in path:
        if not hasattr(thing, name):
            return False
        thing = getattr(thing, name)
    return True


def test_links_between_pages_lead_somewhere():
    broken = []
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
            is_here = not target.startswith("http") and Path(target).name not in GENERATED
            if is_here and not (page.parent / target).exists():
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert broken == []


def test_make_targets_that_pages_name_exist():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.M))
    named = {t for page in PAGES for t in re.findall(r"`make (\w+)", page.read_text(encoding="utf-8"))}
    assert named <= targets


def test_the_page_of_errors_names_every_kind_of_error():
    from veneer import errors

    kinds = {n for n, e in vars(errors).items() if inspect.isclass(e) and issubclass(e, errors.VeneerError)}
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    assert sorted(kinds - set(re.findall(r"`(\w+)`", page))) == []


def test_the_contract_page_names_every_port_every_function_and_every_fact():
    from veneer.edits import FUNCTIONS, PORTS, At, Facts, Spec

    page = (ROOT / "docs" / "design" / "contract.md").read_text(encoding="utf-8")
    words = set(re.findall(r"`(\w+)", page)) | set(re.findall(r"^(\w+)\(", page, flags=re.M))
    fields = [f.name for cls in (At, Facts, Spec) for f in dataclasses.fields(cls)]
    facts = [name for name in fields if not name.startswith("_")]
    assert [n for n in [*PORTS, *FUNCTIONS, *facts] if n not in words] == []


# -- tables from code ----------------------------------------------------------------------------------------


def own_methods() -> list[Any]:
    """The classes of veneer's own methods, by family and key."""
    from veneer.edits import registry

    own = [cls for cls in registry().values() if cls.__module__.startswith("veneer.")]
    return sorted(own, key=lambda cls: (cls.facts.family, cls.facts.key))


def methods() -> str:
    lines = ["| method | what it is | edits | merges | paper |", "|---|---|---|---|---|"]
    for cls in own_methods():
        place, _, number = cls.facts.paper.rpartition(":")
        page = {"openreview": "https://openreview.net/forum?id="}.get(place, "https://arxiv.org/abs/")
        paper = f"[{number}]({page}{number})" if number else ""
        ports = ", ".join(cls.ports) or "the head alone"
        merges = "yes" if _merges(cls) else "no"
        lines.append(f"| `{cls.facts.key}` | {_sentence(cls)} | {ports} | {merges} | {paper} |")
    return "\n".join(lines) + "\n"


def _sentence(cls: type) -> str:
    """Of "LoRA: a low-rank update beside a frozen weight. Hu et al.": what stands before the citation."""
    module = importlib.import_module(cls.__module__)
    first = inspect.cleandoc(module.__doc__ or "").split("\n\n")[0].replace("\n", " ")
    return (first.partition(": ")[2] or first).split(". ")[0].rstrip(".")


def _merges(cls: Any) -> bool:
    if cls.facts.mergeable is not None:
        return cls.facts.mergeable
    affine = "affine" in cls.arguments
    return bool(cls.ports) and all(p == "weight" or (affine and p in ("input", "output")) for p in cls.ports)


def aliases() -> str:
    """HF PEFT's names of options, with veneer's and the methods that have them."""
    users: dict[tuple[str, str], list[str]] = {}
    for cls in own_methods():
        for f in dataclasses.fields(cls):
            for alias in f.metadata.get("alias", ()):
                users.setdefault((alias, f.name), []).append(cls.facts.key)
    lines = ["| also accepted | veneer | methods |", "|---|---|---|"]
    lines += [f"| `{a}` | `{n}` | {', '.join(sorted(keys))} |" for (a, n), keys in sorted(users.items())]
    return "\n".join(lines) + "\n"


def peft_types() -> str:
    from veneer.interop._converter import converters

    rows = [f"| `{t}` | {', '.join(f'`{m}`' for m in c.methods)} |" for t, c in sorted(converters().items())]
    return "\n".join(["| type | methods |", "|---|---|", *rows]) + "\n"


TABLES = {"README.md": (methods,), "docs/from-hf-peft.md": (peft_types, aliases)}


def with_tables(page: str) -> str:
    """The page with its tables written anew, each between `<!-- table NAME -->` and `<!-- table end -->`."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for table in TABLES[page]:
        before, begin, rest = text.partition(f"<!-- table {table.__name__} -->\n")
        _, end, after = rest.partition("<!-- table end -->\n")
        assert begin, f"{page} has no place for the table {table.__name__}"
        assert end, f"the table {table.__name__} of {page} has no end"
        text = before + begin + table() + end + after
    return text


@pytest.mark.parametrize("page", TABLES)
def test_tables_of_pages_are_those_of_the_code(page):
    """`python tests/test_docs.py` writes them anew."""
    assert (ROOT / page).read_text(encoding="utf-8") == with_tables(page)


if __name__ == "__main__":
    for page in TABLES:
        (ROOT / page).write_text(with_tables(page), encoding="utf-8")
