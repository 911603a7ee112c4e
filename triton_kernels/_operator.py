"""How every operator of this room is called, and what it asks of its lists."""

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


def operator(function: Callable[P, R]) -> Callable[P, R]:
    """On the tensors' card, without an autograd graph and without autocast."""

    @functools.wraps(function)
    def plain(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0] if args else None
        if isinstance(first, Sequence):
            first = first[0] if first else None
        device = first.device if isinstance(first, Tensor) else torch.device("cpu")
        on_card = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
        with torch.no_grad(), torch.autocast(device.type, enabled=False), on_card:
            return function(*args, **kwargs)

    return plain


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
) -> None:
    """Parameters, gradients and counters of a list step."""
    check_list("grads", grads, len(params))
    check_list("step_counts", step_counts, len(params))
    if skipped.dtype != torch.int64 or skipped.numel() != 1:
        raise TypeError(f"skipped must be one int64, not {skipped.dtype}, {tuple(skipped.shape)}")
    if lr.numel() != 1:
        raise ValueError(f"lr must be one number, not of shape {tuple(lr.shape)}")
    for i, (param, grad, count) in enumerate(zip(params, grads, step_counts, strict=True)):
        check_writable(f"params[{i}]", param)
        if not grad.is_floating_point():
            raise TypeError(f"grads[{i}] must be floating-point, not {grad.dtype}")
        if param.shape != grad.shape:
            raise ValueError(
                f"grads[{i}] has shape {tuple(grad.shape)}, params[{i}] {tuple(param.shape)}"
            )
        if param.device != grad.device:
            raise ValueError(f"grads[{i}] is on {grad.device}, params[{i}] on {param.device}")
        if count.ndim and count.shape != param.shape[:-2]:
            raise ValueError(
                f"step_counts[{i}] must be 0-dim or have the batch's shape "
                f"{tuple(param.shape[:-2])}, not {tuple(count.shape)}"
            )


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


def check_state(name: str, state: Sequence[Tensor], params: Sequence[Tensor]) -> None:
    """A float32 state of the parameters' shapes."""
    check_list(name, state, len(params))
    for i, (x, param) in enumerate(zip(state, params, strict=True)):
        if x.dtype != torch.float32:
            raise TypeError(f"{name}[{i}] must be float32, not {x.dtype}")
        if x.shape != param.shape:
            raise ValueError(
                f"{name}[{i}] has shape {tuple(x.shape)}, params[{i}] {tuple(param.shape)}"
            )
        check_writable(f"{name}[{i}]", x)


def check_sides(
    params: Sequence[Tensor],
    lefts: Sequence[Tensor],
    rights: Sequence[Tensor],
    left_partners: Sequence[Tensor],
    right_partners: Sequence[Tensor],
    partner: str,
) -> None:
    """Factors and, on the same sides, their partners: "roots" or "bases"; size 0 where absent."""
    for side, dim, factors, partners in (
        ("left", -2, lefts, left_partners),
        ("right", -1, rights, right_partners),
    ):
        for name, tensors in ((f"{side}s", factors), (f"{side}_{partner}", partners)):
            check_list(name, tensors, len(params))
            for i, (x, param) in enumerate(zip(tensors, params, strict=True)):
                expected = (*param.shape[:-2], param.shape[dim], param.shape[dim])
                if not x.numel():
                    continue
                if x.dtype != torch.float32:
                    raise TypeError(f"{name}[{i}] must be float32, not {x.dtype}")
                if x.shape != expected:
                    raise ValueError(
                        f"{name}[{i}] must have shape {expected}, not {tuple(x.shape)}"
                    )
                check_writable(f"{name}[{i}]", x)
        for i, (factor, other) in enumerate(zip(factors, partners, strict=True)):
            if bool(factor.numel()) != bool(other.numel()):
                raise ValueError(
                    f"{side}s[{i}] has shape {tuple(factor.shape)}, "
                    f"{side}_{partner}[{i}] {tuple(other.shape)}"
                )


def check_writable(name: str, x: Tensor) -> None:
    """Every element of a tensor that is written needs a place of its own."""
    if any(stride == 0 and size > 1 for size, stride in zip(x.shape, x.stride(), strict=True)):
        raise ValueError(f"{name} is written in place but has strides {x.stride()}")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """One of the names that an option takes."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")


def check_rows(rows: Sequence[Sequence[float]], restarts: Sequence[int]) -> None:
    """(a, b, c) for every step, and the steps before which the Gram form starts anew."""
    if not rows or any(len(row) != 3 for row in rows):
        raise ValueError(f"rows must hold (a, b, c) for every step, not {rows!r}")
    if not all(1 <= step < len(rows) for step in restarts):
        raise ValueError(f"restarts must be steps in 1..{len(rows) - 1}, not {tuple(restarts)}")


def check_number(name: str, value: float, *, positive: bool = False) -> None:
    """A finite number of at least 0."""
    if not 0.0 <= value < math.inf or (positive and value == 0.0):
        bound = "positive" if positive else "at least 0"
        raise ValueError(f"{name} must be {bound} and finite, not {value}")


def raise_nonfinite(nonfinite: str, **lists: Sequence[Tensor]) -> None:
    """nonfinite="raise": before anything is written, at the price of waiting for the card."""
    check_choice("nonfinite", nonfinite, ("skip", "propagate", "raise"))
    if nonfinite != "raise":
        return
    for name, tensors in lists.items():
        for i, x in enumerate(tensors):
            if not bool(x.isfinite().all()):
                raise ValueError(f"{name}[{i}] has a non-finite element")
