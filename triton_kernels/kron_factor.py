"""Kronecker factors of a gradient's second moment, and two-sided preconditioning."""

from __future__ import annotations

import math

import torch
from spectral_kernels._backend import check_device, check_skipped, check_writable, operator
from spectral_kernels._options import FactorsUpdate, updates
from torch import Tensor

from ._batch import Packed, flattened, from_both_sides, product
from ._device import NONFINITE

_MOST = torch.finfo(torch.float32).max


@operator
@updates
def kron_factors_update_(call: FactorsUpdate) -> None:
    """L <- beta L + w G G^T, R likewise; see `spectral_kernels.kron_factors_update_`."""
    left, right, grad, skipped, beta, weight, left_root, right_root = call
    for name, factor in (("left", left), ("right", right)):
        check_writable(name, factor)
        if factor.numel():
            check_device(name, factor, grad)
    for name, root in (("left_root", left_root), ("right_root", right_root)):
        if root.numel():
            check_device(name, root, grad)
    check_skipped(skipped, grad)
    if not grad.numel():
        return
    state = accumulate_(
        left if left.numel() else None,
        right if right.numel() else None,
        flattened(grad),
        beta=beta,
        weight=weight,
        left_root=flattened(left_root) if left_root.numel() else None,
        right_root=flattened(right_root) if right_root.numel() else None,
    )
    skipped.add_((state == NONFINITE.value).sum())


def accumulate_(
    left: Tensor | None,
    right: Tensor | None,
    grad: Tensor,
    *,
    beta: float,
    weight: float,
    left_root: Tensor | None = None,
    right_root: Tensor | None = None,
) -> Tensor:
    """Updates the factors of a batch in place where the result is finite.

    Args:
        left, right: (..., m, m) and (..., n, n) fp32, or None.
        grad: (count, m, n).
        beta, weight, left_root, right_root: see `spectral_kernels.kron_factors_update_`.

    Returns:
        int32 (count,), NONFINITE where a matrix was left alone.
    """
    m, n = grad.shape[-2:]
    sides = []
    plain = None
    for factor, root, side, other in ((left, right_root, -2, n), (right, left_root, -1, m)):
        if factor is None:
            continue
        if root is None:
            plain = plain or Packed(grad)
            sides.append((factor, plain, grad, side, weight))
            continue
        x = product(grad, root) if side == -2 else product(root, grad)
        sides.append((factor, Packed(x), x, side, weight / other))
    state = _overflow(sides, beta)
    for factor, packed, _, side, w in sides:
        packed.add_gram([factor], side, beta=beta, weight=w, state=state)
    return state


def _overflow(sides: list[tuple[Tensor, Packed, Tensor, int, float]], beta: float) -> Tensor:
    """NONFINITE where an increment is not finite or a sum would not be."""
    bad = None
    for factor, packed, x, side, weight in sides:
        # The largest element of a semidefinite matrix is on its diagonal.
        sums = x.double().square().sum(-1 if side == -2 else -2)
        diagonal = flattened(factor).diagonal(dim1=-2, dim2=-1).double()
        sums = weight * sums + beta * diagonal.abs()
        known = flattened(factor).tril().isfinite().flatten(1).all(1)
        exceeds = ~((sums <= _MOST).all(-1) & known)
        exceeds = exceeds | (packed.summary.state == NONFINITE.value)
        bad = exceeds if bad is None else bad | exceeds
    assert bad is not None
    return bad.to(torch.int32) * NONFINITE.value


def updated(factor: Tensor, x: Tensor, side: int, *, beta: float, weight: float) -> Tensor:
    """beta F + weight X X^T (side -2) or X^T X (-1), new; NaN where X is not finite."""
    packed = Packed(x)
    new = factor.clone()
    nothing = torch.zeros_like(packed.summary.state)
    packed.add_gram([new], side, beta=beta, weight=weight, state=nothing)
    bad = packed.summary.state == NONFINITE.value
    return torch.where(bad[:, None, None], math.nan, new)


@operator
def kron_precondition(grad: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """left @ grad @ right; see `spectral_kernels.kron_precondition`."""
    rows = left.shape[-2] if left.numel() else grad.shape[-2]
    cols = right.shape[-1] if right.numel() else grad.shape[-1]
    shape = (*grad.shape[:-2], rows, cols)
    if not grad.numel() or not math.prod(shape):
        return grad.new_zeros(shape)
    operands = [flattened(x) if x.numel() else None for x in (grad, left, right)]
    x = from_both_sides(*operands)  # type: ignore[arg-type]
    finite = torch.stack([y.isfinite().all(-1).all(-1) for y in operands if y is not None]).all(0)
    return torch.where(finite[:, None, None], x, math.nan).to(grad.dtype).reshape(shape)
