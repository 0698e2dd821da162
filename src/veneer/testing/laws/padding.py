"""Law 10: real tokens do not know how they are padded."""

from .._law import agree, differ, law
from .._subject import Subject


@law(10, "padding", speaks_of=lambda base: bool(base.sides))
def padding(s: Subject) -> str:
    """Outputs of real tokens do not depend on the padding's side or length (position ids given)."""
    model = s.model()
    contents = s.base.contents(4)
    bare = s.evaluated(model, contents)
    s.attach(model)
    alone = [s.evaluated(model, [c])[0] for c in contents]
    differ(alone[0], bare[0], "the randomised adapter changes nothing")
    worst = 0.0
    for side in s.base.sides:
        for extra in (0, 3):
            found = s.evaluated(model, contents, side=side, extra=extra)
            for i, (row, expected) in enumerate(zip(found, alone)):
                expected = expected[: len(row)]
                worst = max(
                    worst,
                    agree(row, expected, f"row {i} padded on the {side} with {extra} more, against it alone"),
                )
    return f"{worst:.1e}"
