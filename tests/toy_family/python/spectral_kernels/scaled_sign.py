"""The signs of a matrix, times a number."""

from __future__ import annotations

import torch

from . import _checks, _dispatch

__all__ = ["scaled_sign"]


def scaled_sign(x: torch.Tensor, *, scale: float = 1.0, backend: str | None = None) -> torch.Tensor:
    """scale sign(X), element by element; sign(0) = 0.

    Args:
        x: (..., m, n) float64, float32, bfloat16 or float16; any strides.
        scale: at least 0 and finite.
        backend: "cpu", "cuda", "triton", "reference"; None chooses.

    Returns:
        x's shape and dtype. A matrix with a non-finite element gives NaN throughout and leaves its
        batch-mates alone.

    Raises:
        TypeError: x is not a dense floating-point tensor, or scale is no number.
        ValueError: x has fewer than two dimensions, or scale is out of range.
        RuntimeError: x requires grad, or the backend that was asked for cannot run.

    Accuracy: scale, rounded once to x's dtype.
    """
    _checks.matrix("x", x)
    _checks.no_autograd("x", x, "scaled_sign")
    scale = _checks.number("scale", scale)
    return _dispatch.run("scaled_sign", (x,), backend, x, scale=scale)
