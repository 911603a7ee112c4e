"""Matrices to test with, and generated ones."""

from __future__ import annotations

import math

import torch
from spectral_kernels.coefficients import resolve
from torch import Tensor

MUON = resolve("muon").rows


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def integers(
    *shape: int, most: int = 3, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Tensor:
    """Integers in -most .. most."""
    return torch.randint(-most, most + 1, shape, generator=generator(seed)).to(dtype)


def orthogonal(n: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(gaussian(n, n, dtype=torch.float64, seed=seed))[0]


def with_singular_values(m: int, n: int, values: Tensor, seed: int = 0) -> Tensor:
    """A float64 m x n matrix of random singular vectors."""
    s = min(m, n)
    return orthogonal(m, seed)[:, :s] * values.double() @ orthogonal(n, seed + 1)[:, :s].mT


def decaying(count: int, condition: float) -> Tensor:
    """1 .. 1 / condition, equally spaced in the logarithm."""
    return torch.logspace(0.0, -math.log10(condition), count, dtype=torch.float64)


def semidefinite(n: int, condition: float, seed: int = 0) -> Tensor:
    """A float64 symmetric matrix of random eigenvectors with the eigenvalues 1 .. 1 / condition."""
    return with_eigenvalues(decaying(n, condition), seed)


def semidefinites(count: int, n: int, condition: float, seed: int = 0) -> Tensor:
    """A batch of `semidefinite` matrices."""
    return torch.stack([semidefinite(n, condition, seed + 3 * i) for i in range(count)])


def with_eigenvalues(values: Tensor, seed: int = 0) -> Tensor:
    q = orthogonal(len(values), seed)
    a = (q * values.double()) @ q.mT
    return 0.5 * (a + a.mT)
