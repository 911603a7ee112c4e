"""Products that are known to be symmetric: the lower triangle counts, the upper one mirrors it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spectral_kernels._backend import check_matrix, operator

from ._shared import finite, matrices


@operator
def gram(x: Tensor) -> Tensor:
    """X X^T, exactly symmetric.

    Args:
        x: (..., m, n), any float dtype.

    Returns:
        (..., m, m) in x's dtype. A matrix with a non-finite element gives NaN throughout; a product
        out of range overflows as torch.mm does.

    Raises:
        TypeError, ValueError: x is not a dense float batch of matrices.
    """
    check_matrix("x", x)
    out = x.new_empty(*x.shape[:-1], x.shape[-2])
    for index in matrices(x):
        out[index] = product(x[index], x[index].mT) if finite(x[index]) else math.nan
    return out


def mirror(x: Tensor) -> Tensor:
    """The symmetric matrix with x's lower triangle."""
    return x.tril() + x.tril(-1).mT


def product(a: Tensor, b: Tensor) -> Tensor:
    """A B where it is symmetric: B = A^T, or A and B symmetric and commuting."""
    return mirror(a @ b)


def power(a: Tensor, exponent: int) -> Tensor:
    """A^exponent of a symmetric matrix, exponent >= 1, by repeated squaring."""
    result = None
    while True:
        if exponent % 2:
            result = a if result is None else product(result, a)
        exponent //= 2
        if not exponent:
            assert result is not None
            return result
        a = product(a, a)


def identity_like(a: Tensor) -> Tensor:
    """I of the size, dtype and device of a square matrix."""
    return torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
