"""Every operator on structured input of every kind against oracles of another make.

2,000 inputs an operator, or 1,000 of those whose oracles are decompositions, and 200 runs of each
step's lists; 150,000 and 15,000 in the long run, or ORACLE_CASES of all. The seed is fixed.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import oracles
import pytest
import spectral_kernels as sk
import torch
from hypothesis import given, settings, strategies as st
from oracles import recipes, structured
from spectral_kernels import _extension
from spectral_kernels.coefficients import resolve
from support.cases import Case, new_step, next_step
from support.formats import FLOATS, FULL, state_dtype
from support.fuzzing import CAMPAIGN, instruction_set
from support.inputs import MUON
from support.layouts import Placed
from support.oracles import plain_newton_root, plain_newton_schulz
from support.rule import (
    FACTOR,
    LEAST_JITTER,
    ONE_DRAW,
    allowed_error,
    errors,
    jittered,
    rms,
    textbook_error,
    unit_roundoff,
)
from test_inverse_root import plain_eigen_root
from test_newton_schulz import noise_of as term_noise

LONG = 150_000
TRAJECTORIES = {"cases": 200, "long": 15_000}
# Any other number, for a look or for a night.
CASES = os.environ.get("ORACLE_CASES")


class Ensemble:
    """Errors in units of what the rule compares with: the larger of plain torch's and the floor."""

    def __init__(self) -> None:
        self.ratios: list[float] = []

    def add(
        self,
        actual: torch.Tensor,
        plain: torch.Tensor | Sequence[torch.Tensor],
        expected: np.ndarray | torch.Tensor,
        *,
        terms: int = 0,
        roundings: float = 1.0,
        noise: float = 0.0,
    ) -> None:
        """One draw, which may be ONE_DRAW times beyond the rule's bound by itself.

        `plain` may be several results of plain torch, whose root mean square counts.
        """
        expected = np.asarray(expected)
        floor = math.hypot(textbook_error(actual.dtype, terms, roundings), noise)
        several = [plain] if isinstance(plain, torch.Tensor) else plain
        ours = rms(errors(actual, expected))
        theirs = rms(np.concatenate([errors(x, expected) for x in several]))
        allowed = allowed_error(theirs, floor)
        assert ours <= ONE_DRAW * allowed, f"error {ours:.3g} against {theirs:.3g} of plain torch"
        self.ratios.append(FACTOR * ours / allowed)

    def assert_rule(self) -> None:
        found = rms(np.array(self.ratios))
        assert found <= FACTOR, f"the errors are {found:.2f} times those of plain torch"


def campaign(
    strategy: st.SearchStrategy[Any], *regressions: Any, cases: int = 2000, long: int = LONG
) -> Callable[[Callable[[Any, Ensemble], None]], Any]:
    """A check of one generated input becomes a test of many, on all instruction sets in turn."""

    def decorate(check: Callable[[Any, Ensemble], None]) -> Any:
        @pytest.mark.parametrize("backend", ["cpu"], indirect=True)
        @pytest.mark.parametrize("examples", [cases, pytest.param(long, marks=pytest.mark.long)])
        def test(backend: object, examples: int) -> None:
            ensemble = Ensemble()

            def example(isa: str, drawn: Any) -> None:
                with instruction_set(isa):
                    check(drawn, ensemble)

            isas = _extension.MODULE.supported_isas()
            for isa in isas:
                for drawn in regressions:
                    example(isa, drawn)
            example.__name__ = example.__qualname__ = check.__name__
            run = given(isa=st.sampled_from(isas), drawn=strategy)(example)
            settings(max_examples=int(CASES or examples), **CAMPAIGN)(run)()
            ensemble.assert_rule()

        test.__doc__ = check.__doc__
        return test

    return decorate


def made(recipe: Sequence[Any]) -> torch.Tensor:
    """The matrix of a recipe of `oracles.recipes`."""
    kind, shape, dtype, exponent, seed, layout = recipe
    x = structured(kind, *shape, seed) * 2.0**exponent
    if dtype == torch.float16:  # whose range is short of an outlier's square
        x /= x.abs().max().clamp(min=1.0)
    return Placed(x.to(dtype), layout).tensor


# No powers of two, so that roundings are others.
MULTIPLES = (1.1, 1.3, 1.7)


def noise_of(
    function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, dtype: torch.dtype
) -> float:
    """What rounding a multiple of x to a dtype makes of a float64 function, relatively.

    As scaling does, this keeps zeros zero and equal entries equal: independent errors would fill
    null spaces that no algorithm has to fill, and hide those that do. float64 input is rounded to
    float32 and the difference scaled, for roundings of its own are lost in float64.
    """
    narrow = torch.float32 if dtype == torch.float64 else dtype
    exact = x.double()
    truth = function(exact).numpy()
    moved = [errors(function((exact * c).to(narrow).double() / c), truth) for c in MULTIPLES]
    return rms(np.concatenate(moved)) * unit_roundoff(dtype) / unit_roundoff(narrow)


@campaign(recipes(FLOATS))
def test_gram(recipe, ensemble):
    x = made(recipe)
    # Large entries beside small ones leave products that no format of the result holds.
    ensemble.add(sk.gram(x), x @ x.mT, oracles.gram(x), terms=x.shape[-1], roundings=2.0)


@campaign(st.tuples(recipes(FLOATS), st.sampled_from(FULL), st.sampled_from([0.0, 0.5, 0.95, 1.0])))
def test_factors(drawn, ensemble):
    recipe, factor_dtype, beta = drawn
    x = made(recipe)
    full = torch.promote_types(factor_dtype, torch.float32)
    weight = 1.0 - beta if beta < 1.0 else 1.0
    for side in (x, x.mT):
        seed = structured("gaussian", len(side), 3, recipe[4])
        old = (seed @ seed.mT).to(full)
        new = old.clone()
        sides = (new, None) if side is x else (None, new)
        sk.kron_factors_update_(*sides, x, beta, weight=weight)
        rounded = side.to(full)
        plain = beta * old + weight * (rounded @ rounded.mT)
        expected = oracles.factor(old, rounded, beta, weight)
        ensemble.add(new, plain, expected, terms=side.shape[-1], roundings=2.0)


@campaign(st.tuples(recipes(FLOATS), st.integers(1, 40), st.integers(1, 40)))
def test_precondition(drawn, ensemble):
    recipe, p, q = drawn
    x = made(recipe)
    (m, n), dtype, seed = x.shape, x.dtype, recipe[4]
    left = structured("gaussian", p, m, seed + 1).to(dtype)
    right = structured("graded", n, q, seed + 2).to(dtype)
    expected = oracles.from_both_sides(x, left, right)
    full = state_dtype(dtype)
    plain = (left.to(full) @ x.to(full) @ right.to(full)).to(dtype)
    sizes = oracles.from_both_sides(x.abs(), left.abs(), right.abs())
    norm = float(np.linalg.norm(expected))
    lost = float(np.linalg.norm(sizes)) / norm if norm > 0.0 else 0.0
    noise = lost * unit_roundoff(full)
    ensemble.add(sk.kron_precondition(x, left, right), plain, expected, noise=noise, terms=m + n)


def check_newton_schulz(x: torch.Tensor, ensemble: Ensemble, **options: Any) -> None:
    def polynomial(y: torch.Tensor) -> torch.Tensor:
        return oracles.newton_schulz(y, MUON)

    unit = x.double() / x.double().abs().max().clamp(min=2.0**-1000)
    # Multiples of a matrix have one result, and plain torch is lucky on some of them.
    multiples = [(unit / c).to(x.dtype) for c in (1.0, *MULTIPLES)]
    plain = [plain_newton_schulz(y, MUON) for y in multiples]
    noise = noise_of(polynomial, x, x.dtype)
    if x.any():  # the terms of a row, which may cancel, are kept in full precision
        noise = math.hypot(noise, term_noise(x.to(state_dtype(x.dtype)), MUON))
    ours = sk.newton_schulz(x, **options)
    ensemble.add(ours, plain, polynomial(x), noise=noise, roundings=2.0)


@campaign(recipes(FLOATS, most=48))
def test_newton_schulz(recipe, ensemble):
    check_newton_schulz(made(recipe), ensemble, method="standard")


def recipe_of(
    kind: str, m: int, n: int, dtype: torch.dtype, *, seed: int = 0, layout: str = "contiguous"
) -> tuple[Any, ...]:
    """What `oracles.recipes` draws, written down."""
    return kind, (m, n), dtype, 0, seed, layout


# The null spaces that a Gram recursion once filled with noise, and those of its shorter side.
NULL_SPACES = [
    recipe_of(kind, m, n, dtype)
    for kind in ("equal rows", "paired rows", "zero columns", "live rows")
    for m, n in ((16, 48), (24, 96), (96, 24))
    for dtype in FLOATS
]
FULL_NULL_SPACES = [recipe for recipe in NULL_SPACES if recipe[2] in FULL]


@campaign(recipes(FLOATS, most=48), *NULL_SPACES)
def test_newton_schulz_in_the_form_that_is_chosen(recipe, ensemble):
    check_newton_schulz(made(recipe), ensemble)


@campaign(recipes(FULL, most=40), *FULL_NULL_SPACES, cases=1000)
def test_polar(recipe, ensemble):
    x = made(recipe)
    drop = max(x.shape) * torch.finfo(x.dtype).eps
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    plain = (u * (s > drop * s.max())) @ vh

    def factor(y: torch.Tensor) -> torch.Tensor:
        return oracles.polar(y, drop)

    noise = noise_of(factor, x, x.dtype)
    ensemble.add(sk.polar(x), plain, factor(x), noise=noise, roundings=8.0, terms=min(x.shape))


ROOTS = st.tuples(
    recipes(FULL, most=40),
    st.integers(1, 8),
    st.sampled_from([1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6]),
)
# The optimizers' ridge on the factors of dead neurons and the like, whose live block was wrong.
LIVE_BLOCKS = [
    (recipe_of(kind, m, n, dtype), p, 1e-6)
    for kind, m, n in (("live rows", 96, 200), ("graded", 48, 240), ("block", 48, 240))
    for dtype in FULL
    for p in (2, 4)
] + [(recipe_of("equal rows", 2, 1, torch.float32, seed=4), 6, 1e-3)]


@campaign(ROOTS, *LIVE_BLOCKS, cases=1000)
def test_inverse_root(drawn, ensemble):
    """The root, and A times it: where a ridge dominates the former, the latter shows the rest."""
    recipe, p, relative_ridge = drawn
    x = made(recipe).double()
    a = (x @ x.mT).to(recipe[2])
    root, info = sk.inverse_root(a, p, relative_ridge=relative_ridge, return_info=True)
    if not a.any():
        assert not root.any()
        return
    delta = float(info.delta)
    plain = [plain_eigen_root(a, p, delta), plain_newton_root(a, p, delta)]
    shifted = a.double() + delta * torch.eye(len(a), dtype=torch.float64)

    for weight in (torch.eye(len(a), dtype=torch.float64), a.double()):

        def of_sum(y: torch.Tensor, weight: torch.Tensor = weight) -> torch.Tensor:
            return weight @ oracles.inverse_root(y, p, 0.0)

        expected = weight @ oracles.inverse_root(a, p, delta)
        ours, *theirs = ((weight @ y.double()).to(a.dtype) for y in (root, *plain))
        worse = max(theirs, key=lambda y: rms(errors(y, expected)))
        # What cancels in the product leaves the roundings of the root's entries.
        lost = float((weight.abs() @ root.double().abs()).norm() / expected.norm())
        # Every iteration rounds A + delta I, which a null space of A feels as u / delta.
        noise = noise_of(of_sum, shifted, a.dtype)
        ensemble.add(ours, worse, expected, noise=noise, roundings=8.0 * lost)


@campaign(recipes(FULL, most=48), cases=1000)
def test_eigenbasis(recipe, ensemble):
    x = made(recipe).double()
    a = (x @ x.mT).to(recipe[2])
    values, vectors = sk.eigenbasis(a)
    plain_values, plain_vectors = torch.linalg.eigh(a)
    u, n = unit_roundoff(a.dtype), len(a)
    size = float(a.double().norm())
    assert (values.diff() <= 0.0).all()
    if not size:
        assert not values.any() and torch.equal(vectors, torch.eye(n, dtype=a.dtype))
        return

    def off(q: torch.Tensor, w: torch.Tensor) -> tuple[float, float]:
        """How far from an eigenbasis, and from orthogonal."""
        q, eye = q.double(), torch.eye(n, dtype=torch.float64)
        residual = float((a.double() @ q - q * w.double()).norm()) / size
        return residual, float((q.mT @ q - eye).norm()) / math.sqrt(n)

    floor = u * math.sqrt(n)
    ours = off(vectors, values)
    for found, theirs in zip(ours, off(plain_vectors, plain_values), strict=True):
        assert found <= ONE_DRAW * allowed_error(theirs, floor), (found, theirs)
    exact_values, exact_vectors = torch.linalg.eigh(a.double())
    assert float((values.double() - exact_values.flip(0)).norm()) <= 8.0 * floor * size
    # The space of the eigenvalues above the widest gap, whatever basis was chosen in it.
    gaps = exact_values.diff()
    if n > 1 and a.dtype == torch.float32 and gaps.max() > 1e-3 * exact_values.abs().max():
        k = int(gaps.argmax()) + 1
        top = exact_vectors[:, k:]
        found_top = vectors.double()[:, : n - k]
        distance = float((top @ top.mT - found_top @ found_top.mT).norm())
        assert distance <= 8.0 * floor * size / float(gaps.max()), distance


@campaign(recipes(FULL, most=48), cases=1000)
def test_refresh_eigenbasis(recipe, ensemble):
    """Q' is the orthonormal factor of A Q: orthogonal, and Q'^T A Q is triangular in its order."""
    x = made(recipe).double()
    a = (x @ x.mT).to(recipe[2])
    n, u = len(a), unit_roundoff(a.dtype)
    q = torch.linalg.qr(structured("gaussian", n, n, recipe[4] + 1))[0].to(a.dtype)
    values, new = sk.refresh_eigenbasis(q, a)
    floor = u * math.sqrt(n)
    wide = new.double()
    eye = torch.eye(n, dtype=torch.float64)
    plain = torch.linalg.qr(a @ q)[0].double()
    theirs = float((plain.mT @ plain - eye).norm()) / math.sqrt(n)
    ours = float((wide.mT @ wide - eye).norm()) / math.sqrt(n)
    assert ours <= ONE_DRAW * allowed_error(theirs, floor), (ours, theirs)
    size = float(a.double().norm())
    image = a.double() @ q.double()
    order = (q.double() * image).sum(0).argsort(descending=True)
    triangle = (wide.mT @ image)[order][:, order]
    assert float(triangle.tril(-1).norm()) <= 16.0 * floor * size
    assert values.shape == (n,) and bool(values.isfinite().all())


# List steps: trajectories in float64, from the formulas.

STEP_CASES = st.tuples(
    st.lists(st.tuples(st.integers(1, 24), st.integers(1, 24)), min_size=1, max_size=3),
    st.sampled_from([torch.float64, torch.float32]),
    st.integers(0, 2**20),
)


def follow(drawn: Any, op: str, step: Callable[..., None], options: dict[str, Any]) -> None:
    """Four steps of ours and of the float64 `step`, with the same gradients."""
    sizes, dtype, seed = drawn
    case = new_step(op, tuple(sizes), dtype, seed=seed, **options)
    weights = [p.double().clone() for p in case["params"]]
    states: list[dict[str, torch.Tensor]] = [{} for _ in weights]
    for t in range(1, 5):
        case = next_step(case, seed + t)
        for i, (w, grad) in enumerate(zip(weights, case["grads"], strict=True)):
            step(w, grad.double(), states[i], t, i, case.options)
        case.run("cpu")
    for w, p in zip(weights, case["params"], strict=True):
        # Five rounded operations and more in each of four steps, whose conditions are tame.
        assert rms(errors(p, w.numpy())) <= 64.0 * unit_roundoff(p.dtype), p.shape


def muon(w, grad, state, t, i, options):
    m = state.setdefault("m", torch.zeros_like(w))
    m.mul_(options["momentum"]).add_((1.0 - options["momentum"]) * grad)
    n = (1.0 - options["momentum"]) * grad + options["momentum"] * m
    update = oracles.newton_schulz(n, MUON)
    w.mul_(1.0 - 0.1 * options["weight_decay"]).sub_(0.1 * options["scales"][i] * update)


@campaign(STEP_CASES, **TRAJECTORIES)
def test_muon_trajectory(drawn, ensemble):
    options = {"restarts": [(3,)] * len(drawn[0])}
    follow(drawn, "muon_step_", muon, options)


def shampoo(w, grad, state, t, i, options):
    b1, b2 = options["beta1"], options["beta2"]
    update = state.setdefault("m", torch.zeros_like(w))
    update.mul_(b1).add_((1.0 - b1) * grad)
    update = update / (1.0 - b1**t)
    for side, g in (("left", grad), ("right", grad.mT)):
        f = state.setdefault(side, torch.zeros(len(g), len(g), dtype=torch.float64))
        f.mul_(b2).add_((1.0 - b2) * g @ g.mT)
        a = f / (1.0 - b2**t)
        delta = options["relative_ridge"] * float(a.abs().sum(-1).max())
        root = oracles.inverse_root(a.clone(), 4, delta)
        update = root @ update if side == "left" else update @ root
    w.mul_(1.0 - 0.1 * options["weight_decay"]).sub_(0.1 * update)


@campaign(STEP_CASES, **TRAJECTORIES)
def test_shampoo_trajectory(drawn, ensemble):
    follow(drawn, "shampoo_step_", shampoo, {"graft": "none", "relative_ridge": 1e-1})


# Steps in eigenbases. A basis depends on its factor's gaps, so that the bound is measured: the
# oracle once more, with a rounding of the parameter's dtype after every operation.

SIDES = {"left": 0, "right": 1}
Rounded = Callable[[torch.Tensor], torch.Tensor]


@st.composite
def basis_cases(draw: st.DrawFn) -> tuple[Any, ...]:
    """(sides, shapes, whether bases are there before the first step, dtype, seed).

    A first gradient determines the whole basis of its shorter side only: the null space of the
    other one may have any.
    """
    side = st.integers(2, 12)
    pairs = draw(st.lists(st.tuples(side, side), min_size=1, max_size=3))
    start = draw(st.sampled_from(["square", "wide", "tall", "warm"]))
    sides = {"wide": ("left",), "tall": ("right",)}.get(start, ("left", "right"))
    ordered = {
        "square": [(m, m) for m, _ in pairs],
        "wide": [(min(pair), max(pair)) for pair in pairs],
        "tall": [(max(pair), min(pair)) for pair in pairs],
    }
    dtype = draw(st.sampled_from(FULL))
    return sides, ordered.get(start, pairs), start == "warm", dtype, draw(st.integers(0, 2**20))


def descending_basis(a: torch.Tensor) -> torch.Tensor:
    return torch.linalg.eigh(a)[1].flip(1)


def warmed(case: Case, seed: int) -> None:
    """Factors of Gaussians that are long enough to keep eigenvalues apart, and their bases."""
    for side in SIDES:
        for i, (f, q) in enumerate(zip(case[side + "s"], case[side + "_bases"], strict=True)):
            g = structured("gaussian", len(f), 2 * len(f), seed + 10 * i + SIDES[side])
            f.copy_(0.1 * g @ g.mT)
            q.copy_(descending_basis(f.double()))


def rounding_of(u: float, seed: int) -> Rounded:
    seeds = itertools.count(seed)
    return lambda x: jittered(x, u, next(seeds)) if u else x


def rotated(x: torch.Tensor, bases: dict[str, torch.Tensor]) -> torch.Tensor:
    """Q_L^T X Q_R; the identity stands for a basis that is not there."""
    x = bases["left"].mT @ x if "left" in bases else x
    return x @ bases["right"] if "right" in bases else x


def rotated_back(x: torch.Tensor, bases: dict[str, torch.Tensor]) -> torch.Tensor:
    return rotated(x, {side: q.mT for side, q in bases.items()})


def gather(state: dict[str, Any], g: torch.Tensor, beta: float, rounded: Rounded) -> None:
    """F <- beta F + (1 - beta) G G^T of every side."""
    for side in state["factors"]:
        x = rounded(g if side == "left" else g.mT)
        added = (1.0 - beta) * x @ x.mT
        state["factors"][side] = rounded_symmetric(beta * state["factors"][side] + added, rounded)


def blurred(f: torch.Tensor, rounded: Rounded) -> torch.Tensor:
    """f with the backward error of LAPACK and of products, sqrt(n) u ||f||, not f's elements'."""
    size = torch.full_like(f, float(f.norm()) * math.sqrt(3.0 / len(f)))
    return f + (rounded(size) - size)  # uniform errors have a third of their bound's square


def rounded_symmetric(f: torch.Tensor, rounded: Rounded) -> torch.Tensor:
    f = rounded(f)
    return f.tril() + f.tril(-1).mT


def refresh(state: dict[str, Any], rounded: Rounded) -> None:
    """QR of A Q, its columns in descending order of diag(Q^T A Q) and put back in their places."""
    new = {}
    for side, q in state["bases"].items():
        image = blurred(state["factors"][side], rounded) @ q
        order = (q * image).sum(0).argsort(descending=True)
        columns, triangle = torch.linalg.qr(image[:, order])
        new[side] = torch.empty_like(q)
        new[side][:, order] = columns * triangle.diagonal().sign()
        new[side] = rounded(new[side])
    state["m"] = rounded(rotated(rotated_back(state["m"], state["bases"]), new))
    state["bases"] = new


def begin(state: dict[str, Any], g: torch.Tensor, beta: float, rounded: Rounded) -> bool:
    """The factors and bases of a first gradient; whether they were not there."""
    first = bool(state["factors"]) and not state["bases"]
    if first:
        gather(state, g, beta, rounded)
        factors = state["factors"].items()
        state["bases"] = {
            side: rounded(descending_basis(blurred(f, rounded))) for side, f in factors
        }
    return first


def soap(w, g, state, scale, options, rounded):
    b1, b2, b = (options[name] for name in ("beta1", "beta2", "shampoo_beta"))
    if begin(state, g, b, rounded):
        return
    state["t"] += 1
    g_rotated = rounded(rotated(rounded(g), state["bases"]))
    state["m"] = rounded(b1 * state["m"] + (1.0 - b1) * g_rotated)
    state["v"] = rounded(b2 * state["v"] + (1.0 - b2) * g_rotated**2)
    c = math.sqrt(1.0 - b2 ** state["t"]) / (1.0 - b1 ** state["t"])
    update = rounded(c * state["m"] / (state["v"].sqrt() + options["eps"]))
    update = rounded(rotated_back(update, state["bases"]))
    w.copy_(rounded((1.0 - 0.1 * options["weight_decay"]) * (w - 0.1 * update)))
    gather(state, g, b, rounded)
    refresh(state, rounded)


def deva(w, g, state, scale, options, rounded):
    b1, b2, b = (options[name] for name in ("beta1", "beta2", "shampoo_beta"))
    first = begin(state, g, b, rounded)
    state["t"] += 1
    g_rotated = rounded(rotated(rounded(g), state["bases"]))
    state["m"] = rounded(b1 * state["m"] + (1.0 - b1) * g_rotated)
    mhat = state["m"] / (1.0 - b1 ** state["t"])
    energy = rounded(torch.outer(mhat.norm(dim=1), mhat.norm(dim=0)))
    state["v"] = rounded(b2 * state["v"] + (1.0 - b2) * energy)
    vhat = state["v"] / (1.0 - b2 ** state["t"])
    gamma = rounded((energy / (vhat + options["eps"] * vhat.mean())).sqrt())
    nesterov = rounded(b1 * state["m"] + (1.0 - b1) * g_rotated)
    direction = oracles.newton_schulz(nesterov, options["rows"], schatten=8)
    update = rounded(scale * gamma * rounded(direction))
    update = rounded(rotated_back(update, state["bases"]))
    w.copy_(rounded((1.0 - 0.1 * options["weight_decay"]) * w - 0.1 * update))
    if not first:
        gather(state, g, b, rounded)
        refresh(state, rounded)


def state_of(case: Case, i: int, sides: Sequence[str], warm: bool) -> dict[str, Any]:
    """Zero moments, and the case's factors and bases in float64."""
    w = case["params"][i].double().clone()
    factors = {side: case[side + "s"][i].double().clone() for side in sides}
    bases = {side: case[side + "_bases"][i].double().clone() for side in sides if warm}
    moments = {"m": torch.zeros_like(w), "v": torch.zeros_like(w), "t": 0}
    return {"w": w, "factors": factors, "bases": bases, **moments}


def follow_in_bases(
    drawn: Any, ensemble: Ensemble, op: str, step: Callable[..., None], **options: Any
) -> None:
    """Four calls of ours and of the float64 `step`, and the latter with roundings."""
    sides, sizes, warm, dtype, seed = drawn
    case = new_step(op, tuple(sizes), dtype, seed=seed, sides=sides, **options)
    if warm:
        warmed(case, seed)
    u = unit_roundoff(dtype)
    made_error = max(u, LEAST_JITTER)
    roundings = [rounding_of(0.0, 0), *(rounding_of(made_error, 1000 * k) for k in (1, 2, 3))]
    runs = [[state_of(case, i, sides, warm) for i in range(len(sizes))] for _ in roundings]
    scales = case.options.get("scales", [1.0] * len(sizes))
    for t in range(1, 5):
        case = next_step(case, seed + t)
        for states, rounded in zip(runs, roundings, strict=True):
            for state, grad, scale in zip(states, case["grads"], scales, strict=True):
                step(state["w"], grad.double(), state, scale, case.options, rounded)
        case.run("cpu")
    for p, truth, *others in zip(case["params"], *runs, strict=True):
        w = truth["w"]
        moved = np.concatenate([errors(other["w"], w) for other in others])
        noise = rms(moved) * u / made_error
        # No plain torch here: the truth is its own, and the roundings alone are allowed for.
        ensemble.add(p, w, w.numpy(), noise=noise, roundings=4.0)


# With so large an eps no update is the sign of an element that is nearly zero.
@campaign(basis_cases(), **TRAJECTORIES)
def test_soap_trajectory(drawn, ensemble):
    follow_in_bases(drawn, ensemble, "soap_step_", soap, eps=0.1)


@campaign(basis_cases(), **TRAJECTORIES)
def test_deva_trajectory(drawn, ensemble):
    follow_in_bases(drawn, ensemble, "deva_step_", deva)


def test_oracles_of_coefficient_sets_are_on_the_resolved_rows():
    """A Gaussian through every coefficient set, by singular values, beside ours in float64."""
    x = structured("gaussian", 12, 31, 0)
    for name in ("muon", "quintic", "polar_express_8", "deepseekv4"):
        rows = resolve(name)
        found = sk.newton_schulz(x, coefficients=name)
        expected = oracles.newton_schulz(x, rows.rows, rows.norm_factor)
        assert rms(errors(found, expected.numpy())) < 1e-11
