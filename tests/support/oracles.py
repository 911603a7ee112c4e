"""The formulas once more in numpy, and plain torch to compare with."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .rule import exact


def exact_newton_schulz(
    x: Tensor, rows: Sequence[Sequence[float]], norm_factor: float = 1.0
) -> np.ndarray:
    y = exact(x)
    tall = y.shape[-2] > y.shape[-1]
    if tall:
        y = y.swapaxes(-1, -2)
    norm = norm_factor * np.sqrt((y**2).sum((-2, -1), keepdims=True))
    y = y / np.where(norm > 0, norm, 1)
    for a, b, c in rows:
        r = y @ y.swapaxes(-1, -2)
        y = a * y + (b * r + c * (r @ r)) @ y
    return y.swapaxes(-1, -2) if tall else y


def jacobi(a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues and eigenvectors of one symmetric matrix in its own precision, unsorted."""
    a = (a + a.T) / 2
    n = len(a)
    v = np.eye(n, dtype=a.dtype)
    for _ in range(30):
        off = np.sqrt((np.tril(a, -1) ** 2).sum())
        if off <= np.finfo(a.dtype).tiny + 1e-3 * np.finfo(a.dtype).eps * np.abs(np.diag(a)).max():
            break
        for p in range(n - 1):
            for q in range(p + 1, n):
                if a[p, q] == 0:
                    continue
                theta = (a[q, q] - a[p, p]) / (2 * a[p, q])
                t = (1 if theta >= 0 else -1) / (abs(theta) + np.sqrt(theta * theta + 1))
                c = 1 / np.sqrt(t * t + 1)
                g = np.array([[c, t * c], [-t * c, c]], dtype=a.dtype)
                a[:, [p, q]] = a[:, [p, q]] @ g
                a[[p, q], :] = g.T @ a[[p, q], :]
                v[:, [p, q]] = v[:, [p, q]] @ g
    return np.diag(a).copy(), v


_eigen: dict[bytes, tuple[np.ndarray, np.ndarray]] = {}


def exact_eigen(a: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues and eigenvectors in the precision of `exact`; those of float64 are kept."""
    if a.dtype != torch.float64:
        values, vectors = torch.linalg.eigh(a.double())
        return values.numpy(), vectors.numpy()
    key = a.contiguous().numpy().tobytes()
    if key not in _eigen:
        _eigen[key] = jacobi(exact(a))
    return _eigen[key]


def exact_inverse_root(a: Tensor, p: int, delta: float) -> np.ndarray:
    """(A + delta I)^(-1/p) of one definite matrix."""
    values, vectors = exact_eigen(a)
    return (vectors * (values + delta) ** (-1 / values.dtype.type(p))) @ vectors.T


# Plain torch in the storage dtype: what the error rule compares with.


def plain_newton_schulz(
    x: Tensor, rows: Sequence[Sequence[float]], dtype: torch.dtype | None = None
) -> Tensor:
    """The standard iteration as torch.optim.Muon does it, in one dtype throughout."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    for index in np.ndindex(*x.shape[:-2]):
        y = x[index].mT if x.shape[-2] > x.shape[-1] else x[index]
        y = y.to(dtype or x.dtype)
        y = y / y.norm().clamp(min=torch.finfo(y.dtype).tiny)
        for a, b, c in rows:
            r = y @ y.mT
            z = b * r if c == 0 else torch.addmm(r, r, r, beta=b, alpha=c)
            y = torch.addmm(y, z, y, beta=a)
        out[index] = y.mT if x.shape[-2] > x.shape[-1] else y
    return out


def plain_newton_root(a: Tensor, p: int, delta: float) -> Tensor:
    """Coupled Newton on full products, as in Distributed Shampoo, of one matrix in its dtype."""
    eye = torch.eye(len(a), dtype=a.dtype)
    b = a + delta * eye
    z = (p + 1) / (2.0 * float(torch.linalg.matrix_norm(b.double())))
    x, m = z ** (1.0 / p) * eye, z * b
    best = math.inf
    for _ in range(100):
        gap = float((m - eye).abs().max())
        if gap >= best and best < 0.5:
            break
        best = min(best, gap)
        n = (1.0 + 1.0 / p) * eye - m / p
        x, m = x @ n, torch.linalg.matrix_power(n, p) @ m
    return x
