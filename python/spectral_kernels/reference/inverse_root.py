"""Inverse p-th roots of symmetric positive semidefinite matrices."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from spectral_kernels._backend import check_choice, check_range, operator
from spectral_kernels._options import ROOT_METHODS, check_root_method
from spectral_kernels.coefficients import (
    MOST_ROOT_ROWS_DECOMPOSED,
    Rows,
    root_schedule,
    root_tolerance,
)

from ._shared import (
    check_root,
    check_square,
    exponent_of,
    finite,
    matrices,
    max_abs,
    norm,
    scaled,
    unit_roundoff,
)
from .symmetric_matmul import identity_like, mirror, power, product

CONVERGED, STAGNATED, FELL_BACK, RANK_DEFICIENT, NON_FINITE = range(5)


@operator
def inverse_root(
    a: Tensor, p: int, *, ridge: float, relative_ridge: float, method: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(A + delta I)^(-1/p), delta = max(ridge, relative_ridge * max_i sum_j |A_ij|), A symmetrised.

    A is scaled by 2^-e, e the largest multiple of p with 2^e <= max(max |A|, ridge), then replaced
    by (A + A^T) / 2, so that A 2^(p k) gives the bits of A, times 2^-k. With B = A + delta I,
    nu = sqrt(||B^2||_F) (1 + 4u), u the unit roundoff of A's dtype, and l0 = delta / nu:

    "iteration" (C7): M = B / nu, X = I; for every row N = a I + b M + c M^2 of
        `root_schedule(l0, p, root_tolerance(u))`: X <- N X, M <- N^p M; the root is
        nu^(-1/p) X. A ridge below 4u nu does not bound the spectrum: l0 = 4u is taken then.
    "newton" (C2): M = z B / nu, X = z^(1/p) I, z = (p + 1) / 2; N = (1 + 1/p) I - M / p,
        X <- N X, M <- N^p M until max |M - I| <= 16u, or below 1/2 and no longer falling, or 100
        steps.
    "newton_db" (C4), p in 2, 4, 8: Y = B / nu, Z = I; E = 1.5 I - 0.5 Z Y, Y <- Y E, Z <- E Z, with
        the stop of "newton" on Z Y; for 4 and 8 again with the Y that came out, root from Z. Full
        products in this order: any other, and mirrored triangles too, lets rounding grow.
    "eigen": in float64, eigenvalues of A below 0 as 0. With delta = 0 the pseudo-inverse root:
        eigenvalues <= cut = max(4u, 4n 2^-53) times the largest magnitude count as 0.
    "auto": "iteration" where delta >= 4u nu and n > 2, else "eigen".

    All but "eigen" work in A's dtype, the products of "iteration" and "newton" mirrored from their
    lower triangles, and are checked: with Omega the fixed n x 8 sign matrix of `sign_matrix`,
        residual = ||(X^floor(p/2) B X^ceil(p/2) - I) Omega||_F / ||Omega||_F
    must be at most 0.25 (float64: at most max(1e-6, 1e-12 / l0) too, 1e-6 where the ridge is below
    4u nu) and the diagonal of X be positive. That shows the smallest eigenvalues, where rounding
    leaves the largest error. What hides behind it, the large eigenvalues, shows in
        ||(B X^p - I) B Omega||_F / ||B Omega||_F <= 256u (p + l0^(-1/p)), B and X those of M,
    as B shrinks the small ones; exact roots, rounded, come to some u l0^(-1/p). Otherwise
    "iteration" runs once more from l0 / 16, and then "eigen" takes over.
    Where the eigensolver gives up, a ridge of at least 4u nu lets "eigen" take the root by
    "iteration" (status 2).
    For "eigen" the residual is taken in float64 on the range P of the eigenvalues of B above
    max(cut, 1e-12) of the largest, P (...) P in place of (...) and P X for X, with 1 / l0 the
    condition number there: rounding in B hides what lies below.

    Args:
        a: (..., n, n), float32 or float64.
        p: 1 to 8.
        ridge, relative_ridge: at least 0.
        method: see above.

    Returns:
        root: (..., n, n).
        status: (...) int64: 0 converged; 1 stagnated, when eigen failed too or an eigenvalue lies
            below -sqrt(n) cut of the largest, so that A is not semidefinite; 2 fell back to eigen,
            or from it;
            3 rank-deficient, the pseudo-inverse root (also where an iteration fell back);
            4 non-finite input.
        steps: (...) int64, the rows or steps of the accepted attempt, 0 for eigen.
        residual, delta: (...) in a's dtype.
        A zero matrix gives delta^(-1/p) I, or 0 and status 3 if delta = 0; a matrix with a
        non-finite element gives NaN.

    Raises:
        TypeError, ValueError: an argument out of its range, "newton_db" with another p.

    Source: Guo and Higham (2006) for C2; DASH, arXiv 2602.02016, for C4; the rows are derived in
    `spectral_kernels.coefficients`.
    """
    check_square("a", a)
    _check_root_options(p, ridge, relative_ridge, method)
    root = torch.empty_like(a, memory_format=torch.contiguous_format)
    status, steps = (a.new_zeros(a.shape[:-2], dtype=torch.int64) for _ in range(2))
    residual, delta = (a.new_zeros(a.shape[:-2]) for _ in range(2))
    for index in matrices(a) if a.numel() else ():
        result = root_of(a[index], p, ridge=ridge, relative_ridge=relative_ridge, method=method)
        root[index], delta[index] = result.root, result.delta
        status[index], steps[index], residual[index] = result.status, result.steps, result.residual
    return root, status, steps, residual, delta


class Root(NamedTuple):
    """What `inverse_root` returns, for one matrix."""

    root: Tensor
    status: int
    steps: int
    residual: float
    delta: Tensor


def root_of(a: Tensor, p: int, *, ridge: float, relative_ridge: float, method: str) -> Root:
    """`inverse_root` of one matrix."""
    zero = a.new_zeros(())
    if not finite(a):
        return Root(torch.full_like(a, math.nan), NON_FINITE, 0, math.nan, zero + math.nan)
    largest = max(max_abs(a), ridge)
    if largest == 0.0:
        return Root(torch.zeros_like(a), RANK_DEFICIENT, 0, 0.0, zero)
    exponent = p * (exponent_of(largest) // p)
    a = scaled(a, -exponent)
    a = 0.5 * (a + a.mT)
    row_sum = a.abs().sum(-1).max()
    delta = torch.maximum(zero + math.ldexp(ridge, -exponent), relative_ridge * row_sum)
    root, status, steps, residual = _scaled_root(a, delta, p, method)
    return Root(scaled(root, -exponent // p), status, steps, residual, scaled(delta, exponent))


def _scaled_root(a: Tensor, delta: Tensor, p: int, method: str) -> tuple[Tensor, int, int, float]:
    """Root, status, steps and residual of a symmetric A with elements of order 1."""
    u = unit_roundoff(a.dtype)
    b = a + delta * identity_like(a)
    nu = math.sqrt(norm(product(b, b))) * (1.0 + 4.0 * u)
    ridged = float(delta) >= 4.0 * u * nu
    if method == "auto":
        method = "iteration" if ridged and len(a) > MOST_ROOT_ROWS_DECOMPOSED else "eigen"
    if method == "eigen":
        root, status, residual = _eigen_root(a, float(delta), p)
        if not (math.isinf(residual) and ridged):
            return root, status, 0, residual
        root, status, steps, residual = _scaled_root(a, delta, p, "iteration")
        return root, FELL_BACK if status == CONVERGED else status, steps, residual
    low = float(delta) / nu if ridged else 4.0 * u
    m = b / nu
    limits = _Limits.of(a.dtype, low, p, ridged=ridged)
    attempts = [low, low / 16.0] if method == "iteration" else [low]
    for attempt in attempts:
        found = _attempt(m, p, method, attempt, limits)
        if found is not None:
            x, steps, residual = found
            return nu ** (-1.0 / p) * x, CONVERGED, steps, residual
    root, status, residual = _eigen_root(a, float(delta), p)
    return root, FELL_BACK if status == CONVERGED else status, 0, residual


class _Limits(NamedTuple):
    """What the residuals of an accepted root may be at most."""

    plain: float
    weighted: float

    @staticmethod
    def of(dtype: torch.dtype, low: float, p: int, *, ridged: bool) -> _Limits:
        weighted = 256.0 * unit_roundoff(dtype) * (p + low ** (-1.0 / p))
        return _Limits(_residual_limit(dtype, low if ridged else 1.0), weighted)


def _attempt(
    m: Tensor, p: int, method: str, low: float, limits: _Limits
) -> tuple[Tensor, int, float] | None:
    """Root of M, steps and residual, or None where the checks refuse it."""
    if method == "iteration":
        x, steps = _iterate(m, root_schedule(low, p, root_tolerance(unit_roundoff(m.dtype))), p)
    elif method == "newton":
        x, steps = _newton(m, p)
    else:
        x, steps = _newton_db(m, p)
    omega = sign_matrix(x)
    residual = _residual(x, m, omega, p)
    accepted = (
        residual <= limits.plain
        and _weighted_residual(x, m, omega, p) <= limits.weighted
        and bool((x.diagonal() > 0.0).all())
    )
    return (x, steps, residual) if accepted else None


def _iterate(m: Tensor, rows: Rows, p: int) -> tuple[Tensor, int]:
    eye = identity_like(m)
    x = eye
    for step, (a, b, c) in enumerate(rows):
        n = a * eye + b * m
        if c != 0.0:
            n = n + c * product(m, m)
        x = n if step == 0 else product(n, x)
        if step < len(rows) - 1:
            m = product(power(n, p), m)
    return x, len(rows)


def _newton(m: Tensor, p: int) -> tuple[Tensor, int]:
    eye = identity_like(m)
    z = (p + 1) / 2.0
    x, m = z ** (1.0 / p) * eye, z * m
    error = math.inf
    for step in range(100):
        previous, error = error, max_abs(m - eye)
        if _stop(error, previous, m.dtype):
            return x, step
        n = (1.0 + 1.0 / p) * eye - m / p
        x, m = product(n, x), product(power(n, p), m)
    return x, 100


def _newton_db(m: Tensor, p: int) -> tuple[Tensor, int]:
    eye = identity_like(m)
    y, steps = m, 0
    for _ in range(p.bit_length() - 1):
        z, error = eye, math.inf
        for _ in range(100):
            zy = z @ y
            previous, error = error, max_abs(zy - eye)
            if _stop(error, previous, m.dtype):
                break
            e = 1.5 * eye - 0.5 * zy
            y, z = y @ e, e @ z
            steps += 1
    return mirror(z), steps


def _stop(error: float, previous: float, dtype: torch.dtype) -> bool:
    """Close enough, as close as rounding lets it come, or diverged."""
    stalled = previous < 0.5 and error >= previous
    return error <= 16.0 * unit_roundoff(dtype) or stalled or not math.isfinite(error)


def _eigen_root(a: Tensor, delta: float, p: int) -> tuple[Tensor, int, float]:
    """Root, status and residual by an eigendecomposition in float64."""
    n = a.shape[-1]
    try:
        values, vectors = torch.linalg.eigh(a.double())
    except torch.linalg.LinAlgError:
        return torch.zeros_like(a), STAGNATED, math.inf
    cut = max(4.0 * unit_roundoff(a.dtype), 4.0 * n * 2.0**-53)
    largest = max_abs(values)
    indefinite = float(values[0]) < -math.sqrt(n) * cut * largest
    spectrum = values.clamp(min=0.0) + delta
    kept = spectrum > (0.0 if delta > 0.0 else cut * largest)
    powers = torch.where(kept, spectrum, 1.0) ** (-1.0 / p) * kept
    root = mirror((vectors * powers) @ vectors.mT)

    checked = spectrum > max(cut, 1e-12) * spectrum[-1]
    residual, limit = 0.0, 0.0
    if bool(checked.any()):
        q, powers = vectors[:, checked], powers[checked]
        b = a.double() + delta * identity_like(vectors)
        # In the eigenbasis P X P is diagonal, and P Omega is Q (Q^T Omega).
        omega = sign_matrix(vectors)
        y = (powers ** (p - p // 2))[:, None] * (q.mT @ omega)
        y = (powers ** (p // 2))[:, None] * (q.mT @ (b @ (q @ y)))
        residual = norm(q @ y - q @ (q.mT @ omega)) / norm(omega)
        limit = _residual_limit(a.dtype, float(spectrum[checked][0] / spectrum[-1]))
    if indefinite or not residual <= limit:
        status = STAGNATED
    else:
        status = CONVERGED if bool(kept.all()) else RANK_DEFICIENT
    return root.to(a.dtype), status, residual


def _residual(x: Tensor, b: Tensor, omega: Tensor, p: int) -> float:
    """||(X^floor(p/2) B X^ceil(p/2) - I) Omega||_F / ||Omega||_F."""
    y = omega
    for _ in range(p - p // 2):
        y = x @ y
    y = b @ y
    for _ in range(p // 2):
        y = x @ y
    return norm(y - omega) / norm(omega)


def _weighted_residual(x: Tensor, b: Tensor, omega: Tensor, p: int) -> float:
    """||(B X^p - I) B Omega||_F / ||B Omega||_F."""
    weighted = b @ omega
    y = weighted
    for _ in range(p):
        y = x @ y
    return norm(b @ y - weighted) / norm(weighted)


def _residual_limit(dtype: torch.dtype, low: float) -> float:
    return min(0.25, max(1e-6, 1e-12 / low)) if dtype == torch.float64 else 0.25


def sign_matrix(like: Tensor) -> Tensor:
    """The fixed n x 8 matrix of +-1 that residuals are taken on, for an n x n matrix.

    From the generator s <- (1664525 s + 1013904223) mod 2^32, s = 1 at first, advanced before each
    element: element (i, j) is -1 where the top bit of the (8 i + j + 1)-th s is set, else 1.
    """
    return _signs(like.shape[-1]).to(like)


@functools.lru_cache(maxsize=64)
def _signs(n: int) -> Tensor:
    state, signs = 1, []
    for _ in range(8 * n):
        state = (1664525 * state + 1013904223) % 2**32
        signs.append(-1.0 if state >> 31 else 1.0)
    return torch.tensor(signs, dtype=torch.float64, device="cpu").reshape(n, 8)


def _check_root_options(p: int, ridge: float, relative_ridge: float, method: str) -> None:
    check_root(p)
    check_range("ridge", ridge)
    check_range("relative_ridge", relative_ridge)
    check_choice("method", method, ROOT_METHODS)
    check_root_method(method, p)
