"""One forward of the base for the batches of several adapters, and a loss for each of them.

A loss is a function of a model: `lambda model: task.loss(model, batch)`. It is asked twice. The first time it is
given a `Seat`, which takes down what it calls the model with and stops it there; then all calls become one, row by
row under each member's adapter; the second time the seat answers with the member's own rows, cut to their length.
So a task knows nothing of cohorts, and a cohort nothing of tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from veneer.errors import BadData, Unsupported
from veneer.tasks._answers import output_layer
from veneer.tasks._collate import takes
from veneer.training._kept import Played, played
from veneer.training.cohorts.lengths import ONE_MORE, of_like_length

Loss = Callable[[Any], Tensor]

# Inputs with a place for each token, and what stands at a place that was added behind.
FILLING = {
    "input_ids": None, "attention_mask": 0, "token_type_ids": 0, "position_ids": 0, "inputs_embeds": 0.0,
    "decoder_input_ids": None, "decoder_attention_mask": 0, "decoder_inputs_embeds": 0.0, "prompt_mask": 0,
}  # fmt: skip
BY_TOKEN = ("start_logits", "end_logits")  # outputs of two axes whose second is the token
ENTERS = ("input_ids", "inputs_embeds")
LEAVES = (
    "decoder_input_ids",
    "decoder_inputs_embeds",
    *ENTERS,
)  # the output has tokens of the decoder, if there is one
NOT_ROWS = ("past_key_values", "loss")


class _Asked(BaseException):
    """Carries a call of the model out of a loss; no `except Exception` on the way takes it."""

    def __init__(self, inputs: dict[str, Any]) -> None:
        super().__init__("the model was called")
        self.inputs = inputs


class Seat:
    """Stands where a loss expects its model: asks, then answers. All else is the model's own."""

    def __init__(self, model: nn.Module, answer: Any = None) -> None:
        self._model, self._answer, self.wants_hidden = model, answer, False

    def __getattr__(self, name: str) -> Any:
        if name == "get_output_embeddings":
            return self._output_embeddings
        return getattr(self._model, name)

    def _output_embeddings(self) -> Any:
        self.__dict__["wants_hidden"] = True
        return self._model.get_output_embeddings()  # type: ignore[operator]

    def __call__(self, *args: Any, **inputs: Any) -> Any:
        if self._answer is None:
            if args:
                inputs = {**dict(zip(_names(self._model), args)), **inputs}
            raise _Asked(inputs)
        return self._answer()


def _names(model: nn.Module) -> list[str]:
    import inspect

    return list(inspect.signature(model.forward).parameters)


@dataclass
class Ask:
    """One member's part of a step. `loss` is the function; `inputs` what it calls the model with."""

    name: str
    loss: Loss
    inputs: dict[str, Any] = field(default_factory=dict)
    wants_hidden: bool = False
    kept: Played | None = None
    value: Tensor | None = None
    error: BaseException | None = None

    @property
    def rows(self) -> int:
        return next((v.shape[0] for v in self.inputs.values() if isinstance(v, Tensor) and v.dim()), 0)


def shared_losses(
    model: nn.Module,
    losses: Mapping[str, Loss],
    seeds: Mapping[str, int] | None = None,
    kept: Mapping[str, Played | None] | None = None,
) -> dict[str, Tensor | Exception]:
    """{name: scalar loss, or the error that this member's part raised}: one forward for all that fit together.

    seeds: of what each member's adapter drops; None draws from torch's generator. kept: what is kept of each member's
    batch below its lowest edit; members with the same prefix share a forward that begins behind it.

    Members whose inputs cannot stand in one batch (other names, pictures of other sizes) get a forward for each
    kind; on the CPU also those whose lengths differ so much that filling up would cost more than another call. Where
    a shared forward fails, each member is run by itself, so that the error is that of its cause alone.
    """
    asks = [_asked(model, name, loss) for name, loss in losses.items()]
    for ask in asks:
        ask.kept = (kept or {}).get(ask.name)
    for group in _groups(model, [a for a in asks if a.error is None]):
        _run(model, group, seeds or {})
    return {a.name: a.value if a.error is None else a.error for a in asks}  # type: ignore[misc]


def _asked(model: nn.Module, name: str, loss: Loss) -> Ask:
    ask, seat = Ask(name, loss), Seat(model)
    try:
        loss(seat)
        raise Unsupported(
            f"the loss of '{name}' never called its model.", next_step="call it once: model(**inputs)"
        )
    except _Asked as asked:
        ask.inputs, ask.wants_hidden = asked.inputs, seat.wants_hidden
        for n, v in ask.inputs.items():
            if n in FILLING and isinstance(v, Tensor) and v.dim() > 1 and v.shape[0] == 1 < ask.rows:
                ask.inputs[n] = v.expand(ask.rows, *v.shape[1:])  # positions that all rows share
        ask.error = _wrong(ask)
    except Exception as error:
        ask.error = error
    return ask


def _wrong(ask: Ask) -> Exception | None:
    """What would shift the rows of others: no rows, or inputs that disagree on how many there are."""
    shapes = {n: tuple(v.shape) for n, v in ask.inputs.items() if isinstance(v, Tensor) and v.dim()}
    if not ask.rows:
        return BadData(
            f"the batch of '{ask.name}' has no rows.", next_step="leave the member out of this step"
        )
    rows = {n: s[0] for n, s in shapes.items()}
    masks = {n: s for n, s in shapes.items() if n == "attention_mask" and len(s) == 2}
    ids = shapes.get("input_ids", shapes.get("inputs_embeds", ()))[:2]
    if len(set(rows.values())) > 1 or any(ids and s != ids for s in masks.values()):
        shown = ", ".join(f"{n} {s}" for n, s in shapes.items())
        return BadData(
            f"the inputs of '{ask.name}' do not have the same rows and tokens: {shown}.",
            next_step="inputs that are padded to one length",
        )
    return None


def _groups(model: nn.Module, asks: Sequence[Ask]) -> list[list[Ask]]:
    """Members whose inputs can be rows of one batch."""
    pads = takes(model, "attention_mask")
    found: dict[Any, list[Ask]] = {}
    for ask in asks:
        key: list[Any] = [ask.wants_hidden, ask.kept and ask.kept.prefix]
        for name, value in sorted(ask.inputs.items()):
            if name == "attention_mask" and pads:
                continue  # made where it is missing
            if not isinstance(value, Tensor):
                key.append((name, repr(value)))
            elif pads and name in FILLING:
                key.append((name, value.dtype, tuple(value.shape[2:])))
            else:
                key.append((name, value.dtype, tuple(value.shape[1:])))
        found.setdefault(tuple(key), []).append(ask)
    if not pads or next(model.parameters()).device.type != "cpu":
        return list(found.values())  # there a call more costs more than filling up
    return [part for group in found.values() for part in _of_like_length(group)]


def _of_like_length(group: list[Ask]) -> list[list[Ask]]:
    """The group in parts that fill little up, each in the order of the group."""
    sizes = [(a.rows, _length(a.inputs, ENTERS)) for a in group]
    return [[group[i] for i in part] for part in of_like_length(sizes, ONE_MORE)]


def _run(model: nn.Module, group: list[Ask], seeds: Mapping[str, int]) -> None:
    """The forward of a group, and the loss of each member from its own rows of the output."""
    from veneer import engine

    before = engine.draws(model, [a.name for a in group])
    try:
        answers = _forward(model, group, seeds)
    except Exception as error:
        if len(group) == 1:
            group[0].error = error
            return
        engine.put_draws(model, before)
        for ask in group:  # whose fault it was
            _run(model, [ask], seeds)
        return
    for ask, answer in zip(group, answers):
        try:
            ask.value = ask.loss(Seat(model, answer))
        except Exception as error:
            ask.error = error


def _forward(model: nn.Module, group: list[Ask], seeds: Mapping[str, int]) -> list[Callable[[], Any]]:
    """One call of the model for all rows; for each member a function that gives its output."""
    from veneer import engine

    inputs = together(model, [a.inputs for a in group])
    if takes(model, "use_cache"):
        inputs["use_cache"] = False
    names = [a.name for a in group for _ in range(a.rows)]
    head = output_layer(model) if group[0].wants_hidden else None
    lengths = {a.name: (_length(a.inputs, ENTERS), _length(a.inputs, LEAVES)) for a in group}
    with engine.rows(model, names), engine.dropout_seeds(model, seeds, lengths), played(model, _kept(group)):
        output, hidden = _call(model, head, inputs)
    answers, start = [], 0
    for ask in group:
        span = (start, start + ask.rows)
        tokens = (_length(ask.inputs, LEAVES), _length(inputs, LEAVES))
        if hidden is None:
            answers.append(_constant(cut(output, span, *tokens, len(names))))
        else:
            own = cut(hidden, span, *tokens, len(names))
            answers.append(_through(head, own))
        start += ask.rows
    return answers


def _kept(group: Sequence[Ask]) -> Played | None:
    """The kept states of all rows, filled up behind as their inputs are."""
    first = group[0].kept
    if first is None:
        return None
    each = [a.kept.states for a in group if a.kept is not None]
    states = {place: torch.cat(_filled([s[place] for s in each], 0.0)) for place in first.prefix.places}
    return Played(first.prefix, states, {k: v for a in group if a.kept for k, v in a.kept.shapes.items()})


def _constant(value: Any) -> Callable[[], Any]:
    return lambda: value


def _through(head: Any, hidden: Tensor) -> Callable[[], Any]:
    """The output layer on a member's own hidden states: a loss that watches the layer sees them enter."""
    return lambda: SimpleNamespace(logits=head(hidden))


def _call(model: nn.Module, head: nn.Module | None, inputs: dict[str, Any]) -> tuple[Any, Tensor | None]:
    """The output, and what entered the output layer where its logits are that layer's and nothing else."""
    if head is None:
        return model(**inputs), None
    from veneer import engine
    from veneer.tasks._answers import hidden_states, is_all

    before = engine.draws(model, list(engine.adapters(model)))
    hidden, first = hidden_states(model, head, inputs)
    if hidden is not None and hidden.dim() == 3 and is_all(head, hidden, first):
        return None, hidden
    engine.put_draws(model, before)
    return model(**inputs), None


def _length(inputs: Mapping[str, Any], names: Sequence[str]) -> int:
    """Tokens of a row, of the first of these inputs that there is."""
    for name in names:
        value = inputs.get(name)
        if isinstance(value, Tensor) and value.dim() >= 2:
            return value.shape[1]
    return 0


def together(model: nn.Module, each: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The inputs of several batches as those of one, shorter ones filled up behind and masked there.

    Behind, on whichever side a batch has its own padding: places of tokens, counted from the left, stay.
    """
    made: dict[str, Any] = {}
    names = list(dict.fromkeys(n for inputs in each for n in inputs))
    for ids, mask in (("input_ids", "attention_mask"), ("inputs_embeds", "attention_mask")):
        given = [i[ids].shape for i in each if isinstance(i.get(ids), Tensor)]
        if given and mask not in names and len({s[1] for s in given}) > 1:
            names.append(mask)
    for name in names:
        values = [_given(inputs, name) for inputs in each]
        if not isinstance(values[0], Tensor) or values[0].dim() == 0:
            made[name] = values[0]
            continue
        if name in FILLING and values[0].dim() >= 2:
            fill = FILLING[name]
            fill = _pad_id(model) if fill is None else fill
            values = _filled(values, fill)
        made[name] = torch.cat(values)
    return made


def _pad_id(model: nn.Module) -> int:
    # The base's own, not the tokenizer's: some bases look for it to find the last token, or to count positions.
    found = getattr(getattr(model, "config", None), "pad_token_id", None)
    return found if isinstance(found, int) else 0


def _given(inputs: Mapping[str, Any], name: str) -> Any:
    """An input, or the mask of a batch that came without one: all its tokens are real."""
    value = inputs.get(name)
    if value is None and name == "attention_mask":
        like = inputs.get("input_ids", inputs.get("inputs_embeds"))
        return torch.ones(like.shape[:2], dtype=torch.long, device=like.device)  # type: ignore[union-attr]
    return value


def _filled(values: Sequence[Tensor], fill: Any) -> list[Tensor]:
    longest = max(v.shape[1] for v in values)
    found = []
    for v in values:
        missing = longest - v.shape[1]
        found.append(
            v if not missing else torch.cat([v, v.new_full((v.shape[0], missing, *v.shape[2:]), fill)], 1)
        )
    return found


def cut(output: Any, span: tuple[int, int], own: int, longest: int, total: int, name: str = "") -> Any:
    """A member's rows of an output, with as many tokens as its own batch has."""
    if isinstance(output, Tensor):
        if output.dim() == 0 or output.shape[0] != total:
            return output
        rows = output[span[0] : span[1]]
        by_token = output.dim() == 3 or name in BY_TOKEN
        # Whole, since losses look at logits as one long list of tokens.
        return rows[:, :own].contiguous() if by_token and own < longest == output.shape[1] else rows
    if hasattr(output, "items"):
        cut_one = {
            k: cut(v, span, own, longest, total, k)
            for k, v in output.items()
            if k not in NOT_ROWS and v is not None
        }
        return type(output)(**cut_one) if type(output) is not dict else cut_one
    if isinstance(output, (tuple, list)):
        each = (cut(v, span, own, longest, total) for v in output)
        return type(output)(*each) if hasattr(output, "_fields") else type(output)(each)
    return output
