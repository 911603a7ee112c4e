"""What the operators of this room ask of their lists."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from spectral_kernels._backend import (
    check_choice,
    check_list,
    check_step_lists,
    check_writable,
)
from torch import Tensor


def check_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    step_counts: Sequence[Tensor],
    skipped: Tensor,
    lr: Tensor,
) -> None:
    """Parameters, gradients and counters of a list step."""
    check_step_lists(params, grads, step_counts, skipped, lr)
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        if param.device != grad.device:
            raise ValueError(f"grads[{i}] is on {grad.device}, params[{i}] on {param.device}")


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
