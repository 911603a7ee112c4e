"""Products known to be symmetric."""

from __future__ import annotations

import torch

from . import _checks, _dispatch

__all__ = ["gram"]


def gram(x: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
    """X X^T, exactly symmetric: one triangle is computed and mirrored.

    Args:
        x: (..., m, n) float64, float32, bfloat16 or float16; any strides.
        backend: "cpu", "cuda", "triton", "reference"; None chooses.

    Returns:
        (..., m, m) in x's dtype. A matrix with a non-finite element gives NaN throughout and leaves
        its batch-mates alone; a product out of range overflows as torch.mm does.

    Raises:
        TypeError: x is not a dense floating-point tensor.
        ValueError: x has fewer than two dimensions.
        RuntimeError: x requires grad, or the backend that was asked for cannot run.

    Accuracy: fp32 and 16-bit products accumulate in fp32; an element differs from the exact one by
    at most n u |x_i| |x_j| before it is rounded to x's dtype. Integers are exact while they fit.
    """
    _checks.matrix("x", x)
    _checks.no_autograd("x", x, "gram")
    return _dispatch.run("gram", (x,), backend, x)
