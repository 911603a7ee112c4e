"""Polynomial coefficients: Newton-Schulz rows for the polar factor, coupled rows for inverse roots.

A row `(a, b, c)` means p(x) = a x + b x^3 + c x^5 on singular values in a Newton-Schulz set, and
N(x) = a + b x + c x^2 on eigenvalues in an inverse-root schedule.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TypeAlias

from . import _checks

__all__ = [
    "Coefficients",
    "Row",
    "gram_restarts",
    "linear_root_row",
    "names",
    "polar_express",
    "quadratic_root_row",
    "resolve",
    "root_products",
    "root_schedule",
    "root_tolerance",
]

Row: TypeAlias = tuple[float, float, float]
Rows: TypeAlias = tuple[Row, ...]

# Far beyond any use, and few enough to be listed.
MOST_STEPS = 10_000


@dataclass(frozen=True)
class Coefficients:
    """Rows of a Newton-Schulz iteration, one a step.

    Attributes:
        name: the name of the set, "polar_express(l0, steps)", or "custom".
        rows: one (a, b, c) a step.
        norm_factor: the iteration starts from x / (norm_factor * norm(x)).
    """

    name: str
    rows: Rows
    norm_factor: float = 1.0


_SIMPLE: Row = (3.4445, -4.7750, 2.0315)

_POLAR_EXPRESS_RAW: Rows = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)


def _with_safety(rows: Rows, factor: float) -> Rows:
    """p(x / factor) for each row: room for rounding that lifts a singular value above the bound."""
    return tuple((a / factor, b / factor**3, c / factor**5) for a, b, c in rows)


_SETS: dict[str, Rows] = {
    # Keller Jordan, "Muon: an optimizer for hidden layers in neural networks" (2024); torch.optim.
    "muon": (_SIMPLE,) * 5,
    # You Jiacheng's rows: NVIDIA-NeMo/Emerging-Optimizers muon_utils.py, gram-newton-schulz.
    "quintic": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
    # Amsel et al., arXiv 2505.16932, l0 = 1e-3; safety 1.05 as in gram-newton-schulz.
    "polar_express": _with_safety(_POLAR_EXPRESS_RAW[:5], 1.05),
    # The same with safety 1.01 on all rows but the exact last one: Emerging-Optimizers, HeavyBall.
    "polar_express_8": _with_safety(_POLAR_EXPRESS_RAW[:7], 1.01) + _POLAR_EXPRESS_RAW[7:],
    # Chebyshev-type rows (CANS): Emerging-Optimizers muon_utils.py.
    "cans": (
        (8.4703, -25.1081, 18.6293),
        (4.1828, -3.1087, 0.5806),
        (3.9619, -2.9541, 0.5630),
        (3.2866, -2.4647, 0.5074),
        (2.2737, -1.6447, 0.4162),
    ),
    # flash-newton-schulz and dion. The older rows that go by this name elsewhere have p(1) < 0.
    "aol": (
        (4.6051, -9.6552, 5.6769),
        (4.7505, -6.0861, 2.1790),
        (2.7763, -2.3190, 0.5523),
        (2.4231, -2.2861, 0.8193),
    ),
    # Emerging-Optimizers muon_utils.py.
    "deepseekv4": (_SIMPLE,) * 8 + ((2.0, -1.5, 0.5),) * 2,
    # Emerging-Optimizers muon_utils.py; made for singular values above 7e-3 of the norm.
    "cubic": (
        (3.3656576, -3.3420992, 0.0),
        (2.5744352, -1.4957376, 0.0),
        (2.5368962, -1.4312570, 0.0),
        (2.4418906, -1.2764040, 0.0),
        (2.2230472, -0.9630650, 0.0),
    ),
    # The Taylor row of x / sqrt(x^2) at 1: p(1) = 1, p'(1) = p''(1) = 0.
    "convergent": ((1.875, -1.25, 0.375),) * 12,
}

# Method "auto" of the inverse roots decomposes matrices up to this size: rounding errors of two
# rows do not average out, and an iteration has up to three times the error of another one.
MOST_ROOT_ROWS_DECOMPOSED = 2

SMALLEST_GRAM = 16  # below, rounding errors do not average out: up to 12 times the error

# What the slopes at 0 of the steps that the Gram form takes on R alone may multiply to. Rounding of
# R in its null space grows with the square of this product; measured with the CPU kernels and with
# simulated 16-bit operands, on spectra that decay and on matrices with repeated, scaled or zero
# rows and columns, the error then is below twice that of the standard iteration in plain torch.
FULL_GROWTH = 12.0  # fp32 and fp64
BFLOAT16_GROWTH = 1100.0
FLOAT16_GROWTH = 500.0
# In fp32 the noise in R is as large as that of the standard iteration, so that it depends on the
# rows whether its growth is seen. With `muon` and `aol` the error of a matrix with zero columns is
# up to 3.4 times that of plain torch, and `cans` amplifies any rounding where s = 1.
_GRAM_IN_FULL = frozenset(
    _SETS[name] for name in ("quintic", "polar_express", "polar_express_8", "deepseekv4", "cubic")
)

_POLAR_EXPRESS_CALL = re.compile(r"polar_express\(\s*([^\s,()]+)\s*,\s*(\d+)\s*\)")


def names() -> tuple[str, ...]:
    """The named Newton-Schulz sets."""
    return tuple(_SETS)


def resolve(
    coefficients: str | Sequence[float] | Sequence[Sequence[float]], steps: int | None = None
) -> Coefficients:
    """The rows that a `coefficients` argument means.

    Args:
        coefficients: a name of `names()`; "polar_express(l0, steps)", computed by `polar_express`;
            one (a, b, c), used in every step; or a sequence of rows, one a step.
        steps: for a named set, the first `steps` rows, the last one repeated as often as needed;
            default: its length. For one (a, b, c) the number of steps, default 5. A computed set
            and a sequence of rows fix the number themselves.

    Raises:
        TypeError: coefficients or steps of another type.
        ValueError: an unknown name, a row that has not three finite numbers, steps < 1 or above
            `MOST_STEPS`, or steps that differ from the number that the rows fix.
    """
    if steps is not None:
        _checks.integer("steps", steps, 1, MOST_STEPS)
    if isinstance(coefficients, str):
        rows = _SETS.get(coefficients)
        if rows is not None:
            count = len(rows) if steps is None else steps
            rows = rows[:count] + rows[-1:] * (count - len(rows))
            return Coefficients(coefficients, rows)
        call = _POLAR_EXPRESS_CALL.fullmatch(coefficients)
        if call is None:
            raise ValueError(
                f"unknown coefficients {coefficients!r}: expected one of {', '.join(_SETS)}, "
                "polar_express(l0, steps), (a, b, c), or a sequence of rows"
            )
        try:
            l0 = float(call[1])
        except ValueError:
            raise ValueError(f"l0 is not a number in coefficients {coefficients!r}") from None
        rows = polar_express(l0, int(call[2]))
        _check_steps_fixed(steps, rows)
        return Coefficients(coefficients, rows)
    if not isinstance(coefficients, Sequence):
        raise TypeError(
            f"coefficients must be a name, (a, b, c), or a sequence of rows, not {coefficients!r}"
        )
    if coefficients and all(isinstance(value, Real) for value in coefficients):
        return Coefficients("custom", (_as_row(coefficients),) * (5 if steps is None else steps))
    if not coefficients:
        raise ValueError("coefficients must have at least one row, not ()")
    rows = tuple(_as_row(row) for row in coefficients)
    _check_steps_fixed(steps, rows)
    return Coefficients("custom", rows)


def gram_restarts(
    coefficients: Coefficients | str | Sequence[float] | Sequence[Sequence[float]],
    m: int,
    n: int,
    growth: float = FULL_GROWTH,
) -> tuple[int, ...] | None:
    """Steps before which the Gram iteration on an m x n matrix restarts to stay accurate.

    The last steps are taken on R alone, as many as have a product of slopes |a| of at most
    `growth`; every step before them is one by itself, as in the standard form. A null space is
    then exact when the last steps begin, also where rows or columns of X repeat, and no later step
    amplifies the rounding noise that those leave in it.

    Args:
        coefficients: whatever `resolve` takes, or what it returned.
        m, n: the shape.
        growth: see above; the default is for fp32 and fp64.

    Returns:
        The restart steps, or None where the Gram form saves nothing or is not accurate: no two
        steps are below `growth`, min(m, n) < 16, or, in fp32 and fp64, rows other than those of
        quintic, polar_express, polar_express_8, deepseekv4 and cubic.
    """
    if not isinstance(coefficients, Coefficients):
        coefficients = resolve(coefficients)
    if growth <= FULL_GROWTH and coefficients.rows not in _GRAM_IN_FULL:
        return None
    alone = steps_alone(coefficients.rows, growth)
    if min(m, n) < SMALLEST_GRAM or alone >= len(coefficients.rows) - 1:
        return None
    return tuple(range(1, alone + 1))


def steps_alone(rows: Sequence[Row], growth: float) -> int:
    """How many steps come before the last ones whose slopes multiply to at most `growth`."""
    product, first = 1.0, len(rows)
    while first > 0 and (product := product * abs(rows[first - 1][0])) <= growth:
        first -= 1
    return first


def polar_express(
    l0: float, steps: int, *, cushion: float = 0.02407327424182761, safety: float = 0.01
) -> Rows:
    """Rows that approach 1 fastest for singular values in [l0, 1].

    Every row is the minimax odd quintic of the interval [l, u] that the rows before it left
    (u = 2 - l after the first), recentred so that p(l) + p(u) = 2. It is the p = 2 case of
    `quadratic_root_row`, since p(x) = x N(x^2).

    Args:
        l0: lower bound of the singular values over the norm, in (0, 1).
        steps: number of rows, at least 1.
        cushion: a row is fitted to [max(l, cushion * u), u]: slower at first, but small singular
            values do not stay far below the others.
        safety: all rows but the last are p(x / (1 + safety)).

    Raises:
        TypeError: steps is not an int.
        ValueError: an argument out of range.

    Source: Amsel, Persson, Musco, Gower, arXiv 2505.16932, algorithm 1 and section 3.
    """
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise TypeError(f"steps must be an int, not {steps!r}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    if not 0.0 < l0 < 1.0:
        raise ValueError(f"l0 must be in (0, 1), not {l0}")
    if not 0.0 <= cushion < 1.0:
        raise ValueError(f"cushion must be in [0, 1), not {cushion}")
    if not 0.0 <= safety < math.inf:
        raise ValueError(f"safety must be finite and at least 0, not {safety}")
    rows: list[Row] = []
    low, high = l0, 1.0
    for step in range(steps):
        (a, b, c), _ = quadratic_root_row(max(low / high, cushion) ** 2, 2)
        row = (a / high, b / high**3, c / high**5)
        centre = 2.0 / (_quintic(row, low) + _quintic(row, high))
        row = (row[0] * centre, row[1] * centre, row[2] * centre)
        if step < steps - 1:
            (row,) = _with_safety((row,), 1.0 + safety)
        rows.append(row)
        low = _quintic(row, low)
        high = 2.0 - low
    return tuple(rows)


def linear_root_row(low: float, p: int) -> tuple[Row, float]:
    """The best N(x) = a + b x of one coupled inverse-root step on the spectrum [low, 1].

    x N(x)^p has equal values at both ends and its interior maximum, at 1 / ((p + 1) rho) for
    b = -a rho, is scaled to 1; the end value is the next lower bound.

    Args:
        low: lower bound of the spectrum, in (0, 1).
        p: the root, 1 to 8.

    Returns:
        (a, b, 0.0) and the next lower bound.

    Source: the equal-ripple form of the coupled Newton step; for p = 2 it is CANS's.
    """
    _check_root_interval(low, p)
    tau = low ** (1.0 / p)
    rho = (1.0 - tau) / (1.0 - tau * low)

    def value(x: float) -> float:
        return x * (1.0 - rho * x) ** p

    top = 1.0 / ((p + 1) * rho)
    peak = max(value(low), value(1.0), value(top) if low < top < 1.0 else 0.0)
    a = peak ** (-1.0 / p)
    return (a, -a * rho, 0.0), min(value(low), value(1.0)) / peak


def quadratic_root_row(low: float, p: int) -> tuple[Row, float]:
    """The best N(x) = a + b x + c x^2 of one coupled inverse-root step on the spectrum [low, 1].

    g(x) = x^(1/p) N(x) is made to alternate 1 - E, 1 + E, 1 - E, 1 + E at low < x1 < x2 < 1
    (Remez), and N is then divided by 1 + E, so that x N(x)^p has the maximum 1. With
    h(x) = x^(-1/p), N interpolates (1 -+ E) h, so its third divided difference vanishes:
    E = -sum(w_i h_i) / sum(s_i w_i h_i) with w_i = prod_(j != i) 1 / (x_i - x_j) and the signs s.
    The new x1 and x2 are the zeros of g', that is of N / p + x N', a quadratic. An alternating
    error has just these two extrema, so every exchange is a full one and any start converges,
    quadratically; x^(1/p) is started at the Chebyshev extrema tau + (1 - tau) {1/4, 3/4},
    tau = low^(1/p). The row is the one levelled on points that moved by less than 1e-4 of
    min(x1, 1 - low): these are within some 1e-8 of the true extrema.

    Above 0.999, where rounding hides the extrema, the row is the Taylor row of (1 - e)^(-1/p) at
    e = 1 - x up to e^2. Its maximum is 1, at x = 1, and with k the coefficient of e^3 the gap
    that it leaves is below 2 p k e^3.

    Args:
        low: lower bound of the spectrum, in (0, 1).
        p: the root, 1 to 8.

    Returns:
        (a, b, c) and the next lower bound, low N(low)^p, the minimum of x N(x)^p on [low, 1].
    """
    _check_root_interval(low, p)
    q = 1.0 / p
    if low > 0.999:
        first, second = q, q * (q + 1.0) / 2.0
        third = second * (q + 2.0) / 3.0
        row = (1.0 + first + second, -first - 2.0 * second, second)
        return row, 1.0 - 2.0 * p * third * (1.0 - low) ** 3
    tau = low**q
    x1, x2 = (tau + 0.25 * (1.0 - tau)) ** p, (tau + 0.75 * (1.0 - tau)) ** p
    moved = 1.0
    for _ in range(50):
        error, alpha, beta, gamma = _alternating(low, x1, x2, q)
        if moved < 1e-4 * min(x1, 1.0 - low):
            break
        new1, new2 = _extrema(alpha, beta, gamma, q)
        moved = max(abs(new1 - x1), abs(new2 - x2))
        x1, x2 = new1, new2
    else:
        raise ArithmeticError(f"no quadratic root row for low={low!r}, p={p}")
    scale = 1.0 / (1.0 + error)
    row = (scale * (alpha - beta + gamma), scale * (beta - 2.0 * gamma), scale * gamma)
    return row, _coupled(row, low, p)


def root_tolerance(unit_roundoff: float) -> float:
    """The gap 1 - l at which an inverse-root schedule stops: 4u.

    Every eigenvalue may be left with this gap, the well-conditioned ones too, whose roots rounding
    leaves exact to some u. The smallest eigenvalue's error, u / low, is no measure for them.
    """
    return 4.0 * unit_roundoff


def root_schedule(low: float, p: int, tolerance: float) -> Rows:
    """Rows that take the spectrum [low, 1] to [1 - tolerance, 1].

    The best row for [low, 1] maps large eigenvalues to its new lower bound too, for a small `low`
    far below where they came from, and adds numbers far above their sum. Rounding in M and N then
    costs these eigenvalues digits that later rows, which see M alone, do not bring back: with
    m_k(x) the values that an eigenvalue x passes through, the root's relative error is about
    (u / p) sum_k 1 / m_k. Therefore a row is made for no longer a spectrum than [0.12 / sqrt(p), 1]
    (rows for [s, 1] are positive and below 1 on [0, s] too, where they grow): nothing then falls
    below a quarter of where it was, and a row's coefficients add up to less than 30 for p = 1, and
    to 8 for p = 4.

    The first rows are linear, the others quadratic, and the last is linear again where that is
    enough: as many of the first as give the fewest products, and the most of them.

    Args:
        low: lower bound of the spectrum, in (0, 1].
        p: the root, 1 to 8.
        tolerance: at least 4.4e-16.

    Returns:
        The rows N_k of M <- N_k^p M, X <- N_k X; empty where the interval is already small enough.
    """
    best = _mixed_schedule(low, p, tolerance, 0)
    for linear in range(1, _MOST_LINEAR_ROWS + 1):
        rows = _mixed_schedule(low, p, tolerance, linear)
        if root_products(rows, p) <= root_products(best, p):
            best = rows
    return best


def root_products(rows: Rows, p: int) -> int:
    """Products of matrices that a schedule takes: M^2, N X and N^p M, the last of which is not
    formed after the last row, and X is N after the first.
    """
    power = p.bit_length() - 1 + p.bit_count()  # squarings, and a product for every bit
    quadratic = sum(c != 0.0 for _, _, c in rows)
    return quadratic + max(len(rows) - 1, 0) * (1 + power)


_MOST_LINEAR_ROWS = 4


def _mixed_schedule(low: float, p: int, tolerance: float, linear: int) -> Rows:
    """`linear` linear rows, then quadratic ones, the last of them linear if that is enough."""
    rows: list[Row] = []
    while 1.0 - low > tolerance:
        row, after = _shortened(linear_root_row, low, p)
        if len(rows) >= linear and 1.0 - after > tolerance:
            row, after = _shortened(quadratic_root_row, low, p)
        rows.append(row)
        low = after
    return tuple(rows)


def _shortened(
    best: Callable[[float, int], tuple[Row, float]], low: float, p: int
) -> tuple[Row, float]:
    """The best row for no longer a spectrum than rounding allows, and the next lower bound."""
    shortest = 0.12 / math.sqrt(p)
    if low >= shortest:
        return best(low, p)
    row, _ = best(shortest, p)
    return row, _coupled(row, low, p)


def _alternating(low: float, x1: float, x2: float, q: float) -> tuple[float, float, float, float]:
    """E, and N = alpha + beta v + gamma v^2 in v = x - 1, levelled on (low, x1, x2, 1)."""
    x = (low, x1, x2, 1.0)
    sign = (-1.0, 1.0, -1.0, 1.0)
    h = [value**-q for value in x]
    w = [1.0 / math.prod([x[i] - x[j] for j in range(4) if j != i]) for i in range(4)]
    error = -sum(w[i] * h[i] for i in range(4)) / sum(sign[i] * w[i] * h[i] for i in range(4))
    y1, y2, y3 = ((1.0 + sign[i] * error) * h[i] for i in (1, 2, 3))
    slope = (y3 - y2) / (1.0 - x2)
    gamma = (slope - (y2 - y1) / (x2 - x1)) / (1.0 - x1)
    return error, y3, slope + gamma * (1.0 - x2), gamma


def _extrema(alpha: float, beta: float, gamma: float, q: float) -> tuple[float, float]:
    """The zeros of q N + x N' for N = alpha + beta v + gamma v^2, v = x - 1, ascending."""
    second, first, constant = gamma * (q + 2.0), beta * (q + 1.0) + 2.0 * gamma, alpha * q + beta
    half = -0.5 * (first + math.copysign(math.sqrt(first**2 - 4.0 * second * constant), first))
    low, high = sorted((1.0 + half / second, 1.0 + constant / half))
    return low, high


def _coupled(row: Row, x: float, p: int) -> float:
    a, b, c = row
    return x * (a + x * (b + x * c)) ** p


def _quintic(row: Row, x: float) -> float:
    a, b, c = row
    return x * (a + x * x * (b + x * x * c))


def _as_row(row: object) -> Row:
    if not isinstance(row, Sequence) or isinstance(row, str):
        raise TypeError(f"a row of coefficients must be three numbers, not {row!r}")
    values = [_checks.real("a coefficient", value) for value in row]
    if len(values) != 3 or not all(map(math.isfinite, values)):
        raise ValueError(f"a row of coefficients must be three finite numbers, not {row!r}")
    return values[0], values[1], values[2]


def _check_steps_fixed(steps: int | None, rows: Rows) -> None:
    if steps is not None and steps != len(rows):
        raise ValueError(f"steps={steps} differs from the number of rows, {len(rows)}")


def _check_root_interval(low: float, p: int) -> None:
    if isinstance(p, bool) or not isinstance(p, int):
        raise TypeError(f"p must be an int, not {p!r}")
    if not 1 <= p <= 8:
        raise ValueError(f"p must be in 1..8, not {p}")
    if not 0.0 < low < 1.0:
        raise ValueError(f"low must be in (0, 1), not {low}")
