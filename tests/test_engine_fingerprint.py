"""The fingerprint of a base: what it is at this moment, however it was changed."""

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


def write_to_data(model):
    model.model.embed_tokens.weight.data.add_(1)


def fused_step(model):
    p = model.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    p.grad = torch.ones_like(p)
    version = p._version
    torch.optim.AdamW([p], lr=0.1, fused=True).step()
    assert p._version == version  # torch leaves no trace of it
    p.grad = None
    p.requires_grad_(False)


def several_dtypes(model):
    model.model.layers[0].to(torch.bfloat16)


def transposed(model):
    p = model.model.layers[0].self_attn.q_proj.weight
    p.data = p.data.T


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


@pytest.mark.parametrize(
    "change",
    [write, write_to_data, fused_step, several_dtypes, transposed, other_data, other_module, other_shape, other_name,
     one_more],
)  # fmt: skip
def test_a_change_of_the_base_is_seen_by_the_next_fingerprint(change):
    model = adapted()
    before = seen(model)
    assert before == plainly(model) == seen(model)
    change(model)
    assert seen(model) == plainly(model)
    assert seen(model) != before


def test_names_and_shapes_are_written_down_once_and_adapters_do_not_matter(monkeypatch):
    model = adapted()
    taken = []
    read = _fingerprint._shapes
    monkeypatch.setattr(_fingerprint, "_shapes", lambda *args: taken.append(1) or read(*args))
    first = seen(model)
    add(model, "lora", "b", seed=2)
    veneer.detach(model, "a")
    assert seen(model) == first
    assert len(taken) == 1


def test_a_head_that_the_plan_trains_whole_is_left_out():
    model = adapted()
    plan = veneer.plan(model, "lora", sites="attention.query", whole=["lm_head"])
    host = host_of(model)
    before = fingerprint(host.anatomy, model, plan)
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    assert fingerprint(host.anatomy, model, plan) == before
    write(model)
    assert fingerprint(host.anatomy, model, plan) != before


def test_tensors_without_versions_are_read_too():
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
