"""The eigenbasis of a Kronecker factor, its refresh, rotation into it, and the fused SOAP step."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from spectral_kernels._backend import operator
from spectral_kernels._options import BasisLists, SoapOptions, takes

from .._step_checks import check_soap
from ._shared import (
    REFERENCE,
    Progress,
    absent,
    check_square,
    exponent_of,
    finite,
    matrices,
    max_abs,
    moved,
    norm,
    optional,
    scaled,
    store,
    unit_roundoff,
    widened,
)
from .kron_factor import from_both_sides, updated_factors
from .symmetric_matmul import identity_like, product


@operator
def eigenbasis(a: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, descending, and eigenvectors of (A + A^T) / 2, computed in float64.

    Every column has its element of largest magnitude, the first of equals, positive. Equal
    eigenvalues keep LAPACK's order; a zero matrix has the identity for its basis.

    Args:
        a: (..., n, n), float32 or float64.

    Returns:
        values (..., n) and vectors (..., n, n) in a's dtype: A ~ V diag(values) V^T. A matrix with
        a non-finite element, or on which LAPACK does not converge, gives NaN.

    Raises:
        TypeError, ValueError: a is not a batch of square float32 or float64 matrices.
    """
    check_square("a", a)
    values = a.new_empty(a.shape[:-1])
    vectors = torch.empty_like(a, memory_format=torch.contiguous_format)
    for index in matrices(a) if a.numel() else ():
        values[index], vectors[index] = eigenbasis_of(a[index])
    return values, vectors


@operator
def refresh_eigenbasis(q: Tensor, a: Tensor, *, sort: bool) -> tuple[Tensor, Tensor]:
    """One round of orthogonal iteration, (A Q)'s orthonormal factor, column j following column j.

    With P = A Q and values_j = sum_i Q_ij P_ij, the columns of P are taken in descending order of
    the values (stably), made orthonormal from first to last as by QR with a positive diagonal of R,
    and put back in their places, so no state of the old basis has to be permuted. With `sort` they
    stay in that order: column k follows column order[k]. A is (A + A^T) / 2, scaled by a power of
    two so that its largest element is in [1, 2). A column of P that is not longer than u sqrt(n)
    times the longest is rounding noise of A: it is replaced by that of Q, with the value 0, so that
    directions in a null space stay where they were.

    Columns are made orthonormal by adaptive CholeskyQR in q's dtype, unit roundoff u: at most 6
    times:
        P <- P diag(column norms)^-1;  C = P^T P;  E = ||C - I||_F
        E < e1:    P <- P (I - striu(C)), done if E < e2 (no Cholesky)
        otherwise: P <- P R^-1, R^T R = C + s I, s = 0 if E < 1/2, else 8 u sqrt(n), and s is raised
            eightfold (from 8 u sqrt(n) if it was 0) as often as a pivot fails
    with e1 = 0.03, e2 = 2e-3 in float32, and both 1e-7 in float64. Where max |Q^T Q - I| is then
    above 5e-6 (float32) or 1e-13 sqrt(n) (float64), Householder QR of the first P takes over, its
    columns signed for a non-negative diagonal of R. If that fails too, Q is kept.
    The C++ kernels for CPUs go to Householder QR at once, in q's dtype, where E is 1/2 or more at
    the beginning, by an estimate from eight products with random signs: there it takes the time of
    two passes at any condition, and leaves ||Q^T Q - I||_F of 13 u sqrt(n), LAPACK's 11.

    Args:
        q: (..., n, n), the old basis, float32 or float64.
        a: the same shape and dtype.
        sort: see above.

    Returns:
        values (..., n): Rayleigh quotients of the old columns, which estimate the eigenvalues of A
        in the order of the new columns. q_new (..., n, n). A zero A gives zeros and q, in order; a
        matrix with a non-finite element in q or a gives NaN.

    Raises:
        TypeError, ValueError: bad input.

    Source: the round is SOAP's, arXiv 2409.11321, algorithm 4; scatter back: HeavyBall.
    """
    check_square("q", q)
    check_square("a", a)
    if q.shape != a.shape:
        raise ValueError(f"q has shape {tuple(q.shape)}, a {tuple(a.shape)}")
    if q.dtype != a.dtype:
        raise TypeError(f"q is {q.dtype}, a {a.dtype}")
    values = a.new_empty(a.shape[:-1])
    new = torch.empty_like(q, memory_format=torch.contiguous_format)
    for index in matrices(a) if a.numel() else ():
        values[index], new[index], _ = refresh_of(q[index], a[index], sort=sort)
    return values, new


def eigenbasis_of(a: Tensor) -> tuple[Tensor, Tensor]:
    """`eigenbasis` of one matrix."""
    wide = a.double()
    failed = a.new_full(a.shape[-1:], math.nan), torch.full_like(a, math.nan)
    if not finite(a):
        return failed
    try:
        values, vectors = torch.linalg.eigh(0.5 * wide + 0.5 * wide.mT)
    except torch.linalg.LinAlgError:
        return failed
    values, order = values.sort(descending=True, stable=True)
    vectors = vectors[:, order]
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return values.to(a.dtype), (vectors * largest.sign()).to(a.dtype)


def refresh_of(q: Tensor, a: Tensor, *, sort: bool) -> tuple[Tensor, Tensor, Tensor]:
    """`refresh_eigenbasis` of one matrix, and the descending order of the old columns."""
    zeros, unchanged = (
        a.new_zeros(a.shape[-1]),
        torch.arange(a.shape[-1], dtype=torch.int64, device=a.device),
    )
    if not finite(q, a):
        return zeros + math.nan, torch.full_like(q, math.nan), unchanged
    largest = max_abs(a)
    if largest == 0.0:
        return zeros, q.clone(), unchanged
    exponent = exponent_of(largest)
    a = scaled(a, -exponent)
    p = (0.5 * (a + a.mT)) @ q
    lengths = p.norm(dim=0)
    null = lengths <= unit_roundoff(a.dtype) * math.sqrt(len(a)) * lengths.max()
    values = torch.where(null, 0.0, (q * p).sum(0))
    p = torch.where(null, q, p)
    order = values.argsort(descending=True, stable=True)
    new = _orthonormal(p[:, order], q[:, order])
    values = scaled(values, exponent)
    if sort:
        return values[order], new, order
    unsorted = torch.empty_like(new)
    unsorted[:, order] = new
    return values, unsorted, order


def _orthonormal(p: Tensor, q: Tensor) -> Tensor:
    """P's orthonormal factor; q is kept if nothing works."""
    n, u = p.shape[-1], unit_roundoff(p.dtype)
    double = p.dtype == torch.float64
    first_order, last = (1e-7, 1e-7) if double else (0.03, 2e-3)
    limit = 1e-13 * math.sqrt(n) if double else 5e-6
    shift = 8.0 * u * math.sqrt(n)
    eye = identity_like(p)
    start = p
    for _ in range(6):
        p = p / p.norm(dim=0)
        c = product(p.mT, p)
        error = norm(c - eye)
        if error < first_order:
            p = p @ (eye - c.triu(1))
            if error < last:
                break
            continue
        s = 0.0 if error < 0.5 else shift
        r, info = torch.linalg.cholesky_ex(c + s * eye, upper=True)
        while int(info) and s < 1.0:
            s = max(8.0 * s, shift)
            r, info = torch.linalg.cholesky_ex(c + s * eye, upper=True)
        if int(info):
            break
        p = torch.linalg.solve_triangular(r, p, upper=True, left=False)
    if _orthogonality(p) <= limit:
        return p
    p, r = torch.linalg.qr(start)
    p = p * torch.where(r.diagonal() < 0.0, -1.0, 1.0)
    return p if _orthogonality(p) <= limit else q.clone()


def _orthogonality(q: Tensor) -> float:
    """max |Q^T Q - I|, NaN counted as infinite."""
    error = max_abs(product(q.mT, q) - identity_like(q))
    return math.inf if math.isnan(error) else error


# Rotation into and out of a pair of bases. An absent side is the identity.


def rotate(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Q_L^T X Q_R."""
    return from_both_sides(x, left if absent(left) else left.mT, right)


def rotate_back(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Q_L X Q_R^T."""
    return from_both_sides(x, left, right if absent(right) else right.mT)


class Bases(NamedTuple):
    """Factors and bases of one matrix; size 0 where a side is absent."""

    left: Tensor
    right: Tensor
    left_basis: Tensor
    right_basis: Tensor


def uninitialised(bases: Bases) -> bool:
    """Whether every side that exists has a basis of zeros, which no basis is."""
    present = [x for x in (bases.left_basis, bases.right_basis) if not absent(x)]
    return bool(present) and all(max_abs(x) == 0.0 for x in present)


def accumulated(bases: Bases, g: Tensor, beta: float) -> Bases:
    """L <- beta L + (1 - beta) G G^T and R likewise."""
    none = g.new_empty(0)
    left, right = updated_factors(
        bases.left,
        bases.right,
        g,
        beta=beta,
        weight=1.0 - beta,
        left_root=none,
        right_root=none,
    )
    return bases._replace(left=left, right=right)


def initialised(bases: Bases, g: Tensor, beta: float) -> Bases:
    """The factors of the first gradient and their eigenbases; nothing happens for G = 0."""
    if max_abs(g) == 0.0:
        return bases
    bases = accumulated(bases, g, beta)
    left_basis, right_basis = (
        x if absent(x) else eigenbasis_of(x)[1] for x in (bases.left, bases.right)
    )
    return bases._replace(left_basis=left_basis, right_basis=right_basis)


def refreshed(
    bases: Bases, moment: Tensor, squares: Tensor, *, permute: bool
) -> tuple[Bases, Tensor, Tensor]:
    """New bases, the rotated moment M' <- (Q_new^T Q_old) M' (...) in them, and the squares.

    With `permute` the new columns are in descending order and the squares are permuted with them,
    as the public SOAP and DeVA do; else column j follows column j and the squares stay.
    """
    moment = rotate_back(moment, bases.left_basis, bases.right_basis)
    if not absent(bases.left):
        _, basis, order = refresh_of(bases.left_basis, bases.left, sort=permute)
        bases = bases._replace(left_basis=basis)
        squares = squares[order] if permute else squares
    if not absent(bases.right):
        _, basis, order = refresh_of(bases.right_basis, bases.right, sort=permute)
        bases = bases._replace(right_basis=basis)
        squares = squares[:, order] if permute else squares
    return bases, rotate(moment, bases.left_basis, bases.right_basis), squares


@operator
@takes(BasisLists, SoapOptions)
def soap_step_(lists: BasisLists, options: SoapOptions) -> None:
    """One SOAP step over a list of matrices: Adam in the eigenbasis of Shampoo's factors.

    For step t of a matrix, in the dtype of its exp_avg, W rounded once:

        G' = Q_L^T G Q_R
        M <- beta1 M + (1 - beta1) G';  V <- beta2 V + (1 - beta2) G'^2         (M, V rotated)
        U = Q_L (M / (sqrt(V) + eps)) Q_R^T;  U <- U / (rms(U) + 1e-30) if normalize_grads
        W <- (1 - lr weight_decay) (W - lr c U)
            c = sqrt(1 - beta2^t) / (1 - beta1^t) if correct_bias, else 1
        L <- b L + (1 - b) G G^T;  R <- b R + (1 - b) G^T G,  b = shampoo_beta
        where refresh: new Q_L, Q_R (`refresh_eigenbasis`), M <- (Q_L,new^T Q_L) M (Q_R^T Q_R,new)

    V is not touched by a refresh, since column j follows column j; with permute_squares the columns
    are sorted and V is permuted with them, as the public class does.

    The first call of a matrix, known by bases of zeros, sets L = (1 - b) G G^T, R likewise and the
    bases from `eigenbasis`. With skip_first, as in the public class, that is all it does: no
    update, no decay, no step. Without, it takes the step in these bases, and neither updates the
    factors again nor refreshes. A first call with G = 0 leaves the bases at zero: without
    skip_first it decays W and counts the step. A matrix without either side has no first call.

    A matrix is skipped, with every bit of it and its state kept, no step counted and `skipped`
    raised, unless nonfinite="propagate", if its gradient or momentum is not finite or its new state
    or parameter would not be.

    Args:
        params, grads: entry i is (..., m_i, n_i).
        exp_avgs, exp_avg_sqs: M and V, shapes of the params, float32 or float64; bfloat16 of params
            that are not float64, rounded at random (`rounded_at_random`).
        lefts, left_bases: (..., m, m) each, or size 0 for no left side.
        rights, right_bases: (..., n, n) each, or size 0.
        step_counts: 0-dim or the batch's shape.
        skipped: one int64.
        lr: one number.
        beta1, beta2, shampoo_beta: in [0, 1).
        eps, weight_decay: at least 0. With eps = 0 an element with V = 0 moves by 0.
        correct_bias, normalize_grads, skip_first, permute_squares: see above.
        maximize: G <- -G.
        nonfinite: "skip"; "propagate", without a test; or "raise", before anything is written, for
            gradients, states and parameters that are not finite.
        refresh: one int an entry, not 0 where its bases are refreshed after the update.

    Raises:
        TypeError, ValueError: bad input, before anything is written.

    Source: Vyas et al., arXiv 2409.11321, algorithm 3; github.com/nikhilvyas/SOAP.
    """
    check_soap(lists, options, REFERENCE)
    params, grads, exp_avgs, exp_avg_sqs, lefts, rights, left_bases, right_bases = lists[:8]
    step_counts, skipped, lr = lists[8:]
    rate, propagate = float(lr), options.nonfinite == "propagate"
    decay = 1.0 - rate * options.weight_decay
    beta1, beta2, shampoo_beta = options.beta1, options.beta2, options.shampoo_beta
    for i, param in enumerate(params):
        progress = Progress(step_counts[i], skipped)
        for index in matrices(param) if param.numel() else ():
            m, v = (widened(x[i][index]) for x in (exp_avgs, exp_avg_sqs))
            g = grads[i][index].to(m.dtype) * (-1.0 if options.maximize else 1.0)
            if not propagate and not finite(g, m):
                progress.skip()
                continue
            old = Bases(*(optional(x[i], index) for x in (lefts, rights, left_bases, right_bases)))
            first = uninitialised(old)
            idle = first and options.skip_first
            t = progress.next_step(index)
            new = initialised(old, g, shampoo_beta) if first else old
            new_m, new_v = m, v
            if not idle:
                rotated = rotate(g, new.left_basis, new.right_basis)
                new_m = beta1 * m + (1.0 - beta1) * rotated
                new_v = beta2 * v + (1.0 - beta2) * rotated**2
                divisor = new_v.sqrt() + options.eps
                update = torch.where(divisor == 0.0, 0.0, new_m / divisor)
                update = rotate_back(update, new.left_basis, new.right_basis)
            if not first:
                new = accumulated(new, g, shampoo_beta)
                if options.refresh[i]:
                    permute = options.permute_squares
                    new, new_m, new_v = refreshed(new, new_m, new_v, permute=permute)
            new_w = param[index]
            if not idle:
                if options.normalize_grads:
                    update = rms_normalized(update)
                bias = adam_bias(beta1, beta2, t) if options.correct_bias else 1.0
                new_w = moved(new_w, update, rate=decay * rate * bias, decay=decay)
            if not propagate and not (finite(new_m, new_v, *new) and (idle or finite(new_w))):
                progress.skip()
                continue
            states = (exp_avgs[i][index], exp_avg_sqs[i][index], *old)
            for state, value in zip(states, (new_m, new_v, *new), strict=True):
                store(state, value, t - 1.0)
            if not idle:
                param[index].copy_(new_w)
                progress.update(index)
        progress.finish()


def rms_normalized(update: Tensor) -> Tensor:
    """U / (rms(U) + 1e-30)."""
    return update / (norm(update) / math.sqrt(update.numel()) + 1e-30)


def adam_bias(beta1: float, beta2: float, t: float) -> float:
    """sqrt(1 - beta2^t) / (1 - beta1^t), the bias corrections as a factor of the step size."""
    return math.sqrt(1.0 - beta2**t) / (1.0 - beta1**t)
