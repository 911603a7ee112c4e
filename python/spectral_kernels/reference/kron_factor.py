"""Kronecker factors of a gradient's second moment, and two-sided preconditioning."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spectral_kernels._backend import (
    check_matrix,
    check_range,
    check_skipped,
    check_writable,
    operator,
)
from spectral_kernels._options import FactorsUpdate, updates

from ._shared import absent, check_side, finite, matrices, optional
from .symmetric_matmul import mirror, product


@operator
@updates
def kron_factors_update_(call: FactorsUpdate) -> None:
    """L <- beta L + weight G G^T and R <- beta R + weight G^T G, in place.

    With a root the opposite increment is KL-Shampoo's, from the factors' inverse square roots:
        right_root X_R:  L <- beta L + weight / n (G X_R) (G X_R)^T
        left_root X_L:   R <- beta R + weight / m (X_L G)^T (X_L G)
    Computed in the factors' dtype; both triangles are written and exactly equal. A size-0 tensor
    stands for an absent factor or root.

    Args:
        left: (..., m, m), float32 or float64.
        right: (..., n, n), left's dtype.
        grad: (..., m, n), any float dtype.
        skipped: one int64; counts the matrices whose gradient is not finite or whose product
            overflowed. Both their factors keep every bit.
        beta, weight: at least 0; AdaGrad is beta = 1, weight = 1.
        left_root: (..., m, m), weights the increment of `right`.
        right_root: (..., n, n), weights the increment of `left`.

    Raises:
        TypeError, ValueError: bad input, before anything is written.

    Source: Gupta et al., arXiv 1802.09568; KL: Lin et al., arXiv 2509.03378.
    """
    left, right, grad, skipped, beta, weight, left_root, right_root = call
    check_matrix("grad", grad)
    for name, x, side in (
        ("left", left, -2),
        ("right", right, -1),
        ("left_root", left_root, -2),
        ("right_root", right_root, -1),
    ):
        check_side(name, x, grad, side)
    for name, x in (("left", left), ("right", right)):
        check_writable(name, x)
    if not absent(left) and not absent(right) and left.dtype != right.dtype:
        raise TypeError(f"left is {left.dtype} but right is {right.dtype}")
    check_skipped(skipped, grad)
    check_range("beta", beta)
    check_range("weight", weight)
    for index in matrices(grad) if grad.numel() else ():
        old = optional(left, index), optional(right, index)
        new = updated_factors(
            *old,
            grad[index],
            beta=beta,
            weight=weight,
            left_root=optional(left_root, index),
            right_root=optional(right_root, index),
        )
        if finite(grad[index], *new):
            for factor, value in zip(old, new, strict=True):
                factor.copy_(value)
        else:
            skipped.add_(1)


@operator
def kron_precondition(grad: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """left @ grad @ right, computed in float64 if an argument is, else in float32.

    Args:
        grad: (..., m, n), any float dtype.
        left: (..., p, m), or of size 0 for the identity.
        right: (..., n, q), or of size 0 for the identity.

    Returns:
        (..., p, q) in grad's dtype. Where an argument has a non-finite element, the whole matrix is
        NaN; a product out of range overflows.

    Raises:
        TypeError, ValueError: bad input.
    """
    check_matrix("grad", grad)
    for name, x, inner, size in (
        ("left", left, -1, grad.shape[-2]),
        ("right", right, -2, grad.shape[-1]),
    ):
        if absent(x):
            continue
        check_matrix(name, x)
        if x.shape[:-2] != grad.shape[:-2] or x.shape[inner] != size:
            raise ValueError(
                f"{name} of shape {tuple(x.shape)} does not fit a matrix of shape "
                f"{tuple(grad.shape)}"
            )
    double = torch.float64 in (grad.dtype, left.dtype, right.dtype)
    dtype = torch.float64 if double else torch.float32
    rows = grad.shape[-2] if absent(left) else left.shape[-2]
    columns = grad.shape[-1] if absent(right) else right.shape[-1]
    out = grad.new_empty(*grad.shape[:-2], rows, columns)
    for index in matrices(grad):
        operands = grad[index], optional(left, index), optional(right, index)
        if finite(*operands):
            out[index] = from_both_sides(*(x.to(dtype) for x in operands)).to(grad.dtype)
        else:
            out[index] = math.nan
    return out


def from_both_sides(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """(left @ x) @ right; an absent side is the identity."""
    if not absent(left):
        x = left @ x
    return x if absent(right) else x @ right


def updated_factor(factor: Tensor, x: Tensor, *, beta: float, weight: float) -> Tensor:
    """beta F + weight X X^T, exactly symmetric, in F's dtype."""
    x = x.to(factor.dtype)
    return mirror(beta * factor + weight * product(x, x.mT))


def updated_factors(
    left: Tensor,
    right: Tensor,
    grad: Tensor,
    *,
    beta: float,
    weight: float,
    left_root: Tensor,
    right_root: Tensor,
) -> tuple[Tensor, Tensor]:
    """Both new factors of one matrix; an absent one stays absent."""
    m, n = grad.shape
    if not absent(left):
        if absent(right_root):
            left = updated_factor(left, grad, beta=beta, weight=weight)
        else:
            x = grad.to(left.dtype) @ right_root.to(left.dtype)
            left = updated_factor(left, x, beta=beta, weight=weight / n)
    if not absent(right):
        if absent(left_root):
            right = updated_factor(right, grad.mT, beta=beta, weight=weight)
        else:
            x = left_root.to(right.dtype) @ grad.to(right.dtype)
            right = updated_factor(right, x.mT, beta=beta, weight=weight / m)
    return left, right
