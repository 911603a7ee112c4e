"""Relations between results on related inputs, which hold whatever the right result is.

500 inputs a relation in the long run and a part of them otherwise; the seed is fixed.
"""

from __future__ import annotations

import functools
import math
import os
from typing import Any

import spectral_kernels as sk
import torch
from hypothesis import strategies as st
from oracles import structured
from support.cases import STEPS, later_step, new_step
from support.formats import FULL
from support.fuzzing import CAMPAIGN, fuzzed
from support.inputs import generator, orthogonal
from support.layouts import same_bits
from support.rule import FACTOR, errors, input_noise, rms, textbook_error, unit_roundoff

# Another number, for a look or for a night.
CASES = os.environ.get("ORACLE_CASES")
BITWISE_KINDS = ("gaussian", "dead", "one hot", "block", "graded", "outlier", "low rank")
TAME = ("gaussian", "clustered", "nearly orthogonal")


related = functools.partial(fuzzed, cases=int(CASES or 60), long=int(CASES or 500), **CAMPAIGN)


side = st.integers(1, 40)
seeds = st.integers(0, 2**31)


def matrices(kinds: tuple[str, ...]) -> st.SearchStrategy[torch.Tensor]:
    return st.builds(
        lambda kind, m, n, dtype, seed: structured(kind, m, n, seed).to(dtype),
        st.sampled_from(kinds),
        side,
        side,
        st.sampled_from(FULL),
        seeds,
    )


def factor_of(x: torch.Tensor) -> torch.Tensor:
    a = x.double() @ x.double().mT + 0.1 * torch.eye(len(x), dtype=torch.float64)
    return ((a + a.mT) / 2).to(x.dtype)


def permuted(n: int, seed: int) -> torch.Tensor:
    return torch.randperm(n, generator=generator(seed))


def assert_close(
    found: torch.Tensor, expected: torch.Tensor, noise: float, terms: int, roundings: float = 4.0
) -> None:
    """Both sides err like a correct result: twice the plainest one's error, for each of them."""
    floor = math.hypot(textbook_error(found.dtype, terms, roundings), noise)
    error = rms(errors(found, expected.double().numpy()))
    assert error <= 3.0 * FACTOR * math.sqrt(2.0) * floor, (error, floor)


# Powers of two and signs: the same bits.


@related(st.tuples(matrices(BITWISE_KINDS), st.integers(-20, 20)))
def test_power_of_two(drawn):
    x, k = drawn
    c = 2.0**k
    assert same_bits(sk.newton_schulz(c * x), sk.newton_schulz(x))
    assert same_bits(sk.gram(c * x), c * c * sk.gram(x))
    assert same_bits(sk.polar(c * x), sk.polar(x))
    a = factor_of(x)
    values, vectors = sk.eigenbasis(a)
    scaled_values, scaled_vectors = sk.eigenbasis(c * a)
    assert rms(errors(scaled_vectors, vectors)) < 1e-3
    assert rms(errors(scaled_values[None], c * values[None])) < 64.0 * unit_roundoff(a.dtype)
    # c^(-1/4) is a power of two, too, and nothing is lost.
    root = sk.inverse_root(a, 4, relative_ridge=1e-3)
    scaled = sk.inverse_root(16.0**k * a, 4, relative_ridge=1e-3) if abs(k) < 8 else root * 2.0**-k
    assert same_bits(scaled * 2.0**k, root)


@related(matrices(BITWISE_KINDS))
def test_negation(x):
    assert same_bits(sk.newton_schulz(-x) + 0.0, -sk.newton_schulz(x) + 0.0)
    assert same_bits(sk.gram(-x), sk.gram(x))
    left = structured("gaussian", 7, len(x), 1).to(x.dtype)
    negative = sk.kron_precondition(-x, left, None)
    assert same_bits(negative + 0.0, -sk.kron_precondition(x, left, None) + 0.0)


# Transposition, rotation, permutation, union: the same but for roundings.


def newton_noise(x: torch.Tensor) -> float:
    from test_newton_schulz import noise_of

    return noise_of(x, sk.coefficients.resolve("muon").rows) if x.any() else 0.0


@related(matrices(TAME))
def test_transposition(x):
    noise = newton_noise(x)
    assert_close(sk.newton_schulz(x.mT).mT, sk.newton_schulz(x), noise, max(x.shape))
    left, right = (torch.zeros(n, n, dtype=x.dtype) for n in x.shape)
    sk.kron_factors_update_(left, right, x, 0.5)
    left_2, right_2 = torch.zeros_like(right), torch.zeros_like(left)
    sk.kron_factors_update_(left_2, right_2, x.mT, 0.5)
    assert_close(left_2, right, 0.0, len(x))
    assert_close(right_2, left, 0.0, x.shape[1])


@related(st.tuples(matrices(TAME), seeds))
def test_permutation(drawn):
    x, seed = drawn
    p, q = permuted(len(x), seed), permuted(x.shape[1], seed + 1)
    noise = newton_noise(x)
    assert_close(sk.newton_schulz(x[p][:, q]), sk.newton_schulz(x)[p][:, q], noise, max(x.shape))
    assert_close(sk.gram(x[p][:, q]), sk.gram(x)[p][:, p], 0.0, x.shape[1])
    a = factor_of(x)
    root = sk.inverse_root(a, 4, relative_ridge=1e-2)
    noise = 100.0 * unit_roundoff(a.dtype)
    assert_close(sk.inverse_root(a[p][:, p], 4, relative_ridge=1e-2), root[p][:, p], noise, len(a))
    values, _ = sk.eigenbasis(a)
    again, _ = sk.eigenbasis(a[p][:, p])
    assert_close(again[None], values[None], 0.0, len(a))


@related(st.tuples(matrices(TAME), seeds))
def test_rotation(drawn):
    """f(U X V^T) = U f(X) V^T; the rotated input is rounded, which `input_noise` measures."""
    x, seed = drawn
    u, v = orthogonal(len(x), seed), orthogonal(x.shape[1], seed + 1)
    turned = (u @ x.double() @ v.mT).to(x.dtype)
    expected = u @ sk.newton_schulz(x).double() @ v.mT
    noise = math.hypot(newton_noise(x), _input_noise(x))
    assert_close(sk.newton_schulz(turned), expected, noise, max(x.shape))
    a = factor_of(x)
    b = u @ a.double() @ u.mT
    b = ((b + b.mT) / 2).to(a.dtype)
    expected = u @ sk.inverse_root(a.double(), 2, ridge=0.05 * float(a.norm())).double() @ u.mT
    found = sk.inverse_root(b, 2, ridge=0.05 * float(a.norm()))
    assert_close(found, expected, 20.0 * unit_roundoff(a.dtype), len(a))


def _input_noise(x: torch.Tensor) -> float:
    import oracles

    rows = sk.coefficients.resolve("muon").rows
    return input_noise(lambda y: oracles.newton_schulz(y, rows), x, x.dtype)


@related(st.tuples(matrices(TAME), seeds))
def test_block_diagonal_union(drawn):
    """A root of a union is the union of the roots, at one and the same absolute ridge."""
    x, seed = drawn
    a = factor_of(x)
    other = factor_of(structured("gaussian", 1 + seed % 20, 9, seed).to(x.dtype))
    ridge = 0.05 * float(max(a.norm(), other.norm()))
    joint = torch.block_diag(a, other)
    each = [sk.inverse_root(part, 4, ridge=ridge) for part in (a, other)]
    found = sk.inverse_root(joint, 4, ridge=ridge)
    assert_close(found, torch.block_diag(*each), 20.0 * unit_roundoff(a.dtype), len(joint))
    values, _ = sk.eigenbasis(joint)
    parts = torch.cat([sk.eigenbasis(part)[0] for part in (a, other)])
    assert_close(values[None], parts.sort(descending=True).values[None], 0.0, len(joint))
    assert_close(
        sk.gram(torch.block_diag(x, other)),
        torch.block_diag(sk.gram(x), sk.gram(other)),
        0.0,
        x.shape[1],
    )


# Order and company: the same bits.


@related(st.tuples(st.integers(1, 24), st.integers(1, 24), st.sampled_from(FULL), seeds))
def test_order_of_a_batch(drawn):
    m, n, dtype, seed = drawn
    x = torch.stack([structured("gaussian", m, n, seed + i) for i in range(4)]).to(dtype)
    order = permuted(4, seed)
    assert same_bits(sk.newton_schulz(x[order]), sk.newton_schulz(x)[order])
    assert same_bits(sk.gram(x[order]), sk.gram(x)[order])
    assert same_bits(sk.polar(x[order]), sk.polar(x)[order])
    a = torch.stack([factor_of(matrix) for matrix in x])
    root = sk.inverse_root(a, 4, relative_ridge=1e-3)
    assert same_bits(sk.inverse_root(a[order], 4, relative_ridge=1e-3), root[order])
    assert same_bits(sk.eigenbasis(a[order])[1], sk.eigenbasis(a)[1][order])


_PER_ENTRY = ("scales", "refresh", "restarts")


def _entries(case: Any, chosen: list[int]) -> Any:
    """The step of some entries of a list."""
    lists = {
        name: [case[name][i] for i in chosen]
        for name in ("grads", *case.names(write=True))
        if name != "skipped"
    }
    options = {n: [case.options[n][i] for i in chosen] for n in _PER_ENTRY if n in case.options}
    return case.with_(**lists, **options)


lists = st.tuples(
    st.sampled_from(STEPS),
    st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=2, max_size=4),
    st.sampled_from(FULL),
    st.integers(0, 2**20),
)


@related(lists, cases=40)
def test_order_and_splitting_of_a_list(drawn):
    op, sizes, dtype, seed = drawn
    if op in ("soap_step_", "deva_step_"):
        case = later_step(op, tuple(sizes), dtype, taken=1, seed=seed)
    else:
        case = new_step(op, tuple(sizes), dtype, seed=seed)
    count = len(sizes)
    together = case.clone()
    together.run("cpu")
    order = permuted(count, seed).tolist()
    for part in (order, list(range(count // 2)), list(range(count // 2, count))):
        some = _entries(case.clone(), part)
        some.run("cpu")
        for name in case.names(write=True):
            if name != "skipped":
                for j, i in enumerate(part):
                    assert same_bits(some[name][j], together[name][i]), (name, i)


# Another backend: the specification.


@related(matrices(TAME))
def test_the_reference_agrees(x):
    noise = newton_noise(x)
    assert_close(sk.newton_schulz(x), sk.newton_schulz(x, backend="reference"), noise, max(x.shape))
    assert_close(sk.gram(x), sk.gram(x, backend="reference"), 0.0, x.shape[1])
    a = factor_of(x)
    noise = 100.0 * unit_roundoff(a.dtype)
    found, expected = (
        sk.inverse_root(a, 4, relative_ridge=1e-2, backend=backend)
        for backend in ("cpu", "reference")
    )
    assert_close(found, expected, noise, len(a))
    sk.call_counts(reset=True)
