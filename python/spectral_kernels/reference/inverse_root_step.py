"""The fused Shampoo step."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from spectral_kernels._backend import operator
from spectral_kernels._options import ShampooLists, ShampooOptions, takes

from .._step_checks import check_shampoo
from ._shared import (
    REFERENCE,
    Progress,
    absent,
    finite,
    matrices,
    max_abs,
    moved,
    norm,
    optional,
    outside_range,
    store,
    widened,
)
from .inverse_root import NON_FINITE, STAGNATED, root_of
from .kron_factor import from_both_sides, updated_factor, updated_factors
from .symmetric_matmul import identity_like


class _Factors(NamedTuple):
    """Factors and roots of one matrix; size 0 where a side is absent."""

    left: Tensor
    right: Tensor
    left_root: Tensor
    right_root: Tensor


@operator
@takes(ShampooLists, ShampooOptions)
def shampoo_step_(lists: ShampooLists, options: ShampooOptions) -> None:
    """One Shampoo or KL-Shampoo step over a list of matrices.

    For step t of a matrix, in the dtype of its momentum buffer, W rounded once:

    1. Factors: L <- beta2 L + w G G^T, R <- beta2 R + w G^T G, w = 1 - beta2, or 1 if beta2 = 1.
    2. Where refresh: X_L = (L / (1 - beta2^t) + delta I)^(-1/root), X_R likewise (`inverse_root`);
       not debiased without `debias`, with beta2 = 1 or with `kl`. Where the status is 1 or 4, or
       the root overflows, the old root is kept and root_failures[..., side] rises. A zero factor
       keeps the old root and is no failure, so root buffers should start as the identity.
    3. M <- beta1 M + (1 - beta1) G;  Mhat = M / (1 - beta1^t) with `debias`, else M.
    4. P = X_L Mhat X_R.
    5. Grafting, as Distributed Shampoo's: U = P ||D||_F / ||P||_F (0 if P = 0), with
       "sgd" D = Mhat; "adagrad" V <- V + G^2, "rmsprop" and "adam" V <- beta V + (1 - beta) G^2
       with beta = graft_beta2, D = Mhat / (sqrt(Vhat) + e), 0 where that divides by 0,
       Vhat = V / (1 - beta^t) for "adam" (always), else V; e = graft_eps * rms(sqrt(Vhat))
       ("relative") or graft_eps ("absolute"). "none": U = P.
    6. W <- (1 - lr weight_decay) W - lr U, t counted.

    With `kl` (root 2), step 1 uses the roots and step 2 belongs to it:
        L <- beta2 L + w/n (G X_R)(G X_R)^T,  R <- beta2 R + w/m (X_L G)^T (X_L G).
    While both factors are zero and G is not, they first become lam0 I and the roots
    (lam0 + delta)^(-1/2) I, with lam0 = rms(G) and delta = max(ridge, relative_ridge lam0). Where
    refresh, "sequential" updates and re-roots the shorter side (L if m <= n) before the other uses
    its root; "simultaneous", and every step without refresh, takes both increments from the old
    roots. After a refresh, if both sides exist, s = sqrt((tr L / m) / (tr R / n)) rebalances:
    L / s, R s, X_L sqrt(s), X_R / sqrt(s). An absent side counts as a root of identity.

    A matrix is skipped, with every bit of it and its state kept, no step counted and `skipped`
    raised, if max |G| is not 0 and outside 2^-50 .. 2^50 while relative_ridge > 0 or kl. So it is,
    unless nonfinite="propagate", if its gradient or momentum is not finite or its new state or
    parameter would not be.

    Args:
        params, grads: entry i is (..., m_i, n_i).
        momentum_buffers: shapes of the params, float32 or float64; bfloat16 of params that are not
            float64, rounded at random (`rounded_at_random`).
        lefts, left_roots: (..., m, m) each, or size 0 for no left side.
        rights, right_roots: (..., n, n) each, or size 0.
        graft_squares: V, likewise, but not in bfloat16 for "adagrad"; size 0 for graft "none" and
            "sgd".
        root_failures: (..., 2) int64, left and right.
        step_counts: 0-dim or the batch's shape.
        skipped: one int64.
        lr: one number.
        beta1, beta2, graft_beta2: in [0, 1), beta2 in [0, 1].
        root: p of the roots, 1 to 8.
        ridge, relative_ridge, root_method: see `inverse_root`.
        weight_decay, graft, graft_eps, graft_eps_mode, kl, kl_order, debias: see above.
        maximize: G <- -G.
        nonfinite: "skip"; "propagate", without a test; or "raise", before anything is written, for
            gradients, states and parameters that are not finite.
        refresh: one int an entry, not 0 where its roots are taken anew.

    Raises:
        TypeError, ValueError: bad input, before anything is written.

    Source: Gupta et al., arXiv 1802.09568; Shi et al., arXiv 2309.06497 (Distributed Shampoo);
    KL-Shampoo: Lin et al., arXiv 2509.03378, with the increments in sequence.
    """
    check_shampoo(lists, options, REFERENCE)
    params, grads, momentum_buffers, lefts, rights, left_roots, right_roots = lists[:7]
    graft_squares, root_failures, step_counts, skipped, lr = lists[7:]
    rate, propagate = float(lr), options.nonfinite == "propagate"
    decay = 1.0 - rate * options.weight_decay
    bounded = options.relative_ridge > 0.0 or options.kl
    for i, param in enumerate(params):
        progress = Progress(step_counts[i], skipped)
        for index in matrices(param) if param.numel() else ():
            m = widened(momentum_buffers[i][index])
            g = grads[i][index].to(m.dtype) * (-1.0 if options.maximize else 1.0)
            if bounded and outside_range(g):
                progress.skip()
                continue
            if not propagate and not finite(g, m):
                progress.skip()
                continue
            t = progress.next_step(index)
            old = _Factors(
                *(optional(x[i], index) for x in (lefts, rights, left_roots, right_roots))
            )
            refresh = bool(options.refresh[i])
            new, failed = _refreshed_factors(old, g, t, options, refresh=refresh)
            squares = optional(graft_squares[i], index)
            new_squares = _new_squares(widened(squares), g, options)
            new_m = options.beta1 * m + (1.0 - options.beta1) * g
            update = _shampoo_update(new_m, new_squares, new, t, options)
            new_w = moved(param[index], update, rate=rate, decay=decay)
            states, values = [momentum_buffers[i][index], *old], [new_m, *new]
            if options.squares:
                states, values = [*states, squares], [*values, new_squares]
            if not propagate and not finite(*values, new_w):
                progress.skip()
                continue
            for state, value in zip(states, values, strict=True):
                store(state, value, t - 1.0)
            param[index].copy_(new_w)
            root_failures[i][index].add_(root_failures[i].new_tensor(failed))
            progress.update(index)
        progress.finish()


def _refreshed_factors(
    old: _Factors, g: Tensor, t: float, step: ShampooOptions, *, refresh: bool
) -> tuple[_Factors, tuple[int, int]]:
    """New factors and roots, and the failed roots of each side."""
    if step.kl:
        return _kl_factors(old, g, step, refresh=refresh)
    none = g.new_empty(0)
    left, right = updated_factors(
        old.left,
        old.right,
        g,
        beta=step.beta2,
        weight=step.weight,
        left_root=none,
        right_root=none,
    )
    if not refresh:
        return old._replace(left=left, right=right), (0, 0)
    bias = 1.0 - step.beta2**t if step.debias and step.beta2 < 1.0 else 1.0
    left_root, left_failed = _new_root(left, old.left_root, bias, step)
    right_root, right_failed = _new_root(right, old.right_root, bias, step)
    return _Factors(left, right, left_root, right_root), (left_failed, right_failed)


def _new_root(factor: Tensor, old: Tensor, bias: float, step: ShampooOptions) -> tuple[Tensor, int]:
    """The root of factor / bias, or the old one and 1 where it fails."""
    if absent(factor) or max_abs(factor) == 0.0:
        return old, 0
    result = root_of(
        factor / bias,
        step.root,
        ridge=step.ridge,
        relative_ridge=step.relative_ridge,
        method=step.root_method,
    )
    if result.status in (STAGNATED, NON_FINITE) or not finite(result.root):
        return old, 1
    return result.root.to(old.dtype), 0


def _kl_factors(
    old: _Factors, g: Tensor, step: ShampooOptions, *, refresh: bool
) -> tuple[_Factors, tuple[int, int]]:
    m, n = g.shape
    left, right, left_root, right_root = _kl_start(old, g, step)

    def new_left(right_root: Tensor) -> Tensor:
        if absent(left):
            return left
        x = from_both_sides(g, g.new_empty(0), right_root)
        return updated_factor(left, x, beta=step.beta2, weight=step.weight / n)

    def new_right(left_root: Tensor) -> Tensor:
        if absent(right):
            return right
        x = from_both_sides(g, left_root, g.new_empty(0))
        return updated_factor(right, x.mT, beta=step.beta2, weight=step.weight / m)

    if not refresh:
        return _Factors(new_left(right_root), new_right(left_root), left_root, right_root), (0, 0)
    if step.kl_order == "simultaneous":
        left, right = new_left(right_root), new_right(left_root)
        left_root, left_failed = _new_root(left, left_root, 1.0, step)
        right_root, right_failed = _new_root(right, right_root, 1.0, step)
    elif m <= n:
        left = new_left(right_root)
        left_root, left_failed = _new_root(left, left_root, 1.0, step)
        right = new_right(left_root)
        right_root, right_failed = _new_root(right, right_root, 1.0, step)
    else:
        right = new_right(left_root)
        right_root, right_failed = _new_root(right, right_root, 1.0, step)
        left = new_left(right_root)
        left_root, left_failed = _new_root(left, left_root, 1.0, step)
    factors = _Factors(left, right, left_root, right_root)
    return _rebalanced(factors), (left_failed, right_failed)


def _kl_start(old: _Factors, g: Tensor, step: ShampooOptions) -> _Factors:
    """lam0 I on both sides at the first gradient that is not zero."""
    if any(not absent(x) and max_abs(x) != 0.0 for x in (old.left, old.right)):
        return old
    lam0 = norm(g) / math.sqrt(g.numel())
    if lam0 == 0.0 or not math.isfinite(lam0):
        return old
    root = (lam0 + max(step.ridge, step.relative_ridge * lam0)) ** -0.5
    start = (lam0, lam0, root, root)
    return _Factors(
        *(x if absent(x) else value * identity_like(x) for x, value in zip(old, start, strict=True))
    )


def _rebalanced(factors: _Factors) -> _Factors:
    left, right, left_root, right_root = factors
    if absent(left) or absent(right):
        return factors
    left_mean, right_mean = float(left.diagonal().mean()), float(right.diagonal().mean())
    if not (0.0 < left_mean < math.inf and 0.0 < right_mean < math.inf):
        return factors
    s = math.sqrt(left_mean / right_mean)
    return _Factors(left / s, right * s, left_root * math.sqrt(s), right_root / math.sqrt(s))


def _new_squares(squares: Tensor, g: Tensor, step: ShampooOptions) -> Tensor:
    if not step.squares:
        return squares
    g2 = g.to(squares.dtype) ** 2
    if step.graft == "adagrad":
        return squares + g2
    return step.graft_beta2 * squares + (1.0 - step.graft_beta2) * g2


def _shampoo_update(
    m: Tensor, squares: Tensor, factors: _Factors, t: float, step: ShampooOptions
) -> Tensor:
    mhat = m / (1.0 - step.beta1**t) if step.debias else m
    p = from_both_sides(mhat, factors.left_root.to(m.dtype), factors.right_root.to(m.dtype))
    if step.graft == "none":
        return p
    length = norm(p)
    if length == 0.0:
        return p
    return p * (norm(_graft_direction(mhat, squares, t, step)) / length)


def _graft_direction(mhat: Tensor, squares: Tensor, t: float, step: ShampooOptions) -> Tensor:
    if step.graft == "sgd":
        return mhat
    bias = 1.0 - step.graft_beta2**t if step.graft == "adam" else 1.0
    root = (squares / bias).sqrt()
    eps = step.graft_eps
    if step.graft_eps_mode == "relative":
        eps *= norm(root) / math.sqrt(root.numel())
    divisor = root + eps
    return torch.where(divisor == 0.0, 0.0, mhat / divisor)
