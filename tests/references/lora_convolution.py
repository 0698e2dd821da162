"""LoRA and DoRA on a two-dimensional convolution: the kernel is the matrix. arXiv:2106.09685,
arXiv:2402.09353.

    delta[o, i, h, w] = s sum_r B[o, r] A[r, i, h, w]            s = alpha / rank
    LoRA: kernel' = kernel + delta      DoRA: kernel' = magnitude / |kernel + delta| * (kernel + delta)

The norm of DoRA is over all but the output channel, and constant in the backward. base: W (out, in, kh, kw),
bias (out,) or None, stride, padding, dilation (pairs). tensors: A (rank, in, kh, kw), B (out, rank), and
magnitude (out,). inputs: x (rows, in, height, width); output (rows, out, height', width'). options: rank,
alpha, dora.
"""

import math

from ._cases import Case, Draw, changed, output_gradients
from ._loops import listed, tensor, zeros


def cases() -> list[Case]:
    found = []
    for seed, (n_in, n_out, kernel, stride, padding, dilation, bias, dora) in enumerate(
        [
            (2, 3, (2, 3), (1, 1), (0, 1), (1, 1), True, False),
            (3, 2, (1, 1), (2, 1), (0, 0), (1, 1), False, False),
            (2, 2, (2, 2), (1, 2), (1, 0), (1, 1), True, True),
            (2, 2, (2, 2), (1, 1), (1, 0), (2, 1), False, False),
        ]
    ):
        draw = Draw(2700 + seed)
        rank, x = 2, draw(2, n_in, 4, 3)
        case = {
            "name": f"{kernel}, stride {stride}, padding {padding}, dilation {dilation}, dora {dora}",
            "options": {"rank": rank, "alpha": 3.0, "dora": dora},
            "base": {
                "W": draw(n_out, n_in, *kernel),
                "bias": draw(n_out) if bias else None,
                "stride": stride,
                "padding": padding,
                "dilation": dilation,
            },
            "tensors": {"A": draw(rank, n_in, *kernel), "B": draw(n_out, rank)},
            "inputs": {"x": x},
        }
        if dora:
            case["tensors"]["magnitude"] = draw.uniform(n_out, low=0.5, high=2.0)
        case["trained"] = tuple(case["tensors"])
        case["cotangent"] = draw(*reference(case)["output"].shape)
        found.append(case)
    return found


def convolve(x, kernel, bias, stride, padding, dilation):
    """(in, height, width) -> (out, height', width')"""
    n_in, kh, kw = len(kernel[0]), len(kernel[0][0]), len(kernel[0][0][0])
    height, width = len(x[0]), len(x[0][0])
    high = (height + 2 * padding[0] - dilation[0] * (kh - 1) - 1) // stride[0] + 1
    wide = (width + 2 * padding[1] - dilation[1] * (kw - 1) - 1) // stride[1] + 1
    out = zeros(len(kernel), high, wide)
    for o in range(len(kernel)):
        for p in range(high):
            for q in range(wide):
                total = bias[o] if bias is not None else 0.0
                for i in range(n_in):
                    for h in range(kh):
                        for w in range(kw):
                            row = p * stride[0] - padding[0] + h * dilation[0]
                            column = q * stride[1] - padding[1] + w * dilation[1]
                            if 0 <= row < height and 0 <= column < width:
                                total += kernel[o][i][h][w] * x[i][row][column]
                out[o][p][q] = total
    return out


def _entries(channel) -> list[float]:
    return [entry for plane in channel for row in plane for entry in row]


def _changed_kernel(case: Case):
    W, A, B = listed(case["base"]["W"]), listed(case["tensors"]["A"]), listed(case["tensors"]["B"])
    s = case["options"]["alpha"] / case["options"]["rank"]
    for o, i, h, w in _places(case):
        W[o][i][h][w] += s * sum(B[o][r] * A[r][i][h][w] for r in range(len(A)))
    return W


def _places(case: Case):
    n_out, n_in, kh, kw = case["base"]["W"].shape
    return [(o, i, h, w) for o in range(n_out) for i in range(n_in) for h in range(kh) for w in range(kw)]


def channel_norms(case: Case) -> list[float]:
    return [math.sqrt(sum(entry**2 for entry in _entries(channel))) for channel in _changed_kernel(case)]


def reference(case: Case, norms: list[float] | None = None) -> dict:
    base, kernel = case["base"], _changed_kernel(case)
    if case["options"]["dora"]:
        norms = channel_norms(case) if norms is None else norms
        magnitude = listed(case["tensors"]["magnitude"])
        for o, i, h, w in _places(case):
            kernel[o][i][h][w] *= magnitude[o] / norms[o]
    steps = (base["stride"], base["padding"], base["dilation"])
    output = [convolve(x, kernel, listed(base["bias"]), *steps) for x in listed(case["inputs"]["x"])]
    return {"output": tensor(output), "delta": tensor(kernel) - base["W"]}


def gradients(case: Case) -> dict:
    constant = channel_norms(case)
    return output_gradients(lambda moved: reference(moved, constant), case)


def _norm_of_one_tap(case: Case) -> dict:
    """The norm over input channels alone, at the first tap."""
    firsts = [[plane[0][0] for plane in channel] for channel in _changed_kernel(case)]
    return reference(case, [math.sqrt(sum(entry**2 for entry in channel)) for channel in firsts])


def _flipped(case: Case) -> dict:
    return reference(changed(case, "tensors", A=case["tensors"]["A"].flip(-1)))


MUTATIONS = [
    ("the norm leaves out the taps", _norm_of_one_tap),
    ("the taps of A are flipped", _flipped),
    (
        "alpha is not divided by the rank",
        lambda case: reference(changed(case, "options", alpha=3.0 * case["options"]["rank"])),
    ),
]


def mutated(case: Case, name: str) -> dict:
    return dict(MUTATIONS)[name](case)
