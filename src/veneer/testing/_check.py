"""Running laws: every law on every base, with what follows for the method as a whole."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from veneer.edits import Method, build, registry
from veneer.errors import Unsupported

from . import bases as tiny
from . import laws as _laws  # noqa: F401  (registers them)
from ._law import LAWS, Broken, DoesNotApply, Law, NotClaimed, chosen, mandatory
from ._report import DOES_NOT_APPLY, FAILED, NOT_CLAIMED, PASSED, LawReport, LawRow
from ._subject import Subject

Options = Mapping[str, Any] | Callable[[Any], Mapping[str, Any]]


def check_method(
    method: Any,
    *,
    laws: Iterable[str | int] | str | int | None = None,
    bases: Iterable[str | tiny.TinyBase] | None = None,
    references: Any = None,
    place: Callable[[Any], Any] | None = None,
    options: Options | None = None,
    raise_on_failure: bool = False,
) -> LawReport:
    """Run laws on a method: a key, a class made with `@method`, or an instance.

    laws: names or numbers; bases: names of tiny bases (default: all that can be built here); references: a
    package or a mapping in which the method's key names a reference, for the law of the equation, and
    `place` how a case of it becomes a layer. options: hyperparameters and attach's options for the laws,
    or a function of the base that gives them; "inputs" is a function of contents that gives extra inputs
    of a call.
    Returns a row for each law and base; `.check()` raises AssertionError, as raise_on_failure=True does here.
    """
    made = build(method)
    report = LawReport(made.key)
    run, on = chosen(laws), [tiny.get(b) for b in (tiny.names() if bases is None else bases)]
    reference = _reference(references, made.key)
    applies = []
    for base in on:
        given = options(base) if callable(options) else options
        subject = Subject(method, base, given, reference, place)
        if not subject.reason:
            applies.append(base)
        report.rows += [_run(law, subject) for law in run if law.name != "equation"]
    if "equation" in [law.name for law in run]:  # it has bases of its own
        given = options(on[0]) if callable(options) else options  # a size that fits; cases bring their own
        report.rows.insert(
            0, _run(LAWS["equation"], Subject(method, on[0], given, reference, place), "layer")
        )
    _demand(report, made, run, applies, reference)
    return report.check() if raise_on_failure else report


def run(
    methods: Iterable[Any] | None = None,
    laws: Iterable[str | int] | None = None,
    *,
    bases: Iterable[str] | None = None,
    options: Mapping[str, Options] | None = None,
    references: Any = None,
    progress: Callable[[str], None] | None = None,
) -> list[LawReport]:
    """Laws over methods (default: all registered), a report for each. options: by key."""
    reports = []
    for what in list(registry()) if methods is None else methods:
        key = build(what).key
        if progress is not None:
            progress(key)
        reports.append(
            check_method(
                what, laws=laws, bases=bases, options=(options or {}).get(key), references=references
            )
        )
    return reports


def _reference(references: Any, key: str) -> Any:
    if references is None:
        return None
    if isinstance(references, Mapping):
        return references.get(key)
    found = getattr(references, key, None)
    if found is None and hasattr(references, "__path__"):
        import importlib
        import importlib.util

        name = f"{references.__name__}.{key}"
        found = importlib.import_module(name) if importlib.util.find_spec(name) is not None else None
    return found


def _run(law: Law, s: Subject, base: str = "") -> LawRow:
    begin = time.perf_counter()
    status, detail, value = _outcome(law, s)
    return LawRow(
        law.number, law.name, base or s.base.name, status, detail, value, time.perf_counter() - begin
    )


def _outcome(law: Law, s: Subject) -> tuple[str, str, float | None]:
    declined = dict(s.facts.not_claimed)
    reason = declined.get(law.name) or declined.get(str(law.number))
    if s.reason and law.name != "equation":
        return DOES_NOT_APPLY, s.reason, None
    if not law.speaks_of(s.base):
        return DOES_NOT_APPLY, f"the law says nothing about a base like {s.base}", None
    if reason is not None:
        if law.name in mandatory(s.method.ports):
            ports = ", ".join(s.method.ports)
            return FAILED, f"declined ({reason}), and no method of the port {ports} may decline it", None
        return NOT_CLAIMED, reason, None
    try:
        return PASSED, law.check(s) or "", None
    except Broken as e:
        return FAILED, str(e), e.value
    except NotClaimed as e:
        return NOT_CLAIMED, str(e), None
    except DoesNotApply as e:
        return DOES_NOT_APPLY, str(e), None
    except Unsupported as e:
        return DOES_NOT_APPLY, f"refused: {e.what}", None
    except Exception as e:  # what a law meets is what a user would meet
        return FAILED, f"{type(e).__name__}: {e}", None


def _demand(report: LawReport, made: Method, run: list[Law], applies: list[Any], reference: Any) -> None:
    """At least one base applies, and each mandatory law was seen to hold on one that it speaks of."""
    if not applies:
        report.missing.append("the method finds no site on any of these bases")
        return
    for law in run:
        if law.name not in mandatory(made.ports) or (law.name == "equation" and reference is None):
            continue
        speaks = [b.name for b in applies if law.speaks_of(b)]
        status = report.of(law.name)
        declared = law.name == "identity" and status == NOT_CLAIMED  # starts_as_identity=False, with a reason
        # One form has nothing to compare with; a reference that is no layer is met beside the method.
        silent = law.name in ("one_form", "equation") and status == DOES_NOT_APPLY
        if speaks and status not in (PASSED, FAILED) and not declared and not silent:
            reasons = {r.detail for r in report.rows if r.law == law.name and r.base in speaks}
            report.missing.append(
                f"{law.number} {law.name} is mandatory for {', '.join(made.ports)}, not seen to hold: "
                + "; ".join(sorted(reasons))
            )
