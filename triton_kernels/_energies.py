"""Sums of products along rows or columns, in an order that no batch changes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._device import launch

_LINES = 16
_ALONG = 128


@triton.jit
def _energy_kernel(
    x, y, out, lines, size, line_stride, step, matrix_stride, blocks,
    LINES: tl.constexpr, ALONG: tl.constexpr,
):  # fmt: skip
    # Sums of products along `size` elements of each of `lines` rows, or columns.
    matrix = (tl.program_id(0) // blocks).to(tl.int64)
    line = tl.program_id(0) % blocks * LINES + tl.arange(0, LINES)
    along = tl.arange(0, ALONG)
    start = matrix * matrix_stride + line[:, None].to(tl.int64) * line_stride
    sums = tl.zeros((LINES, ALONG), tl.float64)
    for first in range(0, size, ALONG):
        at = first + along
        inside = (line < lines)[:, None] & (at < size)[None, :]
        offsets = start + at[None, :].to(tl.int64) * step
        value = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float64)
        sums += value * tl.load(y + offsets, mask=inside, other=0.0).to(tl.float64)
    tl.store(out + matrix * lines + line, tl.sum(sums, 1), mask=line < lines)


def dots(x: Tensor, y: Tensor, *, rows: bool) -> Tensor:
    """Row or column sums of products of two batches, fp64 (count, m) or (count, n)."""
    count, m, n = x.shape
    lines, size = (m, n) if rows else (n, m)
    strides = (n, 1) if rows else (1, n)
    out = torch.empty(count, lines, dtype=torch.float64, device=x.device)
    blocks = -(-lines // _LINES)
    launch(
        _energy_kernel,
        count * blocks,
        x.contiguous(),
        y.contiguous(),
        out,
        lines,
        size,
        *strides,
        m * n,
        blocks,
        LINES=_LINES,
        ALONG=_ALONG,
    )
    return out


def energies(x: Tensor, *, rows: bool) -> Tensor:
    """Row or column sums of squares of a batch, fp64 (count, m) or (count, n)."""
    x = x.contiguous()
    return dots(x, x, rows=rows)
