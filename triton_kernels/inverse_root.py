"""Inverse p-th roots by a coupled iteration whose rows are looked up on the device.

Every matrix of a batch has its own rows, from a table over the lower bound of its spectrum, so the
host never waits: a matrix that is done is copied through, with no product.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from spectral_kernels._backend import operator
from spectral_kernels.coefficients import (
    MOST_ROOT_ROWS_DECOMPOSED,
    root_schedule,
    root_tolerance,
)
from torch import Tensor

from ._batch import flattened, product, scaled_by
from ._config import architecture, config_for
from ._layout import SHORT, kept, layout_of, padded, upload
from ._list_step import length
from .symmetric_matmul import Terms, symmetric

CONVERGED, STAGNATED, FELL_BACK, RANK_DEFICIENT, NON_FINITE = range(5)

_U = 2.0**-24
_LIMIT = 0.25  # of the residual
_PROBES = 8

# Lower bounds of spectra that rows are kept for: 2^0 .. 2^-_BOUNDS, in quarters of a power.
_BOUNDS = 28
_QUARTERS = 4


class Roots(NamedTuple):
    """Roots of a batch, (count, n, n), and how it went, (count,) each."""

    root: Tensor
    status: Tensor
    steps: Tensor
    residual: Tensor
    delta: Tensor


@functools.cache
def _schedules(p: int) -> list[tuple[tuple[float, float, float], ...]]:
    """Rows for spectra in [2^(-i / 4), 1]."""
    lows = [2.0 ** (-i / _QUARTERS) for i in range(_BOUNDS * _QUARTERS + 1)]
    return [root_schedule(low, p, root_tolerance(_U)) for low in lows]


@kept()
def _table(p: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows (bounds, steps, 3) and their numbers (bounds,)."""
    schedules = _schedules(p)
    rows = torch.zeros(
        len(schedules), max(map(len, schedules)), 3, dtype=torch.float32, device="cpu"
    )
    for i, schedule in enumerate(schedules):
        rows[i, : len(schedule)] = torch.tensor(
            schedule, dtype=torch.float32, device="cpu"
        ).reshape(-1, 3)
    counts = torch.tensor(
        [len(schedule) for schedule in schedules], dtype=torch.int32, device="cpu"
    )
    return upload(rows, device), upload(counts, device)


def _most_steps(p: int, low: float) -> int:
    """The longest schedule that a spectrum in [low, 1] or above may be given."""
    last = math.ceil(-math.log2(max(low, 2.0**-_BOUNDS)) * _QUARTERS) + 1
    return max(map(len, _schedules(p)[: max(last, 0) + 1]))


class _Iteration:
    """M <- N^p M, X <- N X in padded workspaces, N = a I + b M + c M^2."""

    def __init__(self, b: Tensor, p: int) -> None:
        count, n, _ = b.shape
        self._p = p
        self._config = config_for(architecture(b.device), torch.float32, n)
        self._size = padded(n, self._config.tile)
        self._layout = layout_of(((n, n),) * count, (self._config.tile,) * 2, b.device)
        self._n = n

    def framed(self, x: Tensor) -> Tensor:
        """A batch with zeros around."""
        pad = self._size - self._n
        return torch.nn.functional.pad(x, (0, pad, 0, pad)).contiguous()

    def view(self, x: Tensor) -> Tensor:
        """The matrices of a workspace."""
        return x.view(-1, self._size, self._size)[:, : self._n, : self._n]

    def empty(self) -> Tensor:
        """A workspace."""
        return self._layout.empty(SHORT, torch.float32)

    def squared(self, b: Tensor) -> Tensor:
        """The Frobenius norm of B^2, in fp64, of every matrix."""
        out = self.empty()
        symmetric(self._layout, self._config, b, b, out)
        return self.view(out).double().square().sum((-2, -1)).sqrt()

    def run(self, m: Tensor, rows: Tensor, steps: Tensor) -> Tensor:
        """The root of a workspace M with a spectrum in [l, 1].

        Args:
            m: overwritten.
            rows: fp32 (count, longest, 3).
            steps: int32 (count,), how many of them each matrix takes.
        """
        longest = rows.shape[1]
        on = (
            torch.arange(longest, dtype=torch.int64, device=rows.device) < steps[:, None]
        ).float()[..., None]
        # Where a matrix is done, products have the weight 0 and what it holds the weight 1.
        table = torch.cat([rows * on, on, 1.0 - on], -1).flatten(1)
        x = self.framed(
            torch.eye(self._n, dtype=torch.float32, device=m.device).expand(len(rows), -1, -1)
        )
        for k in range(longest):
            a, b, c, taken, kept = range(5 * k, 5 * k + 5)
            n, new_x = self.empty(), self.empty()
            self._step(m, m, n, table, (c, b, a), add=m, gamma=1.0)
            self._step(n, x, new_x, table, (taken, kept, a), add=x)
            if k + 1 < longest:
                new_m = self.empty()
                self._step(self._power(n), m, new_m, table, (taken, kept, a), add=m)
                m = new_m
            x = new_x
        return x

    def _step(
        self,
        a: Tensor,
        b: Tensor,
        out: Tensor,
        table: Tensor,
        columns: tuple[int, int, int],
        *,
        add: Tensor,
        gamma: float = 0.0,
    ) -> None:
        terms = Terms(beta=1.0, c=add, gamma=gamma, factors=table, columns=columns)
        symmetric(self._layout, self._config, a, b, out, terms)

    def _power(self, n: Tensor) -> Tensor:
        """N^p by repeated squaring."""
        result, exponent = None, self._p
        while True:
            if exponent % 2:
                result = n if result is None else self._product(result, n)
            exponent //= 2
            if not exponent:
                assert result is not None
                return result
            n = self._product(n, n)

    def _product(self, a: Tensor, b: Tensor) -> Tensor:
        out = self.empty()
        symmetric(self._layout, self._config, a, b, out)
        return out


def roots_of(
    a: Tensor, p: int, *, ridge: float, relative_ridge: float, wait: bool = False
) -> Roots:
    """(A + delta I)^(-1/p) of a batch by iteration alone.

    The rule is that of `spectral_kernels.inverse_root` with method "iteration" and without a
    second attempt from a lower bound: where the residual does not accept the root, or it overflows,
    the status is STAGNATED. Without `wait` the host reads nothing back, and launches the products
    of the longest schedule that a matrix may need, which then only copy where they are not needed.
    """
    n = a.shape[-1]
    finite = a.isfinite().all(-1).all(-1)
    a = torch.where(finite[:, None, None], a, 0.0)
    largest = a.abs().amax((-2, -1)).clamp(min=ridge)
    null = largest == 0.0
    exponent = torch.frexp(torch.where(null, 1.0, largest))[1] - 1
    exponent = p * torch.div(exponent, p, rounding_mode="floor")
    a = scaled_by(a, -exponent[:, None, None])
    a = 0.5 * (a + a.mT)
    row_sum = a.abs().sum(-1).amax(-1)
    own_ridge = scaled_by(torch.full_like(row_sum, ridge), -exponent)
    delta = torch.maximum(own_ridge, relative_ridge * row_sum)
    b = a + delta[:, None, None] * torch.eye(n, dtype=torch.float32, device=a.device)
    iteration = _Iteration(b, p)
    nu = (iteration.squared(iteration.framed(b)).sqrt() * (1.0 + 4.0 * _U)).float()
    nu = torch.where(null | (nu == 0.0), 1.0, nu)
    low = torch.maximum(delta / nu, delta.new_tensor(4.0 * _U)).clamp(max=1.0)
    rows, counts = _table(p, a.device)
    m = b / nu[:, None, None]
    bound = _bound(low, len(rows))
    steps = counts[bound]
    # The largest row sum bounds the spectrum, and nu is at most n^(1/4) times its end.
    known = relative_ridge / ((1.0 + relative_ridge) * n**0.25)
    most = int(steps.max()) if wait else _most_steps(p, known)
    x = iteration.view(iteration.run(iteration.framed(m), rows[bound, :most], steps))
    omega = _signs(n, a.device).expand(len(x), -1, -1)
    residual = _change((x,) * (p - p // 2) + (m,) + (x,) * (p // 2), omega)
    weighted = _change((x,) * p + (m,), product(m, omega))
    accepted = (residual <= _LIMIT) & (weighted <= 256.0 * _U * (p + low ** (-1.0 / p)))
    accepted = accepted & (x.diagonal(dim1=-2, dim2=-1) > 0.0).all(-1)
    root = x * (nu.double() ** (-1.0 / p)).float()[:, None, None]
    root = scaled_by(root, -torch.div(exponent, p, rounding_mode="floor")[:, None, None])
    accepted = accepted & root.isfinite().all(-1).all(-1)
    status = torch.where(accepted, CONVERGED, STAGNATED)
    status = torch.where(null, RANK_DEFICIENT, status)
    status = torch.where(finite, status, NON_FINITE)
    bad = ~finite
    root = torch.where(null[:, None, None], 0.0, root)
    return Roots(
        torch.where(bad[:, None, None], math.nan, root),
        status.long(),
        torch.where(accepted, steps, 0).long(),
        torch.where(bad, math.nan, torch.where(null, 0.0, residual)),
        torch.where(bad, math.nan, scaled_by(torch.where(null, 0.0, delta), exponent)),
    )


def _bound(low: Tensor, count: int) -> Tensor:
    """The row of the table whose bound is the next below."""
    return torch.ceil(-torch.log2(low) * _QUARTERS).nan_to_num().long().clamp(0, count - 1)


def _change(factors: Sequence[Tensor], of: Tensor) -> Tensor:
    """||A_k ... A_1 Y - Y||_F / ||Y||_F for batches of matrices A_1, ..., A_k, and Y."""
    y = of
    for factor in factors:
        y = product(factor, y)
    return (length(y - of) / length(of)).float()


@kept()
def _signs(n: int, device: torch.device) -> Tensor:
    """The fixed n x 8 matrix of +-1 of `spectral_kernels.inverse_root`."""
    state, signs = 1, []
    for _ in range(_PROBES * n):
        state = (1664525 * state + 1013904223) % 2**32
        signs.append(-1.0 if state >> 31 else 1.0)
    return upload(
        torch.tensor(signs, dtype=torch.float32, device="cpu").reshape(n, _PROBES), device
    )


@operator
def inverse_root(
    a: Tensor, p: int, *, ridge: float, relative_ridge: float, method: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(A + delta I)^(-1/p); see `spectral_kernels.inverse_root`.

    Waits for the device: for the number of steps, to see which spectra end far above the ridge, and
    which matrices need an eigendecomposition.
    """
    batch = a.shape[:-2]
    if not a.numel():
        numbers = [a.new_zeros(batch) for _ in range(2)]
        counts = [a.new_zeros(batch, dtype=torch.int64) for _ in range(2)]
        return torch.empty_like(a), counts[0], counts[1], numbers[0], numbers[1]
    given = flattened(a)
    found = roots_of(given, p, ridge=ridge, relative_ridge=relative_ridge, wait=True)
    few = given.shape[-1] <= MOST_ROOT_ROWS_DECOMPOSED
    if method == "eigen" or (method == "auto" and few):
        again = torch.ones_like(found.status, dtype=torch.bool)
    else:
        again = found.status == STAGNATED
        if method == "auto":
            again = again | _unbounded(given, found.delta)
    again = again & (found.status != NON_FINITE) & (found.status != RANK_DEFICIENT)
    chosen = again.nonzero().flatten()
    if len(chosen):
        fallback = eigen_roots(given[chosen], p, found.delta[chosen])
        if method == "iteration":
            status = torch.where(fallback.status == CONVERGED, FELL_BACK, fallback.status)
            fallback = fallback._replace(status=status)
        if method == "eigen":
            fallback = _or_iterated(fallback, Roots(*(x[chosen] for x in found)), given[chosen])
        found = Roots(
            *(x.index_copy(0, chosen, y.to(x.dtype)) for x, y in zip(found, fallback, strict=True))
        )
    status, steps, residual, delta = (x.reshape(batch) for x in found[1:])
    return found.root.reshape(a.shape).contiguous(), status, steps, residual, delta


def _or_iterated(eigen: Roots, iterated: Roots, a: Tensor) -> Roots:
    """The iteration's root where the eigensolver gave up and the ridge bounds the spectrum."""
    lost = eigen.residual.isinf() & (iterated.status == CONVERGED)
    if not bool(lost.any()):
        return eigen
    lost = lost & ~_unbounded(a, iterated.delta)
    iterated = iterated._replace(status=torch.full_like(iterated.status, FELL_BACK))
    return Roots(
        *(
            torch.where(lost.reshape(-1, *[1] * (x.ndim - 1)), y.to(x.dtype), x)
            for x, y in zip(eigen, iterated, strict=True)
        )
    )


def _unbounded(a: Tensor, delta: Tensor) -> Tensor:
    """Where the ridge is below 4u of the scale, so that it bounds no spectrum."""
    b = 0.5 * (a + a.mT)
    b = b + delta[:, None, None] * torch.eye(a.shape[-1], dtype=torch.float32, device=a.device)
    largest = b.abs().amax((-2, -1))
    unit = torch.where(largest > 0.0, largest, 1.0)
    b = b / unit[:, None, None]
    iteration = _Iteration(b, 1)
    nu = iteration.squared(iteration.framed(b)).sqrt() * (1.0 + 4.0 * _U)
    return delta.double() / unit.double() < 4.0 * _U * nu


def eigen_roots(a: Tensor, p: int, delta: Tensor) -> Roots:
    """Roots by eigendecompositions in float64, matrix by matrix."""
    found = [_eigen_root(one, p, float(ridge)) for one, ridge in zip(a, delta, strict=True)]
    numbers = torch.tensor([x[1:] for x in found], dtype=torch.float64, device=a.device)
    status, residual = numbers.unbind(1)
    root = torch.stack([x[0] for x in found])
    return Roots(root, status.long(), torch.zeros_like(status).long(), residual.float(), delta)


def _eigen_root(a: Tensor, p: int, delta: float) -> tuple[Tensor, float, float]:
    """Root, status and residual on the eigenvalues that rounding in A does not hide."""
    n = a.shape[-1]
    wide = a.double()
    exponent = p * (math.frexp(max(float(wide.abs().max()), delta))[1] // p)
    wide = 0.5 * (wide + wide.mT) * 2.0**-exponent
    delta = math.ldexp(delta, -exponent)
    try:
        values, vectors = torch.linalg.eigh(wide)
    except torch.linalg.LinAlgError:
        return torch.zeros_like(a), STAGNATED, math.inf
    cut = max(4.0 * _U, 4.0 * n * 2.0**-53)
    largest = float(values.abs().max())
    indefinite = float(values[0]) < -math.sqrt(n) * cut * largest
    spectrum = values.clamp(min=0.0) + delta
    kept = spectrum > (0.0 if delta > 0.0 else cut * largest)
    powers = torch.where(kept, spectrum, 1.0) ** (-1.0 / p) * kept
    root = (vectors * powers) @ vectors.mT
    root = root.tril() + root.tril(-1).mT
    checked = spectrum > max(cut, 1e-12) * spectrum[-1]
    residual = 0.0
    if bool(checked.any()):
        q, kept_powers = vectors[:, checked], powers[checked]
        b = wide + delta * torch.eye(n, dtype=torch.float64, device=a.device)
        omega = _signs(n, a.device).double()
        y = (kept_powers ** (p - p // 2))[:, None] * (q.mT @ omega)
        y = (kept_powers ** (p // 2))[:, None] * (q.mT @ (b @ (q @ y)))
        residual = float(torch.linalg.matrix_norm(q @ y - q @ (q.mT @ omega)))
        residual /= math.sqrt(omega.numel())
    status = STAGNATED if indefinite or residual > _LIMIT else CONVERGED
    if status == CONVERGED and not bool(kept.all()):
        status = RANK_DEFICIENT
    return (root * 2.0 ** (-exponent // p)).to(a.dtype), status, residual
