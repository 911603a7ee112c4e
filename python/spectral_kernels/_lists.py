"""What list steps take beside their tensors: counters, and one factor an entry; nested state."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _checks

SCALES = ("original", "match_rms_adamw", "spectral_unclamped", "none")


def counters(
    params: Sequence[Tensor], step_counts: Sequence[Tensor] | None, skipped: Tensor | None
) -> tuple[Sequence[Tensor], Tensor]:
    """The counters of a list step, or throw-away ones."""
    if not isinstance(params, Sequence):
        raise TypeError(f"params must be a list of tensors, not {type(params).__name__}")
    _checks.matrices("params", params)
    device = params[0].device if len(params) else torch.device("cpu")
    if step_counts is None:
        step_counts = [torch.zeros((), dtype=torch.float32, device=device) for _ in params]
    _checks.tensors("step_counts", step_counts, len(params))
    if skipped is None:
        skipped = torch.zeros((), dtype=torch.int64, device=device)
    if not isinstance(skipped, Tensor):
        raise TypeError(f"skipped must be a tensor, not {type(skipped).__name__}")
    return step_counts, skipped


def check_counted(step_counts: Sequence[Tensor] | None, **moments: Sequence[Tensor | None]) -> None:
    """Moments in bfloat16 are rounded by the number of the step, so that it has to be given."""
    for name, tensors in moments.items() if step_counts is None else ():
        if any(x is not None and x.dtype == torch.bfloat16 for x in tensors):
            raise ValueError(
                f"{name} in bfloat16 are rounded at random by their step_counts, which are missing"
            )


def scale_factor(scale: str, m: int, n: int) -> float:
    """The factor of the polar factor of an m x n matrix.

    "original" is KellerJordan/Muon's, "match_rms_adamw" arXiv 2502.16982's, "spectral_unclamped"
    that of Bernstein, "Deriving Muon" (2025); the names are those of torch.optim.Muon's
    `adjust_lr_fn`.
    """
    _checks.choice("scale", scale, SCALES)
    if scale == "none" or m == 0 or n == 0:
        return 1.0
    if scale == "match_rms_adamw":
        return 0.2 * math.sqrt(max(m, n))
    return math.sqrt(max(1.0, m / n) if scale == "original" else m / n)


def scales_of(params: Sequence[Tensor], scale: str | float | Sequence[float]) -> list[float]:
    """One factor an entry."""
    if isinstance(scale, str):
        shapes = [p.shape[-2:] for p in params]
        found = {shape: scale_factor(scale, *shape) for shape in set(shapes)}
        return [found[shape] for shape in shapes]
    if not isinstance(scale, Sequence):
        return [_checks.number("scale", scale)] * len(params)
    if len(scale) != len(params):
        raise ValueError(f"scale has {len(scale)} entries, params has {len(params)}")
    return [_checks.number(f"scale[{i}]", value) for i, value in enumerate(scale)]


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested lists, tuples and dicts, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from tensors_in(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from tensors_in(each)
