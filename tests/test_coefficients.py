"""Coefficient tables against their bands, and computed rows against what makes them the best."""

import math

import numpy as np
import pytest
from spectral_kernels import _extension, coefficients
from spectral_kernels.coefficients import (
    BFLOAT16_GROWTH,
    FLOAT16_GROWTH,
    gram_restarts,
    linear_root_row,
    polar_express,
    quadratic_root_row,
    resolve,
    root_products,
    root_schedule,
    root_tolerance,
)

U32, U64 = 2.0**-24, 2.0**-53

# steps, product of the a, range of the composite on [1e-2, 1] and on [1e-3, 1].
BANDS = {
    "muon": (5, 485, (0.682, 1.134), (0.471, 1.202)),
    "quintic": (5, 493, (0.978, 1.032), (0.475, 1.145)),
    "polar_express": (5, 804, (0.846, 1.124), (0.729, 1.124)),
    "polar_express_8": (8, 6363, (1.000, 1.000), (1.000, 1.000)),
    "cans": (5, 1049, (0.884, 1.120), (0.884, 1.120)),
    "aol": (4, 147, (0.941, 1.050), (0.147, 1.050)),
    "deepseekv4": (10, 79263, (1.000, 1.001), (1.000, 1.001)),
    "cubic": (5, 119, (0.774, 1.300), (0.119, 1.300)),
    "convergent": (12, 1888, (1.000, 1.000), (0.981, 1.000)),
}


def composite(rows, x):
    for a, b, c in rows:
        x = a * x + b * x**3 + c * x**5
    return x


def coupled(row, x, p):
    a, b, c = row
    return x * (a + b * x + c * x * x) ** p


def test_every_set_has_a_band():
    assert set(coefficients.names()) == set(BANDS)


@pytest.mark.parametrize("name", BANDS)
def test_band(name):
    steps, slope, *bands = BANDS[name]
    rows = resolve(name).rows
    assert len(rows) == steps
    assert math.prod(a for a, _, _ in rows) == pytest.approx(slope, abs=0.5)
    for low, (bottom, top) in zip((1e-2, 1e-3), bands, strict=True):
        values = composite(rows, np.geomspace(low, 1.0, 100_001))
        assert values.min() == pytest.approx(bottom, abs=6e-4)
        assert values.max() == pytest.approx(top, abs=6e-4)


@pytest.mark.parametrize("name", BANDS)
def test_rank_one_keeps_its_sign(name):
    assert composite(resolve(name).rows, 1.0) > 0.5


def test_polar_express_gives_the_published_rows():
    published = np.array(coefficients._POLAR_EXPRESS_RAW)
    assert np.abs(np.array(polar_express(1e-3, 8, safety=0.0)) - published).max() < 1e-8


def test_polar_express_gives_dions_rows():
    rows = polar_express(1e-3, 5, cushion=0.02, safety=0.02)
    assert rows[0] == pytest.approx((8.156554524902461, -22.48329292557795, 15.878769915207462))
    assert rows[3] == pytest.approx((3.285753657755655, -2.3681294933425376, 0.46449024233003106))
    assert rows[4] == pytest.approx((2.3465413258596377, -1.7097828382687081, 0.42323551169305323))


def test_polar_express_without_cushion_gives_the_cans_rows():
    rows = polar_express(1e-3, 5, cushion=0.0, safety=0.0)
    assert np.abs(np.array(rows) - np.array(resolve("cans").rows)).max() < 6e-5


@pytest.mark.parametrize("low", [0.5, 1e-2, 1e-4, 1e-7])
def test_polar_express_converges(low):
    rows = polar_express(low, 14)
    assert np.abs(composite(rows, np.geomspace(low, 1.0, 10_001)) - 1.0).max() < 1e-9


def test_resolve_fits_the_number_of_steps():
    full = resolve("quintic").rows
    assert resolve("quintic", 3).rows == full[:3]
    assert resolve("quintic", 7).rows == full + full[-1:] * 2
    assert resolve((2.0, -1.5, 0.5)).rows == ((2.0, -1.5, 0.5),) * 5
    assert resolve([2, -1.5, 0.5], 2).rows == ((2.0, -1.5, 0.5),) * 2
    assert resolve([[1, 2, 3], (4, 5, 6)]).rows == ((1.0, 2.0, 3.0), (4.0, 5.0, 6.0))
    assert resolve("polar_express(1e-3, 6)").rows == polar_express(1e-3, 6)
    assert resolve("polar_express( 0.01,4 )", 4).rows == polar_express(0.01, 4)
    assert resolve("muon").norm_factor == 1.0


@pytest.mark.parametrize(
    ("given", "steps", "error", "words"),
    [
        ("muno", None, ValueError, "'muno'"),
        ("polar_express(x, 3)", None, ValueError, "polar_express\\(x, 3\\)"),
        ("polar_express(2.0, 3)", None, ValueError, "l0 must be in \\(0, 1\\), not 2.0"),
        ("polar_express(0.1, 0)", None, ValueError, "steps must be at least 1, not 0"),
        ("polar_express(0.1, 3)", 4, ValueError, "steps=4"),
        ([(1, 2, 3), (1, 2, 3)], 3, ValueError, "steps=3"),
        ("muon", 0, ValueError, "not 0"),
        ("muon", True, TypeError, "True"),
        ("muon", 2.0, TypeError, "2.0"),
        ((1.0, 2.0), None, ValueError, "\\(1.0, 2.0\\)"),
        ((1.0, 2.0, math.inf), None, ValueError, "inf"),
        ([(1.0, 2.0, "3")], None, TypeError, "'3'"),
        ((), None, ValueError, "at least one row"),
        (None, None, TypeError, "None"),
        (3.0, None, TypeError, "3.0"),
    ],
)
def test_resolve_names_what_is_wrong(given, steps, error, words):
    with pytest.raises(error, match=words):
        resolve(given, steps)


def test_gram_restarts():
    # fp32: the last steps with slopes whose product is at most 12.
    assert gram_restarts("quintic", 768, 3072) == (1, 2, 3)
    assert gram_restarts("polar_express", 64, 128) == (1, 2, 3)
    assert gram_restarts("polar_express_8", 64, 128) == (1, 2, 3, 4, 5)
    assert gram_restarts("deepseekv4", 64, 128) == (1, 2, 3, 4, 5, 6, 7, 8)
    assert gram_restarts(resolve("quintic").rows, 64, 128) == (1, 2, 3)
    assert gram_restarts("quintic", 15, 128) is None
    for name in ("muon", "aol", "cans", "convergent"):
        assert gram_restarts(name, 64, 128) is None
    assert gram_restarts(resolve("quintic", 6), 64, 128) is None


def test_gram_restarts_in_16_bits():
    for growth in (BFLOAT16_GROWTH, FLOAT16_GROWTH):
        for name in ("muon", "quintic", "aol", "cubic"):
            assert gram_restarts(name, 64, 128, growth) == ()
        assert gram_restarts("muon", 15, 128, growth) is None
    assert gram_restarts("polar_express", 64, 128, BFLOAT16_GROWTH) == ()
    assert gram_restarts("polar_express", 64, 128, FLOAT16_GROWTH) == (1,)
    assert gram_restarts("polar_express_8", 64, 128, BFLOAT16_GROWTH) == (1,)
    assert gram_restarts("deepseekv4", 64, 128, BFLOAT16_GROWTH) == (1, 2, 3, 4)
    assert gram_restarts([(2000.0, 0.0, 0.0)] * 3, 64, 128, BFLOAT16_GROWTH) is None


# Inverse-root rows.


def test_linear_rows_for_the_fourth_root():
    expected = (
        (1.85423, 1.79559),
        (1.84116, 1.73321),
        (1.81656, 1.62048),
        (1.77005, 1.42338),
        (1.6826, 1.10482),
        (1.53202, 0.69137),
        (1.35317, 0.37167),
        (1.26161, 0.26183),
        (1.25014, 0.25014),
    )
    low = 1e-6
    for a, b in expected:
        row, low = linear_root_row(low, 4)
        assert row == pytest.approx((a, -b, 0.0), abs=6e-6)
    assert 1.0 - low < 1e-6


@pytest.mark.parametrize(
    ("p", "steps"), [(1, 13), (2, 11), (3, 10), (4, 9), (5, 9), (6, 9), (7, 9), (8, 9)]
)
def test_linear_rows_take_so_many_steps(p, steps):
    low, count = 1e-6, 0
    while 1.0 - low > 1e-6:
        _, low = linear_root_row(low, p)
        count += 1
    assert count == steps


LOWS = [10.0 ** -(k / 4.0) for k in range(1, 65)]
LOWS += [1.0 - 10.0 ** -(k / 4.0) for k in range(2, 14)] + [1.0 - 4e-4]


@pytest.mark.parametrize("p", range(1, 9))
def test_linear_row_bounds(p):
    for low in LOWS:
        row, after = linear_root_row(low, p)
        values = coupled(row, np.union1d(np.geomspace(low, 1.0, 2001), [low, 1.0]), p)
        assert values.max() <= 1.0 + 1e-13
        assert values.min() == pytest.approx(after, rel=1e-7, abs=1e-14)
        assert after > low


@pytest.mark.parametrize("p", range(1, 9))
def test_quadratic_row_alternates(p):
    """Four alternating extrema of equal size: no other quadratic does better."""
    for low in LOWS:
        row, after = quadratic_root_row(low, p)
        grid = np.unique(np.concatenate([np.geomspace(low, 1.0, 6001), [low, 1.0]]))
        root = grid ** (1.0 / p) * (row[0] + grid * (row[1] + grid * row[2]))
        bottom = after ** (1.0 / p)
        ripple = 1.0 - bottom
        assert root.max() <= 1.0 + 1e-14 + 1e-6 * ripple
        if low > 0.999:
            # The Taylor row: its gap is guaranteed, but it does not alternate.
            assert 1.0 - (root.min() ** p) <= 1.0 - after
            continue
        assert root.min() >= bottom - 1e-14 - 1e-6 * ripple
        middle = 0.5 * (1.0 + bottom)
        signs = np.sign(root - middle)[np.abs(root - middle) > 0.499 * ripple - 1e-14]
        assert [s for i, s in enumerate(signs) if i == 0 or s != signs[i - 1]] == [-1, 1, -1, 1]
        assert after > low


def orbits(rows, start, p):
    """Every M that an eigenvalue passes through, and its root X in the end."""
    ms, x = [start], np.ones_like(start)
    for a, b, c in rows:
        n = a + b * ms[-1] + c * ms[-1] ** 2
        ms.append(ms[-1] * n**p)
        x = x * n
    return ms, x


SCHEDULES = (0.9, 0.3, 1e-2, 1e-4, 1e-6)


@pytest.mark.parametrize("p", range(1, 9))
@pytest.mark.parametrize("unit_roundoff", [U32, U64])
def test_schedule_reaches_its_tolerance(p, unit_roundoff):
    for low in (*SCHEDULES, 4.0 * unit_roundoff):
        tolerance = root_tolerance(unit_roundoff)
        rows = root_schedule(low, p, tolerance)
        assert len(rows) <= (14 if unit_roundoff == U32 else 24)
        start = np.geomspace(low, 1.0, 2001)
        _, x = orbits(rows, start, p)
        error = np.abs(x * start ** (1.0 / p) - 1.0)
        assert error.max() <= tolerance / p * (1.0 + tolerance) + 64.0 * U64 / low


@pytest.mark.parametrize("p", range(1, 9))
def test_no_row_costs_an_eigenvalue_digits(p):
    """M never falls far below the eigenvalue, and no row adds numbers far above its sum."""
    for low in (*SCHEDULES, 4.0 * U32):
        rows = root_schedule(low, p, root_tolerance(U32))
        start = np.geomspace(low, 1.0, 2001)
        for m in orbits(rows, start, p)[0]:
            assert (m >= 0.25 * start).all() and m.max() <= 1.0 + 1e-12
        assert all(abs(a) + abs(b) + abs(c) <= 32.0 / p for a, b, c in rows)


def test_schedule_of_an_interval_that_is_small_enough():
    assert root_schedule(1.0, 4, 1e-6) == ()
    low = 1.0 / (1.0 + 4.0 * U32)
    assert root_schedule(low, 4, root_tolerance(U32)) == ()


@pytest.mark.parametrize(
    ("low", "p", "products"),
    [(1e-6, 1, 25), (1e-6, 2, 29), (1e-6, 4, 33), (1e-6, 8, 36), (1e-3, 4, 19), (0.1, 4, 10)],
)
def test_products_of_a_schedule(low, p, products):
    rows = root_schedule(low, p, root_tolerance(U32))
    assert root_products(rows, p) == products == _extension.MODULE.root_products(low, p, U32)


@pytest.mark.parametrize("p", range(1, 9))
def test_products_are_the_kernels(p):
    for low in (*SCHEDULES, 4.0 * U32):
        rows = root_schedule(low, p, root_tolerance(U32))
        assert root_products(rows, p) == _extension.MODULE.root_products(low, p, U32)


@pytest.mark.parametrize(
    ("low", "p", "error", "words"),
    [
        (0.0, 4, ValueError, "low must be in \\(0, 1\\), not 0.0"),
        (1.0, 4, ValueError, "not 1.0"),
        (0.5, 9, ValueError, "p must be in 1..8, not 9"),
        (0.5, 2.0, TypeError, "2.0"),
    ],
)
@pytest.mark.parametrize("row", [linear_root_row, quadratic_root_row])
def test_root_rows_name_what_is_wrong(row, low, p, error, words):
    with pytest.raises(error, match=words):
        row(low, p)
