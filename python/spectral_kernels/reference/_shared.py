"""What the families of the reference share: batches, exact scaling, input checks, list steps."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from spectral_kernels._backend import check_device, check_matrix
from spectral_kernels._step_checks import Backend

Index = tuple[int, ...]


# Batches and scalars.


def matrices(x: Tensor) -> Iterator[Index]:
    """The index of every matrix of a batch; `x[index]` is a view."""
    return itertools.product(*map(range, x.shape[:-2]))


def absent(x: Tensor) -> bool:
    """A size-0 tensor stands for a side or a state that is not there."""
    return x.numel() == 0


def optional(x: Tensor, index: Index) -> Tensor:
    """Matrix `index`, or the empty tensor that stands for its absence."""
    return x if absent(x) else x[index]


def finite(*tensors: Tensor) -> bool:
    """Whether every element of every tensor is finite."""
    return all(bool(x.isfinite().all()) for x in tensors)


def sign(x: Tensor) -> Tensor:
    """-1, 0 or 1; NaN stays, which torch.sign makes 0."""
    return torch.where(x.isnan(), x, x.sign())


def max_abs(x: Tensor) -> float:
    """The largest absolute value."""
    return float(x.abs().max())


def norm(x: Tensor) -> float:
    """The Frobenius norm, accumulated in float64 and safe from overflow."""
    largest = max_abs(x)
    if largest == 0.0 or not math.isfinite(largest):
        return largest
    exponent = exponent_of(largest)
    return math.ldexp(float(torch.linalg.norm(scaled(x.double(), -exponent))), exponent)


def exponent_of(value: float) -> int:
    """e with 2^e <= value < 2^(e + 1), for value > 0."""
    return math.frexp(value)[1] - 1


def scaled(x: Tensor, exponent: int) -> Tensor:
    """x * 2^exponent, exact where the result is normal; in two factors, each in range."""
    half = exponent // 2
    return x * 2.0**half * 2.0 ** (exponent - half)


def unit_roundoff(dtype: torch.dtype) -> float:
    """Half the distance from 1 to the next larger number."""
    return torch.finfo(dtype).eps / 2.0


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that a matrix is computed and its state kept in: float32 for 16-bit storage."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# Checks.


def check_square(name: str, x: Tensor) -> None:
    """A batch of square matrices in float32 or float64."""
    check_full_matrix(name, x)
    if x.shape[-1] != x.shape[-2]:
        raise ValueError(f"{name} must be square, not of shape {tuple(x.shape)}")


def check_full_matrix(name: str, x: Tensor) -> None:
    """Factors and states are batches of matrices in float32 or float64."""
    check_matrix(name, x)
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be float32 or float64, not {x.dtype}")


def check_side(name: str, x: Tensor, like: Tensor, side: int) -> None:
    """A factor over rows (side -2) or columns (-1) of a batch, or absent."""
    if absent(x):
        return
    check_square(name, x)
    expected = (*like.shape[:-2], like.shape[side], like.shape[side])
    if x.shape != expected:
        raise ValueError(
            f"{name} must have shape {expected} for a matrix of shape {tuple(like.shape)}, "
            f"not {tuple(x.shape)}"
        )
    check_device(name, x, like)


def check_root(p: int) -> None:
    """The roots that have an iteration."""
    if isinstance(p, bool) or not isinstance(p, int):
        raise TypeError(f"p must be an int, not {p!r}")
    if not 1 <= p <= 8:
        raise ValueError(f"p must be in 1..8, not {p}")


# List steps.


def raise_nonfinite(nonfinite: str, **lists: Sequence[Tensor]) -> None:
    """nonfinite="raise": before anything is written."""
    if nonfinite != "raise":
        return
    for name, tensors in lists.items():
        for i, x in enumerate(tensors):
            for index in () if absent(x) else matrices(x):
                if not finite(x[index]):
                    where = f"{name}[{i}]" + (f", matrix {index}," if index else "")
                    raise ValueError(f"{where} has a non-finite element")


REFERENCE = Backend(check_full_matrix, check_side, raise_nonfinite, distinct=False)


def outside_range(grad: Tensor) -> bool:
    """max|G| is not 0 and outside 2^-50 .. 2^50, where float32 state that goes as G^2 fails."""
    largest = max_abs(grad)
    return math.isfinite(largest) and largest != 0.0 and not 2.0**-50 <= largest <= 2.0**50


class Progress:
    """Steps and skips of the matrices of one entry, written at its end."""

    def __init__(self, step_count: Tensor, skipped: Tensor) -> None:
        self._count, self._skipped, self._updated = step_count, skipped, False

    def next_step(self, index: Index) -> float:
        """The number, from 1, of the step that matrix `index` is about to take."""
        return float(self._count[index] if self._count.ndim else self._count) + 1.0

    def skip(self) -> None:
        """Counts a matrix that kept every bit."""
        self._skipped.add_(1)

    def update(self, index: Index) -> None:
        """Advances a matrix; a count that the entry shares waits for `finish`."""
        self._updated = True
        if self._count.ndim:
            self._count[index].add_(1)

    def finish(self) -> None:
        """Advances a shared count once if any matrix was updated."""
        if self._updated and not self._count.ndim:
            self._count.add_(1)


def rounded_at_random(x: Tensor, step: float) -> Tensor:
    """float32 to bfloat16: each element to one of the two numbers around it, its mean unchanged.

    16 bits r are added to the 16 that bfloat16 lacks, and what is left of those is cut off: an
    element at the fraction f of the way goes up with probability f, to 2^-16. r is the upper half
    of h((h(h(step) + i s) + j s) xor b) mod 2^32 for row i and column j, s = 0x9e3779b9, b the 16
    bits of x that bfloat16 has, and h the finaliser "lowbias32". b does not depend on the fraction,
    so that the mean stays, and it sets apart matrices, and moments of one, that are rounded at the
    same step: without it their errors have a correlation of 1/2. Elements beyond the largest number
    of bfloat16 are cut off, as are infinities and NaN.

    Source: hash: Wellons, "Prospecting for Hash Functions" (2018); rounding: Gupta et al., arXiv
    1502.02551; of an optimizer's state: Zamirai et al., arXiv 2010.06192.
    """
    rows, cols = (torch.arange(n, dtype=torch.int64, device=x.device) for n in x.shape)
    seed = _mixed(torch.tensor(int(step) & _WORD, dtype=torch.int64, device=x.device))
    seed = _mixed((seed + rows * _STRIDE) & _WORD)
    bits = x.contiguous().view(torch.int32).to(torch.int64) & _WORD
    noise = _mixed(((seed[:, None] + cols * _STRIDE) & _WORD) ^ (bits >> 16)) >> 16
    special = (bits & 0x7FFFFFFF) >= 0x7F7F0000
    quiet = torch.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x400000, 0)
    kept = torch.where(special, bits | quiet, bits + noise) & 0xFFFF0000
    return (
        torch.where(kept >= 1 << 31, kept - (1 << 32), kept)
        .to(torch.int32)
        .view(torch.float32)
        .bfloat16()
    )


_WORD, _STRIDE = 0xFFFFFFFF, 0x9E3779B9


def _mixed(x: Tensor) -> Tensor:
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _WORD
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _WORD
    return x ^ (x >> 16)


def widened(moment: Tensor) -> Tensor:
    """What a step computes with: float32 of a moment in bfloat16."""
    return moment.float() if moment.dtype == torch.bfloat16 else moment


def store(state: Tensor, value: Tensor, step: float) -> None:
    """Writes a new state, rounded at random where it is a moment in bfloat16."""
    state.copy_(rounded_at_random(value, step) if state.dtype == torch.bfloat16 else value)


def moved(param: Tensor, update: Tensor, *, rate: float, decay: float) -> Tensor:
    """decay W - rate U in the update's dtype, rounded once to the parameter's."""
    return (decay * param.to(update.dtype) - rate * update).to(param.dtype)
