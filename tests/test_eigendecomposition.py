"""Our own eigendecomposition in float64, on every instruction set, also where LAPACK is faster."""

from __future__ import annotations

import math
import subprocess
import sys
import textwrap
from collections.abc import Iterator

import pytest
import spectral_kernels as sk
import torch
from hypothesis import strategies as st
from spectral_kernels import _extension
from support.fuzzing import fuzzed
from support.inputs import decaying, gaussian, generator, semidefinite, with_eigenvalues
from support.layouts import same_bits
from support.rule import unit_roundoff
from torch import Tensor

FP64 = torch.float64
U = unit_roundoff(FP64)
CPU = [f"cpu-{isa}" for isa in (_extension.MODULE.supported_isas() if _extension.MODULE else ())]
every_set = pytest.mark.parametrize("backend", CPU, indirect=True)

pytestmark = pytest.mark.usefixtures("own_kernels")


@pytest.fixture
def own_kernels(native: None) -> Iterator[None]:
    _extension.MODULE.set_eigen_route("own")
    yield
    _extension.MODULE.set_eigen_route("auto")


def errors(a: Tensor, values: Tensor, vectors: Tensor) -> tuple[float, float]:
    """||V diag(values) V^T - A||_F / ||A||_F and ||V^T V - I||_F / sqrt(n)."""
    n = len(a)
    residual = (vectors * values) @ vectors.mT - a
    off = vectors.mT @ vectors - torch.eye(n, dtype=FP64)
    length = float(a.norm())
    return float(residual.norm()) / length if length else 0.0, float(off.norm()) / math.sqrt(n)


def assert_decomposed(a: Tensor, roundings: float | None = None) -> None:
    """Errors at most twice LAPACK's, but for roundings where it makes next to none."""
    faults = _extension.MODULE.faults()
    values, vectors = sk.eigenbasis(a)
    assert _extension.MODULE.faults() == faults, "LAPACK had to help"
    assert (values.diff() <= 0.0).all()
    lapack = torch.linalg.eigh(a)
    largest = float(lapack.eigenvalues.abs().max())
    assert float((values - lapack.eigenvalues.flip(0)).abs().max()) <= 8.0 * U * (
        math.sqrt(len(a)) * largest
    )
    for ours, theirs in zip(errors(a, values, vectors), errors(a, *lapack), strict=True):
        assert ours <= 2.0 * theirs + U * (
            8.0 + math.sqrt(len(a)) if roundings is None else roundings
        )


def tridiagonal(diagonal: Tensor, beside: Tensor) -> Tensor:
    return torch.diag(diagonal) + torch.diag(beside, 1) + torch.diag(beside, -1)


def wilkinson(n: int) -> Tensor:
    """The largest eigenvalues come in pairs that agree to many digits."""
    middle = (n - 1) / 2
    return tridiagonal((torch.arange(n, dtype=FP64) - middle).abs(), torch.ones(n - 1, dtype=FP64))


def glued(copies: int, n: int, glue: float) -> Tensor:
    """Wilkinson's matrix again and again: clusters of as many eigenvalues as there are copies."""
    one = wilkinson(n)
    beside = torch.ones(copies * n - 1, dtype=FP64)
    beside[n - 1 :: n] = glue
    return tridiagonal(one.diagonal().repeat(copies), beside)


def second_differences(n: int) -> Tensor:
    return tridiagonal(torch.full((n,), 2.0, dtype=FP64), torch.full((n - 1,), -1.0, dtype=FP64))


def blocks(n: int) -> Tensor:
    """Nothing couples the halves, which are cut elsewhere."""
    a = torch.zeros(n, n, dtype=FP64)
    first = n // 3
    a[:first, :first] = semidefinite(first, 1e3, 1)
    a[first:, first:] = -semidefinite(n - first, 1e5, 2)
    return a


def with_steps(n: int) -> Tensor:
    """Down to 2^-1000 in steps that leave nothing of the next row's squares."""
    scale = 2.0 ** -torch.linspace(0.0, 500.0, n, dtype=FP64)
    return scale[:, None] * semidefinite(n, 10.0) * scale


def structures(n: int) -> dict[str, Tensor]:
    scale = torch.logspace(0, -8, n, dtype=FP64)
    line = gaussian(n, 1, dtype=FP64)
    return {
        "semidefinite": semidefinite(n, 1e6),
        "indefinite": with_eigenvalues(torch.linspace(-1.0, 1.0, n)),
        "rank one": line @ line.mT,
        "deficient": with_eigenvalues((torch.arange(n) < max(n // 4, 1)).double() + 1e-17),
        "all but one equal": torch.eye(n, dtype=FP64) + line @ line.mT,
        "clusters": with_eigenvalues(1.0 + torch.arange(n).remainder(3) + 1e-13 * torch.arange(n)),
        "diagonal": torch.diag(gaussian(n, dtype=FP64)),
        "negative": -semidefinite(n, 10.0),
        "ones": torch.ones(n, n, dtype=FP64),
        "graded": scale[:, None] * semidefinite(n, 10.0) * scale,
        "graded to nothing": with_steps(n),
        "blocks": blocks(n),
        "wilkinson": wilkinson(n),
        "second differences": second_differences(n),
    }


@every_set
@pytest.mark.parametrize("n", [1, 2, 3, 8, 31, 32, 33, 47, 64, 65, 97, 129, 200])
def test_error_is_at_most_twice_lapacks(n, backend):
    for seed in range(3):
        x = gaussian(n, 2 * n, dtype=FP64, seed=seed)
        assert_decomposed(x @ x.mT, roundings=4.0)


@every_set
@pytest.mark.parametrize("n", [5, 40, 130])
@pytest.mark.parametrize("name", structures(5))
def test_structures(name, n, backend):
    a = structures(n)[name]
    assert_decomposed(a)
    assert_decomposed(a.flip(0, 1).contiguous())  # what was small at the bottom is so at the top


@every_set
@pytest.mark.parametrize("glue", [1.0, 1e-3, 1e-8, 1e-14, 0.0])
def test_eigenvalues_that_agree_to_many_digits(glue, backend):
    assert_decomposed(glued(9, 21, glue))


@every_set
@pytest.mark.parametrize("n", [2, 33, 150, 301])
def test_known_eigenvalues(n, backend):
    values, _ = sk.eigenbasis(second_differences(n))
    angles = torch.arange(n, 0, -1, dtype=FP64) * (math.pi / (2 * (n + 1)))
    assert float((values - 4.0 * angles.sin().square()).abs().max()) <= 8.0 * U * math.sqrt(n) * 4.0


@every_set
def test_nothing_but_the_exponents_depends_on_a_power_of_two(backend):
    a = semidefinite(70, 1e4)
    values, vectors = sk.eigenbasis(a)
    for k in (-900, -301, 1, 52, 900):
        scaled_values, scaled_vectors = sk.eigenbasis(torch.ldexp(a, torch.tensor(k)))
        assert same_bits(scaled_vectors, vectors)
        assert same_bits(scaled_values, torch.ldexp(values, torch.tensor(k)))


@every_set
def test_subnormal_and_huge_matrices(backend):
    a = semidefinite(40, 10.0)
    for k in (-1060, 1020):
        scaled = torch.ldexp(torch.ldexp(a, torch.tensor(k // 2)), torch.tensor(k - k // 2))
        values, vectors = sk.eigenbasis(scaled)
        back = torch.ldexp(torch.ldexp(scaled, torch.tensor(-(k // 2))), torch.tensor(k // 2 - k))
        assert errors(back, sk.eigenbasis(back)[0], vectors)[0] < 1e-3 if k < 0 else values[0] > 0
        assert errors(back, values, vectors)[1] < 16.0 * U


@pytest.mark.parametrize("n", [40, 333])
def test_bits_do_not_depend_on_threads_or_mates(n):
    stack = torch.stack([semidefinite(n, 10.0**k, k) for k in range(4)])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = [sk.eigenbasis(a) for a in stack]
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            alone = [sk.eigenbasis(a) for a in stack]
            together = sk.eigenbasis(stack)
            for i, (values, vectors) in enumerate(expected):
                assert same_bits(alone[i], (values, vectors))
                assert same_bits((together[0][i], together[1][i]), (values, vectors))
    finally:
        torch.set_num_threads(before)


@st.composite
def spectra(draw):
    n = draw(st.integers(2, 90))
    random = generator(draw(st.integers(0, 2**31)))
    kind = draw(st.sampled_from(["uniform", "decaying", "clusters", "near", "deficient"]))
    values = torch.rand(n, generator=random, dtype=FP64) - 0.5
    if kind == "decaying":
        values = decaying(n, 10.0 ** draw(st.floats(0.0, 15.0)))
    elif kind == "clusters":
        values = (4.0 * values).ceil()
    elif kind == "near":
        values = 1.0 + values * 10.0 ** draw(st.floats(-17.0, -10.0))
    elif kind == "deficient":
        values[n // 3 :] = 0.0
    return with_eigenvalues(values, draw(st.integers(0, 2**31)))


@fuzzed(spectra())
def test_any_spectrum(a):
    assert_decomposed(a)


WRONG_ONCE = """
    import warnings, torch
    import spectral_kernels as sk
    from spectral_kernels import _C

    def found(route, wrong=0):
        _C.set_eigen_route(route)
        _C.corrupt_lapack(wrong)
        return sk.eigenbasis(a)

    x = torch.randn(50, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    a = x @ x.mT
    lapacks, own = found("lapack"), found("own")
    assert not torch.equal(own[1], lapacks[1]) and not _C.faults()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        again = found("own", wrong=1)
    assert torch.equal(again[0], lapacks[0]) and torch.equal(again[1], lapacks[1])
    assert _C.fault_counts() == {"eigh": 1}
    assert len(caught) == 1 and "LAPACK computed it again" in str(caught[0].message)
"""


def test_a_wrong_result_is_lapacks_to_repeat():
    """In a process of its own, where nobody else counts faults."""
    command = [sys.executable, "-c", textwrap.dedent(WRONG_ONCE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr


def test_a_route_has_a_name():
    with pytest.raises(ValueError, match="got 'mine'"):
        _extension.MODULE.set_eigen_route("mine")
