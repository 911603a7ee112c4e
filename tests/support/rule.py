"""Errors against float64, and the accuracy rule that they obey."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from .formats import state_dtype
from .inputs import generator


def unit_roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2.0


def exact(x: Tensor) -> np.ndarray:
    """x in the format that its errors are measured in: float64, and long double for float64."""
    return x.double().numpy().astype(np.longdouble if x.dtype == torch.float64 else np.float64)


def errors(actual: Tensor, expected: np.ndarray | Tensor) -> np.ndarray:
    """The relative Frobenius error of every matrix of a batch, or of a vector.

    Infinite where the truth is zero and the result is not, or where the result is not a number.
    """
    if isinstance(expected, Tensor):
        expected = exact(expected)
    expected = np.atleast_2d(expected)
    difference = actual.double().numpy().astype(expected.dtype) - expected
    distance = np.sqrt((difference**2).sum((-2, -1)))
    norm = np.sqrt((expected**2).sum((-2, -1)))
    relative = np.where(
        norm > 0, distance / np.where(norm > 0, norm, 1), np.where(distance > 0, np.inf, 0)
    )
    return np.atleast_1d(np.where(np.isnan(relative), np.inf, relative)).ravel()


def error(actual: Tensor, expected: np.ndarray | Tensor) -> float:
    """The largest relative Frobenius error among the matrices of a batch, or that of a vector."""
    return float(errors(actual, expected).max(initial=0.0))


# The factor of the accuracy rule, and how far beyond it one draw of an ensemble may be.
FACTOR = 2.0
ONE_DRAW = 3.0


def draws(*shape: int) -> int:
    """How many matrices of a shape an ensemble needs for `assert_rule` to be no lottery.

    Of N entries in D draws with independent Gaussian errors the logarithm of the root mean square
    has the standard deviation 1 / sqrt(2 N D), and that of the ratio of two of them 1 / sqrt(N D).
    With N D >= 64 this is 1/8, and a factor of 2 is log(2) * 8 = 5.5 of them away: results as good
    as plain torch's raise a false alarm once in 5e7 ensembles. Four draws at least, for entries of
    one matrix share what the rounding of its norm does to all of them; one where the matrix is
    large enough for its entries to be an ensemble by themselves.
    """
    entries = math.prod(shape)
    return 1 if entries >= 10_000 else max(4, -(-64 // entries))


def textbook_error(dtype: torch.dtype, terms: int = 0, roundings: float = 1.0) -> float:
    """The relative error of the plainest algorithm, which no correct result need be better than.

    `roundings` of the result, and those of one sum of `terms` products, one after another in the
    precision that sums are kept in. The partial sum after j of k terms is about j / k of the whole
    and is rounded with an error of root mean square 0.41 u (uniform in an ulp, whose relative size
    is between u and 2 u), so the sum has an error of 0.41 u sqrt(sum_j (j / k)^2) = 0.24 sqrt(k) u.
    Whoever sums in several lanes, or in a wider format, is better by luck of the machine.
    """
    wide = unit_roundoff(state_dtype(dtype))
    return math.hypot(roundings * unit_roundoff(dtype), 0.24 * math.sqrt(terms) * wide)


def allowed_error(theirs: float, floor: float) -> float:
    """The accuracy rule's bound on a root mean square: twice that of plain torch's errors.

    Plain torch may be exact by luck (an integer, a 1 x 1 matrix, a sum in eight lanes), so the
    error that any algorithm may make is added to it as independent errors add: in squares.
    """
    return FACTOR * math.hypot(theirs, floor)


def jittered(x: Tensor, u: float, seed: int) -> Tensor:
    """x in float64 with a relative error in -u .. u in every entry."""
    noise = torch.rand(x.shape, generator=generator(seed), dtype=torch.float64) * 2.0 - 1.0
    return x.double() * (1.0 + u * noise)


# Roundings finer than this are lost in float64, so that larger ones are made and scaled.
LEAST_JITTER = 2.0**-36


def input_noise(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    dtype: torch.dtype,
    seeds: Sequence[int] = (1, 2),
) -> float:
    """What one rounding of every entry of x in a dtype makes of a float64 function, relatively."""
    u = unit_roundoff(state_dtype(dtype))
    made = max(u, LEAST_JITTER)
    truth = function(x.double())
    moved = [errors(function(jittered(x, made, seed)), truth.numpy()) for seed in seeds]
    return rms(np.concatenate(moved)) * u / made


def assert_rule(
    actual: Tensor | Sequence[Tensor],
    plain: Tensor | Sequence[Tensor],
    expected: np.ndarray | Tensor,
    *,
    terms: int = 0,
    roundings: float = 1.0,
    noise: float = 0.0,
) -> None:
    """The accuracy rule: at most twice the error of plain torch in the same storage dtype.

    A rule of ensembles: the matrices of a batch are draws of one distribution, `draws` says how
    many there should be, and root mean squares over them are compared, since any single one may be
    lucky on one machine. No draw may be both ONE_DRAW times beyond the bound and beyond twice the
    worst of plain torch's. `actual` and `plain` may hold several computations of one thing, such as
    that of multiples of the input where scale does not matter; they are draws as well.

    `terms` and `roundings` are those of `textbook_error`; `noise` is what an error that no
    algorithm can avoid makes of the result (a rounding of the input, cancellation).

    A result whose error is three times the larger of plain torch's and the textbook's is always
    refused: 3 > 2 sqrt(1 + 1).
    """
    several = [[x] if isinstance(x, Tensor) else list(x) for x in (actual, plain)]
    ours, theirs = (np.concatenate([errors(x, expected) for x in xs]) for xs in several)
    dtype = several[0][0].dtype
    floor = math.hypot(textbook_error(dtype, terms, roundings), noise)
    allowed = allowed_error(rms(theirs), floor)
    assert np.isfinite(ours).all() and rms(ours) <= allowed, (
        f"error {rms(ours):.3g} against {rms(theirs):.3g} of plain torch, {allowed:.3g} allowed"
    )
    worst, limit = float(ours.max(initial=0.0)), 2.0 * float(theirs.max(initial=0.0))
    # The worst of many draws lies further out.
    furthest = ONE_DRAW * max(1.0, (ours.size / 64) ** 0.25)
    assert worst <= max(furthest * allowed, limit), (
        f"one draw has the error {worst:.3g} where all of plain torch's have {rms(theirs):.3g}"
    )


def rms(values: np.ndarray) -> float:
    """The root mean square; 0 of nothing."""
    values = np.asarray(values, dtype=np.float64)
    return float(np.sqrt((values**2).mean())) if values.size else 0.0


def orthogonality(q: Tensor) -> float:
    """max |Q^T Q - I|."""
    q = q.double()
    return float((q.mT @ q - torch.eye(q.shape[-1], dtype=torch.float64)).abs().max())
