"""inverse_root on factors with dead, block, graded or deficient structure, judged block by block.

Where a factor's spectrum goes down to the ridge, its root is dominated by what lies there, and an
error of the whole matrix says nothing about the live block.
"""

from __future__ import annotations

import functools
import importlib
from typing import NamedTuple

import numpy as np
import pytest
import spectral_kernels as sk
import torch
from support.cases import new_step
from support.inputs import orthogonal, semidefinite
from support.oracles import exact_inverse_root, plain_newton_root
from support.rule import unit_roundoff
from torch import Tensor

pytestmark = pytest.mark.usefixtures("backend")

# The package's attribute of this name is the operator.
specification = importlib.import_module("spectral_kernels.reference.inverse_root")

CONVERGED, FELL_BACK = 0, 2
RIDGE = 1e-6  # the optimizers' default, relative
N, DRAWS = 48, 4


class Structured(NamedTuple):
    """A factor, its blocks in the basis of the columns of Q."""

    a: Tensor
    blocks: tuple[Tensor, ...]
    basis: Tensor | None = None


def gram(rows: int, seed: int, columns: int | None = None) -> Tensor:
    g = torch.randn(
        rows,
        columns or 5 * rows,
        generator=torch.Generator().manual_seed(seed),
        dtype=torch.float64,
    )
    return g @ g.mT


def embedded(n: int, parts: list[tuple[Tensor, Tensor]]) -> Structured:
    a = torch.zeros(n, n, dtype=torch.float64)
    for at, block in parts:
        a[at[:, None], at] = block
    return Structured(a, tuple(at for at, _ in parts))


def live_rows(n: int, live: int, seed: int) -> Structured:
    at = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:live].sort()[0]
    return embedded(n, [(at, gram(live, seed))])


def scaled_blocks(n: int, scales: tuple[float, ...], seed: int) -> Structured:
    parts = torch.arange(n).chunk(len(scales))
    return embedded(
        n,
        [
            (at, s * gram(len(at), seed + i))
            for i, (at, s) in enumerate(zip(parts, scales, strict=True))
        ],
    )


def rotated(n: int, live: int, seed: int) -> Structured:
    """The dead rows of a random basis; in the entries nothing shows them."""
    found = live_rows(n, live, seed)
    q = orthogonal(n, seed)
    return found._replace(a=q @ found.a @ q.mT, basis=q)


def graded(n: int, seed: int) -> Structured:
    scales = 2.0 ** -torch.arange(n, dtype=torch.float64)
    a = scales[:, None] * gram(n, seed) * scales
    return Structured(a, tuple(torch.arange(i, i + 4) for i in (0, 4, 8)))


def diagonal(n: int, seed: int) -> Structured:
    u = torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Structured(torch.diag(10.0 ** (-8.0 * u)), tuple(torch.arange(n)[:, None]))


def whole(a: Tensor) -> Structured:
    return Structured(a, (torch.arange(len(a)),))


STRUCTURES = {
    "full": lambda n, seed: whole(gram(n, seed)),
    "10 of 24 live": lambda n, seed: live_rows(n, 10 * n // 24, seed),
    "1 of 10 live": lambda n, seed: live_rows(n, max(n // 10, 1), seed),
    "one-hot": lambda n, seed: live_rows(n, 1, seed),
    "zero block": lambda n, seed: embedded(n, [(torch.arange(n // 2), gram(n // 2, seed))]),
    "blocks 1, 1e-3": lambda n, seed: scaled_blocks(n, (1.0, 1e-3), seed),
    "blocks 1, 1e-3, 1e-6": lambda n, seed: scaled_blocks(n, (1.0, 1e-3, 1e-6), seed),
    "dead in a random basis": lambda n, seed: rotated(n, 10 * n // 24, seed),
    "graded": graded,
    "diagonal": diagonal,
    "rank n / 4": lambda n, seed: whole(gram(n, seed, n // 4)),
    "condition 1e2": lambda n, seed: whole(semidefinite(n, 1e2, seed)),
    "condition 1e4": lambda n, seed: whole(semidefinite(n, 1e4, seed)),
    "condition 1e6": lambda n, seed: whole(semidefinite(n, 1e6, seed)),
    "condition 1e9": lambda n, seed: whole(semidefinite(n, 1e9, seed)),
}


def errors(root: Tensor, expected: np.ndarray, found: Structured) -> list[float]:
    """The relative error of the whole and of every block."""
    ours, truth = root.double(), torch.from_numpy(np.asarray(expected, dtype=np.float64))
    whole_error = float((ours - truth).norm() / truth.norm())
    if found.basis is not None:
        ours, truth = (found.basis.mT @ x @ found.basis for x in (ours, truth))
    blocks = [(x[at[:, None], at] for x in (ours, truth)) for at in found.blocks]
    return [whole_error, *(float((x - y).norm() / y.norm()) for x, y in blocks)]


def rms(samples: list[list[float]]) -> np.ndarray:
    return np.sqrt((np.array(samples) ** 2).mean(0))


def plain_eigen_root(a: Tensor, p: int, delta: float) -> Tensor:
    try:
        values, vectors = torch.linalg.eigh(a)
    except torch.linalg.LinAlgError:  # of many equal eigenvalues, from some order on
        return torch.full_like(a, torch.nan)
    return (vectors * (values.clamp(min=0.0) + delta) ** (-1.0 / p)) @ vectors.mT


@functools.cache
def problem(
    kind: str, p: int, n: int = N, count: int = DRAWS
) -> tuple[list[Structured], list[np.ndarray], np.ndarray]:
    """Draws of a structure, their roots, and the larger of plain torch's errors by both routes, of
    those that have a result."""
    draws = [STRUCTURES[kind](n, seed) for seed in range(count)]
    draws = [x._replace(a=(0.5 * (x.a + x.a.mT) / x.a.abs().max()).float()) for x in draws]
    deltas = [RIDGE * float(x.a.abs().sum(-1).max()) for x in draws]
    expected = [exact_inverse_root(x.a, p, d) for x, d in zip(draws, deltas, strict=True)]
    plain = [
        rms(
            [
                errors(route(x.a, p, d), y, x)
                for x, y, d in zip(draws, expected, deltas, strict=True)
            ]
        )
        for route in (plain_eigen_root, plain_newton_root)
    ]
    return draws, expected, np.fmax(*plain)


@pytest.mark.parametrize("p", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("kind", STRUCTURES)
def test_every_block_keeps_the_error_rule(kind, p):
    """Root mean squares over draws: a single one of plain torch's may be lucky."""
    _check_every_block(p, *problem(kind, p))


@pytest.mark.parametrize("p", [1, 2, 4])  # of 1 it is the usual way
@pytest.mark.parametrize("kind", STRUCTURES)
def test_every_block_keeps_the_error_rule_where_inverses_are_summed(kind, p, backend):
    """Of an order from which the CPU takes another way."""
    if not backend.name.startswith("cpu"):
        pytest.skip("one way for every order")
    _check_every_block(p, *problem(kind, p, 112, 2))


def _check_every_block(
    p: int, draws: list[Structured], expected: list[np.ndarray], plain: np.ndarray
) -> None:
    root, info = sk.inverse_root(
        torch.stack([x.a for x in draws]), p, relative_ridge=RIDGE, return_info=True
    )
    assert ((info.status == CONVERGED) | (info.status == FELL_BACK)).all()
    ours = rms([errors(x, y, draw) for x, y, draw in zip(root, expected, draws, strict=True)])
    # A one-row block is a number that plain torch may well hit.
    allowed = 2.0 * plain + 4.0 * unit_roundoff(torch.float32)
    if draws[0].basis is not None:
        # The dead directions' root is up to l0^(-1/p) times the live one's, and its rounding errors
        # are everywhere in the entries. Products of one triangle, mirrored, spread them further
        # than whole products do. The error rule, of the whole matrix, stays at two.
        allowed[1:] *= 2.0
    assert (ours <= allowed).all(), f"errors {ours} against {plain} of plain torch"


@pytest.mark.parametrize("p", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", ["10 of 24 live", "blocks 1, 1e-3", "one-hot"])
def test_blocks_in_float64(kind, p):
    """A root of blocks is the root of every block, to rounding in its condition."""
    n, u = 24, unit_roundoff(torch.float64)
    for seed in range(2):
        found = STRUCTURES[kind](n, seed)
        root, info = sk.inverse_root(found.a, p, relative_ridge=RIDGE, return_info=True)
        assert int(info.status) == CONVERGED
        for at in found.blocks:
            block = found.a[at[:, None], at]
            values = torch.linalg.eigvalsh(block) + float(info.delta)
            truth = torch.from_numpy(exact_inverse_root(block, p, float(info.delta)).astype(float))
            bound = 64.0 * u * (64.0 + float(values[-1] / values[0]))
            ours = root[at[:, None], at]
            assert float((ours - truth).norm() / truth.norm()) <= bound


@pytest.mark.parametrize("method", ["newton", "iteration"])
@pytest.mark.parametrize("p", [1, 2, 4, 8])
def test_a_residual_sees_a_wrong_live_block(p, method):
    """Behind the rounding errors of dead directions one of 1 % in a live block is no residual."""
    found = live_rows(N, 20, 0)
    m = (found.a / found.a.norm()).float() + 1e-6 * torch.eye(N)
    omega = specification.sign_matrix(m)
    limits = specification._Limits.of(torch.float32, 1e-6, p, ridged=True)
    x, _, _ = specification._attempt(m, p, method, 1e-6, limits)
    assert specification._weighted_residual(x, m, omega, p) <= 0.25 * limits.weighted
    wrong = x.clone()
    live = found.blocks[0]
    wrong[live[:, None], live] *= 1.01
    assert specification._residual(wrong, m, omega, p) <= limits.plain
    seen = specification._weighted_residual(wrong, m, omega, p)
    # The inverse itself of so long a spectrum leaves more than that to rounding.
    assert seen > limits.weighted or p == 1


@pytest.mark.parametrize("options", [{"root": 4}, {"root": 2}, {"kl": True, "root": 2}], ids=str)
def test_roots_of_dead_neurons_along_a_run(options, backend):
    """Roots of steps in float32 against those of a run in float64, the live block alone."""
    single = new_step("shampoo_step_", ((24, 60), (60, 24)), relative_ridge=RIDGE, **options)
    exact = single.to(torch.float64)
    live = torch.arange(3, 13)
    for step in range(4):
        grads = [torch.zeros_like(p) for p in single["params"]]
        generator = torch.Generator().manual_seed(step)
        grads[0][live] = torch.randn(len(live), 60, generator=generator)
        grads[1][:, live] = torch.randn(60, len(live), generator=generator)
        single = single.with_(grads=grads)
        single.run(backend.name)
        exact = exact.with_(grads=[g.double() for g in grads]).run_reference()
        for name, i in (("left_roots", 0), ("right_roots", 1)):
            ours, truth = (x[name][i][live[:, None], live].double() for x in (single, exact))
            assert float((ours - truth).norm() / truth.norm()) < 4e-6, (step, name)
        assert not any(x.any() for x in single["root_failures"])
