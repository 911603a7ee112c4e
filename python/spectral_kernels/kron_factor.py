"""Kronecker factors of gradients: accumulation and two-sided preconditioning."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import _checks, _dispatch

__all__ = ["kron_factors_update_", "kron_precondition"]


def kron_factors_update_(
    left: Tensor | None,
    right: Tensor | None,
    grad: Tensor,
    beta: float,
    *,
    weight: float | None = None,
    left_root: Tensor | None = None,
    right_root: Tensor | None = None,
    skipped: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """L <- beta L + w G G^T and R <- beta R + w G^T G, in place, from one read of G.

    With roots X_L = L^(-1/2) and X_R = R^(-1/2) the increments are those of KL-Shampoo,
    (G X_R)(G X_R)^T / n and (X_L G)^T (X_L G) / m.

    Args:
        left: (..., m, m) float32 or float64, symmetric, or None; its lower triangle is read, both
            are written, exactly equal.
        right: (..., n, n), likewise.
        grad: (..., m, n) float64, float32, bfloat16 or float16; any strides.
        beta: in [0, 1]; beta = 1 with weight = 1 is AdaGrad.
        weight: w, default 1 - beta.
        left_root: X_L, (..., m, m), for the right factor's increment.
        right_root: X_R, (..., n, n), for the left factor's.
        skipped: one int64, advanced by every matrix that was skipped: a matrix of the batch whose
            gradient, factor or root has a non-finite element or whose product overflows keeps every
            bit.
        backend: "cpu", "cuda", "triton", "reference"; None chooses.

    Raises:
        TypeError, ValueError: bad input, naming the value, before anything is written.
        RuntimeError: the backend that was asked for cannot run.

    Accuracy: fp32 accumulation of exact operands (16-bit gradients are not rounded again);
    |error of L_ij| <= 4 u sqrt(n) (|G| |G|^T)_ij.

    Source: Gupta et al., arXiv 1802.09568; KL increments: Lin et al., arXiv 2509.03378.
    """
    _checks.matrix("grad", grad)
    if left is None and right is None:
        raise ValueError("left and right are both None: there is nothing to update")
    m, n = grad.shape[-2:]
    sides = {"left": left, "right": right, "left_root": left_root, "right_root": right_root}
    for name, factor in sides.items():
        _side(name, factor, grad, m if name.startswith("left") else n)
    if skipped is not None and not isinstance(skipped, Tensor):
        raise TypeError(f"skipped must be a tensor, not {type(skipped).__name__}")
    _checks.same_device(grad=grad, skipped=skipped, **sides)
    beta = _checks.number("beta", beta, 0.0, 1.0, include_high=True)
    absent = (left if left is not None else right).new_empty(0)  # type: ignore[union-attr]
    _dispatch.run(
        "kron_factors_update_",
        (grad, *(x for x in sides.values() if x is not None)),
        backend,
        absent if left is None else left,
        absent.clone() if right is None else right,
        grad,
        torch.zeros((), dtype=torch.int64, device=grad.device) if skipped is None else skipped,
        beta=beta,
        weight=1.0 - beta if weight is None else _checks.number("weight", weight, 0.0, math.inf),
        left_root=absent if left_root is None else left_root,
        right_root=absent if right_root is None else right_root,
    )


def kron_precondition(
    grad: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    *,
    backend: str | None = None,
) -> Tensor:
    """left @ grad @ right, in the cheaper order; None stands for the identity.

    Args:
        grad: (..., m, n) float64, float32, bfloat16 or float16; any strides.
        left: (..., p, m), any float dtype and strides (pass q.mT to rotate by a basis q).
        right: (..., n, q), likewise.
        backend: "cpu", "cuda", "triton", "reference"; None chooses.

    Returns:
        (..., p, q) in grad's dtype. A matrix whose input has a non-finite element gives NaN
        throughout.

    Raises:
        TypeError, ValueError: bad input, naming the value.
        RuntimeError: an input requires grad, or the backend that was asked for cannot run.

    Accuracy: products accumulate in fp32 (float64 if any input is float64); operands are rounded to
    bfloat16 only where all inputs are bfloat16, and then so is the intermediate.
    """
    _checks.matrix("grad", grad)
    _checks.no_autograd("grad", grad, "kron_precondition")
    for name, factor, axis, size in (
        ("left", left, -1, grad.shape[-2]),
        ("right", right, -2, grad.shape[-1]),
    ):
        if factor is None:
            continue
        _checks.matrix(name, factor)
        _checks.no_autograd(name, factor, "kron_precondition")
        if factor.shape[:-2] != grad.shape[:-2] or factor.shape[axis] != size:
            raise ValueError(
                f"{name} of shape {tuple(factor.shape)} does not fit a matrix of shape "
                f"{tuple(grad.shape)}"
            )
    _checks.same_device(grad=grad, left=left, right=right)
    absent = grad.new_empty(0)
    return _dispatch.run(
        "kron_precondition",
        (grad, *(x for x in (left, right) if x is not None)),
        backend,
        grad,
        absent if left is None else left,
        absent if right is None else right,
    )


def _side(name: str, factor: Tensor | None, grad: Tensor, size: int) -> None:
    if factor is None:
        return
    _checks.square(name, factor)
    expected = (*grad.shape[:-2], size, size)
    if factor.shape != expected:
        raise ValueError(
            f"{name} must have shape {expected} for a gradient of shape {tuple(grad.shape)}, "
            f"not {tuple(factor.shape)}"
        )
