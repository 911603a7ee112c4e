"""What the backends written in Python share: how an operator is called, and checks of its lists."""

from __future__ import annotations

import contextlib
import functools
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
        with torch.no_grad(), torch.autocast(device.type, enabled=False), on_card:
            return function(*args, **kwargs)

    return plain


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


def check_writable(name: str, x: Tensor) -> None:
    """Every element of a tensor that is written needs a place of its own."""
    if any(stride == 0 and size > 1 for size, stride in zip(x.shape, x.stride(), strict=True)):
        raise ValueError(f"{name} is written in place but has strides {x.stride()}")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """One of the names that an option takes."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")


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
