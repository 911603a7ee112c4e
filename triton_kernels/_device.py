"""What all kernels share: numbers, products and launches, alike on cards and in the interpreter."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Triton decides at import whether functions are compiled or interpreted.
IS_INTERPRETED: bool = triton.knobs.runtime.interpret
INTERPRETED = tl.constexpr(IS_INTERPRETED)

DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}

# Units: which of a matrix's strides is 1, as kernels know it when they are compiled. STRIDED has
# neither, or another stride that is too large for 32 bits.
COLUMN_MAJOR = tl.constexpr(0)
ROW_MAJOR = tl.constexpr(1)
STRIDED = tl.constexpr(2)
# Added to the unit of matrices of which addresses, strides and the length of contiguous lines are
# multiples of 16.
ALIGNED = 4
ALIGNED_UNIT = tl.constexpr(ALIGNED)
ALIGNED_COLUMN_MAJOR = tl.constexpr(ALIGNED + 0)
ALIGNED_ROW_MAJOR = tl.constexpr(ALIGNED + 1)

# Columns of a table of places: address, row stride, column stride.
PLACE_COLUMNS = tl.constexpr(3)
# Of a workspace layout's table, which `_layout` describes: where the offsets of its spaces begin.
LAYOUT_COLUMNS = tl.constexpr(9)
FIRST_OFFSET = tl.constexpr(3)

# States of a matrix.
ZERO = tl.constexpr(0)
NORMAL = tl.constexpr(1)
NONFINITE = tl.constexpr(2)
# The new parameter may be out of range: it is looked at before anything is written.
DOUBTFUL = tl.constexpr(3)
# It took no step, and was not skipped.
IDLE = tl.constexpr(4)

_launches = 0
_reads = 0


def launch(kernel: Any, programs: int, *args: Any, **options: Any) -> None:
    """Runs `kernel` on a one-dimensional grid; no programs, no launch."""
    global _launches
    if programs:
        _launches += 1
        kernel[(programs,)](*args, **options)


def launches() -> int:
    """Kernels of this room that were launched since the start."""
    return _launches


def read(x: Tensor) -> list[Any]:
    """What is on the device, waited for; nothing else in this room's refreshes waits."""
    global _reads
    _reads += 1
    found: list[Any] = x.tolist()
    return found


def reads() -> int:
    """How often the device was waited for by `read` since the start."""
    return _reads


@triton.jit
def narrowed(x, dtype: tl.constexpr):
    """fp32 to a storage dtype, to the nearest."""
    if INTERPRETED and dtype == tl.bfloat16:
        # The interpreter truncates.
        bits = x.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        bits = tl.where(x == x, nearest, 0x7FC0)
        return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def widened(x):
    """A storage dtype to fp32, exactly."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        # The interpreter loses subnormal numbers.
        bits = x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        return bits.to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def _mixed(x):
    # uint32 wraps; the specification has the numbers.
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def rounded_at_random(x, step, rows, cols):
    """fp32 to bfloat16, see `spectral_kernels.reference`; rows and columns are the matrix's own."""
    seed = _mixed(tl.full((1,), 0, tl.uint32) + step.to(tl.uint32))
    seed = _mixed(seed + rows.to(tl.uint32) * 0x9E3779B9)
    bits = x.to(tl.uint32, bitcast=True)
    place = seed[:, None] + (cols.to(tl.uint32) * 0x9E3779B9)[None, :]
    noise = _mixed(place ^ (bits >> 16)) >> 16
    size = bits & 0x7FFFFFFF
    quiet = tl.where(size > 0x7F800000, bits | 0x400000, bits)
    kept = tl.where(size >= 0x7F7F0000, quiet, bits + noise) >> 16
    return kept.to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def multiplied(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b in fp32."""
    if INTERPRETED:
        # The interpreter takes the bits of bf16 for integers, and knows one precision.
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def exponent_of(x):
    """e with 2^e <= x < 2^(e + 1) of fp32 x > 0, subnormal ones too."""
    small = x < 7.888609052210118e-31  # 2^-100
    normal = tl.where(small, x * 1.2676506002282294e30, x)
    field = (normal.to(tl.int32, bitcast=True) >> 23) & 0xFF
    return field - 127 - tl.where(small, 100, 0)


@triton.jit
def _power_of_two(e):
    return ((e + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def scaled(x, e):
    """x 2^e in two factors, each in range; exact where the result is normal."""
    half = e >> 1
    return x * _power_of_two(half) * _power_of_two(e - half)


@triton.jit
def element(table, matrix, column: tl.constexpr, columns: tl.constexpr):
    """table[matrix, column] of a contiguous table."""
    return tl.load(table + matrix * columns + column)


@triton.jit
def tile_of(table):
    """(matrix, row, column) of this program in a table of tiles or chunks."""
    at = table + tl.program_id(0) * 3
    return tl.load(at).to(tl.int64), tl.load(at + 1), tl.load(at + 2)


@triton.jit
def span_of(spans, matrix):
    """(first, count) of a matrix in a table of spans."""
    return tl.load(spans + matrix * 2), tl.load(spans + matrix * 2 + 1)


@triton.jit
def block_of(m, n, blocks, across, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """A program's block of a contiguous batch: matrix, rows and columns, places, which exist."""
    matrix = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    rows = block // across * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    cols = block % across * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    inside = (rows < m)[:, None] & (cols < n)[None, :]
    at = matrix * m * n + rows[:, None].to(tl.int64) * n + cols[None, :]
    return matrix, rows, cols, at, inside


def blocks_of(m: int, n: int, block_rows: int, block_cols: int) -> tuple[int, int]:
    """How many blocks a matrix has, and how many of them stand side by side."""
    across = -(-n // block_cols)
    return across * -(-m // block_rows), across


@triton.jit
def corner(layout, matrix, SPACE: tl.constexpr):
    """Offset and leading dimension of a matrix in a workspace.

    The hints have to stand where the numbers are loaded, or they are lost with the call.
    """
    at = layout + matrix * LAYOUT_COLUMNS + FIRST_OFFSET + 2 * SPACE
    start = tl.multiple_of(tl.load(at), 16)
    ld = tl.multiple_of(tl.load(at + 1).to(tl.int32), 16)
    return start, ld


@triton.jit
def placed(
    places, matrix, swapped, first_row, first_col, rows, cols,
    dtype: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Addresses of a tile of one of the caller's matrices, its rows and columns `swapped` or not.

    UNIT is what is known when compiling, see the units above.
    """
    at = places + matrix * PLACE_COLUMNS
    if UNIT >= ALIGNED_UNIT:
        base = tl.multiple_of(tl.load(at).to(tl.pointer_type(dtype)), 16)
        along = tl.multiple_of(tl.load(at + 1 + swapped), 16)
        across = tl.multiple_of(tl.load(at + 2 - swapped), 16)
    else:
        base = tl.load(at).to(tl.pointer_type(dtype))
        along = tl.load(at + 1 + swapped)
        across = tl.load(at + 2 - swapped)
    if UNIT == ROW_MAJOR or UNIT == ALIGNED_ROW_MAJOR:  # noqa: SIM109 - no tuples in kernels
        offsets = rows[:, None] * along.to(tl.int32) + cols[None, :]
        return base + (first_row * along + first_col) + offsets
    elif UNIT == COLUMN_MAJOR or UNIT == ALIGNED_COLUMN_MAJOR:  # noqa: SIM109
        offsets = rows[:, None] + cols[None, :] * across.to(tl.int32)
        return base + (first_row + first_col * across) + offsets
    else:
        rows = first_row + rows
        cols = first_col + cols
        return base + (rows[:, None] * along + cols[None, :] * across)


@triton.jit
def within(first, lanes, size, IN_16S: tl.constexpr = False):
    """Which lanes are below `size`, compared in 32 bits.

    With IN_16S both are multiples of 16, so that loads and stores under the mask are wide.
    """
    limit = tl.minimum(size - first, 1 << 30).to(tl.int32)
    if IN_16S:
        limit = tl.multiple_of(limit, 16)
    return lanes < limit


@triton.jit
def provided(mask, condition):
    """The mask where a condition on all of it holds, else nothing."""
    if INTERPRETED:
        # The interpreter of Triton 3.9 takes no mask that was combined with one number.
        return tl.where(condition, mask, mask & (mask == 0))
    else:
        return mask & condition
