"""eigenbasis and soap_step_ of the CUDA C++ kernels: what their emulation alone shows."""

from __future__ import annotations

import contextlib
import itertools
import math

import pytest
import torch
from emulated_cuda import Guarded, arranged, launches
from spectral_kernels import eigenbasis, inverse_root, refresh_eigenbasis
from spectral_kernels._operators import TABLE
from support.cases import later_step
from support.emulated_steps import (
    assert_is_its_entries,
    assert_touches_nothing_outside,
    launched,
)
from support.inputs import semidefinite, with_eigenvalues
from support.layouts import LAYOUTS, Placed, same_bits
from support.rule import error, orthogonality, unit_roundoff
from support.step_rules import assert_step_rule
from test_eigenbasis import reconstruction

pytestmark = pytest.mark.usefixtures("native", "backend_emulated")

U = unit_roundoff(torch.float32)
STATE = TABLE["soap_step_"].states


def assert_as_good_as_torch(a):
    values, vectors = eigenbasis(a)
    plain = torch.linalg.eigh(a)
    exact_values = torch.linalg.eigvalsh(a.double()).flip(-1)
    assert reconstruction(a, values, vectors) <= 2.0 * reconstruction(a, *plain) + 4.0 * U
    assert orthogonality(vectors) <= 2.0 * orthogonality(plain[1]) + 4.0 * U
    assert (values - exact_values).abs().max() <= 2.0 * U * exact_values.abs().max()
    assert (values.diff(dim=-1) <= 0.0).all()
    largest = vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True))
    assert (largest > 0.0).all()


@pytest.mark.parametrize("condition", [1.0, 1e3, 1e6, 1e12])
@pytest.mark.parametrize("n", [1, 2, 5, 17, 32, 33])
def test_error_rule(n, condition):
    assert_as_good_as_torch(semidefinite(n, condition).float())


@pytest.mark.parametrize("n", [70, 128, 129])
def test_error_rule_of_large_matrices(n):
    assert_as_good_as_torch(semidefinite(n, 1e6).float())


@contextlib.contextmanager
def eigh_that(fails):
    """Torch's solver fails where fails(matrix, how many have been solved before) says so."""
    calls = itertools.count()

    def solve(a, uplo="L"):
        if fails(a, next(calls)):
            raise RuntimeError("as the test wants")
        return torch.ops.aten._linalg_eigh(a, uplo, True)

    library = torch.library.Library("aten", "IMPL")
    library.impl("linalg_eigh", solve, "CPU")
    try:
        yield
    finally:
        library._destroy()


def is_identity(a):
    return torch.equal(a, torch.eye(len(a), dtype=a.dtype))


def test_what_does_not_converge_is_nan_and_nothing_else():
    """Too large for a chip. The identity says that it is the matrix, whatever words torch has."""
    a = torch.stack([semidefinite(129, 1e3, seed).float() for seed in range(3)])
    with eigh_that(lambda one, _: not is_identity(one) and one[0, 0] == a[1, 0, 0].double()):
        values, vectors = eigenbasis(a)
    assert values[1].isnan().all() and vectors[1].isnan().all()
    expected = eigenbasis(a[::2])
    assert same_bits([values[::2], vectors[::2]], list(expected))


def test_a_solver_that_fails_for_all_is_no_lack_of_convergence():
    a = semidefinite(129, 1e3).float()
    with eigh_that(lambda *_: True), pytest.raises(RuntimeError, match="linalg_eigh failed"):
        eigenbasis(a)


def test_a_solver_that_fails_once_is_asked_again():
    a = semidefinite(129, 1e3).float()
    expected = eigenbasis(a)
    with eigh_that(lambda _, before: before == 0):
        assert same_bits(list(eigenbasis(a)), list(expected))


@pytest.mark.parametrize("values", ["indefinite", "clusters", "negative"])
def test_any_symmetric_matrix(values):
    n = 20
    spectrum = {
        "indefinite": torch.linspace(-1, 2, n, dtype=torch.float64),
        "clusters": torch.arange(n, dtype=torch.float64) // 7,
        "negative": -torch.logspace(0, -6, n, dtype=torch.float64),
    }[values]
    assert_as_good_as_torch(with_eigenvalues(spectrum, 3).float())


@pytest.mark.parametrize("power", [-140, -100, 60, 120])
def test_any_scale(power):
    a = semidefinite(6, 100.0).float()
    values, vectors = eigenbasis(a)
    scaled_values, scaled_vectors = eigenbasis(a * 2.0**power)
    if power > -126:  # else the elements lose bits
        assert error(scaled_values[None] * 2.0**-power, values[None]) < 4.0 * U
        assert error(scaled_vectors, vectors) < 4.0 * U
    assert orthogonality(scaled_vectors) <= 8.0 * U


def test_batch_mates_do_not_matter():
    a = torch.stack([semidefinite(10, 100.0, seed).float() for seed in range(4)])
    clean = eigenbasis(a)
    a[1, 2, 3] = math.nan
    a[2, 9, 9] = math.inf
    with arranged(1):
        values, vectors = eigenbasis(a)
    assert values[1:3].isnan().all() and vectors[1:3].isnan().all()
    for i in (0, 3):
        assert same_bits((values[i], vectors[i]), (clean[0][i], clean[1][i]))
        assert same_bits(eigenbasis(a[i]), (values[i], vectors[i]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    a = torch.stack([semidefinite(9, 100.0, seed).float() for seed in (1, 2)])
    placed = Placed(a, layout)
    assert same_bits(eigenbasis(placed.tensor), eigenbasis(a))
    placed.assert_untouched_around()
    for at_end in (True, False):
        assert same_bits(eigenbasis(Guarded(a, at_end=at_end).tensor), eigenbasis(a))


def test_float64_is_refused():
    for call in (
        lambda: eigenbasis(torch.eye(3).double()),
        lambda: refresh_eigenbasis(torch.eye(3).double(), torch.eye(3).double()),
        lambda: later_step("soap_step_", ((5, 6),), torch.float64).run("cuda"),
    ):
        with pytest.raises(NotImplementedError, match="not in fp64"):
            call()


@pytest.mark.parametrize("p", [1, 2, 4])
def test_roots_by_eigenvectors(p):
    a = torch.stack([semidefinite(24, 1e8, seed).float() for seed in range(2)])
    options = {"relative_ridge": 1e-9, "method": "eigen", "return_info": True}
    root, info = inverse_root(a, p, **options)
    expected, its_info = inverse_root(a, p, **options, backend="reference")
    assert error(root, expected) < 16.0 * U
    assert info.status.tolist() == its_info.status.tolist()
    assert torch.allclose(info.residual, its_info.residual, rtol=0.0, atol=1e-6)


# soap_step_


def test_soap_step_of_larger_matrices():
    case = later_step("soap_step_", ((70, 40), (20, 66)), torch.float32, taken=2)
    assert_step_rule(case, "cuda")


def test_propagate_and_raise():
    case = later_step("soap_step_", ((3, 4), (2, 5, 6)), nonfinite="propagate")
    case["grads"][1][1, 2, 3] = math.nan
    stopped = case.with_(nonfinite="raise").clone()
    untouched = stopped.clone()
    case.run("cuda")
    for name in ("params", *STATE):
        assert case[name][1][1].isnan().any(), name
        assert case[name][1][0].isfinite().all() and case[name][0].isfinite().all(), name
    assert int(case["skipped"]) == 0
    with pytest.raises(ValueError, match=r"grads\[1\] has a non-finite element \(matrix 1\)"):
        stopped.run("cuda")
    assert same_bits(stopped.written(), untouched.written())


def test_a_list_is_its_entries():
    """More entries than one launch takes; in any order, and cut into slices."""
    shapes = [(0, 3), *((1 + 7 * i % 9, 1 + 5 * i % 7) for i in range(50)), (4, 0), (2, 5, 3)]
    refresh = [i % 25 == 1 for i in range(len(shapes))]
    case = later_step("soap_step_", shapes, taken=2, refresh=refresh, sides=("left",))
    assert_is_its_entries(case, (1, 50, 52), elements=500)


@pytest.mark.parametrize("at_end", [True, False])
def test_soap_step_touches_nothing_outside(at_end):
    case = later_step("soap_step_", ((2, 5, 6), (7, 4)))
    assert_touches_nothing_outside(case, at_end=at_end)


def test_launches_do_not_grow_with_the_list():
    assert launched("soap_step_", 1) == launched("soap_step_", 8) < 30


@pytest.mark.parametrize("permuted", [False, True])
def test_bases_are_looked_at_once(permuted):
    case = later_step("soap_step_", ((2, 3, 4, 4),), refresh=[0])
    if permuted:  # has no common stride, and is worked on matrix by matrix
        names = ("params", "grads", *STATE)
        case = case.with_(**{name: [case[name][0].transpose(0, 1)] for name in names})
    counts = []
    for _ in range(3):
        launches()
        case.run("cuda")
        counts.append(launches())
    assert counts[0] - 1 == counts[1] == counts[2]


@pytest.mark.parametrize(
    ("change", "error_type", "sentence"),
    [
        ({"exp_avg_sqs": [torch.zeros(5, 5)]}, ValueError, "exp_avg_sqs"),
        ({"refresh": [1, 1]}, ValueError, "refresh has 2 entries"),
        ({"left_bases": [torch.empty(0)]}, ValueError, r"lefts\[0\] has shape"),
        ({"nonfinite": "ignore"}, ValueError, "nonfinite is 'ignore'"),
        ({"lr": torch.tensor(1)}, TypeError, "lr must be float32 or float64"),
    ],
    ids=str,
)
def test_bad_input_is_named_before_anything_is_written(change, error_type, sentence):
    case = later_step("soap_step_", ((5, 6),)).with_(**change)
    before = case.clone()
    with pytest.raises(error_type, match=sentence):
        case.run("cuda")
    assert same_bits(case.written(), before.written())
