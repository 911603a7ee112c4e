"""Input checks of the public functions: TypeError or ValueError, before anything is written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ._backend import check_tensors

tensors = check_tensors

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
FULL = (torch.float64, torch.float32)

_PLAIN = frozenset((Tensor, torch.nn.Parameter))


def dense(name: str, x: Tensor, *, dtypes: Sequence[torch.dtype] = FLOATS) -> None:
    """A dense floating-point tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(x).__name__}")
    if is_traceable_wrapper_subclass(x):
        raise TypeError(
            f"{name} is a {type(x).__name__}, which has no storage of its own: pass its full, "
            "plain tensor (x.full_tensor() of a DTensor)"
        )
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, not {x.layout}")
    if x.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} must be one of {names}, not {x.dtype}")


def matrix(name: str, x: Tensor, *, dtypes: Sequence[torch.dtype] = FLOATS) -> None:
    """A dense floating-point tensor with at least two dimensions."""
    dense(name, x, dtypes=dtypes)
    if x.ndim < 2:
        raise ValueError(f"{name} must have at least two dimensions, not shape {tuple(x.shape)}")


def matrices(name: str, values: Sequence[Tensor]) -> None:
    """`matrix` of every one of a list."""
    # Hundreds of plain tensors are hardly looked at one by one.
    if _PLAIN.issuperset(map(type, values)):
        layouts, dtypes = {x.layout for x in values}, {x.dtype for x in values}
        dense = layouts <= {torch.strided} and dtypes.issubset(FLOATS)
        if dense and all([x.ndim > 1 for x in values]):
            return
    for i, x in enumerate(values):
        matrix(f"{name}[{i}]", x)


def no_autograd(name: str, x: Tensor, op: str) -> None:
    """A functional operator has no derivative; a silent cut of the graph would be worse."""
    if x.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            f"{op} has no derivative and {name} requires grad: pass {name}.detach(), or call it "
            "under torch.no_grad()"
        )


def square(name: str, x: Tensor) -> None:
    """A batch of square float32 or float64 matrices."""
    matrix(name, x, dtypes=FULL)
    if x.shape[-1] != x.shape[-2]:
        raise ValueError(f"{name} must be square, not of shape {tuple(x.shape)}")


def same_device(**tensors: Tensor | None) -> None:
    """All on one device."""
    given = {name: x for name, x in tensors.items() if x is not None}
    if len({x.device for x in given.values()}) > 1:
        where = ", ".join(f"{name} on {x.device}" for name, x in given.items())
        raise ValueError(f"tensors must be on one device: {where}")


def number(
    name: str,
    value: object,
    low: float = 0.0,
    high: float = math.inf,
    *,
    include_high: bool = False,
) -> float:
    """A real number with low <= value < high (<= high if include_high)."""
    found = real(name, value)
    if not (low <= found < high or (include_high and found == high)):
        end = "]" if include_high else ")"
        raise ValueError(f"{name} must be in [{low:g}, {high:g}{end}, not {found!r}")
    return found


def real(name: str, value: object) -> float:
    """A real number, or a tensor of one that is not on the meta device, as a float."""
    given = value
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_meta:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, not {given!r}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must be a number that a float can hold, not {value}") from None


def flag(name: str, value: bool | int) -> bool:
    """True or False, or 1 or 0."""
    if not isinstance(value, Integral | bool) or value not in (0, 1):
        raise TypeError(f"{name} must be True or False, not {value!r}")
    return bool(value)


def integer(name: str, value: int, low: int, high: int | None = None) -> int:
    """An int with low <= value <= high."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, not {value!r}")
    if value < low or (high is not None and value > high):
        limits = f"at least {low}" if high is None else f"in {low}..{high}"
        raise ValueError(f"{name} must be {limits}, not {value}")
    return value


def choice(name: str, value: str, choices: Sequence[str]) -> str:
    """One of the names that an option takes."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")
    return value


def learning_rate(lr: float | Tensor) -> Tensor:
    """`lr` as a 0-dim float64 tensor on the CPU, or as it is if it is a tensor already.

    The operators look at the value of a tensor on the CPU; one on a device is not waited for.
    """
    if isinstance(lr, Tensor):
        if lr.numel() != 1 or not lr.is_floating_point():
            raise ValueError(f"lr must be one floating-point number, not {lr!r}")
        return lr if lr.dtype in FULL else lr.to(torch.float64)
    return torch.tensor(number("lr", lr), dtype=torch.float64, device="cpu")


def factor_list(
    name: str, factors: Sequence[Tensor | None], params: Sequence[Tensor]
) -> list[Tensor]:
    """Factors of a list step: a size-0 tensor where a side is None."""
    tensors(name, factors, len(params), optional=True)
    if not {type(None)}.issubset(map(type, factors)):
        return list(factors)  # type: ignore[arg-type]
    return [
        param.new_empty(0, dtype=state_dtype(param.dtype)) if factor is None else factor
        for factor, param in zip(factors, params, strict=True)
    ]


def flags(name: str, value: bool | Sequence[bool | int], count: int) -> list[int]:
    """One 0 or 1 an entry."""
    if isinstance(value, Tensor) and value.dtype in (torch.bool, torch.int64):
        value = value.tolist()
    if not isinstance(value, Sequence) or isinstance(value, str):
        return [int(flag(name, value))] * count
    if len(value) != count:
        raise ValueError(f"{name} has {len(value)} entries, params has {count}")
    return [int(flag(f"{name}[{i}]", each)) for i, each in enumerate(value)]


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that the state of a parameter is kept in: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32
