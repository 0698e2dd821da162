"""What all reference files share: seeded draws, masks, changed copies of a case, gradients by differences."""

import copy
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

Case = dict


class Draw:
    """Seeded normal float64 tensors: `draw(2, 3)` is (2, 3); no shape is a scalar tensor."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        return mean + scale * torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=self.generator, dtype=torch.float64)


def mask_of(lengths: Iterable[int], tokens: int, padding: str) -> Tensor:
    """(rows, tokens) bool, True at real tokens; padding: "right" or "left"."""
    rows = []
    for length in lengths:
        real = [True] * length
        pads = [False] * (tokens - length)
        rows.append(real + pads if padding == "right" else pads + real)
    return torch.tensor(rows)


def changed(case: Case, section: str, **values) -> Case:
    """A copy of the case in which some entries of a section are replaced."""
    new = dict(case)
    new[section] = {**case[section], **values}
    return new


def differences(
    scalar: Callable[[Case], float], case: Case, places: Iterable[tuple[str, str]], step: float = 1e-4
) -> dict[str, Tensor]:
    """d scalar / d each named tensor, entry by entry, by the five-point formula (error about step**4).

    places: (section, name) pairs, as ("tensors", "A"), ("inputs", "x").
    """
    work = copy.deepcopy(case)
    found = {}
    for section, name in places:
        entries = work[section][name].reshape(-1)
        assert entries.data_ptr() == work[section][name].data_ptr(), f"{name} is not contiguous"
        slope = torch.zeros_like(entries)
        for i in range(entries.numel()):
            kept = entries[i].item()
            values = []
            for shift in (-2, -1, 1, 2):
                entries[i] = kept + shift * step
                values.append(scalar(work))
            entries[i] = kept
            slope[i] = (values[0] - 8 * values[1] + 8 * values[2] - values[3]) / (12 * step)
        found[name] = slope.reshape(work[section][name].shape)
    return found


def paired(reference: Callable[[Case], dict], key: str = "output") -> Callable[[Case], float]:
    """case -> sum(output * cotangent)"""
    return lambda case: float((reference(case)[key] * case["cotangent"]).sum())


def output_gradients(
    reference: Callable[[Case], dict], case: Case, inputs: Iterable[str] = ("x",)
) -> dict[str, Tensor]:
    """Gradients of sum(output * cotangent) for the trained tensors and the inputs."""
    places = [("tensors", name) for name in case["trained"]] + [("inputs", name) for name in inputs]
    return differences(paired(reference), case, places)


def penalty_gradients(
    reference: Callable[[Case], dict], case: Case, names: Iterable[str]
) -> dict[str, Tensor]:
    """Gradients of the penalty alone, as "penalty.NAME"."""
    found = differences(lambda c: float(reference(c)["penalty"]), case, [("tensors", name) for name in names])
    return {f"penalty.{name}": value for name, value in found.items()}
