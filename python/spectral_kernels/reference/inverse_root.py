"""Inverse p-th roots of symmetric positive semidefinite matrices, and the fused Shampoo step."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from spectral_kernels._backend import check_choice, check_device, check_list, operator
from spectral_kernels.coefficients import (
    MOST_ROOT_ROWS_DECOMPOSED,
    Rows,
    root_schedule,
    root_tolerance,
)

from ._shared import (
    Progress,
    absent,
    check_factors,
    check_range,
    check_root,
    check_square,
    check_state,
    check_step,
    exponent_of,
    finite,
    matrices,
    max_abs,
    moved,
    norm,
    optional,
    outside_range,
    raise_nonfinite,
    scaled,
    unit_roundoff,
)
from .kron_factor import two_sided, updated_factor, updated_factors
from .symmetric_matmul import identity_like, mirror, power, product

CONVERGED, STAGNATED, FELL_BACK, RANK_DEFICIENT, NON_FINITE = range(5)

_METHODS = ("auto", "iteration", "eigen", "newton", "newton_db")
_GRAFTS = ("none", "sgd", "adagrad", "rmsprop", "adam")
_GRAFT_EPS_MODES = ("relative", "absolute")
_KL_ORDERS = ("sequential", "simultaneous")


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


@dataclass(frozen=True)
class _Shampoo:
    """The options of a Shampoo step."""

    rate: float
    beta1: float
    beta2: float
    graft_beta2: float
    root: int
    ridge: float
    relative_ridge: float
    root_method: str
    weight_decay: float
    graft: str
    graft_eps: float
    graft_eps_mode: str
    kl: bool
    kl_order: str
    debias: bool

    @property
    def weight(self) -> float:
        """1 - beta2, or 1 for beta2 = 1, which is AdaGrad's sum."""
        return 1.0 - self.beta2 if self.beta2 < 1.0 else 1.0


class _Factors(NamedTuple):
    """Factors and roots of one matrix; size 0 where a side is absent."""

    left: Tensor
    right: Tensor
    left_root: Tensor
    right_root: Tensor


@operator
def shampoo_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    lefts: Sequence[Tensor],
    rights: Sequence[Tensor],
    left_roots: Sequence[Tensor],
    right_roots: Sequence[Tensor],
    graft_squares: Sequence[Tensor],
    root_failures: Sequence[Tensor],
    step_counts: Sequence[Tensor],
    skipped: Tensor,
    lr: Tensor,
    *,
    beta1: float,
    beta2: float,
    graft_beta2: float,
    root: int,
    ridge: float,
    relative_ridge: float,
    root_method: str,
    weight_decay: float,
    graft: str,
    graft_eps: float,
    graft_eps_mode: str,
    kl: bool,
    kl_order: str,
    debias: bool,
    maximize: bool,
    nonfinite: str,
    refresh: Sequence[int],
) -> None:
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
        momentum_buffers: shapes of the params, float32 or float64.
        lefts, left_roots: (..., m, m) each, or size 0 for no left side.
        rights, right_roots: (..., n, n) each, or size 0.
        graft_squares: V, shapes of the params; size 0 for graft "none" and "sgd".
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
    check_step(params, grads, step_counts, skipped, lr, nonfinite)
    check_state("momentum_buffers", momentum_buffers, params)
    check_factors(params, lefts, rights, left_roots, right_roots, "roots")
    _check_root_options(root, ridge, relative_ridge, root_method)
    check_choice("graft", graft, _GRAFTS)
    check_choice("graft_eps_mode", graft_eps_mode, _GRAFT_EPS_MODES)
    check_choice("kl_order", kl_order, _KL_ORDERS)
    check_range("beta1", beta1, 0.0, 1.0)
    check_range("beta2", beta2, 0.0, 1.0, closed=True)
    check_range("graft_beta2", graft_beta2, 0.0, 1.0)
    check_range("graft_eps", graft_eps)
    check_range("weight_decay", weight_decay)
    if kl and root != 2:
        raise ValueError(
            f"kl weights its factors by inverse square roots: root must be 2, not {root}"
        )
    check_list("refresh", refresh, len(params))
    _check_shampoo_state(params, graft_squares, root_failures, graft)
    raise_nonfinite(
        nonfinite,
        grads=grads,
        momentum_buffers=momentum_buffers,
        lefts=lefts,
        rights=rights,
        left_roots=left_roots,
        right_roots=right_roots,
        graft_squares=() if graft in ("none", "sgd") else graft_squares,
        params=params,
    )
    step = _Shampoo(
        rate=float(lr),
        beta1=beta1,
        beta2=beta2,
        graft_beta2=graft_beta2,
        root=root,
        ridge=ridge,
        relative_ridge=relative_ridge,
        root_method=root_method,
        weight_decay=weight_decay,
        graft=graft,
        graft_eps=graft_eps,
        graft_eps_mode=graft_eps_mode,
        kl=kl,
        kl_order=kl_order,
        debias=debias,
    )
    for i, param in enumerate(params):
        progress = Progress(step_counts[i], skipped)
        for index in matrices(param) if param.numel() else ():
            m = momentum_buffers[i][index]
            g = grads[i][index].to(m.dtype) * (-1.0 if maximize else 1.0)
            if (relative_ridge > 0.0 or kl) and outside_range(g):
                progress.skip()
                continue
            if nonfinite != "propagate" and not finite(g, m):
                progress.skip()
                continue
            t = progress.next_step(index)
            old = _Factors(
                *(optional(x[i], index) for x in (lefts, rights, left_roots, right_roots))
            )
            new, failed = _refreshed_factors(old, g, t, step, refresh=bool(refresh[i]))
            squares = optional(graft_squares[i], index)
            new_squares = _new_squares(squares, g, step)
            new_m = beta1 * m + (1.0 - beta1) * g
            update = _shampoo_update(new_m, new_squares, new, t, step)
            decay = 1.0 - step.rate * weight_decay
            new_w = moved(param[index], update, rate=step.rate, decay=decay)
            states, values = [m, *old], [new_m, *new]
            if graft not in ("none", "sgd"):
                states, values = [*states, squares], [*values, new_squares]
            if nonfinite != "propagate" and not finite(*values, new_w):
                progress.skip()
                continue
            for state, value in zip(states, values, strict=True):
                state.copy_(value)
            param[index].copy_(new_w)
            root_failures[i][index].add_(root_failures[i].new_tensor(failed))
            progress.update(index)
        progress.finish()


def _refreshed_factors(
    old: _Factors, g: Tensor, t: float, step: _Shampoo, *, refresh: bool
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


def _new_root(factor: Tensor, old: Tensor, bias: float, step: _Shampoo) -> tuple[Tensor, int]:
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
    old: _Factors, g: Tensor, step: _Shampoo, *, refresh: bool
) -> tuple[_Factors, tuple[int, int]]:
    m, n = g.shape
    left, right, left_root, right_root = _kl_start(old, g, step)

    def new_left(right_root: Tensor) -> Tensor:
        if absent(left):
            return left
        x = two_sided(g, g.new_empty(0), right_root)
        return updated_factor(left, x, beta=step.beta2, weight=step.weight / n)

    def new_right(left_root: Tensor) -> Tensor:
        if absent(right):
            return right
        x = two_sided(g, left_root, g.new_empty(0))
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


def _kl_start(old: _Factors, g: Tensor, step: _Shampoo) -> _Factors:
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


def _new_squares(squares: Tensor, g: Tensor, step: _Shampoo) -> Tensor:
    if step.graft in ("none", "sgd"):
        return squares
    g2 = g.to(squares.dtype) ** 2
    if step.graft == "adagrad":
        return squares + g2
    return step.graft_beta2 * squares + (1.0 - step.graft_beta2) * g2


def _shampoo_update(
    m: Tensor, squares: Tensor, factors: _Factors, t: float, step: _Shampoo
) -> Tensor:
    mhat = m / (1.0 - step.beta1**t) if step.debias else m
    p = two_sided(mhat, factors.left_root.to(m.dtype), factors.right_root.to(m.dtype))
    if step.graft == "none":
        return p
    length = norm(p)
    if length == 0.0:
        return p
    return p * (norm(_graft_direction(mhat, squares, t, step)) / length)


def _graft_direction(mhat: Tensor, squares: Tensor, t: float, step: _Shampoo) -> Tensor:
    if step.graft == "sgd":
        return mhat
    bias = 1.0 - step.graft_beta2**t if step.graft == "adam" else 1.0
    root = (squares / bias).sqrt()
    eps = step.graft_eps
    if step.graft_eps_mode == "relative":
        eps *= norm(root) / math.sqrt(root.numel())
    divisor = root + eps
    return torch.where(divisor == 0.0, 0.0, mhat / divisor)


def _check_root_options(p: int, ridge: float, relative_ridge: float, method: str) -> None:
    check_root(p)
    check_range("ridge", ridge)
    check_range("relative_ridge", relative_ridge)
    check_choice("method", method, _METHODS)
    if method == "newton_db" and p not in (2, 4, 8):
        raise ValueError(f"newton_db takes square roots: p must be 2, 4 or 8, not {p}")


def _check_shampoo_state(
    params: Sequence[Tensor],
    graft_squares: Sequence[Tensor],
    root_failures: Sequence[Tensor],
    graft: str,
) -> None:
    if graft in ("none", "sgd"):
        check_list("graft_squares", graft_squares, len(params))
    else:
        check_state("graft_squares", graft_squares, params)
    check_list("root_failures", root_failures, len(params))
    for i, (failures, param) in enumerate(zip(root_failures, params, strict=True)):
        check_device(f"root_failures[{i}]", failures, param)
        expected = (*param.shape[:-2], 2)
        if failures.dtype != torch.int64 or failures.shape != expected:
            raise ValueError(
                f"root_failures[{i}] must be int64 of shape {expected}, not "
                f"{failures.dtype} of shape {tuple(failures.shape)}"
            )
