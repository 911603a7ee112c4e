"""The operators once more, from their formulas and by other means than the specification's.

Singular values and eigenvalues instead of iterations, einsum instead of products; in float64, and
for float64 input in mpmath or long double. Nothing here is shared with spectral_kernels.reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mpmath
import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

Rows = Sequence[Sequence[float]]


def wide(x: Tensor) -> np.ndarray:
    return x.double().numpy().astype(np.longdouble)


def gram(x: Tensor) -> np.ndarray:
    return np.einsum("...ik,...jk->...ij", wide(x), wide(x))


def factor(old: Tensor, x: Tensor, beta: float, weight: float) -> np.ndarray:
    """beta F + weight X X^T."""
    return beta * wide(old) + weight * gram(x)


def from_both_sides(x: Tensor, left: Tensor, right: Tensor) -> np.ndarray:
    return np.einsum("pi,ij,jq->pq", wide(left), wide(x), wide(right), optimize=True)


def on_singular_values(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """U f(S) V^T of X = U S V^T, which has no more columns in U than singular values."""
    u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    return (u * function(s)) @ vh


def newton_schulz(
    x: Tensor, rows: Rows, norm_factor: float = 1.0, *, schatten: float = 2.0
) -> Tensor:
    """The composite polynomial on the singular values of X / (norm_factor ||X||).

    The norm is a Schatten one, with exponent 2 Frobenius'.
    """

    def composite(s: Tensor) -> Tensor:
        size = norm_factor * (s**schatten).sum() ** (1.0 / schatten)
        s = s / size if size > 0.0 else s
        for a, b, c in rows:
            s = a * s + b * s**3 + c * s**5
        return s

    return on_singular_values(x, composite)


def polar(x: Tensor, drop: float) -> Tensor:
    """U V^T on the singular values above drop times the largest."""
    return on_singular_values(x, lambda s: (s > drop * s.max()).double())


def inverse_root(a: Tensor, p: int, delta: float) -> Tensor:
    """(A + delta I)^(-1/p) by eigenvalues, in 40 digits where A is tiny and float64."""
    if a.dtype == torch.float64 and len(a) <= 4:
        with mpmath.workdps(40):
            values, vectors = mpmath.eigsy(mpmath.matrix(((a + a.mT) / 2).tolist()))
            roots = mpmath.diag([(v + mpmath.mpf(delta)) ** (-mpmath.mpf(1) / p) for v in values])
            root = vectors * roots * vectors.T
            rows = [[float(x) for x in row] for row in root.tolist()]
            return torch.tensor(rows, dtype=torch.float64)
    return torch.from_numpy(_long_inverse_root(a.double(), p, delta).astype(np.float64))


def _long_inverse_root(a: Tensor, p: int, delta: float) -> np.ndarray:
    """The root in long double: float64 eigenvectors and what they leave, to first order.

    In the basis V, made orthogonal by a Newton step, A is a diagonal and rounding errors E, and
    f(D + E) = f(D) + f[d_i, d_j] o E with the divided differences of f, up to squares of E.
    """
    v = wide(torch.linalg.eigh((a + a.mT) / 2)[1])
    v = v @ (3.0 * np.eye(len(v)) - v.T @ v) / 2.0
    rotated = v.T @ (wide(a) + wide(a.mT)) @ v / 2.0
    d = np.diagonal(rotated) + np.longdouble(delta)
    power = -1 / np.longdouble(p)
    low, high = np.minimum.outer(d, d), np.maximum.outer(d, d)
    gap = high - low
    close = gap <= 1e-4 * high
    middle = power * ((low + high) / 2) ** (power - 1)
    slopes = np.where(close, middle, (high**power - low**power) / np.where(close, 1, gap))
    corrected = slopes * rotated
    np.fill_diagonal(corrected, d**power)
    return v @ corrected @ v.T


# Structure: what training makes, and what kernels have fallen over.


def _gaussian(rng: np.random.Generator, m: int, n: int) -> np.ndarray:
    return rng.standard_normal((m, n))


def _low_rank(rng: np.random.Generator, m: int, n: int) -> np.ndarray:
    rank = rng.integers(1, min(m, n) + 1)
    return rng.standard_normal((m, rank)) @ rng.standard_normal((rank, n))


def _dead(rng: np.random.Generator, m: int, n: int) -> np.ndarray:
    """Zero rows and columns."""
    x = rng.standard_normal((m, n))
    x[rng.random(m) < 0.4] = 0.0
    x[:, rng.random(n) < 0.4] = 0.0
    return x


def _one_hot(rng: np.random.Generator, m: int, n: int) -> np.ndarray:
    x = np.zeros((m, n))
    for _ in range(rng.integers(1, 6)):
        x[rng.integers(m), rng.integers(n)] = rng.standard_normal()
    return x


def _repeated(rng: np.random.Generator, m: int, n: int) -> np.ndarray:
    """Rows or columns in groups that are exactly equal."""
    x = rng.standard_normal((m, n))
    groups = rng.integers(1, 5)
    return x[np.arange(m) // groups] if rng.random() < 0.5 else x[:, np.arange(n) // groups]


def _equal_rows(rng: np.random.Generator, m: int, n: int) -> np.ndarray:
    return np.repeat(rng.standard_normal((1, n)), m, axis=0)


def _paired_rows(rng: np.random.Generator, m: int, n: int) -> np.ndarray:
    return np.repeat(rng.standard_normal(((m + 1) // 2, n)), 2, axis=0)[:m]


def _zero_columns(rng: np.random.Generator, m: int, n: int) -> np.ndarray:
    """Half of the columns, so that a short side of rows may keep its rank."""
    x = rng.standard_normal((m, n))
    x[:, rng.permutation(n)[: n // 2]] = 0.0
    return x


def _live_rows(rng: np.random.Generator, m: int, n: int) -> np.ndarray:
    """Five rows in twelve are not zero."""
    x = np.zeros((m, n))
    live = rng.permutation(m)[: -(-5 * m // 12)]
    x[live] = rng.standard_normal((len(live), n))
    return x


def _block(rng: np.random.Generator, m: int, n: int) -> np.ndarray:
    x = np.zeros((m, n))
    i, j = rng.integers(0, m + 1), rng.integers(0, n + 1)
    x[:i, :j], x[i:, j:] = rng.standard_normal((i, j)), rng.standard_normal((m - i, n - j))
    return x


def _graded(rng: np.random.Generator, m: int, n: int) -> np.ndarray:
    """Rows scaled by 2^-k."""
    return rng.standard_normal((m, n)) * 2.0 ** -rng.integers(0, 12, (m, 1))


def _clustered(rng: np.random.Generator, m: int, n: int) -> np.ndarray:
    u, _, vh = np.linalg.svd(rng.standard_normal((m, n)), full_matrices=False)
    return (u * np.sort(rng.choice([1.0, 0.5, 1e-2], min(m, n)))[::-1]) @ vh


def _nearly_orthogonal(rng: np.random.Generator, m: int, n: int) -> np.ndarray:
    u, s, vh = np.linalg.svd(rng.standard_normal((m, n)), full_matrices=False)
    return (u * (1.0 + 1e-3 * s)) @ vh


def _outlier(rng: np.random.Generator, m: int, n: int) -> np.ndarray:
    x = rng.standard_normal((m, n))
    x[rng.integers(m), rng.integers(n)] *= 1e3
    return x


STRUCTURES = {
    function.__name__.strip("_").replace("_", " "): function
    for function in (
        *(_gaussian, _low_rank, _dead, _one_hot, _repeated, _block, _graded),
        *(_clustered, _nearly_orthogonal, _outlier),
        *(_equal_rows, _paired_rows, _zero_columns, _live_rows),
    )
}


def structured(kind: str, m: int, n: int, seed: int) -> Tensor:
    """A float64 matrix of one of STRUCTURES."""
    return torch.from_numpy(np.ascontiguousarray(STRUCTURES[kind](_rng(seed), m, n)))


def _rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def shapes(most: int = 70) -> st.SearchStrategy[tuple[int, int]]:
    """Both sides up to `most`; small ones, squares and strips as often as the rest."""
    side, small = st.integers(1, most), st.integers(1, 6)
    square = side.map(lambda n: (n, n))
    return st.one_of(st.tuples(side, side), square, st.tuples(small, side), st.tuples(side, small))


def recipes(
    dtypes: Sequence[torch.dtype], kinds: Sequence[str] = tuple(STRUCTURES), most: int = 70
) -> st.SearchStrategy[tuple[str, tuple[int, int], torch.dtype, int, int, str]]:
    """(structure, shape, dtype, exponent of the scale, seed, layout): short to write down again."""
    return st.tuples(
        st.sampled_from(kinds),
        shapes(most),
        st.sampled_from(list(dtypes)),
        st.integers(-8, 8),
        st.integers(0, 2**31),
        st.sampled_from(["contiguous", "transposed", "sliced"]),
    )
