"""What values hyper-parameters may have: each rule returns the value, normalised, or raises."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import _checks, _options

Rule = Callable[[str, Any], Any]
Default = TypeVar("Default", float, tuple[float, float])


class Unwritten:
    """Marks the default of an argument, to tell it from the same value written by the caller."""

    __slots__ = ()


class _Number(float, Unwritten):
    __slots__ = ()


class _Pair(tuple[float, float], Unwritten):
    __slots__ = ()


def unwritten(value: Default) -> Default:
    """The same value, marked as a default that nobody has written."""
    return _Pair(value) if isinstance(value, tuple) else _Number(value)


def real(low: float = 0.0, high: float = math.inf, *, include_high: bool = False) -> Rule:
    """A number in [low, high), or [low, high]."""
    return lambda name, value: _checks.number(name, value, low, high, include_high=include_high)


def whole(low: int, high: int | None = None) -> Rule:
    """An int in low..high."""

    def check(name: str, value: Any) -> int:
        if isinstance(value, Integral) and not isinstance(value, bool):
            value = int(value)
        return _checks.integer(name, value, low, high)

    return check


def flag(name: str, value: Any) -> bool:
    """A bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, not {value!r}")
    return value


def choice(*choices: str) -> Rule:
    """One of some names."""
    return lambda name, value: _checks.choice(name, value, choices)


def number_or(*choices: str) -> Rule:
    """One of some names, or a number."""

    def check(name: str, value: Any) -> str | float:
        if isinstance(value, str):
            return _checks.choice(name, value, choices)
        return _checks.number(name, value)

    return check


def optional(rule: Rule) -> Rule:
    """None, or what another rule takes."""
    return lambda name, value: None if value is None else rule(name, value)


def betas(*, adagrad: bool = False) -> Rule:
    """A pair of numbers in [0, 1); with `adagrad` the second may be 1."""

    def check(name: str, value: Any) -> tuple[float, float]:
        if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
            raise TypeError(f"{name} must be a pair of numbers, not {value!r}")
        first = _checks.number(f"{name}[0]", value[0], 0.0, 1.0)
        second = _checks.number(f"{name}[1]", value[1], 0.0, 1.0, include_high=adagrad)
        return first, second

    return check


def learning_rate(name: str, value: Any) -> float | Tensor:
    """A number, or a tensor of one number, which stays what it is so that it can be changed."""
    if isinstance(value, Tensor):
        if value.numel() != 1 or not value.is_floating_point():
            raise ValueError(f"{name} must be one floating-point number, not {value!r}")
        if value.device.type == "cpu":
            _checks.number(name, value.item())
        return value
    return _checks.number(name, value)


def compute_dtype(name: str, value: Any) -> torch.dtype | None:
    """A floating-point dtype, or None for the default."""
    if value is not None and value not in _checks.FLOATS:
        raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, not {value!r}")
    return value


def state_dtype(name: str, value: Any) -> torch.dtype | None:
    """None for full precision, or bfloat16."""
    if value is not None and value is not torch.bfloat16:
        raise ValueError(f"{name} must be None or torch.bfloat16, not {value!r}")
    return value


def matrix_dims(name: str, value: Any) -> Any:
    """None, or a pair (rows, columns), each a dimension or several."""
    if value is None:
        return None
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2:
        sides = [(side,) if isinstance(side, int) else tuple(side) for side in value]
        if all(isinstance(dim, int) for side in sides for dim in side):
            return tuple(sides)
    raise TypeError(f"{name} must be a pair (rows, columns) of dimensions, not {value!r}")


def of(record: type[_options.Options], *names: str) -> dict[str, Rule]:
    """Rules of options by the record of their operator."""
    return {name: _of_kind(record.kinds[name]) for name in names}


def _of_kind(kind: _options.Kind) -> Rule:
    if isinstance(kind, _options.Flag):
        return flag
    # A group keeps None, which an operator does not take.
    return compute_dtype if isinstance(kind, _options.ComputeDtype) else kind.taken


def arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """The hyper-parameters among all that a constructor was given."""
    others = ("self", "params", "adamw", "distributed", "__class__")
    return {name: value for name, value in given.items() if name not in others}


LR: Mapping[str, Rule] = {"lr": learning_rate}

# Of torch.optim.AdamW, with its defaults.
ADAMW: Mapping[str, Rule] = {
    "lr": learning_rate,
    "betas": betas(),
    "eps": real(),
    "weight_decay": real(),
    "amsgrad": flag,
    "maximize": flag,
}
ADAMW_DEFAULTS: Mapping[str, Any] = {
    "lr": 1e-3,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 1e-2,
    "amsgrad": False,
    "maximize": False,
}

NONFINITE = choice(*_options.NONFINITE)
# What a group of AdamW alone has.
ADAMW_GROUP: Mapping[str, Rule] = {**ADAMW, "nonfinite": NONFINITE, "capturable": flag}

# What every matrix rule has.
MATRIX: Mapping[str, Rule] = {
    "lr": learning_rate,
    "weight_decay": real(),
    "maximize": flag,
    "nonfinite": NONFINITE,
    "capturable": flag,
    "state_dtype": state_dtype,
    "batched": flag,
    "matrix_dims": matrix_dims,
}


# AdamW's own values in a group that holds both kinds; None is that of the group.
ADAMW_FIELDS: Mapping[str, Rule] = {
    **{f"adamw_{name}": optional(rule) for name, rule in ADAMW.items()},
    "adamw_lr_at": optional(real()),
}

# What decides the algorithm of a parameter.
ROUTING: Mapping[str, Rule] = {
    "algorithm": choice("auto", "matrix", "adamw"),
    "batched": MATRIX["batched"],
    "matrix_dims": MATRIX["matrix_dims"],
}


def check_implementation(values: Mapping[str, Any], where: str = "") -> None:
    """The keys by which groups of torch.optim say how a step is computed, where they are there."""
    for name in ("foreach", "fused", "differentiable"):
        value = values.get(name)
        if value is not None and not isinstance(value, bool):
            raise TypeError(f"{where}{name} must be True, False or None, not {value!r}")
    if values.get("differentiable"):
        raise ValueError(
            f"{where}differentiable=True is not supported: no gradient goes through a step"
        )
    if values.get("foreach") and values.get("fused"):
        raise ValueError(f"{where}foreach and fused cannot be True together")


def check(values: Mapping[str, Any], rules: Mapping[str, Rule], where: str = "") -> dict[str, Any]:
    """Every value that has a rule, normalised; errors say where."""
    checked = {}
    for name, rule in rules.items():
        try:
            checked[name] = rule(name, values[name])
        except KeyError:
            raise ValueError(f"{where}{name} is missing") from None
        except (TypeError, ValueError) as error:
            raise type(error)(f"{where}{error}") from None
    return checked
