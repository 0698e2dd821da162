"""The names that people type are there, and importing veneer costs next to nothing."""

import subprocess
import sys

import pytest

import veneer

NAMES = (
    "open_base", "anatomy", "method", "methods", "plan", "attach", "adapters", "activate", "active", "rows",
    "trainable", "parameters", "save", "load", "export", "merge", "unmerge", "detach", "train", "compare",
    "predict", "testing", "Cohort",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_name_of_the_interface_is_there(name):
    assert getattr(veneer, name) is not None
    assert name in dir(veneer)


def test_rooms_whose_name_is_also_a_verb_answer_the_call():
    from engine_tools import base

    assert "lora" in {m.key for m in veneer.methods()}
    assert veneer.method("lora").__name__ == "LoRA"
    model = base("bert")
    found = veneer.anatomy(model)
    veneer.attach(model, "lora")
    assert veneer.anatomy(model).to_dict() == found.to_dict()


def test_importing_veneer_loads_nothing_but_itself_and_the_core_needs_torch_and_safetensors_alone():
    program = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        apart = ('transformers', 'peft', 'accelerate', 'datasets', 'sklearn', 'scipy', 'typer', 'rich')
        if name.split('.')[0] in apart:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
import torch
before = set(sys.modules)
import veneer
assert all(m.split('.')[0] == 'veneer' for m in set(sys.modules) - before)
from torch import nn
model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
veneer.attach(model, 'lora', sites='all-linear', rank=2)
x = torch.randn(3, 4)
y = model(x)
import tempfile
folder = tempfile.mkdtemp()
veneer.save(model, 'lora', folder)
veneer.detach(model, 'lora')
veneer.load(model, folder)
assert torch.equal(model(x), y)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
