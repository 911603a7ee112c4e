"""What the backends written in Python share: how an operator is called, and checks of tensors."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def operator(function: Callable[P, R]) -> Callable[P, R]:
    """On the tensors' card, without an autograd graph and without autocast."""

    @functools.wraps(function)
    def plain(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0] if args else None
        if isinstance(first, Sequence):
            first = first[0] if first else None
        device = first.device if isinstance(first, Tensor) else torch.device("cpu")
        on_card = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
        kind = "cpu" if device.type == "meta" else device.type
        with torch.no_grad(), torch.autocast(kind, enabled=False), on_card:
            return function(*args, **kwargs)

    return plain


def is_capturing() -> bool:
    """Whether the current stream records a CUDA graph, so that nothing can be read back."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


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


_PLAIN = frozenset((Tensor, torch.nn.Parameter))
_PLAIN_OR_NONE = _PLAIN | {type(None)}


def check_tensors(
    name: str, values: Sequence[Tensor | None], count: int, *, optional: bool = False
) -> None:
    """A list of tensors, or of tensors and None if `optional`, one entry a parameter."""
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise TypeError(f"{name} must be a list of tensors, not {type(values).__name__}")
    check_list(name, values, count)
    if (_PLAIN_OR_NONE if optional else _PLAIN).issuperset(map(type, values)):
        return
    for i, x in enumerate(values):
        if not (isinstance(x, Tensor) or (optional and x is None)):
            raise TypeError(f"{name}[{i}] must be a tensor, not {type(x).__name__}")


def may_overlap(x: Tensor) -> bool:
    """Whether two elements of a strided tensor may have one place.

    They have not if every dimension steps beyond all that the shorter steps reach together, which
    is so of everything that torch makes by slicing and permuting. A few layouts by `as_strided` are
    without overlap and yet not of this kind.
    """
    reach = 0
    steps = sorted((step, n) for n, step in zip(x.shape, x.stride(), strict=True) if n > 1)
    for step, n in steps:
        if step <= reach:
            return x.numel() > 0
        reach += step * (n - 1)
    return False


def check_writable(name: str, x: Tensor) -> None:
    """Every element of a tensor that is written needs a place of its own."""
    if may_overlap(x):
        raise ValueError(
            f"{name} is written in place but its elements overlap in memory: shape "
            f"{tuple(x.shape)}, strides {x.stride()}"
        )


def check_device(name: str, x: Tensor, like: Tensor) -> None:
    """Everything that a step writes is on one device."""
    if x.device != like.device:
        raise ValueError(f"{name} is on {x.device}, the other tensors are on {like.device}")


def check_skipped(skipped: Tensor, like: Tensor | None) -> None:
    """The counter of matrices that were left alone; on the device of `like`, if there is one."""
    if skipped.dtype != torch.int64 or skipped.numel() != 1:
        raise TypeError(f"skipped must be one int64, not {skipped.dtype}, {tuple(skipped.shape)}")
    if like is not None:
        check_device("skipped", skipped, like)


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """One of the names that an option takes."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")


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


def check_distinct(written: Sequence[Sequence[Tensor]], read: Sequence[Tensor]) -> None:
    """No tensor that is written shares memory with another."""
    spans = []
    for is_written, tensors in [(True, x) for x in written] + [(False, read)]:
        for x in tensors:
            if x.numel():
                size = 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
                begin = x.data_ptr()
                end = begin + size * x.element_size()
                spans.append((begin, end, is_written, size == x.numel(), x))
    spans.sort(key=lambda span: span[:2])
    for (begin, end, first, dense, x), (next_begin, *_, second, _, y) in itertools.pairwise(spans):
        # Slices of one tensor may interleave without sharing an element.
        if (first or second) and next_begin < end and (begin == next_begin or dense):
            raise ValueError(
                f"tensors of shapes {tuple(x.shape)} and {tuple(y.shape)} overlap in memory, or "
                "are the same, and one of them is written"
            )


def raise_if_nonfinite(**lists: Sequence[Tensor]) -> None:
    """ValueError with the place of the first tensor that is not finite throughout."""
    for name, tensors in lists.items():
        for i, x in enumerate(tensors):
            if not bool(x.isfinite().all()):
                raise ValueError(f"{name}[{i}] has a non-finite element")
