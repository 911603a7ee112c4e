"""newton_schulz on every backend and instruction set."""

from __future__ import annotations

import contextlib
import functools
import math

import numpy as np
import pytest
import spectral_kernels as sk
import torch
from hypothesis import strategies as st
from spectral_kernels.coefficients import names, resolve
from support.formats import AWKWARD_SHAPES, FLOATS, FULL, also_on_cuda, named
from support.fuzzing import fuzzed
from support.inputs import MUON, decaying, gaussian, generator, with_singular_values
from support.layouts import LAYOUTS, Placed, same_bits
from support.oracles import exact_newton_schulz, plain_newton_schulz
from support.rule import assert_rule, draws, error, rms, unit_roundoff
from torch.utils._pytree import tree_leaves

pytestmark = pytest.mark.usefixtures("backend")

SMALL_SHAPES = ((1, 7), (3, 2), (33, 20), (24, 96), (40, 40))


def spectrum_of(name, count):
    """Spectra that stress an iteration: full, decaying over some decades, and with two clusters."""
    if name == "linear":
        return torch.linspace(1.0, 0.05, count, dtype=torch.float64)
    if name == "two-clusters":
        values = torch.full((count,), 1e-3, dtype=torch.float64)
        values[: (count + 1) // 2] = 1.0
        return values
    return decaying(count, float(name))


@functools.cache
def problem(coefficients, shape, spectrum, dtype):
    """An ensemble and what `assert_rule` asks for; shared by all backends."""
    count = draws(*shape)
    if spectrum == "gaussian":
        x = gaussian(count, *shape, dtype=dtype)
    else:
        values = spectrum_of(spectrum, min(shape))
        # The smallest singular values have nearly all of the error, so that a matrix is a few
        # samples of it, however many entries it has: as many as there are values within a factor of
        # 3 of the smallest. Where these are lost in rounding, a sample is 0 or about 1.
        count = max(count, 160 if len(values) < 8 else 24)
        seeds = range(0, 5 * count, 5)
        x = torch.stack([with_singular_values(*shape, values, seed) for seed in seeds]).to(dtype)
    rows = resolve(coefficients).rows
    return x, {
        "plain": plain_newton_schulz(x, rows),
        "expected": exact_newton_schulz(x, rows),
        "noise": noise_of(x, rows),
    }


def noise_of(x, rows):
    """What one rounding in every term makes of the singular values, to first order.

    It matters where the terms of a row nearly cancel, as on a 1 x 1 matrix, on which plain torch
    rounds nothing at all, and where a set diverges just above 1, as CANS does.
    """
    values = torch.linalg.svdvals(x.double())
    values = values / values.square().sum(-1, keepdim=True).sqrt()
    u = unit_roundoff(x.dtype)
    noise = u * values
    for a, b, c in rows:
        terms = abs(a) * values + abs(b) * values**3 + abs(c) * values**5
        noise = (a + 3.0 * b * values**2 + 5.0 * c * values**4).abs() * noise + u * terms
        values = a * values + b * values**3 + c * values**5
    return rms(noise.norm(dim=-1) / values.norm(dim=-1).clamp(min=u))


# The rows of CANS diverge just above 1, where bfloat16 rounds to: plain torch errs by 0.04 on one
# multiple of a matrix and by 1.7 on another, so there is nothing to compare with.
SETS_IN_DTYPES = [
    (coefficients, dtype)
    for coefficients in names()
    for dtype in FLOATS
    if (coefficients, dtype) != ("cans", torch.bfloat16)
]


def finite(results):
    return all(bool(x.isfinite().all()) for x in tree_leaves(results))


@pytest.mark.parametrize("method", ["auto", "standard"])
@pytest.mark.parametrize("spectrum", ["gaussian", "1e2", "1e4"])
@pytest.mark.parametrize(("coefficients", "dtype"), SETS_IN_DTYPES, ids=named)
def test_error_is_at_most_twice_torchs(coefficients, spectrum, method, dtype):
    for shape in SMALL_SHAPES:
        x, rule = problem(coefficients, shape, spectrum, dtype)
        if (coefficients, dtype) == ("cans", torch.float16) and not finite(rule["plain"]):
            continue  # some of plain torch's diverge in fp16 as well
        assert_rule(sk.newton_schulz(x, coefficients=coefficients, method=method), **rule)


@pytest.mark.parametrize("dtype", FLOATS, ids=named)
@pytest.mark.parametrize("spectrum", ["linear", "two-clusters", "1e6", "1e10"])
def test_error_on_the_stress_spectra(spectrum, dtype):
    for shape in ((24, 96), (40, 40)):
        x, rule = problem("muon", shape, spectrum, dtype)
        assert_rule(sk.newton_schulz(x), **rule)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=named)
@pytest.mark.parametrize("shape", AWKWARD_SHAPES, ids=str)
def test_awkward_shapes(shape, dtype):
    x = gaussian(*shape, dtype=dtype)
    result = sk.newton_schulz(x)
    assert_rule(result, plain_newton_schulz(x, MUON), exact_newton_schulz(x, MUON))


@functools.cache
def sparse_signs(m, n):
    """Integers -1, 0, 1 whose Frobenius norm is a power of two."""
    count = 4 ** min(int(math.log(m * n, 4)), 5)
    x = torch.zeros(m * n, dtype=torch.float64)
    chosen = torch.randperm(m * n, generator=generator(m + n))[:count]
    x[chosen] = torch.randint(0, 2, (count,), generator=generator(m * n)).double() * 2.0 - 1.0
    return x.reshape(m, n)


@pytest.mark.parametrize("method", ["standard", "gram"])
@pytest.mark.parametrize("dtype", FULL, ids=named)
@pytest.mark.parametrize(
    "shape",
    [*((n, n) for n in (1, 2, 7, 16, 33)), *((m, 60 - m) for m in range(1, 60, 4)), (130, 127)],
    ids=str,
)
def test_dyadic_numbers_give_the_exact_result(shape, dtype, method):
    # All intermediate numbers of one step with these rows fit into fp32: no rounding may happen.
    x = sparse_signs(*shape)
    row = (2.0, -3.0, 1.0)
    result = sk.newton_schulz(x.to(dtype), coefficients=[row], method=method)
    assert torch.equal(result.double(), exact_step(x, row))


def exact_step(x, row):
    a, b, c = row
    y = x / float((x * x).sum().sqrt())
    r = y @ y.mT
    return a * y + (b * r + c * r @ r) @ y


@pytest.mark.parametrize("method", ["standard", "gram"])
def test_float64_methods_agree(method):
    for shape in ((13, 40), (40, 13), (21, 21)):
        x = gaussian(*shape, dtype=torch.float64)
        result = sk.newton_schulz(x, coefficients="quintic", method=method)
        assert error(result, exact_newton_schulz(x, resolve("quintic").rows)) < 1e-11


@pytest.mark.parametrize("restarts", [(), (1,), (2,), (1, 2, 3, 4)], ids=str)
def test_restarts_change_rounding_only(restarts):
    x = gaussian(12, 50, dtype=torch.float64)
    result = sk.newton_schulz(x, method="gram", restarts=restarts)
    assert error(result, exact_newton_schulz(x, MUON)) < 1e-12


@pytest.mark.parametrize("dtype", also_on_cuda(FLOATS, torch.float32), ids=named)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout, dtype, backend):
    x = gaussian(4, 20, 33, dtype=dtype)
    for matrix in (x, x.mT):
        placed = Placed(matrix, layout)
        result = sk.newton_schulz(placed.tensor)
        placed.assert_untouched_around()
        assert result.is_contiguous()
        if backend.name != "reference":  # torch's products look at strides
            assert same_bits(result, sk.newton_schulz(matrix.contiguous()))
        plain = plain_newton_schulz(matrix, MUON)
        assert_rule(result, plain, exact_newton_schulz(matrix, MUON), noise=noise_of(x, MUON))


@pytest.mark.in_full("cuda")
@pytest.mark.parametrize("batch", [(1,), (5,), (2, 3)], ids=str)
def test_batch_is_as_one_by_one(batch):
    x = gaussian(*batch, 9, 31)
    each = torch.stack([sk.newton_schulz(matrix) for matrix in x.flatten(0, -3)])
    assert same_bits(sk.newton_schulz(x), each.reshape(x.shape))


@pytest.mark.parametrize("function", [sk.newton_schulz, sk.polar])
@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0), (0, 3, 4), (2, 0, 4)], ids=str)
def test_empty(shape, function):
    assert function(torch.empty(shape)).shape == shape


@pytest.mark.parametrize("function", [sk.newton_schulz, sk.polar])
@pytest.mark.parametrize("dtype", also_on_cuda(FLOATS, torch.float32), ids=named)
def test_zero_in_zero_out(dtype, function):
    x = gaussian(3, 6, 9, dtype=dtype)
    clean = function(x)
    x[1] = 0.0
    result = function(x)
    assert torch.equal(result[1], torch.zeros(6, 9, dtype=dtype))
    assert same_bits(result[::2], clean[::2])


@pytest.mark.parametrize("function", [sk.newton_schulz, sk.polar])
@pytest.mark.parametrize("dtype", also_on_cuda(FLOATS, torch.float32), ids=named)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nonfinite_matrix_is_nan_and_spares_its_mates(value, dtype, function):
    x = gaussian(5, 7, 18, dtype=dtype)
    clean = function(x)
    for i, corner in enumerate([(0, 0), (0, -1), (-1, 0), (-1, -1)]):
        x[i][corner] = value
    result = function(x)
    assert result[:4].isnan().all()
    assert same_bits(result[4], clean[4])


@pytest.mark.in_full("cuda")
@pytest.mark.parametrize("method", ["standard", "gram"])
@pytest.mark.parametrize(
    ("dtype", "exponents"),
    [
        (torch.float32, (-140, -126, -60, -1, 1, 64, 120)),
        (torch.float64, (-1070, -1022, -500, 500, 1015)),
        (torch.bfloat16, (-130, -60, 60, 120)),
        (torch.float16, (-20, -14, 12)),
    ],
    ids=named,
)
def test_power_of_two_scales_do_not_change_a_bit(dtype, exponents, method):
    # Few bits, so that even the subnormal multiples are exact.
    x = torch.randint(-15, 16, (2, 7, 19), generator=generator(0)).to(dtype)
    plain = sk.newton_schulz(x, method=method)
    for k in exponents:
        scaled = x.double() * 2.0 ** (k // 2) * 2.0 ** (k - k // 2)
        assert same_bits(sk.newton_schulz(scaled.to(dtype), method=method), plain), k


@pytest.mark.in_full("cuda")
@pytest.mark.parametrize("dtype", FLOATS, ids=named)
def test_largest_and_smallest_numbers(dtype):
    limits = torch.finfo(dtype)
    signs = torch.randint(0, 2, (3, 5), generator=generator(1)).to(dtype) * 2.0 - 1.0
    unit = sk.newton_schulz(signs)
    assert same_bits(sk.newton_schulz(signs * limits.tiny), unit)
    assert same_bits(sk.newton_schulz(signs * (limits.smallest_normal * limits.eps)), unit)
    assert error(sk.newton_schulz(signs * limits.max), unit) <= 64.0 * unit_roundoff(dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=named)
def test_rank_one_keeps_its_sign(dtype):
    u, v = gaussian(9, 1, dtype=torch.float64), gaussian(1, 30, dtype=torch.float64, seed=1)
    x = (u @ v).to(dtype)
    result = sk.newton_schulz(x).double()
    aligned = float((result * (u @ v)).sum() / (u.norm() * v.norm()))
    assert 0.6 < aligned < 1.3


@pytest.mark.parametrize("method", ["auto", "standard"])
@pytest.mark.parametrize("dtype", FLOATS, ids=named)
@pytest.mark.parametrize("kind", also_on_cuda(["rank 3", "duplicated rows", "zero rows"], "rank 3"))
def test_rank_deficient_is_right_on_its_range(kind, dtype, method):
    x = gaussian(18, 40, dtype=torch.float64)
    if kind == "rank 3":
        x = gaussian(18, 3, dtype=torch.float64) @ x[:3]
    elif kind == "duplicated rows":
        x[9:] = x[:9]
    else:
        x[9:] = 0.0
    x = x.to(dtype)
    u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    kept = s > 1e-3 * s[0]

    def on_range(y):
        return u[:, kept].mT @ y.double() @ vh[kept].mT

    expected = torch.from_numpy(exact_newton_schulz(x.float(), MUON))
    result = sk.newton_schulz(x, method=method)
    plain = on_range(plain_newton_schulz(x, MUON))
    noise = noise_of(x, MUON)
    assert_rule(on_range(result).to(dtype), plain.to(dtype), on_range(expected), noise=noise)
    # Off the range there is rounding noise, amplified at most by the product of the slopes at 0.
    assert torch.linalg.matrix_norm(result.double(), 2) < 1.3


def structured(name, m, n, seed):
    """A float64 m x n matrix, wide, with a null space or close to one with a null space."""
    x = gaussian(m, n, dtype=torch.float64, seed=seed)
    rows, cols, quarter = torch.arange(m), torch.arange(n), max(1, m // 4)
    low_rank = gaussian(m, quarter, dtype=torch.float64, seed=seed + 1) @ x[:quarter]
    if name == "rank 1":
        return x[:, :1] @ x[:1]
    if name == "low rank":
        return low_rank
    if name == "low rank and noise":
        return low_rank + 2.0**-6 * x
    if name == "rows all equal":
        return x[:1].expand(m, n)
    if name == "two rows equal":
        return x[rows.clamp(min=1)]
    if name == "rows three times":
        return x[rows // 3]
    if name == "one-hot rows":
        chosen = torch.randint(0, max(2, n // 8), (m,), generator=generator(seed))
        return torch.eye(n, dtype=torch.float64)[chosen]
    if name == "zero rows":
        return x * (rows < m // 3)[:, None]
    if name == "zero columns":
        return x * (cols < quarter)
    if name == "repeated columns":
        return x[:, cols % quarter]
    if name == "blocks":
        top, left = rows[:, None] < m // 2, cols < n // 2
        return torch.where(top, x * left, x[-1] * ~left)
    pairs = x[rows // 2]
    if name == "rows in scaled pairs":
        return pairs * torch.where(rows % 2 == 0, 1.0, -2.0)[:, None]
    if name == "rows nearly in pairs":
        return pairs + 2.0**-8 * gaussian(m, n, dtype=torch.float64, seed=seed + 1)
    if name == "rows in pairs but for 2^-20":
        return pairs * (1.0 + 2.0**-20 * gaussian(m, n, dtype=torch.float64, seed=seed + 1))
    assert name == "rows in pairs", name
    return pairs


STRUCTURES = (
    "rank 1",
    "low rank",
    "low rank and noise",
    "rows all equal",
    "two rows equal",
    "rows in pairs",
    "rows in scaled pairs",
    "rows nearly in pairs",
    "rows in pairs but for 2^-20",
    "rows three times",
    "one-hot rows",
    "zero rows",
    "zero columns",
    "repeated columns",
    "blocks",
)
DRAWS = 6
# Here the error of any iteration is that of the few elements that are rounded apart.
DRAWS_OF = {"rows in pairs but for 2^-20": 24}


@functools.cache
def ensemble(structure, coefficients, norm, shape, dtype):
    """Matrices of one structure, the exact result, and the error of plain torch over all draws."""
    seeds = range(0, 7 * DRAWS_OF.get(structure, DRAWS), 7)
    x = torch.stack([structured(structure, *shape, seed) for seed in seeds]).to(dtype)
    rows = resolve(coefficients).rows
    # To norm 1 in float64: plain torch then only divides by a number near 1.
    values = torch.linalg.svdvals(x.double())
    power = 8 if norm == "schatten8" else 2
    unit = x.double() / (values**power).sum(-1)[:, None, None] ** (1.0 / power)
    expected = plain_iteration(unit, rows)
    return x, expected, errors(plain_iteration(unit.to(dtype), rows), expected)


def plain_iteration(y, rows):
    for a, b, c in rows:
        r = y @ y.mT
        # With alpha=0 torch 2.13 drops b r in 16 bits on processors with AMX.
        z = b * r if c == 0 else torch.baddbmm(r, r, r, beta=b, alpha=c)
        y = torch.baddbmm(y, z, y, beta=a)
    return y


def errors(y, expected):
    """Root mean square over the draws of the relative error."""
    off = torch.linalg.matrix_norm(y.double() - expected) / torch.linalg.matrix_norm(expected)
    return float(off.square().mean().sqrt())


# Rows of CANS diverge just above 1, where the singular value of a matrix of rank 1 is: rounding
# decides about any error.
SETS_OF_NULL_SPACES = tuple(name for name in names() if name != "cans")


def assert_ensemble(structure, coefficients, norm, shape, dtype, compute):
    x, expected, plain = ensemble(structure, coefficients, norm, shape, dtype)
    ours = errors(compute(x), expected)
    # Plain torch is all but exact on one-hot rows.
    allowed = 2.0 * plain + 10.0 * unit_roundoff(dtype)
    assert ours <= allowed, f"{coefficients}: error {ours:.3g}, plain torch {plain:.3g}"


@contextlib.contextmanager
def rows_alike(backend):
    """Triton's interpreter multiplies in float64, so that equal rows have equal products.

    numpy's float32 product takes the rows in groups and rounds each otherwise, which a card does
    not: one element in an ulp's distance from its equals lies in the null space, where a step
    multiplies it by 3.4.
    """
    if backend.name != "triton":
        yield
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_dot(builder, a, b, d, *precision):
        product = np.matmul(a.data, b.data, dtype=np.float64) + d.data
        return TensorHandle(product.astype(d.data.dtype), d.dtype.scalar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_dot", create_dot)
        yield


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=named)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_error_with_a_null_space(structure, dtype, backend):
    # Triton's interpreter takes a second a matrix.
    sets = ("muon", "deepseekv4") if backend.name == "triton" else SETS_OF_NULL_SPACES
    for coefficients in sets:
        for norm, shape in (("frobenius", (24, 96)), ("schatten8", (33, 44))):
            if backend.name == "triton" and norm == "schatten8":
                continue

            def compute(x, coefficients=coefficients, norm=norm):
                with rows_alike(backend):
                    return sk.newton_schulz(x, coefficients=coefficients, norm=norm)

            assert_ensemble(structure, coefficients, norm, shape, dtype, compute)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_gram_form_with_a_null_space_in_16_bits(structure, backend):
    for coefficients in ("muon", "polar_express", "polar_express_8"):
        for dtype in (torch.bfloat16, torch.float16):
            if backend.name == "triton" and (coefficients, dtype) != ("muon", torch.bfloat16):
                continue

            def compute(x, coefficients=coefficients):
                return sk.newton_schulz(x.mT, coefficients=coefficients, method="gram").mT

            assert_ensemble(structure, coefficients, "frobenius", (24, 96), dtype, compute)


@pytest.mark.parametrize("structure", ["rows all equal", "rows in pairs", "zero columns"])
def test_muon_step_with_a_null_space(structure, backend):
    def compute(x):
        params = [torch.zeros_like(x)]
        sk.muon_step_(params, [x], [torch.zeros_like(x.float())], lr=1.0, momentum=0.0)
        return -params[0]

    assert_ensemble(structure, "muon", "frobenius", (24, 96), torch.bfloat16, compute)


@pytest.mark.parametrize("restarts", [None, ()], ids=str)
@pytest.mark.parametrize("coefficients", ["muon", "polar_express_8", "deepseekv4", "convergent"])
def test_finite_input_gives_a_finite_result(coefficients, restarts, backend):
    # Without restarts the rounding noise in the null space of R would be amplified beyond bounds.
    draws = 2 if backend.name == "triton" else 30
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.stack([structured("rows three times", 33, 44, i) for i in range(draws)]).to(dtype)
        for norm in ("frobenius", "schatten8"):
            options = {"norm": norm, "method": "gram", "restarts": restarts}
            result = sk.newton_schulz(x, coefficients=coefficients, **options)
            assert torch.linalg.matrix_norm(result.double()).max() < 1.3 * 33**0.5


# The range of the composite polynomials on [1e-2, 1].
BANDS = {
    "muon": (0.682, 1.134),
    "quintic": (0.978, 1.032),
    "polar_express": (0.846, 1.124),
    "polar_express_8": (1.0, 1.0),
    "cans": (0.884, 1.120),
    "aol": (0.941, 1.050),
    "deepseekv4": (1.0, 1.001),
    "cubic": (0.774, 1.300),
    "convergent": (0.68, 1.0),
}


@pytest.mark.in_full("cuda")
@pytest.mark.parametrize("dtype", FLOATS, ids=named)
@pytest.mark.parametrize("coefficients", names())
def test_every_set_of_one_matrix(coefficients, dtype):
    """No lottery, and no measure of accuracy: the rows are those of the set."""
    rows = resolve(coefficients)
    x = gaussian(24, 70, dtype=dtype)
    expected = exact_newton_schulz(x, rows.rows, rows.norm_factor)
    found = error(sk.newton_schulz(x, coefficients=coefficients), expected)
    assert found < {torch.bfloat16: 4e-2, torch.float16: 1e-2}.get(dtype, 1e-5)


@pytest.mark.parametrize("coefficients", names())
def test_singular_values_come_into_the_band(coefficients):
    # The norm of a matrix with these singular values is about 4, so the smallest starts near 1e-2.
    values = torch.linspace(1.0, 0.05, 45)
    x = with_singular_values(45, 60, values).float()
    result = torch.linalg.svdvals(sk.newton_schulz(x, coefficients=coefficients).double())
    low, high = BANDS[coefficients]
    assert low - 0.002 <= result.min() and result.max() <= high + 0.002


def test_every_named_set_has_a_band():
    assert set(names()) == set(BANDS)


def test_steps_rows_and_single_rows_mean_the_same():
    x = gaussian(8, 20)
    row = MUON[0]
    five = sk.newton_schulz(x, method="standard")
    assert same_bits(sk.newton_schulz(x, coefficients=row, method="standard"), five)
    assert same_bits(sk.newton_schulz(x, coefficients=[row] * 5, method="standard"), five)
    seven = sk.newton_schulz(x, steps=7, method="standard")
    assert same_bits(sk.newton_schulz(x, coefficients=[row] * 7, method="standard"), seven)


@pytest.mark.parametrize("compute_dtype", FLOATS, ids=named)
@pytest.mark.parametrize("dtype", FLOATS, ids=named)
def test_compute_dtype(dtype, compute_dtype):
    x = gaussian(4, 14, 35, dtype=dtype)
    expected = exact_newton_schulz(x, MUON)
    plain = plain_newton_schulz(x, MUON, compute_dtype)
    result = sk.newton_schulz(x, compute_dtype=compute_dtype)
    assert result.dtype == dtype
    noise = noise_of(x.to(compute_dtype), MUON)
    assert_rule(result, plain, expected, noise=noise)


@pytest.mark.in_full("cuda")
@pytest.mark.parametrize("method", ["standard", "gram"])
@pytest.mark.parametrize("dtype", FULL, ids=named)
def test_schatten_8_norm(dtype, method):
    x = gaussian(12, 31, dtype=dtype)
    values = torch.linalg.svdvals(x.double())
    factor = float((values**8).sum() ** 0.125 / (values**2).sum().sqrt())
    result = sk.newton_schulz(x, norm="schatten8", method=method)
    expected = exact_newton_schulz(x, MUON, norm_factor=factor)
    assert error(result, expected) <= 200.0 * unit_roundoff(dtype)


@pytest.mark.in_full("cuda")
@pytest.mark.parametrize("method", ["standard", "gram"])
@pytest.mark.parametrize("norm", ["frobenius", "schatten8"])
def test_eps_is_a_floor_of_the_norm(norm, method):
    x = gaussian(6, 11)
    options = {"norm": norm, "method": method}
    free = sk.newton_schulz(x * 2.0**-20, **options)
    assert same_bits(sk.newton_schulz(x * 2.0**-20, eps=2.0**-30, **options), free)
    # Where the floor acts, x / eps is iterated on.
    row = (1.0, 0.0, 0.0)
    result = sk.newton_schulz(x * 2.0**-20, coefficients=[row], eps=2.0**-4, **options)
    assert error(result, x.double() * 2.0**-16) < 1e-6
    assert not sk.newton_schulz(torch.zeros(3, 4), eps=1e-7, **options).any()


@st.composite
def matrices(draw):
    dtype = draw(st.sampled_from(FLOATS))
    m, n = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    seed = draw(st.integers(0, 2**31))
    if draw(st.booleans()):
        x = gaussian(m, n, dtype=torch.float64, seed=seed)
    else:
        condition = 10.0 ** draw(st.floats(0.0, 8.0))
        x = with_singular_values(m, n, decaying(min(m, n), condition), seed)
    scale = 2.0 ** (draw(st.integers(-60, 60)) if dtype != torch.float16 else 0)
    return Placed((x * scale).to(dtype), draw(st.sampled_from(LAYOUTS))).tensor


def assert_newton_schulz(x):
    # The scale matters to plain torch only.
    largest = float(x.abs().max())
    unit = (x.double() * 2.0 ** -math.frexp(largest)[1]).to(x.dtype) if largest else x
    expected = exact_newton_schulz(unit, MUON)
    plain = plain_newton_schulz(unit, MUON)
    assert_rule(sk.newton_schulz(x), plain, expected, noise=noise_of(unit, MUON))


@fuzzed(matrices())
def test_any_matrix(x):
    assert_newton_schulz(x)
