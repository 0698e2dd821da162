"""One step of training split between two processes has the gradients of a local one."""

import multiprocessing
from multiprocessing.connection import Client, Listener

import pytest
import safetensors.torch
import torch

import veneer
from engine_tools import add, base, inputs
from veneer.errors import Unsupported
from veneer.scaling import Exchange, serve, split

LAYERS = [
    f"bert.encoder.layer.{i}.{part}"
    for i in range(2)
    for part in ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
                 "intermediate.dense", "output.dense")
]  # fmt: skip


def server(address_queue):
    torch.set_num_threads(1)
    model = base("bert", double=False)
    with Listener(("127.0.0.1", 0), authkey=b"test") as listener:
        address_queue.put(listener.address)
        with listener.accept() as connection:
            serve(model, connection, LAYERS)


class Recorded(Exchange):
    """Keeps what was sent, to be looked at."""

    def __init__(self, connection):
        super().__init__(connection)
        self.tensors = []

    def __call__(self, what, module, tensor):
        self.tensors.append((what, module, tensor.detach().clone()))
        return super().__call__(what, module, tensor)


def step(model, given, labels):
    model.train()
    loss = model(**given, labels=labels).loss
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in veneer.adapters(model)["a"].leaves()]


@pytest.mark.parametrize("key", ["lora", "serial_adapter"])
def test_gradients_equal_local_ones_and_only_activations_cross(key):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=server, args=(queue,), daemon=True)
    process.start()
    given, labels = inputs("bert", 3), torch.tensor([0, 1, 1])
    local = base("bert", double=False)
    add(local, key, "a", size=0.1)
    loss, expected = step(local, given, labels)

    with Client(queue.get(timeout=120), authkey=b"test") as connection:
        exchange = Recorded(connection)
        model = split(base("bert", double=False), exchange, LAYERS)
        add(model, key, "a", size=0.1)
        exchange.tensors.clear()
        before = exchange.sent
        split_loss, found = step(model, given, labels)
        exchange.close()
    process.join(timeout=60)

    torch.testing.assert_close(split_loss, loss, atol=1e-6, rtol=0)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)
        assert b.abs().max() > 0
    assert not any("weight" in n for n, _ in model.named_parameters() if any(n.startswith(m) for m in LAYERS))
    assert {what for what, _, _ in exchange.tensors} == {"forward", "backward"}
    secret = [p.detach() for p in veneer.adapters(model)["a"].named().values()]
    for _, _, tensor in exchange.tensors:
        assert tensor.is_floating_point()
        assert tensor.dim() == 3
        assert not any(s.shape == tensor.shape and torch.equal(s, tensor) for s in secret)
    payload = sum(t.numel() * 4 for _, _, t in exchange.tensors)
    assert payload <= exchange.sent - before <= payload + 200 * len(exchange.tensors)


def test_methods_that_read_the_weight_say_that_it_is_elsewhere():
    class Nowhere:
        def send_bytes(self, message):
            raise AssertionError("nothing may be sent")

    model = split(base("bert", double=False), Exchange(Nowhere()), LAYERS)
    with pytest.raises(Unsupported, match="on the server"):
        veneer.attach(model, "dora")


def test_a_foreign_message_is_refused():
    from veneer.errors import BadFile
    from veneer.scaling._split import _unpack

    for message in (b"", b"garbage", safetensors.torch.save({"a": torch.zeros(1), "b": torch.zeros(1)})):
        with pytest.raises(BadFile):
            _unpack(message)
