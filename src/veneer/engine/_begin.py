"""Beginning a generation without `generate`: for loops that keep their own cache and choose tokens by themselves.

What `generate`'s door does before the first call is done here once, and handed out as a session: where the prompt is,
added positions put in, conditions made. Later calls open the same session, or one made of parts of several.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ._attach import host_of
from ._frame import Session, local, opened
from ._generate import _open_generation
from ._names import session_for

INSERTED: Any = object()  # of a session whose added positions are in its cache already


def begin(model: nn.Module, names: Sequence[Any], inputs: dict[str, Any]) -> tuple[Session, dict[str, Any]]:
    """(session, inputs of the first forward) for a batch of prompts, a name (or None) for each row.

    inputs: input_ids (rows, tokens) and attention_mask (rows, tokens). Rows to which an edit adds positions come back
    as inputs_embeds, with the mask as long.
    """
    host = host_of(model)
    session = session_for(host, list(names))
    session.generating = True
    watched, local.read = local.read, None  # what is read to begin is no sign of a method's needs
    try:
        made = _open_generation(host, model, session, dict(inputs))
    finally:
        local.read = watched
    if "inputs_embeds" in made and not host.anatomy.facts.encoder_decoder:
        made.pop("input_ids", None)
    return session, made


def going_on(model: nn.Module, names: Sequence[Any], inserted: bool) -> Session:
    """A session for rows that began earlier, each by itself. inserted: whether any had positions added."""
    session = session_for(host_of(model), list(names))
    session.generating = True
    session.inserted = INSERTED if inserted else None
    return session


@contextmanager
def within(session: Session, mask: Tensor | None = None) -> Iterator[None]:
    """Calls of the block belong to `session`. mask: (rows, tokens of the call) bool, where theirs has 4 axes."""
    session.mask = mask
    with opened(session):
        yield
