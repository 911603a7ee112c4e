"""What the backends written in Python share: how an operator is called, and checks of its lists."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, ParamSpec, TypeVar

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


def check_tensors(
    name: str, values: Sequence[Tensor | None], count: int, *, optional: bool = False
) -> None:
    """A list of tensors, or of tensors and None if `optional`, one entry a parameter."""
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise TypeError(f"{name} must be a list of tensors, not {type(values).__name__}")
    check_list(name, values, count)
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


def check_rate(lr: Tensor) -> None:
    """A learning rate whose value is at hand has to be a number of at least 0."""
    if lr.numel() != 1:
        raise ValueError(f"lr must be one number, not of shape {tuple(lr.shape)}")
    if lr.device.type == "cpu" and not 0.0 <= float(lr) < math.inf:
        raise ValueError(f"lr must be in [0, inf), not {float(lr)!r}")


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


def check_step_lists(
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
    check_rate(lr)
    if len(params):
        check_device("skipped", skipped, params[0])
        if lr.device.type != "cpu":
            check_device("lr", lr, params[0])
    for i, (param, grad, count) in enumerate(zip(params, grads, step_counts, strict=True)):
        check_matrix(f"params[{i}]", param)
        check_matrix(f"grads[{i}]", grad)
        check_writable(f"params[{i}]", param)
        for name, x in (("params", param), ("grads", grad), ("step_counts", count)):
            check_device(f"{name}[{i}]", x, params[0])
        if param.shape != grad.shape:
            raise ValueError(
                f"grads[{i}] has shape {tuple(grad.shape)}, params[{i}] {tuple(param.shape)}"
            )
        if count.ndim and count.shape != param.shape[:-2]:
            raise ValueError(
                f"step_counts[{i}] must be 0-dim or have the batch's shape "
                f"{tuple(param.shape[:-2])}, not {tuple(count.shape)}"
            )


def check_momentum(name: str, state: Sequence[Tensor], params: Sequence[Tensor]) -> list[int]:
    """Entries whose momentum is kept in bfloat16, beside parameters that are not float64."""
    check_list(name, state, len(params))
    narrow = [i for i, x in enumerate(state) if x.dtype == torch.bfloat16]
    for i in narrow:
        x, param = state[i], params[i]
        if param.dtype == torch.float64:
            raise TypeError(f"{name}[{i}] is bfloat16 of a parameter that is float64")
        check_matrix(f"{name}[{i}]", x)
        check_device(f"{name}[{i}]", x, param)
        if x.shape != param.shape:
            raise ValueError(
                f"{name}[{i}] has shape {tuple(x.shape)}, params[{i}] {tuple(param.shape)}"
            )
        check_writable(f"{name}[{i}]", x)
    return narrow


def check_rows_state(
    name: str, state: Sequence[Tensor], params: Sequence[Tensor], *, present: bool
) -> None:
    """One number a row, (..., m, 1), of every parameter if `present`, else of none."""
    check_list(name, state, len(params))
    for i, (x, param) in enumerate(zip(state, params, strict=True)):
        if not param.numel():
            continue
        check_device(f"{name}[{i}]", x, param)
        if not present:
            if x.numel():
                raise ValueError(
                    f"{name}[{i}] must have no element: there is no beta2, got {tuple(x.shape)}"
                )
            continue
        expected = (*param.shape[:-1], 1)
        if x.shape != expected:
            raise ValueError(f"{name}[{i}] must have shape {expected}, got {tuple(x.shape)}")
        full = torch.float64 if param.dtype == torch.float64 else torch.float32
        if x.dtype != full:
            raise TypeError(f"{name}[{i}] must be {full}, not {x.dtype}")
        check_writable(f"{name}[{i}]", x)


def check_factors(
    params: Sequence[Tensor],
    lefts: Sequence[Tensor],
    rights: Sequence[Tensor],
    left_partners: Sequence[Tensor],
    right_partners: Sequence[Tensor],
    partner: str,
    check_side: Callable[[str, Tensor, Tensor, int], None],
) -> None:
    """Factors and, on the same sides, their partners: "roots" or "bases"; size 0 where absent.

    `check_side` is what a backend asks of one of them, over rows (-2) or columns (-1).
    """
    for side, dim, factors, partners in (
        ("left", -2, lefts, left_partners),
        ("right", -1, rights, right_partners),
    ):
        for name, tensors in ((f"{side}s", factors), (f"{side}_{partner}", partners)):
            check_list(name, tensors, len(params))
            for i, (x, param) in enumerate(zip(tensors, params, strict=True)):
                check_side(f"{name}[{i}]", x, param, dim)
                check_writable(f"{name}[{i}]", x)
        for i, (factor, other) in enumerate(zip(factors, partners, strict=True)):
            if bool(factor.numel()) != bool(other.numel()):
                raise ValueError(
                    f"{side}s[{i}] has shape {tuple(factor.shape)}, "
                    f"{side}_{partner}[{i}] {tuple(other.shape)}"
                )


def check_variances(
    squares: Sequence[Tensor],
    params: Sequence[Tensor],
    variance: str,
    check_state: Callable[[str, Sequence[Tensor], Sequence[Tensor]], None],
    check_dtype: Callable[[str, Tensor], None],
) -> None:
    """DeVA's V: of the parameters' shapes, nothing, or for "low_memory" a number a row and column.

    `check_state` and `check_dtype` are what a backend asks of any state and of its dtype.
    """
    check_list("exp_avg_sqs", squares, len(params))
    if variance == "low_memory":
        for i, (v, param) in enumerate(zip(squares, params, strict=True)):
            expected = (*param.shape[:-2], param.shape[-2] + param.shape[-1])
            if v.shape != expected:
                raise ValueError(
                    f"exp_avg_sqs[{i}] must have shape {expected} for low_memory, "
                    f"not {tuple(v.shape)}"
                )
            check_dtype(f"exp_avg_sqs[{i}]", v)
            check_writable(f"exp_avg_sqs[{i}]", v)
            check_device(f"exp_avg_sqs[{i}]", v, param)
    elif variance != "none":
        check_state("exp_avg_sqs", squares, params)


def computed_with(lists: NamedTuple, **instead: Sequence[Tensor]) -> dict[str, Sequence[Tensor]]:
    """The lists of a step whose numbers enter it: gradients first, then state, parameters last.

    `instead` has what is looked at in place of some of them.
    """
    counters = ("params", "grads", "root_failures", "step_counts", "skipped", "lr")
    state = [name for name in lists._fields if name not in counters]
    given = lists._asdict() | instead
    return {name: given[name] for name in ("grads", *state, "params")}


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
