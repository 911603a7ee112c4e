"""What the families of the reference share: batches, exact scaling, input checks, list steps."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

Index = tuple[int, ...]
P = ParamSpec("P")
R = TypeVar("R")

NONFINITE = ("skip", "propagate", "raise")
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def operator(function: Callable[P, R]) -> Callable[P, R]:
    """No autograd graph and no autocast: the same bits inside and outside of both."""

    @functools.wraps(function)
    def plain(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0] if args else None
        if isinstance(first, Sequence):
            first = first[0] if first else None
        kind = first.device.type if isinstance(first, Tensor) else "cpu"
        with torch.no_grad(), torch.autocast(kind, enabled=False):
            return function(*args, **kwargs)

    return plain


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


def check_matrix(name: str, x: Tensor) -> None:
    """A dense floating-point batch of matrices."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(x).__name__}")
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, not {x.layout}")
    if x.dtype not in _FLOATS:
        raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, not {x.dtype}")
    if x.ndim < 2:
        raise ValueError(f"{name} must have at least two dimensions, not shape {tuple(x.shape)}")


def check_square(name: str, x: Tensor) -> None:
    """A batch of square matrices in float32 or float64."""
    check_matrix(name, x)
    check_full_precision(name, x)
    if x.shape[-1] != x.shape[-2]:
        raise ValueError(f"{name} must be square, not of shape {tuple(x.shape)}")


def check_full_precision(name: str, x: Tensor) -> None:
    """Factors and states are float32 or float64."""
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


def check_writable(name: str, x: Tensor) -> None:
    """Every element of a tensor that is written needs a place of its own."""
    if any(stride == 0 and size > 1 for size, stride in zip(x.shape, x.stride(), strict=True)):
        raise ValueError(f"{name} is written in place but has strides {x.stride()}")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """One of the names that an option takes."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")


def check_root(p: int) -> None:
    """The roots that have an iteration."""
    if isinstance(p, bool) or not isinstance(p, int):
        raise TypeError(f"p must be an int, not {p!r}")
    if not 1 <= p <= 8:
        raise ValueError(f"p must be in 1..8, not {p}")


def check_range(
    name: str, value: float, low: float = 0.0, high: float = math.inf, *, closed: bool = False
) -> None:
    """low <= value < high, or <= high if closed."""
    if not (low <= value < high or (closed and value == high)):
        raise ValueError(f"{name} must be in [{low}, {high}{']' if closed else ')'}, not {value}")


def check_list(name: str, values: Sequence[object], count: int) -> None:
    """Lists of one step have one entry a parameter."""
    if len(values) != count:
        raise ValueError(f"{name} has {len(values)} entries, params has {count}")


def check_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    step_counts: Sequence[Tensor],
    skipped: Tensor,
    lr: Tensor,
    nonfinite: str,
) -> None:
    """What every list step asks of its parameters, gradients and counters."""
    check_choice("nonfinite", nonfinite, NONFINITE)
    check_list("grads", grads, len(params))
    check_list("step_counts", step_counts, len(params))
    if skipped.dtype != torch.int64 or skipped.numel() != 1:
        raise TypeError(f"skipped must be one int64, not {skipped.dtype}, {tuple(skipped.shape)}")
    if lr.numel() != 1:
        raise ValueError(f"lr must be one number, not of shape {tuple(lr.shape)}")
    for i, (param, grad, count) in enumerate(zip(params, grads, step_counts, strict=True)):
        check_matrix(f"params[{i}]", param)
        check_matrix(f"grads[{i}]", grad)
        check_writable(f"params[{i}]", param)
        if param.shape != grad.shape:
            raise ValueError(
                f"grads[{i}] has shape {tuple(grad.shape)}, params[{i}] {tuple(param.shape)}"
            )
        if count.ndim and count.shape != param.shape[:-2]:
            raise ValueError(
                f"step_counts[{i}] must be 0-dim or have the batch's shape "
                f"{tuple(param.shape[:-2])}, not {tuple(count.shape)}"
            )


def check_state(name: str, state: Sequence[Tensor], params: Sequence[Tensor]) -> None:
    """A state of the parameter's shape in float32 or float64."""
    check_list(name, state, len(params))
    for i, (x, param) in enumerate(zip(state, params, strict=True)):
        check_matrix(f"{name}[{i}]", x)
        check_full_precision(f"{name}[{i}]", x)
        check_writable(f"{name}[{i}]", x)
        if x.shape != param.shape:
            raise ValueError(
                f"{name}[{i}] has shape {tuple(x.shape)}, params[{i}] {tuple(param.shape)}"
            )


def check_sides(name: str, sides: Sequence[Tensor], params: Sequence[Tensor], side: int) -> None:
    """A list of factors over rows (side -2) or columns (-1)."""
    check_list(name, sides, len(params))
    for i, (x, param) in enumerate(zip(sides, params, strict=True)):
        check_side(f"{name}[{i}]", x, param, side)
        check_writable(f"{name}[{i}]", x)


def check_factors(
    params: Sequence[Tensor],
    lefts: Sequence[Tensor],
    rights: Sequence[Tensor],
    left_partners: Sequence[Tensor],
    right_partners: Sequence[Tensor],
    partner: str,
) -> None:
    """Factors and, on the same sides, their partners: "roots" or "bases"."""
    for side, dim, factors, partners in (
        ("left", -2, lefts, left_partners),
        ("right", -1, rights, right_partners),
    ):
        check_sides(f"{side}s", factors, params, dim)
        check_sides(f"{side}_{partner}", partners, params, dim)
        for i, (factor, other) in enumerate(zip(factors, partners, strict=True)):
            if absent(factor) != absent(other):
                raise ValueError(
                    f"{side}s[{i}] has shape {tuple(factor.shape)}, "
                    f"{side}_{partner}[{i}] {tuple(other.shape)}"
                )


# List steps.


def raise_nonfinite(nonfinite: str, **lists: Sequence[Tensor]) -> None:
    """nonfinite="raise": before anything is written."""
    if nonfinite != "raise":
        return
    for name, tensors in lists.items():
        for i, x in enumerate(tensors):
            for index in matrices(x):
                if not finite(x[index]):
                    where = f"{name}[{i}]" + (f", matrix {index}," if index else "")
                    raise ValueError(f"{where} has a non-finite element")


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


def move_(param: Tensor, update: Tensor, *, rate: float, decay: float) -> None:
    """W <- decay W - rate U in the update's dtype, rounded once to the parameter's."""
    param.copy_(decay * param.to(update.dtype) - rate * update)
