"""The signs of a matrix, times a number: a program a matrix."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from spectral_kernels._backend import check_matrix, check_range, operator
from torch import Tensor

from ._device import launch, narrowed, widened

_BLOCK = 1024


@triton.jit
def _scaled_sign_kernel(x, out, size, scale, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * size
    lanes = tl.arange(0, BLOCK)
    bad = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, size, BLOCK):
        value = widened(tl.load(x + start + first + lanes, mask=first + lanes < size, other=0.0))
        bad = tl.where(tl.abs(value) < float("inf"), bad, 1)
    scale = tl.where(tl.max(bad, 0) == 0, scale, float("nan"))
    for first in range(0, size, BLOCK):
        inside = first + lanes < size
        value = widened(tl.load(x + start + first + lanes, mask=inside, other=0.0))
        sign = tl.where(value > 0.0, 1.0, 0.0) - tl.where(value < 0.0, 1.0, 0.0)
        result = narrowed(scale * sign, out.dtype.element_ty)
        tl.store(out + start + first + lanes, result, mask=inside)


@operator
def scaled_sign(x: Tensor, *, scale: float) -> Tensor:
    """scale sign(X); see `spectral_kernels.scaled_sign`."""
    check_matrix("x", x)
    check_range("scale", scale)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if out.numel():
        count, size = math.prod(x.shape[:-2]), x.shape[-2] * x.shape[-1]
        launch(_scaled_sign_kernel, count, x.contiguous(), out, size, scale, BLOCK=_BLOCK)
    return out
