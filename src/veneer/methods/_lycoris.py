"""What LyCORIS' methods share: kernels by a core, and dropout of the update itself. No method: a part of some.

    dW' = diag(k) dW        k_i = [u_i > rank_dropout] (over their mean, where scaled) times [u > module_dropout]

The numbers u are drawn anew at each call in training; without training they are absent, and dW' = dW.
"""

import torch
from torch import Tensor

from veneer.edits import Specs, Tensors, noise


def draws(rows: float, whole: float, n_out: int) -> Specs:
    """u (out,) where rows are dropped, u_whole () where the whole update is."""
    found = {"u": noise("uniform", n_out)} if rows else {}
    return {**found, "u_whole": noise("uniform")} if whole else found


def drop_rows(D: Tensor, t: Tensors, rows: float, whole: float, scaled: bool = True) -> Tensor:
    """diag(k) dW: (out, in) -> the same shape"""
    return drop(D.mT, t, rows, whole, scaled).mT if "u" in t or "u_whole" in t else D


def drop(y: Tensor, t: Tensors, rows: float, whole: float, scaled: bool = True) -> Tensor:
    """k * dW x, a change of outputs: (..., out) -> (..., out)"""
    if "u" in t:
        kept = (t.u > rows).to(y.dtype)
        if scaled:
            kept = kept / kept.mean(-1, keepdim=True).clamp(min=1e-12)
        y = y * kept
    return y * (t.u_whole > whole).to(y.dtype) if "u_whole" in t else y


def core_product(T: Tensor, B: Tensor, A: Tensor, kernel: int) -> Tensor:
    """sum_kl T[k, l] B[:, k] A[l]: (r, r, height, width), (out, r), (r, in) -> (out, in height width)"""
    return torch.einsum("...klp,...ok,...li->...oip", T.flatten(kernel), B, A).flatten(-2)
