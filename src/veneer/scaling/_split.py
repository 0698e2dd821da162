"""Split training: the server holds the frozen matrices, the client holds data, labels and adapters.

The client runs the model; each frozen linear layer is a request. What crosses the wire is activations and their
gradients, never token ids, labels or a tensor of an adapter. Messages are safetensors, so nothing that is read can
run code; the transport is any `multiprocessing.connection`.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from veneer.errors import BadFile, Unsupported


class Exchange:
    """The one way in which tensors leave this process: send(what, module, tensor) -> tensor. Counts its bytes."""

    def __init__(self, connection: Any) -> None:
        self.connection, self.sent, self.received = connection, 0, 0
        self._lock = threading.Lock()  # backward may run on another thread

    def __call__(self, what: str, module: str, tensor: Tensor) -> Tensor:
        message = _pack(what, module, tensor)
        with self._lock:
            self.connection.send_bytes(message)
            answer = self.connection.recv_bytes()
        self.sent += len(message)
        self.received += len(answer)
        kind, _, value = _unpack(answer)
        if kind == "error":
            raise Unsupported(
                f"the server could not answer '{what}' for '{module}'.",
                next_step="look at the server's own output; then start both again",
            )
        return value

    def close(self) -> None:
        self.connection.send_bytes(_pack("stop", "", torch.zeros(0)))


def _pack(what: str, module: str, tensor: Tensor) -> bytes:
    # The name carries request and module; safetensors' metadata would do too, but not every reader shows it.
    return safetensors.torch.save({f"{what}|{module}": tensor.detach().contiguous()})


def _unpack(message: bytes) -> tuple[str, str, Tensor]:
    try:
        ((name, value),) = safetensors.torch.load(message).items()
        what, module = name.split("|", 1)
    except Exception as e:
        raise BadFile(
            f"a message of {len(message)} bytes is not one of this protocol ({e}).",
            next_step="the same release of veneer on both sides",
        ) from None
    return what, module, value


class _Remote(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, module: str, exchange: Exchange) -> Tensor:
        ctx.module, ctx.exchange = module, exchange
        return exchange("forward", module, x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return ctx.exchange("backward", ctx.module, gradients[0]), None, None


class RemoteLinear(nn.Module):
    """A frozen linear layer whose weight lies on the server: x (..., in) -> (..., out)."""

    def __init__(self, name: str, module: Any, exchange: Exchange) -> None:
        super().__init__()
        self.name, self.exchange = name, exchange
        self.in_features, self.out_features = int(module.in_features), int(module.out_features)
        self.bias = None
        self._dtype = module.weight.dtype

    @property
    def weight(self) -> Tensor:
        """Shape and dtype only: there are no values here."""
        return torch.empty(self.out_features, self.in_features, dtype=self._dtype, device="meta")

    def dense_weight(self) -> Tensor:
        raise Unsupported(
            f"the weight of '{self.name}' is on the server, and this method needs to read it.",
            next_step="veneer methods    lists them: those that only add to outputs or to the context do not",
        )

    def forward(self, x: Tensor) -> Tensor:
        return _Remote.apply(x, self.name, self.exchange)


def split(model: nn.Module, exchange: Exchange, modules: Sequence[str]) -> nn.Module:
    """On the client: the named linear layers become requests, and their weights are dropped. Before attaching."""
    if "veneer" in model._modules:
        raise Unsupported(
            "the model carries adapters already; split it first, then attach.",
            next_step="veneer.detach(model, name), split, and attach on the client",
        )
    for name in modules:
        parent, _, last = name.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, last, RemoteLinear(name, model.get_submodule(name), exchange))
    return model


@torch.no_grad()
def serve(model: nn.Module, connection: Any, modules: Sequence[str]) -> int:
    """On the server: answer requests for the named layers until the client stops; returns how many there were."""
    allowed, answered = set(modules), 0
    while True:
        what, name, x = _unpack(connection.recv_bytes())
        if what == "stop":
            return answered
        if name not in allowed or what not in ("forward", "backward"):
            connection.send_bytes(_pack("error", name, torch.zeros(0)))
            continue
        layer = model.get_submodule(name)
        y = layer(x) if what == "forward" else x @ layer.weight.to(x.dtype)  # type: ignore[operator, union-attr]
        connection.send_bytes(_pack("answer", name, y))
        answered += 1
