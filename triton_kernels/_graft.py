"""Shampoo's direction between roots: means of gradients, with the length of another direction.

What is a number a matrix is summed over chunks, in their order, and then over those of the matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._device import NONFINITE, element, launch, placed, span_of, widened
from ._factor_lists import MOMENTA, SQUARES
from ._fused import BETWEEN, Fused, Moments, constants_of
from ._layout import COLS, COLUMNS, ROWS, WIDE
from ._pack import chunk_of, of_wide, put_wide

_BLOCK = 256


@triton.jit
def _mean_kernel(
    x, out, layout, chunks, state, momenta, squares, firsts, seconds, parts,
    beta1, fresh1, beta2, fresh2,
    MOMENTUM: tl.constexpr, MOMENTUM_UNIT: tl.constexpr, SQUARE: tl.constexpr,
    SQUARE_UNIT: tl.constexpr, SQUARES: tl.constexpr,
    CHUNK_ROWS: tl.constexpr, CHUNK_COLS: tl.constexpr,
):  # fmt: skip
    # Means, and sums of their squares, or of second moments where there are some.
    matrix, row, col, inside = chunk_of(chunks, layout, MOMENTUM_UNIT, CHUNK_ROWS, CHUNK_COLS)
    rows = tl.arange(0, CHUNK_ROWS)
    cols = tl.arange(0, CHUNK_COLS)
    value = of_wide(x, layout, matrix, row, col, CHUNK_ROWS, CHUNK_COLS)
    at = placed(momenta, matrix, 0, row, col, rows, cols, MOMENTUM, MOMENTUM_UNIT)
    mean = beta1 * widened(tl.load(at, mask=inside, other=0.0)) + fresh1 * value
    finite = tl.abs(mean) < float("inf")
    mean = mean * tl.load(firsts + matrix)
    wide = mean.to(tl.float64)
    wide = wide * wide
    if SQUARES:
        at = placed(squares, matrix, 0, row, col, rows, cols, SQUARE, SQUARE_UNIT)
        v = beta2 * widened(tl.load(at, mask=inside, other=0.0)) + fresh2 * (value * value)
        finite = finite & (tl.abs(v) < float("inf"))
        wide = (v * tl.load(seconds + matrix)).to(tl.float64)
    if tl.max(tl.where(finite, 0, 1)) > 0:
        tl.store(state + matrix, NONFINITE)
    tl.store(parts + tl.program_id(0), tl.sum(wide))
    put_wide(mean, out, layout, matrix, row, col, CHUNK_ROWS, CHUNK_COLS)


@triton.jit
def _total(spans, parts, matrix, BLOCK: tl.constexpr):
    """The sum of what the chunks of a matrix have."""
    first, count = span_of(spans, matrix)
    lanes = tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, count, BLOCK):
        at = start + lanes
        sums += tl.load(parts + first + at, mask=at < count, other=0.0)
    return tl.sum(sums, 0)


@triton.jit
def _eps_kernel(spans, parts, layout, out, eps, BLOCK: tl.constexpr):
    # eps of the root of the mean of what was summed.
    matrix = tl.program_id(0).to(tl.int64)
    height = element(layout, matrix, ROWS, COLUMNS)
    size = (height * element(layout, matrix, COLS, COLUMNS)).to(tl.float64)
    tl.store(
        out + matrix, (eps * tl.sqrt(_total(spans, parts, matrix, BLOCK) / size)).to(tl.float32)
    )


@triton.jit
def _lengths_kernel(
    preconditioned, means, x, layout, chunks, squares, seconds, eps, absolute, parts, others,
    beta2, fresh2,
    SQUARE: tl.constexpr, SQUARE_UNIT: tl.constexpr, SQUARES: tl.constexpr,
    RELATIVE: tl.constexpr, CHUNK_ROWS: tl.constexpr, CHUNK_COLS: tl.constexpr,
):  # fmt: skip
    # Sums of squares of what goes between the roots, and of what it takes its length from.
    matrix, row, col, inside = chunk_of(chunks, layout, SQUARE_UNIT, CHUNK_ROWS, CHUNK_COLS)
    value = of_wide(preconditioned, layout, matrix, row, col, CHUNK_ROWS, CHUNK_COLS)
    wide = value.to(tl.float64)
    tl.store(parts + tl.program_id(0), tl.sum(wide * wide))
    if SQUARES:
        rows = tl.arange(0, CHUNK_ROWS)
        cols = tl.arange(0, CHUNK_COLS)
        value = of_wide(x, layout, matrix, row, col, CHUNK_ROWS, CHUNK_COLS)
        at = placed(squares, matrix, 0, row, col, rows, cols, SQUARE, SQUARE_UNIT)
        v = beta2 * widened(tl.load(at, mask=inside, other=0.0)) + fresh2 * (value * value)
        divisor = tl.sqrt(v * tl.load(seconds + matrix))
        divisor += tl.load(eps + matrix) if RELATIVE else absolute
        mean = of_wide(means, layout, matrix, row, col, CHUNK_ROWS, CHUNK_COLS)
        other = tl.where(divisor == 0.0, 0.0, mean / tl.where(divisor == 0.0, 1.0, divisor))
        wide = other.to(tl.float64)
        tl.store(others + tl.program_id(0), tl.sum(wide * wide))


@triton.jit
def _ratios_kernel(spans, parts, others, rates, out, BLOCK: tl.constexpr):
    matrix = tl.program_id(0)
    own = tl.sqrt(_total(spans, parts, matrix, BLOCK))
    other = tl.sqrt(_total(spans, others, matrix, BLOCK))
    ratio = tl.where(own == 0.0, 0.0, other / tl.where(own == 0.0, 1.0, own))
    tl.store(out + matrix, (tl.load(rates + matrix) * ratio).to(tl.float32))


@dataclass(frozen=True)
class Graft:
    """What the length of a direction is.

    Attributes:
        kept: its own.
        squares: that of means over roots of second moments, else that of the means.
        eps: beside the roots.
        relative: eps is a multiple of what they are on average.
    """

    kept: bool
    squares: bool
    eps: float
    relative: bool


def between_roots(fused: Fused, x: Tensor, moments: Moments, graft: Graft) -> tuple[Tensor, Tensor]:
    """The direction, and what it is multiplied by in every matrix.

    Args:
        fused: the matrices.
        x: their gradients.
        moments: how the means, and second moments if there are any, move.
        graft: see `Graft`.
    """
    layout, rates = fused.layout, fused.rates
    count, chunks = layout.count, layout.chunks
    m = fused.places(MOMENTA)
    v = fused.places(SQUARES) if graft.squares else m
    means = layout.empty(WIDE, torch.float32)
    parts, others = torch.empty(
        2, chunks.shape[0] + chunks.shape[0] % 2, dtype=torch.float64, device=layout.device
    ).unbind()
    launch(
        _mean_kernel,
        chunks.shape[0],
        x,
        means,
        layout.table,
        chunks,
        fused.state,
        m.table,
        v.table,
        rates.firsts,
        rates.seconds,
        others,
        *moments,
        SQUARES=graft.squares,
        **constants_of(MOMENTUM=m, SQUARE=v),
    )
    preconditioned = fused.turned(means, BETWEEN)
    if graft.kept:
        return preconditioned, rates.rates
    numbers = torch.empty(count, dtype=torch.float32, device=layout.device)
    if graft.squares and graft.relative:
        launch(
            _eps_kernel, count, layout.spans, others, layout.table, numbers, graft.eps, BLOCK=_BLOCK
        )
    launch(
        _lengths_kernel,
        chunks.shape[0],
        preconditioned,
        means,
        x,
        layout.table,
        chunks,
        v.table,
        rates.seconds,
        numbers,
        graft.eps,
        parts,
        others,
        moments.beta2,
        moments.fresh2,
        SQUARES=graft.squares,
        RELATIVE=graft.relative,
        **constants_of(SQUARE=v),
    )
    grafted = torch.empty(count, dtype=torch.float32, device=layout.device)
    launch(_ratios_kernel, count, layout.spans, parts, others, rates.rates, grafted, BLOCK=_BLOCK)
    return preconditioned, grafted
