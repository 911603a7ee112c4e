"""Steps before which the Gram form of a Newton-Schulz iteration starts anew."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _checks, coefficients as _coefficients

_GROWTH = {
    torch.float64: _coefficients.FULL_GROWTH,
    torch.float32: _coefficients.FULL_GROWTH,
    torch.bfloat16: _coefficients.BFLOAT16_GROWTH,
    torch.float16: _coefficients.FLOAT16_GROWTH,
}


def restarts_for(
    x: Tensor,
    rows: _coefficients.Coefficients,
    method: str,
    dtype: torch.dtype,
    restarts: Sequence[int] | None = None,
) -> tuple[int, ...]:
    """Steps before which the Gram form of a matrix of x's shape restarts.

    Before every step means the standard form.
    """
    count = len(rows.rows)
    if restarts is not None:
        given = {_checks.integer("restarts", step, 1, count - 1) for step in restarts}
        return _bounded(rows.rows, given)
    if method == "gram":
        alone = _coefficients.steps_alone(rows.rows, _GROWTH[dtype])
        return tuple(range(1, min(alone + 1, count)))
    found = _coefficients.gram_restarts(rows, x.shape[-2], x.shape[-1], _GROWTH[dtype])
    return tuple(range(1, count)) if found is None else found


def _bounded(rows: Sequence[_coefficients.Row], restarts: set[int]) -> tuple[int, ...]:
    """The restarts, and further ones where rounding noise could outgrow the matrix."""
    kept, growth = [], 1.0
    for step, (a, _, _) in enumerate(rows):
        growth *= abs(a)
        if step > 0 and (step in restarts or growth > _coefficients.BFLOAT16_GROWTH):
            kept.append(step)
            growth = abs(a)
    return tuple(kept)


def restarts_of(
    params: Sequence[Tensor],
    rows: _coefficients.Coefficients,
    method: str,
    dtype: torch.dtype,
    restarts: Sequence[int] | None = None,
) -> tuple[tuple[int, ...], ...]:
    """`restarts_for` of every entry of a list step, where float64 is computed in itself."""
    full = torch.float64
    kinds = [(full if p.dtype == full else dtype, p.shape[-2:]) for p in params]
    # Hundreds of parameters have a handful of shapes.
    firsts = dict(zip(reversed(kinds), reversed(params), strict=True))
    found = {
        (own, shape): restarts_for(x, rows, method, own, restarts)
        for (own, shape), x in firsts.items()
    }
    return tuple([found[kind] for kind in kinds])
