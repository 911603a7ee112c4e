"""Kernels of the steps with factors, on matrices of any shape in padded workspaces.

What a step makes of a matrix is looked at before any of it is written: every launch before the last
ones only marks what is not finite.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._device import (
    ALIGNED_ROW_MAJOR,
    NONFINITE,
    PLACE_COLUMNS,
    ROW_MAJOR,
    corner,
    element,
    multiplied,
    narrowed,
    placed,
    provided,
    rounded_at_random,
    tile_of,
    widened,
    within,
)
from ._layout import COLS, COLUMNS, ROWS, SHORT, TALL, WIDE
from ._matmul import infinite_from
from ._pack import chunk_of, of_wide, put_wide

_BITS = tl.constexpr(40)  # of a number of steps


@triton.jit
def _turn_kernel(
    x, places, out, layout, tiles,
    LEFT: tl.constexpr, FLIPPED: tl.constexpr, UNIT: tl.constexpr,
    PRECISION: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    # S X, S^T X, X T or X T^T of wide workspaces and the caller's squares, which are not padded.
    matrix, row, col = tile_of(tiles)
    row = row.to(tl.int64) * TILE
    col = col.to(tl.int64) * TILE
    lanes = tl.arange(0, TILE)
    inner = tl.arange(0, DEPTH)
    start, ld = corner(layout, matrix, WIDE)
    height = element(layout, matrix, ROWS, COLUMNS)
    width = element(layout, matrix, COLS, COLUMNS)
    _, short = corner(layout, matrix, SHORT)
    aligned: tl.constexpr = UNIT == ALIGNED_ROW_MAJOR
    at = places + matrix * PLACE_COLUMNS
    by_col = tl.load(at + 2)
    if aligned:
        base = tl.multiple_of(tl.load(at).to(tl.pointer_type(tl.float32)), 16)
        by_row = tl.multiple_of(tl.load(at + 1), 16)
    else:
        base = tl.load(at).to(tl.pointer_type(tl.float32))
        by_row = tl.load(at + 1)
    if LEFT:
        size = tl.minimum(height, width)
        first = row
        depth = short
        x_at = x + start + col + (inner[:, None] * ld + lanes[None, :])
        x_step = DEPTH * ld
    else:
        size = tl.maximum(height, width)
        first = col
        depth = ld
        x_at = x + start + row * ld + (lanes[:, None] * ld + inner[None, :])
        x_step = DEPTH
    lines = within(first, lanes, size, aligned)
    # Whether the sum is along columns of the square, as it stands in memory.
    DOWN: tl.constexpr = LEFT == FLIPPED
    if UNIT == ROW_MAJOR or UNIT == ALIGNED_ROW_MAJOR:  # noqa: SIM109 - no tuples in kernels
        if DOWN:
            q_at = base + first + (inner[:, None] * by_row.to(tl.int32) + lanes[None, :])
            q_step = DEPTH * by_row
        else:
            q_at = base + first * by_row
            q_at += lanes[:, None] * by_row.to(tl.int32) + inner[None, :]
            q_step = tl.full((), DEPTH, tl.int64)
    elif DOWN:
        q_at = base + first * by_col + (inner[:, None] * by_row + lanes[None, :] * by_col)
        q_step = DEPTH * by_row
    else:
        q_at = base + first * by_row + (lanes[:, None] * by_row + inner[None, :] * by_col)
        q_step = DEPTH * by_col
    acc = tl.zeros((TILE, TILE), tl.float32)
    for done in range(0, depth, DEPTH):
        along = within(done, inner, size, aligned)
        if DOWN:
            q = tl.load(q_at, mask=along[:, None] & lines[None, :], other=0.0)
        else:
            q = tl.load(q_at, mask=lines[:, None] & along[None, :], other=0.0)
        value = tl.load(x_at)
        if LEFT:
            acc = multiplied(tl.trans(q) if DOWN else q, value, acc, PRECISION)
        else:
            acc = multiplied(value, q if DOWN else tl.trans(q), acc, PRECISION)
        q_at += q_step
        x_at += x_step
    here = start + row * ld + col
    tl.store(out + here + (lanes[:, None] * ld + lanes[None, :]), acc)


@triton.jit
def _factors_kernel(
    x, places, layout, blocks, state, beta, weight, limit,
    WIDE_LINES: tl.constexpr, LINES: tl.constexpr, ALONG: tl.constexpr,
):  # fmt: skip
    # Marks where beta F + weight X X^T, or X^T X, would not be finite: the largest element of a
    # semidefinite matrix is on its diagonal. Of F the lower triangle counts.
    at = blocks + tl.program_id(0) * 2
    matrix = tl.load(at).to(tl.int64)
    first = tl.load(at + 1) * LINES
    height = element(layout, matrix, ROWS, COLUMNS)
    width = element(layout, matrix, COLS, COLUMNS)
    start, ld = corner(layout, matrix, WIDE)
    if WIDE_LINES:
        size = tl.minimum(height, width).to(tl.int32)
        length = tl.maximum(height, width).to(tl.int32)
    else:
        size = tl.maximum(height, width).to(tl.int32)
        length = tl.minimum(height, width).to(tl.int32)
    line = first + tl.arange(0, LINES)
    along = tl.arange(0, ALONG)
    exists = line < size
    sums = tl.zeros((LINES, ALONG), tl.float64)
    for begin in range(0, length, ALONG):
        to = begin + along
        if WIDE_LINES:
            offsets = line[:, None].to(tl.int64) * ld + to[None, :]
        else:
            offsets = line[:, None] + to[None, :].to(tl.int64) * ld
        mask = exists[:, None] & (to < length)[None, :]
        value = tl.load(x + start + offsets, mask=mask, other=0.0).to(tl.float64)
        sums += value * value
    base = tl.load(places + matrix * PLACE_COLUMNS).to(tl.pointer_type(tl.float32))
    by_row = tl.load(places + matrix * PLACE_COLUMNS + 1)
    by_col = tl.load(places + matrix * PLACE_COLUMNS + 2)
    at_line = base + line.to(tl.int64) * by_row
    found = tl.zeros((LINES, ALONG), tl.int32)
    for begin in range(0, tl.minimum(size, first + LINES), ALONG):
        to = begin + along
        mask = exists[:, None] & (to[None, :] <= line[:, None])
        value = tl.load(at_line[:, None] + to[None, :].to(tl.int64) * by_col, mask=mask, other=0.0)
        found = tl.maximum(found, tl.where(tl.abs(value) < float("inf"), 0, 1))
    diagonal = tl.load(at_line + line.to(tl.int64) * by_col, mask=exists, other=0.0)
    total = weight * tl.sum(sums, 1) + beta * tl.abs(diagonal.to(tl.float64))
    fits = tl.where(total <= limit, 0, 1)
    if tl.max(tl.maximum(tl.max(found, 1), fits), 0) > 0:
        tl.store(state + matrix, NONFINITE)


@triton.jit
def _adam_kernel(
    x, out, layout, chunks, state, momenta, squares, beta1, fresh1, beta2, fresh2, eps,
    MOMENTUM: tl.constexpr, MOMENTUM_UNIT: tl.constexpr, SQUARE: tl.constexpr,
    SQUARE_UNIT: tl.constexpr, CHUNK_ROWS: tl.constexpr, CHUNK_COLS: tl.constexpr,
):  # fmt: skip
    # Moments over roots of squares, both of which are marked where they are not finite.
    matrix, row, col, inside = chunk_of(chunks, layout, MOMENTUM_UNIT, CHUNK_ROWS, CHUNK_COLS)
    rows = tl.arange(0, CHUNK_ROWS)
    cols = tl.arange(0, CHUNK_COLS)
    value = of_wide(x, layout, matrix, row, col, CHUNK_ROWS, CHUNK_COLS)
    at = placed(momenta, matrix, 0, row, col, rows, cols, MOMENTUM, MOMENTUM_UNIT)
    m = widened(tl.load(at, mask=inside, other=0.0))
    at = placed(squares, matrix, 0, row, col, rows, cols, SQUARE, SQUARE_UNIT)
    v = widened(tl.load(at, mask=inside, other=0.0))
    m = beta1 * m + fresh1 * value
    v = beta2 * v + fresh2 * (value * value)
    finite = (tl.abs(m) < float("inf")) & (tl.abs(v) < float("inf"))
    if tl.max(tl.where(finite, 0, 1)) > 0:
        tl.store(state + matrix, NONFINITE)
    divisor = tl.sqrt(v) + eps
    update = tl.where(divisor == 0.0, 0.0, m / tl.where(divisor == 0.0, 1.0, divisor))
    put_wide(update, out, layout, matrix, row, col, CHUNK_ROWS, CHUNK_COLS)


@triton.jit
def outer_of(lines, starts, layout, matrix, rows, cols):
    """The product of a number a row and one a column, 0 outside of the matrix."""
    height = element(layout, matrix, ROWS, COLUMNS)
    width = element(layout, matrix, COLS, COLUMNS)
    tall = element(layout, matrix, TALL, COLUMNS)
    # Lines of the shorter side come first.
    first = tl.load(starts + matrix)
    row_start = first + tl.where(tall != 0, width, 0)
    col_start = first + tl.where(tall != 0, 0, height)
    by_row = tl.load(lines + row_start + rows, mask=rows < height, other=0.0)
    by_col = tl.load(lines + col_start + cols, mask=cols < width, other=0.0)
    return by_row[:, None] * by_col[None, :]


@triton.jit
def _new_params(old, update, rates, keeps, matrix):
    return tl.load(keeps + matrix) * old - tl.load(rates + matrix) * update


@triton.jit
def _look_kernel(
    update, layout, chunks, state, params, rates, keeps,
    PARAM: tl.constexpr, UNIT: tl.constexpr, CHUNK_ROWS: tl.constexpr, CHUNK_COLS: tl.constexpr,
):  # fmt: skip
    # Marks where a new parameter would not be finite.
    matrix, row, col, inside = chunk_of(chunks, layout, UNIT, CHUNK_ROWS, CHUNK_COLS)
    rows = tl.arange(0, CHUNK_ROWS)
    cols = tl.arange(0, CHUNK_COLS)
    value = of_wide(update, layout, matrix, row, col, CHUNK_ROWS, CHUNK_COLS)
    at = placed(params, matrix, 0, row, col, rows, cols, PARAM, UNIT)
    new = _new_params(widened(tl.load(at, mask=inside, other=0.0)), value, rates, keeps, matrix)
    # What lies outside is 0.
    if tl.max(tl.where(tl.abs(new) < infinite_from(PARAM), 0, 1)) > 0:
        tl.store(state + matrix, NONFINITE)


@triton.jit
def _write_kernel(
    update, x, layout, chunks, state, params, momenta, squares, rates, keeps, steps, lines, starts,
    beta1, fresh1, beta2, fresh2,
    PARAM: tl.constexpr, UNIT: tl.constexpr, MOMENTUM: tl.constexpr, MOMENTUM_UNIT: tl.constexpr,
    SQUARE: tl.constexpr, SQUARE_UNIT: tl.constexpr, SQUARES: tl.constexpr, OUTER: tl.constexpr,
    CHUNK_ROWS: tl.constexpr, CHUNK_COLS: tl.constexpr,
):  # fmt: skip
    # Parameters and moments of what is finite throughout.
    matrix, row, col, inside = chunk_of(chunks, layout, UNIT, CHUNK_ROWS, CHUNK_COLS)
    rows = tl.arange(0, CHUNK_ROWS)
    cols = tl.arange(0, CHUNK_COLS)
    inside = provided(inside, tl.load(state + matrix) != NONFINITE)
    value = of_wide(update, layout, matrix, row, col, CHUNK_ROWS, CHUNK_COLS)
    at = placed(params, matrix, 0, row, col, rows, cols, PARAM, UNIT)
    new = _new_params(widened(tl.load(at, mask=inside, other=0.0)), value, rates, keeps, matrix)
    tl.store(at, narrowed(new, PARAM), mask=inside)
    value = of_wide(x, layout, matrix, row, col, CHUNK_ROWS, CHUNK_COLS)
    at_m = placed(momenta, matrix, 0, row, col, rows, cols, MOMENTUM, MOMENTUM_UNIT)
    m = widened(tl.load(at_m, mask=inside, other=0.0))
    new = beta1 * m + fresh1 * value
    if tl.bfloat16 == MOMENTUM:
        new = rounded_at_random(new, tl.load(steps + matrix), row + rows, col + cols)
    tl.store(at_m, new, mask=inside)
    if SQUARES:
        at_v = placed(squares, matrix, 0, row, col, rows, cols, SQUARE, SQUARE_UNIT)
        v = widened(tl.load(at_v, mask=inside, other=0.0))
        if OUTER:
            value = outer_of(lines, starts, layout, matrix, row + rows, col + cols)
        else:
            value = value * value
        new = beta2 * v + fresh2 * value
        if tl.bfloat16 == SQUARE:
            new = rounded_at_random(new, tl.load(steps + matrix), row + rows, col + cols)
        tl.store(at_v, new, mask=inside)


@triton.jit
def _power(base, exponent):
    """base^exponent in fp64, of an int64 that is not negative."""
    result = tl.full(exponent.shape, 1.0, tl.float64)
    for _ in range(0, _BITS):
        result = tl.where((exponent & 1) == 1, result * base, result)
        base *= base
        exponent = exponent >> 1
    return result


@triton.jit(do_not_specialize=("size", "stride"))
def _rates_kernel(
    steps, betas, lr, out, size, stride, rate, kept, decay,
    LR_LOADED: tl.constexpr, TIMES_KEPT: tl.constexpr, BIAS: tl.constexpr,
    FIRST: tl.constexpr, SECOND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # Of every slot: what an update is multiplied by, what of a parameter is kept, and what the
    # moments are multiplied by.
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    t = tl.load(steps + at, mask=inside, other=0) + 1
    first = 1.0 - _power(tl.load(betas), t)
    second = 1.0 - _power(tl.load(betas + 1), t)
    ones = tl.full((BLOCK,), 1.0, tl.float64)
    if LR_LOADED:
        loaded = tl.load(lr).to(tl.float64)
        stays = ones - loaded * decay
        by = loaded * (stays if TIMES_KEPT else ones)
    else:
        stays = kept * ones
        by = rate * ones
    if BIAS:
        by *= tl.sqrt(second) / first
    tl.store(out + at, by.to(tl.float32), mask=inside)
    tl.store(out + stride + at, stays.to(tl.float32), mask=inside)
    by = 1.0 / first if FIRST else ones
    tl.store(out + 2 * stride + at, by.to(tl.float32), mask=inside)
    by = 1.0 / second if SECOND else ones
    tl.store(out + 3 * stride + at, by.to(tl.float32), mask=inside)
