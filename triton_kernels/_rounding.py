"""Moments in bfloat16, rounded at random."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._config import PASS_WARPS
from ._device import block_of, blocks_of, launch, rounded_at_random as _rounded_at_random

_BLOCK_ROWS = 16
_BLOCK_COLS = 256


@triton.jit
def _round_kernel(
    x, steps, out, m, n, blocks, across, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    matrix, rows, cols, at, inside = block_of(m, n, blocks, across, ROWS, COLS)
    value = tl.load(x + at, mask=inside, other=0.0)
    value = _rounded_at_random(value, tl.load(steps + matrix), rows, cols)
    tl.store(out + at, value, mask=inside)


def rounded_at_random(x: Tensor, t: Tensor) -> Tensor:
    """An fp32 batch (count, m, n) in bfloat16; see `rounded_at_random` of the reference.

    Args:
        x: what to round.
        t: (count,), the number, from 1, of the step that each matrix takes.
    """
    count, m, n = x.shape
    out = torch.empty(x.shape, dtype=torch.bfloat16, device=x.device)
    blocks, across = blocks_of(m, n, _BLOCK_ROWS, _BLOCK_COLS)
    launch(
        _round_kernel,
        count * blocks,
        x.contiguous(),
        (t - 1.0).to(torch.int64),
        out,
        m,
        n,
        blocks,
        across,
        ROWS=_BLOCK_ROWS,
        COLS=_BLOCK_COLS,
        num_warps=PASS_WARPS,
    )
    return out
