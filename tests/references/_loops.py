"""Linear algebra by loops over plain Python floats (which are float64): nothing here is fast, all of it is
readable.
"""

import math

import torch
from torch import Tensor


def listed(tensor: Tensor | None):
    """A tensor as nested lists of floats; None stays None."""
    return None if tensor is None else tensor.detach().tolist()


def tensor(nested) -> Tensor:
    return torch.tensor(nested, dtype=torch.float64)


def zeros(*shape: int):
    """Nested lists of zeros."""
    if not shape:
        return 0.0
    return [zeros(*shape[1:]) for _ in range(shape[0])]


def dot(u, v) -> float:
    assert len(u) == len(v), f"lengths {len(u)} and {len(v)}"
    total = 0.0
    for a, b in zip(u, v):
        total += a * b
    return total


def linear(x, W, bias=None):
    """One vector through y_i = sum_j W_ij x_j + b_i: (in,) -> (out,)"""
    return [dot(row, x) + (bias[i] if bias is not None else 0.0) for i, row in enumerate(W)]


def add(u, v):
    assert len(u) == len(v)
    return [a + b for a, b in zip(u, v)]


def times(factor: float, u):
    return [factor * a for a in u]


def transpose(A):
    return [[A[i][j] for i in range(len(A))] for j in range(len(A[0]))]


def matmul(A, B):
    """(n, k) (k, m) -> (n, m)"""
    return [[sum(A[i][k] * B[k][j] for k in range(len(B))) for j in range(len(B[0]))] for i in range(len(A))]


def identity(n: int):
    return [[1.0 if i == j else 0.0 for j in range(n)] for i in range(n)]


def combine(a: float, A, b: float, B):
    """a A + b B, entry by entry."""
    return [[a * p + b * q for p, q in zip(row, other)] for row, other in zip(A, B)]


def inverse(A):
    """Gauss-Jordan elimination with the largest pivot."""
    n = len(A)
    rows = [list(A[i]) + identity(n)[i] for i in range(n)]
    for column in range(n):
        pivot = max(range(column, n), key=lambda i: abs(rows[i][column]))
        rows[column], rows[pivot] = rows[pivot], rows[column]
        rows[column] = times(1.0 / rows[column][column], rows[column])
        for i in range(n):
            if i != column:
                factor = rows[i][column]
                rows[i] = [p - factor * q for p, q in zip(rows[i], rows[column])]
    return [row[n:] for row in rows]


def norm(u) -> float:
    return math.sqrt(dot(u, u))


def frobenius(A) -> float:
    return math.sqrt(sum(entry * entry for row in A for entry in row))


def singular_vectors(A, sweeps: int = 60):
    """(U, S, V) with A = sum_i S_i u_i v_i^T, largest first; u_i and v_i are lists.

    By one-sided Jacobi rotations.
    """
    if len(A) < len(A[0]):
        V, S, U = singular_vectors(transpose(A), sweeps)
        return U, S, V
    columns = transpose(A)
    n = len(columns)
    right = identity(n)  # right[i] is the i-th column of V
    for _ in range(sweeps):
        largest = 0.0
        for i in range(n):
            for j in range(i + 1, n):
                a, b, c = (
                    dot(columns[i], columns[i]),
                    dot(columns[j], columns[j]),
                    dot(columns[i], columns[j]),
                )
                largest = max(largest, abs(c) / math.sqrt(a * b))
                if abs(c) < 1e-300:
                    continue
                angle = 0.5 * math.atan2(2 * c, a - b)
                cos, sin = math.cos(angle), math.sin(angle)
                for pair in (columns, right):
                    first, second = pair[i], pair[j]
                    pair[i] = [cos * p + sin * q for p, q in zip(first, second)]
                    pair[j] = [cos * q - sin * p for p, q in zip(first, second)]
        if largest < 1e-15:
            break
    sizes = [norm(column) for column in columns]
    order = sorted(range(n), key=lambda i: -sizes[i])
    return (
        [times(1.0 / sizes[i], columns[i]) for i in order],
        [sizes[i] for i in order],
        [right[i] for i in order],
    )


def gram_schmidt(vectors):
    """Orthonormal vectors spanning the same space, in order (twice, for accuracy)."""
    found = []
    for vector in vectors:
        for _ in range(2):
            for other in found:
                vector = add(vector, times(-dot(vector, other), other))
        found.append(times(1.0 / norm(vector), vector))
    return found


def softmax(scores):
    top = max(scores)
    powers = [math.exp(score - top) for score in scores]
    return [power / sum(powers) for power in powers]


def sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))


ACTIVATIONS = {
    "identity": lambda x: x,
    "relu": lambda x: x if x > 0 else 0.0,
    "gelu": lambda x: 0.5 * x * (1.0 + math.erf(x / math.sqrt(2.0))),
    "gelu_new": lambda x: 0.5 * x * (1.0 + math.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x * sigmoid(x),
    "tanh": math.tanh,
}


def layer_norm(x, scale, shift, eps: float = 1e-5):
    mean = sum(x) / len(x)
    variance = sum((a - mean) ** 2 for a in x) / len(x)
    return [(a - mean) / math.sqrt(variance + eps) * s + t for a, s, t in zip(x, scale, shift)]


def bottleneck(x, D, D_bias, U, U_bias, activation: str):
    """U act(D x + b_D) + b_U of one vector."""
    hidden = [ACTIVATIONS[activation](a) for a in linear(x, D, D_bias)]
    return linear(hidden, U, U_bias)


def every_token(function, x):
    """Apply a function of one vector to (rows, tokens, width) nested lists."""
    return [[function(token) for token in row] for row in x]
