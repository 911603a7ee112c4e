"""The signs of a matrix, times a number."""

from __future__ import annotations

import math

import torch
from spectral_kernels._backend import check_matrix, check_range, operator
from torch import Tensor

from ._shared import finite, matrices


@operator
def scaled_sign(x: Tensor, *, scale: float) -> Tensor:
    """scale sign(X), element by element; sign(0) = 0.

    Args:
        x: (..., m, n), any float dtype.
        scale: at least 0.

    Returns:
        x's shape and dtype. A matrix with a non-finite element gives NaN throughout.

    Raises:
        TypeError, ValueError: x is not a dense float batch of matrices, or scale is out of range.
    """
    check_matrix("x", x)
    check_range("scale", scale)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    for index in matrices(x):
        out[index] = scale * x[index].sign() if finite(x[index]) else math.nan
    return out
