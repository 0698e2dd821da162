"""The fingerprint of a base: kept while the base is what it was, and never longer."""

import hashlib

import pytest
import torch
from torch import nn

import veneer
from engine_tools import add, base
from veneer.engine import _fingerprint, fingerprint, host_of


def plainly(model):
    """What the files hold: digests over names, shapes, and eight values of each parameter."""
    shapes, values = hashlib.sha256(), hashlib.sha256()
    for name, p in model.named_parameters():
        if not name.startswith("veneer."):
            shapes.update(f"{name}:{tuple(p.shape)};".encode())
            flat = p.detach().reshape(-1)
            values.update(flat[:: max(1, flat.numel() // 8)][:8].float().numpy().tobytes())
    return {
        "class": type(model).__name__,
        "shapes": shapes.hexdigest()[:32],
        "values": values.hexdigest()[:32],
    }


def adapted():
    model = base("llama", double=False)
    add(model, "lora", "a", seed=1)
    return model


def seen(model):
    return fingerprint(host_of(model).anatomy, model)


def write(model):
    with torch.no_grad():
        model.model.embed_tokens.weight.add_(1)


def other_data(model):
    norm = model.model.norm
    norm.weight.data = norm.weight.data + 1


def other_module(model):
    old = model.model.norm
    model.model.norm = type(old)(old.weight.shape[0])
    model.model.norm.weight.data.mul_(3)


def other_shape(model):
    p = model.model.layers[0].mlp.up_proj.weight
    p.data = p.data.view(p.shape[1], p.shape[0])


def other_name(model):
    model.model.add_module("last_norm", model.model._modules.pop("norm"))


def one_more(model):
    model.register_parameter("more", nn.Parameter(torch.ones(3)))


@pytest.mark.parametrize("change", [write, other_data, other_module, other_shape, other_name, one_more])
def test_a_change_of_the_base_is_seen_after_its_fingerprint_was_kept(change):
    model = adapted()
    before = seen(model)
    assert before == plainly(model) == seen(model)
    change(model)
    assert seen(model) == plainly(model)
    assert seen(model) != before


def test_what_is_kept_is_read_once_and_adapters_do_not_matter(monkeypatch):
    model = adapted()
    taken = []
    read = _fingerprint._digests
    monkeypatch.setattr(_fingerprint, "_digests", lambda *args: taken.append(1) or read(*args))
    first = seen(model)
    add(model, "lora", "b", seed=2)
    veneer.detach(model, "a")
    assert seen(model) == first
    assert len(taken) == 1


def test_what_was_given_out_can_be_changed_without_changing_what_is_kept():
    model = adapted()
    seen(model)["values"] = "spoilt"
    assert seen(model) == plainly(model)


def test_tensors_without_versions_are_read_every_time():
    model = adapted()
    with torch.inference_mode():
        model.model.norm.weight = nn.Parameter(torch.ones(32), requires_grad=False)
        first = seen(model)
        model.model.norm.weight.mul_(5)
        assert seen(model) != first


def test_links_out_of_the_folder_are_refused_and_files_in_it_read(tmp_path):
    model = adapted()
    folder = veneer.save(model, "a", tmp_path / "one")
    veneer.load(model, folder, name="again")
    (tmp_path / "linked").symlink_to(folder)
    veneer.load(model, tmp_path / "linked", name="by a link to the folder")
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "veneer.json").write_bytes((folder / "veneer.json").read_bytes())
    (bad / "adapter.safetensors").symlink_to(folder / "adapter.safetensors")
    with pytest.raises(veneer.errors.BadFile, match="link"):
        veneer.load(model, bad, name="out")
