"""newton_schulz and muon_step_ of the CUDA C++ kernels: what their emulation alone shows."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from emulated_cuda import Guarded, arranged
from spectral_kernels import _cuda
from spectral_kernels.coefficients import resolve
from spectral_kernels.newton_schulz import newton_schulz
from support.cases import later_step, new_step
from support.inputs import MUON, decaying, gaussian, with_singular_values
from support.layouts import LAYOUTS, Placed, same_bits
from support.oracles import exact_newton_schulz, plain_newton_schulz
from support.rule import assert_rule, error
from support.step_rules import assert_step_rule
from test_newton_schulz import noise_of

pytestmark = pytest.mark.usefixtures("native", "backend_emulated")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Around the edges of tiles of 16 rows and 64 columns, and of chunks of 2048.
SHAPES = ((1, 1), (3, 2), (1, 300), (16, 16), (17, 64), (40, 33), (65, 64), (96, 97), (113, 20))


def spectra(shape, dtype):
    s = min(shape)
    yield gaussian(*shape, dtype=dtype, seed=1)
    yield with_singular_values(*shape, decaying(s, 1e3), 2).to(dtype)
    low = torch.zeros(s, dtype=torch.float64)
    low[: max(1, s // 4)] = 1.0
    yield with_singular_values(*shape, low, 3).to(dtype)


@functools.cache
def plain_errors(shape, dtype, coefficients):
    """Error of plain torch on each spectrum: the worst of a few multiples."""
    rows = resolve(coefficients)
    return [
        [
            plain_newton_schulz((x.double() * c / rows.norm_factor).to(dtype), rows.rows)
            for c in (1.0, 1.23, 1.41, 1.73)
        ]
        for x in spectra(shape, dtype)
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_rule(shape, dtype):
    rows = resolve("muon").rows
    few = dtype == torch.float32 and min(shape) < _cuda.LEAST_ROWS_FP32  # not chosen by itself
    for x, plain in zip(spectra(shape, dtype), plain_errors(shape, dtype, "muon"), strict=True):
        noise = math.hypot(noise_of(x, rows), 2e-6 if few else 0.0)
        assert_rule(newton_schulz(x), plain, exact_newton_schulz(x, rows), noise=noise)


# Beyond one chip: tiles of 64 rows, sums over columns in parts, the standard and the Gram form.
LARGE = (
    ((130, 129), torch.bfloat16),
    ((140, 580), torch.bfloat16),
    ((200, 131), torch.float16),
    ((129, 200), torch.float32),
)


@pytest.mark.parametrize(("shape", "dtype"), LARGE, ids=str)
def test_error_rule_of_large_matrices(shape, dtype):
    rows = resolve("muon").rows
    x = with_singular_values(*shape, decaying(min(shape), 1e3), 2).to(dtype)
    plain = [plain_newton_schulz((x.double() * c).to(dtype), rows) for c in (1.0, 1.23, 1.41)]
    assert_rule(newton_schulz(x), plain, exact_newton_schulz(x, rows))


@pytest.mark.parametrize("method", ["standard", "gram"])
@pytest.mark.parametrize("dtype", DTYPES[::2], ids=str)
def test_methods_of_large_matrices(method, dtype):
    x = gaussian(129, 150, dtype=dtype)
    options = {"method": method, "steps": 3, "restarts": [2] if method == "gram" else None}
    expected = newton_schulz(x.double(), **options, backend="reference")
    assert error(newton_schulz(x, **options), expected) < (2e-6 if dtype == DTYPES[0] else 4e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("condition", [1.0, 1e3])
def test_schatten_norm_of_large_matrices(condition, dtype):
    """The largest and the smallest squares of a Gram matrix that there are."""
    x = with_singular_values(130, 150, decaying(130, condition), 2).to(dtype)
    for options in ({}, {"eps": 1e4}, {"coefficients": "polar_express"}):
        options = {"norm": "schatten8", "method": "standard", "steps": 2, **options}
        expected = newton_schulz(x.double(), **options, backend="reference")
        plain = newton_schulz(x, **options, backend="reference")
        assert error(newton_schulz(x, **options), expected) <= 2.0 * error(plain, expected) + 1e-6
    assert not newton_schulz(torch.zeros_like(x), norm="schatten8").any()


def test_large_matrices_have_no_mates():
    x = gaussian(4, 129, 140, dtype=torch.bfloat16)
    x[1] = 0.0
    x[2, 7, 9] = math.nan
    together = newton_schulz(x, steps=2)
    assert not together[1].any()
    assert together[2].isnan().all()
    with arranged(1):
        for i in (0, 3):
            assert same_bits(together[i], newton_schulz(x[i], steps=2))
    strided = Placed(x[3:], LAYOUTS[1])
    assert same_bits(newton_schulz(strided.tensor, steps=2), together[3:])
    strided.assert_untouched_around()
    assert same_bits(newton_schulz(x[3] * 2.0**-90, steps=2), together[3])


@pytest.mark.parametrize(
    ("shape", "cleared"), [((20, 30), 1), ((129, 130), 1), ((130, 1500), 2)], ids=str
)
def test_counters_are_cleared_together(shape, cleared):
    """Each time is a launch; sums in parts have counters of their own."""
    x = gaussian(*shape, dtype=torch.bfloat16)
    with torch.autograd.profiler.profile() as profile:
        newton_schulz(x, coefficients=[(2.0, -1.5, 0.5)])
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["aten::zero_"] == cleared


def test_rows_without_a_square():
    """A cubic row takes no product."""
    rows = ((1.5, -0.5, 0.0),) * 2
    x = gaussian(129, 130)
    assert error(newton_schulz(x, coefficients=rows), exact_newton_schulz(x, rows)) < 2e-6


@pytest.mark.parametrize("truncation", [False, True])
def test_long_rows_are_summed_in_chunks(truncation):
    x = gaussian(18, 4500)
    plain = [plain_newton_schulz(x * c, MUON) for c in (1.0, 1.23, 1.41, 1.73)]
    with arranged(truncation=truncation):
        found = newton_schulz(x)
    assert_rule(found, plain, exact_newton_schulz(x, MUON), terms=x.shape[1])


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("shape", [(3, 40, 2064), (3, 8, 16), (3, 33, 104)], ids=str)
def test_what_is_read_in_place_has_the_bits_of_what_is_packed(shape, dtype):
    """Rows of aligned words are not packed; an odd stride between rows keeps them from that."""
    x = gaussian(*shape, dtype=dtype)
    x[1] = 0.0
    if dtype == torch.bfloat16:  # fp16 has no such exponents
        x[2] *= 2.0**-70
    odd = torch.empty(*shape[:2], shape[2] + 1, dtype=dtype)[..., :-1].copy_(x)
    for norm in ("frobenius", "schatten8"):
        found = newton_schulz(x, norm=norm)
        assert same_bits(found, newton_schulz(odd, norm=norm))
    assert not found[1].any()
    guarded = Guarded(x)
    assert same_bits(newton_schulz(guarded.tensor, norm=norm), found)
    for c in (2.0**-60, 2.0**-33, 2.0**60) if dtype == torch.bfloat16 else ():
        assert same_bits(newton_schulz(x[0] * c, norm=norm), found[0])
    for bad in (math.nan, math.inf):
        x[2, 3, 5] = bad
        broken = newton_schulz(x, norm=norm)
        assert broken[2].isnan().all()
        assert same_bits(broken[:2], found[:2])


@pytest.mark.parametrize("at_end", [True, False])
def test_no_access_outside_the_tensors(at_end):
    for dtype in DTYPES:
        x = gaussian(3, 7, 13, dtype=dtype)
        guarded = Guarded(x, at_end=at_end)
        assert same_bits(newton_schulz(guarded.tensor), newton_schulz(x))
    case = new_step("muon_step_", [(5, 9), (9, 5)])
    expected = case.clone()
    expected.run("cuda")
    guards = {
        name: [Guarded(t, at_end=at_end) for t in case[name]]
        for name in ("params", "grads", "momentum_buffers")
    }
    guarded_case = case.with_(**{k: [g.tensor for g in v] for k, v in guards.items()})
    guarded_case.run("cuda")
    assert same_bits(guarded_case["params"], expected["params"])


@pytest.mark.parametrize("compute_dtype", DTYPES, ids=str)
def test_muon_step_of_larger_matrices(compute_dtype):
    """Tall as well as wide; several tiles, and in 16 bits what does not fit on chip."""
    shapes = [(2, 33, 20), (0, 3), (70, 100)]
    if compute_dtype == torch.bfloat16:
        shapes += [(130, 140), (2, 150, 129)]
    for dtype, nesterov in ((torch.float32, True), (torch.bfloat16, False)):
        options = {"compute_dtype": compute_dtype, "nesterov": nesterov, "weight_decay": 0.1}
        assert_step_rule(later_step("muon_step_", shapes, dtype, **options), "cuda")


def test_a_list_is_its_entries():
    """More entries than one launch takes, of all tile counts, empty ones at any position."""
    shapes = [(0, 3), *((1 + 7 * i % 40, 1 + 5 * i % 33) for i in range(101)), (4, 0), (120, 3)]
    together = new_step("muon_step_", shapes)
    alone = together.clone()
    together.run("cuda")
    lists = ("params", "grads", "momentum_buffers", "second_moments", "step_counts")
    for i in (1, 50, 100, 103):
        one = alone.with_(
            **{name: [alone[name][i]] for name in lists},
            scales=[alone.options["scales"][i]],
            restarts=[alone.options["restarts"][i]],
        )
        one.run("cuda")
        assert same_bits(one["params"][0], together["params"][i])
        assert same_bits(one["momentum_buffers"][0], together["momentum_buffers"][i])


@pytest.mark.parametrize(
    ("x", "options", "sentence"),
    [
        (gaussian(3, 4, dtype=torch.float64), {}, "not in fp64"),
        (gaussian(3, 4), {"coefficients": (50.0, 0.0, 0.0)}, "grow beyond"),
    ],
    ids=("fp64", "growth"),
)
def test_what_is_not_served_is_refused(x, options, sentence):
    with pytest.raises(NotImplementedError, match=sentence):
        newton_schulz(x, **options)


# On chip, and beyond it: one launch, a launch a product, wgmma, whose loading warps see the same.
ARRANGEMENTS = (
    ((3, 40, 530), {}),
    ((3, 129, 140), {"queue": True, "residents": 3}),
    ((3, 129, 140), {"queue": False, "order": 1}),
    ((3, 129, 140), {"wgmma": True, "delivery": "random"}),
)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize(("shape", "arrangement"), ARRANGEMENTS, ids=str)
def test_parameters_at_the_end_of_their_range(shape, arrangement, dtype):
    """One that would leave it is kept, one that does not moves, and others do not see either."""
    options = {"compute_dtype": dtype, "rows": ((2.0, -1.5, 0.5),) * 2, "restarts": [()]}
    options |= {"lr": 0.5, "weight_decay": 5.0, "per_matrix_counts": True}
    start = new_step("muon_step_", [shape], dtype, **options)
    usual, case = start.clone(), start.clone()
    case["params"][0][0, 3, -1] = torch.finfo(dtype).max  # times -1.5
    case["params"][0][1, -1, 5] = 0.6 * torch.finfo(dtype).max
    before = case.clone()
    with arranged(**arrangement):
        usual.run("cuda")
        case.run("cuda")
    for name in ("params", "momentum_buffers", "step_counts"):
        assert same_bits(case[name][0][0], before[name][0][0]), name
        others = case[name][0][1:].clone()
        if name == "params":
            assert float(others[0, -1, 5]) == pytest.approx(-0.9 * torch.finfo(dtype).max, rel=0.01)
            others[0, -1, 5] = usual[name][0][1, -1, 5]
        assert same_bits(others, usual[name][0][1:]), name
    assert int(case["skipped"]) == 1 and int(usual["skipped"]) == 0
